"""What must not leave this machine: tokens and keys, pickles, paths of this machine's files."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

CHUNK, OVERLAP = 8 << 20, 4096  # bytes read at once, and looked at twice so that nothing hides on a border
HEADER = 100 << 20  # bytes of a safetensors header at most, as its own reader has it

# How the tokens and keys of services begin, and all of them: a beginning is found fast in gigabytes of weights.
SECRETS = (
    ("a Hugging Face token", b"hf_", rb"hf_[A-Za-z0-9]{30,}"),
    ("a Hugging Face token", b"api_org_", rb"api_org_[A-Za-z0-9]{30,}"),
    ("a GitHub token", b"gh", rb"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,}"),
    ("a GitLab token", b"glpat-", rb"glpat-[A-Za-z0-9_-]{20,}"),
    ("an AWS key", b"AKIA", rb"AKIA[A-Z0-9]{16}(?![A-Z0-9])"),
    ("a Google key", b"AIza", rb"AIza[A-Za-z0-9_-]{35}"),
    ("a Slack token", b"xox", rb"xox[abeprs]-[A-Za-z0-9-]{10,}"),
    ("a secret key", b"sk-", rb"sk-[A-Za-z0-9_-]{32,}"),
    ("a private key", b"-----BEGIN ", rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
)
NAMED = re.compile(  # in text alone: `api_key: …`
    rb"(?i)(?:api_?key|secret_?key|access_?token|auth_?token|password)[\"']?\s{0,4}[:=]\s{0,4}[\"']?([A-Za-z0-9+/_.-]{20,})"
)
SECRET_FILES = re.compile(
    r"(?i)\.?env|\.?netrc|id_(rsa|dsa|ecdsa|ed25519)|(stored_)?tokens?|credentials(\.json)?|.*\.(pem|key|p12|pfx)"
)

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
TEXT = {
    *(".json", ".jsonl", ".md", ".py", ".txt", ".yaml", ".yml", ".jinja", ".csv", ".html", ".swift", ".kt", ".xml"),
    *(".toml", ".ini", ".cfg", ".conf", ".log", ".sh", ".rst", ".tsv", ".ipynb", ".js", ".css", ".svg", ""),
}
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")  # hold any text, none of it of this machine
_PATH = re.compile(
    r"(?<![\w.:/<~$}-])/(?:[\w.@+~-]+/)+[\w.@+~-]+|(?<![A-Za-z])[A-Za-z]:\\{1,2}[\w. -]+\\{1,2}[\w. \\-]+"
)
_PERSONAL = re.compile(r"/(home|Users|root|mnt|media|scratch|workspace|Volumes|tmp)/|[A-Za-z]:\\")
_SYSTEM = ("/usr/", "/bin/", "/etc/", "/dev/", "/proc/", "/sys/", "/opt/", "/lib", "/data/local/")


def secret_in(path: Path, own: str | None = None) -> str | None:
    """The token or key that a file holds, as "a GitHub token (ghp_Ab…)"; `None`: none.

    Args:
        own: the token that this machine pushes with, which no file may hold either.
    """
    if SECRET_FILES.fullmatch(path.name):
        return f"a file of secrets by its name ({path.name})"
    text = path.suffix.lower() in TEXT
    for part in _parts(path):
        for kind, beginning, whole in SECRETS:
            place = part.find(beginning)
            while place >= 0:
                if found := re.compile(whole).match(part, place):
                    return f"{kind} ({found[0][:6].decode()}…)"
                place = part.find(beginning, place + 1)
        if text and (named := NAMED.search(part)):
            return f"a key or password ({named[0].split(named[1])[0].decode(errors='replace').strip()} …)"
        if own and own.encode() in part:
            return f"the token that this machine is logged in with ({own[:6]}…)"
    return None


def _parts(path: Path) -> Iterator[bytes]:
    """A file's bytes in overlapping parts; of safetensors the header, as what follows is numbers alone."""
    with open(path, "rb") as file:
        if path.suffix == ".safetensors":
            yield file.read(min(int.from_bytes(file.read(8), "little"), HEADER))
            return
        kept = b""
        while chunk := file.read(CHUNK):
            yield kept + chunk
            kept = chunk[-OVERLAP:]


def is_pickle(path: Path) -> bool:
    """Whether a file can run code when it is opened: by how it begins, or, outside of a Core ML package, by its
    suffix.
    """
    with open(path, "rb") as file:
        start = file.read(64)
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and start[1:2]:
        return True
    if start[:4] == b"PK\x03\x04" and (b"data.pkl" in start or b".npy" in start or _zipped_pickle(path)):
        return True
    return path.suffix.lower() in PICKLES and not any(part.endswith(".mlpackage") for part in path.parts)


def _zipped_pickle(path: Path) -> bool:
    """Whether an archive holds a pickle, wherever in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.lower().endswith(PICKLES) for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def local_path_in(path: Path) -> tuple[int, str] | None:
    """The first line of a text file that names a file or folder of a machine, and the path; `None`: none."""
    if path.suffix.lower() not in TEXT or path.name in VOCABULARIES:
        return None
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if found := next(local_paths(line), None):
            return number, found
    return None


def local_paths(text: str) -> Iterator[str]:
    """Absolute paths in a text that are a person's or this machine's; addresses, devices' folders and programs'
    places are none.
    """
    for found in _PATH.finditer(text):
        path = found[0].rstrip(".,")
        if not path.startswith(_SYSTEM) and (_PERSONAL.match(path) or os.path.exists(path)):
            yield path


def without_local_paths(value: object) -> object:
    """Plain JSON values in which every path of this machine is only its last part."""
    if isinstance(value, dict):
        return {without_local_paths(name): without_local_paths(one) for name, one in value.items()}
    if isinstance(value, list):
        return [without_local_paths(one) for one in value]
    if isinstance(value, str):
        for path in local_paths(value):
            value = value.replace(path, re.split(r"[/\\]", path)[-1])
    return value
