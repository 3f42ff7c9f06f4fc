"""A folder onto the Hub: planned and checked first, then sent; what is there already is not sent again."""

from __future__ import annotations

import glob
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .. import __version__
from ..errors import EdgeDiTError
from ..files import explain_write_errors, read_json
from ..folders import KINDS, Contents
from ..hub import explain
from ..report.card import card_files
from .contents import MADE, Item, checked, content_hash, items, left_out, without_machine

IGNORED = {".gitattributes", "README.md", "LICENSE"}  # files of a repository that say nothing of its kind


@dataclass(frozen=True)
class Plan:
    """What a push would send.

    Args:
        repo_id: `organisation/name`, or `name` in the own account.
        path: folder within the repository; empty: its root.
        items: the files. left_out: entries of the folder that stay here.
        message: of the commit. tag: of the run's state.
    """

    contents: Contents
    repo_id: str
    path: str
    items: list[Item]
    left_out: list[str]
    message: str
    tag: str

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(item.size for item in self.items)


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Args:
        repo_id: whole, with its account. url: of the commit. commit: its hash. changed: whether it made one.
    """

    repo_id: str
    url: str
    commit: str
    tag: str
    changed: bool


def plan(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    path: str = "",
    license: str | None = None,
    base_model: str | None = None,
    report: str | os.PathLike | None = None,
    unverified: bool = False,
    bundle_code: bool = False,
    own_card: bool = False,
) -> Plan:
    """What a push of a folder would send: checked, with its card; asks nobody.

    Args:
        folder: of a pipeline, an export, a proxy bank or a latency table.
        repo_id: where to. path: folder within that repository.
        license, base_model, report: of the card ([`card_files`]).
        unverified: whether an export that could not be run here may go.
        bundle_code: whether a pipeline goes with its code, for users without this package.
        own_card: whether the folder's own README.md goes, in place of a card made of what was measured.

    Raises:
        EdgeDiTError: the folder may not be pushed, or its card lacks something; by name.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise explain(error, repo_id) from None
    place = PurePosixPath(path)
    path = "" if place == PurePosixPath() else str(place)  # without './' and '//'
    if place.is_absolute() or ".." in place.parts or re.search(r"[\\\x00-\x1f*?\[]", path):
        raise EdgeDiTError(f"The folder {path!r} within {repo_id} must be a relative path without '..', '*' and '?'.")
    contents = checked(folder, unverified=unverified, token=get_token())
    if own_card:
        _check_own_card(contents.path)
        more: dict[str, bytes] = {}
    else:
        more = card_files(contents.path, repo_id, license=license, base_model=base_model, report=report)
    if bundle_code:
        more |= _code_of(contents)
    found = items(contents, more)
    names = [_tag_part(name) for name in (place.name, contents.path.resolve().name)]
    tag = "-".join([*filter(None, names), content_hash(contents.path), *(["bundled"] if bundle_code else [])])
    return Plan(contents, repo_id, path, found, left_out(contents.path), _message(contents), tag)


def _tag_part(name: str) -> str:
    """A folder's name as git takes it in a tag's."""
    return re.sub(r"\.{2,}", ".", re.sub(r"[^\w.-]+", "-", name)).strip("-.")[:80]


def _check_own_card(folder: Path) -> None:
    """Raise unless a folder's README.md says its licence in the front matter that the Hub reads."""
    import yaml
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    if not path.is_file():
        raise EdgeDiTError(f"{folder} has no README.md of its own; write one, or let the card be made (without it).")
    try:
        licence = ModelCard.load(path).data.license
    except (ValueError, yaml.YAMLError) as error:
        raise EdgeDiTError(f"The front matter of {path} cannot be read: {' '.join(str(error).split())}") from None
    if not licence:
        raise EdgeDiTError(f"{path} names no licence; write 'license: …' into its front matter.")


def _message(contents: Contents) -> str:
    """What made the thing, in one line."""
    genotype = contents.genotype
    facts = [
        {"edgedit": "EdgeDiT", "elastic": "Elastic DiT"}[contents.family],
        *([f"genotype {genotype.hash}"] if genotype is not None else []),
        *(
            [f"{contents.index['format']} {contents.index['precision']}"]
            if contents.kind == "exported"
            else ["few steps"] * (contents.few_step and contents.kind != "few-step")
        ),
        f"edgedit_hf {__version__}",
    ]
    return f"Push {KINDS[contents.kind]} ({', '.join(facts)})"


def _code_of(contents: Contents) -> dict[str, bytes]:
    """The code that a pipeline's folder needs to load without this package, and its index that names it."""
    if contents.kind not in ("teacher", "student", "supernet", "subnet", "few-step"):
        raise EdgeDiTError(
            f"{contents.path} is {KINDS[contents.kind]}, whose code cannot go with it; push it without the bundled "
            "code: its users install edgedit_hf."
        )
    if contents.bundled:
        return {}
    from .. import models, pipelines
    from ..pipelines.call import bundled_code

    said = contents.index["transformer"][-1]
    pipeline = getattr(pipelines, contents.index["_class_name"])
    code = bundled_code(pipeline, getattr(models, said), without_machine(contents.index))
    return {name: text.encode() for name, text in code.items()}


