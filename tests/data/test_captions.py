"""Captions that fit their images, sources and bad ones, buckets, the stream of batches, cached latents and text
embeddings.
"""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from edgedit_hf.data.batches import bucket_batch, caption_loader
from edgedit_hf.data.captions import (
    cache_captioned_latents,
    load_captioned,
    nearest_bucket,
    open_captioned_latents,
    parse_buckets,
)
from edgedit_hf.data.digits import (
    HELD_OUT,
    STYLES,
    TEMPLATES,
    is_held_out,
    measure_style,
    parse_caption,
    style_words,
    write_caption,
)
from edgedit_hf.data.images import load_images
from edgedit_hf.data.text_table import TextTable, encoders_hash, text_table
from edgedit_hf.errors import EdgeDiTError

SIZES = [(40, 40), (20, 60), (60, 20), (48, 44), (30, 80), (90, 30), (32, 32), (24, 70), (64, 20)]  # height, width


def save_captioned(folder: Path, sizes=SIZES, captions_of=lambda i: f"picture {i}", key: str = "text") -> Path:
    """A folder of coloured pictures whose top left corner says their number, with metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (height, width) in enumerate(sizes):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
            folder / f"{i:02d}.png"
        )
        line = {"file_name": f"{i:02d}.png"} | ({} if captions_of(i) is None else {key: captions_of(i)})
        lines.append(json.dumps(line) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def digits():
    return {split: load_captioned(split=split) for split in ("train", "validation", "held_out")}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return save_captioned(tmp_path_factory.mktemp("captioned") / "pictures")


@pytest.fixture(scope="module")
def bucketed(pictures):
    return load_captioned(str(pictures), buckets=["32x32", "16x48", "48x16"], validation_fraction=0)


# ------------------------------------------------------------------ the digits' captions


def bar(x_of_row, thickness: int) -> torch.Tensor:
    """A stroke down an 8x8 image whose left edge at each row is given."""
    image = -torch.ones(1, 1, 8, 8)
    for y in range(1, 7):
        x = x_of_row(y)
        image[0, 0, y, x : x + thickness] = 1
    return image


def test_measures_see_what_they_are_named_after():
    thin, thick = measure_style(bar(lambda y: 3, 1)), measure_style(bar(lambda y: 3, 3))
    assert thick["stroke"] > 1.5 * thin["stroke"] and thick["width"] > thin["width"]
    assert abs(float(thin["slant"])) < 1e-12
    right, left = (
        measure_style(bar(lambda y: 6 - y, 2)),
        measure_style(bar(lambda y: y - 1, 2)),
    )  # the top leans right: /
    assert right["slant"] == pytest.approx(1) and left["slant"] == pytest.approx(-1)
    # A line one pixel wide has 1 pixel of area a unit of length and two sides.
    assert float(thin["stroke"]) == pytest.approx(2 * 6 / (2 * 6 + math.sqrt(2)), abs=0.15)


def test_measures_of_larger_three_channel_and_empty_images():
    images = load_images().batch(range(50))["images"]
    large = images.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    for name, values in measure_style(images).items():
        torch.testing.assert_close(measure_style(large)[name], values)
    empty = measure_style(-torch.ones(1, 1, 8, 8))
    assert all(value == 0 for value in empty.values())


def test_every_caption_says_the_digit_and_words_that_fit_its_image(digits):
    for split in digits.values():
        found = style_words(split.batch(range(len(split)))["images"], split.labels)
        for caption, digit, words in zip(split.captions, split.labels.tolist(), found):
            said = parse_caption(caption)
            assert said.pop("digit") == digit, caption
            assert all(word in (None, words[style]) for style, word in said.items()), caption


def test_style_words_are_frequent_balanced_and_leave_the_middle_out(digits):
    train = digits["train"]
    said = Counter(word for caption in train.captions for word in list(parse_caption(caption).values())[1:])
    words = [word for pair in STYLES.values() for word in pair]
    assert all(0.18 < said[word] / len(train) < 0.3 for word in words), said
    nothing = sum(not any(list(parse_caption(caption).values())[1:]) for caption in train.captions)
    assert nothing > 0.05 * len(train)
    # No word stands for a digit: each digit has each word, or it is held out.
    pairs = Counter(
        (digit, word)
        for digit, caption in zip(train.labels.tolist(), train.captions)
        for word in parse_caption(caption).values()
    )
    for digit in range(10):
        for word in words:
            assert (pairs[digit, word] == 0) == ((digit, word) in HELD_OUT)
            assert pairs[digit, word] > 10 or (digit, word) in HELD_OUT
    assert {caption.split()[0] for caption in train.captions} == {"a", "an", "the"}
    assert all(f"a {number}" not in caption for caption in train.captions for number in ("eight", "8"))


def test_held_out_combinations_are_only_in_their_split(digits):
    train, validation, held_out = digits.values()
    for split, there in ((train, False), (validation, False), (held_out, True)):
        found = style_words(split.batch(range(len(split)))["images"], split.labels)
        assert {is_held_out(digit, words) for digit, words in zip(split.labels.tolist(), found)} == {there}
    # The caption of a held-out image always says the word that makes it one.
    assert all(is_held_out(said.pop("digit"), said) for said in map(parse_caption, held_out.captions))
    assert len(train) + len(validation) + len(held_out) == 1797 and len(held_out) > 150
    images = {bytes(image.numpy()) for split in digits.values() for image in split.batch(range(len(split)))["images"]}
    assert len(images) == 1797
    # Apart from the held-out images the split is that of load_images.
    assert {bytes(i.numpy()) for i in train.batch(range(len(train)))["images"]} <= {
        bytes(i.numpy()) for i in load_images().batch(range(1438))["images"]
    }


def test_captions_are_a_function_of_the_seed(digits):
    again, other = load_captioned(), load_captioned(seed=1)
    assert again.captions == digits["train"].captions and again.fingerprint == digits["train"].fingerprint
    assert other.fingerprint != again.fingerprint and other.captions[:40] != again.captions[:40]
    large = load_captioned(resolution=16, channels=3)
    assert large.captions == again.captions and large.shape == (3, 16, 16)


@pytest.mark.parametrize("template", range(len(TEMPLATES)))
@pytest.mark.parametrize("numeral", [False, True])
def test_captions_read_back(template, numeral):
    for digit in range(10):
        for words in ({}, {"stroke": "thick"}, {"stroke": "thin", "width": "wide", "slant": "left"}):
            caption = write_caption(digit, words, template, numeral)
            assert parse_caption(caption) == {"digit": digit, **{style: words.get(style) for style in STYLES}}, caption
            assert "  " not in caption and "{" not in caption and not caption.endswith((" ", ","))


def test_captions_of_other_words():
    assert parse_caption("A Wide EIGHT, Slanted to the right!") == {
        "digit": 8,
        "stroke": None,
        "width": "wide",
        "slant": "right",
    }
    assert parse_caption("a cat")["digit"] is None and parse_caption("number 12")["digit"] is None


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


# ------------------------------------------------------------------ batches


def test_one_bucket_a_batch_in_exact_proportion_and_every_image_once_an_epoch():
    bucket_of = torch.tensor([0] * 12 + [1] * 6 + [2] * 3)[
        torch.randperm(21, generator=torch.Generator().manual_seed(0))
    ]
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    order = []
    for step in range(42):
        rows = bucket_batch(bucket_of, 3, 7, step)
        (bucket,) = bucket_of[rows].unique().tolist()
        seen[bucket] += rows.tolist()
        order.append(bucket)
    assert Counter(order) == {0: 24, 1: 12, 2: 6} and Counter(order[:21]) == {0: 12, 1: 6, 2: 3}
    assert order[:21] != order[21:] and order[:21] != sorted(order[:21])
    for bucket, rows in seen.items():
        members = torch.nonzero(bucket_of == bucket).flatten().tolist()
        for start in range(0, len(rows), len(members)):
            assert sorted(rows[start : start + len(members)]) == members


def test_the_stream_is_a_function_of_seed_and_step(bucketed):
    whole = {step: batch for step, _, batch in caption_loader(bucketed, 4, 3, 0, 12)}
    for step, rows, batch in caption_loader(bucketed, 4, 3, 5, 12, rank=1, world_size=2, num_workers=1):
        assert rows.tolist() == [2, 3]
        assert torch.equal(batch["images"], whole[step]["images"][2:]) and torch.equal(
            batch["rows"], whole[step]["rows"][2:]
        )
    assert len({batch["images"].shape for batch in whole.values()}) == 3
    with pytest.raises(EdgeDiTError, match="cannot be divided between 3 ranks"):
        next(caption_loader(bucketed, 4, 3, 0, 1, world_size=3))


def test_one_bucket_streams_as_uncaptioned_images_do(digits):
    from edgedit_hf.data.batches import batch_indices

    train = digits["train"]
    for step in (0, 11, 400):
        assert bucket_batch(train.bucket_of, 128, 5, step).tolist() == batch_indices(len(train), 128, 5, step).tolist()


# ------------------------------------------------------------------ latents


@pytest.fixture(scope="module")
def vae():
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    blocks = {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    }
    return AutoencoderTiny(latent_channels=4, **blocks).eval().requires_grad_(False)


def test_cached_latents_of_buckets(bucketed, vae, tmp_path):
    with pytest.raises(EdgeDiTError, match="does not exist"):
        open_captioned_latents(bucketed, tmp_path / "latents")
    latents = cache_captioned_latents(bucketed, vae, tmp_path / "latents", batch_size=2)
    assert latents.captions == bucketed.captions and torch.equal(latents.bucket_of, bucketed.bucket_of)
    assert latents.shapes == [(4, 16, 16), (4, 8, 24), (4, 24, 8)] and latents.fingerprint != bucketed.fingerprint
    for rows in ([0, 6], [4], [8, 2]):
        wanted = vae.encode(bucketed.batch(rows)["images"]).latents * vae.config.scaling_factor
        torch.testing.assert_close(latents.batch(rows)["images"], wanted)
    shutil.rmtree(tmp_path / "latents" / "bucket-1" / "shard-00000")  # as a killed run leaves it
    again = cache_captioned_latents(bucketed, vae, tmp_path / "latents", batch_size=2)
    assert again.fingerprint == latents.fingerprint
    streams = zip(caption_loader(latents, 2, 0, 0, 6), caption_loader(bucketed, 2, 0, 0, 6))
    assert all(torch.equal(a[2]["rows"], b[2]["rows"]) for a, b in streams)


# ------------------------------------------------------------------ text embeddings


class Texts:
    """A pipeline's text part: a real tiny T5 encoder, no first one, and a count of the prompts that were encoded."""

    def __init__(self, seed: int = 0) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

        words = Tokenizer(
            models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "cat": 3, "dog": 4, "black": 5}, unk_token="<unk>")
        )
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer_2 = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
        torch.manual_seed(seed)
        config = T5Config(vocab_size=6, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.0)
        self.text_encoder_2 = T5EncoderModel(config).eval()
        self.text_encoder = self.tokenizer = None
        self.config = {"max_sequence_length": 16}
        self.encoded: list[str] = []

    def encode_prompt(self, prompt, max_sequence_length=16):
        self.encoded += prompt
        found = self.tokenizer_2(
            prompt, padding=True, truncation=True, max_length=max_sequence_length, return_tensors="pt"
        )
        states = self.text_encoder_2(input_ids=found.input_ids, attention_mask=found.attention_mask).last_hidden_state
        return [None, states], [None, found.attention_mask.bool()]


