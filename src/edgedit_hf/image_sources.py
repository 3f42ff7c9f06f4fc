"""Where images come from: arrays, and everything the `datasets` library opens (local folders, saved datasets, Hub ids).

What is opened here is a set of rows: encoded images with a shape, decoded one at a time. [`data`] makes sets of them.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .errors import EdgeDiTError

if TYPE_CHECKING:
    import datasets

TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("validation", "valid", "val", "dev", "test", "testing")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_NAMES = ("text", "caption", "prompt", "description")
TABLE_SUFFIXES = (".parquet", ".arrow", ".zip", ".tar", ".csv", ".json", ".jsonl")


# ------------------------------------------------------------------ rows


class ArrayRows:
    """Images that are an array already, `[N, C, H, W]` uint8.

    Rows of any kind have `shape` (C, H, W), `len`, `encoded(i)` (the stored bytes) and `pixels(i)` (`[C, H, W]` uint8).
    """

    def __init__(self, pixels: np.ndarray) -> None:
        if pixels.ndim != 4 or pixels.dtype != np.uint8:
            raise EdgeDiTError(
                f"The images have shape {pixels.shape} and type {pixels.dtype}; expected uint8 [N, C, H, W]."
            )
        self._pixels = pixels
        self.shape = pixels.shape[1:]

    def __len__(self) -> int:
        return len(self._pixels)

    def encoded(self, index: int) -> bytes:
        return self._pixels[index].tobytes()

    def pixels(self, index: int) -> np.ndarray:
        return self._pixels[index]


class EncodedRows:
    """Images of a `datasets` table (one column, not decoded), decoded one by one to `[C, H, W]` uint8.

    `size` (height, width) is what all are resized and centre-cropped to; default: they must have the first one's size.
    """

    def __init__(
        self, table: datasets.Dataset, column: str, name: str, size: tuple[int, int] | None, channels: int | None
    ) -> None:
        if len(table) == 0:
            raise EdgeDiTError(f"The split {name} is empty; give one with images.")
        self._table = table
        self._column = column
        self._name = name
        self._size = size
        first = self._open(0)
        self._mode = {1: "L", 3: "RGB", None: "L" if first.mode in ("1", "L", "LA") else "RGB"}[channels]
        self._colour_is_error = channels is None and self._mode == "L"
        self._first_size = (first.height, first.width)
        self.shape = (len(self._mode), *(size or self._first_size))

    def __len__(self) -> int:
        return len(self._table)

    def where(self, index: int) -> str:
        """What messages call an image: its path, else its number."""
        row = self._table[int(index)][self._column] or {}
        return row.get("path") or f"image {index} of {self._name}"

    def encoded(self, index: int) -> bytes:
        row = self._table[int(index)][self._column]
        if row is None:
            raise EdgeDiTError(f"Image {index} of {self._name} is missing (an empty cell); remove that row.")
        if row["bytes"] is not None:
            return row["bytes"]
        try:
            return Path(row["path"]).read_bytes()
        except OSError as error:
            raise EdgeDiTError(
                f"The image {row['path']} cannot be read ({error.strerror}); restore or remove it."
            ) from error

    @contextlib.contextmanager
    def _decoding(self, index: int) -> Iterator[Image.Image]:
        encoded = self.encoded(index)
        try:
            yield Image.open(io.BytesIO(encoded))
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            raise EdgeDiTError(
                f"The image {self.where(index)} is corrupt or truncated ({error}); replace or remove it."
            ) from error

    def _open(self, index: int) -> Image.Image:
        with self._decoding(index) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            raise EdgeDiTError(
                f"The image {self.where(index)} has mode {image.mode}; only 8-bit images can be used, convert it."
            )
        return image

    def stored_size(self, index: int) -> tuple[int, int]:
        """Height and width of an image before any resizing, upright; decodes its header alone."""
        with self._decoding(index) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)

    def pixels(self, index: int) -> np.ndarray:
        image = self._open(index)
        if self._size is None and (image.height, image.width) != self._first_size:
            raise EdgeDiTError(
                f"The image {self.where(index)} is {image.width}x{image.height}, but the first one is "
                f"{self._first_size[1]}x{self._first_size[0]}; set resolution to bring all to one size."
            )
        if self._colour_is_error and image.mode not in ("1", "L", "LA"):
            raise EdgeDiTError(
                f"The image {self.where(index)} has colours (mode {image.mode}), but the first one is grey; set "
                "channels to 1 or 3."
            )
        image = image.convert(self._mode)  # alpha is dropped
        if self._size is not None and (image.height, image.width) != self._size:
            image = cover(image, *self._size)
        array = np.asarray(image, dtype=np.uint8)
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest part of this shape in the image's centre, resized to `height` x `width`."""
    if image.width * height > image.height * width:
        part = round(image.height * width / height), image.height
    else:
        part = image.width, round(image.width * height / width)
    left, top = (image.width - part[0]) // 2, (image.height - part[1]) // 2
    image = image.crop((left, top, left + part[0], top + part[1]))
    # Pillow's bicubic filter is antialiased when it shrinks.
    return image.resize((width, height), Image.Resampling.BICUBIC)


