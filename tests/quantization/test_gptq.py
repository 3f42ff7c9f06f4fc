"""Error-compensating rounding: nothing to gain on independent inputs, less output error on correlated ones, and the
same grids.
"""

import pytest
import torch

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.quantization.affine import quantize_affine
from edgedit_hf.quantization.gptq import compensated_rounding, gptq, gptq_palette
from edgedit_hf.quantization.kmeans import kmeans_1d


@pytest.fixture(scope="module")
def case():
    """A weight (48, 96), correlated inputs (1000, 96), and their moments."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 96, generator=generator)
    inputs = torch.randn(1000, 12, generator=generator) @ mixing + 0.3 * torch.randn(1000, 96, generator=generator)
    return 0.1 * torch.randn(48, 96, generator=generator), inputs, (inputs.T @ inputs / len(inputs))[None]


def output_loss(quantized, weight, inputs) -> float:
    return float((inputs @ (quantized.dequantize() - weight).flatten(1).T).pow(2).mean())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 40, 0])
def test_correlated_inputs_lose_far_less_than_by_rounding_to_the_nearest(case, group_size, symmetric):
    weight, inputs, moments = case
    nearest, compensated = (
        quantize_affine(weight, 4, group_size, symmetric),
        gptq(weight, moments, 4, group_size, symmetric),
    )
    assert output_loss(compensated, weight, inputs) < 0.2 * output_loss(nearest, weight, inputs)
    # The same grids: only the integers differ, so every runtime that takes the one takes the other.
    assert (
        torch.equal(compensated.scale, nearest.scale)
        and compensated.spec() == nearest.spec()
        and compensated.num_bits == nearest.num_bits
    )
    if not symmetric:
        assert torch.equal(compensated.zero_point, nearest.zero_point)


@pytest.mark.parametrize("symmetric", [True, False])
def test_on_a_diagonal_hessian_it_is_rounding_to_the_nearest(case, symmetric):
    weight, _, _ = case
    diagonal = torch.diag_embed(torch.rand(1, 96, generator=torch.Generator().manual_seed(1)))
    diagonal[0, 5, 5] = 0  # an input that is always zero
    for group_size in (32, 0):
        assert torch.equal(
            gptq(weight, diagonal, 4, group_size, symmetric).values,
            quantize_affine(weight, 4, group_size, symmetric).values,
        )


def test_it_is_near_the_best_rounding_there_is():
    """Against all 2^8 roundings up or down of a small weight."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(200, 3, generator=generator) @ torch.randn(3, 8, generator=generator) + 0.1 * torch.randn(
        200, 8, generator=generator
    )
    moments = (inputs.T @ inputs / 200)[None]
    losses = []
    for _ in range(5):
        weight = torch.rand(1, 1, 8, generator=generator)
        down = (weight / 0.25).floor()
        corners = down + torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8)[None].transpose(0, 1)  # [256, 1, 8]
        changes = (corners * 0.25 - weight)[:, 0]
        best = torch.einsum("ci,ij,cj->c", changes, moments[0], changes).min()

        def loss(value: torch.Tensor, weight: torch.Tensor = weight) -> torch.Tensor:
            change = (value - weight)[0, 0]
            return change @ moments[0] @ change

        compensated = loss(compensated_rounding(weight, moments, lambda values, _: (values / 0.25).round() * 0.25))
        losses.append([float(best), float(compensated), float(loss((weight / 0.25).round() * 0.25))])
    best, compensated, nearest = torch.tensor(losses).mean(0)
    assert compensated < 0.5 * nearest and compensated < 4 * best


@pytest.mark.parametrize("rows", [0, 16, 20])
def test_palettes_gain_too_and_hold_no_more_entries(case, rows):
    weight, inputs, moments = case
    compensated = gptq_palette(weight, moments, 4, rows)
    size = rows or 48
    parts = weight.split(size)
    plain = torch.cat(
        [
            centres[0][index[0].long()].view(part.shape)
            for part in parts
            for centres, index in [kmeans_1d(part.reshape(1, -1), 16)]
        ]
    )
    loss = float((inputs @ (plain - weight).T).pow(2).mean())
    assert output_loss(compensated, weight, inputs) < 0.2 * loss
    restored = compensated.dequantize()
    for part, palette in zip(restored.split(size), compensated.palette):
        assert set(part.unique().tolist()) <= set(palette.float().tolist())


def test_groups_of_a_convolution_have_their_own_moments():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 1, 2, 2, generator=generator)
    inputs = torch.randn(10, 300, 1, generator=generator) + 0.2 * torch.randn(10, 300, 4, generator=generator)
    moments = inputs.transpose(1, 2) @ inputs / 300
    losses = []
    for quantized in (
        quantize_affine(weight, 4, 0, True),
        gptq(weight, moments, 4, 0, True),
        gptq_palette(weight, moments, 4, 5),
    ):
        change = (quantized.dequantize() - weight).reshape(10, 4, 1)
        losses.append(float((inputs @ change).pow(2).mean()))
    assert losses[1] < 0.5 * losses[0] and losses[2] < losses[0]


def test_blocks_of_inputs_do_not_show(case):
    """More inputs than are worked off at a time, against the textbook recursion without blocks."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(400, 40, generator=generator) @ torch.randn(40, 150, generator=generator) + torch.randn(
        400, 150, generator=generator
    )
    moments = inputs.T @ inputs / 400
    weight = torch.randn(2, 150, generator=generator)
    found = compensated_rounding(weight[None], moments[None], lambda values, _: values.round(), damping=0.05)[0]
    order = moments.diagonal().argsort(descending=True, stable=True)
    hessian = (moments.double() + 0.05 * moments.diagonal().double().mean() * torch.eye(150))[order][:, order]
    left, expected = weight.double()[:, order].clone(), torch.zeros(2, 150, dtype=torch.float64)
    for index in range(150):
        inverse = torch.linalg.inv(hessian[index:, index:])
        expected[:, index] = left[:, index].round()
        left[:, index:] -= torch.outer(left[:, index] - expected[:, index], inverse[0] / inverse[0, 0])
    assert (
        found[:, order].double() == expected
    ).double().mean() > 0.97  # a value near the middle of two may round the other way


def test_bad_moments_are_refused(case):
    weight, _, moments = case
    with pytest.raises(EdgeDiTError, match=r"\(1, 48, 96\) and the moments \(1, 95, 95\)"):
        gptq(weight, moments[:, 1:, 1:], 4)
    with pytest.raises(EdgeDiTError, match="not finite"):
        gptq(weight, torch.full_like(moments, float("nan")), 4)
