"""Noising, targets, losses and random draws, against diffusers' schedulers, Bayes' rule and the normal distribution."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from scipy import stats
from torch.distributions import Normal, kl_divergence

from edgedit_hf.diffusion import (
    PREDICTION_TYPES,
    TRAIN_TIMESTEPS,
    Diffusion,
    alphas_cumprod,
    draws,
    drop_labels,
    make_few_step_scheduler,
    make_scheduler,
    own_generators,
)
from edgedit_hf.errors import EdgeDiTError

BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
TIMESTEPS = torch.tensor([0, 1, 2, 37, 500, 998, 999])


def batch(count: int = len(TIMESTEPS), seed: int = 0):
    """x0 and noise, `(count, 2, 4, 4)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 2, 4, 4, generator=generator) * 2 - 1, torch.randn(count, 2, 4, 4, generator=generator)


# -------------------------------------------------------------------- the forward process


def test_epsilon_is_the_ddpm_process_of_diffusers():
    process, reference = Diffusion("epsilon"), DDPMScheduler(**BETAS, clip_sample=False)
    torch.testing.assert_close(alphas_cumprod(), reference.alphas_cumprod, rtol=1e-5, atol=0)
    x0, noise = batch()
    x_t = process.noisy(x0, noise, TIMESTEPS)
    torch.testing.assert_close(x_t, reference.add_noise(x0, noise, TIMESTEPS), rtol=0, atol=1e-5)
    assert torch.equal(process.target(x0, noise), noise)
    output = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    for i, t in enumerate(TIMESTEPS.tolist()):
        expected = reference.step(output[i : i + 1], t, x_t[i : i + 1]).pred_original_sample[0]
        torch.testing.assert_close(process.predict_x0(output, x_t, TIMESTEPS)[i], expected, rtol=1e-4, atol=1e-4)


def test_flow_is_the_rectified_flow_of_diffusers():
    process, reference = Diffusion("flow_prediction"), FlowMatchEulerDiscreteScheduler()
    timesteps = reference.timesteps[[0, 1, 250, 500, 998, 999]]
    assert timesteps[0] == 1000 and timesteps[-1] == 1
    x0, noise = batch(len(timesteps))
    torch.testing.assert_close(
        process.noisy(x0, noise, timesteps), reference.scale_noise(x0, timesteps, noise), rtol=0, atol=1e-5
    )
    assert torch.equal(process.noisy(x0, noise, torch.zeros(6)), x0)
    assert torch.equal(process.noisy(x0, noise, torch.full((6,), 1000.0)), noise)
    # The velocity is the derivative of x_t with respect to σ = t / 1000.
    t = torch.full((6,), 300.0, requires_grad=True)
    _, velocity = torch.func.jvp(lambda t: process.noisy(x0, noise, t), (t.detach(),), (torch.full((6,), 1000.0),))
    torch.testing.assert_close(process.target(x0, noise), velocity, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_clean_image_follows_from_the_true_target(kind):
    process = Diffusion(kind)
    x0, noise = batch()
    x_t = process.noisy(x0, noise, TIMESTEPS)
    found = process.predict_x0(process.target(x0, noise), x_t, TIMESTEPS)
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-4)  # ε at t = 999: rounding over √ᾱ = 0.006
    assert not process.loss(process.target(x0, noise), x0, noise, TIMESTEPS).any()


def test_the_loss_is_a_mean_per_sample():
    process = Diffusion("flow_prediction")
    x0, noise = batch()
    output = torch.randn(x0.shape)
    expected = torch.stack([((noise - x0 - output)[i] ** 2).mean() for i in range(len(x0))])
    torch.testing.assert_close(process.loss(output, x0, noise, TIMESTEPS), expected)
    assert process.loss(output.bfloat16(), x0, noise, TIMESTEPS).dtype == torch.float32


def test_training_timesteps():
    u = (torch.arange(1000) + 0.5) / 1000
    assert torch.equal(Diffusion("epsilon").timesteps(u), torch.arange(1000))
    limits = Diffusion("epsilon").timesteps(torch.tensor([1e-6, 1 - 1e-6]))
    assert limits.tolist() == [0, 999]
    t = Diffusion("flow_prediction").timesteps(u)
    assert ((t > 0) & (t < 1000)).all()
    logits = torch.logit(t.double() / 1000)
    assert stats.kstest(logits.numpy(), "norm").statistic < 1e-3  # logit-normal with mean 0 and scale 1
    limits = Diffusion("flow_prediction").timesteps(torch.tensor([1e-6, 1 - 1e-6]))
    assert 0 < limits[0] < 10 and 990 < limits[1] < 1000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("x0",), "prediction_type is 'x0'"), (("flow_prediction", True), "flow matching has no variance to learn")],
)
def test_processes_that_make_no_sense_are_refused(arguments, said):
    with pytest.raises(EdgeDiTError, match=said):
        Diffusion(*arguments)


def test_the_process_of_a_model_is_that_of_its_config(make_transformer):
    assert (
        Diffusion.for_config(make_transformer(prediction_type="flow_prediction").config).prediction_type
        == "flow_prediction"
    )
    assert Diffusion.for_config(make_transformer(learn_sigma=True).config).learn_sigma


# -------------------------------------------------------------------- the learned variance


def bound_by_bayes(eps, v, x0, noise, t: int) -> torch.Tensor:
    """Bits a dimension of one sample at one step, from Bayes' rule and torch's distributions, in float64."""
    eps, v, x0, noise = (tensor.double() for tensor in (eps, v, x0, noise))
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    acp = torch.cumprod(1 - beta, 0)
    x_t = acp[t].sqrt() * x0 + (1 - acp[t]).sqrt() * noise
    x0_model = (x_t - (1 - acp[t]).sqrt() * eps) / acp[t].sqrt()

    def posterior(x0, t):  # q(x_{t-1} | x_t, x0) ∝ q(x_{t-1} | x0) q(x_t | x_{t-1}): two Gaussians in x_{t-1}
        precision = 1 / (1 - acp[t - 1]) + (1 - beta[t]) / beta[t]
        mean = (acp[t - 1].sqrt() * x0 / (1 - acp[t - 1]) + (1 - beta[t]).sqrt() * x_t / beta[t]) / precision
        return mean, 1 / precision

    smallest = posterior(x0, max(t, 1))[1]
    variance = torch.exp((v + 1) / 2 * beta[t].log() + (1 - (v + 1) / 2) * smallest.log())
    if t == 0:
        return -Normal(x0_model, variance.sqrt()).log_prob(x0).mean() / math.log(2)
    true, model = posterior(x0, t)[0], posterior(x0_model, t)[0]
    return kl_divergence(
        Normal(true, smallest.sqrt().expand_as(true)), Normal(model, variance.sqrt())
    ).mean() / math.log(2)


def test_the_bound_of_the_learned_variance_is_that_of_bayes_rule():
    process, plain = Diffusion("epsilon", learn_sigma=True), Diffusion("epsilon")
    x0, noise = batch()
    generator = torch.Generator().manual_seed(2)
    eps = noise + 0.1 * torch.randn(x0.shape, generator=generator)
    v = torch.rand(x0.shape, generator=generator) * 3 - 1.5  # a network may leave [-1, 1]
    bound = process.loss(torch.cat([eps, v], 1), x0, noise, TIMESTEPS) - plain.loss(eps, x0, noise, TIMESTEPS)
    expected = torch.stack([bound_by_bayes(eps[i], v[i], x0[i], noise[i], t) for i, t in enumerate(TIMESTEPS.tolist())])
    assert (expected[1:] > 0).all()
    torch.testing.assert_close(bound.double(), expected, rtol=2e-3, atol=1e-5)


def test_the_smallest_variance_is_that_of_diffusers():
    scheduler = DDPMScheduler(**BETAS, variance_type="fixed_small")
    x0, noise = batch(1)
    for t in (1, 37, 999):
        variance = scheduler._get_variance(t).item()
        process = Diffusion("epsilon", learn_sigma=True)
        shifts = torch.full_like(x0, 0.3)
        # With v = -1 only the squared shift of the mean is left of the KL divergence, over twice the smallest variance.
        bound = (
            process.loss(torch.cat([noise + shifts, -torch.ones_like(x0)], 1), x0, noise, torch.tensor([t])).item()
            - 0.09
        )
        scheduler.set_timesteps(1000)
        means = [scheduler.step(eps, t, process.noisy(x0, noise, torch.tensor([t]))) for eps in (noise, noise + shifts)]
        alpha, beta = scheduler.alphas[t].item(), scheduler.betas[t].item()
        shift = 0.3 * beta / math.sqrt(alpha * (1 - scheduler.alphas_cumprod[t].item()))  # DDPM, eq. 11
        assert means[0].prev_sample.shape == x0.shape
        assert bound == pytest.approx(shift**2 / (2 * variance) / math.log(2), rel=1e-2)


def test_a_perfect_prediction_with_the_true_variance_costs_nothing():
    process = Diffusion("epsilon", learn_sigma=True)
    x0, noise = batch()
    later = TIMESTEPS > 0
    losses = process.loss(torch.cat([noise, -torch.ones_like(x0)], 1), x0, noise, TIMESTEPS)
    torch.testing.assert_close(losses[later], torch.zeros(later.sum()), rtol=0, atol=1e-5)
    for v in (-0.9, 0.0, 1.0):
        more = process.loss(torch.cat([noise, torch.full_like(x0, v)], 1), x0, noise, TIMESTEPS)
        assert (more[later] >= losses[later] - 1e-6).all()
        assert (more[1:3] > losses[1:3] + 1e-5).all()  # later on, the largest variance is hardly more than the smallest


def test_the_bound_teaches_the_variance_and_leaves_the_mean_alone():
    x0, noise = batch()
    output = torch.randn(len(x0), 4, 4, 4, generator=torch.Generator().manual_seed(3), requires_grad=True)
    (hybrid,) = torch.autograd.grad(
        Diffusion("epsilon", learn_sigma=True).loss(output, x0, noise, TIMESTEPS).sum(), output
    )
    (simple,) = torch.autograd.grad(Diffusion("epsilon").loss(output, x0, noise, TIMESTEPS).sum(), output)
    torch.testing.assert_close(hybrid[:, :2], simple[:, :2])
    assert hybrid[:, 2:].abs().amin() > 0 and not simple[:, 2:].any()


# -------------------------------------------------------------------- random numbers


def test_draws_are_functions_of_their_arguments_alone():
    whole = draws(7, 3, range(8), (2, 4))
    assert whole.noise.shape == (8, 2, 4) and whole.noise.dtype == whole.time.dtype == torch.float32
    torch.manual_seed(0)
    np.random.seed(0)
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    part = draws(7, 3, [5, 0, 6], (2, 4))
    assert all(torch.equal(one, other[[5, 0, 6]]) for one, other in zip(part, whole))
    assert torch.equal(torch.random.get_rng_state(), torch_state) and (np.random.get_state()[1] == numpy_state).all()


def test_draws_of_other_arguments_are_independent():
    count, each = 24, 400
    streams = [draws(seed, step, [row], (each,), stream=stream) for seed, step, row, stream in np.ndindex(2, 3, 2, 2)]
    noise = np.stack([drawn.noise[0].numpy() for drawn in streams])
    assert noise.shape == (count, each)
    correlation = np.corrcoef(noise)[np.triu_indices(count, 1)]
    assert np.abs(correlation).max() < 5 / math.sqrt(each)
    assert len({float(drawn.time) for drawn in streams} | {float(drawn.drop) for drawn in streams}) == 2 * count


def test_draws_of_the_greatest_seeds_differ():
    greatest = [
        draws(2**63 - 1 + i, 0, [0], (4,)).noise for i in (0, 1, 2)
    ]  # the last two belong to the streams of the greatest seed
    assert len({tuple(noise.flatten().tolist()) for noise in greatest}) == 3


def test_generators_are_functions_of_seed_stream_and_row_alone():
    def noise(*arguments) -> list[torch.Tensor]:
        return [torch.randn(1000, generator=generator) for generator in own_generators(*arguments)]

    whole = noise(7, range(5), 1)
    assert all(torch.equal(part, whole[row]) for part, row in zip(noise(7, [4, 0], 1), (4, 0)))
    drawn = draws(7, 0, range(5), (1000,), stream=1).noise
    others = [*whole, *drawn, *noise(8, [0], 1), *noise(7, [0], 0), *noise(2**63 - 1, [0], 1)]
    likeness = torch.corrcoef(torch.stack(others)) - torch.eye(len(others))
    assert likeness.abs().max() < 0.15  # 1000 values each: .032 expected of independent ones


def test_draws_have_the_distributions_they_claim():
    drawn = draws(11, 5, range(2000), (25,))
    assert stats.kstest(drawn.noise.double().flatten().numpy(), "norm").pvalue > 0.01
    assert stats.kstest(drawn.noise.double().pow(2).sum(1).numpy(), stats.chi2(25).cdf).pvalue > 0.01
    assert stats.kstest(drawn.time.double().numpy(), "uniform").pvalue > 0.01
    assert stats.kstest(drawn.drop.double().numpy(), "uniform").pvalue > 0.01
    assert abs(np.corrcoef(drawn.time.numpy(), drawn.drop.numpy())[0, 1]) < 0.1
    assert ((drawn.time > 0) & (drawn.time < 1)).all()


def test_labels_are_dropped_for_the_share_that_is_asked_for():
    labels, drop = torch.arange(1000) % 10, draws(0, 0, range(1000), (1,)).drop
    assert torch.equal(drop_labels(labels, drop, 0.0, 10), labels)
    assert (drop_labels(labels, drop, 1.0, 10) == 10).all()
    dropped = drop_labels(labels, drop, 0.25, 10)
    assert torch.equal(dropped == 10, drop < 0.25) and 200 < (dropped == 10).sum() < 300
    assert torch.equal(dropped[dropped < 10], labels[dropped < 10]) and dropped.dtype == labels.dtype


# -------------------------------------------------------------------- schedulers


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_sampling_with_the_true_prediction_recovers_the_image(kind, steps):
    process, scheduler = Diffusion(kind), make_scheduler(kind)
    assert type(scheduler) is {"epsilon": DDIMScheduler, "flow_prediction": FlowMatchEulerDiscreteScheduler}[kind]
    x0, noise = batch(3)
    scheduler.set_timesteps(steps)
    first = scheduler.timesteps[:1].expand(3)
    assert first[0] == (999 if kind == "epsilon" else TRAIN_TIMESTEPS)  # both start at pure noise
    x = process.noisy(x0, noise, first)
    for t in scheduler.timesteps:
        alpha, sigma = process.alpha_sigma(t.expand(3), x)
        eps = (x - alpha * x0) / sigma
        x = scheduler.step(process.target(x0, eps), t, x).prev_sample
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_scheduler_saves_and_loads(kind, tmp_path):
    scheduler = make_scheduler(kind)
    scheduler.save_pretrained(tmp_path)
    again, config = type(scheduler).from_pretrained(tmp_path), scheduler.config
    assert {key: again.config[key] for key in config if key != "_use_default_values"}.items() <= config.items()


FEW = {
    "epsilon": ([800, 600, 400, 200], [799], [999, 1], [900, 800, 700, 600, 500, 400, 200, 50]),
    "flow_prediction": ([1000, 900, 750, 500], [1000], [1000, 1], [1000, 950, 900, 825, 750, 625, 500, 250]),
}


def set_few(scheduler, kind, timesteps):
    if kind == "epsilon":
        scheduler.set_timesteps(timesteps=timesteps)
    else:
        scheduler.set_timesteps(sigmas=[t / 1000 for t in timesteps])
    torch.testing.assert_close(scheduler.timesteps.double(), torch.tensor(timesteps).double(), rtol=0, atol=1e-3)
    assert scheduler.init_noise_sigma == 1.0 if kind == "epsilon" else not hasattr(scheduler, "init_noise_sigma")


def closed_form(kind, timesteps):
    """(alpha, sigma) of every step and of clean data, in float64."""
    if kind == "flow_prediction":
        return [(1 - t / 1000, t / 1000) for t in timesteps] + [(1.0, 0.0)]
    product = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    return [(product[t] ** 0.5, (1 - product[t]) ** 0.5) for t in timesteps] + [(1.0, 0.0)]


def clean_and_noise(kind, x, prediction, alpha, sigma):
    if kind == "flow_prediction":
        return x - sigma * prediction, x + alpha * prediction
    return (x - sigma * prediction) / alpha, prediction


@pytest.mark.parametrize("kind, timesteps", [(kind, each) for kind, several in FEW.items() for each in several])
def test_few_deterministic_steps_are_the_closed_form(kind, timesteps):
    """Each goes to alpha' x0 + sigma' eps with the x0 and eps of its prediction; the last to x0."""
    scheduler, levels = make_few_step_scheduler(kind), closed_form(kind, timesteps)
    set_few(scheduler, kind, timesteps)
    generator = torch.Generator().manual_seed(5)
    for index, t in enumerate(scheduler.timesteps):
        x, prediction = torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=torch.float64)[:, 0]
        (alpha, sigma), (alpha_next, sigma_next) = levels[index : index + 2]
        clean, noise = clean_and_noise(kind, x, prediction, alpha, sigma)
        expected = alpha_next * clean + sigma_next * noise
        found = scheduler.step(prediction.float(), t, x.float()).prev_sample.double()
        torch.testing.assert_close(
            found, expected, rtol=0, atol=5e-6 / alpha if alpha > 0 and kind == "epsilon" else 2e-6
        )


@pytest.mark.parametrize("kind, timesteps", [(kind, each) for kind, several in FEW.items() for each in several])
def test_few_stochastic_steps_add_fresh_noise_to_the_clean_sample_and_end_in_it(kind, timesteps):
    scheduler, levels = make_few_step_scheduler(kind, stochastic=True), closed_form(kind, timesteps)
    set_few(scheduler, kind, timesteps)
    generator = torch.Generator().manual_seed(5)
    for index, t in enumerate(scheduler.timesteps):
        x, prediction = torch.randn(2, 1, 1, 200, 200, generator=generator, dtype=torch.float64)
        (alpha, sigma), (alpha_next, sigma_next) = levels[index : index + 2]
        clean, _ = clean_and_noise(kind, x, prediction, alpha, sigma)
        found = scheduler.step(prediction.float(), t, x.float(), generator=generator).prev_sample.double()
        rest = found - alpha_next * clean
        if sigma_next == 0:
            torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-5 / (alpha or 1))
            continue
        noise = rest / sigma_next  # 40,000 numbers: their mean and std are within 5 standard errors
        assert abs(float(noise.mean())) < 5 / 200 and abs(float(noise.std()) - 1) < 5 / 280
        for other in (x, prediction):
            assert abs(float((noise * other).mean())) < 5 / 200


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_few_step_scheduler_saves_and_loads(kind, stochastic, tmp_path):
    scheduler = make_few_step_scheduler(kind, stochastic)
    scheduler.save_pretrained(tmp_path)
    again = type(scheduler).from_pretrained(tmp_path)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in scheduler.config.items() if k[0] != "_"
    }
