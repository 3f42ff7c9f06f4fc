"""The sensitivity study on a debug teacher: its table, and that a killed one continues to the same figures."""

import csv
import json
import shutil

import pytest

CHANGES = ["MLP ratio 1", "MLP ratio 2", "MLP ratio 3", "attention 16", "merge 2 → 1", "merge 3 → 1"]


@pytest.fixture(scope="module")
def study(recipes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "run"
    recipes.run_here("train_teacher", folder)
    return folder, recipes.printed_here("sensitivity", folder)


@pytest.mark.slow
def test_table_and_plot(recipes, study):
    folder, printed = study
    table = json.loads((folder / "sensitivity" / "table.json").read_text())
    rows = {}
    for row in table["rows"]:
        rows.setdefault(row["change"], []).append(row)
    assert list(rows) == CHANGES and [len(found) for found in rows.values()] == [
        5,
        5,
        5,
        5,
        4,
        3,
    ]  # every place, and all at once
    assert table["timesteps"] == [250, 750] and table["steps"] == 4
    for *places, everywhere in rows.values():
        assert everywhere["layer_after"] is None and everywhere["flops"] <= min(row["flops"] for row in places) < 1
        for row in (*places, everywhere):
            assert 0 < row["model_after"] < 1 and len(row["model_before_by_timestep"]) == 2
            assert row["model_after"] == pytest.approx(sum(row["model_after_by_timestep"]) / 2)
        assert all(0 < row["layer_after"] < 0.1 for row in places)
    assert rows["merge 3 → 1"][1]["layers"] == [[1, 2, 3]] and rows["merge 2 → 1"][-1]["layers"] == [[0, 1], [2, 3]]

    def median(name: str, quantity: str) -> float:
        return sorted(row[quantity] for row in rows[name][:-1])[1]

    assert (
        median("MLP ratio 1", "layer_before")
        > median("MLP ratio 2", "layer_before")
        > median("MLP ratio 3", "layer_before")
    )
    assert rows["MLP ratio 1"][-1]["model_before"] > max(row["model_before"] for row in rows["MLP ratio 1"][:-1])
    with open(folder / "sensitivity" / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(table["rows"]) and float(lines[0]["model_after"]) == table["rows"][0]["model_after"]
    text = (folder / "sensitivity" / "table.md").read_text()
    assert text in printed and text.count("\n|") == 2 + len(CHANGES)
    assert (folder / "sensitivity" / "plot.png").stat().st_size > 10_000
    stage = json.loads((folder / "sensitivity" / "stage.json").read_text())
    assert stage["changes"] == 6 and stage["places"] == 21 and list(stage["model_error_everywhere"]) == CHANGES
    assert text not in recipes.printed_here("sensitivity", folder)  # finished: nothing is done again


@pytest.mark.slow
@pytest.mark.kills
def test_killed_and_rerun_equals_uninterrupted(recipes, study, tmp_path):
    folder, _ = study
    killed = tmp_path / "run"
    shutil.copytree(folder / "teacher", killed / "teacher")
    seconds = json.loads((folder / "sensitivity" / "stage.json").read_text())["seconds"]
    delays = recipes.run_with_kills("sensitivity", killed, killed / "sensitivity" / "run.json", seconds, kills=2)
    for name in ("table.json", "table.csv", "table.md"):
        assert (killed / "sensitivity" / name).read_bytes() == (folder / "sensitivity" / name).read_bytes(), (
            f"killed after {delays} s"
        )


@pytest.mark.slow
def test_starts_alone_can_be_judged(recipes, study, tmp_path):
    folder, _ = study
    shutil.copytree(folder / "teacher", tmp_path / "run" / "teacher")
    recipes.run("sensitivity", tmp_path / "run", "sensitivity.steps=0", "sensitivity.samples=3")
    rows = json.loads((tmp_path / "run" / "sensitivity" / "table.json").read_text())["rows"]
    assert len(rows) == 27 and all(
        row["model_before"] == row["model_after"] and row["layer_before"] == row["layer_after"] for row in rows
    )
