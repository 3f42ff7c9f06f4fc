"""Layers whose weight is quantised: they keep packed tensors, and `layer.weight` unpacks them when somebody asks.

The layer stays what it is (an [`ElasticLinear`] still slices `self.weight`, `isinstance(layer, nn.Linear)` holds): its
class becomes a subclass in which `weight` is a property. The packed tensors are buffers `weight_packed`,
`weight_palette`, `weight_scale`, …, and so part of the state dict. Nothing is kept unpacked: a forward needs the memory
of one layer's weight more.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from ..errors import EdgeDiTError
from .weights import SCHEMES, QuantizedWeight, complete_spec, from_tensors, layout

PREFIX = "weight_"  # of the names of the packed tensors


_Layer: Any = nn.Module if TYPE_CHECKING else object  # of the classes that it is mixed into


class QuantizedLayer(_Layer):
    """What a layer with a quantised weight has before its own class."""

    weight_spec: dict[str, Any]  # complete, with the shape
    weight_tensors: tuple[str, ...]  # names of the packed tensors, without the prefix
    plain_class: type[nn.Module]
    weight_dtype: torch.dtype  # what the weight is unpacked to: the type of the parameters beside it

    @property
    def weight(self) -> torch.Tensor:
        """The unpacked weight, made anew at every access. It is no parameter: changes of it are lost, and no gradient
        is kept.
        """
        with torch.no_grad():
            return get_quantized_weight(self).dequantize(self.weight_dtype)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class is made at run time; pickles (of other processes, of copies) name the plain one.
        return _new_quantized, (self.plain_class,), self.__dict__

    def _apply(self, fn, *args, **kwargs):
        # `.to(dtype)` and the like: palettes and scales keep their type, which another cannot hold without loss; what
        # they unpack to changes.
        before = {PREFIX + name: self._buffers[PREFIX + name] for name in self.weight_tensors}
        super()._apply(fn, *args, **kwargs)
        for name, tensor in before.items():
            if self._buffers[name].dtype != tensor.dtype:
                self._buffers[name] = tensor.to(self._buffers[name].device)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return self


@functools.cache
def _quantized_class(plain: Any) -> Any:
    return type(f"Quantized{plain.__name__}", (QuantizedLayer, plain), {"__doc__": plain.__doc__, "plain_class": plain})


def _new_quantized(plain: Any) -> nn.Module:
    kind = _quantized_class(plain)
    return kind.__new__(kind)


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear and 2-D convolutional layer of a model by name, quantised or not. Embeddings are look-ups and stay
    as they are.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of a layer's weight, without unpacking it."""
    return tuple(module.weight_spec["shape"] if isinstance(module, QuantizedLayer) else module.weight.shape)


def get_quantized_weight(module: nn.Module) -> QuantizedWeight | None:
    """The quantised weight of a layer (its own tensors, not copies); `None` if it is not quantised."""
    if not isinstance(module, QuantizedLayer):
        return None
    return SCHEMES[module.weight_spec["scheme"]].from_tensors(
        module.weight_spec, {name: module._buffers[PREFIX + name] for name in module.weight_tensors}
    )


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The quantised weights of a model by the name of their layer."""
    return {
        name: get_quantized_weight(module)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer)
    }


def set_quantized_weight(module: nn.Module, quantized: QuantizedWeight) -> None:
    """Put a quantised weight in the place of a layer's parameter `weight`. The weight unpacks to the parameter's type,
    on its device.
    """
    if isinstance(module, QuantizedLayer):
        raise EdgeDiTError(f"The layer is quantised already ({module.weight_spec}); dequantise it first.")
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        raise EdgeDiTError(f"A {type(module).__name__} cannot be quantised; linear and 2-D convolutional layers can.")
    spec = complete_spec(quantized.spec(), tuple(module.weight.shape))
    parameter, tensors = module._parameters.pop("weight"), quantized.tensors()
    module.weight_spec, module.weight_tensors, module.weight_dtype = spec, tuple(tensors), parameter.dtype
    plain: Any = type(module)
    module.__class__ = _quantized_class(plain)
    for name, tensor in tensors.items():
        module.register_buffer(PREFIX + name, tensor.to(parameter.device))


def set_empty_weight(module: nn.Module, spec: Mapping[str, Any]) -> None:
    """[`set_quantized_weight`] with tensors that have shapes but no values yet (on the meta device), for a loader to
    fill in.
    """
    spec = complete_spec(spec, weight_shape(module))
    tensors = {
        name: torch.empty(size, dtype=dtype, device="meta")
        for name, (size, dtype) in layout(spec, weight_shape(module)).items()
    }
    set_quantized_weight(module, from_tensors(spec, tensors))


def dequantize_layer(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Undo [`set_quantized_weight`]: the unpacked weight becomes the layer's parameter again, of type `dtype` (default:
    what it unpacks to).
    """
    weight = get_quantized_weight(module).dequantize(dtype or module.weight_dtype)
    for name in module.weight_tensors:
        del module._buffers[PREFIX + name]
    module.__class__ = module.plain_class
    del module.weight_spec, module.weight_tensors, module.weight_dtype
    others = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update(weight=nn.Parameter(weight), **others)  # the weight comes first, as in a new layer


def dequantize_layers(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """[`dequantize_layer`] for all quantised layers of a model, one after another."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            dequantize_layer(module, dtype)


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put plain parameters back in place of a model's quantised weights, in place; saved now, it is a model like any
    other.

    Args:
        dtype: of the new parameters; default: the type of the others.
    """
    dequantize_layers(model, dtype)
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(mark, None)
    forget_quantization(model)


def forget_quantization(model: nn.Module) -> None:
    """Take the quantisation out of a diffusers model's config."""
    config = dict(getattr(model, "config", {}))
    if config.pop("quantization_config", None) is not None:
        model._internal_dict = FrozenDict(config)
