"""Lowering to ONNX: `export_onnx` (fp32, torch's dynamo exporter), `quantize_int8` (dynamic int8 of every linear layer), and
`export_pipeline`, which makes a verified and timed pipeline folder.

The files describe themselves: `metadata_props` holds the genotype, the model config, the weights' hash, the precision and the batch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper

from ..errors import EdgeDiTError
from ..genotype import Genotype
from ..run_state import atomic_folder, atomic_write_json, versions, weights_hash
from .wrappers import DenoiserWrapper, onnx_attention

if TYPE_CHECKING:
    from torch import nn

    from ..models.transformer_edgedit import EdgeDiTTransformer2DModel
    from ..pipelines.pipeline_edgedit import EdgeDiTPipeline

ATTENTION_OPSET = 23  # the first with an Attention operator: fewer nodes, and faster than its decomposed form
DEFAULT_OPSET = ATTENTION_OPSET
EXTERNAL_DATA_BYTES = 1_500_000_000  # above this the weights go to model.onnx.data: one protobuf file ends at 2 GB
MIN_QUANTIZED_ELEMENTS = 1024  # smaller matrices stay fp32: their scales and extra operators cost more than they save


def check_batch(batch: str | int) -> str | int:
    """`"dynamic"` or a positive integer (also as text), else an [`EdgeDiTError`]."""
    if batch == "dynamic":
        return batch
    try:
        number = int(batch)
    except ValueError:
        number = 0
    if number < 1:
        raise EdgeDiTError(f"batch is {batch!r}; give 'dynamic' or a number of at least 1.")
    return number


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
    kinds = sorted({str(p.dtype) for p in model.parameters()})
    if kinds != ["torch.float32"]:
        raise EdgeDiTError(
            f"The model's parameters are {', '.join(kinds)}; export needs float32: load it without a torch_dtype."
        )
    size = model.config.sample_size
    example = 2 if batch == "dynamic" else batch  # torch.export would freeze a dynamic batch of 0 or 1
    inputs = (torch.zeros(example, model.config.in_channels, size, size), torch.zeros(example))
    if model.config.num_classes:
        inputs += (torch.zeros(example, dtype=torch.long),)
    proto = lower(DenoiserWrapper(model), inputs, dynamic=batch == "dynamic", opset=opset)
    config = {k: v for k, v in model.config.items() if not k.startswith("_")}
    write_metadata(
        proto,
        genotype=Genotype.from_layers(config["layers"], config["hidden_size"]).to_json(),
        config=json.dumps(config, sort_keys=True),
        weights=weights_hash(model.state_dict()),
        precision="fp32",
        batch=str(batch),
        versions=json.dumps(versions()),
    )
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
        with torch.no_grad(), _quiet_exporter(), attention:
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


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says on every call about absent torchvision and renamed dynamic dimensions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter._registration")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


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


# -------------------------------------------------------------------- whole pipelines


def export_pipeline(
    pipeline: EdgeDiTPipeline | str | os.PathLike,
    output: str | os.PathLike,
    *,
    dtype: str = "fp32",
    batch: str | int = "dynamic",
    opset: int = DEFAULT_OPSET,
    tolerance: float | None = None,
    seed: int = 0,
    threads: int = 2,
    bench_batches: Sequence[int] = (2, 8),
    bench_repeats: int = 20,
    num_images: int = 8,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Export a pipeline: lower its denoiser, verify it, time it, and write a pipeline folder around the artefact.

    The folder holds model_index.json, scheduler/, transformer/config.json, transformer/onnx/model.onnx, the VAE if there is one
    (as safetensors), verify.json and bench.json. It appears at once and complete, or, if a gate fails, not at all.

    Args:
        pipeline: an [`EdgeDiTPipeline`], a pipeline folder or a Hub id.
        output: folder to write.
        dtype: `"fp32"` or `"int8"`.
        batch: `"dynamic"`, or the only batch of a forward (guidance makes it twice the images).
        opset: ONNX operator set, 18 or later.
        tolerance: largest relative error of a forward; default `verify.TOLERANCE[dtype]`.
        seed: seed of the comparison's images.
        threads: threads of the comparison and the timing.
        bench_batches: batches that are timed (a fixed `batch` is timed alone).
        bench_repeats: timed rounds a batch.
        num_images: images of the comparison.
        overwrite: whether `output`, if it is an older pipeline folder, is replaced.
        trust_remote_code: whether code in the pipeline's repository may run.

    Returns:
        `output`.

    Raises:
        EdgeDiTError: the pipeline cannot be loaded or is an export already, `output` is in the way, or a gate fails (the message
            has the measured error and the tolerance; nothing is written).
    """
    from ..launch import load_pipeline, with_transformer
    from . import verify
    from .runtime import MODEL_FILE, OnnxEdgeDiTTransformer2DModel

    batch = check_batch(batch)
    if dtype not in verify.TOLERANCE:
        raise EdgeDiTError(f"dtype is {dtype!r}; ONNX exports exist as {' and '.join(verify.TOLERANCE)}.")
    output = Path(output)
    check_output(output, overwrite)
    source = str(pipeline) if isinstance(pipeline, (str, os.PathLike)) else None
    if source is not None:
        pipeline = load_pipeline(pipeline, trust_remote_code=trust_remote_code)
    model = pipeline.transformer
    if not isinstance(model, torch.nn.Module):
        raise EdgeDiTError(
            f"The transformer is a {type(model).__name__}, an export already; give the pipeline that it was made from."
        )
    config = {k: v for k, v in model.config.items() if not k.startswith("_")}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with atomic_folder(output) as folder:
            files = {"fp32": folder / "fp32.onnx"}
            export_onnx(model, files["fp32"], batch=batch, opset=opset)
            if dtype == "int8":
                files["int8"] = quantize_int8(files["fp32"], folder / "int8.onnx")
            transformer = folder / "transformer"
            OnnxEdgeDiTTransformer2DModel(**config, precision=dtype, batch=batch).save_config(transformer)
            shipped = save_onnx(onnx.load(str(files[dtype])), transformer / MODEL_FILE)
            artefact = OnnxEdgeDiTTransformer2DModel.from_pretrained(transformer, num_threads=threads)
            found = verify.compare(pipeline, artefact, seed=seed, num_images=num_images)
            source_of = {
                "source": source,
                "genotype": Genotype.from_layers(config["layers"], config["hidden_size"]).hash,
            }
            source_of["weights"] = artefact.metadata["weights"]
            atomic_write_json(folder / "verify.json", {**verify.check(found, dtype, tolerance), **source_of})
            batches = bench_batches if batch == "dynamic" else [batch]
            timed = {name: shipped if name == dtype else file for name, file in files.items()}
            atomic_write_json(
                folder / "bench.json", {**verify.benchmark(model, timed, batches, threads, bench_repeats), **source_of}
            )
            with_transformer(pipeline, artefact).save_pretrained(folder)
            for file in files.values():
                file.unlink()
                file.with_name(file.name + ".data").unlink(missing_ok=True)
    finally:
        torch.set_num_threads(before)
    return output


def check_output(output: Path, overwrite: bool) -> None:
    """An existing folder is replaced only if asked for, and only if it is a pipeline folder (or empty)."""
    if not output.exists():
        return
    if output.is_dir() and not any(output.iterdir()):
        return
    if not (output / "model_index.json").is_file():
        raise EdgeDiTError(f"{output} exists and is not a pipeline folder; it is left as it is. Choose another output.")
    if not overwrite:
        raise EdgeDiTError(
            f"{output} holds a pipeline already; choose another output, or allow overwriting it (--overwrite)."
        )
