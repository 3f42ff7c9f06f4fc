"""Pareto fronts of two minimised objectives: the front, its hypervolume, and which of its points to take. No torch.

Everywhere a point is `(quality, cost)`, e.g. (Fréchet distance, latency in ms), and smaller is better in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import EdgeDiTError

Points = Sequence[Sequence[float]]


def _as_points(points: Points) -> np.ndarray:
    array = np.asarray(points, dtype=np.float64)
    if array.size == 0:
        return array.reshape(0, 2)
    if array.ndim != 2 or array.shape[1] != 2 or not np.isfinite(array).all():
        raise EdgeDiTError(
            f"The points have shape {array.shape}; expected finite values of shape (n, 2), a row a point."
        )
    return array


def pareto_front(points: Points) -> list[int]:
    """Indices of the points that no other point beats in both objectives, by rising first objective.

    Args:
        points: shape (n, 2), both objectives minimised. Of equal points only the first is on the front.
    """
    array = _as_points(points)
    front: list[int] = []
    best = np.inf
    # By the first objective, ties by the second, then by position (lexsort is stable): a point is on the front if and
    # only if it improves the second objective over everything before it.
    for index in np.lexsort((array[:, 1], array[:, 0])):
        if array[index, 1] < best:
            best = array[index, 1]
            front.append(int(index))
    return front


def hypervolume(points: Points, reference: Sequence[float]) -> float:
    """Area that the points dominate below `reference`, exactly (a sum of rectangles over the front).

    Args:
        points: shape (n, 2), both objectives minimised; points that are not below the reference in both add nothing.
        reference: the two values that bound the area, in the points' units.
    """
    array, corner = _as_points(points), np.asarray(reference, dtype=np.float64)
    if corner.shape != (2,) or not np.isfinite(corner).all():
        raise EdgeDiTError(f"The reference point is {list(np.ravel(corner))}; it must be two finite numbers.")
    array = array[(array < corner).all(axis=1)]
    area, ceiling = 0.0, corner[1]
    for index in pareto_front(array):
        area += (corner[0] - array[index, 0]) * (ceiling - array[index, 1])
        ceiling = array[index, 1]
    return float(area)


def hypervolume_trace(points: Points, reference: Sequence[float]) -> list[float]:
    """Hypervolume after the first, the first two, … all points, in the order in which they were evaluated."""
    return [hypervolume(points[: count + 1], reference) for count in range(len(points))]


def knee_point(front: Points) -> int:
    """Index of the point that lies farthest below the chord between the ends of the front.

    Each objective is scaled to [0, 1] over the front first, so that the chord runs from (0, 1) to (1, 0) and a point's
    distance below it is (1 - x - y) / √2. When no point lies below it, the end with the lower first objective is taken.

    Args:
        front: shape (n, 2), non-dominated points in any order.
    """
    array = _as_points(front)
    if not len(array):
        raise EdgeDiTError("The front has 0 points; a knee point needs at least 1. Evaluate some genotypes first.")
    low, high = array.min(axis=0), array.max(axis=0)
    scaled = (array - low) / np.where(high > low, high - low, 1.0)
    below = 1.0 - scaled.sum(axis=1)
    return int(np.lexsort((array[:, 0], -np.round(below, 12)))[0])


def choose(
    entries: Sequence[Mapping],
    max_latency_ms: float | None = None,
    max_parameters: float | None = None,
    max_flops: float | None = None,
    max_bytes: float | None = None,
    max_memory: float | None = None,
    max_slowest_ms: float | None = None,
) -> tuple[Mapping, str]:
    """The entry of a front to build: within the limits the lowest distance; without limits the knee point.

    Args:
        entries: the front; each holds `distance` and `latency_ms`, and `parameters`, `flops`, `bytes`, `memory` or
            `slowest_ms` (on the slowest of several devices) where limited.
        max_latency_ms, max_parameters, max_flops, max_bytes, max_memory, max_slowest_ms: limits that the choice must
            keep, in the entries' units.

    Returns:
        The entry, and the reason for it in words.

    Raises:
        EdgeDiTError: no entry keeps the limits; quotes them and the entry that comes nearest.
    """
    if not entries:
        raise EdgeDiTError("The front has 0 entries, so there is nothing to choose from; run the search first.")
    asked = {
        **{"latency_ms": max_latency_ms, "slowest_ms": max_slowest_ms},
        **{"parameters": max_parameters, "flops": max_flops, "bytes": max_bytes, "memory": max_memory},
    }
    limits = {key: float(limit) for key, limit in asked.items() if limit is not None}
    for key, limit in limits.items():
        if not limit > 0:
            raise EdgeDiTError(f"The limit on {key} is {limit}; it must be greater than 0.")
    missing = sorted({key for key in limits for entry in entries if key not in entry})
    if missing:
        raise EdgeDiTError(
            f"A limit is set on {missing}, which the front's entries do not hold; they hold {sorted(entries[0])}."
        )
    if not limits:
        entry = entries[knee_point([(e["distance"], e["latency_ms"]) for e in entries])]
        return entry, f"knee point of the {len(entries)} points of the front"

    said = " and ".join(f"{key} <= {limit:.6g}" for key, limit in limits.items())
    fitting = [entry for entry in entries if all(entry[key] <= limit for key, limit in limits.items())]
    if not fitting:
        nearest = min(entries, key=lambda entry: max(entry[key] / limit for key, limit in limits.items()))
        values = " and ".join(f"{key} {nearest[key]:.6g}" for key in limits)
        fastest = min(entry["latency_ms"] for entry in entries)
        raise EdgeDiTError(
            f"None of the {len(entries)} points of the front has {said}. The nearest point has {values}; the fastest "
            f"has latency_ms {fastest:.6g}. Raise the limit or search longer."
        )
    entry = min(fitting, key=lambda e: (e["distance"], e["latency_ms"]))
    return entry, f"lowest distance of the {len(fitting)} of {len(entries)} points of the front with {said}"
