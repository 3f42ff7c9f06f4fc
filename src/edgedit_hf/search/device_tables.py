"""DeviceTables: the latency tables of several devices as one objective. And reading what a run's stage latency holds,
which is one table or several.

Devices are compared by ratios to the teacher on each. By default the worst of them counts: the student that is fast on
its slowest device; with weights their weighted mean. Either is given in milliseconds of the first device, ratio × what
the teacher takes there, so that bounds and pictures read as those of one table do.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EdgeDiTError
from ..files import atomic_write_json, file_sha256, hash_json, read_json
from ..genotype import Genotype, Shape
from ..run.stage import LATENCY
from ..search_space import SearchSpace
from .latency_table import LatencyTable, given_table, table_file

if TYPE_CHECKING:
    from ..run.sections import LatencyConfig

FORMAT = "edgedit-latency-tables-1"


class DeviceTables:
    """Tables of several devices for one teacher; used as a [`LatencyTable`] is.

    Args:
        tables: two or more, the first one's milliseconds are the unit.
        weights: of the devices' ratios to the teacher, whose weighted mean is the objective; `None`: the worst is.

    Raises:
        EdgeDiTError: they are of different teachers, input sizes or batches, or the weights are not one a table.
    """

    def __init__(self, tables: Sequence[LatencyTable], weights: Sequence[float] | None = None) -> None:
        if len(tables) < 2:
            raise EdgeDiTError(f"{len(tables)} latency tables are given; devices are compared from two on.")
        if weights is not None and (len(weights) != len(tables) or not all(weight > 0 for weight in weights)):
            raise EdgeDiTError(
                f"latency.weights is {list(weights)} for {len(tables)} tables; give a number above 0 for each."
            )
        first = tables[0]
        for table in tables[1:]:
            own, other = _teacher(first), _teacher(table)
            if differing := [name for name in own if own[name] != other[name]]:
                both = "; ".join(
                    f"{name} {own[name]} ({first.device}) / {other[name]} ({table.device})" for name in differing
                )
                raise EdgeDiTError(
                    f"The latency tables do not belong together: {both}. Give tables of one teacher and batch."
                )
        self.tables, self.weights = list(tables), None if weights is None else [float(weight) for weight in weights]
        self.space, self.trunk, self.batch = first.space, first.trunk, first.batch
        self.runtime, self.precision = first.runtime, first.precision
        self.devices = dict(zip(_labels(tables), tables))
        whole = _original(first.space)
        self.teacher_ms = {name: table.latency_ms(whole) for name, table in self.devices.items()}

    @property
    def factors(self) -> dict[str, float]:
        """What a device's milliseconds are multiplied with to be the first one's, by the teacher's; with the weight."""
        unit = next(iter(self.teacher_ms.values()))
        weights = [1.0] * len(self.tables) if self.weights is None else [w / sum(self.weights) for w in self.weights]
        return {name: weight * unit / ms for weight, (name, ms) in zip(weights, self.teacher_ms.items())}

    def latencies_ms(self, genotype: Genotype) -> dict[str, float]:
        """Predicted milliseconds on every device."""
        return {name: table.latency_ms(genotype) for name, table in self.devices.items()}

    def latency_ms(self, genotype: Genotype) -> float:
        """The objective: the worst ratio to the teacher, or the weighted mean, × its ms on the first device."""
        found = [self.factors[name] * ms for name, ms in self.latencies_ms(genotype).items()]
        return max(found) if self.weights is None else sum(found)

    # ---------------------------------------------------------------- as costs of a programme

    @property
    def caps_ms(self) -> tuple[str, ...]:
        """Costs in milliseconds that a budget in milliseconds holds for: every device's."""
        return tuple(map(_cost, self.devices))

    @property
    def worst(self) -> dict[str, dict[str, float]]:
        """Costs that are the greatest of others, see [`~programme.Programme`]."""
        return {"latency_ms": {_cost(name): f for name, f in self.factors.items()}} if self.weights is None else {}

    def layer_costs(self, shape: Shape) -> dict[str, float]:
        """What a layer of a shape adds to the costs."""
        return self._costs({name: table.block(shape) for name, table in self.devices.items()})

    @property
    def trunk_costs(self) -> dict[str, float]:
        """What is spent besides the layers."""
        return self._costs({name: table.trunk_ms for name, table in self.devices.items()})

    def _costs(self, ms: Mapping[str, float]) -> dict[str, float]:
        summed = {} if self.weights is None else {"latency_ms": sum(self.factors[name] * ms[name] for name in ms)}
        return {**summed, **{_cost(name): value for name, value in ms.items()}}

    # ---------------------------------------------------------------- what is held against it

    def check_config(self, config: Mapping[str, Any], space: SearchSpace | None = None) -> None:
        """See [`LatencyTable.check_config`]; of every table."""
        for table in self.tables:
            table.check_config(config, space)

    def check_run(self, options: LatencyConfig | None = None, accept_other: bool = False) -> None:
        """See [`LatencyTable.check_run`]; of every table."""
        for table in self.tables:
            table.check_run(options, accept_other)

    @property
    def remarks(self) -> list[str]:
        """See [`LatencyTable.remarks`]; every one with its device."""
        return [f"{name}: {remark}" for name, table in self.devices.items() for remark in table.remarks]

    # ---------------------------------------------------------------- files

    @property
    def hash(self) -> str:
        """16 hex digits over all tables and the weights."""
        return hash_json(self._data())

    def _data(self) -> dict[str, Any]:
        tables = [{**table.to_dict(), "hash": table.hash} for table in self.tables]
        return {"format": FORMAT, "tables": tables, "weights": self.weights}

    def to_json(self, path: str | os.PathLike) -> None:
        """Write all tables into one file."""
        atomic_write_json(path, {**self._data(), "hash": self.hash})


