"""Losses of the supernet and the balance of its gradients (SnapGen++, arXiv:2601.08303, section 3.2).

The paper combines the networks' gradients with "adaptive scaling" and gives no formula. Ours, for gradients G_full of
the full net's loss and G_s of a sub-network's on the same batch, and the slice S of the shared weights that the
sub-network uses:

    λ_s = ‖G_full|_S‖ / ‖G_s|_S‖, within [1/λ_max, λ_max]
    gradient of a shared weight w  = (G_full(w) + Σ_s λ_s G_s(w)) / (1 + number of sub-networks of the step that use w)
    gradient of a norm or modulation that one width owns = its own network's, as it is

So neither network outvotes the other where they share weights, whatever the weight of the distillation loss. The mean,
not the sum, is taken weight by weight: a gradient's size then does not depend on how many networks of a step use the
weight, which differs between steps, and Adam's second moments and the clipping threshold mean what they mean for one
network. Nothing is remembered between steps.

S is read off the gradient itself: outside of its slice a sub-network's gradient is exactly zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..diffusion import Diffusion, draws
from .draws import VALIDATION_STREAM

Gradients = list[torch.Tensor | None]


def distillation_loss(velocity: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """Per-sample ‖v_sub − sg(v_full)‖² `(B,)` (eq. 5), as a mean over the elements like the flow loss.

    Args:
        velocity, full: outputs `(B, C, H, W)` of a sub-network and of the full net for the same noisy input, timestep
            and text.
    """
    return (velocity.float() - full.detach().float()).pow(2).flatten(1).mean(1)


def take_gradients(parameters: Iterable[torch.nn.Parameter]) -> Gradients:
    """The gradients as a list, which leaves the parameters without; nothing is copied."""
    taken = []
    for parameter in parameters:
        taken.append(parameter.grad)
        parameter.grad = None
    return taken


def _norm(squares: Iterable[torch.Tensor]) -> torch.Tensor:
    total = sum(squares)
    return (
        total.full_tensor() if isinstance(total, DTensor) else total
    ).sqrt()  # one reduction where gradients are sharded


@torch.no_grad()
def balance_scale(full: Gradients, sub: Gradients, limit: float) -> torch.Tensor:
    """λ of a sub-network (see the module), 0-d; 1 where either norm is zero or not finite.

    Args:
        full, sub: gradients of both networks, a parameter each; whole, or sharded alike.
        limit: λ_max.
    """
    shared = [(f, s) for f, s in zip(full, sub) if f is not None and s is not None]
    norm_full = _norm((f * (s != 0)).square().sum() for f, s in shared)
    norm_sub = _norm(s.square().sum() for _, s in shared)
    scale = norm_full / norm_sub
    usable = torch.isfinite(scale) & (scale > 0)
    return torch.where(usable, scale, torch.ones_like(scale)).clamp(1 / limit, limit)


@torch.no_grad()
def combine_gradients(full: Gradients, subs: Sequence[Gradients], scales: Sequence[torch.Tensor | float]) -> Gradients:
    """The step's gradient, a parameter each, from those of its networks (see the module). Overwrites and empties what
    it is given.

    Args:
        full: the full net's. subs: each sub-network's. scales: λ of each.
    """
    combined: Gradients = []
    for index, gradient in enumerate(full):
        others = [(sub[index], scale) for sub, scale in zip(subs, scales) if sub[index] is not None]
        for sub in subs:
            sub[index] = None
        full[index] = None
        if gradient is None:
            combined.append(others[0][0] if others else None)  # owned by one width
            continue
        if others:
            users = sum((other != 0).to(gradient.dtype) for other, _ in others) + 1
            for other, scale in others:
                gradient.add_(other * scale)
            gradient.div_(users)
        combined.append(gradient)
    return combined


@torch.no_grad()
def validation_losses(
    network: torch.nn.Module,
    model: Any,
    dataset: Any,
    texts: Any,
    samples: int,
    batch_size: int,
    seed: int,
    accelerator: Any,
) -> dict[str, float]:
    """Flow loss of every width on the first `samples` images of a set, at fixed noise and timesteps: the same numbers
    for every network.

    Args:
        network: what is called (as `accelerator.prepare` returned it); model: the [`ElasticDiTTransformer2DModel`] in
            it.
        dataset: a `CaptionedDataset`; texts: the `TextTable` of its captions. Every rank judges its share.
    """
    diffusion = Diffusion("flow_prediction")
    buckets = torch.as_tensor(dataset.bucket_of[:samples])
    training = model.training
    model.eval()
    sums: Mapping[str, torch.Tensor] = {
        name: torch.zeros(2, dtype=torch.float64) for name in model.subnet_names or ["full"]
    }
    for bucket in buckets.unique().tolist():
        for rows in torch.nonzero(buckets == bucket).flatten().split(batch_size):
            rows = rows[accelerator.process_index :: accelerator.num_processes]
            rows, counted = (
                (rows, len(rows)) if len(rows) else (torch.zeros(1, dtype=torch.long), 0)
            )  # a sharded net needs every rank
            x0 = dataset.batch(rows.numpy())["images"]
            drawn = draws(seed, 0, rows.tolist(), x0.shape[1:], stream=VALIDATION_STREAM)
            x0, u, noise = (tensor.to(accelerator.device) for tensor in (x0, drawn.time, drawn.noise))
            t = diffusion.timesteps(u)
            embeds, masks = ([part.to(accelerator.device) for part in parts] for parts in texts.batch(rows))
            for name, total in sums.items():
                with accelerator.autocast():
                    velocity = network(
                        diffusion.noisy(x0, noise, t), t, embeds, masks, subnet=name if model.subnet_names else None
                    ).sample
                loss = diffusion.loss(velocity, x0, noise, t)[:counted].double()
                total += torch.stack([loss.sum().cpu(), torch.tensor(float(counted), dtype=torch.float64)])
    model.train(training)
    totals = accelerator.reduce(torch.stack(list(sums.values())).to(accelerator.device), reduction="sum").cpu()
    return {name: float(total / count) for name, (total, count) in zip(sums, totals)}
