"""LatencyTable: what a genotype costs in the runtime that ships, from one measurement a distinct layer shape.

A single layer alone is dominated by call overhead and meets warmer caches than it does inside a network, so networks of
equal layers at two depths ([`DEPTHS`]) are timed, all interleaved, and a network's time is fitted as `trunk + Σ
layers`. Whole networks of mixed shapes run in the same rounds; the table keeps how well it predicts them
(`prediction`). For ONNX Runtime every layer shape, the embedders and the output layer are lowered once and the networks
joined from them; for ExecuTorch every network is lowered as a whole.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EdgeDiTError
from ..export.formats import MEASURED
from ..files import atomic_write_json, hash_json, read_json
from ..genotype import Genotype, LayerSpec, Shape
from ..hub import is_name, resolve
from ..records import Table
from ..run.stage import LATENCY
from ..schema import held_to
from ..search_space import OPTIONS, SearchSpace

if TYPE_CHECKING:
    import onnx

    from ..models.transformer_edgedit import EdgeDiTTransformer2DModel
    from ..runtimes.timing import Measurement

FORMAT = 1
DEPTHS = (2, 6)  # layers of the fitted networks
TRUNK_KEYS = ("sample_size", "patch_size", "in_channels", "hidden_size", "num_classes", "learn_sigma")


class LatencyTable:
    """An additive latency model; make it with [`TableMeasurement`] or read it with [`~LatencyTable.from_json`].

    Args:
        data: the plain values of [`~LatencyTable.to_dict`].
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        required = {
            "format",
            "runtime",
            "precision",
            "batch",
            "threads",
            "space",
            "trunk",
            "trunk_ms",
            "blocks",
            "environment",
        }
        if not isinstance(data, Mapping) or not required <= set(data) or data["format"] != FORMAT:
            keys = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise EdgeDiTError(f"This is no latency table of format {FORMAT}: it holds {keys}. Build it again.")
        held_to(data, Table, "The table", LATENCY.made_by, "a latency table")
        self._data = dict(data)
        self.runtime: str = data["runtime"]
        self.precision: str = data["precision"]
        self.batch: int = data["batch"]
        self.threads: int = data["threads"]
        self.trunk: dict[str, Any] = dict(data["trunk"])
        self.trunk_ms: float = float(data["trunk_ms"])
        self.space = SearchSpace.from_dict(data["space"])
        self.blocks: dict[Shape, float] = {
            Shape(
                int(b["attention_dim"]), int(b["num_heads"]), float(b["mlp_ratio"]), token_merge=b.get("token_merge", 1)
            ): float(b["ms"])
            for b in data["blocks"]
        }

    # ---------------------------------------------------------------- use

    def latency_ms(self, genotype: Genotype) -> float:
        """Predicted milliseconds of one forward of `batch` images.

        Raises:
            EdgeDiTError: the genotype belongs to another teacher, or has a layer shape that was not measured.
        """
        if genotype.hidden_size != self.space.hidden_size or genotype.num_teacher_layers != self.space.num_layers:
            raise EdgeDiTError(
                f"The genotype compresses {genotype.num_teacher_layers} layers of width {genotype.hidden_size}, but "
                f"this latency table belongs to a teacher of {self.space.num_layers} layers of width "
                f"{self.space.hidden_size}; build a table for its teacher."
            )
        total = self.trunk_ms
        for layer in genotype.layers:
            if (shape := layer.shape.timed) not in self.blocks:
                raise EdgeDiTError(
                    f"The genotype has a layer of shape {shape} (attention_dim, num_heads, mlp_ratio); this table "
                    f"measured {', '.join(map(str, self.blocks))}. Build a table for its search space."
                )
            total += self.blocks[shape]
        return total

    def check_config(self, config: Mapping[str, Any], space: SearchSpace | None = None) -> None:
        """Raise an [`EdgeDiTError`] if the table was measured for another input, width or output than this model
        config's, or lacks shapes of its search space.
        """
        wrong = {key: (self.trunk[key], config[key]) for key in TRUNK_KEYS if self.trunk[key] != config[key]}
        if wrong:
            differences = ", ".join(f"{key} {mine} (table) / {other} (model)" for key, (mine, other) in wrong.items())
            raise EdgeDiTError(
                f"The latency table belongs to another teacher: {differences}. Build a table for this one."
            )
        for genotype in () if space is None else check_genotypes(space):
            self.latency_ms(genotype)

    def _compare(self, genotype: Genotype, measured_ms: float) -> dict[str, Any]:
        predicted = self.latency_ms(genotype)
        return {
            "genotype": genotype.hash,
            "code": list(self.space.code(genotype)),
            "predicted_ms": predicted,
            "measured_ms": measured_ms,
            "relative_error": abs(predicted - measured_ms) / measured_ms,
        }

    # ---------------------------------------------------------------- files

    @property
    def hash(self) -> str:
        """16 hex digits over all values of the table."""
        return hash_json(self._data)

    def to_dict(self) -> dict[str, Any]:
        """All values, plain."""
        return dict(self._data)

    def to_json(self, path: str | os.PathLike) -> None:
        """Write the table."""
        atomic_write_json(path, {**self._data, "hash": self.hash})

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> LatencyTable:
        """Read a table by its path or name on the Hub; one whose values were changed by hand is refused."""
        data = read_json(table_file(path), LATENCY.made_by)
        stated = data.pop("hash", None) if isinstance(data, dict) else None
        try:
            table = cls(data)
        except EdgeDiTError as error:
            raise EdgeDiTError(f"{path}: {error}") from None
        if stated != table.hash:
            raise EdgeDiTError(
                f"{path} states the hash {stated}, but its values give {table.hash}; it was changed. Build it again."
            )
        return table


