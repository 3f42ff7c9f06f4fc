"""Model cards: rendered from a run's `report.json`, with `huggingface_hub`'s card classes and a template of hub_cards/.

Pushing stays with the Hub's own tools; nothing here reaches for the network.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EdgeDiTError
from ..files import atomic_write_text
from ..markup import MARKUP, markdown, one_line
from ..run.results import pipeline_weights_hash
from ..run.sections import LICENSE, REPO_ID
from ..schema import shorten

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
    "onnx-fp32": "exported, fp32",
    "onnx-int8": "exported, int8",
    "executorch-fp32": "exported, ExecuTorch fp32",
    "executorch-int8": "exported, ExecuTorch int8 (8da8w)",
    "executorch-int4": "exported, ExecuTorch int4 (8da4w)",
}
RUNTIME_LABELS = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "executorch": "ExecuTorch", "coreml": "Core ML"}
PIPELINE_TAG = "unconditional-image-generation"  # the Hub has no tag of its own for class-conditional generation


def template(name: str) -> str:
    """Text of a Jinja template, `"README.md.jinja"` or `"report.html.jinja"`."""
    return (importlib.resources.files("edgedit_hf.hub_cards") / name).read_text(encoding="utf-8")


# -------------------------------------------------------------------- what report and card both show


def metric_label(key: str) -> str:
    """Words for a metric's key: `fid[digits-cnn,n=2000]` → "Fréchet distance (digits-cnn, n=2,000)".

    "FID" is kept for Inception's features, as readers take it to mean those.
    """
    match = re.fullmatch(r"fid\[(.+),n=(\d+)\]", key)
    if match is None:
        return key
    extractor, count = match[1], f"n={int(match[2]):,}"
    return f"FID ({count})" if extractor.startswith("inception") else f"Fréchet distance ({extractor}, {count})"


def latency_label(key: str) -> str:
    """Words for a latency's key: `onnxruntime-fp32` → "ONNX Runtime fp32"."""
    runtime, _, precision = key.partition("-")
    return f"{RUNTIME_LABELS.get(runtime, runtime)} {precision}"


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

    Args:
        models: `report["models"]`.
    """
    order = list(MODEL_LABELS)
    models = sorted(models, key=lambda m: order.index(m["name"]) if m["name"] in order else len(order))
    runtimes = list(RUNTIME_LABELS)

    def place(name: str) -> tuple[int, str]:
        runtime, _, precision = name.partition("-")
        return runtimes.index(runtime) if runtime in runtimes else len(runtimes), precision

    sampled = (("steps", lambda m: str(m["steps"])), ("guidance", guidance_in_words))
    latencies = sorted({key for m in models for key in m["latency_ms"]}, key=place)
    distances = sorted({key for m in models for key in m["metrics"] if key.startswith("fid[")})
    columns = [
        ("model", lambda m: MODEL_LABELS.get(m["name"], m["name"])),
        ("parameters", lambda m: scaled(m["parameters"])),
        ("GFLOPs", lambda m: f"{m['flops'] / 1e9:.3g}"),
        *[(f"{latency_label(k)} (ms)", lambda m, k=k: _number(m["latency_ms"].get(k), ".2f")) for k in latencies],
        *[(name, said) for name, said in sampled if len({said(m) for m in models}) > 1],
        *[(metric_label(k), lambda m, k=k: _number(m["metrics"].get(k), ".3g")) for k in distances],
        ("precision", lambda m: _number(m.get("precision"), ".3f")),
        ("recall", lambda m: _number(m.get("recall"), ".3f")),
        ("class agreement", lambda m: _number(m.get("class_agreement"), ".1%")),
    ]
    cells = [[value(m) for _, value in columns] for m in models]
    kept = [i for i in range(len(columns)) if any(row[i] != "–" for row in cells)]
    return [columns[i][0] for i in kept], [[row[i] for i in kept] for row in cells]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


# -------------------------------------------------------------------- the card


def render_card(
    report: Mapping[str, Any],
    *,
    repo_id: str,
    license: str,
    model: str = "student-tuned",
    base_model: str | None = None,
) -> str:
    """The README.md of a model repository: metadata, how to load it, figures, limits, how to reproduce it.

    Args:
        report: content of a run's `report.json`.
        repo_id: where the model will live, e.g. `"me/digits-edgedit"`; stands in the loading example.
        license: licence identifier of the Hub, e.g. `"apache-2.0"`. It depends on data and teacher: only you know it.
        model: which of the report's models the card is for.
        base_model: Hub id of the teacher, if it has one.

    Raises:
        EdgeDiTError: the report has no such model.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    if not re.fullmatch(REPO_ID, repo_id) or not re.fullmatch(LICENSE, license):
        raise EdgeDiTError(
            f"The card is for repo_id {shorten(repo_id)} and license {shorten(license)}; the Hub takes "
            "organisation/name and an identifier such as apache-2.0, of letters, digits, '-', '_' and '.'."
        )
    models = {m["name"]: m for m in report["models"]}
    if model not in models:
        raise EdgeDiTError(
            f"The report has no model {model!r}; it has {sorted(models) or 'none, run stage evaluate first'}."
        )
    entry, data = models[model], report["reproduce"]["config"].get("data", {}).get("source", "unknown")
    figures = {key: (metric_label(key), value) for key, value in entry["metrics"].items() if key.startswith("fid[")}
    figures |= {
        key: (key, entry[key]) for key in ("precision", "recall", "class_agreement") if entry.get(key) is not None
    }
    results = [
        EvalResult(
            task_type=PIPELINE_TAG,
            task_name="image generation",
            dataset_type=one_line(Path(data).name),
            dataset_name=one_line(Path(data).name),
            metric_type="frechet_distance"
            if key.startswith("fid[") and not label.startswith("FID")
            else key.split("[")[0],
            metric_name=one_line(label.replace("_", " ")),
            metric_value=value,
        )
        for key, (label, value) in figures.items()
    ]
    card_data = ModelCardData(
        model_name=repo_id.rpartition("/")[2],
        license=license,
        library_name="diffusers",
        pipeline_tag=PIPELINE_TAG,
        tags=["edgedit_hf", "diffusion", "DiT", "compressed"] + (["onnx"] if entry["stage"] == "exported" else []),
        base_model=base_model,
        eval_results=results,
    )
    header, rows = comparison_table(report["models"])
    few_step = any(m["stage"] == "few-step" for m in models.values()) and entry["stage"] in ("few-step", "exported")
    card = ModelCard.from_template(
        card_data,
        template_str=template("README.md.jinja"),
        report=report,
        entry=entry,
        label=MODEL_LABELS.get(model, model),
        repo_id=repo_id,
        data=Path(data).name,
        conditional=entry.get("class_agreement") is not None,
        few_step=few_step,
        source=report.get("few_step", {}).get("source") if few_step else None,
        guidance=guidance_in_words(entry),
        alike=not {"steps", "guidance"} & set(header),
        header=[markdown(cell) for cell in header],
        rows=[[markdown(cell) for cell in row] for row in rows],
        **MARKUP,
    )
    return str(card)


def write_card(folder: str | os.PathLike, report: Mapping[str, Any], **options: Any) -> Path:
    """Write [`render_card`]'s text as `folder/README.md` and return its path. Do it after `save_pretrained`, which may
    overwrite a README, and before uploading the folder.

    Raises:
        EdgeDiTError: the folder holds other weights than the report's figures are of.
    """
    path = Path(folder, "README.md")
    wanted = options.get("model", "student-tuned")
    judged = next((entry.get("weights") for entry in report["models"] if entry["name"] == wanted), None)
    current = None if judged is None else pipeline_weights_hash(folder)
    if current not in (None, judged):
        raise EdgeDiTError(
            f"The report's figures of {wanted!r} are those of other weights ({judged}) than {folder} holds "
            f"({current}); run stage evaluate again, write the report anew, then the card."
        )
    atomic_write_text(path, render_card(report, **options))
    return path
