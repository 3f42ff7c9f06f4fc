"""The report of a run: one `report.json` with every figure, the PNGs, and one `report.html` that needs nothing else.

It measures nothing: everything is read from the files that the stages wrote. What a run does not have (yet) is left
out; a file without which there is no report is an error that names the stage to run.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EdgeDiTError
from ..files import atomic_write_json, atomic_write_text
from ..genotype import Genotype
from ..hub import SCHEME
from ..records import (
    Asked,
    BankFigures,
    Bench,
    Choice,
    Curve,
    ExactChoice,
    FrontFigures,
    GivenChoice,
    Latency,
    Model,
    Ranking,
    Reference,
    SearchState,
    StageRecord,
    Table,
    Verified,
)
from ..run.config import RunConfig, refuse_renamed
from ..run.results import check_sources, pipeline_weights_hash
from ..run.stage import BANK, EDGEDIT, EVALUATE, LATENCY, RANK, SEARCH, STUDENT, Stage, maker_of
from ..schema import held_to, read_record
from ..search_space import SearchSpace
from ..stamp import check_comparable
from .devices import compare_devices, in_words, tables_of
from .few_step import TUNED, draw_few_step_figures, few_step_facts, few_step_ratios, few_step_table, on_the_way
from .front import front_data, named_students, overlaid
from .page import Figure, optional_record, render_html
from .ranking import NAMES, ranking_caption, ranking_rows
from .samples import class_samples, compared
from .tables import MODEL_LABELS, latency_label, metric_label
from .telemetry import telemetry

FORMAT = 1
SAMPLE_PANELS = ("teacher", "student", "student-tuned", "onnx-int8")
SAME, FEWER_SAID = "Same place, same seed and class.", " In brackets: denoising steps."


def build_report(run_dir: str | os.PathLike, tables: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Everything that a run measured, as `report.json` holds it.

    Args:
        run_dir: a run folder whose search has finished and whose student is chosen, or given; evaluation and exports
            are taken if there.
        tables: latency tables of other devices, to compare with.

    Returns:
        `models` (a list; see the keys of evaluate/<name>.json), `versions`, `seed`, `seconds` per stage, `search`,
        `bank`, `genotype`, `ratios`, `reproduce`; and `reference`, `latency`, `exported`, `curves`, `few_step`,
        `ranking`, `devices` if the run has them (without a search no `search`, and `choice` where the integer programme
        chose).

    Raises:
        EdgeDiTError: a needed file is missing (the stage that writes it is named) or damaged.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise EdgeDiTError(f"{run_dir} is not a folder; give the output_dir of a run.")
    index = read_record(run_dir / "bank" / "index.json", BankFigures, BANK.made_by)
    choice = read_record(run_dir / "student" / "choice.json", GivenChoice, STUDENT.made_by)
    exact = choice.get("chosen_by") == "programme"
    given = exact or _given(run_dir)
    if not given or exact:
        held_to(choice, ExactChoice if exact else Choice, run_dir / "student" / "choice.json", STUDENT.made_by)
    stages = finished_stages(run_dir, (*EDGEDIT, RANK))
    models = _models(run_dir)
    check_judged(run_dir, models, EVALUATE.made_by)
    run = RunConfig(output_dir=str(run_dir))
    search: dict[str, Any] = {}
    if given:
        seed = read_record(run_dir / "bank" / "stage.json", StageRecord, BANK.made_by)["seed"]
        folder = next((model.get("folder") for model in models if model["name"] == "teacher"), None) or ""
        run.teacher.path = folder if folder.startswith(SCHEME) or Path(folder).is_absolute() else None
    else:
        search, seed = _search(run_dir, choice)
        run.teacher.path = search["teacher"].get("path")
    check_sources(run, stages)
    report = {
        "format": FORMAT,
        "name": run_dir.resolve().name,
        "models": models,
        "versions": {name: v for stage in stages.values() for name, v in stage.get("versions", {}).items()},
        "seed": seed,
        "seconds": {name: stage["seconds"] for name, stage in stages.items()},
        **({"search": search} if search else {}),
        **({"choice": {key: value for key, value in choice.items() if key != "genotype"}} if exact else {}),
        "bank": _bank_summary(index),
        "genotype": _genotype(choice, SearchSpace.from_dict(index["space"])),
        "ratios": _ratios(models),
        "reproduce": reproduce(run_dir, seed, stages, "compress"),
    }
    optional = {
        "reference": optional_record(run_dir / "evaluate" / "reference.json", Reference),
        "latency": _latency(run_dir),
        "exported": {
            folder.name: {
                name: optional_record(folder / f"{name}.json", schema)
                for name, schema in (("verify", Verified), ("bench", Bench))
            }
            for folder in sorted((run_dir / "exported").glob("*-*"))
            if (folder / "verify.json").exists()
        },
        "curves": optional_record(run_dir / "evaluate" / "curves.json", dict[str, Curve]),
        "few_step": few_step_facts(run_dir, models),
        "ranking": optional_record(run_dir / "ranking" / "ranking.json", Ranking) if "ranking" in stages else None,
        "devices": _devices(run_dir, tables),
    }
    if uneven := [
        name for name, curve in (optional["curves"] or {}).items() if len(curve["steps"]) != len(curve["values"])
    ]:
        raise EdgeDiTError(
            f"{run_dir / 'evaluate' / 'curves.json'}: the curve {uneven[0]!r} has another number of steps than of "
            "values; make it anew."
        )
    report.update({key: value for key, value in optional.items() if value})
    if search and "search" in stages:
        asked = stages["search"]["config"].get("search") or {}
        samples, objective = asked.get("samples"), asked.get("objective", "distance")
        if objective != "distance":
            report["search"]["metric"] = NAMES.get(objective, objective)
        elif samples is not None and "reference" in report:
            report["search"]["metric"] = f"fid[{report['reference']['extractor']},n={samples}]"
    latency = report.get("latency", {})
    if report["ratios"] and latency.get("speedup"):
        report["ratios"]["speedup"] = latency["speedup"]  # paired by rounds, which a ratio of medians is not
    return report


def finished_stages(run_dir: Path, table: Sequence[Stage]) -> dict[str, Any]:
    """What the finished stages of a run say of themselves, by folder, in their order."""
    folders = [folder for row in table for folder in row.folders]
    found = {folder: optional_record(run_dir / folder / "stage.json", StageRecord) for folder in folders}
    for folder, stage in found.items():
        if stage is not None:
            remedy = f"Delete {run_dir / folder} and run {maker_of(folder, table).made_by} again."
            refuse_renamed(stage["config"], str(run_dir / folder / "stage.json"), remedy)
    return {folder: stage for folder, stage in found.items() if stage is not None}


def check_judged(run_dir: Path, models: Sequence[Mapping[str, Any]], made_by: str) -> None:
    """Raise unless the weights that models were judged with (`weights`) are those that their `folder` holds now.

    Earlier versions recorded no hashes: their figures are refused where the folder was made anew since, or holds
    another architecture. Models whose folder is not there any more are taken as they are.
    """
    current: dict[str | Path, str | None] = {}
    for model in models:
        if model.get("weights") is None:
            _check_judged_before(run_dir, model, made_by)
            continue
        if model.get("folder") is None:
            continue
        folder = model["folder"] if model["folder"].startswith(SCHEME) else run_dir / model["folder"]
        if folder not in current:
            current[folder] = pipeline_weights_hash(folder)
        if current[folder] not in (None, model["weights"]):
            raise EdgeDiTError(
                f"The figures of {model['name']!r} are those of other weights ({model['weights']}) than {folder} holds "
                f"now ({current[folder]}): delete {run_dir / 'evaluate'} and run {made_by} again."
            )


def _check_judged_before(run_dir: Path, model: Mapping[str, Any], made_by: str) -> None:
    """[`check_judged`] of figures that an earlier version wrote."""
    own = {"exported": f"exported/{model['name']}", "subnet": "elastic"}.get(model["stage"], model["name"])
    folder, stage = run_dir / own, run_dir / Path(own).parts[0]
    if not (folder / "model_index.json").is_file():
        return
    since, was, now = None, model.get("genotype_hash"), None
    if (run := optional_record(stage / "run.json", Asked)) and "format" in run:
        since = "was made after them"
    elif was is not None and "layers" in (
        config := optional_record(folder / "transformer" / "config.json", dict[str, Any]) or {}
    ):
        now = Genotype.of(config).hash
        since = None if now == was else f"holds the genotype {now} now, not {was}"
    if since:
        raise EdgeDiTError(
            f"The figures of {model['name']!r} are of an earlier version, which recorded no weights, and {folder} "
            f"{since}: delete {run_dir / 'evaluate'}, and what was made of the student before, and run {made_by} again."
        )


def _given(run_dir: Path) -> bool:
    """Whether the student was given by the recipe, so that there was no search."""
    asked = optional_record(run_dir / "student" / "run.json", Asked)
    return asked is not None and (asked["config"].get("student") or {}).get("genotype") is not None


def _search(run_dir: Path, choice: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """What the search found, and the run's seed."""
    state = read_record(run_dir / "search" / "state.json", SearchState, SEARCH.made_by)
    front = read_record(run_dir / "search" / "front.json", FrontFigures, SEARCH.made_by)
    settings = (optional_record(run_dir / "search" / "merge.json", SearchState) or state)[
        "settings"
    ]  # merge.json: first of two stages
    found = {
        "by": "integer programme" if state["settings"]["kind"] == "programme" else "Bayesian search",
        "settings": {k: v for k, v in settings.items() if k not in ("kind", "space", "reference", "plan")},
        **{k: front[k] for k in ("front", "reference", "reference_rule", "evaluations", "hypervolume", "teacher")},
        "random_hypervolume": front.get("random_hypervolume"),
        "points": _points(run_dir, "merge.json", "state.json"),
        "named": named_students(run_dir),
        "random_points": _points(run_dir, "random.json"),
        "chosen": choice,
    }
    return found, settings["seed"]