CAPTIONS = ["a cat", "a black dog", "a cat", "cat", "a black black cat dog", "dog"]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("edgedit_hf.data.text_table.TEXT_SHARD", 2)


@pytest.mark.parametrize("in_memory", [True, False])
def test_text_table_gives_each_row_its_caption(small_shards, monkeypatch, tmp_path, in_memory):
    monkeypatch.setattr("edgedit_hf.data.text_table.IN_MEMORY_BYTES", 1 << 20 if in_memory else 0)
    texts = Texts()
    table = text_table(texts, CAPTIONS, tmp_path / "texts", batch_size=2)
    assert len(table) == 6 and table.dims == [0, 8] and table.lengths == [0, 5]
    assert Counter(texts.encoded)["a cat"] == 1  # equal captions are encoded once (the first, also to find the widths)
    embeds, masks = table.batch(torch.tensor([4, 0, 2, 3]))
    assert embeds[0] is None and masks[0] is None
    assert (
        embeds[1].shape == (4, 5, 8) and embeds[1].dtype == torch.float32 and masks[1].sum(1).tolist() == [5, 2, 2, 1]
    )
    for row, caption in enumerate(["a black black cat dog", "a cat", "a cat", "cat"]):
        (_, states), _ = texts.encode_prompt([caption])
        torch.testing.assert_close(embeds[1][row][masks[1][row]], states[0])
    assert embeds[1][1, 2:].abs().max() == 0
    assert TextTable(tmp_path / "texts", CAPTIONS).fingerprint == table.fingerprint


