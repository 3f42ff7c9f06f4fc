"""Images to train on (the embedded digits, any `datasets` id, local folders), their latents, and one stream of batches.

Shapes: N images, C channels, H height, W width. Images are float32 in [-1, 1], labels int64 in 0 … num_classes - 1.
The stream of batches is a function of (seed, step) alone: a run that was killed, or that has more ranks, sees the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..errors import EdgeDiTError
from ..files import FolderLock, atomic_folder, atomic_write_json, hash_json, sweep, weights_hash
from ..records import LatentIndex
from ..schema import read_record
from .latents import encode, latent_scale
from .sources import (
    HELD_OUT_NAMES,
    ArrayRows,
    EncodedRows,
    image_column_of,
    image_rows,
    open_splits,
    parse_background,
    read_labels,
)

IN_MEMORY_BYTES = 256 * 1024**2  # sets below this size are decoded once and kept, as bytes (latents: as float32)
LATENT_FORMAT = 1
CHECK_BATCH, NAMED = 1024, 5  # images checked at a time; how many of those that cannot be used are named
SHARD_BATCHES = 32  # batches of latents in a file: what a killed `cache_latents` loses at most
_BAR = {"unit": "image", "delay": 5, "leave": False, "disable": None}  # only on terminals, and only after a while


# ------------------------------------------------------------------ datasets


class _MapDataset(Dataset):
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


class ImageDataset(_MapDataset):
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
        labels = self._all_labels[self._indices]
        for wrong in np.flatnonzero((labels < 0) | (labels >= max(self.num_classes, 1)))[:1]:
            raise EdgeDiTError(
                f"The label {labels[wrong]} of image {self._indices[wrong]} is out of range: there are "
                f"{self.num_classes} classes, 0 … {self.num_classes - 1}. Correct it, or choose another label_column."
            )
        self.labels = torch.from_numpy(labels)

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

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """`{"images": [n, C, H, W] float32 in [-1, 1], "labels": [n] int64}` of the images at these positions."""
        indices = np.asarray(indices, dtype=np.int64)
        if self._memory is not None:
            pixels = self._memory[indices]
        else:
            pixels = np.stack([self._rows.pixels(index) for index in self._indices[indices]])
        images = torch.from_numpy(pixels).to(torch.float32).div_(self._pixel_max / 2).sub_(1)
        return {"images": images, "labels": self.labels[torch.from_numpy(indices)]}


def check_images(dataset: ImageDataset | Dataset) -> None:
    """Decode every image of a set (an [`ImageDataset`], or what has some as `parts`) once, and name those that cannot
    be used.

    Raises:
        EdgeDiTError: there are such images.
    """
    found = [
        problem
        for part in getattr(dataset, "parts", [dataset])
        if isinstance(part, ImageDataset)
        for problem in part.problems()
        if problem
    ]
    if not found:
        return
    if len(found) == 1:
        raise EdgeDiTError(found[0])
    more = f" … and {len(found) - NAMED} more" if len(found) > NAMED else ""
    raise EdgeDiTError(f"{len(found)} of {len(dataset)} images cannot be used: {' '.join(found[:NAMED])}{more}")


def load_images(
    source: str = "digits",
    split: str = "train",
    *,
    resolution: int | None = None,
    channels: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float = 0.2,
    seed: int = 0,
    data_split: str = "train",
    background: str = "white",
) -> ImageDataset:
    """Open images.

    Args:
        source: "digits" (scikit-learn's 1,797 handwritten digits, 8x8, one channel); a local folder with one
            sub-folder a class, or with `metadata.jsonl` (`file_name`, optionally `label`), or with images alone
            (unlabelled), or one written by `Dataset.save_to_disk`; or a `datasets` id ("org/name", "org/name:config").
        split: "train" or "validation". The validation images are the source's validation or test split where it has
            one, else a seeded fraction (of every class; of files, each by its name), which "train" then leaves out.
        resolution: side of the images after a centre-crop to a square and resizing; default as they are, if all have
            one size.
        channels: 1 or 3; default as in the first image.
        image_column, label_column: columns; default the first image column, and "label" or else the only class column.
            `label_column=""` ignores labels.
        validation_fraction, seed: of the held-out part.
        data_split: the source's split that holds the training images.
        background: what shows through transparent pixels: a colour's name, or "#rrggbb".

    Raises:
        EdgeDiTError: the source cannot be used; the message says why and what to do.
    """
    check_arguments(split, ("train", "validation"), resolution, channels, validation_fraction)
    colour = parse_background(background)
    if source == "digits":
        dataset, own_validation, names = (
            load_digit_images(resolution, channels, labelled=label_column != ""),
            False,
            None,
        )
    else:
        splits, chosen, own_validation = open_source(source, split, data_split, label_column)
        labels, classes = read_labels(splits, data_split, chosen, label_column, source)
        size = None if resolution is None else (resolution, resolution)
        (rows,) = open_rows(splits, data_split, chosen, source, image_column, [size], channels, colour)
        dataset = ImageDataset(rows, labels, classes, name=set_name(source))
        names = file_names(rows, source)
        check_labels_agree(names, dataset, source)
    if not own_validation:
        dataset = dataset.subset(own_split(dataset.labels.numpy(), split, validation_fraction, seed, source, names))
    dataset.batch([0])  # decodes a small set, and so finds its damaged images, now
    return dataset


def check_arguments(
    split: str, splits: Sequence[str], resolution: int | None, channels: int | None, validation_fraction: float
) -> None:
    """Raise [`EdgeDiTError`] at the first argument of a loader that is out of its range."""
    if split not in splits:
        raise EdgeDiTError(f"split is {split!r}; it must be {' or '.join(map(repr, splits))}.")
    if resolution is not None and resolution < 1:
        raise EdgeDiTError(f"resolution is {resolution}; it must be at least 1.")
    if channels not in (None, 1, 3):
        raise EdgeDiTError(f"channels is {channels}; it must be 1 (grey) or 3 (colour).")
    if not 0 <= validation_fraction < 1:
        raise EdgeDiTError(f"validation_fraction is {validation_fraction}; it must be at least 0 and below 1.")


def set_name(source: str) -> str:
    """What a feature extractor trained on a source is named after."""
    return re.sub(r"[^\w.-]+", "-", Path(source).name) or "images"


def open_source(source: str, split: str, data_split: str, label_column: str | None) -> tuple[dict, str, bool]:
    """All splits of a source, the one that `split` is read from, and whether the source has validation images
    itself.
    """
    splits = open_splits(source, label_column)
    if data_split not in splits:
        raise EdgeDiTError(
            f"{source!r} has no split {data_split!r}; it has {sorted(splits)}. Set data_split to one of them."
        )
    held_out = next((name for name in HELD_OUT_NAMES if name in splits and name != data_split), None)
    chosen = held_out if held_out is not None and split == "validation" else data_split
    return splits, chosen, held_out is not None


def open_rows(
    splits: dict,
    data_split: str,
    chosen: str,
    source: str,
    image_column: str | None,
    sizes: Sequence[tuple[int, int] | None],
    channels: int | None,
    background: tuple[int, int, int],
) -> list[EncodedRows]:
    """The images of the chosen split at every size; what is not given about their shape, the training images decide."""
    image_column = image_column_of(splits[data_split], image_column, source)
    name = f"{data_split!r} of {source!r}"
    rows = [image_rows(splits[data_split], image_column, name, size, channels, background) for size in sizes]
    if chosen != data_split:
        shapes, name = [part.shape for part in rows], f"{chosen!r} of {source!r}"
        rows = [image_rows(splits[chosen], image_column, name, size, shapes[0][0], background) for size in sizes]
        for part, shape in zip(rows, shapes):
            if part.shape != shape:
                raise EdgeDiTError(
                    f"The images of {name} have shape {part.shape}, those of {data_split!r} {shape}; set resolution to "
                    "bring all to one size."
                )
    return rows


def check_labels_agree(names: Sequence[str] | None, dataset: ImageDataset, source: str) -> None:
    """Raise if a file is there twice, with two labels."""
    label_of: dict[str, int] = {}
    for name, label in zip(names or (), dataset.labels.tolist()):
        if label_of.setdefault(name, label) != label:
            there = [dataset.label_names[number] for number in (label_of[name], label)]
            raise EdgeDiTError(
                f"The image {name!r} of {source!r} is labelled twice, {there[0]!r} and {there[1]!r}; keep one line of "
                "the metadata."
            )


def own_split(
    labels: np.ndarray, split: str, fraction: float, seed: int, source: str, names: Sequence[str] | None = None
) -> np.ndarray:
    """Sorted positions of "train" or "validation" in a set that has no validation images of its own.

    `names`: of images that are files. Theirs and the seed decide, so that a file that comes or goes moves no other.
    """
    train, validation = (
        stratified_split(labels, fraction, seed) if names is None else split_by_name(labels, names, fraction, seed)
    )
    if split == "validation" and len(validation) == 0:
        raise EdgeDiTError(
            f"validation_fraction {fraction} of the {len(labels)} images of {source!r} leaves none to validate on; "
            "raise it or add images (a class needs two to give one away)."
        )
    return train if split == "train" else validation


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions (kept, held out). Of every class with two or more images at least one is held out.

    A fraction of 0 holds nothing out.
    """
    held_out = []
    for label in np.unique(labels) if fraction > 0 else ():
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out.append(stream_generator(seed, int(label)).permutation(members)[:count])
    validation = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *held_out]))
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def split_by_name(
    labels: np.ndarray, names: Sequence[str], fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions (kept, held out). An image is held out with probability `fraction`, by the hash of its name and
    the seed.

    Of every class one is kept, and of a set where a class has two or more at least one is held out: those with the
    largest and smallest hash.
    """
    draws = [
        int.from_bytes(hashlib.sha256(f"{seed} {name}".encode(errors="surrogateescape")).digest()[:8], "big")
        for name in names
    ]
    share = np.array(draws, dtype=np.float64) / 2**64
    held_out = share < fraction
    spare = np.zeros(len(names), dtype=bool)  # of classes with two or more
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        spare[members] = len(members) > 1
        if held_out[members].all():
            held_out[members[np.argmax(share[members])]] = False
    if fraction > 0 and not held_out.any() and spare.any():
        held_out[np.argmin(np.where(spare, share, 2.0))] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def file_names(rows: EncodedRows, source: str) -> list[str] | None:
    """The path of every image below the source's folder; `None` where they are not files there."""
    folder = os.path.join(Path(source).expanduser().absolute(), "")
    paths = rows.paths() if os.path.isdir(folder) else None
    if paths is None or not all(path.startswith(folder) for path in paths):
        return None
    return [path[len(folder) :].replace(os.sep, "/") for path in paths]


def load_digit_images(resolution: int | None, channels: int | None, labelled: bool) -> ImageDataset:
    """scikit-learn's digits, all 1,797 in their order."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels, pixel_max = digits.images.astype(np.uint8), 16  # values 0 … 16
    if resolution not in (None, 8):
        size = (resolution, resolution)
        resized = [
            Image.fromarray(image.astype(np.float32)).resize(size, Image.Resampling.BILINEAR) for image in digits.images
        ]
        pixels, pixel_max = np.stack([np.rint(np.asarray(image) * 255 / 16).astype(np.uint8) for image in resized]), 255
    pixels = np.repeat(pixels[:, None], channels or 1, axis=1)
    names = [str(i) for i in range(10)] if labelled else ()
    return ImageDataset(pixels, digits.target, names, pixel_max=pixel_max, name="digits")


# ------------------------------------------------------------------ batches


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as uint8, as pipelines make them: clipped and rounded, halves to even."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def stream_generator(seed: int, stream: int) -> np.random.Generator:
    """Counter-based generator of its own for every (seed, stream)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, stream % 2**64], dtype=np.uint64)))


