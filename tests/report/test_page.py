"""The page of a report in a browser: what a reader clicks, drags and types, on a desktop and on a phone, and without
scripts.
"""

import json
import re
from html import escape

import numpy as np
import pytest
from browser import Browser, needs_browser
from run_folder import METRIC, NOTE, make_run
from safetensors.numpy import load_file, save_file

from edgedit_hf.report.edgedit import write_report
from edgedit_hf.report.page import in_script

ODD = '</script><img src="x" onerror="alert(1)"> & "odd"'
FILE = "odd-model"


@pytest.fixture(scope="module")
def report(make_transformer, tmp_path_factory):
    """The page of a run whose figures are made up, with names that are HTML."""
    run = make_run(tmp_path_factory.mktemp("page") / "run <i>one", make_transformer())
    (run / "labels" / "transformer").mkdir(parents=True)
    (run / "labels" / "transformer" / "config.json").write_text('{"num_classes": 3}')
    index = {"_class_name": "EdgeDiTPipeline", "id2label": {"0": ODD, "1": "a cat", "2": "a dog"}}
    (run / "labels" / "model_index.json").write_text(json.dumps(index))
    teacher = json.loads((run / "evaluate" / "teacher.json").read_text())
    (run / "evaluate" / "teacher.json").write_text(json.dumps({**teacher, "folder": "labels"}))
    odd = {**teacher, "name": FILE, "stage": "exported", "latency_ms": {"onnxruntime-fp32": 11.0}, "grid": None}
    odd |= {"metrics": {METRIC: 1.8}, "standard_errors": {METRIC: 0.09}}
    (run / "evaluate" / "odd.json").write_text(json.dumps(odd))
    images = np.random.default_rng(5).integers(0, 256, (32, 1, 8, 8), dtype=np.uint8)
    save_file({"images": images}, run / "evaluate" / f"{FILE}.safetensors")
    lines = [{"step": s, "seconds": s / 4, "loss": 2.0 / s, "gradient": float(s), "note": ODD} for s in range(1, 501)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "student-tuned" / "telemetry.jsonl").write_text(text)
    return write_report(run)


