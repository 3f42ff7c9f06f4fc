"""Measuring a latency table: it comes out true on a machine that drifts or scatters, and says how well it predicts."""

import itertools
import shutil
import statistics

import numpy as np
import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.onnx.lower import lower_onnx
from edgedit_hf.genotype import Genotype, Shape
from edgedit_hf.records import Table
from edgedit_hf.runtimes.runners import SessionRunner, example_inputs
from edgedit_hf.runtimes.sessions import open_session
from edgedit_hf.runtimes.timing import Measurement, measure, paired_medians
from edgedit_hf.schema import check
from edgedit_hf.search.latency_measurement import TableMeasurement
from edgedit_hf.search.latency_networks import fitted_networks, held_out, lower_network
from edgedit_hf.search_space import OPTIONS, SearchSpace


@pytest.fixture(scope="module")
def config(teacher_config):
    return teacher_config


@pytest.fixture(scope="module")
def space(teacher_space):
    return teacher_space


COSTS = (30.0, 23.7, 19.1, 14.9)  # of the four shapes


class Machine:
    """A clock that calls advance: what they cost, times a factor that the machine has at that moment."""

    def __init__(self, monkeypatch, factors):
        self.now, self.factors = 0.0, itertools.cycle(factors)
        monkeypatch.setattr("edgedit_hf.runtimes.timing.time.perf_counter", lambda: self.now)

    def call(self, milliseconds: float):
        def advance():
            self.now += 1e-3 * milliseconds * next(self.factors)

        return advance


@pytest.fixture
def on_machine(config, space, monkeypatch):
    """A measurement whose networks take what an additive model says, on a machine with such factors."""

    def make(factors) -> TableMeasurement:
        measurement = TableMeasurement(config, space, batch=2, threads=1)
        machine = Machine(monkeypatch, factors)
        cost = dict(zip(measurement.plan.shapes, COSTS, strict=True))
        calls = {
            key: machine.call(4.0 + sum(cost[shape] for shape in network))
            for key, network in measurement.networks.items()
        }
        measurement.measurement = Measurement(calls)
        return measurement

    return make


def test_a_quiet_machine_gives_the_true_table(on_machine):
    measurement = on_machine([1.0])
    for _ in range(5):
        measurement.round()
    assert measurement.unsettled(5) == 0
    table = measurement.table({"processors": [0]})
    data = table.to_dict()
    assert table.trunk_ms == pytest.approx(4) and [b["ms"] for b in data["blocks"]] == pytest.approx(COSTS)
    assert data["noisy"] is False and table.remarks == []
    assert data["protocol"]["rounds"] == 5 and data["protocol"]["warmup_rounds"] == 3
    assert data["protocol"]["processors"] == [0]
    prediction = data["prediction"]
    assert prediction["mean"] < 1e-9 and prediction["kendall"] == pytest.approx(1) and prediction["passed"]
    for network in (*data["networks"], *prediction["networks"]):
        assert network["noise"] == pytest.approx(0) and network["noisy"] is False and network["repeats"] == 5
        assert network["iqr_ms"] == pytest.approx(0, abs=1e-9) and network["median_ms"] > 20
    assert [sum(network["layers"]) for network in data["networks"]][:5] == [5, 5, 5, 5, 1]
    check(data, Table, "the table")


