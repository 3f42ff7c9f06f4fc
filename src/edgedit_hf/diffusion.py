"""Noising, targets, conversions between predictions, and the randomness of training: the one place that knows the
signs.

Two parametrisations, both with the timestep on the scale 0 … 1000 that the models take:

- `epsilon`: DDPM with DiT's linear betas 1e-4 … 0.02 over 1000 steps: x_t = √ᾱ_t x0 + √(1−ᾱ_t) ε, target ε; optionally
  a learned variance.
- `flow_prediction`: x_t = (1−σ) x0 + σ ε with σ = t / 1000, target the velocity ε − x0 (σ = 1 is noise).

Shapes: x0, noise, x_t `(B, C, H, W)`; t `(B,)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .errors import EdgeDiTError

TRAIN_TIMESTEPS = 1000
PREDICTION_TYPES = ("epsilon", "flow_prediction")


class Draws(NamedTuple):
    """Random numbers of one training step for some rows of its global batch."""

    time: torch.Tensor  # (B,) uniform in (0, 1)
    drop: torch.Tensor  # (B,) uniform in (0, 1)
    noise: torch.Tensor  # (B, *shape) standard normal


def draws(seed: int, step: int, rows: Sequence[int], shape: Sequence[int], stream: int = 0) -> Draws:
    """Counter-based random numbers (Philox): a function of (seed, stream, step, row) and of nothing else.

    That is what makes a resumed run and a run on another number of ranks see the same noise.

    Args:
        seed: the run's seed.
        step: the training step.
        rows: positions of the samples in the global batch.
        shape: shape of one sample's noise.
        stream: tells uses apart that share seed and step (0 training, 1 evaluation, …).
    """
    uniforms = np.empty((len(rows), 2))
    noise = np.empty((len(rows), math.prod(shape)), dtype=np.float32)
    for i, row in enumerate(rows):
        generator = np.random.Generator(
            np.random.Philox(key=np.array([seed, stream], dtype=np.uint64), counter=[0, int(row), step, 0])
        )
        uniforms[i] = generator.random(2)
        generator.standard_normal(out=noise[i], dtype=np.float32)
    time, drop = torch.from_numpy(uniforms).float().unbind(1)
    return Draws(time.clamp(1e-6, 1 - 1e-6), drop, torch.from_numpy(noise).view(len(rows), *shape))


def own_generators(seed: int, rows: Sequence[int], stream: int = 0) -> list[torch.Generator]:
    """A generator a sample, for a sampler that draws noise while it runs: a function of (seed, stream, row) and of
    nothing else, and apart from what [`draws`] gives.
    """
    keys = (
        np.random.Philox(key=np.array([seed, stream], dtype=np.uint64), counter=[0, int(row), 0, 1]) for row in rows
    )
    return [torch.Generator().manual_seed(int(key.random_raw())) for key in keys]


def drop_labels(labels: torch.Tensor, drop: torch.Tensor, probability: float, num_classes: int) -> torch.Tensor:
    """Replace a share of the labels by the null class `num_classes` (for classifier-free guidance)."""
    return torch.where(drop.to(labels.device) < probability, torch.full_like(labels, num_classes), labels)


def alphas_cumprod() -> torch.Tensor:
    """ᾱ_t of DiT, whose betas grow linearly, `(1000,)` float32."""
    betas = torch.linspace(1e-4, 0.02, TRAIN_TIMESTEPS, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0).float()


class Diffusion:
    """The forward process and the loss of one parametrisation.

    Args:
        prediction_type: `"epsilon"` or `"flow_prediction"`, as in the model's config.
        learn_sigma: the model's output holds variance channels too (only with `"epsilon"`).
    """

    def __init__(self, prediction_type: str, learn_sigma: bool = False) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise EdgeDiTError(f"prediction_type is {prediction_type!r}; it must be one of {PREDICTION_TYPES}.")
        if learn_sigma and prediction_type != "epsilon":
            raise EdgeDiTError("learn_sigma needs prediction_type 'epsilon': flow matching has no variance to learn.")
        self.prediction_type = prediction_type
        self.learn_sigma = learn_sigma
        self._alphas_cumprod = alphas_cumprod()

    @classmethod
    def for_config(cls, config) -> Diffusion:
        """The process that a model with this config was trained with."""
        return cls(config["prediction_type"], config["learn_sigma"])

    def timesteps(self, u: torch.Tensor) -> torch.Tensor:
        """Training timesteps from uniform numbers: uniform integers (DDPM), or 1000·σ with σ logit-normal (Esser et
        al., 2024).
        """
        if self.prediction_type == "epsilon":
            return (u * TRAIN_TIMESTEPS).long().clamp(max=TRAIN_TIMESTEPS - 1)
        return torch.sigmoid(torch.special.ndtri(u.double())).float() * TRAIN_TIMESTEPS

    def alpha_sigma(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """α and σ of x_t = α x0 + σ ε, each `(B, 1, …)` with as many dimensions as `like`, in its precision (float32
        at least). t = 0 is clean data (flow), or the least noise there is (DDPM).
        """
        shape, dtype = (-1,) + (1,) * (like.ndim - 1), torch.promote_types(like.dtype, torch.float32)
        if self.prediction_type == "epsilon":
            a = self._alphas_cumprod.to(t.device, dtype)[t.long()].view(shape)
            return a.sqrt(), (1 - a).sqrt()
        sigma = (t.to(dtype) / TRAIN_TIMESTEPS).view(shape)
        return 1 - sigma, sigma

    def noisy(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the network should output: ε, or the velocity ε − x0."""
        return noise if self.prediction_type == "epsilon" else noise - x0

    def predict_x0(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x0 from the network's (mean) output: (x_t − σ ε)/α, or x_t − σ v."""
        alpha, sigma = self.alpha_sigma(t, x_t)
        return (x_t - sigma * output) / alpha if self.prediction_type == "epsilon" else x_t - sigma * output

    def noise_level(self, t: torch.Tensor) -> torch.Tensor:
        """The flow's σ with the signal-to-noise ratio of timestep t, `(B,)` in [0, 1]: σ / (α + σ), whatever the
        parametrisation.
        """
        alpha, sigma = self.alpha_sigma(t, t)
        return sigma / (alpha + sigma)

    def predict_velocity(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """ε − x0 from the network's (mean) output: what a flow network would predict, whatever the parametrisation.

        Of noise, x0 follows with the weight (α + σ)/α on its error: (α + σ) ε / α − x_t / α.
        """
        if self.prediction_type == "flow_prediction":
            return output
        alpha, sigma = self.alpha_sigma(t, x_t)
        return ((alpha + sigma) * output - x_t) / alpha

    def move(
        self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, to: torch.Tensor | None, noise=None
    ) -> torch.Tensor:
        """x at timestep `to` (`None`: clean data) by one deterministic step, Euler's of the flow or DDIM's (Song et
        al., 2021), which are one formula: α' x0 + σ' ε with what the output says of both.

        Args:
            output: the network's (mean) output for x_t and t.
            noise: fresh noise to take in the place of the predicted ε (re-noising).
        """
        x0 = self.predict_x0(output, x_t, t)
        if to is None:
            return x0
        if noise is None:
            alpha, sigma = self.alpha_sigma(t, x_t)
            noise = output if self.prediction_type == "epsilon" else x_t + alpha * output
        alpha, sigma = self.alpha_sigma(to, x_t)
        return alpha * x0 + sigma * noise

    def loss(self, output: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Per-sample training loss `(B,)`: mean squared error, plus the variational bound of the learned variance
        (DiT's hybrid).

        Args:
            output: the model's output, `(B, C, H, W)` or `(B, 2C, H, W)` with learned variance.
        """
        mean = output[:, : x0.shape[1]].float()
        loss = F.mse_loss(mean, self.target(x0, noise), reduction="none").flatten(1).mean(1)
        if self.learn_sigma:
            loss = loss + self._variational_bound(mean.detach(), output[:, x0.shape[1] :].float(), x0, noise, t)
        return loss

    def _variational_bound(
        self, eps: torch.Tensor, v: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        # Nichol & Dhariwal (2021), eq. 15-16: KL between the true posterior and the model's, in bits a dimension; the
        # mean is detached, so that only the variance learns from it. At t = 0 the decoder likelihood is the Gaussian
        # density at x0 (continuous data).
        acp = self._alphas_cumprod.double().to(t.device)
        shape = (-1,) + (1,) * (x0.ndim - 1)
        a_t = acp[t]
        a_prev = torch.where(t > 0, acp[(t - 1).clamp(min=0)], torch.ones_like(a_t))
        beta = 1 - a_t / a_prev
        posterior = beta * (1 - a_prev) / (1 - a_t)
        # The posterior variance of the first step is 0; DiT uses the second step's there.
        beta_1 = 1 - acp[1] / acp[0]
        posterior = torch.where(t > 0, posterior, beta_1 * (1 - acp[0]) / (1 - acp[1])).float().view(shape)
        log_max, log_min = beta.float().log().view(shape), posterior.log()
        fraction = (v + 1) / 2
        log_variance = fraction * log_max + (1 - fraction) * log_min
        x_t = self.noisy(x0, noise, t)
        c0 = (a_prev.sqrt() * beta / (1 - a_t)).float().view(shape)
        c1 = ((a_t / a_prev).sqrt() * (1 - a_prev) / (1 - a_t)).float().view(shape)
        # At small α the model's x0 explodes; DiT clips nothing in training either, the weight c0 is tiny there.
        mean_true = c0 * x0 + c1 * x_t
        mean_model = c0 * self.predict_x0(eps, x_t, t) + c1 * x_t
        squared = (mean_true - mean_model) ** 2 * torch.exp(-log_variance)
        kl = 0.5 * (-1 + log_variance - log_min + torch.exp(log_min - log_variance) + squared)
        nll = 0.5 * (math.log(2 * math.pi) + log_variance + squared)
        bits = torch.where((t == 0).view(shape), nll, kl).flatten(1).mean(1) / math.log(2.0)
        # Improved DDPM's rescaled bound: T terms, weighted 1/1000.
        return bits * (TRAIN_TIMESTEPS / 1000.0)


def make_scheduler(prediction_type: str):
    """The scheduler that a pipeline of this parametrisation is saved with: DDIM, or the flow-matching Euler
    scheduler.
    """
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler()
    return DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        timestep_spacing="trailing",
    )


def make_few_step_scheduler(prediction_type: str, stochastic: bool = False):
    """The scheduler that a few-step pipeline of this parametrisation is saved with; it takes the pipeline's timesteps.

    It starts from unit Gaussian noise, and its last step goes to clean data. Deterministic: DDIM (the first-order
    DPM-Solver++, which unlike diffusers' DDIMScheduler takes timesteps), or Euler along the flow.

    Args:
        stochastic: every step but the last adds fresh noise to the predicted clean sample.
    """
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

    if prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(stochastic_sampling=stochastic)
    betas = {
        "num_train_timesteps": TRAIN_TIMESTEPS,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
    }
    if stochastic:
        # Every timestep may be one of the schedule; the scaling makes the skip connection of consistency models vanish.
        return LCMScheduler(**betas, clip_sample=False, original_inference_steps=TRAIN_TIMESTEPS, timestep_scaling=1e6)
    return DPMSolverMultistepScheduler(
        **betas, solver_order=1, algorithm_type="dpmsolver++", final_sigmas_type="zero", timestep_spacing="trailing"
    )
