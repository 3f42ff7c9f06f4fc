"""What a run of quantisation works with: the pipeline, prompts and their embeddings, how it samples, what judges it,
and what it will cost.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.loading import load_run_captions
from ..data.text_table import TextTable, text_table
from ..errors import EdgeDiTError
from ..files import read_prompt_lines
from ..models.stored_weights import check_weights
from ..pipelines.loading import KINDS, load_pipeline, source_path
from ..run.config import RunConfig
from ..run.sections import QuantizeConfig
from ..run.stage import FEW_STEP
from .allocation import candidate_specs
from .calibration import CHECK_STREAM, output_error, record, replay
from .layers import quantizable_layers, quantized_weights


def load_source(config: RunConfig) -> Any:
    """The pipeline to quantise, or its sub-network `quantize.subnet`.

    Raises:
        EdgeDiTError: there is none, it is quantised already, or it has no such sub-network.
    """
    options = config.quantize
    few = options.path is None and FEW_STEP.needed(config)  # the run ships it
    path = config.folder(FEW_STEP.folder) if few else source_path(config, "quantize.path", "quantise")
    pipeline = load_pipeline(path, FEW_STEP.made_by if few else None, kind=KINDS)
    packed = quantized_weights(pipeline.transformer)
    if packed:
        raise EdgeDiTError(
            f"{path} is quantised already ({len(packed)} layers); give the pipeline that it was made from."
        )
    check_weights(pipeline.transformer, f"The pipeline {path}")
    if options.subnet is not None:
        try:
            pipeline.register_modules(transformer=pipeline.transformer.extract_subnet(options.subnet).eval())
        except (AttributeError, ValueError) as error:
            raise EdgeDiTError(
                f"quantize.subnet is {options.subnet!r}, but {path} has no such sub-network: {error}"
            ) from error
    return pipeline


def widths_of(pipeline: Any) -> list[str | None]:
    """The sub-networks of a supernet, the full net last; `[None]` for any other network."""
    return list(getattr(pipeline.transformer, "subnet_names", [])) or [None]


def load_prompts(config: RunConfig, pipeline: Any) -> list[str] | None:
    """Prompts of text to image, each once: of `quantize.prompts`, or the captions of the data. `None` for a
    class-conditional pipeline.
    """
    if "text_dims" not in pipeline.transformer.config:
        return None
    path = config.quantize.prompts
    if path is None:
        return list(dict.fromkeys(load_run_captions(config).captions))
    return list(dict.fromkeys(line for _, line in read_prompt_lines(path, "quantize.prompts")))


def load_texts(config: RunConfig, pipeline: Any, prompts: Sequence[str] | None, accelerator: Any) -> TextTable | None:
    """What the pipeline's text encoders make of the prompts. The main process writes the cache."""
    if prompts is None:
        return None
    folder = config.folder("text-embeddings", "quantize")
    if accelerator.is_main_process:
        text_table(pipeline.to(accelerator.device), prompts, folder)
        pipeline.to("cpu")
    accelerator.wait_for_everyone()
    return TextTable(folder, prompts)


def sampling_options(config: RunConfig, prompts: Sequence[str] | None) -> dict[str, Any]:
    """How every image of a run is sampled: arguments of [`calibration.record`]."""
    options = config.quantize
    sampling = {
        "steps": options.sampling_steps,
        "guidance_scale": options.guidance_scale,
        "batch_size": options.sampling_batch_size,
    }
    return {**sampling, "seed": config.seed, "prompts": prompts}


def tuning_options(config: RunConfig, pipeline: Any) -> dict[str, Any]:
    """How self-distillation noises and conditions: arguments of [`self_distillation.micro_batch`]. A few-step pipeline
    is tuned at the timesteps that it samples with and, while it samples without guidance, with its condition.
    """
    options, own = config.quantize, pipeline.config
    if own.few_step_timesteps is None:
        return {"dropout": options.dropout}
    timesteps = pipeline._few_step_timesteps(options.sampling_steps or own.default_steps)
    guided = options.guidance_scale is not None and options.guidance_scale > 1
    return {"dropout": options.dropout if guided else 0.0, "timesteps": timesteps}


