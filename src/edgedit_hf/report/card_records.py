"""What model cards read of the JSON files of a run and of exports, for [`schema.read_record`]. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..records import (
    COUNT,
    FIGURE,
    LAYERS,
    MS,
    Choice,
    Environment,
    Model,
    Quantization,
    Reference,
    Space,
    Whole,
)
from ..schema import key


@dataclass(kw_only=True)
class Reproduced:
    """How a run is repeated, in its report."""

    command: str = key(free=True, length=(1, 10**6))
    config: dict[str, Any] = key()
    yaml: str = key(free=True, length=(0, 10**7))


@dataclass(kw_only=True)
class SearchFigures:
    """What a report says of a search."""

    points: list[list[float]] = key(minimum=0.0, maximum=FIGURE, items=10**6, fewest=1)
    random_points: list[list[float]] = key(list, minimum=0.0, maximum=FIGURE, items=10**6)
    chosen: Choice = key()
    teacher: Whole = key()
    metric: str | None = key(None)


@dataclass(kw_only=True)
class GenotypeFigures:
    """What a report says of a student's layers."""

    hash: str = key()
    num_teacher_layers: int = key(minimum=1, maximum=LAYERS)
    layers: list[dict[str, Any]] = key(items=LAYERS, fewest=1)
    merged: list[list[int]] = key(minimum=0, maximum=LAYERS, items=LAYERS)
    options: dict[str, int] = key(minimum=0, maximum=LAYERS)


@dataclass(kw_only=True)
class BankSummary:
    """What a report says of a bank, as far as a card reads it."""

    space: Space = key()


@dataclass(kw_only=True)
class Timed:
    """How a report's models were timed."""

    batch_size: int | None = key(None, minimum=1, maximum=2**20)
    threads: int | None = key(None, minimum=1, maximum=4096)
    environment: Environment | None = key(None)


@dataclass(kw_only=True)
class WidthFigures:
    """A width of a few-step network in a report."""

    name: str = key()
    many: Model = key()
    few: Model = key()
    few_step: Model = key()


@dataclass(kw_only=True)
class FewStepFigures:
    """What a report says of few steps."""

    source: dict[str, Any] | None = key(None)
    widths: list[WidthFigures] = key(list, items=1000)


@dataclass(kw_only=True)
class CardReport:
    """report.json of either family, as cards are made of it."""

    models: list[Model] = key(items=1000)
    versions: dict[str, str] = key(items=1000)
    reproduce: Reproduced = key()
    reference: Reference | None = key(None)
    latency: Timed | None = key(None)
    search: SearchFigures | None = key(None)
    choice: dict[str, Any] | None = key(None)
    genotype: GenotypeFigures | None = key(None)
    bank: BankSummary | None = key(None)
    few_step: FewStepFigures | None = key(None)


@dataclass(kw_only=True)
class CheckedPart:
    """A file of an export in verify.json."""

    precision: str | None = key(None)
    relative_error: float | None = key(None, minimum=0.0, maximum=FIGURE)
    tolerance: float | None = key(None, minimum=0.0, maximum=FIGURE)


@dataclass(kw_only=True)
class Checked:
    """verify.json, as a card reads it."""

    precision: str = key()
    tolerance: float | None = key(None, minimum=0.0, maximum=FIGURE)
    relative_error: float | None = key(None, minimum=0.0, maximum=FIGURE)
    psnr_db: float | None = key(None, minimum=-FIGURE, maximum=FIGURE)
    images: int | None = key(None, minimum=0, maximum=COUNT)
    steps: int | None = key(None, minimum=1, maximum=COUNT)
    guidance_scale: float | None = key(None, minimum=0.0, maximum=FIGURE)
    passed: bool | None = key(None)
    source: str | None = key(None, path=True)
    not_run: str | None = key(None)
    parts: dict[str, CheckedPart] = key(dict, items=1000)


@dataclass(kw_only=True)
class Timing:
    """One of a batch's timings in bench.json."""

    median_ms: float = key(**MS)


@dataclass(kw_only=True)
class TimedBatch:
    """A batch size of bench.json."""

    batch: int = key(minimum=1, maximum=2**20)
    timings: dict[str, Timing] = key(items=1000)


@dataclass(kw_only=True)
class Benched:
    """bench.json, as a card reads it."""

    file_bytes: int | None = key(None, minimum=0, maximum=2**62)
    latency: list[TimedBatch] = key(list, items=1000)
    environment: Environment | None = key(None)


@dataclass(kw_only=True)
class LayerForm:
    """A layer of quantization.json."""

    weights: int = key(minimum=0, maximum=COUNT)
    num_bits: int = key(minimum=0, maximum=10**14)
    spec: dict[str, Any] | None = key(None)


@dataclass(kw_only=True)
class Quantized(Quantization):
    """quantization.json, as a card reads it."""

    bytes: int = key(minimum=0, maximum=2**62)
    layers: dict[str, LayerForm] = key(items=10**6)
