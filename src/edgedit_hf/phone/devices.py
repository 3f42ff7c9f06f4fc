"""The devices that measure a bundle: what each of them sent, on the disk at once, and what nobody may send. No torch.

Every device has a folder of its own, so that two that measure at once cannot mix: a browser that comes with another
name, backend or number of threads is another device. A row is on the disk before it is acknowledged; one that is sent
again, because the answer was lost, counts once.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import EdgeDiTError
from ..files import hash_json
from ..schema import check, key, shorten
from .bundle import Bundle
from .results import Results, Row, append_rows, read_rows, row_of, summarise

RESULTS = "results.csv"
LEAST_PASSES = 4  # even, so that there are as many forwards as backwards
DEVICES = 32  # of a bundle
ROWS_A_POST = 200
ROWS_A_SECOND, ROWS_AT_ONCE = 200.0, 2000.0  # on average, and after a silence


class Refusal(EdgeDiTError):
    """Something that is not let in.

    Args:
        status: of HTTP.
        kind: what the page does about it: "join" (say again who it is), "later" (try again), "refused" (stop).
    """

    def __init__(self, message: str, status: int = 400, kind: str = "refused") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


@dataclass(frozen=True)
class Course:
    """How a page measures: every network is opened in several passes, each with its warm-ups and a part of the rounds.

    A phone cannot hold all networks open at once. Those that fit go through the rounds of a pass together; passes run
    through the networks forwards and backwards, so that a phone that gets slower is fair to all of them.

    Args:
        networks: names. passes, warmups (a pass), rounds (in all): of each network.
    """

    networks: tuple[str, ...]
    passes: int
    warmups: int
    rounds: int

    @classmethod
    def of(cls, bundle: Bundle) -> Course:
        """That of a bundle, whose protocol it holds to."""
        protocol = bundle.data["protocol"]
        passes = max(LEAST_PASSES, protocol["cold_loads"])
        return cls(tuple(bundle.networks), passes + passes % 2, protocol["warmups"], protocol["rounds"])

    @cached_property
    def counts(self) -> dict[str, int]:
        """Runs of each phase, of a network."""
        return {"cold": self.passes, "warm": self.passes * self.warmups, "timed": self.rounds}

    @property
    def total(self) -> int:
        """Runs of a whole measurement."""
        return len(self.networks) * sum(self.counts.values())

    def check(self, row: Row) -> None:
        """Raise a [`Refusal`] of a row that is no run of it."""
        if row.network not in self.networks:
            raise Refusal(f"The bundle has no network {shorten(row.network)}.")
        if row.round >= self.counts[row.phase]:
            raise Refusal(f"A network has {self.counts[row.phase]} {row.phase} runs, but this is number {row.round}.")


@dataclass(frozen=True, kw_only=True)
class Hello:
    """What a page says of itself.

    Args:
        bundle: the hash of what it measures.
        client: what a browser calls itself by chance, once and for all; tab: this page.
        device, browser, backend, threads, version: of every row.
    """

    bundle: str = key(length=(8, 64))
    client: str = key(length=(16, 64), file=True)
    tab: str = key(length=(16, 64), file=True)
    device: str = key(length=(1, 300))
    browser: str = key(length=(0, 500))
    backend: str = key(choices=("webgpu", "webnn", "wasm"))
    threads: int = key(minimum=1, maximum=4096)
    version: str = key(length=(1, 100))

    @property
    def setting(self) -> dict[str, Any]:
        """What all its rows share, as [`Row.setting`] has it."""
        return {name: value for name, value in asdict(self).items() if name not in ("client", "tab")}

    @property
    def name(self) -> str:
        """Of its folder."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")[:40].strip("-") or "device"
        own = hashlib.sha256(self.client.encode()).hexdigest()
        return f"{plain}-{self.backend}-{hash_json([own, self.setting])[:8]}"


@dataclass(frozen=True, kw_only=True)
class Post:
    """Rows of a device.

    Args:
        session: the name that [`Devices.join`] gave. tab: the page's, as it was said there.
    """

    session: str = key(length=(1, 100), file=True)
    tab: str = key(length=(16, 64), file=True)
    rows: list[dict[str, Any]] = key(items=ROWS_A_POST, fewest=1)


def held(values: Any, schema: type, what: str) -> Any:
    """Plain values as a schema's dataclass: every key of it and no other one; else a [`Refusal`]."""
    names = [entry.name for entry in fields(schema)]
    if isinstance(values, Mapping) and (unknown := [name for name in values if name not in names]):
        raise Refusal(f"{what}: unknown key {shorten(unknown[0])}; the keys are {', '.join(names)}.")
    try:
        check(values, schema, what)
    except EdgeDiTError as error:
        raise Refusal(str(error)) from None
    return schema(**values)


