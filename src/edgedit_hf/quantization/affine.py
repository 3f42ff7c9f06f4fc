"""Even grids for weights: a scale (and a zero point) for every output row and group of inputs; rounding to the nearest
grid point.
"""

from __future__ import annotations

import torch

from .packing import pack
from .weights import AffineWeight

_SMALLEST = 2.0**-24  # of float16


def grid(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Grids that just hold every group's weights.

    Args:
        weight: `(O, n)`.
        group_size: inputs a group (the last may be shorter); 0: all.

    Returns:
        Scale, float16 `(O, G)`, and zero point, uint8 `(O, G)`. Values v mean scale · (v − zero point), v = 0 … 2^bits
        − 1. A symmetric grid has the zero point 2^(bits − 1), and so reaches one step further down than up; the others
        always hold 0 exactly.
    """
    size = min(group_size or weight.shape[1], weight.shape[1])
    groups = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % size)).unflatten(
        1, (-1, size)
    )  # a padded 0 is on every grid
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    levels = (1 << bits) - 1
    if symmetric:
        middle = 1 << (bits - 1)
        scale = torch.maximum(high / (middle - 1), -low / middle)
        scale = scale.clamp(min=_SMALLEST).half()
        return scale, torch.full_like(scale, middle, dtype=torch.uint8)
    scale = ((high - low) / levels).clamp(min=_SMALLEST).half()
    return scale, (-low / scale.float()).round().clamp(0, levels).to(torch.uint8)


def round_to_grid(weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    """Nearest grid values, uint8, of weights; scale and zero point of [`grid`], broadcast to the weights' shape."""
    return (weight.float() / scale.float() + zero_point.float()).round().clamp(0, (1 << bits) - 1).to(torch.uint8)


def affine_weight(
    values: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    shape: tuple[int, ...],
) -> AffineWeight:
    """Pack grid values uint8 `(O, n)` and their grids `(O, G)` as [`grid`] makes them."""
    return AffineWeight(
        pack(values, bits), scale, None if symmetric else pack(zero_point, bits), bits, group_size, tuple(shape)
    )


def quantize_affine(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool) -> AffineWeight:
    """Round a weight `(O, …)` to the nearest points of its own grids."""
    matrix = weight.detach().flatten(1)
    scale, zero_point = grid(matrix, bits, group_size, symmetric)
    size = min(group_size or matrix.shape[1], matrix.shape[1])
    wide_scale, wide_zero = (part.repeat_interleave(size, dim=1)[:, : matrix.shape[1]] for part in (scale, zero_point))
    return affine_weight(
        round_to_grid(matrix, wide_scale, wide_zero, bits), scale, zero_point, bits, group_size, symmetric, weight.shape
    )
