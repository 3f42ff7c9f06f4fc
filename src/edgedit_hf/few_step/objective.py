"""What a training step of few-step distillation minimises: the losses of [`losses`] on what the networks say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..diffusion import TRAIN_TIMESTEPS, Diffusion
from ..run.sections import FewStepConfig
from .diagnosis import agreement_of_scores
from .knowledge import Knowledge
from .losses import guidance_gradient, knowledge_weight, matching_gradient, moments_loss, pull
from .networks import CRITIC, REAL, STUDENT
from .schedule import at, shifted, walk
from .source import Piece, Source

MATCHING_STREAM, GUIDANCE_STREAM, CRITIC_STREAM, NOISE_STREAM = 32, 33, 34, 40
"""Tell the noise of the terms apart; a sampler that noises anew has the last one for its first step, and so on."""

LEAST_NOISE = 0.02
"""Least noise level, and what is left to the greatest, at which scores are compared: at 0 and 1 they say nothing."""


class Objective:
    """Losses of student and critic on a micro-batch.

    Args:
        networks: [`Networks`], as `accelerator.prepare` returned them. data_moments: of the data, `(C,)` each.
    """

    def __init__(
        self,
        networks: Any,
        source: Source,
        options: FewStepConfig,
        knowledge: Knowledge | None,
        data_moments: tuple[torch.Tensor, torch.Tensor],
        seed: int,
    ) -> None:
        self.networks, self.source, self.options, self.knowledge = networks, source, options, knowledge
        self.diffusion: Diffusion = source.diffusion
        self.data_moments, self.seed = data_moments, seed
        guided = source.real_guidance > 1
        self.decoupled = guided and (options.decoupled if options.decoupled is not None else True)

    # ---------------------------------------------------------------- noise levels

    def _timesteps(self, u: torch.Tensor, most: float) -> torch.Tensor:
        """Timesteps `(B,)` up to `most` of uniform numbers: uniform in s before the shift (flow), or in t (DDPM)."""
        top = most / TRAIN_TIMESTEPS
        least = min(LEAST_NOISE, top)
        if self.diffusion.prediction_type == "epsilon":
            return ((least + u * (top - least)) * TRAIN_TIMESTEPS).long()
        shift = self.options.shift
        level = shifted(u * shifted(top, 1 / shift), shift)
        return TRAIN_TIMESTEPS * level.clamp(least, 1 - LEAST_NOISE)

    # ---------------------------------------------------------------- the student

    def student_input(self, piece: Piece, step: int, k: int, width: str | None) -> torch.Tensor:
        """x at the student's k-th timestep, on its own way there; without gradient."""

        def output_of(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.networks(STUDENT, x, t, piece.condition, subnet=width)[0]

        def fresh(index: int) -> torch.Tensor:
            return piece.draws(self.seed, step, NOISE_STREAM + index).noise

        noisy = self.options.sampler == "sde"
        with torch.no_grad():
            return walk(output_of, self.diffusion, piece.noise, self.source.timesteps, k, fresh if noisy else None)

    def sample(self, piece: Piece, x_t: torch.Tensor, k: int, width: str | None) -> torch.Tensor:
        """x0 that the student takes from its k-th step; without gradient, for the critic."""
        t = self._at(k, x_t)
        with torch.no_grad():
            output, _ = self.networks(STUDENT, x_t, t, piece.condition, subnet=width)
        return self.diffusion.predict_x0(output, x_t, t)

    def _at(self, k: int, like: torch.Tensor) -> torch.Tensor:
        return at(self.source.timesteps, k, like.device).expand(len(like))

    def moments(self, pieces: Sequence[Piece], step: int, k: int, width: str | None, accelerator: Any) -> Any:
        """Moments of x0 over all pieces and processes, as [`moments_loss`] takes them; `None`: one piece is the batch,
        or they are not asked for.
        """
        if not self.options.moments_weight or len(pieces) * accelerator.num_processes == 1:
            return None
        sums: Any = 0.0
        for piece in pieces:
            with accelerator.autocast():
                x0 = self.sample(piece, self.student_input(piece, step, k, width), k, width)
            values = x0.double().transpose(0, 1).flatten(1)
            sums = sums + torch.stack(
                [torch.full_like(values[:, 0], values.shape[1]), values.sum(1), values.square().sum(1)]
            )
        count, total, squares = accelerator.reduce(sums, reduction="sum")
        mean = total / count
        std = ((squares - count * mean.square()) / (count - 1)).sqrt().clamp(min=1e-6)
        return mean.float(), std.float(), int(count[0])

    def student_loss(
        self, piece: Piece, x_t: torch.Tensor, step: int, k: int, width: str | None, whole: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Loss, 0-d, x0 `(B, C, H, W)` without gradient, and figures to log.

        Args:
            whole: from [`moments`].
        """
        options, timesteps = self.options, self.source.timesteps
        t = self._at(k, x_t)
        wants = self.knowledge is not None and options.feature_weight > 0
        output, tokens = self.networks(STUDENT, x_t, t, piece.condition, features=wants, subnet=width)
        x0 = self.diffusion.predict_x0(output, x_t, t)
        figures: dict[str, Any] = {}
        loss = x0.new_zeros(())
        if self.knowledge is not None:
            to = timesteps[k + 1] if k + 1 < len(timesteps) else None
            velocity = self.diffusion.predict_velocity(output, x_t, t)
            distance, said = self.knowledge.loss(velocity, tokens, piece, x_t, timesteps[k], to)
            level = self.diffusion.noise_level
            first, least = (level(at(timesteps, place, x_t.device)) for place in (0, len(timesteps) - 1))
            weight = knowledge_weight(level(t), first, least, options.knowledge_last)
            loss = loss + options.knowledge_weight * (weight * distance).mean()
            figures |= said
        if options.matching_weight:
            gradient, said = self.matching(piece, x0.detach(), step, k, width)
            matching = pull(x0, gradient).mean()
            loss = loss + options.matching_weight * matching
            figures |= {"matching": matching.detach(), **said}
        if options.moments_weight:
            drift = moments_loss(x0, *self.data_moments, whole)
            loss = loss + options.moments_weight * drift
            figures["moments"] = drift.detach()
        return loss, x0.detach(), figures

    @torch.no_grad()
    def matching(
        self, piece: Piece, x0: torch.Tensor, step: int, k: int, width: str | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The gradient of the student's sample, `(B, C, H, W)`, and how critic and real score agree."""
        source, floor = self.source, self.options.norm_floor
        drawn = piece.draws(self.seed, step, MATCHING_STREAM)
        t = self._timesteps(drawn.time, source.timesteps[0])
        noisy = self.diffusion.noisy(x0, drawn.noise, t)
        scale = 1.0 if self.decoupled else source.real_guidance
        real, _ = self.networks(
            *(REAL, noisy, t, piece.condition, piece.null),
            guidance_scale=scale,
            guided_channels=source.guided_channels,
            subnet=width,
        )
        fake, _ = self.networks(CRITIC, noisy, t, piece.condition, subnet=width)
        x0_of = self.diffusion.predict_x0
        gradient = matching_gradient(x0, x0_of(real, noisy, t), x0_of(fake, noisy, t), floor)
        velocity_of = self.diffusion.predict_velocity
        figures = agreement_of_scores(velocity_of(real, noisy, t), velocity_of(fake, noisy, t))
        if self.decoupled:
            drawn = piece.draws(self.seed, step, GUIDANCE_STREAM)
            t = self._timesteps(drawn.time, source.timesteps[k])  # cleaner than what the student saw
            noisy = self.diffusion.noisy(x0, drawn.noise, t)
            with_, _ = self.networks(REAL, noisy, t, piece.condition, subnet=width)
            without, _ = self.networks(REAL, noisy, t, piece.null, subnet=width)
            guidance = guidance_gradient(
                x0, x0_of(with_, noisy, t), x0_of(without, noisy, t), source.real_guidance, floor
            )
            if source.guided_channels is not None:
                guidance[:, source.guided_channels :] = 0
            gradient = gradient + guidance
        return gradient, figures

    # ---------------------------------------------------------------- the critic

    def critic_loss(self, piece: Piece, x0: torch.Tensor, step: int, width: str | None) -> torch.Tensor:
        """The critic's own diffusion loss on the student's samples, 0-d."""
        drawn = piece.draws(self.seed, step, CRITIC_STREAM)
        t = self.diffusion.timesteps(drawn.time)
        noisy = self.diffusion.noisy(x0, drawn.noise, t)
        output, _ = self.networks(CRITIC, noisy, t, piece.condition, subnet=width)
        return self.diffusion.loss(output, x0, drawn.noise, t).mean()
