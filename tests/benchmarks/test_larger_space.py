"""The benchmark of a larger space on a menu's bank of the debug run's teacher, at its smallest."""

import json
import shutil

import pytest

MENU = "[{mlp_ratio: 2}, {attention_dim: 16}, {mlp_ratio: 1}, {merge: 2}, {merge: 3}]"


@pytest.mark.slow
def test_two_searches_of_a_menus_run(benchmark, debug_run, recipes, tmp_path):
    run = tmp_path / "menu"
    shutil.copytree(debug_run / "extractor", run / "extractor")
    options = [f"teacher.path={debug_run / 'teacher'}", f"bank.menu={MENU}"]
    recipes.run_here("distill_proxies", run, *options, "bank.steps=1", "bank.calibration_samples=8")
    recipes.run_here("measure_latency", run, *options, "latency.repeats=3")
    overrides = [part for option in (f"output_dir={run}", *options) for part in ("--override", option)]
    config = recipes.arguments("", run)[2]
    arguments = ("--config", config, *overrides, "--evaluations", 9, "--seeds", 1, "--samples", 16)
    table, result = benchmark("larger_space.py", *arguments)

    choices = {(row["merge"], row["option"]): row for row in result["choices"]}
    assert set(choices) == {(1, "mlp2"), (1, "attn16"), (1, "mlp1"), (2, "original"), (3, "original")}
    assert choices[1, "mlp1"]["saved_weights"] == 2 * 32 * 3 * 32 + 3 * 32  # of 4 · 32 neurons 3 · 32 go, with biases
    assert choices[3, "original"]["saved_weights"] == 2 * choices[2, "original"]["saved_weights"]
    assert choices[2, "original"]["places"] == 3 and choices[3, "original"]["places"] == 2
    (row,) = result["searches"]
    assert result["ratio"] == row["ratio"] == row["menu"] / row["paper"]
    assert all(row["fronts"].values()) and len(table) > 8
    papers = {name for name in row["new_choices"] if name in ("mlp2", "attn16", "merge2 original")}
    assert papers <= {"merge2 original"}  # the paper merges at even places alone

    kept = json.loads((run / "larger-space" / "distances-16-0.json").read_text())
    before = {file: file.stat().st_mtime_ns for file in (run / "larger-space").iterdir()}
    again = benchmark("larger_space.py", *arguments)[1]  # every distance is known
    assert again["searches"] == result["searches"] and len(kept) >= 9
    assert {file: file.stat().st_mtime_ns for file in before} == before
