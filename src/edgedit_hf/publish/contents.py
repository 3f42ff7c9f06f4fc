"""Which files of a folder go to the Hub, and whether they may: finished, verified, whole, nothing private."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import EdgeDiTError
from ..files import changed_file, check_links, file_sha256, read_json
from ..folders import CONTRACT, INDEX, Contents, look_at
from ..private import is_pickle, local_path_in, secret_in, without_local_paths
from ..records import BankIndex, ContractFiles, Results, StageRecord
from ..run.lock import FolderLock
from ..run.results import OWN_FILES
from ..schema import read_record

MADE = "edgedit.json"
"""What a repository says of how it was made: the stage's record without paths of the machine."""

RECORDS = {
    *("config.json", "model_index.json", "generation_config.json", "bench.json", "verify.json", "delegation.json"),
    *("quantization.json", "index.json", "table.json"),
}
"""JSON that this package and diffusers write, which may say where something lay on this machine."""


@dataclass(frozen=True)
class Item:
    """A file of the repository.

    Args:
        name: its path there.
        source: the file here, or its bytes where the folder has it in another form.
        size: bytes.
    """

    name: str
    source: Path | bytes
    size: int


def checked(folder: str | os.PathLike, *, unverified: bool = False, token: str | None = None) -> Contents:
    """What a folder holds, if it may be pushed.

    Args:
        unverified: whether an export that could not be run here may go. token: the one that is pushed with.

    Raises:
        EdgeDiTError: it is unfinished or in use, unverified, damaged, or holds something that must not leave this
            machine; the file is named.
    """
    contents = look_at(folder)
    folder = contents.path
    check_links(folder)
    _check_folders(folder)
    _check_stage(folder)
    _check_stage(folder.resolve().parent, folder.resolve().name)  # `.` and a link have no parent of that name
    if contents.kind == "exported":
        _check_export(folder, unverified)
    elif contents.kind == "bank":
        for entry in read_record(folder / "index.json", BankIndex, "the bank")["entries"].values():
            _check_hash(folder, str(entry.get("file")), str(entry.get("sha256")), "the bank's index.json")
    if (folder / INDEX).is_file():
        _check_components(folder)
    cleaned = plain(contents)
    for path in kept(folder):
        name = path.relative_to(folder).as_posix()
        if is_pickle(path):
            raise EdgeDiTError(
                f"{path} is a pickle, which runs code where it is opened; save it as safetensors, or take it away."
            )
        if secret := secret_in(path, token):
            raise EdgeDiTError(f"{path} holds {secret}; take it out, and make it invalid if it was ever shared.")
        if path.suffix == ".safetensors":
            _check_whole(path)
        if name not in cleaned and (where := local_path_in(path)):
            raise EdgeDiTError(
                f"{path} names the path {where[1]} of a machine in line {where[0]}; write it without, before the world "
                "reads it."
            )
    return contents


def kept(folder: Path) -> Iterator[Path]:
    """The files of a folder that are the thing itself: without what a stage keeps for itself, and hidden ones."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        if path.is_file() and parts[0] not in OWN_FILES and not hidden:
            yield path


def left_out(folder: Path) -> list[str]:
    """Top-level entries of a folder that do not go."""
    going = {path.relative_to(folder).parts[0] for path in kept(folder)}
    return sorted(path.name for path in folder.iterdir() if path.name not in going)


def plain(contents: Contents) -> dict[str, bytes]:
    """Files that go in another form, by name: records of ours without the paths of this machine, and [`MADE`]."""
    folder, found = contents.path, {}
    for path in kept(folder):
        if path.name not in RECORDS:
            continue
        values = read_json(path, "save_pretrained", nan=True)
        if (public := without_machine(values)) != values:
            found[path.relative_to(folder).as_posix()] = as_json(public)
    record: dict[str, Any] = {"edgedit_hf": __version__}
    places = (folder, folder.resolve().parent)
    stage = next((place / "stage.json" for place in places if (place / "stage.json").is_file()), None)
    if stage is not None:
        values = read_record(stage, StageRecord, "the stage")
        record |= {name: values.get(name) for name in ("stage", "config", "inputs", "seed", "steps", "versions")}
    record |= {"kind": contents.kind, "family": contents.family}
    if (genotype := contents.genotype) is not None:
        record["genotype"] = genotype.hash
    if stage is None and _says_the_same(folder / MADE, record):
        return found  # it was pulled: what made it is known there alone
    return {**found, MADE: as_json(without_local_paths(record))}


def without_machine(values: Any) -> Any:
    """A record of ours or of diffusers' without the paths of this machine, and without where it was loaded from."""
    said = values.get("_name_or_path") if isinstance(values, dict) else None
    if said is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(said)):
        values = {name: value for name, value in values.items() if name != "_name_or_path"}
    return without_local_paths(values)


