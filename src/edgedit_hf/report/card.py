"""Model cards, of everything that this package makes: rendered from what was measured, with `huggingface_hub`'s card
classes and the templates of hub_cards/.

Pushing stands elsewhere; nothing here reaches for the network, and no weights are loaded. No torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import EdgeDiTError
from ..export.web.page import space_metadata
from ..files import atomic_folder, atomic_write_text
from ..hub import SCHEME, is_name, parse_name
from ..markup import MARKUP, one_line
from ..private import without_local_paths
from ..run.config import RunConfig
from ..run.sections import LICENSE, REPO_ID
from ..run.stage import Stage
from ..schema import shorten
from .card_facts import dtype_of, figures_of, licence_of, tables_of, usage_of
from .card_pictures import FOLDER, Picture, examples, pictures_of
from .subject import STAGES, Subject, subject_of
from .tables import MODEL_LABELS, guidance_in_words, template

TASKS = {"edgedit": "unconditional-image-generation", "elastic": "text-to-image"}
"""The Hub's names; it has none of its own for class-conditional generation."""

RELATIONS = {"student": "finetune", "teacher": "finetune", "supernet": "finetune", "subnet": "finetune"}
RELATIONS |= {"few-step": "finetune", "quantized": "quantized", "exported": "quantized", "bank": "adapter"}
"""What a kind is to its base model. The Hub lists conversions to other formats with the quantised ones; a latency table
is nothing of the sort.
"""

PLACEHOLDER = "your-name/"
"""How the recipes' ids begin until they are changed."""


def card_files(
    folder: str | os.PathLike,
    repo_id: str | None,
    *,
    license: str | None = None,
    base_model: str | None = None,
    report: str | os.PathLike | Mapping[str, Any] | None = None,
    model: str | None = None,
) -> dict[str, bytes]:
    """The card of a folder, in memory: `README.md` and its pictures `card/*.png`.

    Args:
        folder: a pipeline, an export, a proxy bank or a latency table.
        repo_id: where it will live on the Hub, e.g. `"me/digits-edgedit"`; it stands in the lines that load it. `None`:
            a card that stays with the folder, which is then loaded by its own name and may lack a licence.
        license: an identifier of the Hub such as `"apache-2.0"`, or `"name=link"` for one that the Hub does not know;
            without it that of the base model, where it is known.
        base_model: Hub id of what it was made from, if that has one.
        report: report.json or its content, in place of that of the run in which the folder stands.
        model: its name in the report, where its place and its weights do not tell.

    Raises:
        EdgeDiTError: a measurement, the licence or an id is missing or no good (it is named).
    """
    subject = subject_of(folder, report, model)
    base_model = base_model or _recorded_base(subject)
    if base_model is None and repo_id is not None and subject.kind == "bank":
        raise EdgeDiTError(
            f"The card of the bank {folder} needs the Hub's id of its teacher, without which nobody can use it; give "
            "it with --base-model organisation/name."
        )
    known = licence_of(subject, license, base_model)
    if known is None and repo_id is not None:
        raise EdgeDiTError(
            f"The licence of {folder} is unknown: it depends on the data and on the base model. Give it with "
            "--license, as an identifier of the Hub such as apache-2.0, or as name=link for another one."
        )
    pictures = pictures_of(subject)
    text = _render(subject, repo_id, known or {}, base_model, pictures)
    shown = {name: picture for name, picture in pictures.items() if f"{FOLDER}/{name}" in text}
    return {"README.md": text.encode(), **{f"{FOLDER}/{name}": picture.png for name, picture in shown.items()}}


def write_card(
    folder: str | os.PathLike,
    report: str | os.PathLike | Mapping[str, Any] | None = None,
    *,
    repo_id: str | None = None,
    **options: Any,
) -> Path:
    """Write [`card_files`] into the folder and return the path of its README.md. Do it after `save_pretrained`, which
    may overwrite a README.
    """
    files = card_files(folder, repo_id, report=report, **options)
    path = Path(folder, "README.md")
    pictures = {Path(name).name: content for name, content in files.items() if name != path.name}
    at = path.parent / FOLDER
    if pictures != {picture.name: picture.read_bytes() for picture in at.glob("*.png")}:
        with atomic_folder(at) as aside:
            for name, content in pictures.items():
                (aside / name).write_bytes(content)
    atomic_write_text(path, files[path.name].decode())
    return path


