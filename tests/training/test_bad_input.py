"""Bad input ends in one clear line on stderr and exit code 2, quotes what was found, says what to do, and loses
nothing.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def finished(recipes, tmp_path_factory):
    """A run with a teacher and a bank."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    recipes.run_here("train_teacher", folder)
    recipes.run_here("distill_proxies", folder)
    return folder


def image_folder(path: Path, size: int = 8, count: int = 6) -> Path:
    rng = np.random.default_rng(0)
    for label in "ab":
        (path / label).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (size, size), dtype=np.uint8)).save(path / label / f"{i}.png")
    return path


def copy(run: Path, target: Path, *stages: str) -> Path:
    for stage in stages:
        shutil.copytree(run / stage, target / stage)
    return target


def test_missing_dataset(fail, tmp_path):
    assert "no/such-dataset" in fail("train_teacher", tmp_path / "run", "data.source=no/such-dataset")


def test_empty_folder(fail, tmp_path):
    (tmp_path / "images").mkdir()
    assert str(tmp_path / "images") in fail("train_teacher", tmp_path / "run", f"data.source={tmp_path / 'images'}")


def test_corrupt_image(fail, tmp_path):
    images = image_folder(tmp_path / "images")
    (images / "a" / "3.png").write_bytes((images / "a" / "3.png").read_bytes()[:40])
    assert "3.png" in fail("train_teacher", tmp_path / "run", f"data.source={images}")


def test_images_the_patches_do_not_divide(fail, tmp_path):
    message = fail("train_teacher", tmp_path / "run", f"data.source={image_folder(tmp_path / 'images', size=9)}")
    assert "9" in message and "2" in message


@pytest.mark.slow
@pytest.mark.sweep
def test_truncated_safetensors(fail, finished, tmp_path):
    run = copy(finished, tmp_path, "teacher")
    weights = next((run / "teacher" / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(run / "teacher") in fail("distill_proxies", run)


def test_truncated_proxy(fail, debug_run, tmp_path):
    run = copy(debug_run, tmp_path, "teacher", "bank", "latency")
    for proxy in (run / "bank").glob("*.safetensors"):
        proxy.write_bytes(proxy.read_bytes()[:1000])
    assert "bank" in fail("search_architecture", run)


def test_foreign_config(fail, finished, tmp_path):
    run = copy(finished, tmp_path, "teacher")
    config = run / "teacher" / "transformer" / "config.json"
    values = json.loads(config.read_text())
    values["layers"] = values["layers"][:-1]
    config.write_text(json.dumps(values))
    assert "do not fit" in fail("distill_proxies", run)


def test_pipeline_of_another_class(fail, finished, tmp_path):
    run = copy(finished, tmp_path, "teacher")
    index = run / "teacher" / "model_index.json"
    index.write_text(index.read_text().replace('"EdgeDiTPipeline"', '"DDPMPipeline"'))
    assert str(run / "teacher") in fail("distill_proxies", run)


def test_genotype_that_does_not_fit_its_teacher(fail, finished, recipes, tmp_path):
    run = copy(finished, tmp_path, "teacher", "bank")
    (run / "search").mkdir()
    front = {
        "front": [{"distance": 1.0, "latency_ms": 1.0, "code": [0, 0, 0]}],
        "teacher": {"path": None, "latency_ms": 2.0, "parameters": 1, "flops": 1},
    }
    (run / "search" / "front.json").write_text(json.dumps(front))
    message = fail("select_student", run)
    assert "3" in message and "2" in message


def test_more_labels_than_classes(fail, finished, tmp_path):
    images = tmp_path / "images"
    for label in range(11):
        (images / f"{label:02d}").mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((8, 8), 10 * label + i, dtype=np.uint8)).save(images / f"{label:02d}" / f"{i}.png")
    run = copy(finished, tmp_path / "run", "teacher")
    message = fail("distill_proxies", run, f"data.source={images}", "data.validation_fraction=0.0")
    assert "11" in message and "10" in message


def test_unknown_recipe_key(fail, tmp_path):
    message = fail("train_teacher", tmp_path / "run", "teacher.learning_rat=1")
    assert "learning_rat" in message and "learning_rate" in message


def test_missing_recipe(fail, tmp_path):
    assert "no.yaml" in fail("train_teacher", tmp_path, config=str(tmp_path / "no.yaml"))


def test_unwritable_output(fail, tmp_path):
    (tmp_path / "file").write_text("kept")
    assert str(tmp_path / "file") in fail("train_teacher", tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "kept"


def test_nan_loss_keeps_the_checkpoint_before_it(fail, tmp_path):
    message = fail(
        "train_teacher",
        tmp_path,
        "teacher.learning_rate=1e30",
        "teacher.max_grad_norm=0.0",
        "teacher.warmup_steps=0",
        "teacher.log_every=1",
    )
    assert "nan" in message.lower() or "inf" in message.lower()
    assert "learning rate" in message
    assert not (tmp_path / "teacher" / "stage.json").exists()


@pytest.mark.slow
def test_bank_of_another_teacher(fail, finished, recipes, tmp_path):
    run = copy(finished, tmp_path, "bank")
    recipes.run("train_teacher", run, "seed=1")
    recipes.run("measure_latency", run)
    message = fail("search_architecture", run)
    index = json.loads((run / "bank" / "index.json").read_text())
    assert index["teacher_hash"] in message


def test_other_arguments_than_the_folder_was_made_with(fail, finished, tmp_path):
    run = copy(finished, tmp_path, "teacher")
    before = (run / "teacher" / "run.json").read_bytes()
    message = fail("train_teacher", run, "teacher.learning_rate=0.5")
    assert "0.5" in message and "0.001" in message and str(run / "teacher") in message
    assert (run / "teacher" / "run.json").read_bytes() == before


def test_stage_before_its_input(fail, tmp_path):
    assert "train_teacher" in fail("distill_proxies", tmp_path)
    assert "finetune" in fail("export_student", tmp_path)


def test_batch_that_does_not_divide(fail, tmp_path):
    message = fail("train_teacher", tmp_path, "teacher.gradient_accumulation=3")
    assert "32" in message and "3" in message
