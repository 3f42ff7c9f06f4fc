"""What a training loop has beside its weights, as one part of a checkpoint: optimiser, moving average, gradient scaler.
All of it goes by name.

PyTorch and diffusers number the parameters instead, so a state whose parameters came in another order would load
without a word onto the wrong ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..errors import EdgeDiTError
from .sections import OptimisationConfig

NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]


def check_names(what: str, saved: Mapping[str, Sequence[int]], ours: Mapping[str, Sequence[int]]) -> None:
    """Raise unless a checkpoint holds values for exactly these parameters.

    Args:
        what: what the checkpoint holds of them. saved, ours: name → shape.
    """
    missing, unknown = sorted(ours.keys() - saved.keys()), sorted(saved.keys() - ours.keys())
    shapes = [
        f"{name} of shape {list(saved[name])}, but here {list(ours[name])}"
        for name in ours
        if name in saved and list(saved[name]) != list(ours[name])
    ]
    if missing or unknown or shapes:
        faults = [
            f"{len(names)} {kind} ({names[0]})"
            for kind, names in (("missing", missing), ("unknown", unknown), ("unequal", shapes))
            if names
        ]
        raise EdgeDiTError(
            f"The {what} of the checkpoint is of another model: of {len(ours)} parameters {', '.join(faults)}. "
            "Continue with the model and settings that it was made with, or delete the checkpoint."
        )


class Optimisation:
    """Optimiser, moving average and gradient scaler of a loop (for `RunState.track`).

    Args:
        optimizer: over some or all of the parameters, as `accelerator.prepare` returned it.
        parameters: (name, parameter) of what is trained and averaged, in the order that `ema` was given.
        ema: an `EMAModel` of `parameters`. scaler: of mixed precision in fp16.
        beside: (name, parameter) of what is trained and not averaged.
    """

    def __init__(
        self,
        optimizer: Any,
        parameters: NamedParameters,
        ema: Any = None,
        scaler: Any = None,
        beside: NamedParameters = (),
    ) -> None:
        self.optimizer, self.ema, self.scaler = optimizer, ema, scaler
        self.averaged = dict(parameters)
        self.parameters = {**self.averaged, **dict(beside)}
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]

    def stored(self, value: Any) -> Any:
        """Nested values as a checkpoint holds them."""
        return value

    def restored(self, value: Any, parameter: torch.nn.Parameter) -> Any:
        """What [`stored`] made of a value of the parameter's size."""
        return value

    def _shapes(self, names: Iterable[str]) -> dict[str, list[int]]:
        return {name: list(self.parameters[name].shape) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Name → what the optimiser remembers, and name → average."""
        saved = self.stored(self.optimizer.state_dict())
        name_of = {
            index: name
            for group, names in zip(saved["param_groups"], self.groups)
            for index, name in zip(group["params"], names, strict=True)
        }
        state: dict[str, Any] = {
            "shapes": self._shapes(name for names in self.groups for name in names),
            "groups": [
                {**group, "params": list(names)}
                for group, names in zip(saved["param_groups"], self.groups, strict=True)
            ],
            "optimizer": {name_of[index]: values for index, values in saved["state"].items()},
        }
        if self.ema is not None:
            averages = self.stored(self.ema.state_dict())
            state["ema"] = {
                **averages,
                "shadow_params": dict(zip(self.averaged, averages["shadow_params"], strict=True)),
            }
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what [`state_dict`] gave.

        Raises:
            EdgeDiTError: it is of other parameters, grouped otherwise, or of a loop that had other parts. Nothing is
                changed then.
        """
        parts = {
            "shapes",
            "groups",
            "optimizer",
            *(["ema"] if self.ema is not None else []),
            *(["scaler"] if self.scaler is not None else []),
        }
        if set(state) != parts:
            raise EdgeDiTError(
                f"The checkpoint of the optimiser holds {', '.join(sorted(state))}, but {', '.join(sorted(parts))} are "
                "needed: it was written by another version of edgedit_hf or with another mixed precision. Continue "
                "with those, or delete the checkpoint."
            )
        check_names("optimiser's state", state["shapes"], self._shapes(name for names in self.groups for name in names))
        groups = {frozenset(group["params"]): group for group in state["groups"]}
        if groups.keys() != {frozenset(names) for names in self.groups}:
            raise EdgeDiTError(
                "The checkpoint's optimiser groups its parameters by "
                f"{[len(group['params']) for group in state['groups']]}, this one by "
                f"{[len(names) for names in self.groups]} or others; continue with the settings that it was made with, "
                "or delete the checkpoint."
            )
        if self.ema is not None:
            averages = state["ema"]["shadow_params"]
            check_names(
                "moving average",
                {name: state["shapes"].get(name, average.shape) for name, average in averages.items()},
                self._shapes(self.averaged),
            )
        ours = self.optimizer.state_dict()["param_groups"]
        memory = {
            index: {
                key: self.restored(value, self.parameters[name]) if key != "step" else value
                for key, value in state["optimizer"][name].items()
            }
            for group, names in zip(ours, self.groups, strict=True)
            for index, name in zip(group["params"], names, strict=True)
            if name in state["optimizer"]
        }
        options = [
            {**groups[frozenset(names)], "params": group["params"]}
            for group, names in zip(ours, self.groups, strict=True)
        ]
        self.optimizer.load_state_dict({"state": memory, "param_groups": options})
        if self.ema is not None:
            shadows = [self.restored(averages[name], parameter) for name, parameter in self.averaged.items()]
            self.ema.load_state_dict({**state["ema"], "shadow_params": shadows})
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])


def check_batch(options: OptimisationConfig, processes: int) -> None:
    """Raise unless a batch can be divided between the processes and their micro-batches."""
    share = processes * options.gradient_accumulation
    if options.batch_size % share:
        raise EdgeDiTError(
            f"batch_size {options.batch_size} is not a multiple of processes × gradient_accumulation = {share}; change "
            "one."
        )


def learning_rate_at(step: int, peak: float, warmup: int, total: int, final_share: float) -> float:
    """Linear warm-up to `peak`, then cosine decay to `final_share · peak` at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value
