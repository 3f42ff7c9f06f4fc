"""Reproducible sets of generated images: image i depends on (seed, i), and its caption, alone, whatever the batch
size, also where the sampler draws noise at every step.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..diffusion import draws, own_generators
from ..errors import EdgeDiTError
from ..files import file_sha256, weights_hash
from .pipeline_edgedit import EdgeDiTPipeline
from .pipeline_elastic_dit import ElasticDiTPipeline

EVALUATION_STREAM = 1  # keeps the noise of evaluation apart from that of training


@contextmanager
def quiet_call(pipeline: Any) -> Iterator[None]:
    """A call of a pipeline without its progress bar, which is shown as before afterwards; what the pipeline refuses is
    an [`EdgeDiTError`].
    """
    shown = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**shown, "disable": True})
    try:
        yield
    except EdgeDiTError:
        raise
    except ValueError as error:
        raise EdgeDiTError(str(error)) from error
    finally:
        pipeline.set_progress_bar_config(**shown)


def sampling_of(pipeline: Any, steps: int, guidance_scale: float) -> dict[str, Any]:
    """How a set of images is sampled, as arguments of the functions below: as asked, but with a few-step pipeline as it
    was distilled.
    """
    own = pipeline.config
    if own.few_step_timesteps is not None:
        steps, guidance_scale = own.default_steps, own.default_guidance_scale
    return {"steps": steps, "guidance_scale": guidance_scale}


def sampling_stamp(
    pipeline: Any, *, seed: int, steps: int, guidance_scale: float | None, precision: str = "no"
) -> dict[str, Any]:
    """The parts of a [`stamp.Stamp`] that say how a pipeline made images: seed, scheduler, steps, guidance, type of the
    denoiser's numbers, autoencoder.

    Args:
        precision: mixed precision, as accelerate names it.
    """
    net = denoiser_of(pipeline)
    eager = isinstance(net, torch.nn.Module)
    vae = getattr(pipeline, "vae", None)
    exact = str(net.dtype).removeprefix("torch.") if eager else net.config.precision
    return {
        "seed": seed,
        "scheduler": type(pipeline.scheduler).__name__,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "dtype": exact if precision == "no" or not eager else precision,
        "vae": None if vae is None else type(vae).__name__,
        "vae_hash": None if vae is None else component_hash(vae),
    }


def denoiser_of(pipeline: Any) -> Any:
    """A pipeline's denoiser: its transformer or U-Net."""
    components = pipeline.components
    found = components.get("transformer") or components.get("unet")
    if found is None:
        raise EdgeDiTError(
            f"The {type(pipeline).__name__} has neither a transformer nor a unet, but {', '.join(components)}; give a "
            "pipeline of one denoiser."
        )
    return found


def component_hash(component: Any) -> str:
    """First 16 hex digits of the SHA-256 of a component's weights; of an exported one, of its files."""
    if isinstance(component, torch.nn.Module):
        return weights_hash(component.state_dict())
    found = "".join(file_sha256(session.path) for session in component.sessions.values())
    return hashlib.sha256(found.encode()).hexdigest()[:16]