def _points(run_dir: Path, *names: str) -> list[list[float]]:
    """[distance, latency_ms] of everything that the named searches evaluated."""
    states = [state for name in names if (state := optional_record(run_dir / "search" / name, SearchState))]
    return [[point["distance"], point["latency_ms"]] for state in states for point in state["told"]]


def _models(run_dir: Path) -> list[dict[str, Any]]:
    other = ("stage.json", "run.json", "reference.json", "latency.json", "captions.json", "curves.json", "solvers.json")
    found = [
        read_record(path, Model, EVALUATE.made_by)
        for path in sorted((run_dir / "evaluate").glob("*.json"))
        if path.name not in other
    ]
    models = {model["name"]: model for model in found}
    return [models.pop(name) for name in MODEL_LABELS if name in models] + list(models.values())


def _bank_summary(index: Mapping[str, Any]) -> dict[str, Any]:
    entries = index["entries"]
    if not entries:
        raise EdgeDiTError(f"The proxy bank holds 0 proxies; run {BANK.made_by} to its end.")
    by_option: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries.values():
        merged = ("", "merged ", "three merged ")[min(len(entry["source"]), 3) - 1]
        by_option.setdefault(merged + entry["option"], []).append(entry)
    return {
        "proxies": len(entries),
        "teacher_hash": index["teacher_hash"],
        "median_loss": {
            name: {when: statistics.median(e[f"loss_{when}"] for e in group) for when in ("before", "after")}
            for name, group in by_option.items()
        },
        "median_losses": {
            name: {
                start: statistics.median(e["losses"][start] for e in group)
                for start in sorted(set.intersection(*(set(e["losses"]) for e in group)))
            }
            for name, group in by_option.items()
            if all("losses" in e for e in group)  # older banks record none
        },
        "entries": entries,
        "space": index["space"],
    }


