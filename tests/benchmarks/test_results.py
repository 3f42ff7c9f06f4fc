"""Every figure of the pages that a record holds is the record's: no page has a typed one."""

import importlib
import json

import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.private import local_paths
from edgedit_hf.records import Ranking
from edgedit_hf.schema import check

RECORD = {
    "format": "edgedit-record-1",
    "kind": "programme",
    "title": "What it is.",
    "command": "python benchmarks/programme.py --k 8",
    "commit": "0" * 40,
    "dirty": False,
    "date": "2026-11-28",
    "machine": {"cpu": "a <processor>", "cores": 2, "threads": 1, "versions": {"torch": "2.13.0", "numpy": "2.4.6"}},
    "printed": ["printed | as it was"],
    "result": {"replacements": 1296, "rows": {"best": {"seconds": 0.125, "solutions": 1, "score": 0.5}}},
}


@pytest.fixture
def results(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return importlib.import_module("results")


@pytest.fixture
def site(results, tmp_path, monkeypatch):
    """A README with a mark and a page of results, beside one record."""
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (folder / "speed.json").write_text(json.dumps(RECORD))
    (tmp_path / "README.md").write_text("Before\n<!-- results: speed -->\ntyped: 0.01\n<!-- /results -->\nAfter\n")
    (tmp_path / "docs" / "results.md").write_text("<!-- results: all -->\n<!-- /results -->\n")
    for name, value in {"ROOT": tmp_path, "RESULTS": folder, "PAGE": tmp_path / "docs" / "results.md"}.items():
        monkeypatch.setattr(results, name, value)
    return tmp_path


def test_the_pages_have_the_tables_of_the_records(results):
    pages = list(results.pages())
    assert results.PAGE in pages and len(pages) >= 3
    for page in pages:
        assert results.filled(page) == page.read_text(encoding="utf-8"), f"{page.name}: run make results"


def test_every_record_is_whole_and_names_no_machine(results):
    records = {path.stem: results.read(path) for path in sorted(results.RESULTS.glob("*.json"))}
    scripts = {path.stem for path in (results.ROOT / "benchmarks").glob("*.py")}
    page = results.PAGE.read_text(encoding="utf-8")
    for name, record in records.items():
        assert record["kind"] in scripts | {"run", "ranking"}
        assert list(local_paths(json.dumps(record))) == []
        assert f"### {name}\n" in page and len(record["commit"]) == 40
    rankings = [record["result"] for record in records.values() if record["kind"] == "ranking"]
    assert {ranking["extractor"] for ranking in rankings} >= {"digits-cnn", "fashion_mnist-cnn"}
    for ranking in rankings:
        check(ranking, Ranking, "ranking")
        assert len(ranking["genotypes"]) >= 12


def test_a_typed_figure_is_found_and_replaced(results, site, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["results.py", "--check"])
    with pytest.raises(EdgeDiTError, match=r"README.md, docs/results.md has other tables .* make results"):
        results.main()
    monkeypatch.setattr("sys.argv", ["results.py"])
    results.main()
    assert capsys.readouterr().out.split() == ["README.md", "docs/results.md"]
    readme = (site / "README.md").read_text()
    assert "| best | 0.12 | 1 | 0.500 |" in readme and "typed" not in readme
    assert "](docs/results.md#speed)" in readme and readme.startswith("Before\n") and readme.endswith("\nAfter\n")
    page = (site / "docs" / "results.md").read_text()
    assert "### speed\n" in page and "2026-11-28" in page and "commit 0000000;" in page and "numpy" not in page
    assert "a &lt;processor&gt;, 2 cores, 1 thread; torch 2.13.0." in page
    monkeypatch.setattr("sys.argv", ["results.py", "--check"])
    results.main()
    (site / "README.md").write_text(readme.replace("0.12", "0.01"))
    with pytest.raises(EdgeDiTError, match=r"^README.md has other tables"):
        results.main()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"format": "edgedit-record-0"}, r"speed.json does not describe a record of results: format is .*record-0"),
        ({"machine": "a laptop"}, r"machine is 'a laptop' \(str\); it must be keys and values"),
        ({"commit": None}, r"commit is None"),
        (
            {"result": {"rows": {}}},
            r"lacks what the tables of its kind, 'programme', need \(KeyError\('replacements'\)\); measure it again",
        ),
    ],
)
def test_a_record_of_another_layout(results, site, change, said):
    (results.RESULTS / "speed.json").write_text(json.dumps({**RECORD, **change}))
    with pytest.raises(EdgeDiTError, match=said):
        results.filled(site / "README.md")


@pytest.mark.parametrize(
    "name, said",
    [("speeds", r"asks for the record 'speeds'; .* has speed\."), ("speed/b", r"the table 'speed/b'; .* has ''\.")],
)
def test_a_mark_without_a_table(results, site, name, said):
    (site / "README.md").write_text(f"<!-- results: {name} -->\n<!-- /results -->\n")
    with pytest.raises(EdgeDiTError, match=said):
        results.filled(site / "README.md")


@pytest.mark.parametrize(
    "text, line",
    [
        ("a\n<!-- results: speed -->\n\nprose\n\n<!-- results: speed -->\n<!-- /results -->\n", 2),
        ("a\n\n<!-- /results -->\n", 3),
        ("<!-- results: speed -->\n<!-- /results -->\n<!-- results: speed -->\nprose\n", 3),
    ],
)
def test_marks_that_do_not_belong_together_lose_no_prose(results, site, text, line):
    (site / "README.md").write_text(text)
    assert site / "README.md" in set(results.pages())
    with pytest.raises(EdgeDiTError, match=rf"README.md, line {line}: <!-- .*results.* has no other mark"):
        results.filled(site / "README.md")
    assert (site / "README.md").read_text() == text


def test_a_kind_without_tables_is_shown_as_it_was_printed(results, site):
    (results.RESULTS / "speed.json").write_text(json.dumps({**RECORD, "kind": "stages"}))
    assert "```text\nprinted | as it was\n```" in results.filled(site / "README.md")
