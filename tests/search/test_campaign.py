"""The searches of a stage one after the other: what they ask in all, and that a killed one ends with the same files."""

import json
import math
import subprocess
import sys
import time

import pytest

from edgedit_hf import Genotype
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.run.sections import SearchConfig
from edgedit_hf.search.ask_tell import summary
from edgedit_hf.search.campaign import Campaign, check_possible, most_evaluations
from edgedit_hf.search.objectives import NonFiniteImages
from edgedit_hf.search.pareto import pareto_front
from edgedit_hf.search.programme import Block, Programme
from edgedit_hf.search_space import SearchSpace, layer_cost

SPACE = SearchSpace(4, 32, 2)


def objectives(genotype) -> tuple[float, float]:
    """Fewer weights are faster and worse; what is lost in early layers is worse."""
    weights = [layer_cost(32, layer.shape, 16).weights for layer in genotype.layers]
    lost = [(1 - i / 8) / w for i, w in enumerate(weights)]
    return 1e4 * sum(lost) / len(lost), sum(weights) / 1e4


def files(folder) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.json")}  # not the lock


def evaluate(campaign: Campaign) -> None:
    genotype = campaign.ask()
    told = campaign.tell(genotype, objectives(genotype), {"parameters": 1})
    assert (told["distance"], told["latency_ms"]) == objectives(genotype)


def programme() -> Programme:
    """Scores that say what [`objectives`] says, in another unit."""
    blocks = []
    for layer in SPACE.replacements():
        weights = layer_cost(32, layer.shape, 16).weights
        blocks.append(Block(layer, (1 - layer.source[0] / 8) / weights, {"latency_ms": weights / 1e4}))
    return Programme(blocks, 4, 32)


def test_what_cannot_begin_is_refused_at_once():
    few = SearchConfig(mode="exact", scores="swaps", evaluations=9)
    own = Genotype.original(4, 32, 2, 4.0).layers
    solver = programme().with_blocks(
        Block(b.layer, 0.0 if b.layer in own else b.score, {**b.costs, "parameters": 1.0}) for b in programme().blocks
    )
    with pytest.raises(EdgeDiTError, match="swaps, which takes 22 evaluations .* search.evaluations is 9; raise it"):
        check_possible(few, SPACE, solver, {})
    with pytest.raises(EdgeDiTError, match="No student has latency_ms <= 0.01, but the least is"):
        check_possible(SearchConfig(evaluations=9), SPACE, programme(), {"latency_ms": 0.01})
    check_possible(SearchConfig(mode="two-stage"), SPACE, None, {})
    check_possible(few, SPACE, None, {})


@pytest.mark.parametrize("mode", ["joint", "two-stage", "exact"])
@pytest.mark.parametrize("random", [True, False])
def test_a_campaign_that_is_killed_after_every_evaluation_ends_with_the_same_files(tmp_path, mode, random):
    # Two-stage: the first search gets half of the evaluations, fewer than the initial ones that are asked for.
    options = SearchConfig(mode=mode, evaluations=5, initial=4, batch=2, random_baseline=random)
    (one := tmp_path / "one").mkdir()
    (two := tmp_path / "two").mkdir()
    solver = programme() if mode == "exact" else None
    campaign, asked = Campaign(one, SPACE, options, 3, solver), 0
    while campaign.ask() is not None:
        evaluate(campaign)
        asked += 1
        evaluate(killed := Campaign(two, SPACE, options, 3, solver))
        assert killed.evaluated == campaign.evaluated == asked
        assert files(one) == files(two)
    initial, distinct = min(4, 2 if mode == "two-stage" else 5), len(campaign.found.told)
    assert distinct == 5 or mode == "two-stage"  # whose second search may meet a genotype of the first again
    assert asked == 5 + (distinct - initial if random else 0) <= most_evaluations(options)
    assert most_evaluations(options) == 5 + (5 - initial if random else 0)
    assert Campaign(two, SPACE, options, 3, solver).ask() is None
    assert (campaign.random is not None) == random
    if random:
        assert campaign.random.told[:initial] == campaign.found.told[:initial]
    assert len(campaign.found.front()) == len(pareto_front(campaign.found.points))
    assert campaign.found.space.to_dict() == SPACE.to_dict()


def test_a_space_smaller_than_the_budget_ends_early(tmp_path):
    space = SPACE.stage("merge")
    options = SearchConfig(evaluations=space.size + 5, initial=3, batch=10)
    campaign = Campaign(tmp_path, space, options, seed=0)
    while campaign.ask() is not None:
        evaluate(campaign)
    assert len(campaign.found.told) == space.size and campaign.evaluated < most_evaluations(options)


