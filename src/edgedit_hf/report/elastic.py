"""The report of a text-to-image run: `report.json`, the PNGs, and `report.html`. As [`report`], it measures nothing and
reads what the stages wrote.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.digits import STYLES, is_held_out, parse_caption
from ..errors import EdgeDiTError
from ..files import atomic_write_json, atomic_write_text
from ..records import Captions, ElasticEvaluation, ElasticStage, Latency, Model, Reference, Telemetry, TextStage
from ..run.config import RunConfig
from ..run.results import check_sources
from ..run.stage import ELASTIC, EVALUATE_ELASTIC, EVALUATE_FEW_STEP, TEXT_TO_IMAGE
from ..schema import convert, read_lines, read_record
from .edgedit import FORMAT, check_judged, finished_stages, reproduce
from .few_step import draw_few_step_figures, few_step_facts, few_step_widths, few_step_widths_table
from .page import Figure, optional_record, render_html
from .samples import caption_samples, compared
from .tables import metric_label
from .telemetry import telemetry

JUDGED_BY = EVALUATE_ELASTIC.made_by


def build_elastic_report(run_dir: str | os.PathLike) -> dict[str, Any]:
    """Everything that a text-to-image run measured, as `report.json` holds it.

    Returns:
        `models` (the sub-networks, the narrowest first; see evaluate/<name>.json), `sampled` (how often each was
        drawn), `text` (what the encoders learned), `versions`, `seed`, `seconds` per stage, `reproduce`, and
        `reference`, `latency`.

    Raises:
        EdgeDiTError: a needed file is missing (the stage that writes it is named) or damaged.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise EdgeDiTError(f"{run_dir} is not a folder; give the output_dir of a run.")
    trained = read_record(run_dir / "elastic" / "stage.json", ElasticStage, ELASTIC.made_by)
    judged = read_record(run_dir / "evaluate" / "stage.json", ElasticEvaluation, JUDGED_BY)
    learned = optional_record(run_dir / "text" / "stage.json", TextStage)
    stages = finished_stages(run_dir, TEXT_TO_IMAGE)
    models = [
        read_record(run_dir / "evaluate" / f"{name}.json", Model, JUDGED_BY) for name in judged["config"]["subnets"]
    ]
    check_judged(run_dir, models, JUDGED_BY)
    check_sources(RunConfig(output_dir=str(run_dir)), stages, TEXT_TO_IMAGE)
    for model in models:  # what the page needs of every width alike
        lacks = [
            name
            for name in ("class_agreement", "style_agreement", "held_out")
            if ("class_agreement" in models[0]) != (model.get(name) is not None)
        ]
        lacks += [] if "validation_loss" in model["metrics"] else ["metrics.validation_loss"]
        lacks += [
            name
            for name, value in models[0]["metrics"].items()
            if name.startswith("fid[") and model["metrics"].get(name) is None
        ]
        if lacks or model.get("held_out") is not None and "class_agreement" not in model["held_out"]:
            raise EdgeDiTError(
                f"{run_dir / 'evaluate' / model['name']}.json and {models[0]['name']}.json differ in "
                f"{', '.join(lacks or ['held_out.class_agreement'])}: one is damaged or foreign. {JUDGED_BY} writes "
                "them, run that stage again."
            )
    report = {
        "format": FORMAT,
        "name": run_dir.resolve().name,
        "models": sorted(models, key=lambda model: model["parameters"]),
        "sampled": trained["sampled"],
        "elastic_steps": trained["steps"],
        "versions": {name: version for stage in stages.values() for name, version in stage.get("versions", {}).items()},
        "seed": trained["seed"],
        "seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "reproduce": reproduce(run_dir, trained["seed"], stages, "text-to-image"),
        "reference": read_record(run_dir / "evaluate" / "reference.json", Reference, JUDGED_BY),
        "latency": read_record(run_dir / "evaluate" / "latency.json", Latency, JUDGED_BY),
    }
    if learned is not None:
        report["text"] = learned["learned"]
    widths = few_step_widths(run_dir, report["models"])
    if few := few_step_facts(run_dir, [width["many"] for width in widths]):
        report["few_step"] = {**few, "widths": widths}
        judged_since = [
            width[key] for width in widths for key in ("many", "few", "few_step") if width[key] not in models
        ]
        check_judged(run_dir, judged_since, EVALUATE_FEW_STEP.made_by)
    return report


