"""The folders that `evaluate` loads by their path, offline."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from edgedit_hf.metrics import (
    adm_precision_recall,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)

ROOM = Path(importlib.util.find_spec("edgedit_hf.metrics").origin).parent


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


def test_the_inception_score(load, features):
    metric, (logits, _) = load(ROOM / "evaluate_inception_score"), features
    found = metric.compute(predictions=logits, split_size=20)
    assert tuple(found.values()) == pytest.approx(inception_score(logits, 20), rel=1e-12)
    assert list(found) == ["inception_score", "standard_deviation"] and found["standard_deviation"] > 0


def test_the_kernel_distance(load, features):
    metric, (ours, real) = load(ROOM / "evaluate_kernel_distance"), features
    found = metric.compute(predictions=ours, references=real, subsets=5, subset_size=20, seed=3)
    assert tuple(found.values()) == pytest.approx(kernel_distance(ours, real, 5, 20, 3), rel=1e-12)
    assert found["kernel_distance"] != metric.compute(predictions=ours, references=real, subset_size=20)
