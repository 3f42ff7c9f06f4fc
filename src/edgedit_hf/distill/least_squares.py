"""Least squares of closed-form starts: Gram matrices, factors of low rank, selection and refits on calibration
features.

Large products run in the features' precision and on their device, sums over rows and factorisations in float64.

Shapes: n images, N tokens each, M = n·N rows, F features, D residual width, h heads of width d, of which r stay.
"""

from __future__ import annotations

import torch
from torch import nn

RIDGE = 1e-4  # relative to the mean diagonal of a Gram matrix: against singularity
# Fits must hold on features they have not seen, so their ridge grows with what the data leaves open: strength ·
# features / rows. On a digits teacher with 16 to 1,024 calibration images these strengths lost least throughout; no
# constant ridge did.
SELECTION_RIDGE, REFIT_RIDGE = 0.03, 0.3
ROWS = 4096  # summed in the features' precision at a time


def weighted_gram(features: torch.Tensor, row_weight: torch.Tensor | None = None) -> torch.Tensor:
    """Σ_m w_m f_m f_mᵀ of rows `(M, F)` as `(F, F)` float64; `row_weight` is `(M,)`."""
    gram = features.new_zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    weights = features.new_ones(len(features)) if row_weight is None else row_weight.to(features.dtype)
    for rows, weight in zip(features.split(ROWS), weights.split(ROWS)):
        gram += rows.mT @ (rows * weight.unsqueeze(1))
    return gram


def _add_ridge(gram: torch.Tensor, features: torch.Tensor, strength: float) -> torch.Tensor:
    """Add to the diagonal of the Gram matrix of `features` `(M, F)`, in place; returns what was added (0-d)."""
    count, width = features.shape
    added = max(RIDGE, strength * width / count) * gram.diagonal().mean().clamp_min(1e-30)
    gram.diagonal().add_(added)
    return added


def with_ones(features: torch.Tensor) -> torch.Tensor:
    """Features `(M, F)` with a column of ones, for a bias: `(M, F + 1)`."""
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)


