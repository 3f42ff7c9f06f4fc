"""TableMeasurement: makes a [`LatencyTable`] from networks that are lowered and timed here."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EdgeDiTError
from ..export.formats import MEASURED
from ..genotype import Genotype, Shape
from ..search_space import SearchSpace
from .latency_networks import Networks
from .latency_plan import TablePlan, noisy
from .latency_table import LatencyTable

if TYPE_CHECKING:
    from ..runtimes.timing import Measurement, Timing

OPEN_BYTES = 6e9  # weights up to which all networks stay in memory; above it each is loaded for its turns
MORE_ROUNDS = 3  # times the rounds asked for, at most, while a median is noisy


class TableMeasurement:
    """A [`LatencyTable`] in the making: the networks of its plan are lowered, then timed a round at a time. Weights are
    random: latency does not depend on them.

    Args:
        config: the teacher's model config.
        space: its search space.
        batch: images a forward.
        threads: intra-op threads of the runtime.
        runtime: a key of [`MEASURED`].
        precision: one that the runtime has.
        check: whole networks that are timed in the same rounds and that the table is judged by; default [`held_out`].
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        space: SearchSpace,
        *,
        batch: int,
        threads: int,
        runtime: str = "onnxruntime",
        precision: str = "fp32",
        check: Sequence[Genotype] | None = None,
    ) -> None:
        existing = [f"{name}-{dtype}" for name, target in MEASURED.items() for dtype in target.measured]
        if f"{runtime}-{precision}" not in existing:
            raise EdgeDiTError(f"A table of {runtime}-{precision} is asked for; what exists is {', '.join(existing)}.")
        if batch < 1:
            raise EdgeDiTError(f"batch is {batch}; it must be at least 1.")
        self.batch, self.threads, self.runtime, self.precision = batch, threads, runtime, precision
        self.plan = TablePlan(config, space, check)
        self.measurement: Measurement | None = None
        self._temporary: tempfile.TemporaryDirectory | None = None

    @property
    def networks(self) -> dict[Any, tuple[Shape, ...]]:
        """See [`TablePlan.networks`]."""
        return self.plan.networks

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights of all networks together."""
        return self.plan.weight_bytes(self.precision)

    def lower(self, folder: Path | None = None) -> None:
        """Lower and open the networks, and warm them up.

        Args:
            folder: where they are kept, so that a measurement that is done again lowers none twice; default: a
                temporary one.
        """
        from ..runtimes.runners import SessionRunner, example_inputs
        from ..runtimes.sessions import open_session
        from ..runtimes.timing import Measurement

        if folder is None:
            self._temporary = tempfile.TemporaryDirectory()
            folder = Path(self._temporary.name)
        kept = Networks(self.plan.config, self.plan.shapes, self.runtime, self.precision, self.batch, folder)
        keep, inputs = self.weight_bytes <= OPEN_BYTES, example_inputs(self.plan.config, self.batch)
        self.measurement = Measurement(
            {
                key: SessionRunner(open_session(kept.file(shapes), self.threads), inputs, keep)
                for key, shapes in self.networks.items()
            }
        )

    @property
    def rounds(self) -> int:
        """Rounds so far."""
        return self._running().rounds

    def round(self) -> None:
        """Time every network once."""
        self._running().round()

    def long_enough(self, max_seconds: float = 300.0) -> bool:
        """See [`~edgedit_hf.runtimes.timing.Measurement.long_enough`]."""
        return self._running().long_enough(max_seconds)

    def unsettled(self, rounds: int) -> int:
        """How many networks are still noisy, while more rounds may help: 0 once there are [`MORE_ROUNDS`] times those
        asked for, or the measurement is [`~TableMeasurement.long_enough`].
        """
        if self.rounds >= MORE_ROUNDS * rounds or self.long_enough():
            return 0
        return len(noisy(self._timings()))

    def _running(self) -> Measurement:
        if self.measurement is None:
            raise EdgeDiTError("Nothing is lowered yet; call lower() first.")
        return self.measurement

    def _timings(self) -> dict[Any, Timing]:
        from ..runtimes.timing import paired_timings

        return paired_timings(self._running().timings())

    def table(self, protocol: Mapping[str, Any] | None = None) -> LatencyTable:
        """The table of the rounds so far.

        Args:
            protocol: what else is to be said of how it was measured.
        """
        from ..runtimes.timing import environment

        return self.plan.table(
            self._running().timings(),
            runtime=self.runtime,
            precision=self.precision,
            batch=self.batch,
            threads=self.threads,
            environment=environment(self.threads),
            protocol={
                "warmup_rounds": self._running().warmup,
                "untimed_calls_before_a_sample": 1,
                "kept_open": self.weight_bytes <= OPEN_BYTES,
                **(protocol or {}),
            },
        )
