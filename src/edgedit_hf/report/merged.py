"""Several runs on one page: results of one protocol in one table, searches of one latency table in one plot."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import EdgeDiTError
from ..files import atomic_write_text, hash_json
from ..records import Asked
from ..run.outputs import check_writable
from ..run.stage import EDGEDIT, EVALUATE, EVALUATE_ELASTIC, RANK, TEXT_TO_IMAGE
from .front import front_data, overlaid
from .page import GENERATOR, Figure, is_text_to_image, optional_record, render_page
from .samples import Samples, caption_samples, class_samples, compared
from .tables import MODEL_LABELS, comparison_table, judging_lines, plus_minus
from .telemetry import telemetry


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run gives to the page.

    Args:
        name: what tells it from the other runs. report: of its family; `None`: it was not evaluated.
        protocol: how its results were measured, in words.
    """

    name: str
    folder: Path
    report: Mapping[str, Any] | None
    protocol: Mapping[str, str]
    samples: Sequence[Samples]
    front: Mapping[str, Any] | None
    telemetry: Sequence[Mapping[str, Any]]

    @property
    def models(self) -> list[dict[str, Any]]:
        """Its models, named with it."""
        judged = [] if self.report is None else self.report["models"]
        return [{**model, "name": f"{self.name}: {MODEL_LABELS.get(model['name'], model['name'])}"} for model in judged]


def write_merged(run_dirs: Sequence[str | os.PathLike], output: str | os.PathLike) -> Path:
    """Write one self-contained page of several runs of any family; the runs are only read.

    Args:
        run_dirs: their folders. output: the HTML file; only a page of this kind is written over.

    Returns:
        Path of the file.

    Raises:
        EdgeDiTError: a run is given twice or is none, what is needed of one is missing or damaged, or the output is not
            ours to write.
    """
    folders, output = [Path(folder) for folder in run_dirs], Path(output)
    _check_place(output, folders)
    names = run_names(folders)
    runs = [read_run(name, folder) for name, folder in zip(names, folders)]
    samples = [
        dataclasses.replace(each, name=f"{run.name}: {each.name}", chosen=False) for run in runs for each in run.samples
    ]
    fronts = overlaid({run.name: run.front for run in runs})
    tables = protocol_tables(runs)
    with TemporaryDirectory() as folder:
        pictures = [
            (run.name, figure.title, figure.embedded(drawn))
            for number, run in enumerate(runs)
            for drawn in [Path(folder, str(number))]
            for figure in _draw(run, drawn)
        ]
    page = render_page(
        "report-runs.html.jinja",
        {
            "compare": compared(samples),
            "fronts": fronts,
            "telemetry": [{"run": run.name, **stage} for run in runs for stage in run.telemetry],
        },
        report={"name": ", ".join(names)},
        runs=runs,
        tables=tables,
        differences=_differences([table["protocol"] for table in tables]),
        axes=_differences([front["about"] for front in fronts]),
        without=[run.name for run in runs if not run.models],
        pictures=pictures,
    )
    atomic_write_text(output, page)
    return output


def _check_place(output: Path, folders: Sequence[Path]) -> None:
    """Raise unless the page may be written there."""
    if "\0" in "".join(map(str, (output, *folders))):
        raise EdgeDiTError("A path holds a NUL byte; give other ones.")
    real = [folder.resolve() for folder in folders]
    twice = next((folder for place, folder in enumerate(real) if folder in real[:place]), None)
    if twice is not None:
        raise EdgeDiTError(f"The run {twice} is given twice; give each once.")
    inside = next((folder for folder in real if output.resolve().is_relative_to(folder)), None)
    if output.is_dir() or inside is not None:
        where = "is a folder" if inside is None else f"lies in the run {inside}"
        raise EdgeDiTError(f"The output {output} {where}; give an HTML file beside the runs.")
    if output.exists():
        with open(output, encoding="utf-8", errors="replace") as file:
            if f'content="{GENERATOR}"' not in file.read(2000):
                raise EdgeDiTError(
                    f"{output} exists and is no page of a report; it is left as it is. Give another --output."
                )
    check_writable(output.parent, output)


