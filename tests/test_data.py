"""Images from every kind of source, bad sources, the stream of batches, and the latent cache."""

import json
import multiprocessing
import shutil
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgedit_hf import data
from edgedit_hf.data import ImageDataset, batch_indices, cache_latents, check_images, load_images, open_latents, step_loader
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
    held_out = load_images(str(class_folders), "validation", validation_fraction=0.4)
    assert held_out.labels.tolist() == [0, 0, 1, 1, 2, 2]


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
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 100)
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
        (damage, {}, "dog/03.png is corrupt or truncated"),
        (lambda root: (root / "dog/03.png").write_bytes(b""), {}, "dog/03.png is corrupt or truncated"),
        (lambda root: (root / "dog/03.png").write_text("not an image"), {}, "dog/03.png is corrupt or truncated"),
        (
            lambda root: picture(0, size=(8, 9)).save(root / "dog/03.png"),
            {},
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
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 100)
    dataset = load_images(str(class_folders), validation_fraction=0)
    with pytest.raises(EdgeDiTError, match="dog/03.png is corrupt or truncated"):
        dataset.batch(range(15))


def test_every_damaged_image_is_named_before_it_is_needed(class_folders, monkeypatch):
    check_images(load_images(validation_fraction=0))
    check_images(load_images(str(class_folders)))
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 100)
    check_images(load_images(str(class_folders), validation_fraction=0))
    damage(class_folders)
    for options in ({}, {"resolution": 16}):
        dataset = load_images(str(class_folders), validation_fraction=0, **options)
        with pytest.raises(EdgeDiTError, match="^The image .*dog/03.png is corrupt or truncated .* replace or remove it.$"):
            check_images(dataset)
    for name in ("cat/01.png", "test/00.png"):
        (class_folders / name).write_text("nothing")
    with pytest.raises(EdgeDiTError, match="3 of 15 images cannot be used: .*cat/01.png is .*dog/03.png is .*test/00.png is"):
        check_images(dataset)
    (class_folders / "test" / "00.png").unlink()
    with pytest.raises(EdgeDiTError, match="cat/01.png is .*dog/03.png is .*test/00.png cannot be read .No such file"):
        check_images(dataset)
    monkeypatch.setattr(data, "NAMED", 1)
    with pytest.raises(EdgeDiTError, match="3 of 15 images cannot be used: .*cat/01.png is [^;]*; replace or remove it. … and 2 more$"):
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
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 100)
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