def write_run_card(config: RunConfig, stage: Stage) -> Path:
    """Write the card of what a run ships, from its report, as `card.repo_id` and `card.license` of its recipe have it.

    As long as one of the two is not chosen, the card stays with the folder: it loads that by its own name, and says
    no licence.
    """
    card = config.card
    chosen = None if card.repo_id.startswith(PLACEHOLDER) else card.repo_id
    licence = None if card.license == "other" else card.license
    return write_card(
        config.folder(stage.folder),
        config.folder("report.json"),
        repo_id=chosen if licence else None,
        license=licence,
        model=stage.folder,
    )


def render_card(
    report: Mapping[str, Any],
    *,
    repo_id: str,
    license: str,
    model: str = "student-tuned",
    base_model: str | None = None,
) -> str:
    """The text of a card for one of a report's models, without its folder: no pictures.

    Raises:
        EdgeDiTError: the report has no such model.
    """
    models = {entry["name"]: entry for entry in report["models"]}
    if model not in models:
        raise EdgeDiTError(
            f"The report has no model {model!r}; it has {sorted(models) or 'none, run stage evaluate first'}."
        )
    entry = models[model]
    kind = next((kind for kind, stages in STAGES.items() if entry["stage"] in stages), "student")
    few = any(m["stage"] == "few-step" for m in models.values()) and kind in ("few-step", "exported")
    classes = {"num_classes": 10 if entry.get("class_agreement") is not None else 0}
    index = {"format": model.partition("-")[0], "precision": model.partition("-")[2]} if kind == "exported" else {}
    label = MODEL_LABELS.get(model, model)
    subject = Subject(kind, "edgedit", label, report=report, entries=[entry], config=classes, index=index, few_step=few)
    return _render(subject, repo_id, licence_of(subject, license, base_model) or {}, base_model, {})


def _render(
    subject: Subject,
    repo_id: str | None,
    licence: Mapping[str, str],
    base_model: str | None,
    pictures: Mapping[str, Picture],
) -> str:
    import jinja2

    for what, value, form in (
        ("repo_id", repo_id, REPO_ID),
        ("license", licence.get("license"), LICENSE),
        ("base_model", base_model, REPO_ID),
    ):
        if value is not None and (not re.fullmatch(form, value) or value.startswith(PLACEHOLDER)):
            raise EdgeDiTError(
                f"The card is for {what} {shorten(value)}; the Hub takes organisation/name and an identifier such as "
                "apache-2.0, of letters, digits, '-', '_' and '.', and they must be yours."
            )
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(template), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    name = repo_id or (subject.folder.absolute().name if subject.folder else "")
    text = environment.get_template(f"card-{subject.kind}.md.jinja").render(
        card_data=_metadata(subject, repo_id, licence, base_model, pictures),
        subject=subject,
        name=name.rpartition("/")[2],
        place=name,
        on_hub=repo_id is not None,
        base_model=base_model,
        licence=licence.get("license_name") or licence.get("license"),
        pictures=pictures,
        report=subject.report or {},
        entry=subject.entry,
        label=subject.label,
        data=_data(subject),
        guidance=guidance_in_words(subject.entry) if subject.entry else None,
        reproduce=_reproduce(subject),
        versions=(subject.report or subject.stage or subject.index).get("versions", {}),
        **usage_of(subject, base_model),
        **tables_of(subject),
        **MARKUP,
    )
    return re.sub(r"\n{3,}", "\n\n", text)


# -------------------------------------------------------------------- metadata


