"""Several runs on one page: what is set side by side, and what is not."""

import json
import re
import shutil

import pytest
from browser import Browser, needs_browser
from run_folder import NOTE, make_run

from edgedit_hf.commands.cli import main
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.report import merged
from edgedit_hf.report.merged import protocol_tables, read_run, run_names, write_merged


def change(path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def runs(make_transformer, tmp_path_factory):
    """Runs whose figures are made up: `one` and `two` were measured alike, `other` with another extractor, and
    `unjudged` was not evaluated.
    """
    root = tmp_path_factory.mktemp("runs")
    make_run(root / "one", make_transformer())
    change(root / "one" / "evaluate" / "reference.json", extractor_hash="a" * 16, data="d" * 64)
    for name in ("two", "other", "unjudged"):
        shutil.copytree(root / "one", root / name)
    change(root / "other" / "evaluate" / "reference.json", extractor_hash="b" * 16)
    change(root / "two" / "evaluate" / "teacher.json", class_agreement=0.5)
    shutil.rmtree(root / "unjudged" / "evaluate")
    return root


def test_results_of_one_protocol_share_a_table_and_others_do_not(runs):
    one, two, other, unjudged = (read_run(name, runs / name) for name in ("one", "two", "other", "unjudged"))
    together, apart = protocol_tables([one, other, two, unjudged])
    assert together["runs"] == ["one", "two"] and apart["runs"] == ["other"]
    said, *notes = together["judging"]
    assert said.startswith("± is a distance's standard error") and len(together["judging"]) == 3
    assert notes == [f"{name}: {NOTE} (student, before tuning)" for name in together["runs"]]
    names = [row[0] for row in together["rows"]]
    assert names[0] == "one: teacher" and names[5] == "two: teacher" and len(names) == 10
    agreement = together["header"].index("class agreement")
    assert [together["rows"][i][agreement] for i in (0, 5)] == ["97.0%", "50.0%"]
    assert [row[0] for row in apart["rows"]][0] == "other: teacher" and len(apart["rows"]) == 5
    changed = {key for key, value in one.protocol.items() if other.protocol[key] != value}
    assert changed == {"weights of the features"}


@pytest.mark.parametrize(
    ("file", "values", "key"),
    [
        ("evaluate/reference.json", {"data": "e" * 64}, "real images"),
        ("evaluate/reference.json", {"count": 65}, "images compared"),
        ("evaluate/reference.json", {"extractor": "another"}, "features"),
        ("evaluate/latency.json", {"threads": 7}, "threads"),
        ("evaluate/latency.json", {"batch_size": 7}, "images a forward"),
        ("evaluate/latency.json", {"environment": {"cpu": "another"}}, "processor"),
        ("evaluate/teacher.json", {"num_samples": 65}, "generated images"),
    ],
)
def test_whatever_a_figure_depends_on_keeps_tables_apart(runs, tmp_path, file, values, key):
    folder = shutil.copytree(runs / "one", tmp_path / "run")
    change(folder / file, **values)
    one, changed = read_run("one", runs / "one"), read_run("run", folder)
    assert {name for name, value in one.protocol.items() if changed.protocol[name] != value} == {key}
    assert len(protocol_tables([one, changed])) == 2


def test_steps_and_what_was_not_recorded_keep_tables_apart_and_seeds_do_not(runs, tmp_path):
    one = read_run("one", runs / "one")
    folder = shutil.copytree(runs / "one", tmp_path / "run")
    asked = json.loads((folder / "evaluate" / "run.json").read_text())
    asked["config"]["sampling"]["steps"] += 1
    (folder / "evaluate" / "run.json").write_text(json.dumps(asked))
    assert len(protocol_tables([one, read_run("run", folder)])) == 2
    old = shutil.copytree(runs / "one", tmp_path / "old")
    reference = json.loads((old / "evaluate" / "reference.json").read_text())
    del reference["extractor_hash"]
    (old / "evaluate" / "reference.json").write_text(json.dumps(reference))
    older = shutil.copytree(old, tmp_path / "older")
    assert len(protocol_tables([one, read_run("old", old), read_run("older", older)])) == 3
    seeded = shutil.copytree(runs / "one", tmp_path / "seeded")
    for name in ("state", "random"):
        state = json.loads((seeded / "search" / f"{name}.json").read_text())
        state["settings"]["seed"] = 6
        (seeded / "search" / f"{name}.json").write_text(json.dumps(state))
    change(seeded / "evaluate" / "stage.json", seed=6)
    other = read_run("seeded", seeded)
    (table,) = protocol_tables([one, other])
    assert table["seeds"] == "one 5, seeded 6"
    assert {each.key for each in one.samples}.isdisjoint(each.key for each in other.samples)  # of other noise


@pytest.fixture(scope="module")
def page_file(runs, tmp_path_factory):
    """The page of all of them."""
    folders = [runs / name for name in ("one", "two", "other", "unjudged")]
    return write_merged(folders, tmp_path_factory.mktemp("page") / "pages.html")


def data_of(html: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_the_page_says_what_differs_and_what_is_missing(page_file):
    html = page_file.read_text()
    assert "Not evaluated, and so in no table: unjudged; run the stage evaluate of it." in html
    assert re.search(r"<th scope=\"row\">weights of the features</th><td>a{16}</td><td>b{16}</td>", html)
    assert ">one: teacher<" in html and ">other: student, tuned<" in html
    assert len(re.findall('<img alt="[^"]{20,}" src="data:image/png', html)) == 7  # samples of three, searches of four
    data = data_of(html)
    apart = [[series["run"] for series in front["series"]] for front in data["fronts"]]
    assert apart == [["one"], ["two"], ["other"], ["unjudged"]]  # no latency table says that they are the same
    assert "These searches are drawn apart" in html
    assert {model["group"] for model in data["compare"]["models"]} == {0} and len(data["compare"]["models"]) == 15


def test_the_command_only_reads_the_runs_and_writes_over_its_own_page(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(merged, "_draw", lambda run, folder: [])
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    page = tmp_path / "pages.html"
    for names in (("one", "two", "other"), ("one", "two")):
        assert main(["report", *(str(runs / name) for name in names), "--output", str(page)]) == 0
        assert capsys.readouterr().out.strip() == str(page)
    assert len(data_of(page.read_text())["compare"]["models"]) == 10
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before


def test_searches_with_one_latency_table_are_overlaid(runs, device, tmp_path, monkeypatch):
    monkeypatch.setattr(merged, "_draw", lambda run, folder: [])
    folders = [shutil.copytree(runs / name, tmp_path / name) for name in ("one", "two", "other")]
    tables = [device("a", (30.0, 20.0, 12.0, 6.0)), device("b", (30.0, 8.0, 29.0, 7.0))]
    for folder, table in zip(folders, (tables[0], tables[0], tables[1])):
        table.to_json(folder / "latency" / "table.json")
    html = write_merged(folders, tmp_path / "page.html").read_text()
    fronts = data_of(html)["fronts"]
    assert [[series["run"] for series in front["series"]] for front in fronts] == [["one", "two"], ["other"]]
    assert "These searches are drawn apart" in html and tables[1].hash in html


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["one", "two"], "2 runs are given, but no --output"),
        (["one", "--output", "page.html"], "--output page.html is for the page of several runs"),
        (["one", "two", "--output", "page.html", "--table", "x.json"], "give one run"),
        (["one", "one/../one", "--output", "page.html"], "given twice"),
        (["one", "two", "--output", "."], "is a folder"),
        (["one", "two", "--output", "two"], "lies in the run"),
        (["one", "two", "--output", "two/report.html"], "lies in the run"),
        (["one", "two", "--output", "notes.txt"], "is no page of a report"),
        (["one", "nowhere", "--output", "page.html"], "nowhere is not a folder"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_one_line(runs, arguments, said, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    (runs / "notes.txt").write_text("mine")
    assert main(["report", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not (runs / "page.html").exists() and (runs / "notes.txt").read_text() == "mine"


def test_a_text_to_image_run_without_its_evaluation_is_named(tmp_path):
    (tmp_path / "elastic").mkdir()
    run = read_run("run", tmp_path)
    assert run.report is None and run.models == [] and run.samples == []
    with pytest.raises(EdgeDiTError, match="index.json does not exist"):
        read_run("nothing", tmp_path / "elastic")


def test_runs_are_told_apart_by_as_much_of_their_paths_as_it_takes(tmp_path):
    assert run_names([tmp_path / "a" / "demo", tmp_path / "b" / "demo"]) == ["a/demo", "b/demo"]
    assert run_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


@pytest.mark.browser
@needs_browser
def test_runs_are_compared_in_a_browser(page_file):
    with Browser() as page:
        page.phone()
        page.open(page_file.as_uri())
        page.wait("document.readyState === 'complete' && document.querySelector('#compare-stage').dataset.place")
        assert page.run("document.documentElement.scrollWidth") == 390
        names = page.run("[...document.querySelector('#compare-left').options].map(o => o.textContent)")
        assert names[0] == "one: teacher" and "other: student, tuned" in names
        assert page.run("[...document.querySelectorAll('[data-front] svg[role=listbox]')].length") == 4
        assert page.console == [] and page.blocked == []
        assert {url for url in page.requests if not url.startswith(("data:", "about:"))} == {page_file.as_uri()}
