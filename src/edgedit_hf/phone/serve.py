"""`edgedit phone serve`: a page that measures a bundle in any browser that can reach it, and what it sends back. No
torch.

What can be asked for is a table of names, made at the start: no name of a request ever becomes a path. Whoever knows
the token may read these files and send rows of this bundle, which [`devices`] holds to what a measurement can be.
"""

from __future__ import annotations

import contextlib
import hmac
import http.server
import io
import ipaddress
import json
import os
import re
import secrets
import shutil
import socket
import socketserver
import ssl
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from ..errors import EdgeDiTError
from ..export.web import runtime
from ..export.web.page import COPIES, FIXED_BYTES, LIMIT, peak_bytes
from ..files import explain_write_errors, parse_json
from ..run.lock import FolderLock
from ..schema import shorten
from .bundle import Bundle
from .devices import Course, Device, Devices, Refusal

TOKEN, TOKEN_FORM = "token", r"[A-Za-z0-9_-]{32}"
LARGEST_POST = 2**16  # bytes
SILENCE = 60  # seconds after which a connection that says nothing is closed
CONNECTIONS = 64
REFUSALS_SHOWN = 10
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".wasm": "application/wasm",
}
POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:; connect-src 'self'; "
    "style-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {  # the first two isolate the page, which lends it threads
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "X-Content-Type-Options": "nosniff",
}


# -------------------------------------------------------------------- what is served


@dataclass(frozen=True)
class Served:
    """A file, or content, of one name.

    Args:
        content: of it, or where it lies. type: its media type. kept: whether a browser may keep it, as its name says
            which version it is.
    """

    content: bytes | Path
    type: str
    kept: bool = False


def site_of(bundle: Bundle, runtime_folder: Path) -> dict[str, Served]:
    """Everything that can be asked for, by its name behind the token.

    Args:
        runtime_folder: with onnxruntime-web's files.

    Raises:
        EdgeDiTError: a file of the bundle is a link out of it, or too large for a browser.
    """
    web, own = files("edgedit_hf.export.web") / "page", files("edgedit_hf.phone") / "page"
    texts = {"": own / "measure.html"} | {name: own / name for name in ("measure.js", "schedule.js", "measure.css")}
    texts |= {name: web / name for name in ("runtime.js", "style.css")}
    site = {name: Served(file.read_bytes(), TYPES[Path(file.name).suffix]) for name, file in texts.items()}
    for name in runtime.FILES:
        if Path(name).suffix in TYPES:
            place = f"{runtime.PACKAGE}-{runtime.VERSION}/{name}"
            site[place] = Served(runtime_folder / name, TYPES[Path(name).suffix], kept=True)
    real = Path(os.path.realpath(bundle.folder))
    stored, networks = bundle.data["files"], []
    for entry in bundle.data["networks"]:
        parts = {f"{bundle.hash}/{name}": stored[name]["bytes"] for name in entry["files"]}
        size = sum(parts.values())
        if (peak := peak_bytes(size, bundle.precision)) > LIMIT:
            raise EdgeDiTError(
                f"The network {entry['name']} of {size / 1e9:.2f} GB takes {peak / 1e9:.2f} GB in a browser, which has "
                f"{LIMIT / 1e9:.2f}; choose a lower --precision, or `edgedit phone pack`."
            )
        networks.append(
            {"name": entry["name"], "file": f"{bundle.hash}/{entry['file']}", "parts": parts, "bytes": size}
        )
    asked = {name for entry in bundle.data["networks"] for name in entry["files"]}
    for name in sorted(asked | {entry["file"] for entry in bundle.data["inputs"]}):
        if os.path.realpath(bundle.folder / name) != str(real / name):
            raise EdgeDiTError(f"{bundle.folder / name} is a link; it is not served. Make the bundle anew.")
        site[f"{bundle.hash}/{name}"] = Served(real / name, "application/octet-stream", kept=True)
    course = Course.of(bundle)
    plan = {
        "hash": bundle.hash,
        "precision": bundle.precision,
        "batch": bundle.batch,
        "runtime": {"url": f"{runtime.PACKAGE}-{runtime.VERSION}/", "version": runtime.VERSION},
        "memory": {"copies": COPIES[bundle.precision], "fixed_bytes": FIXED_BYTES, "limit_bytes": LIMIT},
        "inputs": [{**entry, "file": f"{bundle.hash}/{entry['file']}"} for entry in bundle.data["inputs"]],
        "networks": networks,
        "passes": course.passes,
        "warmups": course.warmups,
        "rounds": course.rounds,
    }
    site["plan.json"] = Served(json.dumps(plan).encode(), "application/json")
    return site


