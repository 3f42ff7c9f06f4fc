"""What a model card is of: a folder, and everything that was measured of it, found in its own records and in the report
of the run that it stands in. No torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import EdgeDiTError
from ..export.formats import FORMATS
from ..files import read_json
from ..folders import KINDS, Contents, look_at
from ..genotype import Genotype
from ..records import Captions, NetConfig, StageRecord
from ..run.results import pipeline_weights_hash
from ..run.stage import EVALUATE_FEW_STEP, SELF_DISTIL
from ..schema import held_to, read_record
from .card_records import Benched, CardReport, Checked, Quantized
from .tables import MODEL_LABELS

STAGES = {
    "teacher": ("teacher", "teacher-more-steps"),
    "student": ("student", "student-tuned", "student-random-proxies", "few-step-source"),
    "few-step": ("few-step",),
    "exported": ("exported",),
    "quantized": ("quantized",),
    "supernet": ("subnet",),
    "subnet": ("subnet",),
}
"""Kinds of folders → what `stage` a report's models of them have."""

JUDGED = ("teacher", "student", "few-step", "supernet", "subnet")
"""Kinds whose figures are those of a report; the others bring their own."""


@dataclass(frozen=True)
class Subject:
    """What a card is of.

    Args:
        kind, family: as in [`folders.Contents`].
        label: what it is, in words.
        folder, run_dir: where it is, and the run that its report is of.
        report: content of report.json.
        entries: its models there; several of a network with several widths, the widest last.
        config: of its denoiser; of a bank its index, of a table the table. index: of its pipeline, or its contract.
        genotype: of an EdgeDiT.
        quantization, verify, bench, stage: what the files of these names hold.
        captions: what its evaluation was asked for.
    """

    kind: str
    family: str
    label: str
    folder: Path | None = None
    run_dir: Path | None = None
    report: Mapping[str, Any] | None = None
    entries: list[Mapping[str, Any]] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)
    genotype: Genotype | None = None
    pipeline: bool = True
    bundled: bool = False
    few_step: bool = False
    quantization: Mapping[str, Any] | None = None
    verify: Mapping[str, Any] | None = None
    bench: Mapping[str, Any] | None = None
    stage: Mapping[str, Any] | None = None
    captions: Mapping[str, Any] | None = None

    @property
    def entry(self) -> Mapping[str, Any] | None:
        """Its figures in the report; of several widths those of the widest."""
        return self.entries[-1] if self.entries else None

    @property
    def recorded(self) -> Mapping[str, Any]:
        """The settings that it was made with, as far as they were recorded."""
        if self.kind == "quantized" or self.report is None:
            return (self.stage or {}).get("config", {})
        return self.report["reproduce"]["config"]

    @property
    def width(self) -> str | None:
        """The sub-network that it is."""
        if self.kind == "subnet":
            return self.entry["name"] if self.entry else None
        return self.index.get("subnet") if self.kind == "exported" else None


def subject_of(
    folder: str | os.PathLike, report: str | os.PathLike | Mapping[str, Any] | None = None, model: str | None = None
) -> Subject:
    """What there is to say of a folder.

    Args:
        report: report.json or its content; without it that of the run in which the folder stands, if there is one.
        model: the name of its model in the report; without it found by its place or by its weights.

    Raises:
        EdgeDiTError: a measurement is missing (it is named), damaged, or of other weights.
    """
    contents = look_at(folder)
    where, report, run_dir = _report_of(contents.path, report)
    found = contents.config if contents.kind in ("bank", "latency") else _entries(contents, where, report, model)
    entries = found if isinstance(found, list) else []
    label = KINDS[contents.kind].removeprefix("a ").removeprefix("an ")
    if entries and contents.kind not in ("supernet", "subnet"):
        label = MODEL_LABELS.get(entries[-1]["name"], label) if contents.family == "edgedit" else label
    return Subject(
        contents.kind,
        contents.family,
        label,
        contents.path,
        run_dir,
        report,
        entries,
        contents.config,
        contents.index,
        _genotype(contents),
        contents.pipeline,
        contents.bundled,
        contents.few_step,
        captions=_optional(run_dir / "evaluate" / "captions.json", Captions) if run_dir else None,
        stage=_optional(contents.path / "stage.json", StageRecord),
        **_own_records(contents),
    )


def _genotype(contents: Contents) -> Genotype | None:
    if contents.kind == "exported" and contents.index.get("genotype"):
        return Genotype.of(contents.index["genotype"])
    return contents.genotype if contents.pipeline else None


def _own_records(contents: Contents) -> dict[str, Any]:
    """What lies beside the weights, without which there would be nothing to say."""
    path = contents.path
    if contents.kind == "quantized":
        return {"quantization": read_record(path / "quantization.json", Quantized, SELF_DISTIL.made_by)}
    if contents.kind == "exported":
        by = "the export, which measures unless it is told not to"
        return {
            "verify": read_record(path / "verify.json", Checked, by),
            "bench": _optional(path / "bench.json", Benched),
        }
    return {}


def _optional(path: Path, schema: Any) -> Any:
    return read_record(path, schema, "an earlier stage") if path.is_file() else None


