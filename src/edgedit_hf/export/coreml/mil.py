"""Runs the program of a Core ML package in torch, operator by operator: `run_package`. Core ML itself runs on Apple's
systems only.

A check of what was converted, not of Core ML: it reads the saved file, packed weights as Core ML's documentation
defines them, computes in float32, and rounds what the program declares as float16 to float16. Core ML's own kernels
accumulate and round differently. It knows the operators that our parts become.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from ...errors import EdgeDiTError
from .lower import load_program

if TYPE_CHECKING:
    from coremltools.converters.mil import Operation, Var


def run_package(path: str | os.PathLike, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs of a package for inputs, by name.

    Args:
        inputs: tensors of the package's shapes; integers of any size.

    Raises:
        EdgeDiTError: the program has an operator that this interpreter does not know.
    """
    main = load_program(path).functions["main"]
    if set(inputs) != set(main.inputs):
        raise EdgeDiTError(
            f"The package {path} takes the inputs {', '.join(main.inputs)}; {', '.join(inputs)} were given."
        )
    values = {name: _rounded(tensor, main.inputs[name]) for name, tensor in inputs.items()}
    with torch.no_grad():
        for operation in main.operations:
            if operation.op_type == "const":
                continue
            if operation.op_type not in OPERATORS:
                raise EdgeDiTError(
                    f"The package {path} has the operator {operation.op_type!r}, which can be run by Core ML only."
                )
            result = OPERATORS[operation.op_type](_Arguments(operation, values))
            for output, tensor in zip(operation.outputs, result if isinstance(result, tuple | list) else (result,)):
                values[output.name] = _rounded(tensor, output)
    return {output.name: values[output.name] for output in main.outputs}


def _rounded(tensor: torch.Tensor, declared: Var) -> torch.Tensor:
    """A value as the program's type holds it, in the type that is computed in here."""
    kind = declared.dtype.__name__
    if kind in ("fp16", "fp32"):
        return tensor.half().float() if kind == "fp16" else tensor.float()
    return tensor.bool() if kind == "bool" else tensor.long()


class _Arguments:
    """The arguments of an operator by name: computed values and weights as tensors, settings as Python's own."""

    def __init__(self, operation: Operation, values: Mapping[str, torch.Tensor]):
        self.operation, self.values = operation, values

    def __getattr__(self, name: str) -> Any:
        """A setting, `None` where it is not there."""
        given = self.operation.inputs.get(name)
        if given is None or given.val is None:
            return None
        return given.val.tolist() if isinstance(given.val, np.ndarray | np.generic) else given.val

    def tensor(self, name: str) -> torch.Tensor | None:
        given = self.operation.inputs.get(name)
        return None if given is None else self._value(given)

    def tensors(self, name: str) -> list[torch.Tensor]:
        return [self._value(given) for given in self.operation.inputs[name]]

    def _value(self, given: Var) -> torch.Tensor:
        if given.name in self.values:
            return self.values[given.name]
        return _rounded(torch.from_numpy(np.array(given.val)), given)


def _unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[_Arguments], torch.Tensor]:
    return lambda given: function(given.tensor("x"))


def _binary(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[_Arguments], torch.Tensor]:
    return lambda given: function(given.tensor("x"), given.tensor("y"))


