"""The benchmark of true-scale training steps runs with a small preset: three recipes as processes, measured against
their dry run.
"""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_every_training_stage_takes_real_steps(repository, tmp_path):
    command = [
        sys.executable,
        "benchmarks/xl_steps.py",
        "--preset",
        "DiT-S/8",
        "--steps",
        "2",
        "--memory-budget-gb",
        "2",
        "--threads",
        "1",
    ]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path), "--json", "--check"],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    stages = json.loads(lines[-1])["stages"]
    assert [line.split()[0] for line in lines[2:6]] == list(stages) == ["teacher", "bank", "student", "tune"]
    for stage in ("teacher", "bank", "tune"):
        assert 0 < stages[stage]["loss"] < 10 and 0 < stages[stage]["step_seconds"] < 60
        assert 0.5e9 < 1e9 * stages[stage]["peak_gb"] < 4e9
    assert stages["bank"]["proxies"] == 11 and stages["bank"]["groups"][0]["peak_gb"] <= 2 * 1.1
    assert list(tmp_path.iterdir()) == []  # it leaves nothing behind
