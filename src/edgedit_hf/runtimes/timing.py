"""The measurement protocol: everything that is compared is timed in one process, interleaved, with stated threads.

Rounds go A B C A B C …, so that a machine that slows down slows all alike. Within a round every callable runs once
untimed and once timed: the untimed call brings its weights back into the caches and waits out thread pools that the
previous callable left spinning, which is the state it meets in a sampling loop. Comparisons use the rounds as pairs
([`paired_ratio`], [`paired_timings`]). What still scatters is judged by [`Timing.noise`].
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..errors import EdgeDiTError
from ..files import versions

MIN_ROUNDS = 5  # fewer rounds give no median worth stating
MEASURING_S = 20.0  # timed calls of a run's models together take this long at most, once there are so many rounds
LONGEST_CALL_S = (
    5.0  # a call that would take longer is not made: its forwards are timed and multiplied, and decoding added
)
NOISY = 0.03  # greatest noise of a median that is taken as it is


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

    @property
    def noise(self) -> float:
        """Half the notch of a box plot as a share of the median, 1.57 IQR / √n (McGill, Tukey and Larsen 1978): nine
        in ten times the truth is no further away, and medians whose notches do not meet differ.
        """
        return 1.57 * self.iqr_ms / math.sqrt(self.repeats) / self.median_ms

    def to_dict(self) -> dict:
        """The JSON form: median, IQR, rounds and threads (not the samples)."""
        return {"median_ms": self.median_ms, "iqr_ms": self.iqr_ms, "repeats": self.repeats, "threads": self.threads}


class Measurement:
    """Callables timed against each other, interleaved in this process, a round at a time; first the warm-up is done.

    Args:
        callables: name → function without arguments; one call is one sample. One with a method `release` is released
            after each of its turns.
        warmup: untimed rounds before the first timed one.

    Raises:
        EdgeDiTError: nothing to measure.
    """

    def __init__(self, callables: Mapping[Any, Callable[[], object]], warmup: int = 3) -> None:
        if not callables:
            raise EdgeDiTError("A measurement got 0 callables; it needs at least 1.")
        self.callables, self.warmup = callables, warmup
        self.samples: dict[Any, list[float]] = {name: [] for name in callables}
        self.rounds, self.seconds = 0, 0.0  # so far, and what the timed calls of all callables took
        for _ in range(warmup):
            for call in callables.values():
                call()
                _release(call)

    def round(self) -> None:
        """Time every callable once; one untimed call of it goes before."""
        for name, call in self.callables.items():
            call()
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            _release(call)
            self.samples[name].append(1e3 * seconds)
            self.seconds += seconds
        self.rounds += 1

    def long_enough(self, max_seconds: float) -> bool:
        """Whether [`MIN_ROUNDS`] rounds are done and the timed calls took this long (a big network)."""
        return self.seconds >= max_seconds and self.rounds >= MIN_ROUNDS

    def timings(self) -> dict[Any, Timing]:
        """name → [`Timing`], with the rounds kept for [`paired_ratio`]."""
        return {
            name: Timing.from_samples(tuple(self.samples[name]), getattr(call, "threads", None))
            for name, call in self.callables.items()
        }


def _release(call: Callable[[], object]) -> None:
    if (release := getattr(call, "release", None)) is not None:
        release()


def measure(
    callables: Mapping[Any, Callable[[], object]],
    warmup: int = 3,
    repeats: int = 20,
    min_seconds: float = 0.0,
    max_seconds: float = math.inf,
    progress: str = "",
) -> dict[Any, Timing]:
    """A whole [`Measurement`].

    Args:
        callables, warmup: of the measurement.
        repeats: timed rounds, at least 2.
        min_seconds: go on with rounds until the timed calls of all callables together took this long.
        max_seconds: stop early once it is [`~Measurement.long_enough`].
        progress: what a bar of the rounds is called; default: no bar.

    Raises:
        EdgeDiTError: nothing to measure, or fewer than 2 repeats.
    """
    if not callables or repeats < 2:
        raise EdgeDiTError(
            f"measure() got {len(callables)} callables and repeats={repeats}; it needs at least 1 and 2."
        )
    with tqdm(desc=progress, total=repeats, unit="round", leave=False, disable=None if progress else True) as bar:
        measurement = Measurement(callables, warmup)
        while measurement.rounds < repeats or measurement.seconds < min_seconds:
            if measurement.long_enough(max_seconds):
                break
            measurement.round()
            bar.update()
    return measurement.timings()


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


def paired_timings(timings: Mapping[Any, Timing]) -> dict[Any, Timing]:
    """The timings of one [`measure`] with the machine's drift taken out: what many callables cost relative to each
    other.

    Every sample is divided by the median of its round over all callables, and put back on the scale of the median
    round. With another program on one of two cores this predicted whole networks from a latency table four times better
    than plain medians did; on a quiet machine the two agree.
    """
    if len({len(timing.samples_ms) for timing in timings.values()}) != 1:
        raise EdgeDiTError("Paired medians need timings with their rounds, all from the same measure() call.")
    rounds = [statistics.median(samples) for samples in zip(*(timing.samples_ms for timing in timings.values()))]
    scale = statistics.median(rounds)
    return {
        name: Timing.from_samples(
            tuple(scale * sample / usual for sample, usual in zip(timing.samples_ms, rounds)), timing.threads
        )
        for name, timing in timings.items()
    }


def paired_medians(timings: Mapping[Any, Timing]) -> dict[Any, float]:
    """The medians in ms of [`paired_timings`]."""
    return {name: timing.median_ms for name, timing in paired_timings(timings).items()}


# -------------------------------------------------------------------- the machine


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


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[list[int] | None]:
    """Keep this process, with the threads it has and those it starts, on as many processors as it times with: the
    fastest, each of another core as far as there are cores.

    Yields:
        the processors' numbers; `None` where the system cannot (it is not Linux) or gives the process fewer.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if len(allowed) < threads:
        yield None
        return
    chosen = choose_processors(allowed, threads)
    before = {task: os.sched_getaffinity(task) for task in _tasks()}
    try:
        for task in before:
            _set_affinity(task, chosen)
        yield chosen
    finally:
        for task in _tasks():  # those that were started meanwhile too
            _set_affinity(task, before.get(task, set(allowed)))


def _tasks() -> list[int]:
    return [int(entry.name) for entry in Path("/proc/self/task").iterdir()]


def _set_affinity(task: int, processors: Sequence[int] | set[int]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.sched_setaffinity(task, processors)


def choose_processors(allowed: Sequence[int], count: int, system: Path = Path("/sys/devices/system/cpu")) -> list[int]:
    """Of the processors allowed, the first threads of cores before the second ones, and the fastest of these."""
    of_core: Counter[str] = Counter()
    ranked = []
    for number in allowed:
        core = _said(system / f"cpu{number}/topology/thread_siblings_list") or str(number)
        ranked.append((of_core[core], -int(_said(system / f"cpu{number}/cpufreq/cpuinfo_max_freq") or 0), number))
        of_core[core] += 1
    return sorted(number for *_, number in sorted(ranked)[:count])


def governors(processors: Sequence[int], system: Path = Path("/sys/devices/system/cpu")) -> list[str]:
    """What decides the clock of these processors ("performance", "schedutil"), each once; none where it is not said."""
    found = {_said(system / f"cpu{number}/cpufreq/scaling_governor") for number in processors}
    return sorted(name for name in found if name)


def load() -> float | None:
    """Programs that wanted a processor over the last minute; `None` where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _said(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
