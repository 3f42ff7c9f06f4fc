"""Reproducible sets of generated images: image i depends on (seed, i), and its caption, alone, whatever the batch
size, also where the sampler draws noise at every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..diffusion import draws, own_generators
from ..errors import EdgeDiTError
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
        batch_size: images at a time.
    """
    config = pipeline.transformer.config
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    images = []
    for start in range(0, len(captions), batch_size):
        rows = range(start, min(start + batch_size, len(captions)))
        latents = draws(seed, 0, rows, shape, stream=EVALUATION_STREAM).noise
        prompts = [captions[row] for row in rows]
        asked = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "subnet": subnet}
        asked |= {"latents": latents, "generator": own_generators(seed, rows, stream=EVALUATION_STREAM)}
        with quiet_call(pipeline):
            batch = pipeline(prompts, output_type="pt", **asked).images
        images.append(batch.float().cpu() * 2 - 1)
    return torch.cat(images)
