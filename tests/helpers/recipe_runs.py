"""Running recipes as a user does: as processes."""

import contextlib
import io
import os
import random
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgedit_hf.commands import cli
from edgedit_hf.commands.train import find_script, split_options

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ROOT / "training"
BIN = Path(sys.executable).parent

DEBUG_COMMANDS = {
    "debug": "edgedit train compress --config training/recipes/debug.yaml",
    "debug-t2i": "edgedit train text-to-image --config training/recipes/debug-t2i.yaml",
}
"""What makes the shared runs, as the documentation has it."""


class Recipes:
    """Starts recipes of this checkout with one thread each, at debug scale."""

    root = ROOT
    tiny = (
        *"teacher.hidden_size=32 teacher.num_layers=2 teacher.num_heads=2 teacher.steps=4 teacher.batch_size=8 "
        "bank.steps=2 bank.both_steps=1".split(),
        *"bank.calibration_samples=8 bank.batch_size=4 latency.repeats=3 latency.batch_size=2 search.evaluations=4 "
        "search.initial=3".split(),
        *"search.samples=16 search.sampling_steps=1 student.max_latency_ratio=null".split(),
        "student.max_parameters_ratio=null",
        *"rank.genotypes=4 rank.groups=2 rank.steps=2 rank.samples=16 rank.held_out=2".split(),
        *"student.max_flops_ratio=null tune.steps=2 tune.batch_size=8".split(),
        *"evaluate.samples=16 sampling.steps=1".split(),
        *"evaluate.extractor_steps=5 evaluate.grid=1 evaluate.latency_batch_size=2 evaluate.latency_repeats=3".split(),
    )
    """Overrides that make any recipe smaller than debug.yaml."""

    @staticmethod
    def environment(threads: int = 1) -> dict[str, str]:
        return {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONUNBUFFERED": "1",
        }

    @staticmethod
    def arguments(name: str, output: Path, *overrides: str, config: str = "debug.yaml") -> list[str]:
        values = (f"output_dir={output}", "threads=1", *overrides)
        options = [part for value in values for part in ("--override", value)]
        return [str(TRAINING / f"{name}.py"), "--config", str(TRAINING / "recipes" / config), *options]

    def run(
        self,
        name: str,
        output: Path,
        *overrides: str,
        launcher: list[str] | None = None,
        check: bool = True,
        timeout: int = 600,
        config: str = "debug.yaml",
    ):
        command = [*(launcher or [sys.executable]), *self.arguments(name, output, *overrides, config=config)]
        result = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=timeout)
        if check:
            assert result.returncode == 0, (
                f"{name} ended with {result.returncode}:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
            )
        return result

    def shell(
        self, command: list[str], cwd: Path, expect: int = 0, timeout: int = 900, stderr: Path | None = None
    ) -> str:
        """A command as a user types it, with this environment's programs on the path; returns its stdout.

        `stderr`: a file for what it says there.
        """
        environment = {**self.environment(), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == expect, (
            f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        )
        if stderr is not None:
            stderr.write_text(done.stderr)
        return done.stdout

    def here(self, command: list[str], cwd: Path, expect: int = 0) -> str:
        """[`shell`] of an `edgedit …` in this process, which spares the imports. A stage starts without accelerate's
        launcher and its options, which have tests of their own. What it says on stderr stays there.
        """
        from accelerate.commands.launch import launch_command_parser

        program, *arguments = command
        assert program == "edgedit", f"{shlex.join(command)} is no command of edgedit"
        said, errors, code = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
            patch.chdir(cwd)
            try:
                with contextlib.redirect_stderr(errors):
                    if arguments[0] == "train":
                        rest = split_options(launch_command_parser(), arguments[2:])[1]
                        _run_script([str(find_script(arguments[1])), *rest])
                    else:
                        code = cli.main(arguments)
            except SystemExit as ended:
                code = ended.code
        sys.stderr.write(errors.getvalue())
        assert (code or 0) == expect and "Traceback" not in errors.getvalue(), (
            f"{shlex.join(command)} ended with {code}:\n{said.getvalue()[-2000:]}\n{errors.getvalue()[-3000:]}"
        )
        return said.getvalue()

    def run_here(self, name: str, output: Path, *overrides: str, config: str = "debug.yaml") -> None:
        """Run in this process, which spares the imports; bad input ends with `SystemExit`."""
        _run_script(self.arguments(name, output, *overrides, config=config))

    def printed_here(self, name: str, output: Path, *overrides: str) -> str:
        """What [`run_here`] prints, of a run that ends well."""
        return self.here(["edgedit", "train", *self.arguments(name, output, *overrides)], ROOT)

    def start(self, name: str, output: Path, *overrides: str, config: str = "debug.yaml") -> subprocess.Popen:
        command = [sys.executable, *self.arguments(name, output, *overrides, config=config)]
        return subprocess.Popen(
            command,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def interrupted(self, name: str, output: Path, marker: Path, *overrides: str, config: str = "debug.yaml") -> bool:
        """Run and press Ctrl-C as soon as `marker` is there, which ends it with 130 and one line that says how to go
        on. False: it had finished before the signal came.
        """
        process = self.start(name, output, *overrides, config=config)
        deadline = time.monotonic() + 120
        while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        assert process.returncode in (0, 130) and "Traceback" not in said, said
        assert process.returncode == 0 or "Run the same command to continue" in said, said
        return process.returncode == 130

    def run_with_kills(
        self,
        name: str,
        output: Path,
        marker: Path,
        seconds: float,
        *overrides: str,
        kills: int = 1,
        config: str = "debug.yaml",
    ) -> list[float]:
        """Run, SIGKILL the whole process group at a random moment of the `seconds` after `marker` appears, run again to
        the end.
        """
        delays = []
        for _ in range(kills):
            process = self.start(name, output, *overrides, config=config)
            deadline = time.monotonic() + 120
            while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            delays.append(random.SystemRandom().uniform(0, seconds))
            time.sleep(delays[-1])
            with_suppressed_kill(process)
            process.communicate()
        self.run(name, output, *overrides, config=config)
        return delays


def _run_script(argv: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        runpy.run_path(argv[0], run_name="__main__")


def with_suppressed_kill(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it had finished
