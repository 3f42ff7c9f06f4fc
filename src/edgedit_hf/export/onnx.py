"""Lowering to ONNX: `export_onnx` (fp32, torch's dynamo exporter) and `quantize_int8` (dynamic int8 of every linear layer).

The files describe themselves: `metadata_props` holds the genotype, the model config, the weights' hash, the precision and the batch.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper

from ..errors import EdgeDiTError
from .wrappers import DenoiserWrapper, check_batch, check_model, describe, onnx_attention, quiet

if TYPE_CHECKING:
    from torch import nn

    from ..models.transformer_edgedit import EdgeDiTTransformer2DModel

ATTENTION_OPSET = 23  # the first with an Attention operator: fewer nodes, and faster than its decomposed form
DEFAULT_OPSET = ATTENTION_OPSET
EXTERNAL_DATA_BYTES = 1_500_000_000  # above this the weights go to model.onnx.data: one protobuf file ends at 2 GB
MIN_QUANTIZED_ELEMENTS = 1024  # smaller matrices stay fp32: their scales and extra operators cost more than they save


# -------------------------------------------------------------------- fp32


def export_onnx(
    model: EdgeDiTTransformer2DModel, path: str | os.PathLike, batch: str | int = "dynamic", opset: int = DEFAULT_OPSET
) -> Path:
    """Write the denoiser as fp32 ONNX with inputs `sample`, `timestep`, `class_labels` and output `prediction`.

    Args:
        model: the denoiser, float32, on the CPU; its mode (train/eval) is put back.
        path: the .onnx file; weights above [`EXTERNAL_DATA_BYTES`] go to `<path>.data` beside it.
        batch: `"dynamic"`, or the only batch the file shall take.
        opset: ONNX operator set, 18 or later.

    Returns:
        `path`.

    Raises:
        EdgeDiTError: the model is not float32 or not plain weights, or the batch or opset is not one.
    """
    batch = check_batch(batch)
    check_model(model)
    size = model.config.sample_size
    example = 2 if batch == "dynamic" else batch  # torch.export would freeze a dynamic batch of 0 or 1
    inputs = (torch.zeros(example, model.config.in_channels, size, size), torch.zeros(example))
    if model.config.num_classes:
        inputs += (torch.zeros(example, dtype=torch.long),)
    proto = lower(DenoiserWrapper(model), inputs, dynamic=batch == "dynamic", opset=opset)
    write_metadata(proto, **describe(model, "fp32", batch))
    return save_onnx(proto, path)


def lower(wrapper: nn.Module, inputs: tuple[torch.Tensor, ...], dynamic: bool, opset: int) -> onnx.ModelProto:
    """Trace a wrapper (its `input_names` and `output_names` name the tensors) into an ONNX model.

    Args:
        wrapper: module with positional tensor inputs.
        inputs: example inputs; the first dimension of each is the batch.
        dynamic: whether the batch stays open.
        opset: ONNX operator set.
    """
    if not 18 <= opset <= onnx.defs.onnx_opset_version():
        raise EdgeDiTError(
            f"opset is {opset}; it must be from 18 to {onnx.defs.onnx_opset_version()} with this onnx version."
        )
    training = wrapper.training
    dynamic_shapes = None
    if dynamic:
        names = torch.export.Dim("batch", min=1)
        dynamic_shapes = tuple({0: names} for _ in inputs)
    attention = onnx_attention(wrapper) if opset >= ATTENTION_OPSET else contextlib.nullcontext()
    wrapper.eval()
    try:
        with torch.no_grad(), quiet(), attention:
            program = torch.onnx.export(
                wrapper,
                inputs,
                dynamo=True,
                opset_version=opset,
                input_names=wrapper.input_names[: len(inputs)],
                output_names=wrapper.output_names,
                dynamic_shapes=dynamic_shapes,
                verbose=False,
            )
    finally:
        wrapper.train(training)
    proto = program.model_proto
    for node in proto.graph.node:
        del node.metadata_props[
            :
        ]  # the exporter's stack traces: half a small file, and paths of the machine that made it
    for value in (*proto.graph.input, *proto.graph.output):
        del value.metadata_props[:]
    # Shape notes of inner values: every tool infers them itself, the quantiser trips over them, and with them ONNX Runtime fuses the
    # last residual into a SkipLayerNormalization that is several times slower than what it replaces.
    proto.graph.ClearField("value_info")
    del proto.graph.metadata_props[:]
    return proto


def write_metadata(proto: onnx.ModelProto, **values: str) -> None:
    """Set `metadata_props["edgedit.<key>"]` for every key."""
    kept = {entry.key: entry.value for entry in proto.metadata_props}
    kept.update({f"edgedit.{key}": value for key, value in values.items()})
    del proto.metadata_props[:]
    for key, value in kept.items():
        proto.metadata_props.add(key=key, value=value)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The `edgedit.*` metadata of a file without the prefix; external weights are not read."""
    proto = onnx.load(str(path), load_external_data=False)
    return {e.key.removeprefix("edgedit."): e.value for e in proto.metadata_props if e.key.startswith("edgedit.")}


