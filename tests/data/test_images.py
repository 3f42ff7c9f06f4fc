"""Images from every kind of source, bad sources, the stream of batches, and the latent cache."""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgedit_hf.data.batches import batch_indices, step_loader
from edgedit_hf.data.datasets import ImageDataset
from edgedit_hf.data.images import check_images, load_images
from edgedit_hf.data.latents import cache_latents, open_latents
from edgedit_hf.errors import EdgeDiTError


def picture(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    shape = size[::-1] if mode == "L" else (*size[::-1], len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def save_pictures(folder: Path, count: int, first: int = 0, **kwargs) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(first + i, **kwargs).save(folder / f"{i:02d}.png")


@pytest.fixture
def class_folders(tmp_path) -> Path:
    """Three classes of five images; one class has a name that `datasets` would take for a split."""
    root = tmp_path / "animals [small]"
    for first, name in enumerate(["cat", "dog", "test"]):
        save_pictures(root / name, 5, first=10 * first)
    return root


def everything(dataset) -> dict[str, torch.Tensor]:
    return dataset.batch(range(len(dataset)))


# ------------------------------------------------------------------ sources


def test_digits_are_the_real_ones_split_by_class():
    from sklearn.datasets import load_digits

    train, validation = load_images(), load_images(split="validation")
    assert train.shape == (1, 8, 8) and train.num_classes == 10 and train.label_names == [str(i) for i in range(10)]
    assert len(train) + len(validation) == 1797
    truth = load_digits()
    found = torch.cat([everything(train)["images"], everything(validation)["images"]])[:, 0]
    expected = torch.from_numpy(truth.images / 8 - 1).float()
    # The two parts together are the whole set, each image once.
    assert sorted(map(bytes, found.numpy())) == sorted(map(bytes, expected.numpy()))
    counts, held = np.bincount(truth.target), np.bincount(validation.labels.numpy())
    assert np.abs(held - 0.2 * counts).max() <= 0.5
    assert load_images(seed=1).fingerprint != train.fingerprint
    assert load_images().fingerprint == train.fingerprint


def test_digits_fingerprint_is_the_same_everywhere():
    fingerprint = load_images(validation_fraction=0).fingerprint
    assert fingerprint == "71aea6df912d0a069df2d1d2bb974960cb550d036cd86fdaf091db3241aaa0b9"


def test_digits_of_another_resolution_with_three_channels():
    from sklearn.datasets import load_digits

    images = everything(load_images(resolution=16, channels=3, validation_fraction=0))["images"]
    assert images.shape == (1797, 3, 16, 16) and torch.equal(images[:, 0], images[:, 2])
    small = torch.from_numpy(load_digits().images / 8 - 1).float()[:, None]
    wanted = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
    assert (images[:, :1] - wanted).abs().max() <= 1 / 255 + 1e-6


def test_class_folders(class_folders):
    dataset = load_images(str(class_folders), validation_fraction=0)
    assert dataset.shape == (3, 8, 8) and dataset.label_names == ["cat", "dog", "test"]
    assert dataset.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    batch = dataset.batch([7])
    wanted = torch.from_numpy(np.array(picture(12))).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(batch["images"][0], wanted) and batch["labels"].tolist() == [1]
    parts = [load_images(str(class_folders), split, validation_fraction=0.4) for split in ("train", "validation")]
    assert sorted(torch.cat([part.labels for part in parts]).tolist()) == dataset.labels.tolist() and all(
        map(len, parts)
    )
    assert parts[0].labels.unique().tolist() == [0, 1, 2]


def test_folders_with_their_own_validation_images(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate("ab"):
            save_pictures(tmp_path / split / name, count, first=10 * label)
    train, validation = load_images(str(tmp_path)), load_images(str(tmp_path), "validation")
    assert (len(train), len(validation)) == (6, 4) and train.label_names == validation.label_names == ["a", "b"]


def test_links_are_followed(tmp_path):
    save_pictures(tmp_path / "real" / "cat", 3)
    save_pictures(tmp_path / "links" / "dog", 2, first=10)
    (tmp_path / "links" / "cat").symlink_to(tmp_path / "real" / "cat")
    (tmp_path / "links" / "dog" / "also.png").symlink_to(tmp_path / "real" / "cat" / "00.png")
    dataset = load_images(str(tmp_path / "links"), validation_fraction=0)
    assert dataset.label_names == ["cat", "dog"] and dataset.labels.tolist() == [0] * 3 + [1] * 3


def test_a_file_that_comes_or_goes_moves_no_other(tmp_path):
    for first, name in enumerate("ab"):
        save_pictures(tmp_path / "set" / name, 40, first=100 * first)

    def names(split: str) -> set[str]:
        part = load_images(str(tmp_path / "set"), split, validation_fraction=0.3, seed=7)
        return {part._rows.where(index)[len(str(tmp_path / "set")) + 1 :] for index in part._indices}

    train, held_out = names("train"), names("validation")
    # An independent reading of the rule: the hash of seed and name, as a number in [0, 1).
    shares = {
        name: int(hashlib.sha256(f"7 {name}".encode()).hexdigest()[:16], 16) / 16**16 for name in train | held_out
    }
    assert held_out == {name for name, share in shares.items() if share < 0.3} and len(train | held_out) == 80
    fingerprint = load_images(str(tmp_path / "set"), validation_fraction=0.3, seed=7).fingerprint
    gone = sorted(held_out)[3]
    (tmp_path / "set" / gone).write_bytes(b"damaged")  # a stage that does not use it never looks
    assert load_images(str(tmp_path / "set"), validation_fraction=0.3, seed=7).fingerprint == fingerprint
    (tmp_path / "set" / gone).unlink()
    assert names("train") == train and names("validation") == held_out - {gone}
    assert load_images(str(tmp_path / "set"), validation_fraction=0.3, seed=7).fingerprint == fingerprint
    picture(999).save(tmp_path / "set" / "a" / "later.png")
    assert names("train") - {"a/later.png"} == train and names("validation") - {"a/later.png"} == held_out - {gone}
    (tmp_path / "set").rename(tmp_path / "moved")
    assert len(load_images(str(tmp_path / "moved"), "validation", validation_fraction=0.3, seed=7)) in (
        len(held_out) - 1,
        len(held_out),
    )


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_small_folders_give_both_parts(tmp_path, fraction):
    save_pictures(tmp_path / "a", 2)
    save_pictures(tmp_path / "b", 1, first=5)
    train, held_out = (
        load_images(str(tmp_path), split, validation_fraction=fraction) for split in ("train", "validation")
    )
    assert sorted(train.labels.unique().tolist()) == [0, 1] and held_out.labels.tolist() == [0]


def test_images_alone_are_unlabelled(tmp_path, class_folders):
    save_pictures(tmp_path / "flat", 4)
    flat = load_images(str(tmp_path / "flat"), validation_fraction=0)
    assert flat.num_classes == 0 and flat.labels.tolist() == [0] * 4
    ignored = load_images(str(class_folders), label_column="", validation_fraction=0)
    assert ignored.num_classes == 0 and len(ignored) == 15


@pytest.mark.parametrize(
    "column, values, names, labels",
    [
        ("label", ["dog", "cat", "dog"], ["cat", "dog"], [1, 0, 1]),
        ("label", [2, 0, 1], ["0", "1", "2"], [2, 0, 1]),
        ("text", ["a dog", "a cat", "a dog"], [], [0, 0, 0]),
    ],
)
def test_metadata(tmp_path, column, values, names, labels):
    save_pictures(tmp_path / "images", 3)
    rows = [{"file_name": f"images/{i:02d}.png", column: value} for i, value in enumerate(values)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_images(str(tmp_path), validation_fraction=0)
    assert dataset.label_names == names and dataset.labels.tolist() == labels


@pytest.fixture
def table():
    import datasets

    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y"])})
    images = [picture(i, mode="L") for i in range(6)]
    return datasets.Dataset.from_dict({"img": images, "kind": [0, 1] * 3}, features=features)


def test_saved_dataset_parquet_folder_and_cached_hub_id_are_one_path(tmp_path, table, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet" / "train.parquet")
    parquet = load_images(str(tmp_path / "parquet"))
    # What `load_dataset("someone/things")` leaves behind when it has downloaded that dataset.
    built = next((tmp_path / "cache").rglob("dataset_info.json")).parent
    cached = tmp_path / "cache" / "someone___things" / "default" / "0.0.0" / built.name
    shutil.copytree(built, cached)
    (cached / "parquet-train.arrow").rename(cached / "things-train.arrow")
    sets = [load_images(str(tmp_path / "saved")), parquet, load_images("someone/things")]
    assert [s.name for s in sets] == ["saved", "parquet", "things"]
    for dataset in sets:
        assert dataset.shape == (1, 8, 8) and dataset.label_names == ["x", "y"]
        assert dataset.fingerprint == parquet.fingerprint
        assert torch.equal(everything(dataset)["images"], everything(parquet)["images"])


def test_resizing_crops_the_centre(tmp_path):
    wide = np.zeros((32, 64, 3), dtype=np.uint8)
    wide[:, 16:48] = 255  # the square in the middle is white
    tmp_path.joinpath("a").mkdir()
    Image.fromarray(wide).save(tmp_path / "a" / "wide.png")
    Image.fromarray(wide.transpose(1, 0, 2).copy()).save(tmp_path / "a" / "tall.png")
    batch = everything(load_images(str(tmp_path), resolution=8, validation_fraction=0))
    assert torch.equal(batch["images"], torch.ones(2, 3, 8, 8))


def test_grey_and_colour(tmp_path):
    save_pictures(tmp_path / "mixed", 2)
    picture(5, mode="L").save(tmp_path / "mixed" / "grey.png")
    mixed = load_images(str(tmp_path / "mixed"), validation_fraction=0)  # the first image has colours: grey fits in
    grey = mixed.batch([2])["images"]
    assert mixed.shape == (3, 8, 8) and torch.equal(grey[:, 0], grey[:, 1])
    assert load_images(str(tmp_path / "mixed"), channels=1).shape == (1, 8, 8)
    (tmp_path / "mixed" / "grey.png").rename(tmp_path / "mixed" / "-first.png")
    with pytest.raises(EdgeDiTError, match="has colours .* set channels"):
        load_images(str(tmp_path / "mixed"))


def test_turned_photographs_are_turned_back(tmp_path):
    photo = picture(0, size=(16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: rotate by 90° to look at it
    photo.save(tmp_path / "a.png", exif=exif)
    assert load_images(str(tmp_path), validation_fraction=0).shape == (3, 16, 8)


def test_big_sets_are_decoded_when_asked_for(class_folders, monkeypatch):
    small = load_images(str(class_folders))
    monkeypatch.setattr("edgedit_hf.data.datasets.IN_MEMORY_BYTES", 100)
    big = load_images(str(class_folders))
    assert big._memory is None and small._memory is not None
    assert big.fingerprint == small.fingerprint
    for key, value in big.batch([3, 0, -1]).items():
        assert torch.equal(value, small.batch([3, 0, -1])[key])


def test_fingerprint_tells_content_not_place(class_folders, tmp_path):
    fingerprint = load_images(str(class_folders)).fingerprint
    moved = tmp_path / "elsewhere"
    class_folders.rename(moved)
    assert load_images(str(moved)).fingerprint == fingerprint
    assert load_images(str(moved), label_column="").fingerprint != fingerprint
    assert load_images(str(moved), resolution=4).fingerprint != fingerprint
    picture(99).save(moved / "cat" / "00.png")
    assert load_images(str(moved), validation_fraction=0).fingerprint != fingerprint
    (moved / "cat").rename(moved / "bird")
    assert load_images(str(moved)).label_names == ["bird", "dog", "test"]


def test_subset():
    dataset = ImageDataset(np.arange(5 * 4, dtype=np.uint8).reshape(5, 1, 2, 2), [0, 1, 0, 1, 1], ["a", "b"])
    part = dataset.subset([4, 1])
    assert part.labels.tolist() == [1, 1] and torch.equal(part.batch([0])["images"], dataset.batch([4])["images"])
    dataset.batch([0])
    assert dataset.subset([4, 1]).fingerprint == part.fingerprint != dataset.fingerprint
    assert torch.equal(dataset.subset([4, 1]).batch([1])["images"], part.batch([1])["images"])


def test_works_in_a_torch_data_loader():
    dataset = load_images()
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))
    assert torch.equal(batch["images"], dataset.batch(range(4))["images"])
    assert torch.equal(batch["labels"], dataset.labels[:4])
    assert torch.equal(dataset[-1]["images"], dataset.batch([len(dataset) - 1])["images"][0])
    assert sum(1 for _ in dataset) == len(dataset)


# ------------------------------------------------------------------ pictures as people have them


COLOUR, ALPHA = (200, 40, 90), np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def transparent(kind: str) -> tuple[Image.Image, np.ndarray]:
    """A picture of one colour (or its grey) that is transparent in some way, and its alpha, `[8, 8]` in [0, 1]."""
    colour = Image.new("RGB", (8, 8), COLOUR)
    if kind in ("RGBA", "LA"):
        image = colour.convert(kind[:-1]).convert(kind)
        image.putalpha(Image.fromarray(ALPHA))
        return image, ALPHA / 255
    hidden = np.zeros((8, 8), dtype=np.uint8)
    hidden[2:5, 1:7] = 1
    if kind in ("P", "P alphas"):
        image = Image.fromarray(hidden, "P")
        image.putpalette([*COLOUR, 1, 2, 3])
        image.info["transparency"] = bytes([255, 64]) if kind == "P alphas" else 1
        return image, 1 - hidden * (191 / 255 if kind == "P alphas" else 1)
    pixels = np.array(colour.convert("L" if kind == "L tRNS" else "RGB"))
    pixels[hidden == 1] = 7
    image = Image.fromarray(pixels)
    image.info["transparency"] = 7 if kind == "L tRNS" else (7, 7, 7)
    return image, 1.0 - hidden


@pytest.mark.parametrize("background", ["white", "black", "#1080f0"])
@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "P alphas", "RGB tRNS", "L tRNS"])
def test_transparency_shows_the_background(tmp_path, kind, background):
    image, alpha = transparent(kind)
    given = {"transparency": image.info["transparency"]} if "transparency" in image.info else {}
    image.save(tmp_path / "a.png", **given)
    under = {"white": (255, 255, 255), "black": (0, 0, 0), "#1080f0": (0x10, 0x80, 0xF0)}[background]
    found = everything(load_images(str(tmp_path), channels=3, background=background, validation_fraction=0))["images"][
        0
    ]
    over = np.array(image.convert("L").getpixel((0, 0)) if "L" in kind.split()[0] else COLOUR, dtype=float) * np.ones(3)
    if kind in ("RGB tRNS", "RGBA", "P", "P alphas"):
        over = np.array(COLOUR, dtype=float)
    wanted = alpha * over[:, None, None] + (1 - alpha) * np.array(under, dtype=float)[:, None, None]
    shown = (kind != "P alphas") | (alpha == 1)  # the half-transparent entry of that palette has a colour of its own
    assert np.abs((found.numpy() + 1) * 127.5 - wanted)[:, np.broadcast_to(shown, (8, 8))].max() <= 1.01
    if kind == "P alphas":
        half = 64 / 255 * np.array([1, 2, 3]) + 191 / 255 * np.array(under)
        assert np.abs((found.numpy()[:, 3, 3] + 1) * 127.5 - half).max() <= 1.01


def test_files_that_viewers_show_alike_are_alike(tmp_path):
    shown = picture(3)
    invisible = np.array(picture(4).convert("RGBA"))
    invisible[..., 3] = 0
    opaque = np.array(shown.convert("RGBA"))
    for name, image in (("a", shown), ("b", Image.fromarray(opaque)), ("c", shown.convert("RGB"))):
        image.save(tmp_path / f"{name}.png")
    Image.fromarray(invisible).save(tmp_path / "d.png")
    Image.new("RGB", (8, 8), "white").save(tmp_path / "e.png")
    batch = everything(load_images(str(tmp_path), validation_fraction=0))["images"]
    assert torch.equal(batch[0], batch[1]) and torch.equal(batch[0], batch[2]) and torch.equal(batch[3], batch[4])


def test_grey_samples_of_few_bits_have_their_transparent_value(tmp_path):
    # A PNG of 4-bit grey whose value 15 (white) is transparent; Pillow reads 255, and the tRNS chunk says 15.
    rows = b"".join(b"\0" + bytes([0x0F, 0xF5]) for _ in range(4))
    chunks = [
        (b"IHDR", (4).to_bytes(4, "big") * 2 + bytes([4, 0, 0, 0, 0])),
        (b"tRNS", bytes([0, 15])),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    png = b"".join(len(d).to_bytes(4, "big") + k + d + zlib.crc32(k + d).to_bytes(4, "big") for k, d in chunks)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    image = everything(load_images(str(tmp_path), background="black", validation_fraction=0))["images"][0, 0]
    assert torch.allclose((image[0] + 1) * 127.5, torch.tensor([0.0, 0.0, 0.0, 85.0]))


def test_the_fingerprint_sees_a_background_that_shows(tmp_path):
    def fingerprint(image: Image.Image, background: str) -> str:
        image.save(tmp_path / "a.png")
        return load_images(str(tmp_path), background=background, validation_fraction=0).fingerprint

    see_through, opaque = transparent("RGBA")[0], picture(0).convert("RGBA")
    assert fingerprint(see_through, "white") == fingerprint(see_through, "#ffffff") != fingerprint(see_through, "black")
    assert fingerprint(opaque, "white") == fingerprint(opaque, "black") and fingerprint(
        picture(0), "white"
    ) == fingerprint(picture(0), "black")
    # Without transparency it is the hash that it always was.
    header = {"shape": (3, 8, 8), "label_names": [], "pixel_max": 255, "count": 1}
    digest = hashlib.sha256(
        json.dumps(header).encode() + hashlib.sha256((tmp_path / "a.png").read_bytes()).digest() + bytes(8)
    )
    assert fingerprint(picture(0), "white") == digest.hexdigest()


def test_a_colour_profile_is_applied(tmp_path):
    from PIL import ImageCms

    image, srgb = picture(0), ImageCms.createProfile("sRGB")
    linear = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ"))  # not a profile of RGB: ignored, as viewers do
    for name, profile in (
        ("a", ImageCms.ImageCmsProfile(srgb).tobytes()),
        ("b", b"nonsense"),
        ("c", linear.tobytes()),
        ("d", None),
    ):
        image.save(tmp_path / f"{name}.png", **({"icc_profile": profile} if profile else {}))
    batch = everything(load_images(str(tmp_path), validation_fraction=0))["images"]
    assert all(torch.equal(batch[i], batch[3]) for i in range(3))
    # A profile with red and blue exchanged: what it describes is the picture with its channels exchanged.
    swapped = bytearray(
        ImageCms.ImageCmsProfile(srgb)
        .tobytes()
        .replace(b"rXYZ", b"qXYZ")
        .replace(b"bXYZ", b"rXYZ")
        .replace(b"qXYZ", b"bXYZ")
    )
    swapped = bytes(swapped).replace("sRGB".encode("utf-16-be"), "BGR!".encode("utf-16-be")).replace(b"sRGB", b"BGR!")
    image.save(tmp_path / "a.png", icc_profile=swapped)
    found = load_images(str(tmp_path), validation_fraction=0)
    assert (found.batch([0])["images"][0].flip(0) - batch[3]).abs().max() <= 2.5 / 127.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_decoded_as_datasets_does(tmp_path, orientation):
    import datasets

    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = picture(orientation, size=(16, 8))
    photo.save(tmp_path / "0.jpg", exif=exif)
    photo.convert("CMYK").save(tmp_path / "1.jpg", exif=exif)
    photo.convert("P").save(tmp_path / "2.png", exif=exif)
    photo.convert("YCbCr").save(tmp_path / "3.tif")
    wide = orientation >= 5
    if wide:
        (tmp_path / "3.tif").unlink()
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), cache_dir=str(tmp_path.parent / "cache"))[
        "train"
    ]
    ours = load_images(str(tmp_path), validation_fraction=0, channels=3)
    assert len(ours) == len(theirs)
    for i, row in enumerate(theirs):
        wanted = torch.from_numpy(np.array(row["image"].convert("RGB"))).permute(2, 0, 1) if i < 3 or not wide else None
        if wanted is not None:
            assert torch.equal(((ours.batch([i])["images"][0] + 1) * 127.5).round().to(torch.uint8), wanted)


def test_modes_that_pillow_cannot_convert_are_named(tmp_path):
    Image.new("LAB", (8, 8)).save(tmp_path / "a.tif")
    assert load_images(str(tmp_path), validation_fraction=0).shape == (3, 8, 8)
    with pytest.raises(EdgeDiTError, match="a.tif has mode LAB, which cannot be used .*save it as RGB"):
        load_images(str(tmp_path), channels=1, validation_fraction=0)


# ------------------------------------------------------------------ folders as people have them


def rows_of(folder: Path) -> dict[str, list]:
    """Every split's files, and labels or texts, in order, as our loader sees them."""
    from edgedit_hf.data.sources import open_splits

    return {name: comparable(table) for name, table in open_splits(str(folder), None).items()}


def comparable(table) -> list:
    import datasets

    table = table.cast_column("image", datasets.Image(decode=False))
    extra = [name for name in table.column_names if name != "image"]
    of = {name: feature.int2str for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)}
    return [(row["image"]["path"], *[of.get(name, lambda value: value)(row[name]) for name in extra]) for row in table]


def jsonl(*rows: dict, bom: bool = False) -> bytes:
    return (b"\xef\xbb\xbf" if bom else b"") + "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv_of(*rows: dict, bom: bool = False) -> bytes:
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    return (b"\xef\xbb\xbf" if bom else b"") + "\n".join(lines).encode() + b"\n"


def parquet_of(*rows: dict) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


LINES = [
    {"file_name": "02.png", "text": "two"},
    {"file_name": "./sub/00.PNG", "text": "zero"},
    {"file_name": "01.png", "text": "one"},
]
FOLDERS = {
    "classes": {"a": ["0.png", "1.JPG"], "b": ["2.PNG", "0.jpeg"]},
    "flat": {".": ["b.png", "a.webp", "c.tiff", ".hidden.png"]},
    "hidden and special": {"a": ["0.png"], "b": ["1.png"], ".c": ["2.png"], "__d": ["3.png"]},
    "splits": {"train/a": ["0.png"], "train/b": ["1.png"], "test/b": ["2.png"], "test/a": ["3.png"]},
    "validation": {"train/a": ["0.png", "1.png"], "train/b": ["1.png"], "validation/b": ["1.png"]},
    "other files": {"a": ["0.png", "notes.txt"], "b": ["1.png", "cat.json"]},
    "jsonl": {".": ["01.png", "02.png"], "sub": ["00.PNG"], "metadata.jsonl": jsonl(*LINES)},
    "jsonl with a mark": {".": ["01.png", "02.png"], "sub": ["00.PNG"], "metadata.jsonl": jsonl(*LINES, bom=True)},
    "jsonl with blank lines": {".": ["01.png", "02.png"], "sub": ["00.PNG"], "metadata.jsonl": b"\n\n" + jsonl(*LINES)},
    "csv": {".": ["01.png", "02.png"], "sub": ["00.PNG"], "metadata.csv": csv_of(*LINES)},
    "csv with a mark": {".": ["01.png", "02.png"], "sub": ["00.PNG"], "metadata.csv": csv_of(*LINES, bom=True)},
    "parquet": {".": ["01.png", "02.png"], "sub": ["00.PNG"], "metadata.parquet": parquet_of(*LINES)},
    "metadata in folders": {
        "x": ["0.png"],
        "y": ["0.png"],
        "x/metadata.jsonl": jsonl({"file_name": "0.png", "text": "x"}),
        "y/metadata.jsonl": jsonl({"file_name": "0.png", "text": "y"}),
    },
    "metadata of splits": {
        "train": ["0.png"],
        "test": ["1.png"],
        "train/metadata.csv": csv_of({"file_name": "0.png", "label": 4}),
        "test/metadata.csv": csv_of({"file_name": "1.png", "label": 2}),
    },
}


def make_folder(root: Path, content: dict) -> Path:
    for name, files in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(files, bytes):
            (root / name).write_bytes(files)
            continue
        (root / name).mkdir(parents=True, exist_ok=True)
        for i, file in enumerate(files):
            if file.endswith((".txt", ".json")):
                (root / name / file).write_text("{}")
            else:
                picture(i).save(root / name / file)
    return root


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_are_read_as_datasets_reads_them(tmp_path, name):
    import datasets

    folder = make_folder(tmp_path / "set", FOLDERS[name])
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    ours = rows_of(folder)
    assert set(ours) == set(theirs)
    for split, table in theirs.items():
        assert sorted(ours[split], key=str) == sorted(comparable(table), key=str)
    if "metadata" not in str(FOLDERS[name]):
        assert ours == {split: comparable(table) for split, table in theirs.items()}


def test_marks_of_patterns_are_ordinary_characters(tmp_path):
    names = ["[1].png", "p::q.png", "z*?.png", "!{a}.png", "file:x.png", "%20 é.png"]
    folder = make_folder(tmp_path / "a::b [c]*", {"x[1]": names, "y::z": ["0.png"]})
    assert [(Path(path).name, label) for path, label in rows_of(folder)["train"]] == [
        *((name, "x[1]") for name in sorted(names)),
        ("0.png", "y::z"),
    ]
    assert load_images(str(folder), validation_fraction=0).shape == (3, 8, 8)
    plain = make_folder(
        tmp_path / "p [c]*",
        {".": names, "metadata.jsonl": jsonl(*({"file_name": name, "text": name} for name in names))},
    )
    assert [(Path(path).name, text) for path, text in rows_of(plain)["train"]] == [(name, name) for name in names]
    there = make_folder(
        tmp_path / "q::r", {".": ["0.png"], "metadata.jsonl": jsonl({"file_name": "0.png", "text": "zero"})}
    )
    with pytest.raises(EdgeDiTError, match="has '::' in its path, .* rename it"):
        load_images(str(there))


@pytest.mark.parametrize("name", ["t[1]", "t::1"])
def test_tables_in_folders_that_datasets_cannot_name(tmp_path, table, name):
    (tmp_path / "plain").mkdir()
    table.to_parquet(tmp_path / "plain" / "train.parquet")
    (tmp_path / "plain").rename(tmp_path / name)
    with pytest.raises(EdgeDiTError, match="in its path, .* rename it"):
        load_images(str(tmp_path / name))


def test_what_metadata_leaves_out_and_names_twice_is_said(tmp_path):
    twice = jsonl({"file_name": "1.png", "text": "0"}, {"file_name": "1.png", "text": "1"})
    folder = make_folder(tmp_path / "set", {".": ["0.png", "1.png", "2.png"], "metadata.jsonl": twice})
    with pytest.warns(UserWarning) as said:
        rows = rows_of(folder)
    assert [str(one.message).split("set', ")[1] for one in said] == [
        "2 are named by no line of the metadata, and left out: 0.png, 2.png",
        "1 are named by several lines of the metadata, and count once a line: 1.png",
    ]
    assert [text for _, text in rows["train"]] == ["0", "1"]


def test_links_back_end_the_scan(tmp_path):
    folder = make_folder(tmp_path / "set", {"a": ["0.png"], "b": ["1.png"]})
    for name in ("a/up", "a/again", "b/up"):
        (folder / name).symlink_to(folder)
    assert load_images(str(folder), validation_fraction=0).labels.tolist() == [0, 1]
    for i in range(30):  # 2^30 paths to one folder, and no loop
        (tmp_path / "many" / str(i)).mkdir(parents=True)
        for way in "xy":
            (tmp_path / "many" / str(i) / way).symlink_to(tmp_path / "many" / str(i + 1))
    make_folder(tmp_path / "many" / "30", {".": ["0.png"]})
    with pytest.raises(EdgeDiTError, match="More than 16 links lead to the folder .*many/30"):
        load_images(str(tmp_path / "many"))


def test_a_column_of_ids_is_not_one_of_classes(tmp_path, monkeypatch):
    from edgedit_hf.data import sources as image_sources

    monkeypatch.setattr(image_sources, "MANY_CLASSES", 3)
    for values, classes in ((["u", "v", "w", "x", "y"], 5), ([0, 1, 2, 3, 4], 5), ([0, 9, 0, 9, 0], 10)):
        rows = [{"file_name": f"{i}.png", "kind": value} for i, value in enumerate(values)]
        folder = make_folder(tmp_path / "set", {".": [f"{i}.png" for i in range(5)], "metadata.jsonl": jsonl(*rows)})
        with pytest.raises(EdgeDiTError, match=f"'kind' of .* makes {classes} classes of 5 images"):
            load_images(str(folder), label_column="kind")
        assert load_images(str(folder), label_column="").num_classes == 0


# ------------------------------------------------------------------ bad input


def damage(root: Path) -> None:
    path = root / "dog" / "03.png"
    path.write_bytes(path.read_bytes()[:-60])


def metadata(*lines: str):
    def write(root: Path) -> None:
        (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")

    return write


FIRST = '{"file_name": "cat/00.png", "label": %s}'


@pytest.mark.parametrize(
    "prepare, options, message",
    [
        (None, {"source": "./nowhere"}, "folder './nowhere' does not exist"),
        (None, {"source": "nobody/nothing"}, "'nobody/nothing' is neither a folder here nor a dataset"),
        (None, {"source": __file__}, "is a file; give the folder"),
        (None, {"split": "test"}, "split is 'test'"),
        (None, {"resolution": 0}, "resolution is 0"),
        (None, {"channels": 2}, "channels is 2"),
        (None, {"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        (None, {"data_split": "extra"}, r"no split 'extra'; it has \['train'\]"),
        (None, {"image_column": "photo"}, r"no column 'photo'; its columns are \['image', 'label'\]"),
        (None, {"image_column": "label"}, "column 'label' of split .* does not hold images"),
        (None, {"label_column": "kind"}, r"no column 'kind'; its columns are \['image', 'label'\]"),
        (None, {"split": "validation", "validation_fraction": 0}, "leaves none to validate on"),
        (damage, {"validation_fraction": 0}, "dog/03.png is corrupt or truncated"),
        (
            lambda root: (root / "dog/03.png").write_bytes(b""),
            {"validation_fraction": 0},
            "dog/03.png is corrupt or truncated",
        ),
        (
            lambda root: (root / "dog/03.png").write_text("not an image"),
            {"validation_fraction": 0},
            "dog/03.png is corrupt or truncated",
        ),
        (
            lambda root: picture(0, size=(8, 9)).save(root / "dog/03.png"),
            {"validation_fraction": 0},
            "03.png is 8x9, .* first one is 8x8; set res",
        ),
        (lambda root: picture(0).save(root / "new.png"), {}, "lie at different depths"),
        (lambda root: save_pictures(root / "cat/young", 1), {}, "lie at different depths"),
        (lambda root: Image.new("I;16", (8, 8)).save(root / "cat/00.png"), {}, "00.png has mode I;16; only 8-bit"),
        (metadata('{"label": 1}'), {}, r"has the keys \['label'\]; every line needs file_name"),
        (metadata(""), {}, "first line of .*metadata.jsonl is ''"),
        (metadata("{nonsense"), {}, "first line of .*metadata.jsonl is '{nonsense'"),
        (metadata('{"file_name": "cat/77.png"}'), {}, "cat/77.png cannot be read"),
        (metadata('{"file_name": "../../secret.png"}'), {}, "Invalid metadata file_name"),
        (metadata(FIRST % -1), {}, "label -1 of image 0 is out of range"),
        (metadata(FIRST % 0.5), {}, "labels must be integers or strings"),
        (metadata(FIRST % 1, FIRST % "null"), {}, "Row 1 of .* has no label"),
        (metadata(FIRST % 1, FIRST % 0), {}, "'cat/00.png' of .* is labelled twice, '1' and '0'; keep one"),
        (
            metadata(FIRST % 200_000_000),
            {},
            "'label' of .* makes 200,000,001 classes of 1 images, as an id would; set label_column",
        ),
        (lambda root: os.mkfifo(root / "cat" / "z.png"), {}, r"cat/z.png is a pipe \(FIFO\), not a file; remove it"),
        (lambda root: os.mkfifo(root / "metadata.jsonl"), {}, "metadata.jsonl is a pipe"),
        (lambda root: (root / "z.PNG").symlink_to("nowhere"), {}, "z.PNG is a link that leads nowhere"),
        (lambda root: (root / "z.png").symlink_to("z.png"), {}, "z.png is a link that leads nowhere"),
        (lambda root: (root / "z.png").symlink_to("/dev/zero"), {}, "z.png is a device"),
        (lambda root: (root / os.fsdecode(b"\xff.png")).write_bytes(b""), {}, "is not UTF-8; rename it"),
        (
            lambda root: os.mkfifo(root / "pipe") or metadata('{"file_name": "pipe", "label": 1}')(root),
            {},
            "pipe is a pipe .FIFO., not a file",
        ),
        (None, {"background": "#12"}, "background is '#12'; it must be a colour's name"),
        (None, {"background": "#11223344"}, "background is '#11223344'"),
        (None, {"background": ""}, "background is ''"),
    ],
)
def test_bad_input_gives_one_clear_message(class_folders, monkeypatch, prepare, options, message):
    if prepare:
        prepare(class_folders)
    monkeypatch.chdir(class_folders)
    options = {"source": str(class_folders), **options}
    with pytest.raises(EdgeDiTError, match=message):
        load_images(**options)


@pytest.mark.parametrize("content, message", [((), "is empty"), (("notes.md",), "holds no images")])
def test_folder_without_images(tmp_path, content, message):
    for name in content:
        (tmp_path / name).write_text("text")
    with pytest.raises(EdgeDiTError, match=message):
        load_images(str(tmp_path))


def test_damaged_image_of_a_big_set_is_named(class_folders, monkeypatch):
    damage(class_folders)
    monkeypatch.setattr("edgedit_hf.data.datasets.IN_MEMORY_BYTES", 100)
    dataset = load_images(str(class_folders), validation_fraction=0)
    with pytest.raises(EdgeDiTError, match="dog/03.png is corrupt or truncated"):
        dataset.batch(range(15))


def test_every_damaged_image_is_named_before_it_is_needed(class_folders, monkeypatch):
    check_images(load_images(validation_fraction=0))
    check_images(load_images(str(class_folders)))
    monkeypatch.setattr("edgedit_hf.data.datasets.IN_MEMORY_BYTES", 100)
    check_images(load_images(str(class_folders), validation_fraction=0))
    damage(class_folders)
    for options in ({}, {"resolution": 16}):
        dataset = load_images(str(class_folders), validation_fraction=0, **options)
        with pytest.raises(
            EdgeDiTError, match="^The image .*dog/03.png is corrupt or truncated .* replace or remove it.$"
        ):
            check_images(dataset)
    for name in ("cat/01.png", "test/00.png"):
        (class_folders / name).write_text("nothing")
    with pytest.raises(
        EdgeDiTError, match="3 of 15 images cannot be used: .*cat/01.png is .*dog/03.png is .*test/00.png is"
    ):
        check_images(dataset)
    (class_folders / "test" / "00.png").unlink()
    with pytest.raises(EdgeDiTError, match="cat/01.png is .*dog/03.png is .*test/00.png cannot be read .No such file"):
        check_images(dataset)
    monkeypatch.setattr("edgedit_hf.data.images.NAMED", 1)
    with pytest.raises(
        EdgeDiTError, match="3 of 15 images cannot be used: .*cat/01.png is [^;]*; replace or remove it. … and 2 more$"
    ):
        check_images(dataset)


def test_a_photograph_is_checked_at_an_eighth_of_its_size(tmp_path):
    picture(0, size=(512, 512)).save(tmp_path / "a.jpg")
    dataset = load_images(str(tmp_path), resolution=8, validation_fraction=0)
    assert dataset._rows._open(0, small=True).size == (64, 64)
    dataset.__dict__.pop("_memory")
    check_images(dataset)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-2000])
    with pytest.raises(EdgeDiTError, match="a.jpg is corrupt or truncated"):
        check_images(dataset)


def test_an_image_that_claims_to_be_huge(tmp_path):
    picture(0).save(tmp_path / "a.png")
    png = bytearray((tmp_path / "a.png").read_bytes())
    png[16:24] = (40_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(png)
    with pytest.raises(EdgeDiTError, match="a.png claims to be too large .*1600000000 pixels.*scale it down"):
        load_images(str(tmp_path), resolution=8)


def test_tables_with_unusable_columns(tmp_path, table):
    import datasets

    def load(changed):
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        changed.save_to_disk(tmp_path / "saved")
        return load_images(str(tmp_path / "saved"))

    with pytest.raises(EdgeDiTError, match=r"no column of images; its columns are \['kind'\]"):
        load(table.remove_columns("img"))
    with pytest.raises(EdgeDiTError, match=r"several class columns, \['kind', 'sort'\]; set label_column"):
        load(table.add_column("sort", [0] * 6).cast_column("sort", datasets.ClassLabel(names=["only"])))
    with pytest.raises(EdgeDiTError, match="is empty or cannot be read"):
        load(table.select([]))
    other = table.cast_column("kind", datasets.Value("int64")).map(lambda row: {"kind": row["kind"] + 5})
    splits = datasets.DatasetDict(train=table.cast_column("kind", datasets.Value("int64")), test=other)
    splits.save_to_disk(tmp_path / "both")
    assert load_images(str(tmp_path / "both"), label_column="").num_classes == 0
    with pytest.raises(EdgeDiTError, match="label 5 of image 0 is out of range: there are 2 classes, 0 … 1"):
        load_images(str(tmp_path / "both"), "validation", label_column="kind")


def test_labels_must_fit_the_images():
    images = np.zeros((3, 1, 8, 8), dtype=np.uint8)
    with pytest.raises(EdgeDiTError, match="3 images but 2 labels"):
        ImageDataset(images, [0, 1], ["a", "b"])
    with pytest.raises(EdgeDiTError, match="label 2 of image 1 is out of range"):
        ImageDataset(images, [0, 2, 1], ["a", "b"])
    with pytest.raises(EdgeDiTError, match="expected uint8"):
        ImageDataset(images.astype(np.float32))


# ------------------------------------------------------------------ batches


def test_batches_run_through_every_epoch_once():
    stream = np.concatenate([batch_indices(10, 4, seed=3, step=step) for step in range(10)])
    epochs = stream.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    wide = batch_indices(10, 40, seed=3, step=0)  # one batch over four epochs
    assert np.array_equal(wide, stream) and wide.dtype == np.int64


def test_a_batch_depends_on_its_arguments_alone():
    first = batch_indices(1000, 64, seed=0, step=50)
    for step in (3, 77, 500):
        batch_indices(1000, 64, seed=0, step=step)
    assert np.array_equal(first, batch_indices(1000, 64, seed=0, step=50))
    assert not np.array_equal(first, batch_indices(1000, 64, seed=1, step=50))
    with pytest.raises(EdgeDiTError, match="step -1"):
        batch_indices(10, 4, 0, -1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_ranks_and_restarts_see_the_same_stream(num_workers):
    dataset = load_images()
    before = torch.get_rng_state()
    whole = list(step_loader(dataset, 8, seed=1, start_step=0, total_steps=5))
    assert [step for step, _, _ in whole] == [0, 1, 2, 3, 4]
    parts = [
        list(step_loader(dataset, 8, 1, 3, 5, rank=rank, world_size=2, num_workers=num_workers)) for rank in range(2)
    ]
    for (step, rows, batch), *ranks in zip(whole[3:], *parts):
        assert [r[0] for r in ranks] == [step, step] and rows.tolist() == list(range(8))
        assert torch.equal(torch.cat([r[1] for r in ranks]), rows)
        for key in ("images", "labels"):
            assert torch.equal(torch.cat([r[2][key] for r in ranks]), batch[key])
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(EdgeDiTError, match="batch_size 8 cannot be divided between 3 ranks"):
        next(step_loader(dataset, 8, 0, 0, 1, world_size=3))


def test_a_batch_of_digits_costs_less_than_a_millisecond():
    loader = step_loader(load_images(), 128, seed=0, start_step=0, total_steps=200)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        next(loader)
        times.append(time.perf_counter() - start)
    assert np.median(times) < 1e-3


# ------------------------------------------------------------------ latents


def tiny_vae(seed: int = 0, kind: str = "tiny"):
    from diffusers import AutoencoderKL, AutoencoderTiny

    torch.manual_seed(seed)
    if kind == "kl":
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        sizes = {"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16}
        return AutoencoderKL(**blocks, **sizes, scaling_factor=0.5, shift_factor=0.1).eval()
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(**sizes, **blocks, latent_channels=4, upsampling_scaling_factor=2).eval()


@pytest.fixture(scope="module")
def colour_digits():
    return load_images(resolution=16, channels=3).subset(range(150))


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_latents_are_what_the_vae_says(tmp_path, colour_digits, kind, monkeypatch):
    vae = tiny_vae(kind=kind)
    latents = cache_latents(colour_digits, vae, tmp_path, batch_size=2, progress=False)
    assert len(latents) == 150 and latents.shape == (4, 8, 8)
    assert latents.num_classes == 10 and torch.equal(latents.labels, colour_digits.labels)
    order = [149, 3, 70, -1]
    images = colour_digits.batch(order)["images"]
    with torch.no_grad():
        encoded = vae.encode(images)
    wanted = encoded.latents if kind == "tiny" else (encoded.latent_dist.mode() - 0.1) * 0.5
    batch = latents.batch(order)
    assert torch.allclose(batch["images"], wanted, atol=1e-5) and batch["labels"].dtype == torch.int64
    monkeypatch.setattr("edgedit_hf.data.latents.IN_MEMORY_BYTES", 100)
    big = open_latents(tmp_path)
    assert big._memory is None and torch.equal(big.batch(order)["images"], batch["images"])
    for _, _, part in step_loader(big, 8, 0, 0, 2, num_workers=1):
        assert part["images"].shape == (8, 4, 8, 8)
    with pytest.raises(IndexError):
        big.batch([150])


def test_latents_of_the_vaes_of_sana_and_qwen_image(tmp_path, colour_digits):
    from flow_pipelines import qwen_image, sana

    few = colour_digits.subset(range(3))
    images = few.batch(range(3))["images"]
    for name, vae in (("sana", sana().vae.eval()), ("qwen", qwen_image().vae.eval())):
        batch = cache_latents(few, vae, tmp_path / name, progress=False).batch(range(3))["images"]
        with torch.no_grad():
            if name == "sana":
                wanted = vae.encode(images).latent * 0.4
            else:  # as the pipeline undoes it: latents · std + mean
                wanted = (vae.encode(images.unsqueeze(2)).latent_dist.mode()[:, :, 0] - 0.1) / 0.9
        assert batch.shape == (3, 4, 8, 8) and torch.allclose(batch, wanted, atol=1e-5)


def test_latent_cache_of_other_data_or_another_vae(tmp_path, colour_digits):
    few = colour_digits.subset(range(4))
    made = cache_latents(few, tiny_vae(), tmp_path, progress=False)
    assert open_latents(tmp_path).fingerprint == made.fingerprint
    others = colour_digits.subset(range(4, 8))
    with pytest.raises(
        EdgeDiTError, match=f"made from the dataset {few.fingerprint}.*the dataset {others.fingerprint}"
    ):
        cache_latents(others, tiny_vae(), tmp_path, progress=False)
    with pytest.raises(EdgeDiTError, match="made from the vae [0-9a-f]{16}, but this run has the vae [0-9a-f]{16}"):
        cache_latents(few, tiny_vae(seed=1), tmp_path, progress=False)


def test_latent_cache_refuses_what_does_not_fit(tmp_path, colour_digits):
    with pytest.raises(EdgeDiTError, match="images have 1 channels, but the VAE takes 3"):
        cache_latents(load_images(), tiny_vae(), tmp_path, progress=False)
    odd = load_images(resolution=15, channels=3).subset([0])
    with pytest.raises(EdgeDiTError, match=r"images of \(15, 15\) into latents of \(8, 8\)"):
        cache_latents(odd, tiny_vae(), tmp_path, progress=False)
    broken = tiny_vae()
    with torch.no_grad():
        next(broken.encoder.parameters()).fill_(torch.nan)
    with pytest.raises(EdgeDiTError, match="NaN or infinite"):
        cache_latents(colour_digits, broken, tmp_path, progress=False)
    assert not (tmp_path / "index.json").exists()
    with pytest.raises(EdgeDiTError, match="index.json does not exist"):
        open_latents(tmp_path)


def test_damaged_and_foreign_latent_caches(tmp_path, colour_digits):
    cache_latents(colour_digits, tiny_vae(), tmp_path, batch_size=2, progress=False)
    part = tmp_path / "shard-00001" / "latents.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(EdgeDiTError, match="shard-00001/latents.safetensors is damaged.*delete"):
        open_latents(tmp_path)
    shutil.rmtree(part.parent)
    with pytest.raises(EdgeDiTError, match="unfinished: 1 of 3 parts are missing"):
        open_latents(tmp_path)
    cache_latents(colour_digits, tiny_vae(), tmp_path, batch_size=2, progress=False)
    assert len(open_latents(tmp_path)) == 150
    (tmp_path / "index.json").write_text('{"format": 9}')
    with pytest.raises(EdgeDiTError, match="does not describe a latent cache"):
        open_latents(tmp_path)


def _encode_in_child(images, vae, folder):
    torch.set_num_threads(1)
    cache_latents(images, vae, folder, batch_size=1, progress=False)


def test_latent_cache_continues_after_a_kill(tmp_path):
    images, vae = load_images(resolution=16, channels=3).subset(range(500)), tiny_vae()
    cache, second = tmp_path / "cache", tmp_path / "cache" / "shard-00001"
    child = multiprocessing.get_context("fork").Process(target=_encode_in_child, args=(images, vae, cache))
    child.start()
    while child.is_alive() and not second.exists():
        time.sleep(0.005)
    child.kill()
    child.join()
    written = {path: path.stat().st_mtime_ns for path in cache.glob("shard-*/*")}
    assert len(written) >= 2
    resumed = cache_latents(images, vae, cache, batch_size=1, progress=False)
    assert all(path.stat().st_mtime_ns == at for path, at in written.items())
    assert sorted(path.name for path in cache.iterdir()) == ["index.json", *[f"shard-{i:05d}" for i in range(16)]]
    whole = cache_latents(images, vae, tmp_path / "whole", batch_size=1, progress=False)
    assert torch.allclose(everything(resumed)["images"], everything(whole)["images"], atol=1e-6)
    assert torch.equal(resumed.labels, images.labels)
