"""Shares of ranks, groups that fit the memory, and which proxies a genotype needs: pure functions against brute
force.
"""

import itertools
import random

import pytest

from edgedit_hf import Genotype, ProxyBank, SearchSpace
from edgedit_hf.distill.memory_plan import (
    MemoryModel,
    contiguous_shares,
    depth_of,
    fitting_groups,
    plan_bank,
    prefix_cost,
    step_cost,
    units_of,
    wanted_proxies,
)
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.menu_space import MenuSpace
from edgedit_hf.models.transformer_edgedit import PRESETS
from edgedit_hf.report.bank import bank_choices
from edgedit_hf.search.latency_plan import network_bytes

SPACE = SearchSpace(7, 32, 2)
XL_CONFIG = {
    **{"sample_size": 32, "in_channels": 4, "num_classes": 1000, "learn_sigma": True, "mlp_ratio": 4.0},
    **PRESETS["DiT-XL/2"],
}
XL = SearchSpace(28, 1152, 16)


def xl_memory(**changes) -> MemoryModel:
    return MemoryModel(
        **{
            "space": XL,
            "model_config": XL_CONFIG,
            "tokens": 256,
            "batch_size": 32,
            "calibration_samples": 32,
            **changes,
        }
    )


# -------------------------------------------------------------------- units


def test_a_pair_holds_ten_proxies_and_a_last_odd_layer_three():
    pairs = units_of(SPACE, SPACE.proxies())
    assert [len(pair) for pair in pairs] == [10, 10, 10, 3] and [depth_of(pair) for pair in pairs] == [2, 4, 6, 7]
    assert sorted(sum((list(pair) for pair in pairs), []), key=str) == sorted(SPACE.proxies(), key=str)
    assert len(units_of(XL, XL.proxies())) == 14 and len(XL.proxies()) == 140


def test_weights_are_those_of_blocks_with_their_position_biases(make_transformer, tmp_path):
    teacher = make_transformer(num_layers=5, position_bias=True, long_skips=[[0, 4]])
    space = MenuSpace.for_config(teacher.config, menu=[{"num_heads": 1}, {"merge": 2, "mlp_ratio": 2}])
    assert any(len(layer.source) == 2 for layer in space.proxies())
    memory = MemoryModel(space, dict(teacher.config), 16, 4, 8)
    bank = ProxyBank.create(tmp_path, teacher, space)
    figures = {"loss_before": 1.0, "loss_after": 0.5}
    entries = {
        bank.key(layer): {"source": list(layer.source), "option": space.option_of(layer), **figures}
        for layer in space.proxies()
    }
    own = sum(weight.numel() for weight in teacher.blocks[0].parameters())
    choices = bank_choices({**bank.index, "entries": entries}, None)
    assert choices["original"]["parameters"] == memory.weights([space.layer((0,), "original")]) == own
    for layer, choice in zip(space.proxies(), choices["choices"]):
        count = sum(weight.numel() for weight in bank.new_block(layer).parameters())
        assert memory.weights([layer]) == choice["parameters"] == count, bank.key(layer)
    assert memory.teacher(5) == sum(weight.numel() for weight in teacher.parameters())
    assert network_bytes(teacher.config, [layer.shape for layer in [space.layer((0,), "original")] * 5], "int8") == (
        memory.teacher(5)
    )


MENU = MenuSpace(5, 32, 2, menu=[{"mlp_ratio": 2}, {"modulation_rank": 0}, {"merge": 2}, {"merge": 3, "mlp_ratio": 1}])


def test_of_a_menu_the_proxies_that_start_at_a_layer_stay_together():
    units = units_of(MENU, MENU.proxies())
    assert [{layer.source[0] for layer in unit} for unit in units] == [{0}, {1}, {2}, {3}, {4}]
    assert [len(unit) for unit in units] == [3, 4, 4, 3, 2]  # layer 0 may not be static, nothing merges past the end
    memory = MemoryModel(MENU, dict(XL_CONFIG, hidden_size=32), tokens=16, batch_size=4, calibration_samples=8)
    (whole,) = plan_bank(MENU.proxies(), memory, 1, None)
    assert [group.layers for group in whole] == [tuple(MENU.proxies())]
    plans = plan_bank(MENU.proxies(), memory, 3, None)
    assert sum((group.layers for plan in plans for group in plan), ()) == tuple(MENU.proxies())
    with pytest.raises(EdgeDiTError, match="6 processes share 5 layers at which proxies start"):
        plan_bank(MENU.proxies(), memory, 6, None)


