"""`export_pipeline`: every network of a pipeline lowered, verified, timed and written as one folder; the same for every
format and both families.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import EdgeDiTError
from ..files import atomic_folder, check_finite
from ..pipelines.loading import load_pipeline, with_components
from ..quantization.layers import dequantize_model, quantized_weights
from ..run.outputs import check_output
from ..search_space import BYTES
from . import verify
from .contract import is_guided, set_schedule
from .formats import DYNAMIC_BATCH, ExportOptions
from .job import Job
from .lowering import Lowering
from .mixed import quantized_linears
from .onnx.lowbit import GROUP
from .parts import is_elastic, latent_size, pipeline_parts, text_lengths
from .web import page, runtime
from .wrappers import check_model

PROFILE_RUNS = 5


def export_pipeline(pipeline: Any, output: str | os.PathLike, options: ExportOptions | None = None) -> Path:
    """Export a pipeline: lower every network of it, verify and time the result, and write a pipeline folder around the
    artefacts.

    The folder holds model_index.json, scheduler/, tokenizers, and of every component config.json and the artefacts
    (`<component>/<format>/…`); verify.json, bench.json, for ExecuTorch delegation.json, and the port contract
    ([`contract.write_contract`]). It appears at once and complete, or, if a gate fails, not at all.

    Args:
        pipeline: an [`EdgeDiTPipeline`] or [`ElasticDiTPipeline`], a pipeline folder or a Hub id.
        output: folder to write.
        options: what is asked; default: ONNX in fp32.

    Returns:
        `output`.

    Raises:
        EdgeDiTError: the pipeline cannot be loaded or is an export already, `output` is in the way, options do not fit
            the pipeline, or a gate fails (the message has the measured error and the tolerance; nothing is written).
    """
    options = ExportOptions() if options is None else options
    source = str(pipeline) if isinstance(pipeline, (str, os.PathLike)) else None
    check_output(output, [source, *options.inputs], overwrite=options.overwrite)
    output = Path(output)
    if options.format == "web":
        runtime.check_available(options.runtime_url)
    if source is not None:
        pipeline = load_pipeline(
            pipeline,
            trust_remote_code=options.trust_remote_code,
            kind=("EdgeDiTPipeline", "ElasticDiTPipeline"),
        )
    if not isinstance(pipeline.transformer, nn.Module):
        raise EdgeDiTError(
            f"The transformer is a {type(pipeline.transformer).__name__}, an export already; give the pipeline that it "
            "was made from."
        )
    if hasattr(pipeline.transformer, "_orig_mod"):  # compiled: its weights would have other names
        pipeline = with_components(pipeline, transformer=pipeline.transformer._orig_mod)
    pipeline, subnet = _with_subnet(pipeline, options.subnet)
    if options.batch is None and options.rows != DYNAMIC_BATCH and not is_guided(pipeline):
        options = replace(options, batch=1)  # an image is one row
    plain, packed = _plain(pipeline)
    check_finite(
        plain.transformer.state_dict(), "The pipeline's transformer", "nothing was written. Export a sound checkpoint."
    )
    open_size = options.resolution == "dynamic"
    if open_size and is_elastic(pipeline):
        raise EdgeDiTError(
            "The resolution is 'dynamic', but an elastic DiT cuts its tokens into strips of a fixed number; export it "
            "once a resolution."
        )
    size = latent_size(plain, options.resolution if isinstance(options.resolution, tuple) else None)
    if is_elastic(pipeline) and options.rows != DYNAMIC_BATCH:
        options = replace(options, prompts=prompts_that_fit(plain, options.prompts))
    job = Job(plain, options, subnet, None if open_size else size)
    set_schedule(plain, size)
    parts = pipeline_parts(
        plain,
        split=options.split_conditioner,
        size=_other(size, plain) if open_size else size,
        batch=job.rows,
        images=job.images,
    )
    if options.format == "web":
        # A split denoiser's module still holds what its conditioner's file does.
        weighed = [] if options.split_conditioner else [(part, job.dtype_of(part)) for part in parts]
        page.check_pipeline(plain, {job.file(p): (p.weights * BYTES[dtype], dtype) for p, dtype in weighed})
    lowering = Lowering(
        opset=options.opset,
        open_sizes=job.open_sizes,
        quantized=packed,
        backend=options.backend,
        profile_runs=PROFILE_RUNS,
        layers=plain.transformer,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        with atomic_folder(output) as folder:
            facts = {"source": source, **job.identity()}
            if options.not_run:
                job.write_unverified(folder, parts, lowering, facts)
            else:
                if packed and options.dtype in ("int8", "int4"):
                    lowering = replace(lowering, given=packed)
                job.write_verified(folder, parts, _calibrated(plain, lowering, options), pipeline, facts)
    finally:
        torch.set_num_threads(before)
    return output


def _with_subnet(pipeline: Any, subnet: str | None) -> tuple[Any, str | None]:
    """The pipeline around one stand-alone network, and the name of the sub-network it was."""
    if not is_elastic(pipeline):
        if subnet is not None:
            raise EdgeDiTError(f"subnet is {subnet!r}, but the pipeline's network is not elastic; leave it out.")
        return pipeline, None
    model = pipeline.transformer
    if model.active_subnet is None:
        if subnet is not None:
            raise EdgeDiTError(f"subnet is {subnet!r}, but the pipeline's network is a stand-alone net; leave it out.")
        return pipeline, None
    if subnet is not None and subnet not in model.subnet_names:
        raise EdgeDiTError(f"subnet is {subnet!r}; this net has {', '.join(model.subnet_names)}.")
    name = subnet or model.active_subnet
    return with_components(pipeline, transformer=model.extract_subnet(name)), name


def _plain(pipeline: Any) -> tuple[Any, dict[str, Any]]:
    """The pipeline with plain float32 weights, and the packed weights of a quantised transformer by layer."""
    packed = quantized_weights(pipeline.transformer)
    if packed:
        model = copy.deepcopy(pipeline.transformer)
        dequantize_model(model, torch.float32)
        pipeline = with_components(pipeline, transformer=model)
    check_model(pipeline.transformer)
    return pipeline, packed


def _other(size: tuple[int, int], pipeline: Any) -> tuple[int, int]:
    """A size of latents that the network was not made for: an example of it keeps the exporter from fixing the native
    positions.
    """
    patch = pipeline.transformer.config.patch_size
    return size[0] + 2 * patch, size[1] + 4 * patch


def _calibrated(pipeline: Any, lowering: Lowering, options: ExportOptions) -> Lowering:
    """The lowering with what is measured on the pipeline's own samples: activation scales, or compensated 4-bit
    weights.
    """
    if options.activations == "dynamic" and options.weights == "nearest":
        return lowering
    from ..quantization.activations import activation_scales
    from ..quantization.calibration import input_ranges, record, second_moments
    from ..quantization.gptq import gptq

    model = pipeline.transformer
    layers = [name for name in quantized_linears(model) if name not in lowering.given]
    calls = record(
        pipeline, CALIBRATION_IMAGES, seed=options.seed, prompts=list(options.prompts or verify.PROMPTS)
    ).calls
    if options.activations != "dynamic":
        # The first layer sees the sample itself, where one value (a background's) may fill half of it: its rounding
        # error would be the same everywhere.
        timesteps, ranges = input_ranges(model, calls, [name for name in layers if name != "patch_embed"])
        used = {
            name: bounds for name, bounds in ranges.items() if torch.isfinite(bounds).all()
        }  # side blocks are never called
        buckets = min(BUCKETS, len(timesteps)) if options.activations == "by-timestep" else 1
        return replace(lowering, scales=activation_scales(timesteps, used, buckets))
    given = dict(lowering.given)
    for name in layers:  # one at a time: the moments of all layers of a large network would not fit
        moments = second_moments(model, calls, [name])[name]
        given[name] = gptq(model.get_submodule(name).weight, moments, 4, GROUP, symmetric=True)
    return replace(lowering, given=given)


CALIBRATION_IMAGES = 16
BUCKETS = 8  # of timesteps, each with activation scales of its own


def prompts_that_fit(pipeline: Any, prompts: Sequence[str] | None) -> list[str]:
    """Prompts for files whose number of tokens is fixed: the given ones, or the beginnings of the usual ones that fit.

    Raises:
        EdgeDiTError: a given prompt has more tokens than the files take.
    """
    limits = [
        (pipeline.components.get(name), length)
        for name, length in zip(("tokenizer", "tokenizer_2"), text_lengths(pipeline))
    ]

    def excess(prompt: str) -> tuple[int, int] | None:
        counts = [
            (len(tokenizer(prompt, verbose=False).input_ids), length)
            for tokenizer, length in limits
            if tokenizer is not None
        ]
        return next(((count, length) for count, length in counts if count > length), None)

    for prompt in prompts or ():
        over = excess(prompt)
        if over is not None:
            raise EdgeDiTError(
                f"The prompt {prompt!r} has {over[0]} tokens, but files of a fixed batch take {over[1]}; shorten it, "
                "or leave --batch dynamic."
            )
    if prompts:
        return list(prompts)
    found = []
    for prompt in verify.PROMPTS:
        words = prompt.split()
        while len(words) > 1 and excess(" ".join(words)) is not None:
            words.pop()
        found.append(" ".join(words))
    return found