def training_curves(run_dir: Path, report: Mapping[str, Any]) -> dict[str, tuple[list[int], list[float]]]:
    """Flow loss of every sub-network against the supernet's steps, from the telemetry; means over a fiftieth of the
    run.
    """
    lines = read_lines(run_dir / "elastic" / "telemetry.jsonl", Telemetry, ELASTIC.made_by)
    bin_size, curves = max(1, report["elastic_steps"] // 50), {}
    for name in (model["name"] for model in report["models"]):
        bins: dict[int, list[float]] = {}
        for line in lines:
            if f"loss_{name}" in line:
                loss = convert(
                    line[f"loss_{name}"],
                    float,
                    f"loss_{name} at step {line['step']} of {run_dir / 'elastic' / 'telemetry.jsonl'}",
                )
                bins.setdefault(-(-line["step"] // bin_size), []).append(loss)
        if bins:
            curves[name] = (
                [number * bin_size for number in bins],
                [sum(values) / len(values) for values in bins.values()],
            )
    return curves


def draw_elastic_figures(run_dir: Path, report: Mapping[str, Any]) -> list[Figure]:
    """Write the PNGs below `run_dir/report` and describe them."""
    from . import plots

    folder, captions = run_dir / "report", _captions(run_dir)
    images = _judged_images(run_dir, report, captions)
    figures = draw_caption_grids(report, captions, images, folder)
    if few := report.get("few_step"):
        figures += _few_step_figures(run_dir, few, captions, images)
    curves = training_curves(run_dir, report)
    if curves:
        plots.curve_plot(folder / "curves.png", curves, ylabel="flow loss", xlabel="steps of the supernet")
        ends = ", ".join(f"{name} {values[-1]:.3g}" for name, (_, values) in curves.items())
        drawn = " and ".join(f"{name} {count:,} times" for name, count in report["sampled"].items())
        text = f"Every step trained the full net and a drawn sub-network: {drawn} of {report['elastic_steps']:,} steps."
        figures.append(
            Figure("curves.png", "Training", f"Flow loss of every width against steps; in the end: {ends}.", text)
        )
    return figures


def draw_samples(run_dir: Path, report: Mapping[str, Any], path: Path) -> list[Figure]:
    """Write the picture of what every width makes of the same captions, and the one beside it of those that training
    never saw; the first is described.
    """
    captions = _captions(run_dir)
    return draw_caption_grids(report, captions, _judged_images(run_dir, report, captions), path.parent)[:1]


def draw_caption_grids(
    report: Mapping[str, Any], captions: Mapping[str, Any], images: Mapping[str, Any], folder: Path
) -> list[Figure]:
    """Write the pictures of what every width makes of the same captions, and of those that training never saw."""
    from . import plots

    names = [model["name"] for model in report["models"]]
    rows = ", ".join(names)
    wanted = [
        (
            "samples",
            "captions",
            "Samples",
            "A column is one caption and one noise, a row one width of the same supernet.",
        )
    ]
    if "held_out" in captions:
        text = "No training image was of such a digit in such a style; digit and style were seen apart."
        wanted.append(("held-out", "held_out", "Combinations that training never saw", text))
    figures = []
    for file, key, title, text in wanted:
        shown = spread(captions[key], captions["shown"]) if key == "held_out" else list(range(captions["shown"]))
        prompts = [captions[key][index] for index in shown]
        plots.caption_grid(
            folder / f"{file}.png", prompts, {name: images[name][key][shown].transpose(0, 2, 3, 1) for name in names}
        )
        figures.append(
            Figure(
                f"{file}.png",
                title,
                f"Generated images, a row each of {rows}, for the captions: {'; '.join(prompts)}.",
                text,
            )
        )
    return figures


def _captions(run_dir: Path) -> dict[str, Any]:
    return read_record(run_dir / "evaluate" / "captions.json", Captions, JUDGED_BY)


def _judged_images(run_dir: Path, report: Mapping[str, Any], captions: Mapping[str, Any]) -> dict[str, Any]:
    names = [model["name"] for model in report["models"]]
    return {name: _images(run_dir / "evaluate" / f"{name}.safetensors", captions) for name in names}


def _few_step_figures(run_dir: Path, few: Mapping[str, Any], captions: Any, images: Mapping[str, Any]) -> list[Figure]:
    """Every width with many steps, with few, and distilled; and how it learned that."""
    from . import plots

    shown, rows = list(range(captions["shown"])), {}
    for width in few["widths"]:
        name, many = width["name"], width["many"]

        def made(model: Mapping[str, Any]) -> Any:
            return _images(run_dir / EVALUATE_FEW_STEP.folder / f"{model['name']}.safetensors", captions)["captions"]

        own = many["name"] == name  # not those of a given net
        rows[f"{name}\n{many['steps']} steps"] = images[name]["captions"] if own else made(many)
        for model in (width["few"], width["few_step"]):
            label = "distilled" if model is width["few_step"] else model["solver"]
            rows[f"{name}, {model['steps']}\n{label}"] = made(model)
    figures = []
    if rows:
        prompts = [captions["captions"][index] for index in shown]
        pictures = {label: images[shown].transpose(0, 2, 3, 1) for label, images in rows.items()}
        plots.caption_grid(run_dir / "report" / "few-step-samples.png", prompts, pictures)
        guided = "guided " * (few["widths"][0]["many"]["guidance_scale"] > 1)
        text = f"Three rows a width: with many {guided}steps, with few by the best standard solver, and distilled."
        said = f"Generated images for the captions: {'; '.join(prompts)}. {text}"
        figures.append(Figure("few-step-samples.png", "From many steps to few", said, f"{text}"))
    return figures + draw_few_step_figures(run_dir, few)


def _images(path: Path, captions: Mapping[str, Any]) -> dict[str, Any]:
    """The images of a width, one a caption."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        images = load_file(path)
    except (OSError, SafetensorError) as error:
        raise EdgeDiTError(f"{path} cannot be read ({error}); {JUDGED_BY} writes it, run that stage again.") from None
    wanted = {name: len(captions[name]) for name in ("captions", "held_out") if name in captions}
    found = {name: len(images[name]) if name in images and images[name].ndim == 4 else 0 for name in wanted}
    if found != wanted or captions["shown"] > wanted["captions"]:
        raise EdgeDiTError(
            f"{path} holds {found} images, captions.json {wanted} captions; {JUDGED_BY} writes both, run that stage "
            "again."
        )
    return images


def spread(captions: list[str], count: int) -> list[int]:
    """Positions of `count` captions, as different as they come: first of each caption's digit and style in turn."""
    kinds: dict[Any, list[int]] = {}
    for caption in dict.fromkeys(captions):
        said = parse_caption(caption)
        kind = (
            said["digit"],
            *(word for style in STYLES if (word := said[style]) and is_held_out(said["digit"], {style: word})),
        )
        kinds.setdefault(kind, []).append(captions.index(caption))
    turns = max(map(len, kinds.values()))
    order = [places[turn] for turn in range(turns) for places in kinds.values() if turn < len(places)]
    return sorted(order[:count], key=lambda index: parse_caption(captions[index])["digit"] or 0)


def headlines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(figure, what it is) for the top of the page."""
    narrowest, widest = report["models"][0], report["models"][-1]
    widths = len(report["models"])
    lines = [(f"{widths}", f"width{'s' * (widths > 1)} in one set of weights")]
    lines.append(
        (
            f"{narrowest['parameters'] / widest['parameters']:.0%}",
            f"of the full net's parameters in {narrowest['name']}",
        )
    )
    if "class_agreement" in narrowest:
        worst = min(report["models"], key=lambda model: model["class_agreement"])
        lines.append(
            (f"{worst['class_agreement']:.1%}", f"of digits as the caption says, at the least ({worst['name']})")
        )
        unseen = min(report["models"], key=lambda model: model["held_out"]["class_agreement"])
        lines.append(
            (f"{unseen['held_out']['class_agreement']:.1%}", f"in combinations never trained ({unseen['name']})")
        )
    distance = next((name for name in narrowest["metrics"] if name.startswith("fid[")), None)
    if distance is not None:
        lines += [
            (f"{model['metrics'][distance]:.3g}", f"{metric_label(distance)}, {model['name']}")
            for model in (narrowest, widest)
        ]
    return lines


def write_elastic_report(run_dir: str | os.PathLike) -> Path:
    """Write `report.json`, the PNGs and `run.yaml` below `report/`, and the self-contained `report.html` of a
    text-to-image run.

    Returns:
        Path of the HTML file.
    """
    run_dir = Path(run_dir)
    report = build_elastic_report(run_dir)
    figures = draw_elastic_figures(run_dir, report)
    atomic_write_json(run_dir / "report.json", report)
    atomic_write_text(run_dir / "report" / "run.yaml", report["reproduce"]["yaml"])
    few_steps = few_step_widths_table(report.get("few_step", {}).get("widths", []))
    data = {
        "compare": compared(caption_samples(run_dir, report)),
        "telemetry": telemetry(run_dir, TEXT_TO_IMAGE),
    }
    page = render_html(
        *("report-elastic.html.jinja", report, figures, headlines(report), run_dir / "report", few_steps), data=data
    )
    atomic_write_text(run_dir / "report.html", page)
    return run_dir / "report.html"
