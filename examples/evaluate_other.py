"""Somebody else's pipeline: how far its pictures are from real ones, beside how far some real ones are from all.

    python examples/evaluate_other.py [--pipeline PATH_OR_ID] [--samples 200] [--output runs/example-score]

Any pipeline of diffusers that draws grey pictures of 8 x 8; without one a small untrained DDPM stands for it. Distances
are in the features of a classifier of digits that is trained first: compare them with nothing that was measured with
another extractor, against other pictures, or with another number of them. It is `edgedit train score` from Python.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from edgedit_hf.data.datasets import to_bytes
from edgedit_hf.data.digits import load_digit_images
from edgedit_hf.metrics.extractors import train_classifier
from edgedit_hf.run.launch import accelerator_of
from edgedit_hf.training import score


def untrained_ddpm() -> DDPMPipeline:
    torch.manual_seed(0)
    blocks = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8, **blocks)
    return DDPMPipeline(unet, DDPMScheduler())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", metavar="PATH_OR_ID")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("runs/example-score"))
    pipeline, samples, output = vars(parser.parse_args()).values()
    if pipeline is None:
        pipeline = output / "theirs"
        untrained_ddpm().save_pretrained(pipeline)
    digits = load_digit_images(resolution=None, channels=1, labelled=True)
    train_classifier(digits, steps=150).save(output / "extractor")
    some = digits.batch(np.random.default_rng(0).permutation(len(digits))[:samples])["images"]
    np.savez(output / "real.npz", arr_0=to_bytes(some).permute(0, 2, 3, 1).numpy())  # the layout of ADM's evaluator

    distances = {}
    for name, model, steps in ("real", output / "real.npz", []), ("drawn", pipeline, ["--steps", "10"]):
        print(f"{name}:")
        options = f"--reference digits --extractor {output}/extractor --samples {samples} --output {output}/{name}"
        score.run(score.parse([str(model), *options.split(), *steps]), accelerator_of(0))
        metrics = json.loads((output / name / "result.json").read_text())["metrics"]
        distances[name] = next(value for key, value in metrics.items() if key.startswith("fid["))
    assert distances["real"] < distances["drawn"], "nothing is nearer to real pictures than others of them"
