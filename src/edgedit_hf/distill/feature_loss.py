"""Feature-wise distillation losses between a proxy block and the teacher layers it replaces.

Shapes: x, output, target `(B, N, D)`: the proxy's input (the teacher's hidden state), its output, and the teacher's output.
"""

from __future__ import annotations

import torch

from ..errors import EdgeDiTError

OUTLIER_SIGMA = 5.0


def ordinary_updates(x: torch.Tensor, target: torch.Tensor, sigmas: float = OUTLIER_SIGMA) -> torch.Tensor:
    """Mask `(B, N, D)` of the elements whose teacher update lies within `sigmas` standard deviations of the mean update.

    A few massive activations otherwise own the loss (TinyFusion, arXiv:2412.01199, masks at 2σ of the hidden state; here the
    residual update is masked, which has far lighter tails, hence 5).
    """
    update = target - x
    centred = update - update.mean()
    return centred.abs() <= sigmas * centred.pow(2).mean().sqrt()


def feature_loss(output: torch.Tensor, target: torch.Tensor, x: torch.Tensor, kind: str = "normalised") -> torch.Tensor:
    """Distance of a proxy's output to the teacher's (scalar).

    `plain` is the paper's ‖T(x) − S(x)‖² (EdgeDiT, FwKD), as a mean over elements. `normalised` divides it by the mean square of the
    teacher's own update T(x) − x and ignores massive activations: 1 means "no better than leaving the layer out" at any depth.

    Raises:
        EdgeDiTError: shapes differ or `kind` is unknown.
    """
    if output.shape != target.shape or x.shape != target.shape:
        raise EdgeDiTError(f"Shapes differ: output {tuple(output.shape)}, target {tuple(target.shape)}, input {tuple(x.shape)}.")
    error = (output.float() - target.float()).pow(2)
    if kind == "plain":
        return error.mean()
    if kind != "normalised":
        raise EdgeDiTError(f"The feature loss is {kind!r}; it must be 'normalised' or 'plain'.")
    mask = ordinary_updates(x.float(), target.float())
    energy = ((target.float() - x.float()).pow(2) * mask).sum().clamp_min(torch.finfo(torch.float32).tiny)
    return (error * mask).sum() / energy
