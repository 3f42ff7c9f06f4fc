"""What a report says of few-step distillation, of either family: from many steps to few, and whether it worked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EdgeDiTError
from ..genotype import Genotype
from ..records import FewStepStage, Model, Solvers, Telemetry
from ..run.stage import EVALUATE_FEW_STEP, FEW_STEP
from ..schema import convert, read_lines, read_record
from .page import Figure, optional_record
from .tables import MODEL_LABELS, distance_cell, guidance_in_words, latency_label, metric_label, width_rows

TUNED, GIVEN = "student-tuned", "few-step-source"
"""What a few-step student is distilled from: the run's own student, or another pipeline (few_step.path)."""

FEWER = "-few-steps"
"""Ends the name of the same net, sampled with as few steps."""


def distilled_from(models: Iterable[Mapping[str, Any]]) -> str:
    """The stage of the model that the few-step student was distilled from; that with "-few-steps" is the same net with
    few.
    """
    return GIVEN if any(model["stage"] == GIVEN for model in models) else TUNED


def on_the_way(models: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The stages of models on the way from many steps to few, to the exports."""
    source = distilled_from(models)
    before = ("teacher",) if source == TUNED else ()
    return (*before, source, source + FEWER, "few-step", "exported")


def few_step_facts(run_dir: Path, judged: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the stage made and how it went, what it was distilled from if that is not of the run, and what standard
    solvers reach; `None`: the run has no such stage.

    Args:
        judged: the models that few steps were judged beside.
    """
    stage = optional_record(run_dir / FEW_STEP.folder / "stage.json", FewStepStage)
    if stage is None:
        return None
    solvers = optional_record(run_dir / "evaluate" / "solvers.json", Solvers)
    return {
        "timesteps": stage["timesteps"],
        "best": stage["best"],
        "steps": stage["steps"],
        "curves": _curves(run_dir),
        **_source(run_dir, judged),
        **({} if solvers is None else {"solvers": solvers}),
    }


def _source(run_dir: Path, judged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The pipeline that was distilled in the place of the run's own, and (of classes) the architecture that it has."""
    given = next((model for model in judged if model["stage"] == GIVEN), None)
    if given is None:
        return {}
    source: dict[str, Any] = {"path": given.get("path")}
    config = optional_record(run_dir / FEW_STEP.folder / "transformer" / "config.json", dict[str, Any]) or {}
    if "layers" in config:
        genotype = Genotype.of(config)
        source["genotype"] = {"hash": genotype.hash, "layers": genotype.to_layers()}
    return {"source": source}


def _curves(run_dir: Path) -> dict[str, dict[str, list[float]]]:
    """Distance (and recall) of few-step samples against steps, by sub-network ("" where there is none)."""
    path = run_dir / FEW_STEP.folder / "telemetry.jsonl"
    if not path.is_file():
        return {}
    found: dict[str, dict[str, list[float]]] = {}
    for line in read_lines(path, Telemetry, FEW_STEP.made_by):
        for key in (key for key in line if key.split("_")[0] == "distance"):
            width = key.partition("_")[2]
            recall = key.replace("distance", "recall", 1)
            curve = found.setdefault(width, {"steps": [], "distance": [], "recall": []})
            where = f"at step {line['step']} of {path}"
            curve["steps"].append(line["step"])
            curve["distance"].append(convert(line[key], float, f"{key} {where}"))
            curve["recall"].append(convert(line.get(recall, 0.0), float, f"{recall} {where}"))
    return found


def few_step_table(models: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the one table from teacher to export, each model as it samples; empty without a few-step
    model.
    """
    if not any(model["stage"] == "few-step" for model in models):
        return [], []
    rows = [model for stage in on_the_way(models) for model in models if model["stage"] == stage]
    distance = next(key for key in rows[0]["metrics"] if key.startswith("fid["))
    header = [
        *("model", "weights (MB)", "steps", "guidance", "forwards an image", "ms an image", "in"),
        *(metric_label(distance), "recall", "class agreement"),
    ]
    return header, [_row(model, distance) for model in rows]


def _seconds(model: Mapping[str, Any]) -> tuple[str, float | None]:
    """In which runtime an image was timed, and how long it took; "" and `None` where it was not."""
    return next(iter((model.get("seconds_per_image") or {"": None}).items()))


def _row(model: Mapping[str, Any], distance: str) -> list[str]:
    label = MODEL_LABELS.get(model["name"], model["name"])
    if model.get("solver") is not None:
        label = f"the same net, {model['solver']}"
    runtime, seconds = _seconds(model)
    stored = model.get("bytes") or {}
    weights = stored.get("fp32") or next(iter(stored.values()), None)
    return [
        label,
        "–" if weights is None else f"{weights / 1e6:.2f}",
        str(model["steps"]),
        guidance_in_words(model),
        str(model.get("forwards_per_image") or "–"),
        "–" if seconds is None else f"{1e3 * seconds:.3g}",
        latency_label(runtime) if runtime else "–",
        distance_cell(model, distance),
        "–" if model.get("recall") is None else f"{model['recall']:.3f}",
        "–" if model.get("class_agreement") is None else f"{model['class_agreement']:.1%}",
    ]


def few_step_ratios(models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The few-step student against the net that it was distilled from, with its many steps and with as few: ratios of
    forwards, seconds and distances, and the share of the distance that few steps cost which it wins back.
    """
    by_stage, source = {model["stage"]: model for model in models}, distilled_from(models)
    if not {"few-step", source, source + FEWER} <= by_stage.keys():
        return {}
    ours, many, few = by_stage["few-step"], by_stage[source], by_stage[source + FEWER]
    key = next(key for key in ours["metrics"] if key.startswith("fid["))
    distance = {name: model["metrics"][key] for name, model in (("ours", ours), ("many", many), ("few", few))}
    cost = distance["few"] - distance["many"]
    found = {
        "source": many["name"],
        "forwards": many["forwards_per_image"] / ours["forwards_per_image"],
        "distance": distance["ours"] / distance["many"],
        "won_back": (distance["few"] - distance["ours"]) / cost if cost > 0 else None,
        "recall": ours["recall"] - many["recall"],
    }
    if ours.get("class_agreement") is not None and many.get("class_agreement") is not None:
        found["class_agreement"] = ours["class_agreement"] - many["class_agreement"]
    seconds = [model.get("seconds_per_image", {}).get("torch-fp32") for model in (many, ours)]
    if all(seconds):
        found["speedup"] = seconds[0] / seconds[1]
    return found


def draw_few_step_figures(run_dir: Path, facts: Mapping[str, Any]) -> list[Figure]:
    """Write the PNGs of the stage below `run_dir/report`: the distance while it learned, and its last strips."""
    from . import plots

    figures = []
    if facts["curves"]:
        count = f"{len(facts['timesteps'])} step" + "s" * (len(facts["timesteps"]) > 1)
        series = {
            f"{width}, {count}" if width else count: (curve["steps"], curve["distance"])
            for width, curve in facts["curves"].items()
        }
        plots.curve_plot(run_dir / "report" / "few-step.png", series, xlabel="steps of few-step distillation")
        best = facts["best"]
        figures.append(
            Figure(
                "few-step.png",
                "While it learned few steps",
                f"Fréchet distance of few-step samples against training steps: {', '.join(series)}.",
                f"Without guidance. The best, after {best['step']} of {facts['steps']} steps, is what was published.",
            )
        )
    last = sorted((run_dir / FEW_STEP.folder / "samples").glob("step-*.png"))
    newest = [path for path in last if path.name[:11] == last[-1].name[:11]]
    if newest:
        plots.sample_grid(run_dir / "report" / "few-step-strips.png", {_name(path): _picture(path) for path in newest})
        text = "First row: the student's samples. Second: what its first step takes for them."
        text += " Third: the critic's own samples of many steps, which should look like the first." * _third(newest[0])
        figures.append(
            Figure("few-step-strips.png", "The last look at student and critic", f"Rows of samples. {text}", text)
        )
    return figures


def _name(path: Path) -> str:
    """What a strip's file name says, e.g. "step 500, tiny"."""
    step, _, width = path.stem.removeprefix("step-").partition("_")
    return f"step {int(step) if step.isdecimal() else step}" + (f", {width}" if width else "")


def _picture(path: Path) -> Any:
    import numpy as np
    from PIL import Image

    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise EdgeDiTError(f"The image {path} cannot be read ({error}); {FEW_STEP.made_by} writes it.") from error


def _third(path: Path) -> bool:
    """Whether a strip has a row of the critic: ten square pictures a row."""
    height, width = _picture(path).shape[:2]
    return height > 2.5 * (width + 1) / 10


# -------------------------------------------------------------------- text to image


MANY = "-many-steps"
"""Names a width of another net than the run's own."""


def few_step_widths(run_dir: Path, many: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every width with many steps, with few by the best standard solver, and distilled: the same captions from the
    same noise. Empty before stage evaluate-few-step.

    Args:
        many: the run's own widths with many steps; those of another net (few_step.path) stand beside the others.
    """
    folder = run_dir / EVALUATE_FEW_STEP.folder
    if not (folder / "stage.json").is_file():
        return []
    paths = sorted(folder.glob(f"*{MANY}.json"))
    given = [read_record(path, Model, EVALUATE_FEW_STEP.made_by) for path in paths]
    found = []
    for model in sorted(given, key=lambda model: model["parameters"]) or many:
        width = model["name"].removesuffix(MANY)
        if not (folder / f"{width}.json").is_file():  # one width alone was distilled
            continue
        few, ours = (
            read_record(folder / f"{name}.json", Model, EVALUATE_FEW_STEP.made_by) for name in (width + FEWER, width)
        )
        row = {"name": width, "many": model, "few": few, "few_step": ours}
        if model.get("class_agreement") is not None and ours.get("class_agreement") is not None:
            row["relative_fall"] = {
                key: 1 - prompt_agreement(row[key]) / prompt_agreement(model) if prompt_agreement(model) else None
                for key in ("few", "few_step")
            }
        found.append(row)
    return found


def prompt_agreement(model: Mapping[str, Any]) -> float:
    """The mean of the shares that follow their caption: the digit, and each style."""
    shares = [model["class_agreement"], *model["style_agreement"].values()]
    return sum(shares) / len(shares)


def _forwards(model: Mapping[str, Any]) -> int:
    return model.get("forwards_per_image") or model["steps"] * (2 if model["guidance_scale"] > 1 else 1)


def _seconds_of_many(width: Mapping[str, Any]) -> float | None:
    """Seconds an image of a width in many steps, from two calls in few: what is in them beside the forwards, such as
    the decoder, is not multiplied. `None` where they do not tell how long a forward takes.
    """
    few, ours = (_seconds(width[key])[1] for key in ("few", "few_step"))
    more = _forwards(width["few"]) - _forwards(width["few_step"])
    if few is None or ours is None or few <= ours or more <= 0:
        return None
    return few + (_forwards(width["many"]) - _forwards(width["few"])) * (few - ours) / more


def few_step_widths_table(widths: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: three ways of every width."""
    if not widths:
        return [], []
    first = widths[0]["many"]
    distance = next(key for key in first["metrics"] if key.startswith("fid["))
    header = ["width, sampler", "steps", "guidance", "forwards an image", "ms an image", metric_label(distance)]
    judged = "relative_fall" in widths[0]
    if judged:
        header += ["digit", *first["style_agreement"], "digit, never seen", "fall of prompt agreement"]
    rows = []
    for width in widths:
        for label, key, model in width_rows([width]):
            guided = model["guidance_scale"] > 1
            seconds, about = (_seconds_of_many(width), "≈ ") if key == "many" else (_seconds(model)[1], "")
            row = [
                label,
                str(model["steps"]),
                f"{model['guidance_scale']:g}" if guided else "none",
                str(_forwards(model)),
                "–" if seconds is None else f"{about}{1e3 * seconds:.3g}",
                distance_cell(model, distance),
            ]
            if judged:
                fall = width["relative_fall"].get(key)
                row += [f"{model['class_agreement']:.1%}", *(f"{s:.1%}" for s in model["style_agreement"].values())]
                row += [f"{model['held_out']['class_agreement']:.1%}", "–" if fall is None else f"{fall:.1%}"]
            rows.append(row)
    return header, rows
