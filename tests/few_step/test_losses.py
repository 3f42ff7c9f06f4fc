"""The losses against closed forms: Gaussians and mixtures of them, whose scores are known, and no network."""

from functools import partial

import pytest
import torch
from gaussians import Mixture

from edgedit_hf.diffusion import PREDICTION_TYPES, Diffusion
from edgedit_hf.few_step import losses
from edgedit_hf.few_step.losses import (
    chord,
    knowledge_loss,
    knowledge_weight,
    moments_loss,
    on_flow,
    pull,
)
from edgedit_hf.few_step.networks import guide
from edgedit_hf.run.sections import FewStepConfig

FLOOR = FewStepConfig().norm_floor
matching_gradient, guidance_gradient = (
    partial(of, floor=FLOOR) for of in (losses.matching_gradient, losses.guidance_gradient)
)
DATA = {"gaussian": Mixture.of((1.0, 0.4, 0.3)), "mixture": Mixture.of((0.3, -1.0, 0.2), (0.7, 0.8, 0.4))}
STUDENT = {"gaussian": Mixture.of((1.0, -0.5, 0.8)), "mixture": Mixture.of((0.5, -0.3, 0.5), (0.5, 0.1, 0.3))}


def noisy(diffusion: Diffusion, student: Mixture, count: int = 6, seed: int = 0):
    """Samples of a student `(count, 1, 4, 4)`, made noisy at various timesteps: x0, x_t, t, α, σ."""
    generator = torch.Generator().manual_seed(seed)
    x0 = student.sample((count, 1, 4, 4), generator)
    t = torch.linspace(40, 960, count).long()
    x_t = diffusion.noisy(x0, torch.randn(x0.shape, generator=generator, dtype=torch.float64), t)
    alpha, sigma = (part.expand_as(x_t) for part in diffusion.alpha_sigma(t, x_t))
    return x0, x_t, t, alpha, sigma