@functools.lru_cache(maxsize=16)  # neighbouring steps share an epoch's permutation, or a few
def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation `[num_samples]` int64 of an epoch; read-only, as calls share it."""
    order = stream_generator(seed, epoch).permutation(num_samples)
    order.flags.writeable = False
    return order


def batch_indices(num_samples: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Positions of the global batch `step`, `[batch_size]` int64, out of an endless stream of permutations.

    There is one permutation an epoch; a batch may straddle epochs. The result depends on the arguments alone.
    """
    if num_samples < 1 or batch_size < 1 or step < 0:
        raise EdgeDiTError(
            f"num_samples is {num_samples}, batch_size {batch_size}, step {step}; the first two must be at least 1, "
            "step at least 0."
        )
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // num_samples
    orders = [epoch_order(num_samples, seed, int(epoch)) for epoch in range(epochs[0], epochs[-1] + 1)]
    return np.concatenate([order[positions[epochs == epochs[0] + i] % num_samples] for i, order in enumerate(orders)])


class _Steps(Dataset):
    """Item `step` is one rank's whole batch of that step."""

    def __init__(self, dataset: Dataset, indices_of: Callable[[int], np.ndarray], rows: np.ndarray) -> None:
        self._dataset = dataset
        self._indices_of = indices_of
        self._rows = rows

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        return self._dataset.batch(self._indices_of(step)[self._rows])


