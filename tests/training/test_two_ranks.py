"""Two gloo ranks give what one process gives, within float tolerance, through `accelerate launch` and through
torchrun.
"""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

BIN = Path(sys.executable).parent


def launcher(recipes, kind: str) -> list[str]:
    if kind == "accelerate":
        return [
            str(BIN / "accelerate"),
            "launch",
            "--config_file",
            str(recipes.root / "training" / "accelerate" / "cpu-2.yaml"),
            "--main_process_port",
            "0",
        ]
    return [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]


def compare(one: Path, two: Path, tolerance: float) -> None:
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert files and files == sorted(path.relative_to(two) for path in two.rglob("*.safetensors"))
    for file in files:
        a, b = load_file(one / file), load_file(two / file)
        for name in a:
            torch.testing.assert_close(
                b[name], a[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name, f=file: f"{f} {n}: {m}"
            )


@pytest.fixture(scope="module")
def one_process(recipes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    recipes.run_here("train_teacher", folder)
    return folder


def test_teacher_through_accelerate_launch(recipes, one_process, tmp_path):
    recipes.run("train_teacher", tmp_path, launcher=launcher(recipes, "accelerate"))
    # Adam divides by tiny second moments in its first steps, which magnifies the rounding of summing gradients in
    # another order.
    compare(one_process / "teacher" / "transformer", tmp_path / "teacher" / "transformer", 2e-3)


@pytest.mark.slow
@pytest.mark.ranks
def test_bank_through_torchrun(recipes, one_process, tmp_path):
    recipes.run("distill_proxies", one_process)
    shutil.copytree(one_process / "teacher", tmp_path / "teacher")
    recipes.run("distill_proxies", tmp_path, launcher=launcher(recipes, "torchrun"))
    compare(one_process / "bank", tmp_path / "bank", 1e-4)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["accelerate", "torchrun"])
def test_whole_loop_on_two_ranks(recipes, tmp_path, kind):
    recipes.run("compress", tmp_path, launcher=launcher(recipes, kind), timeout=1200)
    for folder in ("teacher", "student-tuned", "teacher-more-steps", "exported/onnx-int8"):
        assert (tmp_path / folder / "model_index.json").exists()
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
@pytest.mark.ranks
def test_finetuning_on_two_ranks_equals_one(recipes, one_process, tmp_path):
    for name in ("distill_proxies", "measure_latency", "search_architecture", "select_student"):
        recipes.run(name, one_process)
    for folder in ("teacher", "bank", "student"):
        shutil.copytree(one_process / folder, tmp_path / folder)
    recipes.run("finetune", one_process)
    recipes.run("finetune", tmp_path, launcher=launcher(recipes, "torchrun"))
    compare(one_process / "student-tuned" / "transformer", tmp_path / "student-tuned" / "transformer", 2e-3)
    compare(one_process / "teacher-more-steps" / "transformer", tmp_path / "teacher-more-steps" / "transformer", 2e-3)