def _genotype(choice: Mapping[str, Any], space: SearchSpace) -> dict[str, Any]:
    from .plots import option_order

    genotype = Genotype.from_layers(choice["genotype"], space.hidden_size)
    used = [space.option_of(layer) for layer in genotype.layers]
    return {
        "hash": genotype.hash,
        "hidden_size": genotype.hidden_size,
        "num_teacher_layers": genotype.num_teacher_layers,
        "layers": genotype.to_layers(),
        "merged": [list(source) for source in genotype.merged],
        "options": {option: used.count(option) for option in sorted(set(used), key=option_order)},
    }


def _latency(run_dir: Path) -> dict[str, Any]:
    """How whole networks were timed, and how well the table had predicted such networks."""
    measured = optional_record(run_dir / "evaluate" / "latency.json", Latency) or {}
    kept = {
        key: measured[key]
        for key in ("batch_size", "threads", "environment", "speedup", "multiplied")
        if key in measured
    }
    table = optional_record(run_dir / "latency" / "table.json", dict[str, Any])
    if table and "tables" not in table:  # those of several devices are compared, see `_devices`
        held_to(table, Table, run_dir / "latency" / "table.json", LATENCY.made_by)
        kept["table"] = {
            key: table[key]
            for key in ("runtime", "precision", "batch", "threads", "hash", "prediction")
            if key in table
        }
    return kept


