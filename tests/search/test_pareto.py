"""Pareto fronts, hypervolume against BoTorch's, the knee point and the choice within limits."""

import math

import numpy as np
import pytest
import torch

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.search.pareto import choose, hypervolume, hypervolume_trace, knee_point, pareto_front


def random_points(seed: int, count: int = 30) -> list[tuple[float, float]]:
    return [tuple(row) for row in np.random.default_rng(seed).uniform(0.1, 10.0, (count, 2)).tolist()]


@pytest.mark.parametrize("seed", range(5))
def test_front_is_what_the_definition_says(seed):
    points = [(round(a, 1), round(b, 1)) for a, b in random_points(seed, 60)]  # rounding makes ties
    front = pareto_front(points)
    dominated = [
        any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points) or points.index(p) != i
        for i, p in enumerate(points)
    ]
    assert sorted(front) == [i for i, d in enumerate(dominated) if not d]
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


@pytest.mark.parametrize("seed", range(5))
def test_hypervolume_equals_botorch(seed):
    from botorch.utils.multi_objective.hypervolume import Hypervolume

    points, reference = random_points(seed), (7.0, 8.0)  # some points lie beyond the reference
    front = torch.tensor([points[i] for i in pareto_front(points)], dtype=torch.float64)
    expected = Hypervolume(ref_point=-torch.tensor(reference, dtype=torch.float64)).compute(-front)
    assert hypervolume(points, reference) == pytest.approx(expected, rel=1e-12)


def test_hypervolume_trace_grows_to_the_whole():
    points, reference = random_points(0), (11.0, 11.0)
    trace = hypervolume_trace(points, reference)
    assert len(trace) == len(points) and trace == sorted(trace) and trace[-1] == hypervolume(points, reference)
    assert hypervolume([], reference) == 0.0 and hypervolume([(12.0, 1.0)], reference) == 0.0


def test_knee_is_the_corner_of_an_l():
    front = [(1.0, 100.0), (1.2, 20.0), (1.5, 12.0), (8.0, 10.0)]
    assert knee_point(front) == 2  # 1 - x - y: 0, .861, .906, 0
    assert knee_point([(a * 1e6, b * 1e-3) for a, b in front]) == 2  # units do not matter
    assert knee_point([(2.0, 1.0), (1.0, 2.0)]) == 1  # nothing below the chord: the better first objective
    assert knee_point([(3.0, 3.0)]) == 0


ENTRIES = [
    {"distance": 1.0, "latency_ms": 10.0, "parameters": 100},
    {"distance": 2.0, "latency_ms": 6.0, "parameters": 90},
    {"distance": 9.0, "latency_ms": 5.0, "parameters": 40},
]


def test_choose_by_limit_or_knee():
    assert choose(ENTRIES)[0] is ENTRIES[1]
    assert choose(ENTRIES, max_latency_ms=10.0)[0] is ENTRIES[0]
    entry, reason = choose(ENTRIES, max_latency_ms=6.5)
    assert entry is ENTRIES[1] and "latency_ms <= 6.5" in reason
    assert choose(ENTRIES, max_latency_ms=6.5, max_parameters=50)[0] is ENTRIES[2]


def test_choose_says_what_does_not_fit():
    with pytest.raises(EdgeDiTError, match="latency_ms <= 4.*fastest has latency_ms 5"):
        choose(ENTRIES, max_latency_ms=4.0)
    with pytest.raises(EdgeDiTError, match="'flops'"):
        choose(ENTRIES, max_flops=1e9)
    with pytest.raises(EdgeDiTError, match="must be greater than 0"):
        choose(ENTRIES, max_latency_ms=0.0)
    with pytest.raises(EdgeDiTError, match="0 entries"):
        choose([])


def test_bad_points_are_errors():
    for points in ([(1.0, math.nan)], [(1.0, 2.0, 3.0)]):
        with pytest.raises(EdgeDiTError, match="finite values of shape"):
            pareto_front(points)
    with pytest.raises(EdgeDiTError, match="reference point"):
        hypervolume([(1.0, 1.0)], (1.0, math.inf))
