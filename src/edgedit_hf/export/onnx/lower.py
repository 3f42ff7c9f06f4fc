"""Lowering to ONNX by torch's dynamo exporter: `lower_onnx` writes a part of a pipeline at any precision.

The files describe themselves: `metadata_props` holds what the caller says of them, such as genotype, config, weights'
hash, precision, versions.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch

from ...errors import EdgeDiTError
from ...files import explain_write_errors
from ..formats import FORMATS
from ..parts import Part
from ..wrappers import onnx_attention, quiet
from .lowbit import dynamic_int8, half_precision, linear_nodes, static_int8, weight_only

if TYPE_CHECKING:
    from torch import nn

    from ...quantization.activations import ActivationScales
    from ...quantization.weights import AffineWeight

ATTENTION_OPSET = 23  # the first with an Attention operator: fewer nodes, and faster than its decomposed form
DEFAULT_OPSET = ATTENTION_OPSET
EXTERNAL_DATA_BYTES = 1_500_000_000  # above this the weights go to model.onnx.data: one protobuf file ends at 2 GB
FORMAT = FORMATS["onnx"]


def lower_onnx(
    part: Part,
    path: str | os.PathLike,
    precision: str,
    facts: Mapping[str, str],
    *,
    opset: int = DEFAULT_OPSET,
    open_sizes: Collection[str] = ("batch",),
    scales: ActivationScales | None = None,
    given: Mapping[str, AffineWeight] | None = None,
    keep_8bit: Collection[str] = (),
    layers: nn.Module | None = None,
) -> dict[str, Any]:
    """Write a part as an ONNX file.

    Args:
        part: what to write.
        path: the .onnx file; weights above [`EXTERNAL_DATA_BYTES`] go to `<path>.data` beside it.
        precision: a dtype of the format. A part without large linear layers stays fp32 in int8 and int4.
        facts: text for the file's metadata.
        opset: ONNX operator set, 18 or later.
        open_sizes: names of sizes (values of `part.dynamic`) that stay open; all others are those of the examples.
        scales: static int8 with these activations' scales; default: dynamic int8.
        given: int4: weights to use as they are. keep_8bit: int4: layers that get 8 bits.
        layers: the module whose layer names `scales`, `given` and `keep_8bit` use; default: the part's.

    Returns:
        precision (what the file is), and where it applies activations, linear_layers (number by bits), fp32_islands.
    """
    path = Path(path)
    if precision not in FORMAT.precisions:
        raise EdgeDiTError(f"precision is {precision!r}; ONNX files exist as {', '.join(FORMAT.precisions)}.")
    module, layers = part.module, part.module if layers is None else layers
    said: dict[str, Any] = {"precision": precision}
    if precision == "fp16":
        module, said["fp32_islands"] = half_precision(module, part.inputs)
    dynamic = {
        name: {axis: size for axis, size in axes.items() if size in open_sizes} for name, axes in part.dynamic.items()
    }
    proto = trace(module, part.inputs, part.outputs, dynamic, opset)
    if precision in ("int8", "int4") and not linear_nodes(proto):
        said["precision"] = "fp32"
    elif precision == "int8" and scales is None:
        proto, said["activations"] = dynamic_int8(proto, weights_size(proto) > EXTERNAL_DATA_BYTES), "dynamic"
    elif precision == "int8" and scales is not None:
        said["linear_layers"] = {"static int8": static_int8(proto, scales, layers)}
        said["activations"] = (
            f"static, {scales.num_buckets} buckets of timesteps" if scales.num_buckets > 1 else "static"
        )
    elif precision == "int4":
        said["linear_layers"] = weight_only(proto, layers, given, frozenset(keep_8bit))
    if "activations" in said:
        facts = {**facts, "activations": said["activations"]}
        if scales is not None and scales.num_buckets > 1:
            facts["timestep_edges"] = json.dumps(list(scales.edges))
    write_metadata(proto, **{**facts, "precision": said["precision"]})
    with explain_write_errors(path):
        save_onnx(proto, path)
    return said


def trace(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
    opset: int,
) -> onnx.ModelProto:
    """Trace a module into an ONNX model.

    Args:
        module: takes tensors by position.
        inputs: examples by name, in order. outputs: names.
        dynamic: input → axis → name of a size that stays open.
        opset: ONNX operator set.
    """
    if not 18 <= opset <= onnx.defs.onnx_opset_version():
        raise EdgeDiTError(
            f"opset is {opset}; it must be from 18 to {onnx.defs.onnx_opset_version()} with this onnx version."
        )
    training = module.training
    attention = onnx_attention(module) if opset >= ATTENTION_OPSET else contextlib.nullcontext()
    module.eval()
    try:
        with torch.no_grad(), quiet(), attention:
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=_dynamic_shapes(module, list(inputs), dynamic),
                verbose=False,
            )
    finally:
        module.train(training)
    proto = program.model_proto
    for node in proto.graph.node:
        del node.metadata_props[
            :
        ]  # the exporter's stack traces: half a small file, and paths of the machine that made it
    for value in (*proto.graph.input, *proto.graph.output):
        del value.metadata_props[:]
    # Shape notes of inner values: every tool infers them itself, the quantiser trips over them, and with them ONNX
    # Runtime fuses the last residual into a SkipLayerNormalization that is several times slower than what it replaces.
    proto.graph.ClearField("value_info")
    del proto.graph.metadata_props[:]
    return proto


def _dynamic_shapes(module: nn.Module, names: list[str], dynamic: Mapping[str, Mapping[int, str]]) -> tuple | None:
    """`dynamic` as torch.export wants it: nested like the parameters of `forward`, of which the last may be
    variadic.
    """
    if not any(dynamic.values()):
        return None
    sizes: dict[str, Any] = {}

    def dimension(size: str) -> Any:
        # Heights and widths are multiples of a patch (or more): the exporter finds out of how many. Other sizes are
        # free, and named.
        if size.endswith(("height", "width")):
            return torch.export.Dim.DYNAMIC
        return sizes.setdefault(size, torch.export.Dim(size, min=1))

    shapes = [{axis: dimension(size) for axis, size in dynamic.get(name, {}).items()} for name in names]
    parameters = list(inspect.signature(module.forward).parameters.values())
    if parameters[-1].kind is inspect.Parameter.VAR_POSITIONAL:
        fixed = len(parameters) - 1
        return (*shapes[:fixed], tuple(shapes[fixed:]))
    return tuple(shapes)


def write_metadata(proto: onnx.ModelProto, **values: str) -> None:
    """Set `metadata_props["edgedit.<key>"]` for every key."""
    kept = {entry.key: entry.value for entry in proto.metadata_props}
    kept.update({f"edgedit.{key}": value for key, value in values.items()})
    del proto.metadata_props[:]
    for key, value in kept.items():
        proto.metadata_props.add(key=key, value=value)


def initializer_bytes(path: str | os.PathLike) -> dict[str, int]:
    """Bytes of the weights in a file by element type, e.g. `{"int8": 1769472, "float32": 30000}`."""
    total: dict[str, int] = {}
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        total[kind.name] = total.get(kind.name, 0) + int(np.prod(tensor.dims, dtype=np.int64)) * kind.itemsize
    return dict(sorted(total.items()))


def weights_size(proto: onnx.ModelProto) -> int:
    """Bytes of the weights in a model."""
    return sum(len(tensor.raw_data) for tensor in proto.graph.initializer)


def save_onnx(proto: onnx.ModelProto, path: str | os.PathLike) -> Path:
    """Write a model; big weights go to `<path>.data`, which must stay beside the file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    size = weights_size(proto)
    data = path.with_name(path.name + ".data")
    data.unlink(missing_ok=True)  # onnx appends to an existing data file
    external = size > EXTERNAL_DATA_BYTES
    onnx.save_model(proto, str(path), save_as_external_data=external, location=data.name if external else None)
    return path
