"""What a device measured: one row a run of a network, the same in a posted JSON object and in a line of a CSV file; and
what the rows come to. No torch.
"""

from __future__ import annotations

import csv
import io
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import EdgeDiTError
from ..files import explain_write_errors
from ..records import MS
from ..schema import check, hints_of, key, shorten

COLD_LOADS, WARMUPS, ROUNDS = 3, 3, 20  # of the protocol, for every network
THROTTLED = 0.05  # a slow-down from the first rounds to the last ones that is flagged
SHARE = 5  # drift is measured from the first fifth of the rounds to the last one
ROWS = 10**6  # of a file
LARGEST_FILE = 2**30  # bytes
PHASES = ("cold", "warm", "timed")
TIME = "2000-01-01T00:00:00Z"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run of a network on a device.

    Args:
        bundle: the hash of what was measured. network: its name there.
        phase: cold (a load, its first run not in it), warm (a run that does not count) or timed.
        round: its number among the network's runs of this phase, from 0; round i of all networks ran next to each
            other.
        ms: milliseconds.
        device, browser: what they call themselves; browser is empty outside one.
        backend: what computed: "wasm", "webgpu", "cpu", "xnnpack", "cpuAndNeuralEngine", …
        threads: that it was allowed.
        version: of the runtime.
        battery: charge, 0 to 1; temperature: in °C; where the device tells.
        time: when it ended, in UTC, as ISO 8601 writes it (2026-01-31T23:59:59Z, with or without a fraction).
    """

    bundle: str = key(length=(8, 64))
    network: str = key(length=(1, 100))
    phase: str = key(choices=PHASES)
    round: int = key(minimum=0, maximum=10**6)
    ms: float = key(**MS)
    device: str = key(length=(1, 300))
    browser: str = key("", length=(0, 500))
    backend: str = key(length=(1, 100))
    threads: int = key(minimum=1, maximum=4096)
    version: str = key(length=(1, 100))
    battery: float | None = key(None, minimum=0.0, maximum=1.0)
    temperature: float | None = key(None, minimum=-50.0, maximum=150.0)
    time: str = key(length=(len(TIME), 40))

    @property
    def place(self) -> tuple[str, str, int]:
        """Which run it was."""
        return self.network, self.phase, self.round

    @property
    def setting(self) -> dict[str, Any]:
        """What all rows of one measurement share."""
        return {name: getattr(self, name) for name in ("bundle", "device", "browser", "backend", "threads", "version")}


COLUMNS = tuple(field.name for field in fields(Row))


def row_of(values: Any, source: str) -> Row:
    """A row from plain values, as a device posts them: every column and no other one.

    Args:
        source: what messages call its place.

    Raises:
        EdgeDiTError: a key is missing or unknown, or a value is no such value.
    """
    if not isinstance(values, Mapping):
        raise EdgeDiTError(f"{source}: it is {shorten(values)}; it must hold keys and values.")
    if unknown := [name for name in values if name not in COLUMNS]:
        raise EdgeDiTError(f"{source}: unknown key {shorten(unknown[0])}; the keys are {', '.join(COLUMNS)}.")
    try:
        check(values, Row)
        _check_time(values["time"])
    except EdgeDiTError as error:
        raise EdgeDiTError(f"{source}: {error}") from None
    numbers = {name: float(values[name]) for name in ("ms", "battery", "temperature") if values.get(name) is not None}
    return Row(**{**values, **numbers})


def _check_time(text: str) -> None:
    from datetime import datetime

    try:
        if not text.endswith("Z"):
            raise ValueError
        datetime.fromisoformat(text.removesuffix("Z"))
    except ValueError:
        raise EdgeDiTError(f"time is {shorten(text)}; it must be UTC as in {TIME}.") from None


# -------------------------------------------------------------------- files


def read_rows(path: str | os.PathLike) -> list[Row]:
    """The rows of a CSV file with a header of [`COLUMNS`], in any order. A last line that was cut off (no line break
    ends it) is left out.

    Raises:
        EdgeDiTError: it cannot be read, or a line is no row; the line is named.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise EdgeDiTError(f"{path} has {path.stat().st_size} bytes; results have at most {LARGEST_FILE}.")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeDiTError(
            f"{path} cannot be read ({error}); give the CSV file that a device's results are in."
        ) from None
    text = text[: text.rfind("\n") + 1]
    try:
        lines = list(csv.reader(io.StringIO(text), strict=True))
    except csv.Error as error:
        raise EdgeDiTError(f"{path} is no CSV file: {error}.") from None
    header = lines[0] if lines else []
    if sorted(header) != sorted(COLUMNS):
        lacking = [name for name in COLUMNS if name not in header]
        other = [name for name in header if name not in COLUMNS]
        raise EdgeDiTError(
            f"{path}: its first line is {shorten(','.join(header))}; "
            f"{'it lacks ' + ', '.join(lacking) if lacking else 'it names ' + shorten(other or header) + ' too much'}. "
            f"The columns are {','.join(COLUMNS)}."
        )
    if len(lines) > ROWS:
        raise EdgeDiTError(f"{path} has {len(lines) - 1} rows; results have at most {ROWS}.")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        if len(line) != len(header):
            raise EdgeDiTError(f"{path}, line {number}: it has {len(line)} values, the first line {len(header)}.")
        rows.append(row_of(_typed(dict(zip(header, line)), f"{path}, line {number}"), f"{path}, line {number}"))
    return rows


