"""Which genotypes the ranking study tunes, and its rank correlations against scipy."""

import numpy as np
import pytest
from scipy.stats import kendalltau, rankdata, spearmanr

from edgedit_hf import SearchSpace
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.search import ranking
from edgedit_hf.search.ranking import choose_genotypes, pairs_within, rank_correlations

LOSS = {"original": 0.0, "mlp": 0.1, "attention": 0.2, "both": 0.35}
MS = {"original": 4.0, "mlp": 3.0, "attention": 2.5, "both": 1.0}


def additive(space: SearchSpace, table: dict[str, float], place: float = 0.0):
    """A sum over the layers; `place`: what one later in the teacher adds."""
    return lambda genotype: sum(
        table[space.option_of(layer)] * (1 + place * layer.source[0]) for layer in genotype.layers
    )


@pytest.mark.parametrize(("layers", "count", "groups"), [(4, 12, 4), (6, 11, 3)])
def test_genotypes_are_spread_over_the_latencies_and_differ_within_a_group(layers, count, groups):
    space = SearchSpace(layers, 64, 2)
    loss, latency = additive(space, LOSS, 0.5), additive(space, MS)
    chosen = choose_genotypes(space, loss, latency, count, groups, seed=3)
    assert chosen == choose_genotypes(space, loss, latency, count, groups, seed=3)
    assert len({one.genotype for one in chosen}) == count and [one.group for one in chosen] == sorted(
        number % groups for number in range(count)
    )
    every = [latency(genotype) for genotype in space.all()]
    low, width = min(every), (max(every) - min(every)) / groups
    for group in range(groups):
        members = [one for one in chosen if one.group == group]
        times = [latency(one.genotype) for one in members]
        assert max(abs(time - low - (group + 0.5) * width) for time in times) <= 0.15 * width + 0.5
        kinds = [one.kind for one in members]
        assert kinds == ["best", *["random"] * (len(members) - 2), "worst"]
        losses = [loss(one.genotype) for one in members]
        assert losses[0] == min(losses) < max(losses) == losses[-1]
    assert choose_genotypes(space, loss, latency, count, groups, seed=4) != chosen


def test_a_space_too_large_to_be_listed_is_drawn_from(monkeypatch):
    monkeypatch.setattr(ranking, "POOL", 300)
    space = SearchSpace(28, 64, 2)
    loss, latency = additive(space, LOSS, 0.1), additive(space, MS)
    chosen = choose_genotypes(space, loss, latency, 12, 4, seed=0)
    times = [np.mean([latency(one.genotype) for one in chosen if one.group == group]) for group in range(4)]
    assert len({one.genotype for one in chosen}) == 12 and times == sorted(times) and times[-1] > 1.5 * times[0]


def test_too_few_genotypes_are_refused():
    space = SearchSpace(2, 64, 2)
    loss, latency = additive(space, LOSS), additive(space, MS)
    with pytest.raises(EdgeDiTError, match="5 genotypes leave groups of fewer than 2; 3 groups need 6"):
        choose_genotypes(space, loss, latency, 5, 3, seed=0)
    with pytest.raises(EdgeDiTError, match="holds 20 genotypes, too few to choose 30 in 2 groups"):
        choose_genotypes(space, loss, latency, 30, 2, seed=0)


@pytest.fixture
def measured():
    rng = np.random.default_rng(5)
    latency = np.repeat([1.0, 2.0, 3.0, 4.0], 4) + rng.normal(0, 0.05, 16)
    quality = -latency + rng.normal(0, 0.7, 16)
    objectives = {
        "distance": quality + rng.normal(0, 1.0, 16),
        "true": quality,
        "tied": np.round(quality + rng.normal(0, 0.5, 16)),
        "latency": -latency,
    }
    return objectives, quality, latency, np.repeat(range(4), 4)


def test_correlations_are_scipys(measured):
    objectives, quality, latency, groups = measured
    found = rank_correlations(objectives, quality, latency, groups, seed=0)
    for name, values in objectives.items():
        assert found[name]["spearman"][0] == pytest.approx(spearmanr(values, quality).statistic)
        assert found[name]["kendall"][0] == pytest.approx(kendalltau(values, quality).statistic)
    # Partial: the correlation of what is left of the ranks when the latency's are regressed out.
    ranks = [rankdata(values) for values in (objectives["distance"], quality, latency)]
    design = np.stack([np.ones(16), ranks[2]], axis=1)
    left = [values - design @ np.linalg.lstsq(design, values, rcond=None)[0] for values in ranks[:2]]
    assert found["distance"]["partial"][0] == pytest.approx(np.corrcoef(*left)[0, 1])
    # Within groups: concordant minus discordant pairs of one group.
    score = pairs = 0
    for a in range(16):
        for b in range(a):
            if groups[a] == groups[b]:
                score += np.sign(objectives["distance"][a] - objectives["distance"][b]) * np.sign(
                    quality[a] - quality[b]
                )
                pairs += 1
    assert found["distance"]["within"][0] == pytest.approx(score / pairs) and pairs == pairs_within(groups) == 24


def test_what_agrees_leads_and_what_cannot_be_said_is_left_open(measured):
    objectives, quality, latency, groups = measured
    found = rank_correlations(objectives, quality, latency, groups, seed=0)
    assert found["true"]["spearman"] == [1.0, 1.0, 1.0] and found["true"]["within"][0] == 1.0
    value, low, high = found["true"]["lead"]
    assert value == pytest.approx(1 - found["distance"]["partial"][0]) and 0 < low <= value <= high
    assert found["distance"]["lead"] == [0.0, 0.0, 0.0]
    assert found["latency"]["partial"] == [None, None, None] == found["latency"]["lead"]
    for figures in found.values():
        for figure in ("spearman", "kendall", "within"):
            value, low, high = figures[figure]
            assert -1 - 1e-9 <= low <= value <= high <= 1 + 1e-9
    constant = rank_correlations({"distance": [1.0] * 16}, quality, latency, groups, seed=0)["distance"]
    assert constant["spearman"] == constant["kendall"] == constant["within"] == [None, None, None]


def test_intervals_cover_and_narrow(measured):
    """Of two independent rankings 95 % intervals should mostly hold 0, and more genotypes make them narrower."""
    covered, widths = 0, {}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        for count in (12, 48):
            x, y, z = rng.normal(size=(3, count))
            _, low, high = rank_correlations({"distance": x}, y, z, np.zeros(count), seed)["distance"]["spearman"]
            covered += low <= 0 <= high
            widths.setdefault(count, []).append(high - low)
    assert covered >= 34 and np.mean(widths[48]) < 0.7 * np.mean(widths[12])
