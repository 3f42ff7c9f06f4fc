"""Your own images: compress a diffusion transformer for a folder of pictures, from nothing to a report.

    python examples/own_data.py [--images FOLDER] [--output runs/example]

FOLDER has a sub-folder a class; without it dark and bright ones are drawn. In earnest: `edgedit init --data FOLDER`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import edgedit_hf
from edgedit_hf.run.config import load_config
from edgedit_hf.run.launch import make_accelerator
from edgedit_hf.training import compress

RECIPE = """
output_dir: {output}
data: {{source: {images}, resolution: 8}}
teacher: {{hidden_size: 32, num_layers: 4, num_heads: 2, prediction_type: flow_prediction, steps: 200, batch_size: 32,
          learning_rate: 3.0e-3, ema_decay: 0.97}}
bank: {{calibration_samples: 64, steps: 20, both_steps: 10, batch_size: 16, warmup_steps: 2}}
student: {{genotype: {output}/genotype.json}}  # given, so that no latency is measured and nothing searched
tune: {{steps: 120, batch_size: 32, learning_rate: 3.0e-3, ema_decay: 0.97, teacher_more_steps: false}}
export: {{dtypes: [int8], tolerance: 0.2}}
sampling: {{steps: 10}}
evaluate: {{samples: 64, batch_size: 64, extractor_steps: 20, grid: 4, latency_repeats: 5}}
"""


def draw_images(folder: Path) -> Path:
    for label, middle in {"dark": 60, "bright": 190}.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i, pixels in enumerate(np.random.default_rng(0).normal(middle, 15, (40, 8, 8)).clip(0, 255)):
            Image.fromarray(np.uint8(pixels)).save(folder / label / f"{i}.png")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/example"))
    given, output = vars(parser.parse_args()).values()
    output.mkdir(parents=True, exist_ok=True)
    images = given or draw_images(output / "images")
    (output / "genotype.json").write_text(edgedit_hf.SearchSpace(4, 32, 2).ends()[1].to_json())  # the smallest student
    (output / "run.yaml").write_text(RECIPE.format(output=output, images=images))
    compress.run(config := load_config(output / "run.yaml"), make_accelerator(config))  # as edgedit train compress

    teacher, student = (DiffusionPipeline.from_pretrained(output / name) for name in ("teacher", "student-tuned"))
    print(f"{student.transformer.num_parameters() / teacher.transformer.num_parameters():.0%} of the teacher's weights")
    if given is None:
        images = student(["dark", "bright"] * 64, output_type="np", generator=torch.manual_seed(0)).images
        means = images[::2].mean(), images[1::2].mean()
        print(f"mean brightness of what the student draws: dark {means[0]:.2f}, bright {means[1]:.2f}")
        assert means[0] + 0.2 < means[1], "the student does not know its classes apart"
