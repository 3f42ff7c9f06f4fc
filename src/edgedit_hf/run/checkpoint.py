"""The state of a loop as files: nested tensors and plain values in safetensors + JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import EdgeDiTError
from ..files import (
    is_finite,
    read_json,
)


def save_state(folder: str | os.PathLike, state: Any, name: str = "state") -> None:
    """Write nested dicts/lists of tensors and plain values (e.g. an optimiser's `state_dict()`) as `name.safetensors` +
    `name.json`.
    """
    import torch
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()

    def encode(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            key = str(len(tensors))
            tensor = value.detach().cpu().contiguous()
            # safetensors refuses tensors that share memory; copying only those spares a second copy of everything.
            start = tensor.untyped_storage().data_ptr()
            tensors[key] = tensor.clone() if start in storages else tensor
            storages.add(start)
            return {"tensor": key}
        if isinstance(value, Mapping):
            return {"dict": [[k, encode(v)] for k, v in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [encode(v) for v in value]}
        if isinstance(value, list):
            return {"list": [encode(v) for v in value]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        raise TypeError(f"cannot checkpoint a {type(value).__name__}")

    plain = encode(state)
    save_file(tensors, Path(folder, f"{name}.safetensors"))
    Path(folder, f"{name}.json").write_text(json.dumps(plain), encoding="utf-8")


def load_state(folder: str | os.PathLike, name: str = "state") -> Any:
    """Read what [`save_state`] wrote."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(Path(folder, f"{name}.safetensors"))
    except (SafetensorError, OSError) as error:
        raise EdgeDiTError(
            f"The checkpoint {folder} cannot be read ({error}); delete that folder to continue from the one before it, "
            "or start anew."
        ) from error

    def decode(value: dict) -> Any:
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {k: decode(v) for k, v in content}
        if kind == "list":
            return [decode(v) for v in content]
        if kind == "tuple":
            return tuple(decode(v) for v in content)
        if kind == "value":
            return content
        raise ValueError(f"it holds a {kind!r}")

    path = Path(folder, f"{name}.json")
    plain = read_json(path, "the checkpoint writer", nan=True)
    try:
        return decode(plain)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise EdgeDiTError(
            f"The checkpoint {folder} cannot be read ({path.name}: {error!r}); delete that folder to continue from the "
            "one before it, or start anew."
        ) from error


class Facts(dict):
    """Plain values that belong to a checkpoint (pass it to [`RunState.track`])."""

    def state_dict(self) -> dict:
        """A copy."""
        return dict(self)

    def load_state_dict(self, state: Mapping) -> None:
        """Hold these values and no others."""
        self.clear()
        self.update(state)


def first_non_finite(state: Any, name: str = "") -> str | None:
    """Dotted name of the first tensor in nested dicts and lists that holds a NaN or an infinity."""
    import torch

    if isinstance(state, torch.Tensor):
        return None if is_finite(state) else name
    parts = (
        state.items() if isinstance(state, Mapping) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    )
    found = (first_non_finite(part, f"{name}.{key}" if name else str(key)) for key, part in parts)
    return next((bad for bad in found if bad is not None), None)
