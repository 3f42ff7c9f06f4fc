"""What the cost of a stage is stated in: machines, their rates, and the table that --dry-run prints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

BACKWARD = 2  # a backward costs two forwards


UPDATE_BYTES = (
    40  # moved a weight and step: AdamW reads four values and writes three, the moving average reads two and writes one
)


IMAGENET = {"classes": 1000, "images": 1_281_167}  # assumed where the data set is not here


@dataclass(frozen=True)
class Machine:
    """What estimates are for: processes of one machine, one device each.

    Args:
        flops: FLOPs a second that a process reaches in matrix products of the launch's precision. fp32_flops: in
            float32.
        conv_flops: in the VAE's convolutions, which run in float32 (TF32 on a GPU).
        update_bytes: bytes a second that an optimiser's update moves.
        gpu: whether `memory` of the estimates is a GPU's; stages that need none run on the host's CPU as `host` says.
    """

    name: str
    processes: int
    flops: float
    fp32_flops: float
    conv_flops: float
    update_bytes: float
    gpu: bool = False
    host: Machine | None = None


def gpus(count: int, host: Machine) -> Machine:
    """A100-SXM4-80GB in bf16: 312, 156 and 19.5 TFLOP/s in bf16, TF32 and fp32 at peak, 2.04 TB/s (NVIDIA's data
    sheet). Assumed reached: 40 % of the first two, 80 % of the others; transfers between GPUs are taken to hide behind
    the backward pass.
    """
    return Machine(
        f"{count} × A100", count, 0.4 * 312e12, 0.8 * 19.5e12, 0.4 * 156e12, 0.8 * 2.04e12, gpu=True, host=host
    )


@dataclass(frozen=True)
class Estimate:
    """Cost of one stage: seconds, peak bytes of memory a process (of its GPU, where it has one), bytes on disk when it
    is finished.

    `device`: where the work is done, by how many processes; stages without a data-parallel loop use the main process
    alone. `before`: seconds of these that pass before a first training step (latents, starts of proxies).
    """

    stage: str
    seconds: float
    memory: float
    disk: float
    device: str = "cpu"
    processes: int = 1
    before: float = 0.0


def saved_bytes(forward: Callable[[], torch.Tensor], model: torch.nn.Module) -> int:
    """Bytes that autograd keeps of a forward beside the model's weights. Under `FakeTensorMode` nothing is computed.

    Args:
        forward: returns what a backward pass starts from.
    """
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del output
    return total


def median_seconds(call) -> float:
    """Median seconds of a call, of three to seven in about a second."""
    seconds: list[float] = []
    while len(seconds) < 7 and (len(seconds) < 3 or sum(seconds) < 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]


def _duration(seconds: float) -> str:
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes}:{rest:02d} m"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"


def print_table(machines: Sequence[Machine], tables: Sequence[list[Estimate]], assumed: Iterable[str]) -> None:
    """Print the stages' estimates, one table a machine; the first is this one."""
    local = machines[0]
    header = [f"{'stage':<9}"]
    for machine in machines:
        header.append(
            f"{machine.name + ':':>10} {'time':>8} {'memory':>9}" + (f" {'disk':>9}" if machine is local else "")
        )
    print(" ".join(header))
    for rows in zip(*tables):
        cells = [f"{rows[0].stage:<9}"]
        for machine, row in zip(machines, rows):
            where = (
                ""
                if not machine.gpu
                else row.device
                if row.device == "cpu"
                else f"{row.processes} GPU" + "s" * (row.processes > 1)
            )
            cells.append(
                f"{where:>10} {_duration(row.seconds):>8} {row.memory / 1e9:>6.2f} GB"
                + (f" {row.disk / 1e9:>6.2f} GB" if machine is local else "")
            )
        print(" ".join(cells))
    cells = [f"{'all':<9}"]
    for machine, table in zip(machines, tables):
        memory = max(row.memory for row in table if not machine.gpu or row.device == "gpu")
        disk = f" {sum(row.disk for row in table) / 1e9:>6.2f} GB" if machine is local else ""
        cells.append(f"{'':>10} {_duration(sum(row.seconds for row in table)):>8} {memory / 1e9:>6.2f} GB{disk}")
    print(" ".join(cells))
    print(
        f"Closed-form FLOPs. here: {local.flops / 1e9:.0f} GFLOP/s, measured just now with {torch.get_num_threads()} "
        "threads; nothing was written. GPUs: A100 80 GB in bf16 at 40 % of 312 TFLOP/s; stages on 1 GPU of 8 use the "
        "main process alone, those on the CPU run as they do here. Memory: of a process, or of its GPU; disk: of "
        "results, checkpoints apart."
    )
    for line in assumed:
        print(f"Assumed: {line}.")
