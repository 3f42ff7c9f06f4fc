"""The search space: its size, its codec over all of it, the paper's two stages; and the closed-form costs of what it
holds.
"""

import itertools
import random
from collections import Counter

import pytest
import torch

from edgedit_hf import EdgeDiTTransformer2DModel, Genotype, SearchSpace
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.genotype import LayerSpec, Shape
from edgedit_hf.search_space import (
    BYTES,
    OPTIONS,
    Cost,
    default_attention_dim,
    layer_cost,
    live_values,
    model_cost,
    peak_live_values,
    trunk_live_values,
)

PAIR_CHOICES = 4 * 4 + 4


def space(num_layers: int = 6, **sizes) -> SearchSpace:
    return SearchSpace(num_layers, 64, 2, **sizes)


def random_points(dimension: int, count: int, seed: int = 0):
    source = random.Random(seed)
    return ([source.random() for _ in range(dimension)] for _ in range(count))


# -------------------------------------------------------------------- size and content


@pytest.mark.parametrize("num_layers", [1, 2, 3, 6, 28])
def test_size_and_dimension(num_layers):
    s = space(num_layers)
    assert s.size == PAIR_CHOICES ** (num_layers // 2) * (4 if num_layers % 2 else 1)
    assert s.dimension == num_layers
    if num_layers <= 3:
        genotypes = list(s.all())
        assert len(genotypes) == len(set(genotypes)) == s.size


def test_the_options_are_those_of_the_paper():
    s = SearchSpace(28, 1152, 16)
    assert [s.option_shape(option)[:3] for option in OPTIONS] == [
        (1152, 16, 4.0),
        (1152, 16, 2.0),
        (512, 16, 4.0),
        (512, 16, 2.0),
    ]
    assert default_attention_dim(1152, 16) == 512
    assert len(s.proxies()) == len(set(s.proxies())) == 28 * 3 + 14 * 4 == 140
    for width, heads in ((384, 6), (768, 12), (1024, 16), (128, 4), (32, 2)):
        reduced = default_attention_dim(width, heads)
        assert reduced < width and reduced % (8 * heads) == 0


def test_the_proxies_are_the_layers_that_students_need_beside_the_teachers_own():
    s = space(5)
    used = {layer for genotype in s.all() for layer in genotype.layers}
    originals = {s.layer((i,), "original") for i in range(5)}
    assert used - originals == set(s.proxies())
    for layer in used:
        assert s.layer(layer.source, s.option_of(layer)) == layer


# -------------------------------------------------------------------- codes and the cube


def test_codes_and_points_cover_the_whole_space_one_to_one():
    s = space(6)
    seen = set()
    for code in itertools.product(range(PAIR_CHOICES), repeat=3):
        genotype = s.from_code(code)
        seen.add(genotype)
        assert s.code(genotype) == code
        assert s.decode(s.encode(genotype)) == genotype
    assert len(seen) == s.size == PAIR_CHOICES**3


@pytest.mark.parametrize("num_layers", [27, 28])
def test_codec_round_trip_of_random_points_at_the_size_of_the_paper(num_layers):
    s = space(num_layers)
    for x in random_points(num_layers, 200):
        genotype = s.decode(x)
        point = s.encode(genotype)
        assert all(0 < coordinate < 1 for coordinate in point)
        assert s.decode(point) == genotype and s.from_code(s.code(genotype)) == genotype
        assert genotype.num_teacher_layers == num_layers


PAIR = space(2)
SMALL_SPACES = {
    "pair": PAIR,
    "odd": space(3),
    "merge": space(3).stage("merge"),
    "options of a pair": PAIR.stage("options", PAIR.from_code((0,))),
    "options of a merged pair": PAIR.stage("options", PAIR.from_code((16,))),
}


@pytest.mark.parametrize("name", SMALL_SPACES)
def test_uniform_points_choose_uniformly(name):
    s = SMALL_SPACES[name]
    grid = [(i + 0.5) / 20 for i in range(20)]  # every cell is a whole number of these boxes
    counts = Counter(s.code(s.decode(x)) for x in itertools.product(grid, repeat=s.dimension))
    assert len(counts) == s.size and len(set(counts.values())) == 1


def test_the_cubes_faces_belong_to_it_and_points_outside_are_clipped():
    s = space(3)
    assert s.code(s.decode([0.0, 0.0, 0.0])) == (0, 0) == s.code(s.decode([-0.5, 0.0, -1e9]))
    assert s.code(s.decode([1.0, 1.0, 1.0])) == (19, 3) == s.code(s.decode([1.5, 1.0, 1e9]))


def test_a_code_reads_as_documented():
    genotype = space(5).from_code(
        (4 * OPTIONS.index("mlp") + OPTIONS.index("attention"), 16 + OPTIONS.index("both"), 1)
    )
    assert genotype.layers == (
        LayerSpec((0,), 64, 2, 2.0),
        LayerSpec((1,), 32, 2, 4.0),
        LayerSpec((2, 3), 32, 2, 2.0),
        LayerSpec((4,), 64, 2, 2.0),
    )


def test_features_tell_genotypes_apart_and_neighbours_differ_in_one_pair():
    s = space(5)
    rows = {tuple(s.features(genotype)) for genotype in s.all()}
    assert len(rows) == s.size and {len(row) for row in rows} == {5 * 2 + 2}
    assert set(itertools.chain(*rows)) == {0.0, 1.0}
    genotype = s.from_code((5, 17, 2))
    neighbours = list(s.neighbours(genotype))
    assert len(neighbours) == len(set(neighbours)) == 19 + 19 + 3 and genotype not in neighbours
    for neighbour in neighbours:
        assert sum(a != b for a, b in zip(s.code(neighbour), (5, 17, 2))) == 1


# -------------------------------------------------------------------- the paper's two stages


def test_the_two_stages_have_the_sizes_of_the_paper():
    s = SearchSpace(28, 1152, 16)
    merge = s.stage("merge")
    assert merge.size == 2**14
    chosen = merge.from_code([16 if pair in (4, 7, 10) else 0 for pair in range(14)])
    assert len(chosen.layers) == 25 and chosen.merged == [(8, 9), (14, 15), (20, 21)]
    options = s.stage("options", chosen)
    assert options.size == 4**25
    for x in random_points(28, 50):
        genotype = options.decode(x)
        assert [layer.source for layer in genotype.layers] == [layer.source for layer in chosen.layers]
        assert options.decode(options.encode(genotype)) == genotype and s.code(genotype) == options.code(genotype)
        assert {s.option_of(layer) for layer in merge.decode(x).layers} == {"original"}


def test_stages_and_spaces_round_trip_as_plain_values():
    s = space(5, reduced_mlp_ratio=1.5, reduced_attention_dim=16)
    for each in (s, s.stage("merge"), s.stage("options", s.from_code((0, 16, 0)))):
        again = SearchSpace(**each.to_dict())
        assert again.to_dict() == each.to_dict() and again.size == each.size
    with pytest.raises(EdgeDiTError, match=r"stage\('third'\) is not a stage"):
        s.stage("third")
    with pytest.raises(EdgeDiTError, match="with the genotype that stage 'merge' chose"):
        s.stage("options")


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s: s.from_code((0, 0)), "The code has 2 entries; this space needs 3"),
        (lambda s: s.from_code((0, 20, 0)), "Entry 1 of the code is 20"),
        (lambda s: s.from_code((0, 0, 4)), r"Entry 2 of the code is 4; this space allows \[0, 1, 2, 3\]"),
        (lambda s: s.from_code((-1, 0, 0)), "Entry 0 of the code is -1"),
        (lambda s: s.stage("merge").from_code((1, 0, 0)), r"Entry 0 of the code is 1; this space allows \[0, 16\]"),
        (lambda s: s.decode([0.5] * 4), "has 4 coordinates; this space has 5"),
        (
            lambda s: s.code(Genotype.original(4, 64, 2)),
            "replaces 4 layers of width 64, but the teacher has 5 of width 64",
        ),
        (lambda s: s.code(Genotype.original(5, 32, 2)), "5 layers of width 32"),
        (lambda s: s.code(Genotype.original(5, 64, 4)), "none of this teacher's options"),
        (lambda s: s.option_shape("smaller"), "option is 'smaller'"),
    ],
)
def test_codes_and_genotypes_of_another_space_are_refused(call, said):
    with pytest.raises(EdgeDiTError, match=said):
        call(space(5))


