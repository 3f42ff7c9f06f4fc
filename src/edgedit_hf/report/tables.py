"""What report pages and cards share: labels of models, runtimes and metrics, and the table that compares models."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..stamp import PROTOCOL, protocol

NO_VALUE = "–"
PLUS_MINUS = (
    "± is a distance's standard error, of a bootstrap over the generated images; models share their noise, so that "
    "differences are more certain than that."
)
# What readers call the models of a run, by their name in report.json, in the order in which they are compared.
MODEL_LABELS = {
    "teacher": "teacher",
    "teacher-more-steps": "teacher, same extra steps",
    "student": "student, before tuning",
    "student-random-proxies": "student from random proxies, tuned",
    "student-tuned": "student, tuned",
    "student-tuned-few-steps": "student, tuned, with few steps",
    "few-step-source": "source of the few-step student",
    "few-step-source-few-steps": "source of the few-step student, with few steps",
    "few-step": "few-step student",
    "quantized": "student, quantized",
    "onnx-fp32": "exported, fp32",
    "onnx-int8": "exported, int8",
    "executorch-fp32": "exported, ExecuTorch fp32",
    "executorch-int8": "exported, ExecuTorch int8 (8da8w)",
    "executorch-int4": "exported, ExecuTorch int4 (8da4w)",
}
RUNTIME_LABELS = {
    "torch": "PyTorch",
    "onnxruntime": "ONNX Runtime",
    "executorch": "ExecuTorch",
    "coreml": "Core ML",
    "web": "browser",
}


def template(name: str) -> str:
    """Text of a Jinja template, `"README.md.jinja"` or `"report.html.jinja"`."""
    return (importlib.resources.files("edgedit_hf.hub_cards") / name).read_text(encoding="utf-8")


def chosen_model(models: Sequence[Mapping[str, Any]]) -> str:
    """The name of the model that a run is about."""
    return "few-step" if any(model["name"] == "few-step" for model in models) else "student-tuned"


def metric_label(key: str) -> str:
    """Words for a metric's key: `fid[digits-cnn,n=2000]` → "Fréchet distance (digits-cnn, n=2,000)".

    "FID" is kept for Inception's features, as readers take it to mean those.
    """
    match = re.fullmatch(r"(s?)fid\[(.+),n=(\d+)\]", key)
    if match is None:
        return key.replace("_", " ")
    extractor, count = match[2], f"n={int(match[3]):,}"
    if match[1]:
        return f"sFID ({count})"
    return f"FID ({count})" if extractor == "inception" else f"Fréchet distance ({extractor}, {count})"


def latency_label(key: str) -> str:
    """Words for a latency's key: `onnxruntime-fp32` → "ONNX Runtime fp32"."""
    runtime, _, precision = key.partition("-")
    return f"{RUNTIME_LABELS.get(runtime, runtime)} {precision}".rstrip()


def model_place(name: str) -> int:
    """Where a model stands on the way from the teacher to what ships; others come last."""
    known = list(MODEL_LABELS)
    return known.index(name) if name in known else len(known)


def scaled(value: float) -> str:
    """A count in three digits with k, M or G: 1812345 → "1.81 M"."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}" if abs(value) < 1e3 * factor else f"{value / factor:,.0f}{unit}"
    return f"{value:.3g}"


def guidance_in_words(model: Mapping[str, Any]) -> str:
    """The guidance that a model of a report was sampled with, "none" where its net was run once a step."""
    once = model.get("forwards_per_image") == model["steps"]  # so is a net without classes, whatever was asked for
    return "none" if once or model["guidance_scale"] <= 1 else f"{model['guidance_scale']:g}"


def comparison_table(models: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that sets the models of a report side by side; columns nobody has a value for are
    left out, and how models were sampled if they all were alike.

    Figures of quality that were not measured alike ([`stamp.PROTOCOL`]) stand in columns of their own, which say what
    differs.

    Args:
        models: `report["models"]`.
    """
    models = sorted(models, key=lambda m: model_place(m["name"]))
    runtimes = list(RUNTIME_LABELS)

    def place(name: str) -> tuple[int, str]:
        runtime, _, precision = name.partition("-")
        return runtimes.index(runtime) if runtime in runtimes else len(runtimes), precision

    sampled = (("steps", lambda m: str(m["steps"])), ("guidance", guidance_in_words))
    latencies = sorted({key for m in models for key in m["latency_ms"]}, key=place)
    judges = list(dict.fromkeys(protocol(m.get("stamp")) for m in models))
    apart = differing(judges)
    distances = [
        (key, judge, judged)
        for key in sorted({key for m in models for key in m["metrics"] if key.startswith("fid[")})
        for judge, judged in zip(judges, apart)
    ]
    columns = [
        ("model", lambda m: MODEL_LABELS.get(m["name"], m["name"])),
        ("parameters", lambda m: scaled(m["parameters"])),
        ("GFLOPs", lambda m: f"{m['flops'] / 1e9:.3g}"),
        *[(f"{latency_label(k)} (ms)", lambda m, k=k: _number(m["latency_ms"].get(k), ".2f")) for k in latencies],
        *[(name, said) for name, said in sampled if len({said(m) for m in models}) > 1],
        *[
            (
                metric_label(k) + said,
                lambda m, k=k, j=j: distance_cell(m, k) if judged_by(m, j) else NO_VALUE,
            )
            for k, j, said in distances
        ],
        *[
            (name + said, lambda m, name=name, j=j: _number(m.get(name) if judged_by(m, j) else None, ".3f"))
            for name in ("precision", "recall")
            for j, said in zip(judges, apart)
        ],
        ("class agreement", lambda m: _number(m.get("class_agreement"), ".1%")),
    ]
    cells = [[value(m) for _, value in columns] for m in models]
    kept = [i for i in range(len(columns)) if any(row[i] != NO_VALUE for row in cells)]
    return [columns[i][0] for i in kept], [[row[i] for i in kept] for row in cells]


