"""Files that others can trust: atomic files and folders, JSON, hashes, versions. No torch at import."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import EdgeDiTError

PACKAGES = (
    "edgedit_hf torch diffusers transformers accelerate peft huggingface-hub datasets optimum bitsandbytes botorch "
    "evaluate onnx onnxruntime executorch torchao numpy"
).split()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# -------------------------------------------------------------------- hashes and atomic files


def hash_json(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def weights_hash(state_dict: Mapping[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 over names, shapes and bytes of a state dict's tensors (on any device, any
    dtype).
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def check_finite(state_dict: Mapping[str, Any], what: str, remedy: str) -> None:
    """Raise unless every value of a state dict's floating-point tensors is finite: nothing else is published, converted
    or sampled from.

    Args:
        what: whose weights they are, for the message. remedy: what the user can do.

    Raises:
        EdgeDiTError: naming the first tensor and how many are affected.
    """
    bad = [name for name, tensor in state_dict.items() if not is_finite(tensor)]
    if bad:
        raise EdgeDiTError(
            f"{what}: {len(bad)} of {len(state_dict)} tensors hold NaN or infinite values, the first is {bad[0]}; "
            f"{remedy}"
        )


def is_finite(tensor: Any) -> bool:
    """Whether every value of a tensor is finite; always so of integers."""
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return True
    tensor = tensor.detach()
    tensor = tensor.float() if tensor.element_size() == 1 else tensor  # 8-bit floats have no sum
    # The sum of finite values may overflow; only a tensor whose sum is not finite is looked at value by value.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def check_finite_files(folder: str | os.PathLike, what: str, remedy: str) -> None:
    """[`check_finite`] of every safetensors file below a folder, a tensor at a time."""
    from safetensors import safe_open

    for path in sorted(Path(folder).rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            bad = [name for name in names if not is_finite(file.get_tensor(name))]
        if bad:
            where = path.relative_to(folder)
            raise EdgeDiTError(
                f"{what}: {len(bad)} of {len(names)} tensors of {where} hold NaN or infinite values, the first is "
                f"{bad[0]}; {remedy}"
            )


# -------------------------------------------------------------------- processes and what they leave behind


def process_started(pid: int) -> str | None:
    """When a process of this machine began, as its kernel counts; `None` if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    import psutil

    try:
        return str(int(psutil.Process(pid).create_time()))
    except psutil.Error:
        return None


def _host_tag() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def aside_of(path: Path, kind: str = "tmp") -> Path:
    """The hidden neighbour of `path` that this process writes before it takes the place of `path` (`"old"`: that the
    old content is moved to).
    """
    return path.with_name(f".{path.name}.{kind}-{_host_tag()}-{os.getpid()}-{process_started(os.getpid())}")


_ASIDE = re.compile(
    r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?:(?P<host>[0-9a-f]{6})-)?(?P<pid>\d{1,10})(?:-(?P<started>\w+))?"
)


def _abandoned(found: re.Match) -> bool:
    """Whether the process that wrote an aside is gone; of another host nobody here can tell."""
    if found["host"] not in (None, _host_tag()):
        return False
    started = process_started(int(found["pid"]))
    return started is None or found["started"] not in (None, started)


def sweep(folder: str | os.PathLike, name: str | None = None) -> None:
    """Remove what killed processes left in a folder (of the entry `name`, or of all), and bring back what they had only
    moved aside.
    """
    entries = [(match, path) for path in sorted(Path(folder).glob(".*")) if (match := _ASIDE.fullmatch(path.name))]
    for match, path in entries:
        if name not in (None, match["name"]) or not _abandoned(match):
            continue
        with contextlib.suppress(OSError):  # another process was faster
            target = path.with_name(match["name"])
            if match["kind"] == "old" and not target.exists():
                os.rename(path, target)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


# -------------------------------------------------------------------- which files belong to a result


HASHED_ALWAYS = 8 << 20  # bytes; a larger file is hashed again only when its size or its time of change differs


