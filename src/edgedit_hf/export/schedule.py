"""A diffusers scheduler as numbers: what a step computes, without diffusers.

A deterministic scheduler without clipping is linear. With x_i the sample before step i and m_i the (guided) prediction
for `scale_i · x_i` at timestep t_i, every step is

    x_{i+1} = Σ_j A_ij x_j + Σ_j B_ij m_j,   j ≤ i,

one-step solvers with j = i alone, multistep ones with a few older j too. [`linear_schedule`] finds the coefficients by
probing: the scheduler itself steps through its timesteps once with an "image" of 2S pixels for S steps, x_i the i-th
basis vector and m_i the (S + i)-th, so that the pixels of what it returns are the coefficients. A random loop then
shows that the scheduler does nothing else.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import EdgeDiTError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

TOLERANCE = 1e-4  # of the random loop, relative to the largest term of a sum; schedulers compute in float32
NEGLIGIBLE = 1e-9  # relative to a step's largest coefficient: far below what float32 resolves
SIDE = 8  # pixels a side of the random loop
# Schedulers that add noise, and the nearest that do not.
WITHOUT_NOISE = {
    "DDPMScheduler": "DDIMScheduler",
    "DDPMParallelScheduler": "DDIMScheduler",
    "EulerAncestralDiscreteScheduler": "EulerDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler": "KDPM2DiscreteScheduler",
    "LCMScheduler": "DPMSolverMultistepScheduler with solver_order=1",  # DDIM, at the same timesteps
    "TCDScheduler": "DDIMScheduler",
    "FlowMatchLCMScheduler": "FlowMatchEulerDiscreteScheduler",
    "DPMSolverSDEScheduler": "DPMSolverMultistepScheduler",
}


@dataclass(frozen=True)
class Step:
    """One evaluation of the denoiser and the update that follows it.

    Args:
        timestep: what the denoiser is given.
        input_scale: the denoiser sees `input_scale · x_i`.
        samples: A_ij by j, no zeros. predictions: B_ij by j, no zeros.
    """

    timestep: float
    input_scale: float
    samples: dict[int, float]
    predictions: dict[int, float]


@dataclass(frozen=True)
class Schedule:
    """Sampling as numbers.

    Args:
        scheduler: name of the class that it was read from.
        init_noise_sigma: x_0 is standard normal noise times this.
        steps: in order.
        sigmas: the scheduler's noise levels, for information; `None` if it has none.
    """

    scheduler: str
    init_noise_sigma: float
    steps: tuple[Step, ...]
    sigmas: tuple[float, ...] | None

    @property
    def history(self) -> int:
        """Samples and predictions that a loop must keep besides the current ones."""
        return max(index - old for index, step in enumerate(self.steps) for old in (*step.samples, *step.predictions))

    def sample(self, noise: Any, predict: Callable[[int, Any], Any]) -> Any:
        """The whole loop on any arrays.

        Args:
            noise: standard normal. predict: `(step, scaled input) → guided prediction`.
        """
        samples, predictions = [noise * self.init_noise_sigma], []
        for index, step in enumerate(self.steps):
            predictions.append(predict(index, samples[index] * step.input_scale))
            terms = [(samples, step.samples), (predictions, step.predictions)]
            samples.append(sum(factor * values[old] for values, factors in terms for old, factor in factors.items()))
        return samples[-1]

    def to_json(self) -> dict[str, Any]:
        """Plain values; coefficients as `[j, factor]` pairs."""
        return {
            "scheduler": self.scheduler,
            "init_noise_sigma": self.init_noise_sigma,
            "history": self.history,
            "sigmas": None if self.sigmas is None else list(self.sigmas),
            "steps": [
                {
                    "timestep": step.timestep,
                    "input_scale": step.input_scale,
                    "x": [[old, factor] for old, factor in step.samples.items()],
                    "m": [[old, factor] for old, factor in step.predictions.items()],
                }
                for step in self.steps
            ],
        }


class NotLinearError(EdgeDiTError):
    """A scheduler is more than coefficients."""


def linear_schedule(scheduler: SchedulerMixin) -> Schedule:
    """The coefficients of a scheduler whose timesteps are set; it is left as it is.

    Raises:
        NotLinearError: the scheduler adds noise, or clips or thresholds, or cannot be run on its own.
    """
    name, count = type(scheduler).__name__, len(scheduler.timesteps)
    check_timesteps(scheduler)
    basis = torch.eye(2 * count, dtype=torch.float64).view(2 * count, 1, 1, 1, 2 * count)
    init_noise_sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))
    outputs, scaled = _step_through(scheduler, list(basis[:count]), list(basis[count:]))
    steps = []
    for index, (output, image) in enumerate(zip(outputs, scaled)):
        factors = output.flatten().tolist()
        threshold = NEGLIGIBLE * max(map(abs, factors))
        kept = {place: factor for place, factor in enumerate(factors) if abs(factor) > threshold}
        samples = {place: factor for place, factor in kept.items() if place < count}
        predictions = {place - count: factor for place, factor in kept.items() if place >= count}
        steps.append(Step(float(scheduler.timesteps[index]), float(image.flatten()[index]), samples, predictions))
    sigmas = getattr(scheduler, "sigmas", None)
    sigmas = (
        tuple(float(sigma) for sigma in sigmas) if sigmas is not None and len(sigmas) in (count, count + 1) else None
    )
    schedule = Schedule(name, init_noise_sigma, tuple(steps), sigmas)
    _check(scheduler, schedule)
    return schedule


def check_timesteps(scheduler: SchedulerMixin) -> None:
    """Raise if the timesteps or noise levels of a scheduler whose timesteps are set are not finite.

    A schedule that is stretched to end at `shift_terminal` needs two points: of one step, diffusers divides 0 by 0.
    """
    for name in ("timesteps", "sigmas"):
        values = getattr(scheduler, name, None)
        if values is not None and not torch.isfinite(torch.as_tensor(values, dtype=torch.float64)).all():
            count, terminal = len(scheduler.timesteps), scheduler.config.get("shift_terminal")
            stretched = f" with shift_terminal={terminal}" if terminal else ""
            remedy = (
                "take two steps or more, or make it with shift_terminal=None"
                if terminal and count == 1
                else "choose another number of steps"
            )
            found = torch.as_tensor(values).tolist()
            raise EdgeDiTError(
                f"{type(scheduler).__name__}{stretched} has {name} that are not finite for {count} step(s) ({found}); "
                f"{remedy}."
            )


def _step_through(
    scheduler: SchedulerMixin, samples: list[torch.Tensor], predictions: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a copy of the scheduler returns for every step, and its scaled inputs, given samples and predictions of
    every step, float64.
    """
    scheduler = copy.deepcopy(scheduler)
    options: dict[str, Any] = {"return_dict": False}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(0)
    outputs, scaled = [], []
    try:
        for timestep, sample, prediction in zip(scheduler.timesteps, samples, predictions):
            scaled.append(
                scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
            )
            outputs.append(scheduler.step(prediction, timestep, sample, **options)[0].double())
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise NotLinearError(
            f"{type(scheduler).__name__} does not step through its timesteps on its own ({error}); use DDIMScheduler, "
            "or FlowMatchEulerDiscreteScheduler for flow matching."
        ) from error
    return outputs, scaled


