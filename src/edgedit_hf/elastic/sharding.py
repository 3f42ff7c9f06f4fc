"""Checkpoints of what FSDP2 shards between ranks: every rank saves and loads its own parts, nothing is gathered."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..run.optimisation import Optimisation


def _part(value: Any) -> Any:
    """Nested plain values and tensors, with this rank's part in place of every sharded tensor."""
    if isinstance(value, DTensor):
        return value.to_local()
    if isinstance(value, dict):
        return {key: _part(item) for key, item in value.items()}
    return [_part(item) for item in value] if isinstance(value, list) else value


def _shard(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A rank's part as a tensor that is sharded as `like` is."""
    if not isinstance(like, DTensor):
        return part
    part = part.to(like.device)
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def whole(model: Any, accelerator: Any) -> Any:
    """The model with all of its weights, on the main process (an untrained one on the others); itself where nothing is
    sharded.
    """
    if not accelerator.is_fsdp2:
        return model
    state = accelerator.get_state_dict(model)
    model = type(model).from_config(model.config)
    if accelerator.is_main_process:
        model.load_state_dict(state)
    return model


class ShardedModel:
    """A sharded model in a checkpoint (for `RunState.track`)."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict:
        return _part(self.model.state_dict())

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(
            {name: _shard(state[name], tensor) for name, tensor in self.model.state_dict().items()}
        )


class ShardedOptimisation(Optimisation):
    """[`Optimisation`] of sharded parameters: moments and averages are this rank's parts; `step`, a scalar of each, is
    not sharded.
    """

    def stored(self, value: Any) -> Any:
        return _part(value)

    def restored(self, value: Any, parameter: torch.nn.Parameter) -> Any:
        return _shard(value, parameter)
