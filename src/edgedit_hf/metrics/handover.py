"""Images and prompts as judges want them that live in environments of their own: GenEval, DPG-Bench, HPSv3.

- `geneval`: `00000/metadata.jsonl` (the prompt's own line) and `00000/samples/0000.png` …, for its
  `evaluate_images.py FOLDER`.
- `dpg`: `images/<id>.png`, an image or up to four in a square of two by two, for DPG-Bench's
  `compute_dpg_bench.py --image-root-path FOLDER/images --resolution SIDE --pic-num IMAGES`, which cuts squares of that
  side out of each and looks at so many of them.
- `hpsv3`: `images/<id>-0.png` … and `hpsv3.json`, a list of `{"id", "prompt", "path"}`, whose prompts and paths
  `HPSv3RewardInferencer.reward` takes.

Each has `prompts.jsonl` too, a line a prompt with `id`, `prompt` and `images`, their paths.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..errors import EdgeDiTError
from ..files import atomic_folder, parse_json, read_prompt_lines

COMMANDS = {
    "geneval": "python evaluation/evaluate_images.py {folder}",
    "dpg": (
        "accelerate launch dpg_bench/compute_dpg_bench.py --image-root-path {images} --resolution {side} "
        "--pic-num {each}"
    ),
    "hpsv3": "HPSv3RewardInferencer().reward(prompts=prompts, image_paths=paths)",
}
"""What the judge of each layout is called with."""
LAYOUTS = tuple(COMMANDS)
GRID = 4  # images of a prompt that DPG-Bench looks at
ID = re.compile(r"[\w][\w.-]*")
ID_BYTES = 200  # file names have 255 at most, and more is put behind it


class Prompt(NamedTuple):
    """A prompt, what its files are called after, and the line that it stood in."""

    id: str
    text: str
    line: dict[str, Any]


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file: a text with a prompt a line, or `.jsonl` with objects that have `prompt` (or `text`) and
    may have `id`, as the prompt lists of GenEval and DPG-Bench do.

    Raises:
        EdgeDiTError: the file cannot be read, or a line is none of these; the message has its number.
    """
    path = Path(path)
    found: list[Prompt] = []
    for number, text in read_prompt_lines(path, "The file"):
        line: dict[str, Any] = {"prompt": text}
        if path.suffix == ".jsonl":
            try:
                line = parse_json(text)
            except ValueError as error:
                raise EdgeDiTError(f"{path}, line {number} is not JSON ({error}); write one object a line.") from None
        prompt = (line.get("prompt") or line.get("text")) if isinstance(line, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise EdgeDiTError(
                f"{path}, line {number} has no prompt: expected an object with 'prompt', a text that is not empty."
            )
        name = str(line.get("id", f"{len(found):05d}"))
        if not ID.fullmatch(name) or len(name.encode()) > ID_BYTES:
            raise EdgeDiTError(
                f"{path}, line {number} has the id {name[:80]!r}, which no file can be called after; use letters, "
                f"digits, '-', '_' and '.', {ID_BYTES} bytes at most."
            )
        found.append(Prompt(name, prompt.strip(), line))
    names = [prompt.id for prompt in found]
    if twice := next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None:
        raise EdgeDiTError(f"{path} has the id {twice!r} twice; every prompt needs its own.")
    return found


def check_layout(layout: str, prompts: Sequence[Prompt], count: int) -> None:
    """Raise unless `count` images of these prompts, in turns, can be written in this layout."""
    if layout not in LAYOUTS:
        raise EdgeDiTError(f"The layout {layout!r} does not exist; it must be one of {', '.join(LAYOUTS)}.")
    if not prompts:
        raise EdgeDiTError(f"A folder for {layout} holds images of prompts; give a file of them (--prompts).")
    if count % len(prompts):
        raise EdgeDiTError(
            f"{count} images are no multiple of {len(prompts)} prompts; every prompt needs as many, such as "
            f"{len(prompts)} or {4 * len(prompts)}."
        )
    if layout == "geneval" and (plain := next((p for p in prompts if "tag" not in p.line), None)) is not None:
        raise EdgeDiTError(
            f"GenEval judges by the metadata of its own prompt list, but {plain.text[:60]!r} has no 'tag'; give its "
            "evaluation_metadata.jsonl as prompts."
        )
    if layout == "dpg" and (cut := next((prompt.id for prompt in prompts if "." in prompt.id), None)) is not None:
        raise EdgeDiTError(f"DPG-Bench reads the id of a file up to its first dot, but one is {cut!r}; leave dots out.")
    if layout == "dpg" and count // len(prompts) > GRID:
        raise EdgeDiTError(
            f"There are {count // len(prompts)} images a prompt, but DPG-Bench looks at {GRID} at most; make fewer."
        )


def write_handover(
    folder: str | Path, layout: str, prompts: Sequence[Prompt], count: int, image_of: Callable[[int], torch.Tensor]
) -> str:
    """Write images in a judge's layout, replacing the folder in one step.

    Args:
        count: images, a multiple of the prompts: image i is of prompt i mod `len(prompts)`.
        image_of: bytes `[C, H, W]` of an image by its number. Memory: what it holds, and one prompt's images.

    Returns:
        The judge's own command for them (of HPSv3 the call).

    Raises:
        EdgeDiTError: the layout cannot hold them, see [`check_layout`], or needs square images.
    """
    check_layout(layout, prompts, count)
    each, said, listed = count // len(prompts), [], []
    with atomic_folder(folder) as aside:
        for place, prompt in enumerate(prompts):
            pictures = [_picture(image_of(place + k * len(prompts))) for k in range(each)]
            side = pictures[0].width
            if layout == "dpg":
                names = [f"{prompt.id}.png"]
                pictures = [_square(pictures)]
                root = aside / "images"
            else:
                head = f"{place:05d}/samples/" if layout == "geneval" else f"images/{prompt.id}-"
                names = [f"{head}{k:04d}.png" if layout == "geneval" else f"{head}{k}.png" for k in range(each)]
                root = aside
            for name, picture in zip(names, pictures):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                picture.save(root / name)
            if layout == "geneval":
                (aside / f"{place:05d}" / "metadata.jsonl").write_text(json.dumps(prompt.line), encoding="utf-8")
            names = [f"images/{name}" for name in names] if layout == "dpg" else names
            said.append({"id": prompt.id, "prompt": prompt.text, "images": names})
            listed += [{"id": prompt.id, "prompt": prompt.text, "path": name} for name in names]
        (aside / "prompts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in said), encoding="utf-8")
        if layout == "hpsv3":
            (aside / "hpsv3.json").write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    return COMMANDS[layout].format(
        folder=shlex.quote(str(folder)), images=shlex.quote(str(Path(folder, "images"))), side=side, each=each
    )


def _picture(pixels: torch.Tensor) -> Image.Image:
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).convert("RGB")


def _square(pictures: list[Image.Image]) -> Image.Image:
    """One square picture as it is, several in a square of two by two, row by row."""
    width, height = pictures[0].size
    if width != height:
        raise EdgeDiTError(
            f"DPG-Bench cuts squares out of files, but images are {width} × {height}; hand square ones over "
            "(--resolution)."
        )
    if len(pictures) == 1:
        return pictures[0]
    whole = Image.new("RGB", (2 * width, 2 * height))
    for k, picture in enumerate(pictures):
        whole.paste(picture, (k % 2 * width, k // 2 * height))
    return whole
