"""The latency table: additive, the same after a file, and it knows its teacher."""

import json

import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.genotype import Genotype, LayerSpec
from edgedit_hf.search.latency_table import LatencyTable, check_genotypes, given_table
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
