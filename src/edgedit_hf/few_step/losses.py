"""Losses of few-step distillation, pure functions: distribution matching (DMD, Yin et al., arXiv:2311.18828), its
decoupled form (arXiv:2511.22677), knowledge of a multi-step teacher (SnapGen++, arXiv:2601.08303, section 3.3), and a
guard of the samples' moments.

All work on x0 or on velocities ε − x0, so that both families share them; [`Diffusion`] converts. The sign: a critic
that calls a sample cleaner data than the real score does has learned that the student makes too much of it, so the
sample moves by real − fake in x0. In velocities the order flips, as x0 = x − σ v.

Shapes: samples, x0 and velocities `(B, C, H, W)`; noise levels and losses `(B,)`.
"""

from __future__ import annotations

import torch


def _per_sample(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(1).mean(1)


def _normaliser(x0: torch.Tensor, real: torch.Tensor, floor: float) -> torch.Tensor:
    distance = _per_sample((x0 - real).abs()).clamp(min=floor)
    return distance.view(-1, *(1,) * (x0.ndim - 1))


@torch.no_grad()
def matching_gradient(x0: torch.Tensor, real: torch.Tensor, fake: torch.Tensor, floor: float) -> torch.Tensor:
    """Gradient of the distribution matching loss by the student's sample (DMD, eq. 7-8): (x̂_fake − x̂_real) / n, where n
    is the sample's mean |x0 − x̂_real|, at least `floor`: where both agree to less, dividing would blow up rounding
    errors.

    Args:
        x0: the student's sample. real, fake: what the real score and the critic take for x0 in the same noisy x0.
    """
    return (fake - real) / _normaliser(x0, real, floor)


@torch.no_grad()
def guidance_gradient(
    x0: torch.Tensor,
    conditional: torch.Tensor,
    unconditional: torch.Tensor,
    guidance_scale: float,
    floor: float,
) -> torch.Tensor:
    """The guidance term of decoupled distribution matching: −(w − 1) (x̂_cond − x̂_uncond) / n of the real score at a
    noise level of its own, which is cleaner than the student's input; n as in [`matching_gradient`] of the conditional.

    Beside it [`matching_gradient`] takes the unguided real score.
    """
    return -(guidance_scale - 1) * (conditional - unconditional) / _normaliser(x0, conditional, floor)


def pull(x0: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """½ ‖x0 − sg(x0 − g)‖², a mean over the elements: a loss whose gradient by x0 is g (over their number)."""
    return 0.5 * _per_sample((x0 - (x0 - gradient).detach()).square())


def chord(x_t: torch.Tensor, x_s: torch.Tensor, level_t: torch.Tensor, level_s: torch.Tensor) -> torch.Tensor:
    """Velocity of the straight line that leads from x_t to x_s on the flow's path: (x_t − x_s) / (σ_t − σ_s).

    Args:
        x_t, x_s: on the flow's path, (1 − σ) x0 + σ ε (see [`on_flow`]). level_t, level_s: their noise levels.
    """
    shape = (-1, *(1,) * (x_t.ndim - 1))
    return (x_t - x_s) / (level_t - level_s).view(shape)


def on_flow(x_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x_t = α x0 + σ ε as the flow has it at the same signal-to-noise ratio: x_t / (α + σ)."""
    return x_t / (alpha + sigma)


def knowledge_loss(velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """‖v_teacher − v_student‖² as a mean over the elements (SnapGen++, eq. 6 with a teacher that needs few steps)."""
    return _per_sample((velocity.float() - target.detach().float()).square())


def knowledge_weight(
    level: torch.Tensor, first: torch.Tensor | float, least: torch.Tensor | float, last: float
) -> torch.Tensor:
    """Weight of the knowledge by noise level: 1 at the first step's level, `last` at the last step's, linear between:
    the teacher holds what the first steps decide, distribution matching has the last ones.

    Args:
        level: of the student's input. first, least: of the first and the last step's input (one step: the same).
    """
    if float(least) >= float(first):
        return torch.ones_like(level)
    return last + (1 - last) * ((level - least) / (first - least)).clamp(0, 1)


def moments_loss(
    x0: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    whole: tuple[torch.Tensor, torch.Tensor, int] | None = None,
) -> torch.Tensor:
    """KL of the Gaussian with the batch's moments from that with the data's, a mean over the channels, 0-d: log(S/s) +
    (s² + (m − M)²) / 2S² − ½. It holds the mean and the contrast, which distribution matching alone lets drift.

    Args:
        x0: samples. mean, std: `(C,)`, the data's of every channel.
        whole: mean and std of the batch that the samples are a piece of, and how many values a channel has there. The
            gradients of equal pieces then have the batch's as their mean.
    """
    values = x0.float().transpose(0, 1).flatten(1)  # [C, B·H·W]
    if whole is None:
        own_mean, own_std = values.mean(1), values.std(1).clamp(min=1e-6)
    else:
        own_mean, own_std, count = whole
        shift = values.mean(1) - own_mean
        spread = (values - own_mean[:, None]).square().mean(1) * count / (count - 1) - own_std.square()
        own_mean = own_mean + (shift - shift.detach())  # their values, with the gradient by this piece
        own_std = own_std + (spread - spread.detach()) / (2 * own_std)
    kl = (std / own_std).log() + (own_std.square() + (own_mean - mean).square()) / (2 * std.square()) - 0.5
    return kl.mean()
