"""The benchmark of the forward against diffusers' at a small size: equal outputs are asserted here, speed is not."""

import pytest


@pytest.mark.slow
def test_fp32(benchmark):
    arguments = ("--preset", "DiT-S/8", "--batches", 1, "--repeats", 2, "--dtypes", "fp32")
    _, result = benchmark("forward.py", *arguments, children=True)  # they measure their own memory
    (row,) = result["rows"]
    assert row["relative_error"] < 1e-5 and row["speedup"] > 0
    assert result["memory"]["ours-fp32"]["weights"] < result["memory"]["diffusers-fp32"]["weights"]


@pytest.mark.slow
def test_both_precisions(benchmark):
    arguments = ("--preset", "DiT-S/8", "--batches", 1, "--repeats", 2)
    _, result = benchmark("forward.py", *arguments, children=True)  # they measure their own memory
    rows = {row["dtype"]: row for row in result["rows"]}
    assert rows["fp32"]["relative_error"] < 1e-5 and rows["bf16"]["relative_error"] < 5e-2
    assert all(
        row["ms"].keys() == {"ours", "diffusers", "matrices", "ours fused"} and row["speedup"] > 0
        for row in rows.values()
    )
    memory = result["memory"]
    assert memory["ours-fp32"]["weights"] == 2 * memory["ours-bf16"]["weights"] < memory["diffusers-fp32"]["weights"]
    assert memory["ours-fp32"]["peak"] > memory["ours-fp32"]["weights"] / 2
