"""A repository of the loopback Hub, as a folder."""

import hashlib
import json
import re
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from hub_wire import Refused


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def sizes(entry: dict) -> dict:
    """Of a file of LFS in a commit."""
    return {"size": entry["size"], "pointerSize": len(pointer(entry["lfs"], entry["size"]))}


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{uuid.uuid4().hex}")
    beside.write_bytes(content)
    beside.replace(path)


class Repository:
    """A folder with `repo.json` (its refs, who may see it), `commits/` and `objects/`, named by their hashes."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def state(self) -> dict:
        return json.loads((self.folder / "repo.json").read_bytes())

    def save(self, state: dict) -> None:
        write(self.folder / "repo.json", json.dumps(state, indent=1).encode())

    def object(self, oid: str) -> Path:
        return self.folder / "objects" / oid

    def commit(self, oid: str) -> dict:
        return json.loads((self.folder / "commits" / f"{oid}.json").read_bytes())

    def resolve(self, revision: str) -> str:
        """The commit of a branch, a tag or a (shortened) commit's hash."""
        state, name = self.state, re.sub("^refs/(heads|tags)/", "", revision)
        for refs in (state["branches"], state["tags"]):
            if name in refs:
                return refs[name]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            for found in (self.folder / "commits").glob(f"{revision}*.json"):
                return found.stem
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def store(self, content: bytes) -> dict:
        """A file of git itself: its entry in a commit."""
        oid = blob_id(content)
        write(self.object(oid), content)
        return {"oid": oid, "size": len(content), "lfs": None}

    def receive(self, target: Path, blocks: Iterable[bytes], sha256: str | None = None) -> str:
        """Bytes that come in blocks, as a file if all of them do (and have that hash); returns their hash."""
        target.parent.mkdir(parents=True, exist_ok=True)
        beside, digest = target.with_name(f".{uuid.uuid4().hex}"), hashlib.sha256()
        try:
            with open(beside, "wb") as file:
                for block in blocks:
                    digest.update(block)
                    file.write(block)
            if sha256 not in (None, digest.hexdigest()):
                raise Refused(400, f"{sha256} is not the SHA-256 of what came")
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
        return digest.hexdigest()

    def stored(self, sha256: str) -> dict:
        """A file of LFS that has been uploaded: its entry in a commit."""
        if not self.object(sha256).is_file():
            raise Refused(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        size = self.object(sha256).stat().st_size
        return {"oid": blob_id(pointer(sha256, size)), "size": size, "lfs": sha256}

    def add_commit(self, branch: str, files: dict, title: str, message: str, author: str) -> str:
        state = self.state
        commit = {"parent": state["branches"].get(branch), "title": title, "message": message, "author": author}
        content = json.dumps({**commit, "date": now(), "nonce": uuid.uuid4().hex, "files": files}, indent=1).encode()
        oid = hashlib.sha1(content).hexdigest()
        write(self.folder / "commits" / f"{oid}.json", content)
        state["branches"][branch] = oid
        self.save(state)
        return oid

    def listing(self, oid: str, under: str = "", recursive: bool = True) -> list[dict]:
        """What the Hub lists of a commit: files and folders, in order."""
        listed, prefix = {}, f"{under}/" if under else ""
        files = self.commit(oid)["files"]
        for path, entry in files.items():
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                folder = prefix + "/".join(parts[:depth])
                tree = hashlib.sha1("".join(f for f in files if f.startswith(f"{folder}/")).encode()).hexdigest()
                listed[folder] = {"type": "directory", "oid": tree, "size": 0, "path": folder}
            if recursive or len(parts) == 1:
                listed[path] = {"type": "file", "oid": entry["oid"], "size": entry["size"], "path": path}
                if entry["lfs"]:
                    listed[path]["lfs"] = {"oid": entry["lfs"], **sizes(entry)}
        return [listed[path] for path in sorted(listed)]