def test_merging_across_pairs_is_refused():
    layers = [LayerSpec(source, 64, 2, 4.0) for source in ((0,), (1, 2), (3,), (4,))]
    with pytest.raises(EdgeDiTError, match=r"merges \[\(1, 2\)\]; only the pairs \(0, 1\), \(2, 3\)"):
        space(5).code(Genotype(tuple(layers), 64))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"reduced_mlp_ratio": 4.0}, "MLP ratio 4.0"),
        ({"reduced_attention_dim": 64}, "attention width 64"),
        ({"reduced_mlp_ratio": 0.01}, "MLP ratio 0.01, so 0 of 256 neurons"),
        ({"reduced_mlp_ratio": -1.0}, "MLP ratio -1.0, so 0 of"),
        ({"reduced_mlp_ratio": float("nan")}, "MLP ratio nan"),
        ({"reduced_attention_dim": 0}, "attention width 0"),
        ({"reduced_attention_dim": 15}, "attention width 15.*2 heads divide"),
        ({"allowed": [[0], [0]]}, "allowed must hold 3"),
        ({"allowed": [[0], [], [0]]}, "allowed must hold 3 non-empty"),
        ({"allowed": [[0], [20], [0]]}, "codes below 20"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(sizes, said):
    with pytest.raises(EdgeDiTError, match=said):
        SearchSpace(**{"num_layers": 6, "hidden_size": 64, "num_heads": 2, **sizes})


def test_the_space_of_a_model_is_that_of_its_config(make_transformer):
    config = make_transformer().config
    assert (
        SearchSpace.for_config(config, reduced_attention_dim=16).to_dict()
        == SearchSpace(4, 32, 2, reduced_attention_dim=16).to_dict()
    )
    compressed = SearchSpace.for_config(config).from_code((5, 16)).to_layers()
    with pytest.raises(EdgeDiTError, match="2 different layer shapes and 1 merged layers"):
        SearchSpace.for_config({**config, "layers": compressed})
    narrow = [{**layer, "attention_dim": 16} for layer in config["layers"]]
    with pytest.raises(EdgeDiTError, match="attention width 16 is not its hidden size 32"):
        SearchSpace.for_config({**config, "layers": narrow})


# -------------------------------------------------------------------- closed-form costs (against modules: tests/models)


def test_costs_add_up_over_the_layers(make_transformer):
    config = make_transformer().config
    s = SearchSpace.for_config(config)
    whole, tokens = model_cost(config), 16
    for genotype in random.Random(0).sample(list(s.all()), 20):
        cost = model_cost({**config, "layers": genotype.to_layers()})
        layers = sum((layer_cost(32, layer.shape, tokens) for layer in genotype.layers), Cost(0, 0, 0, 0))
        assert whole.weights - cost.weights == 4 * layer_cost(32, Shape(32, 2, 4.0), tokens).weights - layers.weights
        assert whole.flops - cost.flops == 4 * layer_cost(32, Shape(32, 2, 4.0), tokens).flops - layers.flops
        assert cost == whole if genotype == Genotype.original(4, 32, 2) else cost.flops < whole.flops


def test_what_a_modulation_and_merged_tokens_save():
    # DiT-XL/2's layer: 23.9052 M weights and 4.23582 G MACs, of which adaLN has 7.9695 M (6 · 1152² and a bias)
    shape, tokens = Shape(1152, 16, 4.0), 256
    whole = layer_cost(1152, shape, tokens)
    static, low = (layer_cost(1152, shape._replace(modulation_rank=rank), tokens) for rank in (0, 64))
    assert whole.weights - static.weights == whole.macs - static.macs == 6 * 1152**2
    assert low.weights - static.weights == low.macs - static.macs == 64 * 1152 + 6 * 1152 * 64
    merged, quarter = layer_cost(1152, shape._replace(token_merge=2), tokens), layer_cost(1152, shape, tokens // 4)
    assert merged == quarter and merged.weights == whole.weights


@pytest.mark.parametrize("token_merge", [1, 2])
@pytest.mark.parametrize(("attention_dim", "num_heads", "mlp_ratio"), [(8, 1, 4.0), (32, 2, 0.5), (16, 8, 1.0)])
def test_live_values_are_those_that_hooks_see(make_transformer, attention_dim, num_heads, mlp_ratio, token_merge):
    layer = LayerSpec((0,), attention_dim, num_heads, mlp_ratio, token_merge=token_merge)
    config = make_transformer(num_layers=1).config
    model = EdgeDiTTransformer2DModel.with_config(config, layers=Genotype((layer,), 32).to_layers())
    block, sizes = model.blocks[0], {}
    for name, module in block.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: sizes.update({name: out.numel(), "": args}))
    tokens = torch.randn(1, 16, 32)
    block(tokens, torch.randn(1, 32))
    inside = sizes["norm1"] // 32
    attention = max(sizes["norm1"] + sizes["attn.to_qkv"], sizes["attn.to_qkv"] + num_heads * inside**2)
    most = max(attention, sizes["norm2"] + sizes["mlp.proj_in"])
    assert inside == 16 // token_merge**2 and live_values(config, layer) == tokens.numel() + most
    small = LayerSpec((1,), 8, 1, 0.25, token_merge=2)
    both = max(live_values(config, layer), live_values(config, small), trunk_live_values(config))
    assert peak_live_values(config, Genotype((layer, small), 32)) == both
    skipped = {**config, "long_skips": [[-1, 3], [0, 2]]}
    over = [live_values(skipped, LayerSpec((index,), *layer.shape)) for index in range(4)]
    assert [(value - over[3]) // tokens.numel() for value in over] == [0, 1, 1, 0]
    assert trunk_live_values(skipped) == 2 * trunk_live_values(config) == 4 * tokens.numel()


def test_larger_inputs_cost_more_and_bytes_follow_the_precision(make_transformer):
    config = make_transformer().config
    assert model_cost(config) == model_cost(config, 8, 8)
    large = model_cost(config, 16, 12)
    assert large.weights == model_cost(config).weights and large.macs > 3 * model_cost(config).macs
    assert large.parameters - large.weights == 8 * 6 * 32
    for precision, size in BYTES.items():
        assert large.bytes(precision) == int(large.weights * size)
