"""The measurement protocol: interleaving, statistics, pairing of rounds, and what the runners run."""

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
    environment,
    measure,
    paired_medians,
    paired_ratio,
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
