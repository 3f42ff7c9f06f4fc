"""Images: what is decoded, resized, turned, coloured and made opaque, and damaged ones."""

import hashlib
import json
import zlib

import numpy as np
import pytest
import torch
from pictures import damage, everything, picture, save_pictures
from PIL import Image

from edgedit_hf.data.images import check_images, load_images
from edgedit_hf.errors import EdgeDiTError

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


# ------------------------------------------------------------------ bad input


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
