"""Which layers of a 4-bit export need 8 bits, so that its images stay as good as was asked.

The network's layers are ranked by what the output loses when each alone is quantised, a weight; then whole images are
sampled with the layers of both widths simulated, and the shortest beginning of the ranking that reaches the goal is
found by bisection. A simulation is what the runtime makes of a layer: [`nearest_form`] of ONNX Runtime's MatMulNBits,
[`xnnpack_weights`] of XNNPACK, which also rounds activations to 8 bits a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import EdgeDiTError
from ..metrics.distances import psnr
from ..pipelines.loading import with_transformer
from ..quantization.affine import quantize_affine
from ..quantization.calibration import output_error, record, replay, spread
from ..quantization.weights import AffineWeight
from .executorch.lower import given_weight, linear_scheme, quantized_weight
from .executorch.xnnpack import FormLinear
from .onnx.lowbit import GROUP, MIN_QUANTIZED_ELEMENTS
from .parts import share
from .verify import PROMPTS, sampling_arguments

TIMESTEPS = 4  # that the ranking is measured at
Form = Callable[[str, nn.Linear, int], torch.Tensor]  # (name, the layer, 4 or 8 bits) → the weight that simulates it


def quantized_linears(model: nn.Module, smallest: int = MIN_QUANTIZED_ELEMENTS) -> dict[str, nn.Linear]:
    """The linear layers of at least so many weights, by name; side blocks serve training only."""
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not name.startswith("side_blocks.")
    }
    return {name: layer for name, layer in layers.items() if layer.weight.numel() >= smallest}


def nearest_form(given: Mapping[str, Any]) -> Form:
    """Layers in ONNX Runtime: the given 4-bit weights or the nearest ones in groups of [`GROUP`]; or 8 bits."""

    def form(name: str, layer: nn.Linear, bits: int) -> torch.Tensor:
        if bits == 4 and isinstance(given.get(name), AffineWeight):
            return given[name].dequantize()
        return quantize_affine(layer.weight.detach(), bits, GROUP, symmetric=True).dequantize()

    return form


def xnnpack_weights(given: Mapping[str, Any]) -> Form:
    """Layers in XNNPACK: 8da4w with the given weights where it has such a grid, or 8da8w; activations are rounded
    too.
    """

    def form(name: str, layer: nn.Linear, bits: int) -> torch.Tensor:
        scheme = linear_scheme("8da4w", layer.in_features, keep_8bit=bits == 8)
        if scheme == "fp32":
            return layer.weight.detach()
        kept = given.get(name) if bits == 4 else None
        weight = given_weight(FormLinear(layer, name), scheme, kept) if isinstance(kept, AffineWeight) else None
        return quantized_weight(layer.weight.detach(), scheme) if weight is None else weight

    return form


@torch.no_grad()
def choose_8bit(
    pipeline: Any,
    form: Form,
    goal_db: float,
    *,
    smallest: int = MIN_QUANTIZED_ELEMENTS,
    seed: int = 0,
    images: int = 4,
    prompts: Sequence[str] | None = None,
) -> list[str]:
    """Names of the layers that need 8 bits, in the network's order; none if 4 bits reach the goal everywhere.

    Args:
        pipeline: the eager pipeline, plain float32 weights.
        form: what the runtime makes of a layer.
        goal_db: least peak signal-to-noise ratio of the images of the whole loop.
        smallest: weights of a layer that the runtime quantises.
        seed: image i starts from the noise of seed + i. images: how many are compared. prompts: of text to image.

    Raises:
        EdgeDiTError: even 8 bits everywhere do not reach the goal.
    """
    model, layers = share(pipeline.transformer), quantized_linears(pipeline.transformer, smallest)
    simulated = with_transformer(pipeline, model)
    simulated.set_progress_bar_config(disable=True)
    asked = sampling_arguments(pipeline, images, prompts)

    def put(name: str, weight: torch.Tensor) -> None:
        model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)

    def quality(kept: set[str]) -> float:
        for name, layer in layers.items():
            put(name, form(name, layer, 8 if name in kept else 4))
        return psnr(sample(), reference, data_range=1.0)

    def sample() -> Any:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(images)]
        return simulated(**asked, generator=generators, output_type="np").images

    reference = sample()
    if quality(set()) >= goal_db:
        return []
    for name, layer in layers.items():
        put(name, layer.weight.detach())
    calls = spread(record(simulated, min(images, 4), seed=seed, prompts=list(prompts or PROMPTS)).calls, TIMESTEPS)
    references = [replay(model, call) for call in calls]
    errors = {}
    for name, layer in layers.items():
        put(name, form(name, layer, 4))
        errors[name] = output_error(model, calls, references).mean_mse / math.prod(layer.weight.shape)
        put(name, layer.weight.detach())
    ranking = sorted(errors, key=errors.__getitem__, reverse=True)
    low, high = 0, len(ranking)  # 8 bits for the first `low` do not reach the goal; for the first `high` they do
    best = quality(set(ranking))
    if best < goal_db:
        raise EdgeDiTError(
            f"The images reach {best:.1f} dB with 8 bits in every layer; {goal_db:.1f} dB were asked. Export at a "
            "higher precision."
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if quality(set(ranking[:middle])) >= goal_db else (middle, high)
    kept = set(ranking[:high])
    return [name for name in layers if name in kept]
