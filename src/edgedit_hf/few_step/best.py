"""The best student so far, and what is trained, as parts of a checkpoint: by name, and without a shared base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..run.optimisation import check_names
from .networks import Networks

Named = Sequence[tuple[str, torch.nn.Parameter]]


def _here(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's values, or this rank's part of a sharded one."""
    values = parameter.detach()
    return values.to_local() if isinstance(values, DTensor) else values


class Trained:
    """The parameters of the roles that learn, and no others (for `RunState.track`)."""

    def __init__(self, roles: Mapping[str, Named]) -> None:
        self.parameters = {name: parameter for named in roles.values() for name, parameter in named}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Name → values."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what [`state_dict`] gave.

        Raises:
            EdgeDiTError: it is of other parameters.
        """
        check_names(
            "trained weights",
            {name: list(value.shape) for name, value in state.items()},
            {name: list(parameter.shape) for name, parameter in self.parameters.items()},
        )
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])


class Best:
    """The averaged weights of the student that was best, with its figures (for `RunState.track`).

    Args:
        student: names and parameters.
    """

    def __init__(self, student: Named) -> None:
        self.student = list(student)
        self.facts: dict[str, Any] = {}
        self.weights: dict[str, torch.Tensor] = {}

    def take(self, metric: float, step: int, widths: Mapping[str, float]) -> bool:
        """Keep what the parameters hold now, if the metric is lower than ever; whether it was."""
        if self.facts and not metric < self.facts["distance"]:
            return False
        self.facts = {"distance": metric, "step": step, "widths": dict(widths)}
        self.weights = {name: _here(parameter).cpu().clone() for name, parameter in self.student}
        return True

    def state_dict(self) -> dict[str, Any]:
        """Figures and weights."""
        return {"facts": dict(self.facts), "weights": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what [`state_dict`] gave."""
        self.facts, self.weights = dict(state["facts"]), dict(state["weights"])

    @torch.no_grad()
    def finished(self, networks: Networks, accelerator: Any) -> Any:
        """The best student, as [`Networks.finished`] gives it; where weights are sharded, on the main process (an
        untrained one on the others).
        """
        for name, parameter in self.student:
            _here(parameter).copy_(self.weights[name])
        if not accelerator.is_fsdp2:
            return networks.finished()
        state = accelerator.get_state_dict(networks)
        whole = networks.twin()
        if accelerator.is_main_process:
            whole.load_state_dict(state)
        return whole.finished()
