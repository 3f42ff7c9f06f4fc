"""TableMeasurement: makes a [`LatencyTable`] from networks that are lowered and timed."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EdgeDiTError
from ..export.formats import MEASURED
from ..genotype import Genotype, LayerSpec, Shape
from ..search_space import SearchSpace
from .latency_networks import LoweredParts, lower_network
from .latency_table import FORMAT, LatencyTable, check_genotypes, trunk_of

if TYPE_CHECKING:
    from ..runtimes.timing import Measurement

DEPTHS = (2, 6)  # layers of the fitted networks


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
        check: whole networks that are timed in the same rounds; default [`check_genotypes`].
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
        self.check = check_genotypes(space) if check is None else list(check)
        self.config = {**config, "long_skips": None, "decoder_start": None, "side_layers": 0}
        self.shapes = sorted({layer.shape.timed for layer in space.replacements()}, reverse=True)
        self.measurement: Measurement | None = None

    def lower(self) -> None:
        """Lower and open the networks, and warm them up."""
        from ..runtimes.runners import SessionRunner, example_inputs
        from ..runtimes.sessions import open_session
        from ..runtimes.timing import Measurement

        config, batch, runtime, precision = self.config, self.batch, self.runtime, self.precision
        parts = LoweredParts(config, self.shapes, precision) if runtime == "onnxruntime" else None
        networks: dict[Any, list[Shape]] = {
            (shape, depth): [shape] * depth for shape in self.shapes for depth in DEPTHS
        }
        networks.update({genotype.hash: [layer.shape.timed for layer in genotype.layers] for genotype in self.check})
        with tempfile.TemporaryDirectory() as folder:
            runners: dict[Any, Any] = {}
            for number, (key, shapes) in enumerate(networks.items()):
                if parts is not None:
                    file = parts.network(shapes, Path(folder, f"{number}.onnx"))
                else:
                    layers = [LayerSpec((i,), *shape).to_dict() for i, shape in enumerate(shapes)]
                    network = {**config, "layers": layers}
                    file = lower_network(network, runtime, precision, batch, Path(folder, str(number)))
                runners[key] = SessionRunner(open_session(file, self.threads), example_inputs(config, batch))
        self.measurement = Measurement(runners)

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

    def _running(self) -> Measurement:
        if self.measurement is None:
            raise EdgeDiTError("Nothing is lowered yet; call lower() first.")
        return self.measurement

    def table(self) -> LatencyTable:
        """The table of the rounds so far."""
        from ..runtimes.timing import environment, paired_medians

        space, timings = self.space, self._running().timings()
        times: dict[Any, float] = paired_medians(timings)
        trunk_ms, blocks, residual = _fit({key: time for key, time in times.items() if isinstance(key, tuple)})
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
                        "attention_dim": shape[0],
                        "num_heads": shape[1],
                        "mlp_ratio": shape[2],
                        **({} if shape.token_merge == 1 else {"token_merge": shape.token_merge}),
                        "ms": blocks[shape],
                        "networks": {str(depth): timings[shape, depth].to_dict() for depth in DEPTHS},
                    }
                    for shape in self.shapes
                ],
                "fit_residual": residual,
                "repeats": self.rounds,
                "environment": environment(self.threads),
            }
        )
        entries = [table._compare(genotype, times[genotype.hash]) for genotype in self.check]
        table._data["prediction"] = _summary(entries)
        return table


def _fit(times: Mapping[tuple[Shape, int], float]) -> tuple[float, dict[Shape, float], float]:
    """Least squares of `time = trunk + depth · layer(shape)` over the networks of equal layers, each weighted by
    1/time.

    Returns:
        trunk, shape → layer (all in the unit of `times`), and the largest relative residual.
    """
    shapes = sorted({shape for shape, _ in times}, reverse=True)
    rows, ones = [], []
    for (shape, depth), time in times.items():
        rows.append([1 / time, *(depth / time if shape == other else 0.0 for other in shapes)])
        ones.append(1.0)
    solution, *_ = np.linalg.lstsq(np.array(rows), np.array(ones), rcond=None)
    residual = float(np.abs(np.array(rows) @ solution - 1).max())
    trunk, *layers = (float(value) for value in solution)
    if min(layers) <= 0:
        raise EdgeDiTError(
            f"The fitted layer times are {[round(t, 4) for t in layers]} ms; they must be positive. The machine was "
            "too busy: close other programs, or raise latency.repeats or latency.batch_size."
        )
    return max(trunk, 0.0), dict(zip(shapes, layers)), residual


def _summary(entries: list[dict[str, Any]]) -> dict[str, Any]:
    errors = [entry["relative_error"] for entry in entries]
    return {
        "mean": float(np.mean(errors)) if errors else None,
        "max": max(errors, default=None),
        "networks": entries,
    }
