"""Which layers of a 4-bit export get 8 bits: what is simulated is what a runtime stores, and the layer that hurts comes
first.
"""

import numpy as np
import pytest
import torch
from torch import nn

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.mixed import choose_8bit, nearest_form, quantized_linears, xnnpack_weights
from edgedit_hf.export.onnx.lower import lower_onnx
from edgedit_hf.export.parts import Part
from edgedit_hf.quantization.affine import quantize_affine
from edgedit_hf.runtimes.sessions import open_session


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    return nn.Linear(64, 48, bias=False).eval().requires_grad_(False)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_simulated_weight_is_the_one_in_the_file(layer, bits, tmp_path):
    part = Part("transformer", "denoiser", nn.Sequential(layer), {"x": torch.eye(64)}, ("y",))
    said = lower_onnx(part, tmp_path / "a.onnx", "int4", {}, keep_8bit=["0"] if bits == 8 else [])
    assert said["linear_layers"] == {f"{bits} bit": 1}
    stored = torch.from_numpy(
        open_session(tmp_path / "a.onnx", 1).run(part.inputs)[0].T
    )  # of the identity: the matrix itself
    simulated = nearest_form({})("0", layer, bits)
    assert torch.allclose(stored, simulated, atol=1e-2 * simulated.abs().max().item())
    step = layer.weight.unflatten(1, (-1, 32)).abs().amax(-1) / (2 ** (bits - 1) - 1)  # of the nearest grid, at most
    assert ((simulated - layer.weight).abs().unflatten(1, (-1, 32)).amax(-1) <= 1.01 * step).all()


def test_given_weights_are_taken_in_4_bits_only(layer):
    given = quantize_affine(-layer.weight, 4, 32, symmetric=True)
    for form in (nearest_form({"a": given}), xnnpack_weights({"a": given})):
        assert torch.allclose(torch.as_tensor(form("a", layer, 4).dequantize()), given.dequantize(), rtol=1e-2)
        eight = form("a", layer, 8)
        eight = eight.dequantize() if type(eight) is not torch.Tensor else eight
        assert (eight - layer.weight).abs().max() < 0.02 * layer.weight.abs().max()


def test_xnnpack_has_no_4_bits_for_odd_widths():
    torch.manual_seed(0)
    layer = nn.Linear(48, 16, bias=False).requires_grad_(False)  # 48 inputs are no multiple of its groups of 32
    error = (xnnpack_weights({})("a", layer, 4).dequantize() - layer.weight).abs().amax(1)
    assert (error <= 0.51 * layer.weight.abs().amax(1) / 127).all()


def test_the_layer_that_4_bits_ruin_gets_8(make_transformer):
    """One layer's groups hold a large value each, for an input that is always 0: beside it 4 bits lose all others."""
    model = make_transformer(num_layers=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.25)
        mlp = model.blocks[1].mlp
        mlp.proj_in.weight[::32], mlp.proj_in.bias[::32] = 0.0, -100.0  # GELU makes 0 of it
        mlp.proj_out.weight[:, ::32] = 1.0
    pipeline = EdgeDiTPipeline(model, make_scheduler("epsilon"), default_steps=2)
    layers = quantized_linears(model)
    assert not any(name.startswith("side_blocks") for name in layers)
    assert min(layer.weight.numel() for layer in layers.values()) >= 1024
    form = nearest_form({})
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def quality(kept):
        copy = make_transformer(num_layers=2)
        copy.load_state_dict(model.state_dict())
        for name in layers:
            weight = form(name, model.get_submodule(name), 8 if name in kept else 4)
            copy.get_submodule(name).weight = nn.Parameter(weight)
        pipe = EdgeDiTPipeline(copy, pipeline.scheduler, default_steps=2)
        return images(pipe)

    def images(pipe):
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        return pipe([0, 1], generator=generators, output_type="np").images

    def decibels(found):
        return -10 * np.log10(((found - images(pipeline)) ** 2).mean())

    alone = {name: decibels(quality({name})) for name in layers}
    best = max(alone, key=alone.get)
    assert best == "blocks.1.mlp.proj_out" and alone[best] > decibels(quality(set())) + 1
    goal = alone[best] - 0.1
    chosen = set(choose_8bit(pipeline, form, goal, images=2))
    assert best in chosen and len(chosen) < len(layers) and decibels(quality(chosen)) >= goal
    assert decibels(quality(chosen - {best})) < goal
    assert choose_8bit(pipeline, form, decibels(quality(set())) - 0.1, images=2) == []
    with pytest.raises(EdgeDiTError, match="with 8 bits in every layer; 150.0 dB were asked"):
        choose_8bit(pipeline, form, 150.0, images=2)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
