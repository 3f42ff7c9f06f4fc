"""Pictures with random content, in folders, with and without captions."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    shape = size[::-1] if mode == "L" else (*size[::-1], len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def save_pictures(folder: Path, count: int, first: int = 0, **kwargs) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(first + i, **kwargs).save(folder / f"{i:02d}.png")


def everything(dataset) -> dict[str, torch.Tensor]:
    return dataset.batch(range(len(dataset)))


def damage(root: Path) -> None:
    path = root / "dog" / "03.png"
    path.write_bytes(path.read_bytes()[:-60])


SIZES = [(40, 40), (20, 60), (60, 20), (48, 44), (30, 80), (90, 30), (32, 32), (24, 70), (64, 20)]  # height, width


def save_captioned(folder: Path, sizes=SIZES, captions_of=lambda i: f"picture {i}", key: str = "text") -> Path:
    """A folder of coloured pictures whose top left corner says their number, with metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (height, width) in enumerate(sizes):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
            folder / f"{i:02d}.png"
        )
        line = {"file_name": f"{i:02d}.png"} | ({} if captions_of(i) is None else {key: captions_of(i)})
        lines.append(json.dumps(line) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder
