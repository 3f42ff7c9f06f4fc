"""The space of a menu: its size by counting, its codes, cube and neighbours over all of it, and what it refuses."""

import itertools
import json
import random
from collections import Counter

import pytest

from edgedit_hf import Genotype, SearchSpace
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.genotype import LayerSpec, Shape
from edgedit_hf.menu_space import MenuSpace
from edgedit_hf.search_space import layer_cost

MENU = [
    {"mlp_ratio": 2},
    {"num_heads": 1, "attention_dim": 8},
    {"modulation_rank": 0},
    {"modulation_rank": 4, "token_merge": 2},
    {"merge": 2},
    {"merge": 2, "modulation_rank": 0, "mlp_ratio": 1},
    {"merge": 3, "attention_dim": 16},
]
NAMES = ["original", "mlp2", "attn8-heads1", "static", "rank4-tokens2", "original", "mlp1-static", "attn16"]
XL = [
    {"num_heads": 8},
    {"num_heads": 32},
    {"mlp_ratio": 3},
    {"mlp_ratio": 2},
    {"mlp_ratio": 1},
    {"attention_dim": 768},
    {"attention_dim": 512},
    {"attention_dim": 512, "mlp_ratio": 2},
    {"modulation_rank": 0},
    {"modulation_rank": 16},
    {"token_merge": 2},
    *({"merge": merge, **sizes} for merge in (2, 3) for sizes in ({}, {"mlp_ratio": 2}, {"attention_dim": 512})),
]


def space(num_layers: int = 5, menu=MENU, **sizes) -> MenuSpace:
    return MenuSpace(num_layers, 32, 2, 4.0, menu, **sizes)


def brute_force(num_layers: int, joints=()) -> set[Genotype]:
    """Every genotype of MENU's choices, put together without the class; `joints`: layers after which nothing merges."""
    shapes = [
        (1, Shape(32, 2, 4.0)),
        (1, Shape(32, 2, 2.0)),
        (1, Shape(8, 1, 4.0)),
        (1, Shape(32, 2, 4.0, 0)),
        (1, Shape(32, 2, 4.0, 4, 2)),
        (2, Shape(32, 2, 4.0)),
        (2, Shape(32, 2, 1.0, 0)),
        (3, Shape(16, 2, 4.0)),
    ]

    def rests(at: int):
        if at == num_layers:
            yield ()
        for span, shape in shapes:
            source = tuple(range(at, at + span))
            crossed = set(source[:-1]) & set(joints)
            if at + span <= num_layers and not crossed and not (at == 0 and shape.modulation_rank == 0):
                yield from ((LayerSpec(source, *shape), *rest) for rest in rests(at + span))

    return {Genotype(layers, 32) for layers in rests(0)}


@pytest.mark.parametrize("num_layers", [3, 4, 5])
def test_every_genotype_once_and_the_size_without_listing_them(num_layers):
    s = space(num_layers)
    codes = list(s.codes())
    genotypes = list(s.all())
    assert len(codes) == len(set(codes)) == len(set(genotypes)) == s.size and codes == sorted(codes)
    assert set(genotypes) == brute_force(num_layers)
    assert s.dimension == num_layers == len(s.allowed)


def test_the_size_is_exact_at_the_size_of_the_paper():
    s = MenuSpace(28, 1152, 16, 4.0, XL)
    count = {0: 1}  # counted from the front here, with what may start at layer 0 left aside
    for at in range(28):
        static = at == 0  # the one choice that may not stand there
        for span, choices in ((1, 12 - static), (2, 3), (3, 3)):
            count[at + span] = count.get(at + span, 0) + count[at] * choices
    assert s.size == count[28] > 10**30
    assert sum(len(a) for a in s.allowed) == len(s.replacements())
    assert SearchSpace.from_dict(json.loads(json.dumps(s.to_dict()))).size == s.size


def test_codes_points_and_features_stand_for_one_genotype_each():
    s = space(4)
    rows = set()
    for genotype in s.all():
        code, x = s.code(genotype), s.encode(genotype)
        assert s.from_code(code) == genotype and all(0 <= value <= 1 for value in x)
        assert s.decode(x) == genotype
        rows.add(tuple(s.features(genotype)))
    assert len(rows) == s.size and {len(row) for row in rows} == {4 * (8 + 1) - 1}
    assert set(itertools.chain(*rows)) == {0.0, 1.0}


def test_any_entries_that_are_allowed_decode_and_what_is_covered_does_not_count():
    s, draw = space(6), random.Random(0)
    for _ in range(300):
        vector = [draw.choice(allowed) for allowed in s.allowed]
        genotype = s.from_code(vector)
        code = s.code(genotype)
        assert s.from_code(code) == genotype
        starts = {layer.source[0] for layer in genotype.layers}
        assert all(code[i] == (vector[i] if i in starts else 0) for i in range(6))


def test_uniform_points_choose_uniformly():
    s, draw = space(3), random.Random(0)
    rounds = 200
    counts = Counter(s.decode([draw.random() for _ in range(3)]) for _ in range(rounds * s.size))
    assert len(counts) == s.size
    chi_squared = sum((count - rounds) ** 2 / rounds for count in counts.values())
    assert chi_squared < s.size + 5 * (2 * s.size) ** 0.5
    assert s.decode([-1.0] * 3) == s.decode([0.0] * 3) == Genotype.original(3, 32, 2)
    assert s.decode([1.0] * 3) == s.decode([7.0] * 3) == s.from_code((7, 0, 0))


@pytest.mark.parametrize("num_layers", [27, 28])
def test_codec_round_trip_of_random_points_at_the_size_of_the_paper(num_layers):
    s, draw = MenuSpace(num_layers, 1152, 16, 4.0, XL), random.Random(0)
    for _ in range(100):
        genotype = s.decode([draw.random() for _ in range(num_layers)])
        assert s.decode(s.encode(genotype)) == genotype and s.from_code(s.code(genotype)) == genotype


def test_neighbours_are_legal_and_one_choice_away():
    s = space(5)
    for genotype in random.Random(0).sample(list(s.all()), 60):
        code, found = s.code(genotype), list(s.neighbours(genotype))
        assert len(found) == len(set(found)) and genotype not in found
        wanted = {
            s.from_code((*code[:at], index, *code[at + 1 :]))
            for at in (layer.source[0] for layer in genotype.layers)
            for index in s.allowed[at]
        }
        assert set(found) == wanted - {genotype}
        for neighbour in found:
            s.code(neighbour)
            started = {layer for layer in neighbour.layers} - set(genotype.layers)
            assert sum(s.option_of(layer) != "original" or len(layer.source) > 1 for layer in started) <= 1


def test_neighbours_reach_the_whole_space():
    s = space(3)
    seen = {s.ends()[0]}
    while True:
        further = {near for genotype in seen for near in s.neighbours(genotype)} | seen
        if further == seen:
            break
        seen = further
    assert len(seen) == s.size


def test_replacements_are_the_layers_of_the_genotypes_and_proxies_those_that_are_made():
    s = space(4)
    used = {layer for genotype in s.all() for layer in genotype.layers}
    assert set(s.replacements()) == used and len(s.replacements()) == len(used)
    assert [layer.source[0] for layer in s.replacements()] == sorted(layer.source[0] for layer in used)
    assert used - {s.layer((i,), "original") for i in range(4)} == set(s.proxies())
    for layer in used:
        assert s.layer(layer.source, s.option_of(layer)) == layer
    few = space(4, allowed=[[5], [0], [1, 5], [0]])
    assert set(few.replacements()) == {layer for genotype in few.all() for layer in genotype.layers}


def test_options_are_named_after_what_differs():
    s = space()
    assert [choice.option for choice in s.choices] == NAMES and s.options == tuple(dict.fromkeys(NAMES))
    assert s.option_shape("rank4-tokens2") == Shape(32, 2, 4.0, 4, 2)
    wide = MenuSpace(3, 1152, 16, 4.0, [{"mlp_ratio": 2.5, "num_heads": 24, "attention_dim": 768, "token_merge": 2}])
    assert wide.options[1] == "attn768-heads24-mlp2.5-tokens2"
    assert wide.layer((2,), wide.options[1]) == LayerSpec((2,), 768, 24, 2.5, None, 2)


def test_the_first_layer_is_conditioned_whatever_is_chosen():
    for genotype in space(4).all():
        assert genotype.layers[0].modulation_rank != 0
    with pytest.raises(EdgeDiTError, match=r"has 'static' in the place of the teacher layers \[0\]; this space allows"):
        space(3).code(
            Genotype((LayerSpec((0,), 32, 2, 4.0, 0), *Genotype.original(3, 32, 2).layers[1:]), 32),
        )


def test_the_ends_have_the_most_and_the_fewest_weights_of_all():
    for s in (space(4), space(4, allowed=[[1, 5], [0, 3], [1], [2, 3]]), SearchSpace(4, 32, 2)):
        weights = [sum(layer_cost(32, layer.shape, 4).weights for layer in g.layers) for g in s.all()]
        most, fewest = (sum(layer_cost(32, layer.shape, 4).weights for layer in g.layers) for g in s.ends())
        assert (most, fewest) == (max(weights), min(weights))


def test_stages_are_parts_of_the_space():
    s = space(4)
    merge = s.stage("merge")
    assert {g.merged.__str__() for g in merge.all()} == {"[]", "[(0, 1)]", "[(1, 2)]", "[(2, 3)]", "[(0, 1), (2, 3)]"}
    chosen = merge.from_code((0, 5, 0, 0))
    options = s.stage("options", chosen)
    assert {tuple(layer.source for layer in g.layers) for g in options.all()} == {((0,), (1, 2), (3,))}
    assert options.size == 4 * 2 * 5  # (0,) may not be static
    with pytest.raises(EdgeDiTError, match=r"stage\('third'\) is not a stage"):
        s.stage("third")


def test_spaces_round_trip_as_plain_values():
    s = space(5)
    for each in (s, s.stage("merge"), space(5, allowed=[[0, 1]] * 5)):
        again = SearchSpace.from_dict(json.loads(json.dumps(each.to_dict())))
        assert isinstance(again, MenuSpace) and again.to_dict() == each.to_dict() and again.allowed == each.allowed
        assert again.choices == each.choices
    paper = SearchSpace.from_dict(SearchSpace(5, 32, 2).to_dict())
    assert type(paper) is SearchSpace and "menu" not in paper.to_dict()
    listed = space(5, [*MENU[:3], {"merge": 1, "num_heads": None}, *MENU[3:]])  # the teacher's own layer, listed too
    assert listed.to_dict() == s.to_dict()


def test_long_skips_and_decoders_keep_their_places(make_transformer):
    config = make_transformer(num_layers=5).config
    free = MenuSpace.for_config(config, menu=MENU)
    assert free.to_dict() == space(5).to_dict() and set(free.all()) == brute_force(5)
    bound = MenuSpace.for_config({**config, "long_skips": [[1, 4]], "decoder_start": 3}, menu=MENU[:-2])
    joints = (1, 2, 3)  # a skip starts after 1 and ends before 4, the decoder starts before 3
    assert set(bound.all()) == brute_force(5, joints) and bound.size < free.size
    with pytest.raises(EdgeDiTError, match=r"'original' in the place of the teacher layers \[1, 2\]"):
        bound.code(free.from_code((0, 5, 0, 0, 0)))


def test_a_choice_that_fits_nowhere_is_refused(make_transformer):
    with pytest.raises(EdgeDiTError, match=r"'static' \(merge 2\) fit nowhere .* is never static"):
        MenuSpace(2, 32, 2, menu=[{"mlp_ratio": 2}, {"merge": 2, "modulation_rank": 0}])
    config = {**make_transformer(num_layers=4).config, "long_skips": [[0, 3], [1, 2]]}
    with pytest.raises(EdgeDiTError, match="'mlp2' .merge 2., 'original' .merge 3. fit nowhere .* end of a long skip"):
        MenuSpace.for_config(config, menu=[{"merge": 2, "mlp_ratio": 2}, {"num_heads": 4}, {"merge": 3}])
    kept = MenuSpace(2, 32, 2, menu=[{"mlp_ratio": 2}, {"merge": 2}], allowed=[[0, 1], [0, 1]])
    assert SearchSpace.from_dict(kept.to_dict()).allowed == kept.allowed  # what a stage leaves out is meant