def root_and_inverse(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric square root and its inverse of second moments `(h, d, d)`, with a small ridge."""
    values, vectors = torch.linalg.eigh(moment)
    floor = RIDGE * values.mean(-1, keepdim=True).clamp_min(1e-12)
    values = values.clamp_min(0) + floor
    root = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT
    inverse = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT
    return root, inverse


def with_ridge(moment: torch.Tensor) -> torch.Tensor:
    """Second moments `(…, d, d)` with a small ridge."""
    size = moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    return moment + RIDGE * size[..., None, None] * torch.eye(moment.shape[-1]).to(moment)


def factor_query_key(
    query_moment: torch.Tensor, key_moment: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps `(h, d, r)` P, R such that (qP)(kR)ᵀ/√r is the best rank-r stand-in of qkᵀ/√d on inputs with these second
    moments.

    Whitening turns the expected squared error of the scores into a Frobenius norm, so a truncated SVD of C_q^½ C_k^½ is
    optimal. The change of the softmax scale from 1/√d to 1/√r is absorbed. Keys should be centred over the tokens of an
    image: a softmax does not see what all keys share.
    """
    width = query_moment.shape[-1]
    root_q, inverse_q = root_and_inverse(query_moment)
    root_k, inverse_k = root_and_inverse(key_moment)
    left, values, right = torch.linalg.svd(root_q @ root_k)
    half = values[:, :rank].sqrt().unsqueeze(-2) * (rank / width) ** 0.25
    return inverse_q @ left[..., :rank] * half, inverse_k @ right.mT[..., :rank] * half


def factor_value_output(
    value_moment: torch.Tensor, out_weight: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map `(h, d, r)` of the values and new output weights `(h, r, D)`: the best rank-r stand-in of o·W on averaged
    values o with this second moment `(h, d, d)`; `out_weight` is `(h, d, D)`."""
    root, inverse = root_and_inverse(value_moment)
    left, values, right = torch.linalg.svd(root @ out_weight, full_matrices=False)
    return inverse @ left[..., :rank], values[:, :rank].unsqueeze(-1) * right[:, :rank]


def select_groups(
    features: torch.Tensor, out_weight: torch.Tensor, row_weight: torch.Tensor, keep: int, group: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which neurons (`group` 1) or heads (`group` d) to keep, so that the output of all, features·W, is best matched
    after a refit.

    Optimal brain surgeon (Hassibi & Stork, 1993) on the Gram matrix of the features, a few groups a round (heads one by
    one): the loss of leaving out group g is tr(W_gᵀ [(G⁻¹)_gg]⁻¹ W_g); the weights of the others and G⁻¹ are then
    updated in closed form, which costs less than inverting anew.

    Args:
        features: `(M, g·group)`; out_weight: `(g·group, D)`; row_weight: `(M,)`, importance of a row (its mean squared
            gate).

    Returns:
        Indices `(keep,)` of the kept groups, sorted, and the refitted weights of their features `(keep·group, D)`,
        float64.
    """
    gram = weighted_gram(features, row_weight)
    _add_ridge(gram, features, SELECTION_RIDGE)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    weight = out_weight.double()
    alive = torch.arange(features.shape[1] // group, device=features.device)
    within = torch.arange(group, device=features.device)
    while (count := len(alive)) > keep:
        blocks = inverse.view(count, group, count, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [g, group, group]
        parts = weight.view(count, group, -1)
        order = (parts * torch.linalg.solve(blocks, parts)).sum((1, 2)).argsort()
        dropped = min(count - keep, max(1, count // 32)) if group == 1 else 1
        out, stay = order[:dropped], order[dropped:].sort().values
        gone, kept = ((t.unsqueeze(1) * group + within).flatten() for t in (out, stay))
        cross = inverse[kept][:, gone]
        change = torch.linalg.solve(inverse[gone][:, gone], torch.cat([cross.mT, weight[gone]], dim=1))
        weight = weight[kept] - cross @ change[:, len(kept) :]
        inverse = inverse[kept][:, kept] - cross @ change[:, : len(kept)]
        alive = alive[stay]
    return alive, weight


def refit_gated(
    features: torch.Tensor,
    gate: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    ridge: float = REFIT_RIDGE,
    iterations: int = 30,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `(F, D)` and bias `(D,)` that minimise Σ (gate ⊙ (features·W + b) − target)², kept near the given ones by
    a ridge.

    The gate of adaLN weighs every element differently, so the columns do not share a Gram matrix; conjugate gradients
    need only products with `features`, and the Gram matrix weighted by the rows' mean squared gate preconditions them.

    Args:
        features: `(M, F)`; gate, target: `(M, D)`.
        ridge: strength; the ridge itself is this · F / M of the Gram matrix's mean diagonal.
    """
    features = with_ones(features)
    gate, target = gate.to(features.dtype), target.to(features.dtype)
    start = torch.cat([weight, bias.unsqueeze(0)]).to(features)
    square = gate.pow(2)
    rows, columns = square.mean(1), square.mean(0, keepdim=True).double()
    gram = weighted_gram(features, rows)
    added = _add_ridge(gram, features, ridge)
    factor = torch.linalg.cholesky(gram).to(features.dtype)  # a preconditioner need not be exact
    column_scale = (columns / columns.mean().clamp_min(1e-30)).clamp_min(1e-6)

    def operator(w: torch.Tensor) -> torch.Tensor:
        return (features.mT @ (square * (features @ w.to(features.dtype)))).double() + added * column_scale * w

    def precondition(residual: torch.Tensor) -> torch.Tensor:
        return torch.cholesky_solve(residual.to(factor.dtype), factor) / column_scale

    # Solve for the change of the weights, so that the ridge pulls towards where they were.
    change = torch.zeros_like(start, dtype=torch.float64)
    residual = (features.mT @ (gate * (target - gate * (features @ start)))).double()
    direction = precondition(residual)
    energy = (residual * direction).sum()
    first = energy.clone()
    for _ in range(iterations):
        if energy <= 1e-7 * first:
            break
        image = operator(direction)
        step = energy / (direction * image).sum()
        change += step * direction
        residual -= step * image
        corrected = precondition(residual)
        energy, last = (residual * corrected).sum(), energy
        direction = corrected + energy / last * direction
    solved = start.double() + change
    return solved[:-1], solved[-1]


def refit_linear(features: torch.Tensor, target: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """Weights with the bias as last row, `(F + 1, K)` float64, of features `(M, F)` → target `(M, K)` by least squares,
    kept near those of `linear`."""
    features = with_ones(features)
    start = torch.cat([linear.weight.mT, linear.bias.unsqueeze(0)]).to(features)
    gram = weighted_gram(features)
    _add_ridge(gram, features, REFIT_RIDGE)
    residual = (features.mT @ (target - features @ start)).double()
    return start.double() + torch.cholesky_solve(residual, torch.linalg.cholesky(gram))


def low_rank(
    weight: torch.Tensor, covariance: torch.Tensor, importance: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`up (K, r)` and `down (r, D)` whose product is the best stand-in of rank r of `weight` `(K, D)`: on inputs with
    this `covariance` `(D, D)`, where the squared error of output i counts `importance[i]` times. All float64.
    """
    root, inverse = (t[0] for t in root_and_inverse(covariance[None]))
    scale = importance.sqrt().clamp_min(RIDGE * importance.mean().sqrt().clamp_min(1e-30)).unsqueeze(1)
    left, values, right = torch.linalg.svd(scale * weight @ root, full_matrices=False)
    half = values[:rank].sqrt()
    return left[:, :rank] / scale * half, half.unsqueeze(1) * right[:rank] @ inverse