def _typed(values: dict[str, str], source: str) -> dict[str, Any]:
    """Texts of a CSV line as the schema's types; an empty one is none where there may be none."""
    typed: dict[str, Any] = {}
    for name, text in values.items():
        hint = hints_of(Row)[name]
        if hint is str:
            typed[name] = text
        elif text == "" and hint == float | None:
            typed[name] = None
        else:
            kind = int if hint is int else float
            try:
                typed[name] = kind(text)
            except (ValueError, OverflowError):
                words = "a whole number" if kind is int else "a number"
                raise EdgeDiTError(f"{source}: {name} is {shorten(text)}; it must be {words}.") from None
    return typed


def append_rows(path: str | os.PathLike, rows: Iterable[Row]) -> None:
    """Add rows to a CSV file, which is made with its header if it is not there; on return they are on the disk. A line
    that an earlier kill cut off goes.
    """
    path = Path(path)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            file.seek(0)
            kept = file.read().rfind(b"\n") + 1
            file.truncate(kept)
            if kept == 0:
                writer.writeheader()
            writer.writerows(
                {name: "" if value is None else value for name, value in asdict(row).items()} for row in rows
            )
            file.write(text.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())


# -------------------------------------------------------------------- what they come to


@dataclass(frozen=True)
class Summary:
    """A network's runs: median, 90th percentile and interquartile range of the timed ones, and the median load, in ms;
    `samples` by round.
    """

    median_ms: float
    p90_ms: float
    iqr_ms: float
    cold_ms: float
    samples: tuple[float, ...]

    def to_dict(self) -> dict[str, float]:
        """The figures, without the samples."""
        return {name: getattr(self, name) for name in ("median_ms", "p90_ms", "iqr_ms", "cold_ms")}


@dataclass(frozen=True)
class Results:
    """A whole measurement on one device.

    Args:
        setting: what all rows share.
        networks: by name.
        drift: by which share the device was slower in the last fifth of the rounds than in the first (median over the
            networks).
        rounds: timed rounds that every network has, which are those used; cold_loads, warmups: the least of a network.
        unused: timed rows of further rounds, which not every network has.
        battery: charge at the first and the last row. temperature: the least and the greatest. Where they are told.
        time: of the first and the last row.
    """

    setting: dict[str, Any]
    networks: dict[str, Summary]
    drift: float
    rounds: int
    cold_loads: int
    warmups: int
    unused: int
    battery: tuple[float, float] | None
    temperature: tuple[float, float] | None
    time: tuple[str, str]

    @property
    def throttled(self) -> bool:
        """Whether the device slowed down more than [`THROTTLED`]."""
        return self.drift > THROTTLED


