"""Which objective foretells the quality after tuning: the genotypes that are tuned to find out, and rank correlations.

Rank correlations over all genotypes say little to a search, as nearly everything follows the latency; so they are given
at equal latency too, in two ways: the partial correlation given the latency, and Kendall's over the pairs of one group
of similar latency alone. Intervals are percentiles of a bootstrap over genotypes. No torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from ..errors import EdgeDiTError
from ..genotype import Genotype
from ..search_space import SearchSpace

POOL = 20_000  # genotypes that are chosen from, where the space holds more
BAND = 0.15  # half-width of a group, as a share of the distance between two groups
RESAMPLES = 2000
CHOICE_STREAM, BOOTSTRAP_STREAM = 50, 51
FIGURES = ("spearman", "kendall", "partial", "within")
"""Spearman's ρ, Kendall's τ_b, Spearman's ρ given the latency, Kendall's τ_b over pairs of one group."""


class Chosen(NamedTuple):
    """A genotype to tune: its group of similar latency, and why it was taken ("best", "worst" or "random")."""

    genotype: Genotype
    group: int
    kind: str


def choose_genotypes(
    space: SearchSpace,
    loss_of: Callable[[Genotype], float],
    latency_of: Callable[[Genotype], float],
    count: int,
    groups: int,
    seed: int,
) -> list[Chosen]:
    """Genotypes in groups of similar latency, spread over its range: of each group that of the least and that of the
    greatest additive loss, and others at random.

    Args:
        loss_of, latency_of: cheap; called for every genotype of the space, or for a random part of a large one.
        count: of genotypes, at least two a group.
    """
    if count < 2 * groups:
        raise EdgeDiTError(f"{count} genotypes leave groups of fewer than 2; {groups} groups need {2 * groups}.")
    from ..data.batches import stream_generator  # which loads torch: the report needs none

    rng = stream_generator(seed, CHOICE_STREAM)
    pool = _pool(space, rng)
    loss, latency = (np.array([of(genotype) for genotype in pool]) for of in (loss_of, latency_of))
    step = (latency.max() - latency.min()) / groups
    chosen: list[Chosen] = []
    for group in range(groups):
        centre, taken = latency.min() + (group + 0.5) * step, {c.genotype for c in chosen}
        wanted = count // groups + (group < count % groups)
        near = np.argsort(np.abs(latency - centre), kind="stable")
        near = [i for i in near if pool[i] not in taken]
        band = [i for i in near if abs(latency[i] - centre) <= BAND * step]
        band = band if len(band) >= wanted else near[:wanted]
        best, worst = min(band, key=lambda i: loss[i]), max(band, key=lambda i: loss[i])
        others = [i for i in band if i not in (best, worst)]
        random = rng.permutation(others)[: wanted - 2]
        kinds = {best: "best", **dict.fromkeys(random.tolist(), "random"), worst: "worst"}
        chosen += [Chosen(pool[i], group, kind) for i, kind in kinds.items()]
    if len(chosen) < count:
        raise EdgeDiTError(f"The space holds {space.size} genotypes, too few to choose {count} in {groups} groups.")
    return chosen


def _pool(space: SearchSpace, rng: np.random.Generator) -> list[Genotype]:
    """All genotypes of a space, or random ones that keep every share of the teacher's layers as often."""
    if space.size <= POOL:
        return list(space.all())
    found: dict[Genotype, None] = {}
    for _ in range(POOL):
        share = rng.random()
        code = [codes[0] if rng.random() < share else codes[rng.integers(len(codes))] for codes in space.allowed]
        found[space.from_code(code)] = None
    return list(found)


# -------------------------------------------------------------------- correlations


def _signs(values: np.ndarray) -> np.ndarray:
    return np.sign(values[:, None] - values[None, :])


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's, row by row, `(R,)` of two `(R, n)`."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))


def _tau(a: np.ndarray, b: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Kendall's τ_b over some pairs, `(R,)`; a, b: signs of differences `(R, n, n)`; pairs: which of them count."""
    with np.errstate(invalid="ignore", divide="ignore"):
        both = (a * b * pairs).sum((1, 2))
        return both / np.sqrt((a * a * pairs).sum((1, 2)) * (b * b * pairs).sum((1, 2)))


def _all_figures(
    x: np.ndarray, y: np.ndarray, latency: np.ndarray, group: np.ndarray, draws: np.ndarray
) -> dict[str, np.ndarray]:
    """Every one of [`FIGURES`] for every redrawn set, `(R,)` each; `draws`: `(R, n)` positions."""
    rank_x, rank_y, rank_z = (rankdata(values[draws], axis=1) for values in (x, y, latency))
    xy, xz, yz = _correlation(rank_x, rank_y), _correlation(rank_x, rank_z), _correlation(rank_y, rank_z)
    with np.errstate(invalid="ignore", divide="ignore"):
        left = (1 - xz**2) * (1 - yz**2)
        partial = np.where(left > 1e-9, (xy - xz * yz) / np.sqrt(np.maximum(left, 1e-300)), np.nan)
    pick = (draws[:, :, None], draws[:, None, :])
    sign_x, sign_y = _signs(x)[pick], _signs(y)[pick]
    same = (group[:, None] == group[None, :])[pick]
    return {
        "spearman": xy,
        "kendall": _tau(sign_x, sign_y, np.ones_like(same)),
        "partial": partial,
        "within": _tau(sign_x, sign_y, same),
    }


def _interval(values: np.ndarray) -> list[float | None]:
    """A figure and its 95 % interval from (the figure, those of redrawn sets); `None`: not defined."""
    if not np.isfinite(values[0]):
        return [None, None, None]
    return [float(values[0]), *(float(q) for q in np.nanquantile(values[1:], (0.025, 0.975)))]


def rank_correlations(
    objectives: Mapping[str, Sequence[float]],
    quality: Sequence[float],
    latency: Sequence[float],
    groups: Sequence[int],
    seed: int,
    against: str = "distance",
) -> dict[str, dict[str, list[float | None]]]:
    """Of every objective each of [`FIGURES`] with the quality: [figure, low, high], the latter of 95 % intervals.

    `lead`, beside them, is how much higher than `against`'s the partial correlation is, as the same redrawn sets give
    both.

    Args:
        objectives: by name, a value a genotype, in the order of `quality` (after the tuning), `latency` and `groups`;
            all the smaller the better.
    """
    y, z, group = (np.asarray(values, dtype=np.float64) for values in (quality, latency, groups))
    count = len(y)
    from ..data.batches import stream_generator  # which loads torch: the report needs none

    redrawn = stream_generator(seed, BOOTSTRAP_STREAM).integers(count, size=(RESAMPLES, count))
    draws = np.concatenate([np.arange(count)[None], redrawn])
    found = {
        name: _all_figures(np.asarray(values, dtype=np.float64), y, z, group, draws)
        for name, values in objectives.items()
    }
    return {
        name: {
            **{figure: _interval(values) for figure, values in figures.items()},
            "lead": _interval(figures["partial"] - found[against]["partial"]),
        }
        for name, figures in found.items()
    }


def pairs_within(groups: Sequence[int]) -> int:
    """Pairs of genotypes of one group, which is what "within" rests on."""
    return sum(a == b for a, b in itertools.combinations(groups, 2))
