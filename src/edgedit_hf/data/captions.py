"""Captioned images (the embedded digits, folders, `datasets` ids) in buckets of sizes, and what text encoders made of
their captions.

Shapes: N images, C channels, H height, W width, T tokens, D width of a text encoder. Images are float32 in [-1, 1]. As
in [`data`], the stream of batches is a function of (seed, step) alone.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..errors import EdgeDiTError
from ..files import FolderLock, atomic_folder, atomic_write_json, hash_json, sweep, weights_hash
from ..records import TextIndex
from ..schema import read_record
from .images import (
    IN_MEMORY_BYTES,
    ImageDataset,
    LatentDataset,
    batch_indices,
    cache_latents,
    check_arguments,
    epoch_order,
    file_names,
    load_digit_images,
    open_latents,
    open_rows,
    open_source,
    own_split,
    set_name,
    step_loader,
    stream_generator,
)
from .sources import EncodedRows, caption_column_of, parse_background

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STYLES = {"stroke": ("thin", "thick"), "width": ("narrow", "wide"), "slant": ("left", "right")}
"""Style words of the digits: what each says about, and its word for the lower and the upper end of
[`measure_style`].
"""

STYLE_SHARE = 0.3  # of a digit's images at either end of a measure that get its word; those between get none
MENTIONED = 0.8  # probability that a caption says a word that fits
HELD_OUT = ((3, "thick"), (7, "thin"), (5, "left"), (4, "wide"))
"""Digits with a style that no training image has; `split="held_out"` gives their images."""

TEMPLATES = (
    "{article} {adjectives}{digit}{slanted}",
    "{article} {adjectives}handwritten {digit}{slanted}",
    "the digit {digit}{listed}",
    "a drawing of the number {digit}{listed}",
)
_STREAM = -(2**62)  # of the captions' random numbers, away from those of splits and epochs
TEXT_FORMAT = 1
TEXT_SHARD = 1024  # captions in a file: what a killed [`text_table`] loses at most


# ------------------------------------------------------------------ the digits' captions


def measure_style(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """How digits are drawn, from their pixels. Larger images are averaged down to 8x8 first.

    With the ink p of every pixel in [0, 1] and M_ab its central moments (x to the right, y down):
    stroke = 2 Σp / Σ|∇p| (area over half the outline: the mean width of the stroke), width = √(M_20 / M_02),
    slant = -M_11 / M_02 (horizontal shift a row upwards; positive leans right, as deskewing of MNIST measures it).

    Args:
        images: `[N, C, H, W]` in [-1, 1], ink is 1.

    Returns:
        "stroke" (in pixels of 8x8), "width" and "slant", each `[N]` float64. An empty image measures 0.
    """
    ink = ((images.detach().double().mean(1, keepdim=True) + 1) / 2).clamp(0, 1).cpu()
    if ink.shape[-2:] != (8, 8):
        ink = F.adaptive_avg_pool2d(ink, 8)
    padded = F.pad(ink[:, 0], (1, 1, 1, 1))
    outline = torch.hypot(padded[:, :-1].diff(dim=2), padded[:, :, :-1].diff(dim=1)).sum((1, 2))
    ink = ink[:, 0]
    mass = ink.sum((1, 2))
    safe = mass.clamp_min(1e-9)
    axis = torch.arange(8, dtype=torch.float64)
    x, y = ((ink.sum(dim) * axis).sum(1) / safe for dim in (1, 2))
    dx, dy = axis - x[:, None], axis - y[:, None]
    xx, yy = (ink.sum(1) * dx**2).sum(1), (ink.sum(2) * dy**2).sum(1)
    xy = torch.einsum("nyx,ny,nx->n", ink, dy, dx)
    return {
        "stroke": 2 * mass / outline.clamp_min(1e-9),
        "width": (xx / yy.clamp_min(1e-9)).sqrt(),
        "slant": -xy / yy.clamp_min(1e-9),
    }


@functools.cache
def style_thresholds() -> dict[str, torch.Tensor]:
    """`[10, 2]` a style: below the first value a digit gets the style's first word, above the second its second.

    They are quantiles among all images of the same digit, as a 1 is always narrow and a 7 leans by its nature.
    """
    digits = load_digit_images(None, None, labelled=True)
    measures = measure_style(digits.batch(range(len(digits)))["images"])
    ends = torch.tensor([STYLE_SHARE, 1 - STYLE_SHARE], dtype=torch.float64)
    of_digit = [digits.labels == digit for digit in range(10)]
    return {
        style: torch.stack([values[rows].quantile(ends) for rows in of_digit]) for style, values in measures.items()
    }


def style_words(images: torch.Tensor, digits: Sequence[int] | torch.Tensor) -> list[dict[str, str | None]]:
    """The words of [`STYLES`] that fit each image (None: neither), e.g. `{"stroke": "thick", "width": None, "slant":
    "left"}`.

    Args:
        images: `[N, C, H, W]` in [-1, 1], generated ones too.
        digits: which digit each is meant to be.
    """
    digits = torch.as_tensor(digits)
    words: list[dict[str, str | None]] = [{} for _ in range(len(digits))]
    for style, values in measure_style(images).items():
        low, high = style_thresholds()[style][digits].unbind(1)
        for row, (below, above) in enumerate(zip((values < low).tolist(), (values > high).tolist())):
            words[row][style] = STYLES[style][0] if below else STYLES[style][1] if above else None
    return words


def is_held_out(digit: int, words: Mapping[str, str | None]) -> bool:
    """Whether a digit with these style words is one that training never sees."""
    return any((digit, word) in HELD_OUT for word in words.values())


def write_caption(digit: int, words: Mapping[str, str | None], template: int = 0, numeral: bool = False) -> str:
    """A caption with these style words in one of [`TEMPLATES`]; the digit as a word, or as a numeral.

    Example:
        >>> write_caption(7, {"stroke": "thick", "width": None, "slant": "left"})
        'a thick seven slanted to the left'
    """
    name = str(digit) if numeral else NUMBERS[digit]
    adjectives = [words[style] for style in ("stroke", "width") if words.get(style)]
    slanted = f"slanted to the {words['slant']}" if words.get("slant") else ""
    listed = [*adjectives, *([slanted] if slanted else [])]
    text = TEMPLATES[template].format(
        article="{article}",
        adjectives="".join(f"{word} " for word in adjectives),
        digit=name,
        slanted=f" {slanted}" if slanted else "",
        listed=", " + " and ".join(filter(None, [", ".join(listed[:-1]), listed[-1]])) if listed else "",
    )
    return text.format(article="an" if text.startswith(("{article} eight", "{article} 8")) else "a")


def parse_caption(caption: str) -> dict[str, Any]:
    """`{"digit": int or None, "stroke": "thick", "thin" or None, "width": …, "slant": …}`: what a caption says about a
    digit.
    """
    tokens = re.findall(r"[a-z]+|[0-9]+", caption.lower())
    digits = [
        NUMBERS.index(token) if token in NUMBERS else int(token)
        for token in tokens
        if token in NUMBERS or re.fullmatch("[0-9]", token)
    ]
    said = {style: next((token for token in tokens if token in words), None) for style, words in STYLES.items()}
    return {"digit": digits[0] if digits else None, **said}


def _digit_captions(digits: ImageDataset, seed: int) -> tuple[list[str], np.ndarray]:
    """A caption for each of the 1,797 digits, by its number and the seed, and which of them are held out.

    The word that makes an image a held-out one is always said, others are left out at times.
    """
    small = load_digit_images(None, None, labelled=True)
    words = style_words(small.batch(range(len(small)))["images"], small.labels)
    uniform = stream_generator(seed, _STREAM).random((len(small), 2 + len(STYLES)))
    captions, held_out = [], np.zeros(len(small), dtype=bool)
    for row, (digit, found) in enumerate(zip(digits.labels.tolist(), words)):
        held_out[row] = is_held_out(digit, found)
        said = {
            style: word if (digit, word) in HELD_OUT or chance < MENTIONED else None
            for (style, word), chance in zip(found.items(), uniform[row, 2:])
        }
        captions.append(write_caption(digit, said, int(uniform[row, 0] * len(TEMPLATES)), bool(uniform[row, 1] < 0.5)))
    return captions, held_out


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
        self.shapes: list[tuple[int, int, int]] = [tuple(part.shape) for part in self.parts]
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
    def shape(self) -> tuple[int, int, int]:
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
        split: "train", "validation" (as in [`data.load_images`]), or, of the digits, "held_out": the images of the
            combinations [`HELD_OUT`], which the other two lack.
        caption_column: default the first of "text", "caption", "prompt", "description" that is there.
        buckets: sizes, height x width ("160x96"), instead of a resolution. An image goes where [`nearest_bucket`] says,
            is resized to cover that size and cropped to it, in the centre. Buckets without images are left out.
        resolution, channels, image_column, validation_fraction, seed, data_split, background: as in
        [`data.load_images`].

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
        captions, held_out = _digit_captions(digits, seed)
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


def bucket_batch(bucket_of: torch.Tensor, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Positions of the global batch `step`, all of one bucket, `[batch_size]` int64; a function of the arguments alone.

    N steps in a row draw every row's bucket once, in random order: buckets come exactly in proportion to their size. A
    bucket's batches are its own endless stream of permutations, as in [`data.batch_indices`]. With one bucket both are
    the same.
    """
    round_, place = divmod(step, len(bucket_of))
    order = bucket_of.numpy()[epoch_order(len(bucket_of), seed, -1 - round_)]
    bucket = order[place]
    rows = np.flatnonzero(bucket_of.numpy() == bucket)
    before = round_ * len(rows) + int((order[:place] == bucket).sum())
    return rows[batch_indices(len(rows), batch_size, seed, before)]


