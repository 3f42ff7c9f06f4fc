"""Images to train on (the embedded digits, any `datasets` id, local folders), their latents, and one stream of batches.

Shapes: N images, C channels, H height, W width. Images are float32 in [-1, 1], labels int64 in 0 … num_classes - 1.
The stream of batches is a function of (seed, step) alone: a run that was killed, or that has more ranks, sees the same.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from ..errors import EdgeDiTError
from .batches import stream_generator
from .datasets import ImageDataset
from .digits import load_digit_images
from .sources import (
    HELD_OUT_NAMES,
    EncodedRows,
    image_column_of,
    image_rows,
    open_splits,
    parse_background,
    read_labels,
)

# ------------------------------------------------------------------ datasets

NAMED = 5  # how many of the images that cannot be used are named


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


# ------------------------------------------------------------------ batches


# ------------------------------------------------------------------ latents
