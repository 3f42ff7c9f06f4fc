"""The forms that the layers of a network may take: what each stores, what it costs the network's output, and the
weights in the forms that are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import EdgeDiTError
from ..run.sections import QuantizeConfig
from .allocation import Allocation, Candidate, allocate, candidate_specs, replaced_weight_error
from .calibration import ModelCall, moment_batches, replay, second_moments
from .gptq import quantize_compensated
from .layers import quantizable_layers
from .quantize import quantize_weight
from .weights import QuantizedWeight, spec_bits


class LayerForms:
    """Measures and makes the forms of a network's layers; the network stays unquantised meanwhile.

    Args:
        model: the network. options: of the recipe.
        calls: forwards that the compensation is fitted to. judged: forwards whose outputs errors are measured on.

    Raises:
        EdgeDiTError: the network predicts zeros alone, or even the smallest forms exceed the budget.
    """

    def __init__(
        self, model: nn.Module, options: QuantizeConfig, calls: Sequence[ModelCall], judged: Sequence[ModelCall]
    ) -> None:
        self.model, self.options, self.calls, self.judged = model, options, calls, judged
        self.layers = quantizable_layers(model)
        self.names = list(self.layers)
        self.references = [replay(model, call) for call in judged]
        if not any(reference.any() for reference in self.references):
            raise EdgeDiTError(
                "The network predicts zeros alone, so there is no error to measure; train it before it is quantised."
            )
        self.batches = moment_batches(model, self.names) if options.compensate else [self.names]
        self.moments: dict[str, torch.Tensor] = {}  # of the layers of one batch
        self.sizes = {name: layer.weight.numel() for name, layer in self.layers.items()}
        self.specs = {
            name: candidate_specs(layer.weight.shape, options.scheme, options.rows_per_palette, options.group_size)
            for name, layer in self.layers.items()
        }
        self.allocate(  # fails now, not after hours
            {
                name: [{"spec": spec, "num_bits": self.bits(name, spec), "mse": 0.0} for spec in specs]
                for name, specs in self.specs.items()
            }
        )

    def bits(self, name: str, spec: Mapping[str, Any] | None) -> int:
        """Stored bits of a layer in this form; `None`: as it is."""
        weight = self.layers[name].weight
        return 8 * weight.element_size() * weight.numel() if spec is None else spec_bits(spec, tuple(weight.shape))

    def weight(self, name: str, spec: Mapping[str, Any]) -> QuantizedWeight:
        """A layer's weight in this form."""
        weight = self.layers[name].weight
        if not self.options.compensate:
            return quantize_weight(weight, spec)
        if name not in self.moments:
            self.moments = second_moments(
                self.model, self.calls, next(batch for batch in self.batches if name in batch)
            )
        return quantize_compensated(weight, spec, self.moments[name])

    def measure(self, name: str) -> list[dict[str, Any]]:
        """Every form of a layer: its spec, its bits, and the error of the output when this layer alone has it."""
        rows = []
        for spec in self.specs[name]:
            error = {"mse": 0.0, "sqnr_db": None}  # of a layer that stays as it is
            if spec is not None:
                weight = self.weight(name, spec).dequantize()
                error = replaced_weight_error(self.model, name, weight, self.judged, self.references).to_dict()
            rows.append(
                {"spec": spec, "num_bits": self.bits(name, spec), "mse": error["mse"], "sqnr_db": error["sqnr_db"]}
            )
        return rows

    def allocate(self, measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> Allocation:
        """The best forms within the budget, of what [`~LayerForms.measure`] gave for every layer."""
        candidates = {
            name: [Candidate(row["spec"], row["num_bits"], row["mse"]) for row in measured[name]] for name in self.names
        }
        return allocate(candidates, self.sizes, self.options.budget_bits)

    def weights(self, plan: Mapping[str, Mapping[str, Any]]) -> dict[str, QuantizedWeight]:
        """The weights of the chosen forms, all made from the unquantised network, whose inputs the moments are of."""
        return {name: self.weight(name, plan[name]) for batch in self.batches for name in batch if name in plan}

    def describe(self, chosen: Allocation, measured: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Every layer's choice as `quantization.json` has it."""
        return {
            name: {
                "spec": choice.spec,
                "weights": self.sizes[name],
                "num_bits": choice.num_bits,
                "mse": choice.error,
                "candidates": measured[name],
            }
            for name, choice in chosen.chosen.items()
        }
