"""Layers with quantised weights: they compute what the unpacked weights compute, keep their packed tensors, and can be
undone.
"""

import copy
import io
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from stored_bytes import stored_bytes
from torch import nn

from edgedit_hf import ElasticDiTTransformer2DModel
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.quantization.gptq import quantize_compensated
from edgedit_hf.quantization.layers import (
    dequantize_layer,
    dequantize_model,
    get_quantized_weight,
    quantizable_layers,
    quantized_weights,
    set_empty_weight,
    set_quantized_weight,
    weight_shape,
)
from edgedit_hf.quantization.packing import packed_size
from edgedit_hf.quantization.quantize import quantize_weight
from edgedit_hf.quantization.quantizer import quantize_model
from edgedit_hf.quantization.weights import from_tensors, layout, spec_bits

SPECS = [
    {"scheme": "palette", "bits": 1, "rows_per_palette": 0},
    {"scheme": "palette", "bits": 2, "rows_per_palette": 1},
    {"scheme": "palette", "bits": 4, "rows_per_palette": 16},
    {"scheme": "palette", "bits": 8, "rows_per_palette": 5},
    {"scheme": "affine", "bits": 4, "group_size": 32, "symmetric": True},
    {"scheme": "affine", "bits": 4, "group_size": 10, "symmetric": False},
    {"scheme": "affine", "bits": 8, "group_size": 0, "symmetric": True},
    {"scheme": "nf4", "block": 64},
]
LAYERS = {
    "linear": lambda: nn.Linear(33, 24),
    "without a bias": lambda: nn.Linear(16, 7, bias=False),
    "convolution": lambda: nn.Conv2d(3, 10, 2, stride=2),
}
INPUTS = {"linear": (5, 33), "without a bias": (5, 16), "convolution": (2, 3, 8, 8)}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name]()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_layer_computes_with_its_unpacked_weight(name, spec):
    layer, plain = make(name), make(name)
    quantized = quantize_weight(layer.weight, spec)
    assert {n: (tuple(t.shape), t.dtype) for n, t in quantized.tensors().items()} == layout(spec, quantized.shape)
    assert quantized.num_bits == spec_bits(spec, quantized.shape)
    set_quantized_weight(layer, quantized)
    plain.weight.data.copy_(quantized.dequantize())
    inputs = torch.randn(INPUTS[name])
    assert torch.equal(layer(inputs), plain(inputs))
    assert isinstance(layer, type(plain)) and layer.weight.shape == plain.weight.shape == weight_shape(layer)
    assert not any("weight" == n for n, _ in layer.named_parameters())
    again = from_tensors(quantized.spec(), get_quantized_weight(layer).tensors())
    assert torch.equal(again.dequantize(), plain.weight)
    stored = {n: t.dtype for n, t in layer.state_dict().items() if n != "bias"}
    assert stored == {f"weight_{n}": t.dtype for n, t in quantized.tensors().items()}


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_nearest_entry_of_the_palette_is_chosen(bits):
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    quantized = quantize_weight(weight, {"scheme": "palette", "bits": bits, "rows_per_palette": 8})
    assert quantized.indices.shape == (20, packed_size(30, bits)) and quantized.palette.shape == (3, 1 << bits)
    found = quantized.dequantize()
    for row in range(20):
        palette = quantized.palette[row // 8].float()
        nearest = palette[(weight[row][:, None] - palette).abs().argmin(dim=1)]
        assert torch.allclose((found[row] - weight[row]).abs(), (nearest - weight[row]).abs(), atol=1e-6)


def test_more_bits_are_better():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = [
        float((quantize_weight(weight, {"scheme": "palette", "bits": b}).dequantize() - weight).norm() / weight.norm())
        for b in (1, 2, 4, 8)
    ]
    # Lloyd-Max quantisers of a normal distribution: 0.3634, 0.1175, 0.009497 (Max, 1960), and 2.7e-5·… ≈ √3π/2 · 4^-8
    # for 8 bits.
    assert errors[:3] == pytest.approx([0.3634**0.5, 0.1175**0.5, 0.009497**0.5], rel=0.02)
    assert errors[3] < (2.73 * 4**-8) ** 0.5


def test_palettes_beat_even_grids_and_nf4_at_equal_bytes():
    weight = torch.randn(128, 512, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 2, 128)[:, None]
    found = {}
    for spec in (
        {"scheme": "palette", "rows_per_palette": 1},
        {"scheme": "affine", "group_size": 32},
        {"scheme": "nf4", "block": 32},
    ):
        quantized = quantize_weight(weight, spec)
        found[spec["scheme"]] = (
            quantized.num_bits / weight.numel(),
            float((quantized.dequantize() - weight).norm() / weight.norm()),
        )
    assert [bits for bits, _ in found.values()] == [4.5, 4.5, 4.5]
    assert found["palette"][1] < min(found["affine"][1], found["nf4"][1])


def test_casts_change_what_is_unpacked_and_not_what_is_stored():
    layer = make("linear")
    set_quantized_weight(layer, quantize_weight(layer.weight, {"scheme": "palette"}))
    before, exact = {n: t.clone() for n, t in layer.named_buffers()}, layer.weight
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16 and torch.equal(layer.weight, exact.bfloat16())
    layer(torch.randn(2, 33, dtype=torch.bfloat16))
    layer.double().float()
    assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in layer.named_buffers())
    assert torch.equal(layer.weight, exact)
    layer.to("meta")
    assert all(t.is_meta and t.dtype == before[n].dtype for n, t in layer.named_buffers()) and layer.weight.is_meta


