"""Images from every kind of source: folders, metadata, tables, saved datasets, and bad ones of each."""

import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import damage, everything, picture, save_pictures
from PIL import Image

from edgedit_hf.data.images import load_images
from edgedit_hf.errors import EdgeDiTError


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
