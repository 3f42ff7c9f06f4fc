"""Lowering to Core ML: `lower_coreml` writes a `.mlpackage` (an ML program) of one part for one batch, and
`read_package` says what is in it.

coremltools runs on Linux as far as this module needs it: it converts, writes and reads packages; only Apple's systems
run them. What a package computes can be checked everywhere with [`mil.run_package`], an interpreter of its program.

Precisions: `fp32` and `fp16` compute in that type. `int8` (a scale an output channel) and `int4` (palettes of 16
entries, one for 16 output channels) store the weights of linear layers and convolutions so, rounded to the nearest, and
compute in fp16. A model that [`edgedit_hf.quantization`] has quantised keeps its palettes and grids. Either way they
are written as Core ML's own, entry by entry.

All packages need iOS 18 / macOS 15: palettes of a group of channels, 4-bit grids with a scale a block, and attention as
one operator came with them. In fp16, what half precision cannot hold stays fp32: the angles of the timestep features
(999 in steps of 0.5), and squares and their means in norms that are not one operator (group norm, RMS norm).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ...errors import EdgeDiTError
from ...files import atomic_folder, explain_write_errors
from ...quantization.layers import quantizable_layers
from ...quantization.packing import unpack
from ...quantization.quantize import quantize_weight
from ...quantization.weights import AffineWeight, PaletteWeight, QuantizedWeight, matrix_shape
from ..formats import FORMATS
from ..parts import Part, share
from ..wrappers import quiet
from .form import coreml_program

if TYPE_CHECKING:
    from coremltools.converters.mil import Operation, Program, Var

FORMAT = FORMATS["coreml"]
TARGET = "iOS18"
SPECS = {
    "int8": {"scheme": "affine", "bits": 8, "group_size": 0, "symmetric": True},
    "int4": {"scheme": "palette", "bits": 4, "rows_per_palette": 16},
}
MIN_QUANTIZED_ELEMENTS = 1024  # smaller matrices stay fp16: their scales and palettes cost more than they save
METADATA_PREFIX = "edgedit."
# Statistics of norms: squares overflow half precision above 255, and a mean of many loses digits.
_STATISTICS = {"square", "pow", "reduce_mean", "reduce_l2_norm", "rsqrt", "sqrt"}
_ON_THE_WAY_TO_AN_ANGLE = {"add", "sub", "mul", "real_div", "matmul", "expand_dims", "reshape", "transpose", "concat"}


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """[`quiet`], and no progress bars: coremltools draws one a group of passes."""
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        yield


def lower_coreml(
    part: Part,
    path: str | os.PathLike,
    precision: str,
    facts: Mapping[str, str],
    *,
    quantized: Mapping[str, QuantizedWeight] | None = None,
    dynamic: bool = False,
) -> dict[str, Any]:
    """Write a part as a `.mlpackage` with its inputs and outputs by name, float32 (integers: int32), of the shapes of
    its examples.

    Args:
        part: what to lower.
        path: the package, a folder whose name ends in `.mlpackage`; it appears whole or not at all.
        precision: a dtype of the format; with `quantized`, `"fp16"` or `"fp32"`: what everything else is.
        facts: text stored in the package's user-defined metadata as `edgedit.<key>`.
        quantized: layer name → the weight of which the part's module holds the dequantised values. Palettes become
            `constexpr_lut_to_dense` with the same indices and entries, grids `constexpr_blockwise_shift_scale` with the
            same integers and scales. Layers that are not in this part are passed over.
        dynamic: open shapes; there are none here, so `True` is an error.

    Returns:
        What [`read_package`] says, `precision`, `compute_precision`, and with quantised weights the layers `mapped` and
        those in the part that are `dense`, because the graph needed their values.

    Raises:
        EdgeDiTError: coremltools is not installed; precision, shapes or a kind of quantised weight do not exist in Core
            ML; the part has an operator that it cannot convert; the disk is full.
    """
    FORMAT.require()
    path, quantized = Path(path), dict(quantized or {})
    _check(path, precision, quantized, dynamic)
    compute = "fp32" if precision == "fp32" else "fp16"
    report: dict[str, Any] = {"precision": precision, "compute_precision": compute}
    with silent(), explain_write_errors(path):
        import coremltools as ct

        if precision in SPECS:
            part, quantized = _quantize(part, SPECS[precision])
        program = _convert(part, compute)
        if quantized:
            report["mapped"] = write_native(program, quantized)
            report["dense"] = _dense(part, quantized, report["mapped"])
        once = ct.PassPipeline.EMPTY  # the program has been through all passes already
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target[TARGET],
            pass_pipeline=once,
            skip_model_load=True,
        )
        model.user_defined_metadata.update({f"{METADATA_PREFIX}{key}": str(value) for key, value in facts.items()})
        with atomic_folder(path) as folder:
            # coremltools insists on the suffix, which the folder aside does not have.
            model.save(str(folder / path.name))
            for entry in (folder / path.name).iterdir():
                os.replace(entry, folder / entry.name)
            (folder / path.name).rmdir()
            (folder / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)  # for ExecuTorch's profiler
    return {**report, **read_package(path)}


def _check(path: Path, precision: str, quantized: Mapping[str, QuantizedWeight], dynamic: bool) -> None:
    if precision not in FORMAT.precisions:
        raise EdgeDiTError(f"precision is {precision!r}; Core ML exports exist as {', '.join(FORMAT.precisions)}.")
    if path.suffix != FORMAT.suffix:
        raise EdgeDiTError(f"{path} does not end in {FORMAT.suffix}, as a Core ML package must; choose another name.")
    if dynamic:
        raise EdgeDiTError(
            "Core ML exports have fixed shapes, but open ones were asked for; give the batch as a number."
        )
    if quantized and precision not in ("fp32", "fp16"):
        raise EdgeDiTError(
            f"precision is {precision!r}, but the model is quantised already; give fp16 (or fp32) for what its own "
            "palettes leave out."
        )
    for name, weight in quantized.items():
        if not isinstance(weight, PaletteWeight | AffineWeight):
            raise EdgeDiTError(
                f"The layer {name} is quantised as {weight.scheme!r}, which Core ML does not have; use 'palette' or "
                "'affine'."
            )


# -------------------------------------------------------------------- conversion


def _convert(part: Part, compute: str) -> Program:
    """The part as a MIL program in its final types, after coremltools' own passes."""
    import coremltools as ct

    inputs = [
        ct.TensorType(name=name, shape=tuple(value.shape), dtype=np.float32 if value.is_floating_point() else np.int32)
        for name, value in part.inputs.items()
    ]
    try:
        return ct.convert(
            coreml_program(part.module, tuple(part.inputs.values())),
            convert_to="milinternal",
            inputs=inputs,
            outputs=[ct.TensorType(name=name, dtype=np.float32) for name in part.outputs],
            minimum_deployment_target=ct.target[TARGET],
            compute_precision=ct.precision.FLOAT32
            if compute == "fp32"
            else ct.transform.FP16ComputePrecision(op_selector=_fits_half),
        )
    except OSError:
        raise
    except Exception as error:  # whatever torch.export and coremltools think of
        raise EdgeDiTError(
            f"coremltools cannot convert the {part.name} of {part.component} ({error}); export this part as onnx."
        ) from error


