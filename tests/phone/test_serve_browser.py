"""The measuring page in a headless browser: a whole measurement, and what may happen to it on the way."""

import contextlib
import re
import signal
import time

import pytest
from browser import Browser, needs_browser
from phone_servers import free_port, process_of, server_of

from edgedit_hf.phone.devices import Course
from edgedit_hf.phone.results import read_rows, summarise

pytestmark = [pytest.mark.browser, needs_browser]


def state(page) -> str:
    return page.run("document.body.dataset.state")


def text(page, name) -> str:
    return page.run(f"document.getElementById('{name}').textContent")


def ready(page, url):
    page.open(url)
    page.wait("['ready', 'error'].includes(document.body.dataset.state)")
    assert state(page) == "ready", text(page, "status")


def begun(page, runs: int):
    """Until so many runs are through."""
    page.wait(f"document.getElementById('progress').value >= {runs} || document.body.dataset.state === 'error'")
    assert state(page) == "busy", text(page, "status")


def ended(page, seconds=120):
    page.wait("['done', 'error'].includes(document.body.dataset.state)", seconds)
    assert state(page) == "done", (text(page, "status"), page.console)


def whole(folder, bundle):
    """The rows of the one device, which are a whole measurement: every run once."""
    (file,) = folder.glob("*/results.csv")
    rows = read_rows(file)
    assert len({row.place for row in rows}) == len(rows) == Course.of(bundle).total
    summarise(rows, bundle.hash, list(bundle.networks))
    return rows


@contextlib.contextmanager
def at(bundle, tmp_path, web_runtime):
    """A server, and the address of its page."""
    with server_of(bundle, tmp_path, web_runtime) as server:
        yield server, f"http://127.0.0.1:{server.server_port}/{server.token.decode()}/"


