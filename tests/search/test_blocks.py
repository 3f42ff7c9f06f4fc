"""What the programme's blocks say, against the whole models' own counts and the table's own sums."""

import json
import math

import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.search.blocks import blocks_of, programme_of
from edgedit_hf.search.latency_table import LatencyTable
from edgedit_hf.search_space import SearchSpace, model_cost


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
        }
        proxies = [bank.key(layer) for layer in genotype.layers if bank.key(layer) in bank.entries]
        losses = [bank.entries[key]["loss_after"] * len(bank.entries[key]["source"]) for key in proxies]
        assert solution.score == pytest.approx(math.fsum(losses))
    best, every = programme.best({"latency_ms": 8.0}), list(bank.space.all())
    assert best.score == min(
        programme.of(genotype).score for genotype in every if table.latency_ms(genotype) <= 8.0 * (1 + 1e-9)
    )


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
