"""Scoring a set of images of any origin: what is scored, what it is compared with, features in chunks on the disk, and
the figures that follow from them.

A chunk is a fixed range of image numbers; it is stored whole or not at all, and figures are computed from the chunks in
their order. So how many processes made them, and how often one was killed, changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .. import hub
from ..data.datasets import ImageDataset, to_bytes
from ..data.images import check_images, load_images
from ..errors import EdgeDiTError
from ..files import aside_of, explain_write_errors, file_sha256, fsync_path
from ..pipelines.loading import load_pipeline
from ..pipelines.sampling import call_defaults, denoiser_of, generate_rows, sampling_stamp
from ..run.results import pipeline_weights_hash
from ..schema import key
from .clip import ClipScorer
from .distances import (
    RunningMoments,
    adm_precision_recall,
    frechet_distance_from_moments,
    frechet_standard_error,
    inception_score,
    kernel_distance,
    precision_recall,
)
from .extractors import Extractor
from .extractors import check_images as check_finite
from .npz import Gaussian, read_npz

NEIGHBOURS = 3
REFERENCE_IMAGES = 50_000  # more add nothing to the precision of a distance
SUBSET = 1000  # images of a subset of the kernel distance, as torchmetrics and torch-fidelity take


# ------------------------------------------------------------------ what is scored


class Generated:
    """Images that a pipeline makes: of ours, of diffusers, or an export.

    Args:
        path: folder or name on the Hub, see [`hub`].
        prompts: of text to image; image i is of prompt i mod their number.
        steps, guidance_scale: default the pipeline's own.
        options: `subnet` of an elastic pipeline, `batch_size`.
    """

    def __init__(
        self,
        path: str,
        prompts: Sequence[str] | None,
        *,
        seed: int,
        steps: int | None,
        guidance_scale: float | None,
        batch_size: int,
        subnet: str | None = None,
    ) -> None:
        self.pipeline = load_pipeline(path, kind=None)
        self.prompts, self.seed, self.batch_size, self.subnet = prompts, seed, batch_size, subnet
        own = call_defaults(self.pipeline)
        self.steps = own["steps"] if steps is None else steps
        self.guidance_scale = own["guidance_scale"] if guidance_scale is None else guidance_scale
        kind, takes_prompts = type(self.pipeline).__name__, own["conditioned_by"] == "prompt"
        names = getattr(denoiser_of(self.pipeline), "subnet_names", ())
        if subnet is not None and subnet not in names:
            there = ", ".join(names) or "no sub-networks; leave --subnet out"
            raise EdgeDiTError(f"--subnet is {subnet!r}, but {path} has {there}.")
        if takes_prompts and not prompts:
            raise EdgeDiTError(f"{path} makes images of prompts; give a file of them (--prompts).")
        if prompts and not takes_prompts:
            raise EdgeDiTError(f"{path} is a {kind}, which takes no prompts; leave --prompts out.")
        self.fingerprint = str(pipeline_weights_hash(path, described=True))

    def to(self, device: torch.device) -> None:
        """Run it there, if it runs in PyTorch."""
        if isinstance(denoiser_of(self.pipeline), torch.nn.Module):
            self.pipeline.to(device)

    def images(self, rows: range) -> torch.Tensor:
        """Images `[n, C, H, W]` float32 in [-1, 1]; image i depends on the seed, i and its class or prompt alone."""
        return generate_rows(
            self.pipeline,
            rows,
            prompts=None if self.prompts is None else [self.prompts[row % len(self.prompts)] for row in rows],
            subnet=self.subnet,
            seed=self.seed,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            batch_size=self.batch_size,
        )

    def stamp(self, precision: str) -> dict[str, Any]:
        """Its parts of a [`stamp.Stamp`]."""
        sampled: dict[str, Any] = {"seed": self.seed, "steps": self.steps, "guidance_scale": self.guidance_scale}
        return sampling_stamp(self.pipeline, **sampled, precision=precision)


class Given:
    """Images that are there: of a folder, or `arr_0` of an `.npz` file."""

    def __init__(self, images: ImageDataset) -> None:
        self._images = images
        self.fingerprint = images.fingerprint

    def __len__(self) -> int:
        return len(self._images)

    def images(self, rows: range) -> torch.Tensor:
        """Images `[n, C, H, W]` float32 in [-1, 1]."""
        return self._images.batch(rows)["images"]

    def stamp(self, precision: str) -> dict[str, Any]:
        """Nothing is known of how they were made."""
        return {}


def open_images(source: str, resolution: int | None) -> ImageDataset:
    """All images of a folder or `datasets` id, each looked at: one that is damaged is named now.

    Args:
        resolution: side that they are cropped and resized to; default as they are.
    """
    images = load_images(source, label_column="", resolution=resolution, validation_fraction=0.0)
    check_images(images)
    return images


def channels_of(extractor: Extractor) -> int | None:
    """Channels of the images that an extractor takes; `None`: it takes grey and coloured ones."""
    return getattr(extractor, "shape", (None,))[0]


def is_pipeline(source: str) -> bool:
    """Whether what is to be scored is a pipeline: a folder that describes one, or a name on the Hub."""
    return Path(source, "model_index.json").is_file() or hub.is_name(source)


def check_fits(what: str, images: ImageDataset, extractor: Extractor, least: int) -> None:
    """Raise unless these images are `least` or more, and of the shape that an extractor of one shape takes."""
    if len(images) < least:
        raise EdgeDiTError(f"{what} has {len(images)} images; a covariance needs at least {least}.")
    taken, found = getattr(extractor, "shape", None), tuple(images.batch(range(1))["images"].shape[1:])
    if taken is not None and found != tuple(taken):
        raise EdgeDiTError(
            f"The images of {what} have the shape {found}, but the extractor {extractor.name} takes {tuple(taken)}; "
            "give images of that size (--resolution) and as many channels, or another extractor."
        )


# ------------------------------------------------------------------ what it is compared with


@dataclass
class Reference:
    """What images are compared with.

    Args:
        sha256: of the `.npz` file, or of all images as they are stored.
        images: whose features are to be computed; `None`: there are statistics alone.
        pooled, spatial: statistics that are given.
    """

    sha256: str
    images: ImageDataset | None = None
    pooled: Gaussian | None = None
    spatial: Gaussian | None = None

    @property
    def count(self) -> int | None:
        """Images that the statistics are of; `None`: they do not say."""
        return None if self.pooled is not None or self.images is None else len(self.images)


def open_reference(source: str, extractor: Extractor, resolution: int | None = None) -> Reference:
    """A reference: ADM's `.npz`, a folder of images, or a `datasets` id.

    Statistics in an `.npz` are of ADM's Inception; with another extractor its images are used, if it has some.

    Raises:
        EdgeDiTError: it cannot be read, or belongs to another extractor.
    """
    if Path(source).suffix != ".npz":
        images = open_images(source, resolution)
        kept = images.at_most(REFERENCE_IMAGES)
        return Reference(kept.fingerprint, kept)
    file, sha256 = read_npz(source, channels_of(extractor)), file_sha256(source)
    if extractor.name == "inception" and file.pooled is not None:
        if len(file.pooled[0]) != extractor.width:
            raise EdgeDiTError(
                f"{source} has statistics of {len(file.pooled[0])} features, but the extractor {extractor.name} gives "
                f"{extractor.width}; both must be of one extractor."
            )
        return Reference(sha256, file.images, file.pooled, file.spatial)
    if file.images is None:
        raise EdgeDiTError(
            f"{source} has statistics of ADM's Inception and no images, but the extractor is {extractor.name} "
            f"({extractor.hash}); give images as the reference, or --extractor inception."
        )
    return Reference(sha256, file.images)


# ------------------------------------------------------------------ chunks


class Chunks:
    """Tensors of images `0 … count - 1` in files of `size` images each.

    Args:
        folder: where they are. name: what they are called. count: images. size: of a chunk.
    """

    def __init__(self, folder: Path, name: str, count: int, size: int) -> None:
        self.folder, self.name, self.count, self.size = folder, name, count, size

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def rows(self, index: int) -> range:
        """The images of a chunk."""
        return range(index * self.size, min((index + 1) * self.size, self.count))

    def path(self, index: int) -> Path:
        """Its file, which is there once it is whole."""
        return self.folder / f"{self.name}-{index:05d}.safetensors"

    def write(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Store a chunk, whole or not at all."""
        path = self.path(index)
        aside = aside_of(path)
        with explain_write_errors(path):
            try:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)
                fsync_path(aside)
                os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)

    def read(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor of every chunk, in order."""
        for index in range(len(self)):
            try:
                tensor = load_file(self.path(index))[name]
            except (SafetensorError, OSError, KeyError) as error:
                raise EdgeDiTError(
                    f"{self.path(index)} is damaged ({error}); delete it and run the same command again."
                ) from error
            yield tensor

    def image(self, number: int) -> torch.Tensor:
        """The bytes `[C, H, W]` of an image, if images are kept."""
        index = number // self.size
        with safe_open(self.path(index), framework="pt") as file:
            return file.get_slice("images")[number - index * self.size]

    def whole(self, name: str) -> np.ndarray:
        """A tensor of all images, `[count, …]`."""
        return torch.cat(list(self.read(name))).numpy()

    def moments(self, name: str) -> RunningMoments:
        """Mean and covariance of features. Memory: those, and one chunk."""
        moments = RunningMoments()
        for part in self.read(name):
            moments.update(part)
        return moments


def _as_in_a_file(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[n, C, H, W]` in [-1, 1] as bytes, and in [-1, 1] again. NaN, which would become black, is an error."""
    check_finite(images, tuple(images.shape[1:]))
    pixels = to_bytes(images)
    return pixels, pixels.float() / 127.5 - 1


def describe(images: torch.Tensor, extractor: Extractor, keep: bool) -> dict[str, torch.Tensor]:
    """What is stored of images `[n, C, H, W]` in [-1, 1]: features of what is left when they are rounded to bytes, as a
    file would hold them, and the bytes themselves if they are to be kept.
    """
    pixels, rounded = _as_in_a_file(images)
    if hasattr(extractor, "features_and_spatial"):
        pooled, spatial = extractor.features_and_spatial(rounded)
        found = {"features": pooled, "spatial": spatial}
    else:
        found = {"features": extractor.features(rounded)}
    return found | ({"images": pixels} if keep else {})


# ------------------------------------------------------------------ figures


@dataclass(kw_only=True)
class Score:
    """What is read of a result.json."""

    metrics: dict[str, float] = key()
    standard_errors: dict[str, float] = key(minimum=0.0)
    notes: list[str] = key()


def figures(
    samples: Chunks,
    reference_chunks: Chunks | None,
    reference: Reference,
    extractor: Extractor,
    *,
    seed: int,
    clip: bool = False,
) -> dict[str, Any]:
    """`metrics`, `standard_errors`, `spreads` and `notes` of a score: what the stored features and the reference allow.

    A spread is the standard deviation of a figure over the parts (inception score) or the random subsets (kernel
    distance) that it is the mean of: these overlap or depend on each other, so it is no standard error.

    Memory: the features of samples and reference, five times over in float64 (2048 features of 50,000 images: 0.8 GB
    each time); spatial ones one after the other with these.

    Args:
        reference_chunks: of the reference's images; `None`: it has statistics alone.
        seed: of the bootstrap, and of the kernel distance's subsets.
        clip: whether CLIPScores are stored too.
    """
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    spreads: dict[str, float] = {}
    notes: list[str] = []

    def frechet(kind: str, key: str, given: Gaussian | None) -> None:
        if given is None and reference_chunks is None:
            notes.append(f"the reference has no statistics of {kind} and no images: {key} is left out.")
            return
        ours = samples.moments(kind)
        if given is None:
            assert reference_chunks is not None
            theirs = reference_chunks.moments(kind)
            notes.extend(theirs.notes(f"the reference, {kind}"))
            given = theirs.mean, theirs.covariance
        notes.extend(ours.notes(f"the samples, {kind}"))
        metrics[key] = frechet_distance_from_moments(ours.mean, ours.covariance, *given)
        errors[key] = frechet_standard_error(samples.whole(kind), given, seed=seed)

    name = f"[{extractor.name},n={samples.count}]"
    frechet("features", f"fid{name}", reference.pooled)
    if hasattr(extractor, "features_and_spatial"):
        frechet("spatial", f"sfid{name}", reference.spatial)
    features = samples.whole("features")
    if head := getattr(extractor, "head", None):
        metrics["inception_score"], spreads["inception_score"] = inception_score(head(torch.from_numpy(features)))
    if reference_chunks is not None:
        real = reference_chunks.whole("features")
        least = min(len(real), len(features))
        size = min(SUBSET, least)
        metrics["kernel_distance"], spread = kernel_distance(features, real, subset_size=size, seed=seed)
        if size < max(len(real), len(features)):  # else all subsets are the same
            spreads["kernel_distance"] = spread
        if least <= NEIGHBOURS:
            few = f"{least} images have no {NEIGHBOURS} neighbours: precision and recall are left out; take more."
            notes.append(few)
        else:
            pairs = {"": precision_recall(real, features), "adm_": adm_precision_recall(real, features)}
            for prefix, (precision, recall) in pairs.items():
                for kind, share, counted in (("precision", precision, features), ("recall", recall, real)):
                    metrics[prefix + kind] = share
                    errors[prefix + kind] = float(np.sqrt(share * (1 - share) / len(counted)))
    else:
        notes.append("the reference has no images: precision, recall and the kernel distance are left out.")
    if clip:
        scores = samples.whole("clip")
        metrics["clip_score"] = float(scores.mean(dtype=np.float64))
        errors["clip_score"] = float(scores.std(ddof=1, dtype=np.float64) / len(scores) ** 0.5)
    return {"metrics": metrics, "standard_errors": errors, "spreads": spreads, "notes": notes}


def clip_scores(scorer: ClipScorer, images: torch.Tensor, prompts: Sequence[str], rows: range) -> torch.Tensor:
    """CLIPScore `[n]` of images as they are when rounded to bytes, each with its prompt."""
    return scorer.scores(_as_in_a_file(images)[1], [prompts[row % len(prompts)] for row in rows])