def _check(scheduler: SchedulerMixin, schedule: Schedule) -> None:
    """Compare a random loop with the coefficients, and see whether nothing stays nothing."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(schedule.steps), 1, 1, SIDE, SIDE)
    first = schedule.init_noise_sigma
    samples, predictions = (list(torch.randn(shape, generator=generator, dtype=torch.float64)) for _ in range(2))
    samples = [sample * first for sample in samples]
    outputs, scaled = _step_through(scheduler, samples, predictions)
    worst = 0.0
    for index, step in enumerate(schedule.steps):
        terms = [factor * samples[old] for old, factor in step.samples.items()]
        terms += [factor * predictions[old] for old, factor in step.predictions.items()]
        largest = max((float(term.abs().max()) for term in terms), default=0.0) or 1.0
        worst = max(worst, float((sum(terms) - outputs[index]).abs().max()) / largest)
        error = (samples[index] * step.input_scale - scaled[index]).abs().max()
        worst = max(worst, float(error / scaled[index].abs().max().clamp(min=torch.finfo(torch.float64).tiny)))
    if worst <= TOLERANCE:
        return
    zeros = [torch.zeros(1, 1, SIDE, SIDE, dtype=torch.float64)] * len(schedule.steps)
    noisy = any(bool(output.any()) for output in _step_through(scheduler, zeros, zeros)[0])
    raise NotLinearError(
        f"{type(scheduler).__name__} is not linear in samples and predictions (off by {worst:.0e} of them, "
        f"{TOLERANCE:.0e} is allowed): {_reason(scheduler, noisy)}."
    )


def _reason(scheduler: SchedulerMixin, noisy: bool) -> str:
    """Why a scheduler is not linear, and what to use instead."""
    name, config = type(scheduler).__name__, scheduler.config
    if noisy:
        if str(config.get("algorithm_type")).startswith("sde-"):
            plain = config.algorithm_type.removeprefix("sde-")
            return (
                f"it adds noise in every step (algorithm_type {config.algorithm_type!r}); make it with "
                f"algorithm_type={plain!r}"
            )
        if config.get("stochastic_sampling"):
            return "it adds noise in every step (stochastic_sampling=True); make it with stochastic_sampling=False"
        flow = name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"
        other = WITHOUT_NOISE.get(name, "FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler")
        return f"it adds noise in every step; use {other}"
    for option in ("thresholding", "clip_sample"):
        if config.get(option):
            return f"it clips what it takes for the image ({option}=True); make it with {option}=False"
    return "use DDIMScheduler, or FlowMatchEulerDiscreteScheduler for flow matching"
