"""Captioned images (the embedded digits, folders, `datasets` ids) in buckets of sizes, and what text encoders made of
their captions.

Shapes: N images, C channels, H height, W width, T tokens, D width of a text encoder. Images are float32 in [-1, 1]. As
in [`data`], the stream of batches is a function of (seed, step) alone.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..errors import EdgeDiTError
from ..files import hash_json
from .datasets import ImageDataset
from .digits import digit_captions, load_digit_images
from .images import check_arguments, file_names, open_rows, open_source, own_split, set_name
from .latents import LatentDataset, cache_latents, open_latents
from .sources import EncodedRows, caption_column_of, parse_background

# ------------------------------------------------------------------ the digits' captions


# ------------------------------------------------------------------ datasets


class CaptionedDataset(Dataset):
    """Captioned images (or their latents) in one bucket a size.

    Args:
        parts: the images of each bucket: [`ImageDataset`]s, or [`LatentDataset`]s.
        bucket_of: the bucket of every row, `[N]`; a bucket holds its rows in their order.
        captions: one a row.
        labels: classes of the rows, where they have any.

    Attributes:
        shapes: `(C, H, W)` of every bucket.
        captions: list of N strings.
        bucket_of: LongTensor `[N]`.
        labels: LongTensor `[N]`, or None; label_names: their names.
        fingerprint: of images, captions and buckets.
    """

    def __init__(
        self,
        parts: Sequence[ImageDataset | LatentDataset],
        bucket_of: Sequence[int] | np.ndarray,
        captions: Sequence[str],
        labels: torch.Tensor | None = None,
        label_names: Sequence[str] = (),
    ) -> None:
        self.parts = list(parts)
        self.captions = list(captions)
        self.bucket_of = torch.as_tensor(np.asarray(bucket_of, dtype=np.int64))
        self.labels = labels
        self.label_names = list(label_names)
        self.shapes: list[tuple[int, ...]] = [tuple(part.shape) for part in self.parts]
        self._place = torch.empty(len(self), dtype=torch.int64)  # of a row in its bucket
        for bucket, part in enumerate(self.parts):
            rows = self.rows_of(bucket)
            if len(rows) != len(part):
                raise EdgeDiTError(
                    f"Bucket {bucket} has {len(rows)} captions, but {len(part)} images; every image needs one."
                )
            self._place[rows] = torch.arange(len(rows))

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def shape(self) -> tuple[int, ...]:
        """The one shape of all images."""
        if len(self.shapes) > 1:
            raise EdgeDiTError(
                f"The images have {len(self.shapes)} shapes, {self.shapes}; this needs one, set data.resolution."
            )
        return self.shapes[0]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Reads every image once."""
        return hash_json([[part.fingerprint for part in self.parts], self.bucket_of.tolist(), self.captions])

    def rows_of(self, bucket: int) -> torch.Tensor:
        """Positions of a bucket's rows, ascending."""
        return torch.nonzero(self.bucket_of == bucket).flatten()

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """`{"images": [n, C, H, W], "rows": [n] int64}` at these positions, which must be of one bucket."""
        rows = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        buckets = self.bucket_of[rows].unique().tolist()
        if len(buckets) != 1:
            raise EdgeDiTError(
                f"A batch needs images of one size, but these are of {[self.shapes[b] for b in buckets]}; ask for one "
                "bucket's."
            )
        return {"images": self.parts[buckets[0]].batch(self._place[rows].numpy())["images"], "rows": rows}


def parse_buckets(sizes: Sequence[str]) -> list[tuple[int, int]]:
    """`["160x96"]` to `[(160, 96)]`: height, width."""
    found = []
    for text in sizes:
        match = re.fullmatch(r"\s*([0-9]+)\s*[x×]\s*([0-9]+)\s*", text)
        if match is None or 0 in (size := (int(match[1]), int(match[2]))):
            raise EdgeDiTError(f"The bucket {text!r} is not a size; write height x width in pixels, e.g. '160x96'.")
        if size in found:
            raise EdgeDiTError(f"The bucket {text!r} is there twice; remove one.")
        found.append(size)
    return found


def nearest_bucket(height: int, width: int, buckets: Sequence[tuple[int, int]]) -> int:
    """The bucket whose aspect ratio is nearest to the image's, by |log ratio|.

    Of several that are as near it is the largest that the image fills without being enlarged, or else the smallest.
    """
    distance = [abs(math.log(width * h / (height * w))) for h, w in buckets]
    near = [b for b in range(len(buckets)) if distance[b] <= min(distance) + 1e-9]
    filled = [b for b in near if buckets[b][0] <= height and buckets[b][1] <= width]
    area = [h * w for h, w in buckets]
    return max(filled, key=area.__getitem__) if filled else min(near, key=area.__getitem__)


