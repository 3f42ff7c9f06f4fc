"""Do generated digits show what their caption says? The captions that they are judged on, and the shares that agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..data.captions import CaptionedDataset
from ..data.digits import STYLES, parse_caption, style_words
from .extractors import IndependentClassifier


def judged_captions(held_out: CaptionedDataset, count: int) -> list[str]:
    """`count` captions of held-out images, again from the first where there are fewer; the digits' begin with one of
    each that has a style.
    """
    captions = held_out.captions
    if held_out.labels is not None and held_out.label_names:
        telling = sorted(
            range(len(captions)),
            key=lambda row: -sum(parse_caption(captions[row])[style] is not None for style in STYLES),
        )
        first = [
            next(row for row in telling if held_out.labels[row] == digit) for digit in range(len(held_out.label_names))
        ]
        captions = [captions[row] for row in first] + [
            caption for row, caption in enumerate(captions) if row not in first
        ]
    return [captions[i % len(captions)] for i in range(count)]


def agreement(images: torch.Tensor, captions: list[str], classifier: IndependentClassifier) -> dict[str, float]:
    """Shares of generated digits that are what their caption says: the digit (`class_agreement`), and each style, where
    one is said.
    """
    said = [parse_caption(caption) for caption in captions]
    digits = torch.tensor([one["digit"] for one in said])
    found = style_words(images, digits)
    shares = {"class_agreement": float((classifier.predict(images) == digits).double().mean())}
    for style in STYLES:
        asked = [row for row, one in enumerate(said) if one[style] is not None]
        if asked:
            shares[style] = sum(found[row][style] == said[row][style] for row in asked) / len(asked)
    return shares


def agreements(
    made: Mapping[str, torch.Tensor], sets: Mapping[str, list[str]], classifier: IndependentClassifier
) -> dict[str, Any]:
    """What an evaluation says of prompts: [`agreement`] of `captions`, digit and styles apart, and of `held_out`.

    Args:
        made: images of each set. sets: its captions.
    """
    shares = {name: agreement(images, sets[name], classifier) for name, images in made.items()}
    return {
        "class_agreement": shares["captions"].pop("class_agreement"),
        "style_agreement": shares["captions"],
        "held_out": {"num_samples": len(sets["held_out"]), **shares["held_out"]},
    }
