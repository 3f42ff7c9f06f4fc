"""The programme's plan as an ask/tell search."""

import math

import numpy as np
import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.run.sections import SearchConfig
from edgedit_hf.search.ask_tell import RandomSearch, summary
from edgedit_hf.search.blocks import programme_of
from edgedit_hf.search.campaign import Campaign
from edgedit_hf.search.latency_table import LatencyTable
from edgedit_hf.search.pareto import hypervolume
from edgedit_hf.search.programme_search import ProgrammeSearch


def test_what_the_plan_names_is_evaluated_in_its_order(unsearched, tmp_path):
    folder, bank = unsearched
    table = LatencyTable.from_json(folder / "latency" / "table.json")
    programme, space, file = programme_of(bank, table), bank.space, tmp_path / "state.json"
    plan = [solution.genotype for solution, _ in zip(programme.plan(), range(7))]
    search = ProgrammeSearch.of(programme, space, 7, 0, 3)
    asked = []
    while not search.finished:
        for genotype in search.pending or search.ask(2):
            search.tell(genotype, (1.0 + programme.of(genotype).score, table.latency_ms(genotype)))
            search.save(file)
            asked.append(genotype)
            search = ProgrammeSearch.of(programme, space, 7, 0, 3).resume(file)  # as after a kill
    assert asked == plan
    assert search.reference == (
        1.1 * (1.0 + programme.of(plan[1]).score),  # of the fastest; the first is the teacher
        1.1 * table.latency_ms(plan[0]),
    )
    random = RandomSearch.sharing_initial(search)
    assert len(summary(search, random)["front"]) >= 3
    other = ProgrammeSearch(space, 7, 0, 3, plan=search.plan[::-1])  # as of another bank
    with pytest.raises(EdgeDiTError, match="was made with plan = "):
        other.resume(file)


def test_a_plan_that_ends_and_a_programme_that_is_not_there(unsearched, tmp_path):
    folder, bank = unsearched
    only = {key: entry for key, entry in bank.entries.items() if key == "00/mlp"}  # as of bank.only
    bank.index["entries"] = only
    programme = programme_of(bank, LatencyTable.from_json(folder / "latency" / "table.json"))
    search = ProgrammeSearch.of(programme, bank.space, 100, 0, 8)
    assert search.budget == 2 and len(search.ask(100)) == 2
    for genotype in search.pending:
        search.tell(genotype, (1.0, 1.0))
    assert search.finished and search.reference == (1.1, 1.1)
    with pytest.raises(EdgeDiTError, match="search.mode is exact, but there is no programme"):
        Campaign(tmp_path, bank.space, SearchConfig(mode="exact"), 0)


def test_scores_learned_from_swaps_find_the_front_that_losses_miss(unsearched):
    """The distance is a product over layers of what the losses do not say."""
    folder, bank = unsearched
    table = LatencyTable.from_json(folder / "latency" / "table.json")
    programme, space = programme_of(bank, table), bank.space
    draw = np.random.default_rng(1)
    worse = {block.layer: 1.0 + draw.uniform(0, 0.3) * (block.score > 0) for block in programme.blocks}

    def objectives(genotype):
        return math.prod(worse[layer] for layer in genotype.layers), table.latency_ms(genotype)

    truth = [objectives(genotype) for genotype in space.all()]
    corner = [1.1 * max(column) for column in zip(*truth)]
    with pytest.raises(EdgeDiTError, match=r"takes 22 evaluations .* but search.evaluations is 22"):
        ProgrammeSearch.of(programme, space, 22, 0, 2, swaps=True)
    found = {}
    for swaps in (True, False):
        search = ProgrammeSearch.of(programme, space, 40, 0, 2, swaps=swaps)
        while not search.finished:
            for genotype in search.ask(3):
                search.tell(genotype, objectives(genotype))
        found[swaps] = hypervolume(search.points, corner) / hypervolume(truth, corner)
        assert len({tuple(point["code"]) for point in search.told}) == 40
    assert found[True] > 0.97 and found[True] > found[False]