def run_names(folders: Sequence[Path]) -> list[str]:
    """What tells runs apart: the last part of each path, or as many as it takes."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def read_run(name: str, folder: Path) -> Run:
    """What one run gives to the page.

    Raises:
        EdgeDiTError: it is no run, or a file is missing (the stage that writes it is named) or damaged.
    """
    if not is_text_to_image(folder):
        from .edgedit import build_report

        report = build_report(folder)
        front, logged = front_data(folder, report), telemetry(folder, (*EDGEDIT, RANK))
        return Run(name, folder, report, protocol(name, folder, report), class_samples(folder, report), front, logged)
    logged = telemetry(folder, TEXT_TO_IMAGE)
    if not (folder / EVALUATE_ELASTIC.folder / "stage.json").is_file():
        return Run(name, folder, None, {}, [], None, logged)
    from .elastic import build_elastic_report

    report = build_elastic_report(folder)
    return Run(name, folder, report, protocol(name, folder, report), caption_samples(folder, report), None, logged)


def protocol(name: str, folder: Path, report: Mapping[str, Any]) -> dict[str, str]:
    """How the results of a run were measured, in words; what was not recorded is like nothing in another run."""
    unknown = f"not recorded ({name})"
    reference, latency = report.get("reference") or {}, report.get("latency") or {}
    asked = optional_record(folder / EVALUATE.folder / "run.json", Asked) or {"config": {}}
    sampling = asked["config"].get("sampling")
    sampling = sampling if isinstance(sampling, dict) else {}
    counts = sorted({model["num_samples"] for model in report["models"]})
    return {
        "task": "text to image" if is_text_to_image(folder) else "classes",
        "features": str(reference.get("extractor", unknown)),
        "weights of the features": str(reference.get("extractor_hash", unknown)),
        "real images": str(reference.get("data", unknown))[:16],
        "images compared": str(reference.get("count", unknown)),
        "generated images": ", ".join(f"{count:,}" for count in counts),
        "steps": str(sampling.get("steps", unknown)),
        "guidance": str(sampling.get("guidance_scale", unknown)),
        "processor": str((latency.get("environment") or {}).get("cpu", unknown)),
        "threads": str(latency.get("threads", unknown)),
        "images a forward": str(latency.get("batch_size", unknown)),
    }


def protocol_tables(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A table for each protocol: `runs` (their names), `protocol`, `seeds` (in words, where they differ), `header`,
    `rows` and `judging` (what has to be known of its distances).
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.models:
            groups.setdefault(hash_json(run.protocol), []).append(run)
    tables = []
    for group in groups.values():
        header, rows = comparison_table([model for run in group for model in run.models])
        reports = [(run.name, run.report) for run in group if run.report is not None]
        seeds = [(name, report["seed"]) for name, report in reports]
        tables.append(
            {
                "runs": [run.name for run in group],
                "protocol": group[0].protocol,
                "seeds": ", ".join(f"{name} {seed}" for name, seed in seeds) if len({s for _, s in seeds}) > 1 else "",
                "header": header,
                "rows": rows,
                "judging": [
                    *dict.fromkeys(line for _, report in reports for line in plus_minus(report)),
                    *(line for name, report in reports for line in judging_lines(report, name)),
                ],
            }
        )
    return tables


def _differences(about: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Of descriptions in words, those that are not all the same: what, and how it is in each."""
    rows = [[what, *(each[what] for each in about)] for what in (about[0] if about else {})]
    return [row for row in rows if len(set(row[1:])) > 1]


def _draw(run: Run, folder: Path) -> list[Figure]:
    """The static pictures of a run, written to a folder: its samples, and its search."""
    if run.report is None:
        return []
    if is_text_to_image(run.folder):
        from .elastic import draw_samples

        return draw_samples(run.folder, run.report, folder / "samples.png")
    from .edgedit import draw_samples, pareto_figure

    figures = draw_samples(run.folder, run.report, folder / "samples.png")
    search = run.report.get("search")
    return figures + ([pareto_figure(search, folder / "pareto.png")] if search is not None else [])
