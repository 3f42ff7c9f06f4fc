"""Bad input everywhere: no traceback, no hang, no crash, nothing lost, nothing accepted that cannot work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_folder import make_run
from sweep_inputs import write_inputs

SWEEP = Path(__file__).with_name("sweep.py")
SHARE = {"quick": "0.012", "whole": "0.15"}
"""Of all cases, always the same ones: a full sweep takes hours."""


def sweep(*arguments: str) -> str:
    result = subprocess.run([sys.executable, str(SWEEP), *arguments], capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def test_a_sample_of_options_recipe_keys_and_files_of_a_run(tmp_path, make_transformer):
    make_run(tmp_path / "run", make_transformer())
    write_inputs(tmp_path)
    assert ", 0 bad," in sweep("--quick", "--fixtures", str(tmp_path), "--share", SHARE["quick"])


@pytest.mark.slow
def test_a_share_of_the_whole_sweep():
    assert ", 0 bad," in sweep("--share", SHARE["whole"])
