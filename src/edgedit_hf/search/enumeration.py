"""Ways to cover a row of layers by replacements, the best first: where an integer programme's next best solutions come
from. No torch.

A way is a path from layer 0 to the end. Best-first search (A*) goes along paths by the least that a way with that
beginning can score. A bound that knew no limits would let it walk through all that breaks them; so each limit has a
price (its dual value in the linear relaxation), and what a way uses is added to its score: a Lagrangian bound. The
order is exact whatever the prices are; good ones make it quick.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linprog

OPEN = 3_000_000  # beginnings of ways that are remembered at a time: about 1 GB
ROUNDING = 1e-12  # share by which a sum in another order may be above a limit; callers hold the way itself against it


class Limit(NamedTuple):
    """What a way keeps: the sum of `added` over its replacements and the greatest of their `largest` (at least
    `least`) are together at most `room`.
    """

    added: np.ndarray
    room: float
    largest: np.ndarray | None = None
    least: float = 0.0


class TooManyOpen(Exception):
    """More than [`OPEN`] beginnings are as good as the next way may be."""


def ways_in_order(
    scores: np.ndarray, spans: Sequence[tuple[int, int]], num_layers: int, limits: Sequence[Limit] = ()
) -> Iterator[list[int]]:
    """Every way to cover `num_layers` layers that keeps all limits, by rising sum of scores.

    Args:
        scores: of the replacements. spans: first layer of each, and the one after its last.

    Yields:
        The places of a way's replacements, from the first layer on.

    Raises:
        TooManyOpen: the next way is not found within the memory that this may take.
    """
    starts: list[list[tuple[int, int]]] = [[] for _ in range(num_layers)]
    for number, (first, end) in enumerate(spans):
        starts[first].append((number, end))
    peaks = [np.zeros(len(scores)) if limit.largest is None else limit.largest for limit in limits]
    least = tuple(limit.least for limit in limits)
    # From each layer on, what the rest of any way adds, and its peak, at least.
    rest = [_least_to_end(starts, limit.added, float.__add__, 0.0) for limit in limits]
    flattest = [_least_to_end(starts, peak, max, low) for peak, low in zip(peaks, least)]
    rooms = np.array([limit.room - flat[0] for limit, flat in zip(limits, flattest)])
    if not np.isfinite(rooms).all():
        return  # no way reaches the end
    prices = _prices(scores, spans, num_layers, limits, rooms)
    if prices is None:
        return
    priced = scores + sum(price * limit.added for price, limit in zip(prices, limits))
    bound = _least_to_end(starts, priced, float.__add__, 0.0)
    if not math.isfinite(bound[0]):
        return
    slack = [ROUNDING * (abs(limit.room) + float(np.abs(limit.added).sum())) for limit in limits]
    # At each layer what may follow: by how much it raises the bound, the least first; itself, where it ends.
    steps = [
        sorted((float(priced[number]) + bound[end] - bound[first], number, end) for number, end in choices)
        for first, choices in enumerate(starts)
    ]
    steps = [[step for step in those if math.isfinite(step[0])] for those in steps]
    ticks = itertools.count()
    open_ways: list[tuple[Any, ...]] = []

    def remember(so_far: float, reached: int, place: int, state: tuple[Any, ...], way: Any) -> None:
        """A beginning with its bound, and which step is taken from its end; equal ones: the longest first."""
        if place < len(steps[reached]):
            if len(open_ways) >= OPEN:
                raise TooManyOpen
            entry = (so_far + steps[reached][place][0], -reached, next(ticks), so_far, place, state, way)
            heapq.heappush(open_ways, entry)

    remember(bound[0] - float(prices @ rooms), 0, 0, ((0.0,) * len(limits), least), None)
    while open_ways:
        key, back, _, so_far, place, state, way = heapq.heappop(open_ways)
        if place < 0:
            yield way
            continue
        remember(so_far, -back, place + 1, state, way)
        rise, number, end = steps[-back][place]
        added = tuple(a + float(limit.added[number]) for a, limit in zip(state[0], limits))
        peak = tuple(max(p, float(each[number])) for p, each in zip(state[1], peaks))
        if any(
            a + more[end] + max(p, flat[end]) > limit.room + loose
            for a, more, p, flat, limit, loose in zip(added, rest, peak, flattest, limits, slack)
        ):
            continue
        if end < num_layers:
            remember(so_far + rise, end, 0, (added, peak), (number, way))
        else:  # its score is at least its bound: it waits until no beginning has a lower one
            whole = _places((number, way))
            score = math.fsum(float(scores[each]) for each in whole)
            heapq.heappush(open_ways, (score, -num_layers, next(ticks), score, -1, None, whole))


def _least_to_end(
    starts: Sequence[Sequence[tuple[int, int]]], values: np.ndarray, join: Callable[[float, float], float], last: float
) -> list[float]:
    """From each layer on, the least that the rest of a way comes to; infinite where none reaches the end."""
    found = [math.inf] * len(starts) + [last]
    for first in reversed(range(len(starts))):
        found[first] = min((join(float(values[number]), found[end]) for number, end in starts[first]), default=math.inf)
    return found


def _prices(
    scores: np.ndarray, spans: Sequence[tuple[int, int]], num_layers: int, limits: Sequence[Limit], rooms: np.ndarray
) -> np.ndarray | None:
    """What one unit of each limit's sum is worth in scores; `None`: not even fractions of replacements keep them."""
    if not limits:
        return np.zeros(0)
    cover = np.zeros((num_layers, len(spans)))
    for number, (first, end) in enumerate(spans):
        cover[first:end, number] = 1.0
    units = np.array([max(float(np.abs(limit.added).max()), np.finfo(float).tiny) for limit in limits])
    worth = max(float(np.abs(scores).max()), np.finfo(float).tiny)
    result = linprog(
        scores / worth,
        A_ub=np.array([limit.added for limit in limits]) / units[:, None],
        b_ub=rooms / units,
        A_eq=cover,
        b_eq=np.ones(num_layers),
        bounds=(0, 1),
        method="highs",
    )
    if result.status == 2:
        return None
    if result.status != 0:
        return np.zeros(len(limits))
    return np.maximum(0.0, -result.ineqlin.marginals) * worth / units


def _places(way: Any) -> list[int]:
    """The replacements of a linked way, the first one first."""
    found = []
    while way is not None:
        number, way = way
        found.append(number)
    return found[::-1]
