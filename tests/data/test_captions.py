"""Captioned images: sources and bad ones, and buckets of aspect ratios that every image fits."""

import numpy as np
import pytest
import torch
from pictures import SIZES, save_captioned
from PIL import Image

from edgedit_hf.data.captions import (
    load_captioned,
    nearest_bucket,
    parse_buckets,
)
from edgedit_hf.errors import EdgeDiTError

# ------------------------------------------------------------------ other sources


def test_a_folder_with_metadata(pictures):
    dataset = load_captioned(str(pictures), resolution=16, validation_fraction=0)
    assert (
        dataset.captions == [f"picture {i}" for i in range(len(SIZES))]
        and dataset.shape == (3, 16, 16)
        and dataset.labels is None
    )
    train, validation = (
        load_captioned(str(pictures), split, resolution=16, validation_fraction=0.3)
        for split in ("train", "validation")
    )
    assert len(train) and len(validation) and sorted(train.captions + validation.captions) == dataset.captions
    batch = dataset.batch([4, 2])
    assert batch["rows"].tolist() == [4, 2] and torch.equal(batch["images"][1], dataset.batch([2])["images"][0])


def test_a_saved_dataset_with_its_own_validation_and_other_columns(tmp_path):
    import datasets

    def part(count: int, first: int) -> datasets.Dataset:
        images = [Image.new("L", (8, 8), first + i) for i in range(count)]
        columns = {"picture": images, "words": [f" no {first + i} " for i in range(count)]}
        return datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())

    datasets.DatasetDict(train=part(3, 0), test=part(2, 10)).save_to_disk(tmp_path / "set")
    found = load_captioned(str(tmp_path / "set"), "validation", caption_column="words")
    assert found.captions == ["no 10", "no 11"] and found.shape == (1, 8, 8)
    with pytest.raises(
        EdgeDiTError, match=r"no column of captions \(text, caption, .*its columns are \['picture', 'words'\]"
    ):
        load_captioned(str(tmp_path / "set"))


@pytest.mark.parametrize(
    ("captions_of", "said"),
    [
        (lambda i: None if i == 2 else f"picture {i}", r"Row 2 of .*02\.png\) has no 'text'"),
        (lambda i: " " if i == 1 else f"picture {i}", r"Row 1 of .*01\.png\) has an empty 'text'"),
        (lambda i: None, r"no column of captions .*its columns are \['image'\]"),
        (lambda i: i, r"no column of captions .*its columns are \['image', 'text'\], with texts \[\]"),
    ],
)
def test_missing_captions_are_named(tmp_path, captions_of, said):
    with pytest.raises(EdgeDiTError, match=said):
        load_captioned(str(save_captioned(tmp_path / "x", captions_of=captions_of)), resolution=8)


def test_the_lines_of_the_metadata_are_the_set(tmp_path):
    folder = save_captioned(tmp_path / "x")
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(lines[:-1]))  # an image that no line names does not belong to it
    assert len(load_captioned(str(folder), resolution=8, validation_fraction=0)) == len(SIZES) - 1
    (folder / "04.png").unlink()
    with pytest.raises(EdgeDiTError, match=r"04\.png cannot be read"):
        load_captioned(str(folder), resolution=8, validation_fraction=0)


@pytest.mark.parametrize("buckets", [(), ("16x16", "16x48")])
def test_an_unreadable_image_is_named(tmp_path, buckets):
    folder = save_captioned(tmp_path / "x")
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:60])
    with pytest.raises(EdgeDiTError, match=r"03\.png is corrupt or truncated"):
        load_captioned(str(folder), resolution=None if buckets else 16, buckets=buckets, validation_fraction=0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"split": "test"}, "split is 'test'; it must be 'train' or 'validation' or 'held_out'"),
        ({"buckets": ["16x16"]}, "digits all have one size"),
        ({"buckets": ["16x16"], "resolution": 16}, "exclude each other"),
        ({"source": "FOLDER", "split": "held_out"}, "Only the embedded digits"),
        ({"source": "FOLDER", "buckets": ["16x"]}, "'16x' is not a size"),
        ({"source": "FOLDER", "buckets": ["0x16"]}, "'0x16' is not a size"),
        ({"source": "FOLDER", "buckets": ["16x8", "16 x 8"]}, "is there twice"),
        (
            {"source": "FOLDER", "caption_column": "capt"},
            r"no column of texts 'capt'; its columns are \['image', 'text'\]",
        ),
        ({"source": "FOLDER"}, "00.png|01.png|is 60x20, but the first one is 40x40"),
        ({"source": "./nowhere"}, "'./nowhere' does not exist"),
        ({"channels": 2}, "channels is 2"),
    ],
)
def test_bad_arguments(pictures, arguments, said):
    if arguments.get("source") == "FOLDER":
        arguments = {**arguments, "source": str(pictures)}
    with pytest.raises(EdgeDiTError, match=said):
        load_captioned(**arguments)


