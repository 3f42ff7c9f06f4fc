"""Closed-form starts against plain truncation."""

import copy

import pytest
import torch
from kinds import CHANGES, layer_of
from sklearn.datasets import load_digits

from edgedit_hf import EdgeDiTTransformer2DModel, SearchSpace
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.distill.closed_form import (
    closed_form_block,
    combine_blocks,
    join_heads,
    truncated_block,
)
from edgedit_hf.distill.feature_loss import feature_loss
from edgedit_hf.distill.least_squares import refit_gated
from edgedit_hf.distill.proxy_group import random_block
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.genotype import LayerSpec
from edgedit_hf.models.transformer_edgedit import EdgeDiTBlock
from edgedit_hf.search_space import OPTIONS

SPACE = SearchSpace(4, 32, 2)


def spec(*source: int, width: int = 32, ratio: float = 4.0, heads: int = 2, rank=None, merge: int = 1) -> LayerSpec:
    return LayerSpec(source, width, heads, ratio, rank, merge)


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


def test_a_proxy_is_made_from_a_teachers_whole_layer_of_its_rank_at_most(teacher, features):
    layers, conditioning = features(0)
    with pytest.raises(EdgeDiTError, match="modulation_rank 33 cannot be above the teacher's width 32"):
        closed_form_block([teacher.blocks[0]], layers[0], conditioning, spec(0, rank=33))
    for change, said in ({"rank": 0}, "StaticModulation"), ({"merge": 2}, "merges 2 × 2 tokens"):
        made = truncated_block(teacher.blocks[0], spec(0, **change))
        with pytest.raises(EdgeDiTError, match=said):
            closed_form_block([made], layers[0], conditioning, spec(0))


# -------------------------------------------------------------------- every kind of layer


