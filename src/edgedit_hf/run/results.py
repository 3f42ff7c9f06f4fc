"""The results in a stage's folder: replaced as a whole, and told apart by their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import (
    HASHED_ALWAYS,
    atomic_folder,
    atomic_write_json,
    file_record,
    file_sha256,
    sweep,
)
from ..records import Named, Results
from ..schema import read_record
from .lock import FolderLock

OWN_FILES = ("run.json", "stage.json", "telemetry.jsonl", "checkpoints", FolderLock.NAME)


LATER_FILES = ("README.md", "curves.json")  # of a card, of a benchmark: written into finished folders


UNLISTED = (*OWN_FILES, *LATER_FILES)


@contextlib.contextmanager
def replace_results(folder: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty folder; what is put there takes the place of `folder` at once, of a stage's folder of all its
    results.

    What a stage says of itself stays (`run.json`, `telemetry.jsonl`), and `stage.json`, if it is finished, lists the
    new files.
    """
    folder = Path(folder)
    sweep(folder.parent, folder.name)
    stage = folder.exists() and (folder / "run.json").is_file()
    lock = FolderLock(folder)
    try:
        if stage:
            lock.acquire()
        with atomic_folder(folder) as aside:
            yield aside
            if stage:
                record = file_record(aside, UNLISTED)
                for name in ("run.json", "telemetry.jsonl", FolderLock.NAME):
                    if (folder / name).is_file():
                        shutil.copy2(folder / name, aside / name)
                if (folder / "stage.json").is_file():
                    atomic_write_json(
                        aside / "stage.json",
                        {**read_record(folder / "stage.json", Results, "the stage"), "files": record},
                    )
    finally:
        if stage and (folder / "stage.json").is_file():
            lock.release()


NO_WEIGHTS = (
    ".json",
    ".txt",
    ".md",
    ".py",
    ".jinja",
    ".model",
    ".yaml",
)  # suffixes beside weights in a component's folder


def pipeline_weights_hash(folder: str | os.PathLike) -> str | None:
    """First 16 hex digits of the SHA-256 over the weight files of a pipeline folder's components; `None` where there is
    no such folder.

    Equal weights in equal files give equal hashes wherever the folder lies. Large files whose hash a stage has recorded
    are not read again.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        return None
    index = read_record(folder / "model_index.json", Named, "save_pretrained")
    known: dict[str, Any] = {}
    for root in (folder.parent, folder):
        if (root / "stage.json").is_file():
            listed = read_record(root / "stage.json", Results, "the stage").get("files", {})
            known |= {root / name: entry for name, entry in listed.items()}
    digest = hashlib.sha256()
    for name in sorted(
        name for name, value in index.items() if isinstance(value, list) and Path(name).name == name != ".."
    ):
        for path in sorted(
            path for path in (folder / name).rglob("*") if path.is_file() and path.suffix not in NO_WEIGHTS
        ):
            about, entry = path.stat(), known.get(path, {})
            recorded = about.st_size > HASHED_ALWAYS and (about.st_size, about.st_mtime_ns) == (
                entry.get("size"),
                entry.get("mtime_ns"),
            )
            digest.update(
                f"{path.relative_to(folder).as_posix()} {entry['sha256'] if recorded else file_sha256(path)}\n".encode()
            )
    return digest.hexdigest()[:16]