def judged(genotype) -> tuple[float, float | None]:
    return objectives(genotype)[0], 0.01


@pytest.mark.parametrize("random", [True, False])
def test_a_campaign_goes_on_past_evaluations_that_fail(tmp_path, random):
    def judge(genotype):
        judge.calls += 1
        match judge.calls % 8:
            case 2:
                raise RuntimeError("out of memory")
            case 4:
                return math.nan, None
            case 5:
                raise NonFiniteImages("3 of 9 images hold NaN.")
            case 7:
                time.sleep(30)
        return judged(genotype)

    judge.calls = 0
    options = SearchConfig(evaluations=12, initial=4, batch=3, random_baseline=random, timeout_minutes=0.2 / 60)
    campaign, asked = Campaign(tmp_path, SPACE, options, seed=0), []
    while (genotype := campaign.ask()) is not None:
        asked.append(genotype)
        campaign.evaluate(genotype, judge, objectives(genotype)[1], {})
        campaign = Campaign(tmp_path, SPACE, options, seed=0)
    found = campaign.found
    assert found.evaluated == 12 and len(found.failed) == 6 and len(set(asked[:12])) == 12
    reasons = [point["reason"] for point in found.failed[:4]]
    assert reasons[0] == "RuntimeError: out of memory" and reasons[1] == "FloatingPointError: the distance is nan"
    assert reasons[2].startswith("NonFiniteImages") and "search.timeout_minutes = 0.00333" in reasons[3]
    assert {point["noise"] for point in found.told} == {0.01}
    result = json.loads(json.dumps(summary(found, campaign.random)))
    assert result["evaluations"] == 6 and len(result["failed"]) == 6 and len(result["hypervolume"]) == 6
    if random:
        assert campaign.random.evaluated == 12 and campaign.evaluated == len(asked) == 20
        assert campaign.random.failed[:2] == found.failed[:2]


def test_two_stages_end_with_the_cause_where_every_merge_fails(tmp_path):
    options = SearchConfig(mode="two-stage", evaluations=4, initial=2)
    campaign = Campaign(tmp_path, SPACE, options, seed=0)

    def crashes(genotype):
        raise ValueError("no GPU")

    campaign.evaluate(campaign.ask(), crashes, 1.0, {})
    said = "All 2 evaluations of the search failed, .*ValueError: no GPU. Mend the cause, delete the search's folder"
    with pytest.raises(EdgeDiTError, match=said):
        campaign.evaluate(campaign.ask(), crashes, 1.0, {})
    with pytest.raises(EdgeDiTError, match=said):
        Campaign(tmp_path, SPACE, options, seed=0)


def test_what_is_no_fault_of_the_genotypes_ends_the_search(tmp_path):
    options = SearchConfig(evaluations=12, initial=4, random_baseline=False)
    campaign = Campaign(tmp_path, SPACE, options, seed=0)

    def broken(genotype):
        raise EdgeDiTError("The bank's file is damaged.")

    with pytest.raises(EdgeDiTError, match="is damaged"):
        campaign.evaluate(campaign.ask(), broken, 1.0, {})
    assert campaign.evaluated == 0

    def crashes(genotype):
        raise ValueError("no GPU")

    for _ in range(4):
        assert "failed" in campaign.evaluate(campaign.ask(), crashes, 1.0, {})
    with pytest.raises(EdgeDiTError, match="5 evaluations in a row failed.*ValueError: no GPU.*state.json"):
        campaign.evaluate(campaign.ask(), crashes, 1.0, {})
    again = Campaign(tmp_path, SPACE, options, seed=0)
    assert again.evaluated == 5 and again.search.reference is None
    for genotype in iter(again.ask, None):
        again.evaluate(genotype, judged, objectives(genotype)[1], {})
    assert len(again.found.told) == 7 and again.found.reference


def test_a_second_process_is_refused(tmp_path):
    code = "import sys, time; from edgedit_hf.run.lock import FolderLock; FolderLock(sys.argv[1]).acquire()"
    first = subprocess.Popen(
        [sys.executable, "-c", f"{code}; print(flush=True); time.sleep(600)", tmp_path], stdout=subprocess.PIPE
    )
    try:
        first.stdout.readline()
        with pytest.raises(EdgeDiTError, match=f"{tmp_path} is in use by process {first.pid}"):
            Campaign(tmp_path, SPACE, SearchConfig(), seed=0)
    finally:
        first.kill()
        first.wait()
    Campaign(tmp_path, SPACE, SearchConfig(), seed=0)
