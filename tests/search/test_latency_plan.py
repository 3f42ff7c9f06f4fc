"""The plan of a latency table: its fit is exact on exact times, and it says how well it predicts."""

import re
import statistics

import numpy as np
import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.genotype import Genotype, Shape
from edgedit_hf.records import Table
from edgedit_hf.runtimes.timing import Timing
from edgedit_hf.schema import check
from edgedit_hf.search.latency_networks import fitted_networks, held_out, timed_shapes
from edgedit_hf.search.latency_plan import TablePlan, fit, judge


def test_the_fit_recovers_exact_times():
    large, small = Shape(128, 4, 4.0), Shape(64, 4, 2.0)
    costs = {large: 2.0, small: 0.75}
    times = {(shape,) * depth: 0.5 + depth * cost for shape, cost in costs.items() for depth in (2, 6)}
    trunk, blocks, residual = fit(times)
    assert trunk == pytest.approx(0.5) and blocks == pytest.approx(costs) and residual < 1e-9
    with pytest.raises(EdgeDiTError, match="must be positive"):
        fit({(large,) * 2: 3.0, (large,) * 6: 2.0})


def test_the_design_tells_16_shapes_apart_under_noise():
    """The fitted networks of a menu give trunk and layers back exactly, and to about the noise where there is some."""
    shapes = [
        Shape(64, heads, ratio, token_merge=merge) for heads in (1, 2, 4, 8) for ratio in (2.0, 4.0) for merge in (1, 2)
    ]
    costs = {shape: 5 + 10 * shape.mlp_ratio / shape.token_merge + shape.num_heads for shape in shapes}
    networks = fitted_networks(shapes, 28)
    assert len(networks) == len(shapes) + 1 + 4
    times = {network: 7.0 + sum(costs[shape] for shape in network) for network in networks}
    trunk, blocks, residual = fit(times)
    assert trunk == pytest.approx(7.0) and blocks == pytest.approx(costs) and residual < 1e-9
    noise = np.random.default_rng(0)
    errors, whole = [], [tuple(noise.choice(16, 28)) for _ in range(16)]
    for _ in range(20):
        trunk, blocks, _ = fit({network: time * noise.normal(1, 0.02) for network, time in times.items()})
        for network in whole:
            true = 7.0 + sum(costs[shapes[index]] for index in network)
            errors.append(abs(trunk + sum(blocks[shapes[index]] for index in network) - true) / true)
    assert statistics.fmean(errors) < 0.02  # the design makes no more of the noise than there is


def entries(predicted, measured) -> list[dict]:
    return [
        {"predicted_ms": p, "measured_ms": m, "relative_error": abs(p - m) / m}
        for p, m in zip(predicted, measured, strict=True)
    ]


def test_the_judgement_by_hand():
    found = judge(entries([22.0, 38.0, 80.0], [20.0, 40.0, 80.0]), 0, 20, batch=4)
    assert found["mean"] == pytest.approx((0.1 + 0.05 + 0) / 3) and found["max"] == pytest.approx(0.1)
    assert found["baseline"] == pytest.approx(((140 / 3 - 20) / 20 + (140 / 3 - 40) / 40 + (80 - 140 / 3) / 80) / 3)
    assert found["ratio"] == pytest.approx(found["mean"] / found["baseline"])
    assert found["kendall"] == found["spearman"] == pytest.approx(1) and found["passed"] and found["remarks"] == []
    found = judge(entries([40.0, 20.0, 90.0, 5.0], [20.0, 40.0, 80.0, 10.0]), 3, 20, batch=4)
    assert found["kendall"] == pytest.approx(4 / 6) and found["spearman"] == pytest.approx(0.8)
    assert not found["passed"] and found["least_ms"] == 10
    said = "; ".join(found["remarks"])
    for words in (
        "mean error is 53.1%, above 8%",
        "above 0.25",
        "Kendall's τ of predicted and measured is 0.67, below 0.9",
        "3 of 20 networks scatter",
        "takes 10.0 ms, below 20.*latency.batch_size 8 would",
    ):
        assert re.search(words, said), words


def test_a_judgement_of_nothing_or_of_equal_networks():
    found = judge([], 0, 5, batch=1)
    assert found["mean"] is None and found["kendall"] is None and found["passed"] and found["remarks"] == []
    found = judge(entries([30.0, 31.0], [30.0, 30.0]), 0, 5, batch=1)
    assert found["ratio"] is None and found["kendall"] is None and found["max"] == pytest.approx(1 / 30)


COSTS = (30.0, 23.7, 19.1, 14.9)  # of the four shapes


def test_times_from_anywhere_make_a_table(teacher_config, teacher_space):
    """A device of known trunk and layers that slows down by half is recovered; what was said of it stands there."""
    space, config = teacher_space, teacher_config
    plan = TablePlan(config, space)
    assert plan.shapes == timed_shapes(space) and plan.fitted == fitted_networks(plan.shapes, space.num_layers)
    assert plan.check == held_out(config, space, plan.fitted)
    cost = dict(zip(plan.shapes, COSTS, strict=True))
    speeds = np.linspace(1.0, 1.5, 5)
    times = {
        key: Timing.from_samples(tuple(map(float, speeds * (4.0 + sum(cost[shape] for shape in network)))))
        for key, network in plan.networks.items()
    }
    said = {"runtime": "web", "precision": "int8", "batch": 3, "threads": 4}
    environment, protocol = {"cpu": "a phone", "versions": {"web": "1.30"}}, {"imported": True}
    table = plan.table(times, **said, environment=environment, protocol=protocol, remarks=["it slowed down"])
    scale = speeds[2]  # of the median round
    assert table.trunk_ms == pytest.approx(4 * scale)
    assert [table.blocks[shape] for shape in plan.shapes] == pytest.approx([scale * each for each in COSTS])
    data = table.to_dict()
    assert {key: data[key] for key in said} == said and data["environment"] == environment
    assert data["protocol"]["rounds"] == data["repeats"] == 5 and data["protocol"]["imported"] is True
    assert table.remarks == ["the table's predictions are to be taken with care: it slowed down"]
    check(data, Table, "the table")


def test_a_plan_whose_networks_are_given(teacher_config, teacher_space):
    """The sizes of the teacher are enough then."""
    whole = Genotype.of(teacher_config)
    shape = whole.layers[0].shape.timed
    sizes = {key: teacher_config[key] for key in ("sample_size", "patch_size", "in_channels", "hidden_size")}
    plan = TablePlan(
        {**sizes, "num_classes": 10, "learn_sigma": False}, teacher_space, [whole], [(shape,), (shape,) * 2]
    )
    assert plan.networks == {(shape,): (shape,), (shape,) * 2: (shape,) * 2, whole.hash: (shape,) * 4}
