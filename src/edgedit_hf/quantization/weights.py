"""Quantised weights: packed integers and what they stand for, as tensors for safetensors and as a plain dict for
config.json.

A weight of shape `(O, …)` is seen as a matrix `(O, n)` of output rows, n = inputs · kernel size. Its *spec* is a dict
that says how it is stored: `{"scheme": "palette", "bits", "rows_per_palette"}`, `{"scheme": "affine", "bits",
"group_size", "symmetric"}` or `{"scheme": "nf4", "block"}`, with `"shape"` once there is a weight. Palettes and scales
are float16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..errors import EdgeDiTError
from .packing import lookup, packed_size

# The 16 quantiles of a normal distribution, scaled to [-1, 1], that bitsandbytes calls NormalFloat4 (QLoRA,
# arXiv:2305.14314, appendix E).
NF4_CODES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class PaletteWeight:
    """Every weight is an entry of a palette, which a run of consecutive output rows shares (Core ML's look-up tables
    per grouped channel).

    Args:
        indices: uint8 `(O, ⌈n·bits/8⌉)`, packed.
        palette: float16 `(⌈O / rows_per_palette⌉, 2^bits)`.
        rows_per_palette: output rows that share a palette (the last run may be shorter); 0: all.
    """

    indices: torch.Tensor
    palette: torch.Tensor
    bits: int
    rows_per_palette: int
    shape: tuple[int, ...]

    scheme: ClassVar[str] = "palette"
    defaults: ClassVar[dict[str, Any]] = {"bits": 4, "rows_per_palette": 16}

    @staticmethod
    def layout(spec: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = matrix_shape(shape)
        palettes = -(-rows // spec["rows_per_palette"]) if spec["rows_per_palette"] else 1
        return {
            "packed": ((rows, packed_size(columns, spec["bits"])), torch.uint8),
            "palette": ((palettes, 1 << spec["bits"]), torch.float16),
        }

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> PaletteWeight:
        return cls(tensors["packed"], tensors["palette"], spec["bits"], spec["rows_per_palette"], tuple(spec["shape"]))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors to store, by name."""
        return {"packed": self.indices, "palette": self.palette}

    def spec(self) -> dict[str, Any]:
        """How the weight is stored, in plain values."""
        return {
            "scheme": self.scheme,
            "bits": self.bits,
            "rows_per_palette": self.rows_per_palette,
            "shape": list(self.shape),
        }

    @property
    def num_bits(self) -> int:
        """Bits of all stored tensors."""
        return stored_bits(self)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that is meant, of shape `shape`."""
        rows, columns = matrix_shape(self.shape)
        palette_of_row = None
        if len(self.palette) > 1:
            palette_of_row = torch.arange(rows, dtype=torch.int32, device=self.indices.device) // self.rows_per_palette
        return lookup(self.indices, self.palette.to(dtype), self.bits, columns, palette_of_row).reshape(self.shape)


@dataclass(frozen=True)
class AffineWeight:
    """Weights on even grids: scale · (value − zero point), with a grid for every output row and group of inputs.

    Args:
        values: uint8 `(O, ⌈n·bits/8⌉)`, packed integers 0 … 2^bits − 1.
        scale: float16 `(O, G)`, G = ⌈n / group_size⌉.
        zero_point: uint8 `(O, ⌈G·bits/8⌉)`, packed; `None`: 2^(bits − 1) everywhere (a symmetric grid; ONNX's default
            for unsigned 4 bit).
        group_size: consecutive inputs that share a scale (the last group may be shorter); 0: all.
    """

    values: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    bits: int
    group_size: int
    shape: tuple[int, ...]

    scheme: ClassVar[str] = "affine"
    defaults: ClassVar[dict[str, Any]] = {"bits": 4, "group_size": 32, "symmetric": True}

    @staticmethod
    def layout(spec: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = matrix_shape(shape)
        groups = -(-columns // (spec["group_size"] or columns))
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "packed": ((rows, packed_size(columns, spec["bits"])), torch.uint8),
            "scale": ((rows, groups), torch.float16),
        }
        if not spec["symmetric"]:
            tensors["zero_point"] = ((rows, packed_size(groups, spec["bits"])), torch.uint8)
        return tensors

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> AffineWeight:
        return cls(
            tensors["packed"],
            tensors["scale"],
            tensors.get("zero_point"),
            spec["bits"],
            spec["group_size"],
            tuple(spec["shape"]),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors to store, by name."""
        tensors = {"packed": self.values, "scale": self.scale}
        return tensors if self.zero_point is None else {**tensors, "zero_point": self.zero_point}

    def spec(self) -> dict[str, Any]:
        """How the weight is stored, in plain values."""
        grid = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.zero_point is None}
        return {"scheme": self.scheme, **grid, "shape": list(self.shape)}

    @property
    def num_bits(self) -> int:
        """Bits of all stored tensors."""
        return stored_bits(self)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that is meant, of shape `shape`."""
        rows, columns = matrix_shape(self.shape)
        middle = 1 << (self.bits - 1) if self.zero_point is None else 0
        levels = torch.arange(-middle, (1 << self.bits) - middle, dtype=torch.float32, device=self.values.device)[None]
        # [O, n], exact small integers; whole bytes need no table.
        weight = self.values.float().sub_(middle) if self.bits == 8 else lookup(self.values, levels, self.bits, columns)
        group = min(self.group_size or columns, columns)  # of what a file claims, no more than there is
        weight = _padded(weight, group).view(rows, -1, group)
        if self.zero_point is not None:
            weight -= lookup(self.zero_point, levels, self.bits, weight.shape[1]).unsqueeze(-1)
        weight *= self.scale.float().unsqueeze(-1)
        return weight.view(rows, -1)[:, :columns].reshape(self.shape).to(dtype)


@dataclass(frozen=True)
class NF4Weight:
    """NormalFloat4 of bitsandbytes: 16 fixed codes times the largest absolute value of a block of the flattened weight.

    Args:
        values: uint8 `(⌈numel/2⌉,)`, packed codes.
        absmax: float16 `(⌈numel / block⌉,)` (bitsandbytes keeps float32, or 8 bits and a second scale).
        block: weights that share an absmax (the last block may be shorter).
    """

    values: torch.Tensor
    absmax: torch.Tensor
    block: int
    shape: tuple[int, ...]

    scheme: ClassVar[str] = "nf4"
    defaults: ClassVar[dict[str, Any]] = {"block": 64}

    @staticmethod
    def layout(spec: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        count = math.prod(shape)
        return {
            "packed": ((packed_size(count, 4),), torch.uint8),
            "absmax": ((-(-count // spec["block"]),), torch.float16),
        }

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> NF4Weight:
        return cls(tensors["packed"], tensors["absmax"], spec["block"], tuple(spec["shape"]))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors to store, by name."""
        return {"packed": self.values, "absmax": self.absmax}

    def spec(self) -> dict[str, Any]:
        """How the weight is stored, in plain values."""
        return {"scheme": self.scheme, "block": self.block, "shape": list(self.shape)}

    @property
    def num_bits(self) -> int:
        """Bits of all stored tensors."""
        return stored_bits(self)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that is meant, of shape `shape`."""
        count = math.prod(self.shape)
        block = min(self.block, count)
        codes = torch.tensor([NF4_CODES], device=self.values.device)
        weight = _padded(lookup(self.values, codes, 4, count), block).view(-1, block)
        weight *= self.absmax.float()[:, None]
        return weight.view(-1)[:count].reshape(self.shape).to(dtype)


def _padded(tensor: torch.Tensor, group: int) -> torch.Tensor:
    """The tensor with zeros up to whole groups of its last dimension; itself, contiguous, where there is nothing to
    add.
    """
    missing = -tensor.shape[-1] % group
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor.contiguous()


QuantizedWeight = PaletteWeight | AffineWeight | NF4Weight
SCHEMES: dict[str, type[QuantizedWeight]] = {kind.scheme: kind for kind in (PaletteWeight, AffineWeight, NF4Weight)}
_ALLOWED: dict[str, Any] = {
    "bits": {"palette": (1, 2, 4, 8), "affine": (2, 4, 8)},
    "rows_per_palette": 0,
    "group_size": 0,
    "block": 1,
}


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(output rows, weights a row) of a weight."""
    return shape[0], math.prod(shape[1:])


