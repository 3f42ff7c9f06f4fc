"""Your own teacher: a diffusers DiT, converted, taken apart into proxy blocks and put together as a smaller student.

    python examples/own_teacher.py [--teacher PATH_OR_ID] [--output runs/example-teacher]

PATH_OR_ID has diffusers' DiTTransformer2DModel, for one channel of 8 x 8. Without it a small random one is made.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel

import edgedit_hf
from edgedit_hf.pipelines.loading import load_original_pipeline
from edgedit_hf.run.config import load_config
from edgedit_hf.run.launch import make_accelerator
from edgedit_hf.training import distill_proxies, select_student

RECIPE = """
output_dir: {output}
data: {{source: digits}}
teacher: {{path: {output}/converted}}
bank: {{calibration_samples: 64, steps: 30, both_steps: 15, batch_size: 16, warmup_steps: 4}}
student: {{genotype: {output}/genotype.json}}
"""
SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 4, "num_embeds_ada_norm": 10}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher")
    parser.add_argument("--output", type=Path, default=Path("runs/example-teacher"))
    teacher, output = vars(parser.parse_args()).values()
    if teacher is None:
        teacher = output / "theirs"
        theirs = DiTTransformer2DModel(**SIZES, in_channels=1, out_channels=1, sample_size=8)
        for block in theirs.transformer_blocks:  # every layer has a copy of the embedders, equal ones after training
            block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
        theirs.save_pretrained(teacher)
    converted = load_original_pipeline(teacher, numerics="diffusers")  # else: what DiT's own code computes
    theirs = DiTTransformer2DModel.from_pretrained(teacher).eval()
    x, t, label = torch.randn(2, 1, 8, 8), torch.tensor([10, 900]), torch.tensor([3, 7])
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=label).sample
        torch.testing.assert_close(converted.transformer(x, t, label).sample, expected, rtol=1e-3, atol=1e-4)
    converted.save_pretrained(output / "converted")

    _, smallest = edgedit_hf.SearchSpace.for_config(converted.transformer.config).ends()  # a search finds better ones
    (output / "genotype.json").write_text(smallest.to_json())
    (output / "run.yaml").write_text(RECIPE.format(output=output))
    for stage in (distill_proxies, select_student):  # edgedit train bank, edgedit train student
        stage.run(config := load_config(output / "run.yaml"), make_accelerator(config))

    entries = json.loads((output / "bank" / "index.json").read_text())["entries"].values()
    random, after = ([entry["losses"][key] for entry in entries] for key in ("random", "after"))
    assert all(a < b for a, b in zip(after, random))
    print(f"{len(after)} proxies; losses add up to {sum(random):.2f} at random, to {sum(after):.2f} distilled")
    student = edgedit_hf.EdgeDiTPipeline.from_pretrained(output / "student")
    assert student.transformer.num_parameters() < converted.transformer.num_parameters()