def file_record(folder: str | os.PathLike, left_out: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Size, time of change and SHA-256 of every file below a folder, by relative path; hidden entries and top-level
    ones in `left_out` apart.
    """
    folder, left_out = Path(folder), set(left_out)
    record = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and parts[0] not in left_out and not any(part.startswith(".") for part in parts):
            about = path.stat()
            record["/".join(parts)] = {
                "size": about.st_size,
                "mtime_ns": about.st_mtime_ns,
                "sha256": file_sha256(path),
            }
    return record


def changed_file(
    folder: str | os.PathLike, record: Mapping[str, Mapping[str, Any]], *, trust_time: bool = True
) -> str | None:
    """What differs between a folder and its [`file_record`], in words; `None`: nothing does. Other files do not
    count.

    Args:
        trust_time: whether a large file is believed by its size and its time of change.
    """
    for name, was in record.items():
        path = Path(folder, name)
        if not path.is_file():
            return f"{path} is missing"
        about = path.stat()
        if about.st_size != was["size"]:
            return f"{path} has {about.st_size} bytes instead of {was['size']}"
        trusted = trust_time and about.st_mtime_ns == was["mtime_ns"] and about.st_size > HASHED_ALWAYS
        if not trusted and file_sha256(path) != was["sha256"]:
            return f"{path} holds other bytes than were written"
    return None


# -------------------------------------------------------------------- writing


@contextlib.contextmanager
def explain_write_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turn a full disk or a forbidden folder, met in the block while writing `path`, into one clear
    [`EdgeDiTError`].
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors gives the number of a failed write only at the end of its text: "... (os error 28)".
        in_text = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(in_text[1]) if in_text else None
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise EdgeDiTError(
                f"No space left on the disk of {path}; free some and run the same command again, it continues."
            ) from error
        if number in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
            errno.EEXIST,
            errno.EFBIG,
            errno.ENAMETOOLONG,
        ):
            raise EdgeDiTError(
                f"Cannot write {path} ({os.strerror(number)}); choose a folder you may write to."
            ) from error
        raise


def fsync_path(path: Path) -> None:
    """fsync a file, or a folder's list of entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file so that at any moment either the old or the new content stands there in full."""
    path = Path(path)
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = aside_of(path)
        try:
            with open(aside, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        fsync_path(path.parent)


def atomic_write_json(path: str | os.PathLike, value: Any) -> None:
    """[`atomic_write_text`] of indented JSON; NaN and infinities are refused."""
    atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


JSON_BYTES = 2**29  # no file of ours comes near


def parse_json(text: str | bytes, *, nan: bool = False) -> Any:
    """The values of a JSON text; NaN and infinities, which are no JSON, only with `nan`. Whatever is wrong with it is a
    `ValueError`.
    """

    def refuse(name: str) -> float:
        raise ValueError(f"it holds {name}, which is no number")

    try:
        return json.loads(text, parse_constant=None if nan else refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | os.PathLike, made_by: str, *, nan: bool = False) -> Any:
    """Read a JSON file of a run; `made_by` names the stage that writes it, `nan` is as in [`parse_json`]."""
    path = Path(path)
    try:
        if (size := path.stat().st_size) > JSON_BYTES:
            raise EdgeDiTError(
                f"{path} has {size} bytes, more than {JSON_BYTES}; it is damaged or foreign. {made_by} writes it."
            )
        return parse_json(path.read_text(encoding="utf-8"), nan=nan)
    except FileNotFoundError:
        raise EdgeDiTError(f"{path} does not exist; it is written by {made_by}, run that first.") from None
    except OSError as error:
        raise EdgeDiTError(f"{path} cannot be read ({error.strerror}); it is written by {made_by}.") from None
    except EdgeDiTError:
        raise
    except ValueError as error:  # of the text's encoding, its syntax, or a number of thousands of digits
        raise EdgeDiTError(f"{path} is not JSON ({error}); it is damaged or foreign. {made_by} writes it.") from None


def read_prompt_lines(path: str | os.PathLike, what: str) -> list[tuple[int, str]]:
    """Number and text of the lines of a text file that are not empty, without space around them.

    Lines end at line breaks alone: a prompt may hold others of the characters that `str.splitlines` cuts at. What marks
    the byte order at the file's start is no part of the first.

    Args:
        what: words for the file in messages, such as "--prompts".

    Raises:
        EdgeDiTError: it cannot be read, or has no such line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise EdgeDiTError(f"{what} {path} cannot be read ({error}); give a text file with a prompt a line.") from None
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise EdgeDiTError(f"{what} {path} has no prompt; write one a line.")
    return found


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a new empty folder beside `path`; if the block succeeds its content is synced and takes the place of
    `path`.
    """
    path = Path(path)
    aside = aside_of(path)
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            yield aside
            sync_tree(aside)
            replace_folder(aside, path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below (and including) `folder`."""
    for root, _, files in os.walk(folder):
        for name in files:
            fsync_path(Path(root, name))
        fsync_path(Path(root))


def replace_folder(source: Path, target: Path) -> None:
    """Move a complete folder onto `target`, which may exist. Killed between the two renames, [`sweep`] brings the old
    one back.
    """
    old = aside_of(target, "old")
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(source, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    fsync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def publish_into(folder: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty folder; what is put there is synced and moved into `folder`, entry by entry, when the block
    succeeds.
    """
    folder = Path(folder)
    aside = folder / ".publish"
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            yield aside
            sync_tree(aside)
            for entry in sorted(aside.iterdir()):
                if entry.is_dir():
                    replace_folder(entry, folder / entry.name)
                else:
                    os.replace(entry, folder / entry.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


# -------------------------------------------------------------------- received folders


@contextlib.contextmanager
def ask_nothing(trusted: bool = False) -> Iterator[None]:
    """Within it transformers refuses the code of a repository, where it would ask at the terminal whether to run it
    (`trusted`: as usual).
    """
    from transformers import dynamic_module_utils as loading

    before = loading.TIME_OUT_REMOTE_CODE
    loading.TIME_OUT_REMOTE_CODE = before if trusted else 0
    try:
        yield
    finally:
        loading.TIME_OUT_REMOTE_CODE = before


def check_links(folder: str | os.PathLike) -> None:
    """Raise if something in a folder is a link out of it: what is copied from a received folder is what was received,
    not a file of this machine.

    The Hub's cache is such links: into `blobs/` of the same repository they are followed.
    """
    folder = Path(folder)
    real = Path(os.path.realpath(folder))
    snapshot = next(
        (place for place in real.parents if place.parent.name == "snapshots"),
        real if real.parent.name == "snapshots" else None,
    )
    allowed = [real] if snapshot is None else [snapshot, snapshot.parent.parent / "blobs"]
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            if path.is_symlink() and not any(Path(os.path.realpath(path)).is_relative_to(place) for place in allowed):
                raise EdgeDiTError(
                    f"{path} is a link to {os.path.realpath(path)}, outside of {folder}; it is not copied. Put the "
                    "file itself there."
                )


def copy_tree(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copy a folder's files into another, links as what they point to; [`check_links`]."""
    check_links(source)
    with explain_write_errors(target):
        shutil.copytree(source, target, dirs_exist_ok=True)


# -------------------------------------------------------------------- where a command may write
