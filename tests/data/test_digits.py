"""The written captions of the digits: measured words, balanced, held-out combinations, read back."""

import math
from collections import Counter

import pytest
import torch

from edgedit_hf.data.captions import (
    load_captioned,
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