def test_a_copy_is_a_layer_of_its_own():
    layer = make("linear")
    set_quantized_weight(layer, quantize_weight(layer.weight, {"scheme": "affine"}))
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.weight, layer.weight)
    dequantize_layer(twin)
    assert get_quantized_weight(twin) is None and get_quantized_weight(layer) is not None


def test_gradients_reach_the_inputs_and_the_bias():
    layer = make("linear")
    set_quantized_weight(layer, quantize_weight(layer.weight, {"scheme": "palette"}))
    inputs = torch.randn(4, 33, requires_grad=True)
    layer(inputs).sum().backward()
    assert torch.allclose(inputs.grad, layer.weight.sum(dim=0).expand(4, -1), atol=1e-6)
    assert torch.equal(layer.bias.grad, torch.full((24,), 4.0)) and not layer.weight.requires_grad


def test_dequantising_puts_plain_layers_back(make_transformer):
    model, plain = make_transformer(), make_transformer()
    names = list(plain.state_dict())
    quantize_model(model, {name: SPECS[i % len(SPECS)] for i, name in enumerate(quantizable_layers(model))})
    weights = {name: weight.dequantize() for name, weight in quantized_weights(model).items()}
    assert set(weights) == set(quantizable_layers(plain)) and "label_embedder" not in weights
    dequantize_model(model, torch.float32)
    assert quantized_weights(model) == {} and "quantization_config" not in model.config
    assert list(model.state_dict()) == names
    assert {type(module) for module in model.modules()} == {type(module) for module in plain.modules()}
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight) and model.get_submodule(name).weight.requires_grad


def test_the_size_of_a_model_is_known_before_it_exists(make_transformer):
    plan = {name: SPECS[i % len(SPECS)] for i, name in enumerate(quantizable_layers(make_transformer()))}
    with torch.device("meta"):
        size = stored_bytes(type(make_transformer()).from_preset("DiT-debug/2"), plan)
    model = make_transformer()
    quantize_model(model, plan)
    assert size == sum(t.numel() * t.element_size() for t in model.state_dict().values())


@pytest.fixture(scope="module")
def supernets():
    """A supernet with random weights, and the same quantised."""
    torch.manual_seed(0)
    plain = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug").eval()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.2)
    quantized = copy.deepcopy(plain)
    plan = {name: {"scheme": "palette", "bits": 8, "rows_per_palette": 4} for name in quantizable_layers(plain)}
    quantize_model(quantized, plan)
    unpacked = copy.deepcopy(quantized)
    dequantize_model(unpacked)
    return plain, quantized, unpacked


INPUT = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([5.0, 500.0])
TEXT = [torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2)), None]


