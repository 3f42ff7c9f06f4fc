"""What a model card says of its subject: figures with their protocol, tables, the lines that use it, the licence.
No torch.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..errors import EdgeDiTError
from ..export.formats import FORMATS
from ..genotype import LayerSpec
from ..hub import is_name, parse_name
from ..markup import MARKUP, quoted
from ..schema import shorten
from ..search_space import SearchSpace
from .few_step import few_step_widths_table
from .subject import Subject
from .tables import (
    NO_VALUE,
    comparison_table,
    guidance_in_words,
    judging_lines,
    latency_label,
    metric_label,
    plus_minus,
    scaled,
)

KNOWN_LICENCES = {"facebook/dit-xl-2-256": "cc-by-nc-4.0", "facebook/dit-xl-2-512": "cc-by-nc-4.0"}
"""Of base models that say theirs elsewhere than in a card."""

PROMPT = "a photograph of a lighthouse at dusk"  # where no record holds a caption


class Figure(NamedTuple):
    """A measured value: the Hub's type of the metric, its name with the protocol, and the value."""

    type: str
    name: str
    value: float


# -------------------------------------------------------------------- figures


def figures_of(subject: Subject) -> list[Figure]:
    """Every figure of the model-index."""
    found = [figure for entry in subject.entries for figure in _judged(subject, entry)]
    if subject.kind == "quantized":
        found += _quantised(subject)
    if subject.kind == "exported" and subject.verify is not None:
        found += _verified(subject.verify)
        if not found and subject.verify.get("not_run") is None:
            raise EdgeDiTError(f"{subject.folder}/verify.json has no relative_error: export again, which measures it.")
    if subject.kind == "bank":
        losses = [entry["loss_after"] for entry in subject.config["entries"].values()]
        if not losses:
            raise EdgeDiTError(f"The proxy bank {subject.folder} holds 0 proxies; run stage bank to its end.")
        name = f"feature loss, median of {len(losses)} proxies (1: layer left out)"
        found.append(Figure("feature_loss", name, statistics.median(losses)))
    if subject.kind == "latency":
        table, errors = subject.config, subject.config.get("prediction") or {}
        protocol = f"{table['runtime']} {table['precision']}, batch {table['batch']}, {table['threads']} threads"
        found += [
            Figure("relative_error", f"{which} relative error of predicted latency ({protocol})", errors[key])
            for key, which in (("mean", "mean"), ("max", "largest"))
            if errors.get(key) is not None
        ]
        if not found:
            raise EdgeDiTError(
                f"{subject.folder} has no figures of how well it predicts (prediction); run stage latency again."
            )
    return found


def _judged(subject: Subject, entry: Mapping[str, Any]) -> Iterator[Figure]:
    """A model of the report."""
    guidance = guidance_in_words(entry)
    sampled = f"{entry['steps']} step{'s' if entry['steps'] > 1 else ''}, guidance {guidance}"
    sampled += f", width {entry['name']}" if len(subject.entries) > 1 or subject.kind == "subnet" else ""
    keys = [key for key, value in entry["metrics"].items() if key.startswith("fid[") and value is not None]
    for key in keys:
        label = metric_label(key)
        kind = key.split("[")[0] if label.startswith("FID") else "frechet_distance"
        name = f"{label[:-1]}, {sampled})" if label.endswith(")") else f"{label} ({sampled})"
        yield Figure(kind, name, entry["metrics"][key])
    about = (subject.report or {}).get("reference") or {}
    extractor = next((key[len("fid[") :].rpartition(",n=")[0] for key in keys), about.get("extractor", "unknown"))
    judge = about.get("classifier") or extractor
    for key, by in (("precision", extractor), ("recall", extractor), ("class_agreement", judge)):
        if entry.get(key) is not None:
            yield Figure(key, f"{key.replace('_', ' ')} ({by}, n={entry['num_samples']:,}, {sampled})", entry[key])