# -------------------------------------------------------------------- distribution matching


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("kind", DATA)
def test_the_gradient_is_the_difference_of_the_scores(prediction_type, kind):
    """∇ KL(student ‖ data) of the noisy samples is score_student − score_data, which autograd takes of the densities;
    x̂0 = (x_t + σ² score) / α turns it into DMD's form.
    """
    x0, x_t, _, alpha, sigma = noisy(Diffusion(prediction_type), STUDENT[kind])
    found = matching_gradient(x0, DATA[kind].x0(x_t, alpha, sigma), STUDENT[kind].x0(x_t, alpha, sigma))

    def score(mixture: Mixture) -> torch.Tensor:
        x = x_t.clone().requires_grad_()
        return torch.autograd.grad(mixture.log_density(x, alpha, sigma).sum(), x)[0]

    real = (x_t + sigma**2 * score(DATA[kind])) / alpha
    n = (x0 - real).abs().mean((1, 2, 3), keepdim=True)
    assert (n > FLOOR).all()
    torch.testing.assert_close(
        found, sigma**2 / alpha * (score(STUDENT[kind]) - score(DATA[kind])) / n, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("kind", DATA)
def test_noise_velocity_and_x0_forms_agree(prediction_type, kind):
    diffusion = Diffusion(prediction_type)
    x0, x_t, t, alpha, sigma = noisy(diffusion, STUDENT[kind])
    means = [mixture[kind].x0(x_t, alpha, sigma) for mixture in (DATA, STUDENT)]
    wanted = matching_gradient(x0, *means)
    outputs = [mixture[kind].network(diffusion)(x_t, t) for mixture in (DATA, STUDENT)]
    by_output = matching_gradient(x0, *(diffusion.predict_x0(output, x_t, t) for output in outputs))
    level = diffusion.noise_level(t).double().view(-1, 1, 1, 1)
    clean = [
        on_flow(x_t, alpha, sigma) - level * diffusion.predict_velocity(output, x_t, t) for output in outputs
    ]  # x0 = x − σ v of the flow's x
    assert (by_output - wanted).abs().max() < 1e-6 and (matching_gradient(x0, *clean) - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("kind", DATA)
def test_both_families_agree_at_one_signal_to_noise_ratio(kind):
    ddpm, flow = (Diffusion(prediction_type) for prediction_type in PREDICTION_TYPES)
    x0, x_t, t, alpha, sigma = noisy(ddpm, STUDENT[kind])
    level = sigma / (alpha + sigma)
    there, t_there = on_flow(x_t, alpha, sigma), 1000 * level[:, 0, 0, 0]
    torch.testing.assert_close(ddpm.noise_level(t).double(), level[:, 0, 0, 0], rtol=1e-6, atol=1e-6)
    found = []
    for diffusion, x, at in ((ddpm, x_t, t), (flow, there, t_there)):
        networks = [mixture[kind].network(diffusion) for mixture in (DATA, STUDENT)]
        found.append(matching_gradient(x0, *(diffusion.predict_x0(net(x, at), x, at) for net in networks)))
        found.append(diffusion.predict_velocity(networks[0](x, at), x, at))
    assert (found[0] - found[2]).abs().max() < 1e-6 and (found[1] - found[3]).abs().max() < 1e-6


def test_the_normaliser_is_of_each_sample_and_has_a_floor():
    x0 = torch.zeros(2, 1, 2, 2)
    real = torch.tensor([[1.0, -3.0, 1.0, 3.0], [1e-4, 0.0, 0.0, 0.0]]).view(2, 1, 2, 2)
    fake = real + 0.5
    gradient = matching_gradient(x0, real, fake)
    torch.testing.assert_close(gradient[0], torch.full((1, 2, 2), 0.25))  # mean |x0 − real| is 2
    torch.testing.assert_close(gradient[1], torch.full((1, 2, 2), 0.5 / FLOOR))
    assert torch.equal(matching_gradient(x0, real, fake, floor=5.0), torch.full_like(x0, 0.1))


def descend(parts, data: Mixture, sign: float, steps: int = 250, rate: float = 0.03):
    """Means and stds `(K,)` of a generator x = m + s z of so many equally frequent components, after descending the
    matching loss by `sign` times its gradient; the critic is the score of what it makes at the time.
    """
    diffusion = Diffusion("flow_prediction")
    generator = torch.Generator().manual_seed(0)
    means, stds = (torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in zip(*parts))
    optimizer = torch.optim.Adam([means, stds], lr=rate, betas=(0.5, 0.9))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        which = torch.arange(64).remainder(len(parts)).view(64, 1, 1, 1).expand(64, 1, 4, 4)
        z = torch.randn(which.shape, generator=generator, dtype=torch.float64)
        x0 = means[which] + stds[which] * z
        t = 20 + 960 * torch.rand(64, generator=generator, dtype=torch.float64)
        x_t = diffusion.noisy(x0.detach(), torch.randn(z.shape, generator=generator, dtype=torch.float64), t)
        alpha, sigma = (part.expand_as(x_t) for part in diffusion.alpha_sigma(t, x_t))
        made = Mixture(torch.full_like(means, 1 / len(parts)).detach(), means.detach(), stds.detach())
        gradient = matching_gradient(x0.detach(), data.x0(x_t, alpha, sigma), made.x0(x_t, alpha, sigma))
        optimizer.zero_grad()
        pull(x0, sign * gradient).mean().backward()
        optimizer.step()
    return means.detach(), stds.detach()


def test_a_generator_descends_to_the_data():
    data = Mixture.of((1.0, 0.7, 0.3))
    means, stds = descend([(-0.5, 1.0)], data, 1.0)
    assert abs(means - 0.7) < 0.03 and abs(stds.abs() - 0.3) < 0.03
    means, stds = descend([(-0.5, 1.0)], data, -1.0, steps=60)
    assert means < -0.6 or stds.abs() > 1.2  # away from it


def test_a_generator_of_two_modes_descends_to_a_mixture():
    data = Mixture.of((0.5, -1.0, 0.2), (0.5, 0.8, 0.3))
    means, stds = descend([(-0.2, 0.6), (0.3, 0.6)], data, 1.0, steps=400)
    torch.testing.assert_close(means, data.means, rtol=0, atol=0.05)
    torch.testing.assert_close(stds.abs(), data.stds, rtol=0, atol=0.05)
    means, _ = descend([(-0.2, 0.6), (0.3, 0.6)], data, -1.0, steps=60)
    assert (means - data.means).abs().max() > 0.5


def test_the_pull_has_the_gradient_that_it_was_given():
    generator = torch.Generator().manual_seed(0)
    x0, gradient = (torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    x0.requires_grad_()
    loss = pull(x0, gradient)
    torch.testing.assert_close(loss, 0.5 * gradient.square().mean((1, 2, 3)))
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), x0)[0], gradient / 32)