def step_loader(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    start_step: int,
    total_steps: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    indices_of: Callable[[int], np.ndarray] | None = None,
) -> Iterator[tuple[int, torch.Tensor, dict[str, torch.Tensor]]]:
    """One rank's part of the batches of steps `start_step` … `total_steps - 1`.

    Args:
        dataset: what `.batch(indices)` is asked of.
        batch_size: global batch, divided evenly between the ranks.
        indices_of: positions of the global batch of a step; default [`batch_indices`].

    Yields:
        (step, rows, batch): rows are this rank's positions in the global batch, `[batch_size / world_size]` int64,
        which is what noise is keyed by; batch as of [`ImageDataset.batch`].
    """
    if batch_size < 1 or batch_size % world_size:
        raise EdgeDiTError(f"batch_size {batch_size} cannot be divided between {world_size} ranks; make it a multiple.")
    share = batch_size // world_size
    rows = np.arange(rank * share, (rank + 1) * share)
    steps = range(start_step, total_steps)
    loader = DataLoader(
        _Steps(dataset, indices_of or functools.partial(batch_indices, len(dataset), batch_size, seed), rows),
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        generator=torch.Generator(),  # else the loader draws from, and so moves, the global one
    )
    for step, batch in zip(steps, loader):
        yield step, torch.from_numpy(rows), batch


