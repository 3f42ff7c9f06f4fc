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

import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..errors import EdgeDiTError
from ..files import atomic_folder, atomic_write_json, hash_json, sweep, weights_hash
from ..pipelines.loading import check_vae_takes
from ..records import LatentIndex
from ..run.lock import FolderLock
from ..schema import read_record
from .datasets import IN_MEMORY_BYTES, ImageDataset, MapDataset


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


LATENT_FORMAT = 1


SHARD_BATCHES = 32  # batches of latents in a file: what a killed `cache_latents` loses at most


class LatentDataset(MapDataset):
    """The latents that [`cache_latents`] wrote, with the interface of [`ImageDataset`]: "images" are latents, float32.

    Attributes:
        fingerprint: of the images' fingerprint and the VAE's hash.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.shape = tuple(index["shape"])
        self.label_names = list(index["label_names"])
        self.fingerprint = hash_json([index["dataset"], index["vae"]])
        self._shard_rows = index["shard_rows"]
        shards = range(_num_shards(index))
        # Counted from the folders that are there, not from the number that the index claims.
        there = {path.parent.name for path in self.folder.glob("shard-*/latents.safetensors")}
        missing = len(shards) - len(there)
        if missing > 0 or any(_shard_file(self.folder, shard).parent.name not in there for shard in shards):
            raise EdgeDiTError(
                f"The latent cache {str(self.folder)!r} is unfinished: {max(missing, 1)} of {len(shards)} parts are "
                "missing. Run cache_latents again, it continues."
            )
        self._files: dict[int, safe_open] = {}
        for shard in shards:
            self._check(shard, min(self._shard_rows, index["count"] - shard * self._shard_rows))
        self.labels = torch.cat([self._file(shard).get_tensor("labels") for shard in shards])
        if len(self.labels) != index["count"]:
            raise EdgeDiTError(
                f"The latent cache {str(self.folder)!r} holds {len(self.labels)} latents, but its index says "
                f"{index['count']}; delete the folder and make it anew."
            )

    def _file(self, shard: int) -> safe_open:
        if shard not in self._files:
            path = _shard_file(self.folder, shard)
            try:
                self._files[shard] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise EdgeDiTError(
                    f"{path} is damaged ({error}); delete {str(path.parent)!r} and run cache_latents again, it makes "
                    "that part anew."
                ) from error
        return self._files[shard]

    def _check(self, shard: int, rows: int) -> None:
        """Raise unless a part holds as many latents and labels, of the shape, as the index says."""
        file, path, wanted = (
            self._file(shard),
            _shard_file(self.folder, shard),
            {"latents": [rows, *self.shape], "labels": [rows]},
        )
        found = {name: file.get_slice(name).get_shape() if name in file.keys() else None for name in wanted}
        if found != wanted:
            raise EdgeDiTError(
                f"{path} is damaged: it holds {found}, its index says {wanted}; delete {str(path.parent)!r} and run "
                "cache_latents again."
            )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}  # open files do not travel to data-loading processes

    @functools.cached_property
    def _memory(self) -> torch.Tensor | None:
        if 4 * len(self) * int(np.prod(self.shape)) > IN_MEMORY_BYTES:
            return None
        shards = range(-(-len(self) // self._shard_rows))
        return torch.cat([self._file(shard).get_tensor("latents") for shard in shards])

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """`{"images": [n, c, h, w] float32 latents, "labels": [n] int64}` at these positions."""
        rows = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        labels = self.labels[rows]
        if self._memory is not None:
            return {"images": self._memory[rows], "labels": labels}
        places = [divmod(index % len(self), self._shard_rows) for index in rows.tolist()]
        latents = [self._file(shard).get_slice("latents")[row : row + 1] for shard, row in places]
        return {"images": torch.cat(latents), "labels": labels}


def open_latents(folder: str | os.PathLike) -> LatentDataset:
    """Open what [`cache_latents`] has finished; an unfinished, damaged or foreign folder raises [`EdgeDiTError`]."""
    return LatentDataset(folder)


def _read_index(folder: Path) -> dict:
    index = read_record(folder / "index.json", LatentIndex, "cache_latents", "a latent cache")
    if index["format"] != LATENT_FORMAT:
        raise EdgeDiTError(
            f"{folder / 'index.json'} does not describe a latent cache of format {LATENT_FORMAT}, but of "
            f"{index['format']}; choose another folder."
        )
    return index


def _num_shards(index: dict) -> int:
    return -(-index["count"] // index["shard_rows"])


def _shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}" / "latents.safetensors"


@torch.inference_mode()
def _encode(vae: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """[`latents.encode`] on the host in float32, `[n, c, h, w]`."""
    latents = encode(vae, images).float().cpu().contiguous()
    size, latent_size = tuple(images.shape[-2:]), tuple(latents.shape[-2:])
    factor = size[0] // latent_size[0]
    if size != (factor * latent_size[0], factor * latent_size[1]) or factor & (factor - 1):
        raise EdgeDiTError(
            f"The VAE turns images of {size} into latents of {latent_size}, which it cannot turn back into that size; "
            "set resolution to a multiple of its downsampling factor."
        )
    if not torch.isfinite(latents).all():
        raise EdgeDiTError(f"The VAE ({vae.dtype}) gives latents that are NaN or infinite; use it in float32.")
    return latents


def cache_latents(
    dataset: ImageDataset, vae: torch.nn.Module, folder: str | os.PathLike, batch_size: int = 16, progress: bool = True
) -> LatentDataset:
    """Encode every image once and keep the latents in `folder` (safetensors parts and `index.json`).

    Killed at any moment and called again with the same arguments, it continues with the first missing part; a finished
    cache is only opened. One process writes a folder.

    Args:
        dataset: images `[C, H, W]` with the VAE's number of channels.
        vae: an autoencoder that [`loading.load_vae`] knows, on the device and in the precision to encode with.
        folder: of the cache; one of other images or of another VAE is an error.
        batch_size: images encoded at a time.
        progress: show a progress bar on a terminal.
    """
    folder = Path(folder)
    check_vae_takes(dataset.shape, vae.config)
    factors = [vae.config.get("scaling_factor"), vae.config.get("shift_factor")]
    if latent_scale(vae.config).mean is not None:
        factors += [vae.config["latents_mean"], vae.config["latents_std"]]
    made_from = {
        "dataset": dataset.fingerprint,
        "vae": hash_json([type(vae).__name__, weights_hash(vae.state_dict()), factors]),
    }
    if (folder / "index.json").exists():
        index = _read_index(folder)
        for name, value in made_from.items():
            if index[name] != value:
                raise EdgeDiTError(
                    f"The latent cache {str(folder)!r} was made from the {name} {index[name]}, but this run has the "
                    f"{name} {value}; choose another folder or delete this one."
                )
        if index["count"] != len(dataset):
            raise EdgeDiTError(
                f"The latent cache {str(folder)!r} is of {index['count']} images, but there are {len(dataset)}; delete "
                "the folder."
            )
    else:
        shape = _encode(vae, dataset.batch([0])["images"]).shape[1:]
        index = {
            "format": LATENT_FORMAT,
            **made_from,
            "count": len(dataset),
            "shape": list(shape),
            "shard_rows": batch_size * SHARD_BATCHES,
            "label_names": dataset.label_names,
        }
        atomic_write_json(folder / "index.json", index)
    if all(_shard_file(folder, shard).is_file() for shard in range(_num_shards(index))):
        return LatentDataset(folder)
    rows = index["shard_rows"]
    with (
        FolderLock(folder),
        tqdm(total=len(dataset), desc="Encoding latents", unit="image", disable=None if progress else True) as bar,
    ):
        sweep(folder)
        for shard in range(_num_shards(index)):
            positions = np.arange(shard * rows, min((shard + 1) * rows, len(dataset)))
            if not _shard_file(folder, shard).is_file():
                parts = []
                for start in range(0, len(positions), batch_size):
                    parts.append(_encode(vae, dataset.batch(positions[start : start + batch_size])["images"]))
                    bar.update(len(parts[-1]))
                with atomic_folder(folder / f"shard-{shard:05d}") as aside:
                    content = {"latents": torch.cat(parts), "labels": dataset.labels[positions].contiguous()}
                    save_file(content, aside / "latents.safetensors")
            else:
                bar.update(len(positions))
    return LatentDataset(folder)
