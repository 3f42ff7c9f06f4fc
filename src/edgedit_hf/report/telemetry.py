"""The telemetry of a run's stages as the page of its report draws it: bounded, one series a metric. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..records import FIGURE, Telemetry
from ..run.stage import Stage
from ..schema import read_lines

POINTS, METRICS = 200, 24
"""Of a series, and of a stage, at most."""

TIME, SPEED = "seconds since the start", "steps a second"


def telemetry(run_dir: Path, table: Sequence[Stage]) -> list[dict[str, Any]]:
    """What the stages of a table logged, in their order; a stage that logged nothing is left out.

    Returns:
        Of each folder its `name`, `label` (what the stage does), and `series`: by metric [steps, values], each value
        the mean over its part of the run. Time and speed are series too.

    Raises:
        EdgeDiTError: a line is damaged (the stage that writes it is named).
    """
    found = []
    for stage in table:
        for folder in stage.folders:
            path = run_dir / folder / "telemetry.jsonl"
            series = _series(read_lines(path, Telemetry, stage.made_by)) if path.is_file() else {}
            if series:
                found.append({"name": folder, "label": stage.label, "series": series})
    return found


def _series(lines: Sequence[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """By metric [steps, values] of what is a number."""
    raw: dict[str, list[tuple[int, float]]] = {}
    before = (0, 0.0)
    for line in lines:
        step, seconds = line["step"], line.get("seconds")
        for name, value in line.items():
            if name not in ("step", "seconds") and _is_number(value):
                raw.setdefault(name, []).append((step, value))
        if _is_number(seconds):
            raw.setdefault(TIME, []).append((step, seconds))
            if step > before[0] and seconds > before[1]:
                raw.setdefault(SPEED, []).append((step, (step - before[0]) / (seconds - before[1])))
            before = step, seconds
    names = [name for name in raw if name not in (TIME, SPEED)][: METRICS - 2]
    return {name: thinned(raw[name]) for name in (*names, TIME, SPEED) if name in raw} if names else {}


def thinned(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[list[float]]:
    """[steps, values] of at most so many points: means of as many neighbours, at the last one's step."""
    size = -(-len(points) // most)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    values = [math.fsum(value for _, value in part) / len(part) for part in parts]
    return [[part[-1][0] for part in parts], [float(f"{value:.5g}") for value in values]]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= FIGURE