# -------------------------------------------------------------------- guidance


def test_the_decoupled_form_at_one_noise_level_is_the_guided_score():
    """fake − (u + w (c − u)) = (fake − c) − (w − 1)(c − u); the normaliser, which differs, is at its floor."""
    generator = torch.Generator().manual_seed(0)
    x0, with_, without, fake = (torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(4))
    apart = matching_gradient(x0, with_, fake, floor=9.0) + guidance_gradient(x0, with_, without, 3.5, floor=9.0)
    torch.testing.assert_close(apart, matching_gradient(x0, guide(with_, without, 3.5), fake, floor=9.0))
    assert not guidance_gradient(x0, with_, without, 1.0).any()
    term = guidance_gradient(x0, with_, without, 3.5)
    assert ((-term * (with_ - without)).sum((1, 2, 3)) > 0).all()  # descent leads from without to with
    n = (x0 - with_).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(term, -2.5 * (with_ - without) / n)


# -------------------------------------------------------------------- knowledge and moments


def test_knowledge_is_a_mean_square_whose_target_has_no_gradient():
    generator = torch.Generator().manual_seed(0)
    velocity, target = (torch.randn(3, 2, 4, 4, generator=generator, requires_grad=True) for _ in range(2))
    loss = knowledge_loss(velocity, target)
    torch.testing.assert_close(loss, ((velocity - target) ** 2).flatten(1).mean(1))
    loss.sum().backward()
    assert velocity.grad is not None and target.grad is None


def test_the_weight_falls_from_one_to_the_last():
    level = torch.tensor([1.0, 0.9, 0.75, 0.5], dtype=torch.float64)
    wanted = torch.tensor([1.0, 0.84, 0.6, 0.2], dtype=torch.float64)
    for scale in (1.0, 0.86):  # a net that predicts noise begins below pure noise
        x = scale * level
        torch.testing.assert_close(knowledge_weight(x, x[0], x[-1], 0.2), wanted)
        assert torch.equal(knowledge_weight(x, x[0], x[-1], 1.0), torch.ones(4, dtype=torch.float64))
        assert torch.equal(knowledge_weight(x[:1], x[0], x[0], 0.2), torch.ones(1, dtype=torch.float64))  # one step


def test_moments_are_held_by_their_divergence():
    generator = torch.Generator().manual_seed(0)
    x0 = 0.7 * torch.randn(5, 3, 8, 8, generator=generator) + 0.2
    mean, std = torch.tensor([0.0, 0.3, -0.2]), torch.tensor([1.0, 0.5, 0.7])
    values = x0.transpose(0, 1).reshape(3, -1)
    own, data = torch.distributions.Normal(values.mean(1), values.std(1)), torch.distributions.Normal(mean, std)
    torch.testing.assert_close(moments_loss(x0, mean, std), torch.distributions.kl_divergence(own, data).mean())
    assert moments_loss(x0, own.loc, own.scale).abs() < 1e-6
    x0.requires_grad_()
    moments_loss(x0, own.loc + 0.1, own.scale).backward()
    assert (x0.grad.sum((0, 2, 3)) < 0).all()  # all samples are to rise


def test_pieces_of_a_batch_are_held_by_its_moments():
    """The mean of their gradients is the whole batch's, the mean of their values its divergence."""
    generator = torch.Generator().manual_seed(0)
    x0 = (0.7 * torch.randn(6, 2, 4, 4, generator=generator, dtype=torch.float64) + 0.2).requires_grad_()
    mean, std = torch.tensor([0.0, 0.3]), torch.tensor([1.0, 0.5])
    loss = moments_loss(x0, mean, std)
    values = x0.detach().transpose(0, 1).flatten(1)
    whole = (values.mean(1).float(), values.std(1).float(), values.shape[1])
    pieces = torch.stack([moments_loss(piece, mean, std, whole) for piece in x0.chunk(3)]).mean()
    torch.testing.assert_close(pieces, loss)
    wanted, found = (torch.autograd.grad(one, x0)[0] for one in (loss, pieces))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def test_a_chord_is_what_a_straight_flow_has():
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    level = torch.tensor([[0.9, 1.0], [0.4, 0.0]], dtype=torch.float64)
    x_t, x_s = ((1 - s.view(-1, 1, 1, 1)) * x0 + s.view(-1, 1, 1, 1) * noise for s in level)
    torch.testing.assert_close(chord(x_t, x_s, *level), noise - x0)
