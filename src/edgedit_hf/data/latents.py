"""Latents as a denoiser sees them and as a VAE gives and takes them: one pair of functions for every VAE class.

    x = (z - shift) · scaling                    z = x / scaling + shift
    x = (z - mean) · scaling / std               z = x · std / scaling + mean        with latents_mean and latents_std
    in the config

z are the VAE's own latents, x those of the denoiser, as pipelines of diffusers have them (SDXL's, Qwen-Image's). The
pipeline files repeat the right column, because they must stand alone, and `contract.json` holds its numbers; tests hold
all of them together.

Shapes: B images, C channels of the latents, H × W their size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..errors import EdgeDiTError


class LatentScale(NamedTuple):
    """How a VAE's latents are scaled; `mean` and `std`, one number a channel, take the place of `shift`."""

    scaling: float
    shift: float
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def latent_scale(config: Mapping[str, Any]) -> LatentScale:
    """The scale in the config of a VAE of diffusers.

    Raises:
        EdgeDiTError: the numbers cannot be divided by, or there is not one mean a standard deviation.
    """
    scaling, shift = float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0)
    mean, std = (
        None if config.get(name) is None else tuple(map(float, config[name]))
        for name in ("latents_mean", "latents_std")
    )
    if mean is None or std is None:
        mean = std = None  # as diffusers: both, or none
    elif (
        len(mean) != len(std)
        or not all(map(math.isfinite, mean))
        or not all(math.isfinite(value) and value > 0 for value in std)
    ):
        raise EdgeDiTError(
            f"The VAE's config has the latents_mean {list(mean)} and the latents_std {list(std)}; it needs a number "
            "and a positive one a channel."
        )
    if not math.isfinite(scaling) or not math.isfinite(shift):
        raise EdgeDiTError(
            f"The VAE's config has the scaling_factor {scaling} and the shift_factor {shift}; both must be finite."
        )
    return LatentScale(scaling, shift if mean is None else 0.0, mean, std)


def _factors(config: Mapping[str, Any], latents: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """(shift, scale) of x = (z - shift) · scale."""
    scaling, shift, mean, std = latent_scale(config)
    if mean is None:
        return shift, scaling
    if len(mean) != latents.shape[1]:
        raise EdgeDiTError(
            f"The VAE's config has {len(mean)} latents_mean and latents_std, but its latents have {latents.shape[1]} "
            "channels; correct them."
        )
    by_channel = [
        torch.tensor(values, device=latents.device).view(1, -1, *[1] * (latents.ndim - 2)) for values in (mean, std)
    ]
    return by_channel[0], scaling / by_channel[1]


def scaled(latents: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """z → x, `(B, C, …)`."""
    shift, scale = _factors(config, latents)
    return (latents - shift) * scale


def unscaled(latents: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """x → z, `(B, C, …)`."""
    shift, scale = _factors(config, latents)
    return latents / scale + shift


def decoder_numbers(config: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """(multiply, add) of z = x · multiply + add: one number, or one a channel."""
    scaling, shift, mean, std = latent_scale(config)
    return ([1.0 / scaling], [shift]) if mean is None else ([value / scaling for value in std], list(mean))


def is_video(config: Mapping[str, Any]) -> bool:
    """Whether a VAE has a time axis, such as Qwen-Image's: an image is a video of one frame."""
    return "temperal_downsample" in config


def vae_encode(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """Images → z `(B, C, H, W)`, the mode of the posterior where there is one."""
    video = is_video(vae.config)
    encoded = vae.encode(images.unsqueeze(2) if video else images, return_dict=False)[0]
    latents = encoded if torch.is_tensor(encoded) else encoded.mode()
    return latents[:, :, 0] if video else latents


def vae_decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """z `(B, C, H, W)` → images about [-1, 1]."""
    if is_video(vae.config):
        return vae.decode(latents.unsqueeze(2), return_dict=False)[0][:, :, 0]
    return vae.decode(latents, return_dict=False)[0]


def encode(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] → x `(B, C, H, W)`, what a denoiser is trained on, where the VAE is and in its precision."""
    return scaled(vae_encode(vae, images.to(vae.device, vae.dtype)), vae.config)


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """x `(B, C, H, W)` → images about [-1, 1] float32, as the pipelines decode what a denoiser has made."""
    return vae_decode(vae, unscaled(latents.to(vae.device), vae.config).to(vae.dtype)).float()
