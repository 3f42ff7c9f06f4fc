"""The searches that ours is compared with: a path by brute force, generations that go through again, resume."""

import sys

import numpy as np
import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.menu_space import MenuSpace
from edgedit_hf.search.baselines import GreedySearch, NSGA2Search, greedy_path
from edgedit_hf.search.pareto import hypervolume
from edgedit_hf.search.programme import Block, Programme
from edgedit_hf.search_space import SearchSpace

PAPER = SearchSpace(5, 32, 2)
MENU = MenuSpace(4, 32, 2, menu=[{"mlp_ratio": 2.0}, {"merge": 2}, {"merge": 3, "mlp_ratio": 1.0}])


def programme(space) -> Programme:
    rng, blocks = np.random.default_rng(0), []
    for layer in space.replacements():
        whole = len(layer.source) == 1 and space.option_of(layer) == "original"
        cost = 2.0 if whole else rng.uniform(0.5, 1.9) * len(layer.source) ** 0.3
        blocks.append(Block(layer, 0.0 if whole else rng.uniform(0.1, 1.0), {"latency_ms": cost}))
    return Programme(blocks, space.num_layers, space.hidden_size)


def objectives(space, genotype) -> tuple[float, float]:
    of = {block.layer: block for block in programme(space).blocks}
    blocks = [of[layer] for layer in genotype.layers]
    return 1.0 + sum(b.score for b in blocks) ** 1.5, sum(b.costs["latency_ms"] for b in blocks)


def run(space, search, batch=3):
    while not search.finished:
        for genotype in search.pending or search.ask(batch):
            search.tell(genotype, objectives(space, genotype))
    return search


def codes(search) -> list[tuple[int, ...]]:
    return [tuple(point["code"]) for point in search.told]


@pytest.mark.parametrize("space", [PAPER, MENU], ids=["paper", "menu"])
def test_the_greedy_path_takes_the_cheapest_step_each_time(space):
    of = {block.layer: block for block in programme(space).blocks}
    path = list(greedy_path(programme(space)))
    assert path[0] == space.ends()[0] and 3 <= len(path)

    def sums(genotype):
        blocks = [of[layer] for layer in genotype.layers]
        return sum(b.score for b in blocks), sum(b.costs["latency_ms"] for b in blocks)

    everything = list(space.all())
    for before, after in zip(path, path[1:]):
        (score, ms), rates = sums(before), {}
        for other in everything:  # those that differ in one layer of theirs
            if len(set(other.layers) - set(before.layers)) == 1 and sums(other)[1] < ms:
                rates[other] = (sums(other)[0] - score) / (ms - sums(other)[1])
        assert rates[after] == pytest.approx(min(rates.values()))
    assert not any(
        len(set(other.layers) - set(path[-1].layers)) == 1 and sums(other)[1] < sums(path[-1])[1] - 1e-9
        for other in everything
    )


def test_a_greedy_search_evaluates_its_path_or_some_of_it():
    path = [PAPER.code(genotype) for genotype in greedy_path(programme(PAPER))]
    assert codes(run(PAPER, GreedySearch.of(programme(PAPER), PAPER, 100, 0, 2))) == path
    few = codes(run(PAPER, GreedySearch.of(programme(PAPER), PAPER, 3, 0, 2)))
    assert len(few) == 3 and few[0] == path[0] and few[-1] == path[-1] and few[1] in path


@pytest.mark.parametrize("space", [PAPER, MENU], ids=["paper", "menu"])
def test_nsga2_asks_the_same_after_a_restart_and_nothing_twice(tmp_path, space):
    whole = run(space, NSGA2Search(space, 30, seed=1, num_initial=6))
    assert len(set(codes(whole))) == 30
    search, path = NSGA2Search(space, 30, seed=1, num_initial=6), tmp_path / "state.json"
    while not search.finished:
        genotype = (search.pending or search.ask(3))[0]
        search.tell(genotype, objectives(space, genotype))
        search.save(path)
        search = NSGA2Search(space, 30, seed=1, num_initial=6).resume(path)
    assert search.to_json() == whole.to_json()
    assert codes(run(space, NSGA2Search(space, 30, seed=2, num_initial=6))) != codes(whole)


def test_nsga2_improves_on_its_first_population_and_ends_with_the_space():
    points = [objectives(PAPER, genotype) for genotype in PAPER.all()]
    search = run(PAPER, NSGA2Search(PAPER, 80, num_initial=8))
    reference = search.reference
    assert hypervolume(search.points, reference) > 1.05 * hypervolume(search.points[:8], reference)
    assert hypervolume(search.points, reference) <= hypervolume(points, reference)
    small = SearchSpace(2, 32, 2)
    assert len(run(small, NSGA2Search(small, 100, num_initial=4), batch=50).told) == 20


def test_nsga2_goes_on_past_failures():
    search = NSGA2Search(PAPER, 24, num_initial=6)
    while not search.finished:
        for place, genotype in enumerate(search.pending or search.ask(3)):
            if place == 1:
                search.fail(genotype, "it crashed")
            else:
                search.tell(genotype, objectives(PAPER, genotype))
    assert len(search.failed) >= 6 and len({*codes(search), *(tuple(p["code"]) for p in search.failed)}) == 24


def test_without_pymoo_nsga2_says_what_to_install(monkeypatch):
    search = NSGA2Search(PAPER, 10, num_initial=2)
    for genotype in search.ask(2):
        search.tell(genotype, objectives(PAPER, genotype))
    monkeypatch.setitem(sys.modules, "pymoo.core.evaluator", None)
    with pytest.raises(EdgeDiTError, match="NSGA-II needs pymoo.*pip install 'edgedit_hf.search.'"):
        search.ask(2)
