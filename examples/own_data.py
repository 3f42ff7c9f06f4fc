"""Your own images: compress a diffusion transformer for a folder of pictures, from nothing to a report.

    python examples/own_data.py [--images FOLDER] [--output runs/example]

FOLDER has a sub-folder a class. Without it 80 dark and bright pictures of 8 x 8 pixels are drawn. The sizes are for
seconds on a laptop; `edgedit init --data FOLDER` writes a recipe in earnest, every key explained.
"""

import argparse
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

import edgedit_hf
from edgedit_hf.run.config import load_config
from edgedit_hf.run.launch import make_accelerator
from edgedit_hf.training import compress

RECIPE = """
output_dir: {output}
data: {{source: {images}, resolution: 8}}
teacher: {{hidden_size: 32, num_layers: 4, num_heads: 2, steps: 150, batch_size: 32, warmup_steps: 10}}
bank: {{calibration_samples: 64, steps: 20, both_steps: 10, batch_size: 16, warmup_steps: 2}}
student: {{genotype: {output}/genotype.json}}  # given, so that no latency is measured and nothing searched
tune: {{steps: 60, batch_size: 32, warmup_steps: 5, teacher_more_steps: false}}
sampling: {{steps: 10}}
export: {{dtypes: [int8], tolerance: 0.2}}
evaluate: {{samples: 64, batch_size: 64, extractor_steps: 20, grid: 4, latency_repeats: 5}}
"""


def draw_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for label, middle in {"dark": 60, "bright": 190}.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(40):
            Image.fromarray(np.uint8(rng.normal(middle, 15, (8, 8)).clip(0, 255))).save(folder / label / f"{i}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/example"))
    given, output = vars(parser.parse_args()).values()
    if given is None:
        draw_images(output / "images")
    # What the student's layers are: the smallest of the space, which merges both pairs of the teacher's four.
    (output / "genotype.json").write_text(edgedit_hf.SearchSpace(4, 32, 2).ends()[0].to_json())
    (output / "run.yaml").write_text(RECIPE.format(output=output, images=given or output / "images"))
    config = load_config(output / "run.yaml")
    compress.run(config, make_accelerator(config))  # what `edgedit train compress --config run.yaml` does

    teacher, student = (DiffusionPipeline.from_pretrained(output / name) for name in ("teacher", "student-tuned"))
    print(f"{student.transformer.num_parameters() / teacher.transformer.num_parameters():.0%} of the teacher's weights")
    if given is None:
        means = [np.mean(student(class_labels=[name] * 8, output_type="np").images) for name in ("dark", "bright")]
        print(f"mean brightness of what the student draws: dark {means[0]:.2f}, bright {means[1]:.2f}")
        assert means[0] + 0.2 < means[1], "the student does not know its classes apart"
