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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import EdgeDiTError

PACKAGES = (
    "edgedit_hf torch diffusers transformers accelerate peft huggingface-hub datasets optimum bitsandbytes botorch evaluate onnx "
    "onnxruntime executorch torchao numpy"
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
    """First 16 hex digits of the SHA-256 over names, shapes and bytes of a state dict's tensors (on any device, any dtype)."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def check_finite(state_dict: Mapping[str, Any], what: str, remedy: str) -> None:
    """Raise unless every value of a state dict's floating-point tensors is finite: nothing else is published, converted or sampled from.

    Args:
        what: whose weights they are, for the message. remedy: what the user can do.

    Raises:
        EdgeDiTError: naming the first tensor and how many are affected.
    """
    import torch

    bad = [name for name, tensor in state_dict.items() if tensor.is_floating_point() and not torch.isfinite(tensor.detach().sum())]
    # The sum of finite values may overflow; only a tensor whose sum is not finite is looked at value by value.
    bad = [name for name in bad if not torch.isfinite(state_dict[name]).all()]
    if bad:
        raise EdgeDiTError(f"{what}: {len(bad)} of {len(state_dict)} tensors hold NaN or infinite values, the first is {bad[0]}; {remedy}")


@contextlib.contextmanager
def explain_write_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turn a full disk or a forbidden folder, met in the block while writing `path`, into one clear [`EdgeDiTError`]."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors gives the number of a failed write only at the end of its text: "... (os error 28)".
        in_text = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(in_text[1]) if in_text else None
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise EdgeDiTError(f"No space left on the disk of {path}; free some and run the same command again, it continues.") from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EFBIG):
            raise EdgeDiTError(f"Cannot write {path} ({os.strerror(number)}); choose a folder you may write to.") from error
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
        aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
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
    """The values of a JSON text; NaN and infinities, which are no JSON, only with `nan`. Whatever is wrong with it is a `ValueError`."""

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
            raise EdgeDiTError(f"{path} has {size} bytes, more than {JSON_BYTES}; it is damaged or foreign. {made_by} writes it.")
        return parse_json(path.read_text(encoding="utf-8"), nan=nan)
    except FileNotFoundError:
        raise EdgeDiTError(f"{path} does not exist; it is written by {made_by}, run that first.") from None
    except OSError as error:
        raise EdgeDiTError(f"{path} cannot be read ({error.strerror}); it is written by {made_by}.") from None
    except EdgeDiTError:
        raise
    except ValueError as error:  # of the text's encoding, its syntax, or a number of thousands of digits
        raise EdgeDiTError(f"{path} is not JSON ({error}); it is damaged or foreign. {made_by} writes it.") from None


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a new empty folder beside `path`; if the block succeeds its content is synced and takes the place of `path`."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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
    """Move a complete folder onto `target`, which may exist."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        os.rename(target, old)
    os.rename(source, target)
    fsync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def publish_into(folder: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty folder; what is put there is synced and moved into `folder`, entry by entry, when the block succeeds."""
    folder = Path(folder)
    aside = folder / ".publish"
    with explain_write_errors(folder):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
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
