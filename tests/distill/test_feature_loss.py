"""The feature losses: what they measure, what they ignore, and where their gradient points."""

import pytest
import torch

from edgedit_hf.distill.feature_loss import OUTLIER_SIGMA, feature_loss, ordinary_updates
from edgedit_hf.errors import EdgeDiTError


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
    update = target - x
    for sigmas in (1.0, 2.0, OUTLIER_SIGMA):
        expected = (update - update.mean()).abs() <= sigmas * update.std(correction=0)
        assert torch.equal(ordinary_updates(x, target, sigmas), expected)
    assert 0.66 < ordinary_updates(x, target, 1.0).float().mean() < 0.71  # a normal distribution


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
