"""Somebody else's pipeline: how far its pictures are from real ones, beside how far real ones are from each other.

    python examples/evaluate_other.py [--pipeline PATH_OR_ID] [--samples 256]

Any pipeline of diffusers that draws grey pictures of 8 x 8 without being told what (its call takes batch_size); without
one a small untrained DDPM stands for it. Distances are in the features of a classifier of digits: compare them with
nothing that was measured with another one, with other pictures, or with another number of them.
"""

import argparse

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

from edgedit_hf.data.digits import load_digit_images
from edgedit_hf.metrics.distances import frechet_distance, precision_recall
from edgedit_hf.metrics.extractors import train_classifier


def untrained_ddpm() -> DDPMPipeline:
    torch.manual_seed(0)
    blocks = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8, **blocks)
    return DDPMPipeline(unet, DDPMScheduler())


def main(name: str | None, samples: int) -> None:
    pipeline = untrained_ddpm() if name is None else DiffusionPipeline.from_pretrained(name)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        batch_size=samples, num_inference_steps=10, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    theirs = torch.from_numpy(np.asarray(drawn)).permute(0, 3, 1, 2).float() * 2 - 1  # [n, 1, 8, 8] in [-1, 1]

    digits = load_digit_images(resolution=None, channels=1, labelled=True)
    order = np.random.default_rng(0).permutation(len(digits))
    held_out, others = order[:samples], order[samples:]
    extractor = train_classifier(digits.subset(others), steps=150)  # never sees the held-out pictures
    real = extractor.features(digits.batch(others)["images"])

    print(f"{samples} pictures in the features of {extractor.name}, accuracy {extractor.accuracy:.1%}")
    print(f"{'':<24}{'Fréchet distance':>18}{'precision':>11}{'recall':>8}")
    distances = {}
    for label, images in {"real, held out": digits.batch(held_out)["images"], "the pipeline": theirs}.items():
        features = extractor.features(images)
        distances[label] = frechet_distance(features, real)
        precision, recall = precision_recall(real, features)
        print(f"{label:<24}{distances[label]:>18.2f}{precision:>11.3f}{recall:>8.3f}")
    assert distances["real, held out"] < distances["the pipeline"], "nothing is nearer to real pictures than others"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", dest="name", metavar="PATH_OR_ID")
    parser.add_argument("--samples", type=int, default=256)
    main(**vars(parser.parse_args()))
