"""Ranges of an export's options, checked before anything is loaded. No torch."""

from __future__ import annotations

import math
from typing import Any

from ..errors import EdgeDiTError

RANGES = {  # least, greatest
    "images": (1, 10_000),
    "threads": (1, 1024),
    "batch": (1, 1024),
    "seed": (0, 2**63 - 1),
    "opset": (18, 99),  # up to what the installed onnx knows, which is asked when it is loaded
    "resolution": (8, 4096),
    "tolerance": (0.0, 1e6),
    "min-psnr": (0.0, 200.0),
    "image-size": (8, 4096),
    "num-classes": (0, 1_000_000),
    "heads": (1, 1024),
    "decoder-layers": (1, 1024),
    "max-latency-ms": (0.0, 1e9),
    "max-parameters-ratio": (0.0, 1e6),
}
POSITIVE = ("tolerance", "max-latency-ms", "max-parameters-ratio")  # 0 is none of their values


def check_ranges(**given: Any) -> None:
    """Raise unless each option that is given is in its range of [`RANGES`]; `_` in a name stands for `-`.

    Raises:
        EdgeDiTError: naming the option, its value and its range.
    """
    for key, value in given.items():
        name = key.replace("_", "-")
        least, greatest = RANGES[name]
        whole = isinstance(least, int)
        if value is None:
            continue
        try:
            number = (int if whole else float)(value)
            fits = (
                least <= number <= greatest
                and (not whole or number == float(value) or isinstance(value, str))
                and math.isfinite(number)
            )
            fits = fits and not isinstance(value, bool) and not (number == 0 and name in POSITIVE)
        except (TypeError, ValueError, OverflowError):
            fits = False
        if not fits:
            kind = "a whole number" if whole else "a number"
            start = f"above {least:g}, up to" if name in POSITIVE else f"from {least:g} to"
            end = "2^63 - 1" if greatest == 2**63 - 1 else f"{greatest:g}" if not whole else f"{greatest}"
            raise EdgeDiTError(f"--{name} is {value}; give {kind} {start} {end}.")
