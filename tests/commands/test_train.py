"""`edgedit train`: exit codes and signals of a stage reach the user as they are, with one process and with two."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgedit_hf.commands.train import SCORE, SCRIPTS, find_script, split_options
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.run.stage import STAGES

ROOT = Path(__file__).parents[2]
EDGEDIT = Path(sys.executable).with_name("edgedit")


def start(output: Path, *arguments: str, processes: int = 1, stage: str = "teacher") -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    given = [part for value in (f"output_dir={output}", "threads=1", *arguments) for part in ("--override", value)]
    launch = [] if processes == 1 else ["--num_processes", str(processes)]
    command = [
        str(EDGEDIT),
        "train",
        stage,
        *launch,
        "--config",
        str(ROOT / "training" / "recipes" / "debug.yaml"),
        *given,
    ]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def said(stderr: str) -> list[str]:
    """What is no progress bar and no notice of a library's import."""
    lines = [line for part in stderr.splitlines() for line in part.split("\r")]
    return [
        line
        for line in lines
        if line.startswith(("error", "edgedit", "Stopped", "Interrupted", "interrupted", "Traceback", "E1", "W1 death"))
    ]


def test_every_stage_has_a_script_and_the_other_way_round():
    scripts = {path.name for path in (ROOT / "training").glob("*.py")} - {"__init__.py", "reference.py"}
    assert {find_script(stage).name for stage in SCRIPTS} == scripts == set(SCRIPTS.values())
    assert all(find_script(stage).is_file() for stage in SCRIPTS)
    with pytest.raises(EdgeDiTError, match="'teachers' does not exist; the stages are compress"):
        find_script("teachers")


def test_options_are_told_apart():
    from accelerate.commands.launch import launch_command_parser

    arguments = (
        "--num_processes 2 --config run.yaml --mixed_precision=bf16 --override a=--cpu --cpu --teacher x "
        "--dry-run --config_file f.yaml"
    ).split()
    ours, left = split_options(launch_command_parser(), arguments)
    assert ours == ["--num_processes", "2", "--mixed_precision=bf16", "--cpu", "--config_file", "f.yaml"]
    assert left == ["--config", "run.yaml", "--override", "a=--cpu", "--teacher", "x", "--dry-run"]


@pytest.mark.slow
def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    process = start(tmp_path / "run", "teacher.stps=3")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and len(said(err)) == 1 and "'teacher.stps'" in err and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.kills
def test_bad_input_of_two_processes_is_said_once(tmp_path):
    overrides = (
        "teacher.learning_rate=1e10",
        "teacher.max_grad_norm=0.0",
        "teacher.log_every=1",
        "teacher.warmup_steps=0",
        "teacher.steps=200",
    )
    process = start(tmp_path / "run", *overrides, processes=2)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and len(said(err)) == 1 and "error: teacher: " in said(err)[0], err
    process = start(tmp_path / "run", "teacher.stps=3", processes=2)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and len(said(err)) == 1, err


@pytest.mark.slow
@pytest.mark.kills
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "number, to_group", [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGTERM, True)]
)
def test_a_signal_saves_and_ends_with_its_code(tmp_path, processes, number, to_group):
    process = start(tmp_path / "run", "teacher.steps=3000", processes=processes)
    telemetry, deadline = tmp_path / "run" / "teacher" / "telemetry.jsonl", time.monotonic() + 200
    while not telemetry.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    (os.killpg if to_group else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    (line,) = said(err)
    assert line.startswith("Stopped at step") and "Run the same command to continue" in line
    assert len(list((tmp_path / "run" / "teacher" / "checkpoints").glob("step-*"))) == 1


@pytest.mark.slow
@pytest.mark.kills
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_at_any_moment_of_the_start(tmp_path, processes):
    for delay in (0.5, 2, 5, 8):
        process = start(tmp_path / "run", "teacher.steps=3000", processes=processes)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 130 and len(said(err)) == 1 and "Traceback" not in err, err


def test_the_help_says_what_every_stage_does(run_python):
    code = "from edgedit_hf.commands.cli import main; import sys; sys.argv = ['edgedit', 'train', '--help']; main()"
    lines = run_python(code).splitlines()
    assert [line.split() for line in lines[-len(STAGES) - 1 : -1]] == [[s.name, *s.label.split()] for s in STAGES]
    assert lines[-1].split()[0] == SCORE
