"""Error-compensating rounding: GPTQ (Frantar et al., 2022, arXiv:2210.17323) for affine grids and for palettes.

The weights of an output are rounded one input after the other, and what rounding an input's weight changes in the
output is made up for by the weights that are still to come, as the second moments of the layer's inputs tell how inputs
stand in for one another. The result lies on the same grid as rounding to the nearest would give, so that every runtime
that takes the one takes the other.

Shapes: G groups of a convolution (1 for a linear layer), R outputs a group, n inputs an output sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import EdgeDiTError
from .affine import affine_weight, grid, round_to_grid
from .kmeans import nearest
from .packing import pack
from .quantize import quantize_palette, quantize_weight
from .weights import AffineWeight, PaletteWeight, QuantizedWeight, complete_spec, matrix_shape

BLOCK = 128  # inputs whose effect on the later ones is applied at once


def compensated_rounding(
    weight: torch.Tensor,
    moments: torch.Tensor,
    nearest: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    damping: float = 0.01,
) -> torch.Tensor:
    """Round a weight to a grid so that the squared error of the layer's output, not of the weight, is small.

    Args:
        weight: `(G, R, n)`.
        moments: `(G, n, n)`, mean of x·xᵀ over the inputs x. Inputs that are always zero are rounded to the nearest.
        nearest: `nearest(values (G, R), inputs (G,))` gives the grid's nearest values for the weights of one input a
            group.
        damping: added to the diagonal of the moments, as a share of its mean (the paper's 1 %).

    Returns:
        `(G, R, n)` float32, every value on the grid.

    Raises:
        EdgeDiTError: the moments are not finite.
    """
    groups, rows, inputs = weight.shape
    if moments.shape != (groups, inputs, inputs):
        raise EdgeDiTError(
            f"The weight has the shape {tuple(weight.shape)} and the moments {tuple(moments.shape)}; they must be "
            f"{(groups, inputs, inputs)}."
        )
    if not torch.isfinite(moments).all():
        raise EdgeDiTError(
            "The second moments of the layer's inputs are not finite; calibrate with a pipeline in float32."
        )
    hessian = moments.double()
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    unseen = diagonal <= 0
    # Inputs that matter most first, while there are still many others to make up for them.
    order = torch.argsort(diagonal, dim=1, descending=True, stable=True)  # [G, n]
    mean = diagonal.sum(1) / (~unseen).sum(1).clamp(min=1)
    hessian = hessian + torch.diag_embed(
        torch.where(unseen, torch.ones_like(diagonal), damping * mean[:, None] + 1e-30)
    )
    hessian = hessian.gather(1, order[:, :, None].expand(-1, -1, inputs)).gather(
        2, order[:, None].expand(-1, inputs, -1)
    )
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(
        inverse, upper=True
    ).float()  # its rows tell how an input's error spreads to later ones
    left = weight.float().gather(2, order[:, None].expand(-1, rows, -1))  # what is still to be rounded
    rounded = torch.empty_like(left)
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        errors = left.new_zeros(groups, rows, end - start)
        for index in range(start, end):
            column = left[:, :, index]
            value = nearest(column, order[:, index])
            rounded[:, :, index] = value
            error = (column - value) / factor[:, index, index, None]
            left[:, :, index:end] -= error[:, :, None] * factor[:, None, index, index:end]
            errors[:, :, index - start] = error
        left[:, :, end:] -= errors @ factor[:, start:end, end:]
    return torch.empty_like(rounded).scatter_(2, order[:, None].expand(-1, rows, -1), rounded)


def gptq(
    weight: torch.Tensor,
    moments: torch.Tensor,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    damping: float = 0.01,
) -> AffineWeight:
    """A weight on the affine grids of [`affine.quantize_affine`], rounded with compensation.

    Args:
        weight: `(O, …)`. moments: `(G, n, n)`, as [`calibration.second_moments`] gives them. damping: as in
            [`compensated_rounding`].
        bits, group_size, symmetric: as of an affine spec.
    """
    rows, columns = matrix_shape(tuple(weight.shape))
    matrix = weight.detach().float().reshape(rows, columns)
    groups, size = len(moments), min(group_size or columns, columns)
    scale, zero_point = grid(matrix, bits, group_size, symmetric)  # [O, groups of inputs]
    scales, zero_points = (part.float().unflatten(0, (groups, -1)) for part in (scale, zero_point))

    def nearest_value(values: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        place = (inputs // size)[:, None, None].expand(-1, values.shape[1], 1)
        step, zero = scales.gather(2, place)[..., 0], zero_points.gather(2, place)[..., 0]
        return (round_to_grid(values, step, zero, bits).float() - zero) * step

    rounded = compensated_rounding(matrix.unflatten(0, (groups, -1)), moments, nearest_value, damping).reshape(
        rows, columns
    )
    wide_scale, wide_zero = (part.repeat_interleave(size, dim=1)[:, :columns] for part in (scale, zero_point))
    return affine_weight(
        round_to_grid(rounded, wide_scale, wide_zero, bits),
        scale,
        zero_point,
        bits,
        group_size,
        symmetric,
        tuple(weight.shape),
    )


def gptq_palette(
    weight: torch.Tensor, moments: torch.Tensor, bits: int = 4, rows_per_palette: int = 16, damping: float = 0.01
) -> PaletteWeight:
    """A palettised weight: k-means in which a weight counts as much as its input's mean square, then rounding with
    compensation.

    Args:
        weight, moments, damping: as of [`gptq`]. bits, rows_per_palette: as of a palette spec.
    """
    rows, columns = matrix_shape(tuple(weight.shape))
    matrix = weight.detach().float().reshape(rows, columns)
    groups, size = len(moments), min(rows_per_palette or rows, rows)
    importance = moments.diagonal(dim1=1, dim2=2).float().mean(0)  # [n]
    # An input that was never seen still has weights that need entries.
    importance = importance.clamp(min=float(importance.mean()) * 1e-3 + 1e-30)
    palette = quantize_palette(weight, bits, rows_per_palette, importance).palette
    row_palette = palette.float()[torch.arange(rows, device=palette.device) // size]  # [O, K]

    def nearest_value(values: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        index = nearest(values.reshape(rows, 1), row_palette)
        return row_palette.gather(1, index.long()).reshape(values.shape)

    rounded = compensated_rounding(matrix.unflatten(0, (groups, -1)), moments, nearest_value, damping).reshape(
        rows, columns
    )
    return PaletteWeight(
        pack(nearest(rounded, row_palette), bits), palette, bits, rows_per_palette, tuple(weight.shape)
    )


def quantize_compensated(
    weight: torch.Tensor, spec: Mapping[str, Any], moments: torch.Tensor, damping: float = 0.01
) -> QuantizedWeight:
    """[`quantize.quantize_weight`] with compensation, of a palette or affine spec; NF4 is rounded to the nearest
    code.
    """
    spec = complete_spec(spec, tuple(weight.shape))
    if spec["scheme"] == "palette":
        return gptq_palette(weight, moments, spec["bits"], spec["rows_per_palette"], damping)
    if spec["scheme"] == "affine":
        return gptq(weight, moments, spec["bits"], spec["group_size"], spec["symmetric"], damping)
    return quantize_weight(weight, spec)