def _quantised(subject: Subject) -> Iterator[Figure]:
    quantization = subject.quantization or {}
    yield Figure("bits_per_weight", "average bits a weight of the quantised layers", quantization["average_bits"])
    when = "tuned" if "tuned" in quantization["error"] else "untuned"
    settings = (subject.stage or {}).get("config", {}).get("quantize") or {}
    sampled = "".join(
        f", {words.format(settings[key])}"
        for key, words in (
            ("calibration_images", "n={}"),
            ("sampling_steps", "{} steps"),
            ("guidance_scale", "guidance {:g}"),
        )
        if settings.get(key) is not None
    )
    for width, error in quantization["error"].get(when, {}).items():
        if error["sqnr_db"] is not None:
            name = f"signal to quantisation noise of the output in dB (own samples{sampled}, {width})"
            yield Figure("sqnr_db", name, error["sqnr_db"])


def _verified(verify: Mapping[str, Any]) -> Iterator[Figure]:
    if verify.get("relative_error") is not None:
        yield Figure("relative_error", "largest relative error of a forward against PyTorch", verify["relative_error"])
    else:
        for name, part in verify.get("parts", {}).items():
            if part.get("relative_error") is not None:
                label = f"relative error of {name} against PyTorch (interpreted, not run)"
                yield Figure("relative_error", label, part["relative_error"])
    if verify.get("psnr_db") is not None:
        protocol = f"{verify.get('images')} images, {verify.get('steps')} steps"
        protocol += f", guidance {verify['guidance_scale']:g}" if verify.get("guidance_scale") is not None else ""
        yield Figure("psnr_db", f"PSNR in dB of images against PyTorch ({protocol})", verify["psnr_db"])


# -------------------------------------------------------------------- tables


def tables_of(subject: Subject) -> dict[str, Any]:
    """The table of the card, escaped, whether its models were all sampled alike, and what has to be known of its
    distances.
    """
    header, rows = _table(subject)
    escape = MARKUP["markdown"]
    judged = subject.report is not None and any("±" in cell for row in rows for cell in row)
    return {
        "header": [escape(cell) for cell in header],
        "rows": [[escape(cell) for cell in row] for row in rows],
        "alike": not {"steps", "guidance"} & set(header),
        "judging": [*plus_minus(subject.report), *judging_lines(subject.report)] if judged else [],
    }


def _table(subject: Subject) -> tuple[list[str], list[list[str]]]:
    if subject.kind == "bank":
        return _bank_table(subject)
    if subject.kind == "latency":
        table = subject.config
        rows = [
            [str(b["option"]), str(b["attention_dim"]), f"{b['mlp_ratio']:g}", f"{b['ms']:.4g}"]
            for b in table["blocks"]
        ]
        return ["block", "attention width", "MLP ratio", "ms"], rows
    if subject.kind == "quantized":
        return _forms_table(subject)
    if subject.kind == "exported" and subject.entry is None:
        return _bench_table(subject)
    if subject.family == "elastic":
        if subject.kind == "few-step":
            return few_step_widths_table((subject.report or {})["few_step"]["widths"])
        return _widths_table(subject)
    return comparison_table((subject.report or {})["models"])


def _widths_table(subject: Subject) -> tuple[list[str], list[list[str]]]:
    """All widths of a supernet; a sub-network stands among them."""
    models = (subject.report or {})["models"]
    header, rows = comparison_table(models)
    held = [(model.get("held_out") or {}).get("class_agreement") for model in models]
    if all(value is not None for value in held):
        header = [*header, "in combinations never trained"]
        rows = [[*row, f"{value:.1%}"] for row, value in zip(rows, held)]
    return header, rows


def _bank_table(subject: Subject) -> tuple[list[str], list[list[str]]]:
    from .plots import option_order

    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for entry in subject.config["entries"].values():
        groups.setdefault((len(entry["source"]), entry["option"]), []).append(entry)
    rows = []
    for (length, option), group in sorted(groups.items(), key=lambda item: (item[0][0], option_order(item[0][1]))):
        before, after = (statistics.median(e[f"loss_{when}"] for e in group) for when in ("before", "after"))
        what = f"{option}, in the place of {('one layer', 'two layers', 'three layers')[length - 1]}"
        rows.append([what, str(len(group)), f"{before:.3g}", f"{after:.3g}"])
    return ["proxy", "number", "median loss at the start", "distilled"], rows


