"""Where a command may write: never into its inputs, and never over a folder that is somebody else's."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import EdgeDiTError
from ..files import aside_of, file_sha256, read_json

PIPELINES = ("EdgeDiTPipeline", "ElasticDiTPipeline")


COMPONENTS = ("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


WRITTEN = {  # beside the components of a pipeline folder, by our own commands
    *(
        "model_index.json",
        "contract.json",
        "reference.safetensors",
        "sample_min.py",
        "PORTING.md",
        "verify.json",
        "bench.json",
        "delegation.json",
    ),
    *("choice.json", "quantization.json", "pipeline_edgedit.py", "pipeline_elastic_dit.py"),
}


STAGE_FILES = {"run.json", "stage.json", "telemetry.jsonl", "checkpoints", "run.lock", ".publish"}


WRITTEN_SUFFIXES = (
    ".json",
    ".safetensors",
    ".onnx",
    ".data",
    ".pte",
    ".mlmodel",
    ".bin",
    ".py",
    ".txt",
    ".model",
    ".jinja",
)


def class_name(config: Mapping[str, Any]) -> Any:
    """The class that a config.json or model_index.json names; with code of its own stands [file, class]."""
    name = config.get("_class_name")
    return name[-1] if isinstance(name, list) and name else name


def foreign_to_pipeline(folder: Path) -> str | None:
    """What tells a folder from a pipeline folder or export that a command of ours wrote, in words; `None`: nothing. A
    run's stages are not a command's.
    """
    if owned := sorted(STAGE_FILES & set(os.listdir(folder))):
        return f"is the folder of a stage of a run (it holds {owned[0]})"
    return _foreign(folder)


def _foreign(folder: Path) -> str | None:
    index = folder / ("model_index.json" if (folder / "model_index.json").is_file() else "contract.json")
    try:
        values = read_json(index, "save_pretrained")
        ours = isinstance(values, dict) and (class_name(values) in PIPELINES or "contract_version" in values)
    except EdgeDiTError:
        ours = False
    if not ours:
        return "is not a pipeline folder"
    listed = _listed(folder)
    for root, folders, files in os.walk(folder):
        for entry in sorted((*folders, *files)):
            path = Path(root, entry)
            if (name := path.relative_to(folder).as_posix()) in listed:
                known = path.is_file() and file_sha256(path) == listed[name]
            elif Path(root) == folder:
                known = entry in {*WRITTEN, *STAGE_FILES, *COMPONENTS, *(Path(name).parts[0] for name in listed)}
            else:
                known = entry in folders or entry.endswith(WRITTEN_SUFFIXES)
            if path.is_symlink() or not known:
                return f"holds {path.relative_to(folder)}, which this package did not write"
    return None


def _listed(folder: Path) -> dict[str, str]:
    """The files of a web page, by which the user may have changed one: their SHA-256, as contract.json has it."""
    try:
        contract = read_json(folder / "contract.json", "the export")
        web = contract["web"]
        return {name: contract["files"][name]["sha256"] for name in web["files"]} | {"README.md": web["readme_sha256"]}
    except (EdgeDiTError, LookupError, TypeError):
        return {}  # no page, or a damaged one, whose files are anybody's


def foreign_to_student(folder: Path) -> str | None:
    """What tells a folder from a student that was selected, or from a stage that has not written its own yet, in words;
    `None`: nothing.
    """
    if {entry.name for entry in folder.iterdir()} <= STAGE_FILES:
        return None
    return _foreign(folder) if (folder / "choice.json").is_file() else "is not a student that was selected"


def check_output(
    output: str | os.PathLike,
    inputs: Iterable[str | os.PathLike | None] = (),
    *,
    overwrite: bool = False,
    foreign: Callable[[Path], str | None] | None = foreign_to_pipeline,
) -> None:
    """Raise unless a command may write a folder: nothing that the user has is lost, and it can be written.

    Args:
        output: the folder.
        inputs: what the command reads: files and folders; what does not exist, such as a Hub id, is left out.
        overwrite: whether an older result of ours may be replaced.
        foreign: says what in an existing folder is not ours; `None`: single files are written into it, and its others
            stay.

    Raises:
        EdgeDiTError: it has no name, is a link, is or holds the current or the home folder, is, holds or lies in an
            input, holds what is not ours, or cannot be written. Allowing to overwrite changes nothing about these.
    """
    real = check_place(output)
    for given in inputs:
        relation = _relation(real, given) if given is not None and os.fspath(given) else None
        if relation is not None:
            raise EdgeDiTError(
                f"The output {output} {relation} the input {given}, which would be lost or changed; choose another "
                "output."
            )
    if real.exists() and foreign is not None and any(real.iterdir()):
        found = foreign(real)
        if found is not None:
            raise EdgeDiTError(f"{output} exists and {found}; it is left as it is. Choose another output.")
        if not overwrite:
            raise EdgeDiTError(
                f"{output} holds a pipeline already; choose another output, or allow overwriting it (--overwrite)."
            )
    check_writable(
        real if foreign is None else aside_of(real), output
    )  # a folder that is replaced is written beside its place


def check_place(output: str | os.PathLike) -> Path:
    """The real path of a folder to write; raises where no command may write, whatever is there."""
    text = os.fspath(output)
    if not text.strip() or "\0" in text:
        raise EdgeDiTError(f"The output {text!r} is no name of a folder; give one.")
    if os.path.islink(text.rstrip("/")):
        raise EdgeDiTError(f"The output {text} is a link to {os.path.realpath(text)}; give the folder itself.")
    real = Path(os.path.realpath(text))
    for place, name in ((Path.cwd(), "the current folder"), (os.path.expanduser("~"), "your home folder")):
        if _within(Path(os.path.realpath(place)), real):
            raise EdgeDiTError(f"The output {text!r} is {real}, which is or holds {name}; give a folder of its own.")
    if real.exists() and not real.is_dir():
        raise EdgeDiTError(f"The output {text} is a file; give a folder.")
    return real


def _within(path: Path, folder: Path) -> bool:
    """Whether a real path is a folder or lies in it, under whatever name (case, mounts)."""
    if path == folder or folder in path.parents:
        return True
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            if os.path.samefile(place, folder):
                return True
    return False


def _relation(output: Path, given: str | os.PathLike) -> str | None:
    """How a real path stands to an input, in words; `None`: they are apart, or there is no such input."""
    try:
        if not os.path.lexists(given):
            return None
        source = Path(os.path.realpath(given))
    except (OSError, ValueError):
        return None
    inside, holds = _within(output, source), _within(source, output) or _within(Path(os.path.abspath(given)), output)
    return "is" if inside and holds else "lies in" if inside else "holds" if holds else None


def check_writable(path: str | os.PathLike, named: str | os.PathLike | None = None) -> None:
    """Raise unless a folder is at a path, or could be made there, that this process may write into: hours later would
    be late to find out.

    It is tried with a folder that is removed at once. `named`: what messages call the path.
    """
    named, place = path if named is None else named, Path(path)
    if "\0" in str(path):
        raise EdgeDiTError(f"The path {str(named)!r} holds a NUL byte; choose another output.")
    longest = os.pathconf("/", "PC_NAME_MAX")
    if any(len(os.fsencode(part)) > longest for part in place.parts):
        shown = os.fspath(named)
        shown = shown if len(shown) < 100 else f"{shown[:60]}…"
        raise EdgeDiTError(
            f"Cannot write {shown}: a name in it, with what is added while it is written, is longer than {longest} "
            "bytes; choose another."
        )
    try:
        while not os.path.lexists(place) and place != place.parent:
            place = place.parent
        if not place.is_dir():
            raise EdgeDiTError(f"Cannot write {named}: {place} is not a folder; choose a folder you may write to.")
        os.rmdir(tempfile.mkdtemp(prefix=".edgedit-", dir=place))
    except OSError as error:
        raise EdgeDiTError(
            f"Cannot write {named} ({error.strerror}); choose a place, with space, where you may write."
        ) from error