def table_file(path: str | os.PathLike, **hub: Any) -> Path:
    """The file of a latency table: a path as it is, of a name on the Hub the `table.json` there.

    Args:
        hub: of [`hub.fetch`].
    """
    found = resolve(path, ["table.json"], **hub)
    return found / "table.json" if is_name(path) and found.is_dir() else found


def given_table(path: str, config: Mapping[str, Any], space: SearchSpace, **hub: Any) -> LatencyTable:
    """The table that a recipe's `latency.table` names, if it is one for this teacher and its search space.

    Args:
        hub: of [`hub.fetch`].
    """
    try:
        file = table_file(path, **hub)
    except EdgeDiTError as error:
        raise EdgeDiTError(f"latency.table is {error}") from None
    if not file.is_file():
        raise EdgeDiTError(
            f"latency.table is {path}, but there is no such file; give the table.json of another run's stage latency, "
            "or null to measure one."
        )
    try:
        table = LatencyTable.from_json(file)
        table.check_config(config, space)
    except EdgeDiTError as error:
        raise EdgeDiTError(f"latency.table is {path}: {error}") from None
    return table


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
        self.shapes = sorted({space.option_shape(option) for option in OPTIONS}, reverse=True)
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
                        "option": next(o for o in OPTIONS if space.option_shape(o) == shape),
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


# -------------------------------------------------------------------- parts


def trunk_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a table depends on besides the layers' shapes."""
    return {key: config[key] for key in TRUNK_KEYS}


def check_genotypes(space: SearchSpace) -> list[Genotype]:
    """Three genotypes for the prediction error: all original, all smallest, and one that mixes merges and all
    options.
    """
    codes = [codes[0] for codes in space.allowed], [codes[-1] for codes in space.allowed]
    # Steps through each pair's choices by a number prime to 20, so that neighbours differ.
    mixed = [codes[(7 * i + 6) % len(codes)] for i, codes in enumerate(space.allowed)]
    found = {genotype.hash: genotype for genotype in map(space.from_code, (*codes, mixed))}
    return list(found.values())


def random_model(config: Mapping[str, Any], seed: int = 0) -> EdgeDiTTransformer2DModel:
    """A model with random weights everywhere: zeros and repeated biases, as fresh models have, would be folded away in
    lowering.
    """
    import torch

    from ..models.transformer_edgedit import EdgeDiTTransformer2DModel

    model = EdgeDiTTransformer2DModel.with_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.eval()


def lower_network(config: Mapping[str, Any], runtime: str, precision: str, batch: int, path: Path) -> Path:
    """Write a whole network of random weights as the export stage does; returns the file, `path` with the format's
    suffix.
    """
    from ..export.lowering import lower_denoiser

    target = MEASURED[runtime]
    file = path.with_suffix(target.suffix)
    lower_denoiser(random_model(config), file, target.name, precision, None if target.dynamic else batch)
    return file


class LoweredParts:
    """Embedders, output layer and one layer of each shape, each lowered to ONNX once; [`~LoweredParts.network`] joins
    them to what a whole network's lowering gives.

    Args:
        config: the teacher's model config.
        shapes: distinct layer shapes.
        precision: of the networks.
    """

    def __init__(self, config: Mapping[str, Any], shapes: Sequence[Shape], precision: str):
        import onnx

        from ..export.lowering import EXAMPLE_ROWS
        from ..export.onnx.lower import lower_onnx
        from ..export.parts import layer_parts

        layers = [LayerSpec((i,), *shape).to_dict() for i, shape in enumerate(shapes)]
        before, blocks, after = layer_parts(random_model({**config, "layers": layers}), EXAMPLE_ROWS)
        lowered = []
        with tempfile.TemporaryDirectory() as folder:
            for part in (before, *blocks, after):
                file = Path(folder, part.name, "model.onnx")
                lower_onnx(part, file, precision, {"precision": precision})
                lowered.append(onnx.load(str(file)))
        self.embed, *blocks, self.unembed = lowered
        self.blocks = dict(zip(shapes, blocks))

    def network(self, shapes: Sequence[Shape], path: Path) -> Path:
        """Write a whole network with layers of these shapes; every layer has its own copy of the weights."""
        from ..export.onnx.lower import save_onnx

        return save_onnx(join([self.embed, *(self.blocks[shape] for shape in shapes), self.unembed]), path)


def join(parts: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
    """Join models end to end: an input `x` of a part is the newest output `x` or `x_out` of the parts before it.

    The first part's inputs are the result's inputs, the last part's outputs its outputs.
    """
    import onnx

    joined = onnx.ModelProto()
    joined.CopyFrom(parts[0])
    for field in ("node", "initializer", "output"):
        joined.graph.ClearField(field)
    known = {value.name: value.name for value in parts[0].graph.input}
    for number, part in enumerate(parts):
        outputs = [value.name for value in part.graph.output]
        last = number == len(parts) - 1
        names = {value.name: known[value.name] for value in part.graph.input}
        names |= {name: name if last else f"{number}.{name}" for name in outputs}

        def rename(name: str, names: dict[str, str] = names, number: int = number) -> str:
            return names.get(name, f"{number}.{name}" if name else "")

        for node in part.graph.node:
            copy = joined.graph.node.add()
            copy.CopyFrom(node)
            copy.name = f"{number}.{node.name}"
            copy.input[:] = map(rename, node.input)
            copy.output[:] = map(rename, node.output)
        for tensor in part.graph.initializer:
            copy = joined.graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = rename(tensor.name)
        there = {entry.domain for entry in joined.opset_import}
        joined.opset_import.extend(entry for entry in part.opset_import if entry.domain not in there)
        known |= {name.removesuffix("_out"): names[name] for name in outputs}
    joined.graph.output.extend(parts[-1].graph.output)
    return joined


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
