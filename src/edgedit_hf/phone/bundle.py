"""A bundle: the networks that a latency table takes, as files for a device, with all that is to be known of them.

They are whole networks, not single layers (`search.latency_networks`). Importing this needs no torch; making one does.

    bundle.json         what is measured, how often, and the hash by which results name it
    networks/           a file a network; ONNX graphs share the weights of their layers, `*.onnx.data`
    inputs/             the inputs of a forward, raw little-endian values in the files' order

Everything that a graph names lies in its own folder under a plain name: ONNX Runtime refuses weights from anywhere
else, and a browser is handed them by that name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import EdgeDiTError
from ..export.formats import FORMATS, RUNTIMES
from ..files import atomic_folder, atomic_write_json, file_sha256, hash_json, read_json, versions
from ..folders import look_at
from ..genotype import Genotype, LayerSpec, Shape
from ..records import BankFigures, GivenChoice, Space, Trunk
from ..run.stage import BANK, STUDENT, TEACHER
from ..schema import held_to, key, read_record
from ..search.latency_networks import LoweredParts, lower_network
from ..search.latency_plan import TablePlan, network_bytes
from ..search.latency_table import trunk_of
from ..search_space import SearchSpace
from .results import COLD_LOADS, ROUNDS, WARMUPS

FORMAT, BUNDLE = "edgedit-phone-bundle-1", "bundle.json"
MADE_BY = "edgedit phone"
NETWORKS, INPUTS = "networks", "inputs"
ONNX = ("onnxruntime", "web")  # runtimes whose networks are joined from parts
PRECISIONS = {
    "onnxruntime": ("fp32", "int8"),
    "web": ("fp32", "int8"),
    "executorch": tuple(FORMATS["executorch"].measured),
    "coreml": tuple(FORMATS["coreml"].precisions),
}
TEACHERS, STUDENTS = "teacher", "student"  # names of these two


@dataclass(kw_only=True)
class NetworkFile:
    """A network of a bundle."""

    name: str = key(file=True)
    fitted: bool = key()
    layers: list[dict[str, Any]] = key(items=1000, fewest=1)
    file: str = key(path=True)
    files: list[str] = key(path=True, items=10**4, fewest=1)


@dataclass(kw_only=True)
class InputFile:
    """An input of a forward."""

    name: str = key()
    dtype: str = key(choices=("float32", "int64"))
    shape: list[int] = key(minimum=1, maximum=2**20, items=8, fewest=1)
    file: str = key(path=True)


@dataclass(kw_only=True)
class Stored:
    """A file of a bundle."""

    bytes: int = key(minimum=0, maximum=2**50)
    sha256: str = key(length=(64, 64))


@dataclass(kw_only=True)
class Protocol:
    """How often every network is run, at least."""

    cold_loads: int = key(minimum=1, maximum=1000)
    warmups: int = key(minimum=1, maximum=1000)
    rounds: int = key(minimum=2, maximum=10**5)


@dataclass(kw_only=True)
class BundleFile:
    """bundle.json."""

    format: str = key(choices=(FORMAT,))
    runtime: str = key(choices=tuple(PRECISIONS))
    precision: str = key()
    batch: int = key(minimum=1, maximum=2**20)
    space: Space = key()
    trunk: Trunk = key()
    protocol: Protocol = key()
    inputs: list[InputFile] = key(items=10, fewest=1)
    networks: list[NetworkFile] = key(items=10**4, fewest=2)
    files: dict[str, Stored] = key(items=10**5, fewest=2)
    hash: str = key(length=(8, 64))


class Bundle:
    """A bundle that is there.

    Args:
        folder: where. data: what its `bundle.json` holds, the hash apart.
    """

    def __init__(self, folder: Path, data: Mapping[str, Any]) -> None:
        self.folder, self.data = folder, dict(data)
        self.hash = hash_json(self.data)
        self.runtime: str = data["runtime"]
        self.precision: str = data["precision"]
        self.batch: int = data["batch"]

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Bundle:
        """The bundle in a folder; one whose `bundle.json` was changed is refused.

        Its networks need not be there: results are imported without them, see [`~Bundle.check_files`].
        """
        path = Path(folder) / BUNDLE
        data = read_json(path, MADE_BY)
        held_to(data, BundleFile, path, MADE_BY, "a bundle of networks to measure")
        named = [*data["files"], *(entry["file"] for entry in (*data["networks"], *data["inputs"]))]
        for place in (*named, *(file for entry in data["networks"] for file in entry["files"])):
            if os.path.isabs(place) or ".." in Path(place).parts or "\\" in place:
                raise EdgeDiTError(f"{path} names the file {place!r}, which is outside its folder; make it anew.")
        stated = data.pop("hash")
        bundle = cls(Path(folder), data)
        if stated != bundle.hash:
            raise EdgeDiTError(
                f"{path} states the hash {stated}, but its values give {bundle.hash}; it was changed. Make it anew."
            )
        return bundle

    @cached_property
    def plan(self) -> TablePlan:
        """Which networks a table of it is fitted to and judged by."""
        space = SearchSpace.from_dict(self.data["space"])
        whole = [(entry["fitted"], self._genotype(entry)) for entry in self.data["networks"]]
        fitted = [tuple(layer.shape.timed for layer in genotype.layers) for first, genotype in whole if first]
        return TablePlan(self.data["trunk"], space, [genotype for first, genotype in whole if not first], fitted)

    @cached_property
    def networks(self) -> dict[str, Any]:
        """The keys of the plan's networks, by their names here."""
        return {
            entry["name"]: tuple(layer.shape.timed for layer in genotype.layers) if entry["fitted"] else genotype.hash
            for entry in self.data["networks"]
            for genotype in [self._genotype(entry)]
        }

    def _genotype(self, entry: Mapping[str, Any]) -> Genotype:
        return Genotype.from_layers(entry["layers"], self.data["space"]["hidden_size"])

    def check_files(self) -> None:
        """Raise an [`EdgeDiTError`] unless every file is there as it was written."""
        for name, stored in self.data["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise EdgeDiTError(f"{path} of the bundle is missing; make the bundle anew.")
            if path.stat().st_size != stored["bytes"] or file_sha256(path) != stored["sha256"]:
                raise EdgeDiTError(f"{path} holds other bytes than {BUNDLE} says; make the bundle anew.")


def bundles_of(run_dir: str | os.PathLike) -> list[Path]:
    """The `bundle.json` of every bundle that was made in a run."""
    return sorted(Path(run_dir, "phone").glob(f"*/{BUNDLE}"))


# -------------------------------------------------------------------- what of a run


@dataclass(frozen=True)
class Subject:
    """What a bundle is made for.

    Args:
        config: the teacher's model config. space: the bank's search space. student: of the run, if it has one.
    """

    config: dict[str, Any]
    space: SearchSpace
    student: Genotype | None = None


def subject_of(run_dir: str | os.PathLike, teacher: str | os.PathLike | None = None) -> Subject:
    """The teacher's config, the bank's space and the student of a run.

    Args:
        teacher: the folder of the teacher's pipeline, where the run was given one.

    Raises:
        EdgeDiTError: the run has no bank or no teacher, or they do not belong together.
    """
    run_dir = Path(run_dir)
    index = read_record(run_dir / BANK.folder / "index.json", BankFigures, BANK.made_by)
    space = SearchSpace.from_dict(index["space"])
    if teacher is None and not (run_dir / TEACHER.folder).exists():
        raise EdgeDiTError(
            f"{run_dir} has no teacher of its own; give the one that its bank was made from (--teacher)."
        )
    contents = look_at(run_dir / TEACHER.folder if teacher is None else teacher)
    config = contents.config
    sizes = ("num_layers", "hidden_size", "num_heads")
    if contents.family != "edgedit" or "layers" not in config:
        raise EdgeDiTError(f"{contents.path} holds no class-conditional network; give the teacher of the bank.")
    whole = Genotype.of(config)
    found = whole.num_teacher_layers, whole.hidden_size, whole.layers[0].num_heads
    if found != (own := tuple(getattr(space, name) for name in sizes)):
        said = ", ".join(f"{name} {a} (bank) / {b} (teacher)" for name, a, b in zip(sizes, own, found) if a != b)
        raise EdgeDiTError(f"The bank {run_dir / BANK.folder} belongs to another teacher: {said}. Give its own.")
    student = None
    if (choice := run_dir / STUDENT.folder / "choice.json").is_file():
        layers = read_record(choice, GivenChoice, STUDENT.made_by)["genotype"]
        student = Genotype.from_layers(layers, space.hidden_size)
    return Subject(config, space, student)


# -------------------------------------------------------------------- making one


def check_kind(runtime: str, precision: str) -> None:
    """Raise an [`EdgeDiTError`] unless there are bundles of this runtime and precision."""
    if runtime not in PRECISIONS or precision not in PRECISIONS[runtime]:
        known = "; ".join(f"{name}: {', '.join(found)}" for name, found in PRECISIONS.items())
        raise EdgeDiTError(f"A bundle of {runtime}-{precision} is asked for; what exists is {known}.")
    if runtime not in ONNX:
        RUNTIMES[runtime].require()


def bundle_bytes(plan: TablePlan, runtime: str, precision: str) -> float:
    """About how many bytes a bundle has: joined networks share the weights of their layers, others do not."""
    if runtime in ONNX:
        return network_bytes(plan.config, plan.shapes, precision)
    return plan.weight_bytes(precision)


def make_bundle(
    folder: Path,
    subject: Subject,
    *,
    runtime: str,
    precision: str,
    batch: int,
    tell: Callable[[str], None] = lambda line: None,
) -> Bundle:
    """Lower the networks of a teacher's latency table into a folder that is empty.

    Args:
        runtime, precision: of [`PRECISIONS`]. batch: images a forward.
        tell: called with lines that say how far it is.

    Raises:
        EdgeDiTError: there is no such kind, or the disk has no room.
    """
    check_kind(runtime, precision)
    plan, names = _planned(subject)
    need, free = 1.1 * bundle_bytes(plan, runtime, precision), shutil.disk_usage(folder).free
    if need > free:
        raise EdgeDiTError(
            f"The {len(plan.networks)} networks take about {need / 1e9:.1f} GB, but {folder.parent} has "
            f"{free / 1e9:.1f} GB left; make room, or choose a smaller precision."
        )
    lower = _lowering(plan, runtime, precision, batch, folder / NETWORKS)
    entries = []
    fitted = (f"fitted-{place:02}" for place in range(len(plan.fitted)))
    specs = [(True, name, _spec(shapes)) for name, shapes in zip(fitted, plan.fitted)]
    specs += [(False, name, list(genotype.layers)) for name, genotype in zip(names, plan.check)]
    for place, (first, name, layers) in enumerate(specs, 1):
        tell(f"network {place} of {len(specs)}: {name}")
        files = lower(name, tuple(layer.shape.timed for layer in layers))
        entries.append(
            {
                "name": name,
                "fitted": first,
                "layers": [layer.to_dict() for layer in layers],
                "file": f"{NETWORKS}/{files[0]}",
                "files": [f"{NETWORKS}/{file}" for file in files[1:]],
            }
        )
    inputs = _write_inputs(plan.config, batch, folder, test_data=runtime == "onnxruntime")
    data = {
        "format": FORMAT,
        "runtime": runtime,
        "precision": precision,
        "batch": batch,
        "space": subject.space.to_dict(),
        "trunk": trunk_of(plan.config),
        "protocol": {"cold_loads": COLD_LOADS, "warmups": WARMUPS, "rounds": ROUNDS},
        "versions": versions(),
        "inputs": inputs,
        "networks": entries,
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    }
    bundle = Bundle(folder, data)
    atomic_write_json(folder / BUNDLE, {**data, "hash": bundle.hash})
    return bundle


def _planned(subject: Subject) -> tuple[TablePlan, list[str]]:
    """The networks of a subject's bundle, and the names of those that judge the table."""
    plan = TablePlan(subject.config, subject.space)
    whole = Genotype.of(subject.config)
    known = {genotype.hash for genotype in plan.check}
    named = {whole.hash: TEACHERS}
    if subject.student is not None and subject.student.hash != whole.hash:
        named[subject.student.hash] = STUDENTS
    plan.check += [g for g in (whole, subject.student) if g is not None and g.hash in set(named) - known]
    return plan, [named.get(genotype.hash, f"judged-{place:02}") for place, genotype in enumerate(plan.check)]


def bundle_in_run(
    run_dir: str | os.PathLike,
    subject: Subject,
    *,
    runtime: str,
    precision: str,
    batch: int,
    tell: Callable[[str], None] = lambda line: None,
) -> Bundle:
    """The bundle of a run's subject, below the run: the one that is there, checked, or made now.

    What it is made of stands in its folder's name, so that results of an earlier student or version keep their bundle.

    Args:
        subject, runtime, precision, batch, tell: of [`make_bundle`].
    """
    check_kind(runtime, precision)
    student = subject.student and subject.student.to_layers()
    made_of = [subject.space.to_dict(), trunk_of(subject.config), student, batch, versions()]
    place = Path(run_dir, "phone", f"{runtime}-{precision}-{hash_json(made_of)[:8]}")
    if not (place / BUNDLE).is_file():
        with atomic_folder(place) as folder:
            make_bundle(folder, subject, runtime=runtime, precision=precision, batch=batch, tell=tell)
    bundle = Bundle.read(place)
    bundle.check_files()
    return bundle


def _spec(shapes: Sequence[Shape]) -> list[LayerSpec]:
    return [LayerSpec((place,), *shape) for place, shape in enumerate(shapes)]


def _lowering(
    plan: TablePlan, runtime: str, precision: str, batch: int, folder: Path
) -> Callable[[str, tuple[Shape, ...]], list[str]]:
    """What writes a network with layers of such shapes under a name, and returns what a run opens and, after it, all
    files that it needs.
    """
    folder.mkdir()
    if runtime in ONNX:
        import onnx

        parts = LoweredParts(plan.config, plan.shapes, precision, folder)
        for path in folder.glob("*.onnx"):  # the parts' graphs; their weights stay
            path.unlink()

        def join(name: str, shapes: tuple[Shape, ...]) -> list[str]:
            path = parts.network(shapes, folder / f"{name}.onnx")
            graph = onnx.load(str(path), load_external_data=False).graph
            data = {e.value for tensor in graph.initializer for e in tensor.external_data if e.key == "location"}
            return [path.name, path.name, *sorted(data)]

        return join

    def lower(name: str, shapes: tuple[Shape, ...]) -> list[str]:
        layers = [layer.to_dict() for layer in _spec(shapes)]
        path = lower_network({**plan.config, "layers": layers}, runtime, precision, batch, folder / name)
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        return [path.name, *(file.relative_to(folder).as_posix() for file in inside if file.is_file())]

    return lower


def _write_inputs(config: Mapping[str, Any], batch: int, folder: Path, test_data: bool) -> list[dict[str, Any]]:
    """Write the inputs of a forward as raw values and, with `test_data`, as onnxruntime_perf_test looks for them: in a
    folder beside the networks.
    """
    from ..runtimes.runners import example_inputs

    (folder / INPUTS).mkdir()
    entries = []
    for place, (name, value) in enumerate(example_inputs(config, batch).items()):
        array = value.contiguous().numpy()
        file = f"{INPUTS}/{place}-{name}.bin"
        (folder / file).write_bytes(array.astype(array.dtype.newbyteorder("<")).tobytes())
        entries.append({"name": name, "dtype": str(array.dtype), "shape": list(array.shape), "file": file})
        if test_data:
            from onnx import numpy_helper

            beside = folder / NETWORKS / "test_data_set_0"
            beside.mkdir(exist_ok=True)
            (beside / f"input_{place}.pb").write_bytes(numpy_helper.from_array(array, name).SerializeToString())
    return entries
