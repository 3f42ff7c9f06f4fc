"""The measurement protocol: everything that is compared is timed in one process, interleaved, with stated threads.

Rounds go A B C A B C …, so that a machine that slows down slows all alike. Within a round every callable runs once
untimed and once timed: the untimed call brings its weights back into the caches and waits out thread pools that the
previous callable left spinning, which is the state it meets in a sampling loop. Comparisons use the rounds as pairs
([`paired_ratio`]).
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..errors import EdgeDiTError
from ..files import versions

MIN_ROUNDS = 5  # fewer rounds give no median worth stating


@dataclass(frozen=True)
class Timing:
    """What one callable took.

    Args:
        median_ms: median over the rounds, in milliseconds.
        iqr_ms: interquartile range over the rounds, in milliseconds.
        repeats: number of timed rounds.
        threads: threads the callable was allowed (its attribute `threads`), `None` where it states none.
        samples_ms: every timed round, in order; round i of all callables of one [`measure`] ran next to each other.
    """

    median_ms: float
    iqr_ms: float
    repeats: int
    threads: int | None = None
    samples_ms: tuple[float, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def from_samples(cls, samples_ms: tuple[float, ...], threads: int | None = None) -> Timing:
        """Summarise the rounds of one callable."""
        if len(samples_ms) < 2:
            raise EdgeDiTError(f"A timing needs at least 2 rounds, got {len(samples_ms)}; raise repeats.")
        quarters = statistics.quantiles(samples_ms, n=4, method="inclusive")
        return cls(
            statistics.median(samples_ms), quarters[2] - quarters[0], len(samples_ms), threads, tuple(samples_ms)
        )

    def to_dict(self) -> dict:
        """The JSON form: median, IQR, rounds and threads (not the samples)."""
        return {"median_ms": self.median_ms, "iqr_ms": self.iqr_ms, "repeats": self.repeats, "threads": self.threads}


def measure(
    callables: Mapping[str, Callable[[], object]],
    warmup: int = 3,
    repeats: int = 20,
    min_seconds: float = 0.0,
    max_seconds: float = math.inf,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Time callables against each other, interleaved in this process.

    Args:
        callables: name → function without arguments; one call is one sample.
        warmup: untimed rounds before the first timed one.
        repeats: timed rounds, at least 2.
        min_seconds: go on with rounds until the timed calls of all callables together took this long.
        max_seconds: stop early once [`MIN_ROUNDS`] rounds are done and the timed calls took this long (a big network).
        progress: called after every timed round with (rounds done, rounds asked for).

    Returns:
        name → [`Timing`], with the rounds kept for [`paired_ratio`].

    Raises:
        EdgeDiTError: nothing to measure, or fewer than 2 repeats.
    """
    if not callables or repeats < 2:
        raise EdgeDiTError(
            f"measure() got {len(callables)} callables and repeats={repeats}; it needs at least 1 and 2."
        )
    for _ in range(warmup):
        for call in callables.values():
            call()
    samples: dict[str, list[float]] = {name: [] for name in callables}
    rounds, spent = 0, 0.0
    while rounds < repeats or spent < min_seconds:
        if spent >= max_seconds and rounds >= MIN_ROUNDS:
            break
        for name, call in callables.items():
            call()
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            samples[name].append(1e3 * seconds)
            spent += seconds
        rounds += 1
        if progress is not None:
            progress(rounds, repeats)
    return {
        name: Timing.from_samples(tuple(samples[name]), getattr(call, "threads", None))
        for name, call in callables.items()
    }


def paired_ratio(numerator: Timing, denominator: Timing) -> float:
    """Median over the rounds of numerator/denominator of one [`measure`]: a drift of the machine cancels within each
    round.
    """
    if not numerator.samples_ms or len(numerator.samples_ms) != len(denominator.samples_ms):
        raise EdgeDiTError(
            f"The timings have {len(numerator.samples_ms)} and {len(denominator.samples_ms)} rounds; "
            "a paired ratio needs both from the same measure() call."
        )
    return statistics.median(a / b for a, b in zip(numerator.samples_ms, denominator.samples_ms))


def paired_medians(timings: Mapping[str, Timing]) -> dict[str, float]:
    """Medians in ms of one [`measure`] with the machine's drift taken out: what many callables cost relative to each
    other.

    Every sample is divided by the median of its round over all callables; the median of these over the rounds is put
    back on the scale of the median round. With another program on one of two cores this predicted whole networks from a
    latency table four times better than plain medians did; on a quiet machine the two agree.
    """
    if len({len(timing.samples_ms) for timing in timings.values()}) != 1:
        raise EdgeDiTError("Paired medians need timings with their rounds, all from the same measure() call.")
    rounds = [statistics.median(samples) for samples in zip(*(timing.samples_ms for timing in timings.values()))]
    scale = statistics.median(rounds)
    return {
        name: scale * statistics.median(sample / usual for sample, usual in zip(timing.samples_ms, rounds))
        for name, timing in timings.items()
    }


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.lower().startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the portable name follows
    return platform.processor() or platform.machine()


def environment(threads: int) -> dict:
    """What a latency belongs to: processor, cores this process may use, threads used, and library versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu_model(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": cores,
        "threads": threads,
        "versions": versions(),
    }