@dataclass
class Device:
    """A device's measurement.

    Args:
        name: of its folder. setting: what its rows share. runs: ms by place. tab: the page that goes on with it.
    """

    name: str
    file: Path
    course: Course
    setting: dict[str, Any]
    runs: dict[tuple[str, str, int], float] = field(default_factory=dict)
    tab: str | None = None

    @property
    def whole(self) -> bool:
        """Whether every run is there."""
        return len(self.runs) == self.course.total

    def results(self) -> Results:
        """What a whole measurement comes to."""
        return summarise(read_rows(self.file), self.setting["bundle"], self.course.networks, str(self.file))

    def answer(self) -> dict[str, Any]:
        """What its page is told: how many runs are there and, at the end, what they come to."""
        told: dict[str, Any] = {"session": self.name, "count": len(self.runs), "total": self.course.total}
        if self.whole:
            results = self.results()
            told["summary"] = {
                "drift": results.drift,
                "throttled": results.throttled,
                "networks": {name: found.to_dict() for name, found in results.networks.items()},
            }
        return told


class Devices:
    """All devices of a bundle, and their results in a folder; the methods may be called from several threads.

    Args:
        folder: with a folder a device; what is there goes on.
        bundle: that is measured.

    Raises:
        EdgeDiTError: results in the folder are damaged.
    """

    def __init__(self, folder: Path, bundle: Bundle) -> None:
        self.folder, self.bundle, self.course = folder, bundle, Course.of(bundle)
        self.lock = threading.Lock()
        self.known: dict[str, Device] = {}
        self._room, self._since = ROWS_AT_ONCE, time.monotonic()
        for file in sorted(folder.glob(f"*/{RESULTS}")):
            if rows := read_rows(file):
                device = Device(file.parent.name, file, self.course, rows[0].setting)
                try:
                    self._add(device, rows)
                except EdgeDiTError as error:
                    raise EdgeDiTError(f"{file}: {error} Move {file.parent} elsewhere.") from None
                self.known[device.name] = device

    def join(self, values: Any) -> tuple[Device, dict[str, Any]]:
        """A page begins or goes on: its device, and what it is told: [`Device.answer`] and `done`, the numbers of the
        runs that are there, by network and phase. An earlier page of the same browser may send no more.
        """
        hello = held(values, Hello, "hello")
        if hello.bundle != self.bundle.hash:
            raise Refusal(
                f"This page measures the bundle {hello.bundle}, but {self.bundle.hash} is served now; reload it.", 409
            )
        with self.lock:
            device = self.known.get(hello.name)
            if device is None:
                silent = [name for name, found in self.known.items() if not found.runs]
                if len(self.known) - len(silent) >= DEVICES:
                    raise Refusal(
                        f"{DEVICES} devices have results in {self.folder} already; move some of them away and start "
                        "the server again.",
                        409,
                    )
                for name in silent[: max(0, len(self.known) + 1 - DEVICES)]:
                    del self.known[name]
                file = self.folder / hello.name / RESULTS
                device = self.known[hello.name] = Device(hello.name, file, self.course, hello.setting)
            device.tab = hello.tab
            done: dict[str, dict[str, list[int]]] = {}
            for network, phase, number in device.runs:
                done.setdefault(network, {}).setdefault(phase, []).append(number)
            return device, {**device.answer(), "done": done}

    def take(self, values: Any) -> tuple[Device, dict[str, Any]]:
        """Rows that a page sends: its device, and what it is told. They are on the disk afterwards; of rows that are
        refused none is taken.
        """
        post = held(values, Post, "post")
        rows = []
        for number, each in enumerate(post.rows):
            try:
                rows.append(row_of(each, f"row {number}"))
            except EdgeDiTError as error:
                raise Refusal(str(error)) from None
        with self.lock:
            device = self.known.get(post.session)
            if device is None or device.tab is None:
                raise Refusal("This server has started since; say hello again.", 409, "join")
            if device.tab != post.tab:
                raise Refusal("Another page of this browser goes on with the measurement.", 409)
            self._wait(len(rows))
            before = device.runs
            new = self._add(device, rows)
            try:
                if new:
                    append_rows(device.file, new)
            except EdgeDiTError as error:
                device.runs = before
                raise Refusal(str(error), 507, "later") from None
            return device, device.answer()

    def _add(self, device: Device, rows: Sequence[Row]) -> list[Row]:
        """Note rows; those that are new. Either all of them are noted or none."""
        runs, new = dict(device.runs), []
        for row in rows:
            if row.setting != device.setting:
                name = next(name for name, value in row.setting.items() if value != device.setting[name])
                ours, theirs = shorten(device.setting[name]), shorten(row.setting[name])
                raise Refusal(f"A row's {name} is {theirs}, but the device said {ours}.", 409)
            device.course.check(row)
            if row.place not in runs:
                runs[row.place] = row.ms
                new.append(row)
            elif runs[row.place] != row.ms:
                network, phase, number = row.place
                raise Refusal(
                    f"The {phase} run {number} of {network} is there with {runs[row.place]:g} ms, not {row.ms:g}.",
                    409,
                    "join",
                )
        device.runs = runs
        return new

    def _wait(self, count: int) -> None:
        """Raise a [`Refusal`] where rows come faster than a device can measure."""
        now = time.monotonic()
        self._room = min(ROWS_AT_ONCE, self._room + (now - self._since) * ROWS_A_SECOND)
        self._since = now
        if count > self._room:
            raise Refusal(f"More than {ROWS_A_SECOND:g} rows a second; wait a little.", 429, "later")
        self._room -= count
