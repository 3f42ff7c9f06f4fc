"""Feature-wise distillation losses between a proxy block and the teacher layers it replaces.

Shapes: x, output, target `(B, N, D)`: the proxy's input (the teacher's hidden state), its output, and the teacher's
output.
"""

from __future__ import annotations

import math

import torch

from ..errors import EdgeDiTError

MASSIVE_SIGMA, CLIP_SIGMA = 30.0, 5.0
FAR_LOSS = 0.1  # normalised loss from which on a proxy trains at the full rate


def ordinary_updates(
    x: torch.Tensor, target: torch.Tensor, sigmas: float = MASSIVE_SIGMA, eps: float = 0.0
) -> torch.Tensor:
    """Mask `(B, N, D)` of the elements whose teacher update lies within `sigmas` standard deviations of the mean
    update.

    A few massive activations, hundreds of times the rest (Sun et al., arXiv:2402.17762), otherwise own the loss.
    TinyFusion (arXiv:2412.01199) masks at 2σ of the hidden state, but updates are heavy-tailed without being massive:
    on a digits teacher 1 % of the elements, beyond 5σ, hold half of their energy, and a student whose proxies did not
    learn these came out worse; 30 lost nothing. Mean and deviation are those of the elements within [`CLIP_SIGMA`]
    deviations of all, so that huge outliers do not hide smaller ones.

    A residual stream may also be massive where the update is not: elements whose rounding at the relative precision
    `eps` alone may exceed a standard deviation are left out too.
    """
    update = target.float() - x.float()
    clipped = (update - update.mean()).abs() <= CLIP_SIGMA * update.std(correction=0)
    count = clipped.sum()
    mean = (update * clipped).sum() / count
    deviation = ((update - mean).square() * clipped).sum().div(count).sqrt()
    mask = (update - mean).abs() <= sigmas * deviation
    return mask & (torch.maximum(target.float().abs(), x.float().abs()) * (0.5 * eps) <= deviation) if eps else mask


def rate_scale(start_loss: float) -> float:
    """Share of the peak learning rate for a proxy whose normalised loss at its start is `start_loss`: √(loss / 0.1), at
    most 1.

    A step of Adam has the length of the learning rate however small the gradient is; near its optimum a proxy would
    first walk away. The distance still to go is about the root of a quadratic loss, and steps are best in proportion to
    it.
    """
    return min(1.0, math.sqrt(start_loss / FAR_LOSS))


def feature_loss(output: torch.Tensor, target: torch.Tensor, x: torch.Tensor, kind: str = "normalised") -> torch.Tensor:
    """Distance of a proxy's output to the teacher's (scalar).

    `plain` is the paper's ‖T(x) − S(x)‖² (EdgeDiT, FwKD), as a mean over elements. `normalised` divides it by the mean
    square of the teacher's own update T(x) − x and ignores massive activations: 1 means "no better than leaving the
    layer out" at any depth.

    Raises:
        EdgeDiTError: shapes differ or `kind` is unknown.
    """
    if output.shape != target.shape or x.shape != target.shape:
        raise EdgeDiTError(
            f"Shapes differ: output {tuple(output.shape)}, target {tuple(target.shape)}, input {tuple(x.shape)}."
        )
    error = (output.float() - target.float()).pow(2)
    if kind == "plain":
        return error.mean()
    if kind != "normalised":
        raise EdgeDiTError(f"The feature loss is {kind!r}; it must be 'normalised' or 'plain'.")
    # Below single precision, rounding counts; a proxy's own update is added to x in the coarsest of the three.
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (output, target, x))
    mask = ordinary_updates(x, target, eps=eps)
    energy = ((target.float() - x.float()).pow(2) * mask).sum().clamp_min(torch.finfo(torch.float32).tiny)
    return (error * mask).sum() / energy
