"""Adapters of one base: where they are, which one runs, whose gradients flow, what is left when one is fused."""

import contextlib
import copy

import pytest
import torch
from kinds import MIXED

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.few_step.adapters import active_adapter, adapter_parameters, add_adapters, fuse_adapter
from edgedit_hf.models.transformer_elastic_dit import ElasticDiTTransformer2DModel
from edgedit_hf.pipelines.pipeline_edgedit import EdgeDiTPipeline

BOTH = ["student", "critic"]


def randomise(tensors, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))


@pytest.fixture(params=["edgedit", "every kind of layer", "elastic"])
def model(request, make_transformer):
    if request.param == "edgedit":
        return make_transformer(num_layers=2)
    if request.param == "every kind of layer":
        return make_transformer(layers=MIXED)
    net = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug").eval()
    randomise(net.parameters(), 0)
    return net


def adapted(model, filled: bool = True):
    """The model with the two adapters, and other weights than zero in their B."""
    add_adapters(model, BOTH, rank=3, alpha=6, seed=5)
    if filled:
        for seed, name in enumerate(BOTH):
            randomise([value for key, value in adapter_parameters(model, name) if ".lora_B." in key], seed + 1)
    return model


def call(model, width: str | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([10.0, 700.0])
    if isinstance(model, ElasticDiTTransformer2DModel):
        text = [torch.randn(2, 3, dim, generator=generator) for dim in model.config.text_dims]
        return model(x, t, text, subnet=width).sample
    return model(x, t, torch.tensor([3, 10])).sample


@torch.no_grad()
def output(model, width: str | None = None) -> torch.Tensor:
    return call(model, width)


def widths(model) -> list[str | None]:
    return getattr(model, "subnet_names", [None])


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def merged_by_hand(model, plain, name: str):
    """`plain`, to whose weights the adapter's changes are added."""
    factors = dict(adapter_parameters(model, name))
    with torch.no_grad():
        for key in [key for key in factors if ".lora_A." in key]:
            down, up = factors[key], factors[key.replace("lora_A", "lora_B")]
            weight = plain.get_submodule(key.partition(".lora_A")[0]).weight
            weight += (6 / 3) * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    return plain


# -------------------------------------------------------------------- adding


def test_every_layer_has_adapters_that_change_nothing_yet(model):
    plain = copy.deepcopy(model)
    adapted(model, filled=False)
    layers = [key for key, layer in plain.named_modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))]
    layers = [key for key in layers if "compress" not in key]  # depthwise
    for name in BOTH:
        parameters = adapter_parameters(model, name)
        expected = [f"{key}.{part}.{name}.weight" for key in layers for part in ("lora_A", "lora_B")]
        assert [key for key, _ in parameters] == expected and len(expected) > 20
        assert all(dict(model.named_parameters())[key] is value for key, value in parameters)
        assert all(value.dtype == torch.float32 and value.requires_grad for _, value in parameters)
        assert all(value.any() == (".lora_A." in key) for key, value in parameters)
        with active_adapter(model, name):
            assert all(torch.equal(output(model, width), output(plain, width)) for width in widths(model))
    trainable = {key for key, value in model.named_parameters() if value.requires_grad}
    assert trainable == {key for name in BOTH for key, _ in adapter_parameters(model, name)}


def test_what_is_drawn_follows_from_the_seed_and_the_name(make_transformer):
    def drawn(seed, names, name):
        model = make_transformer(num_layers=1).to(torch.bfloat16)
        add_adapters(model, names, rank=4, alpha=4, seed=seed)
        return [value for key, value in adapter_parameters(model, name) if ".lora_A." in key]

    first = drawn(5, BOTH, "student")
    assert all(value.dtype == torch.float32 for value in first)  # on a base in bf16
    for again in (drawn(5, BOTH, "student"), drawn(5, BOTH[::-1], "student"), drawn(5, ["student"], "student")):
        assert all(map(torch.equal, first, again))
    for other in (drawn(6, BOTH, "student"), drawn(5, BOTH, "critic")):
        assert not any(map(torch.equal, first, other))
    for value in first:
        bound = value[0].numel() ** -0.5
        assert 0.8 * bound < value.abs().max() <= bound and value.mean().abs() < 0.35 * bound


# -------------------------------------------------------------------- running