# ------------------------------------------------------------------ the `datasets` library


def open_splits(source: str, label_column: str | None) -> dict[str, datasets.Dataset]:
    """All splits of a local folder or of an id."""
    import datasets
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    folder = Path(source).expanduser()
    if folder.is_dir():
        bars = is_progress_bar_enabled()
        disable_progress_bar()  # a local table is made in a moment; the run has its own display
        try:
            return _open_folder(folder, label_column)
        except EdgeDiTError:
            raise
        except Exception as error:
            raise EdgeDiTError(
                f"The folder {source!r} is empty or cannot be read as images ({_first_line(error)})."
            ) from error
        finally:
            if bars:
                enable_progress_bar()
    if folder.exists():
        raise EdgeDiTError(f"{source!r} is a file; give the folder that holds the images.")
    name, _, config = source.partition(":")
    if source.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise EdgeDiTError(f"The folder {source!r} does not exist; correct data.source.")
    try:
        splits = datasets.load_dataset(name, config or None)
    except Exception as error:
        raise EdgeDiTError(
            f"{source!r} is neither a folder here nor a dataset that could be loaded from the Hub "
            f"({_first_line(error)}). Check the spelling; a private dataset needs `hf auth login`; without a network, "
            "give a local folder or 'digits'."
        ) from error
    return dict(splits)


def _open_folder(folder: Path, label_column: str | None) -> dict[str, datasets.Dataset]:
    import datasets
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    if (folder / "dataset_dict.json").is_file():
        return dict(datasets.load_from_disk(str(folder)))
    if (folder / "state.json").is_file():
        return {"train": datasets.load_from_disk(str(folder))}
    images, tables, others = [], [], 0  # images and metadata: their path below the folder, as parts
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in files:
            if name.startswith((".", "__")):
                continue
            parts = (*Path(root).relative_to(folder).parts, name)
            suffix = Path(name).suffix.lower()
            if suffix in ImageFolder.EXTENSIONS:
                images.append(parts)
            elif name in METADATA_NAMES:
                tables.append(parts)
            else:
                others += suffix in TABLE_SUFFIXES
    if not images and others:
        return dict(datasets.load_dataset(str(folder)))  # a copy of a Hub dataset: parquet files, archives
    if not images:
        empty = not any(folder.iterdir())
        raise EdgeDiTError(
            f"The folder {str(folder)!r} {'is empty' if empty else 'holds no images'}; give one with images."
        )
    for parts in tables:
        _check_metadata(folder.joinpath(*parts))
    # Which folder belongs to which split is said explicitly, because `datasets` would take a class folder named "test"
    # for a split and drop the other classes, and would not follow a link to a folder.
    tops = {parts[0] for parts in images if len(parts) > 1}
    is_split = all(len(parts) > 1 for parts in images + tables) and tops <= {*TRAIN_NAMES, *HELD_OUT_NAMES}
    is_split = is_split and not tops.isdisjoint(TRAIN_NAMES)
    patterns: dict[str, list[str]] = {}
    for parts in sorted({parts[:-1] for parts in images + tables}):
        split = "train" if not is_split or parts[0] in TRAIN_NAMES else parts[0]
        patterns.setdefault(split, []).append(str(Path(glob.escape(str(folder.joinpath(*parts))), "*")))
    depths = {len(parts) - is_split for parts in images}
    if not tables and label_column != "" and not (depths == {1} or depths == {2}):
        raise EdgeDiTError(
            f"The images of {str(folder)!r} lie at different depths or more than one folder deep, so their classes are "
            "not clear; put them at <class>/<image>, or describe them in metadata.jsonl, or set label_column to '' for "
            "unlabelled."
        )
    drop_labels = None if tables else (label_column == "" or depths == {1})
    return dict(datasets.load_dataset("imagefolder", data_files=patterns, drop_labels=drop_labels))