def _metadata(
    subject: Subject,
    repo_id: str | None,
    licence: Mapping[str, str],
    base_model: str | None,
    pictures: Mapping[str, Picture],
) -> str:
    """The YAML at the head of a card."""
    from huggingface_hub import EvalResult, ModelCardData

    name = repo_id or (subject.folder.absolute().name if subject.folder else "model")
    own = "random input" if subject.kind == "latency" else "own samples"
    dataset = one_line(own if subject.kind == "latency" else _data(subject) or own)
    results = [
        EvalResult(
            task_type=TASKS[subject.family],
            task_name="image generation",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=figure.type,
            metric_name=one_line(figure.name),
            metric_value=figure.value,
        )
        for figure in figures_of(subject)
    ]
    family = "DiT" if subject.family == "edgedit" else "elastic"
    tags = ["edgedit_hf", "diffusion", family, "compressed" if subject.kind != "teacher" else "teacher"]
    more: dict[str, Any] = {}
    if subject.kind == "exported":
        tags.append(str(subject.index["format"]))
        if subject.index["format"] == "web":  # as a Space too the folder is served as it is
            more |= space_metadata(name.rpartition("/")[2])
    elif subject.kind != "student":
        tags.append(subject.kind)
    if base_model is not None and subject.kind in RELATIONS:
        more["base_model_relation"] = RELATIONS[subject.kind]
    if subject.family == "elastic" and (shown := examples(subject, pictures)):
        more["widget"] = shown
    data = ModelCardData(
        model_name=name.rpartition("/")[2],
        library_name="diffusers" if subject.pipeline else None,
        pipeline_tag=TASKS[subject.family] if subject.pipeline else None,
        tags=tags,
        base_model=base_model,
        eval_results=results,
        **licence,
        **more,
    )
    return data.to_yaml()


def _recorded_base(subject: Subject) -> str | None:
    """The Hub's id of what it was made from, where the recipe had it from there: a name that the client has fetched,
    since a path of those days may read like one.
    """
    from huggingface_hub import try_to_load_from_cache

    settings = subject.recorded
    section = "quantize" if subject.kind == "quantized" else "teacher"
    for path in ((subject.verify or {}).get("source"), (settings.get(section) or {}).get("path")):
        if isinstance(path, str) and is_name(path):
            name = parse_name(path).repo_id
            files = ("model_index.json", "config.json", "README.md")
            if path.startswith(SCHEME) or any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
                return name
    return None


def _data(subject: Subject) -> str | None:
    """The name of the data that it was trained on."""
    source = (subject.recorded.get("data") or {}).get("source")
    if source is None and subject.report is not None:
        source = (subject.report["reproduce"]["config"].get("data") or {}).get("source", "unknown")
    return None if source is None else Path(source).name


# -------------------------------------------------------------------- how to reproduce


def _reproduce(subject: Subject) -> dict[str, str] | None:
    """The command and its run.yaml; `None`: it was not recorded."""
    report, stage = subject.report, subject.stage
    if report is not None and subject.kind != "quantized":
        if subject.kind != "exported" or subject.entry is not None:
            found = report["reproduce"]
            return {"command": found["command"], "yaml": _without_places(found["yaml"])}
    if subject.kind == "exported" and (subject.verify or {}).get("source"):
        source = str((subject.verify or {})["source"])
        source = Path(source).name if Path(source).is_absolute() else source
        command = (
            f"optimum-cli export edgedit --model {source} --format {subject.index['format']} --dtype "
            f"{dtype_of(subject)} --output {subject.folder.name if subject.folder else 'export'}"
        )
        return {"command": command, "yaml": ""}
    if stage is None:
        return None
    name = "quantize" if subject.kind == "quantized" else subject.kind
    config = {"output_dir": f"runs/{name}-again", "seed": stage["seed"], **stage["config"]}
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return {"command": f"edgedit train {name} --config run.yaml", "yaml": _without_places(text)}


def _without_places(text: str) -> str:
    """A recipe in which the absolute paths of the machine that it ran on are their last parts."""
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    shortened = without_local_paths(config)
    return text if shortened == config else yaml.safe_dump(shortened, sort_keys=False, allow_unicode=True)