@pytest.fixture(scope="module")
def trained():
    """A small teacher that has learned to denoise the digits, and `features(seed)` of it on them."""
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    labels, scheduler = torch.tensor(load_digits().target), make_scheduler("epsilon")
    torch.manual_seed(0)
    model = EdgeDiTTransformer2DModel.from_preset("DiT-debug/2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)

    def batch(seed: int, count: int):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(0, len(images), (count,), generator=generator)
        t = torch.randint(0, 1000, (count,), generator=generator)
        noise = torch.randn(count, 1, 8, 8, generator=generator)
        return scheduler.add_noise(images[chosen], noise, t), t.float(), labels[chosen], noise

    for step in range(300):
        *given, noise = batch(step + 10, 64)
        (model(*given).sample - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().requires_grad_(False)

    def features(seed: int):
        tokens, conditioning = model.embed(*batch(seed, 256)[:3])
        inputs, outputs = model.layer_features(tokens, conditioning)
        return [*inputs, outputs[-1]], conditioning

    return model, features


@pytest.mark.parametrize("source", [(1,), (1, 2), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_every_kind_of_start_beats_copied_and_random_weights(trained, change, source):
    model, features = trained
    layer = LayerSpec.from_dict(layer_of(source, change))
    layers, conditioning = features(0)
    proxy = closed_form_block([model.blocks[i] for i in source], layers[source[0]], conditioning, layer)
    fresh = model.new_block(layer.to_dict())
    assert {k: v.shape for k, v in proxy.state_dict().items()} == {k: v.shape for k, v in fresh.state_dict().items()}
    assert proxy.attn.heads == layer.num_heads and proxy.token_merge == layer.token_merge
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in proxy.state_dict().values())
    unseen = features(1)
    closed = loss_of(proxy, unseen, source[0], source[-1])
    copied = min(loss_of(truncated_block(model.blocks[i], layer), unseen, source[0], source[-1]) for i in source)
    chance = loss_of(random_block(fresh, 0, change), unseen, source[0], source[-1])
    assert closed < 0.9 * copied and closed < 0.9 * chance


@pytest.mark.parametrize(
    "cost, groups",
    [
        ([[0, 9, 1, 9], [9, 0, 9, 1], [1, 9, 0, 9], [9, 1, 9, 0]], [(0, 2), (1, 3)]),
        # The cheapest pair first would leave the dearest.
        ([[0, 1, 2, 9], [1, 0, 9, 2], [2, 9, 0, 50], [9, 2, 50, 0]], [(0, 2), (1, 3)]),
        ([[0, 9, 9], [9, 0, 1], [9, 1, 0]], [(0,), (1, 2)]),
    ],
)
def test_heads_that_are_alike_are_joined(cost, groups):
    assert join_heads(torch.tensor(cost, dtype=torch.float64), len(groups)) == groups


def test_joined_groups_are_near_the_best_of_all_pairings():
    def total(pairs, cost):
        return sum(float(cost[i, j]) for i, j in pairs)

    def pairings(left):
        if not left:
            yield []
        for other in left[1:]:
            for rest in pairings([i for i in left[1:] if i != other]):
                yield [(left[0], other), *rest]

    for seed in range(10):
        cost = random(8, 8, seed=seed).abs()
        cost = cost + cost.mT
        every = sorted(total(pairs, cost) for pairs in pairings(list(range(8))))
        groups = join_heads(cost, 4)
        assert sorted(len(group) for group in groups) == [2] * 4
        assert total(groups, cost) <= every[len(every) // 20]  # of 105


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_loss(source, features, layer: LayerSpec) -> tuple[float, float]:
    """Losses on unseen features of the closed form and of the truncated block of one changed layer."""
    layers, conditioning = features(0, 128)
    proxy, copied = closed_form_block([source], layers[1], conditioning, layer), truncated_block(source, layer)
    layers, conditioning = features(1)
    with torch.no_grad():
        target = source(layers[1], conditioning)
        return tuple(feature_loss(b(layers[1], conditioning), target, layers[1]).item() for b in (proxy, copied))


def test_heads_that_attend_alike_become_one_without_loss(teacher, features):
    source = copy.deepcopy(teacher.blocks[1])
    source.attn.heads = 4
    with torch.no_grad():  # heads 0 and 2 look at the same tokens, and 1 and 3
        weight, bias = source.attn.to_qkv.weight.view(3, 4, 8, 32), source.attn.to_qkv.bias.view(3, 4, 8)
        weight[:2, 2:], bias[:2, 2:] = weight[:2, :2].clone(), bias[:2, :2].clone()
    closed, copied = exact_loss(source, features, spec(1, heads=2))
    assert closed < 1e-5 < 1e-4 < copied


def test_heads_of_low_rank_become_several_without_loss(teacher, features):
    source = copy.deepcopy(teacher.blocks[1])
    with torch.no_grad():  # queries and keys of rank 8 in heads of width 16, their directions mixed
        weight, bias = source.attn.to_qkv.weight.view(3, 2, 16, 32), source.attn.to_qkv.bias.view(3, 2, 16)
        mix = torch.linalg.qr(random(16, 16).float()).Q
        weight[:2, :, 8:], bias[:2, :, 8:] = 0, 0
        weight[:2], bias[:2] = mix @ weight[:2], bias[:2] @ mix.mT
    closed, copied = exact_loss(source, features, spec(1, heads=4))
    assert closed < 1e-5 < 1e-4 < copied


def test_heads_without_an_output_are_the_ones_that_go(teacher, features):
    source = copy.deepcopy(teacher.blocks[1])
    source.attn.heads = 4
    with torch.no_grad():
        source.attn.to_out.weight.view(32, 4, 8)[:, :2] = 0
    closed, copied = exact_loss(source, features, spec(1, width=16, heads=2))
    assert closed < 1e-5 < 1e-4 < copied


@pytest.mark.parametrize("rank", [0, 2])
def test_a_modulation_of_low_rank_is_found_again(teacher, features, rank):
    source = copy.deepcopy(teacher.blocks[1])
    with torch.no_grad():
        source.modulation.weight.copy_(0.05 * (random(192, 32)[:, :rank] @ random(rank, 32, seed=1)).float())
    closed, _ = exact_loss(source, features, spec(1, rank=rank))
    assert closed < 1e-5


@torch.no_grad()
def test_tokens_that_are_the_same_are_merged_without_loss(teacher):
    """Four copies of a key weigh in a softmax as one does among groups of four."""
    source, generator = teacher.blocks[1], torch.Generator().manual_seed(0)
    few, conditioning = torch.randn(300, 4, 32, generator=generator), torch.randn(300, 32, generator=generator)
    x = few.view(300, 2, 2, 32).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    proxy = closed_form_block([source], x[:250], conditioning[:250], spec(1, merge=2))
    target = source(x[250:], conditioning[250:])
    assert feature_loss(proxy(x[250:], conditioning[250:]), target, x[250:]) < 1e-5


@pytest.mark.parametrize("change", ["fewer, wider heads", "more, narrower heads", "all at once"])
def test_a_position_bias_follows_its_heads(change):
    torch.manual_seed(0)
    source = EdgeDiTBlock(32, 32, 2, 4.0, bias_grid=4)
    with torch.no_grad():
        source.attn.position_bias.table.normal_()
        source.modulation.weight.normal_(std=0.1)
        source.modulation.bias.normal_(std=0.3)
    generator = torch.Generator().manual_seed(1)
    x, conditioning = torch.randn(300, 16, 32, generator=generator), torch.randn(300, 32, generator=generator)
    layer = LayerSpec.from_dict(layer_of((0,), change))
    proxy, copied = closed_form_block([source], x[:250], conditioning[:250], layer), truncated_block(source, layer)
    fresh = EdgeDiTBlock(32, *layer.shape, bias_grid=4)
    with torch.no_grad():
        target = source(x[250:], conditioning[250:])
        losses = [feature_loss(b(x[250:], conditioning[250:]), target, x[250:]).item() for b in (proxy, copied)]
    if layer.token_merge == 1:  # means of noise say nothing
        assert losses[0] < losses[1]
    for made in (proxy, copied):
        assert made.attn.position_bias.table.shape == fresh.attn.position_bias.table.shape
        assert torch.equal(made.attn.position_bias.index, fresh.attn.position_bias.index)
    if change == "more, narrower heads":
        table = source.attn.position_bias.table
        assert torch.equal(proxy.attn.position_bias.table, table[:, [0, 0, 1, 1]])
        assert torch.equal(copied.attn.position_bias.table, table[:, [0, 0, 1, 1]])


def test_truncation_of_every_kind(teacher):
    source = teacher.blocks[1]
    wide, narrow = truncated_block(source, spec(1, heads=1)), truncated_block(source, spec(1, heads=4))
    for made in (wide, narrow):  # the same channels, in other heads
        assert torch.equal(made.attn.to_qkv.weight, source.attn.to_qkv.weight)
    one = truncated_block(source, spec(1, width=16, heads=1))
    assert torch.equal(one.attn.to_qkv.weight.view(3, 16, 32), source.attn.to_qkv.weight.view(3, 2, 16, 32)[:, 0])
    static, low = truncated_block(source, spec(1, rank=0)), truncated_block(source, spec(1, rank=3))
    assert torch.equal(static.modulation.bias, source.modulation.bias)
    assert torch.equal(low.modulation.up.bias, source.modulation.bias)
    values = torch.linalg.svdvals(source.modulation.weight)
    error = (source.modulation.weight - low.modulation.up.weight @ low.modulation.down.weight).square().sum()
    assert error.item() == pytest.approx(values[3:].square().sum().item(), rel=1e-3)
    assert truncated_block(source, spec(1, merge=2)).token_merge == 2


@torch.no_grad()
def test_static_blocks_are_combined_and_others_are_not(teacher, features):
    layers, conditioning = features(1)
    one, other = (truncated_block(teacher.blocks[i], spec(i, rank=0)) for i in (1, 2))
    combined = combine_blocks(one, other)
    assert torch.equal(combined.modulation.bias[:96], one.modulation.bias[:96])
    assert torch.equal(combined.modulation.bias[96:], other.modulation.bias[96:])
    low = truncated_block(teacher.blocks[1], spec(1, rank=2))
    for pair in (
        (one, teacher.blocks[1]),
        (low, low),
        (one, truncated_block(teacher.blocks[1], spec(1, rank=0, merge=2))),
    ):
        with pytest.raises(EdgeDiTError, match="cannot be combined; both modulations must be whole or static"):
            combine_blocks(*pair)


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