def items(contents: Contents, more: dict[str, bytes]) -> list[Item]:
    """The files of the repository, in order of their names.

    Args:
        more: further files, such as the card's, which go in the place of those here.
    """
    folder = contents.path
    sources: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): path for path in kept(folder)}
    sources |= plain(contents)
    sources |= more
    return [
        Item(name, source, len(source) if isinstance(source, bytes) else source.stat().st_size)
        for name, source in sorted(sources.items())
    ]


def content_hash(folder: Path) -> str:
    """First 12 hex digits of the SHA-256 over what the folder itself holds: the same for the same thing."""
    digest = hashlib.sha256()
    for path in kept(folder):
        if path.suffix != ".md":
            digest.update(f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n".encode())
    return digest.hexdigest()[:12]


def as_json(values: Any) -> bytes:
    """As diffusers writes its records."""
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


# -------------------------------------------------------------------- finished, verified, whole


def _check_stage(folder: Path, within: str = "") -> None:
    """Raise unless the stage whose folder this is is finished, nobody works in it, and its files (`within`: those of
    one of its folders) are those that it wrote.
    """
    if not (folder / "run.json").is_file():
        return
    if not (folder / "stage.json").is_file():
        raise EdgeDiTError(
            f"{folder} is the folder of a stage that is not finished (it has no stage.json); run the stage to its end "
            "first."
        )
    with FolderLock(folder) if _may_be_in_use(folder) else contextlib.nullcontext():
        record = read_record(folder / "stage.json", Results, "the stage").get("files", {})
    if within:
        record = {name: was for name, was in record.items() if name.split("/")[0] == within}
    if changed := changed_file(folder, record, trust_time=False):
        raise EdgeDiTError(
            f"{changed}: since the stage finished, its result was damaged or changed; run it again, or save what you "
            "changed as a folder of its own (save_pretrained)."
        )


def _check_export(folder: Path, unverified: bool) -> None:
    if not (folder / "verify.json").is_file():
        raise EdgeDiTError(f"{folder} has no verify.json: it was never compared with its model; export it again.")
    found = read_json(folder / "verify.json", "the export")
    passed = found.get("passed") if isinstance(found, dict) else False
    if passed is None and not unverified:
        raise EdgeDiTError(
            f"{folder} was not verified ({found.get('not_run') or 'its runtime is not here'}); verify it on its "
            "device, or push it with --unverified: its card then says so."
        )
    if passed not in (True, None):
        raise EdgeDiTError(f"{folder}/verify.json says that the export failed (passed: {passed!r}); export it again.")
    for name, facts in read_record(folder / CONTRACT, ContractFiles, "the export")["files"].items():
        _check_hash(folder, name, facts["sha256"], CONTRACT)


def _check_hash(folder: Path, name: str, sha256: str, recorded: str) -> None:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise EdgeDiTError(f"{recorded} in {folder} names {name}, outside of it; it is damaged.")
    if not path.is_file():
        raise EdgeDiTError(f"{path} is missing, but {recorded} lists it; make the folder again.")
    if (found := file_sha256(path)) != sha256:
        raise EdgeDiTError(
            f"{path} has the SHA-256 {found}, but {recorded} says {sha256}: it was damaged or changed; make it again."
        )


def _may_be_in_use(folder: Path) -> bool:
    """Whether somebody may work in a folder: on a disk that nobody may write to, only if they said so."""
    return os.access(folder, os.W_OK) or (folder / FolderLock.NAME).exists()


def _says_the_same(path: Path, record: dict[str, Any]) -> bool:
    """Whether the [`MADE`] that lies in a folder is of what the folder holds."""
    if not path.is_file():
        return False
    said = read_json(path, "edgedit push")
    return isinstance(said, dict) and all(said.get(name) == record.get(name) for name in ("kind", "family", "genotype"))


def _check_folders(folder: Path) -> None:
    """Raise if a folder in it is a link: what lies there would not go."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and path.is_dir() and not path.name.startswith("."):
            raise EdgeDiTError(
                f"{path} is a link to the folder {path.resolve()}, whose files would not go with it; put the folder "
                "itself there, or take the link away."
            )


def _check_components(folder: Path) -> None:
    """Raise unless every component that the pipeline names is there, with all its weights."""
    for name, value in read_json(folder / INDEX, "save_pretrained", nan=True).items():
        component = isinstance(value, list) and len(value) == 2 and name != "_class_name" and value[1] is not None
        if component and not any((folder / name).glob("*")):
            raise EdgeDiTError(f"{folder / INDEX} names the component {name!r}, which is not there; save it again.")
    for path in folder.glob("*/*.index*.json"):  # of weights in several files
        listing = read_json(path, "save_pretrained")
        shards = listing.get("weight_map") if isinstance(listing, dict) else None
        for shard in sorted({str(name) for name in shards.values()} if isinstance(shards, dict) else ()):
            if not (path.parent / shard).is_file():
                raise EdgeDiTError(f"{path} names the weights {shard!r}, which are not there; save it again.")


def _check_whole(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise EdgeDiTError(f"{path} is no whole safetensors file ({error}); save or download it again.") from None
