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
import contextlib
import fnmatch
import hashlib
import json
import re
import socket
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

from hub_endpoints import Endpoints
from hub_store import Repository, now, write
from hub_wire import Fault

TOKEN, READER, STRANGER = "hf_writer", "hf_reader", "hf_stranger"
LFS = """*.7z *.arrow *.bin *.bin.* *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy
*.npz *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite
*.tgz *.wasm *.xz *.zip *.zst *tfevents*""".split()


class _Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

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
        handler = type("Handler", (Endpoints,), {"hub": self})
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
            **{"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_CACHE": f"{home}/hub", "HF_TOKEN": token or ""},
            **dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"), "1"),
            **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1"),
            **dict.fromkeys(network, "1" if offline else "0"),
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
        with self.lock:
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
        repository.save({"private": private, "gated": gated, "created": now(), "branches": {}, "tags": {}})
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
                write(repository.object(sha256), content)
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
        write(self.folder / "collections.json", json.dumps(collections, indent=1).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="its state; made if it is not there")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    arguments = parser.parse_args()
    with Hub(arguments.folder, arguments.port) as hub:
        print(hub.url, flush=True)
        print(" ".join(f"{key}={value}" for key, value in hub.env(arguments.folder / "home").items()), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
