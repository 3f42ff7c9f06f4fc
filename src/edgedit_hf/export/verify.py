"""Gates of an export: does the artefact compute what the model computes (verify.json), and what does it cost
(bench.json)?
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import EdgeDiTError
from ..metrics.distances import psnr
from ..pipelines.loading import with_components
from ..runtimes.footprint import footprint
from ..runtimes.runners import SessionRunner, TorchRunner
from ..runtimes.sessions import open_session
from ..runtimes.timing import environment, measure, paired_ratio
from .formats import PRECISIONS
from .onnx.lower import initializer_bytes
from .parts import MODULATED, Part, is_elastic, text_lengths

PROMPTS = (
    "a photo of a cat sitting on a chair",
    "a red bicycle leaning against a brick wall",
    "a watercolour painting of mountains at sunrise",
    "two people walking on a beach",
    "a bowl of fruit on a wooden table",
    "a small house in a snowy forest",
    "a portrait of an old man with a hat",
    "a blue car parked on a city street",
)


# -------------------------------------------------------------------- accuracy


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """‖found − reference‖ / ‖reference‖ (0 for two zero tensors)."""
    error, norm = (
        torch.linalg.vector_norm(found.float() - reference.float()),
        torch.linalg.vector_norm(reference.float()),
    )
    return float(error / norm) if norm > 0 else (0.0 if error == 0 else math.inf)


def sampling_arguments(pipeline: Any, num_images: int, prompts: Sequence[str] | None = None) -> dict[str, Any]:
    """Arguments of a pipeline's call for so many images: balanced classes, or prompts in turn (random embeddings for a
    pipeline without encoders).
    """
    config = pipeline.transformer.config
    if not is_elastic(pipeline):
        return (
            {"class_labels": [i % config.num_classes for i in range(num_images)]}
            if config.num_classes
            else {"batch_size": num_images}
        )
    if pipeline.text_encoder is not None or pipeline.text_encoder_2 is not None:
        texts = list(prompts or PROMPTS)
        return {"prompt": [texts[i % len(texts)] for i in range(num_images)]}
    generator = torch.Generator().manual_seed(0)
    lengths = text_lengths(pipeline)
    return {
        "prompt_embeds": [
            torch.randn(num_images, length, width, generator=generator)
            for length, width in zip(lengths, config.text_dims)
        ]
    }


def compare(
    pipeline: Any, exported: Any, seed: int = 0, num_images: int = 8, prompts: Sequence[str] | None = None
) -> dict:
    """Sample with the eager pipeline and with the exported one from the same seeds, at the pipeline's default steps and
    guidance.

    At every sampling timestep both denoisers get the eager run's input; afterwards both pipelines run their own loop to
    the images.

    Args:
        pipeline: the eager pipeline.
        exported: the same with exported components.
        seed: image i starts from the noise of seed + i.
        num_images: images, rounded up to what an artefact of fixed batch takes.
        prompts: of text to image.

    Returns:
        relative_error (the worst timestep's), worst_timestep, per_timestep, psnr_db (`None` if all images are equal),
        finite, and how it was measured (seed, images, steps, guidance_scale).
    """
    artefact = exported.transformer
    eager = with_components(pipeline)
    for pipe in (eager, exported):
        pipe.set_progress_bar_config(disable=True)
    guidance = pipeline.config.default_guidance_scale
    if not is_elastic(pipeline) and not artefact.config.num_classes:
        guidance = 1.0
    if artefact.config.batch != "dynamic":
        step = artefact.config.batch
        if guidance > 1:  # doubles the batch
            step //= math.gcd(step, 2)
        num_images = step * math.ceil(num_images / step)
    asked = sampling_arguments(pipeline, num_images, prompts)
    size = artefact.config.get("size")
    if size:
        asked |= {"height": size[0] * pipeline.vae_scale_factor, "width": size[1] * pipeline.vae_scale_factor}
    steps: list[dict[str, float]] = []

    def compare_forward(module, inputs, named, output) -> None:
        # A pipeline computes the modulation for a model that can; an artefact has its own conditioner.
        named = {key: value for key, value in named.items() if key not in ("return_dict", MODULATED)}
        found = artefact(*inputs, **named, return_dict=False)[0]
        steps.append({"timestep": float(inputs[1].flatten()[0]), "relative_error": relative_error(found, output[0])})

    def sample(pipe: Any) -> Any:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(num_images)]
        return pipe(**asked, guidance_scale=guidance, generator=generators, output_type="np").images

    handle = pipeline.transformer.register_forward_hook(compare_forward, with_kwargs=True)
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


def compare_part(part: Part, outputs: Sequence[np.ndarray]) -> float:
    """Relative error of an artefact's outputs for the part's example inputs against the eager part, the worst output's.

    Positions of a text encoder whose token is masked do not count: nobody reads them.
    """
    mask = part.inputs.get("attention_mask")
    errors = []
    for value, reference in zip(map(torch.from_numpy, outputs), part.run().values(), strict=True):
        if mask is not None:
            value, reference = value * mask.unsqueeze(-1), reference * mask.unsqueeze(-1)
        errors.append(relative_error(value, reference))
    return max(errors)


def check(found: Mapping, precision: str, tolerance: float | None = None, min_psnr_db: float | None = None) -> dict:
    """The gate: what verify.json holds if it passes.

    Args:
        found: what [`compare`] returned.
        precision: a key of [`PRECISIONS`].
        tolerance: largest relative error of a forward; default the precision's.
        min_psnr_db: least ratio of the images; default the precision's.

    Raises:
        EdgeDiTError: NaN or infinite values, a relative error above the tolerance, or images below `min_psnr_db`.
    """
    tolerance = PRECISIONS[precision].tolerance if tolerance is None else tolerance
    least = PRECISIONS[precision].min_psnr_db if min_psnr_db is None else min_psnr_db
    if not found["finite"]:
        raise EdgeDiTError(
            f"The {precision} export gives NaN or infinite values (worst at timestep {found['worst_timestep']:g}); "
            "nothing was written. Check that the model itself samples finite images."
        )
    if found["relative_error"] > tolerance:
        raise EdgeDiTError(
            f"The {precision} export differs from the model by a relative error of {found['relative_error']:.3g} at "
            f"timestep {found['worst_timestep']:g}; the tolerance is {tolerance:g}. Nothing was written. Raise the "
            "tolerance (in a recipe export.tolerance) only if the images still satisfy you, or export at a higher "
            "precision."
        )
    if found["psnr_db"] is not None and found["psnr_db"] < least:
        raise EdgeDiTError(
            f"The images of the {precision} export reach {found['psnr_db']:.1f} dB against the model's after "
            f"{found['steps']} steps; the gate is {least:g} dB. Nothing was written. Export at a higher precision."
        )
    return {
        "precision": precision,
        "tolerance": tolerance,
        "min_psnr_db": least,
        "passed": True,
        **found,
    }


def check_part(part: Part, precision: str, error: float, tolerance: float | None = None) -> dict:
    """The gate of a part beside the denoiser: what verify.json holds of it if it passes.

    Raises:
        EdgeDiTError: the error is not finite or above the tolerance.
    """
    tolerance = PRECISIONS[precision].tolerance if tolerance is None else tolerance
    if not error <= tolerance:
        raise EdgeDiTError(
            f"The {precision} export of the {part.name} of {part.component} differs from the model by a relative error "
            f"of {error:.3g}; the tolerance is {tolerance:g}. Nothing was written. Export at a higher precision."
        )
    return {"precision": precision, "relative_error": error, "tolerance": tolerance}


# -------------------------------------------------------------------- cost


def with_rows(inputs: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """Examples of another batch: rows are repeated."""
    return {
        name: value.repeat(math.ceil(rows / len(value)), *[1] * (value.ndim - 1))[:rows].contiguous()
        for name, value in inputs.items()
    }


def benchmark(
    part: Part,
    files: Mapping[str, str | os.PathLike],
    batches: Sequence[int],
    threads: int,
    repeats: int = 20,
    max_seconds: float = 120.0,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> dict:
    """What an artefact costs beside the eager part: latency interleaved in one run a batch, bytes, time to load and
    memory.

    Args:
        part: the eager fp32 part.
        files: precision → artefact; the last one is what the result is about, others are for comparison.
        batches: rows a forward.
        threads: intra-op threads of every runtime.
        repeats: timed rounds a batch (fewer, at least 5, once a batch took `max_seconds`).
        max_seconds: see repeats.
        extra: examples of inputs that the artefact has beside the part's.

    Returns:
        file_bytes, initializer_bytes (of the weights in the file; also by type where the format tells),
        initializer_bytes_fp32 (of the part's), load_seconds (first run included), resident_bytes, peak_bytes, latency
        (one entry a batch: a timing a runner and `speedup` over each other runner, paired by rounds).
    """
    *_, precision = files
    examples = {**part.inputs, **(extra or {})}
    sessions = {name: open_session(file, threads) for name, file in files.items()}
    shipped = f"{sessions[precision].runtime}-{precision}"
    latency = []
    for batch in batches:
        runners: dict[str, Any] = {"torch-fp32": TorchRunner(part.module, with_rows(part.inputs, batch), threads)}
        for name, session in sessions.items():
            runners[f"{session.runtime}-{name}"] = SessionRunner(session, with_rows(examples, batch))
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
    total = sum(bytes_of.values())
    fp32 = 4 * part.weights
    return {
        "precision": precision,
        "file_bytes": sum(p.stat().st_size for p in (file, file.with_name(file.name + ".data")) if p.exists()),
        "initializer_bytes": total,
        "initializer_bytes_by_type": bytes_of,
        "initializer_bytes_fp32": fp32,
        "initializer_shrink": fp32 / total,
        **footprint(file, with_rows(examples, batches[0]), threads),
        "latency": latency,
        "environment": environment(threads),
    }


def weight_bytes(file: str | os.PathLike) -> dict[str, int]:
    """Bytes of the weights in an artefact by type. A .pte file keeps them packed for its kernels: there it is the
    file's size.
    """
    file = Path(file)
    return {"packed": file.stat().st_size} if file.suffix == ".pte" else initializer_bytes(file)
