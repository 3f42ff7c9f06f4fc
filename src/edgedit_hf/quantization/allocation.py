"""Which layer gets how many bits: the error of the network's output when one layer alone is quantised, and the best
choice within a budget.

SnapGen++ (arXiv:2601.08303, supplement): most layers have 4 bits, those whose quantisation changes the network's output
most have 8, so that the average is 4.3. Here that choice is a multiple-choice knapsack problem, solved to optimality:
each layer takes one of its candidates, the true stored bits (indices, palettes, scales) stay within the budget, and the
sum of the layers' errors is least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import EdgeDiTError
from .calibration import ModelCall, OutputError, output_error
from .weights import matrix_shape

PALETTE_SHARES = (
    0.05,
    0.2,
)  # bits a weight that 4-bit palettes may add, for the candidates between one palette a layer and many
SMALL_LAYER = 4096  # weights below which a layer may stay as it is: its palettes would be as large as itself
SCALE = 1e4  # the budget in the solver's units, where its absolute tolerances are far below one bit


@dataclass(frozen=True)
class Candidate:
    """One way to store a layer.

    Args:
        spec: of `quantize_weight`; `None` leaves the layer as it is.
        num_bits: true stored bits of the whole layer.
        error: what the network's output loses, e.g. its mean squared error.
    """

    spec: Mapping[str, Any] | None
    num_bits: int
    error: float


@dataclass(frozen=True)
class Allocation:
    """A choice of one candidate a layer.

    Args:
        chosen: the candidate of every layer.
        average_bits: stored bits a weight. error: sum of the chosen candidates' errors.
        bound: no choice within the budget has a smaller sum (equal to `error`, but for rounding, where the solver
            proved it).
    """

    chosen: Mapping[str, Candidate]
    average_bits: float
    error: float
    bound: float

    @property
    def plan(self) -> dict[str, Mapping[str, Any]]:
        """The spec of every layer that is quantised."""
        return {name: candidate.spec for name, candidate in self.chosen.items() if candidate.spec is not None}


def candidate_specs(
    shape: Sequence[int], scheme: str = "palette", rows_per_palette: int | None = None, group_size: int = 64
) -> list[dict[str, Any] | None]:
    """The forms that a weight of this shape may take: 4 bit and 8 bit; of a small layer also as it is (`None`).

    Args:
        scheme: `"palette"` or `"affine"` (symmetric).
        rows_per_palette: output rows that share a 4-bit palette, 0: all; `None`: several choices, from one palette to
            about 0.2 bits a weight for palettes. The counts divide the rows, as Core ML wants it.
        group_size: inputs that share a scale (affine).
    """
    rows, columns = matrix_shape(tuple(shape))
    if scheme == "affine":
        specs: list[dict[str, Any] | None] = [
            {"scheme": scheme, "bits": bits, "group_size": group_size, "symmetric": True} for bits in (4, 8)
        ]
    else:
        runs = {rows_per_palette}
        if rows_per_palette is None:
            wanted = [16 * 16 / (columns * share) for share in PALETTE_SHARES]  # 16 entries of 16 bits
            # The largest power of two that divides the rows and is not above what is wanted by more than a half.
            runs = {
                0,
                *(
                    max(2**k for k in range(rows.bit_length()) if rows % 2**k == 0 and (k == 0 or 2**k <= 1.5 * most))
                    for most in wanted
                ),
            } - {rows}
        specs = [{"scheme": scheme, "bits": 4, "rows_per_palette": run} for run in sorted(runs)]
        specs.append({"scheme": scheme, "bits": 8, "rows_per_palette": 0})
    return [*specs, None] if math.prod(shape) < SMALL_LAYER else specs


@torch.no_grad()
def replaced_weight_error(
    model: nn.Module, name: str, weight: torch.Tensor, calls: Sequence[ModelCall], references: Sequence[torch.Tensor]
) -> OutputError:
    """Error of the network's output when the layer `name` has another weight and everything else is as it was.

    Args:
        model: left as it was found.
        weight: of the layer's shape, such as what a quantised weight stands for.
        calls: forwards of the sampling loop. references: the outputs of the unchanged network.
    """
    parameter = model.get_submodule(name).weight
    original = parameter.detach().clone()
    try:
        parameter.copy_(weight)
        return output_error(model, calls, references)
    finally:
        parameter.copy_(original)


def allocate(
    candidates: Mapping[str, Sequence[Candidate]],
    sizes: Mapping[str, int],
    budget_bits: float = 4.3,
    max_seconds: float = 60.0,
) -> Allocation:
    """Choose a candidate for every layer: the least sum of errors at `budget_bits` or fewer bits a weight on average.

    Exact (HiGHS' branch and bound, through SciPy) unless `max_seconds` are over first; [`Allocation.bound`] then tells
    how far it may be off.

    Args:
        candidates: of every layer, at least one.
        sizes: weights of every layer.

    Raises:
        EdgeDiTError: even the smallest candidates exceed the budget, or an error is not a finite number.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    names = list(candidates)
    flat = [(row, candidate) for row, name in enumerate(names) for candidate in candidates[name]]
    for row, candidate in flat:
        if not np.isfinite(candidate.error):
            raise EdgeDiTError(
                f"The error of layer {names[row]} as {candidate.spec} is {candidate.error}; a layer with such an error "
                "cannot be stored so."
            )
    weights = sum(sizes[name] for name in names)
    allowed = budget_bits * weights
    least = sum(min(candidate.num_bits for candidate in candidates[name]) for name in names)
    if least > allowed:
        raise EdgeDiTError(
            f"The budget is {budget_bits:g} bits a weight, but the smallest candidates of the {len(names)} layers have "
            f"{least / weights:.3f}; raise the budget, or let more rows share a palette or more weights a scale."
        )
    errors = np.array([candidate.error for _, candidate in flat])
    bits = np.array([candidate.num_bits for _, candidate in flat], dtype=np.float64)
    largest = max(float(np.abs(errors).max()), np.finfo(float).tiny)
    one_each = csr_array(
        (np.ones(len(flat)), ([row for row, _ in flat], np.arange(len(flat)))), shape=(len(names), len(flat))
    )
    limit = allowed
    while True:
        constraints = [
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(bits[None] * (SCALE / allowed), -np.inf, SCALE * (limit / allowed)),
        ]
        solved = milp(
            errors / largest,
            constraints=constraints,
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0, "time_limit": max_seconds},
        )
        if solved.x is None:
            raise EdgeDiTError(
                f"No allocation of {budget_bits:g} bits was found in {max_seconds:g} s ({solved.message}); give more "
                "time or a larger budget."
            )
        picked = {names[flat[i][0]]: flat[i][1] for i in np.flatnonzero(solved.x > 0.5)}
        spent = sum(candidate.num_bits for candidate in picked.values())
        if spent <= allowed:
            break
        limit -= spent - allowed + 1  # the solver's tolerance let it exceed the budget by a few bits
    bound = solved.mip_dual_bound if solved.mip_dual_bound is not None else solved.fun
    total = sum(candidate.error for candidate in picked.values())
    return Allocation(picked, spent / weights, total, min(total, float(bound) * largest))