@contextmanager
def _gathered(plan: Plan) -> Iterator[Path]:
    """A folder with the files of a plan under their names: those that are here as links."""
    with tempfile.TemporaryDirectory(prefix="edgedit-push-") as name:
        folder = Path(name)
        with explain_write_errors(folder):
            for item in plan.items:
                target = folder / item.name
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(item.source, bytes):
                    target.write_bytes(item.source)
                else:
                    target.symlink_to(item.source.resolve())
        yield folder


def push(plan: Plan, *, private: bool = True, replace: bool = False, collection: str | None = None) -> Pushed:
    """Send what a plan says in one commit (or several, of a large folder), with a tag; files of an earlier push that
    the folder has no more are deleted. Interrupted, run it again: what arrived is not sent again.

    Args:
        private: of a repository (and collection) that is made now; one that is there keeps what it is.
        replace: whether a repository that holds another kind of thing is overwritten.
        collection: title of a collection of the repository's owner that it is put into; made where it is not there.

    Raises:
        EdgeDiTError: the Hub refuses or cannot be reached, or the repository holds something else.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="edgedit_hf", library_version=__version__)
    try:
        before, stale = _look(api, plan, replace)
        _check_card(plan)
        repo_id = api.create_repo(plan.repo_id, private=private, exist_ok=True).repo_id
        _check_there(plan)
        with _gathered(plan) as folder:
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=plan.path or None,
                commit_message=plan.message,
                delete_patterns=[glob.escape(name) for name in stale],
            )
        api.create_tag(repo_id, tag=plan.tag, revision=commit.oid, tag_message=plan.message, exist_ok=True)
        if collection:
            _collect(api, repo_id, collection, private, plan.contents)
    except EdgeDiTError:
        raise
    except Exception as error:  # of the client, of its HTTP library, of the disk: without a common base
        _check_there(plan)
        raise explain(error, plan.repo_id) from error
    return Pushed(repo_id, f"{api.endpoint}/{repo_id}", commit.oid, plan.tag, commit.oid != before)


def _check_there(plan: Plan) -> None:
    """Raise if a file of a plan went away since it was checked: it would be left out without a word."""
    sources = [item.source for item in plan.items if isinstance(item.source, Path)]
    if gone := next((source for source in sources if not source.is_file()), None):
        raise EdgeDiTError(
            f"{gone} went away while it was pushed; let whoever works in {plan.contents.path} finish, and run it again."
        )


def _check_card(plan: Plan) -> None:
    """Raise if the Hub does not take the card's front matter, before anything is made there."""
    from huggingface_hub import ModelCard

    source = next(item.source for item in plan.items if item.name == "README.md")
    text = source.decode() if isinstance(source, bytes) else source.read_text(encoding="utf-8")
    try:
        ModelCard(text).validate()
    except ValueError as error:
        said = "; ".join(re.findall(r'"message":\s*"((?:[^"\\]|\\.)*)"', str(error))) or " ".join(str(error).split())
        raise EdgeDiTError(
            f"The Hub does not take the front matter of the card of {plan.contents.path} ({said[:300]}); give another "
            "--license or --base-model, or mend the card of your own."
        ) from None


def _look(api: Any, plan: Plan, replace: bool) -> tuple[str | None, list[str]]:
    """The commit that a repository is at (`None`: there is none) if what a plan sends may go there, and what is to be
    deleted of an earlier push.

    Raises:
        EdgeDiTError: it holds another kind of thing.
    """
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    try:
        info = api.repo_info(plan.repo_id)
    except RepositoryNotFoundError as error:
        if getattr(error.response, "status_code", 404) == 401:
            raise
        return None, []
    prefix = f"{plan.path}/" if plan.path else ""
    named = (file.rfilename for file in info.siblings or ())
    there = sorted(name.removeprefix(prefix) for name in named if name.startswith(prefix))
    others = [name.removesuffix(MADE) for name in there if name.endswith(f"/{MADE}")]  # folders pushed on their own
    there = [name for name in there if not name.startswith(tuple(others)) and name not in IGNORED]
    stale = sorted(set(there) - {item.name for item in plan.items})
    if not there or replace:
        return info.sha, stale
    try:
        path = api.hf_hub_download(plan.repo_id, f"{prefix}{MADE}", revision=info.sha)
        made = read_json(path, "edgedit push")
        found = tuple(str(made.get(name)) for name in ("kind", "family")) if isinstance(made, dict) else ("?", "?")
    except EntryNotFoundError:
        found = ("what edgedit push did not put there", f"{len(there)} files such as {there[0]}")
    wanted = (plan.contents.kind, plan.contents.family)
    if found != wanted:
        raise EdgeDiTError(
            f"{plan.repo_id}{f', folder {plan.path},' if plan.path else ''} holds {found[0]} ({found[1]}), not "
            f"{wanted[0]} ({wanted[1]}); give another repository or folder, or replace what is there (--replace)."
        )
    return info.sha, stale


def _collect(api: Any, repo_id: str, title: str, private: bool, contents: Contents) -> None:
    """Put a repository into its owner's collection of that title."""
    collection = api.create_collection(title, namespace=repo_id.split("/")[0], private=private, exists_ok=True)
    api.add_collection_item(collection.slug, repo_id, "model", note=KINDS[contents.kind], exists_ok=True)
