"""What a run will cost, a stage, before anything runs: closed-form FLOPs and bytes, here and on one and eight GPUs.

Nothing of the run's size is allocated, and nothing outside this machine is asked: what is not here yet (a teacher to be
converted, a data set or an autoencoder of the Hub) is replaced by an assumption that is printed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from . import hub
from .data.loading import load_run_images
from .distill.memory_plan import (
    PROCESS_BYTES,
    MemoryModel,
    combined,
    depth_of,
    plan_bank,
    prefix_cost,
    units_of,
    wanted_proxies,
)
from .distill.teacher import new_teacher, read_genotype, search_space_of
from .elastic.cost import data_shapes, print_elastic_estimate
from .elastic.cost import here as elastic_machine
from .elastic.supernet import new_elastic
from .errors import EdgeDiTError
from .export.web.runtime import PACKAGE_BYTES
from .few_step.cost import activation_bytes, few_step_estimate, net_to_distil, print_memory
from .genotype import LayerSpec
from .models.transformer_edgedit import EdgeDiTTransformer2DModel
from .models.transformer_elastic_dit import ElasticDiTTransformer2DModel
from .pipelines.loading import meta_vae
from .quantization.inputs import count_forms, images_through
from .run.config import RunConfig
from .run.cost import BACKWARD, IMAGENET, UPDATE_BYTES, Estimate, Machine, gpus, median_seconds, print_table
from .run.sections import OptimisationConfig
from .run.stage import EDGEDIT, ELASTIC, FEW_STEP, SELF_DISTIL, TUNE, given_source
from .runtimes.timing import LONGEST_CALL_S, MEASURING_S, MIN_ROUNDS
from .search.latency_measurement import OPEN_BYTES
from .search.latency_networks import HELD_OUT, fitted_networks, timed_shapes
from .search_space import (
    BYTES,
    Cost,
    SearchSpace,
    elastic_cost,
    grid_tokens,
    layer_cost,
    model_cost,
    position_weights,
    trunk_cost,
)

LIBRARIES = 0.15e9  # what botorch and ONNX Runtime add to a process
HELD_OUT_SHARE = 0.65  # of the teacher's cost: a network that the latency table is judged by, on average
CHUNK = 2000  # images that stage evaluate holds as floats at a time
SOLVERS = 6  # that few steps of the tuned student are tried with
CG_ITERATIONS = 30  # of a closed-form refit, with two products of 2·M·F·D FLOPs each
JUDGED = 7  # times that every proxy sees the held-out images: three starts and four points of its curve


# -------------------------------------------------------------------- what the run is made of


@dataclass
class Workload:
    """Sizes of a run: the teacher's config, its data, and what had to be assumed."""

    model: dict[str, Any]
    images: int
    pixels: int  # values of an image
    encode_flops: float = 0.0  # of the VAE, an image
    decode_flops: float = 0.0
    assumed: list[str] = field(default_factory=list)


def _flops(call) -> float:
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        call()
    return float(counter.get_total_flops())


