"""A device of known speed: what its networks take is trunk + Σ layers, times a speed that a round has."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgedit_hf.genotype import Genotype
from edgedit_hf.phone.bundle import Bundle
from edgedit_hf.phone.devices import Course, Hello
from edgedit_hf.phone.results import Row

TRUNK_MS, LAYER_MS = 9.0, (30.0, 23.7, 19.1, 14.9)  # what is around the layers, and each of four shapes


def true_ms(bundle: Bundle, genotype: Genotype, trunk: float = TRUNK_MS, layer: Sequence[float] = LAYER_MS) -> float:
    """What a genotype takes on the device."""
    costs = dict(zip(bundle.plan.shapes, layer, strict=True))
    return trunk + sum(costs[spec.shape.timed] for spec in genotype.layers)


def measure(
    bundle: Bundle,
    speeds: Sequence[float] = (1.0,) * 20,
    trunk: float = TRUNK_MS,
    layer: Sequence[float] = LAYER_MS,
    scatter: float = 0.0,
    **changes,
) -> list[Row]:
    """The rows of a whole measurement: 3 loads, 3 warm-ups, and a round at each speed, with some scatter.

    Args:
        changes: values of all rows.
    """
    costs, draw = dict(zip(bundle.plan.shapes, layer, strict=True)), np.random.default_rng(0)
    rounds = [("cold", number, 5.0) for number in range(3)] + [("warm", number, 2.0) for number in range(3)]
    rounds += [("timed", number, speed) for number, speed in enumerate(speeds)]
    said = {"device": "SM-S938B", "backend": "cpu", "threads": 4, "version": "1.31.1", "battery": 0.8}
    rows = []
    for phase, number, speed in rounds:
        for name, key in bundle.networks.items():
            ms = speed * (trunk + sum(costs[shape] for shape in bundle.plan.networks[key])) * draw.normal(1, scatter)
            at = f"2026-01-31T10:{len(rows) // 60 % 60:02}:{len(rows) % 60:02}Z"
            own = {"bundle": bundle.hash, "network": name, "phase": phase, "round": number, "ms": float(ms), "time": at}
            rows.append(Row(**{**own, **said, **changes}))
    return rows


@dataclass
class Said:
    """What a phone's page says: its hello, and every row of a measurement; post(rows) is what carries them."""

    hello: dict[str, Any]
    expected: list[Row]
    session: str

    def rows(self) -> list[dict[str, Any]]:
        """As plain values."""
        return [asdict(row) for row in self.expected]

    def post(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What is sent."""
        return {"session": self.session, "tab": self.hello["tab"], "rows": list(rows)}


def said_by(bundle: Bundle, *, client: str = "a" * 32, tab: str = "1" * 32, ms: float = 10.0, **changes) -> Said:
    """A phone that measures a bundle, every run in `ms`.

    Args:
        changes: of what it says of itself.
    """
    setting = {"device": "Pixel 9", "browser": "Chromium 140", "backend": "wasm", "threads": 4, "version": "1.30.0"}
    setting |= {"bundle": bundle.hash, **changes}
    hello = {"client": client, "tab": tab, **setting}
    course = Course.of(bundle)
    rows = [
        Row(network=network, phase=phase, round=number, ms=ms, time="2026-01-31T10:00:00Z", **setting)
        for phase, count in course.counts.items()
        for number in range(count)
        for network in course.networks
    ]
    return Said(hello, rows, Hello(**hello).name)