def test_merged_tokens_need_an_even_grid(make_transformer):
    config = {**make_transformer().config, "sample_size": 6, "patch_size": 2}
    with pytest.raises(EdgeDiTError, match="'rank4-tokens2' has token_merge 2, but the teacher's tokens .* 3 × 3"):
        MenuSpace.for_config(config, menu=MENU)
    MenuSpace.for_config(config, menu=MENU[:3])


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("menu", "said"),
    [
        ([], r"menu is \[\]; list at least one choice"),
        ("mlp2", "menu is 'mlp2'"),
        ([{"mlp_ration": 2}], r"menu\[0\] is \{'mlp_ration': 2\}; did you mean 'mlp_ratio'"),
        ([{}, "mlp2"], r"menu\[1\] is 'mlp2'; a choice's keys are merge, attention_dim"),
        ([{"merge": 4}], r"menu\[0\].merge is 4; it must be at least 1 and at most 3"),
        ([{"attention_dim": 64}], r"menu\[0\].attention_dim is 64, above the teacher's 32"),
        ([{"mlp_ratio": 5}], r"menu\[0\].mlp_ratio is 5.0, above the teacher's 4.0"),
        ([{"mlp_ratio": 0.01}], r"menu\[0\].mlp_ratio is 0.01, .* no neuron; it must be at least 0.0312"),
        ([{"num_heads": 3}], r"menu\[0\] is .*attention_dim 32 is not a positive multiple of num_heads 3"),
        ([{"modulation_rank": 32}], r"menu\[0\].modulation_rank is 32; it must be below the hidden_size 32"),
        ([{"token_merge": 3}], r"menu\[0\] is .*token_merge"),
        ([{"merge": 2.0}], r"menu\[0\].merge is 2.0 \(float\); it must be a whole number or null"),
        ([{}, {"num_heads": True}], r"menu\[1\].num_heads is True \(bool\); it must be a whole number"),
        ([{"num_heads": "4"}], r"menu\[0\].num_heads is '4' \(str\); it must be a whole number"),
        ([{"modulation_rank": 4.5}], r"menu\[0\].modulation_rank is 4.5 \(float\)"),
        ([{"mlp_ratio": "2"}], r"menu\[0\].mlp_ratio is '2' \(str\); it must be a number or null"),
        ([{"mlp_ratio": 10**400}], r"menu\[0\].mlp_ratio is .* \(int\); it must be a number or null"),
        ([{}], r"menu is \[\{\}\], which is the teacher's own layer alone; list a choice beside it"),
        ([{"num_heads": 2, "merge": 1, "mlp_ratio": None}], "the teacher's own layer alone"),
        ([{"mlp_ratio": 2}, {}, {"mlp_ratio": 2.0}], r"menu\[0\] and menu\[2\] are both 'mlp2' of 1 layers"),
        ([{"mlp_ratio": 1 + i / 8} for i in range(16)], "holds 17 choices with merge 1 .* it may hold 16"),
        ([{"merge": 2, "mlp_ratio": 1 + i / 8} for i in range(17)], "holds 17 choices with merge 2"),
    ],
)
def test_a_menu_that_makes_no_sense_is_refused(menu, said):
    with pytest.raises(EdgeDiTError, match=said):
        space(5, menu)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s: s.from_code((0, 0)), "The code has 2 entries; this space needs 4"),
        (
            lambda s: s.from_code((0, 8, 0, 0)),
            r"Entry 1 of the code is 8; this space allows \[0, 1, 2, 3, 4, 5, 6, 7\]",
        ),
        (lambda s: s.from_code((0, 0, 0, 5)), r"Entry 3 of the code is 5; this space allows \[0, 1, 2, 3, 4\]"),
        (lambda s: s.decode([0.5] * 3), "has 3 coordinates; this space has 4"),
        (lambda s: s.code(Genotype.original(3, 32, 2)), "replaces 3 layers of width 32, but the teacher has 4"),
        (lambda s: s.code(Genotype.original(4, 32, 4)), "none of the menu's"),
        (lambda s: s.layer((0,), "both"), "option is 'both'; it must be one of"),
        (lambda s: s.layer((0, 1), "mlp2"), "none of the menu's"),
        (lambda s: space(2), r"menu\[6\].merge is 3; it must be at least 1 and at most 2 \(of 2 teacher layers\)"),
        (lambda s: space(4, allowed=[[0]] * 3), "allowed must hold 4"),
        (lambda s: space(4, allowed=[[0], [0], [0], [5]]), "that fit there"),
        (lambda s: space(4, allowed=[[3], [0], [0], [0]]), "that fit there"),
    ],
)
def test_codes_genotypes_and_limits_of_another_space_are_refused(call, said):
    with pytest.raises(EdgeDiTError, match=said):
        call(space(4))


STRANGE = (None, True, "x", "", [], {}, [[]], -1, 0, 3, 10**30, 1.5, float("nan"), float("inf"), -1e300)


def damaged(value):
    """A plain value with something strange in the place of each of its parts, one at a time, or without it."""
    yield from STRANGE
    if isinstance(value, dict):
        for key, part in value.items():
            yield {other: kept for other, kept in value.items() if other != key}
            yield from ({**value, key: strange} for strange in damaged(part))
    if isinstance(value, list):
        for place, part in enumerate(value):
            yield value[:place] + value[place + 1 :]
            yield from ([*value[:place], strange, *value[place + 1 :]] for strange in damaged(part))


def test_a_damaged_space_is_one_clear_error_or_a_space():
    values = space(3).to_dict()
    good = 0
    for strange in damaged(values):
        try:
            s = SearchSpace.from_dict(strange)
            assert s.from_code(next(iter(s.codes()))).num_teacher_layers == s.num_layers
            good += 1
        except EdgeDiTError:
            pass
    assert good > 50
