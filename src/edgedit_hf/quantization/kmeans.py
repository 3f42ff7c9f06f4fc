"""One-dimensional k-means of many groups of values at once: the palettes of palettised weights.

On sorted values the clusters are runs, so that with prefix sums an iteration of Lloyd's algorithm costs one binary
search a boundary, however many values there are. Lloyd's algorithm finds a local optimum, so the start matters: for few
clusters the best runs of a few hundred small cells, by dynamic programming; for many the density of the levels of an
optimal quantiser.
"""

from __future__ import annotations

import torch

from ..errors import EdgeDiTError

_CHUNK, _GROUPS = (
    1 << 21,
    64,
)  # values and groups at a time: bounds the memory of the prefix sums and of the dynamic programme
_CELLS = 128  # of the dynamic programme at most, twice: by count and by level density
_FEW = 32  # clusters up to which it gives the start


class _Sorted:
    """Groups of sorted values `(G, n)` and their prefix sums `(G, n + 1)` of weight, weight · value and weight ·
    value², in float64.
    """

    def __init__(self, values: torch.Tensor, weights: torch.Tensor | None):
        self.values, order = values.sort(dim=-1)
        exact = self.values.double()
        mass = torch.ones_like(exact) if weights is None else weights.expand_as(values).gather(-1, order).double()
        self.sums = [torch.nn.functional.pad((mass * exact**power).cumsum(-1), (1, 0)) for power in range(3)]

    def clusters(self, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the cluster of every (sorted) centre `(G, K)`: its end in the values, weight, sum, and squared error
        around its own mean.
        """
        middles = ((centres[:, 1:] + centres[:, :-1]) / 2).to(self.values.dtype)
        ends = torch.searchsorted(self.values, middles.contiguous(), right=True)
        ends = torch.nn.functional.pad(ends, (0, 1), value=self.values.shape[-1])
        mass, first, second = (
            torch.diff(prefix.gather(-1, ends), dim=-1, prepend=prefix[:, :1]) for prefix in self.sums
        )
        error = (second - first**2 / mass.clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0)
        return ends, mass, first, error


def _level_density(values: torch.Tensor) -> torch.Tensor:
    """For sorted values `(G, n)`, the share of an optimal quantiser's levels that lies below each, `(G, n)` from 0 to
    1: with many levels their density is that of the values to the power ⅓ (Panter & Dite, 1951); a gap d between
    neighbours has the density ∝ 1/d.
    """
    share = torch.nn.functional.pad(values.double().diff(dim=-1).pow(2 / 3).cumsum(-1), (1, 0))
    return share / share[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)


def _dense_start(values: torch.Tensor, share: torch.Tensor, clusters: int) -> torch.Tensor:
    """Centres `(G, K)` of the density of an optimal quantiser's levels."""
    wanted = (
        (torch.arange(clusters, dtype=torch.float64, device=values.device) + 0.5)
        .div(clusters)
        .expand(len(values), -1)
        .contiguous()
    )
    above = torch.searchsorted(share, wanted).clamp(max=values.shape[1] - 1)
    return (values.gather(-1, above).double() + values.gather(-1, (above - 1).clamp(min=0)).double()) / 2


def _best_runs(data: _Sorted, share: torch.Tensor, clusters: int) -> torch.Tensor:
    """Centres `(G, K)` of the K runs of cells with the least error."""
    groups, count = data.values.shape
    cells = min(_CELLS, max(64, count // 16))
    even = torch.linspace(0, 1, cells + 1, dtype=torch.float64, device=share.device).expand(groups, -1).contiguous()
    cuts = (
        torch.cat([(even * count).long(), torch.searchsorted(share, even[:, 1:-1].contiguous())], dim=1)
        .sort(dim=1)
        .values
    )  # [G, C]
    mass, first, second = (prefix.gather(-1, cuts) for prefix in data.sums)
    run = [part.unsqueeze(1) - part.unsqueeze(2) for part in (mass, first, second)]  # [G, from, to]
    cost = (run[2] - run[1] ** 2 / run[0].clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0).float()
    cost += torch.full(cost.shape[1:], torch.inf, device=cost.device).tril(-1)
    least, begins = cost[:, 0], []
    for _ in range(clusters - 1):
        least, begin = (least.unsqueeze(2) + cost).min(dim=1)
        begins.append(begin)
    place = torch.full((groups, 1), cuts.shape[1] - 1, device=cuts.device)
    ends = [place]
    for begin in reversed(begins):
        ends.insert(0, begin.gather(-1, ends[0]))
    ends = torch.cat(ends, dim=1)  # [G, K]
    mass, first = (torch.diff(part.gather(-1, ends), dim=-1, prepend=part[:, :1]) for part in (mass, first))
    at_end = data.values.gather(-1, (cuts.gather(-1, ends) - 1).clamp(min=0)).double()
    return torch.where(mass > 0, first / mass, at_end).sort(dim=-1).values


def _lloyd(data: _Sorted, centres: torch.Tensor, iterations: int) -> torch.Tensor:
    """Lloyd's iterations to convergence: centres `(G, K)`, none without values where there are enough distinct ones."""
    for _ in range(iterations):
        ends, mass, first, error = data.clusters(centres)
        moved = torch.where(mass > 0, first / mass, centres)
        # An empty cluster (one a group at a time) moves to the largest value of the cluster with the largest error,
        # which cannot be its mean.
        worst = error.argmax(dim=-1, keepdim=True)
        farthest = data.values.gather(-1, (ends.gather(-1, worst) - 1).clamp(min=0)).double()
        empty = mass <= 0
        chosen = empty & (empty.cumsum(-1) == 1) & (error.gather(-1, worst) > 0)
        moved = torch.where(chosen, farthest, moved).sort(dim=-1).values
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def kmeans_1d(
    values: torch.Tensor, clusters: int, weights: torch.Tensor | None = None, iterations: int = 200
) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means of every row of `values`, minimising Σ weight · (value − centre)².

    Args:
        values: `(G, n)`, finite.
        clusters: K, 2 … 256.
        weights: not negative, `(G, n)` or broadcast to it; `None`: all equal.
        iterations: at most so many of Lloyd's algorithm.

    Returns:
        Centres, float32 `(G, K)`, ascending (with fewer than K distinct values some are equal), and for every value the
        index of the nearest centre, uint8 `(G, n)`.
    """
    if values.ndim != 2 or values.shape[1] < 1 or not 2 <= clusters <= 256:
        raise EdgeDiTError(
            f"kmeans_1d got values of shape {tuple(values.shape)} and {clusters} clusters; give (groups, n ≥ 1) and 2 "
            "… 256."
        )
    if not torch.isfinite(values).all():
        raise EdgeDiTError(
            f"{int((~torch.isfinite(values)).sum())} of the {values.numel()} values to cluster are not finite."
        )
    found, step = [], max(1, min(_GROUPS, _CHUNK // values.shape[1]))
    for rows in range(0, len(values), step):
        chunk = values[rows : rows + step].float()
        share = None if weights is None else weights.expand_as(values)[rows : rows + len(chunk)]
        shift = chunk.mean(dim=-1, keepdim=True)  # small numbers keep the differences of the prefix sums exact
        data = _Sorted(chunk - shift, share)
        density = _level_density(data.values)
        start = (
            _best_runs(data, density, clusters) if clusters <= _FEW else _dense_start(data.values, density, clusters)
        )
        best = _lloyd(data, start, iterations)
        found.append((best + shift.double()).float())
    centres = torch.cat(found)
    return centres, nearest(values, centres)


def nearest(values: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Index of the nearest of the ascending `centres` `(G, K ≤ 256)` for every value `(G, n)`: uint8 `(G, n)`."""
    middles = (centres[:, 1:].float() + centres[:, :-1].float()) / 2
    return torch.searchsorted(middles.contiguous(), values.float().contiguous()).to(torch.uint8)
