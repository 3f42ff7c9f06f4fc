"""Measuring a latency table: its fit is exact on exact times, and it says how well it predicts."""

import statistics

import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.genotype import Genotype
from edgedit_hf.runtimes.runners import SessionRunner, example_inputs
from edgedit_hf.runtimes.sessions import open_session
from edgedit_hf.runtimes.timing import measure, paired_medians
from edgedit_hf.search.latency_measurement import DEPTHS, TableMeasurement, _fit
from edgedit_hf.search.latency_networks import lower_network
from edgedit_hf.search.latency_table import check_genotypes
from edgedit_hf.search_space import OPTIONS, SearchSpace


@pytest.fixture(scope="module")
def config(teacher_config):
    return teacher_config


@pytest.fixture(scope="module")
def space(teacher_space):
    return teacher_space


def test_the_fit_recovers_exact_times():
    costs = {(128, 4, 4.0): 2.0, (64, 4, 2.0): 0.75}
    times = {(shape, depth): 0.5 + depth * cost for shape, cost in costs.items() for depth in DEPTHS}
    trunk, blocks, residual = _fit(times)
    assert trunk == pytest.approx(0.5) and blocks == pytest.approx(costs) and residual < 1e-9
    with pytest.raises(EdgeDiTError, match="must be positive"):
        _fit({((128, 4, 4.0), 2): 3.0, ((128, 4, 4.0), 6): 2.0})


def test_the_table_states_its_prediction_error(table, space):
    prediction = table.to_dict()["prediction"]
    assert [entry["genotype"] for entry in prediction["networks"]] == [g.hash for g in check_genotypes(space)]
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
    found = prediction_errors(table, config, check_genotypes(space), tmp_path)
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
    found = prediction_errors(table, config, check_genotypes(space)[-1:], tmp_path)
    assert len(found) == 1 and found[0] < 0.3, found
