"""How the loopback Hub talks HTTP: who asks, what is logged, bodies that stream, answers in ranges, and faults."""

import contextlib
import json
import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

BLOCK = 1 << 20


class Refused(Exception):
    """A request that the Hub answers with an error."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        self.status, self.body = status, {"error": message}
        line = " ".join(message.split()).encode("ascii", "replace").decode()
        self.headers = {"X-Error-Message": line, **headers, **({"X-Error-Code": code} if code else {})}


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
    reset: int | None = None  # the connection is reset after so many bytes: of the upload, of the answer to a GET
    truncate: int | None = None  # so many bytes of the announced length are answered, then the connection closes
    short: int | None = None  # the answer announces and has only so many bytes
    delay: float = 0.0  # seconds before the answer
    hits: int = 0


ROUTES: list[tuple[str, re.Pattern, object]] = []


def route(method: str, path: str):
    def keep(function):
        ROUTES.append((method, re.compile(path), function))
        return function

    return keep


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: object  # hub_server.Hub

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
        self.left, self.received, self.logged = int(self.headers.get("Content-Length") or 0), 0, False
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
        if not self.logged:
            self.hub.log({"request": self.line, "received": self.received, "status": status, "answered": answered})
        self.logged = True

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
        if self.received and self.fault.reset is not None:
            raise Cut  # all arrived, and the answer is lost
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
