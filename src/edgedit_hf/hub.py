"""Things on the Hub by their names: fetched into the client's cache, or one clear error. No torch.

A name is `organisation/name`, or `hf://organisation/name[@revision][/folder]`, huggingface_hub's own form. Wherever a
path may stand, a name may: what is there on this machine is a path; so is every `Path`, and text that begins with `.`,
`/` or `~`, holds another number of slashes, or ends like a file of weights or of JSON.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import posixpath
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .errors import EdgeDiTError
from .files import atomic_folder, file_sha256, read_json
from .records import BANK_FORMAT, BankIndex, ContractFiles, Results
from .schema import held_to, read_record

SCHEME = "hf://"
FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".json")
"""How files end that a name may lead to; `organisation/name` never ends so."""

HERE = "org/name or hf://org/name[@revision][/folder]"


class HubName(NamedTuple):
    """A place on the Hub.

    Args:
        repo_id: `organisation/name`.
        revision: branch, tag or commit; `None`: the default branch.
        path: folder or file in the repository; empty: the whole of it.
    """

    repo_id: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision.replace('/', '%2F')}"
        return f"{SCHEME}{self.repo_id}{revision}{'/' if self.path else ''}{self.path}"


# -------------------------------------------------------------------- names


def is_name(path_or_name: str | os.PathLike) -> bool:
    """Whether it can only be a name: nothing of this machine is called so. Asks nobody."""
    if not isinstance(path_or_name, str):
        return False
    if path_or_name.startswith(SCHEME):
        return True
    local = path_or_name.startswith((".", "/", "~")) or path_or_name.count("/") != 1
    return not local and not path_or_name.endswith(("/", *FILES)) and not os.path.exists(path_or_name)


def parse_name(name: str) -> HubName:
    """The parts of a name.

    Raises:
        EdgeDiTError: it is none of a model's repository.
    """
    from huggingface_hub.errors import HfUriError, HFValidationError
    from huggingface_hub.utils import parse_hf_uri, validate_repo_id

    if not name.startswith(SCHEME):
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise explain(error, name) from None
        return HubName(name)
    try:
        uri = parse_hf_uri(name)
    except HfUriError as error:
        raise explain(error, name) from None
    path = posixpath.normpath(uri.path_in_repo) if uri.path_in_repo else ""
    if uri.type != "model" or path.startswith(".."):
        what = "a folder outside its repository" if path.startswith("..") else f"a {uri.type}"
        raise EdgeDiTError(f"{name} is {what}; give a model's repository: {HERE}.")
    return HubName(uri.id, uri.revision, "" if path == "." else path.rstrip("/"))


# -------------------------------------------------------------------- fetching


def resolve(path_or_name: str | os.PathLike, patterns: Sequence[str] | None = None, **hub: Any) -> Path:
    """The path of a thing that is given by its path or name: a path as it is, whether or not something is there; of a
    name what [`fetch`] gives.

    Args:
        patterns, hub: of [`fetch`].
    """
    if not is_name(path_or_name):
        return Path(path_or_name)
    return fetch(str(path_or_name), patterns, **hub)


def fetch(
    name: str,
    patterns: Sequence[str] | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Path:
    """A folder or file of the Hub in the client's cache, as it is there now; where the Hub is out of reach, as it was
    when it was last fetched.

    Args:
        patterns: which of the files in the named folder, as in `fnmatch`, where `*` goes into folders too
            (`../tokenizer/*` are files beside the folder); `None`: all.
        revision: branch, tag or commit, unless the name says it.
        token, cache_dir, local_files_only: as in huggingface_hub.

    Returns:
        the named folder or file.

    Raises:
        EdgeDiTError: the name is none, or what it names cannot be had; the reason and the remedy in words.
    """
    place = _place(name, revision)
    options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    return _fetch(name, place, patterns, **options)


def _place(name: str, revision: str | None) -> HubName:
    place = parse_name(name)
    if None not in (revision, place.revision) and revision != place.revision:
        raise EdgeDiTError(f"{name} and the revision {revision!r} name two revisions; leave one out.")
    return place if revision is None else place._replace(revision=revision)


def _fetch(name: str, place: HubName, patterns: Sequence[str] | None, **options: Any) -> Path:
    """[`fetch`] of a place that messages call `name`."""
    from huggingface_hub import snapshot_download

    if place.path.endswith(FILES):
        wanted: list[str] | None = [glob.escape(place.path)]
    elif patterns is None:
        wanted = [f"{glob.escape(place.path)}/*"] if place.path else None
    else:
        wanted = [posixpath.normpath(posixpath.join(glob.escape(place.path), pattern)) for pattern in patterns]
    try:
        with quietly():
            root = snapshot_download(
                place.repo_id, revision=place.revision, allow_patterns=wanted, tqdm_class=_bar(), **options
            )
    except Exception as error:  # of the client, of its HTTP library, of the disk: without a common base
        raise explain(error, name) from error
    found = Path(root, place.path)
    if place.path and not found.exists():
        raise EdgeDiTError(
            f"{name}: the repository {place.repo_id} has no {place.path} at commit {Path(root).name[:12]}, or none of "
            f"the files that are needed; look at {_page(place.repo_id)}."
        )
    return found


def pinned(name: str, folder: Path) -> str:
    """The name at the commit that `folder`, which [`fetch`] gave for it, is of."""
    place = parse_name(name)
    root = folder.parents[place.path.count("/")] if place.path else folder
    return str(place._replace(revision=root.name))


def here(path_or_name: str | os.PathLike, file: str) -> Path | None:
    """The folder of a thing, as far as it is on this machine, if it holds `file`; `None`: it does not. Nothing is
    fetched.
    """
    try:
        folder = resolve(path_or_name, [file], local_files_only=True)
    except EdgeDiTError:
        return None
    return folder if (folder / file).is_file() else None


def absolute(path_or_name: str | os.PathLike) -> str:
    """A path that holds in every folder; a name in the form that is no path anywhere, `hf://…`."""
    name = is_name(path_or_name)
    return str(parse_name(str(path_or_name))) if name else str(Path(path_or_name).absolute())


# -------------------------------------------------------------------- the files of a pipeline, of a component

WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|pytorch_model|model|flax_model|tf_model)[.-][\w.-]*")
PLAIN = re.compile(r"(?:diffusion_pytorch_model|model)(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?")
COMPONENT = (".json", ".txt", ".model", ".jinja", ".safetensors", ".bin", ".py")
"""How files end that a component's own folder needs; others there (pictures, other frameworks' weights) it does not."""


def loaded_files(files: Iterable[str]) -> list[str]:
    """Those of a component folder's files that are loaded: where its weights are there as safetensors without a
    variant, these alone, else safetensors of every variant, else pickles.
    """
    files = sorted(files)
    weights = [file for file in files if WEIGHTS.fullmatch(file)]
    chosen = [file for file in weights if PLAIN.fullmatch(file)]
    chosen = chosen or [file for file in weights if ".safetensors" in file] or weights
    return [file for file in files if file not in weights or file in chosen]


def pipeline_folder(path_or_name: str | os.PathLike, *, described: bool = False, **hub: Any) -> Path:
    """The folder of a pipeline given by its path or name; of a name, its index and the files of the components that
    the index lists are fetched.

    Args:
        described: of the components only their configs. hub: of [`fetch`].
    """
    if not is_name(path_or_name):
        return Path(path_or_name)
    seen = _look(str(path_or_name), ["model_index.json", "config.json"], **hub)
    try:
        index = json.loads((seen.folder / "model_index.json").read_text(encoding="utf-8"))
        parts = [key for key, value in index.items() if isinstance(value, list) and key != "_class_name"]
    except (OSError, ValueError, AttributeError):
        return seen.folder  # whoever reads it says what is wrong with it
    code = index.get("_class_name")
    wanted = ["model_index.json", *([f"{code[0]}.py"] if isinstance(code, list) and code else [])]
    for part in parts:
        inside = [file.removeprefix(f"{part}/") for file in seen.files or () if file.startswith(f"{part}/")]
        known = [glob.escape(f"{part}/{file}") for file in loaded_files(inside)]
        configs = [f"{part}/config.json", f"{part}/scheduler_config.json"]
        wanted += configs if described else [f"{part}/*"] if seen.files is None else known
    return _fetch(str(path_or_name), seen.place, wanted, **seen.options)


def component_folder(path_or_name: str | os.PathLike, beside: Sequence[str] = (), **hub: Any) -> Path:
    """The folder of a model, or an adapter, given by its path or name; of a name, the files in it are fetched, not
    those of folders in it.

    Args:
        beside: folders next to it that are needed too, such as a text encoder's tokenizer. hub: of [`fetch`].
    """
    if not is_name(path_or_name):
        return Path(path_or_name)
    seen = _look(str(path_or_name), ["config.json", "adapter_config.json"], **hub)
    wanted = [f"../{part}/*" for part in beside] if seen.place.path else []
    if seen.files is None:
        wanted += [f"*{ending}" for ending in COMPONENT]
    else:
        own = [file for file in seen.files if "/" not in file and file.endswith(COMPONENT)]
        wanted += map(glob.escape, loaded_files(own))
    return _fetch(str(path_or_name), seen.place, wanted, **seen.options)


class _Seen(NamedTuple):
    """A folder on the Hub of which a little was fetched: the commit, and what else is there (`None`: the cache does not
    know).
    """

    folder: Path
    place: HubName
    files: list[str] | None
    options: dict[str, Any]


def _look(name: str, patterns: Sequence[str], *, revision: str | None = None, **options: Any) -> _Seen:
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    place = _place(name, revision)
    whole = [posixpath.join(place.path, pattern) for pattern in patterns]
    root = _fetch(name, place._replace(path=""), whole, **options)
    place = place._replace(revision=root.name)  # all that follows is of this commit
    try:
        tree = get_cached_repo_tree(place.repo_id, revision=place.revision, cache_dir=options.get("cache_dir"))
    except CachedRepoTreeNotFoundError:
        return _Seen(root / place.path, place, None, options)
    within = f"{place.path}/" if place.path else ""
    files = [file.path.removeprefix(within) for file in tree if file.path.startswith(within)]
    return _Seen(root / place.path, place, files, options)


# -------------------------------------------------------------------- a copy of its own


class Pulled(NamedTuple):
    """What [`pull`] wrote.

    Args:
        commit: of the repository.
        files, size: how many, and their bytes.
    """

    commit: str
    files: int
    size: int


def pull(name: str, output: str | os.PathLike, **hub: Any) -> Pulled:
    """A whole copy of a repository, or of a folder of it, in a folder of its own, which appears at once and complete,
    or not at all.

    It goes through the client's cache, which keeps the files that are complete when it is interrupted. Every file is
    held against the hash that the Hub gave it (the cache's name for it), and against those that the thing itself lists
    ([`recorded_hashes`]).

    Args:
        output: a folder that is not there yet. hub: of [`fetch`].

    Raises:
        EdgeDiTError: it cannot be had or written, is no folder, or a file is missing or not what it was.
    """
    folder = fetch(name, None, **hub)
    if not folder.is_dir():
        raise EdgeDiTError(f"{name} is a file; give the repository, or a folder of it.")
    commit = parse_name(pinned(name, folder)).revision
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".gitattributes"]
    size = 0
    with atomic_folder(output) as aside:
        for path in files:
            target = aside / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            size += target.stat().st_size
            if not _is_named(target, path.resolve()):
                raise EdgeDiTError(
                    f"{name}: {path.relative_to(folder)} ({target.stat().st_size} bytes) has not the hash that the Hub "
                    f"gave it: it was damaged on the way or in the cache. Delete {path.resolve()} and run it again."
                )
        for file, (sha256, said_by) in recorded_hashes(aside).items():
            if not (aside / file).is_file():
                raise EdgeDiTError(f"{name}: {said_by} lists {file}, which is not there; it was pushed in part.")
            if (found := file_sha256(aside / file)) != sha256:
                raise EdgeDiTError(
                    f"{name}: {file} has the SHA-256 {found}, but {said_by} says {sha256}: it was damaged or changed "
                    "before it was pushed; ask whoever did."
                )
    return Pulled(str(commit), len(files), size)


def recorded_hashes(folder: Path) -> dict[str, tuple[str, str]]:
    """SHA-256 of the files of a stage, an export or a proxy bank, and the file that says so, by the files' paths in the
    folder; empty where nothing says so.
    """
    found: dict[str, tuple[str, str]] = {}
    if (folder / "stage.json").is_file():
        listed = read_record(folder / "stage.json", Results, "the stage").get("files", {})
        found |= {file: (about["sha256"], "stage.json") for file, about in listed.items()}
    if (folder / "contract.json").is_file():
        listed = read_record(folder / "contract.json", ContractFiles, "the export")["files"]
        found |= {file: (about["sha256"], "contract.json") for file, about in listed.items()}
    if (folder / "index.json").is_file():
        index = read_json(folder / "index.json", "the bank")
        if isinstance(index, dict) and index.get("format") == BANK_FORMAT:
            held_to(index, BankIndex, folder / "index.json", "the bank", "a proxy bank")
            entries = index["entries"].values()
            found |= {str(entry.get("file")): (str(entry.get("sha256")), "index.json") for entry in entries}
    if outside := [file for file in found if Path(file).is_absolute() or ".." in Path(file).parts]:
        raise EdgeDiTError(f"{found[outside[0]][1]} lists {outside[0]!r}, which is not in its folder; it is damaged.")
    return found


def _is_named(path: Path, blob: Path) -> bool:
    """Whether a file is the one that the cache's blob is named after: by its SHA-256, or of a small one git's own hash.
    A cache without links has other names, which say nothing.
    """
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        return file_sha256(path) == blob.name
    if re.fullmatch("[0-9a-f]{40}", blob.name):
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == blob.name
    return True


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Within it the client says nothing of its own, but that it waits as long as the Hub asks it to: what it cannot do
    is one line of ours.
    """

    def waits(record: logging.LogRecord) -> bool:
        return record.getMessage().startswith("Rate limited.")

    loggers = [
        logging.getLogger(f"huggingface_hub.{name}") for name in ("_snapshot_download", "file_download", "utils._http")
    ]
    for logger in loggers:
        logger.addFilter(waits)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(waits)


def _bar() -> type:
    """The client's progress bar, for a terminal alone."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": options.get("disable") or not sys.stderr.isatty()})

    return Bar


# -------------------------------------------------------------------- errors in words


def explain(error: BaseException, what: str) -> EdgeDiTError:
    """What an error of the Hub's client means, in one line with the remedy. An [`EdgeDiTError`] is given back as it is.

    Args:
        what: was to be fetched or sent, such as its name: the line begins with it.
    """
    if isinstance(error, EdgeDiTError):
        return error
    what = what if len(what) <= 200 else f"{what[:200]}…"
    return EdgeDiTError(" ".join(f"{what}: {_words(error)}".split()))


def _words(error: BaseException) -> str:
    causes = list(_causes(error))
    names = {base.__name__ for cause in causes for base in type(cause).__mro__}
    said = " ".join(str(error).split())[:300]
    if {"HFValidationError", "HfUriError"} & names:
        return f"this is no name on the Hub ({said}); give {HERE}, or the path of what is on this machine."
    if any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
        return "no space left on the disk; free some and run the same command again, what is complete is kept."
    for cause in causes:
        if (response := getattr(cause, "response", None)) is not None and hasattr(response, "status_code"):
            return _status(cause, response)
    if "LocalTokenNotFoundError" in names:
        return "there is no token on this machine; log in (hf auth login), or set HF_TOKEN."
    if "IncompleteSnapshotError" in names and "OfflineModeIsEnabled" not in names:
        return f"the cache holds only part of it, and {_unreachable(names)}."
    if "OfflineModeIsEnabled" in names or ("LocalEntryNotFoundError" in names and len(causes) == 1):
        there = "only part of it is in the cache"
        if "IncompleteSnapshotError" not in names:
            there = "it is neither a local path nor a Hub id that is whole in the cache"
        return (
            f"{there}, and HF_HUB_OFFLINE or local_files_only keeps the client from asking the Hub; fetch it where it "
            "is online, or give the path of what is on this machine."
        )
    if _unreachable(names):
        return f"{_unreachable(names)}."
    if "Consistency check failed" in said:
        return f"the download was cut short ({said.split('Consistency check failed: ')[-1][:120]}); run it again."
    if isinstance(error, OSError) and error.errno is not None:
        return (
            f"{error.filename or 'the cache'}: {os.strerror(error.errno)}; look at your rights there, or set HF_HOME."
        )
    return f"it cannot be had ({type(error).__name__}: {said})."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _unreachable(names: set[str]) -> str:
    """Why the Hub cannot be reached, if the classes of an error and its causes say so. By name: the client's HTTP
    library has changed.
    """
    from huggingface_hub import constants

    if "ProxyError" in names:
        return f"the proxy on the way to {constants.ENDPOINT} refuses; look at HTTPS_PROXY"
    if {"TimeoutException", "TimeoutError", "Timeout"} & names:
        return f"{constants.ENDPOINT} did not answer in time; run it again, it continues with what is missing"
    if {"ReadError", "WriteError", "RemoteProtocolError", "ConnectionResetError", "BrokenPipeError"} & names:
        return f"{constants.ENDPOINT} cut the connection; run it again, it continues with what is missing"
    if {"ConnectError", "NetworkError", "ConnectionError"} & names:
        return f"{constants.ENDPOINT} cannot be reached; look at your connection (and HF_ENDPOINT) and run it again"
    return ""


def _status(error: BaseException, response: Any) -> str:
    """What the Hub's answer means."""
    from huggingface_hub import constants

    names = {base.__name__ for base in type(error).__mro__}
    status, server = response.status_code, " ".join(str(getattr(error, "server_message", None) or "").split())[:300]
    said = f"{status}: {server}" if server else str(status)
    if "GatedRepoError" in names:
        return f"the repository is gated ({said}); accept its terms on its page on {constants.ENDPOINT}, and log in."
    if "DisabledRepoError" in names:
        return f"the repository was disabled by the Hub ({said}); ask its owner."
    if "RevisionNotFoundError" in names:
        return f"the repository has no such revision ({said}); look at its branches and tags."
    if "EntryNotFoundError" in names:
        return f"the repository has no such file ({said}); look at its files."
    if "RepositoryNotFoundError" in names or status == 404:
        return (
            f"it is neither a local path nor a Hub id that {constants.ENDPOINT} knows, or it is private ({said}); look "
            "at the name, and log in (hf auth login, or HF_TOKEN) if it is yours."
        )
    if status == 401:
        return f"the Hub does not take the token ({said}); log in (hf auth login), or set HF_TOKEN to a valid one."
    if status == 403:
        return f"the token may not do this ({said}); take one with rights to this repository (hf auth login)."
    if status == 409:
        return f"somebody else changed it at the same time, or it is there already ({said}); look at it, and run again."
    if status == 429:
        wait = response.headers.get("retry-after")
        return (
            f"too many requests ({said}); wait {f'{wait} seconds' if wait else 'some minutes'} and run it again, it "
            "continues with what is missing."
        )
    if status >= 500:
        return f"the Hub has a fault ({said}); run it again later, it continues with what is missing."
    return f"the Hub refuses ({said})."


def _page(repo_id: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo_id}"
