"""Recording: what a script measured or a run wrote, with what it belongs to, and nothing of this machine."""

import importlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from edgedit_hf.errors import EdgeDiTError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
RANKING = {**json.loads((RESULTS / "ranking-digits.json").read_text(encoding="utf-8"))["result"], "figure": 0.123456789}


@pytest.fixture
def record(repository, monkeypatch, tmp_path):
    """The module, with results in a folder of their own."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    module = importlib.import_module("record")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return module


@pytest.fixture
def measure(record, monkeypatch):
    """`measure(NAME, …)`: the command line; the record that it wrote."""

    def run(name, *arguments):
        monkeypatch.setattr("sys.argv", ["record.py", name, *map(str, arguments)])
        record.main()
        return json.loads((record.RESULTS / f"{name}.json").read_text())

    return run


def test_a_script(record, measure, monkeypatch, capsys):
    monkeypatch.setattr(record, "checkout_of", lambda folder: ("f" * 40, True))
    size = "--layers 5 --choices 4 --points 4 --k 3"
    found = measure("small", "--", "programme.py", *size.split())
    assert found["command"] == f"python benchmarks/programme.py {size}" and found["kind"] == "programme"
    assert found["result"]["replacements"] == 4 * (5 + 4 + 3)
    assert (found["commit"], found["dirty"]) == ("f" * 40, True)
    assert found["title"].startswith("How long the integer programme takes") and found["machine"]["cores"] >= 1
    printed = capsys.readouterr().out
    assert "best under two caps" in printed and '{"replacements"' not in printed
    assert any(line.startswith("best under two caps") for line in found["printed"])


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_file_of_a_run_and_its_checkout(record, measure, tmp_path):
    checkout = tmp_path / "checkout"
    file = checkout / "runs" / "ranking.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(RANKING))
    with pytest.raises(EdgeDiTError, match=r"is in no git checkout .* record in a clone"):
        measure("study", "--of", file, "--command", "edgedit train rank")

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
        subprocess.run(["git", "-C", checkout, *identity, *arguments], check=True, capture_output=True)

    git("init")
    (checkout / "tracked").write_text("one")
    git("add", "tracked")
    git("commit", "-m", "One")
    found = measure("study", "--of", file, "--command", "edgedit train rank")
    assert found["kind"] == "ranking" and len(found["commit"]) == 40 and found["dirty"] is False
    assert found["result"]["figure"] == 0.123457 and found["command"] == "edgedit train rank"
    (checkout / "tracked").write_text("two")
    assert measure("study", "--of", file, "--command", "edgedit train rank")["dirty"] is True


@pytest.mark.parametrize(
    "values, said",
    [
        (
            {**RANKING, "extractor": "/home/me/run/extractor"},
            r"names '/home/me/run/extractor', which is this machine's",
        ),
        ({"rows": []}, r"neither the report.json of a run nor a ranking.json"),
        ({"correlations": 1}, r"lacks what the tables of its kind, 'ranking', need"),
        ({"models": [1]}, r"ranking.json is not whole \(.*\); make it again with edgedit report"),
        ({"models": [], "search": {"hypervolume": []}}, r"is not whole \(KeyError\('front'\)\)"),
    ],
)
def test_what_is_not_recorded(record, measure, monkeypatch, tmp_path, values, said):
    monkeypatch.setattr(record, "checkout_of", lambda folder: ("f" * 40, False))
    (tmp_path / "ranking.json").write_text(json.dumps(values))
    with pytest.raises(EdgeDiTError, match=said):
        measure("study", "--of", tmp_path / "ranking.json", "--command", "edgedit train rank")
    assert not record.RESULTS.exists()


@pytest.mark.parametrize("arguments", [["a"], ["a", "--of", "b"], ["A b", "--", "programme.py"]])
def test_what_is_no_command_line(measure, arguments):
    with pytest.raises(SystemExit):
        measure(*arguments)


def test_a_script_that_is_not_there(measure):
    with pytest.raises(EdgeDiTError, match=r"has no 'programs.py'; it has .*programme.py"):
        measure("a", "--", "programs.py")


def test_json_of_few_lines(record):
    value = {"a": [1, 2.5, None], "long": {f"key {n}": "x" * 20 for n in range(9)}, "ä": True}
    text = record.lines(value)
    assert json.loads(text) == value and '"a": [1, 2.5, null]' in text.splitlines()[1]
    assert max(map(len, text.splitlines())) <= 120
