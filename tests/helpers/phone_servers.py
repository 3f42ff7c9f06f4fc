"""Servers of the measuring page: in this process, and as one of their own."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from edgedit_hf.phone.bundle import Bundle
from edgedit_hf.phone.devices import Devices
from edgedit_hf.phone.serve import Server, listening, site_of

TOKEN = "T" * 32
PROGRAM = """
import sys
from pathlib import Path
from edgedit_hf.entry import guard
from edgedit_hf.phone.bundle import Bundle
from edgedit_hf.phone.serve import serve
sys.exit(guard(lambda: serve(Bundle.read(sys.argv[1]), Path(sys.argv[2]), port=int(sys.argv[3])), "serve"))
"""


@contextlib.contextmanager
def server_of(bundle: Bundle, folder: Path, runtime: Path, **options) -> Iterator[Server]:
    """A server in this process; results go to `folder / "results"`."""
    devices = Devices(folder / "results", bundle)
    server = Server(("127.0.0.1", 0), devices, site_of(bundle, runtime), TOKEN, **options)
    with listening(server):
        yield server


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextlib.contextmanager
def process_of(bundle: Bundle, folder: Path, port: int) -> Iterator[tuple[subprocess.Popen, str]]:
    """The server as its own process, and the address of its page."""
    command = [sys.executable, "-c", PROGRAM, str(bundle.folder), str(folder), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith("Open "):
                yield process, line.split()[1]
                break
        else:
            raise AssertionError(process.stderr.read())
    finally:
        process.kill()
        process.communicate()