def test_a_machine_that_drifts_gives_the_true_table_too(on_machine):
    """Every round at another speed, as a processor that warms up."""
    measurement = on_machine([1.0])
    calls = 2 * len(measurement.networks)
    measurement = on_machine([1.0] * 3 * (calls // 2) + [speed for speed in (1, 1.1, 1.4, 2, 3) for _ in range(calls)])
    for _ in range(5):
        measurement.round()
    assert measurement.unsettled(5) == 0
    data = measurement.table().to_dict()
    ratios = [block["ms"] / data["blocks"][0]["ms"] for block in data["blocks"]]
    assert ratios == pytest.approx([cost / COSTS[0] for cost in COSTS]) and data["prediction"]["mean"] < 1e-9


def test_a_noisy_machine_is_measured_longer_and_flagged(on_machine):
    noise = np.random.default_rng(0)
    measurement = on_machine(noise.uniform(1, 2, 10007))
    for _ in range(5):
        measurement.round()
    assert measurement.unsettled(5) > 0
    while measurement.unsettled(5):
        measurement.round()
    assert measurement.rounds == 15  # three times what was asked for, no more
    table = measurement.table()
    data = table.to_dict()
    noisy = [n["noisy"] for n in (*data["networks"], *data["prediction"]["networks"])]
    assert data["noisy"] is True and any(noisy) and data["protocol"]["rounds"] == 15
    assert any(f"{sum(noisy)} of {len(noisy)} networks scatter too much" in remark for remark in table.remarks)


def test_a_disturbance_that_passes_is_outlived(on_machine):
    """Two rounds of five beside another program: more rounds, and no flag."""
    once = len(on_machine([1.0]).networks)
    noise = np.random.default_rng(0)
    quiet, busy = [1.0] * 3 * once, list(noise.uniform(1, 2, 2 * 2 * once))
    measurement = on_machine([*quiet, *busy, *[1.0] * 100 * once])
    for _ in range(5):
        measurement.round()
    assert measurement.unsettled(5) > 0
    while measurement.unsettled(5):
        measurement.round()
    assert 5 < measurement.rounds < 15
    table = measurement.table()
    assert table.to_dict()["noisy"] is False and table.trunk_ms == pytest.approx(4, rel=0.05)


@pytest.mark.slow
@pytest.mark.export
def test_networks_are_lowered_once(table, kept_networks, config, space, tmp_path, monkeypatch):
    """What is there is taken, what is missing is lowered, what is left of other settings goes."""
    (made,) = kept_networks.iterdir()
    folder = tmp_path / made.name
    shutil.copytree(made, folder)
    (tmp_path / "of-another-precision").mkdir()
    weights = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name.endswith(".data")}
    assert {"embed.onnx.data", "layer_0.onnx.data", "unembed.onnx.data"} <= set(weights)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    (folder / "layer_1.onnx").unlink()  # as a kill between two parts leaves it
    lowered = []

    def watched(part, *args, **options):
        lowered.append(part.name)
        return lower_onnx(part, *args, **options)

    monkeypatch.setattr("edgedit_hf.export.onnx.lower.lower_onnx", watched)
    measurement = TableMeasurement(config, space, batch=2, threads=1)
    measurement.lower(tmp_path)
    measurement.round()
    assert lowered == ["layer_1"] and [path.name for path in tmp_path.iterdir()] == [folder.name]
    for name, changed in weights.items():
        assert ((folder / name).stat().st_mtime_ns == changed) == (name != "layer_1.onnx.data")


def test_networks_too_big_to_stay_are_loaded_for_their_turns(table, kept_networks, config, space, monkeypatch):
    monkeypatch.setattr("edgedit_hf.search.latency_measurement.OPEN_BYTES", 1.0)
    measurement = TableMeasurement(config, space, batch=2, threads=1)
    measurement.lower(kept_networks)
    for _ in range(2):
        measurement.round()
    runners = measurement.measurement.callables.values()
    assert all(runner.session.session is None for runner in runners)
    assert measurement.table().to_dict()["protocol"]["kept_open"] is False


def test_the_table_states_its_prediction_error(table, config, space):
    prediction = table.to_dict()["prediction"]
    fitted = fitted_networks([Shape(*shape) for shape in table.blocks], space.num_layers)
    assert [entry["genotype"] for entry in prediction["networks"]] == [g.hash for g in held_out(config, space, fitted)]
    assert len(prediction["networks"]) == 16
    for entry in prediction["networks"]:
        assert entry["predicted_ms"] == pytest.approx(table.latency_ms(space.from_code(entry["code"])))
        assert entry["relative_error"] == pytest.approx(abs(entry["predicted_ms"] / entry["measured_ms"] - 1))
    assert prediction["max"] == max(entry["relative_error"] for entry in prediction["networks"])
    environment = table.to_dict()["environment"]
    assert environment["threads"] == 1 and environment["cpu"] and "onnxruntime" in environment["versions"]


def test_what_does_not_exist_is_an_error(config, space):
    for options, message in (
        ({"runtime": "coreml"}, "coreml-fp32"),
        ({"precision": "int4"}, "onnxruntime-int4.*executorch-int4"),
        ({"batch": 0}, "batch is 0"),
    ):
        with pytest.raises(EdgeDiTError, match=message):
            TableMeasurement(config, space, **{"batch": 1, "threads": 1, **options})


def prediction_errors(table, config, genotypes, folder) -> list[float]:
    """|predicted − measured| / measured of whole networks, exported and timed now. The machine may be faster or slower
    than when the table was measured: the original network runs in the same rounds, its time over its predicted one is
    the drift.
    """
    space, runners = table.space, {}
    original = Genotype.original(space.num_layers, space.hidden_size, space.num_heads, space.mlp_ratio)
    for genotype in {g.hash: g for g in [original, *genotypes]}.values():
        network = {**config, "layers": genotype.to_layers()}
        file = lower_network(network, table.runtime, table.precision, table.batch, folder / genotype.hash)
        session = open_session(file, table.threads)
        runners[genotype.hash] = SessionRunner(session, example_inputs(config, table.batch))
    times = paired_medians(measure(runners, repeats=20))
    drift = times[original.hash] / table.latency_ms(original)
    others = [genotype for genotype in genotypes if genotype != original]  # which fits by construction
    return [abs(drift * table.latency_ms(g) - times[g.hash]) / times[g.hash] for g in others]


@pytest.mark.slow
@pytest.mark.export
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_prediction_of_exported_networks(precision, measure_table, tmp_path):
    from edgedit_hf import EdgeDiTTransformer2DModel

    config = dict(EdgeDiTTransformer2DModel.from_preset("DiT-digits/2").config)
    space = SearchSpace.for_config(config)
    table = measure_table(config, space, batch=32, threads=1, precision=precision)
    whole = held_out(config, space)
    found = prediction_errors(table, config, [whole[0], whole[8], whole[-1]], tmp_path)
    assert len(found) == 2 and statistics.fmean(found) < 0.1, found


@pytest.mark.slow
@pytest.mark.export
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_table_of_executorch(make_transformer, measure_table, precision, tmp_path):
    config = dict(make_transformer(hidden_size=64, num_layers=2).config)
    space = SearchSpace.for_config(config)
    table = measure_table(config, space, batch=16, threads=1, runtime="executorch", precision=precision, rounds=20)
    assert table.runtime == "executorch" and set(table.blocks) == {space.option_shape(option) for option in OPTIONS}
    assert table.blocks[space.option_shape("both")] < table.blocks[space.option_shape("original")]
    assert "executorch" in table.to_dict()["environment"]["versions"]
    found = prediction_errors(table, config, held_out(config, space)[-2:-1], tmp_path)
    assert len(found) == 1 and found[0] < 0.3, found