@torch.no_grad()
def generate(
    pipeline: EdgeDiTPipeline,
    num_images: int,
    *,
    first: int = 0,
    seed: int = 0,
    steps: int = 20,
    guidance_scale: float = 1.5,
    batch_size: int = 250,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Generate images with balanced classes (image i has class i mod num_classes).

    Args:
        pipeline: any [`EdgeDiTPipeline`], torch or ONNX Runtime underneath.
        num_images: how many. first: number of the first of them; a large set can be made in pieces.
        steps, guidance_scale: as the pipeline's call.
        batch_size: images at a time.

    Returns:
        images `(num_images, C, H, W)` float32 in [-1, 1], and their labels `(num_images,)` (None if unconditional).
    """
    config = pipeline.transformer.config
    size = config["sample_size"]
    shape = (config["in_channels"], size, size)
    classes = config["num_classes"]
    labels = torch.arange(first, first + num_images) % classes if classes else None
    images = []
    for start in range(first, first + num_images, batch_size):
        rows = range(start, min(start + batch_size, first + num_images))
        latents = draws(seed, 0, rows, shape, stream=EVALUATION_STREAM).noise
        asked = (
            {"batch_size": len(rows)}
            if labels is None
            else {"class_labels": labels[rows.start - first : rows.stop - first]}
        )
        asked |= {"latents": latents, "generator": own_generators(seed, rows, stream=EVALUATION_STREAM)}
        with quiet_call(pipeline):
            batch = pipeline(**asked, num_inference_steps=steps, guidance_scale=guidance_scale, output_type="pt").images
        images.append(batch.float().cpu() * 2 - 1)
    return torch.cat(images), labels


@torch.no_grad()
def generate_from_captions(
    pipeline: ElasticDiTPipeline,
    captions: Sequence[str],
    *,
    first: int = 0,
    subnet: str | None = None,
    seed: int = 0,
    steps: int = 20,
    guidance_scale: float = 2.0,
    batch_size: int = 250,
) -> torch.Tensor:
    """An image of every caption, `(len(captions), C, H, W)` float32 in [-1, 1]; a sub-network's and another's start
    from the same noise.

    Args:
        pipeline: text to image. subnet: as its call. steps, guidance_scale: as its call.
        first: number of the first image; a large set can be made in pieces.
        batch_size: images at a time.
    """
    config = pipeline.transformer.config
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    images = []
    for start in range(0, len(captions), batch_size):
        prompts = list(captions[start : start + batch_size])
        rows = range(first + start, first + start + len(prompts))
        latents = draws(seed, 0, rows, shape, stream=EVALUATION_STREAM).noise
        asked = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "subnet": subnet}
        asked |= {"latents": latents, "generator": own_generators(seed, rows, stream=EVALUATION_STREAM)}
        with quiet_call(pipeline):
            batch = pipeline(prompts, output_type="pt", **asked).images
        images.append(batch.float().cpu() * 2 - 1)
    return torch.cat(images)


# -------------------------------------------------------------------- pipelines of any kind


def call_defaults(pipeline: Any) -> dict[str, Any]:
    """How a pipeline samples unless it is told otherwise: `steps`, `guidance_scale` (`None`: it takes none), and
    `conditioned_by`, its call's argument ("class_labels", "prompt" or `None`).
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    defaults = [
        parameters[name].default if name in parameters else None for name in ("num_inference_steps", "guidance_scale")
    ]
    if type(pipeline).__name__ in ("EdgeDiTPipeline", "ElasticDiTPipeline"):
        defaults = [pipeline.config.default_steps, pipeline.config.default_guidance_scale]
    conditioned_by = next((name for name in ("class_labels", "prompt") if name in parameters), None)
    return {"steps": defaults[0], "guidance_scale": defaults[1], "conditioned_by": conditioned_by}


def generate_rows(
    pipeline: Any,
    rows: range,
    *,
    prompts: Sequence[str] | None = None,
    subnet: str | None = None,
    seed: int,
    steps: int,
    guidance_scale: float | None,
    batch_size: int,
) -> torch.Tensor:
    """The images of these numbers by any pipeline of diffusers, `(n, C, H, W)` float32 in [-1, 1]: [`generate`] and
    [`generate_from_captions`] of ours, the same of others, whose noise comes from a generator an image.

    Args:
        prompts: of text to image, one an image; image i of a class-conditional pipeline has class i mod their number.
        subnet: of an elastic pipeline. steps, guidance_scale: as the pipeline's call.
        batch_size: images at a time.
    """
    asked: dict[str, Any] = {"seed": seed, "steps": steps, "guidance_scale": guidance_scale, "batch_size": batch_size}
    kind = type(pipeline).__name__
    if kind == "EdgeDiTPipeline":
        return generate(pipeline, len(rows), first=rows.start, **asked)[0]
    if kind == "ElasticDiTPipeline":
        return generate_from_captions(pipeline, prompts or [], first=rows.start, subnet=subnet, **asked)
    conditioned_by, images = call_defaults(pipeline)["conditioned_by"], []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        call: dict[str, Any] = {"generator": own_generators(seed, part, stream=EVALUATION_STREAM), "output_type": "np"}
        if conditioned_by == "class_labels":
            classes = denoiser_of(pipeline).config.num_embeds_ada_norm
            call["class_labels"] = [row % classes for row in part]
        elif conditioned_by == "prompt":
            call["prompt"] = list((prompts or [])[start : start + batch_size])
        else:
            call["batch_size"] = len(part)
        if guidance_scale is not None:
            call["guidance_scale"] = guidance_scale
        try:
            with quiet_call(pipeline):
                made = pipeline(**call, num_inference_steps=steps).images  # [n, H, W, C] in [0, 1]
        except EdgeDiTError:
            raise
        except Exception as error:  # every pipeline has its own
            said = " ".join(f"{type(error).__name__} {error}".split())[:300]
            raise EdgeDiTError(f"The {kind} makes no images with {steps} steps and these inputs: {said}") from error
        images.append(torch.from_numpy(made).permute(0, 3, 1, 2).float() * 2 - 1)
    return torch.cat(images)
