"""Bad input everywhere: no traceback, no hang, no crash, nothing lost, nothing accepted that cannot work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_folder import make_run
from sweep_forks import BAD
from sweep_inputs import write_inputs

SWEEP = Path(__file__).with_name("sweep.py")
SHARE = {"quick": "0.004", "whole": "0.12"}
"""Of all cases, always the same ones: a full sweep takes hours."""


def sweep(results: Path, *arguments: str) -> set[str]:
    """Names of the bad cases."""
    command = [sys.executable, str(SWEEP), "--results", str(results), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    print(result.stdout[-6000:])
    assert result.returncode in (0, 1) and "cases," in result.stdout, result.stderr[-3000:]
    return {
        each["name"] for each in map(json.loads, results.read_text().splitlines()) if each["class"] in (*BAD, "harness")
    }


def test_a_sample_of_options_recipe_keys_and_files_of_a_run(tmp_path, make_transformer):
    make_run(tmp_path / "run", make_transformer())
    write_inputs(tmp_path)
    assert sweep(tmp_path / "results.jsonl", "--quick", "--fixtures", str(tmp_path), "--share", SHARE["quick"]) == set()


@pytest.mark.slow
@pytest.mark.sweep
def test_a_share_of_the_whole_sweep(tmp_path):
    assert sweep(tmp_path / "results.jsonl", "--share", SHARE["whole"]) == set()
