"""How long the models of a run take, forward by forward and image by image, as they ship."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from ..genotype import Genotype
from ..pipelines.sampling import quiet_call
from ..run.config import RunConfig
from ..runtimes.runners import SessionRunner, TorchRunner, example_inputs
from ..runtimes.sessions import open_session
from ..runtimes.timing import LONGEST_CALL_S, MEASURING_S, environment, measure, paired_ratio
from .formats import FORMATS
from .lowering import denoiser_file
from .wrappers import DenoiserWrapper

DECODING = ()  # the names under which decoding is timed: no model's own


class Sampled(NamedTuple):
    """A pipeline, and how it samples."""

    pipeline: Any
    steps: int
    guidance_scale: float

    @property
    def eager(self) -> bool:
        """Whether it runs in PyTorch."""
        return isinstance(self.pipeline.transformer, torch.nn.Module)

    @property
    def forwards(self) -> int:
        """Forwards of the denoiser an image: two a step with guidance."""
        conditional = self.pipeline.transformer.config.get("num_classes", 1)  # text to image always is
        return self.steps * (2 if self.guidance_scale > 1 and conditional else 1)

    @property
    def runtime(self) -> str:
        """What it runs in, e.g. "onnxruntime-int8"."""
        transformer = self.pipeline.transformer
        return "torch-fp32" if self.eager else f"{FORMATS[transformer.FORMAT].runtime}-{transformer.config.precision}"


def measure_latencies(pipelines: dict, config: RunConfig) -> dict:
    """Whole networks of each architecture in torch, ONNX Runtime (fp32 and int8) and, where exported, ExecuTorch:
    interleaved in one run. What the run has exported is timed as it ships; the rest is lowered here.
    """
    options, threads, batch = config.evaluate, config.latency.threads, config.evaluate.latency_batch_size
    asked = [("onnx", dtype) for dtype in FORMATS["onnx"].measured] + [
        ("executorch", dtype) for dtype in config.export.executorch
    ]
    runners: dict[tuple[str, str], TorchRunner | SessionRunner] = {}
    hashes: dict[str, str] = {}
    shipped: dict[str, str] = {}
    with TemporaryDirectory() as folder:
        for name in filter(pipelines.__contains__, ("teacher", "student-tuned", "few-step")):
            model = pipelines[name].transformer
            genotype = Genotype.of(model.config).hash
            if name == "few-step" and genotype in hashes.values():
                continue  # it has an architecture of its own only if it was distilled from a given pipeline
            hashes[name] = genotype
            inputs = example_inputs(model.config, batch)
            runners[name, "torch-fp32"] = TorchRunner(DenoiserWrapper(model), inputs, threads)
            for kind, dtype in asked:
                export, runtime = pipelines.get(f"exported/{kind}-{dtype}"), f"{FORMATS[kind].runtime}-{dtype}"
                exported = None if export is None else export.transformer
                file = denoiser_file(model, Path(folder, name), kind, dtype, batch, exported)
                if not file.is_relative_to(folder):
                    shipped[f"{name} {runtime}"] = f"exported/{kind}-{dtype}"
                runners[name, runtime] = SessionRunner(open_session(file, threads), inputs)
        timings = measure(runners, repeats=options.latency_repeats, max_seconds=MEASURING_S, progress="Timing forwards")
    measured: dict[str, dict[str, float]] = {hashes[name]: {} for name in hashes}
    for (name, runtime), timing in timings.items():
        measured[hashes[name]][runtime] = timing.median_ms
    ratios = {
        runtime: paired_ratio(timings["teacher", runtime], timings["student-tuned", runtime])
        for name, runtime in runners
        if name == "teacher"
    }
    return {
        "latency_ms": measured,
        "speedup": ratios,
        "shipped": shipped,
        "timings": {f"{name} {runtime}": timing.to_dict() for (name, runtime), timing in timings.items()},
        "batch_size": options.latency_batch_size,
        "threads": threads,
        "environment": environment(threads),
    }


def seconds_an_image(rows: Mapping[str, Sampled], latency: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """Wall-clock seconds an image of whole calls, noise to pixels, of `evaluate.latency_batch_size` images: medians of
    calls in turns. Models of one architecture that sample alike in one runtime are timed once.

    Args:
        rows: by name. latency: of [`measure_latencies`].

    Returns:
        `seconds_per_image`, by name, and `multiplied`: names of those whose call would take longer than
        [`LONGEST_CALL_S`]. Theirs are so many forwards as were timed, and the decoding of one image, timed in the same
        turns.
    """
    threads, batch = config.latency.threads, config.evaluate.latency_batch_size
    kinds: dict[tuple, list[str]] = {}
    for name, row in rows.items():
        kind = Genotype.of(row.pipeline.transformer.config).hash, row.runtime, row.steps, row.forwards
        kinds.setdefault(kind, []).append(name)
    seconds: dict[str, float] = {}
    runners: dict[tuple[str, ...], TorchRunner] = {}
    multiplied: list[str] = []
    for (genotype, runtime, _, forwards), names in kinds.items():
        of_forward = latency["latency_ms"].get(genotype, {}).get(runtime)
        if of_forward is not None and forwards * of_forward / 1e3 > LONGEST_CALL_S:
            seconds |= dict.fromkeys(names, forwards * of_forward / 1e3 / batch)
            multiplied += names
            continue
        row = rows[names[0]]
        if not row.eager:
            row.pipeline.transformer.set_threads(threads)
        runners[tuple(names)] = TorchRunner(call_of(row, batch), {}, threads)
    if multiplied and rows[multiplied[0]].pipeline.vae is not None:  # which all models of a run share
        runners[DECODING] = TorchRunner(decoding_of(rows[multiplied[0]]), {}, threads)
    timings = {}
    if runners:
        repeats = config.evaluate.latency_repeats
        timings = measure(runners, warmup=1, repeats=repeats, max_seconds=MEASURING_S, progress="Timing whole calls")
    if (decoding := timings.pop(DECODING, None)) is not None:
        seconds |= {name: seconds[name] + decoding.median_ms / 1e3 for name in multiplied}
    for names, timing in timings.items():
        seconds |= dict.fromkeys(names, timing.median_ms / 1e3 / batch)
        if not rows[names[0]].eager:
            rows[names[0]].pipeline.transformer.set_threads(None)
    return {"seconds_per_image": seconds, "multiplied": multiplied}


def _noise(row: Sampled, batch: int) -> torch.Tensor:
    config = row.pipeline.transformer.config
    size = config["sample_size"]
    return torch.randn(batch, config["in_channels"], size, size, generator=torch.Generator().manual_seed(0))


def decoding_of(row: Sampled) -> Any:
    """What its pipeline does last, for one image."""
    latents = _noise(row, 1)
    return lambda: row.pipeline.decode(latents)


def call_of(row: Sampled, batch: int) -> Any:
    """A call of a class-conditional pipeline for a batch of images."""
    latents, classes = _noise(row, batch), row.pipeline.transformer.config["num_classes"]
    asked = {"class_labels": torch.arange(batch) % classes} if classes else {"batch_size": batch}
    asked |= {"num_inference_steps": row.steps, "guidance_scale": row.guidance_scale, "output_type": "pt"}

    def call() -> Any:
        with quiet_call(row.pipeline):
            return row.pipeline(**asked, latents=latents).images

    return call
