"""What a figure of quality was measured with: two figures can be compared where the protocol of their stamps is one.
No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import EdgeDiTError
from .schema import key

PROTOCOL = ("extractor", "extractor_hash", "reference", "reference_count", "count", "rounding", "prompts")
"""The parts of a stamp that belong to the judge: figures that differ in one measure different things. The others, such
as seed and steps, are the model's or its run's.
"""


@dataclass(kw_only=True)
class Stamp:
    """The entry `stamp` of a result.

    Args:
        extractor, extractor_hash: what images are compared in. reference: SHA-256 of what they are compared with: of an
            `.npz` file, or over all images as they are stored.
        reference_count: its images; null: statistics that do not say.
        count: generated images. rounding: whether they were rounded to bytes first.
        prompts: hash of what they were asked to show, where prompts were given; null: none, or the data's own.
        seed, scheduler, steps, guidance_scale, dtype: how they were made; null: it is not known.
        vae, vae_hash: class and weights of what decoded them; null: nothing did.
    """

    extractor: str = key()
    extractor_hash: str = key()
    reference: str = key()
    reference_count: int | None = key(None, minimum=1, maximum=10**12)
    count: int = key(minimum=1, maximum=10**12)
    rounding: str = key(choices=("bytes", "none"))
    prompts: str | None = key(None)
    seed: int | None = key(None, minimum=0, maximum=2**64)
    scheduler: str | None = key(None)
    steps: int | None = key(None, minimum=1, maximum=10**12)
    guidance_scale: float | None = key(None, minimum=0.0, maximum=1e30)
    dtype: str | None = key(None)
    vae: str | None = key(None)
    vae_hash: str | None = key(None)


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Every part in which two stamps differ, with both values."""
    return {part: (a.get(part), b.get(part)) for part in Stamp.__dataclass_fields__ if a.get(part) != b.get(part)}


def protocol(stamp: Mapping[str, Any] | None) -> tuple[Any, ...] | None:
    """The judge's part of a stamp; `None` of a result without one, as earlier versions wrote them."""
    return None if stamp is None else tuple(stamp.get(part) for part in PROTOCOL)


def check_comparable(stamps: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Raise unless the results with these stamps, by the names of their models, were judged alike; one without a stamp
    is taken as it is.

    Raises:
        EdgeDiTError: naming two models, the part in which they differ, and its values.
    """
    known = [(name, stamp) for name, stamp in stamps.items() if stamp is not None]
    for name, stamp in known[1:]:
        first, other = known[0]
        for part, (one, two) in differences(other, stamp).items():
            if part in PROTOCOL:
                raise EdgeDiTError(
                    f"{first} and {name} were not judged alike: {part} is {one!r} of {first} and {two!r} of {name}. "
                    "Evaluate both with the same extractor, reference, number of images, rounding and prompts."
                )
