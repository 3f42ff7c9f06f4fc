"""Which point of a finished search becomes the student, and assembling it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..distill.proxy_bank import ProxyBank
from ..files import atomic_write_json, check_finite
from ..genotype import Genotype
from ..pipelines.loading import load_pipeline, with_transformer
from ..pipelines.pipeline_edgedit import EdgeDiTPipeline
from ..records import Front
from ..run.config import RunConfig
from ..run.outputs import check_output, foreign_to_student
from ..run.results import check_sources, replace_results
from ..run.stage import EDGEDIT, SEARCH, STUDENT, TEACHER
from ..schema import read_record
from ..search_space import BYTES, activation_bytes
from .blocks import weights_precision
from .device_tables import DeviceTables, load_table
from .exact import ExactChoice, accepted, device_facts
from .pareto import choose


def select(
    run_dir: str | os.PathLike,
    *,
    max_latency_ms: float | None = None,
    max_latency_ratio: float | None = None,
    max_parameters_ratio: float | None = None,
    max_flops_ratio: float | None = None,
    max_bytes_mb: float | None = None,
    max_memory_mb: float | None = None,
    bytes_precision: str | None = None,
    accept_other: bool = False,
    output: str | os.PathLike | None = None,
    exact: ExactChoice | None = None,
) -> dict[str, Any]:
    """Choose a point of the front, or the solution of an integer programme, and write the assembled student.

    Within the bounds the lowest distance; without any bound the knee point of the front.

    Args:
        run_dir: a run with a finished search; with `exact`, one with a bank and a latency table.
        max_latency_ms: bound on the table latency, in ms; with tables of several devices, on every device.
        max_latency_ratio, max_parameters_ratio, max_flops_ratio: bounds as shares of the teacher's.
        max_bytes_mb: bound on the bytes of the weights, in MB (10^6).
        max_memory_mb: bound on a lower estimate of peak memory at the latency table's batch, in MB (10^6): the weights,
            and what the layer that holds the most values at once holds; without what the runtime's arena takes beyond.
        bytes_precision: of the weights that both are about, one of [`BYTES`]; default that of the latency table (of
            `exact`, its own).
        accept_other: take the run's latency table though it is not of this machine; so does a run whose recipe had
            `latency.accept_other`.
        output: pipeline folder to write, with `choice.json`; default `run_dir/student`.
        exact: chooses in the place of the front: within the bounds the least loss by the bank.

    Returns:
        what `choice.json` holds.

    Raises:
        EdgeDiTError: the search is unfinished or of another bank, table or teacher than is there now, or no point of
            the front keeps the bounds.
    """
    run_dir = Path(run_dir)
    output = run_dir / "student" if output is None else output
    if exact is not None:
        bounds = max_latency_ms, max_latency_ratio, max_parameters_ratio, max_flops_ratio, max_bytes_mb, max_memory_mb
        solution, facts = exact.choose(exact.caps(*bounds))
        _check_place(output, run_dir, run_dir / TEACHER.folder)
        return write_student(exact.teacher, exact.bank, solution.genotype, output, facts)
    front = read_record(run_dir / "search" / "front.json", Front, SEARCH.made_by)
    whole = front["teacher"]
    made_of = RunConfig(output_dir=str(run_dir))
    made_of.teacher.path = whole["path"]
    check_sources(made_of, [SEARCH.folder], EDGEDIT)
    file = run_dir / "latency" / "table.json"
    table = load_table(file) if file.is_file() else None
    entries, max_slowest_ms = front["front"], None
    if max_latency_ms is None and max_latency_ratio is not None:
        max_latency_ms = max_latency_ratio * whole["latency_ms"]
    elif max_latency_ms is not None and isinstance(table, DeviceTables):
        max_latency_ms, max_slowest_ms = None, max_latency_ms
        entries = [
            {**entry, "slowest_ms": max(table.latencies_ms(table.space.from_code(entry["code"])).values())}
            for entry in entries
        ]
    if max_bytes_mb is not None or max_memory_mb is not None:
        made_with = load_table(file) if table is None else table
        sizes = partial(_sizes, precision=bytes_precision or weights_precision(made_with), batch=made_with.batch)
        entries = [{**entry, **sizes(entry)} for entry in entries]
    entry, reason = choose(
        entries,
        max_latency_ms=max_latency_ms,
        max_parameters=None if max_parameters_ratio is None else max_parameters_ratio * whole["parameters"],
        max_flops=None if max_flops_ratio is None else max_flops_ratio * whole["flops"],
        max_bytes=None if max_bytes_mb is None else max_bytes_mb * 1e6,
        max_memory=None if max_memory_mb is None else max_memory_mb * 1e6,
        max_slowest_ms=max_slowest_ms,
    )
    path = whole["path"] or run_dir / "teacher"
    _check_place(output, run_dir, path)
    teacher = load_pipeline(path, TEACHER.made_by)
    if table is not None:
        table.check_config(teacher.transformer.config)
        table.check_run(accept_other=accept_other or accepted(run_dir / "latency" / "run.json"))
    bank = ProxyBank(run_dir / "bank", teacher.transformer)
    facts = {
        "reason": reason,
        "predicted_latency_ms": entry["latency_ms"],
        "teacher_latency_ms": whole["latency_ms"],
        "distance": entry["distance"],
    }
    genotype = bank.space.from_code(entry["code"])
    facts |= {} if table is None else device_facts(table, genotype)
    return write_student(teacher, bank, genotype, output, facts)


def _sizes(entry: Mapping[str, Any], precision: str, batch: int) -> dict[str, float]:
    """Bytes and memory of a point of the front, as far as it says what they take (those of older searches do not)."""
    sizes = {}
    if "weights" in entry:
        sizes["bytes"] = entry["weights"] * BYTES[precision]
        if "live_values" in entry:
            sizes["memory"] = sizes["bytes"] + activation_bytes(entry["live_values"], batch, precision)
    return sizes


def _check_place(output: str | os.PathLike, run_dir: Path, teacher: str | os.PathLike) -> None:
    """Raise if a student must not be written there."""
    inputs = [teacher, *(run_dir / stage.folder for stage in EDGEDIT[: EDGEDIT.index(STUDENT)])]
    check_output(output, inputs, overwrite=True, foreign=foreign_to_student)


def write_student(
    teacher: EdgeDiTPipeline, bank: ProxyBank, genotype: Genotype, output: str | os.PathLike, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Assemble a genotype's student and write it as a pipeline folder with `choice.json`: its genotype, and `facts`
    about the choice.

    The folder changes as a whole: killed at any moment, either the earlier student stands there or this one.

    Returns:
        what `choice.json` holds.
    """
    student = bank.assemble(genotype)
    check_finite(
        student.state_dict(),
        "The assembled student",
        f"nothing was written. Make {bank.folder} anew from a sound teacher.",
    )
    choice = {
        "genotype": genotype.to_layers(),
        "genotype_hash": genotype.hash,
        "code": list(bank.space.code(genotype)),
        **facts,
    }
    with replace_results(output) as folder:
        with_transformer(teacher, student).save_pretrained(folder)
        atomic_write_json(folder / "choice.json", choice)
    return choice