def load_table(path: str | os.PathLike) -> LatencyTable | DeviceTables:
    """The table, or the tables of several devices, in a file or under a name on the Hub; what was changed by hand is
    refused.
    """
    file = table_file(path)
    data = read_json(file, LATENCY.made_by)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        return LatencyTable.from_json(path)
    if not isinstance(data.get("tables"), list):
        raise EdgeDiTError(f"{file} holds no list of tables; {LATENCY.made_by} writes it, run that stage again.")
    tables = [LatencyTable.read(values, f"{file}: table {place}") for place, values in enumerate(data["tables"])]
    weights = data.get("weights")
    if weights is not None and not (isinstance(weights, list) and all(type(each) in (int, float) for each in weights)):
        raise EdgeDiTError(f"{file}: weights is {weights!r}; it must be a list of numbers, or null.")
    found = DeviceTables(tables, weights)
    if data.get("hash") != found.hash:
        raise EdgeDiTError(
            f"{file} states the hash {data.get('hash')}, but its values give {found.hash}; it was changed. Build "
            "it again."
        )
    return found


def table_names(table: str | Sequence[str] | None) -> list[str]:
    """The names that a recipe's `latency.table` gives: none, one, or several."""
    return [] if table is None else [table] if isinstance(table, str) else list(table)


def given_tables(
    options: LatencyConfig, config: Mapping[str, Any], space: SearchSpace, check_run: bool = True, **hub: Any
) -> LatencyTable | DeviceTables:
    """What a recipe's `latency.table` names, if it is for this teacher and its search space.

    Args:
        options: of the recipe, with a table. check_run: whether every table must also be measured as they say.
        hub: of [`hub.fetch`].
    """
    asked = options if check_run else None
    tables = [given_table(name, config, space, asked, **hub) for name in table_names(options.table)]
    return tables[0] if len(tables) == 1 else DeviceTables(tables, options.weights)


def given_files(table: str | Sequence[str] | None) -> list[Path]:
    """The files that a recipe's `latency.table` names."""
    return [table_file(name) for name in table_names(table)]


def files_hash(files: Sequence[Path]) -> str | None:
    """A hash of the files' content; of one file its SHA-256; `None`: there are none."""
    hashes = [file_sha256(file) for file in files]
    return None if not hashes else hashes[0] if len(hashes) == 1 else hash_json(hashes)


def _cost(device: str) -> str:
    return f"latency_ms[{device}]"


def _labels(tables: Sequence[LatencyTable]) -> list[str]:
    """A name for each: its device; with the runtime, and a number, where that is not enough to tell them apart."""
    for names in (
        [table.device for table in tables],
        [f"{table.device}, {table.runtime}-{table.precision}" for table in tables],
    ):
        if max(Counter(names).values()) == 1:
            return names
    return [f"{name} #{place}" for place, name in enumerate(names, 1)]


def _teacher(table: LatencyTable) -> dict[str, Any]:
    """What tables that are compared have in common."""
    sizes = {name: getattr(table.space, name) for name in ("num_layers", "hidden_size", "num_heads", "mlp_ratio")}
    return {"batch": table.batch, **table.trunk, **sizes}


def _original(space: SearchSpace) -> Genotype:
    return Genotype.original(space.num_layers, space.hidden_size, space.num_heads, space.mlp_ratio)
