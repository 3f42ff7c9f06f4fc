"""Quantise weights: k-means palettes, even grids by rounding to the nearest, NF4; of a tensor, or of a model's layers
by a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import EdgeDiTError
from .affine import quantize_affine
from .kmeans import kmeans_1d, nearest
from .layers import QuantizedLayer, quantizable_layers, set_quantized_weight, weight_shape
from .packing import pack
from .weights import NF4_CODES, NF4Weight, PaletteWeight, QuantizedWeight, complete_spec


def quantize_palette(
    weight: torch.Tensor, bits: int = 4, rows_per_palette: int = 16, importance: torch.Tensor | None = None
) -> PaletteWeight:
    """k-means palettes of a weight `(O, …)`, one for every run of `rows_per_palette` output rows (0: one for all).

    Args:
        importance: `(n,)`, what an error of each of a row's weights costs (for example the mean square of its input);
            default: the same.
    """
    matrix = weight.detach().float().flatten(1)
    rows, columns = matrix.shape
    run = min(rows_per_palette or rows, rows)
    whole = rows - rows % run
    palettes, indices = [], []
    for part in (matrix[:whole].reshape(-1, run * columns), matrix[whole:].reshape(1, -1)):
        if not part.numel():
            continue
        weights = None if importance is None else importance.to(part.device).repeat(part.shape[1] // columns)[None]
        palette = kmeans_1d(part, 1 << bits, weights)[0].half()
        palettes.append(palette)
        indices.append(nearest(part, palette).view(-1, columns))  # again: the palette has been rounded
    return PaletteWeight(
        pack(torch.cat(indices), bits), torch.cat(palettes), bits, rows_per_palette, tuple(weight.shape)
    )


def quantize_nf4(weight: torch.Tensor, block: int = 64) -> NF4Weight:
    """NF4 of a weight: the codes that bitsandbytes finds."""
    flat = weight.detach().float().flatten()
    size = min(block, len(flat))
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.tensor([NF4_CODES], device=flat.device)
    values = nearest(scaled.view(1, -1), codes)[0, : len(flat)]
    return NF4Weight(pack(values, 4), absmax.half(), block, tuple(weight.shape))


def quantize_weight(
    weight: torch.Tensor, spec: Mapping[str, Any], importance: torch.Tensor | None = None
) -> QuantizedWeight:
    """A weight `(O, …)` in the form that `spec` names (see [`weights`]); `importance` as in [`quantize_palette`], for
    palettes only.
    """
    spec = complete_spec(spec, tuple(weight.shape))
    _check_values(weight, "The weight")
    if spec["scheme"] == "palette":
        return quantize_palette(weight, spec["bits"], spec["rows_per_palette"], importance)
    if importance is not None:
        raise EdgeDiTError(f"importance was given with the scheme {spec['scheme']!r}; only palettes use it.")
    if spec["scheme"] == "affine":
        return quantize_affine(weight, spec["bits"], spec["group_size"], spec["symmetric"])
    return quantize_nf4(weight, spec["block"])


def quantize_layers(model: nn.Module, plan: Mapping[str, Mapping[str, Any]]) -> None:
    """Quantise the weights of the layers that a plan names, in place; the model's config says nothing of it."""
    check_plan(model, plan)
    layers = quantizable_layers(model)
    for name in plan:
        _check_values(layers[name].weight, f"The weight of {name}")
    for name, spec in plan.items():
        set_quantized_weight(layers[name], quantize_weight(layers[name].weight, spec))


def check_plan(model: nn.Module, plan: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise unless every layer of a plan is there, is not quantised yet, and its spec fits it."""
    layers = quantizable_layers(model)
    wrapped = next((name for name in layers if ".base_layer" in name or ".lora_" in name), None)
    compiled = next((name for name in layers if "_orig_mod" in name.split(".")), None)
    if compiled is not None:
        raise EdgeDiTError(
            f"The layer {compiled!r} is compiled, and would be saved under that name; quantise the model "
            "(model._orig_mod) before."
        )
    if wrapped is not None:
        raise EdgeDiTError(
            f"The layer {wrapped!r} belongs to a PEFT adapter; merge it with fuse_lora(), call unload_lora(), and "
            "quantise then."
        )
    for name, spec in plan.items():
        if name not in layers:
            raise EdgeDiTError(
                f"The plan names {name!r}, which is no linear or convolutional layer of the model; see "
                "quantizable_layers(model)."
            )
        if isinstance(layers[name], QuantizedLayer):
            raise EdgeDiTError(
                f"The layer {name!r} is quantised already ({layers[name].weight_spec}); call dequantize_model(model) "
                "first."
            )
        complete_spec(spec, weight_shape(layers[name]))


def _check_values(weight: torch.Tensor, what: str) -> None:
    largest = float(weight.detach().abs().max())
    if not largest <= torch.finfo(torch.float16).max:  # NaN too
        raise EdgeDiTError(
            f"{what} has a value of size {largest}; quantised weights must be finite and below 65504 (float16)."
        )
