"""What a run will cost, a stage, before anything runs: closed-form FLOPs over the rate this machine reaches in a second of measuring."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from .launch import load_run_images, load_teacher, load_vae, new_teacher, search_space_of
from .models.transformer_edgedit import EdgeDiTTransformer2DModel
from .recipes import RunConfig
from .search_space import layer_cost, model_cost

BASE_MEMORY = 0.9e9  # interpreter with torch, diffusers, botorch, onnxruntime
TRAIN_FORWARDS = 3  # a training step costs about three forwards
TABLE_ROUND_NETWORKS = 12  # networks timed in a round of the latency table
LOWERING_SECONDS = 3.0  # a layer of a network, in ExecuTorch
EXPORTED_SHARE = {"fp32": 1.0, "int8": 0.27, "int4": 0.17}  # of the weights in fp32


@dataclass(frozen=True)
class Estimate:
    """Cost of one stage: seconds, peak bytes of memory a process, bytes on disk when it is finished."""

    stage: str
    seconds: float
    memory: float
    disk: float


def _forward_rate(model: EdgeDiTTransformer2DModel, batch: int) -> float:
    """FLOPs a second of this model's forward here (median of a few, about a second in all)."""
    config = model.config
    size = config.sample_size
    x, t = torch.randn(batch, config.in_channels, size, size), torch.full((batch,), 500.0)
    labels = torch.zeros(batch, dtype=torch.long) if config.num_classes else None
    seconds = []
    with torch.inference_mode():
        for _ in range(7):
            start = time.perf_counter()
            model(x, t, labels)
            seconds.append(time.perf_counter() - start)
            if sum(seconds) > 2 and len(seconds) > 2:
                break
    return batch * model_cost(config).flops / sorted(seconds)[len(seconds) // 2]


def estimate(config: RunConfig) -> list[Estimate]:
    """Estimates of all stages of a run, in order. Times are for one process; they assume that nothing else runs."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    teacher, bank, search, tune, judged = config.teacher, config.bank, config.search, config.tune, config.evaluate
    if teacher.path is not None:
        model = load_teacher(config).transformer
    else:
        images = load_run_images(config)
        channels, size = images.shape[0], images.shape[1]
        if config.data.vae is not None:
            vae = load_vae(config.data.vae)
            channels, size = vae.config.latent_channels, size // 2 ** (len(vae.config.block_out_channels) - 1)
        model = new_teacher(config, (channels, size, size), images.num_classes)
    cost = model_cost(model.config)
    space = search_space_of(config, model.config)
    tokens = (model.config.sample_size // model.config.patch_size) ** 2
    rate = _forward_rate(model.eval(), min(64, judged.batch_size))
    proxies = [(space.option_of(layer), layer_cost(space.hidden_size, layer.shape, tokens)) for layer in space.proxies()]
    proxy_weights = sum(c.weights for _, c in proxies)
    weights = 4.0 * cost.weights

    def activations(batch: int, flops_share: float = 1.0) -> float:
        # About 34 bytes a token and channel a layer in fp32 training without checkpointing: what autograd keeps of a DiT block.
        return batch * tokens * space.hidden_size * space.num_layers * 34 * 4 * flops_share

    def training(steps: int, batch: int) -> float:
        return TRAIN_FORWARDS * steps * batch * cost.flops / rate

    def sampling(images: int, steps: int, guidance: float) -> float:
        doubled = 2 if guidance > 1 and model.config.num_classes else 1
        return images * steps * doubled * cost.flops / rate

    runs = 1 + tune.teacher_more_steps + tune.random_proxies
    single = TRAIN_FORWARDS * sum(c.flops for o, c in proxies if o != "both")
    both = TRAIN_FORWARDS * sum(c.flops for o, c in proxies if o == "both")
    bank_flops = bank.batch_size * (bank.steps * (single + cost.flops) + bank.both_steps * (both + cost.flops))
    genotypes = search.evaluations + (search.evaluations - search.initial if search.random_baseline else 0)
    exports = [*config.export.dtypes, *config.export.executorch]
    lowering = LOWERING_SECONDS * model.config.num_layers  # of one network in ExecuTorch
    models = 2 + tune.teacher_more_steps + tune.random_proxies + 1 + len(exports)
    steps_of_table = TABLE_ROUND_NETWORKS * config.latency.repeats * 2 * config.latency.batch_size
    kd = 4 / 3 if tune.output_kd else 1
    exported = weights * sum(EXPORTED_SHARE[precision] for precision in exports)
    seconds = {
        "teacher": 0.0 if teacher.path else training(teacher.steps, teacher.batch_size),
        "bank": bank_flops / rate,
        "latency": 15 + steps_of_table * cost.flops / rate + (TABLE_ROUND_NETWORKS * lowering if config.latency.runtime == "executorch" else 0.0),
        "search": 15 + search.evaluations + genotypes * sampling(search.samples, search.sampling_steps, search.guidance_scale),
        "student": 1.0,
        "tune": runs * training(tune.steps, tune.batch_size) * kd,
        "export": 15.0 * len(exports) + len(config.export.executorch) * lowering,
        "evaluate": 20 + 2 * len(config.export.executorch) * lowering + models * sampling(judged.samples, judged.sampling_steps, judged.guidance_scale),
    }
    memory = {
        "teacher": 5 * weights + activations(teacher.batch_size),
        "bank": weights + 16.0 * proxy_weights + activations(bank.batch_size, len(proxies) / space.num_layers),
        "latency": 4 * weights,
        "search": 3 * weights,
        "student": 3 * weights,
        "tune": 6 * weights + activations(tune.batch_size),
        "export": 6 * weights,
        "evaluate": models * weights,
    }
    disk = {
        "teacher": 0.0 if teacher.path else weights,
        "bank": 4.0 * proxy_weights,
        "latency": 1e4,
        "search": 1e5,
        "student": weights,
        "tune": runs * weights,
        "export": exported,
        "evaluate": judged.samples * models * 200.0,
    }
    return [Estimate(stage, seconds[stage], BASE_MEMORY + memory[stage], disk[stage]) for stage in seconds]


def print_estimate(config: RunConfig) -> None:
    """Print the estimates as a table."""
    rows = estimate(config)
    print(f"{'stage':<10} {'time':>10} {'memory':>10} {'disk':>10}")
    total = Estimate("all", sum(r.seconds for r in rows), max(r.memory for r in rows), sum(r.disk for r in rows))
    for row in (*rows, total):
        minutes, seconds = divmod(round(row.seconds), 60)
        print(f"{row.stage:<10} {minutes:>6}:{seconds:02d} m {row.memory / 1e9:>7.2f} GB {row.disk / 1e6:>7.1f} MB")
    print("Estimates: FLOPs over the rate measured just now with", torch.get_num_threads(), "threads; nothing was written.")