# ------------------------------------------------------------------ latents


class LatentDataset(_MapDataset):
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
        indices = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        labels = self.labels[indices]
        if self._memory is not None:
            return {"images": self._memory[indices], "labels": labels}
        places = [divmod(index % len(self), self._shard_rows) for index in indices.tolist()]
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


def check_vae_takes(shape: Sequence[int], config: Mapping[str, Any]) -> None:
    """Raise unless an autoencoder with this config encodes images of shape `(C, H, W)`."""
    channels = config.get("in_channels") or config["input_channels"]
    if shape[0] != channels:
        raise EdgeDiTError(
            f"The images have {shape[0]} channels, but the VAE takes {channels}; set channels to {channels}."
        )


def cache_latents(
    dataset: ImageDataset, vae: torch.nn.Module, folder: str | os.PathLike, batch_size: int = 16, progress: bool = True
) -> LatentDataset:
    """Encode every image once and keep the latents in `folder` (safetensors parts and `index.json`).

    Killed at any moment and called again with the same arguments, it continues with the first missing part; a finished
    cache is only opened. One process writes a folder.

    Args:
        dataset: images `[C, H, W]` with the VAE's number of channels.
        vae: an autoencoder that [`launch.load_vae`] knows, on the device and in the precision to encode with.
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
