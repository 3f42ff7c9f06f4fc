"""Several networks in the memory of one: LoRA adapters (Hu et al., arXiv:2106.09685) on one frozen base.

A network's weight is W + (alpha / rank) · B A. A forward runs with one adapter or none ([`active_adapter`]), at every
width of a supernet; [`fuse_adapter`] turns the base into the network of one adapter.
"""

from __future__ import annotations

import contextlib
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from ..errors import EdgeDiTError

PARTS = ("lora_A", "lora_B")


def add_adapters(model: nn.Module, names: Sequence[str], rank: int, alpha: float, seed: int) -> None:
    """Give every linear and convolutional layer of a model an adapter of each name: float32, trainable, A drawn as
    Kaiming's uniform from (seed, name), B zero. All other weights are frozen; outside of [`active_adapter`] the model
    runs without any.

    Depthwise layers (those of the elastic transformer that compress keys and values) have none: theirs could not be
    merged into them.

    Args:
        model: a diffusers model that takes adapters. rank, alpha: LoRA's; a change is scaled by alpha / rank.

    Raises:
        EdgeDiTError: the model has adapters already.
    """
    there = _layers(model)
    if there:
        raise EdgeDiTError(
            f"The model has the adapters {_names(there)} already; add all at once, or fuse or unload those first."
        )
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]
    for name in names:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # more than one is meant
            model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), name)
        drawn = np.random.Generator(np.random.Philox(key=np.array([seed, zlib.crc32(name.encode())], dtype=np.uint64)))
        for layer in _layers(model):
            down, up = (getattr(layer, part)[name].float() for part in PARTS)
            bound = 1 / math.sqrt(down.weight[0].numel())
            values = torch.from_numpy(drawn.random(tuple(down.weight.shape), dtype=np.float32))
            with torch.no_grad():
                down.weight.copy_((2 * values - 1) * bound)
                up.weight.zero_()
    model.requires_grad_(False)
    for name in names:
        for _, parameter in adapter_parameters(model, name):
            parameter.requires_grad_(True)
    for layer in _layers(model):
        layer._disable_adapters = True


def adapter_parameters(model: nn.Module, name: str) -> list[tuple[str, nn.Parameter]]:
    """Names (as in `named_parameters`) and parameters of an adapter, in the model's order.

    Raises:
        EdgeDiTError: there is no such adapter.
    """
    _check(_layers(model), name)
    return [
        (f"{key}.{part}.{name}.{parameter}", value)
        for key, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
        for part in PARTS
        if name in getattr(layer, part)
        for parameter, value in getattr(layer, part)[name].named_parameters()
    ]


@contextlib.contextmanager
def active_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within it, the model runs with this adapter alone (`None`: with none), in every thread. Which parameters are
    trainable stays as it is (peft's own `set_adapter` changes that, which DDP and FSDP do not take).

    The forwards made within it keep their adapter: where diffusers' gradient checkpointing is on, the backward pass
    computes them again with it, whenever it comes.

    Args:
        model: the model, or what wraps it (DDP, FSDP).

    Raises:
        EdgeDiTError: there is no such adapter, or one is merged into the weights.
    """
    modules = list(model.modules())  # once: a large model has thousands
    layers = [module for module in modules if isinstance(module, LoraLayer)]
    if name is not None:
        _check(layers, name)
    merged = sorted({one for layer in layers for one in layer.merged_adapters})
    if merged:
        raise EdgeDiTError(
            f"The adapters {merged} are merged into the weights, so that {name!r} cannot run alone; call unfuse_lora()."
        )
    checkpointing = [module for module in modules if "_gradient_checkpointing_func" in vars(module)]
    before = [module._gradient_checkpointing_func for module in checkpointing]
    with _switched(layers, name):
        for module in checkpointing:
            module._gradient_checkpointing_func = _Bound(module._gradient_checkpointing_func, name)
        try:
            yield
        finally:
            for module, function in zip(checkpointing, before):
                module._gradient_checkpointing_func = function


def fuse_adapter(model: nn.Module, name: str) -> Any:
    """Make W + (alpha / rank) · B A of this adapter the model's weights, all trainable, leave no trace of adapters, and
    return the model. In place, as a copy of a large net would be most of what a run takes.

    Raises:
        EdgeDiTError: there is no such adapter.
    """
    _check(_layers(model), name)
    model.fuse_lora(adapter_names=[name])
    model.unload_lora()
    return model.requires_grad_(True)


def _layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _names(layers: Sequence[LoraLayer]) -> list[str]:
    return sorted({name for layer in layers for name in layer.lora_A})


def _check(layers: Sequence[LoraLayer], name: str) -> None:
    if not any(name in layer.lora_A for layer in layers):
        raise EdgeDiTError(f"There is no adapter {name!r}; the model has {', '.join(_names(layers)) or 'none'}.")


@contextlib.contextmanager
def _switched(layers: Sequence[LoraLayer], name: str | None) -> Iterator[None]:
    """[`active_adapter`] of layers."""
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before):
            layer._active_adapter, layer._disable_adapters = active, disabled


class _Bound:
    """A model's gradient checkpointing function, which calls a module with its inputs, that calls it again with this
    adapter in the backward pass.
    """

    def __init__(self, checkpoint: Callable, name: str | None) -> None:
        self.plain: Callable = (
            checkpoint.plain if isinstance(checkpoint, _Bound) else checkpoint
        )  # of a context within another
        self.name = name

    def __call__(self, module: nn.Module, *inputs: Any) -> Any:
        def run(*inputs: Any) -> Any:
            with _switched(_layers(module), self.name):
                return module(*inputs)

        return self.plain(run, *inputs)
