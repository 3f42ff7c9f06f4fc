"""Closed-form starts: each piece of linear algebra against a brute-force solution, and the whole against plain
truncation.
"""

import copy

import pytest
import torch

from edgedit_hf import EdgeDiTTransformer2DModel, SearchSpace
from edgedit_hf.distill.closed_form import (
    SELECTION_RIDGE,
    closed_form_block,
    combine_blocks,
    factor_query_key,
    factor_value_output,
    refit_gated,
    refit_linear,
    select_groups,
    truncated_block,
    weighted_gram,
)
from edgedit_hf.distill.feature_loss import feature_loss
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.genotype import LayerSpec
from edgedit_hf.models.transformer_edgedit import EdgeDiTBlock
from edgedit_hf.search_space import OPTIONS

SPACE = SearchSpace(4, 32, 2)


def spec(*source: int, width: int = 32, ratio: float = 4.0, heads: int = 2, rank=None, merge: int = 1) -> LayerSpec:
    return LayerSpec(source, width, heads, ratio, rank, merge)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Rows whose directions have very different sizes."""
    scales = torch.logspace(0, -2, width, dtype=torch.float64)
    return random(rows, width, seed=seed) * scales @ random(width, width, seed=seed + 1)


# -------------------------------------------------------------------- attention


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_query_and_key_maps_are_the_best_of_their_rank(rank):
    width, count = 8, 60
    query, key = correlated(count, width, seed=0), correlated(count, width, seed=5)
    moments = [(t.mT @ t / count).unsqueeze(0) for t in (query, key)]
    p, r = (maps[0] for maps in factor_query_key(*moments, rank))
    assert p.shape == r.shape == (width, rank)
    scores, narrow = query @ key.mT / width**0.5, (query @ p) @ (key @ r).mT / rank**0.5
    error = (scores - narrow).square().sum()
    # Brute force: every query meets every key, so the best stand-in of this rank is the truncated SVD of the score
    # matrix itself.
    values = torch.linalg.svdvals(scores)
    best = values[rank:].square().sum()
    assert best * (1 - 1e-9) <= error <= best * 1.001 + 1e-9 * values.square().sum()
    truncated = query[:, :rank] @ key[:, :rank].mT / rank**0.5
    assert error < 0.5 * (scores - truncated).square().sum()


def test_query_and_key_maps_of_full_rank_are_exact():
    query, key = random(2, 40, 6), random(2, 40, 6, seed=1)
    p, r = factor_query_key(query.mT @ query / 40, key.mT @ key / 40, 6)
    torch.testing.assert_close((query @ p) @ (key @ r).mT, query @ key.mT, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_value_and_output_maps_are_the_best_of_their_rank(rank):
    width, hidden, count = 6, 10, 60
    values, weight = correlated(count, width), random(width, hidden, seed=3)
    v, o = factor_value_output((values.mT @ values / count).unsqueeze(0), weight.unsqueeze(0), rank)
    assert v.shape == (1, width, rank) and o.shape == (1, rank, hidden)
    error = (values @ weight - values @ v[0] @ o[0]).square().sum()
    singular = torch.linalg.svdvals(values @ weight).square()
    assert error <= singular[rank:].sum() * 1.001 + 1e-9 * singular.sum()


# -------------------------------------------------------------------- MLP


def test_neurons_that_others_can_stand_in_for_are_dropped():
    hidden = random(200, 12)
    hidden[:, 3] = 0  # dead
    hidden[:, 5] = 2 * hidden[:, 1]  # a duplicate at another scale
    hidden[:, 9] = 0.5 * hidden[:, 2] - hidden[:, 7]  # a combination
    out = random(12, 8, seed=1)
    kept, refitted = select_groups(hidden, out, torch.ones(200), 9)
    assert kept.tolist() == sorted(kept.tolist()) and len(set(kept.tolist())) == 9
    dropped = set(range(12)) - set(kept.tolist())
    assert 3 in dropped and len(dropped & {1, 5}) == 1 and len(dropped & {2, 7, 9}) == 1
    # What is left still gives the whole output, with the weights that come along: up to the ridge, exactly.
    exact = torch.linalg.lstsq(hidden[:, kept], hidden @ out).solution
    torch.testing.assert_close(hidden[:, kept] @ exact, hidden @ out, rtol=0, atol=1e-8)
    torch.testing.assert_close(hidden[:, kept] @ refitted, hidden @ out, rtol=0, atol=0.02)


def test_neurons_without_an_output_or_in_rows_that_do_not_count_are_dropped():
    hidden, out = random(200, 8), random(8, 4, seed=1)
    out[2] = 0
    assert 2 not in select_groups(hidden, out, torch.ones(200), 7)[0]
    hidden[:100, 6] = 0
    weights = torch.cat([torch.ones(100), torch.zeros(100)])  # neuron 6 fires only where the gate is closed
    assert 6 not in select_groups(hidden, random(8, 4, seed=1), weights, 7)[0]
    kept, weight = select_groups(hidden, out, torch.ones(200), 8)
    assert kept.tolist() == list(range(8)) and torch.equal(weight, out)


def test_selection_is_better_than_chance():
    hidden, out = correlated(300, 24), random(24, 10, seed=7)

    def lost(kept) -> float:
        refitted = torch.linalg.lstsq(hidden[:, kept], hidden @ out).solution
        return (hidden[:, kept] @ refitted - hidden @ out).square().sum().item()

    chosen = lost(select_groups(hidden, out, torch.ones(300), 12)[0])
    generator = torch.Generator().manual_seed(0)
    chance = sorted(lost(torch.randperm(24, generator=generator)[:12]) for _ in range(50))
    assert chosen <= chance[2]


def test_rounds_of_selection_are_exact():
    """Updating inverse and weights round by round is the same as solving for what is left."""
    hidden, out, weights = correlated(400, 40), random(40, 10, seed=7), random(400, seed=3).abs()
    kept, weight = select_groups(hidden, out, weights, 10)
    gram = hidden.mT @ (hidden * weights[:, None])
    gram.diagonal().add_(SELECTION_RIDGE * 40 / 400 * gram.diagonal().mean())
    torch.testing.assert_close(weight, torch.linalg.solve(gram[kept][:, kept], gram[kept] @ out), rtol=1e-6, atol=1e-8)


def test_whole_heads_are_selected_together():
    width, heads = 3, 5
    hidden, out = random(300, heads * width), random(heads * width, 8, seed=1)
    hidden[:, 3:6] = hidden[:, 9:12] @ random(3, 3, seed=2)  # head 1 says what head 3 says
    hidden[:, 12] *= 10  # a head with one loud channel stays whole
    kept, weight = select_groups(hidden, out, torch.ones(300), 4, group=width)
    assert len(set(kept.tolist()) & {1, 3}) == 1 and {0, 2, 4} <= set(kept.tolist())
    channels = (kept[:, None] * width + torch.arange(width)).flatten()
    assert (hidden[:, channels] @ weight - hidden @ out).norm() < 0.02 * (hidden @ out).norm()


def test_a_gram_matrix_of_single_precision_rows_is_summed_in_double():
    rows, weights = random(9000, 16).float(), random(9000, seed=1).abs().float()
    expected = rows.double().mT @ (rows.double() * weights.double()[:, None])
    found = weighted_gram(rows, weights)
    assert found.dtype == torch.float64 and torch.equal(weighted_gram(rows), weighted_gram(rows, torch.ones(9000)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_linear_refit_stays_near_the_given_weights_only_where_the_data_is_silent():
    linear = torch.nn.Linear(6, 4, dtype=torch.float64)
    features = random(5000, 6)
    features[:, 5] = 0
    wanted = random(7, 4, seed=1)
    found = refit_linear(features, features @ wanted[:6] + wanted[6], linear)
    torch.testing.assert_close(found[[0, 1, 2, 3, 4, 6]], wanted[[0, 1, 2, 3, 4, 6]], rtol=0, atol=0.05)
    torch.testing.assert_close(found[5], linear.weight.data[:, 5])


def test_gated_refit_is_weighted_least_squares_a_column():
    rows, width, hidden = 80, 6, 5
    features, gate, target = random(rows, width), random(rows, hidden, seed=1), random(rows, hidden, seed=2)
    gate[:, 4] = 0  # a closed gate teaches nothing
    start_weight, start_bias = random(width, hidden, seed=3), random(hidden, seed=4)
    weight, bias = refit_gated(features, gate, target, start_weight, start_bias, ridge=0, iterations=200)
    with_ones = torch.cat([features, torch.ones(rows, 1, dtype=torch.float64)], dim=1)
    for column in range(4):
        g = gate[:, column : column + 1]
        expected = torch.linalg.lstsq(g * with_ones, target[:, column : column + 1]).solution[:, 0]
        torch.testing.assert_close(
            torch.cat([weight[:, column], bias[column : column + 1]]), expected, rtol=0, atol=2e-3
        )
    torch.testing.assert_close(weight[:, 4], start_weight[:, 4])
    torch.testing.assert_close(bias[4], start_bias[4])


def test_gated_refit_converges_in_its_few_iterations():
    rows, width, hidden = 400, 32, 16
    features, target = correlated(rows, width), random(rows, hidden, seed=2)
    gate = (
        random(rows, 1, seed=1).abs()
        * torch.logspace(-1, 1, hidden, dtype=torch.float64)
        * (1 + 0.3 * random(rows, hidden, seed=5))
    )
    start = torch.zeros(width, hidden, dtype=torch.float64), torch.zeros(hidden, dtype=torch.float64)

    def error(iterations: int) -> float:
        weight, bias = refit_gated(features, gate, target, *start, iterations=iterations)
        return (gate * (features @ weight + bias) - target).square().sum().item()

    assert error(30) <= error(500) * 1.001 < target.square().sum().item()


def test_gated_refit_leaves_a_perfect_fit_alone():
    features, gate, weight, bias = random(50, 6), random(50, 5, seed=1), random(6, 5, seed=3), random(5, seed=4)
    again = refit_gated(features, gate, gate * (features @ weight + bias), weight, bias)
    torch.testing.assert_close(again[0], weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(again[1], bias, rtol=0, atol=1e-10)


# -------------------------------------------------------------------- whole blocks


@pytest.fixture(scope="module")
def teacher():
    """DiT's initialisation, randomly perturbed where it starts at zero."""
    torch.manual_seed(3)
    model = EdgeDiTTransformer2DModel.from_preset("DiT-debug/2").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any():
                parameter.normal_(std=0.1 if "modulation" in name else 0.2)
    return model


