"""One way down: a part of a network to a file, in any format. Exports, latency tables, evaluations and benchmarks all
lower here, so that what is measured is what ships.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..files import read_json, versions, weights_hash
from ..genotype import Genotype
from ..quantization.weights import AffineWeight
from ..runtimes.sessions import METHODS
from .formats import BACKEND, DYNAMIC_BATCH, format_of
from .parts import Part, edgedit_parts
from .wrappers import check_model, plain_config

if TYPE_CHECKING:
    from ..models.transformer_edgedit import EdgeDiTTransformer2DModel

EXAMPLE_ROWS = 2


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
        backend: ExecuTorch: who computes, `"xnnpack"`, `"coreml"` or `"qnn"`. profile_runs: forwards that are timed to
            find the share of what it did not take.
    """

    opset: int | None = None
    open_sizes: tuple[str, ...] = ()
    scales: Any = None
    given: Mapping[str, Any] = field(default_factory=dict)
    keep_8bit: tuple[str, ...] = ()
    layers: nn.Module | None = None
    quantized: Mapping[str, Any] = field(default_factory=dict)
    backend: str = BACKEND
    profile_runs: int = 0


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


def _executorch_weights(part: Part, lowering: Lowering) -> dict[str, Any]:
    """What ExecuTorch's lowering of a part is told of its weights."""
    if part.component != "transformer":
        return {"backend": lowering.backend}
    given = {name: weight for name, weight in lowering.given.items() if isinstance(weight, AffineWeight)}
    return {"backend": lowering.backend, "keep_8bit": lowering.keep_8bit, "affine": given}


def _lower_executorch(part: Part, path: Path, precision: str, facts: Mapping[str, str], lowering: Lowering) -> dict:
    from .executorch.lower import lower_executorch

    options = _executorch_weights(part, lowering)
    return lower_executorch(part, path, precision, facts, profile_runs=lowering.profile_runs, **options)


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


def lower_one_file(
    asked: Mapping[str, tuple[Part, str, Mapping[str, str]]], path: Path, lowering: Lowering
) -> dict[str, dict[str, Any]]:
    """Write one ExecuTorch file whose methods are what the files of single parts have as `forward`; equal tensors are
    in it once.

    Args:
        asked: method → its part, precision, and what the file says about it.
        path: the `.pte` file.

    Returns:
        Of every method what [`~edgedit_hf.export.executorch.lower.lower_methods`] says.

    Raises:
        EdgeDiTError: ExecuTorch cannot lower them together.
    """
    from .executorch.lower import described, explain_refusals, lower_methods, quantized_form

    methods, said = {}, {}
    for name, (part, precision, facts) in asked.items():
        form, scheme, _ = quantized_form(part, precision, **_executorch_weights(part, lowering))
        methods[name] = form, tuple(part.inputs.values())
        said[name] = described(part, scheme, facts)
    with explain_refusals("all networks of the pipeline in one file"):
        return lower_methods(methods, path, {METHODS: json.dumps(said)}, lowering.backend)


def facts_of(
    component: str, module: nn.Module, config: Mapping[str, Any], dtype: str, batch: str | int
) -> dict[str, str]:
    """What the files of a component say about themselves, as text: config, weights (their hash), precision, batch,
    versions; of an EdgeDiT also the genotype.
    """
    said = {
        "config": json.dumps(config, sort_keys=True),
        "weights": weights_hash(module.state_dict()),
        "precision": dtype,
        "batch": str(batch),
        "versions": json.dumps(versions()),
    }
    if component == "transformer" and "layers" in config and "hidden_size" in config:
        said["genotype"] = Genotype.of(config).to_json()
    return said


def lower_denoiser(
    model: EdgeDiTTransformer2DModel,
    path: str | os.PathLike,
    format: str = "onnx",
    dtype: str = "fp32",
    batch: str | int | None = None,
    keep_8bit: Collection[str] = (),
) -> dict[str, Any]:
    """Write an EdgeDiT as the export of its pipeline does: one file of the whole denoiser, for its native size.

    Args:
        model: float32, on the CPU.
        path: the file.
        format: a key of [`FORMATS`]. dtype: one of the format's.
        batch: `"dynamic"` where the format has it, or the rows of a forward; default as of an export.
        keep_8bit: int4: layers that get 8 bits.

    Returns:
        What the format's lowering says.

    Raises:
        EdgeDiTError: the model is not float32 or not plain weights, or the format, the precision or the batch does not
            exist.
    """
    batch = format_of(format).check_batch(batch)
    check_model(model)
    size, dynamic = model.config.sample_size, batch == DYNAMIC_BATCH
    (part,) = edgedit_parts(model, (size, size), example_rows(batch), split=False)
    facts = {**facts_of(part.component, model, plain_config(model), dtype, batch), "part": part.name}
    lowering = Lowering(open_sizes=("batch",) if dynamic else (), keep_8bit=tuple(keep_8bit), layers=model)
    return LOWER[format](part, Path(path), dtype, facts, lowering)


def denoiser_file(
    model: EdgeDiTTransformer2DModel,
    folder: str | os.PathLike,
    format: str,
    dtype: str,
    batch: int,
    exported: Any = None,
) -> Path:
    """The file of a whole EdgeDiT for forwards of `batch`: an export's where there is one that fits, or one that is
    lowered now.

    Args:
        model: the network. folder: where a file that is lowered now goes.
        format: a key of [`FORMATS`]. dtype: one of the format's.
        exported: the transformer of an export in this format and dtype. It fits if it is of this architecture, in one
            piece, for the native size, and takes the batch; one that does only not take the batch says which layers
            have 8 bits in int4.
    """
    architecture = json.loads(json.dumps(plain_config(model)))
    kept: Collection[str] = ()
    native = [model.config.sample_size] * 2
    if exported is not None and {**exported.config, "split": False, "size": native, **architecture} == exported.config:
        if exported.config.batch in (DYNAMIC_BATCH, batch):
            return exported.path
        verified = read_json(exported.folder.parent / "verify.json", "the export")
        kept = verified.get("layers_of_8_bits", ())
    target = format_of(format)
    file = Path(folder, f"{format}-{dtype}").with_suffix(target.suffix)
    file.parent.mkdir(parents=True, exist_ok=True)
    lower_denoiser(model, file, format, dtype, None if target.dynamic else batch, kept)
    return file


def example_rows(batch: str | int) -> int:
    """Rows of the examples that a network is traced with: torch.export would freeze an open batch of 0 or 1."""
    return EXAMPLE_ROWS if batch == DYNAMIC_BATCH else int(batch)
