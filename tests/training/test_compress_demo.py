"""The real demo, as a new user runs it, and what its report must show."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from edgedit_hf.run.stage import EDGEDIT, TUNE

pytestmark = [pytest.mark.slow, pytest.mark.demos]


@pytest.fixture(scope="module")
def demo(recipes, tmp_path_factory):
    """The command of `make demo` on two threads, into a folder of its own: (run, seconds, peak bytes, stderr)."""
    run = tmp_path_factory.mktemp("demo") / "demo"
    environment = recipes.environment(threads=2)
    command = [
        *(
            str(Path(sys.executable).parent / "accelerate"),
            "launch",
            "--config_file",
            "training/accelerate/cpu.yaml",
            "training/compress.py",
        ),
        *("--config", "training/recipes/digits.yaml", "--override", f"output_dir={run}"),
    ]
    started, peak = time.monotonic(), 0
    with open(run.parent / "stderr", "w+") as log:
        process = subprocess.Popen(command, cwd=recipes.root, env=environment, stderr=log, stdout=log)
        while process.poll() is None:
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            peak = max(peak, sum(memory(p) for p in tree))
            time.sleep(0.5)
        log.seek(0)
        text = log.read()
    assert process.returncode == 0, text[-3000:]
    return run, time.monotonic() - started, peak, text


def memory(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


@pytest.fixture(scope="module")
def report(demo):
    return json.loads((demo[0] / "report.json").read_text())


def model(report, name: str) -> dict:
    return next(entry for entry in report["models"] if entry["name"] == name)


def distance(entry: dict) -> float:
    return next(value for key, value in entry["metrics"].items() if key.startswith("fid["))


def test_time_and_memory(demo):
    _, seconds, peak, _ = demo
    assert seconds < 20 * 60
    assert peak < 6e9


def test_progress_names_stage_eta_and_metric(demo):
    text = demo[3]
    for stage in (stage for stage in EDGEDIT if not stage.only):
        assert f"] {stage.folder if stage is TUNE else stage.name}:" in text, stage.name
    assert "min left in all" in text and "loss=" in text and "distance=" in text


def test_extractor_and_floor(demo):
    reference = json.loads((demo[0] / "evaluate" / "reference.json").read_text())
    assert reference["extractor_accuracy"] >= 0.98
    assert reference["real_floor"] > 0


def test_teacher_samples_are_recognisable(report):
    assert model(report, "teacher")["class_agreement"] >= 0.90


def test_student_is_smaller_and_faster(report, demo):
    teacher, student = model(report, "teacher"), model(report, "student-tuned")
    assert student["parameters"] <= 0.8 * teacher["parameters"]
    assert student["flops"] <= 0.75 * teacher["flops"]
    latency = json.loads((demo[0] / "evaluate" / "latency.json").read_text())
    assert latency["speedup"]["onnxruntime-fp32"] >= 1.3


def test_student_keeps_the_quality(report):
    reference, student = model(report, "teacher-more-steps"), model(report, "student-tuned")
    assert distance(student) <= 1.10 * distance(reference)
    assert abs(student["precision"] - reference["precision"]) <= 0.05
    assert abs(student["recall"] - reference["recall"]) <= 0.05
    assert student["class_agreement"] >= reference["class_agreement"] - 0.03


def test_int8_export(report, demo):
    student, int8 = model(report, "student-tuned"), model(report, "onnx-int8")
    assert int8["psnr_db"] >= 25
    assert abs(int8["class_agreement"] - student["class_agreement"]) <= 0.01
    fp32 = model(report, "onnx-fp32")
    assert fp32["bytes"]["fp32"] >= 3 * int8["bytes"]["int8"]
    assert json.loads((demo[0] / "evaluate" / "latency.json").read_text())["speedup"]["onnxruntime-int8"] > 0


def test_bayesian_search_is_no_worse_than_random(report):
    search = report["search"]
    assert len(search["hypervolume"]) == 24 and len(search["random_hypervolume"]) == 24
    assert search["hypervolume"][-1] >= 0.98 * search["random_hypervolume"][-1]


def test_feature_distillation_matters(recipes, demo):
    command = [
        sys.executable,
        "benchmarks/feature_distillation.py",
        str(demo[0]),
        "--json",
        "--check",
        "--samples",
        "500",
    ]
    environment = recipes.environment(threads=2)
    done = subprocess.run(command, cwd=recipes.root, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert len(json.loads(done.stdout.splitlines()[-1])["ratios"]) == 3
    assert (demo[0] / "evaluate" / "curves.json").exists()
