"""The pictures of a model card, as PNGs in memory: drawn from the run's records, nothing is sampled. No torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import EdgeDiTError
from ..genotype import Genotype
from ..run.stage import EVALUATE, EVALUATE_ELASTIC, EVALUATE_FEW_STEP
from ..search_space import SearchSpace
from .edgedit import draw_front, draw_pareto
from .subject import Subject

FOLDER = "card"
SHOWN, EXAMPLES = 8, 3  # captions of a grid; pictures of the Hub's widget


class Picture(NamedTuple):
    """A picture of a card: its bytes, and what it shows for who cannot see it."""

    png: bytes
    alt: str


def pictures_of(subject: Subject) -> dict[str, Picture]:
    """Every picture that the records of a subject allow, by its name in the repository's folder `card`."""
    from . import plots

    found: dict[str, Picture] = {}

    def add(name: str, alt: str, draw: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory() as aside:
            path = Path(aside, name)
            draw(path)
            found[name] = Picture(path.read_bytes(), alt)

    report = subject.report or {}
    genotype, space = subject.genotype, _space(subject)
    if genotype is not None and genotype.compressed and space is not None:
        alt = f"The teacher's {space.num_layers} layers above the {len(genotype.layers)} of this network"
        add("genotype.png", alt, lambda path: plots.genotype_strip(path, genotype, space))
    if report.get("search") and subject.kind in ("student", "few-step", "exported", "bank", "latency"):
        search = report["search"]
        alt = f"Scatter plot of {len(search['points'])} searched students: distance against latency, with their front"
        add("pareto.png", alt, lambda path: draw_pareto(path, search))
        space_searched = SearchSpace.from_dict(report["bank"]["space"])
        alt = (
            f"What each of the {space_searched.num_layers} teacher layers became in the front's students, fastest first"
        )
        add("front.png", alt, lambda path: draw_front(path, search, space_searched))
    if subject.family == "elastic":
        for name, (alt, draw) in _captioned(subject).items():
            add(name, alt, draw)
    elif subject.entry is not None and subject.entry.get("grid"):
        grid = _inside(subject, subject.entry["grid"])
        if grid is not None:
            alt = f"A grid of images from {subject.label}"
            add("samples.png", alt, lambda path: plots.sample_grid(path, {subject.label: _pixels(grid)}))
    if "samples.png" not in found and subject.kind == "exported":
        image = _reference_image(subject)
        if image is not None:
            label = "the image of reference.safetensors"
            alt = "An image that the exported files made"
            add("samples.png", alt, lambda path: plots.sample_grid(path, {label: plots.montage(image[None], 1)}))
    return found


def _space(subject: Subject) -> SearchSpace | None:
    """The search space of a network's teacher: the report's, or the one that its own layers tell."""
    genotype: Genotype | None = subject.genotype
    if genotype is None:
        return None
    layers = genotype.layers
    heads, ratio = max(layer.num_heads for layer in layers), max(4.0, *(layer.mlp_ratio for layer in layers), 0.0)
    reduced = [layer.mlp_ratio for layer in layers if layer.mlp_ratio < ratio]
    narrow = [layer.attention_dim for layer in layers if layer.attention_dim < genotype.hidden_size]
    size, dim = min(reduced, default=ratio / 2), min(narrow, default=None)
    for make in (
        lambda: SearchSpace.from_dict((subject.report or {})["bank"]["space"]),
        lambda: SearchSpace(genotype.num_teacher_layers, genotype.hidden_size, heads, ratio, size, dim),
    ):
        try:
            space = make()
            for layer in layers:
                space.option_of(layer)
        except (EdgeDiTError, KeyError, TypeError):  # no report, another teacher's, or layers of no such space
            continue
        if space.num_layers == genotype.num_teacher_layers:
            return space
    return None


def _inside(subject: Subject, name: str) -> Path | None:
    """A file that a record of the run names, where it lies in the run."""
    if subject.run_dir is None:
        return None
    path = (subject.run_dir / name).resolve()
    return path if path.is_relative_to(subject.run_dir.resolve()) and path.is_file() else None


def _pixels(path: Path) -> Any:
    import numpy as np
    from PIL import Image

    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise EdgeDiTError(f"The image {path} cannot be read ({error}); {EVALUATE.made_by} writes it.") from error


def _tensors(path: Path, made_by: str) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise EdgeDiTError(f"{path} cannot be read ({error}); {made_by} writes it.") from None


def _reference_image(subject: Subject) -> Any:
    """The image of an export's own reference, made by the files in their runtime; uint8 [H, W, C]."""
    path = subject.folder / "reference.safetensors" if subject.folder else None
    if path is None or not path.is_file():
        return None
    image = _tensors(path, "the export").get("loop.image")
    return image if image is not None and image.ndim == 3 and image.shape[-1] in (1, 3) else None


def _captioned(subject: Subject) -> dict[str, tuple[str, Callable[[Path], None]]]:
    """Of text to image: the grid, and single pictures for the widget."""
    from . import plots

    if not subject.entries or subject.captions is None or subject.run_dir is None:
        return {}
    few = subject.kind == "few-step"
    folder, by = ("evaluate-few-step", EVALUATE_FEW_STEP) if few else ("evaluate", EVALUATE_ELASTIC)
    captions, rows = subject.captions["captions"], {}
    for entry in subject.entries:
        path = _inside(subject, f"{folder}/{entry['name']}.safetensors")
        if path is None:
            return {}
        images = _tensors(path, by.made_by).get("captions")
        if images is None or images.ndim != 4 or len(images) != len(captions):
            raise EdgeDiTError(f"{path} has no image for each of {len(captions)} captions; run {by.made_by} again.")
        rows[entry["name"]] = images.transpose(0, 2, 3, 1)
    count = min(SHOWN, subject.captions["shown"], len(captions))
    shown = {name: images[:count] for name, images in rows.items()}
    alt = f"Generated images, a row each of {', '.join(shown)}, for {count} captions"
    found = {"samples.png": (alt, lambda path: plots.caption_grid(path, captions[:count], shown))}
    widest = list(rows.values())[-1]
    for number in range(min(EXAMPLES, count)):
        image = widest[number]
        found[f"sample-{number + 1}.png"] = ("One of them", partial(_enlarged, image=image))
    return found


def _enlarged(path: Path, image: Any) -> None:
    """A PNG of one image, small ones in whole multiples to at least 256 pixels."""
    import numpy as np

    from . import plots

    times = max(1, -(-256 // image.shape[0]))
    plots.save_montage(path, np.repeat(np.repeat(image, times, 0), times, 1)[None], 1)


def examples(subject: Subject, pictures: Mapping[str, Picture]) -> list[dict[str, Any]]:
    """What the Hub's widget shows of text to image: captions and their images."""
    captions = (subject.captions or {}).get("captions", [])
    return [
        {"text": caption, "output": {"url": f"{FOLDER}/sample-{number}.png"}}
        for number, caption in enumerate(captions[:EXAMPLES], 1)
        if f"sample-{number}.png" in pictures
    ]
