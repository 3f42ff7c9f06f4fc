"""The proxies that train together: features of the teacher, one step for all of them, held-out losses, starts, and
their checkpoint.

Shapes: B images, N tokens, D residual width. The teacher may be in bf16; its residual stream, which is what proxies
see, stays in fp32: late layers change a large hidden state by little, and that little would drown in bf16's rounding.
"""

from __future__ import annotations

import gc
import hashlib
import math
import resource
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import EdgeDiTError
from ..genotype import LayerSpec
from ..models.transformer_edgedit import EdgeDiTBlock, EdgeDiTTransformer2DModel, StaticModulation
from ..run.optimisation import Optimisation
from .closed_form import closed_form_block, truncated_block
from .feature_loss import feature_loss
from .memory_plan import depth_of

STARTS = {
    "closed_form": "closed_form",
    "copy": "copied",
    "random": "random",
}  # bank.init → name in the index's `losses`


@dataclass(frozen=True)
class Features:
    """What one teacher forward gives: inputs and outputs `(B, N, D)` by teacher layer, and the conditioning `(B,
    D)`.
    """

    inputs: Mapping[int, torch.Tensor]
    outputs: Mapping[int, torch.Tensor]
    conditioning: torch.Tensor

    def of(self, layer: LayerSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Input of the first and output of the last teacher layer that `layer` replaces."""
        return self.inputs[layer.source[0]], self.outputs[layer.source[-1]]

    def needed_by(self, layers: Iterable[LayerSpec]) -> Features:
        """Only what these layers need; the rest is let go."""
        layers = list(layers)
        firsts, lasts = {layer.source[0] for layer in layers}, {layer.source[-1] for layer in layers}
        return Features(
            {i: self.inputs[i] for i in sorted(firsts)}, {i: self.outputs[i] for i in sorted(lasts)}, self.conditioning
        )

    @staticmethod
    def cat(batches: Sequence[Features]) -> Features:
        """Batches of the same layers as one."""
        inputs = {i: torch.cat([batch.inputs[i] for batch in batches]) for i in batches[0].inputs}
        outputs = {i: torch.cat([batch.outputs[i] for batch in batches]) for i in batches[0].outputs}
        return Features(inputs, outputs, torch.cat([batch.conditioning for batch in batches]))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision of one forward: `precision` as Accelerate names it, "no" or "bf16"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def teacher_features(
    teacher: EdgeDiTTransformer2DModel,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    labels: torch.Tensor | None,
    depth: int,
    precision: str = "no",
) -> Features:
    """Features of the teacher's first `depth` layers; nothing above them runs.

    Args:
        noisy: `(B, C, H, W)`; timesteps: `(B,)`; labels: `(B,)`, or `None` for an unconditional teacher.
    """
    with autocast(noisy.device, precision):
        tokens, conditioning = teacher.embed(noisy.to(teacher.dtype), timesteps, labels)
        inputs, outputs = teacher.layer_features(tokens.float(), conditioning.float(), depth)
    return Features(dict(enumerate(inputs)), dict(enumerate(outputs)), conditioning.float())


# -------------------------------------------------------------------- starts


def random_block(block: EdgeDiTBlock, seed: int, key: str) -> EdgeDiTBlock:
    """Initialise a block in place: Xavier weights, modulation included (DiT's zeros would leave it the identity), and
    zero biases; a static modulation is random too.

    The numbers are a function of seed and key alone, whatever rank or group makes the proxy.
    """
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    if isinstance(block.modulation, StaticModulation):
        nn.init.normal_(block.modulation.bias, std=0.1, generator=generator)
    for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):
        nn.init.xavier_uniform_(linear.weight, generator=generator)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    return block


def start_blocks(
    teacher: EdgeDiTTransformer2DModel,
    layer: LayerSpec,
    calibration: tuple[torch.Tensor, torch.Tensor],
    seed: int,
    key: str,
    init: str,
) -> Iterable[tuple[str, EdgeDiTBlock]]:
    """Untrained stand-ins of a layer, one at a time: "random", "copied", and, where `init` is "closed_form",
    "closed_form".

    Args:
        calibration: input of the layer `(n, N, D)` and conditioning `(n, D)` that the closed form is fitted to.
    """
    device = calibration[0].device
    sources = [teacher.blocks[i] for i in layer.source]
    yield "random", random_block(teacher.new_block(layer.to_dict()), seed, key).to(device)
    yield "copied", truncated_block(sources[0], layer).to(device, torch.float32)
    if init == "closed_form":
        sources = [
            teacher.new_block(teacher.config.layers[i]).to(device) for i in layer.source
        ]  # in fp32, though the teacher may be in bf16
        for block, i in zip(sources, layer.source):
            block.load_state_dict(teacher.blocks[i].state_dict())
        try:
            fitted = closed_form_block(sources, *calibration, layer)
        except torch.linalg.LinAlgError as error:
            raise EdgeDiTError(
                f"The proxy {key!r} cannot be fitted in closed form to the teacher's layers {list(layer.source)}: "
                f"{str(error).splitlines()[0]} Their features are not finite, or all the same; look at the teacher's "
                "weights there, or set bank.init to copied."
            ) from error
        yield "closed_form", fitted.to(device)


# -------------------------------------------------------------------- training


def new_optimizer(name: str, parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW without weight decay: `"adamw"` (8 bytes of state a weight) or `"adamw8bit"` (bitsandbytes, about 2).

    Raises:
        EdgeDiTError: bitsandbytes is needed and does not work here.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=learning_rate, weight_decay=0.0)
    except (ImportError, RuntimeError, OSError) as error:  # missing, or no native library for this machine
        raise EdgeDiTError(
            f"bank.optimizer is {name!r}, but bitsandbytes does not work here "
            f"({str(error).splitlines()[0] if str(error) else error!r}); `pip install bitsandbytes`, or set "
            "bank.optimizer to adamw."
        ) from error


@dataclass
class Proxy:
    """One proxy on the device: what it replaces, its block in fp32, its optimiser, and its held-out losses so far as
    [step, loss].
    """

    layer: LayerSpec
    block: EdgeDiTBlock
    optimizer: torch.optim.Optimizer
    curve: list[list[float]] = field(default_factory=list)


def train_step(proxies: Iterable[Proxy], features: Features, kind: str, precision: str = "no") -> torch.Tensor:
    """One optimiser step of every proxy on the features of one batch; returns their mean loss.

    Each proxy's forward, backward and update run on their own, one proxy after the other: the activations and gradients
    of one are alive at a time, and its weights are still in the caches when they are updated.
    """
    losses = []
    for proxy in proxies:
        x, target = features.of(proxy.layer)
        with autocast(x.device, precision):
            output = proxy.block(x, features.conditioning)
        loss = feature_loss(output, target, x, kind)
        loss.backward()
        proxy.optimizer.step()
        proxy.optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).mean()


@torch.no_grad()
def held_out_losses(
    blocks: Mapping[str, tuple[LayerSpec, EdgeDiTBlock]], batches: Iterable[Features], precision: str = "no"
) -> dict[str, float]:
    """Normalised feature loss of every block, as a mean over batches that are looked at one at a time.

    Raises:
        EdgeDiTError: a loss is not finite: the teacher's layers give NaN or infinite features, or the block's own
            training diverged.
    """
    sums: dict[str, torch.Tensor] = {}
    count = 0
    for features in batches:
        count += 1
        for key, (layer, block) in blocks.items():
            x, target = features.of(layer)
            with autocast(x.device, precision):
                output = block(x, features.conditioning)
            sums[key] = sums.get(key, 0.0) + feature_loss(output, target, x, "normalised").double()
    losses = {key: float(total) / count for key, total in sums.items()}
    for key, loss in losses.items():
        if not math.isfinite(loss):
            raise EdgeDiTError(
                f"The held-out loss of the stand-in {key!r} of the teacher's layers {list(blocks[key][0].source)} is "
                f"{loss}: these layers give NaN or infinite features, or it diverged. Look at the teacher's weights "
                "there, or lower bank.learning_rate."
            )
    return losses


class ProxyGroup:
    """The proxies that are on the device, by key, and the group's place in the plan: a checkpoint holds these and no
    others.

    Args:
        new_proxy: makes a proxy of a layer around a block (given), or around a new one (`None`) whose weights will be
            loaded.
    """

    def __init__(self, new_proxy: Callable[[LayerSpec, EdgeDiTBlock | None], Proxy]) -> None:
        self.new_proxy = new_proxy
        self.proxies: dict[str, Proxy] = {}
        self.starts: dict[str, dict[str, float]] = {}  # held-out losses of the group's untrained stand-ins
        self.written: dict[str, dict[str, Any]] = {}  # entries of all proxies so far whose files are complete
        self.peaks: dict[int, int] = {}  # most bytes held, by group

    def clear(self) -> None:
        """Let go of the proxies, whose files are written."""
        self.proxies = {}
        # an optimiser is part of a reference cycle: its states would stay until the collector happens to run
        gc.collect()

    @property
    def depth(self) -> int:
        """Teacher layers that must run to train these proxies."""
        return depth_of(proxy.layer for proxy in self.proxies.values())

    def blocks(self) -> dict[str, tuple[LayerSpec, EdgeDiTBlock]]:
        """Layer and block of every proxy, as [`held_out_losses`] takes them."""
        return {key: (proxy.layer, proxy.block) for key, proxy in self.proxies.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed process needs."""
        proxies = {
            key: {
                "layer": proxy.layer.to_dict(),
                "block": proxy.block.state_dict(),
                "optimisation": Optimisation(proxy.optimizer, proxy.block.named_parameters()).state_dict(),
                "curve": proxy.curve,
            }
            for key, proxy in self.proxies.items()
        }
        return {"proxies": proxies, "starts": self.starts, "written": self.written, "peaks": self.peaks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what [`state_dict`] gave."""
        self.proxies = {}
        for key, saved in state["proxies"].items():
            proxy = self.new_proxy(LayerSpec.from_dict(saved["layer"]), None)
            proxy.block.load_state_dict(saved["block"])
            Optimisation(proxy.optimizer, proxy.block.named_parameters()).load_state_dict(saved["optimisation"])
            proxy.curve = saved["curve"]
            self.proxies[key] = proxy
        self.starts, self.written, self.peaks = (dict(state[name]) for name in ("starts", "written", "peaks"))


# -------------------------------------------------------------------- memory


def reset_peak_memory(device: torch.device) -> None:
    """Let [`peak_memory`] count from now on, where the system can (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # not Linux, or not allowed: the peak then counts from the start of the process, which is never less


def peak_memory(device: torch.device) -> int:
    """Most bytes held since [`reset_peak_memory`]: of the GPU's allocator, or of the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass  # not Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
