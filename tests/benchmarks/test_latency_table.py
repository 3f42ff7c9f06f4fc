"""The benchmark of the latency table at the smallest size: every network is there, judged and flagged."""

import importlib

import pytest


@pytest.mark.slow
def test_the_smallest_table(benchmark):
    arguments = ("--preset", "DiT-debug/2", "--layers", 4, "--kinds", "onnxruntime-fp32", "--repeats", 5)
    table, result = benchmark("latency_table.py", *arguments, "--max-seconds", 1)
    (row,) = result["rows"]
    said = row["prediction"]
    assert len(said["networks"]) == 16 and said["mean"] <= said["max"] and -1 <= said["kendall"] <= 1
    assert said["ratio"] == pytest.approx(said["mean"] / said["baseline"])
    assert f"{said['kendall']:.3f}" in table[1] and ("yes" in table[1]) == row["noisy"]
    assert any("below 20" in remark for remark in said["remarks"]) and row["protocol"]["rounds"] >= 5
    assert len(table) == 2 + len(said["remarks"])


@pytest.mark.slow
@pytest.mark.export
def test_what_the_choices_save_at_the_smallest(benchmark):
    arguments = ("--choices", "--preset", "DiT-debug/2", "--kinds", "onnxruntime-fp32", "--repeats", 5)
    table, result = benchmark("latency_table.py", *arguments, "--max-seconds", 1)
    rows = {row["choice"]: row for row in result["rows"]}
    assert rows["original"]["saved_ms"] == pytest.approx(0) and len(table) == 1 + len(rows)
    assert {"mlp2", "tokens2", "heads1"} <= set(rows) and all(row["two_layers_ms"] > 0 for row in rows.values())
    assert len(importlib.import_module("tables").latency_table(result)[""].splitlines()) == 2 + len(rows)
