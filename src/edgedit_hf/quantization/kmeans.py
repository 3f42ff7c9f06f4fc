"""One-dimensional k-means of many groups of values at once: the palettes of palettised weights.

On sorted values the clusters are runs, so that with prefix sums an iteration of Lloyd's algorithm costs one binary search a boundary, however
many values there are. Lloyd's algorithm finds a local optimum; three starts are tried and the best kept for every group.
"""

from __future__ import annotations

import torch

from ..errors import EdgeDiTError

_CHUNK = 1 << 22  # values at a time: bounds the memory of the float64 prefix sums


class _Sorted:
    """Groups of sorted values `(G, n)` and their prefix sums `(G, n + 1)` of weight, weight · value and weight · value², in float64."""

    def __init__(self, values: torch.Tensor, weights: torch.Tensor | None):
        self.values, order = values.sort(dim=-1)
        exact = self.values.double()
        mass = torch.ones_like(exact) if weights is None else weights.expand_as(values).gather(-1, order).double()
        self.sums = [torch.nn.functional.pad((mass * exact**power).cumsum(-1), (1, 0)) for power in range(3)]

    def clusters(self, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the cluster of every (sorted) centre `(G, K)`: its end in the values, weight, sum, and squared error around its own mean."""
        middles = ((centres[:, 1:] + centres[:, :-1]) / 2).to(self.values.dtype)
        ends = torch.searchsorted(self.values, middles.contiguous(), right=True)
        ends = torch.nn.functional.pad(ends, (0, 1), value=self.values.shape[-1])
        mass, first, second = (torch.diff(prefix.gather(-1, ends), dim=-1, prepend=prefix[:, :1]) for prefix in self.sums)
        error = (second - first**2 / mass.clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0)
        return ends, mass, first, error


def _starts(values: torch.Tensor, clusters: int) -> list[torch.Tensor]:
    """Centres to start from, each float64 `(G, K)`, for sorted values `(G, n)`: of equal count, of equal width, and by density^⅓ (the
    density of an optimal quantiser with many levels: Panter & Dite, 1951)."""
    places = (torch.arange(clusters, dtype=torch.float64, device=values.device) + 0.5) / clusters
    cells = max(1, min(values.shape[-1] - 1, 16 * clusters))
    edges = values[:, torch.linspace(0, values.shape[-1] - 1, cells + 1, device=values.device).round().long()].double()
    low, high = edges[:, :1], edges[:, -1:]
    widths = edges.diff(dim=-1)
    # A cell of width d and a fixed count has density ∝ 1/d, and so takes a share d · (1/d)^⅓ of the levels.
    share = torch.nn.functional.pad(widths.pow(2 / 3).cumsum(-1), (1, 0))
    wanted = places * share[:, -1:]
    cell = (torch.searchsorted(share, wanted) - 1).clamp(0, cells - 1)
    begin, end = share.gather(-1, cell), share.gather(-1, cell + 1)
    inside = (wanted - begin) / (end - begin).clamp(min=torch.finfo(torch.float64).tiny)
    dense = edges.gather(-1, cell) + inside * widths.gather(-1, cell)
    counts = values[:, (places * values.shape[-1]).long()].double()
    return [dense, counts, low + places * (high - low)]


def _lloyd(data: _Sorted, centres: torch.Tensor, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's iterations to convergence: centres `(G, K)`, none without values where there are enough distinct ones, and the error `(G,)`."""
    for _ in range(iterations):
        ends, mass, first, error = data.clusters(centres)
        moved = torch.where(mass > 0, first / mass, centres)
        # An empty cluster (one a group at a time) moves to the largest value of the cluster with the largest error, which cannot be its mean.
        worst = error.argmax(dim=-1, keepdim=True)
        farthest = data.values.gather(-1, (ends.gather(-1, worst) - 1).clamp(min=0)).double()
        empty = mass <= 0
        chosen = empty & (empty.cumsum(-1) == 1) & (error.gather(-1, worst) > 0)
        moved = torch.where(chosen, farthest, moved).sort(dim=-1).values
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres, data.clusters(centres)[3].sum(dim=-1)


def kmeans_1d(
    values: torch.Tensor, clusters: int, weights: torch.Tensor | None = None, iterations: int = 200
) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means of every row of `values`, minimising Σ weight · (value − centre)².

    Args:
        values: `(G, n)`, finite.
        clusters: K, 2 … 256.
        weights: not negative, `(G, n)` or broadcast to it; `None`: all equal.
        iterations: at most so many of Lloyd's algorithm, from each of three starts.

    Returns:
        Centres, float32 `(G, K)`, ascending (with fewer than K distinct values some are equal), and for every value the index of the nearest
        centre, uint8 `(G, n)`.
    """
    if values.ndim != 2 or values.shape[1] < 1 or not 2 <= clusters <= 256:
        raise EdgeDiTError(f"kmeans_1d got values of shape {tuple(values.shape)} and {clusters} clusters; give (groups, n ≥ 1) and 2 … 256.")
    if not torch.isfinite(values).all():
        raise EdgeDiTError(f"{int((~torch.isfinite(values)).sum())} of the {values.numel()} values to cluster are not finite.")
    found = []
    for rows in range(0, len(values), max(1, _CHUNK // values.shape[1])):
        chunk = values[rows : rows + max(1, _CHUNK // values.shape[1])].float()
        share = None if weights is None else weights.expand_as(values)[rows : rows + len(chunk)]
        shift = chunk.mean(dim=-1, keepdim=True)  # small numbers keep the differences of the prefix sums exact
        data = _Sorted(chunk - shift, share)
        best, least = None, None
        for start in _starts(data.values, clusters):
            centres, error = _lloyd(data, start, iterations)
            better = error < least if best is not None else torch.ones_like(error, dtype=torch.bool)
            best = centres if best is None else torch.where(better[:, None], centres, best)
            least = error if least is None else torch.where(better, error, least)
        found.append((best + shift.double()).float())
    centres = torch.cat(found)
    return centres, nearest(values, centres)


def nearest(values: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Index of the nearest of the ascending `centres` `(G, K ≤ 256)` for every value `(G, n)`: uint8 `(G, n)`."""
    middles = (centres[:, 1:].float() + centres[:, :-1].float()) / 2
    return torch.searchsorted(middles.contiguous(), values.float().contiguous()).to(torch.uint8)