def complete_spec(spec: Mapping[str, Any], shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """A spec with the values that it leaves open, checked; with the shape of the weight where it is given (a spec that
    has another one does not fit)."""
    if not isinstance(spec, Mapping):
        raise EdgeDiTError(
            f"The spec of a quantised weight is {spec!r}; it must be a dict such as {{'scheme': 'nf4'}}."
        )
    kind = SCHEMES.get(spec["scheme"]) if isinstance(spec.get("scheme"), str) else None
    if kind is None:
        raise EdgeDiTError(
            f"The spec {dict(spec)} has the scheme {spec.get('scheme')!r}; the schemes are {', '.join(SCHEMES)}."
        )
    unknown = sorted(set(spec) - {"scheme", "shape", *kind.defaults})
    if unknown:
        raise EdgeDiTError(
            f"The spec {dict(spec)} has {unknown[0]!r}; {kind.scheme!r} takes {', '.join(kind.defaults)}."
        )
    complete = {"scheme": kind.scheme, **kind.defaults, **spec}
    for name in kind.defaults:
        value = complete[name]
        if name == "symmetric":
            fits, wanted = isinstance(value, bool), "true or false"
        elif name == "bits":
            allowed = _ALLOWED["bits"][kind.scheme]
            fits, wanted = type(value) is int and value in allowed, f"one of {', '.join(map(str, allowed))}"
        else:
            fits, wanted = type(value) is int and value >= _ALLOWED[name], f"an integer of at least {_ALLOWED[name]}"
        if not fits:
            raise EdgeDiTError(f"The spec {dict(spec)} has {name} {value!r}; it must be {wanted}.")
    claimed = complete.get("shape", ())
    if not isinstance(claimed, (list, tuple)) or not all(type(size) is int and size > 0 for size in claimed):
        raise EdgeDiTError(f"The spec {dict(spec)} has the shape {claimed!r}; it must be a list of positive integers.")
    if shape is not None:
        if tuple(complete.get("shape", shape)) != tuple(shape):
            raise EdgeDiTError(
                f"The spec {dict(spec)} is for a weight of shape {tuple(spec['shape'])}, but the layer's is "
                f"{tuple(shape)}."
            )
        complete["shape"] = list(shape)
    return complete


def layout(spec: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name → (shape, dtype) of the tensors that hold a weight of this shape."""
    spec = complete_spec(spec, shape)
    return SCHEMES[spec["scheme"]].layout(spec, tuple(shape))


def from_tensors(spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
    """The weight that `spec` (with its `shape`) and these tensors describe."""
    spec = complete_spec(spec)
    if "shape" not in spec:
        raise EdgeDiTError(f"The spec {spec} has no shape; a stored weight needs one.")
    expected = layout(spec, tuple(spec["shape"]))
    got = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if got != expected:
        raise EdgeDiTError(f"The tensors of a quantised weight are {got}, but its spec {spec} needs {expected}.")
    return SCHEMES[spec["scheme"]].from_tensors(spec, tensors)


def spec_bits(spec: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    """Bits that a weight of this shape takes in this form: what [`PaletteWeight.num_bits`] will say, without a
    weight.
    """
    return sum(8 * math.prod(size) * dtype.itemsize for size, dtype in layout(spec, shape).values())


def stored_bits(weight: QuantizedWeight) -> int:
    """Bits of all tensors of a weight."""
    return sum(8 * tensor.numel() * tensor.element_size() for tensor in weight.tensors().values())
