"""Which layers of a 4-bit export need 8 bits, so that its images stay as good as was asked.

The network's layers are ranked by what the output loses when each alone is quantised ([`sensitivity.replaced_weight_error`]), a bit spent; then
whole images are sampled with the weights of both widths simulated, and the shortest beginning of the ranking that reaches the goal is found by
bisection.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import EdgeDiTError
from ..launch import with_transformer
from ..metrics.generative import psnr
from ..quantization.affine import quantize_affine
from ..quantization.calibration import record, replay
from ..quantization.sensitivity import replaced_weight_error
from ..quantization.weights import AffineWeight
from .verify import PROMPTS, sampling_arguments

GROUP = 32  # inputs that share a scale in 4 bits, in every runtime
MIN_ELEMENTS = 1024  # smaller layers are not quantised
RANKING_CALLS = 6  # forwards, spread over the timesteps, that the ranking is measured at


def four_bit_weights(model: nn.Module, given: Mapping[str, Any]) -> dict[str, AffineWeight]:
    """The 4-bit form of every linear layer that an export quantises: the given one, or the nearest symmetric grid in groups of [`GROUP`]."""
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer.weight.numel() >= MIN_ELEMENTS:
            found = given.get(name)
            weights[name] = found if isinstance(found, AffineWeight) else quantize_affine(layer.weight.detach(), 4, GROUP, symmetric=True)
    return weights


@torch.no_grad()
def choose_8bit(
    pipeline: Any, weights: Mapping[str, AffineWeight], goal_db: float, *, seed: int = 0, images: int = 4, prompts: Sequence[str] | None = None
) -> list[str]:
    """Names of the layers that need 8 bits, in the network's order; none if 4 bits reach the goal everywhere.

    Args:
        pipeline: the eager pipeline, plain float32 weights.
        weights: [`four_bit_weights`].
        goal_db: least peak signal-to-noise ratio of the images of the whole loop.
        seed: image i starts from the noise of seed + i. images: how many are compared. prompts: of text to image.

    Raises:
        EdgeDiTError: even 8 bits everywhere do not reach the goal.
    """
    model = copy.deepcopy(pipeline.transformer)
    simulated = with_transformer(pipeline, model)
    original = {name: model.get_submodule(name).weight.detach().clone() for name in weights}
    asked = sampling_arguments(pipeline, images, prompts)

    def sample() -> Any:
        simulated.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(images)]
        return simulated(**asked, generator=generators, output_type="np").images

    def quality(kept: set[str]) -> float:
        for name, weight in weights.items():
            if name in kept:
                value = quantize_affine(original[name], 8, GROUP, symmetric=True).dequantize()
            else:
                value = weight.dequantize()
            model.get_submodule(name).weight.copy_(value)
        return psnr(sample(), reference, data_range=1.0)

    reference = sample()
    if quality(set()) >= goal_db:
        return []
    for name, value in original.items():
        model.get_submodule(name).weight.copy_(value)
    ranking = _ranking(simulated, weights, seed, prompts)
    low, high = 0, len(ranking)  # 8 bits for the first `low` do not reach the goal; for the first `high` they do
    best = quality(set(ranking))
    if best < goal_db:
        raise EdgeDiTError(f"The images reach {best:.1f} dB with 8 bits in every layer; {goal_db:.1f} dB were asked. Export at a higher precision.")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if quality(set(ranking[:middle])) >= goal_db else (middle, high)
    kept = set(ranking[:high])
    return [name for name in weights if name in kept]


def _ranking(pipeline: Any, weights: Mapping[str, AffineWeight], seed: int, prompts: Sequence[str] | None) -> list[str]:
    """The layers, the one with the largest squared error a weight first."""
    model = pipeline.transformer
    calls = record(pipeline, 2, seed=seed, prompts=list(prompts or PROMPTS)).calls
    calls = calls[:: max(1, math.ceil(len(calls) / RANKING_CALLS))]
    references = [replay(model, call) for call in calls]
    errors = {}
    for name, weight in weights.items():
        error = replaced_weight_error(model, name, weight.dequantize(), calls, references)
        errors[name] = error.mean_mse / math.prod(weight.shape)
    return sorted(errors, key=errors.get, reverse=True)
