"""Where images come from: arrays, and everything the `datasets` library opens (local folders, saved datasets, Hub ids).

What is opened here is a set of rows: encoded images with a shape, decoded one at a time. [`data`] makes sets of them.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageColor, ImageOps

from ..errors import EdgeDiTError

if TYPE_CHECKING:
    import datasets

TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_NAMES = ("text", "caption", "prompt", "description")
GREY_MODES = ("1", "L", "LA", "La")
MANY_CLASSES = 1000  # below, nobody is asked whether a column is one of classes
MOST_VISITS = 16  # of one folder, by links
TABLE_SUFFIXES = (".parquet", ".arrow", ".tar", ".csv", ".json", ".jsonl")


# ------------------------------------------------------------------ rows


class ArrayRows:
    """Images that are an array already, `[N, C, H, W]` uint8.

    Rows of any kind have `shape` (C, H, W), `len`, `encoded(i)` (the stored bytes), `reading(i, bytes)` (what beside
    them decides about the pixels; mostly nothing), `pixels(i)` (`[C, H, W]` uint8) and `check(i)`, which raises what
    `pixels` would.
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

    def reading(self, index: int, encoded: bytes) -> str:
        return ""

    def check(self, index: int) -> None:
        pass


class EncodedRows:
    """Images of a `datasets` table (one column, not decoded), decoded one by one to `[C, H, W]` uint8.

    `size` (height, width) is what all are resized and centre-cropped to; default: they must have the first one's size.
    `background` (RGB) is what shows through transparent pixels. The first image whose header can be read decides what
    is left open.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        column: str,
        name: str,
        size: tuple[int, int] | None,
        channels: int | None,
        background: tuple[int, int, int] = (255, 255, 255),
    ) -> None:
        if len(table) == 0:
            raise EdgeDiTError(f"The split {name} is empty; give one with images.")
        self._table = table
        self._column = column
        self._name = name
        self._size = size
        self._background = background
        grey, self._first_size = self._first_header()
        self._mode = {1: "L", 3: "RGB", None: "L" if grey else "RGB"}[channels]
        self._colour_is_error = channels is None and self._mode == "L"
        self.shape = (len(self._mode), *(size or self._first_size))

    def __len__(self) -> int:
        return len(self._table)

    def _first_header(self) -> tuple[bool, tuple[int, int]]:
        """Whether the first image whose header can be read is grey, and its height and width."""
        problem: EdgeDiTError | None = None
        for index in range(len(self)):
            try:
                with self._decoding(index) as image:
                    return _is_grey(image, self._background), _upright_size(image)
            except EdgeDiTError as error:
                problem = problem or error
        raise problem

    def where(self, index: int) -> str:
        """What messages call an image: its path, else its number."""
        row = self._table[int(index)][self._column] or {}
        return row.get("path") or f"image {index} of {self._name}"

    def paths(self) -> list[str] | None:
        """The file of every image; `None` where some are not files but bytes in a table."""
        first = self._table[0][self._column]
        if first is None or first["bytes"] is not None:  # all that follows would read the whole table
            return None
        rows = self._table.with_format("arrow")[:][self._column].to_pylist()
        return (
            [row["path"] for row in rows] if all(row and row["bytes"] is None and row["path"] for row in rows) else None
        )

    def encoded(self, index: int) -> bytes:
        row = self._table[int(index)][self._column]
        if row is None:
            raise EdgeDiTError(f"Image {index} of {self._name} is missing (an empty cell); remove that row.")
        if row["bytes"] is not None:
            return row["bytes"]
        try:
            if not stat.S_ISREG(os.stat(row["path"]).st_mode):
                raise EdgeDiTError(f"The image {row['path']} is {_kind_of(row['path'])}, not a file; remove it.")
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
        except EdgeDiTError:
            raise
        except Image.DecompressionBombError as error:
            raise EdgeDiTError(
                f"The image {self.where(index)} claims to be too large to be decoded safely ({error}); scale it down "
                "or remove it."
            ) from error
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            raise EdgeDiTError(
                f"The image {self.where(index)} is corrupt or truncated ({error}); replace or remove it."
            ) from error

    def _open(self, index: int, small: bool = False) -> Image.Image:
        """An image upright and opaque, in sRGB. `small`: at an eighth of its size where its format can."""
        with self._decoding(index) as image:
            if small:
                image.draft(None, (1, 1))
            scale = _sample_scale(image)
            image.load()
            if scale > 1:
                image.info["transparency"] *= scale
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            raise EdgeDiTError(
                f"The image {self.where(index)} has mode {image.mode}; only 8-bit images can be used, convert it."
            )
        return opaque(in_srgb(image), self._background)

    def _converted(self, index: int, image: Image.Image) -> Image.Image:
        """Grey or RGB, as the set is."""
        if self._colour_is_error and image.mode not in GREY_MODES:
            raise EdgeDiTError(
                f"The image {self.where(index)} has colours (mode {image.mode}), but the first one is grey; set "
                "channels to 1 or 3."
            )
        try:
            return image.convert(self._mode)
        except ValueError as error:  # Pillow converts most modes, but not LAB
            raise EdgeDiTError(
                f"The image {self.where(index)} has mode {image.mode}, which cannot be used ({error}); save it as RGB."
            ) from error

    def reading(self, index: int, encoded: bytes) -> str:
        """What beside its bytes decides about an image's pixels: its background if it is transparent somewhere, that
        its colours are converted.
        """
        try:
            image = Image.open(io.BytesIO(encoded))
            said = "sRGB " if _profile(image) else ""
            if (
                image.has_transparency_data
                and image.mode[0] not in "IF"
                and image.convert("RGBA").getextrema()[3][0] < 255
            ):
                said += "on {:02x}{:02x}{:02x}".format(*self._background)
            return said
        except Exception:  # whoever decodes it will say what is wrong
            return ""

    def stored_size(self, index: int) -> tuple[int, int]:
        """Height and width of an image before any resizing, upright; decodes its header alone."""
        with self._decoding(index) as image:
            return _upright_size(image)

    def pixels(self, index: int) -> np.ndarray:
        image = self._open(index)
        if self._size is None and (image.height, image.width) != self._first_size:
            raise EdgeDiTError(
                f"The image {self.where(index)} is {image.width}x{image.height}, but the first one is "
                f"{self._first_size[1]}x{self._first_size[0]}; set resolution to bring all to one size."
            )
        image = self._converted(index, image)
        if self._size is not None and (image.height, image.width) != self._size:
            image = cover(image, *self._size)
        array = np.asarray(image, dtype=np.uint8)
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)

    def check(self, index: int) -> None:
        """Decode an image and raise what [`pixels`] would; faster where the size is free."""
        if self._size is None:
            self.pixels(index)
        else:
            self._converted(index, self._open(index, small=True))


def parse_background(text: str) -> tuple[int, int, int]:
    """Red, green, blue of a colour: a name ("white"), or "#rrggbb"."""
    try:
        colour = ImageColor.getrgb(text)
    except (ValueError, AttributeError):
        colour = ()
    if len(colour) != 3:
        raise EdgeDiTError(
            f"background is {text!r}; it must be a colour's name, such as 'white', or '#rrggbb' (in quotes, as # "
            "begins a comment)."
        )
    return colour


def opaque(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """An image with its transparent parts laid on a background: then of mode L if image and background are grey, else
    RGB.

    Transparency is an alpha channel (RGBA, LA, PA), a palette's, or one colour that a PNG or GIF declares to be
    transparent (tRNS).
    """
    if not image.has_transparency_data:
        return image
    grey = _is_grey(image, background)
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    image = image.convert("RGBA")
    under = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(under, image).convert("L" if grey else "RGB")


def _is_grey(image: Image.Image, background: tuple[int, int, int]) -> bool:
    return image.mode in GREY_MODES and (len(set(background)) == 1 or not image.has_transparency_data)


def _sample_scale(image: Image.Image) -> int:
    """What a grey PNG's transparent value is to be multiplied by: Pillow stretches samples of 1, 2 and 4 bits to 8, but
    not that value.
    """
    value = image.info.get("transparency")
    if image.format != "PNG" or not image.tile or not isinstance(value, int):
        return 1
    scale = {"1": 255, "L;2": 85, "L;4": 17}.get(str(image.tile[0].args), 1)
    return scale if value <= 255 // scale else 1


def _profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """The colour profile that an image carries, unless it is sRGB or cannot be read."""
    data = image.info.get("icc_profile")
    if not data:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        return None if "srgb" in ImageCms.getProfileDescription(profile).lower() else profile
    except (OSError, ImageCms.PyCMSError):
        return None  # as viewers do


def in_srgb(image: Image.Image) -> Image.Image:
    """An image with the colours that its profile describes, as sRGB; without a profile the numbers are taken to be
    sRGB.
    """
    profile = _profile(image)
    if profile is None:
        return image
    if image.mode in ("P", "PA") or (image.mode == "RGB" and image.has_transparency_data):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    space = {"RGB": "RGB", "RGBA": "RGBA", "CMYK": "RGB", "L": "L"}.get(image.mode)
    if space is None or (space == "L" and image.has_transparency_data):
        return image
    try:
        converted = ImageCms.profileToProfile(
            image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB" if space == "L" else space
        )
    except (OSError, ImageCms.PyCMSError):  # a profile of another colour space than the image's
        return image
    return converted.convert(space)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (image.width, image.height) if turned else (image.height, image.width)


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
    from datasets.data_files import DataFilesList

    whole = str(folder.absolute())
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        _check_name(whole, "::")
        found = datasets.load_from_disk(whole)
        return dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
    images, tables, archives, others = _scan(folder)
    if not images and (archives or others):
        _check_name(whole, "::", "*", "?", "[")
        return dict(datasets.load_dataset(str(folder)))  # a copy of a Hub dataset: parquet files, archives
    if not images:
        empty = not any(folder.iterdir())
        raise EdgeDiTError(
            f"The folder {str(folder)!r} {'is empty' if empty else 'holds no images'}; give one with images."
        )
    for parts in tables:
        _check_metadata(folder.joinpath(*parts))
    # Which file belongs to which split is said explicitly, because `datasets` would take a class folder named "test"
    # for a split and drop the other classes, would not follow a link to a folder, and reads [ in names as a pattern.
    tops = {parts[0] for parts in images if len(parts) > 1}
    is_split = all(len(parts) > 1 for parts in images + tables) and tops <= {*TRAIN_NAMES, *HELD_OUT_NAMES}
    is_split = is_split and not tops.isdisjoint(TRAIN_NAMES)
    files: dict[str, list[str]] = {}
    for parts in sorted(images + tables + archives, key=lambda parts: (parts[:-1], parts)):
        split = "train" if not is_split or parts[0] in TRAIN_NAMES else parts[0]
        files.setdefault(split, []).append(os.path.join(whole, *parts))
    depths = {len(parts) - is_split for parts in images}
    if not tables and label_column != "" and not (depths == {1} or depths == {2}):
        raise EdgeDiTError(
            f"The images of {str(folder)!r} lie at different depths or more than one folder deep, so their classes are "
            "not clear; put them at <class>/<image>, or describe them in metadata.jsonl, or set label_column to '' for "
            "unlabelled."
        )
    if not tables and not archives:
        return _image_tables(files, labelled=label_column != "" and depths == {2})
    _check_name(whole, "::")
    drop_labels = None if tables else (label_column == "" or depths == {1})
    lists = {
        split: DataFilesList(paths, [(str(os.stat(path).st_mtime),) for path in paths])
        for split, paths in files.items()
    }
    splits = dict(datasets.load_dataset("imagefolder", data_files=lists, drop_labels=drop_labels))
    if tables:
        _say_what_is_left_out(splits, [os.path.join(whole, *parts) for parts in images], whole)
    return splits


def _image_tables(files: dict[str, list[str]], labelled: bool) -> dict[str, datasets.Dataset]:
    """Tables of image files as `datasets` makes them of class folders; it would lose, without a word, a file with :: in
    its path.
    """
    import datasets

    features, of_file = {"image": datasets.Image()}, {}
    if labelled:
        of_file = {path: os.path.basename(os.path.dirname(path)) for paths in files.values() for path in paths}
        features["label"] = datasets.ClassLabel(names=sorted(set(of_file.values())))
    tables = {}
    for split, paths in files.items():
        columns = {"image": paths} | ({"label": [of_file[path] for path in paths]} if labelled else {})
        tables[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return tables


Parts = tuple[str, ...]  # of a path below the folder


def _scan(folder: Path) -> tuple[list[Parts], list[Parts], list[Parts], list[Parts]]:
    """Images, metadata, zip archives and other tables below a folder, links followed; what is no file but named like
    one is an error.

    A link to a folder that it lies in is left out: what is there is seen anyway.
    """
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    images: list[Parts] = []
    tables: list[Parts] = []
    archives: list[Parts] = []
    others: list[Parts] = []
    visits: dict[tuple[int, int], int] = {}
    waiting: list[tuple[Parts, frozenset]] = [((), frozenset())]
    while waiting:
        parts, above = waiting.pop()
        here = folder.joinpath(*parts)
        try:
            state = os.stat(here)
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            raise EdgeDiTError(
                f"The folder {here} cannot be read ({error.strerror}); allow it, or move it away."
            ) from error
        this = (state.st_dev, state.st_ino)
        if this in above:
            continue
        visits[this] = visits.get(this, 0) + 1
        if visits[this] > MOST_VISITS:
            raise EdgeDiTError(
                f"More than {MOST_VISITS} links lead to the folder {os.path.realpath(here)}, {here} is one; keep one."
            )
        for entry in entries:
            name, suffix = entry.name, Path(entry.name).suffix.lower()
            if name.startswith("."):
                continue
            if (
                os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
            ):  # of a link to itself `is_dir` raises
                if not name.startswith("__"):
                    waiting.append(((*parts, name), above | {this}))
                continue
            kind = (
                images
                if suffix in ImageFolder.EXTENSIONS
                else tables
                if name in METADATA_NAMES
                else archives
                if suffix == ".zip"
                else others
            )
            if kind is others and suffix not in TABLE_SUFFIXES:
                continue
            if not name.isprintable() and not _is_utf8(name):
                raise EdgeDiTError(f"The name of {str(here / name)!r} is not UTF-8; rename it.")
            if not os.path.isfile(entry.path):
                raise EdgeDiTError(f"{here / name} is {_kind_of(entry.path)}, not a file; remove it.")
            kind.append((*parts, name))
    return images, tables, archives, others


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind_of(path: str) -> str:
    """What something is that is no regular file, for messages."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return "a link that leads nowhere"
    kinds = {stat.S_ISFIFO: "a pipe (FIFO)", stat.S_ISSOCK: "a socket", stat.S_ISDIR: "a folder"}
    return next((name for is_kind, name in kinds.items() if is_kind(mode)), "a device")


