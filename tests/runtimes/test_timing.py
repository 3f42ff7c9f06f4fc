"""The measurement protocol: interleaving, statistics, pairing of rounds, and what the runners run."""

import math
import os
import threading
import time

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.wrappers import DenoiserWrapper
from edgedit_hf.runtimes.runners import SessionRunner, TorchRunner, example_inputs
from edgedit_hf.runtimes.sessions import open_session
from edgedit_hf.runtimes.timing import (
    MIN_ROUNDS,
    Measurement,
    Timing,
    choose_processors,
    environment,
    governors,
    load,
    measure,
    paired_medians,
    paired_ratio,
    paired_timings,
    pinned,
)


def test_rounds_are_interleaved_and_warm():
    calls = []
    timings = measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, warmup=1, repeats=3)
    assert calls == ["a", "b"] + ["a", "a", "b", "b"] * 3
    assert {t.repeats for t in timings.values()} == {3} and all(len(t.samples_ms) == 3 for t in timings.values())


def test_measures_time():
    timings = measure({"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.008)}, warmup=0, repeats=5)
    assert timings["short"].median_ms >= 2 and timings["long"].median_ms >= 8
    assert paired_ratio(timings["long"], timings["short"]) > 1.5


def test_minimum_and_maximum_time():
    sleep = {"sleep": lambda: time.sleep(0.002)}
    assert measure(sleep, warmup=0, repeats=2, min_seconds=0.03)["sleep"].repeats > 2
    assert measure(sleep, warmup=0, repeats=1000, max_seconds=0.001)["sleep"].repeats == MIN_ROUNDS
    measurement = Measurement(sleep, warmup=0)
    for done in range(MIN_ROUNDS):
        assert measurement.rounds == done and not measurement.long_enough(0.001)
        measurement.round()
    assert measurement.long_enough(0.001) and not measurement.long_enough(60)
    assert measurement.seconds == pytest.approx(sum(measurement.timings()["sleep"].samples_ms) / 1e3)


def test_statistics():
    timing = Timing.from_samples((4.0, 1.0, 2.0, 3.0, 5.0), threads=2)
    assert timing.median_ms == 3 and timing.iqr_ms == 2 and timing.threads == 2
    assert timing.to_dict() == {"median_ms": 3.0, "iqr_ms": 2.0, "repeats": 5, "threads": 2}


def test_pairing_takes_out_drift():
    # A machine that becomes three times slower half-way, while b costs 1.5 times a, and c twice a.
    speed = [1.0, 1.0, 1.0, 3.0, 3.0]
    timings = {
        name: Timing.from_samples(tuple(cost * s for s in speed))
        for name, cost in (("a", 10.0), ("b", 15.0), ("c", 20.0))
    }
    assert paired_ratio(timings["b"], timings["a"]) == pytest.approx(1.5)
    medians = paired_medians(timings)
    assert medians["b"] == pytest.approx(15) and medians["c"] / medians["a"] == pytest.approx(2)
    # A disturbance that hits one callable in one round does not move what they cost relative to each other.
    disturbed = {**timings, "a": Timing.from_samples((10.0, 500.0, 10.0, 30.0, 30.0))}
    medians = paired_medians(disturbed)
    assert medians["b"] / medians["a"] == pytest.approx(1.5)


def test_noise_is_what_rounds_leave_open():
    timing = Timing.from_samples((4.0, 1.0, 2.0, 3.0, 5.0))
    assert timing.noise == pytest.approx(1.57 * 2 / math.sqrt(5) / 3)
    drawn = np.random.default_rng(0).normal(100, 5, (2000, 41))
    timings = [Timing.from_samples(tuple(samples)) for samples in drawn]
    inside = np.mean([abs(t.median_ms - 100) <= t.noise * t.median_ms for t in timings])
    assert 0.88 < inside < 0.94
    # Drift that all share is no noise.
    speed = [1.0, 1.2, 1.5, 3.0, 3.0]
    drifting = {name: Timing.from_samples(tuple(cost * s for s in speed), 2) for name, cost in (("a", 10), ("b", 20))}
    paired = paired_timings(drifting)
    assert drifting["a"].noise > 0.5 and paired["a"].noise == pytest.approx(0) and paired["b"].threads == 2


def test_a_callable_that_can_is_released_after_its_turn():
    said = []

    class Call:
        def __call__(self):
            said.append("call")

        def release(self):
            said.append("release")

    measurement = Measurement({"a": Call()}, warmup=2)
    assert measurement.warmup == 2 and said == ["call", "release"] * 2
    measurement.round()
    assert said[4:] == ["call", "call", "release"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds threads to processors")
def test_a_process_is_kept_on_as_many_processors_as_threads():
    before, inside, stop = os.sched_getaffinity(0), [], threading.Event()
    worker = threading.Thread(target=stop.wait)  # one that is there already
    worker.start()
    try:
        with pinned(1) as processors:
            assert len(processors) == 1 and os.sched_getaffinity(0) == set(processors)
            assert os.sched_getaffinity(worker.native_id) == set(processors)
            started = threading.Thread(target=lambda: inside.append(os.sched_getaffinity(0)))
            started.start()
            started.join()
            assert inside == [set(processors)]
        assert os.sched_getaffinity(0) == os.sched_getaffinity(worker.native_id) == before
        with pinned(4096) as processors:  # more than there are
            assert processors is None and os.sched_getaffinity(0) == before
    finally:
        stop.set()
        worker.join()


def test_fast_processors_of_different_cores_come_first(tmp_path):
    """Two fast cores of two threads each, numbered in turns, and two slow cores."""
    for number, (core, speed) in enumerate([("0,2", 5), ("1,3", 5), ("0,2", 5), ("1,3", 5), ("4", 3), ("5", 3)]):
        for name, value in (("topology/thread_siblings_list", core), ("cpufreq/cpuinfo_max_freq", speed)):
            path = tmp_path / f"cpu{number}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")
    (tmp_path / "cpu4" / "cpufreq" / "scaling_governor").write_text("powersave\n")
    assert [choose_processors(range(6), count, tmp_path) for count in (1, 2, 3, 5)] == [
        [0],
        [0, 1],
        [0, 1, 4],
        [0, 1, 2, 4, 5],
    ]
    assert choose_processors([3, 7], 1, tmp_path / "absent") == [3]
    assert governors(range(6), tmp_path) == ["powersave"] and governors([0], tmp_path) == []
    assert load() is None or load() >= 0


def test_errors_say_what_is_wrong():
    with pytest.raises(EdgeDiTError, match="0 callables"):
        measure({})
    with pytest.raises(EdgeDiTError, match="repeats=1"):
        measure({"a": lambda: None}, repeats=1)
    with pytest.raises(EdgeDiTError, match="3 and 2 rounds"):
        paired_ratio(Timing.from_samples((1.0, 1.0, 1.0)), Timing.from_samples((1.0, 1.0)))
    with pytest.raises(EdgeDiTError, match="same measure"):
        paired_medians({"a": Timing.from_samples((1.0, 1.0, 1.0)), "b": Timing.from_samples((1.0, 1.0))})


def test_environment_names_the_machine():
    found = environment(2)
    assert found["threads"] == 2 and found["cpu"] and found["cores"] >= 1
    assert {"python", "torch", "onnxruntime"} <= set(found["versions"])


def test_torch_runner_uses_its_threads_and_puts_them_back(make_transformer):
    model = make_transformer()
    seen = []
    handle = model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    runner = TorchRunner(DenoiserWrapper(model), example_inputs(model.config, 3), threads=1)
    assert runner().shape == (3, 1, 8, 8) and runner.threads == 1
    handle.remove()
    assert seen == [1] and torch.get_num_threads() == before


def test_example_inputs_cover_the_classes(make_transformer):
    inputs = example_inputs(make_transformer().config, 200)
    assert inputs["sample"].shape == (200, 1, 8, 8) and inputs["timestep"].dtype == torch.float32
    assert inputs["class_labels"].max() == 10 and inputs["class_labels"].min() == 0  # 10 is the null class
    assert set(example_inputs(make_transformer(num_classes=0).config, 2)) == {"sample", "timestep"}


def test_a_session_runner_runs_its_inputs(tmp_path):
    shape = ["batch", 4]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "double",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = min(model.ir_version, 10)
    onnx.checker.check_model(model)
    onnx.save(model, tmp_path / "double.onnx")
    runner = SessionRunner(open_session(tmp_path / "double.onnx", threads=1), {"x": np.ones((5, 4), np.float32)})
    assert runner()[0].shape == (5, 4) and (runner()[0] == 2).all()
    assert measure({"onnx": runner}, warmup=0, repeats=2)["onnx"].threads == 1
