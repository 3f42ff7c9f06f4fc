"""Our quantisation as diffusers knows it: the `quantization_config` of a config.json, and the quantiser that
`from_pretrained` calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from ..errors import EdgeDiTError
from .layers import PREFIX, QuantizedLayer, dequantize_layers, forget_quantization, quantizable_layers, set_empty_weight
from .quantize import quantize_layers
from .weights import complete_spec


class EdgeDiTQuantizationMethod(StrEnum):
    """The value of `quant_method` in config.json (diffusers asks for an enumeration)."""

    EDGEDIT = "edgedit"


class EdgeDiTQuantizationConfig(QuantizationConfigMixin):
    """How the layers of a model are quantised.

    Args:
        layers: layer name → spec (see [`weights`]).
        default: spec of all linear and convolutional layers that `layers` does not name. Only for a checkpoint that is
            not quantised: `from_pretrained(…, quantization_config=EdgeDiTQuantizationConfig(default={"scheme":
                "nf4"}))` quantises while it loads, on CPU too.
        dequantize: turn a quantised checkpoint into a plain model while it is loaded.
    """

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        default: Mapping[str, Any] | None = None,
        dequantize: bool = False,
        quant_method: str = EdgeDiTQuantizationMethod.EDGEDIT,
        **unknown: Any,
    ):
        if unknown:
            raise EdgeDiTError(
                f"The quantization_config has the key {sorted(unknown)[0]!r}, which this version does not know: "
                f"{sorted(unknown)}."
            )
        if not isinstance(layers or {}, Mapping):
            raise EdgeDiTError(
                f"The layers of the quantization_config are {layers!r}; they must be a dict of layer names and specs."
            )
        self.quant_method = EdgeDiTQuantizationMethod(quant_method)
        self.layers = {name: complete_spec(spec) for name, spec in (layers or {}).items()}
        self.default = None if default is None else complete_spec(default)
        self.dequantize = dequantize
        if dequantize and (layers or default):
            raise EdgeDiTError(
                "dequantize=True and specs of layers were given; a checkpoint is either unpacked or quantised."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in config.json."""
        return {
            "quant_method": self.quant_method.value,
            "layers": {name: dict(spec) for name, spec in self.layers.items()},
        }

    to_diff_dict = to_dict  # what diffusers prints


class EdgeDiTQuantizer(DiffusersQuantizer):
    """Loads models with quantised weights: layers get their packed tensors before the file is read, so that no float
    weight ever exists.
    """

    use_keep_in_fp32_modules = True
    quantization_config: EdgeDiTQuantizationConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        model.is_quantized = (
            False  # `.to(dtype)` works: it sets the type of the other weights, and what the packed ones unpack to
        )
        if not self.pre_quantized:
            return
        layers = quantizable_layers(model)
        for name, spec in self.quantization_config.layers.items():
            if name not in layers:
                raise EdgeDiTError(
                    f"The quantization_config in config.json names the layer {name!r}, which a {type(model).__name__} "
                    "of this config has not."
                )
            try:
                set_empty_weight(layers[name], spec)
            except EdgeDiTError as error:
                raise EdgeDiTError(
                    f"The quantization_config in config.json does not fit the layer {name!r}: {error}"
                ) from error

    def check_if_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        layer, _, name = param_name.rpartition(".")
        return name.startswith(PREFIX) and isinstance(model.get_submodule(layer), QuantizedLayer)

    def check_quantized_param_shape(
        self, param_name: str, current_param: torch.Tensor, loaded_param: torch.Tensor
    ) -> bool:
        _check_tensor(param_name, current_param, loaded_param)
        return True

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        layer, _, name = param_name.rpartition(".")
        module = model.get_submodule(layer)
        stored = state_dict[
            param_name
        ]  # `param_value` has been cast to the model's dtype; scales and palettes must not be
        _check_tensor(param_name, module._buffers[name], stored)
        module._buffers[name] = stored.to(target_device)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.pre_quantized:
            return
        config = self.quantization_config
        names = quantizable_layers(model) if config.default is not None else ()
        quantize_model(model, {**{name: config.default for name in names}, **config.layers})
        self.quantization_config = model.hf_quantizer.quantization_config

    def _dequantize(self, model: nn.Module) -> nn.Module:
        dequantize_layers(model)
        forget_quantization(model)
        del model.quantization_method
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _check_tensor(name: str, expected: torch.Tensor, stored: torch.Tensor) -> None:
    if (stored.shape, stored.dtype) != (expected.shape, expected.dtype):
        raise EdgeDiTError(
            f"{name} in the file is {stored.dtype} of shape {tuple(stored.shape)}, but the quantization_config in "
            f"config.json needs {expected.dtype} of shape {tuple(expected.shape)}; both must come from the same model."
        )


def mark_quantized(model: nn.Module) -> None:
    """Note in a diffusers model's config how its layers are quantised, so that save_pretrained and from_pretrained
    know. Anything else is left as it is."""
    if not hasattr(model, "register_to_config"):
        return
    layers = {name: module.weight_spec for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    config = EdgeDiTQuantizationConfig(layers=layers)
    model.register_to_config(quantization_config=config.to_dict())
    model.hf_quantizer = EdgeDiTQuantizer(config, pre_quantized=True)
    model.quantization_method = config.quant_method


def quantize_model(model: nn.Module, plan: Mapping[str, Mapping[str, Any]]) -> None:
    """Quantise the weights of the layers that a plan names, in place. The model is then saved and loaded in this form.

    Args:
        plan: layer name → spec. Layers that it does not name keep their weights; so do biases, norms, embeddings and
            tables.
    """
    quantize_layers(model, plan)
    mark_quantized(model)
