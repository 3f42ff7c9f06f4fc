"""Whether a folder was made with what is asked for now: nested plain values, compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .config import RunConfig
from .stage import Stage

FORMAT = 3
"""Of run.json. 1, without the key, did not record all inputs; 2 hashed pipelines in another way, and knew fewer
sections.
"""

NO_RESULT = ("num_workers", "log_every", "checkpoint_every", "continue_from", "enabled", "accept_other")
"""Keys of any section that no result depends on: changing them neither refuses a folder nor makes it anew."""

AFTER_NAN = (
    *("learning_rate", "warmup_steps", "max_grad_norm"),
    *("critic_learning_rate", "matching_weight", "real_guidance", "moments_weight", "mean_drift", "std_drift"),
)
"""Keys that may change once a stage was stopped by values that are not finite or samples that drifted; it continues
from its checkpoint with the new ones.
"""

SWITCHES = ("matching_weight",)
"""Those of them that may not become 0 or leave it, as the checkpoint holds a network that is there for them alone."""


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


def switched(old: Any, new: Any) -> tuple[str, Any, Any] | None:
    """Dotted name and both values of the first of [`SWITCHES`] that is 0 in one of two nested plain values alone."""
    for section, values in old.items():
        for key in SWITCHES if isinstance(values, Mapping) else ():
            before, now = values.get(key), (new.get(section) or {}).get(key)
            if (before or 0) * (now or 0) == 0 and before != now:
                return f"{section}.{key}", before, now
    return None


def with_value(values: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """Nested dicts with another value at a path."""
    first, *rest = path
    return {**values, first: with_value(values.get(first) or {}, rest, value) if rest else value}


# -------------------------------------------------------------------- what is asked for


def asked_values(stage: Stage, config: RunConfig, also: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values that decide a stage's result: its sections, and `also`, nested alike."""
    values = stage.values(config)
    for name, value in also.items():
        values[name] = {**values[name], **value} if name in values else value
    return values


def declared_inputs(stage: Stage, given: Mapping[str, str | None]) -> dict[str, str]:
    """The inputs that a script gives, those left out that are not read in this run.

    Raises:
        ValueError: they are not those that the stage declares.
    """
    declared, opened = {name for name, _ in stage.inputs}, {name for name, at in stage.inputs if not at}
    if not opened <= given.keys() <= declared:
        raise ValueError(f"stage {stage.name} declares the inputs {sorted(declared)}; {sorted(given)} were given")
    return {name: value for name, value in given.items() if value is not None}


# -------------------------------------------------------------------- records of earlier versions


def comparable_inputs(found: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
    """The inputs of a record, as far as it has hashes of the kind that is recorded now."""
    known = {name for name, at in stage.inputs if not at or at.endswith(".json")}
    new = found.get("format", 1) >= FORMAT
    return {name: value for name, value in found.get("inputs", {}).items() if new or name in known}


def comparable(found: Mapping[str, Any], asked: Mapping[str, Any], stage: Stage) -> tuple[dict, dict]:
    """What a folder was made with and what is asked for now, as far as the folder's version recorded both.

    A key that is newer than the record counts as its default, which is what was done before there was one.
    """
    made, now = dict(found), dict(asked)
    if found.get("format", 1) < FORMAT:
        made["inputs"] = comparable_inputs(found, stage)
        now["inputs"] = {name: value for name, value in asked["inputs"].items() if name in made["inputs"]}
        now["config"] = {name: value for name, value in asked["config"].items() if name in found["config"]}
        made["stage"] = asked["stage"]  # some had another name
    if "format" not in found:
        now["config"] = _known_to(made["config"], now["config"])
    made["config"] = {
        name: {**_defaults(name, now["config"].get(name)), **values} if isinstance(values, Mapping) else values
        for name, values in found["config"].items()
    }
    return made, now


def _known_to(old: Any, new: Any) -> Any:
    """Nested dicts with those keys alone that the older ones have too."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    return {key: _known_to(old[key], value) for key, value in new.items() if key in old}


def _defaults(section: str, asked: Any) -> dict[str, Any]:
    """The defaults of those keys of a section that are asked for."""
    if not hasattr(RunConfig(), section) or not isinstance(asked, Mapping):
        return {}
    return {key: value for key, value in RunConfig().section(section)[section].items() if key in asked}
