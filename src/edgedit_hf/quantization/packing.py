"""Integers of 1, 2, 4 or 8 bits packed into bytes, the first value in the lowest bits (as in ONNX and Core ML)."""

from __future__ import annotations

import torch

from ..errors import EdgeDiTError

BITS = (1, 2, 4, 8)
_CHUNK = 1 << 18  # bytes that are unpacked at a time: their index stays in the cache
# Integer types by size in bytes: several packed values are copied as one of them.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take."""
    return -(-count * bits // 8)


def check_bits(bits: int, allowed: tuple[int, ...] = BITS) -> None:
    """Raise unless `bits` is one of the allowed widths."""
    if bits not in allowed:
        raise EdgeDiTError(f"bits is {bits!r}; it must be one of {', '.join(map(str, allowed))}.")


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack the last dimension of uint8 `values` `(…, n)`, each below 2^bits, to uint8 `(…, ⌈n·bits/8⌉)`; spare bits are
    0.
    """
    check_bits(bits)
    if values.dtype != torch.uint8 or (values.numel() and int(values.max()) >= 1 << bits):
        raise EdgeDiTError(
            f"Values of type {values.dtype} do not fit {bits} bits; give uint8 values below {1 << bits}."
        )
    if bits == 8:
        return values.contiguous()
    per_byte = 8 // bits
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    packed = values[..., 0].clone()
    for place in range(1, per_byte):
        packed |= values[..., place] << (place * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Undo [`pack`]: uint8 `(…, ⌈count·bits/8⌉)` → uint8 `(…, count)`."""
    return lookup(packed, torch.arange(1 << bits, dtype=torch.uint8, device=packed.device)[None], bits, count)


def _codes(bits: int, device: torch.device) -> torch.Tensor:
    """The values that each byte holds: int64 `(256, 8 / bits)`."""
    shifts = torch.arange(0, 8, bits, device=device)
    return (torch.arange(256, device=device)[:, None] >> shifts) & ((1 << bits) - 1)


def lookup(
    packed: torch.Tensor, tables: torch.Tensor, bits: int, count: int, table_of_row: torch.Tensor | None = None
) -> torch.Tensor:
    """What packed values stand for: a table look-up of whole bytes, so that 4-bit values are fetched in pairs.

    Args:
        packed: uint8 `(R, ⌈count·bits/8⌉)` (or `(…, ⌈count·bits/8⌉)` with one table).
        tables: `(T, 2^bits)`, the value of every code.
        table_of_row: int32 `(R,)`, the table that a row uses; `None`: all use the only one.

    Returns:
        Values of the tables' dtype, `(R, count)`; beside them there is only a small index in memory.
    """
    per_byte = 8 // bits
    table = tables if bits == 8 else tables[:, _codes(bits, tables.device)]  # [T, 256, values a byte]
    table = table.reshape(-1, per_byte).contiguous()
    words = table.view(
        _WORDS[min(8, per_byte * table.element_size())]
    )  # what one byte stands for, moved as one integer where it fits
    if words.shape[-1] == 1:
        words = words.squeeze(-1)
    rows = packed.reshape(-1, packed.shape[-1])
    found = words.new_empty(rows.numel(), *words.shape[1:])
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    for first in range(0, len(rows), step):
        index = rows[first : first + step].to(torch.int32)
        if table_of_row is not None:
            index += 256 * table_of_row[first : first + step, None]
        start = first * rows.shape[1]
        torch.index_select(words, 0, index.reshape(-1), out=found[start : start + index.numel()])
    return found.view(rows.numel(), -1).view(tables.dtype).view(*packed.shape[:-1], -1)[..., :count]
