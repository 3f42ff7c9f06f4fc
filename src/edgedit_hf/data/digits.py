"""The embedded digits, and captions written for them from what can be measured in each image."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .batches import stream_generator
from .datasets import ImageDataset

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


def digit_captions(digits: ImageDataset, seed: int) -> tuple[list[str], np.ndarray]:
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


def load_digit_images(resolution: int | None, channels: int | None, labelled: bool) -> ImageDataset:
    """scikit-learn's digits, all 1,797 in their order."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels, pixel_max = digits.images.astype(np.uint8), 16  # values 0 … 16
    if resolution not in (None, 8):
        size = (resolution, resolution)
        resized = [
            Image.fromarray(image.astype(np.float32)).resize(size, Image.Resampling.BILINEAR) for image in digits.images
        ]
        pixels, pixel_max = np.stack([np.rint(np.asarray(image) * 255 / 16).astype(np.uint8) for image in resized]), 255
    pixels = np.repeat(pixels[:, None], channels or 1, axis=1)
    names = [str(i) for i in range(10)] if labelled else ()
    return ImageDataset(pixels, digits.target, names, pixel_max=pixel_max, name="digits")
