"""One way down: a part of a network to a file, in any format. Exports, latency tables, evaluations and benchmarks all
lower here, so that what is measured is what ships.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..quantization.weights import AffineWeight
from .parts import Part


@dataclass(frozen=True)
class Lowering:
    """What an export asks of a lowering, beside the precision.

    Args:
        opset: ONNX operator set.
        open_sizes: sizes that stay open.
        scales: static int8 activations ([`ActivationScales`]) of the denoiser's layers; default: dynamic.
        given: low-bit weights to use as they are, by layer. keep_8bit: layers that a 4-bit export gives 8 bits.
        layers: the module whose layer names these use.
        quantized: Core ML: the packed weights of a quantised model, by layer.
        backend: ExecuTorch: who computes, `"xnnpack"`, `"coreml"` or `"qnn"`.
    """

    opset: int | None = None
    open_sizes: tuple[str, ...] = ()
    scales: Any = None
    given: Mapping[str, Any] = field(default_factory=dict)
    keep_8bit: tuple[str, ...] = ()
    layers: nn.Module | None = None
    quantized: Mapping[str, Any] = field(default_factory=dict)
    backend: str = "xnnpack"


def _lower_onnx(part: Part, path: Path, precision: str, facts: Mapping[str, str], lowering: Lowering) -> dict:
    from .onnx.lower import DEFAULT_OPSET, lower_onnx

    return lower_onnx(
        part,
        path,
        precision,
        facts,
        opset=DEFAULT_OPSET if lowering.opset is None else lowering.opset,
        open_sizes=lowering.open_sizes,
        scales=lowering.scales if part.name == "denoiser" else None,
        given=lowering.given,
        keep_8bit=lowering.keep_8bit,
        layers=lowering.layers,
    )


def _lower_executorch(part: Part, path: Path, precision: str, facts: Mapping[str, str], lowering: Lowering) -> dict:
    from .executorch.lower import lower_executorch

    in_transformer = part.component == "transformer"
    given = (
        {name: weight for name, weight in lowering.given.items() if isinstance(weight, AffineWeight)}
        if in_transformer
        else None
    )
    kept = lowering.keep_8bit if in_transformer else ()
    return lower_executorch(part, path, precision, facts, keep_8bit=kept, affine=given, backend=lowering.backend)


def _lower_coreml(part: Part, path: Path, precision: str, facts: Mapping[str, str], lowering: Lowering) -> dict:
    from .coreml.lower import lower_coreml

    quantized = lowering.quantized if part.component == "transformer" else {}
    if quantized and precision != "fp32":
        precision = "fp16"  # of all that is not packed already
    return lower_coreml(part, path, precision, facts, quantized=quantized or None)


LOWER: dict[str, Callable[[Part, Path, str, Mapping[str, str], Lowering], dict]] = {
    "onnx": _lower_onnx,
    "executorch": _lower_executorch,
    "coreml": _lower_coreml,
}