def test_an_empty_set(tmp_path):
    import datasets

    empty = (
        datasets.Dataset.from_dict({"image": [], "text": []})
        .cast_column("image", datasets.Image())
        .cast_column("text", datasets.Value("string"))
    )
    empty.save_to_disk(tmp_path / "empty")
    with pytest.raises(EdgeDiTError, match="is empty"):
        load_captioned(str(tmp_path / "empty"))


# ------------------------------------------------------------------ buckets


def test_the_nearest_aspect_ratio_wins_and_then_the_largest_that_is_filled():
    sizes = parse_buckets(["128x128", "160x96", "96×160", " 64 x 64 "])
    assert sizes == [(128, 128), (160, 96), (96, 160), (64, 64)]
    for size, bucket in [
        ((256, 256), 0),
        ((128, 128), 0),
        ((127, 127), 3),
        ((20, 20), 3),
        ((300, 100), 1),
        ((90, 160), 2),
        ((110, 100), 3),
    ]:
        assert nearest_bucket(*size, sizes) == bucket, size
    # 4:5 is nearer to 1:1 than to 3:5 by log ratio: log 1.25 < log (5/3) - log 1.25.
    assert nearest_bucket(500, 400, sizes) == 0


def test_every_image_is_in_its_bucket_covered_and_centred(bucketed):
    assert bucketed.shapes == [(3, 32, 32), (3, 16, 48), (3, 48, 16)]
    assert bucketed.bucket_of.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    batch = bucketed.batch([5, 2])  # 90x30 and 60x20: exactly 3:1
    assert batch["images"].shape == (2, 3, 48, 16)
    wanted = Image.fromarray(np.random.default_rng(5).integers(0, 256, (90, 30, 3), dtype=np.uint8)).resize(
        (16, 48), Image.Resampling.BICUBIC
    )
    assert torch.allclose(batch["images"][0], torch.from_numpy(np.array(wanted)).permute(2, 0, 1) / 127.5 - 1)
    wide = np.random.default_rng(4).integers(0, 256, (30, 80, 3), dtype=np.uint8)  # 8:3 loses rows: 80 x 27 of 80 x 30
    wanted = Image.fromarray(wide).crop((0, 1, 80, 28)).resize((48, 16), Image.Resampling.BICUBIC)
    assert torch.allclose(
        bucketed.batch([4])["images"][0], torch.from_numpy(np.array(wanted)).permute(2, 0, 1) / 127.5 - 1
    )
    with pytest.raises(EdgeDiTError, match="one size"):
        bucketed.batch([0, 1])
    with pytest.raises(EdgeDiTError, match="3 shapes"):
        bucketed.shape  # noqa: B018


def test_buckets_look_at_upright_images(tmp_path):
    folder = save_captioned(tmp_path / "x", [(20, 60)] * 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    for i in range(3):
        Image.open(folder / f"{i:02d}.png").save(folder / f"{i:02d}.png", exif=exif)
    dataset = load_captioned(str(folder), buckets=["16x48", "48x16"], validation_fraction=0)
    assert dataset.bucket_of.tolist() == [1, 1, 1, 0]
    assert dataset.batch([0])["images"].shape == (1, 3, 48, 16)


def test_empty_buckets_are_left_out(pictures):
    dataset = load_captioned(str(pictures), buckets=["8x80", "32x32", "16x48", "80x8", "48x16"], validation_fraction=0)
    assert dataset.shapes == [(3, 32, 32), (3, 16, 48), (3, 48, 16)]
