"""Ways in order, against all ways that recursion finds."""

import itertools

import numpy as np
import pytest

from edgedit_hf.search import enumeration
from edgedit_hf.search.enumeration import Limit, TooManyOpen, ways_in_order


def every_way(spans: list[tuple[int, int]], num_layers: int, first: int = 0) -> list[list[int]]:
    if first == num_layers:
        return [[]]
    return [
        [number, *rest]
        for number, (start, end) in enumerate(spans)
        if start == first and end <= num_layers
        for rest in every_way(spans, num_layers, end)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_every_way_within_the_limits_comes_once_the_best_first(seed):
    draw, num_layers = np.random.default_rng(seed), 3 + seed % 3
    spans = [(first, first + span) for span in (1, 2, 3) for first in range(num_layers - span + 1) for _ in range(3)]
    scores = draw.lognormal(-8, 3, len(spans)) if seed % 2 else draw.integers(-2, 3, len(spans)) / 4
    sizes, live, times = draw.integers(1, 9, (3, len(spans))).astype(float)
    ways = every_way(spans, num_layers)

    def used(way: list[int], peak: bool) -> float:
        return sum(sizes[way]) + (max(2.0, *live[way]) if peak else 0.0)

    for peak, share in itertools.product((False, True), (0.0, 0.2, 0.6, 1.0)):
        room = sorted(used(way, peak) for way in ways)[int(share * (len(ways) - 1))]
        slowest = sorted(sum(times[way]) for way in ways)[int(0.7 * (len(ways) - 1))]
        limits = [Limit(sizes, room, live if peak else None, 2.0 if peak else 0.0), Limit(times, slowest)]
        truth = [way for way in ways if used(way, peak) <= room and sum(times[way]) <= slowest]
        found = list(ways_in_order(scores, spans, num_layers, limits))
        assert sorted(found) == sorted(truth)
        sums = [sum(scores[way]) for way in found]
        assert all(after >= before - 1e-12 for before, after in itertools.pairwise(sums))
    assert sorted(ways_in_order(scores, spans, num_layers)) == sorted(ways)
    assert not list(ways_in_order(scores, spans, num_layers, [Limit(sizes, 0.5)]))


def test_a_row_that_cannot_be_covered_has_no_way():
    assert list(ways_in_order(np.zeros(2), [(0, 2), (1, 3)], 3)) == []
    assert list(ways_in_order(np.zeros(2), [(0, 2), (1, 3)], 3, [Limit(np.ones(2), 5.0)])) == []


def test_what_takes_too_much_memory_is_given_up(monkeypatch):
    monkeypatch.setattr(enumeration, "OPEN", 50)
    spans = [(layer, layer + 1) for layer in range(20) for _ in range(2)]
    found = ways_in_order(np.tile([0.0, 1.0], 20) * np.random.default_rng(0).uniform(1, 1.01, 40), spans, 20)
    assert next(found) == list(range(0, 40, 2))
    with pytest.raises(TooManyOpen):
        list(found)
