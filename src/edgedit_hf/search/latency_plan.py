"""TablePlan: what a [`LatencyTable`] is made of but the times, which may come from anywhere: which networks are timed,
how a table is fitted to some of them, and how it is judged by the others. No torch.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EdgeDiTError
from ..genotype import Genotype, Shape
from ..search_space import BYTES, SearchSpace, grid_tokens, layer_cost, position_weights, trunk_cost
from .latency_networks import fitted_networks, held_out, timed_shapes
from .latency_table import FORMAT, LatencyTable, trunk_of

if TYPE_CHECKING:
    from ..runtimes.timing import Timing

# What a table must show on networks that it was not fitted to, to be believed without a word.
LEAST_MS = 20.0  # shorter networks: overheads of a call, and the clock
MEAN_ERROR, ERROR_RATIO, KENDALL = 0.08, 0.25, 0.9
NO_TIME = 1e-9  # share of a network up to which a layer's time is rounding


class TablePlan:
    """The networks of a [`LatencyTable`]: times of them, wherever they were taken, make one.

    Long skips (MDTv2) are not in the table: every genotype has the same ones, so they add the same to all.

    Args:
        config: the teacher's model config; its sizes (`TRUNK_KEYS`) are enough where both kinds of networks are given.
        space: its search space.
        check: whole networks that the table is judged by; default [`held_out`].
        fitted: networks that it is fitted to, by their layers' shapes; default [`fitted_networks`].
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        space: SearchSpace,
        check: Sequence[Genotype] | None = None,
        fitted: Sequence[tuple[Shape, ...]] | None = None,
    ) -> None:
        self.space = space
        self.config = {**config, "long_skips": None, "decoder_start": None, "side_layers": 0}
        self.shapes = timed_shapes(space)
        self.fitted = fitted_networks(self.shapes, space.num_layers) if fitted is None else list(fitted)
        self.check = held_out(self.config, space, self.fitted) if check is None else list(check)

    @property
    def networks(self) -> dict[Any, tuple[Shape, ...]]:
        """The layers of every network: by themselves where the table is fitted to it, by genotype's hash elsewhere."""
        judged = {genotype.hash: tuple(layer.shape.timed for layer in genotype.layers) for genotype in self.check}
        return {**{shapes: shapes for shapes in self.fitted}, **judged}

    def weight_bytes(self, precision: str) -> float:
        """Bytes of the weights of all networks together."""
        return sum(network_bytes(self.config, shapes, precision) for shapes in self.networks.values())

    def table(
        self,
        measured: Mapping[Any, Timing],
        *,
        runtime: str,
        precision: str,
        batch: int,
        threads: int,
        environment: Mapping[str, Any],
        protocol: Mapping[str, Any],
        remarks: Sequence[str] = (),
    ) -> LatencyTable:
        """The table of such times.

        Args:
            measured: of every one of [`~TablePlan.networks`], with its rounds; round i of all ran next to each other.
            runtime, precision, batch, threads: how they ran.
            environment: on what, as [`~edgedit_hf.runtimes.timing.environment`] says it.
            protocol: what else is to be said of how it was measured.
            remarks: what is to be known before the table is believed, beside what the judgement finds.
        """
        from ..runtimes.timing import NOISY, paired_timings

        space, paired = self.space, paired_timings(measured)
        times = {shapes: paired[shapes].median_ms for shapes in self.fitted}
        trunk_ms, blocks, residual = fit(times)
        disturbed = set(noisy(paired))

        def timed(key: Any) -> dict[str, Any]:
            return {**measured[key].to_dict(), "noise": paired[key].noise, "noisy": key in disturbed}

        def layers(shapes: tuple[Shape, ...]) -> list[int]:
            counts = Counter(shapes)
            return [counts[shape] for shape in self.shapes]

        rounds = min(timing.repeats for timing in measured.values())
        table = LatencyTable(
            {
                "format": FORMAT,
                "runtime": runtime,
                "precision": precision,
                "batch": int(batch),
                "threads": int(threads),
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
                "repeats": rounds,
                "environment": dict(environment),
                "protocol": {"rounds": rounds, "noise_allowed": NOISY, **protocol},
                "noisy": bool(disturbed),
            }
        )
        entries = [
            {**table._compare(genotype, paired[genotype.hash].median_ms), **timed(genotype.hash)}
            for genotype in self.check
        ]
        judged = judge(entries, len(disturbed), len(paired), batch)
        table._data["prediction"] = {**judged, "remarks": [*judged["remarks"], *remarks], "networks": entries}
        return table


# -------------------------------------------------------------------- arithmetic


def network_bytes(config: Mapping[str, Any], shapes: Sequence[Shape], precision: str) -> float:
    """Bytes of a network's weights."""
    tokens, head = grid_tokens(config), position_weights(config)
    weights = trunk_cost(config, tokens).weights
    weights += sum(layer_cost(config["hidden_size"], shape, tokens, head).weights for shape in shapes)
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
    if min(layers) <= NO_TIME * max(times.values()):
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
