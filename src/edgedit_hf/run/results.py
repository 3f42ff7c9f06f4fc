"""The results in a stage's folder: replaced as a whole, told apart by hashes, held against what they were made from."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import EdgeDiTError
from ..files import HASHED_ALWAYS, atomic_folder, atomic_write_json, file_record, file_sha256, sweep
from ..hub import is_name, loaded_files, pipeline_folder
from ..records import Named, Results
from ..schema import read_record
from .comparison import comparable_inputs
from .config import RunConfig
from .lock import FolderLock
from .stage import STAGES, Stage, maker_of

OWN_FILES = ("run.json", "stage.json", "telemetry.jsonl", "checkpoints", FolderLock.NAME)
LATER_FILES = ("README.md", "card", "curves.json")  # of a card, of a benchmark: written into finished folders
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


def pipeline_weights_hash(folder: str | os.PathLike, *, described: bool = False) -> str | None:
    """First 16 hex digits of the SHA-256 over the weight files of a pipeline folder's components; `None` where there is
    no such folder. Of a name on the Hub: of those files that are loaded, as they were last fetched.

    Equal weights in equal files give equal hashes wherever the folder lies. Large files whose hash a stage has recorded
    are not read again.

    Args:
        described: also over what decides beside the weights: configs, tokenizers, the index.
    """
    of_hub = is_name(folder)
    if of_hub:
        try:
            folder = pipeline_folder(folder, local_files_only=True)
        except EdgeDiTError:
            return None
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
        there = [path.relative_to(folder / name).as_posix() for path in (folder / name).rglob("*") if path.is_file()]
        paths = [folder / name / file for file in (loaded_files(there) if of_hub else there)]
        for path in sorted(path for path in paths if described or path.suffix not in NO_WEIGHTS):
            about, entry = path.stat(), known.get(path, {})
            recorded = about.st_size > HASHED_ALWAYS and (about.st_size, about.st_mtime_ns) == (
                entry.get("size"),
                entry.get("mtime_ns"),
            )
            digest.update(
                f"{path.relative_to(folder).as_posix()} {entry['sha256'] if recorded else file_sha256(path)}\n".encode()
            )
    if described:
        digest.update(file_sha256(folder / "model_index.json").encode())
    return digest.hexdigest()[:16]


def input_place(config: RunConfig, at: str) -> Path | str:
    """Where an input of a run is: in its folder, or where its recipe says."""
    maker = maker_of(at)
    return maker.place(config) if at == maker.folder else config.folder(at)


def input_hash(config: RunConfig, at: str) -> str | None:
    """The SHA-256 of a file of a run, or the hash of a pipeline's weights; `None`: it is not there."""
    path = input_place(config, at)
    if isinstance(path, Path) and path.suffix == ".json":
        return file_sha256(path) if path.is_file() else None
    return pipeline_weights_hash(path)


def check_sources(config: RunConfig, folders: Iterable[str], table: Sequence[Stage] = STAGES) -> None:
    """Raise if results of a run were made from others than are there now, or those from others, and so on back.

    What is not there any more, or is from before it was recorded, is taken as it is.

    Args:
        folders: of the stages whose results are to be read. table: of the run's family.
    """
    hashes: dict[str, str | None] = {}
    left = list(dict.fromkeys(folders))
    for folder in left:
        maker, record = maker_of(folder, table), config.folder(folder, "stage.json")
        if not record.is_file():
            continue
        if maker.brought and maker.place(config) != config.folder(folder):
            continue  # another one is used in its place
        made_from = comparable_inputs(read_record(record, Results, maker.made_by), maker)
        for name, at in maker.inputs:
            if not at or name not in made_from:
                continue
            if at not in hashes:
                hashes[at] = input_hash(config, at)
            if hashes[at] not in (None, made_from[name]):
                place = input_place(config, at)
                other = (
                    f"another {place} than is there now:"
                    if place == config.folder(at)
                    else f"another {at} than {place}: give the one that it was made from, or"
                )
                raise EdgeDiTError(
                    f"{config.folder(folder)} was made from {other} delete {config.folder(folder)} and run "
                    f"{maker.made_by} again."
                )
            if (before := Path(at).parts[0]) not in left:
                left.append(before)