def _fits_half(operation: Operation) -> bool:
    """Whether an operator may compute in half precision."""
    return operation.op_type not in _STATISTICS and not _becomes_angle(operation)


def _becomes_angle(operation: Operation) -> bool:
    """Whether an operator is a sine or cosine, or arithmetic that only leads to one."""
    if operation.op_type in ("sin", "cos"):
        return True
    if operation.op_type not in _ON_THE_WAY_TO_AN_ANGLE:
        return False
    followers = [follower for output in operation.outputs for follower in output.child_ops]
    return bool(followers) and all(_becomes_angle(follower) for follower in followers)


def _quantize(part: Part, spec: Mapping[str, Any]) -> tuple[Part, dict[str, QuantizedWeight]]:
    """The part with every linear layer and convolution of [`MIN_QUANTIZED_ELEMENTS`] or more rounded to a spec, and the
    weights by layer.

    By our own quantisation: the one in coremltools took seven times as long to find palettes, and leaves layers as they
    are whose rows are no multiple of a palette's.
    """
    module = share(part.module)
    weights = {}
    for name, layer in quantizable_layers(module).items():
        if layer.weight.numel() >= MIN_QUANTIZED_ELEMENTS:
            weights[name] = quantize_weight(layer.weight, spec)
            layer.weight = nn.Parameter(weights[name].dequantize(), requires_grad=False)
    return dataclasses.replace(part, module=module), weights


