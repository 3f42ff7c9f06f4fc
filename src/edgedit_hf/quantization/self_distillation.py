"""What makes up for quantised weights: biases, norms and modulation, tuned so that the network's output is the
unquantised one's again.

SnapGen++ (arXiv:2601.08303, supplement): the weights stay frozen. The loss is the distance to the unquantised network's
prediction for the same input ([`distill.output_loss.output_loss`]); the inputs are the unquantised network's own
samples with noise added, so no data set is needed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..data.text_table import TextTable
from ..diffusion import Diffusion, draws, drop_labels
from ..run.optimisation import check_names

SAMPLE_STREAM, SUBNET_STREAM, POOL_STREAM = (
    22,
    23,
    24,
)  # of `diffusion.draws`: which samples, which sub-network, and noise of the samples


def tuned_parameters(model: nn.Module, quantized: Collection[str]) -> dict[str, nn.Parameter]:
    """The parameters that self-distillation tunes, by name: biases, norms, and what makes modulations (their tables,
    and their weights where they are not quantised).

    Args:
        quantized: names of the quantised layers, whose weights stay as they are.
    """
    frozen = {f"{name}.weight" for name in quantized}
    norms = {
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm))
    }

    def tuned(name: str) -> bool:
        return name.endswith(".bias") or "modulation" in name or any(name.startswith(norm) for norm in norms)

    return {name: parameter for name, parameter in model.named_parameters() if name not in frozen and tuned(name)}


class TunedState:
    """The tuned parameters as a part of a checkpoint (pass it to [`RunState.track`])."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Name → values."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy the values in; an EdgeDiTError if they are of other parameters."""
        check_names(
            "tuned weights",
            *({name: tensor.shape for name, tensor in values.items()} for values in (state, self.parameters)),
        )
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])


class StepDraws(NamedTuple):
    """Random numbers of a step for some rows of its batch, functions of (seed, step, row).

    Args:
        samples: `(B,)` numbers of the samples that noise is added to.
        time, drop: `(B,)` uniform in (0, 1). noise: `(B, *shape)`.
    """

    samples: torch.Tensor
    time: torch.Tensor
    drop: torch.Tensor
    noise: torch.Tensor


def step_draws(seed: int, step: int, rows: Sequence[int], shape: Sequence[int], samples: int) -> StepDraws:
    """Draws of a step's rows from `samples` samples of this shape."""
    which = (draws(seed, step, rows, (1,), stream=SAMPLE_STREAM).time * samples).long().clamp(max=samples - 1)
    return StepDraws(which, *draws(seed, step, rows, shape))


def step_subnet(names: Sequence[str], seed: int, step: int) -> str | None:
    """The sub-network that a step tunes, drawn uniformly from all (`None` of a stand-alone net)."""
    if not names:
        return None
    generator = np.random.Generator(
        np.random.Philox(key=np.array([seed, SUBNET_STREAM], dtype=np.uint64), counter=[0, 0, step, 0])
    )
    return names[int(generator.integers(len(names)))]


class SamplePool(NamedTuple):
    """The unquantised network's samples.

    Args:
        latents: `(S, C, H, W)`.
        labels: `(S,)`, of a class-conditional network.
        texts: of text to image, the encoded prompts: sample i has the i-th, from the first again where there are fewer.
    """

    latents: torch.Tensor
    labels: torch.Tensor | None = None
    texts: TextTable | None = None

    def condition(self, drawn: StepDraws, dropout: float, num_classes: int) -> dict[str, Any]:
        """Keyword arguments of the transformer for the drawn samples; a share `dropout` goes without label or any text,
        as guidance needs it.
        """
        if self.labels is not None:
            return {"class_labels": drop_labels(self.labels[drawn.samples], drawn.drop, dropout, num_classes)}
        if self.texts is None:
            return {}
        embeds, masks = self.texts.batch(drawn.samples % len(self.texts))
        kept = (drawn.drop >= dropout)[:, None]
        return {
            "encoder_hidden_states": embeds,
            "encoder_attention_mask": [None if mask is None else mask & kept for mask in masks],
        }


class MicroBatch(NamedTuple):
    """What both networks see: `noisy` `(B, C, H, W)`, `t` `(B,)`, and the condition as keyword arguments."""

    noisy: torch.Tensor
    t: torch.Tensor
    condition: dict[str, Any]


def micro_batch(
    pool: SamplePool,
    diffusion: Diffusion,
    seed: int,
    step: int,
    rows: Sequence[int],
    dropout: float,
    num_classes: int,
    timesteps: Sequence[float] | None = None,
) -> MicroBatch:
    """Noised samples and their condition for these rows of a step's batch.

    Args:
        timesteps: the only ones that the network is ever asked at, drawn uniformly; `None`: as in its training.
    """
    drawn = step_draws(seed, step, rows, pool.latents.shape[1:], len(pool.latents))
    t = diffusion.timesteps(drawn.time)
    if timesteps is not None:
        t = torch.tensor(timesteps)[(drawn.time * len(timesteps)).long()].to(t.dtype)
    noisy = diffusion.noisy(pool.latents[drawn.samples], drawn.noise, t)
    return MicroBatch(noisy, t, pool.condition(drawn, dropout, num_classes))


def on_device(value: Any, device: torch.device) -> Any:
    """A tensor, or nested dicts and lists of tensors and `None`, on a device."""
    if isinstance(value, dict):
        return {name: on_device(part, device) for name, part in value.items()}
    if isinstance(value, list):
        return [on_device(part, device) for part in value]
    return None if value is None else value.to(device)


def verdicts(found: Mapping[str, Any], start: Any) -> Iterator[str]:
    """A line a width: the output's ratio of signal to error before and after, and what to do where it fell.

    Args:
        found: the content of `quantization.json`. start: the folder of the untuned pipeline.
    """
    for width, error in found["error"]["tuned"].items():
        # No ratio (`None`): there is no error at all.
        before, after = (
            math.inf if ratio is None else ratio
            for ratio in (found["error"]["untuned"][width]["sqnr_db"], error["sqnr_db"])
        )
        better = f"; {start} is the better one: lower quantize.learning_rate or give more steps"
        yield (
            f"{width}: {found['average_bits']:.2f} bits, output {before:.1f} dB → {after:.1f} dB above the "
            f"quantisation error{better if after < before else ''}"
        )
