"""One writer a folder: a lock that dies with its process, on every file system."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import EdgeDiTError
from ..files import aside_of, explain_write_errors, parse_json, process_started, sweep


class FolderLock:
    """One process at a time works in a folder: the file `run.lock` in it names who does.

    The lock of a process that is gone is taken over where that can be known, on the same host. A process may take its
    own lock again.

    Args:
        folder: must exist.

    Raises:
        EdgeDiTError: (on `acquire`) another process holds it; the message says which, and what to do if it is gone.
    """

    NAME = "run.lock"
    _held: set[Path] = set()

    def __init__(self, folder: str | os.PathLike) -> None:
        self.path = Path(folder).absolute() / self.NAME

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *error: Any) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock or raise."""
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": process_started(os.getpid())}
        command = " ".join(sys.argv)[:300]
        text = json.dumps({**mine, "since": time.strftime("%Y-%m-%d %H:%M:%S %z"), "command": command}) + "\n"
        with explain_write_errors(self.path), _exclusively(self.path.parent):
            sweep(self.path.parent, self.NAME)
            holder = self._holder()
            if holder is not None and {key: holder.get(key) for key in mine} != mine:
                if holder.get("host") != mine["host"]:
                    raise self._refusal(holder)
                started = process_started(holder["pid"]) if isinstance(holder.get("pid"), int) else None
                if started is not None and started == holder.get("started"):
                    raise self._refusal(holder)
            aside = aside_of(self.path)
            try:
                aside.write_text(text, encoding="utf-8")
                if holder is None:
                    try:
                        os.link(aside, self.path)  # fails if another host was faster
                    except FileExistsError:
                        raise self._refusal(self._holder() or {}) from None
                    except OSError:  # no links on this file system
                        os.replace(aside, self.path)
                else:
                    os.replace(aside, self.path)
            finally:
                aside.unlink(missing_ok=True)
        self._held.add(self.path)

    def release(self) -> None:
        """Give the lock back, if this process has it."""
        if self.path not in self._held:
            return
        self._held.discard(self.path)
        with contextlib.suppress(OSError, EdgeDiTError):
            if (self._holder() or {}).get("pid") == os.getpid():  # not of a forked child
                self.path.unlink()

    def _holder(self) -> dict[str, Any] | None:
        try:
            found = parse_json(self.path.read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return found
        except FileNotFoundError:
            return None
        except ValueError:
            pass
        raise EdgeDiTError(
            f"{self.path} is damaged, so nobody can tell who works in {self.path.parent}; if no process does, delete "
            "that file."
        )

    def _refusal(self, holder: Mapping[str, Any]) -> EdgeDiTError:
        who = (
            f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')}: "
            f"{holder.get('command')})"
        )
        return EdgeDiTError(
            f"{self.path.parent} is in use by {who}. Wait for it or stop it; if it is gone, delete {self.path} and run "
            "again."
        )


def release_locks() -> None:
    """Give back every lock of this process."""
    for path in list(FolderLock._held):
        FolderLock(path.parent).release()


@contextlib.contextmanager
def _exclusively(folder: Path) -> Iterator[None]:
    """One process of this host at a time, where the file system can: looking at a lock and taking it belong
    together.
    """
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not on every network file system
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


atexit.register(release_locks)