# -------------------------------------------------------------------- our palettes and grids as Core ML's


def write_native(program: Program, quantized: Mapping[str, QuantizedWeight]) -> list[str]:
    """Replace every constant of a program that holds the dequantised values of a quantised weight by the operator that
    unpacks the weight in Core ML.

    Constants are recognised by their values, all of them: what is replaced is equal to what replaces it.

    Returns:
        Names of the layers of which a constant was found and replaced.
    """
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil.scope import ScopeInfo, ScopeSource

    weights: dict[Any, tuple[Any, list[str]]] = {}
    for name, weight in quantized.items():
        dense = weight.dequantize()
        for dtype in (torch.float32, torch.float16):  # a program in fp16 may have fp32 islands
            weights.setdefault(_key(dense.to(dtype).numpy()), (weight, []))[1].append(name)
    mapped: set[str] = set()
    for function in program.functions.values():
        for operation in list(function.operations):
            value = operation.outputs[0].val if operation.op_type == "const" else None
            if not isinstance(value, np.ndarray) or (key := _key(value)) not in weights:
                continue
            weight, names = weights[key]
            inputs = native_inputs(weight, value.dtype)
            if inputs is None:
                continue
            build = mb.constexpr_lut_to_dense if "lut" in inputs else mb.constexpr_blockwise_shift_scale
            # Where in the exported graph it comes from; a program with operators that do not say so is refused.
            origin = [
                ScopeInfo(source=source, data=data)
                for source, data in operation.scopes.items()
                if source is not ScopeSource.COREMLTOOLS_GRAPH_PASS
            ]
            with function, mb.scope(*origin):
                packed = build(**inputs, before_op=operation, name=f"{operation.name}_packed")
            function.replace_uses_of_var_after_op(
                anchor_op=operation,
                old_var=operation.outputs[0],
                new_var=packed,
                no_check_var_types=True,
                force_replace=True,
            )
            function.remove_ops([operation])
            mapped.update(names)
    return sorted(mapped)


