"""Gates of an export: does the artefact compute what the model computes (verify.json), and what does it cost (bench.json)?"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import EdgeDiTError
from ..latency.protocol import environment, measure, paired_ratio
from ..latency.runners import RUNNERS, TorchRunner
from ..launch import with_transformer
from ..metrics.generative import psnr
from ..pipelines.pipeline_edgedit import EdgeDiTPipeline
from .onnx import initializer_bytes

if TYPE_CHECKING:
    from ..models.transformer_edgedit import EdgeDiTTransformer2DModel
    from .runtime import ExportedTransformer

# ‖artefact − eager‖ / ‖eager‖ of one forward, the worst over all sampling timesteps. fp32 differs by the order of additions only.
# Quantised networks are worst at the last, nearly clean timesteps, where trained models on digits lie between 0.010 and 0.021 in int8
# (images at 44 to 54 dB), between 0.009 and 0.015 in 8da8w (43 to 48 dB), and between 0.08 and 0.13 in 8da4w (25 to 27 dB).
TOLERANCE = {"fp32": 1e-3, "int8": 5e-2, "8da8w": 5e-2, "8da4w": 3e-1}
# Peak signal-to-noise ratio of the images after the full loop, where the forwards' errors have added up.
MIN_PSNR_DB = {"fp32": 50.0, "int8": 25.0, "8da8w": 25.0, "8da4w": 15.0}


def compare(
    pipeline: EdgeDiTPipeline, artefact: ExportedTransformer, seed: int = 0, num_images: int = 8
) -> dict:
    """Sample with the eager pipeline and with the artefact from the same seeds, at the pipeline's default steps and guidance.

    At every sampling timestep both networks get the eager run's input; afterwards both run their own loop to the images.

    Args:
        pipeline: the eager pipeline.
        artefact: the exported denoiser.
        seed: image i starts from the noise of seed + i.
        num_images: images, rounded up to what an artefact of fixed batch takes.

    Returns:
        relative_error (the worst timestep's), worst_timestep, per_timestep, psnr_db (`None` if all images are equal), finite, and how
        it was measured (seed, images, steps, guidance_scale).
    """
    eager = with_transformer(pipeline, pipeline.transformer)
    exported = with_transformer(pipeline, artefact)
    for pipe in (eager, exported):
        pipe.set_progress_bar_config(disable=True)
    classes = artefact.config.num_classes
    guidance = pipeline.config.default_guidance_scale if classes else 1.0
    if artefact.config.batch != "dynamic":
        step = artefact.config.batch
        if guidance > 1:  # doubles the batch
            step //= math.gcd(step, 2)
        num_images = step * math.ceil(num_images / step)
    images_of = {"class_labels": [i % classes for i in range(num_images)]} if classes else {"batch_size": num_images}
    steps: list[dict[str, float]] = []

    def compare_forward(module, inputs, output) -> None:
        reference = output[0].float()
        error = torch.linalg.vector_norm(artefact(*inputs, return_dict=False)[0] - reference)
        norm = torch.linalg.vector_norm(reference)
        relative = float(error / norm) if norm > 0 else (0.0 if error == 0 else math.inf)
        steps.append({"timestep": float(inputs[1].flatten()[0]), "relative_error": relative})

    def sample(pipe: EdgeDiTPipeline):
        generators = [torch.Generator().manual_seed(seed + i) for i in range(num_images)]
        return pipe(**images_of, guidance_scale=guidance, generator=generators, output_type="np").images

    handle = pipeline.transformer.register_forward_hook(compare_forward)
    try:
        reference_images = sample(eager)
    finally:
        handle.remove()
    images = sample(exported)
    worst = max(steps, key=lambda s: s["relative_error"] if math.isfinite(s["relative_error"]) else math.inf)
    finite = all(math.isfinite(s["relative_error"]) for s in steps) and bool(torch.from_numpy(images).isfinite().all())
    ratio = psnr(images, reference_images, data_range=1.0) if finite else math.nan
    return {
        "seed": seed,
        "images": num_images,
        "steps": len(steps),
        "guidance_scale": guidance,
        "finite": finite,
        "relative_error": worst["relative_error"],
        "worst_timestep": worst["timestep"],
        "psnr_db": None if math.isinf(ratio) else ratio,
        "per_timestep": steps,
    }


def check(found: Mapping, precision: str, tolerance: float | None = None) -> dict:
    """The gate: what verify.json holds if it passes.

    Args:
        found: what [`compare`] returned.
        precision: a key of [`TOLERANCE`].
        tolerance: largest relative error of a forward; default [`TOLERANCE`].

    Raises:
        EdgeDiTError: NaN or infinite values, a relative error above the tolerance, or images below [`MIN_PSNR_DB`].
    """
    tolerance = TOLERANCE[precision] if tolerance is None else tolerance
    if not found["finite"]:
        raise EdgeDiTError(
            f"The {precision} export gives NaN or infinite values (worst at timestep {found['worst_timestep']:g}); nothing was written. "
            "Check that the model itself samples finite images."
        )
    if found["relative_error"] > tolerance:
        raise EdgeDiTError(
            f"The {precision} export differs from the model by a relative error of {found['relative_error']:.3g} at timestep "
            f"{found['worst_timestep']:g}; the tolerance is {tolerance:g}. Nothing was written. Raise the tolerance only if the images "
            "still satisfy you, or export at a higher precision."
        )
    if found["psnr_db"] is not None and found["psnr_db"] < MIN_PSNR_DB[precision]:
        raise EdgeDiTError(
            f"The images of the {precision} export reach {found['psnr_db']:.1f} dB against the model's after {found['steps']} steps; "
            f"the gate is {MIN_PSNR_DB[precision]:g} dB. Nothing was written. Export at a higher precision."
        )
    return {
        "precision": precision,
        "tolerance": tolerance,
        "min_psnr_db": MIN_PSNR_DB[precision],
        "passed": True,
        **found,
    }


def benchmark(
    model: EdgeDiTTransformer2DModel,
    files: Mapping[str, str | os.PathLike],
    batches: Sequence[int],
    threads: int,
    repeats: int = 20,
    max_seconds: float = 120.0,
    runtime: str = "onnxruntime",
) -> dict:
    """What the artefacts cost beside the eager model: latency interleaved in one run a batch, bytes, and time to load.

    Args:
        model: the eager fp32 denoiser.
        files: precision → artefact; the last one is what the result is about.
        batches: images a forward.
        threads: intra-op threads of every runtime.
        repeats: timed rounds a batch (fewer, at least 5, once a batch took `max_seconds`).
        max_seconds: see repeats.
        runtime: key of `latency.runners.RUNNERS`.

    Returns:
        file_bytes, initializer_bytes (of the weights in the file; also by type where the format tells), initializer_bytes_fp32 (of the
        model's), load_seconds (first run included), latency (one entry a batch: a timing a runner
        and `speedup` over each other runner, paired by rounds) and the environment.
    """
    *_, precision = files
    shipped = f"{runtime}-{precision}"
    latency, load_seconds = [], math.nan
    for batch in batches:
        runners = {"torch-fp32": TorchRunner(model, batch, threads)}
        for name, file in files.items():
            start = time.perf_counter()
            runner = runners[f"{runtime}-{name}"] = RUNNERS[runtime](file, model.config, batch, threads)
            runner()
            load_seconds = time.perf_counter() - start
        timings = measure(runners, repeats=repeats, max_seconds=max_seconds)
        latency.append(
            {
                "batch": batch,
                "timings": {name: timing.to_dict() for name, timing in timings.items()},
                "speedup": {n: paired_ratio(t, timings[shipped]) for n, t in timings.items() if n != shipped},
            }
        )
    file = Path(files[precision])
    bytes_of = weight_bytes(file)
    total, fp32 = sum(bytes_of.values()), 4 * sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    return {
        "precision": precision,
        "file_bytes": sum(p.stat().st_size for p in (file, file.with_name(file.name + ".data")) if p.exists()),
        "initializer_bytes": total,
        "initializer_bytes_by_type": bytes_of,
        "initializer_bytes_fp32": fp32,
        "initializer_shrink": fp32 / total,
        "load_seconds": load_seconds,
        "latency": latency,
        "environment": environment(threads),
    }


def weight_bytes(file: str | os.PathLike) -> dict[str, int]:
    """Bytes of the weights in an artefact by type. A .pte file keeps them packed for its kernels: there it is the file's size."""
    file = Path(file)
    return {"packed": file.stat().st_size} if file.suffix == ".pte" else initializer_bytes(file)
