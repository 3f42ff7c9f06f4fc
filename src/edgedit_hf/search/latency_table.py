"""LatencyTable: what a genotype costs in the runtime that ships, from one measurement a distinct layer shape.

A single layer alone is dominated by call overhead and meets warmer caches than it does inside a network, so networks
about as deep as the teacher ([`fitted_networks`]) are timed, all interleaved, and a network's time is fitted as `trunk
+ Σ layers`. Other whole networks ([`held_out`]) run in the same rounds; the table keeps how well it predicts them
(`prediction`). It belongs to a device, a version of the runtime, a number of threads, a precision, a batch and an input
size, and says so.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import EdgeDiTError
from ..files import atomic_write_json, hash_json, read_json, versions
from ..genotype import Genotype, Shape
from ..hub import is_name, resolve
from ..records import Table
from ..run.stage import LATENCY
from ..runtimes.timing import cpu_model
from ..schema import held_to
from ..search_space import SearchSpace

if TYPE_CHECKING:
    from ..run.sections import LatencyConfig

FORMAT = 1
UNSAID = "not said"
PROTOCOL = ("bundle", "backend", "cold_loads", "warmups", "rounds", "drift")  # what an imported table must say
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
        return self.trunk_ms + sum(self.block(layer.shape.timed) for layer in genotype.layers)

    def block(self, shape: Shape) -> float:
        """Milliseconds of a layer of this shape; one that was not measured is an [`EdgeDiTError`]."""
        if shape not in self.blocks:
            raise EdgeDiTError(
                f"The genotype has a layer of shape {shape} (attention_dim, num_heads, mlp_ratio); this table "
                f"measured {', '.join(map(str, self.blocks))}. Build a table for its search space."
            )
        return self.blocks[shape]

    # ---------------------------------------------------------------- as costs of a programme

    caps_ms = ("latency_ms",)  # costs in milliseconds that a budget in milliseconds holds for
    worst: Mapping[str, dict[str, float]] = MappingProxyType({})  # costs that are the greatest of others: none

    @property
    def devices(self) -> dict[str, LatencyTable]:
        """The tables by device: this one."""
        return {self.device: self}

    def layer_costs(self, shape: Shape) -> dict[str, float]:
        """What a layer of a shape adds to the costs."""
        return {"latency_ms": self.block(shape)}

    @property
    def trunk_costs(self) -> dict[str, float]:
        """What is spent besides the layers."""
        return {"latency_ms": self.trunk_ms}

    # ---------------------------------------------------------------- what is held against it

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
        for layer in () if space is None else space.replacements():
            self.block(layer.shape.timed)

    @property
    def imported(self) -> bool:
        """Whether it was made of what another device measured."""
        return (self._data.get("protocol") or {}).get("imported") is True

    @property
    def remarks(self) -> list[str]:
        """What is to be known before it is believed, in words: bars that its error misses, networks that scattered."""
        said = (self._data.get("prediction") or {}).get("remarks", ())
        return [f"the table's predictions are to be taken with care: {remark}" for remark in said]

    @property
    def device(self) -> str:
        """The processor that it was measured on, as the table names it."""
        return device_name(self._data["environment"].get("cpu"), self._data["environment"].get("machine"))

    def differences(self, options: LatencyConfig | None = None) -> dict[str, tuple[Any, Any]]:
        """What the table was measured with and a run would not: name → both values, the table's first.

        Args:
            options: of the run's recipe; `None`: only this machine is compared (its processor, and the version of the
                runtime that is installed). Of an imported table the batch alone is: its user named the device.
        """
        if self.imported:
            theirs = {} if options is None else {"latency.batch_size": (self.batch, options.batch_size)}
            return {name: pair for name, pair in theirs.items() if pair[0] != pair[1]}
        version = (self._data["environment"].get("versions") or {}).get(self.runtime, UNSAID)
        pairs: dict[str, tuple[Any, Any]] = {
            "device": (self.device, device_name(cpu_model(), platform.machine())),
            f"version of {self.runtime}": (version, versions().get(self.runtime, "not installed")),
        }
        if options is not None:
            pairs |= {
                "latency.runtime": (self.runtime, options.runtime),
                "latency.precision": (self.precision, options.precision),
                "latency.batch_size": (self.batch, options.batch_size),
                "latency.threads": (self.threads, options.threads),
            }
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def check_run(self, options: LatencyConfig | None = None, accept_other: bool = False) -> None:
        """Raise an [`EdgeDiTError`] if the table was measured on another device, with another version of the runtime or
        otherwise than the run asks for, unless its recipe or `accept_other` says that it may be.

        Args:
            options: see [`~LatencyTable.differences`].

        Raises:
            EdgeDiTError: so is an imported table that does not say how it was measured.
        """
        protocol = self._data.get("protocol") or {}
        if self.imported and (lacking := [name for name in PROTOCOL if protocol.get(name) is None]):
            raise EdgeDiTError(
                f"The latency table of {self.device} was imported, but its protocol does not say {', '.join(lacking)}; "
                "import the device's results again (edgedit phone import)."
            )
        if accept_other or (options is not None and options.accept_other):
            return
        if differing := self.differences(options):
            both = "; ".join(f"{name} {own} (table) / {here} (here)" for name, (own, here) in differing.items())
            raise EdgeDiTError(
                f"The latency table was measured otherwise than this run would: {both}. Measure one here (delete the "
                "stage's folder, latency.table=null), or take it as it is with latency.accept_other=true (edgedit "
                "select: --accept-other)."
            )

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
        return cls.read(read_json(table_file(path), LATENCY.made_by), path)

    @classmethod
    def read(cls, data: Any, path: str | os.PathLike) -> LatencyTable:
        """The table of a file's values, with their hash; `path`: what messages call them."""
        stated = data.get("hash") if isinstance(data, dict) else None
        try:
            table = cls(
                {key: value for key, value in data.items() if key != "hash"} if isinstance(data, dict) else data
            )
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


def given_table(
    path: str, config: Mapping[str, Any], space: SearchSpace, options: LatencyConfig | None = None, **hub: Any
) -> LatencyTable:
    """The table that a recipe's `latency.table` names, if it is one for this teacher and its search space.

    Args:
        options: of the recipe, if the table must also be of this machine and measured as they say.
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
        if options is not None:
            table.check_run(options)
    except EdgeDiTError as error:
        raise EdgeDiTError(f"latency.table is {path}: {error}") from None
    return table


def device_name(cpu: str | None, machine: str | None) -> str:
    """A processor in words: its name and architecture, as far as they are said."""
    return f"{cpu} ({machine})" if cpu and machine else cpu or machine or UNSAID


def trunk_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a table depends on besides the layers' shapes."""
    return {key: config[key] for key in TRUNK_KEYS}
