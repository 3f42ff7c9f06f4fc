"""A headless Chromium for tests, driven over the DevTools protocol through two pipes: nothing but the browser is
needed.
"""

import base64
import contextlib
import fcntl
import functools
import http.server
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this machine")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-extensions --mute-audio"
).split()
KEYS = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
# The browser reads commands from descriptor 3 and writes to 4: where the pipes are when it takes this process's place.
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


class BrowserError(AssertionError):
    """The browser, or the page in it, said that something failed."""


class Browser:
    """A browser with one page. `with Browser() as page: page.open(url); page.wait("done"); …`

    requests, console: addresses asked for by the page and its workers, and lines of its console, errors among them.
    """

    def __init__(self, *flags: str, timeout: float = 120.0):
        self.flags, self.timeout = flags, timeout
        self.requests: list[str] = []
        self.blocked: list[str] = []
        self.console: list[str] = []

    def __enter__(self) -> "Browser":
        with contextlib.ExitStack() as stack:
            # On a disk that lasts: a browser's profile in a test's folder would be kept with the last runs.
            profile = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            theirs, self._commands = _pipe()
            answers, back = _pipe()
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-c", START, str(theirs), str(back), CHROMIUM, *FLAGS, *self.flags),
                    *("--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"),
                ],
                pass_fds=(theirs, back),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            stack.callback(self._end)
            os.close(theirs), os.close(back)
            self._answers: queue.Queue = queue.Queue()
            self._next, self._session = 0, None
            threading.Thread(target=self._read, args=(answers,), daemon=True).start()
            target = next(t for t in self.command("Target.getTargets")["targetInfos"] if t["type"] == "page")
            attach = {"targetId": target["targetId"], "flatten": True}
            self._session = self.command("Target.attachToTarget", **attach)["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.command(f"{domain}.enable")
            self.command("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def _end(self) -> None:
        os.close(self._commands)  # it ends when nobody can command it any more
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _read(self, descriptor: int) -> None:
        held = b""
        with os.fdopen(descriptor, "rb", buffering=0) as pipe:
            while part := pipe.read(1 << 16):
                *messages, held = (held + part).split(b"\0")
                for message in messages:
                    self._answers.put(json.loads(message))
        self._answers.put(None)

    def _take(self, deadline: float) -> dict:
        """The next message, an answer; events are noted on the way."""
        while True:
            try:
                message = self._answers.get(timeout=max(deadline - time.monotonic(), 0.001))
            except queue.Empty:
                raise BrowserError(f"the browser did not answer; its console: {self.console[-20:]}") from None
            if message is None:
                raise BrowserError(f"the browser has ended; its console: {self.console[-20:]}")
            if "id" in message:
                return message
            self._note(message.get("method"), message["params"], message.get("sessionId"))

    def _note(self, method: str, params: dict, session: str | None) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Network.loadingFailed" and params.get("blockedReason"):
            self.blocked.append(params["blockedReason"])
        elif method == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(arg.get("value", arg.get("description"))) for arg in params["args"]))
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.console.append("error: " + details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded":
            self.console.append(f"{params['entry']['level']}: {params['entry']['text']}")
        elif method == "Target.attachedToTarget" and self._session is not None:  # a worker: its requests count too
            self._send("Network.enable", {}, params["sessionId"])

    def _send(self, method: str, params: dict, session: str | None) -> int:
        self._next += 1
        message = {"id": self._next, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        return self._next

    def command(self, method: str, **params) -> dict:
        """A command of the DevTools protocol to the page; its result."""
        own = not method.startswith(("Target.get", "Target.attach", "Browser."))
        number = self._send(method, params, self._session if own else None)
        deadline = time.monotonic() + self.timeout
        while True:
            answer = self._take(deadline)
            if answer["id"] == number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    # ---------------------------------------------------------------- what a test does

    def phone(self, width: int = 390, height: int = 844, scale: int = 2) -> None:
        """Be a phone of this size, with touch."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": True}
        self.command("Emulation.setDeviceMetricsOverride", **metrics)
        self.command("Emulation.setTouchEmulationEnabled", enabled=True, maxTouchPoints=5)

    def open(self, url: str) -> None:
        """Go to an address."""
        found = self.command("Page.navigate", url=url)
        if found.get("errorText"):
            raise BrowserError(f"{url}: {found['errorText']}")

    def run(self, script: str):
        """The value of an expression in the page (of a promise: what it comes to)."""
        found = self.command("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description", details["text"]))
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float | None = None):
        """The expression's value once it is true."""
        deadline = time.monotonic() + (self.timeout if seconds is None else seconds)
        while time.monotonic() < deadline:
            if found := self.run(f"document.body && ({condition})"):
                return found
            time.sleep(0.05)
        text = self.run("document.body && document.body.innerText")
        raise BrowserError(f"not in time: {condition}\npage: {text}\nconsole: {self.console[-20:]}")

    def tap(self, selector: str) -> None:
        """Touch the middle of an element with a finger."""
        left, top, width, height = self.place(selector)
        points = [{"x": left + width / 2, "y": top + height / 2}]
        self.command("Input.dispatchTouchEvent", type="touchStart", touchPoints=points)
        self.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def mouse(self, *events: tuple[str, float, float]) -> None:
        """Mouse events of the left button at places of the window: ("Pressed", x, y), ("Moved", …), ("Released", …)."""
        held = False
        for kind, x, y in events:
            held = kind == "Pressed" or held and kind == "Moved"
            about = {"x": x, "y": y, "button": "left" if held or kind == "Released" else "none", "buttons": int(held)}
            self.command("Input.dispatchMouseEvent", type=f"mouse{kind}", clickCount=int(kind != "Moved"), **about)

    def place(self, selector: str) -> list[float]:
        """Left, top, width and height of an element, which is scrolled into the window."""
        return self.run(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect(); "
            f"return [r.x, r.y, r.width, r.height] }})(document.querySelector({json.dumps(selector)}))"
        )

    def press(self, *names: str) -> None:
        """Keys, one after the other, by the names that a page knows them by: "ArrowLeft", "Enter", …"""
        for name in names:
            key = {"key": name, "code": name, "windowsVirtualKeyCode": KEYS[name]}
            text = {"text": "\r"} if name == "Enter" else {}
            self.command("Input.dispatchKeyEvent", type="keyDown", **key, **text)
            self.command("Input.dispatchKeyEvent", type="keyUp", **key)

    def screenshot(self, path: Path) -> Path:
        """The visible part of the page as PNG."""
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))
        return path


def _pipe() -> tuple[int, int]:
    """A pipe whose descriptors are not those that the browser will use."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high


@contextlib.contextmanager
def served(folder: Path, headers: dict[str, str] | None = None):
    """The folder as `python -m http.server` serves it, on loopback (with `headers` besides): yields its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self):
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=os.fspath(folder))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
