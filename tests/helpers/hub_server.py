"""A Hub on the loopback interface, for the unmodified client of huggingface_hub with `HF_HUB_DISABLE_XET=1`.

Its state is a folder: a server that is stopped or killed goes on where it was. Files of LFS are sent to and served from
a second port, as by the Hub's storage. It logs what it receives, and fails as it is told to.

    with Hub(folder) as hub:
        hub.fault("PUT /storage/", reset=1000)
        subprocess.run(..., env={**os.environ, **hub.env(home)})
        assert hub.sent("PUT /storage/") < 2000

By hand: `python tests/helpers/hub_server.py FOLDER --port 8080`.
"""

import argparse
import base64
import contextlib
import fnmatch
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import hub_card_rules

TOKEN, READER, STRANGER = "hf_writer", "hf_reader", "hf_stranger"
LFS = """*.7z *.arrow *.bin *.bin.* *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy
*.npz *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite
*.tgz *.wasm *.xz *.zip *.zst *tfevents*""".split()
BLOCK = 1 << 20


class Refused(Exception):
    """A request that the Hub answers with an error."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        self.status, self.body = status, {"error": message}
        self.headers = {"X-Error-Message": message, **headers, **({"X-Error-Code": code} if code else {})}


class Cut(Exception):
    """The connection is to be torn, without an answer."""


@dataclass
class Fault:
    """What goes wrong with the next `times` requests (None: with all) whose "METHOD /path" the pattern is found in."""

    pattern: str
    times: int | None = 1
    status: int | None = None  # this answer, with `message`, `code` (X-Error-Code) and `retry_after`
    message: str = "told to fail"
    code: str | None = None
    retry_after: int | None = None
    reset: int | None = None  # the connection is reset after so many bytes of the upload, or else of the answer
    truncate: int | None = None  # so many bytes of the announced length are answered, then the connection closes
    short: int | None = None  # the answer announces and has only so many bytes
    delay: float = 0.0  # seconds before the answer
    hits: int = 0


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _write(path: Path, content: bytes) -> None:
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
        _write(self.folder / "repo.json", json.dumps(state, indent=1).encode())

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
        oid = _blob_id(content)
        _write(self.object(oid), content)
        return {"oid": oid, "size": len(content), "lfs": None}

    def stored(self, sha256: str) -> dict:
        """A file of LFS that has been uploaded: its entry in a commit."""
        if not self.object(sha256).is_file():
            raise Refused(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        size = self.object(sha256).stat().st_size
        return {"oid": _blob_id(_pointer(sha256, size)), "size": size, "lfs": sha256}

    def add_commit(self, branch: str, files: dict, title: str, message: str, author: str) -> str:
        state = self.state
        commit = {"parent": state["branches"].get(branch), "title": title, "message": message, "author": author}
        content = json.dumps({**commit, "date": _now(), "nonce": uuid.uuid4().hex, "files": files}, indent=1).encode()
        oid = hashlib.sha1(content).hexdigest()
        _write(self.folder / "commits" / f"{oid}.json", content)
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
                    pointer = len(_pointer(entry["lfs"], entry["size"]))
                    listed[path]["lfs"] = {"oid": entry["lfs"], "size": entry["size"], "pointerSize": pointer}
        return [listed[path] for path in sorted(listed)]


ROUTES: list[tuple[str, re.Pattern, object]] = []
REPO = "(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)"
PLACE = "(?:(?P<kind>dataset|space)s/)?(?P<name>[^/]+/[^/]+)"


def route(method: str, path: str):
    def keep(function):
        ROUTES.append((method, re.compile(path), function))
        return function

    return keep


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: "Hub"

    # What every request goes through

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def respond(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.left, self.received = int(self.headers.get("Content-Length") or 0), 0
        self.line = f"{self.command} {url.path}"
        self.fault = self.hub.take(self.line)
        try:
            if "Transfer-Encoding" in self.headers:
                self.close_connection = True
                raise Refused(411, "A length is required")
            time.sleep(self.fault.delay)
            if self.fault.status:
                wait = self.fault.retry_after
                after = {} if wait is None else {"Retry-After": str(wait)}
                raise Refused(self.fault.status, self.fault.message, self.fault.code, **after)
            self.user = self.authenticate(url.path)
            for method, pattern, function in ROUTES:
                found = pattern.fullmatch(url.path)
                if found and method == self.command.replace("HEAD", "GET"):
                    return function(self, **{key: value and unquote(value) for key, value in found.groupdict().items()})
            raise Refused(404, f"{self.line} is not served by this Hub")
        except Refused as no:
            self.fault = Fault("")
            self.answer(no.body, no.status, **no.headers)
        except (Cut, ConnectionError):
            self.tear()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = respond

    def authenticate(self, path: str) -> dict | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        if path.startswith("/storage/"):
            raise Refused(400, "Only one auth mechanism allowed")  # the URL is signed
        user = self.hub.tokens.get(given.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def owns(self, namespace: str) -> bool:
        return self.user is not None and namespace in (self.user["name"], *self.user["orgs"])

    def may_write(self, namespace: str) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if self.user["role"] != "write":
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        if not self.owns(namespace):
            raise Refused(403, f'You don\'t have the rights to write under the namespace "{namespace}"')

    def repository(self, kind: str | None, name: str, write: bool = False, content: bool = False) -> Repository:
        repository, owned = self.hub.repository(name, kind or "model"), self.owns(name.split("/")[0])
        if not repository.folder.is_dir() or (repository.state["private"] and not owned):
            if self.user is None:
                raise Refused(401, "Invalid username or password.")
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write:
            self.may_write(name.split("/")[0])
        if content and repository.state["gated"] and not owned:
            words = f"Access to {kind or 'model'} {name} is restricted"
            raise Refused(403 if self.user else 401, f"{words} and you are not in the authorized list.", "GatedRepo")
        return repository

    def blocks(self) -> Iterator[bytes]:
        """The request's body, as it comes; the connection is reset in it where that is to happen."""
        while self.left:
            cut = BLOCK if self.fault.reset is None else self.fault.reset - self.received
            block = self.rfile.read(min(BLOCK, self.left, cut))
            if not block:
                raise Cut
            self.left -= len(block)
            self.received += len(block)
            yield block

    def body(self) -> bytes:
        return b"".join(self.blocks())

    def json(self) -> dict:
        return json.loads(self.body() or b"{}")

    def log(self, status: int, answered: int) -> None:
        self.hub.log({"request": self.line, "received": self.received, "status": status, "answered": answered})

    def tear(self) -> None:
        """Reset the connection; close() would still send what is buffered."""
        self.log(0, 0)
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def answer(self, body=b"", status: int = 200, **headers: str) -> None:
        """JSON, text, or (a Path) a file of which a range may be asked."""
        for _ in self.blocks():
            pass
        start, file = 0, body if isinstance(body, Path) else None
        if file is None and not isinstance(body, bytes):
            headers, body = {"Content-Type": "application/json", **headers}, json.dumps(body).encode()
        length = total = file.stat().st_size if file else len(body)
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")) if file else None
        if wanted and wanted[0] != "bytes=-":
            first, last = wanted.groups()
            start = int(first) if first else max(0, total - int(last))
            stop = min(int(last) + 1, total) if first and last else total
            if start >= stop:
                raise Refused(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{total}"})
            status, length = 206, stop - start
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{total}"
        fault = self.fault
        length = length if fault.short is None else min(length, fault.short)
        cuts = [cut for cut in (fault.truncate, fault.reset) if cut is not None]
        sent = 0 if self.command == "HEAD" else min(length, *cuts, length)
        self.log(status, sent)
        self.send_response(status)
        for key, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if file is None:
            self.wfile.write(body[:sent])
        else:
            with open(file, "rb") as stream:
                stream.seek(start)
                while sent and (block := stream.read(min(BLOCK, sent))):
                    self.wfile.write(block)
                    sent -= len(block)
        if cuts and self.command != "HEAD":
            if fault.reset is not None:
                time.sleep(0.05)  # what was sent arrives before the reset does
                raise Cut
            self.close_connection = True

    def page(self, items: list, size: int) -> None:
        """A part of a list, with a link to the next."""
        start = int(self.query.get("cursor", ["0"])[0])
        rest = "&".join(f"{key}={quote(value)}" for key, (value, *_) in self.query.items() if key != "cursor")
        url = f"{self.hub.url}{urlsplit(self.path).path}?{rest}&cursor={start + size}"
        more = {"Link": f'<{url}>; rel="next"'} if start + size < len(items) else {}
        self.answer(items[start : start + size], **more)

    def log_message(self, *args) -> None:
        pass

    # Accounts, repositories, their description

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": org, "roleInOrg": "admin"} for org in self.user["orgs"]]
        token = {"displayName": "test", "role": self.user["role"], "createdAt": _now()}
        auth = {"type": "access_token", "accessToken": token}
        self.answer({"type": "user", "name": self.user["name"], "fullname": "A. User", "orgs": orgs, "auth": auth})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        asked = self.json()
        errors, warnings = hub_card_rules.check(asked["content"], asked.get("repoType") or "model")
        status = 400 if errors else 200
        if "text/plain" in self.headers.get("Accept", ""):
            lines = [*(f"- Error: {error}" for error in errors), *(f"- Warning: {warning}" for warning in warnings)]
            return self.answer("\n".join(lines).encode(), status, **{"Content-Type": "text/plain"})
        said = {"errors": [{"message": error} for error in errors]}
        self.answer({**said, "warnings": [{"message": warning} for warning in warnings]}, status)

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        asked = self.json()
        namespace = asked.get("organization") or (self.user or {}).get("name")
        self.may_write(namespace)
        kind, name = asked.get("type") or "model", f"{namespace}/{asked['name']}"
        place = {"url": self.hub.url + self.hub.web(name, kind), "name": name, "id": name}
        with self.hub.lock:
            if self.hub.repository(name, kind).folder.is_dir():
                words = f"You already created this {kind} repo: {name}"
                return self.answer({"error": words, **place}, 409, **{"X-Error-Message": words})
            self.hub.create(name, kind, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.answer(place)

    @route("DELETE", "/api/repos/delete")
    def delete(self) -> None:
        asked = self.json()
        name = f"{asked.get('organization') or (self.user or {}).get('name')}/{asked['name']}"
        shutil.rmtree(self.repository(asked.get("type"), name, write=True).folder)
        self.answer({})

    @route("PUT", f"/api/{REPO}/settings")
    def settings(self, kind: str, name: str) -> None:
        repository, asked = self.repository(kind, name, write=True), self.json()
        with self.hub.lock:
            state = repository.state
            state["gated"] = asked.get("gated", state["gated"])
            state["private"] = asked.get("visibility", "private" if state["private"] else "public") == "private"
            repository.save(state)
        self.answer({"private": state["private"], "gated": state["gated"]})

    @route("GET", f"/api/{REPO}/auth-check(?P<write>/write)?")
    def auth_check(self, kind: str, name: str, write: str | None) -> None:
        self.repository(kind, name, write=bool(write), content=True)
        self.answer({})

    @route("GET", f"/api/{REPO}(?:/revision/(?P<revision>[^/]+))?")
    def info(self, kind: str, name: str, revision: str | None) -> None:
        repository = self.repository(kind, name)
        sha, state = repository.resolve(revision or "main"), repository.state
        commit, siblings, card = repository.commit(sha), [], {}
        for path, entry in sorted(commit["files"].items()):
            siblings.append({"rfilename": path})
            if "blobs" in self.query:
                siblings[-1].update(size=entry["size"], blobId=entry["oid"])
                if entry["lfs"]:
                    pointer = len(_pointer(entry["lfs"], entry["size"]))
                    siblings[-1]["lfs"] = {"sha256": entry["lfs"], "size": entry["size"], "pointerSize": pointer}
        if "README.md" in commit["files"]:
            card = hub_card_rules.metadata(repository.object(commit["files"]["README.md"]["oid"]).read_text()) or {}
        bases = card.get("base_model") or []
        bases = bases if isinstance(bases, list) else [bases]
        tags = [*filter(None, [card.get("library_name")]), *(card.get("tags") or [])]
        tags += [f"base_model:{base}" for base in bases]
        tags += [f"base_model:{card['base_model_relation']}:{b}" for b in bases if "base_model_relation" in card]
        tags += [f"license:{card['license']}"] if "license" in card else []
        about = {
            "_id": hashlib.sha1(name.encode()).hexdigest()[:24],
            **{"id": name, "modelId": name, "author": name.split("/")[0], "sha": sha},
            **{"private": state["private"], "gated": state["gated"], "disabled": False, "downloads": 0, "likes": 0},
            **{"lastModified": commit["date"], "createdAt": state["created"], "tags": tags, "cardData": card},
            **{key: card[key] for key in ("pipeline_tag", "library_name", "model-index") if key in card},
            **{"siblings": siblings, "usedStorage": sum(p.stat().st_size for p in repository.folder.glob("objects/*"))},
        }
        expand = self.query.get("expand")
        self.answer({key: about.get(key) for key in ("_id", "id", *expand)} if expand else about)

    @route("GET", f"/api/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<under>.+))?")
    def tree(self, kind: str, name: str, revision: str, under: str | None) -> None:
        repository = self.repository(kind, name)
        sha = repository.resolve(revision)
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        listing = repository.listing(sha, under or "", recursive)
        if under and not listing:
            raise Refused(404, f"{under} does not exist on {revision!r}", "EntryNotFound")
        self.page(listing, self.hub.page_size)

    @route("POST", f"/api/{REPO}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, kind: str, name: str, revision: str) -> None:
        repository, asked = self.repository(kind, name), self.body().decode()
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(asked)["paths"]
        else:
            paths = parse_qs(asked).get("paths", [])
        self.answer([entry for entry in repository.listing(repository.resolve(revision)) if entry["path"] in paths])

    # References

    @route("GET", f"/api/{REPO}/refs")
    def refs(self, kind: str, name: str) -> None:
        state, answer = self.repository(kind, name).state, {"converts": [], "pullRequests": []}
        for refs, place in (("branches", "heads"), ("tags", "tags")):
            answer[refs] = [
                {"name": ref, "ref": f"refs/{place}/{ref}", "targetCommit": sha} for ref, sha in state[refs].items()
            ]
        self.answer(answer)

    @route("POST", f"/api/{REPO}/(?P<refs>tag|branch)/(?P<ref>[^/]+)")
    def add_ref(self, kind: str, name: str, refs: str, ref: str) -> None:
        """`tag/REVISION` has the tag's name in the body, `branch/NAME` the revision."""
        repository, asked = self.repository(kind, name, write=True), self.json()
        new, revision = (asked["tag"], ref) if refs == "tag" else (ref, asked.get("startingPoint") or "main")
        sha, kept = repository.resolve(revision), "tags" if refs == "tag" else "branches"
        with self.hub.lock:
            state = repository.state
            if new in state[kept]:
                raise Refused(409, f"Tag reference exists already: {new}" if refs == "tag" else f"{new} exists already")
            state[kept][new] = sha
            repository.save(state)
        self.answer({"name": new, "ref": new, "targetCommit": sha})

    @route("DELETE", f"/api/{REPO}/(?P<refs>tag|branch)/(?P<ref>[^/]+)")
    def delete_ref(self, kind: str, name: str, refs: str, ref: str) -> None:
        repository = self.repository(kind, name, write=True)
        with self.hub.lock:
            state = repository.state
            if state["tags" if refs == "tag" else "branches"].pop(ref, None) is None or ref == "main":
                raise Refused(404, f"Invalid rev id: {ref}", "RevisionNotFound")
            repository.save(state)
        self.answer({})

    @route("GET", f"/api/{REPO}/commits/(?P<revision>[^/]+)")
    def commits(self, kind: str, name: str, revision: str) -> None:
        repository, commits = self.repository(kind, name), []
        sha = repository.resolve(revision)
        while sha:
            commit = repository.commit(sha)
            what = {key: commit[key] for key in ("title", "message", "date")}
            commits.append({"id": sha, "authors": [{"user": commit["author"]}], **what})
            sha = commit["parent"]
        self.page(commits, self.hub.page_size)

    # Upload

    @route("POST", f"/api/{REPO}/preupload/(?P<revision>[^/]+)")
    def preupload(self, kind: str, name: str, revision: str) -> None:
        repository, asked = self.repository(kind, name, write=True), self.json()
        files = repository.commit(repository.resolve(revision))["files"]
        ignored = asked.get("gitIgnore")
        if ignored is None and ".gitignore" in files:
            ignored = repository.object(files[".gitignore"]["oid"]).read_text()
        rules = [line.strip().strip("/") for line in (ignored or "").splitlines() if line.strip(" \n#")]
        answer = []
        for file in asked["files"]:
            path, there = file["path"], files.get(file["path"])
            mode = "lfs" if self.hub.is_lfs(path, file["size"], base64.b64decode(file["sample"])) else "regular"
            skip = any(fnmatch.fnmatch(part, rule) for rule in rules for part in (path, *path.split("/")))
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": skip})
            if there:
                answer[-1]["oid"] = there["lfs"] or there["oid"]
        self.answer({"files": answer, "commitOid": repository.resolve(revision)})

    @route("POST", rf"/{PLACE}\.git/info/lfs/objects/batch")
    def batch(self, kind: str | None, name: str) -> None:
        repository, asked, objects = self.repository(kind, name, write=True), self.json(), []
        for wanted in asked["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            objects.append({"oid": oid, "size": size, "authenticated": True})
            if repository.object(oid).is_file():
                continue
            place = f"/storage/{kind or 'model'}s/{name}/{oid}"
            header, href = {}, f"{self.hub.storage_url}{place}"
            if size > self.hub.part_size and "multipart" in asked["transfers"]:
                count = -(-size // self.hub.part_size)
                header = {f"{part}": f"{self.hub.storage_url}{place}/{part}" for part in range(1, count + 1)}
                header["chunk_size"] = str(self.hub.part_size)
                href = f"{self.hub.url}/api/complete-multipart{place}"
            verify = {"href": f"{self.hub.url}{self.hub.web(name, kind or 'model')}.git/info/lfs/verify"}
            objects[-1]["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
        self.answer({"transfer": "multipart", "objects": objects}, **{"Content-Type": "application/vnd.git-lfs+json"})

    @route("PUT", f"/storage/{REPO}/(?P<oid>[0-9a-f]{{64}})(?:/(?P<part>[0-9]+))?")
    def upload(self, kind: str, name: str, oid: str, part: str | None) -> None:
        """A whole object, or a part of one: kept if all of it arrives."""
        repository, digest = self.hub.repository(name, kind), hashlib.sha256()
        target = repository.folder / "parts" / oid / part if part else repository.object(oid)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{uuid.uuid4().hex}")
        try:
            with open(beside, "wb") as file:
                for block in self.blocks():
                    digest.update(block)
                    file.write(block)
            if not part and digest.hexdigest() != oid:
                raise Refused(400, "The Content-SHA256 you specified did not match what we received")
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
        self.answer(ETag=f'"{digest.hexdigest()[:32]}"')

    @route("POST", f"/api/complete-multipart/storage/{REPO}/(?P<oid>[0-9a-f]{{64}})")
    def complete(self, kind: str, name: str, oid: str) -> None:
        repository, parts, digest = self.hub.repository(name, kind), self.json()["parts"], hashlib.sha256()
        folder, target = repository.folder / "parts" / oid, repository.object(oid)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{uuid.uuid4().hex}")
        with open(beside, "wb") as whole:
            for number, part in enumerate(parts, start=1):
                with open(folder / str(part["partNumber"]), "rb") as file:
                    one = hashlib.sha256()
                    while block := file.read(BLOCK):
                        one.update(block), digest.update(block), whole.write(block)
                if part["partNumber"] != number or part["etag"].strip('"') != one.hexdigest()[:32]:
                    raise Refused(400, f"InvalidPart: {part}")
        if digest.hexdigest() != oid:
            beside.unlink()
            raise Refused(400, f"{oid} is not the SHA-256 of the {len(parts)} parts")
        beside.replace(target)
        shutil.rmtree(folder)
        self.answer({"success": True})

    @route("POST", rf"/{PLACE}\.git/info/lfs/verify")
    def verify(self, kind: str | None, name: str) -> None:
        repository, asked = self.repository(kind, name, write=True), self.json()
        if repository.stored(asked["oid"])["size"] != asked["size"]:
            raise Refused(422, f"{asked['oid']} has not {asked['size']} bytes")
        self.answer({})

    @route("POST", f"/api/{REPO}/commit/(?P<revision>[^/]+)")
    def commit(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository(kind, name, write=True)
        lines = [json.loads(line) for line in self.body().splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            if revision not in repository.state["branches"] or "create_pr" in self.query:
                raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            head = repository.resolve(revision)
            if header.get("parentCommit") and not head.startswith(header["parentCommit"]):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repository.commit(head)["files"])
            for line in lines:
                self.apply(line["key"], line["value"], files, repository)
            sha = repository.add_commit(revision, files, header["summary"], header["description"], self.user["name"])
        url = f"{self.hub.url}{self.hub.web(name, kind)}/commit/{sha}"
        self.answer({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def apply(self, key: str, value: dict, files: dict, repository: Repository) -> None:
        """One line of a commit."""
        path = value.get("path", "").rstrip("/")
        if key == "file":
            content = base64.b64decode(value["content"])
            if len(content) > self.hub.lfs_from:
                raise Refused(400, f"{path} has {len(content)} bytes: files larger than that are for LFS")
            if path == "README.md" and (errors := hub_card_rules.check(content.decode())[0]):
                raise Refused(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
            files[path] = repository.store(content)
        elif key == "lfsFile":
            files[path] = repository.stored(value["oid"])
        elif key in ("deletedFile", "deletedFolder"):
            gone = [file for file in files if file == path or (key[7:] == "Folder" and file.startswith(f"{path}/"))]
            if not gone:
                raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for file in gone:
                del files[file]

    # Download

    @route("GET", f"/{PLACE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        repository = self.repository(kind, name, content=True)
        sha = repository.resolve(revision)
        entry, headers = repository.commit(sha)["files"].get(path), {"X-Repo-Commit": sha}
        if entry is None:
            raise Refused(404, "Entry not found", "EntryNotFound", **headers)
        if entry["lfs"] is None:
            headers |= {"ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
            return self.answer(repository.object(entry["oid"]), **headers)
        headers |= {"X-Linked-Size": str(entry["size"]), "X-Linked-ETag": f'"{entry["lfs"]}"'}
        headers["Location"] = f"{self.hub.storage_url}/storage/{kind or 'model'}s/{name}/{entry['lfs']}"
        self.answer(b"", 302, **headers)

    @route("GET", f"/storage/{REPO}/(?P<oid>[0-9a-f]{{64}})")
    def stored(self, kind: str, name: str, oid: str) -> None:
        file = self.hub.repository(name, kind).object(oid)
        if not file.is_file():
            raise Refused(403, "AccessDenied")
        self.answer(file, **{"ETag": f'"{oid[:32]}"', "Accept-Ranges": "bytes"})

    # Collections

    def collection(self, slug: str, write: bool = False) -> dict:
        found = self.hub.collections.get(slug)
        if found is None or (found["private"] and not self.owns(found["owner"]["name"])):
            raise Refused(404 if self.user else 401, "Collection not found")
        if write:
            self.may_write(found["owner"]["name"])
        return found

    @route("GET", "/api/collections")
    def list_collections(self) -> None:
        owners = self.query.get("owner")
        found = [c for c in self.hub.collections.values() if not owners or c["owner"]["name"] in owners]
        found = [c for c in found if not c["private"] or self.owns(c["owner"]["name"])]
        self.page([{k: v for k, v in c.items() if k != "position"} for c in found], self.hub.page_size)

    @route("POST", "/api/collections")
    def create_collection(self) -> None:
        asked = self.json()
        self.may_write(asked["namespace"])
        if not 0 < len(asked["title"]) < 60 or len(asked.get("description", "")) > 150:
            raise Refused(400, "A title has up to 59 characters, a description up to 150")
        words = re.sub("[^a-z0-9]+", "-", asked["title"].lower()).strip("-")
        with self.hub.lock:
            for slug, other in self.hub.collections.items():
                if (other["owner"]["name"], other["title"]) == (asked["namespace"], asked["title"]):
                    return self.answer({"error": f"This collection already exists: {slug}", "slug": slug}, 409)
            slug = f"{asked['namespace']}/{words}-{uuid.uuid4().hex[:24]}"
            made = {"slug": slug, "title": asked["title"], "description": asked.get("description")}
            made |= {"owner": {"type": "user", "name": asked["namespace"]}, "private": bool(asked.get("private"))}
            made |= {"items": [], "position": 0, "theme": "orange", "upvotes": 0, "lastUpdated": _now()}
            self.hub.save_collections({**self.hub.collections, slug: made})
        self.answer(made)

    @route("GET", "/api/collections/(?P<slug>[^/]+/[^/]+)")
    def get_collection(self, slug: str) -> None:
        self.answer(self.collection(slug))

    @route("PATCH", "/api/collections/(?P<slug>[^/]+/[^/]+)")
    def update_collection(self, slug: str) -> None:
        changed = {**self.collection(slug, write=True), **self.json(), "lastUpdated": _now()}
        with self.hub.lock:
            self.hub.save_collections({**self.hub.collections, slug: changed})
        self.answer({"success": True, "data": changed})

    @route("DELETE", "/api/collections/(?P<slug>[^/]+/[^/]+)")
    def delete_collection(self, slug: str) -> None:
        self.collection(slug, write=True)
        with self.hub.lock:
            self.hub.save_collections({key: value for key, value in self.hub.collections.items() if key != slug})
        self.answer({})

    @route("POST", "/api/collections/(?P<slug>[^/]+/[^/]+)/items")
    def add_item(self, slug: str) -> None:
        asked = self.json()
        item, note = asked["item"], asked.get("note")
        if item["type"] in ("model", "dataset", "space"):
            self.repository(item["type"], item["id"])
        with self.hub.lock:
            changed = self.collection(slug, write=True)
            if any((old["id"], old["type"]) == (item["id"], item["type"]) for old in changed["items"]):
                raise Refused(409, f"{item['id']} is already in the collection")
            new = {"_id": uuid.uuid4().hex[:24], **item, "position": len(changed["items"])}
            changed["items"].append(new | ({"note": {"text": note, "html": note}} if note else {}))
            changed["lastUpdated"] = _now()
            self.hub.save_collections({**self.hub.collections, slug: changed})
        self.answer(changed)

    @route("PATCH", "/api/collections/(?P<slug>[^/]+/[^/]+)/items/(?P<item>[^/]+)")
    @route("DELETE", "/api/collections/(?P<slug>[^/]+/[^/]+)/items/(?P<item>[^/]+)")
    def change_item(self, slug: str, item: str) -> None:
        asked = self.json()
        with self.hub.lock:
            changed = self.collection(slug, write=True)
            there = {old["_id"]: old for old in changed["items"]}
            if item not in there:
                raise Refused(404, f"{item} is not in the collection")
            if self.command == "DELETE":
                changed["items"].remove(there[item])
            elif "note" in asked:
                there[item]["note"] = {"text": asked["note"], "html": asked["note"]}
            if "position" in asked:
                changed["items"].remove(there[item])
                changed["items"].insert(asked["position"], there[item])
            for position, other in enumerate(changed["items"]):
                other["position"] = position
            self.hub.save_collections({**self.hub.collections, slug: changed})
        self.answer({"success": True})


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Hub:
    """A server on `port` (0: any that is free), whose state is `folder`.

    Files are for LFS by their names, when they are binary, or above `lfs_from` bytes; above `part_size` bytes they are
    sent in parts. `tokens` says who may do what: TOKEN writes as me (and acme, org), READER only reads as me, STRANGER
    is somebody else.
    """

    def __init__(self, folder, port: int = 0, *, lfs_from: int = 5 << 20, part_size: int = 64 << 20, page_size=1000):
        self.folder, self.port = Path(folder), port
        self.lfs_from, self.part_size, self.page_size = lfs_from, part_size, page_size
        me = {"name": "me", "orgs": ["acme", "org"], "role": "write"}
        self.tokens = {TOKEN: me, READER: {**me, "role": "read"}, STRANGER: {**me, "name": "stranger", "orgs": []}}
        self.faults: list[Fault] = []
        self.lock, self.connections = threading.RLock(), set()
        self.folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> "Hub":
        handler = type("Handler", (Handler,), {"hub": self})
        self.servers = [_Server(("127.0.0.1", port), handler) for port in (self.port, 0)]
        self.port, storage = (server.server_port for server in self.servers)
        self.url, self.storage_url = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{storage}"
        for server in self.servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Also what is being sent is cut. `start()` again serves the same state, on the same port."""
        for server in self.servers:
            server.shutdown()
            server.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "Hub":
        return self.start()

    def __exit__(self, *error) -> None:
        self.stop()

    def env(self, home, token: str | None = TOKEN, offline: bool = False) -> dict[str, str]:
        """Of a child process whose client uses this Hub, with its cache in the folder `home`."""
        network = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
        return {
            **{"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"},
            **{"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
            **{"HF_TOKEN": token or "", **dict.fromkeys(network, "1" if offline else "0")},
        }

    # What is to go wrong, and what came

    def fault(self, pattern: str, **what) -> Fault:
        """Let requests fail whose "METHOD /path" the pattern is found in; see `Fault`."""
        self.faults.append(Fault(pattern, **what))
        return self.faults[-1]

    def take(self, line: str) -> Fault:
        with self.lock:
            for fault in self.faults:
                if re.search(fault.pattern, line) and fault.times != 0:
                    fault.hits += 1
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return Fault("")

    def log(self, entry: dict) -> None:
        with self.lock, open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")

    def requests(self, pattern: str = "") -> list[dict]:
        """Those whose "METHOD /path" has the pattern: request, received and answered bytes, status (0: torn)."""
        log = self.folder / "log.jsonl"
        with self.lock:
            entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [entry for entry in entries if re.search(pattern, entry["request"])]

    def sent(self, pattern: str = "PUT /storage/|POST .*/commit/") -> int:
        """Bytes that clients have sent (without a pattern: of files)."""
        return sum(entry["received"] for entry in self.requests(pattern))

    def forget(self) -> None:
        """Start a new log."""
        (self.folder / "log.jsonl").unlink(missing_ok=True)

    # Its state

    def repository(self, name: str, kind: str = "model") -> Repository:
        return Repository(self.folder / f"{kind}s" / name)

    def web(self, name: str, kind: str) -> str:
        return f"/{name}" if kind == "model" else f"/{kind}s/{name}"

    def is_lfs(self, path: str, size: int, sample: bytes) -> bool:
        if any(fnmatch.fnmatch(path, rule) or fnmatch.fnmatch(path.split("/")[-1], rule) for rule in LFS):
            return True
        return size > self.lfs_from or b"\0" in sample

    def create(self, name: str, kind: str = "model", private: bool = False, gated=False) -> Repository:
        """As the Hub makes one: with a first commit that has `.gitattributes`."""
        repository = self.repository(name, kind)
        repository.folder.mkdir(parents=True)
        repository.save({"private": private, "gated": gated, "created": _now(), "branches": {}, "tags": {}})
        rules = "".join(f"{rule} filter=lfs diff=lfs merge=lfs -text\n" for rule in LFS)
        repository.add_commit("main", {".gitattributes": repository.store(rules.encode())}, "initial commit", "", name)
        return repository

    def add(self, name: str, folder, kind: str = "model", **who) -> str:
        """A folder as a repository that is already there, with no client; returns its commit."""
        repository = self.create(name, kind, **who)
        files = dict(repository.commit(repository.resolve("main"))["files"])
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            content, place = path.read_bytes(), path.relative_to(folder).as_posix()
            if self.is_lfs(place, len(content), content[:512]):
                sha256 = hashlib.sha256(content).hexdigest()
                _write(repository.object(sha256), content)
                files[place] = repository.stored(sha256)
            else:
                files[place] = repository.store(content)
        return repository.add_commit("main", files, "Upload folder", "", name.split("/")[0])

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, Path]:
        """The files of a repository (but `.gitattributes`), and where their contents are."""
        repository = self.repository(name, kind)
        files = repository.commit(repository.resolve(revision))["files"]
        return {p: repository.object(f["lfs"] or f["oid"]) for p, f in sorted(files.items()) if p != ".gitattributes"}

    @property
    def collections(self) -> dict[str, dict]:
        file = self.folder / "collections.json"
        return json.loads(file.read_bytes()) if file.exists() else {}

    def save_collections(self, collections: dict) -> None:
        _write(self.folder / "collections.json", json.dumps(collections, indent=1).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="its state; made if it is not there")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    arguments = parser.parse_args()
    with Hub(arguments.folder, arguments.port) as hub:
        print(hub.url, flush=True)
        print(" ".join(f"{key}={value}" for key, value in hub.env(arguments.folder / "home").items()), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
