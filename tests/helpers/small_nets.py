"""A network, its optimiser and its average, and steps that are functions of their number."""

import torch
from diffusers.training_utils import EMAModel

from edgedit_hf.diffusion import draws


def optimised(steps: int = 3):
    """A small network with an optimiser and an average that have seen some steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    ema = EMAModel(model.parameters(), decay=0.9)
    for step in range(steps):
        train_step(model, optimizer, ema, step)
    return model, optimizer, ema


def train_step(model, optimizer, ema, step: int) -> torch.Tensor:
    noise = draws(0, step, range(16), (4,)).noise
    loss = (model(noise) - noise.roll(1, dims=1)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    ema.step(model.parameters())
    return loss
