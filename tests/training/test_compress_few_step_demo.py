"""What `make demo-few-step` runs after installing: in time, and four steps as good as many."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.demos]


@pytest.fixture(scope="module")
def demo(recipes, tmp_path_factory):
    """The demo on two threads, into a folder of its own: (models of the report by name, its ratios, seconds)."""
    run = tmp_path_factory.mktemp("demo") / "demo-few-step"
    environment = recipes.environment(threads=2)
    command = [str(Path(sys.executable).parent / "edgedit"), "train", "compress"]
    command += ["--config_file", "training/accelerate/cpu.yaml", "--config", "training/recipes/digits-few-step.yaml"]
    started = time.monotonic()
    subprocess.run(
        [*command, "--override", f"output_dir={run}"], cwd=recipes.root, env=environment, check=True, timeout=3000
    )
    report = json.loads((run / "report.json").read_text())
    return {model["name"]: model for model in report["models"]}, report["ratios"], time.monotonic() - started


def test_time(demo):
    assert demo[2] < 15 * 60


def test_four_steps_win_back_what_few_steps_cost(demo):
    models, ratios, _ = demo
    found = ratios["few_step"]
    assert models["few-step"]["steps"] == 4 and models["few-step"]["forwards_per_image"] == 4
    assert found["won_back"] >= 0.8 and found["distance"] <= 1.15
    assert found["recall"] >= -0.05 and found["class_agreement"] >= -0.02
    assert found["forwards"] == 14 and found["speedup"] > 5


def test_what_ships(demo):
    models, ratios, _ = demo
    assert 0.65 < ratios["parameters"] < 0.75
    int8, few = models["onnx-int8"], models["few-step"]
    assert int8["psnr_db"] >= 25 and abs(int8["class_agreement"] - few["class_agreement"]) <= 0.01
    assert few["bytes"]["fp32"] >= 3 * int8["bytes"]["int8"]