def test_a_phone_measures_with_a_finger(small_bundle, tmp_path, web_runtime):
    with at(small_bundle, tmp_path, web_runtime) as (server, url), Browser() as page:
        page.phone()
        ready(page, url)
        assert page.run("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
        heights = (
            "[...document.querySelectorAll('button, select')].filter(b => b.offsetParent).map(b => b.offsetHeight)"
        )
        assert min(page.run(heights)) >= 44
        backends = text(page, "backends")
        assert "WebGPU" in backends and "not here: " in backends, "what is missing is named, and why"
        page.tap("#measure")
        begun(page, 1)
        assert page.run("document.getElementById('measure').offsetParent") is None
        ended(page)
        rows = whole(tmp_path / "results", small_bundle)
        assert {row.backend for row in rows} == {"wasm"} and page.run("crossOriginIsolated")
        assert {row.threads for row in rows} == {min(4, page.run("navigator.hardwareConcurrency"))}
        assert {row.version for row in rows} == {"1.30.0"} and "hrom" in rows[0].browser
        shown = page.run("[...document.querySelectorAll('#rows tr')].map(r => r.cells[0].textContent)")
        assert shown == list(small_bundle.networks)
        summary = summarise(rows, small_bundle.hash, list(small_bundle.networks))
        median = float(page.run("document.querySelector('#rows tr:last-child').cells[1].textContent").replace(",", ""))
        assert median == pytest.approx(summary.networks[shown[-1]].median_ms, rel=0.01, abs=0.006)
        heads = page.run("[...document.querySelectorAll('#result thead th')].map(c => c.textContent)")
        assert heads == ["network", "median (ms)", "p90 (ms)", "IQR (ms)", "load (ms)"]
        shown = page.run("[...document.querySelectorAll('#rows td:not(:first-child)')].map(c => c.textContent)")
        assert len(shown) == 4 * len(small_bundle.networks) and all(re.fullmatch(r"[\d,]+\.\d\d", one) for one in shown)
        assert page.run("document.documentElement.scrollWidth") == 390
        assert all(name.startswith((url, "data:", "about:", "blob:")) for name in page.requests), page.requests
        assert page.blocked == [] and not [line for line in page.console if line.startswith("error")]
        page.screenshot(tmp_path / "phone.png")
        # The same address again: all is there, and nothing is measured twice.
        ready(page, url)
        page.tap("#measure")
        ended(page)
        assert whole(tmp_path / "results", small_bundle) == rows


@pytest.mark.slow
def test_a_closed_page_goes_on_when_it_is_opened_again(small_bundle, tmp_path, web_runtime):
    with at(small_bundle, tmp_path, web_runtime) as (server, url), Browser() as page:
        ready(page, url)
        page.run("document.getElementById('measure').click()")
        begun(page, 20)
        page.open("about:blank")
        time.sleep(0.5)
        (device,) = server.devices.known.values()
        before = dict(device.runs)
        page.open(url)  # and of itself
        ended(page)
        rows = whole(tmp_path / "results", small_bundle)
        assert before.items() <= {row.place: row.ms for row in rows}.items()


@pytest.mark.slow
def test_a_cut_network_and_what_was_measured_meanwhile(small_bundle, tmp_path, web_runtime):
    with at(small_bundle, tmp_path, web_runtime) as (server, url), Browser() as page:
        ready(page, url)
        page.run("document.getElementById('measure').click()")
        begun(page, 10)
        offline = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        page.command("Network.emulateNetworkConditions", offline=True, **offline)
        page.wait("/does not answer.* kept here/.test(document.getElementById('connection').textContent)", 30)
        (device,) = server.devices.known.values()
        there = len(device.runs)
        waiting = int(page.run("document.getElementById('connection').textContent.match(/(\\d+) run/)[1]"))
        assert waiting > 0 and len(page.run("Object.keys(localStorage)")) > waiting
        time.sleep(1.5)
        assert len(device.runs) == there and state(page) == "busy"
        page.command("Network.emulateNetworkConditions", offline=False, **offline)
        ended(page)
        whole(tmp_path / "results", small_bundle)
        assert text(page, "connection") == "" and page.run("Object.keys(localStorage)") == ["edgedit client"]


@pytest.mark.slow
def test_a_killed_server_that_starts_again(small_bundle, tmp_path, web_runtime):
    folder, port = tmp_path / "results", free_port()
    with Browser() as page:
        with process_of(small_bundle, folder, port) as (process, url):
            ready(page, url)
            page.run("document.getElementById('measure').click()")
            begun(page, 15)
            process.send_signal(signal.SIGKILL)
            process.wait()
            page.wait("/does not answer/.test(document.getElementById('connection').textContent)", 30)
        before = {row.place: row.ms for row in read_rows(next(folder.glob("*/results.csv")))}
        with process_of(small_bundle, folder, port) as (process, again):
            assert again == url
            ended(page)
        rows = {row.place: row.ms for row in whole(folder, small_bundle)}
        assert before and before.items() <= rows.items()


@pytest.mark.slow
def test_little_memory_a_paused_page_and_a_lost_folder(small_bundle, tmp_path, web_runtime):
    with at(small_bundle, tmp_path, web_runtime) as (server, url), Browser() as page:
        source = "Object.defineProperty(navigator, 'deviceMemory', {value: 0.25})"  # 64 MiB: a network at a time
        page.command("Page.addScriptToEvaluateOnNewDocument", source=source)
        ready(page, url)
        page.run("document.getElementById('measure').click()")
        begun(page, 10)
        assert "3 groups, one after the other" in text(page, "groups")
        page.run("document.getElementById('stop').click()")
        page.wait("document.body.dataset.state === 'ready'")
        assert "Paused: " in text(page, "status") and text(page, "measure") == "Go on"
        (device,) = server.devices.known.values()
        page.run("document.getElementById('measure').click()")
        begun(page, 30)
        for _ in range(500):  # what is measured is sent some at a time
            if device.file.exists():
                break
            time.sleep(0.01)
        with server.devices.lock:  # the results are taken away
            device.file.unlink()
            device.runs = {}
        ended(page)
        whole(tmp_path / "results", small_bundle)


def test_what_the_page_says_when_it_cannot_go_on(small_bundle, tmp_path, web_runtime):
    with at(small_bundle, tmp_path, web_runtime) as (server, url), Browser() as page:
        ready(page, url)
        page.run("document.getElementById('measure').click()")
        begun(page, 5)
        (device,) = server.devices.known.values()
        device.tab = "another" * 4  # a second page of the same browser was opened
        page.wait("document.body.dataset.state === 'error'", 30)
        assert "Another page of this browser goes on with the measurement" in text(page, "status")
        page.run("document.getElementById('measure').click()")  # but this one may take it back
        ended(page)
        whole(tmp_path / "results", small_bundle)
        damaged = small_bundle.folder / "networks" / "teacher.onnx"
        damaged.write_bytes(b"x" * damaged.stat().st_size)
        page.run("localStorage.clear()")  # a new device
        page.command("Network.clearBrowserCache")
        ready(page, url)
        page.run("document.getElementById('measure').click()")
        page.wait("document.body.dataset.state === 'error'", 60)
        assert "teacher cannot be opened with WebAssembly: " in text(page, "status")
