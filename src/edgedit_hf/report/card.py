"""Model cards: rendered from a run's `report.json`, with `huggingface_hub`'s card classes and a template of hub_cards/.

Pushing stays with the Hub's own tools; nothing here reaches for the network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import EdgeDiTError
from ..files import atomic_write_text
from ..markup import MARKUP, markdown, one_line
from ..run.results import pipeline_weights_hash
from ..run.sections import LICENSE, REPO_ID
from ..schema import shorten
from .tables import MODEL_LABELS, comparison_table, guidance_in_words, metric_label, template

PIPELINE_TAG = "unconditional-image-generation"  # the Hub has no tag of its own for class-conditional generation


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