def _forms_table(subject: Subject) -> tuple[list[str], list[list[str]]]:
    """How many weights are held in which form."""
    forms: dict[str, list[int]] = {}
    for layer in (subject.quantization or {})["layers"].values():
        spec = layer.get("spec")
        name = "not quantised" if not spec else f"{spec.get('scheme', 'low-bit')}, {spec.get('bits', '?')} bits"
        found = forms.setdefault(name, [0, 0, 0])
        for place, value in enumerate((1, layer["weights"], layer["num_bits"])):
            found[place] += value
    rows = [
        [name, str(layers), scaled(weights), f"{bits / weights:.3g}" if weights else NO_VALUE]
        for name, (layers, weights, bits) in sorted(forms.items())
    ]
    return ["form", "layers", "weights", "bits a weight"], rows


def _bench_table(subject: Subject) -> tuple[list[str], list[list[str]]]:
    parts = (subject.verify or {}).get("parts") or {}
    timed = (subject.bench or {}).get("latency") or []
    if not timed:
        rows = [
            [name, str(part.get("precision")), *(f"{part[key]:.2g}" for key in ("relative_error", "tolerance"))]
            for name, part in parts.items()
            if part.get("relative_error") is not None and part.get("tolerance") is not None
        ]
        return (["file", "precision", "relative error", "tolerance"] if rows else []), rows
    runtimes = list(dict.fromkeys(name for batch in timed for name in batch["timings"]))

    def ms(timings: Mapping[str, Any], name: str) -> str:
        return f"{timings[name]['median_ms']:.3g}" if name in timings else NO_VALUE

    rows = [[str(batch["batch"]), *(ms(batch["timings"], name) for name in runtimes)] for batch in timed]
    return ["images of a forward", *(f"{latency_label(name)} (ms)" for name in runtimes)], rows


# -------------------------------------------------------------------- how to use it


def dtype_of(subject: Subject) -> str:
    """What `--dtype` an export was made with."""
    precisions = FORMATS[subject.index["format"]].precisions
    return next((dtype for dtype, found in precisions.items() if found.name == subject.index["precision"]), "fp32")


def usage_of(subject: Subject, base_model: str | None) -> dict[str, Any]:
    """What a pipeline is called with, and how a sampler without libraries is; of a bank a genotype that it holds."""
    caption = ((subject.captions or {}).get("captions") or [None])[0]
    caption = caption or (subject.index.get("reference") or {}).get("prompt") or PROMPT
    classes, entry = _classes(subject), subject.entry
    arguments = []
    if subject.family == "elastic":
        arguments.append(quoted(caption))
    elif classes:
        arguments.append(f"class_labels={list(range(min(3, classes)))}")
    else:
        arguments.append("batch_size=3")
    if entry is not None and not subject.few_step:
        arguments.append(f"num_inference_steps={entry['steps']}")
        if subject.family == "elastic" or classes:
            arguments.append(f"guidance_scale={entry['guidance_scale']}")
    shares = (subject.config.get("subnets") or {}) if subject.family == "elastic" else {}
    widths = sorted(shares, key=lambda name: shares[name])
    sampler = f"--prompt {_shell(caption)}" if subject.family == "elastic" else f"--label {min(2, classes - 1)}"
    names = subject.index.get("id2label") or {}
    found = {
        "arguments": arguments,
        "narrowest": widths[0] if len(widths) > 1 else None,
        "widths": widths,
        "sampler": sampler if subject.family == "elastic" or classes else "--seed 1",
        "names": [names[key] for key in sorted(names, key=lambda key: (len(key), key))][:20],
        "named": len(names),
        "classes": classes,
        "format": FORMATS.get(subject.index["format"]) if subject.kind == "exported" else None,
        "teacher": base_model or "teacher",
        "code_of_student": None,
    }
    if subject.kind == "bank":
        found["code_of_student"] = _code(subject)
    return found


def _classes(subject: Subject) -> int:
    if subject.family == "elastic":
        return 0
    if subject.kind == "exported" and "labels" in subject.index:
        return int((subject.index["labels"] or {}).get("count", 0))
    return int(subject.config.get("num_classes") or 0)