def _check_name(folder: str, *foreign: str) -> None:
    """Of a folder of tables: they are found by the `datasets` library, which reads such marks in a path as patterns or
    as links of a chain.
    """
    for mark in foreign:
        if mark in folder:
            raise EdgeDiTError(
                f"The folder {folder!r} has {mark!r} in its path, below which the datasets library finds no tables; "
                "rename it."
            )


def _say_what_is_left_out(splits: dict[str, datasets.Dataset], images: list[str], folder: str) -> None:
    """Warn of images that no line of the metadata names, and of those that several do."""
    import datasets

    lines: collections.Counter[str] = collections.Counter()
    for table in splits.values():
        for column in [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]:
            rows = (
                table.select_columns([column])
                .cast_column(column, datasets.Image(decode=False))
                .with_format("arrow")[:][column]
                .to_pylist()
            )
            lines.update(row["path"] for row in rows if row and row["path"])
    for paths, said in (
        ([path for path in images if path not in lines], "named by no line of the metadata, and left out"),
        (
            [path for path, count in lines.items() if count > 1],
            "named by several lines of the metadata, and count once a line",
        ),
    ):
        if paths:
            named = ", ".join(os.path.relpath(path, folder) for path in paths[:5]) + (", …" if len(paths) > 5 else "")
            warnings.warn(f"Of the images of {folder!r}, {len(paths)} are {said}: {named}", stacklevel=2)