def _check_metadata(path: Path) -> None:
    """`datasets` explains neither an empty metadata.jsonl nor a line that is not JSON."""
    if path.suffix != ".jsonl":
        return
    with open(path, encoding="utf-8") as file:
        line = file.readline()
    try:
        keys = sorted(json.loads(line))
    except (json.JSONDecodeError, TypeError):
        raise EdgeDiTError(
            f"The first line of {path} is {line.strip()[:80]!r}; it must be a JSON object with file_name."
        ) from None
    if not any(key == "file_name" or key.endswith("_file_name") for key in keys):
        raise EdgeDiTError(f"{path} has the keys {keys}; every line needs file_name (a path relative to that file).")


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error  # `datasets` wraps what went wrong
    return f"{type(cause).__name__}: {(str(cause).strip() or 'no message').splitlines()[0]}"


def image_column_of(table: datasets.Dataset, column: str | None, source: str) -> str:
    """The column that was asked for, or the first one with images."""
    import datasets

    found = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if column is None and not found or column is not None and column not in table.features:
        wanted = "no column of images" if column is None else f"no column {column!r}"
        raise EdgeDiTError(
            f"{source!r} has {wanted}; its columns are {table.column_names}. Set image_column to one with images."
        )
    return column or found[0]


def caption_column_of(table: datasets.Dataset, column: str | None, source: str) -> str:
    """The column of captions that was asked for, or the first usual one."""
    texts = [name for name, feature in table.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")]
    found = [name for name in CAPTION_NAMES if name in texts] if column is None else [column] if column in texts else []
    if not found:
        wanted = f"no column of captions ({', '.join(CAPTION_NAMES)})" if column is None else f"no column of texts {column!r}"
        raise EdgeDiTError(
            f"{source!r} has {wanted}; its columns are {table.column_names}, with texts {texts}. Set caption_column to "
            "one with captions; a folder of images needs them in metadata.jsonl, as text beside file_name."
        )
    return found[0]


def image_rows(
    table: datasets.Dataset, column: str, name: str, size: tuple[int, int] | None, channels: int | None
) -> EncodedRows:
    """The images of a column; `name` is what messages call the table, `size` as in [`EncodedRows`]."""
    import datasets

    try:
        encoded = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as error:
        raise EdgeDiTError(
            f"The column {column!r} of split {name} does not hold images ({_first_line(error)}); set image_column to "
            "one that does."
        ) from error
    return EncodedRows(encoded, column, name, size, channels)


def read_labels(
    splits: dict, train: str, chosen: str, column: str | None, source: str
) -> tuple[list[int] | None, list[str]]:
    """Class numbers of the chosen split and the names of the classes, which the training split decides."""
    import datasets

    features = splits[train].features
    if column is None:
        class_columns = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        if "label" not in features and len(class_columns) > 1:
            raise EdgeDiTError(
                f"{source!r} has several class columns, {class_columns}; set label_column to one of them."
            )
        column = "label" if "label" in features else (class_columns or [""])[0]
    if column == "":
        return None, []
    if column not in features or column not in splits[chosen].features:
        raise EdgeDiTError(
            f"{source!r} has no column {column!r}; its columns are {list(features)}. Set label_column to one of them."
        )

    def values(name: str) -> list:
        found = splits[name].select_columns([column]).with_format("arrow")[:][column].to_pylist()
        if None in found:
            raise EdgeDiTError(f"Row {found.index(None)} of {source!r} has no {column}; label it or remove it.")
        return found

    dtype = getattr(features[column], "dtype", "")
    if isinstance(features[column], datasets.ClassLabel):
        return values(chosen), features[column].names
    if dtype in ("string", "large_string"):
        names = sorted(set(values(train)))
        number = {name: i for i, name in enumerate(names)}
        unknown = sorted({name for name in values(chosen) if name not in number})
        if unknown:
            raise EdgeDiTError(
                f"The split {chosen!r} of {source!r} has labels {unknown[:5]} that {train!r} does not have."
            )
        return [number[name] for name in values(chosen)], names
    if dtype.startswith(("int", "uint", "bool")):
        return [int(v) for v in values(chosen)], [str(i) for i in range(max(0, *map(int, values(train))) + 1)]
    raise EdgeDiTError(
        f"The column {column!r} of {source!r} has type {features[column]}; labels must be integers or strings."
    )