def caption_loader(
    dataset: CaptionedDataset,
    batch_size: int,
    seed: int,
    start_step: int,
    total_steps: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> Iterator[tuple[int, torch.Tensor, dict[str, torch.Tensor]]]:
    """As [`data.step_loader`]; every global batch comes from one bucket, as [`bucket_batch`] says."""
    indices_of = functools.partial(bucket_batch, dataset.bucket_of, batch_size, seed)
    return step_loader(dataset, batch_size, seed, start_step, total_steps, rank, world_size, num_workers, indices_of)


# ------------------------------------------------------------------ latents


def cache_captioned_latents(
    dataset: CaptionedDataset,
    vae: torch.nn.Module,
    folder: str | os.PathLike,
    batch_size: int = 16,
    progress: bool = True,
) -> CaptionedDataset:
    """[`data.cache_latents`] of every bucket, in a folder each; opens what is there already."""
    for bucket, part in enumerate(dataset.parts):
        cache_latents(part, vae, Path(folder, f"bucket-{bucket}"), batch_size, progress)
    return open_captioned_latents(dataset, folder)


def open_captioned_latents(dataset: CaptionedDataset, folder: str | os.PathLike) -> CaptionedDataset:
    """The captioned set with the latents that [`cache_captioned_latents`] wrote in place of its images."""
    parts = [open_latents(Path(folder, f"bucket-{bucket}")) for bucket in range(len(dataset.parts))]
    return CaptionedDataset(parts, dataset.bucket_of, dataset.captions, dataset.labels, dataset.label_names)


# ------------------------------------------------------------------ what text encoders make of the captions


class TextTable:
    """The encoded captions that [`text_table`] wrote, by row of the set. Of each only the tokens its mask keeps are
    stored.

    Attributes:
        dims: width of every encoder's tokens; 0 where there is no encoder.
        lengths: tokens of the longest caption, an encoder; what shorter ones are padded to.
        fingerprint: of the captions and the encoders.
    """

    def __init__(self, folder: str | os.PathLike, captions: Sequence[str]) -> None:
        self.folder = Path(folder)
        index = _read_text_index(self.folder)
        unique = sorted(set(captions))
        if index["captions"] != hash_json(unique):
            raise EdgeDiTError(
                f"The text cache {str(self.folder)!r} was made of other captions; delete it and run the command again."
            )
        self.dims: list[int] = index["dims"]
        self.fingerprint: str = hash_json([index["captions"], index["encoders"], list(captions)])
        number = {caption: place for place, caption in enumerate(unique)}
        self._number = np.asarray([number[caption] for caption in captions], dtype=np.int64)
        self._files: dict[int, Any] = {}
        shards = range(-(-len(unique) // TEXT_SHARD))
        missing = [shard for shard in shards if not _text_shard(self.folder, shard).is_file()]
        if missing:
            raise EdgeDiTError(
                f"The text cache {str(self.folder)!r} is unfinished: {len(missing)} of {len(shards)} parts are "
                "missing. Run the command again."
            )
        for shard in shards:
            self._check(shard, min(TEXT_SHARD, len(unique) - shard * TEXT_SHARD))
        # Of every encoder and shard, where each caption's tokens begin and end: [captions + 1].
        self._ends = [
            [self._file(shard).get_tensor(f"ends_{i}") for shard in shards] if dim else []
            for i, dim in enumerate(self.dims)
        ]
        self.lengths = [max((int(ends.diff().max()) for ends in parts), default=0) for parts in self._ends]

    def _check(self, shard: int, captions: int) -> None:
        """Raise unless a part holds the tokens of so many captions, of the widths that the index says."""
        file, path = self._file(shard), _text_shard(self.folder, shard)
        names = file.keys()
        for encoder, dim in enumerate(self.dims):
            if not dim:
                continue
            tokens, ends = f"tokens_{encoder}", f"ends_{encoder}"
            shapes = [file.get_slice(name).get_shape() if name in names else None for name in (tokens, ends)]
            right = (
                shapes[0] is not None and len(shapes[0]) == 2 and shapes[0][1] == dim and shapes[1] == [captions + 1]
            )
            if right:
                places = file.get_tensor(ends)
                right = (
                    not places.is_floating_point()
                    and bool((places.diff() >= 0).all())
                    and [int(places[0]), int(places[-1])] == [0, shapes[0][0]]
                )
            if not right:
                raise EdgeDiTError(
                    f"{path} is damaged: its tokens and their places of encoder {encoder + 1} have the shapes "
                    f"{shapes}, {captions} captions of width {dim} are wanted; delete {str(path.parent)!r} and run the "
                    "command again, it makes that part anew."
                )

    def __len__(self) -> int:
        return len(self._number)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}  # open files do not travel to other processes

    def _file(self, shard: int) -> Any:
        if shard not in self._files:
            path = _text_shard(self.folder, shard)
            try:
                self._files[shard] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise EdgeDiTError(
                    f"{path} is damaged ({error}); delete {str(path.parent)!r} and run the command again, it makes "
                    "that part anew."
                ) from error
        return self._files[shard]

    @functools.cached_property
    def _memory(self) -> list[list[torch.Tensor]] | None:
        size = sum(4 * dim * int(ends[-1]) for dim, parts in zip(self.dims, self._ends) for ends in parts)
        if size > IN_MEMORY_BYTES:
            return None
        return [
            [self._file(shard).get_tensor(f"tokens_{i}").float() for shard in range(len(parts))]
            for i, parts in enumerate(self._ends)
        ]

    def _tokens(self, encoder: int, number: int) -> torch.Tensor:
        shard, place = divmod(number, TEXT_SHARD)
        start, end = self._ends[encoder][shard][place : place + 2].tolist()
        if self._memory is not None:
            return self._memory[encoder][shard][start:end]
        return self._file(shard).get_slice(f"tokens_{encoder}")[start:end].float()

    def batch(self, rows: Sequence[int] | torch.Tensor) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
        """Of every encoder the tokens `[n, T_i, D_i]` float32 (0 where the mask is) and their mask `[n, T_i]` bool;
        None, None without one.
        """
        numbers = self._number[np.asarray(rows, dtype=np.int64)]
        embeds: list[torch.Tensor | None] = []
        masks: list[torch.Tensor | None] = []
        for encoder, (dim, length) in enumerate(zip(self.dims, self.lengths)):
            if not dim:
                embeds.append(None)
                masks.append(None)
                continue
            tokens = torch.zeros(len(numbers), length, dim)
            mask = torch.zeros(len(numbers), length, dtype=torch.bool)
            for row, number in enumerate(numbers.tolist()):
                found = self._tokens(encoder, number)
                tokens[row, : len(found)] = found
                mask[row, : len(found)] = True
            embeds.append(tokens)
            masks.append(mask)
        return embeds, masks


def _text_shard(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}" / "text.safetensors"


def _read_text_index(folder: Path) -> dict:
    index = read_record(folder / "index.json", TextIndex, "text_table", "a text cache")
    if index["format"] != TEXT_FORMAT:
        raise EdgeDiTError(
            f"{folder / 'index.json'} does not describe a text cache of format {TEXT_FORMAT}, but of "
            f"{index['format']}; choose another folder."
        )
    return index


def encoders_hash(pipeline: Any, max_sequence_length: int | None = None) -> str:
    """Hash of what a pipeline's text encoders make of a prompt: weights, tokenizers, the length that prompts are cut
    to.
    """
    content: list[Any] = [max_sequence_length or pipeline.config.get("max_sequence_length")]
    for suffix in ("", "_2"):
        encoder, tokenizer = (getattr(pipeline, f"{part}{suffix}", None) for part in ("text_encoder", "tokenizer"))
        if encoder is not None:
            rules = json.loads(tokenizer.backend_tokenizer.to_str())
            rules = {
                name: rule for name, rule in rules.items() if name not in ("truncation", "padding")
            }  # set by every call
            facts = [
                type(encoder).__name__,
                weights_hash(encoder.state_dict()),
                str(encoder.dtype),
                tokenizer.model_max_length,
            ]
            content.append(
                [
                    suffix,
                    *facts,
                    hash_json(rules),
                    {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
                ]
            )
    return hash_json(content)


@torch.inference_mode()
def text_table(
    pipeline: Any,
    captions: Sequence[str],
    folder: str | os.PathLike,
    batch_size: int = 64,
    max_sequence_length: int | None = None,
    progress: bool = True,
) -> TextTable:
    """Encode every distinct caption once and keep the tokens in `folder` (safetensors parts and `index.json`).

    Killed at any moment and called again with the same arguments, it continues with the first missing part; a finished
    cache is only opened. One process writes a folder.

    Args:
        pipeline: what has `encode_prompt(prompts, max_sequence_length=…)`, giving embeddings `[B, T_i, D_i]` and masks
            `[B, T_i]` (or None) an encoder, and the `text_encoder` and `tokenizer` (`…_2`) that it uses.
        captions: of the rows.
        folder: of the cache; one of other captions or encoders is an error.
        batch_size: captions encoded at a time.
    """
    folder = Path(folder)
    unique = sorted(set(captions))
    if not unique:
        raise EdgeDiTError("There are no captions to encode; give a set with some.")
    options = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    made_from = {"captions": hash_json(unique), "encoders": encoders_hash(pipeline, max_sequence_length)}

    def encode(texts: list[str]) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
        embeds, masks = pipeline.encode_prompt(texts, **options)
        masks = [
            tokens.new_ones(tokens.shape[:2]) if mask is None and tokens is not None else mask
            for tokens, mask in zip(embeds, masks)
        ]
        return [None if tokens is None else (tokens.cpu(), mask.bool().cpu()) for tokens, mask in zip(embeds, masks)]

    if (folder / "index.json").exists():
        index = _read_text_index(folder)
        for name, value in made_from.items():
            if index[name] != value:
                raise EdgeDiTError(
                    f"The text cache {str(folder)!r} was made with the {name} {index[name]}, but this run has the "
                    f"{name} {value}; choose another folder or delete this one."
                )
    else:
        dims = [0 if part is None else part[0].shape[-1] for part in encode(unique[:1])]
        index = {"format": TEXT_FORMAT, **made_from, "dims": dims}
        atomic_write_json(folder / "index.json", index)
    shards = range(-(-len(unique) // TEXT_SHARD))
    if all(_text_shard(folder, shard).is_file() for shard in shards):
        return TextTable(folder, captions)
    with (
        FolderLock(folder),
        tqdm(total=len(unique), desc="Encoding captions", unit="caption", disable=None if progress else True) as bar,
    ):
        sweep(folder)
        for shard in shards:
            texts = unique[shard * TEXT_SHARD : (shard + 1) * TEXT_SHARD]
            if not _text_shard(folder, shard).is_file():
                _write_text_shard(
                    folder,
                    shard,
                    [encode(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)],
                )
            bar.update(len(texts))
    return TextTable(folder, captions)


def _write_text_shard(folder: Path, shard: int, batches: list[list[tuple[torch.Tensor, torch.Tensor] | None]]) -> None:
    content = {}
    for encoder, parts in enumerate(zip(*batches)):
        if parts[0] is None:
            continue
        tokens = torch.cat([embeds[mask] for embeds, mask in parts])
        if not torch.isfinite(tokens).all():
            raise EdgeDiTError(
                f"Text encoder {encoder + 1} ({tokens.dtype}) gives embeddings that are NaN or infinite; use it in "
                "float32."
            )
        counts = torch.cat([mask.sum(1) for _, mask in parts])
        content[f"tokens_{encoder}"] = tokens.contiguous()
        content[f"ends_{encoder}"] = F.pad(counts.cumsum(0), (1, 0))
    with atomic_folder(folder / f"shard-{shard:05d}") as aside:
        save_file(content, aside / "text.safetensors")
