"""Whether few-step distillation works, in figures and words. Its losses do not say: that of distribution matching is
constant by construction, the critic's follows the student.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

GAP_RISE, COSINE_FALL, STD_RISE = 1.25, 0.02, 1.03
"""A gap that has grown by a quarter; a cosine that has fallen by .02; a contrast that has grown by 3 %."""

CRITIC_LAGS, GUIDANCE_TOO_STRONG = "critic lags", "guidance too strong"


@torch.no_grad()
def agreement_of_scores(real: torch.Tensor, fake: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far the critic is from the real score: relative gap rms(v_fake − v_real) / rms(v_real), and the cosine of
    both, 0-d.

    Args:
        real, fake: velocities `(B, C, H, W)` for the same noisy samples.
    """
    gap = (fake - real).square().mean().sqrt() / real.square().mean().sqrt().clamp(min=1e-12)
    return {"gap": gap, "cosine": torch.cosine_similarity(fake.flatten(1), real.flatten(1)).mean()}


class Diagnosis:
    """Two rules on how gap, cosine and contrast move from the first measurement to the running mean of late ones.

    - gap up and cosine down: the critic does not follow the student ("critic lags"): raise its rate, or update the
      student less often.
    - gap up, cosine as it was, contrast up: the real score pulls further than the data are ("guidance too strong").

    Part of a checkpoint, so that a run which is continued says the same; of several processes the main one's counts.

    Args:
        keep: share of the running mean that a measurement leaves.
    """

    def __init__(self, keep: float = 0.8) -> None:
        self.keep = keep
        self.first: dict[str, float] = {}
        self.now: dict[str, float] = {}
        self.seen: dict[str, Any] = {}

    def see(self, **figures: torch.Tensor) -> None:
        """Another step's `gap` and `cosine`, 0-d; [`update`] takes their means."""
        values = {name: value.detach().double() for name, value in figures.items()} | {"count": 1.0}
        self.seen = {name: value + self.seen.get(name, 0.0) for name, value in values.items()}

    def update(self, std: float) -> str:
        """What is wrong after samples of this contrast and what was seen since the last ones, in words; empty: nothing
        is, or nothing was seen.
        """
        count = self.seen.pop("count", 0.0)
        figures = {name: float(total) / count for name, total in self.seen.items()} | {"std": std}
        self.seen = {}
        if not count:
            return ""
        if not self.first:
            self.first = dict(figures)
        before = self.now or figures
        self.now = {name: self.keep * before[name] + (1 - self.keep) * value for name, value in figures.items()}
        if self.now["gap"] < GAP_RISE * self.first["gap"]:
            return ""
        if self.now["cosine"] < self.first["cosine"] - COSINE_FALL:
            return CRITIC_LAGS
        return GUIDANCE_TOO_STRONG if self.now["std"] > STD_RISE * self.first["std"] else ""

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        seen = {name: float(total) for name, total in self.seen.items()}
        return {"first": dict(self.first), "now": dict(self.now), "seen": seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what [`state_dict`] gave."""
        self.first, self.now, self.seen = (dict(state[name]) for name in ("first", "now", "seen"))


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of all values, and of every channel `(C,)`."""

    mean: float
    std: float
    channel_mean: torch.Tensor
    channel_std: torch.Tensor

    @classmethod
    def of(cls, images: torch.Tensor) -> Moments:
        """Of images or latents `(n, C, H, W)`."""
        values = images.double()
        by_channel = values.transpose(0, 1).flatten(1)
        return cls(float(values.mean()), float(values.std()), by_channel.mean(1).float(), by_channel.std(1).float())

    def drift_to(self, other: Moments) -> tuple[float, float]:
        """(difference of the means in standard deviations, relative difference of the standard deviations)."""
        return (other.mean - self.mean) / self.std, other.std / self.std - 1


def drift_message(real: Moments, samples: Moments, mean_drift: float, std_drift: float) -> str | None:
    """What to tell whose samples have drifted from the data by more than is allowed; `None`: they have not."""
    mean, std = real.drift_to(samples)
    if abs(mean) > mean_drift:
        return (
            f"the samples' mean has drifted to {samples.mean:.3f}, the data's is {real.mean:.3f}: {abs(mean):.2f} of "
            f"their standard deviation, {mean_drift:g} is allowed (few_step.mean_drift)"
        )
    if abs(std) > std_drift:
        return (
            f"the samples' standard deviation has drifted to {samples.std:.3f}, the data's is {real.std:.3f}: "
            f"{100 * abs(std):.0f} % off, {100 * std_drift:g} % is allowed (few_step.std_drift)"
        )
    return None