def _check_metadata(path: Path) -> None:
    """`datasets` explains neither an empty metadata.jsonl nor a line that is not JSON."""
    if path.suffix != ".jsonl":
        return
    with open(path, encoding="utf-8-sig") as file:
        line = next((line for line in file if line.strip()), "")
    try:
        keys = sorted(json.loads(line))
    except (json.JSONDecodeError, TypeError):
        raise EdgeDiTError(
            f"The first line of {path} is {line.strip()[:80]!r}; it must be a JSON object with file_name."
        ) from None
    if not any(key in ("file_name", "file_names") or key.endswith(("_file_name", "_file_names")) for key in keys):
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
    texts = [
        name for name, feature in table.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    found = [name for name in CAPTION_NAMES if name in texts] if column is None else [column] if column in texts else []
    if not found:
        wanted = (
            f"no column of captions ({', '.join(CAPTION_NAMES)})"
            if column is None
            else f"no column of texts {column!r}"
        )
        raise EdgeDiTError(
            f"{source!r} has {wanted}; its columns are {table.column_names}, with texts {texts}. Set caption_column to "
            "one with captions; a folder of images needs them in metadata.jsonl, as text beside file_name."
        )
    return found[0]


def image_rows(
    table: datasets.Dataset,
    column: str,
    name: str,
    size: tuple[int, int] | None,
    channels: int | None,
    background: tuple[int, int, int] = (255, 255, 255),
) -> EncodedRows:
    """The images of a column; `name` is what messages call the table, `size` and `background` as in [`EncodedRows`]."""
    import datasets

    try:
        encoded = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as error:
        raise EdgeDiTError(
            f"The column {column!r} of split {name} does not hold images ({_first_line(error)}); set image_column to "
            "one that does."
        ) from error
    return EncodedRows(encoded, column, name, size, channels, background)


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
        _check_classes(len(names), len(splits[train]), column, source)
        number = {name: i for i, name in enumerate(names)}
        unknown = sorted({name for name in values(chosen) if name not in number})
        if unknown:
            raise EdgeDiTError(
                f"The split {chosen!r} of {source!r} has labels {unknown[:5]} that {train!r} does not have."
            )
        return [number[name] for name in values(chosen)], names
    if dtype.startswith(("int", "uint", "bool")):
        count = max(0, *map(int, values(train))) + 1
        _check_classes(count, len(splits[train]), column, source)
        return [int(v) for v in values(chosen)], [str(i) for i in range(count)]
    raise EdgeDiTError(
        f"The column {column!r} of {source!r} has type {features[column]}; labels must be integers or strings."
    )


def _check_classes(count: int, images: int, column: str, source: str) -> None:
    """Of a column that does not name its classes: there must be images for them, else it is an id."""
    if count > MANY_CLASSES and 2 * count > images:
        raise EdgeDiTError(
            f"The column {column!r} of {source!r} makes {count:,} classes of {images:,} images, as an id would; set "
            "label_column to the column of classes ('' for none), or number the classes 0, 1, 2, … without gaps."
        )