def initializer_bytes(path: str | os.PathLike) -> dict[str, int]:
    """Bytes of the weights in a file by element type, e.g. `{"int8": 1769472, "float32": 30000}`."""
    total: dict[str, int] = {}
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        total[kind.name] = total.get(kind.name, 0) + int(np.prod(tensor.dims, dtype=np.int64)) * kind.itemsize
    return dict(sorted(total.items()))


def save_onnx(proto: onnx.ModelProto, path: str | os.PathLike) -> Path:
    """Write a model; big weights go to `<path>.data`, which must stay beside the file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    data = path.with_name(path.name + ".data")
    data.unlink(missing_ok=True)  # onnx appends to an existing data file
    external = size > EXTERNAL_DATA_BYTES
    onnx.save_model(proto, str(path), save_as_external_data=external, location=data.name if external else None)
    return path


# -------------------------------------------------------------------- int8


def quantize_int8(source: str | os.PathLike, target: str | os.PathLike) -> Path:
    """Dynamic int8: weights of all linear layers signed per output channel, activations unsigned per tensor at run time.

    The adaLN layers and embedders act on `(B, D)` and lower to Gemm, which ONNX Runtime's dynamic quantiser skips; they are rewritten
    to MatMul + Add first (they are a third of a DiT's weights). What stays fp32: biases, the position table, the label
    table (a look-up, no arithmetic), the patch convolution (`patch_size² · channels` inputs: ConvInteger costs more than it saves) and
    matrices below [`MIN_QUANTIZED_ELEMENTS`].

    Args:
        source: fp32 file of [`export_onnx`].
        target: file to write.

    Returns:
        `target`.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    proto = onnx.load(str(source))
    precision = {e.key: e.value for e in proto.metadata_props}.get("edgedit.precision", "fp32")
    if precision != "fp32":
        raise EdgeDiTError(f"{source} is {precision} already; quantise the fp32 file it was made from.")
    gemm_to_matmul(proto)
    weights = {t.name: tuple(t.dims) for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT}
    chosen = []
    for node in proto.graph.node:
        if node.op_type == "MatMul" and len(weights.get(node.input[1], ())) == 2:
            rows, columns = weights[node.input[1]]
            if rows * columns >= MIN_QUANTIZED_ELEMENTS:
                chosen.append(node.name)
    if not chosen:
        raise EdgeDiTError(
            f"{source} holds no linear layer to quantise (matrices of {MIN_QUANTIZED_ELEMENTS} elements or more)."
        )
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    external = sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > EXTERNAL_DATA_BYTES
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the quantiser logs its advice to the root logger
    try:
        quantize_dynamic(
            proto,
            str(target),
            op_types_to_quantize=["MatMul"],  # "Attention" would be taken for com.microsoft's
            nodes_to_quantize=chosen,
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=external,
        )
    finally:
        root.setLevel(level)
    quantized = onnx.load(str(target))
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(proto.metadata_props)
    write_metadata(quantized, precision="int8")
    return save_onnx(quantized, target)


def gemm_to_matmul(proto: onnx.ModelProto) -> None:
    """Rewrite every Gemm with a constant second input as MatMul + Add, in place (the transposed weight is stored)."""
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    uses: dict[str, int] = {}
    for node in proto.graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    nodes = []
    for node in proto.graph.node:
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        plain = options.get("alpha", 1.0) == 1.0 and options.get("beta", 1.0) == 1.0 and not options.get("transA", 0)
        if node.op_type != "Gemm" or not plain or node.input[1] not in weights:
            nodes.append(node)
            continue
        source, weight, *bias = node.input
        if options.get("transB", 0):
            array = np.ascontiguousarray(numpy_helper.to_array(weights[weight]).T)
            if uses[weight] == 1:
                weights[weight].CopyFrom(numpy_helper.from_array(array, weight))
            else:
                weight = f"{weight}.transposed"
                if weight not in weights:
                    weights[weight] = numpy_helper.from_array(array, weight)
                    proto.graph.initializer.append(weights[weight])
        name = node.name or node.output[0]
        product = f"{node.output[0]}.product" if bias else node.output[0]
        nodes.append(onnx.helper.make_node("MatMul", [source, weight], [product], name=f"{name}.matmul"))
        if bias:
            nodes.append(onnx.helper.make_node("Add", [product, bias[0]], [node.output[0]], name=f"{name}.add"))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