def transformer_bytes(folder: Path) -> int:
    """Bytes of the transformer's weight files in a pipeline folder."""
    return sum(path.stat().st_size for path in (folder / "transformer").glob("*.safetensors"))


class Judge:
    """The error of a network's output at every timestep of the sampling loop, a width each, on noise that nothing was
    fitted to.

    Args:
        pipeline: with the reference network, whose loop is recorded.
        images: how many. sampling: further arguments of [`calibration.record`].
    """

    def __init__(self, pipeline: Any, images: int, **sampling: Any) -> None:
        self.calls = {
            width: record(pipeline, images, stream=CHECK_STREAM, subnet=width, **sampling).calls
            for width in widths_of(pipeline)
        }
        self.references = {
            width: [replay(pipeline.transformer, call) for call in calls] for width, calls in self.calls.items()
        }

    def __call__(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """[`OutputError.to_dict`] by width (`full` for a network that has one)."""
        return {
            width or "full": output_error(model, calls, self.references[width]).to_dict()
            for width, calls in self.calls.items()
        }


def count_forms(model: nn.Module, options: QuantizeConfig) -> int:
    """Forms that are tried, over all layers of a network; its weights may be on the meta device."""
    return sum(
        spec is not None
        for layer in quantizable_layers(model).values()
        for spec in candidate_specs(layer.weight.shape, options.scheme, options.rows_per_palette)
    )


def images_through(options: QuantizeConfig, forms: int, widths: int, steps: int, guided: int) -> dict[str, int]:
    """How often an image goes through the network, by part of the work.

    Args:
        forms: of [`count_forms`]. widths: sub-networks. steps: of sampling. guided: 2 with guidance, else 1.
    """
    # Two recordings are replayed about three times: moments twice, judging before and after.
    sampled = (5 * widths * options.calibration_images + bool(options.steps) * options.samples) * steps * guided
    return {
        "calibrate, judge": sampled,
        "errors of layers": forms * widths * options.sensitivity_images * min(options.timesteps, steps) * guided,
        "self-distillation": 4 * options.steps * options.batch_size,
    }


def print_quantization_estimate(config: RunConfig) -> None:
    """Print what a run will take on this machine: forwards, counted, times the seconds of one, measured."""
    options, pipeline = config.quantize, load_source(config)
    model, widths, prompts = pipeline.transformer.eval(), widths_of(pipeline), load_prompts(config, pipeline)
    layers = quantizable_layers(model)
    if config.threads:
        torch.set_num_threads(config.threads)
    images = options.sampling_batch_size
    call = record(pipeline, min(images, 8), **{**sampling_options(config, prompts), "steps": 1}).calls[0]
    started = time.monotonic()
    replay(model, call)
    row_seconds = (time.monotonic() - started) / len(call.inputs["hidden_states"])
    steps, guided = (
        options.sampling_steps or pipeline.config.default_steps,
        len(call.inputs["hidden_states"]) // min(images, 8),
    )
    forms = count_forms(model, options)
    rows = images_through(options, forms, len(widths), steps, guided)
    weights, total = (
        sum(layer.weight.numel() for layer in layers.values()),
        sum(parameter.numel() for parameter in model.parameters()),
    )
    for name, count in rows.items():
        print(f"{name:<20} {count:>12,} images through the network, about {count * row_seconds / 60:>8.1f} min")
    size = (weights * options.budget_bits / 8 + 4 * (total - weights)) / 1e9
    print(
        f"result: about {size:.4f} GB for {total / 1e6:.1f} M parameters; memory: {8 * total / 1e9:.2f} GB for two "
        "networks in fp32, and their activations"
    )
    print(
        f"{len(layers)} layers in {forms} forms; {1e3 * row_seconds:.1f} ms an image and forward, measured just now "
        f"with {torch.get_num_threads()} threads"
    )
