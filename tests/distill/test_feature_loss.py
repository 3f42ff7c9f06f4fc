"""The feature losses: what they measure, what they ignore, and where their gradient points."""

import pytest
import torch

from edgedit_hf.distill.feature_loss import CLIP_SIGMA, MASSIVE_SIGMA, feature_loss, ordinary_updates, rate_scale
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.models.transformer_edgedit import EdgeDiTBlock


def features(seed: int = 0):
    """Input of a layer and the teacher's output, `(4, 16, 32)`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 16, 32, generator=generator)
    return x, x + 0.3 * torch.randn(x.shape, generator=generator)


@pytest.mark.parametrize("kind", ["normalised", "plain"])
def test_zero_for_the_teachers_own_output_and_only_then(kind):
    x, target = features()
    assert feature_loss(target, target, x, kind) == 0
    assert feature_loss(target + 1e-3, target, x, kind) > 0


def test_plain_is_the_mean_squared_error():
    x, target = features()
    output = torch.randn(target.shape)
    torch.testing.assert_close(feature_loss(output, target, x, "plain"), torch.nn.functional.mse_loss(output, target))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_normalised_is_one_for_a_layer_left_out_at_any_scale(scale):
    x, target = (scale * tensor for tensor in features())
    assert feature_loss(x, target, x).item() == pytest.approx(1.0)
    assert feature_loss(x + 0.5 * (target - x), target, x).item() == pytest.approx(0.25)


def test_normalised_ignores_massive_updates():
    x, target = features()
    output = target + 0.1 * torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    before = feature_loss(output, target, x)
    massive = target.clone()
    massive[0, 3, 7] += 1000.0
    assert not ordinary_updates(x, massive)[0, 3, 7] and ordinary_updates(x, massive).sum() == massive.numel() - 1
    # Whatever the proxy says there, and however large it is in the teacher, the rest is judged alike.
    assert feature_loss(output, massive, x).item() == pytest.approx(before.item(), rel=0.01)
    output[0, 3, 7] = -5000.0
    assert feature_loss(output, massive, x).item() == pytest.approx(before.item(), rel=0.01)
    assert feature_loss(output, massive, x, "plain") > 1000 * feature_loss(target + 0.1, target, x, "plain")


def test_the_mask_is_that_many_standard_deviations_of_the_update():
    x, target = features()
    target[0, 0, :8] += 2.0  # a heavy tail, beyond five deviations
    update = target - x
    rest = update[(update - update.mean()).abs() <= CLIP_SIGMA * update.std(correction=0)]
    assert rest.numel() == update.numel() - 8
    for sigmas in (2.0, 5.0, 10.0):
        assert torch.equal(
            ordinary_updates(x, target, sigmas), (update - rest.mean()).abs() <= sigmas * rest.std(correction=0)
        )
    assert (
        not ordinary_updates(x, target, 5.0).all() and ordinary_updates(x, target, MASSIVE_SIGMA).all()
    )  # a tail is not massive


def test_huge_outliers_do_not_hide_large_ones():
    x, target = features()
    target[0, 0, 0] += 5000.0
    target[1, 2, 3] += 40.0  # below five deviations of all, a hundred of the ordinary ones
    mask = ordinary_updates(x, target)
    assert not mask[0, 0, 0] and not mask[1, 2, 3] and mask.sum() == mask.numel() - 2


def test_a_massive_residual_stream_counts_unless_its_rounding_drowns_the_update():
    x, target = features()
    exact = feature_loss(x + 0.9 * (target - x), target, x).item()
    update = target - x
    x[:, 5, 9] += 3000.0
    target = x + update
    assert ordinary_updates(x, target).all()  # in single precision the update is there to be learnt
    assert feature_loss(x + 0.9 * update, target, x).item() == pytest.approx(exact, rel=0.01)
    # bfloat16 numbers near 3,000 lie 16 apart: the proxy's rounding would be all of the loss.
    half = [tensor.bfloat16() for tensor in (x + 0.9 * update, target, x)]
    assert feature_loss(*half).item() == pytest.approx(exact, rel=0.2)
    rounded = (half[0].float() - half[1].float()).square().mean() / (half[1].float() - half[2].float()).square().mean()
    unresolved = ~ordinary_updates(half[2], half[1], eps=torch.finfo(torch.bfloat16).eps)
    assert unresolved.sum() == 4 and unresolved[:, 5, 9].all() and rounded > 2 * exact


def massive_layer():
    """A layer whose MLP has a few massive activations, as large DiTs have: one channel, a few tokens, hundreds of times
    the rest.
    """
    torch.manual_seed(0)
    layer = EdgeDiTBlock(32, 32, 2, 4.0).requires_grad_(False)
    layer.modulation.weight.normal_(std=0.02)
    layer.modulation.bias.normal_(std=0.3)
    layer.modulation.bias[-32:] = 1.0  # the MLP's gate
    layer.mlp.proj_in.weight[0] *= 20
    layer.mlp.proj_in.bias[0] = -20.0  # a neuron that few tokens reach …
    layer.mlp.proj_out.weight[:, 0] = 0
    layer.mlp.proj_out.weight[5, 0] = 30.0  # … and that one channel hears of
    return layer


def test_massive_activations_own_plain_training_and_leave_masked_training_alone():
    layer = massive_layer()
    starts = torch.Generator().manual_seed(1)
    x, conditioning = torch.randn(24, 16, 32, generator=starts), torch.randn(24, 32, generator=starts)
    target = layer(x, conditioning)
    ordinary = ordinary_updates(x, target)
    update = target - x
    massive = ~ordinary
    assert 0 < massive.sum() < 0.01 * massive.numel() and (massive.nonzero()[:, 2] == 5).all()
    assert update[massive].abs().median() > 100 * update[ordinary].abs().mean()

    def ordinary_error(block) -> float:
        return ((block(x, conditioning) - target)[ordinary].square().sum() / update[ordinary].square().sum()).item()

    found = {}
    for kind in ("plain", "normalised"):
        torch.manual_seed(2)
        proxy = EdgeDiTBlock(32, 32, 2, 2.0)
        before = ordinary_error(proxy)
        optimizer = torch.optim.AdamW(proxy.parameters(), lr=3e-3, weight_decay=0.0)
        worst = 0.0
        for step in range(250):
            rows = torch.randperm(24, generator=torch.Generator().manual_seed(step))[:8]
            feature_loss(proxy(x[rows], conditioning[rows]), target[rows], x[rows], kind).backward()
            optimizer.step()
            optimizer.zero_grad()
            worst = max(worst, ordinary_error(proxy)) if step % 10 == 9 else worst
        found[kind] = before, worst, ordinary_error(proxy)
    before, worst, after = found["plain"]
    assert worst > 5 * before and after > 1  # thrown about, and in the end worse than leaving the layer out
    before, worst, after = found["normalised"]
    assert worst < before and after < 0.25


@pytest.mark.parametrize(("start", "scale"), [(2.0, 1.0), (0.1, 1.0), (0.025, 0.5), (1e-3, 0.1), (0.0, 0.0)])
def test_the_rate_falls_with_the_root_of_the_start(start, scale):
    assert rate_scale(start) == pytest.approx(scale)


def test_the_gradient_moves_towards_the_teacher():
    x, target = features()
    output = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(feature_loss(output, target, x), output)
    assert torch.nn.functional.cosine_similarity(-gradient.flatten(), (target - x).flatten(), dim=0) > 0.999


def test_half_precision_features_are_judged_in_single_precision():
    x, target = features()
    loss = feature_loss(x.bfloat16(), target.bfloat16(), x.bfloat16())
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(1.0)


def test_shapes_and_names_that_do_not_fit_are_refused():
    x, target = features()
    with pytest.raises(EdgeDiTError, match=r"output \(4, 15, 32\), target \(4, 16, 32\)"):
        feature_loss(target[:, 1:], target, x)
    with pytest.raises(EdgeDiTError, match=r"input \(1, 16, 32\)"):
        feature_loss(target, target, x[:1])
    with pytest.raises(EdgeDiTError, match="feature loss is 'cosine'; it must be 'normalised' or 'plain'"):
        feature_loss(target, target, x, "cosine")