def test_one_adapter_or_none_runs_at_every_width(model):
    plain = copy.deepcopy(model)
    adapted(model)
    changed = {name: merged_by_hand(model, copy.deepcopy(plain), name) for name in BOTH}
    trainable = [value.requires_grad for value in model.parameters()]
    for width in widths(model):
        base = output(plain, width)
        assert torch.equal(output(model, width), base)  # outside of a context there is none
        for name in BOTH:
            with active_adapter(model, name):
                assert_near(output(model, width), output(changed[name], width))
                assert (output(model, width) - base).norm() > 0.1 * base.norm()
                with active_adapter(model, None):
                    assert torch.equal(output(model, width), base)
                with contextlib.suppress(ZeroDivisionError), active_adapter(torch.nn.Sequential(model), BOTH[0]):
                    assert_near(output(model, width), output(changed[BOTH[0]], width))
                    raise ZeroDivisionError
                assert_near(output(model, width), output(changed[name], width))
                assert [value.requires_grad for value in model.parameters()] == trainable
    assert torch.equal(output(model), output(plain))


@pytest.mark.parametrize("nested", [False, True])
def test_checkpointed_forwards_keep_their_adapter_in_the_backward_pass(model, nested):
    adapted(model).train()
    width = widths(model)[0]

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        with active_adapter(model, "critic") if nested else contextlib.nullcontext():
            with active_adapter(model, "student"):
                sample = call(model, width)
        with active_adapter(model, "critic"):
            other = call(model, width)
        (sample.square().sum() + 0.0 * other.detach().sum()).backward()
        return {key: value.grad for key, value in model.named_parameters() if value.grad is not None}

    expected = gradients()
    model.enable_gradient_checkpointing()
    checkpoint = model._gradient_checkpointing_func
    found = gradients()
    assert model._gradient_checkpointing_func is checkpoint
    student = {key for key, _ in adapter_parameters(model, "student")}
    assert found.keys() == expected.keys() <= student and len(found) > 20
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# -------------------------------------------------------------------- fusing


def test_a_fused_adapter_is_a_plain_network_of_its_own(model, tmp_path):
    plain = copy.deepcopy(model)
    adapted(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = fuse_adapter(copy.deepcopy(model), "student")
    assert type(fused) is type(plain) and list(fused.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in fused.modules()] == [type(module) for module in plain.modules()]
    assert all(value.requires_grad for value in fused.parameters())
    fused.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for width in widths(model):
        with active_adapter(model, "student"):
            expected = output(model, width)
        assert_near(output(loaded, width), expected)
        if width is not None:
            assert_near(output(fused.extract_subnet(width)), expected)
            assert_near(output(type(model).from_pretrained(tmp_path, subnet=width)), expected)
        assert torch.equal(output(model, width), output(plain, width))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_precomputed_modulations_have_the_adapter_too(make_transformer):
    from diffusers import DDIMScheduler

    model = adapted(make_transformer(num_layers=2))
    times, labels = torch.tensor([900.0, 100.0]), torch.tensor([1, 10])
    with active_adapter(model, "student"):
        table = model.precompute_modulation(times, labels)
        images = EdgeDiTPipeline(model, DDIMScheduler())(
            [1, 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt"
        ).images
    plain = model.precompute_modulation(times, labels)
    assert fuse_adapter(model, "student") is model
    assert_near(table, model.precompute_modulation(times, labels))
    assert (table - plain).norm() > 0.1 * table.norm()
    alone = EdgeDiTPipeline(model, DDIMScheduler())(
        [1, 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt"
    )
    torch.testing.assert_close(images, alone.images, rtol=1e-3, atol=1e-3)


# -------------------------------------------------------------------- bad input


def test_adapters_that_are_not_there_or_in_the_way_are_explained(make_transformer):
    model = make_transformer(num_layers=1)
    with active_adapter(model, None):
        assert output(model).isfinite().all()
    for use in (adapter_parameters, fuse_adapter, lambda *given: active_adapter(*given).__enter__()):
        with pytest.raises(EdgeDiTError, match="no adapter 'student'; the model has none"):
            use(model, "student")
    adapted(model)
    with pytest.raises(EdgeDiTError, match="no adapter 'teacher'; the model has critic, student"):
        fuse_adapter(model, "teacher")
    with pytest.raises(EdgeDiTError, match=r"\['critic', 'student'\] already"):
        add_adapters(model, ["third"], rank=1, alpha=1, seed=0)
    model.fuse_lora(adapter_names=["critic"])
    with pytest.raises(EdgeDiTError, match=r"\['critic'\] are merged.*unfuse_lora"):
        with active_adapter(model, "student"):
            pass
