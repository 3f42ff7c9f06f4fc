"""The timesteps of a few-step sampler, and the student's own way along them.

Flow: σ = shift · s / (1 + (shift − 1) s) of s = 1, 1 − 1/S, …, 1/S (Esser et al., arXiv:2403.03206): with shift 3 and
four steps 1, .9, .75, .5. DDPM: at its last timesteps nearly no signal is left (DiT's α is .0064 at 999), and x0 = (x −
σ ε) / α multiplies the network's error by 1/α. So the first step is the noisiest timestep that still has `first_signal`
of signal to noise, and the others divide what is left evenly, as DDIM does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..diffusion import TRAIN_TIMESTEPS, Diffusion
from ..errors import EdgeDiTError

MOST_STEPS = 8


def shifted(s: Any, shift: float) -> Any:
    """A noise level (or tensor of them) moved towards noise, 0 and 1 where they are: shift · s / (1 + (shift − 1) s).
    With 1 / shift it is the inverse.
    """
    return shift * s / (1 + (shift - 1) * s)


def few_step_timesteps(
    prediction_type: str,
    steps: int,
    shift: float = 3.0,
    first_signal: float = 0.16,
    timesteps: Sequence[float] | None = None,
) -> list[float]:
    """The timesteps of a few-step student on the scale 0 … 1000, falling; after the last comes clean data.

    Args:
        steps: how many, 1 to 8. shift: of the flow's. first_signal: α/σ of the first of DDPM's, at least.
        timesteps: given ones, in the place of all of these.

    Raises:
        EdgeDiTError: the given ones are not as many, do not fall, or are out of range.
    """
    epsilon = prediction_type == "epsilon"
    if not 1 <= steps <= MOST_STEPS:
        raise EdgeDiTError(f"few_step.sampling_steps is {steps}; it must be from 1 to {MOST_STEPS}.")
    if timesteps is None:
        fractions = [1 - index / steps for index in range(steps)]
        if not epsilon:
            return [round(TRAIN_TIMESTEPS * shifted(s, shift), 6) for s in fractions]
        t = torch.arange(TRAIN_TIMESTEPS)
        alpha, sigma = Diffusion("epsilon").alpha_sigma(t, t.float())
        first = int((alpha / sigma >= first_signal).sum()) - 1  # the signal falls with t
        if first < steps:
            raise EdgeDiTError(
                f"few_step.first_signal is {first_signal}, which the timesteps 0 … {first} have: too few for {steps} "
                "steps; lower it."
            )
        return [float(round(first * s)) for s in fractions]
    most = TRAIN_TIMESTEPS - 1 if epsilon else TRAIN_TIMESTEPS
    listed = [float(t) for t in timesteps]
    if len(listed) != steps:
        raise EdgeDiTError(
            f"few_step.timesteps holds {len(listed)} timesteps, but few_step.sampling_steps is {steps}; they must "
            "agree."
        )
    for before, after in zip(listed, listed[1:]):
        if after >= before:
            raise EdgeDiTError(f"few_step.timesteps must fall, but {after:g} follows {before:g}.")
    wrong = [t for t in listed if not 0 < t <= most or (epsilon and t != int(t))]
    if wrong:
        kind = "whole numbers" if epsilon else "numbers"
        raise EdgeDiTError(f"few_step.timesteps holds {wrong[0]:g}; they must be {kind} above 0, at most {most}.")
    return listed


def after(timesteps: Sequence[float], index: int, device: torch.device) -> torch.Tensor | None:
    """The timestep that a step leads to, `(1,)`; `None`: clean data."""
    return at(timesteps, index + 1, device) if index + 1 < len(timesteps) else None


def at(timesteps: Sequence[float], index: int, device: torch.device) -> torch.Tensor:
    """The timestep of a step, `(1,)`: integers stay such, as the tables of DDPM are indexed by them."""
    t = timesteps[index]
    return torch.tensor([int(t) if t == int(t) else t], device=device)


def walk(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    diffusion: Diffusion,
    x: torch.Tensor,
    timesteps: Sequence[float],
    steps: int,
    fresh_noise: Callable[[int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The sampler that ships, its first `steps` steps from noise x: what the student sees in use (backward simulation,
    DMD2, Yin et al., arXiv:2405.14867).

    Args:
        predict: `(x_t, t (B,)) → output`. fresh_noise: of every step, for a sampler that noises anew; default the
            deterministic one.
    """
    for index in range(steps):
        t = at(timesteps, index, x.device).expand(len(x))
        to = after(timesteps, index, x.device)
        to = None if to is None else to.expand(len(x))
        noise = None if fresh_noise is None or to is None else fresh_noise(index)
        x = diffusion.move(predict(x, t), x, t, to, noise)
    return x
