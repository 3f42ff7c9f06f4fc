"""The latency table: its parts compute what the model computes, its fit is exact on exact times, and it knows its
teacher.
"""

import json
import statistics
from collections import Counter

import numpy as np
import onnx
import pytest
import torch

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.onnx.lower import initializer_bytes
from edgedit_hf.genotype import Genotype, LayerSpec
from edgedit_hf.runtimes.runners import SessionRunner, example_inputs
from edgedit_hf.runtimes.sessions import open_session
from edgedit_hf.runtimes.timing import measure, paired_medians
from edgedit_hf.search.latency_table import (
    DEPTHS,
    LatencyTable,
    LoweredParts,
    TableMeasurement,
    _fit,
    check_genotypes,
    given_table,
    lower_network,
    random_model,
)
from edgedit_hf.search_space import OPTIONS, SearchSpace


@pytest.fixture(scope="module")
def config(make_transformer):
    return dict(make_transformer().config)


@pytest.fixture(scope="module")
def space(config):
    return SearchSpace.for_config(config)


def measure_table(config, space, rounds: int = 40, **options) -> LatencyTable:
    measurement = TableMeasurement(config, space, **options)
    measurement.lower()
    for _ in range(rounds):
        measurement.round()
    return measurement.table()


@pytest.fixture(scope="module")
def table(config, space):
    return measure_table(config, space, batch=64, threads=1, rounds=5)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("int8", 5e-2)])
def test_joined_parts_are_the_model_as_it_ships(config, space, tmp_path, precision, tolerance):
    """What the model computes, by the operators on the weights of its export as a whole, whatever their order and
    names.
    """
    shapes = [space.option_shape(option) for option in ("original", "both")]
    network = {**config, "layers": [LayerSpec((i,), *shape).to_dict() for i, shape in enumerate(shapes)]}
    inputs = example_inputs(config, 5)
    with torch.no_grad():
        expected = random_model(network)(*inputs.values()).sample.numpy()
    joined = LoweredParts(config, shapes, precision).network(shapes, tmp_path / "joined.onnx")
    (found,) = open_session(joined, 1).run(inputs)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < tolerance

    def operators(path):
        counts = Counter(node.op_type for node in onnx.load(str(path)).graph.node)
        return {name: counts[name] for name in ("Attention", "MatMul", "Gemm", "MatMulInteger", "LayerNormalization")}

    whole = lower_network(network, "onnxruntime", precision, 5, tmp_path / "whole")
    assert operators(joined) == operators(whole) and (operators(joined)["MatMulInteger"] > 0) == (precision == "int8")
    assert initializer_bytes(joined).get("int8") == initializer_bytes(whole).get("int8")
    shipped = open_session(whole, 1).run(inputs)[0]
    assert np.linalg.norm(found - shipped) <= 1e-5 * np.linalg.norm(shipped)


def test_the_fit_recovers_exact_times():
    costs = {(128, 4, 4.0): 2.0, (64, 4, 2.0): 0.75}
    times = {(shape, depth): 0.5 + depth * cost for shape, cost in costs.items() for depth in DEPTHS}
    trunk, blocks, residual = _fit(times)
    assert trunk == pytest.approx(0.5) and blocks == pytest.approx(costs) and residual < 1e-9
    with pytest.raises(EdgeDiTError, match="must be positive"):
        _fit({((128, 4, 4.0), 2): 3.0, ((128, 4, 4.0), 6): 2.0})


def test_latency_is_additive(table, space):
    original = Genotype.original(space.num_layers, space.hidden_size, space.num_heads)
    assert set(table.blocks) == {space.option_shape(option) for option in OPTIONS}
    block = table.blocks[space.option_shape("original")]
    assert table.latency_ms(original) == pytest.approx(table.trunk_ms + space.num_layers * block)
    merged = space.from_code((16,) * space.num_pairs)
    assert table.latency_ms(merged) == pytest.approx(table.trunk_ms + space.num_pairs * block)


def test_the_table_states_its_prediction_error(table, space):
    prediction = table.to_dict()["prediction"]
    assert [entry["genotype"] for entry in prediction["networks"]] == [g.hash for g in check_genotypes(space)]
    for entry in prediction["networks"]:
        assert entry["predicted_ms"] == pytest.approx(table.latency_ms(space.from_code(entry["code"])))
        assert entry["relative_error"] == pytest.approx(abs(entry["predicted_ms"] / entry["measured_ms"] - 1))
    assert prediction["max"] == max(entry["relative_error"] for entry in prediction["networks"])
    environment = table.to_dict()["environment"]
    assert environment["threads"] == 1 and environment["cpu"] and "onnxruntime" in environment["versions"]