def native_inputs(weight: PaletteWeight | AffineWeight, dtype: np.dtype) -> dict[str, np.ndarray] | None:
    """Inputs of Core ML's operator for a quantised weight: `indices` and `lut`, or `data`, `scale` and perhaps
    `offset`.

    Core ML wants runs of equal length. Where the last run of rows (or group of inputs) is shorter, all are cut to their
    greatest common divisor with the whole, and palettes (scales) repeat.

    Args:
        dtype: of the entries and scales, float16 or float32.

    Returns:
        `None` for groups that cut through the kernel of a convolution: Core ML has no blocks of that shape.
    """
    from coremltools.converters.mil.mil import types

    rows, columns = matrix_shape(weight.shape)
    ones = (1,) * (len(weight.shape) - 2)
    if isinstance(weight, PaletteWeight):
        run = min(weight.rows_per_palette or rows, rows)
        step = rows if len(weight.palette) == 1 else math.gcd(run, rows)
        lut = weight.palette[torch.arange(0, rows, step) // run]
        indices = unpack(weight.indices, weight.bits, columns).reshape(weight.shape).numpy()
        return {
            "indices": indices.astype(types.string_to_nptype(f"uint{weight.bits}")),
            "lut": lut.reshape(len(lut), 1, *ones, -1, 1).numpy().astype(dtype),
        }
    group = min(weight.group_size or columns, columns)
    step = math.gcd(min(group, columns), columns)
    if step % math.prod(weight.shape[2:]):
        return None
    group_of = torch.arange(0, columns, step) // group
    values = unpack(weight.values, weight.bits, columns).reshape(weight.shape).numpy()
    inputs = {"scale": weight.scale[:, group_of].reshape(rows, -1, *ones).numpy().astype(dtype)}
    stored = 8 if weight.bits == 8 else 4  # Core ML has no integers of 2 bits here
    if weight.zero_point is None:
        return inputs | {
            "data": (values.astype(np.int16) - (1 << (weight.bits - 1))).astype(types.string_to_nptype(f"int{stored}"))
        }
    kind = types.string_to_nptype(f"uint{stored}")
    offset = unpack(weight.zero_point, weight.bits, weight.scale.shape[1])[:, group_of].reshape(rows, -1, *ones).numpy()
    return inputs | {"data": values.astype(kind), "offset": offset.astype(kind)}


def _key(value: np.ndarray) -> tuple[tuple[int, ...], str, bytes]:
    """What two equal arrays have in common."""
    return value.shape, str(value.dtype), hashlib.blake2b(np.ascontiguousarray(value).view(np.uint8)).digest()


def _dense(part: Part, quantized: Mapping[str, QuantizedWeight], mapped: list[str]) -> list[str]:
    """Quantised layers of which the part's module has the weight, but its program not the constant (such as a kernel
    that is used in slices).
    """
    parameters = list(part.module.parameters())
    left = {name: weight.dequantize() for name, weight in quantized.items() if name not in mapped}
    return sorted(
        name
        for name, dense in left.items()
        if any(p.shape == dense.shape and torch.equal(p, dense) for p in parameters)
    )


# -------------------------------------------------------------------- reading


def load_program(path: str | os.PathLike) -> Program:
    """The MIL program of a package, with its weights."""
    FORMAT.require()
    with silent():
        import coremltools as ct
        from coremltools.converters.mil.frontend.milproto.load import load

        model = ct.models.MLModel(str(path), skip_model_load=True)
        spec = model.get_spec()
        return load(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir)


def read_package(path: str | os.PathLike) -> dict[str, Any]:
    """What a package is made of.

    Returns:
        `bytes`; `operators`: number of each kind that computes; `weights`: kind (`"fp16"`, `"palettes of 4 bits"`,
        `"grids of 8 bits"`, …) → number of `tensors`, their `elements` and stored `bytes`; `minimum_deployment_target`;
        `inputs` and `outputs`: name → shape.
    """
    path = Path(path)
    main = load_program(path).functions["main"]
    weights: dict[str, Counter] = {}
    for operation in main.operations:
        if kind := _weight_kind(operation):
            stored = (
                [operation.outputs[0]]
                if operation.op_type == "const"
                else [value for value in operation.inputs.values() if value is not None]
            )
            weights.setdefault(kind, Counter()).update(
                tensors=1,
                elements=math.prod(operation.outputs[0].shape),
                bytes=sum(-(-value.val.size * _bits(value) // 8) for value in stored),
            )
    return {
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "operators": dict(
            sorted(
                Counter(
                    op.op_type
                    for op in main.operations
                    if op.op_type != "const" and not op.op_type.startswith("constexpr")
                ).items()
            )
        ),
        "weights": {kind: dict(count) for kind, count in sorted(weights.items())},
        "minimum_deployment_target": TARGET,
        "inputs": {name: list(value.shape) for name, value in main.inputs.items()},
        "outputs": {value.name: list(value.shape) for value in main.outputs},
    }


def _weight_kind(operation: Operation) -> str | None:
    """How a weight is stored, or `None` for what is none: an operator, an argument, or a piece of a packed weight."""
    if operation.op_type == "constexpr_lut_to_dense":
        return f"palettes of {_bits(operation.indices)} bits"
    if operation.op_type == "constexpr_blockwise_shift_scale":
        return f"grids of {_bits(operation.data)} bits"
    value = operation.outputs[0].val if operation.op_type == "const" else None
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.size < 2:
        return None
    packed = any(follower.op_type.startswith("constexpr") for follower in operation.outputs[0].child_ops)
    return None if packed else {2: "fp16", 4: "fp32"}[value.dtype.itemsize]


def _bits(value: Var) -> int:
    """Bits of an element; numpy has no types below a byte."""
    return value.dtype.get_bitwidth() if value.val.dtype.kind in "iu" else 8 * value.val.dtype.itemsize