def embedded(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def cells(page: Browser, column: int) -> list[str]:
    """The first table's column."""
    return page.run(f"[...document.querySelector('table').tBodies[0].rows].map(r => r.cells[{column}].textContent)")


def test_nothing_that_users_named_is_markup(report):
    html = report.read_text()
    assert html.count("</script>") == 2 and 'onerror="alert' not in html and "<i>one" not in html
    assert "run &lt;i&gt;one" in html
    data = embedded(html)
    assert data["compare"]["groups"][0]["words"][:2] == [ODD, "a cat"]
    assert [model["name"] for model in data["compare"]["models"]][-1] == FILE
    text = in_script({"a": "</script><!--&\u2028é"})
    assert not re.search("[<>&\u2028é]", text) and json.loads(text) == {"a": "</script><!--&\u2028é"}


def test_what_has_to_be_known_of_distances_is_said(report):
    html = report.read_text()
    assert f"<li>{escape(NOTE)} (student, before tuning)</li>" in html and NOTE not in html
    assert html.count("± is a distance&#39;s standard error") == 1


def test_the_policy_allows_what_is_in_the_page_alone(report):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', report.read_text())[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.replace("&#39;", "'").split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert all(re.fullmatch(r"'sha256-[\w+/=]{44}'", rules[f"{kind}-src"]) for kind in ("style", "script"))


def shown(page: Browser, side: int) -> np.ndarray:
    """The pixels of a side's canvas, from a copy: shape (8, 8)."""
    values = page.run(
        "(c => { const copy = document.createElement('canvas').getContext('2d', {willReadFrequently: true}); "
        "copy.drawImage(c, 0, 0); return [...copy.getImageData(0, 0, c.width, c.height).data] })"
        f"(document.querySelectorAll('#compare-stage canvas')[{side}])"
    )
    return np.array(values).reshape(8, 8, 4)[..., 0]


def choose(page: Browser, selector: str, text: str) -> None:
    """Take an option of a select, as a reader does."""
    page.run(
        f"(s => {{ s.selectedIndex = [...s.options].findIndex(o => o.textContent === {json.dumps(text)}); "
        f"s.dispatchEvent(new Event('change')) }})(document.querySelector({json.dumps(selector)}))"
    )


def opened(page: Browser, report) -> None:
    page.open(report.as_uri())
    page.wait("document.readyState === 'complete' && document.querySelector('#compare-stage').dataset.place")


def quiet(page: Browser, report) -> None:
    """Nothing was asked for beside the file, and nothing went wrong."""
    assert {url for url in page.requests if not url.startswith(("data:", "about:"))} == {report.as_uri()}
    assert page.blocked == [] and page.console == []


@pytest.mark.browser
@needs_browser
def test_a_reader_at_a_desk(report):
    with Browser("--window-size=1200,900") as page:
        opened(page, report)
        # The table: by a header, with the mouse and with the keyboard; what is missing stands last either way.
        header = page.run("[...document.querySelector('table').tHead.rows[0].cells].map(c => c.textContent)")
        column, models = header.index("ONNX Runtime int8 (ms)"), cells(page, 0)
        place = f"table th:nth-child({column + 1}) button"
        left, top, width, height = page.place(place)
        page.mouse(*((kind, left + width / 2, top + height / 2) for kind in ("Pressed", "Released")))
        assert cells(page, column) == ["2.50", "2.50", "4.00", "–", "–", "–"]
        assert page.run(f"document.querySelector('table th:nth-child({column + 1})').ariaSort") == "ascending"
        page.press("Enter")
        assert cells(page, column) == ["4.00", "2.50", "2.50", "–", "–", "–"]
        page.press("Enter")
        assert cells(page, 0) == models
        column = header.index("Fréchet distance (digits-cnn, n=64)")
        page.run(f"document.querySelector('table th:nth-child({column + 1}) button').click()")
        assert cells(page, column)[:4] == ["1.6 ± 0.080", "1.7 ± 0.085", "1.75 ± 0.087", "1.8 ± 0.090"]  # no texts
        column = header.index("parameters")
        page.run(f"document.querySelector('table th:nth-child({column + 1}) button').click()")
        units = {"k": 1e3, "M": 1e6}
        sizes = [float(size.split()[0]) * units[size.split()[1]] for size in cells(page, column)]
        assert sizes == sorted(sizes) and len(set(sizes)) == 2

        # Two models at the same seed: the images of the file, the divide by keyboard and by mouse.
        run = report.parent / "evaluate"
        judged = {name: load_file(run / f"{name}.safetensors")["images"] for name in ("teacher", "student-tuned", FILE)}
        assert (shown(page, 0) == judged["teacher"][0, 0]).all()
        assert (shown(page, 1) == judged["student-tuned"][0, 0]).all()
        choose(page, "#compare-what", "a dog")
        choose(page, "#compare-nth", "4")
        page.wait("document.querySelector('#compare-stage').dataset.place === '11'")
        choose(page, "#compare-right", FILE)
        page.wait(f"document.querySelector('#compare-sides').lastChild.textContent === {json.dumps(FILE)}")
        page.wait(f"document.querySelector('#compare-slider').ariaValueText.includes({json.dumps(FILE)})")
        assert (shown(page, 0) == judged["teacher"][11, 0]).all() and (shown(page, 1) == judged[FILE][11, 0]).all()
        assert page.run("document.querySelector('#compare-says').textContent") == "class: a dog"
        page.run("document.querySelector('#compare-slider').focus()")
        page.press(*["ArrowRight"] * 5)
        clip = "document.querySelectorAll('#compare-stage canvas')[1].style.clipPath"
        assert page.run(clip) == "inset(0px 0px 0px 55%)"
        left, top, width, height = page.place("#compare-stage")
        middle = top + height / 2
        page.mouse(("Pressed", left + width / 2, middle), ("Moved", left + width / 5, middle))
        assert (
            page.run(clip) == "inset(0px 0px 0px 20%)"
            and page.run("document.querySelector('#compare-slider').value") == "20"
        )
        page.mouse(("Released", left + width / 5, middle), ("Moved", left + width / 2, middle))
        assert page.run(clip) == "inset(0px 0px 0px 20%)"

        # The search: the picture is replaced; a point says its genotype when it is focused or pointed at.
        assert page.run("document.querySelector('[data-static]').offsetParent") is None
        points = embedded(report.read_text())["fronts"][0]["series"][0]["points"]
        assert page.run("document.querySelectorAll('.mark[role=option]').length") == len(points)
        page.run("document.querySelector('.mark[tabindex=\"0\"]').focus()")
        facts = "document.querySelector('.facts').innerText"
        hash_of = lambda point: point["facts"][-1][1]  # noqa: E731
        (chosen,) = [point for point in points if point["kind"] == "chosen"]
        assert "chosen student" in page.run(facts) and hash_of(chosen) in page.run(facts)
        page.press("Home")
        assert hash_of(points[0]) in page.run(facts)
        page.press("ArrowRight", "ArrowRight", "ArrowLeft")
        assert hash_of(points[1]) in page.run(facts)
        label = page.run("document.activeElement.getAttribute('aria-label')")
        first, count, option = points[1]["strip"][0]
        assert f"{f'{first}–{first + count - 1} merged' if count > 1 else first}" in label
        assert embedded(report.read_text())["fronts"][0]["series"][0]["options"][option]["label"] in label
        page.press("End")
        assert hash_of(points[-1]) in page.run(facts)
        left, top, width, height = page.place('.mark[aria-posinset="1"]')
        page.mouse(("Moved", left + width / 2, top + height / 2))
        assert hash_of(points[0]) in page.run(facts)

        # Telemetry: a metric is chosen, the curve is read.
        output = "document.querySelector('#stages output').textContent"
        assert page.run(output) == "step 500: loss 0.004004"  # the mean over the last two
        choose(page, "#stages select", "gradient")
        assert page.run(output) == "step 500: gradient 499.5"
        page.run("document.querySelector('#stages svg').focus()")
        page.press("Home")
        assert page.run(output) == "step 3: gradient 2"
        choose(page, "#stages select", "steps a second")
        assert page.run(output) == "step 500: steps a second 4"
        quiet(page, report)


@pytest.mark.browser
@needs_browser
def test_a_reader_on_a_phone_in_the_dark(report):
    with Browser() as page:
        page.phone()
        scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
        page.command("Emulation.setEmulatedMedia", features=scheme)
        opened(page, report)
        assert page.run("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
        assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
        box = "document.querySelector('.scroll')"
        assert page.run(f"{box}.scrollWidth > {box}.clientWidth") and page.run(f"{box}.tabIndex") == 0
        page.tap('.mark[aria-posinset="1"]')
        points = embedded(report.read_text())["fronts"][0]["series"][0]["points"]
        assert points[0]["facts"][-1][1] in page.run("document.querySelector('.facts').innerText")
        page.tap("#compare-stage")
        left, top, width, height = page.place("#compare-stage")
        touch = [{"x": left + 0.9 * width, "y": top + height / 2}]
        page.command("Input.dispatchTouchEvent", type="touchStart", touchPoints=touch)
        page.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        assert page.run("document.querySelector('#compare-slider').value") == "90"
        page.tap("table th:nth-child(2) button")
        assert page.run("document.querySelector('table th:nth-child(2)').ariaSort") == "ascending"
        assert page.run("document.documentElement.scrollWidth") == 390
        sizes = page.run(
            "[...document.querySelectorAll('select')].filter(s => s.offsetParent).map(s => s.offsetHeight)"
        )
        assert min(sizes) >= 44
        quiet(page, report)


@pytest.mark.browser
@needs_browser
def test_a_reader_without_scripts_has_pictures_and_tables(report):
    with Browser() as page:
        page.phone()
        page.command("Emulation.setScriptExecutionDisabled", value=True)
        page.open(report.as_uri())
        page.wait("document.readyState === 'complete'")
        images = page.run("[...document.images].map(i => i.naturalWidth > 0 && i.offsetParent !== null)")
        assert images and all(images)
        assert page.run("[...document.querySelectorAll('.widget')].every(w => w.offsetParent === null)")
        assert page.run("document.querySelector('table').innerText.includes('student, tuned')")
        assert page.run("document.documentElement.scrollWidth") == 390
        quiet(page, report)
