"""What training a supernet will cost, before anything runs: closed-form FLOPs, and activations counted on tensors that
hold nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..data.captions import parse_buckets
from ..data.loading import load_run_captions
from ..distill.memory_plan import PROCESS_BYTES
from ..models.transformer_elastic_dit import ElasticDiTTransformer2DModel
from ..pipelines.loading import meta_vae
from ..run.config import RunConfig
from ..run.cost import (
    BACKWARD,
    IMAGENET,
    UPDATE_BYTES,
    Estimate,
    Machine,
    gpus,
    median_seconds,
    print_table,
    saved_bytes,
)
from ..run.stage import ELASTIC
from ..search_space import TEXT_TOKENS, elastic_cost, elastic_weights
from .knowledge import teacher_note
from .supernet import new_elastic

BALANCE_BYTES = (
    32  # moved a weight, step and sub-network: both gradients are read three times, the sum is written twice
)
SHORT = {
    "num_layers": [1, 1, 1],
    "sample_size": 16,
}  # what this machine's rate is measured on in place of a net with more than ...
LARGE = 5e7  # ... weights


def activation_bytes(model: ElasticDiTTransformer2DModel, shape: Sequence[int], text_tokens: int = TEXT_TOKENS) -> int:
    """[`saved_bytes`] of a float32 forward of one image `(C, H, W)`."""
    text = [torch.empty(1, text_tokens, dim) for dim in model.config.text_dims]
    masks = [torch.ones(1, text_tokens, dtype=torch.bool) for _ in text]
    return saved_bytes(lambda: model(torch.empty(1, *shape), torch.empty(1), text, masks).sample.square().mean(), model)


def data_shapes(config: RunConfig, assumed: list[str]) -> tuple[list[tuple[int, ...]], int]:
    """`(C, H, W)` of what the net sees, a bucket each, and the number of images; nothing is downloaded."""
    data = config.data
    of_hub = (
        data.source.count("/") == 1 and not data.source.startswith((".", "/", "~")) and not Path(data.source).exists()
    )
    if of_hub and (data.resolution or data.buckets):
        sizes = parse_buckets(data.buckets or [f"{data.resolution}x{data.resolution}"])
        shapes: list[tuple[int, ...]] = [(data.channels or 3, *size) for size in sizes]
        count = IMAGENET["images"]
        assumed.append(f"data.source {data.source} is not here: taken to hold {count:,} captioned images")
    else:
        dataset = load_run_captions(config)
        shapes, count = dataset.shapes, len(dataset)
    if data.vae is not None:
        vae = meta_vae(data.vae, assumed, shapes[0])
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        shapes = [(vae.config.latent_channels, height // factor, width // factor) for _, height, width in shapes]
    return shapes, count


def here(values: dict[str, Any], threads: int) -> Machine:
    """This machine, with rates measured in about a second each: forwards of the full net, and an optimiser's update."""
    torch.set_num_threads(threads or torch.get_num_threads())
    if elastic_weights(values) > LARGE:
        values = {**values, **SHORT}
    model = ElasticDiTTransformer2DModel(**values).eval()
    size, batch = values["sample_size"], max(1, min(64, int(4e10 / elastic_cost(values).flops)))
    x, t = torch.randn(batch, values["in_channels"], size, size), torch.full((batch,), 500.0)
    with torch.inference_mode():
        rate = batch * elastic_cost(values, text_tokens=0).flops / median_seconds(lambda: model(x, t))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weights = sum(parameter.numel() for parameter in model.parameters())
    updates = (
        0.7 * UPDATE_BYTES * weights / median_seconds(optimizer.step)
    )  # without the moving average, it moves 28 of 40 bytes
    return Machine("here", 1, rate, rate, rate, updates)


def elastic_estimate(config: RunConfig, machine: Machine | None = None) -> tuple[Estimate, Machine, list[str]]:
    """Estimate of stage elastic, the machine it is for (default: this one), and what had to be assumed.

    On several GPUs every one holds all weights (data parallel); FSDP divides what is held for the weights by their
    number.
    """
    options = config.elastic
    assumed: list[str] = []
    shapes, _ = data_shapes(config, assumed)
    shape = max(shapes, key=lambda shape: shape[1] * shape[2])
    given = (config.text.encoder, config.text.encoder_2)
    dims = [config.text.hidden_size if path is None else 0 for path in given]  # 0: as the model's own
    with FakeTensorMode():
        model = new_elastic(config, shapes, dims)
        activations = activation_bytes(model, shape)
        if options.gradient_checkpointing:
            model.enable_gradient_checkpointing()
            activations = activation_bytes(model, shape) + activations / sum(model.config.num_layers)
    values = {key: value for key, value in model.config.items() if not key.startswith("_")}
    machine = machine or here(values, config.threads)
    narrow = model.subnet_names[:-1]
    drawn = 0 if not narrow else 1 if options.sampling == "one" or len(narrow) == 1 else 2
    size, weights = shape[1:], elastic_weights(values)
    flops: float = elastic_cost(values, None, *size).flops
    if drawn:  # the mean of those that may be drawn; a sandwich has the narrowest and one of the others
        costs = [elastic_cost(values, name, *size).flops for name in narrow]
        flops += sum(costs) / len(costs) if drawn == 1 else costs[0] + sum(costs[1:]) / len(costs[1:])
    products = (
        (1 + BACKWARD + options.gradient_checkpointing)
        * options.batch_size
        * flops
        / (machine.processes * machine.flops)
    )
    step = products + (UPDATE_BYTES + BALANCE_BYTES * drawn) * weights / machine.update_bytes
    # Weights, two moments, moving average, a gradient of every network; buckets of the all-reduce; copies of the
    # weights that autocast keeps.
    held = weights * (20 + 4 * drawn + (4 if machine.processes > 1 else 0) + (2 if machine.gpu else 0))
    micro = -(-options.batch_size // (machine.processes * options.gradient_accumulation))
    memory = (1e9 if machine.gpu else PROCESS_BYTES) + held + micro * activations * (0.5 if machine.gpu else 1)
    device = "gpu" if machine.gpu else "cpu"
    return (
        Estimate(ELASTIC.name, options.steps * step, memory, 4.0 * weights, device, machine.processes),
        machine,
        assumed,
    )


def print_elastic_estimate(config: RunConfig) -> None:
    """Print the estimate of stage elastic: here, on one GPU and on eight."""
    row, local, assumed = elastic_estimate(config)
    machines = (local, gpus(1, local), gpus(8, local))
    others = [elastic_estimate(config, machine)[0] for machine in machines[1:]]
    assumed += teacher_note(config)
    assumed.append(
        "text encoders apart; on 8 GPUs every one holds all weights, with training/accelerate/fsdp.yaml an eighth of "
        "them"
    )
    print_table(machines, [[row], *([other] for other in others)], assumed)
