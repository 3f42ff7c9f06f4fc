"""Student, critic and real score of distribution matching as one module, and what each of them takes of memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from .adapters import active_adapter, adapter_parameters, add_adapters, fuse_adapter

STUDENT, CRITIC, REAL = "student", "critic", "real"

Condition = Mapping[str, Any]
"""Keyword arguments of a transformer's forward: tensors `(B, …)`, lists of them, or `None`."""


class Networks(nn.Module):
    """The networks of few-step distillation. One module, so that DDP and FSDP2 wrap one.

    Args:
        model: the many-step net. It becomes the base of the adapters, or the student.
        shared: student and critic are LoRA adapters of the one frozen net, which is the real score itself; else they
            are full nets beside a frozen copy.
        critic: whether there is one.
        rank, alpha, seed: of the adapters.
    """

    def __init__(
        self, model: nn.Module, shared: bool, critic: bool, rank: int = 64, alpha: float = 128.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.shared, self.roles = shared, (STUDENT, CRITIC) if critic else (STUDENT,)
        self._made_with: dict[str, Any] = {
            "shared": shared,
            "critic": critic,
            "rank": rank,
            "alpha": alpha,
            "seed": seed,
        }
        if shared:
            add_adapters(model, self.roles, rank, alpha, seed)
            self.base = model
            if critic:  # the same A, so that a mean of both adapters is one of what they do
                with torch.no_grad():
                    for (_, own), (_, other) in zip(self.trained(CRITIC), self.trained(STUDENT)):
                        own.copy_(other)
            return
        frozen = copy.deepcopy(model).requires_grad_(False)
        self.nets = nn.ModuleDict({REAL: frozen, STUDENT: model.requires_grad_(True)})
        if critic:
            self.nets[CRITIC] = copy.deepcopy(model)

    def net(self, role: str) -> Any:
        """The model that a role runs; of shared ones with its adapter active ([`active_adapter`])."""
        return self.base if self.shared else self.nets[role]

    def trained(self, role: str) -> list[tuple[str, nn.Parameter]]:
        """Names, as in `named_parameters`, and parameters of a role that learns."""
        if self.shared:
            return [(f"base.{name}", parameter) for name, parameter in adapter_parameters(self.base, role)]
        return [(f"nets.{role}.{name}", parameter) for name, parameter in self.nets[role].named_parameters()]

    def finished(self) -> Any:
        """The student, without a trace of adapters. Shared networks are of no more use then: their base becomes it."""
        return fuse_adapter(self.base, STUDENT) if self.shared else self.nets[STUDENT]

    def twin(self) -> Networks:
        """Networks of the same kind, untrained."""
        model = self.base if self.shared else self.nets[REAL]
        return Networks(type(model).from_config(model.config), **self._made_with)

    def enable_gradient_checkpointing(self) -> None:
        """Of every net that learns."""
        for role in self.roles:
            self.net(role).enable_gradient_checkpointing()

    def forward(self, role: str, *inputs: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[`predict`] of a role's net, with all else that it takes."""
        model = self.net(role)
        with active_adapter(model, None if role == REAL else role) if self.shared else nullcontext():
            return predict(model, *inputs, **options)

    def memory(self) -> dict[str, int]:
        """Bytes of weights and of what AdamW and the moving average keep, by part, all in float32."""
        size = {role: 4 * sum(p.numel() for _, p in self.trained(role)) for role in self.roles}
        whole = 4 * sum(p.numel() for p in self.parameters())
        parts = {"frozen weights": whole - sum(size.values())}
        for role in self.roles:
            parts |= {f"{role}: weights": size[role], f"{role}: optimiser": 2 * size[role]}
        return parts | {"student: moving average": size[STUDENT]}


def separate_bytes(weights: int, critic: bool = True) -> int:
    """Bytes that a student, a critic and a real score of so many weights take as float32 nets of their own, with two
    AdamW states and the student's moving average.
    """
    return 4 * weights * (3 + 4 + 1 if critic else 2 + 2 + 1)


def guide(
    conditional: torch.Tensor, unconditional: torch.Tensor, scale: float, channels: int | None = None
) -> torch.Tensor:
    """u + w (c − u), of the first so many channels (default all); the others stay conditional."""
    prediction = unconditional + scale * (conditional - unconditional)
    if channels is None:
        return prediction
    return torch.cat([prediction[:, :channels], conditional[:, channels:]], dim=1)


def joined(first: Condition, second: Condition) -> dict[str, Any]:
    """Both conditions, one below the other."""

    def cat(a: Any, b: Any) -> Any:
        if a is None:
            return None
        return [cat(one, other) for one, other in zip(a, b)] if isinstance(a, list) else torch.cat([a, b])

    return {name: cat(value, second[name]) for name, value in first.items()}


def predict(
    model: Any,
    x_t: torch.Tensor,
    t: torch.Tensor,
    condition: Condition,
    null: Condition | None = None,
    guidance_scale: float = 1.0,
    guided_channels: int | None = None,
    features: bool = False,
    subnet: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a net of either family predicts, ε or the velocity, guided above 1: `(B, C, H, W)` float32, and the last
    layer's tokens `(B, N, D)` of the conditional rows where they are asked for.

    Args:
        null: the condition of no class or text. guided_channels: as of [`guide`].
    """
    guided, count = null is not None and guidance_scale > 1, len(x_t)
    if guided and null is not None:
        x_t, t, condition = torch.cat([x_t, x_t]), torch.cat([t, t]), joined(condition, null)
    elastic, tokens = is_elastic(model), []
    asked: dict[str, Any] = {} if subnet is None else {"subnet": subnet}
    if features and elastic:
        asked["return_features"] = True
    keep = (
        model.blocks[-1].register_forward_hook(lambda module, inputs, output: tokens.append(output))
        if features and not elastic
        else None
    )
    try:
        output = model(x_t, t, **condition, **asked)
    finally:
        if keep is not None:
            keep.remove()
    prediction = output.sample[:, : x_t.shape[1]].float()
    kept = (output.features if elastic else tokens[0])[:count] if features else None
    if guided:
        with_, without = prediction.chunk(2)
        prediction = guide(with_, without, guidance_scale, guided_channels)
    return prediction, kept


def is_elastic(model: Any) -> bool:
    """Whether a transformer is the text-to-image family's."""
    return "subnets" in model.config