@pytest.mark.parametrize("subnet", ["tiny", "small", "full"])
@torch.no_grad()
def test_every_width_of_a_quantised_supernet(supernets, subnet):
    plain, quantized, unpacked = supernets
    for net in supernets:
        net.set_active_subnet(subnet)
    outputs = [net(*INPUT, TEXT).sample for net in supernets]
    assert torch.equal(outputs[1], outputs[2])
    assert (outputs[1] - outputs[0]).norm() < 0.1 * outputs[0].norm()
    alone = quantized.extract_subnet(subnet)
    assert not quantized_weights(alone) and "quantization_config" not in alone.config
    assert all(parameter.requires_grad for parameter in alone.parameters())
    assert torch.allclose(alone(*INPUT, TEXT).sample, outputs[1], atol=1e-5)


def test_bad_plans_leave_the_model_as_it_was(make_transformer):
    model = make_transformer()
    good = {"scheme": "affine", "bits": 8}
    with pytest.raises(EdgeDiTError, match="'blocks.9.mlp', which is no linear"):
        quantize_model(model, {"proj_out": good, "blocks.9.mlp": good})
    with pytest.raises(EdgeDiTError, match="'label_embedder', which is no linear"):
        quantize_model(model, {"proj_out": good, "label_embedder": good})
    with pytest.raises(EdgeDiTError, match="bits 7"):
        quantize_model(model, {"proj_out": good, "modulation_out": {"scheme": "affine", "bits": 7}})
    model.modulation_out.weight.data[0, 0] = float("nan")
    with pytest.raises(EdgeDiTError, match="The weight of modulation_out has a value of size nan"):
        quantize_model(model, {"proj_out": good, "modulation_out": good})
    assert quantized_weights(model) == {}
    quantize_model(model, {"proj_out": good})
    with pytest.raises(EdgeDiTError, match="'proj_out' is quantised already"):
        quantize_model(model, {"proj_out": good})
    with pytest.raises(EdgeDiTError, match="quantised already"):
        set_quantized_weight(model.proj_out, get_quantized_weight(model.proj_out))
    with pytest.raises(EdgeDiTError, match="A Embedding cannot be quantised"):
        set_quantized_weight(model.label_embedder, get_quantized_weight(model.proj_out))
    with pytest.raises(EdgeDiTError, match="shape"):
        set_quantized_weight(model.modulation_out, get_quantized_weight(model.proj_out))
    tensors = {name: tensor[..., :1] for name, tensor in get_quantized_weight(model.proj_out).tensors().items()}
    with pytest.raises(EdgeDiTError, match="its spec .* needs"):
        from_tensors(model.proj_out.weight_spec, tensors)


def test_adapters_are_neither_quantised_nor_merged_into_packed_weights(make_transformer, tmp_path):
    from peft import LoraConfig

    model = make_transformer()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_qkv"]), "style")
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(EdgeDiTError, match="'_orig_mod.*is compiled.*quantise the model"):
        quantize_model(compiled, {name: {"scheme": "nf4"} for name in quantizable_layers(compiled)})
    with pytest.raises(EdgeDiTError, match="PEFT adapter; merge it"):
        quantize_model(model, {"proj_out": {"scheme": "affine"}})
    model.unload_lora()
    quantize_model(model, {"blocks.0.attn.to_qkv": {"scheme": "affine"}})
    inputs = torch.randn(1, 1, 8, 8), torch.tensor([3.0]), torch.tensor([1])
    before = model(*inputs).sample
    model.add_adapter(LoraConfig(r=2, target_modules=["to_qkv"], init_lora_weights=False), "style")
    assert not torch.allclose(model(*inputs).sample, before)  # an adapter works beside a packed weight
    with pytest.raises(ValueError, match="quantised, so adapters cannot be merged"):
        model.fuse_lora()
    with pytest.raises(ValueError, match="wrapped for the adapters"):
        model.save_pretrained(tmp_path)
    model.unload_lora()
    assert torch.equal(model(*inputs).sample, before)


# ---------------------------------------------------------------- other processes, copies, claims


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_quantised_layer_can_be_pickled_copied_and_saved_whole(name, spec):
    layer, inputs = make(name), torch.randn(INPUTS[name])
    set_quantized_weight(layer, quantize_weight(layer.weight, spec))
    expected = layer(inputs)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert type(again) is type(layer) and again.weight_spec == layer.weight_spec
        assert torch.equal(again(inputs), expected) and again.weight_packed.data_ptr() != layer.weight_packed.data_ptr()
        dequantize_layer(again)
        assert type(again) is type(make(name)) and torch.equal(again(inputs), expected)
        again.half()
    assert torch.equal(layer(inputs), expected)