def workload(config: RunConfig) -> Workload:
    """Sizes of a run, from what is on this machine; nothing is downloaded and no teacher loaded.

    Raises:
        EdgeDiTError: local data cannot be used, the teacher's sizes do not fit the data, or `teacher.path` is not
            EdgeDiT's.
    """
    assumed: list[str] = []
    data, source = config.data, Path(config.data.source).expanduser()
    of_hub = (
        data.source.partition(":")[0].count("/") == 1
        and not data.source.startswith((".", "/", "~"))
        and not source.exists()
    )
    if not of_hub or data.resolution is None:
        images = load_run_images(config)
        count, shape, classes = len(images), images.shape, images.num_classes
    else:
        count, classes = IMAGENET["images"], IMAGENET["classes"]
        shape = (data.channels or 3, data.resolution, data.resolution)
        assumed.append(
            f"data.source {data.source} is not here: taken to hold {count:,} images of {classes} classes, as ImageNet "
            "does"
        )
    pixels, encode, decode = shape[0] * shape[1] * shape[2], 0.0, 0.0
    if data.vae is not None:
        vae = meta_vae(data.vae, assumed, shape)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        latent = (vae.config.latent_channels, shape[1] // factor, shape[2] // factor)
        encode = _flops(lambda: vae.encode(torch.empty(1, *shape)))
        decode = _flops(lambda: vae.decode(torch.empty(1, *latent)))
        shape = latent
    with torch.device("meta"):
        model = _given_teacher(config.teacher.path, assumed)
        if model is None:
            model = new_teacher(config, shape, classes)
    return Workload(dict(model.config), count, pixels, encode, decode, assumed)


def _given_teacher(path: str | None, assumed: list[str]) -> EdgeDiTTransformer2DModel | None:
    """The teacher that is brought along, on the meta device; `None`: it is not here (or none is), the recipe's sizes
    count.
    """
    if path is None:
        return None
    try:
        folder = hub.here(path, "transformer/config.json") or path
        values = EdgeDiTTransformer2DModel.load_config(folder, subfolder="transformer", local_files_only=True)
    except (OSError, ValueError):
        assumed.append(f"teacher.path {path} is not here: taken to have the sizes in the recipe's section teacher")
        return None
    if values.get("_class_name") != EdgeDiTTransformer2DModel.__name__:
        raise EdgeDiTError(
            f"teacher.path {path} holds a {values.get('_class_name')}; convert it first: edgedit convert {path} OUT"
        )
    return EdgeDiTTransformer2DModel.from_config(values)


# -------------------------------------------------------------------- this machine


def here(config: RunConfig, model_config: dict[str, Any]) -> Machine:
    """This machine, with rates measured in about a second each: a forward of the teacher's first layers, and an
    optimiser's update.
    """
    torch.set_num_threads(config.threads or torch.get_num_threads())
    layer = layer_cost(
        model_config["hidden_size"], SearchSpace.for_config(model_config).option_shape("original"), 1
    ).weights
    layers = model_config["layers"][: max(1, min(len(model_config["layers"]), int(5e7 / layer)))]
    small = {"layers": layers, "num_layers": len(layers), "long_skips": None, "decoder_start": None, "side_layers": 0}
    model = EdgeDiTTransformer2DModel.with_config(model_config, **small).eval()
    flops = model_cost(model.config).flops
    batch = max(1, min(64, config.evaluate.batch_size, int(4e10 / flops)))
    size = model_config["sample_size"]
    x, t = torch.randn(batch, model_config["in_channels"], size, size), torch.full((batch,), 500.0)
    labels = torch.zeros(batch, dtype=torch.long) if model_config["num_classes"] else None
    with torch.inference_mode():
        rate = batch * flops / median_seconds(lambda: model(x, t, labels))
    weights = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    updates = (
        UPDATE_BYTES * 0.7 * weights / median_seconds(optimizer.step)
    )  # without the moving average, it moves 28 of 40 bytes
    return Machine("here", 1, rate, rate, rate, updates)


# -------------------------------------------------------------------- the stages


class _Estimator:
    """Closed forms of every stage for one run and one machine."""

    def __init__(self, config: RunConfig, work: Workload, machine: Machine) -> None:
        self.config, self.work, self.machine = config, work, machine
        self.host = machine.host or machine
        self.space = search_space_of(config, work.model)
        self.tokens = grid_tokens(work.model)
        self.teacher = model_cost(work.model)
        self.student = self._student()
        self.base = 1e9 if machine.gpu else PROCESS_BYTES + LIBRARIES  # of a GPU: what CUDA and cuBLAS take
        self.device = "gpu" if machine.gpu else "cpu"
        self.bf16 = machine.gpu

    def _student(self) -> Cost:
        """The student's cost: the given genotype's, else the largest that the limits allow."""
        given = self.config.student
        if given.genotype is not None:
            return model_cost(
                {**self.work.model, "layers": read_genotype(given.genotype, "student.genotype").to_layers()}
            )
        weights = round(self.teacher.weights * min(1.0, given.max_parameters_ratio or 1.0))
        for megabytes in (given.max_bytes_mb, given.max_memory_mb):
            if megabytes is not None:
                weights = min(weights, round(1e6 * megabytes / BYTES[self.config.latency.precision]))
        flops = round(self.teacher.flops * min(1.0, given.max_flops_ratio or 1.0))
        return Cost(weights, weights, flops // 2, flops)

    def activations(self, batch: int, checkpointing: bool = False) -> float:
        """Bytes that autograd keeps of all layers: 32 + 16·A/D + 8·(MLP ratio) a token and channel in fp32 (counted
        with saved-tensor hooks), half as many in bf16; with checkpointing the input of every layer, and one layer."""
        token = batch * self.tokens * self.space.hidden_size
        layer = token * (48 + 8 * self.space.mlp_ratio) * (0.5 if self.bf16 else 1)
        return layer + self.space.num_layers * 4 * token if checkpointing else self.space.num_layers * layer

    def training(self, cost: Cost, options: OptimisationConfig) -> tuple[float, float]:
        """Seconds and bytes a process. Data parallel: each of N processes holds everything and does an N-th of the
        batch.
        """
        machine = self.machine
        forwards = 1 + BACKWARD + options.gradient_checkpointing
        step = (
            forwards * options.batch_size * cost.flops / (machine.processes * machine.flops)
            + UPDATE_BYTES * cost.weights / machine.update_bytes
        )
        # Weights, gradients, two moments, moving average; buckets of the gradients' all-reduce; copies of the weights
        # that autocast keeps.
        held = cost.weights * (20 + (4 if machine.processes > 1 else 0) + (2 if self.bf16 else 0))
        micro = -(-options.batch_size // (machine.processes * options.gradient_accumulation))
        return options.steps * step, held + self.activations(micro, options.gradient_checkpointing)

    def sampling(self, cost: Cost, images: int, steps: int, guidance: float) -> float:
        """Seconds of one process, the VAE included."""
        doubled = 2 if guidance > 1 and self.work.model["num_classes"] else 1
        return images * (steps * doubled * cost.flops + self.work.decode_flops) / self.machine.flops

    def timing(self, calls: float) -> float:
        """Seconds of timing models in turns whose calls take so long together: each runs untimed before it is timed."""
        rounds = min(self.config.evaluate.latency_repeats, max(MIN_ROUNDS, MEASURING_S / max(calls, 1e-6)))
        return 2 * rounds * calls

    def judging(self, batch: int, networks: int, images: int) -> float:
        """Bytes that sampling needs on its device; on the CPU the images that are floats lie there too, twice while
        they are joined.
        """
        batch_bytes = batch * (
            2 * self.tokens * self.space.hidden_size * 4 * 8 + 4 * 16 * self.work.pixels * bool(self.work.decode_flops)
        )
        return (
            self.base
            + 4 * networks * self.teacher.weights
            + batch_bytes
            + (0 if self.machine.gpu else 8 * images * self.work.pixels)
        )

    def latents(self) -> float:
        """Seconds of caching the latents, which the main process does before the first stage that trains."""
        return self.work.images * self.work.encode_flops / self.machine.conv_flops

    # ---------------------------------------------------------------- one method a stage, in order

    def stage_teacher(self) -> Estimate:
        options = self.config.teacher
        if options.path is not None:
            return Estimate("teacher", 0.0, 0.0, 0.0, self.device)
        seconds, held = self.training(self.teacher, options)
        disk, before = 4.0 * self.teacher.weights, self.latents()
        return Estimate(
            "teacher", before + seconds, self.base + held, disk, self.device, self.machine.processes, before
        )

    def stage_bank(self) -> Estimate:
        options, machine, space = self.config.bank, self.machine, self.space
        only = None if options.only is None else [read_genotype(name, "bank.only") for name in options.only]
        wanted = wanted_proxies(space, only)
        memory = MemoryModel(
            space,
            self.work.model,
            tokens=self.tokens,
            batch_size=options.batch_size,
            calibration_samples=options.calibration_samples,
            teacher_bytes=2 if self.bf16 else 4,
            state_bytes=2 if options.optimizer == "adamw8bit" else 8,
            closed_form=options.init == "closed_form",
            process_bytes=0 if machine.gpu else PROCESS_BYTES,
        )
        budget = None if options.memory_budget_gb is None else 1e9 * options.memory_budget_gb
        plans = plan_bank(wanted, memory, min(machine.processes, len(units_of(space, wanted))), budget)
        # Ranks go through their groups in step with each other: the slowest group of every round counts.
        rounds = list(
            zip_longest(
                *([self._group_seconds(group.layers) for group in plan] for plan in plans), fillvalue=(0.0, 0.0)
            )
        )
        before = sum(max(starts for starts, _ in group) for group in rounds) + (
            self.latents() if self.config.teacher.path is not None else 0.0
        )
        seconds = before + sum(max(trained for _, trained in group) for group in rounds)
        held = max(group.predicted_bytes for plan in plans for group in plan) + (self.base if machine.gpu else 0)
        disk = 4.0 * memory.weights(wanted)
        return Estimate("bank", seconds, held, disk, self.device, len(plans), before)

    def _group_seconds(self, layers: tuple[LayerSpec, ...]) -> tuple[float, float]:
        """Of a group: starts and held-out losses, and training."""
        options, machine = self.config.bank, self.machine
        depths, head = [depth_of(unit) for unit in units_of(self.space, layers)], position_weights(self.work.model)

        def prefix(depth: int, batch: int) -> float:
            return prefix_cost(self.space, depth, self.tokens, batch) / machine.flops

        def step(some: Iterable[LayerSpec]) -> float:
            costs = [layer_cost(self.space.hidden_size, layer.shape, self.tokens, head) for layer in some]
            if not costs:
                return 0.0
            products = (1 + BACKWARD) * options.batch_size * sum(c.flops for c in costs) / machine.flops
            return (
                prefix(max(depths), options.batch_size)
                + products
                + 28 * sum(c.weights for c in costs) / machine.update_bytes
            )

        both = [layer for layer in layers if combined(self.space, layer)]
        trained = options.steps * step(
            layer for layer in layers if not combined(self.space, layer)
        ) + options.both_steps * step(both)
        count = options.calibration_samples
        forwards = sum(layer_cost(self.space.hidden_size, layer.shape, self.tokens).flops for layer in layers)
        judged = (
            JUDGED * count * forwards / machine.flops
            + sum(2 * prefix(depth, count) for depth in depths)
            + JUDGED * prefix(max(depths), count)
        )
        fitted = sum(map(self._fit_flops, layers)) / machine.fp32_flops if options.init == "closed_form" else 0.0
        return judged + fitted, trained

    def _fit_flops(self, layer: LayerSpec) -> float:
        """A closed-form start: Gram matrices and conjugate gradients of attention outputs and MLP neurons, before and
        after selection.
        """
        rows, width, merged = (
            self.config.bank.calibration_samples * self.tokens,
            self.space.hidden_size,
            len(layer.source),
        )
        neurons, kept = merged * int(width * self.space.mlp_ratio), int(width * layer.mlp_ratio)
        sizes = [kept]
        if layer.attention_dim < width or layer.num_heads != self.space.num_heads or merged > 1:
            sizes.append(layer.attention_dim)
        if merged > 1:
            sizes += [neurons, merged * width]
        selection = 2 * rows * neurons**2 + 4 * neurons**3 if kept < neurons else 0
        return selection + sum(2 * rows * size**2 + CG_ITERATIONS * 4 * rows * size * width for size in sizes)

    def stage_latency(self) -> Estimate:
        options, space = self.config.latency, self.space
        if options.table is not None:
            return Estimate("latency", 1.0, PROCESS_BYTES, 1e4)
        networks = fitted_networks(timed_shapes(space), space.num_layers)
        trunk, head = trunk_cost(self.work.model, self.tokens), position_weights(self.work.model)
        costs = [
            sum((layer_cost(space.hidden_size, shape, self.tokens, head) for shape in network), trunk)
            for network in networks
        ]
        flops = sum(cost.flops for cost in costs) + HELD_OUT * HELD_OUT_SHARE * self.teacher.flops
        weights = sum(cost.weights for cost in costs) + HELD_OUT * HELD_OUT_SHARE * self.teacher.weights
        seconds = 10 + options.repeats * 2 * options.batch_size * flops / self.host.fp32_flops
        stored = BYTES[options.precision] * weights
        loaded = stored if stored <= OPEN_BYTES else BYTES[options.precision] * self.teacher.weights
        held = PROCESS_BYTES + LIBRARIES + loaded + 8 * self.teacher.weights  # one is being lowered
        if options.runtime != "onnxruntime":  # every network is a file until the stage ends
            return Estimate("latency", seconds, held, stored)
        return Estimate("latency", seconds, held, 1e4)

    def stage_search(self) -> Estimate:
        options = self.config.search
        genotypes = options.evaluations + (options.evaluations - options.initial if options.random_baseline else 0)
        smallest = model_cost({**self.work.model, "layers": self.space.ends()[1].to_layers()})
        flops = (self.teacher.flops + smallest.flops) // 2  # of a genotype, on average
        mean = Cost(self.teacher.parameters, self.teacher.weights, flops // 2, flops)
        judged = (
            options.samples * mean.flops / self.machine.flops
        )  # of a loss: a forward an image, which is not decoded
        if options.objective == "distance":
            judged = self.sampling(mean, options.samples, options.sampling_steps, options.guidance_scale)
        one = judged + 4 * self.teacher.weights / 5e8
        batch = min(options.samples, self.config.evaluate.batch_size)
        return Estimate(
            "search",
            5 + 0.5 * options.evaluations + genotypes * one,
            self.judging(batch, 2, options.samples),
            1e5,
            self.device,
        )

    def stage_student(self) -> Estimate:
        held = PROCESS_BYTES + 4 * (self.teacher.weights + self.student.weights)
        return Estimate("student", 1.0 + 8 * self.teacher.weights / 5e8, held, 4.0 * self.student.weights)

    def stage_tune(self) -> Estimate:
        options = self.config.tune
        runs = [self.student] * (1 + options.random_proxies) + [self.teacher] * options.teacher_more_steps
        seconds, memory = zip(*(self.training(cost, options) for cost in runs))
        more = 0.0
        if options.output_kd:  # a forward of the teacher for every step of a student
            more = (
                sum(s for s, cost in zip(seconds, runs) if cost is self.student)
                * self.teacher.flops
                / ((1 + BACKWARD) * self.student.flops)
            )
        keeps_teacher = options.output_kd or (
            not self.machine.gpu and (options.random_proxies or options.teacher_more_steps)
        )
        held = max(*memory, memory[0] + 4 * self.teacher.weights if keeps_teacher else 0)
        disk = 4.0 * sum(cost.weights for cost in runs)
        return Estimate("tune", sum(seconds) + more, self.base + held, disk, self.device, self.machine.processes)

    def student_model(self) -> EdgeDiTTransformer2DModel:
        """The given genotype's network on the meta device, or, where that is searched for, the teacher's, which is
        larger.
        """
        given = self.config.student.genotype
        layers = {} if given is None else {"layers": read_genotype(given, "student.genotype").to_layers()}
        with torch.device("meta"):
            return EdgeDiTTransformer2DModel.with_config(self.work.model, **layers)

    def stage_few_step(self) -> Estimate:
        """Of the net that few_step.path names, or else of the student that does not exist yet: the given genotype's,
        or, where that is searched for, the teacher's, which is larger.
        """
        options = self.config.few_step
        model = self.student_model() if options.path is None else net_to_distil(self.config)
        flops = self.student.flops if options.path is None else model_cost(model.config).flops
        asked = options.knowledge_guidance
        guided = (self.config.sampling.guidance_scale if asked is None else asked) > 1
        activations = activation_bytes(model, options)
        return few_step_estimate(self.config, self.machine, model, flops, guided, activations)

    def stage_quantize(self) -> Estimate:
        """Its first part, of the student's cost whatever quantize.path names."""
        rows = self._quantized_images()
        seconds = (rows["calibrate, judge"] + rows["errors of layers"]) * self.student.flops / self.machine.flops
        return self._quantizing("quantize", seconds, 2)

    def stage_self_distil(self) -> Estimate:
        """Its loop, which only the main process's networks are counted of."""
        seconds = self._quantized_images()["self-distillation"] * self.student.flops / self.machine.flops
        return self._quantizing("self-distil", seconds / self.machine.processes, 3, self.machine.processes)

    def _quantized_images(self) -> dict[str, int]:
        options, sampling, few = self.config.quantize, self.config.sampling, FEW_STEP.needed(self.config)
        steps, guidance = (
            (self.config.few_step.sampling_steps, 1.0) if few else (sampling.steps, sampling.guidance_scale)
        )
        steps = options.sampling_steps or steps
        guidance = guidance if options.guidance_scale is None else options.guidance_scale
        guided = 2 if guidance > 1 and self.work.model["num_classes"] else 1
        return images_through(options, count_forms(self.student_model(), options), 1, steps, guided)

    def _quantizing(self, stage: str, seconds: float, networks: int, processes: int = 1) -> Estimate:
        """Of a stage that holds so many networks, and activations."""
        options = self.config.quantize
        batch = options.sampling_batch_size if networks == 2 else options.batch_size // options.gradient_accumulation
        held = self.base + 4 * networks * self.student.weights + self.activations(-(-batch // processes))
        disk = options.budget_bits / 8 * self.student.weights
        return Estimate(stage, seconds, held, disk, self.device, processes)

    def stage_export(self) -> Estimate:
        options = self.config.export
        dtypes = [*options.dtypes, *options.executorch, *options.web]
        count = len(dtypes)
        seconds = count * (6.0 + 200 * self.student.flops / self.host.fp32_flops + 16 * self.student.weights / 2e8)
        disk = sum(BYTES[dtype] for dtype in dtypes) * self.student.weights + len(options.web) * PACKAGE_BYTES
        return Estimate("export", seconds, PROCESS_BYTES + LIBRARIES + 20 * self.student.weights, disk)

    def stage_evaluate(self) -> Estimate:
        options, tune = self.config.evaluate, self.config.tune
        asked = options.samples, self.config.sampling.steps, self.config.sampling.guidance_scale
        exports = (len(self.config.export.dtypes) + len(self.config.export.executorch)) * options.exports
        teachers, students = 1 + tune.teacher_more_steps, 2 + tune.random_proxies
        seconds = 10 + teachers * self.sampling(self.teacher, *asked) + students * self.sampling(self.student, *asked)
        seconds += exports * self.sampling(self.student, *asked) * self.machine.flops / self.host.fp32_flops
        runtimes, batch = 3 + len(self.config.export.executorch), options.latency_batch_size
        seconds += self.timing(runtimes * batch * (self.teacher.flops + self.student.flops) / self.host.fp32_flops)
        calls = [self.sampling(cost, batch, *asked[1:]) for cost in (self.teacher, self.student)]
        calls += calls[1:] * exports
        if FEW_STEP.needed(self.config):  # the student, and the tuned one by every standard solver and the best again
            few, guidance = self.config.few_step.sampling_steps, asked[2]
            seconds += self.sampling(self.student, options.samples, few, 1.0)
            calls += [self.sampling(self.student, batch, few, scale) for scale in (1.0, guidance)]
            seconds += (SOLVERS + 1) * self.sampling(self.student, options.samples, few, guidance)
            students += 2
            if given_source(self.config) is not None:  # with many steps too
                seconds += self.sampling(self.student, *asked)
                students += 1
        if SELF_DISTIL.needed(self.config):  # quantised, it samples as what it was made of
            few = FEW_STEP.needed(self.config)
            seconds += self.sampling(
                self.student, options.samples, *((self.config.few_step.sampling_steps, 1.0) if few else asked[1:])
            )
            students += 1
        decoding = self.work.decode_flops / self.machine.flops if max(calls) > LONGEST_CALL_S else 0.0  # one image's
        seconds += self.timing(sum(call for call in calls if call <= LONGEST_CALL_S) + decoding)
        models = teachers + students + exports
        networks = 1 if self.machine.gpu else models + runtimes
        held = self.judging(options.batch_size, networks, min(options.samples, CHUNK))
        return Estimate("evaluate", seconds, held, float(options.samples * models * self.work.pixels), self.device)

    def all(self) -> list[Estimate]:
        """Every stage that is asked for, in order; without a search the stages that only serve it cost nothing."""
        found = {
            stage: getattr(self, f"stage_{stage.name.replace('-', '_')}")()
            for stage in EDGEDIT
            if not stage.only or stage.needed(self.config)
        }
        return [
            cost if stage.needed(self.config) else Estimate(stage.name, 0.0, 0.0, 0.0, cost.device)
            for stage, cost in found.items()
        ]


def estimate(config: RunConfig, machine: Machine | None = None, on_gpus: int = 0) -> list[Estimate]:
    """Estimates of all stages of a run, in order. They assume that nothing else runs there.

    Args:
        machine: default: this one, one process; with `on_gpus`, as many GPUs in it, taken to be like [`gpus`].
    """
    work = workload(config)
    machine = machine or here(config, work.model)
    return _Estimator(config, work, gpus(on_gpus, machine) if on_gpus else machine).all()


# -------------------------------------------------------------------- the table


def print_estimate(config: RunConfig) -> None:
    """Print the estimates as a table: here, on one GPU and on eight."""
    work = workload(config)
    local = here(config, work.model)
    machines = (local, gpus(1, local), gpus(8, local))
    print_table(machines, [_Estimator(config, work, machine).all() for machine in machines], work.assumed)


def print_text_to_image_estimate(config: RunConfig) -> None:
    """Print the estimates of stage elastic and, where the recipe asks for it, of stage few-step."""
    print_elastic_estimate(config)
    if FEW_STEP.needed(config):
        if config.few_step.path is not None:
            print_few_step_estimate(config)
            return
        given, shapes = (config.text.encoder, config.text.encoder_2), data_shapes(config, [])[0]
        with torch.device("meta"):
            model = new_elastic(config, shapes, [config.text.hidden_size if path is None else 0 for path in given])
        print_few_step_estimate(config, model)


def print_few_step_estimate(config: RunConfig, model: Any = None) -> None:
    """Print the estimate of stage few-step: here, on one GPU and on eight.

    Args:
        model: the net that will be distilled; default the one that is there.
    """
    model = net_to_distil(config) if model is None else model
    elastic = isinstance(model, ElasticDiTTransformer2DModel)
    values = {key: value for key, value in model.config.items() if not key.startswith("_")}
    flops = elastic_cost(values).flops if elastic else model_cost(model.config).flops
    local = elastic_machine(values, config.threads) if elastic else here(config, dict(model.config))
    machines = (local, gpus(1, local), gpus(8, local))
    kept = activation_bytes(model, config.few_step)
    guided = config.few_step.knowledge_guidance is None or config.few_step.knowledge_guidance > 1
    rows = [[few_step_estimate(config, machine, copy.deepcopy(model), flops, guided, kept)] for machine in machines]
    print_table(machines, rows, ["the autoencoder, the real images and the time of a given teacher are not counted"])
    if config.few_step.path is not None or any(config.folder(stage.folder).exists() for stage in (TUNE, ELASTIC)):
        print_memory(config)