@torch.no_grad()
def features_of(model, seed: int, count: int):
    """Inputs of every layer and the conditioning, from noise at random timesteps."""
    generator = torch.Generator().manual_seed(seed)
    x, t = torch.randn(count, 1, 8, 8, generator=generator), torch.rand(count, generator=generator) * 1000
    hidden, conditioning = model.embed(x, t, torch.arange(count) % 11)
    layers = [hidden]
    for block in model.blocks:
        layers.append(block(layers[-1], conditioning))
    return layers, conditioning


@pytest.fixture(scope="module")
def features(teacher):
    """`features(seed, count)` of the teacher."""
    return lambda seed, count=48: features_of(teacher, seed, count)


@torch.no_grad()
def loss_of(block, features, first: int, last: int) -> float:
    layers, conditioning = features
    return feature_loss(block(layers[first], conditioning), layers[last + 1], layers[first]).item()


@pytest.mark.parametrize(
    ("option", "source"), [(option, (1,)) for option in OPTIONS[1:]] + [(option, (2, 3)) for option in OPTIONS], ids=str
)
def test_closed_form_beats_truncation_on_features_it_has_not_seen(teacher, features, option, source):
    layers, conditioning = features(0)
    blocks = [teacher.blocks[i] for i in source]
    proxy = closed_form_block(blocks, layers[source[0]], conditioning, SPACE.layer(source, option))
    fresh = EdgeDiTBlock(32, *SPACE.option_shape(option))
    assert {k: v.shape for k, v in proxy.state_dict().items()} == {k: v.shape for k, v in fresh.state_dict().items()}
    assert {v.dtype for v in proxy.state_dict().values()} == {torch.float32}
    unseen = features(1)
    closed = loss_of(proxy, unseen, source[0], source[-1])
    plain = min(
        loss_of(truncated_block(block, SPACE.layer(source, option)), unseen, source[0], source[-1]) for block in blocks
    )
    assert closed < 0.2 * plain and closed < (0.1 if len(source) == 2 else 0.01)


