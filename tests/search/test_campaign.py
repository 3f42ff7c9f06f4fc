"""The searches of a stage one after the other: what they ask in all, and that a killed one ends with the same files."""

import pytest

from edgedit_hf.run.sections import SearchConfig
from edgedit_hf.search.campaign import Campaign, most_evaluations
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
    return {path.name: path.read_text() for path in folder.iterdir()}


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