def test_json_round_trip(table, space, tmp_path):
    path = tmp_path / "table.json"
    table.to_json(path)
    again = LatencyTable.from_json(path)
    genotype = check_genotypes(space)[-1]
    assert again.hash == table.hash and again.latency_ms(genotype) == table.latency_ms(genotype)
    data = json.loads(path.read_text())
    data["trunk_ms"] += 1
    path.write_text(json.dumps(data))
    with pytest.raises(EdgeDiTError, match=f"{table.hash}.*it was changed"):
        LatencyTable.from_json(path)
    path.write_text("[1]")
    with pytest.raises(EdgeDiTError, match="no latency table"):
        LatencyTable.from_json(path)
    with pytest.raises(EdgeDiTError, match="does not exist"):
        LatencyTable.from_json(tmp_path / "absent.json")


def test_another_teacher_is_an_error(table, config, space):
    with pytest.raises(EdgeDiTError, match="6 layers of width 64.*4 layers of width 32"):
        table.latency_ms(Genotype.original(6, 64, 4))
    foreign = Genotype((LayerSpec((0,), 16, 2, 3.0), *Genotype.original(4, 32, 2).layers[1:]), 32)
    with pytest.raises(EdgeDiTError, match=r"shape \(16, 2, 3.0\)"):
        table.latency_ms(foreign)
    table.check_config(config)
    with pytest.raises(EdgeDiTError, match=r"sample_size 8 \(table\) / 16 \(model\)"):
        table.check_config({**config, "sample_size": 16})


def test_a_table_that_a_recipe_names_must_fit(table, config, space, tmp_path, make_hub_cache, monkeypatch):
    path = tmp_path / "table.json"
    with pytest.raises(EdgeDiTError, match=f"latency.table is {path}, but there is no such file; give the table.json"):
        given_table(str(path), config, space)
    table.to_json(path)
    assert given_table(str(path), config, space).hash == table.hash
    (tmp_path / "latency").mkdir()
    table.to_json(tmp_path / "latency" / "table.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(make_hub_cache(tmp_path / "latency", "me/table")))
    for name in ("me/table", "hf://me/table@main/table.json"):
        assert given_table(name, config, space).hash == LatencyTable.from_json(name).hash == table.hash
    with pytest.raises(EdgeDiTError, match="latency.table is me/other: it is neither a local path nor a Hub id"):
        given_table("me/other", config, space)
    for other in ({"sample_size": 16}, {"patch_size": 4}, {"learn_sigma": True}):
        with pytest.raises(
            EdgeDiTError, match=f"latency.table is {path}: .* belongs to another teacher: {[*other][0]}"
        ):
            given_table(str(path), {**config, **other}, space)
    wider = SearchSpace.for_config(config, reduced_attention_dim=8)
    with pytest.raises(EdgeDiTError, match=rf"latency.table is {path}: The genotype has a layer of shape \(8, "):
        given_table(str(path), config, wider)


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
def test_prediction_of_exported_networks(precision, tmp_path):
    from edgedit_hf import EdgeDiTTransformer2DModel

    config = dict(EdgeDiTTransformer2DModel.from_preset("DiT-digits/2").config)
    space = SearchSpace.for_config(config)
    table = measure_table(config, space, batch=32, threads=1, precision=precision)
    found = prediction_errors(table, config, check_genotypes(space), tmp_path)
    assert len(found) == 2 and statistics.fmean(found) < 0.1, found


@pytest.mark.slow
@pytest.mark.export
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_table_of_executorch(make_transformer, precision, tmp_path):
    config = dict(make_transformer(hidden_size=64, num_layers=2).config)
    space = SearchSpace.for_config(config)
    table = measure_table(config, space, batch=16, threads=1, runtime="executorch", precision=precision, rounds=20)
    assert table.runtime == "executorch" and set(table.blocks) == {space.option_shape(option) for option in OPTIONS}
    assert table.blocks[space.option_shape("both")] < table.blocks[space.option_shape("original")]
    assert "executorch" in table.to_dict()["environment"]["versions"]
    found = prediction_errors(table, config, check_genotypes(space)[-1:], tmp_path)
    assert len(found) == 1 and found[0] < 0.3, found
