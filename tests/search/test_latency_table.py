"""The latency table: additive, the same after a file, and it knows its teacher."""

import dataclasses
import json

import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.genotype import Genotype, LayerSpec
from edgedit_hf.run.sections import LatencyConfig
from edgedit_hf.search.latency_networks import held_out
from edgedit_hf.search.latency_table import LatencyTable, given_table
from edgedit_hf.search_space import OPTIONS, SearchSpace


@pytest.fixture(scope="module")
def config(teacher_config):
    return teacher_config


@pytest.fixture(scope="module")
def space(teacher_space):
    return teacher_space


def test_latency_is_additive(table, space):
    original = Genotype.original(space.num_layers, space.hidden_size, space.num_heads)
    assert set(table.blocks) == {space.option_shape(option) for option in OPTIONS}
    block = table.blocks[space.option_shape("original")]
    assert table.latency_ms(original) == pytest.approx(table.trunk_ms + space.num_layers * block)
    merged = space.from_code((16,) * space.num_pairs)
    assert table.latency_ms(merged) == pytest.approx(table.trunk_ms + space.num_pairs * block)


def test_json_round_trip(table, config, space, tmp_path):
    path = tmp_path / "table.json"
    table.to_json(path)
    again = LatencyTable.from_json(path)
    genotype = held_out(config, space)[-2]
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


@pytest.fixture
def options(table):
    return LatencyConfig(batch_size=table.batch, threads=table.threads, precision=table.precision)


def test_a_table_of_another_run_is_refused_unless_told(table, options):
    table.check_run(options)
    table.check_run()
    data = table.to_dict()
    environment = data["environment"]
    other = {**environment, "cpu": "Snapdragon 8", "machine": "aarch64"}
    older = {**environment, "versions": {**environment["versions"], "onnxruntime": "1.2.3"}}
    for changes, asked, said in (
        ({"environment": other}, {}, r"device Snapdragon 8 \(aarch64\) \(table\) / .+ \(here\)"),
        ({"environment": older}, {}, r"version of onnxruntime 1\.2\.3 \(table\) / \d"),
        ({}, {"threads": 3}, r"latency.threads 1 \(table\) / 3 \(here\)"),
        ({}, {"batch_size": 7}, r"latency.batch_size 64 \(table\) / 7 \(here\)"),
        ({}, {"precision": "int8"}, r"latency.precision fp32 \(table\) / int8 \(here\)"),
        ({}, {"runtime": "executorch", "threads": 4}, r"latency.runtime onnxruntime .*; latency.threads 1"),
    ):
        foreign = LatencyTable({**data, **changes})
        run = dataclasses.replace(options, **asked)
        with pytest.raises(EdgeDiTError, match=f"{said}.*latency.accept_other=true"):
            foreign.check_run(run)
        foreign.check_run(dataclasses.replace(run, accept_other=True))
        foreign.check_run(accept_other=True)
        if not asked:  # without a recipe the machine alone is compared
            with pytest.raises(EdgeDiTError, match=said):
                foreign.check_run()
        else:
            foreign.check_run()


def test_a_table_that_a_recipe_names_must_be_of_its_run(table, config, space, options, tmp_path):
    path = tmp_path / "table.json"
    table.to_json(path)
    assert given_table(str(path), config, space, options).hash == table.hash
    with pytest.raises(EdgeDiTError, match=rf"latency.table is {path}: .* latency.threads 1 \(table\) / 2 \(here\)"):
        given_table(str(path), config, space, dataclasses.replace(options, threads=2))
    given_table(str(path), config, space, dataclasses.replace(options, threads=2, accept_other=True))
    with pytest.raises(EdgeDiTError, match="sample_size 8"):  # other inputs are no matter of taste
        given_table(str(path), {**config, "sample_size": 16}, space, dataclasses.replace(options, accept_other=True))


def test_tables_of_earlier_versions(table, options):
    """They have no protocol and a short prediction; one that does not say its machine is refused in words."""
    data = table.to_dict()
    kept = ("format", "runtime", "precision", "batch", "threads", "space", "trunk", "trunk_ms", "environment")
    networks = {"2": {"median_ms": 4.8, "iqr_ms": 0.7, "repeats": 40, "threads": 1}}
    old = {
        **{key: data[key] for key in kept},
        "blocks": [{**block, "networks": networks} for block in data["blocks"]],
        "fit_residual": 0.02,
        "repeats": 40,
        "prediction": {key: data["prediction"][key] for key in ("mean", "max", "networks")},
    }
    earlier = LatencyTable(old)
    assert earlier.blocks == table.blocks and earlier.remarks == []
    earlier.check_run(options)
    silent = LatencyTable({**old, "environment": {"cpu": None}})
    with pytest.raises(EdgeDiTError, match=r"device not said \(table\) / .*version of onnxruntime not said \(table\)"):
        silent.check_run(options)
