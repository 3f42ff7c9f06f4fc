"""The benchmark of true-scale training steps runs with a small preset: three recipes as processes, measured against
their dry run.
"""

import pytest


@pytest.mark.slow
def test_the_first_stage(benchmark, tmp_path):
    arguments = ("--preset", "DiT-S/8", "--until", "teacher", "--classes", 10, "--steps", 2, "--folder", tmp_path)
    table, result = benchmark("xl_steps.py", *arguments)
    ((name, row),) = result["stages"].items()
    assert name == "teacher" and table[-1].split()[0] == "teacher" and result["steps"] == 2
    assert 0 < row["loss"] < 10 and 0 < row["step_seconds"] < row["all_seconds"] < 120
    assert 0.5 < row["peak_gb"] < 4 and 0.5 < row["expected_gb"] < 4
    assert list(tmp_path.iterdir()) == []  # it leaves nothing behind


@pytest.mark.slow
def test_every_training_stage_takes_real_steps(benchmark, tmp_path):
    arguments = ("--preset", "DiT-S/8", "--steps", 2, "--memory-budget-gb", 2, "--folder", tmp_path)
    table, result = benchmark("xl_steps.py", *arguments, "--check")
    stages = result["stages"]
    names = ["teacher", "bank", "student", "tune", "few-step"]
    assert [line.split()[0] for line in table[2:7]] == list(stages) == names
    assert 0 < stages["few-step"]["held_bytes"] < 0.5 * stages["few-step"]["separate_bytes"]
    for stage in ("teacher", "bank", "tune", "few-step"):
        assert 0 < stages[stage]["loss"] < 10 and 0 < stages[stage]["step_seconds"] < 60
        assert 0.5e9 < 1e9 * stages[stage]["peak_gb"] < 4e9
    assert stages["bank"]["proxies"] == 11 and stages["bank"]["groups"][0]["peak_gb"] <= 2 * 1.1
    assert list(tmp_path.iterdir()) == []  # it leaves nothing behind
