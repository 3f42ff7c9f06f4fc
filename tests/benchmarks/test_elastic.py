"""The benchmark of elasticity runs at a small size and prints what it promises; its --check refuses networks that
learnt nothing alike.
"""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_it_trains_four_networks_and_states_both_counts(repository):
    recipe = repository / "training" / "recipes" / "debug-t2i.yaml"
    command = [
        sys.executable,
        repository / "benchmarks" / "elastic.py",
        "--json",
        "--config",
        recipe,
        "--model",
        "elastic-dit-debug",
    ]
    small = ["--steps", "3", "--batch-size", "4", "--validation-samples", "8", "--repeats", "2", "--threads", "1"]
    done = subprocess.run(
        [*command, *small], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *table, last = done.stdout.strip().splitlines()
    result = json.loads(last)
    assert list(result["loss_ratio"]) == list(result["forward_ratio"]) == ["tiny", "small", "full"]
    drawn = result["steps_in_supernet"]
    assert result["steps"] == drawn["full"] == 3 and drawn["tiny"] + drawn["small"] == 3
    assert all(0.8 < ratio < 1.25 for ratio in result["loss_ratio"].values())  # three steps do not take networks apart
    assert (
        result["switch_ms"] < 1
        and result["parameters"]["tiny"] < result["parameters"]["small"] < result["parameters"]["full"]
    )
    assert f"ratio {result['time_ratio']:.3f}" in table[-1]