def _devices(run_dir: Path, others: Sequence[str | Path]) -> dict[str, Any]:
    """How the devices differ that the run's latency tables, and `others`, are of; nothing where it is one."""
    tables = tables_of(run_dir, others)
    if len(tables) < 2:
        return {}
    told: dict[tuple[int, ...], float] = {}
    for name in ("merge.json", "state.json"):
        state = optional_record(run_dir / "search" / name, SearchState)
        told |= {tuple(point["code"]): point["distance"] for point in (state or {"told": []})["told"]}
    return compare_devices(tables, list(told.items()))


def _ratios(models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Student against teacher. Cost and distance as student / teacher, speed as teacher / student, shares as
    differences.
    """
    by_name = {m["name"]: m for m in models}
    student, teacher = by_name.get("student-tuned", by_name.get("student")), by_name.get("teacher")
    if student is None or teacher is None:
        return {}
    check_comparable({name: model.get("stamp") for name, model in by_name.items()})
    ratios: dict[str, Any] = {
        "student": student["name"],
        "parameters": student["parameters"] / teacher["parameters"],
        "flops": student["flops"] / teacher["flops"],
        "speedup": _quotients(teacher["latency_ms"], student["latency_ms"]),
        "against": {
            name: _compare(student, by_name[name]) for name in ("teacher", "teacher-more-steps") if name in by_name
        },
    }
    if "student-random-proxies" in by_name:
        ratios["random_proxies"] = _compare(by_name["student-random-proxies"], student)
    if few := few_step_ratios(models):
        ratios["few_step"] = few
    if "onnx-int8" in by_name:
        int8 = by_name["onnx-int8"]
        shipped = by_name.get("few-step", student)
        ratios["int8"] = {**_compare(int8, shipped), "psnr_db": int8.get("psnr_db")}
        fp32_ms, int8_ms = (shipped["latency_ms"].get(f"onnxruntime-{p}") for p in ("fp32", "int8"))
        if fp32_ms and int8_ms:
            ratios["int8"]["speedup"] = fp32_ms / int8_ms
    return ratios


def _compare(model: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    differences = {
        key: model[key] - reference[key]
        for key in ("precision", "recall", "class_agreement")
        if model.get(key) is not None and reference.get(key) is not None
    }
    distances = [{k: v for k, v in m["metrics"].items() if k.startswith("fid[")} for m in (model, reference)]
    return {"distance": _quotients(*distances), **differences}


def _quotients(numerators: Mapping[str, float], denominators: Mapping[str, float]) -> dict[str, float]:
    return {
        key: value / denominators[key]
        for key, value in numerators.items()
        if denominators.get(key) and value is not None
    }


def reproduce(run_dir: Path, seed: int, stages: Mapping[str, Mapping[str, Any]], recipe: str) -> dict[str, Any]:
    """The settings that the stages say they ran with, and the command that runs them again (`recipe`: as
    `edgedit train` names it).
    """
    import yaml

    sections = [field.name for field in dataclasses.fields(RunConfig)]
    used: dict[str, Any] = {}
    for key, value in ((key, value) for stage in stages.values() for key, value in stage["config"].items()):
        if key in sections:
            earlier = used.get(key)  # some stages record single keys of a section
            used[key] = {**earlier, **value} if isinstance(earlier, dict) and isinstance(value, dict) else value
    config = {
        "output_dir": f"runs/{run_dir.resolve().name}-again",
        "seed": seed,
        **{key: used[key] for key in sections if key in used},
    }
    return {
        "command": f"edgedit train {recipe} --config run.yaml",
        "config": config,
        "yaml": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
    }


# -------------------------------------------------------------------- figures


def draw_figures(run_dir: Path, report: Mapping[str, Any]) -> list[Figure]:
    """Write the PNGs below `run_dir/report` and describe them."""
    from . import plots

    folder, search, genotype = run_dir / "report", report.get("search"), report["genotype"]
    space = SearchSpace.from_dict(report["bank"]["space"])
    figures: list[Figure] = []

    def add(name: str, title: str, alt: str, caption: str) -> None:
        figures.append(Figure(f"{name}.png", title, alt, caption))

    figures += draw_samples(run_dir, report, folder / "samples.png")
    if report.get("few_step"):
        figures += draw_few_step_figures(run_dir, report["few_step"])

    student = Genotype.of(genotype)
    plots.genotype_strip(folder / "genotype.png", student, space)
    options = ", ".join(f"{count} {plots.option_label(option)}" for option, count in genotype["options"].items())
    add(
        "genotype",
        "The student's layers",
        f"Teacher with {genotype['num_teacher_layers']} layers above the student with {len(student.layers)}: "
        f"{options}.",
        f"{options}. Wide cells replace several teacher layers.",
    )

    if search is not None:
        figures += _search_figures(folder, search, space)
    networks = ((report.get("latency", {}).get("table") or {}).get("prediction") or {}).get("networks")
    if networks:
        plots.latency_plot(folder / "latency.png", networks)
        errors = [abs(n["predicted_ms"] - n["measured_ms"]) / n["measured_ms"] for n in networks]
        add(
            "latency",
            "What the latency table predicts",
            f"Predicted against measured latency of {len(networks)} whole networks; on average "
            f"{statistics.mean(errors):.1%} apart, {max(errors):.1%} at most.",
            "Whole networks that the table was not fitted to. The closer to the line, the better; shaded: within 8 %.",
        )
    if report.get("devices"):
        figures += _device_figures(folder, report["devices"])
    if report.get("ranking"):
        plots.ranking_plot(folder / "ranking.png", report["ranking"])
        add(
            "ranking",
            "What foretells the quality after tuning",
            "Scatter plots of the distance after tuning against six objectives that are known before it.",
            f"{ranking_caption(report['ranking'], 'distance')} The whole table is in ranking/table.md.",
        )
    plots.proxy_loss_plot(folder / "proxies.png", report["bank"]["entries"])
    add(
        "proxies",
        "The proxy blocks",
        f"Feature loss of {report['bank']['proxies']} proxy blocks before and after distillation, grouped by kind, and "
        "of other starts.",
        f"Each of the {report['bank']['proxies']} blocks was distilled on its own from the teacher's features. "
        f"{_starts_in_words(report['bank'])}".strip(),
    )
    if report.get("curves"):
        series = {name: (curve["steps"], curve["values"]) for name, curve in report["curves"].items()}
        plots.curve_plot(folder / "curves.png", series)
        add(
            "curves",
            "Quality while fine-tuning",
            f"Fréchet distance against fine-tuning steps: {', '.join(series)}.",
            "What distilling the blocks first is worth: the same genotype and steps from different starts.",
        )
    return figures


def draw_samples(run_dir: Path, report: Mapping[str, Any], path: Path) -> list[Figure]:
    """Write the picture of the same samples of several models, as far as the run has them."""
    import numpy as np
    from PIL import Image

    from . import plots

    panels, few = {}, any(model["stage"] == "few-step" for model in report["models"])
    wanted = (*on_the_way(report["models"])[:-1], "onnx-int8") if few else SAMPLE_PANELS
    for model in report["models"]:
        grid = (run_dir / str(model.get("grid"))).resolve()
        label = MODEL_LABELS.get(model["name"], model["name"]) + (f" ({model['steps']})" if few else "")
        if model["name"] in wanted and grid.is_relative_to(run_dir.resolve()) and grid.is_file():
            try:
                panels[label] = np.asarray(Image.open(grid).convert("RGB"))
            except Exception as error:  # decoders raise nearly anything on damaged bytes
                raise EdgeDiTError(
                    f"The image {grid} cannot be read ({error}); {EVALUATE.made_by} writes it, run that stage again."
                ) from error
    if not panels:
        return []
    plots.sample_grid(path, panels)
    alt = f"Grids of generated images: {', '.join(panels)}."
    return [Figure(path.name, "Samples", alt, SAME + FEWER_SAID * few)]


def draw_pareto(path: str | os.PathLike, search: Mapping[str, Any]) -> None:
    """Write the picture of a search's front (`search`: of a report)."""
    from . import plots

    chosen = search["chosen"]
    whole = next((p for p in search["points"] if p[1] == search["teacher"]["latency_ms"]), None)
    plots.pareto_plot(
        path,
        search["points"],
        search["random_points"],
        (chosen["distance"], chosen["predicted_latency_ms"]),
        whole,
        metric_label(search["metric"]) if "metric" in search else "Fréchet distance",
        {name: (distance, latency) for name, (distance, latency) in search.get("named", {}).items()},
        search.get("by", "Bayesian search"),
    )


def draw_front(path: str | os.PathLike, search: Mapping[str, Any], space: SearchSpace) -> None:
    """Write the picture of what the layers became along a search's front (`search`: of a report)."""
    from . import plots

    points = [(Genotype.of(point["genotype"]), point["distance"], point["latency_ms"]) for point in search["front"]]
    plots.front_strips(path, points, space, Genotype.from_layers(search["chosen"]["genotype"], space.hidden_size))


def _search_figures(folder: Path, search: Mapping[str, Any], space: SearchSpace) -> list[Figure]:
    """The front, what its students are, and what the search gained."""
    from . import plots

    draw_front(folder / "front.png", search, space)
    fastest, *_, best = sorted(search["front"], key=lambda point: point["latency_ms"]) * 2
    strips = Figure(
        "front.png",
        "What the layers become along the front",
        f"A row for each of the {len(search['front'])} students of the front, fastest first, from "
        f"{fastest['latency_ms']:.3g} to {best['latency_ms']:.3g} ms; a column a teacher layer, a colour an option.",
        "Wide cells replace several teacher layers.",
    )
    traces = {search.get("by", "Bayesian search"): search["hypervolume"]}
    if search.get("random_hypervolume"):
        traces["random search"] = search["random_hypervolume"]
    plots.hypervolume_plot(folder / "hypervolume.png", traces, search["settings"]["num_initial"])
    ends = ", ".join(f"{name} {trace[-1]:.4g}" for name, trace in traces.items())
    hypervolume = Figure(
        "hypervolume.png",
        "What the search gained",
        f"Hypervolume against evaluations; in the end: {ends}.",
        f"Area below the reference point (distance {search['reference'][0]:.3g}, {search['reference'][1]:.3g} ms) that "
        f"the front dominates; in the end: {ends}.",
    )
    return [pareto_figure(search, folder / "pareto.png"), strips, hypervolume]


def pareto_figure(search: Mapping[str, Any], path: Path) -> Figure:
    """[`draw_pareto`], described."""
    draw_pareto(path, search)
    return Figure(
        path.name,
        "Quality against latency",
        f"Scatter plot of {len(search['points'])} searched genotypes, their Pareto front of {len(search['front'])} "
        f"points, the teacher{''.join(f', {name}' for name in search.get('named', {}))} and the chosen student.",
        f"Every point is a student assembled from the bank, not yet tuned. Chosen: {search['chosen']['reason']}.",
    )


def _device_figures(folder: Path, devices: Mapping[str, Any]) -> list[Figure]:
    """How the devices' tables predict, side by side, and what they say of one another."""
    from . import plots

    predicted = {
        device["name"]: networks
        for device in devices["devices"]
        if (networks := (device["prediction"] or {}).get("networks"))
    }
    if not predicted:
        return []
    plots.devices_plot(folder / "devices.png", predicted)
    errors = {
        name: statistics.mean(abs(n["predicted_ms"] - n["measured_ms"]) / n["measured_ms"] for n in networks)
        for name, networks in predicted.items()
    }
    return [
        Figure(
            "devices.png",
            "Devices compared",
            "Predicted against measured latency of whole networks, as shares of the slowest: "
            f"{', '.join(f'{name} {error:.1%} apart on average' for name, error in errors.items())}.",
            in_words(devices),
        )
    ]


def _starts_in_words(bank: Mapping[str, Any]) -> str:
    """How the starts compare, e.g. "Median loss of narrow MLP: random 1.1, copied weights 0.29, …"."""
    from .plots import PROXY_STARTS, option_label

    parts = []
    for name, losses in bank["median_losses"].items():
        values = [f"{label} {losses[start]:.2g}" for start, (_, _, label) in PROXY_STARTS.items() if start in losses]
        words = name.removesuffix(name.split()[-1]) + option_label(name.split()[-1])
        parts.append(
            f"{words}: {', '.join(values)}, distilled {losses['after']:.2g}"
            if "after" in losses
            else f"{words}: {', '.join(values)}"
        )
    return f"Median held-out losses, where 1 is a layer left out. {'; '.join(parts)}." if parts else ""


# -------------------------------------------------------------------- pages


def write_report(run_dir: str | os.PathLike, tables: Sequence[str | Path] = ()) -> Path:
    """Write `report.json`, the PNGs and `run.yaml` below `report/`, and the self-contained `report.html` of a run.

    Args:
        run_dir, tables: of [`build_report`].

    Returns:
        Path of the HTML file.
    """
    run_dir = Path(run_dir)
    report = build_report(run_dir, tables)
    figures = draw_figures(run_dir, report)
    atomic_write_json(run_dir / "report.json", report)
    atomic_write_text(run_dir / "report" / "run.yaml", report["reproduce"]["yaml"])
    atomic_write_text(
        run_dir / "report.html",
        render_html(
            *("report.html.jinja", report, figures, headlines(report), run_dir / "report"),
            few_step_table(report["models"]),
            ranking_rows(report["ranking"], "distance") if "ranking" in report else ([], []),
            {
                "compare": compared(class_samples(run_dir, report)),
                "fronts": overlaid({"": front_data(run_dir, report)}),
                "telemetry": telemetry(run_dir, (*EDGEDIT, RANK)),
            },
        ),
    )
    return run_dir / "report.html"


def headlines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(figure, what it is) for the top of the page."""
    ratios = report["ratios"]
    if not ratios:
        return []
    few = ratios.get("few_step")
    of = "tuned student: " if few and few["source"] != TUNED else ""  # which is not what ships
    lines = [
        (f"{ratios[key] - 1:+.0%}".replace("-", "−"), f"{of}{name} against the teacher")
        for key, name in (("parameters", "parameters"), ("flops", "FLOPs"))
    ]
    lines += [(f"{value:.2f}×", f"{of}faster in {latency_label(key)}") for key, value in ratios["speedup"].items()]
    if few:
        lines.append((f"{few['forwards']:.0f}×", "fewer forwards an image with few steps"))
        lines += [(f"{few['speedup']:.1f}×", "faster an image with few steps")] if "speedup" in few else []
        lines.append((f"{few['distance']:.2f}×", "distance of the same net with many steps"))
    reference = "teacher-more-steps" if "teacher-more-steps" in ratios["against"] else "teacher"
    for key, value in ratios["against"][reference]["distance"].items():
        lines.append((f"{value:.2f}×", f"{of}{metric_label(key)} of the {MODEL_LABELS[reference]}"))
    if ratios.get("int8", {}).get("psnr_db") is not None:
        lines.append((f"{ratios['int8']['psnr_db']:.1f} dB", "int8 images against fp32 (PSNR)"))
    return lines
