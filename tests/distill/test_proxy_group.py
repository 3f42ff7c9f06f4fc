"""Proxies that train together: features of the teacher's prefix, steps, starts, checkpoints, precision and memory."""

import copy
import sys

import pytest
import torch

from edgedit_hf import SearchSpace
from edgedit_hf.distill.feature_loss import feature_loss
from edgedit_hf.distill.proxy_group import (
    Proxy,
    ProxyGroup,
    held_out_losses,
    new_optimizer,
    peak_memory,
    random_block,
    reset_peak_memory,
    start_blocks,
    teacher_features,
    train_step,
)
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.run.checkpoint import load_state, save_state

LAYERS = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(make_transformer):
    return make_transformer().requires_grad_(False)


@pytest.fixture(scope="module")
def wide_teacher(make_transformer):
    """Wide enough for 8-bit optimiser states: bitsandbytes leaves tensors below 4096 elements as they are."""
    return make_transformer(hidden_size=64, num_layers=2).requires_grad_(False)


def batch(seed: int = 0, count: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.linspace(5, 990, count), torch.arange(count)


def make_proxies(teacher, optimizer: str = "adamw", learning_rate: float = 1e-3) -> list[Proxy]:
    proxies = []
    for number, layer in enumerate(SearchSpace.for_config(teacher.config, reduced_attention_dim=8).proxies()):
        block = random_block(teacher.new_block(layer.to_dict()), 0, str(number))
        proxies.append(Proxy(layer, block, new_optimizer(optimizer, block.parameters(), learning_rate)))
    return proxies


# -------------------------------------------------------------------- features


def test_features_are_what_goes_into_and_comes_out_of_each_layer(teacher):
    seen = []
    hooks = [
        block.register_forward_hook(lambda module, given, made: seen.append((given[0], made)))
        for block in teacher.blocks
    ]
    with torch.no_grad():
        teacher(*batch())
    for hook in hooks:
        hook.remove()
    features = teacher_features(teacher, *batch(), depth=LAYERS)
    for i, (given, made) in enumerate(seen):
        assert torch.equal(features.inputs[i], given) and torch.equal(features.outputs[i], made)
    merged = SearchSpace.for_config(teacher.config, reduced_attention_dim=8).layer((2, 3), "mlp")
    assert torch.equal(features.of(merged)[0], seen[2][0]) and torch.equal(features.of(merged)[1], seen[3][1])


def test_nothing_above_the_prefix_runs(teacher):
    calls = [0] * LAYERS
    hooks = [
        b.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        for i, b in enumerate(teacher.blocks)
    ]
    features = teacher_features(teacher, *batch(), depth=2)
    for hook in hooks:
        hook.remove()
    assert calls == [1, 1, 0, 0] and sorted(features.outputs) == [0, 1]
    shorter = copy.deepcopy(teacher)
    shorter.blocks = shorter.blocks[:2]  # as a rank of the first layers holds it
    assert torch.equal(teacher_features(shorter, *batch(), depth=2).outputs[1], features.outputs[1])


def test_long_skips_are_part_of_the_features(make_transformer):
    teacher = make_transformer(long_skips=[[0, 3]]).requires_grad_(False)
    features = teacher_features(teacher, *batch(), depth=LAYERS)
    joined = teacher.skips["3"](torch.cat([features.outputs[2], features.outputs[0]], dim=-1))
    assert torch.equal(features.inputs[3], joined) and not torch.equal(features.inputs[3], features.outputs[2])


def test_a_teacher_in_bf16_gives_nearly_the_same_features_in_fp32(teacher):
    exact = teacher_features(teacher, *batch(), depth=LAYERS)
    half = teacher_features(copy.deepcopy(teacher).to(torch.bfloat16), *batch(), depth=LAYERS, precision="bf16")
    assert {t.dtype for t in (*half.inputs.values(), *half.outputs.values(), half.conditioning)} == {torch.float32}
    for i in range(LAYERS):
        loss = feature_loss(exact.inputs[i] + half.outputs[i] - half.inputs[i], exact.outputs[i], exact.inputs[i])
        assert loss < 2e-3, f"layer {i}"


# -------------------------------------------------------------------- steps


def test_a_step_of_all_is_a_step_of_each_alone(teacher):
    together, alone = make_proxies(teacher), make_proxies(teacher)
    features = [teacher_features(teacher, *batch(seed), depth=LAYERS) for seed in range(3)]
    for f in features:
        mean = train_step(together, f, "normalised")
    assert all(parameter.grad is None for proxy in together for parameter in proxy.block.parameters())
    last = []
    for proxy in alone:
        plain = torch.optim.AdamW(proxy.block.parameters(), lr=1e-3, weight_decay=0.0, foreach=False)
        for f in features:
            x, target = f.of(proxy.layer)
            loss = feature_loss(proxy.block(x, f.conditioning), target, x)
            plain.zero_grad()
            loss.backward()
            plain.step()
        last.append(loss.item())
    assert mean.item() == pytest.approx(sum(last) / len(last), rel=1e-5)
    for one, other in zip(together, alone):
        for a, b in zip(one.block.parameters(), other.block.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # three steps move a weight by up to 3e-3


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_reduces_the_held_out_loss_and_keeps_weights_in_fp32(wide_teacher, optimizer, precision):
    teacher = copy.deepcopy(wide_teacher).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    proxies = make_proxies(teacher, optimizer)
    blocks = {str(i): (proxy.layer, proxy.block) for i, proxy in enumerate(proxies)}
    test = [teacher_features(teacher, *batch(100 + i), depth=2, precision=precision) for i in range(2)]
    before = held_out_losses(blocks, test, precision)
    for step in range(30):
        train_step(
            proxies, teacher_features(teacher, *batch(step), depth=2, precision=precision), "normalised", precision
        )
    after = held_out_losses(blocks, test, precision)
    assert all(after[key] < before[key] for key in blocks) and sum(after.values()) < 0.8 * sum(before.values())
    assert {p.dtype for proxy in proxies for p in proxy.block.parameters()} == {torch.float32}
    weight = proxies[0].block.mlp.proj_in.weight
    states = {
        tensor.dtype
        for tensor in proxies[0].optimizer.state[weight].values()
        if torch.is_tensor(tensor) and tensor.shape == weight.shape
    }
    assert states == {torch.uint8 if optimizer == "adamw8bit" else torch.float32}


def test_held_out_losses_are_means_over_batches(teacher):
    proxies = make_proxies(teacher)[:3]
    features = [teacher_features(teacher, *batch(i), depth=LAYERS) for i in range(2)]
    found = held_out_losses({str(i): (p.layer, p.block) for i, p in enumerate(proxies)}, iter(features))
    for i, proxy in enumerate(proxies):
        with torch.no_grad():
            each = [
                feature_loss(proxy.block(f.of(proxy.layer)[0], f.conditioning), *reversed(f.of(proxy.layer))).item()
                for f in features
            ]
        assert found[str(i)] == pytest.approx(sum(each) / 2, rel=1e-6)


def test_without_bitsandbytes_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(
        EdgeDiTError,
        match="'adamw8bit', but bitsandbytes does not work here .*pip install bitsandbytes.* or set bank.optimizer to "
        "adamw",
    ):
        new_optimizer("adamw8bit", torch.nn.Linear(4, 4).parameters(), 1e-3)


# -------------------------------------------------------------------- starts


def test_a_random_start_depends_on_seed_and_key_alone(teacher):
    layer = make_proxies(teacher)[0].layer

    def weights(seed, key):
        torch.rand(3)  # a rank or group that makes others first has drawn from the global generator
        return torch.cat(
            [p.detach().flatten() for p in random_block(teacher.new_block(layer.to_dict()), seed, key).parameters()]
        )

    one = weights(0, "00/mlp")
    assert torch.equal(one, weights(0, "00/mlp"))
    assert not torch.equal(one, weights(1, "00/mlp")) and not torch.equal(one, weights(0, "01/mlp"))


def test_starts_rank_as_they_should_and_the_fit_is_made_only_when_asked_for(teacher):
    space = SearchSpace.for_config(teacher.config, reduced_attention_dim=8)
    layer, features = space.layer((1,), "mlp"), teacher_features(teacher, *batch(count=10), depth=2)
    given = features.inputs[1], features.conditioning
    for init, names in (
        ("closed_form", ["random", "copied", "closed_form"]),
        ("copy", ["random", "copied"]),
        ("random", ["random", "copied"]),
    ):
        losses = {
            name: held_out_losses({name: (layer, block)}, [features])[name]
            for name, block in start_blocks(teacher, layer, given, 0, "k", init)
        }
        assert list(losses) == names
        if init == "closed_form":
            assert losses["closed_form"] < losses["copied"] and losses["closed_form"] < losses["random"]


# -------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_group_goes_on_from_its_checkpoint_to_the_same_bytes(wide_teacher, tmp_path, optimizer):
    def new_proxy(layer, block):
        block = wide_teacher.new_block(layer.to_dict()) if block is None else block
        return Proxy(layer, block, new_optimizer(optimizer, block.parameters(), 1e-3))

    def train(group, steps):
        for step in steps:
            train_step(
                group.proxies.values(), teacher_features(wide_teacher, *batch(step), depth=group.depth), "normalised"
            )

    group = ProxyGroup(new_proxy)
    group.proxies = {str(i): proxy for i, proxy in enumerate(make_proxies(wide_teacher, optimizer)[:4])}
    group.proxies["0"].curve.append([0, 0.5])
    group.starts, group.written, group.peaks = {"0": {"random": 1.0}}, {"x": {"file": "x.safetensors"}}, {0: 17}
    train(group, range(3))
    save_state(tmp_path, group.state_dict())
    resumed = ProxyGroup(new_proxy)
    resumed.load_state_dict(load_state(tmp_path))
    assert (resumed.starts, resumed.written, resumed.peaks) == (group.starts, group.written, group.peaks)
    assert resumed.proxies["0"].curve == [[0, 0.5]] and resumed.depth == group.depth
    train(group, range(3, 6))
    train(resumed, range(3, 6))
    for key, proxy in group.proxies.items():
        other = resumed.proxies[key]
        assert other.layer == proxy.layer
        assert all(torch.equal(a, b) for a, b in zip(proxy.block.parameters(), other.block.parameters()))


# -------------------------------------------------------------------- memory


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the peak of a resident set can be reset on Linux alone"
)
def test_the_peak_counts_what_was_held_for_a_moment_since_the_reset():
    tensor = torch.ones(64_000_000)  # 256 MB
    del tensor
    reset_peak_memory(CPU)
    start = peak_memory(CPU)
    tensor = torch.ones(32_000_000)  # 128 MB
    del tensor
    assert 100e6 < peak_memory(CPU) - start < 160e6
    reset_peak_memory(CPU)
    assert peak_memory(CPU) - start < 30e6


@pytest.mark.parametrize("damage", ["nan", "overflow"])
def test_a_teacher_that_gives_nothing_to_learn_from_is_one_error_that_names_the_layer(make_transformer, damage):
    teacher = make_transformer().requires_grad_(False)
    teacher.blocks[2].attn.to_out.weight[0, 0] = float("nan") if damage == "nan" else 3e38
    layers = [
        layer
        for layer in SearchSpace.for_config(teacher.config, reduced_attention_dim=8).proxies()
        if layer.source == (2,)
    ]
    features = teacher_features(teacher, *batch(count=8), depth=4)
    for layer in layers:
        x, _ = features.of(layer)
        starts = start_blocks(teacher, layer, (x, features.conditioning), 0, "02/mlp", "closed_form")
        with pytest.raises(EdgeDiTError, match=r"'02/mlp'.*layers \[2\]"):
            for _, start in starts:
                held_out_losses({"02/mlp": (layer, start)}, [features])


def test_a_closed_form_that_cannot_be_solved_names_its_layer(make_transformer):
    teacher = make_transformer().requires_grad_(False)
    layer = SearchSpace.for_config(teacher.config, reduced_attention_dim=8).layer((1,), "both")
    features = teacher_features(teacher, *batch(count=8), depth=4)
    teacher.blocks[1].attn.to_qkv.weight[0, 0] = float("nan")
    with pytest.raises(EdgeDiTError, match=r"'01/both'.*closed form.*layers \[1\]"):
        list(start_blocks(teacher, layer, (features.of(layer)[0], features.conditioning), 0, "01/both", "closed_form"))