def test_three_layers_become_one(teacher, features):
    layers, conditioning = features(0, 128)
    unseen = features(1)
    plain = min(
        loss_of(truncated_block(block, spec(1, 2, 3, width=16, ratio=2.0)), unseen, 1, 3)
        for block in teacher.blocks[1:]
    )
    proxy = closed_form_block(list(teacher.blocks[1:]), layers[1], conditioning, spec(1, 2, 3, width=16, ratio=2.0))
    assert loss_of(proxy, unseen, 1, 3) < min(0.2, 0.3 * plain)


def test_pooled_heads_and_neurons_beat_those_of_one_layer(teacher, features):
    """A merged layer's start against the same fit with the first layer's own heads and neurons alone."""
    layers, conditioning = features(0, 128)
    unseen = features(1)
    pooled = closed_form_block([teacher.blocks[2], teacher.blocks[3]], layers[2], conditioning, spec(2, 3))
    alone = copy.deepcopy(teacher.blocks[2])
    with torch.no_grad():
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            alone.modulation(conditioning).unsqueeze(1).chunk(6, dim=-1)
        )
        after = layers[2] + gate_a * alone.attn(alone.norm1(layers[2]) * (1 + scale_a) + shift_a)
        hidden = alone.mlp.act(alone.mlp.proj_in(alone.norm2(after) * (1 + scale_m) + shift_m)).flatten(0, 1)
        weight, bias = refit_gated(
            hidden,
            gate_m.expand_as(after).flatten(0, 1),
            (layers[4] - after).flatten(0, 1),
            alone.mlp.proj_out.weight.mT,
            alone.mlp.proj_out.bias,
        )
        alone.mlp.proj_out.weight.copy_(weight.mT)
        alone.mlp.proj_out.bias.copy_(bias)
    assert loss_of(pooled, unseen, 2, 3) < 0.9 * loss_of(alone, unseen, 2, 3)