def test_a_range_of_a_menu_runs_the_teacher_as_deep_as_its_deepest_proxy():
    """A merge of three with none of two beside it reaches deeper than the layers that start after it."""
    space = MenuSpace(4, 32, 2, menu=[{"mlp_ratio": 2}, {"merge": 3}])
    units = units_of(space, space.proxies())
    assert [depth_of(unit) for unit in units] == [3, 4, 3, 4]
    memory = MemoryModel(space, dict(XL_CONFIG, hidden_size=32), tokens=16, batch_size=4, calibration_samples=8)
    prefix = {depth: prefix_cost(space, depth, 16, 4) for depth in range(5)}

    def slowest(cuts) -> float:
        parts = [units[a:b] for a, b in zip((0, *cuts), (*cuts, 4))]
        return max(
            sum(step_cost(space, layer, 16, 4) for unit in part for layer in unit)
            + prefix[max(depth_of(unit) for unit in part)]
            for part in parts
        )

    best = min(slowest([cut]) for cut in (1, 2, 3))
    plans = plan_bank(space.proxies(), memory, 2, None)
    cut = len({layer.source[0] for group in plans[0] for layer in group.layers})
    assert slowest([cut]) == pytest.approx(best)


def test_a_merge_of_three_needs_more_memory_to_be_fitted_than_one_of_two():
    def predict(merge: int) -> int:
        space = MenuSpace(28, 1152, 16, menu=[{"merge": merge}])
        return xl_memory(space=space).predict([space.layer(tuple(range(merge)), "original")], 3)

    assert predict(3) > 1.3 * predict(2)


def test_of_a_menu_a_genotype_needs_its_own_layers_alone():
    genotype = MENU.from_code((1, 3, 0, 0, 2))
    keys = [(layer.source, MENU.option_of(layer)) for layer in wanted_proxies(MENU, [genotype])]
    assert keys == [((0,), "mlp2"), ((1, 2), "original"), ((4,), "static")]


def test_a_genotype_needs_its_reduced_and_merged_layers_and_the_parts_of_both():
    def names(*codes):
        return [
            (layer.source, SPACE.option_of(layer))
            for layer in wanted_proxies(SPACE, [SPACE.from_code(code) for code in codes])
        ]

    assert names((0, 0, 1, 0)) == [((5,), "mlp")]
    assert names((0, 0, 16, 0)) == [((4, 5), "original")]
    assert names((0, 0, 0, 3)) == [((6,), "mlp"), ((6,), "attention"), ((6,), "both")]
    assert names((19, 0, 0, 0)) == [((0, 1), option) for option in ("mlp", "attention", "both")]
    assert names((0, 0, 1, 0), (0, 0, 2, 0)) == [((5,), "mlp"), ((5,), "attention")]
    assert wanted_proxies(SPACE, None) == SPACE.proxies()


@pytest.mark.parametrize(("name", "option"), [("EdgeDiT-1", "mlp"), ("EdgeDiT-6", "attention")])
def test_a_published_student_needs_25_of_the_140(name, option):
    wanted = wanted_proxies(XL, [Genotype.of(PRESETS[name])])
    assert len(wanted) == 25 and {XL.option_of(layer) for layer in wanted} == {option}


def test_a_genotype_that_needs_nothing_or_does_not_fit_is_refused():
    with pytest.raises(EdgeDiTError, match="they need no proxies"):
        wanted_proxies(SPACE, [Genotype.original(7, 32, 2)])
    with pytest.raises(EdgeDiTError, match="replaces 6 layers of width 32, but the teacher has 7"):
        wanted_proxies(SPACE, [Genotype.original(6, 32, 2)])


# -------------------------------------------------------------------- shares


