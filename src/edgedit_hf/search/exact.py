"""The student of a run without a search: the best by the bank's losses and the latency table, proved."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..distill.proxy_bank import ProxyBank
from ..distill.teacher import load_teacher
from ..errors import EdgeDiTError
from ..genotype import Genotype
from ..pipelines.pipeline_edgedit import EdgeDiTPipeline
from ..records import Asked
from ..run.config import RunConfig
from ..run.results import check_sources
from ..run.stage import BANK, EDGEDIT, LATENCY, SEARCH, TEACHER
from ..schema import read_record
from .blocks import programme_of, weights_precision
from .device_tables import DeviceTables, load_table
from .latency_table import LatencyTable
from .pareto import knee_point
from .programme import Programme, Solution, said

SWEEP = 33  # budgets among which the knee point is looked for, where no cap is given


def was_searched(run_dir: str | os.PathLike) -> bool:
    """Whether a run has a search, be it finished or not."""
    return any(Path(run_dir, SEARCH.folder, name).exists() for name in ("front.json", "state.json", "run.json"))


def accepted(record: Path) -> bool:
    """Whether the recipe that a latency stage was run with takes tables of other machines."""
    if not record.is_file():
        return False
    options = read_record(record, Asked, LATENCY.made_by)["config"].get("latency")
    return isinstance(options, Mapping) and options.get("accept_other") is True


def device_facts(table: LatencyTable | DeviceTables, genotype: Genotype) -> dict[str, Any]:
    """What `choice.json` says of a student on every device, where there are tables of several: predicted milliseconds,
    and the teacher's.
    """
    if not isinstance(table, DeviceTables):
        return {}
    found = table.latencies_ms(genotype)
    return {
        "devices": {
            name: {"predicted_latency_ms": ms, "teacher_latency_ms": table.teacher_ms[name]}
            for name, ms in found.items()
        },
        "weights": table.weights,
    }


@dataclass(frozen=True)
class ExactChoice:
    """The integer programme of a run, and what assembles its solutions."""

    teacher: EdgeDiTPipeline
    bank: ProxyBank
    programme: Programme
    precision: str
    table: LatencyTable | DeviceTables

    @classmethod
    def of(
        cls,
        run_dir: str | os.PathLike,
        teacher: str | None = None,
        precision: str | None = None,
        accept_other: bool = False,
    ) -> ExactChoice:
        """That of a run with a bank and a latency table; nothing else of it is read but the teacher.

        Args:
            teacher: where the teacher is, if not in the run.
            precision: of the caps on bytes and memory; default the table's.
            accept_other: see [`select`](selection.select).

        Raises:
            EdgeDiTError: one of the three is missing or unfinished, or they do not belong together.
        """
        run_dir = Path(run_dir)
        if not any((run_dir / stage.folder).is_dir() for stage in (TEACHER, BANK, LATENCY)):
            raise EdgeDiTError(
                f"{run_dir} is not the folder of a run: it holds no {TEACHER.folder}, {BANK.folder} or "
                f"{LATENCY.folder}; give the output_dir of a recipe that made them."
            )
        for stage in (BANK, LATENCY):
            folder = run_dir / stage.folder
            if (folder / "run.json").is_file() and not (folder / "stage.json").is_file():
                raise EdgeDiTError(f"{folder} is unfinished; run {stage.made_by} to its end.")
        if teacher is None and not (run_dir / TEACHER.folder).exists():
            raise EdgeDiTError(
                f"{run_dir} has no teacher of its own; give the one that its bank was made from (--teacher)."
            )
        config = RunConfig(output_dir=str(run_dir))
        config.teacher.path = teacher
        check_sources(config, [BANK.folder, LATENCY.folder], EDGEDIT)
        table = load_table(run_dir / LATENCY.folder / "table.json")
        table.check_run(accept_other=accept_other or accepted(run_dir / LATENCY.folder / "run.json"))
        pipeline = load_teacher(config)
        bank = ProxyBank(run_dir / BANK.folder, pipeline.transformer)
        precision = precision or weights_precision(table)
        return cls(pipeline, bank, programme_of(bank, table, precision), precision, table)

    @property
    def whole(self) -> Solution:
        """The teacher's costs."""
        return self.programme.of(Genotype.of(self.bank.teacher.config))

    def caps(
        self,
        max_latency_ms: float | None = None,
        max_latency_ratio: float | None = None,
        max_parameters_ratio: float | None = None,
        max_flops_ratio: float | None = None,
        max_bytes_mb: float | None = None,
        max_memory_mb: float | None = None,
    ) -> dict[str, float]:
        """Bounds as [`select`](selection.select) takes them, as caps of the programme. With tables of several devices
        milliseconds are those of each device, a share is that of the objective.
        """
        whole = self.whole.costs
        latency: dict[str, float | None] = {}
        if max_latency_ms is not None:
            latency = dict.fromkeys(self.table.caps_ms, max_latency_ms)
        elif max_latency_ratio is not None:
            latency = {"latency_ms": max_latency_ratio * whole["latency_ms"]}
        caps = {
            **latency,
            "parameters": None if max_parameters_ratio is None else max_parameters_ratio * whole["parameters"],
            "flops": None if max_flops_ratio is None else max_flops_ratio * whole["flops"],
            "bytes": None if max_bytes_mb is None else max_bytes_mb * 1e6,
            "memory": None if max_memory_mb is None else max_memory_mb * 1e6,
        }
        return {name: cap for name, cap in caps.items() if cap is not None}

    def choose(self, caps: dict[str, float]) -> tuple[Solution, dict[str, Any]]:
        """The student within the caps, and what `choice.json` says of it."""
        if caps:
            solution = self.programme.best(caps)
            reason = f"least loss of all genotypes with {said(caps)}"
        else:
            front = self.programme.front(SWEEP)
            points = [(each.score, each.costs["latency_ms"]) for each in front]
            solution = front[knee_point(points)]
            reason = f"knee point of the {len(front)} points of a sweep of latency budgets"
        proof = "proved" if solution.gap == 0 else f"proved to {solution.gap:.2g} of it"
        facts = {
            "reason": f"{reason}, by the integer programme over the bank's losses ({proof}); nothing was evaluated",
            "chosen_by": "programme",
            "score": solution.score,
            "gap": solution.gap,
            "caps": caps,
            "bytes": solution.costs["bytes"],
            "bytes_precision": self.precision,
            "memory": solution.costs["memory"],
            "memory_batch": self.table.batch,
            "predicted_latency_ms": solution.costs["latency_ms"],
            "teacher_latency_ms": self.whole.costs["latency_ms"],
            **device_facts(self.table, solution.genotype),
        }
        return solution, facts

    def rows(self, solutions: Sequence[Solution]) -> list[dict[str, Any]]:
        """Solutions as plain values, for a table."""
        whole = self.whole.costs
        return [
            {
                "genotype_hash": each.genotype.hash,
                "code": list(self.bank.space.code(each.genotype)),
                "layers": len(each.genotype.layers),
                "score": each.score,
                "gap": each.gap,
                **each.costs,
                "parameters_ratio": each.costs["parameters"] / whole["parameters"],
                "genotype": each.genotype.to_layers(),
            }
            for each in solutions
        ]