@pytest.mark.parametrize("source", [(1,), (1, 2)], ids=str)
def test_what_is_special_about_a_teachers_blocks_is_kept(source):
    """Relative position bias, and the norms' own epsilons."""
    torch.manual_seed(0)
    blocks = [EdgeDiTBlock(32, 32, 2, 4.0, norm_eps=0.1, mlp_norm_eps=0.2, bias_grid=4) for _ in range(3)]
    with torch.no_grad():
        for block in blocks:
            block.attn.position_bias.table.normal_()
            block.modulation.weight.normal_(std=0.1)
            block.modulation.bias.normal_(std=0.3)
    generator = torch.Generator().manual_seed(1)
    x, conditioning = torch.randn(200, 16, 32, generator=generator), torch.randn(200, 32, generator=generator)
    layer = spec(*source, width=16, ratio=2.0)
    proxy = closed_form_block([blocks[i] for i in source], x[:150], conditioning[:150], layer)
    copied = truncated_block(blocks[source[0]], layer)
    for made in (proxy, copied):
        assert made.norm1.eps == 0.1 and made.norm2.eps == 0.2
    assert torch.equal(copied.attn.position_bias.table, blocks[1].attn.position_bias.table)
    target = x[150:]
    with torch.no_grad():
        for i in source:
            target = blocks[i](target, conditioning[150:])
        closed, plain = (feature_loss(b(x[150:], conditioning[150:]), target, x[150:]).item() for b in (proxy, copied))
        if len(source) == 1:
            assert torch.equal(proxy.attn.position_bias.table, blocks[1].attn.position_bias.table)
        proxy.attn.position_bias.table.zero_()
        without = feature_loss(proxy(x[150:], conditioning[150:]), target, x[150:]).item()
    assert closed < (0.5 if len(source) == 1 else 0.9) * plain and closed < without


@pytest.mark.parametrize("option", ["original", "both"])
def test_even_a_teacher_of_pure_chance_is_fitted_given_enough_features(make_transformer, option):
    model = make_transformer(seed=3)  # every weight random: gates far above one, softmaxes that pick one token
    layers, conditioning = features_of(model, 0, 256)
    proxy = closed_form_block([model.blocks[2], model.blocks[3]], layers[2], conditioning, SPACE.layer((2, 3), option))
    unseen = features_of(model, 1, 64)
    assert loss_of(proxy, unseen, 2, 3) < 0.6


def test_a_proxy_of_the_teachers_own_size_is_the_teachers_layer(teacher, features):
    layers, conditioning = features(0)
    proxy = closed_form_block([teacher.blocks[2]], layers[2], conditioning, spec(2))
    assert loss_of(proxy, features(1), 2, 2) < 1e-9
    copied = truncated_block(teacher.blocks[2], spec(2)).state_dict()
    assert all(torch.equal(tensor, copied[name]) for name, tensor in teacher.blocks[2].state_dict().items())


