"""What all recipes share: exit codes, the accelerator, threads, dry runs."""

import sys

import pytest
import torch

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.estimate import print_estimate
from edgedit_hf.run.config import RunConfig, load_config
from edgedit_hf.run.launch import make_accelerator, recipe_main, stage_runs
from edgedit_hf.run.stage import BANK, TEACHER
from edgedit_hf.run.state import Interrupted


def configured(folder, *overrides: str) -> RunConfig:
    (folder / "recipe.yaml").touch()
    return load_config(folder / "recipe.yaml", [f"output_dir={folder / 'run'}", *overrides])


# -------------------------------------------------------------------- the command line of a recipe


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    """`launch(run, *arguments)`: a recipe's command line; returns (exit code, stdout, stderr)."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path / 'run'}\nthreads: 1\nteacher: {{hidden_size: 32, num_layers: 2, num_heads: 2}}\n"
    )

    def run_it(run, *arguments: str):
        monkeypatch.setattr(sys, "argv", ["recipe.py", "--config", str(recipe), *arguments])
        code = 0
        try:
            recipe_main(run, "What the recipe does.", dry_run=print_estimate)
        except SystemExit as end:
            code = end.code
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run_it


def raising(error: BaseException):
    def run(config, accelerator):
        raise error

    return run


def test_a_recipe_gets_its_config_and_an_accelerator(launch):
    seen = []
    code, _, _ = launch(lambda *given: seen.append(given), "--override", "seed=5", "--override", "teacher.steps=3")
    config, accelerator = seen[0]
    assert code == 0 and (config.seed, config.teacher.steps, config.teacher.hidden_size) == (5, 3, 32)
    assert accelerator.num_processes == 1 and accelerator.is_main_process


def test_bad_input_is_one_line_and_exit_code_2(launch):
    assert launch(raising(EdgeDiTError("The bank is of another teacher; make it anew.")))[::2] == (
        2,
        "error: The bank is of another teacher; make it anew.\n",
    )
    code, _, err = launch(raising(AssertionError("not reached")), "--override", "teacher.stps=3")
    assert code == 2 and err == "error: --override: unknown key 'teacher.stps'; did you mean 'steps'?\n"
    code, _, err = launch(raising(AssertionError("not reached")), "--config", "none.yaml")
    assert code == 2 and err.startswith("error: The recipe none.yaml cannot be read") and err.count("\n") == 1


def test_an_interruption_is_exit_code_130(launch):
    assert launch(raising(Interrupted("Stopped at step 3 of 9 of demo; saved.")))[::2] == (
        130,
        "Stopped at step 3 of 9 of demo; saved.\n",
    )
    assert launch(raising(KeyboardInterrupt()))[::2] == (130, "Interrupted. Run the same command to continue.\n")


def test_an_error_of_the_program_itself_is_called_one(launch, monkeypatch):
    code, _, err = launch(lambda *_: 1 / 0)
    assert code == 70 and err.count("\n") == 1 and "a fault of edgedit_hf" in err and "ZeroDivisionError" in err
    monkeypatch.setenv("EDGEDIT_TRACEBACK", "1")
    assert launch(lambda *_: 1 / 0)[2].startswith("Traceback")


def test_a_dry_run_prints_estimates_and_runs_nothing(launch, tmp_path):
    code, out, _ = launch(raising(AssertionError("not reached")), "--dry-run")
    assert code == 0 and [line.split()[0] for line in out.splitlines()[:3]] == ["stage", "teacher", "bank"]
    assert not (tmp_path / "run").exists()


def test_threads_are_those_of_the_recipe(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    try:
        make_accelerator(configured(tmp_path, "threads=2"))
        assert torch.get_num_threads() == 2
        make_accelerator(configured(tmp_path, "threads=0"))
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        make_accelerator(configured(tmp_path, "threads=2"))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_a_driver_whose_folder_lacks_a_stage_says_so(tmp_path):
    (tmp_path / "train_teacher.py").write_text("def run(config, accelerator):\n    return 'done'\n")
    (run,) = stage_runs([TEACHER], tmp_path).values()
    assert run(None, None) == "done"
    with pytest.raises(
        EdgeDiTError, match="distill_proxies.py, the script of stage bank, is not there; `edgedit recipes"
    ):
        stage_runs([TEACHER, BANK], tmp_path)
