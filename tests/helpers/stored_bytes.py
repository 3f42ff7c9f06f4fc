"""What a quantised model's file must weigh."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from edgedit_hf.quantization.layers import quantizable_layers
from edgedit_hf.quantization.weights import spec_bits


def stored_bytes(model: nn.Module, plan: Mapping[str, Mapping[str, Any]]) -> int:
    """Bytes of all tensors of the model's file once it is quantised by this plan. The model may be on the meta
    device.
    """
    layers = quantizable_layers(model)
    total = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    for name, spec in plan.items():
        weight = layers[name].weight
        total += spec_bits(spec, tuple(weight.shape)) // 8 - weight.numel() * weight.element_size()
    return total