def test_what_can_be_left_out_is_left_out_without_loss(teacher, features):
    """A layer that in truth is as small as its proxy is found again: heads of half the rank, some neurons copies of
    others.
    """
    source = copy.deepcopy(teacher.blocks[1])
    with torch.no_grad():
        for index in range(3):  # the second half of every head's channels of q, k and v repeats the first
            weight = source.attn.to_qkv.weight.view(3, 2, 16, 32)[index]
            bias = source.attn.to_qkv.bias.view(3, 2, 16)[index]
            weight[:, 8:], bias[:, 8:] = weight[:, :8], bias[:, :8]
        source.mlp.proj_in.weight[120:] = source.mlp.proj_in.weight[:8]
        source.mlp.proj_in.bias[120:] = source.mlp.proj_in.bias[:8]
    layers, conditioning = features(0)
    proxy = closed_form_block([source], layers[1], conditioning, spec(1, width=16, ratio=3.75))
    unseen, conditioning = features(1)
    with torch.no_grad():
        target = source(unseen[1], conditioning)
        assert feature_loss(proxy(unseen[1], conditioning), target, unseen[1]) < 1e-5
        assert (
            feature_loss(
                truncated_block(source, spec(1, width=16, ratio=3.75))(unseen[1], conditioning), target, unseen[1]
            )
            > 0.01
        )


def test_the_sources_are_not_changed(teacher, features):
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    layers, conditioning = features(0)
    closed_form_block([teacher.blocks[0], teacher.blocks[1]], layers[0], conditioning, spec(0, 1, width=16, ratio=2.0))
    truncated_block(teacher.blocks[0], spec(0, width=16, ratio=2.0))
    combine_blocks(teacher.blocks[0], teacher.blocks[1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_a_proxy_wider_than_its_teacher_is_refused(teacher, features):
    layers, conditioning = features(0)
    with pytest.raises(EdgeDiTError, match="cannot be wider than its teacher: attention 64 of 32"):
        closed_form_block([teacher.blocks[0]], layers[0], conditioning, spec(0, width=64))
    with pytest.raises(EdgeDiTError, match="MLP 256 of 128"):
        closed_form_block([teacher.blocks[0]], layers[0], conditioning, spec(0, ratio=8.0))


def test_truncation_keeps_the_first_channels_of_every_head_and_the_first_neurons(teacher):
    source, proxy = teacher.blocks[1], truncated_block(teacher.blocks[1], spec(1, width=16, ratio=2.0))
    old, new = source.attn.to_qkv.weight.view(3, 2, 16, 32), proxy.attn.to_qkv.weight.view(3, 2, 8, 32)
    assert torch.equal(new, old[:, :, :8])
    assert torch.equal(proxy.attn.to_qkv.bias.view(3, 2, 8), source.attn.to_qkv.bias.view(3, 2, 16)[:, :, :8])
    assert torch.equal(proxy.attn.to_out.weight.view(32, 2, 8), source.attn.to_out.weight.view(32, 2, 16)[:, :, :8])
    assert torch.equal(proxy.mlp.proj_in.weight, source.mlp.proj_in.weight[:64])
    assert torch.equal(proxy.mlp.proj_out.weight, source.mlp.proj_out.weight[:, :64])
    assert torch.equal(proxy.modulation.weight, source.modulation.weight)


@torch.no_grad()
def test_a_combined_block_attends_as_one_and_thinks_as_the_other(teacher, features):
    layers, conditioning = features(1)
    x = layers[1]
    attention_from, mlp_from = truncated_block(teacher.blocks[1], spec(1, width=16)), copy.deepcopy(teacher.blocks[2])
    combined = combine_blocks(attention_from, mlp_from)
    assert combined.attn.to_out.in_features == 16 and combined.mlp.proj_in.out_features == 128

    def without(block, part: int) -> EdgeDiTBlock:
        """The block with the gate of its attention (2) or of its MLP (5) closed."""
        closed = copy.deepcopy(block)
        closed.modulation.weight[part * 32 : (part + 1) * 32] = 0
        closed.modulation.bias[part * 32 : (part + 1) * 32] = 0
        return closed

    after_attention = without(attention_from, 5)(x, conditioning)
    assert torch.equal(without(combined, 5)(x, conditioning), after_attention)
    assert torch.equal(combined(x, conditioning), without(mlp_from, 2)(after_attention, conditioning))