def test_text_table_of_an_encoder_without_masks(tmp_path):
    texts = Texts()
    encode = texts.encode_prompt
    texts.encode_prompt = lambda prompts, **options: (encode(prompts, **options)[0], [None, None])
    table = text_table(texts, ["a cat", "black dog"], tmp_path / "texts")
    _, masks = table.batch([0, 1])
    assert table.lengths == [0, 2] and masks[1].all()


def test_text_table_continues_where_it_was_killed(small_shards, tmp_path):
    text_table(Texts(), CAPTIONS, tmp_path / "whole", batch_size=2)
    text_table(Texts(), CAPTIONS, tmp_path / "killed", batch_size=2)
    shutil.rmtree(tmp_path / "killed" / "shard-00001")
    (tmp_path / "killed" / ".shard-00001.tmp-1").mkdir()
    with pytest.raises(EdgeDiTError, match="1 of 3 parts are missing"):
        TextTable(tmp_path / "killed", CAPTIONS)
    texts = Texts()
    text_table(texts, CAPTIONS, tmp_path / "killed", batch_size=2)
    assert sorted(texts.encoded) == sorted(set(CAPTIONS))[2:4]
    files = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
        for folder in tmp_path.iterdir()
    ]
    assert files[0] == files[1]


def test_text_table_of_others_is_refused(tmp_path):
    texts = Texts()
    table = text_table(texts, CAPTIONS, tmp_path / "texts")
    with pytest.raises(EdgeDiTError, match="made with the captions .* but this run has"):
        text_table(texts, [*CAPTIONS, "black"], tmp_path / "texts")
    with pytest.raises(EdgeDiTError, match="made with the encoders .* but this run has"):
        text_table(Texts(seed=1), CAPTIONS, tmp_path / "texts")
    with pytest.raises(EdgeDiTError, match="made with the encoders"):
        text_table(texts, CAPTIONS, tmp_path / "texts", max_sequence_length=2)
    with pytest.raises(EdgeDiTError, match="made of other captions"):
        TextTable(tmp_path / "texts", ["black"])
    with pytest.raises(EdgeDiTError, match="no captions"):
        text_table(texts, [], tmp_path / "other")
    # Rows in another order share the cache, but not the fingerprint.
    assert text_table(texts, CAPTIONS[::-1], tmp_path / "texts").fingerprint != table.fingerprint