# -------------------------------------------------------------------- in the report


def _report_of(folder: Path, given: Any) -> tuple[str, Mapping[str, Any] | None, Path | None]:
    """Words for the report, its content, and the folder of its run."""
    around = [folder, *folder.absolute().parents[:2]]
    if isinstance(given, Mapping):
        held_to(given, CardReport, "the report", "edgedit report")
        return "The report", given, next((place for place in around if (place / "evaluate").is_dir()), None)
    if given is None:
        given = next((place / "report.json" for place in around if (place / "report.json").is_file()), None)
        if given is None:
            return "", None, None
    return str(given), read_record(given, CardReport, "edgedit report", "a run's report"), Path(given).parent


def _entries(contents: Contents, where: str, report: Any, model: str | None) -> list[Mapping[str, Any]]:
    """Its models in the report."""
    kind, folder = contents.kind, contents.path
    if report is None:
        if kind in JUDGED:
            raise EdgeDiTError(
                f"There are no figures of {folder}: neither it nor the run around it has a report.json. Judge it with "
                "the stages of its run, write their report (edgedit report RUN), or give it with --report FILE."
            )
        return []
    if contents.family == "elastic":
        return _widths(contents, where, report)
    if kind == "quantized" and not any(entry["stage"] == "quantized" for entry in report["models"]):
        return []  # its weights need not be read
    models = [entry for entry in report["models"] if entry["stage"] in STAGES[kind]]
    if kind == "exported":
        names = FORMATS[contents.index["format"]].precisions.items()
        dtypes = [dtype for dtype, precision in names if precision.name == contents.index["precision"]]
        models = [entry for entry in models if entry["name"] in [f"{contents.index['format']}-{d}" for d in dtypes]]
    current = pipeline_weights_hash(folder)
    place = "/".join(folder.absolute().parts[-2:]) if kind == "exported" else folder.absolute().name
    own = [entry for entry in models if entry["name"] == model]
    own = own or [entry for entry in models if current is not None and entry.get("weights") == current]
    known = own or [entry for entry in report["models"] if entry["stage"] in sum(STAGES.values(), ())]
    here = [e for e in known if place in (e.get("folder"), e["name"], f"exported/{e['name']}")]
    own = here or own
    if not own:
        if kind in JUDGED:
            raise EdgeDiTError(
                f"{where} has no figures of {folder}, {KINDS[kind]} with the weights {current}; it has those of "
                f"{', '.join(sorted(entry['name'] for entry in report['models'])) or 'nothing'}. Judge it in its run, "
                "or give its own report with --report FILE."
            )
        return []
    (entry, *_) = own
    if entry.get("weights") not in (None, current):
        raise EdgeDiTError(
            f"The report's figures of {entry['name']!r} are those of other weights ({entry['weights']}) than {folder} "
            f"holds ({current}); run stage evaluate again, write the report anew, then the card."
        )
    return [entry]


def _widths(contents: Contents, where: str, report: Any) -> list[Mapping[str, Any]]:
    """Of an elastic network: all widths that were judged, or the one that it is."""
    if contents.kind in ("quantized", "exported"):
        return []
    entries = [entry for entry in report["models"] if entry["stage"] == "subnet"]
    if contents.kind == "few-step":
        entries = [width["few_step"] for width in (report.get("few_step") or {}).get("widths", [])]
        if not entries:
            by = EVALUATE_FEW_STEP.made_by
            raise EdgeDiTError(f"{where} has no figures of few steps: run {by}, then write the report anew.")
    names = list(contents.config.get("subnets") or {})
    if not names:
        names = [_width_of(contents.config, Path(where).parent, entries)]
    found = sorted((entry for entry in entries if entry["name"] in names), key=lambda entry: entry["parameters"])
    if not found:
        raise EdgeDiTError(
            f"{where} has no figures of {contents.path}; its widths are "
            f"{', '.join(entry['name'] for entry in entries) or 'none'}. Give the report of its own run with --report "
            "FILE."
        )
    if contents.kind in ("supernet", "few-step") and found[0].get("weights") is not None:
        current = pipeline_weights_hash(contents.path)
        if current not in (None, found[0]["weights"]):
            raise EdgeDiTError(
                f"The report's figures of {found[0]['name']!r} are those of other weights ({found[0]['weights']}) than "
                f"{contents.path} holds ({current}); judge it again, write the report anew, then the card."
            )
    return found


def _width_of(config: Mapping[str, Any], run_dir: Path, entries: list[Mapping[str, Any]]) -> str | None:
    """The name that a sub-network alone had in its supernet, by its number of heads."""
    if len(entries) == 1:
        return entries[0]["name"]
    for name in ("elastic", "few-step"):
        path = run_dir / name / "transformer" / "config.json"
        if path.is_file():
            net = read_json(path, "the run")
            held_to(net, NetConfig, path, "the run", "a denoiser")
            heads = net.get("num_attention_heads", 0)
            for width, share in (net.get("subnets") or {}).items():
                if round(heads * share) == config.get("num_attention_heads"):
                    return width
    return None
