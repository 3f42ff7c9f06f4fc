"""What the programme's blocks say, against the whole models' own counts and the table's own sums."""

import json
import math
from types import SimpleNamespace

import pytest

from edgedit_hf import EdgeDiTTransformer2DModel
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.menu_space import MenuSpace
from edgedit_hf.search.blocks import blocks_of, programme_of
from edgedit_hf.search.latency_table import LatencyTable, trunk_of
from edgedit_hf.search_space import SearchSpace, model_cost, peak_live_values


@pytest.mark.parametrize("precision", [None, "fp32", "int4"])
def test_costs_are_those_of_whole_models(unsearched, precision):
    folder, bank = unsearched
    table = LatencyTable.from_json(folder / "latency" / "table.json")
    programme, config = programme_of(bank, table, precision), dict(bank.teacher.config)
    for genotype in list(bank.space.all())[::37]:
        solution, cost = programme.of(genotype), model_cost({**config, "layers": genotype.to_layers()})
        assert solution.costs == {
            "latency_ms": pytest.approx(table.latency_ms(genotype)),
            "parameters": cost.parameters,
            "flops": cost.flops,
            "bytes": pytest.approx(cost.bytes(precision or "int8"), abs=1),
            "activations": 4 * table.batch * peak_live_values(config, genotype),
            "memory": solution.costs["bytes"] + solution.costs["activations"],
        }
        proxies = [bank.key(layer) for layer in genotype.layers if bank.key(layer) in bank.entries]
        losses = [bank.entries[key]["loss_after"] * len(bank.entries[key]["source"]) for key in proxies]
        assert solution.score == pytest.approx(math.fsum(losses))
    best, every = programme.best({"latency_ms": 8.0}), list(bank.space.all())
    assert best.score == min(
        programme.of(genotype).score for genotype in every if table.latency_ms(genotype) <= 8.0 * (1 + 1e-9)
    )


def test_costs_of_a_teacher_whose_heads_have_positions_of_their_own(make_transformer):
    """A merge saves a table of position biases, and a head its share of one."""
    structure = {"position_bias": True, "long_skips": [[0, 2], [-1, 3]], "decoder_start": 2}
    config = dict(make_transformer(num_layers=6, **structure).config)
    menu = [{"num_heads": 1}, {"num_heads": 4, "mlp_ratio": 2}, {"token_merge": 2}, {"merge": 2, "num_heads": 1}]
    space = MenuSpace.for_config(config, menu=menu)
    entries = {space.key(layer): {"loss_after": 0.1, "source": list(layer.source)} for layer in space.proxies()}
    shapes = {layer.shape for layer in space.replacements()}
    table = LatencyTable(
        {
            **{"format": 1, "runtime": "onnxruntime", "precision": "fp32", "batch": 1, "threads": 1},
            **{"space": space.to_dict(), "trunk": trunk_of(config), "trunk_ms": 0.5, "environment": {}},
            "blocks": [{**shape._asdict(), "ms": 1.0} for shape in shapes],
        }
    )
    programme = programme_of(
        SimpleNamespace(teacher=SimpleNamespace(config=config), space=space, entries=entries), table
    )
    for genotype in list(space.all())[::7]:
        student = {**config, "layers": genotype.to_layers()}
        cost, costs = model_cost(student), programme.of(genotype).costs
        assert (costs["parameters"], costs["flops"], costs["bytes"]) == (cost.parameters, cost.flops, 4 * cost.weights)
    model = EdgeDiTTransformer2DModel(**{name: value for name, value in student.items() if name[0] != "_"})
    assert sum(weight.numel() for weight in model.parameters()) == cost.weights and len(model.blocks) < 6


def test_a_bank_of_a_few_genotypes_and_bad_ones(unsearched):
    folder, bank = unsearched
    table, config = LatencyTable.from_json(folder / "latency" / "table.json"), dict(bank.teacher.config)
    only = {"00/mlp": bank.entries["00/mlp"], "02-03/both": bank.entries["02-03/both"]}
    assert len(blocks_of(bank.space, only, table, config)) == bank.space.num_layers + 2
    with pytest.raises(EdgeDiTError, match="The proxy bank holds 0 proxies"):
        blocks_of(bank.space, {}, table, config)
    for loss, said in ((math.nan, "loss_after is nan"), (None, "loss_after is None"), (-1.0, "at least 0")):
        wrong = {**bank.entries, "01/mlp": {**bank.entries["01/mlp"], "loss_after": loss}}
        with pytest.raises(EdgeDiTError, match=rf"The entry 01/mlp of the bank's index .*{said}"):
            blocks_of(bank.space, wrong, table, config)
    wider = SearchSpace.for_config(config, reduced_attention_dim=8)
    with pytest.raises(EdgeDiTError, match=r"a layer of shape \(8, .* this table measured"):
        blocks_of(wider, bank.entries, table, config)
    text = (folder / "bank" / "index.json").read_text()
    assert json.loads(text)["entries"]["00/mlp"]["loss_after"] > 0
