"""The benchmark of exports at its smallest: every form of one layer and its figures."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_one_layer_in_every_form(repository):
    pytest.importorskip("executorch")
    command = [
        sys.executable,
        "benchmarks/export.py",
        "--parts",
        "blocks",
        "--layers",
        "1",
        "--repeats",
        "2",
        "--max-seconds",
        "5",
        "--json",
    ]
    done = subprocess.run(
        command, cwd=repository, env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])["blocks"]
    rows = {row["form"]: row for row in found["rows"]}
    errors = {
        "onnxruntime-fp32": 1e-5,
        "onnxruntime-fp16": 2e-3,
        "onnxruntime-int8": 5e-2,
        "executorch-fp32": 1e-5,
        "executorch-8da8w": 5e-2,
    }
    assert all(0 < rows[name]["error"] < largest for name, largest in errors.items())
    for small, large in (
        ("onnxruntime-int8", "onnxruntime-fp16"),
        ("onnxruntime-int4", "onnxruntime-int8"),
        ("executorch-8da4w", "executorch-8da8w"),
    ):
        assert rows[small]["bytes"] < 0.7 * rows[large]["bytes"]
    # The conditioner holds what the split denoiser lost, and the share of what XNNPACK did not take is small.
    split = {row["form"]: row for row in found["split"]}
    for runtime in ("onnxruntime-int8", "executorch-8da4w"):
        whole, denoiser, conditioner = (split[f"{runtime} {part}"] for part in ("whole", "denoiser", "conditioner"))
        assert (
            denoiser["bytes"] + conditioner["bytes"] < 1.05 * whole["bytes"]
            and denoiser["resident_bytes"] < whole["resident_bytes"]
        )
    assert all(share <= 0.1 for share in found["portable_share"].values())
