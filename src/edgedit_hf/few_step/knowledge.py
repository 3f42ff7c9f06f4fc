"""The teacher's knowledge of where the student's own x_t leads: the chord of a few guided steps of the many-step net,
or the velocity of a teacher that needs few steps itself.

Unlike a trained few-step teacher (SnapGen++, arXiv:2601.08303, section 3.3) the chord needs no second training and no
download, and it is taken at every one of the student's steps, on the student's own way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..diffusion import Diffusion
from .losses import chord, on_flow

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`(x_t, t (B,)) → output`."""


def substeps(t: float, to: float | None, count: int, whole: bool) -> list[float]:
    """So many timesteps from t towards `to` (`None`: clean data), evenly, without the end; `whole`: integers, fewer where
    there are no more.
    """
    end = 0.0 if to is None else to
    found = [t + (end - t) * index / count for index in range(count)]
    if whole:
        found = list(dict.fromkeys(float(round(value)) for value in found))
        found = [value for value in found if value > end or value == t]
    return found


@torch.no_grad()
def chord_velocity(
    predict: Predict, diffusion: Diffusion, x_t: torch.Tensor, t: float, to: float | None, count: int
) -> torch.Tensor:
    """Velocity `(B, C, H, W)` of the straight line from x_t to where `count` deterministic steps of a net lead, on the
    flow's path.

    With one step of a flow net that is its velocity at x_t.
    """
    places = substeps(t, to, count, diffusion.prediction_type == "epsilon")
    x = x_t
    for place, then in zip(places, [*places[1:], to]):
        now, goal = _rows(place, x), None if then is None else _rows(then, x)
        x = diffusion.move(predict(x, now), x, now, goal)
    now = _rows(t, x_t)
    start, level = on_flow(x_t, *diffusion.alpha_sigma(now, x_t)), diffusion.noise_level(now)
    if to is None:
        return chord(start, x, level, torch.zeros_like(level))
    goal = _rows(to, x)
    return chord(start, on_flow(x, *diffusion.alpha_sigma(goal, x)), level, diffusion.noise_level(goal))


def _rows(t: float, like: torch.Tensor) -> torch.Tensor:
    return torch.full((len(like),), int(t) if t == int(t) else t, device=like.device)
