"""Even grids and NF4: what they can represent, what rounding costs, and torchao's and bitsandbytes' results on the same
weights.
"""

import pytest
import torch

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.quantization.affine import grid, quantize_affine
from edgedit_hf.quantization.packing import unpack
from edgedit_hf.quantization.quantize import quantize_nf4, quantize_weight
from edgedit_hf.quantization.weights import NF4_CODES, from_tensors, spec_bits


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(24, 100, generator=torch.Generator().manual_seed(0)) * 0.05


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [0, 20, 32])
def test_every_weight_is_within_half_a_step(weight, bits, group_size, symmetric):
    quantized = quantize_affine(weight, bits, group_size, symmetric)
    scale, _ = grid(weight, bits, group_size, symmetric)
    step = scale.float().repeat_interleave(group_size or 100, dim=1)[:, :100]
    # Half a step, and what rounding the scale and the zero point may cut off at the ends.
    assert ((quantized.dequantize() - weight).abs() <= step * (0.501 if symmetric else 1.001)).all()
    assert quantized.num_bits == spec_bits(quantized.spec(), weight.shape)
    again = from_tensors(quantized.spec(), quantized.tensors())
    assert torch.equal(again.dequantize(), quantized.dequantize())


def test_zero_is_exact_and_constant_groups_survive():
    weight = torch.tensor([[0.0, 0.3, 0.9, 0.5], [0.0, 0.0, 0.0, 0.0], [-0.25, -0.25, -0.25, -0.25]])
    for symmetric in (True, False):
        found = quantize_affine(weight, 4, 0, symmetric).dequantize()
        assert (found[weight == 0] == 0).all()
        assert torch.allclose(found[2], weight[2], rtol=1e-3)


def test_grid_points_come_back_exactly():
    levels = torch.arange(16).float() - 8
    weight = levels.repeat(3, 2) * torch.tensor([[0.5], [0.25], [2.0]])
    assert torch.equal(quantize_affine(weight, 4, 16, True).dequantize(), weight)


def test_int8_is_as_good_as_that_of_torchao(weight):
    torchao = pytest.importorskip("torchao.quantization")
    linear = torch.nn.Linear(100, 24, bias=False)
    linear.weight.data.copy_(weight)
    torchao.quantize_(linear, torchao.Int8WeightOnlyConfig())  # symmetric, a scale an output row
    ours, theirs = (
        float((found - weight).norm())
        for found in (quantize_affine(weight, 8, 0, True).dequantize(), linear.weight.dequantize())
    )
    assert 0.9 * theirs < ours < 1.02 * theirs


@pytest.mark.parametrize("shape", [(24, 128), (7, 33), (4, 3, 2, 2)])
def test_nf4_is_that_of_bitsandbytes(shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours = quantize_nf4(weight)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(state.code, torch.tensor(NF4_CODES))
    # bitsandbytes puts the first value into the high bits of a byte.
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[: weight.numel()]
    assert torch.equal(unpack(ours.values, 4, weight.numel()), codes)
    assert torch.allclose(ours.absmax.float(), state.absmax, rtol=1e-3)
    state.absmax = ours.absmax.float()  # theirs has the whole float32
    assert torch.equal(functional.dequantize_4bit(packed, state), ours.dequantize())


def test_nf4_of_zeros_is_zero():
    assert torch.equal(quantize_nf4(torch.zeros(3, 50)).dequantize(), torch.zeros(3, 50))


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"scheme": "int4"}, "scheme 'int4'; the schemes are palette, affine, nf4"),
        ({"scheme": "affine", "bits": 3}, "bits 3; it must be one of 2, 4, 8"),
        ({"scheme": "palette", "bits": 5}, "bits 5; it must be one of 1, 2, 4, 8"),
        ({"scheme": "affine", "group_size": -1}, "group_size -1; it must be an integer of at least 0"),
        ({"scheme": "nf4", "block": 0}, "block 0; it must be an integer of at least 1"),
        ({"scheme": "affine", "symmetric": 1}, "symmetric 1; it must be true or false"),
        ({"scheme": "nf4", "bits": 4}, "'bits'; 'nf4' takes block"),
        ({"scheme": "palette", "shape": [3, 4]}, r"shape \(3, 4\), but the layer's is \(24, 100\)"),
    ],
)
def test_a_bad_spec_is_one_clear_error(weight, spec, message):
    with pytest.raises(EdgeDiTError, match=message):
        quantize_weight(weight, spec)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_weights_that_float16_cannot_hold(weight, value):
    bad = weight.clone()
    bad[3, 4] = value
    with pytest.raises(EdgeDiTError, match="must be finite and below 65504"):
        quantize_weight(bad, {"scheme": "palette"})


def test_importance_is_for_palettes(weight):
    with pytest.raises(EdgeDiTError, match="'affine'; only palettes"):
        quantize_weight(weight, {"scheme": "affine"}, importance=torch.ones(100))
    importance = torch.ones(100)
    importance[:10] = 1e4
    plain, weighted = (
        quantize_weight(weight, {"scheme": "palette", "bits": 2}, importance=i).dequantize() for i in (None, importance)
    )
    assert (importance * (weighted - weight) ** 2).sum() < 0.9 * (importance * (plain - weight) ** 2).sum()
