"""Images of the models of a run for the page that compares two of them: one sprite a model, of the same seeds. No
torch.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EdgeDiTError
from ..files import hash_json
from ..hub import SCHEME
from ..records import Captions, PipelineIndex
from ..run.stage import EVALUATE, EVALUATE_ELASTIC, EVALUATE_FEW_STEP
from .page import optional_record
from .tables import MODEL_LABELS, chosen_model

SAMPLES = 40
"""Images of a model, at most."""
SIDE = 256
"""Pixels of an image's longer side, at most; larger ones are shrunk."""
PIXELS = 2**20
"""Of all models of a page together, as far as two images of each allow."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """The first images of a model.

    Args:
        name: of the model, in words. words: what each image was asked for, e.g. its class.
        kind: of these words: "class", "caption" or "image" (nothing was asked for).
        images: shape (n, height, width, 1 or 3), uint8.
        key: of all that decides what two models must share to be compared: the noise and what was asked for.
        chosen: whether it is what the run is about.
    """

    name: str
    kind: str
    words: Sequence[str]
    images: Any
    key: str
    chosen: bool = False


def compared(models: Sequence[Samples]) -> dict[str, Any] | None:
    """What the page needs to compare any two models that share their seeds; `None`: there are no two such.

    Returns:
        `groups` (of models that share them: `kind`, `words`, `tile` [width, height] in pixels, `columns` of a sprite,
        `of` the size that the images had), `models` (`name`, `group`, `chosen`, `sprite`: a PNG as a data address),
        and `bytes`, the size of all sprites.
    """
    keys = [model.key for model in models]
    kept = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
    models = [model for model in models if model.key in kept]
    groups: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for number, key in enumerate(kept):
        those = [model for model in models if model.key == key]
        height, width = those[0].images.shape[1:3]
        scale = min(1.0, SIDE / max(height, width))
        tile = [max(1, round(width * scale)), max(1, round(height * scale))]
        count = max(2, min(SAMPLES, PIXELS // (len(models) * tile[0] * tile[1])))
        count = min(count, *(len(model.images) for model in those))
        columns = math.ceil(math.sqrt(count))
        groups.append(
            {
                "kind": those[0].kind,
                "words": list(those[0].words[:count]),
                "tile": tile,
                "columns": columns,
                "of": [width, height],
            }
        )
        found += [
            {
                "name": model.name,
                "group": number,
                "chosen": model.chosen,
                "sprite": _sprite(model.images[:count], tile, columns),
            }
            for model in those
        ]
    size = sum(len(model["sprite"]) for model in found)
    return {"groups": groups, "models": found, "bytes": size} if found else None


def _sprite(images: Any, tile: Sequence[int], columns: int) -> str:
    """The images side by side, without gaps, as the data address of a PNG."""
    from PIL import Image

    width, height = tile
    mode = "L" if images.shape[-1] == 1 else "RGB"
    sprite = Image.new(mode, (columns * width, -(-len(images) // columns) * height))
    for index, image in enumerate(images):
        one = Image.fromarray(image[..., 0] if mode == "L" else image)
        if one.size != (width, height):
            one = one.resize((width, height), Image.Resampling.LANCZOS)
        sprite.paste(one, (index % columns * width, index // columns * height))
    held = io.BytesIO()
    sprite.save(held, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode('ascii')}"


def first_images(path: Path, key: str, made_by: str) -> Any:
    """The first [`SAMPLES`] images of a file, shape (n, height, width, 1 or 3), uint8.

    Raises:
        EdgeDiTError: it is damaged, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            kept = file.get_slice(key)
            kind, shape = kept.get_dtype(), kept.get_shape()
            if kind == "U8" and len(shape) == 4 and shape[1] in (1, 3) and 0 not in shape:
                return kept[: min(SAMPLES, shape[0])].transpose(0, 2, 3, 1)
    except (OSError, SafetensorError) as error:
        raise EdgeDiTError(f"{path} cannot be read ({error}); {made_by} writes it, run that stage again.") from None
    raise EdgeDiTError(
        f"The images of {path} are {kind} of shape {shape}; expected U8 (bytes) of shape [n, 1 or 3, height, width]. "
        f"{made_by} writes it, run that stage again."
    )


# -------------------------------------------------------------------- classes


def class_samples(run_dir: Path, report: Mapping[str, Any]) -> list[Samples]:
    """The first images of every judged model of a run of classes that were kept. Image i is of class i modulo their
    number.
    """
    stage = optional_record(run_dir / EVALUATE.folder / "stage.json", dict[str, Any]) or {}
    seed, labels = stage.get("seed", report["seed"]), _labels(run_dir, report["models"])
    found = []
    for model in report["models"]:
        path = run_dir / EVALUATE.folder / f"{model['name']}.safetensors"
        if not path.is_file():
            continue
        images = first_images(path, "images", EVALUATE.made_by)
        names = [labels[index % len(labels)] for index in range(len(images))] if labels else ["image"] * len(images)
        name = MODEL_LABELS.get(model["name"], model["name"])
        key = hash_json(["classes", seed, images.shape[1:], labels])
        made = model["name"] == chosen_model(report["models"])
        found.append(Samples(name, "class" if labels else "image", names, images, key, made))
    return found


def _labels(run_dir: Path, models: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the classes; none where a model knows no classes, or none of the folders is there any more."""
    for model in models:
        folder = str(model.get("folder") or "")
        if not folder or folder.startswith(SCHEME):
            continue
        config = optional_record(run_dir / folder / "transformer" / "config.json", dict[str, Any]) or {}
        count = config.get("num_classes")
        if isinstance(count, int) and 0 < count <= 10**5:
            index = optional_record(run_dir / folder / "model_index.json", PipelineIndex) or {}
            names = index.get("id2label") or {}
            return [names.get(str(number), str(number)) for number in range(count)]
    return []


# -------------------------------------------------------------------- captions


def caption_samples(run_dir: Path, report: Mapping[str, Any]) -> list[Samples]:
    """The first images of every width of a text-to-image run, with many steps and, where it was distilled, with few."""
    captions = optional_record(run_dir / EVALUATE_ELASTIC.folder / "captions.json", Captions)
    if captions is None:
        return []
    files = [
        (model["name"], run_dir / EVALUATE_ELASTIC.folder / f"{model['name']}.safetensors")
        for model in report["models"]
    ]
    for width in report.get("few_step", {}).get("widths", []):
        folder = run_dir / EVALUATE_FEW_STEP.folder
        made = {"few": width["few"].get("solver") or "few steps", "few_step": "distilled"}
        if width["many"]["name"] != width["name"]:  # of a net from outside the run
            made = {"many": "its source", **made}
        files += [
            (f"{width['name']}, {words} ({width[key]['steps']} steps)", folder / f"{width[key]['name']}.safetensors")
            for key, words in made.items()
        ]
    found = []
    for name, path in files:
        if path.is_file():
            images = first_images(path, "captions", EVALUATE_ELASTIC.made_by)
            words = captions["captions"][: len(images)]
            key = hash_json(["captions", report["seed"], images.shape[1:], words])
            found.append(Samples(name, "caption", words, images, key))
    return found