def distance_cell(model: Mapping[str, Any], key: str) -> str:
    """A distance of a model with its standard error, where it has one: "5.46 ± 0.21"."""
    value, error = model["metrics"].get(key), (model.get("standard_errors") or {}).get(key)
    return _number(value, ".3g") + ("" if value is None or error is None else f" ± {f'{error:#.2g}'.removesuffix('.')}")


def width_rows(widths: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Label, way (`"many"`, `"few"`, `"few_step"`) and model of the three rows of every width."""
    return [
        row
        for width in widths
        for row in (
            (f"{width['name']}, many steps", "many", width["many"]),
            (f"{width['name']}, {width['few'].get('solver')}", "few", width["few"]),
            (f"{width['name']}, few-step", "few_step", width["few_step"]),
        )
    ]


def judging_lines(report: Mapping[str, Any], run: str = "") -> list[str]:
    """What a reader has to know of a report's distances, a sentence each: what makes them worth less, first of the real
    images, then of models, each note once with the models that it holds for.

    Args:
        run: its name, to stand before each on a page of several runs.
    """
    of: dict[str, list[str]] = {}
    named = _named_models(report)
    for label, model in named:
        for note in model.get("notes") or ():
            of.setdefault(note, []).append(label)
    own = [f"{note} ({'all models' if len(names) == len(named) else '; '.join(names)})" for note, names in of.items()]
    lines = [*((report.get("reference") or {}).get("notes") or ()), *own]
    return [f"{run}: {line}" for line in lines] if run else lines


def plus_minus(report: Mapping[str, Any]) -> list[str]:
    """The sentence that says what ± behind a distance is, if one of the report's models has it."""
    return [PLUS_MINUS] if any(model.get("standard_errors") for _, model in _named_models(report)) else []


def _named_models(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Every model of a report with what tables call it; a width that is a model of the run stands there once."""
    models = report["models"]
    named = [(MODEL_LABELS.get(model["name"], model["name"]), model) for model in models]
    rows = width_rows((report.get("few_step") or {}).get("widths") or [])
    return named + [(label, model) for label, _, model in rows if model not in models]


def judged_by(model: Mapping[str, Any], judge: tuple[Any, ...] | None) -> bool:
    """Whether a model's figures of quality were measured by this protocol."""
    return protocol(model.get("stamp")) == judge


def differing(judges: Sequence[tuple[Any, ...] | None]) -> list[str]:
    """Words for each of several protocols that tell it from the others, to stand behind a column's name; nothing where
    there is one.
    """
    known = [judge for judge in judges if judge is not None]
    parts = [place for place in range(len(PROTOCOL)) if len({judge[place] for judge in known}) > 1]
    words = []
    for judge in judges:
        said = [f"{PROTOCOL[place].replace('_', ' ')} {str(judge[place])[:12]}" for place in parts] if judge else []
        words.append(f", {'; '.join(said) or 'stamped' if judge else 'without a stamp'}" if len(judges) > 1 else "")
    return words


def _number(value: float | None, form: str) -> str:
    return NO_VALUE if value is None else format(value, form)