@pytest.mark.parametrize("seed", range(10))
def test_shares_are_the_best_contiguous_ones(seed):
    rng = random.Random(seed)
    count = rng.randint(1, 8)
    work, prefix = [rng.random() for _ in range(count)], sorted(rng.random() for _ in range(count))
    for ranks in range(1, count + 1):
        shares = contiguous_shares(work, prefix, ranks)
        assert [i for share in shares for i in share] == list(range(count)) and all(len(share) for share in shares)

        def slowest(ends):
            return max(sum(work[a:b]) + prefix[b - 1] for a, b in zip((0, *ends), (*ends, count)))

        best = min(slowest(ends) for ends in itertools.combinations(range(1, count), ranks - 1))
        assert slowest([share.stop for share in shares[:-1]]) == pytest.approx(best)


def test_at_xl_scale_ranks_cost_alike_and_the_deepest_rank_owns_least():
    pairs = units_of(XL, XL.proxies())
    work = [sum(step_cost(XL, layer, 256, 32) for layer in pair) for pair in pairs]
    prefix = [prefix_cost(XL, depth_of(pair), 256, 32) for pair in pairs]
    for ranks in (2, 4, 7):
        shares = contiguous_shares(work, prefix, ranks)
        costs = [sum(work[i] for i in share) + prefix[share[-1]] for share in shares]
        assert max(costs) <= 1.25 * (sum(work) + sum(prefix[share[-1]] for share in shares)) / ranks
        assert len(shares[-1]) <= len(shares[0])


def test_more_ranks_than_pairs_is_refused():
    with pytest.raises(EdgeDiTError, match="5 processes share 4 pairs of layers; start at most that many"):
        plan_bank(SPACE.proxies(), MemoryModel(SPACE, {**XL_CONFIG, "hidden_size": 32}, 16, 4, 8), 5, None)


# -------------------------------------------------------------------- memory


def test_groups_are_contiguous_fit_and_are_as_few_as_can_be():
    pairs = units_of(XL, XL.proxies())
    memory = xl_memory(closed_form=False)

    def predict(layers):
        return memory.predict(layers, 28)

    assert len(fitting_groups(pairs, predict, None)) == 1
    for budget in (9e9, 12e9, 20e9, 60e9):
        groups = fitting_groups(pairs, predict, budget)
        assert [layer for group in groups for layer in group.layers] == [layer for pair in pairs for layer in pair]
        assert all(group.predicted_bytes == predict(group.layers) <= budget for group in groups)
        fewest = next(
            count
            for count in range(1, 15)
            for ends in itertools.combinations(range(1, 14), count - 1)
            if all(predict([x for pair in pairs[a:b] for x in pair]) <= budget for a, b in zip((0, *ends), (*ends, 14)))
        )
        assert len(groups) == fewest


@pytest.mark.parametrize("budget", [0.0, 5e9])
def test_a_budget_too_small_for_one_pair_quotes_both_numbers(budget):
    with pytest.raises(
        EdgeDiTError,
        match=rf"teacher layers 0–1 need \d+\.\d\d GB .* but bank.memory_budget_gb is {budget / 1e9:g}\. Raise it",
    ):
        plan_bank(XL.proxies(), xl_memory(), 1, budget)


def test_every_lever_lowers_the_prediction():
    layers = units_of(XL, XL.proxies())[0] + units_of(XL, XL.proxies())[1]

    def predict(depth: int = 28, **changes) -> int:
        return xl_memory(**{"closed_form": False, **changes}).predict(layers, depth)

    assert predict(teacher_bytes=2) < predict()
    assert predict(state_bytes=2) < predict()
    assert predict(batch_size=4) < predict()
    assert predict(depth=4) < predict()  # a rank of the first layers runs, and holds, these alone
    assert predict(closed_form=True, calibration_samples=32) < predict(closed_form=True, calibration_samples=256)
    assert predict(calibration_samples=256) < predict(closed_form=True, calibration_samples=256)


def test_the_proxies_of_dit_xl_take_what_a_hand_count_says():
    memory = xl_memory(process_bytes=0, batch_size=1, calibration_samples=1, closed_form=False)
    assert memory.weights(XL.proxies()) == pytest.approx(2.65e9, rel=0.01)
    assert memory.teacher(28) == 675_129_632 - 256 * 1152  # without the fixed position embedding
    alone = memory.predict(XL.proxies(), 28)
    single = [layer for layer in XL.proxies() if XL.option_of(layer) != "both"]
    assert alone == pytest.approx(12 * memory.weights(single) + 4 * memory.teacher(28), rel=0.05)