def token_of(folder: Path) -> str:
    """The token in a folder, which stays the same so that an open page goes on when the server starts again: only its
    owner may read it. One that others could read, or that is none, is replaced.
    """
    path = folder / TOKEN
    with explain_write_errors(path):
        with contextlib.suppress(FileNotFoundError):
            state = path.lstat()
            text = path.read_text("ascii", "replace") if stat.S_ISREG(state.st_mode) else ""
            if re.fullmatch(TOKEN_FORM, text) and not state.st_mode & 0o077:
                return text
            path.unlink()
        token = secrets.token_urlsafe(24)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(token)
    return token


# -------------------------------------------------------------------- the server


class Server(http.server.ThreadingHTTPServer):
    """Serves a site to those who know its token.

    Args:
        address: host and port. devices: what is sent goes there. site: of [`site_of`]. token: in every address.
        tls: makes it https. heard: called after every row or hello, with the device; refused: with what was not let in.
    """

    daemon_threads = True
    request_queue_size = CONNECTIONS

    def __init__(
        self,
        address: tuple[str, int],
        devices: Devices,
        site: Mapping[str, Served],
        token: str,
        *,
        tls: ssl.SSLContext | None = None,
        heard: Callable[[Device], None] = lambda device: None,
        refused: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.devices, self.site, self.token, self.heard, self.refused = devices, site, token.encode(), heard, refused
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(address, Handler)
        if tls is not None:  # the handshake is made when a connection is first read, not where new ones wait
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def server_bind(self) -> None:
        """Take the port, and ask nobody for this machine's name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread of its own, unless there are too many."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In that thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is no news; anything else is."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers the requests of a connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "edgedit", ""
    error_content_type, error_message_format = "text/plain; charset=utf-8", "%(code)d %(message)s\n"
    timeout = SILENCE

    def log_message(self, *_: Any) -> None:
        """Nothing: the address holds the token."""

    def end_headers(self) -> None:
        """With those that every answer has."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def _name(self) -> str | None:
        """What is asked for, behind the token; `None` without it."""
        first, _, name = self.path.partition("?")[0].removeprefix("/").partition("/")
        known = hmac.compare_digest(first.encode("utf-8", "replace"), self.server.token)
        return name if known else None

    def do_GET(self) -> None:
        """A file of the site."""
        name = self._name()
        served = None if name is None else self.server.site.get(name)
        if served is None:
            return self.send_error(404)
        if self.path.removeprefix("/").encode() == self.server.token:  # names on the page are relative to it
            return self._head(Served(b"", "text/plain"), 0, status=308)
        if isinstance(served.content, bytes):
            return self._send(served, io.BytesIO(served.content), len(served.content))
        try:
            file = open(os.open(served.content, os.O_RDONLY | os.O_NOFOLLOW), "rb")
        except OSError:  # gone, or a link by now
            return self.send_error(404)
        with file:
            return self._send(served, file, os.fstat(file.fileno()).st_size)

    def _send(self, served: Served, file: BinaryIO, size: int) -> None:
        self._head(served, size)
        if self.command != "HEAD":
            shutil.copyfileobj(file, self.wfile, 1 << 18)

    do_HEAD = do_GET

    def _head(self, served: Served, size: int, status: int = 200) -> None:
        self.send_response(status)
        if status == 308:
            self.send_header("Location", f"{self.path}/")
        self.send_header("Content-Type", served.type)
        self.send_header("Content-Length", str(size))
        self.send_header("Cache-Control", "private, max-age=604800, immutable" if served.kept else "no-store")
        self.end_headers()

    def do_POST(self) -> None:
        """A hello, or rows."""
        devices = self.server.devices
        asked = {"hello": devices.join, "rows": devices.take}.get(self._name() or "")
        if asked is None:
            self.close_connection = True  # with whatever it was going to send
            return self.send_error(404)
        device = None
        try:
            status, (device, answer) = 200, asked(self._body())
        except Refusal as refusal:
            status, answer = refusal.status, {"error": str(refusal), "kind": refusal.kind}
            self.server.refused(str(refusal))
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Cache-Control", "no-store")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(text)
        if device is not None:
            self.server.heard(device)  # after the answer: the last one may end the server
        return None

    def _body(self) -> Any:
        """The JSON that was sent; what is too long for one is not even read."""
        told = self.headers.get_all("Content-Length", [])
        size = int(told[0]) if len(told) == 1 and re.fullmatch(r"[0-9]{1,18}", told[0]) else -1
        if size < 0 or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise Refusal("Say how many bytes there are (one Content-Length, no Transfer-Encoding).", 411)
        if size > LARGEST_POST:
            self.close_connection = True
            raise Refusal(f"{size} bytes were to be sent; it may be {LARGEST_POST} at most.", 413)
        body = self.rfile.read(size)
        if len(body) < size:
            self.close_connection = True
            raise Refusal(f"{len(body)} bytes came instead of {size}.")
        try:
            return parse_json(body)
        except ValueError as error:
            raise Refusal(f"This is no JSON: {shorten(str(error))}.") from None


# -------------------------------------------------------------------- in the terminal


@dataclass
class Bars:
    """A progress bar a device, and what else is said. The methods may be called from several threads."""

    whole: Callable[[Device], None]
    lock: threading.Lock = field(default_factory=threading.Lock)
    bars: dict[str, tqdm] = field(default_factory=dict)
    refusals: int = 0
    ended: set[str] = field(default_factory=set)

    def tell(self, line: str) -> None:
        """A line, above the bars."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def heard(self, device: Device) -> None:
        """Show how far a device is."""
        with self.lock:
            count, total = len(device.runs), device.course.total
            if device.name not in self.bars:
                said = " ".join(str(device.setting[name]) for name in ("device", "backend"))
                self.tell(f"{said}, {device.setting['threads']} thread(s): {count} of {total} runs are there")
                options = {"total": total, "initial": count, "unit": "run", "disable": None}
                self.bars[device.name] = tqdm(desc=shorten(said, 40).strip("'\""), **options)
            bar = self.bars[device.name]
            bar.update(count - bar.n)
            if not device.whole or device.name in self.ended:
                return
            self.ended.add(device.name)
            bar.close()
        self.whole(device)

    def refused(self, message: str) -> None:
        """Say what was not let in, the first times."""
        with self.lock:
            self.refusals += 1
            if self.refusals <= REFUSALS_SHOWN:
                more = "; later ones are not shown" if self.refusals == REFUSALS_SHOWN else ""
                self.tell(f"refused: {message}{more}")

    def close(self) -> None:
        """Take the bars away."""
        with self.lock:
            for bar in self.bars.values():
                bar.close()


def qr_lines(address: str) -> str | None:
    """An address as a QR code of block characters; `None` without segno."""
    try:
        import segno
    except ImportError:
        return None
    text = io.StringIO()
    segno.make(address, error="l", micro=False).terminal(out=text, compact=True)
    return text.getvalue().rstrip("\n")


def address_of(host: str, port: int, token: str, secure: bool) -> str:
    """The address to open on a phone; for a host that stands for every one of this machine's, that of its network."""
    if host in ("0.0.0.0", "::"):
        family, far = (socket.AF_INET, "192.0.2.1") if host == "0.0.0.0" else (socket.AF_INET6, "2001:db8::1")
        with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.connect((far, 9))  # which sends nothing: it asks which way such a packet would go
            host = probe.getsockname()[0]
    shown = f"[{host}]" if ":" in host else host
    return f"http{'s' if secure else ''}://{shown}:{port}/{token}/"


def is_local(host: str) -> bool:
    """Whether only this machine reaches it."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def advice(address: str) -> str:
    """How a phone gets there, and what it lacks there."""
    parts = urlsplit(address)
    host, port = str(parts.hostname), parts.port
    if is_local(host):
        return (
            f"Only this machine reaches it; a phone on a cable does after `adb reverse tcp:{port} tcp:{port}`. Or give "
            "--host 0.0.0.0, with --certfile and --keyfile."
        )
    if parts.scheme == "http":
        return (
            "Whoever is in this network can listen. Without https, browsers give no WebGPU, no WebNN and one thread; "
            f"give --certfile and --keyfile, or leave --host out and use `adb reverse tcp:{port} tcp:{port}`."
        )
    return "The phone must be told to trust the certificate, if it does not yet."


def tls_of(certfile: Path | None, keyfile: Path | None) -> ssl.SSLContext | None:
    """What makes a server https.

    Raises:
        EdgeDiTError: one of the files is missing, or they are no certificate and its key.
    """
    if certfile is None:
        if keyfile is not None:
            raise EdgeDiTError(f"--keyfile is {keyfile}, but there is no --certfile; give both, or neither.")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certfile, keyfile)
    except (OSError, ValueError) as error:  # of ssl, too
        key = f" with the key {keyfile}" if keyfile is not None else ""
        raise EdgeDiTError(
            f"--certfile {certfile}{key} gives no certificate ({error}); give PEM files, the key in --keyfile or after "
            "the certificate."
        ) from None
    return context


@contextlib.contextmanager
def listening(server: Server) -> Iterator[None]:
    """Within it the server answers; at the end what it is writing is written."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        server.devices.lock.acquire()  # for good: a row is not cut off, and none comes after
        thread.join()


def serve(
    bundle: Bundle,
    folder: Path,
    *,
    port: int,
    host: str = "127.0.0.1",
    tls: ssl.SSLContext | None = None,
    once: bool = False,
    whole: Callable[[Device, Bars], None] = lambda device, bars: None,
) -> Device:
    """Serve a bundle until Ctrl-C.

    Args:
        folder: of the results; what is there goes on.
        port, host: where it listens. tls: makes it https, see [`tls_of`].
        once: end when a device is through, and give it back.
        whole: called when a device is through.

    Raises:
        EdgeDiTError: the port cannot be had, a file is damaged, or the runtime cannot be fetched.
    """
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    done = threading.Event()
    through: list[Device] = []

    def ended(device: Device) -> None:
        whole(device, bars)
        through.append(device)
        done.set()

    bars = Bars(ended)
    with FolderLock(folder):
        devices = Devices(folder, bundle)
        site, token = site_of(bundle, runtime.runtime_folder()), token_of(folder)
        try:
            server = Server((host, port), devices, site, token, tls=tls, heard=bars.heard, refused=bars.refused)
        except (OSError, OverflowError, UnicodeError) as error:
            raise EdgeDiTError(
                f"Nothing can listen at {host}, port {port} ({getattr(error, 'strerror', None) or error}); give "
                "another --port or --host, or end what listens there."
            ) from None
        try:
            with listening(server):
                greet(address_of(host, port, token, tls is not None), devices, bars)
                while not (once and done.is_set()):
                    time.sleep(0.1)
        finally:
            bars.close()
            kept = sum(len(device.runs) for device in devices.known.values())
            bars.tell(f"{kept} runs are in {folder}; the same command goes on with them")
    return through[0]


def greet(address: str, devices: Devices, bars: Bars) -> None:
    """Say where the page is, and what is there already."""
    course = devices.course
    for device in devices.known.values():
        bars.tell(f"{device.file}: {len(device.runs)} of {course.total} runs; its page goes on")
    bars.tell(
        f"{len(course.networks)} networks of {devices.bundle.runtime}-{devices.bundle.precision}, bundle "
        f"{devices.bundle.hash}: {course.passes} loads, {course.passes} × {course.warmups} warm-ups and "
        f"{course.rounds} timed runs of each"
    )
    if sys.stdout.isatty():
        code = qr_lines(address)
        bars.tell(code if code is not None else "(with segno installed, a QR code stands here: pip install segno)")
    bars.tell(f"Open {address}\n{advice(address)}")
