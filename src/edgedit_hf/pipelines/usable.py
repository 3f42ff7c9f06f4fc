"""Whether a pipeline that could be loaded can also be used: constructors of diffusers keep most values of a config
unlooked at.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import EdgeDiTError


def check_usable(pipeline: Any, source: str) -> None:
    """Raise unless the network's and the pipeline's own configs hold values of the declared types, and the scheduler
    makes steps of finite numbers.

    Args:
        source: where it was loaded from, for the message.

    Raises:
        EdgeDiTError: naming the value.
    """
    network = pipeline.transformer
    for owner, values, file in (
        (type(pipeline), pipeline.config, "model_index.json"),
        (type(network), network.config, "transformer/config.json"),
    ):
        for name, hint in _plain_hints(owner).items():
            if name in values and not _fits(values[name], hint):
                raise EdgeDiTError(
                    f"{source}: {name} in {file} is {values[name]!r:.200}; it must be {_words(hint)}. The file is "
                    "damaged or foreign; load the original, or write it anew."
                )
    try:
        pipeline.check_scheduler()
    except ValueError as error:
        raise EdgeDiTError(f"{source}: {error}") from error
    check_scheduler(pipeline.scheduler, source)


def check_scheduler(scheduler: Any, source: str) -> None:
    """Raise unless eight steps with this scheduler's config end in finite numbers."""
    shift = (
        {"mu": 1.0}
        if scheduler.config.get("use_dynamic_shifting")
        and "mu" in inspect.signature(scheduler.set_timesteps).parameters
        else {}
    )
    learned = str(scheduler.config.get("variance_type")).startswith(
        "learned"
    )  # beside the noise, in channels of its own
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            trial = type(scheduler).from_config(scheduler.config)
            trial.set_timesteps(8, **shift)  # PNDM makes no fewer than four
            sample = torch.ones(1, 3, 2, 2)
            for timestep in trial.timesteps:
                prediction = 0.1 * (
                    trial.scale_model_input(sample, timestep) if hasattr(trial, "scale_model_input") else sample
                )
                prediction = torch.cat([prediction] * 2, dim=1) if learned else prediction
                sample = trial.step(prediction, timestep, sample).prev_sample
    except Exception as error:  # every scheduler has its own
        reason = " ".join(f"{type(error).__name__} {error}".split())[:300]
        raise EdgeDiTError(
            f"{source}: no step can be made with scheduler/scheduler_config.json ({reason}); take the original, or "
            "write it anew."
        ) from error
    if not torch.isfinite(sample).all():
        raise EdgeDiTError(
            f"{source}: steps with scheduler/scheduler_config.json end in NaN or infinite values; take the original, "
            f"or one that fits prediction type {scheduler.config.get('prediction_type', 'flow_prediction')!r}."
        )


PLAIN = (int, float, str, bool, type(None))


def _plain_hints(owner: Any) -> dict[str, Any]:
    """Type hints of the constructor's arguments that are plain values, or lists and mappings."""
    constructor = inspect.unwrap(owner.__init__)
    try:
        return {
            name: hint
            for name, hint in typing.get_type_hints(constructor).items()
            if name != "return" and all(map(_known, _options(hint)))
        }
    except NameError:  # a class of others, with names that only a type checker knows
        return {}


def _options(hint: Any) -> tuple[Any, ...]:
    return (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )


def _known(hint: Any) -> bool:
    return hint in PLAIN or typing.get_origin(hint) in (list, tuple, dict, Mapping)


def _fits(value: Any, hint: Any) -> bool:
    for option in _options(hint):
        kind = typing.get_origin(option) or option
        if kind is float:
            fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        elif kind is int:
            fits = isinstance(value, int) and not isinstance(value, bool)
        elif kind in (list, tuple):  # JSON has lists only
            fits = isinstance(value, (list, tuple))
        elif kind in (dict, Mapping):
            fits = isinstance(value, Mapping)
        elif kind in PLAIN:
            fits = isinstance(value, kind)
        else:
            fits = True
        if fits:
            return True
    return False


def _words(hint: Any) -> str:
    names = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", type(None): "null"}
    kinds = [typing.get_origin(option) or option for option in _options(hint)]
    return " or ".join(names.get(kind, "a list" if kind in (list, tuple) else "keys and values") for kind in kinds)