def test_a_damaged_text_table(tmp_path):
    text_table(Texts(), CAPTIONS, tmp_path / "texts")
    file = tmp_path / "texts" / "shard-00000" / "text.safetensors"
    file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(EdgeDiTError, match=r"shard-00000/text.safetensors is damaged .* delete"):
        text_table(Texts(), CAPTIONS, tmp_path / "texts")
    (tmp_path / "texts" / "index.json").write_text("{}")
    with pytest.raises(EdgeDiTError, match="does not describe a text cache"):
        text_table(Texts(), CAPTIONS, tmp_path / "texts")


def test_embeddings_that_are_nan(tmp_path):
    texts = Texts()
    with torch.no_grad():
        texts.text_encoder_2.encoder.final_layer_norm.weight.fill_(torch.nan)
    with pytest.raises(EdgeDiTError, match="encoder 2 .* NaN"):
        text_table(texts, CAPTIONS, tmp_path / "texts")


def test_the_hash_of_encoders_sees_weights_and_vocabulary_but_not_use():
    texts = Texts()
    before = encoders_hash(texts)
    texts.encode_prompt(["a cat", "a black dog"])  # sets padding and truncation in the tokenizer
    assert encoders_hash(texts) == before
    assert encoders_hash(texts, 16) == before != encoders_hash(texts, 8)
    assert (
        encoders_hash(SimpleNamespace(config={}, text_encoder=texts.text_encoder_2, tokenizer=texts.tokenizer_2))
        != before
    )
    texts.tokenizer_2.add_tokens(["bird"])
    assert encoders_hash(texts) != before
