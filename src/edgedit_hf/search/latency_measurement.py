"""TableMeasurement: makes a [`LatencyTable`] from networks that are lowered and timed, and judges it by others."""

from __future__ import annotations

import statistics
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EdgeDiTError
from ..export.formats import MEASURED
from ..genotype import Genotype, Shape
from ..search_space import BYTES, SearchSpace, layer_cost, trunk_cost
from .latency_networks import Networks, fitted_networks, held_out, timed_shapes
from .latency_table import FORMAT, LatencyTable, trunk_of

if TYPE_CHECKING:
    from ..runtimes.timing import Measurement, Timing

OPEN_BYTES = 6e9  # weights up to which all networks stay in memory; above it each is loaded for its turns
MORE_ROUNDS = 3  # times the rounds asked for, at most, while a median is noisy
# What a table must show on networks that it was not fitted to, to be believed without a word.
LEAST_MS = 20.0  # shorter networks: overheads of a call, and the clock
MEAN_ERROR, ERROR_RATIO, KENDALL = 0.08, 0.25, 0.9


class TableMeasurement:
    """A [`LatencyTable`] in the making: networks are lowered, then timed a round at a time. Weights are random: latency
    does not depend on them.

    Long skips (MDTv2) are not in the table: every genotype has the same ones, so they add the same to all.

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
        self.space, self.batch, self.threads, self.runtime, self.precision = space, batch, threads, runtime, precision
        self.config = {**config, "long_skips": None, "decoder_start": None, "side_layers": 0}
        self.shapes = timed_shapes(space)
        self.fitted = fitted_networks(self.shapes, space.num_layers)
        self.check = held_out(self.config, space, self.fitted) if check is None else list(check)
        self.measurement: Measurement | None = None
        self._temporary: tempfile.TemporaryDirectory | None = None

    @property
    def networks(self) -> dict[Any, tuple[Shape, ...]]:
        """The layers of every network: by themselves where the table is fitted to it, by genotype's hash elsewhere."""
        judged = {genotype.hash: tuple(layer.shape.timed for layer in genotype.layers) for genotype in self.check}
        return {**{shapes: shapes for shapes in self.fitted}, **judged}

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights of all networks together."""
        return sum(network_bytes(self.config, shapes, self.precision) for shapes in self.networks.values())

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
        kept = Networks(self.config, self.shapes, self.runtime, self.precision, self.batch, folder)
        keep, inputs = self.weight_bytes <= OPEN_BYTES, example_inputs(self.config, self.batch)
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
        from ..runtimes.timing import NOISY, environment

        space, measured, paired = self.space, self._running().timings(), self._timings()
        times = {shapes: paired[shapes].median_ms for shapes in self.fitted}
        trunk_ms, blocks, residual = fit(times)
        disturbed = set(noisy(paired))

        def timed(key: Any) -> dict[str, Any]:
            return {**measured[key].to_dict(), "noise": paired[key].noise, "noisy": key in disturbed}

        def layers(shapes: tuple[Shape, ...]) -> list[int]:
            counts = Counter(shapes)
            return [counts[shape] for shape in self.shapes]

        table = LatencyTable(
            {
                "format": FORMAT,
                "runtime": self.runtime,
                "precision": self.precision,
                "batch": int(self.batch),
                "threads": int(self.threads),
                "space": space.to_dict(),
                "trunk": trunk_of(self.config),
                "trunk_ms": trunk_ms,
                "blocks": [
                    {
                        "option": space.name_of(shape),
                        "attention_dim": shape.attention_dim,
                        "num_heads": shape.num_heads,
                        "mlp_ratio": shape.mlp_ratio,
                        **({} if shape.token_merge == 1 else {"token_merge": shape.token_merge}),
                        "ms": blocks[shape],
                    }
                    for shape in self.shapes
                ],
                "networks": [
                    {
                        "layers": layers(shapes),  # of each block
                        "fitted_ms": trunk_ms + sum(blocks[shape] for shape in shapes),
                        "measured_ms": times[shapes],
                        **timed(shapes),
                    }
                    for shapes in self.fitted
                ],
                "fit_residual": residual,
                "repeats": self.rounds,
                "environment": environment(self.threads),
                "protocol": {
                    "warmup_rounds": self._running().warmup,
                    "untimed_calls_before_a_sample": 1,
                    "rounds": self.rounds,
                    "kept_open": self.weight_bytes <= OPEN_BYTES,
                    "noise_allowed": NOISY,
                    **(protocol or {}),
                },
                "noisy": bool(disturbed),
            }
        )
        entries = [
            {**table._compare(genotype, paired[genotype.hash].median_ms), **timed(genotype.hash)}
            for genotype in self.check
        ]
        table._data["prediction"] = {
            **judge(entries, len(disturbed), len(paired), self.batch),
            "networks": entries,
        }
        return table


# -------------------------------------------------------------------- arithmetic


def network_bytes(config: Mapping[str, Any], shapes: Sequence[Shape], precision: str) -> float:
    """Bytes of a network's weights."""
    tokens = (config["sample_size"] // config["patch_size"]) ** 2
    weights = trunk_cost(config, tokens).weights
    weights += sum(layer_cost(config["hidden_size"], shape, tokens).weights for shape in shapes)
    return BYTES[precision] * weights


def noisy(timings: Mapping[Any, Timing]) -> list[Any]:
    """Those whose medians are known to less than [`~edgedit_hf.runtimes.timing.NOISY`]."""
    from ..runtimes.timing import NOISY

    return [key for key, timing in timings.items() if timing.noise > NOISY]


def fit(times: Mapping[tuple[Shape, ...], float]) -> tuple[float, dict[Shape, float], float]:
    """Non-negative least squares of `time = trunk + Σ layer(shape)` over networks given by their layers' shapes, each
    weighted by 1/time: all count by their relative error.

    Returns:
        trunk, shape → layer (all in the unit of `times`), and the largest relative residual.

    Raises:
        EdgeDiTError: a layer takes no time.
    """
    from scipy.optimize import nnls

    shapes = list(dict.fromkeys(shape for network in times for shape in network))
    counts = [Counter(network) for network in times]
    rows = np.array([[1.0, *(count[shape] for shape in shapes)] for count in counts])
    rows /= np.array(list(times.values()))[:, None]
    solution, _ = nnls(rows, np.ones(len(rows)))
    trunk, *layers = (float(value) for value in solution)
    if min(layers) <= 0:
        raise EdgeDiTError(
            f"The fitted layer times are {[round(t, 4) for t in layers]} ms; they must be positive. The machine was "
            "too busy: close other programs, or raise latency.repeats or latency.batch_size."
        )
    return trunk, dict(zip(shapes, layers)), float(np.abs(rows @ solution - 1).max())


def judge(entries: Sequence[Mapping[str, Any]], disturbed: int, timed: int, batch: int) -> dict[str, Any]:
    """How well a table predicts networks that it was not fitted to.

    Args:
        entries: a network each, with `predicted_ms`, `measured_ms` and `relative_error`.
        disturbed: networks whose medians are noisy, of those `timed`.
        batch: images a forward.

    Returns:
        mean and max of the relative error; baseline, the mean relative error of predicting the networks' mean for each,
        and ratio, of both; kendall (τ-b) and spearman, rank correlations of predicted and measured (these four `None`
        where the networks do not differ); least_ms, of the shortest network; passed, whether all bars are kept; and
        remarks, in words.
    """
    measured = [entry["measured_ms"] for entry in entries]
    errors = [entry["relative_error"] for entry in entries]
    found: dict[str, Any] = dict.fromkeys(("mean", "max", "baseline", "ratio", "kendall", "spearman", "least_ms"))
    if entries:
        found |= {"mean": statistics.fmean(errors), "max": max(errors), "least_ms": min(measured)}
    if len(set(measured)) > 1:
        from scipy.stats import kendalltau, spearmanr

        usual = statistics.fmean(measured)
        found["baseline"] = statistics.fmean(abs(usual - value) / value for value in measured)
        found["ratio"] = found["mean"] / found["baseline"]
        predicted = [entry["predicted_ms"] for entry in entries]
        if len(set(predicted)) > 1:
            found["kendall"] = float(kendalltau(predicted, measured).statistic)
            found["spearman"] = float(spearmanr(predicted, measured).statistic)
    remarks = []
    if found["mean"] is not None and found["mean"] > MEAN_ERROR:
        remarks.append(f"its mean error is {found['mean']:.1%}, above {MEAN_ERROR:.0%}")
    if found["ratio"] is not None and found["ratio"] > ERROR_RATIO:
        remarks.append(
            f"its mean error is {found['ratio']:.2f} of what predicting the networks' mean for each would give, above "
            f"{ERROR_RATIO}"
        )
    if found["kendall"] is not None and found["kendall"] < KENDALL:
        remarks.append(f"Kendall's τ of predicted and measured is {found['kendall']:.2f}, below {KENDALL}")
    found["passed"] = not remarks
    if disturbed:
        remarks.append(
            f"{disturbed} of {timed} networks scatter too much for their rounds: something else was running; measure "
            "again on a quiet machine, or raise latency.repeats"
        )
    if found["least_ms"] is not None and found["least_ms"] < LEAST_MS:
        wanted = -(-int(batch * LEAST_MS) // max(1, int(found["least_ms"])))
        remarks.append(
            f"its shortest network takes {found['least_ms']:.1f} ms, below {LEAST_MS:.0f}, where calls and the clock "
            f"weigh: latency.batch_size {wanted} would make it long enough"
        )
    return {**found, "remarks": remarks}