def progress(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """How many runs of each phase there are, by network: what a measurement that goes on need not do again."""
    found: dict[str, dict[str, int]] = {}
    for network, phase, _ in {row.place for row in rows}:
        counts = found.setdefault(network, dict.fromkeys(PHASES, 0))
        counts[phase] += 1
    return found


def summarise(rows: Sequence[Row], bundle: str, networks: Sequence[str], source: str = "the results") -> Results:
    """What the rows of one device come to.

    A row that came twice (sent again after a lost connection) counts once.

    Args:
        bundle: the hash of the bundle that the networks are of. networks: names of all that must be there.
        source: what messages call the rows' place.

    Raises:
        EdgeDiTError: they are of another bundle or of several devices, two differ about the same run, a network is
            unknown or missing, or runs are fewer than the protocol's.
    """
    if not rows:
        raise EdgeDiTError(f"{source}: there are no rows, so nothing was measured.")
    if foreign := sorted({row.bundle for row in rows} - {bundle}):
        raise EdgeDiTError(
            f"{source}: rows are of the bundle {shorten(foreign[0])}, but this is {bundle}; give the bundle that was "
            "measured, or measure this one."
        )
    for name in rows[0].setting:
        values = sorted({str(getattr(row, name)) for row in rows})
        if len(values) > 1:
            raise EdgeDiTError(
                f"{source}: rows of different {name} are in it: {' and '.join(map(shorten, values[:3]))}; give every "
                "device and setting a file of its own."
            )
    if unknown := sorted({row.network for row in rows} - set(networks)):
        raise EdgeDiTError(f"{source}: it names the network {shorten(unknown[0])}, which the bundle {bundle} lacks.")
    runs: dict[tuple[str, str, int], Row] = {}
    for row in rows:
        known = runs.setdefault(row.place, row)
        if known.ms != row.ms:
            network, phase, number = row.place
            raise EdgeDiTError(
                f"{source}: the {phase} run {number} of {network} is there twice, with {known.ms:g} and {row.ms:g} ms; "
                "keep the rows of one measurement."
            )
    by_phase: dict[str, dict[str, dict[int, float]]] = {name: {phase: {} for phase in PHASES} for name in networks}
    for (network, phase, number), row in runs.items():
        by_phase[network][phase][number] = row.ms
    least = {}
    for phase, wanted in (("cold", COLD_LOADS), ("warm", WARMUPS), ("timed", ROUNDS)):
        counts = {name: len(found[phase]) for name, found in by_phase.items()}
        if lacking := [name for name, count in counts.items() if count < wanted]:
            raise EdgeDiTError(
                f"{source}: {lacking[0]} has {counts[lacking[0]]} {phase} runs, the protocol asks for {wanted} "
                f"({len(lacking)} of {len(networks)} networks have too few); let the measurement go on to its end."
            )
        least[phase] = min(counts.values())
    shared = sorted(set.intersection(*(set(found["timed"]) for found in by_phase.values())))
    if len(shared) < ROUNDS:
        raise EdgeDiTError(
            f"{source}: only {len(shared)} rounds are there of every network, the protocol asks for {ROUNDS}; let the "
            "measurement go on to its end."
        )
    samples = {name: tuple(found["timed"][number] for number in shared) for name, found in by_phase.items()}
    return Results(
        setting=rows[0].setting,
        networks={name: _summary(samples[name], list(found["cold"].values())) for name, found in by_phase.items()},
        drift=drift_of(samples),
        rounds=len(shared),
        cold_loads=least["cold"],
        warmups=least["warm"],
        unused=sum(len(found["timed"]) - len(shared) for found in by_phase.values()),
        **_told(rows),
    )


def _summary(samples: tuple[float, ...], cold: Sequence[float]) -> Summary:
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    quarters = statistics.quantiles(samples, n=4, method="inclusive")
    median, cold_ms = statistics.median(samples), statistics.median(cold)
    return Summary(median, tenths[8], quarters[2] - quarters[0], cold_ms, samples)


def drift_of(samples: Mapping[Any, Sequence[float]]) -> float:
    """By which share a device was slower in the last fifth of the rounds than in the first: the median over the
    networks of the ratio of both medians, less 1.
    """
    ratios = []
    for values in samples.values():
        part = max(1, len(values) // SHARE)
        ratios.append(statistics.median(values[-part:]) / statistics.median(values[:part]))
    return statistics.median(ratios) - 1


def _told(rows: Sequence[Row]) -> dict[str, Any]:
    ordered = sorted(rows, key=lambda row: row.time)
    charge = [row.battery for row in ordered if row.battery is not None]
    warmth = [row.temperature for row in ordered if row.temperature is not None]
    return {
        "battery": (charge[0], charge[-1]) if charge else None,
        "temperature": (min(warmth), max(warmth)) if warmth else None,
        "time": (ordered[0].time, ordered[-1].time),
    }
