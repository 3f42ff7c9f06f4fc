"""The benchmarks of sparse attention and of the stages run at a small size and print what they promise; speed is not
asserted.
"""

import json
import os
import subprocess
import sys

import pytest


def run(repository, script: str, *arguments: str) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, repository / "benchmarks" / script, "--json", "--threads", "1", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_attention(repository):
    result = run(
        repository,
        "attention.py",
        "--side",
        "16",
        "--kv-heads",
        "4",
        "--repeats",
        "2",
        "--runtimes",
        "onnxruntime-fp32",
    )
    (row,) = result["rows"]
    assert row["relative_error"] < 1e-5
    assert row["ms"].keys() == row["speedup"].keys() == {"core", "layer"} and row["ms"]["core"].keys() == row[
        "peak_bytes"
    ].keys() == {"full", "ASSA"}


@pytest.mark.slow
def test_stages(repository):
    rows = run(repository, "stages.py", "--heads", "4", "--latents", "32", "--repeats", "2")["rows"]
    assert list(rows) == ["PixArt", "A", "B", "C", "D"]
    flops = {variant: row["flops"] for variant, row in rows.items()}
    # By hand, A's attention at 256 tokens of width 288: 24 layers of self-attention and of attention to 2 + 256 text
    # tokens, two products each.
    assert flops["A"]["attention"] == 24 * 2 * 2 * 256 * (256 + 258) * 288
    assert flops["PixArt"]["attention"] == 24 * 2 * 2 * 256 * (256 + 256) * 288
    assert flops["A"]["attention"] > flops["B"]["attention"] > flops["D"]["attention"] > flops["C"]["attention"]
    assert flops["A"]["linear"] > flops["D"]["linear"] > flops["C"]["linear"] > flops["B"]["linear"]
    assert rows["D"]["weights"] > rows["C"]["weights"] > rows["B"]["weights"]
