"""Images in memory or decoded on demand, as a data set of rows."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..errors import EdgeDiTError
from .batches import batch_indices
from .sources import ArrayRows

IN_MEMORY_BYTES = 256 * 1024**2  # sets below this size are decoded once and kept, as bytes (latents: as float32)


class MapDataset(Dataset):
    """What sets of images and of latents share: shape, names, labels, `batch`, and torch's map-style protocol."""

    shape: tuple[int, int, int]
    label_names: list[str]
    labels: torch.Tensor

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 when nothing is labelled."""
        return len(self.label_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Samples at these positions, for the default collation of a torch `DataLoader`."""
        batch = self.batch(indices)
        return [{"images": image, "labels": label} for image, label in zip(batch["images"], batch["labels"])]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sample: `{"images": [C, H, W], "labels": []}`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"position {index} of {len(self)}")
        return self.__getitems__([index])[0]


class ImageDataset(MapDataset):
    """Images and labels, map-style. Small sets are kept in memory as bytes, others are decoded when they are asked for.

    Args:
        pixels: `[N, C, H, W]` uint8, or rows of [`load_images`].
        labels: N class numbers (ignored when `label_names` is empty).
        label_names: one name a class; empty for unlabelled images.
        indices: the rows that belong to this set; default all.
        pixel_max: the byte that stands for 1.0 (0 stands for -1.0).
        name: what a feature extractor trained on the set is named after; not part of the fingerprint.

    Attributes:
        shape: `(C, H, W)`.
        num_classes: 0 for unlabelled images; their labels read 0.
        labels: LongTensor `[N]`.
        label_names: list of names.
    """

    def __init__(
        self,
        pixels,
        labels: Sequence[int] | None = None,
        label_names: Sequence[str] = (),
        indices: Sequence[int] | None = None,
        pixel_max: int = 255,
        name: str = "images",
    ) -> None:
        self._rows = ArrayRows(pixels) if isinstance(pixels, np.ndarray) else pixels
        self._pixel_max = pixel_max
        self.name = name
        self._indices = np.arange(len(self._rows)) if indices is None else np.asarray(indices, dtype=np.int64)
        self.shape: tuple[int, int, int] = tuple(self._rows.shape)
        self.label_names = list(label_names)
        count = len(self._rows)
        self._all_labels = np.asarray(labels if self.label_names else np.zeros(count), dtype=np.int64)
        if len(self._all_labels) != count:
            raise EdgeDiTError(f"There are {count} images but {len(self._all_labels)} labels; every image needs one.")
        chosen = self._all_labels[self._indices]
        for wrong in np.flatnonzero((chosen < 0) | (chosen >= max(self.num_classes, 1)))[:1]:
            raise EdgeDiTError(
                f"The label {chosen[wrong]} of image {self._indices[wrong]} is out of range: there are "
                f"{self.num_classes} classes, 0 … {self.num_classes - 1}. Correct it, or choose another label_column."
            )
        self.labels = torch.from_numpy(chosen)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shape, names, labels and the images as they are stored. Reads every image once.

        Encoded files are hashed, not what a decoder makes of them, so it depends on neither paths nor machines; with a
        transparent image goes the background that shows through it.
        """
        header = {
            "shape": self.shape,
            "label_names": self.label_names,
            "pixel_max": self._pixel_max,
            "count": len(self),
        }
        digest = hashlib.sha256(json.dumps(header).encode())
        rows = tqdm(self._indices, desc="Hashing images", **_BAR)
        for index, label in zip(rows, self.labels.tolist()):
            encoded = self._rows.encoded(index)
            digest.update(hashlib.sha256(encoded).digest() + self._rows.reading(index, encoded).encode())
            digest.update(label.to_bytes(8, "little"))
        return digest.hexdigest()

    @functools.cached_property
    def _memory(self) -> np.ndarray | None:
        if len(self) * int(np.prod(self.shape)) > IN_MEMORY_BYTES:
            return None
        pixels = np.empty((len(self), *self.shape), dtype=np.uint8)
        for row, index in enumerate(tqdm(self._indices, desc="Decoding images", **_BAR)):
            pixels[row] = self._rows.pixels(index)
        return pixels

    def problems(self) -> Iterator[str | None]:
        """Of every image why it cannot be used; `None`: it can. Decodes each once, unless all are decoded already."""
        if self.__dict__.get("_memory") is not None:
            yield from [None] * len(self)
            return
        rows = tqdm(total=len(self), desc="Checking images", **_BAR)
        with rows, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(self), CHECK_BATCH):
                for problem in pool.map(self._problem, self._indices[start : start + CHECK_BATCH]):
                    rows.update()
                    yield problem

    def _problem(self, index: int) -> str | None:
        try:
            self._rows.check(index)
        except EdgeDiTError as error:
            return str(error)
        return None

    def subset(self, indices: Sequence[int]) -> ImageDataset:
        """The set of the images at these positions, in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        rows = self._indices[indices]
        part = ImageDataset(self._rows, self._all_labels, self.label_names, rows, self._pixel_max, self.name)
        if self.__dict__.get("_memory") is not None:
            part._memory = self._memory[indices]  # decoded already
        return part

    def at_most(self, count: int) -> ImageDataset:
        """The set itself, or so many of its images, drawn without replacement, in their order: the first ones of a
        folder are of its first classes. The same ones every time.
        """
        return self if len(self) <= count else self.subset(np.sort(batch_indices(len(self), count, 0, 0)))

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """`{"images": [n, C, H, W] float32 in [-1, 1], "labels": [n] int64}` of the images at these positions."""
        indices = np.asarray(indices, dtype=np.int64)
        if self._memory is not None:
            pixels = self._memory[indices]
        else:
            pixels = np.stack([self._rows.pixels(index) for index in self._indices[indices]])
        images = torch.from_numpy(pixels).to(torch.float32).div_(self._pixel_max / 2).sub_(1)
        return {"images": images, "labels": self.labels[torch.from_numpy(indices)]}


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as uint8, as pipelines make them: clipped and rounded, halves to even."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


CHECK_BATCH = 1024  # images checked at a time


_BAR = {"unit": "image", "delay": 5, "leave": False, "disable": None}  # only on terminals, and only after a while
