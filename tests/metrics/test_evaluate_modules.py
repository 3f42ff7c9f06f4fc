"""The folders that `evaluate` loads by their path, offline, and that can be pushed as Spaces as they are."""

import importlib.util
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import yaml

from edgedit_hf.metrics import adm_precision_recall, frechet_distance, precision_recall

ROOM = Path(importlib.util.find_spec("edgedit_hf.metrics").origin).parent
FOLDERS = sorted(ROOM.glob("evaluate_*"))


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(40, 6)).astype(np.float32)
    return (1.2 * rng.normal(size=(40, 6)) + 0.3).astype(np.float32), real


@pytest.fixture
def load(tmp_path):
    import evaluate

    return lambda folder: evaluate.load(str(folder), cache_dir=str(tmp_path))


def test_frechet_distance(load, features):
    metric, (ours, real) = load(ROOM / "evaluate_frechet_distance"), features
    found = metric.compute(predictions=ours, references=real)
    assert json.dumps(found) and found["frechet_distance"] == pytest.approx(frechet_distance(ours, real), rel=1e-12)
    for part_a, part_b in zip(np.split(ours, 4), np.split(real, 4)):
        metric.add_batch(predictions=part_a, references=part_b)
    assert metric.compute() == found


def test_precision_and_recall(load, features):
    metric, (ours, real) = load(ROOM / "evaluate_precision_recall"), features
    found = metric.compute(predictions=ours, references=real)
    assert json.dumps(found) and tuple(found.values()) == precision_recall(real, ours)
    found = metric.compute(predictions=ours, references=real, k=1, adm=True)
    assert tuple(found.values()) == adm_precision_recall(real, ours, k=1)
    assert list(found) == ["precision", "recall"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_is_ready_to_be_a_space(folder, monkeypatch, tmp_path):
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {
        *("README.md", "app.py", "requirements.txt", f"{folder.name}.py")
    }
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(head)
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and card["tags"] == ["evaluate", "metric"]
    assert f'evaluate.load("{folder.name}")' in text
    assert (folder / "requirements.txt").read_text().split() == ["edgedit_hf", "evaluate"]
    shown = []
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr("evaluate.utils.launch_gradio_widget", shown.append)  # gradio is not needed to load a metric
    runpy.run_path(str(folder / "app.py"))
    assert len(FOLDERS) == 2 and shown[0].name == folder.name.removeprefix("evaluate_") and shown[0].description
