"""LoRA (peft) on a compressed network: teach it one thing more, keep the adapter apart, switch it on and off.

    python examples/own_data.py
    python examples/lora.py [--model runs/example/student-tuned] [--steps 80]

The new thing is a picture whose left half is black and whose right half is white, in place of the first class.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch.nn.functional import mse_loss

from edgedit_hf.diffusion import Diffusion  # importing edgedit_hf lets diffusers find the classes


def loss_at(pipeline, generator: torch.Generator, batch: int = 32) -> torch.Tensor:
    """The loss that the network was trained with, on the new picture alone."""
    net, diffusion = pipeline.transformer, Diffusion(pipeline.transformer.config.prediction_type)
    channels, side = net.config.in_channels, net.config.sample_size
    target = torch.ones(batch, channels, side, side)
    target[..., : side // 2] = -1.0
    noise = torch.randn(target.shape, generator=generator)
    t = diffusion.timesteps(torch.rand(batch, generator=generator))
    prediction = net(diffusion.noisy(target, noise, t), t, torch.zeros(batch, dtype=torch.long)).sample
    return mse_loss(prediction, diffusion.target(target, noise))


def held_out(pipeline) -> float:
    return loss_at(pipeline, torch.Generator().manual_seed(1), 256).item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/example/student-tuned"))
    parser.add_argument("--steps", type=int, default=80)
    model, steps = vars(parser.parse_args()).values()
    pipeline = DiffusionPipeline.from_pretrained(model)
    net, before = pipeline.transformer, held_out(pipeline)
    net.requires_grad_(False)
    net.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_qkv", "to_out", "proj_in", "proj_out"]), "halves")
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer, draws = torch.optim.AdamW(trained, lr=1e-2), torch.Generator().manual_seed(0)
    for _ in range(steps):
        loss_at(pipeline, draws).backward()
        optimizer.step()
        optimizer.zero_grad()
    after, count = held_out(pipeline), sum(parameter.numel() for parameter in trained)
    net.disable_adapters()
    assert abs(held_out(pipeline) - before) < 1e-6, "the network itself must not have changed"
    net.enable_adapters()
    with tempfile.TemporaryDirectory() as folder:  # load_lora_adapter reads it again; fuse_lora merges it for an export
        net.save_lora_adapter(folder, adapter_name="halves")
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    print(f"loss {before:.3f} -> {after:.3f} by {count:,} of {net.num_parameters():,} parameters, {size / 1e3:.0f} kB")
    assert after < 0.9 * before