def _shell(text: str) -> str:
    import shlex

    return shlex.quote(" ".join(text.split()))


def _code(subject: Subject) -> list[int]:
    """The student of the run, or the smallest whose proxies are all there, as a code of the search space."""
    from ..genotype import Genotype

    space, held = SearchSpace.from_dict(subject.config["space"]), subject.config["entries"]
    chosen = (subject.report or {}).get("genotype")
    if chosen is not None:
        try:
            return list(space.code(Genotype.from_layers(chosen["layers"], space.hidden_size)))
        except EdgeDiTError:  # of another run
            pass

    own = Genotype.original(space.num_layers, space.hidden_size, space.num_heads, space.mlp_ratio).layers
    layers: list[LayerSpec] = []
    there = [
        layer
        for layer in space.replacements()
        if layer in own or f"{'-'.join(f'{n:02}' for n in layer.source)}/{space.option_of(layer)}" in held
    ]
    while (at := layers[-1].source[-1] + 1 if layers else 0) < space.num_layers:
        fitting = [layer for layer in there if layer.source[0] == at]
        layers.append(max(reversed(fitting), key=lambda layer: len(layer.source), default=own[at]))
    return list(space.code(Genotype(tuple(layers), space.hidden_size)))


# -------------------------------------------------------------------- licence


LICENCE_LINK = r"https?://[^\s<>()\[\]\"'\\]+|[\w.-]+(?:/[\w.-]+)*"


def licence_of(subject: Subject, given: str | None, base_model: str | None) -> dict[str, str] | None:
    """`license` of the card, with `license_name` and `license_link` where the Hub has no identifier; `None`: unknown.

    In this order: the given one; what the folder's own card says; what that of the base model says, in the run, or in
    the client's cache; what is known of the source.
    """
    if given is not None:
        name, told, link = given.partition("=")
        if told and name and link:
            if not re.fullmatch(r"[a-z0-9.-]+", name.lower()) or not re.fullmatch(LICENCE_LINK, link):
                raise EdgeDiTError(
                    f"The licence {shorten(given)} is no name=link: a name is of letters, digits, '-' and '.', a link "
                    "an https:// address or a file of the repository, e.g. --license my-licence=LICENSE."
                )
            return {"license": "other", "license_name": name.lower(), "license_link": link}
        if given == "other":
            raise EdgeDiTError(
                "The licence 'other' says nothing: the Hub wants its name and where it can be read. Give "
                "--license name=link, e.g. --license my-licence=LICENSE."
            )
        return {"license": given}
    for path in _cards(subject, base_model):
        if (found := _said(path)) is not None:
            return found
    sources = [base_model, (subject.recorded.get("teacher") or {}).get("path"), (subject.verify or {}).get("source")]
    for source in sources:
        if isinstance(source, str) and source.lower() in KNOWN_LICENCES:
            return {"license": KNOWN_LICENCES[source.lower()]}
    return None


def _cards(subject: Subject, base_model: str | None) -> Iterator[Path]:
    """Cards that may say the licence, the nearest first."""
    if subject.folder is not None:
        yield subject.folder / "README.md"
    settings = subject.recorded
    sources = [(subject.verify or {}).get("source")]
    sources += [(settings.get(section) or {}).get("path") for section in ("quantize", "few_step", "teacher")]
    for source in sources:
        if isinstance(source, str) and not is_name(source):
            yield Path(source).expanduser() / "README.md"
    if subject.run_dir is not None:
        yield subject.run_dir / "teacher" / "README.md"
    for name in (base_model, *sources):
        if isinstance(name, str) and is_name(name):
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(parse_name(name).repo_id, "README.md")
            if isinstance(cached, str):
                yield Path(cached)


def _said(path: Path) -> dict[str, str] | None:
    """The licence in the metadata of a card; "other" without a name says nothing."""
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError):
        return None
    found = data if isinstance(data, dict) else {}
    kept = {key: found[key] for key in ("license", "license_name", "license_link") if isinstance(found.get(key), str)}
    if "license" not in kept or kept["license"] in ("other", "unknown") and len(kept) < 3:
        return None
    return kept
