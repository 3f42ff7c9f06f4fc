"""What a step of supernet training draws: sub-networks, dropped texts and its micro-batches, as functions of (seed,
step, row) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..data.text_table import TextTable
from ..diffusion import Diffusion, draws
from ..run.sections import ElasticConfig

SUBNET_STREAM, TEXT_STREAM, VALIDATION_STREAM = (
    10,
    11,
    12,
)  # tell these numbers from the noise of training (see `diffusion.draws`)


def _generator(seed: int, stream: int, step: int, row: int = 0) -> np.random.Generator:
    return np.random.Generator(
        np.random.Philox(key=np.array([seed, stream], dtype=np.uint64), counter=[0, row, step, 0])
    )


def step_subnets(names: Sequence[str], seed: int, step: int, draw: str = "one") -> list[str]:
    """The sub-networks that a step trains beside the full net.

    Args:
        names: all of the supernet, the narrowest first, the full net last (none for a stand-alone net).
        draw: `"one"`, drawn uniformly from all but the full net (SnapGen++, section 3.2); or `"sandwich"`: the
            narrowest, and one drawn from the others (Yu & Huang, arXiv:1903.05134).
    """
    narrow = list(names[:-1])
    always, drawn = (narrow[:1], narrow[1:]) if draw == "sandwich" else ([], narrow)
    if not drawn:
        return always
    return [*always, drawn[int(_generator(seed, SUBNET_STREAM, step).integers(len(drawn)))]]


def text_uniforms(seed: int, step: int, rows: Sequence[int], encoders: int) -> torch.Tensor:
    """Uniform numbers `(B, encoders)` that decide which text encoder's tokens a row goes without.

    Args:
        rows: positions of the samples in the global batch.
    """
    numbers = [_generator(seed, TEXT_STREAM, step, int(row)).random(encoders) for row in rows]
    return torch.from_numpy(np.stack(numbers)).float()


def drop_texts(masks: Sequence[torch.Tensor], uniforms: torch.Tensor, probability: float) -> list[torch.Tensor]:
    """The masks `(B, T_i)` with the tokens of dropped encoders taken out, each encoder on its own: all are absent in
    probability^encoders.

    Args:
        uniforms: of [`text_uniforms`], `(B, encoders)`.
    """
    kept = uniforms >= probability
    return [mask.bool() & kept[:, i : i + 1].to(mask.device) for i, mask in enumerate(masks)]


class MicroBatch(NamedTuple):
    """What every network of a step sees, on its device."""

    x0: torch.Tensor  # (B, C, H, W)
    noise: torch.Tensor
    t: torch.Tensor  # (B,)
    noisy: torch.Tensor
    text: list[torch.Tensor | None]  # (B, T_i, D_i) an encoder
    masks: list[torch.Tensor | None]  # (B, T_i)
    rows: torch.Tensor  # (B,) of the data set

    @property
    def without_text(self) -> torch.Tensor:
        """(B,) bool: rows whose every text was dropped."""
        return ~torch.stack([mask.any(1) for mask in self.masks if mask is not None]).any(0)


def micro_batches(
    batch: dict, texts: TextTable, rows: list[int], step: int, seed: int, options: ElasticConfig, device
) -> list[MicroBatch]:
    """A rank's part of a step's batch with noise, timesteps and dropped texts, in `gradient_accumulation` pieces."""
    diffusion, count = Diffusion("flow_prediction"), options.gradient_accumulation
    drawn = draws(seed, step, rows, batch["images"].shape[1:])
    text, masks = texts.batch(batch["rows"])
    masks = drop_texts(masks, text_uniforms(seed, step, rows, len(masks)), options.text_dropout)
    t = diffusion.timesteps(drawn.time)
    tensors = batch["images"], drawn.noise, t, diffusion.noisy(batch["images"], drawn.noise, t)

    def pieces(tensor: torch.Tensor | None) -> list[torch.Tensor | None]:
        return [None] * count if tensor is None else list(tensor.to(device).chunk(count))

    by_tensor = [
        *map(pieces, tensors),
        *([list(part) for part in zip(*map(pieces, parts))] for parts in (text, masks)),
        pieces(batch["rows"]),
    ]
    return [MicroBatch(*values) for values in zip(*by_tensor)]