def load_captioned(
    source: str = "digits",
    split: str = "train",
    *,
    resolution: int | None = None,
    channels: int | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    validation_fraction: float = 0.2,
    seed: int = 0,
    data_split: str = "train",
    buckets: Sequence[str] = (),
    background: str = "white",
) -> CaptionedDataset:
    """Open captioned images.

    Args:
        source: "digits" (scikit-learn's, with captions written from what their pixels measure); a local folder with
            `metadata.jsonl` (`file_name` and a caption); a `datasets` id, or what `Dataset.save_to_disk` wrote.
        split: "train", "validation" (as in [`images.load_images`]), or, of the digits, "held_out": the images of the
            combinations [`HELD_OUT`], which the other two lack.
        caption_column: default the first of "text", "caption", "prompt", "description" that is there.
        buckets: sizes, height x width ("160x96"), instead of a resolution. An image goes where [`nearest_bucket`] says,
            is resized to cover that size and cropped to it, in the centre. Buckets without images are left out.
        resolution, channels, image_column, validation_fraction, seed, data_split, background: as in
        [`images.load_images`].

    Raises:
        EdgeDiTError: the source cannot be used; the message says why and what to do.
    """
    check_arguments(split, ("train", "validation", "held_out"), resolution, channels, validation_fraction)
    colour = parse_background(background)
    if buckets and resolution is not None:
        raise EdgeDiTError(f"buckets {list(buckets)} and resolution {resolution} exclude each other; give one.")
    if source == "digits":
        if buckets:
            raise EdgeDiTError(
                f"The embedded digits all have one size, not buckets {list(buckets)}; set resolution instead."
            )
        digits = load_digit_images(resolution, channels, labelled=True)
        captions, held_out = digit_captions(digits, seed)
        rows = np.flatnonzero(held_out)
        if split != "held_out":
            rows = np.setdiff1d(own_split(digits.labels.numpy(), split, validation_fraction, seed, source), rows)
        part = digits.subset(rows)
        return CaptionedDataset(
            [part], np.zeros(len(rows)), [captions[row] for row in rows], part.labels, part.label_names
        )
    if split == "held_out":
        raise EdgeDiTError(
            f"Only the embedded digits have a split 'held_out', {source!r} has not; use 'train' or 'validation'."
        )
    splits, chosen, own_validation = open_source(source, split, data_split, label_column="")
    caption_column = caption_column_of(splits[data_split], caption_column, source)
    sizes = parse_buckets(buckets) or [None if resolution is None else (resolution, resolution)]
    rows_at = open_rows(splits, data_split, chosen, source, image_column, sizes, channels, colour)
    captions = read_captions(splits[chosen], caption_column, rows_at[0], f"{chosen!r} of {source!r}")
    rows = np.arange(len(captions))
    if not own_validation:
        rows = own_split(
            np.zeros(len(captions)), split, validation_fraction, seed, source, file_names(rows_at[0], source)
        )
    bucket_of = np.zeros(len(rows), dtype=np.int64)
    if len(sizes) > 1:
        stored = [
            rows_at[0].stored_size(row)
            for row in tqdm(rows, desc="Measuring images", delay=5, leave=False, disable=None)
        ]
        bucket_of = np.asarray([nearest_bucket(*size, sizes) for size in stored])
    filled, bucket_of = np.unique(bucket_of, return_inverse=True)
    name = set_name(source)
    parts = [
        ImageDataset(rows_at[bucket], indices=rows[bucket_of == place], name=name)
        for place, bucket in enumerate(filled)
    ]
    for part in parts:
        part.batch([0])  # decodes a small set, and so finds its damaged images, now
    return CaptionedDataset(parts, bucket_of, [captions[row] for row in rows])


def read_captions(table: Any, column: str, images: EncodedRows, name: str) -> list[str]:
    """The captions of a `datasets` table, stripped; one that is missing or empty is an error that names its image."""
    if column not in table.features:
        raise EdgeDiTError(
            f"{name} has no column {column!r}; its columns are {table.column_names}. Set caption_column to one that is "
            "there."
        )
    captions = []
    for row, caption in enumerate(table.select_columns([column]).with_format("arrow")[:][column].to_pylist()):
        if caption is None or not caption.strip():
            problem = "no" if caption is None else "an empty"
            raise EdgeDiTError(
                f"Row {row} of {name} ({images.where(row)}) has {problem} {column!r}; write a caption or remove the "
                "row."
            )
        captions.append(caption.strip())
    return captions


# ------------------------------------------------------------------ batches


# ------------------------------------------------------------------ latents


def cache_captioned_latents(
    dataset: CaptionedDataset,
    vae: torch.nn.Module,
    folder: str | os.PathLike,
    batch_size: int = 16,
    progress: bool = True,
) -> CaptionedDataset:
    """[`latents.cache_latents`] of every bucket, in a folder each; opens what is there already."""
    for bucket, part in enumerate(dataset.parts):
        cache_latents(part, vae, Path(folder, f"bucket-{bucket}"), batch_size, progress)
    return open_captioned_latents(dataset, folder)


def open_captioned_latents(dataset: CaptionedDataset, folder: str | os.PathLike) -> CaptionedDataset:
    """The captioned set with the latents that [`cache_captioned_latents`] wrote in place of its images."""
    parts = [open_latents(Path(folder, f"bucket-{bucket}")) for bucket in range(len(dataset.parts))]
    return CaptionedDataset(parts, dataset.bucket_of, dataset.captions, dataset.labels, dataset.label_names)


# ------------------------------------------------------------------ what text encoders make of the captions
