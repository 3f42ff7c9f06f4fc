"""Balance and combination of the networks' gradients, by hand and on a tiny supernet."""

import copy

import pytest
import torch

from edgedit_hf.elastic.losses import balance_scale, combine_gradients, distillation_loss, take_gradients
from edgedit_hf.models.transformer_elastic_dit import ElasticDiTTransformer2DModel


def tensors(*values) -> list:
    return [None if value is None else torch.tensor(value, dtype=torch.float32) for value in values]


# A shared matrix of which the sub-network uses one column, a shared vector used by all, a norm of the full net, one of
# the sub-network.
FULL = ([[3.0, 8.0], [4.0, 6.0]], [0.0], [5.0], None)
SUB = ([[0.6, 0.0], [0.0, 0.0]], [0.8], None, [7.0])


def test_the_scale_makes_norms_equal_on_the_shared_slice():
    # The full net's gradient on the entries that the sub-network's loss reaches: 3 and 0; the sub-network's: 0.6 and
    # 0.8.
    assert balance_scale(tensors(*FULL), tensors(*SUB), 10.0) == pytest.approx(3.0)
    assert balance_scale(tensors(*FULL), tensors(*SUB), 2.0) == 2.0
    assert balance_scale(tensors([0.01]), tensors([1.0]), 10.0) == pytest.approx(0.1)


@pytest.mark.parametrize("sub", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_no_scale_from_norms_that_are_zero_or_not_finite(sub):
    assert balance_scale(tensors([1.0, 1.0]), tensors(sub), 10.0) == 1.0
    assert balance_scale(tensors([0.0, 0.0]), tensors([1.0, 1.0]), 10.0) == 1.0


def test_a_weight_gets_the_mean_over_the_networks_that_use_it():
    full, sub, other = tensors(*FULL), tensors(*SUB), tensors([[1.0, 2.0], [0.0, 0.0]], [0.0], None, None)
    combined = combine_gradients(full, [sub], [2.0])
    expected = [[[(3 + 1.2) / 2, 8.0], [4.0, 6.0]], [(0 + 1.6) / 2], [5.0], [7.0]]
    for found, wanted in zip(combined, expected):
        torch.testing.assert_close(found, torch.tensor(wanted))
    assert full == sub == [None] * 4  # nothing is kept twice
    combined = combine_gradients(tensors(*FULL), [tensors(*SUB), other], [1.0, torch.tensor(0.5)])
    torch.testing.assert_close(combined[0], torch.tensor([[(3 + 0.6 + 0.5) / 3, (8 + 1) / 2], [4.0, 6.0]]))


def test_the_target_of_distillation_gets_no_gradient():
    velocity, full = torch.ones(2, 1, 2, 2, requires_grad=True), torch.zeros(2, 1, 2, 2, requires_grad=True)
    loss = distillation_loss(2 * velocity, full)
    torch.testing.assert_close(loss, torch.tensor([4.0, 4.0]))
    loss.sum().backward()
    assert full.grad is None and velocity.grad is not None


@pytest.fixture
def supernet():
    """A tiny supernet whose every weight is random (a fresh one predicts zero)."""
    model = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model, name: str, scale: float = 1.0) -> list:
    model.set_active_subnet(name)
    generator = torch.Generator().manual_seed(1)
    x, text = (
        torch.randn(2, 1, 8, 8, generator=generator),
        [torch.randn(2, 3, dim, generator=generator) for dim in model.config.text_dims],
    )
    (scale * model(x, torch.tensor([300.0, 700.0]), text).sample.square().mean()).backward()
    return take_gradients(model.parameters())


def test_the_slice_is_read_off_the_gradient(supernet):
    """The norm over the sub-network's slice equals the norm over what extraction copies."""
    full, sub = gradients(supernet, "full"), gradients(supernet, "small")
    assert all(parameter.grad is None for parameter in supernet.parameters())
    carrier = copy.deepcopy(supernet)
    with torch.no_grad():
        for parameter, gradient in zip(carrier.parameters(), full):
            parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
    shared = {
        name for (name, _), f, s in zip(supernet.named_parameters(), full, sub) if f is not None and s is not None
    }
    norm_full = sum(
        p.square().sum() for name, p in carrier.extract_subnet("small").named_parameters() if name in shared
    ).sqrt()
    norm_sub = sum(s.square().sum() for f, s in zip(full, sub) if f is not None and s is not None).sqrt()
    assert balance_scale(full, sub, 1e6) == pytest.approx((norm_full / norm_sub).item(), rel=1e-4)
    # The scale undoes whatever weight the sub-network's loss has.
    assert balance_scale(full, gradients(supernet, "small", 7.0), 1e6) == pytest.approx(
        (norm_full / norm_sub).item() / 7, rel=1e-4
    )


def test_per_width_parameters_of_other_widths_do_not_move(supernet):
    """Neither weight decay nor momentum touches what a step gave no gradient."""
    optimizer = torch.optim.AdamW(supernet.parameters(), lr=0.1, weight_decay=0.5, fused=True)

    def step(sub: str) -> set[str]:
        before = {name: parameter.detach().clone() for name, parameter in supernet.named_parameters()}
        combined = combine_gradients(gradients(supernet, "full"), [gradients(supernet, sub)], [1.0])
        for parameter, gradient in zip(supernet.parameters(), combined):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        return {name for name, parameter in supernet.named_parameters() if not torch.equal(parameter, before[name])}

    of = {
        width: {name for name, _ in supernet.named_parameters() if f".{width}." in name}
        for width in ("tiny", "small", "full")
    }
    assert of["tiny"] and of["small"] and of["full"]
    everything = {name for name, _ in supernet.named_parameters()}
    assert step("tiny") == everything - of["small"]
    assert step("small") == everything - of["tiny"]  # though their moments hold momentum by now
    assert step("tiny") == everything - of["small"]
