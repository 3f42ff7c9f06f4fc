"""The data of a run: images or captions as its recipe names them, and their cached latents."""

from __future__ import annotations

from typing import Any

import torch

from ..pipelines.loading import TEXT_TO_IMAGE_VAES, load_vae
from ..run.config import RunConfig
from .captions import CaptionedDataset, cache_captioned_latents, load_captioned, open_captioned_latents
from .datasets import ImageDataset
from .images import load_images
from .latents import LatentDataset, cache_latents, open_latents


def reading_options(config: RunConfig) -> dict[str, Any]:
    """How the run's images are read, with captions or without: arguments of [`images.load_images`] and
    [`captions.load_captioned`].
    """
    data = config.data
    return {
        "source": data.source,
        "resolution": data.resolution,
        "channels": data.channels,
        "image_column": data.image_column,
        "validation_fraction": data.validation_fraction,
        "seed": config.seed,
        "data_split": data.split,
        "background": data.background,
    }


def load_run_images(config: RunConfig, split: str = "train") -> ImageDataset:
    """The run's images."""
    return load_images(split=split, label_column=config.data.label_column, **reading_options(config))


def load_training_set(
    config: RunConfig, accelerator: Any
) -> tuple[ImageDataset | LatentDataset, torch.nn.Module | None]:
    """What the denoiser is trained on (images, or cached latents) and the VAE, if any. The main process writes the
    cache.
    """
    images = load_run_images(config)
    if config.data.vae is None:
        return images, None
    vae = load_vae(config.data.vae)
    folder = config.folder("latents")
    if accelerator.is_main_process:
        cache_latents(images, vae.to(accelerator.device), folder)
    accelerator.wait_for_everyone()
    return open_latents(folder), vae.cpu()


def load_run_captions(config: RunConfig, split: str = "train") -> CaptionedDataset:
    """The run's captioned images; `split` as of [`captions.load_captioned`]."""
    data = config.data
    return load_captioned(
        split=split, caption_column=data.caption_column, buckets=data.buckets or (), **reading_options(config)
    )


def load_captioned_set(
    config: RunConfig, accelerator: Any, split: str = "train"
) -> tuple[CaptionedDataset, torch.nn.Module | None]:
    """Captioned images, or their cached latents, and the VAE, if any. The main process writes the cache."""
    images = load_run_captions(config, split)
    if config.data.vae is None:
        return images, None
    vae = load_vae(config.data.vae, kinds=TEXT_TO_IMAGE_VAES)
    folder = config.folder("captioned-latents", split)
    if accelerator.is_main_process:
        cache_captioned_latents(images, vae.to(accelerator.device), folder)
    accelerator.wait_for_everyone()
    return open_captioned_latents(images, folder), vae.cpu()