def _lut_to_dense(given: _Arguments) -> torch.Tensor:
    indices, lut = given.tensor("indices"), given.tensor("lut")[..., 0]
    for axis, size in enumerate(indices.shape):
        lut = lut.repeat_interleave(size // lut.shape[axis], axis)
    return lut.gather(-1, indices[..., None])[..., 0]


def _shift_scale(given: _Arguments) -> torch.Tensor:
    data, scale, offset = given.tensor("data"), given.tensor("scale"), given.tensor("offset")
    offset = torch.zeros_like(scale) if offset is None else offset
    for axis, size in enumerate(data.shape):
        scale, offset = (grid.repeat_interleave(size // grid.shape[axis], axis) for grid in (scale, offset))
    return scale * (data - offset)


def _conv(given: _Arguments) -> torch.Tensor:
    x, pad = given.tensor("x"), given.pad or [0] * 2 * (given.tensor("x").ndim - 2)
    if given.pad_type not in (None, "custom", "valid"):
        raise EdgeDiTError(f"A convolution has the padding {given.pad_type!r}, which can be run by Core ML only.")
    pairs = [pad[index : index + 2] for index in range(0, len(pad), 2)]
    x = F.pad(x, [size for pair in reversed(pairs) for size in pair])
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.ndim]
    return function(
        x, given.tensor("weight"), given.tensor("bias"), given.strides or 1, 0, given.dilations or 1, given.groups or 1
    )


def _attention(given: _Arguments) -> torch.Tensor:
    query, key, value = (given.tensor(name) for name in ("query", "key", "value"))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=given.tensor("attn_mask"))


def _matmul(given: _Arguments) -> torch.Tensor:
    x, y = given.tensor("x"), given.tensor("y")
    return (x.mT if given.transpose_x else x) @ (y.mT if given.transpose_y else y)


def _layer_norm(given: _Arguments) -> torch.Tensor:
    x, axes = given.tensor("x"), given.axes
    centred = x - x.mean(axes, keepdim=True)
    normed = centred * (centred.square().mean(axes, keepdim=True) + (given.epsilon or 1e-5)).rsqrt()
    gamma, beta = given.tensor("gamma"), given.tensor("beta")
    normed = normed if gamma is None else normed * gamma
    return normed if beta is None else normed + beta


def _batch_norm(given: _Arguments) -> torch.Tensor:
    arguments = (given.tensor(name) for name in ("x", "mean", "variance", "gamma", "beta"))
    return F.batch_norm(*arguments, eps=given.epsilon or 1e-5)


def _slice(given: _Arguments) -> torch.Tensor:
    x = given.tensor("x")
    count = x.ndim
    strides, off = given.stride or [1] * count, [False] * count
    masks = given.begin_mask or off, given.end_mask or off, given.squeeze_mask or off
    picks: list[Any] = []
    for begin, end, stride, from_start, to_end, squeeze in zip(given.begin, given.end, strides, *masks):
        picks.append(begin if squeeze else slice(None if from_start else begin, None if to_end else end, stride))
    return x[tuple(picks)]


def _split(given: _Arguments) -> list[torch.Tensor]:
    x, axis = given.tensor("x"), given.axis
    return list(x.split(given.split_sizes or x.shape[axis] // given.num_splits, axis))


def _gather(given: _Arguments) -> torch.Tensor:
    x, indices, axis = given.tensor("x"), given.tensor("indices"), given.axis or 0
    axis %= x.ndim
    return x.index_select(axis, indices.reshape(-1)).reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _reshape(given: _Arguments) -> torch.Tensor:
    x = given.tensor("x")
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(given.shape)])


def _squeeze(given: _Arguments) -> torch.Tensor:
    return given.tensor("x").squeeze(tuple(given.axes) if given.axes is not None else None)


def _expand_dims(given: _Arguments) -> torch.Tensor:
    x, count = given.tensor("x"), given.tensor("x").ndim + len(given.axes)
    for axis in sorted(axis % count for axis in given.axes):
        x = x.unsqueeze(axis)
    return x


def _pad(given: _Arguments) -> torch.Tensor:
    if given.mode not in (None, "constant"):
        raise EdgeDiTError(f"A padding has the mode {given.mode!r}, which can be run by Core ML only.")
    pairs = [given.pad[index : index + 2] for index in range(0, len(given.pad), 2)]
    return F.pad(
        given.tensor("x"), [size for pair in reversed(pairs) for size in pair], value=given.constant_val or 0.0
    )


def _upsample(given: _Arguments) -> torch.Tensor:
    return F.interpolate(
        given.tensor("x"), scale_factor=(given.scale_factor_height, given.scale_factor_width), mode="nearest"
    )


_GELU = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}

OPERATORS: dict[str, Callable[[_Arguments], Any]] = {
    "constexpr_lut_to_dense": _lut_to_dense,
    "constexpr_blockwise_shift_scale": _shift_scale,
    "linear": lambda given: F.linear(given.tensor("x"), given.tensor("weight"), given.tensor("bias")),
    "conv": _conv,
    "matmul": _matmul,
    "scaled_dot_product_attention": _attention,
    "softmax": lambda given: given.tensor("x").softmax(-1 if given.axis is None else given.axis),
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "gelu": lambda given: F.gelu(given.tensor("x"), approximate=_GELU[given.mode or "EXACT"]),
    "reshape": _reshape,
    "transpose": lambda given: given.tensor("x").permute(given.perm),
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "concat": lambda given: torch.cat(given.tensors("values"), given.axis),
    "stack": lambda given: torch.stack(given.tensors("values"), given.axis),
    "split": _split,
    "slice_by_index": _slice,
    "tile": lambda given: given.tensor("x").repeat(given.reps),
    "pad": _pad,
    "upsample_nearest_neighbor": _upsample,
    "pixel_shuffle": lambda given: F.pixel_shuffle(given.tensor("x"), given.upscale_factor),
    "gather": _gather,
    "gather_nd": lambda given: given.tensor("x")[tuple(given.tensor("indices").unbind(-1))],
    "select": lambda given: torch.where(given.tensor("cond"), given.tensor("a"), given.tensor("b")),
    "reduce_mean": lambda given: given.tensor("x").mean(given.axes, keepdim=bool(given.keep_dims)),
    "reduce_sum": lambda given: given.tensor("x").sum(given.axes, keepdim=bool(given.keep_dims)),
    "reduce_l2_norm": lambda given: torch.linalg.vector_norm(
        given.tensor("x"), dim=given.axes, keepdim=bool(given.keep_dims)
    ),
    "rsqrt": lambda given: (given.tensor("x") + (given.epsilon or 0.0)).rsqrt(),
    "clip": lambda given: given.tensor("x").clamp(given.alpha, given.beta),
    "add": _binary(torch.add),
    "sub": _binary(torch.sub),
    "mul": _binary(torch.mul),
    "real_div": _binary(torch.div),
    "pow": _binary(torch.pow),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "logical_and": _binary(torch.logical_and),
    "logical_or": _binary(torch.logical_or),
    "equal": _binary(torch.eq),
    "not_equal": _binary(torch.ne),
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "cast": _unary(lambda x: x),  # the type is that of the output
    "identity": _unary(lambda x: x),
    "logical_not": _unary(torch.logical_not),
    "cos": _unary(torch.cos),
    "sin": _unary(torch.sin),
    "exp": _unary(torch.exp),
    "tanh": _unary(torch.tanh),
    "sigmoid": _unary(torch.sigmoid),
    "silu": _unary(F.silu),
    "relu": _unary(torch.relu),
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
}
