"""The benchmarks against diffusers run at a small size and print what they promise; equal outputs are asserted here,
speed is not.
"""

import json
import os
import subprocess
import sys

import pytest

SMALL = ["--preset", "DiT-S/8", "--json", "--threads", "1"]


def run(repository, script: str, *arguments: str) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, repository / "benchmarks" / script, *SMALL, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_forward(repository):
    result = run(repository, "forward.py", "--batches", "1", "--repeats", "2")
    rows = {row["dtype"]: row for row in result["rows"]}
    assert rows["fp32"]["relative_error"] < 1e-5 and rows["bf16"]["relative_error"] < 5e-2
    assert all(
        row["ms"].keys() == {"ours", "diffusers", "matrices", "ours fused"} and row["speedup"] > 0
        for row in rows.values()
    )
    memory = result["memory"]
    assert memory["ours-fp32"]["weights"] == 2 * memory["ours-bf16"]["weights"] < memory["diffusers-fp32"]["weights"]
    assert memory["ours-fp32"]["peak"] > memory["ours-fp32"]["weights"] / 2


def test_sampling(repository):
    row = run(repository, "sampling.py", "--steps", "3", "--rounds", "1", "--dtypes", "fp32")["rows"][0]
    assert row["difference"] < 1e-4 and row["released"]["difference"] < 1e-4
    assert row["released"]["ratio"] < row["weight_ratio"] < 1


@pytest.mark.slow
def test_int8(repository):
    row = run(repository, "int8.py", "--batches", "2", "--repeats", "3")["rows"][0]
    assert 0 < row["relative_error"] < 0.1 and row["speedup"] > 0