@pytest.mark.slow
def test_a_quantised_net_goes_to_a_spawned_process(make_transformer):
    model = make_transformer()
    quantize_model(model, {name: SPECS[index % len(SPECS)] for index, name in enumerate(quantizable_layers(model))})
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([5.0, 500.0]), torch.tensor([1, 2])
    with torch.no_grad():
        expected = model(*inputs).sample
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool, torch.no_grad():
        assert torch.equal(pool.submit(quantized_output, model.requires_grad_(False), inputs).result(), expected)


def quantized_output(model, inputs):
    with torch.no_grad():
        return model(*inputs).sample


def test_a_quantised_elastic_net_can_be_pickled():
    torch.manual_seed(0)
    model = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug").eval()
    quantize_model(model, {name: {"scheme": "nf4"} for name in quantizable_layers(model)})
    again = pickle.loads(pickle.dumps(model))
    text = [torch.randn(1, 3, 16), None]
    inputs = torch.randn(1, 1, 8, 8), torch.tensor([500.0])
    with torch.no_grad():
        assert torch.equal(
            again(*inputs, encoder_hidden_states=text).sample, model(*inputs, encoder_hidden_states=text).sample
        )


@pytest.mark.parametrize("huge", [10**9, 20_000_000_000, 2**64])
@pytest.mark.parametrize("name", LAYERS)
def test_groups_larger_than_the_weight_are_one_group_and_cost_nothing(name, huge):
    weight = make(name).weight.detach()
    rows, columns = weight.flatten(1).shape
    pairs = [
        ({"scheme": "nf4", "block": huge}, {"scheme": "nf4", "block": weight.numel()}),
        (
            {"scheme": "affine", "bits": 4, "group_size": huge, "symmetric": False},
            {"scheme": "affine", "bits": 4, "group_size": 0, "symmetric": False},
        ),
        ({"scheme": "affine", "bits": 8, "group_size": huge}, {"scheme": "affine", "bits": 8, "group_size": columns}),
        (
            {"scheme": "palette", "bits": 4, "rows_per_palette": huge},
            {"scheme": "palette", "bits": 4, "rows_per_palette": 0},
        ),
    ]
    for spec, same in pairs:
        found, expected = quantize_weight(weight, spec), quantize_weight(weight, same)
        assert found.num_bits == expected.num_bits == spec_bits(spec, tuple(weight.shape))
        assert torch.equal(found.dequantize(), expected.dequantize())
        compensated = quantize_compensated(
            weight, spec, torch.eye(columns, dtype=torch.float64)[None] if spec["scheme"] != "nf4" else None
        )
        assert torch.equal(
            compensated.dequantize(),
            quantize_compensated(weight, same, torch.eye(columns, dtype=torch.float64)[None]).dequantize(),
        )


@pytest.mark.parametrize(
    "spec, said",
    [
        ("nf4", "must be a dict"),
        ({"scheme": ["nf4"]}, "the schemes are"),
        ({"scheme": "nf4", "block": 0}, "block 0"),
        ({"scheme": "nf4", "block": 64.0}, "block 64.0"),
        ({"scheme": "nf4", "block": True}, "block True"),
        ({"scheme": "palette", "bits": True}, "bits True"),
        ({"scheme": "affine", "bits": 4.0}, "bits 4.0"),
        ({"scheme": "affine", "group_size": -1}, "group_size -1"),
        ({"scheme": "affine", "group_size": None}, "group_size None"),
        ({"scheme": "nf4", "shape": 3}, "the shape 3"),
        ({"scheme": "nf4", "shape": [3, -1]}, r"the shape \[3, -1\]"),
        ({"scheme": "nf4", "shape": "33"}, "the shape '33'"),
        ({"scheme": "nf4", "shape": [10**9, 10**9]}, "is for a weight of shape"),
    ],
    ids=str,
)
def test_specs_that_make_no_sense_are_one_clear_error(spec, said):
    layer = nn.Linear(3, 3)
    with pytest.raises(EdgeDiTError, match=said):
        set_empty_weight(layer, spec)
    assert type(layer) is nn.Linear
