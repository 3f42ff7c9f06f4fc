"""Whether a folder was made with what is asked for now: nested plain values, compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NO_RESULT = ("num_workers", "log_every", "checkpoint_every")
"""Keys of any section that no result depends on: changing them neither refuses a folder nor makes it anew."""


AFTER_NAN = ("learning_rate", "warmup_steps", "max_grad_norm")
"""Keys that may change once a stage was stopped by values that are not finite; it continues from its checkpoint with
the new ones.
"""


def without_keys(value: Any, names: tuple[str, ...]) -> Any:
    """Nested dicts without the entries of these names."""
    if not isinstance(value, Mapping):
        return value
    return {key: without_keys(part, names) for key, part in value.items() if key not in names}


def first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Dotted name and both values of the first place where two nested plain values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}, key=str):
            if (
                found := first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
            ) is not None:
                return found
        return None
    return None if old == new else (path, old, new)


def known_to(old: Any, new: Any) -> Any:
    """Nested dicts with those keys alone that the older ones have too."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    return {key: known_to(old[key], value) for key, value in new.items() if key in old}


def with_value(values: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """Nested dicts with another value at a path."""
    first, *rest = path
    return {**values, first: with_value(values.get(first) or {}, rest, value) if rest else value}


FORMAT = 2  # of run.json; 1, without the key, did not record all inputs
