"""What models are judged by: an extractor trained once a run, features of all real images, counted accuracies."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from edgedit_hf.data.batches import batch_indices
from edgedit_hf.data.loading import load_run_images
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.metrics import reference
from edgedit_hf.metrics.distances import frechet_distance, frechet_standard_error
from edgedit_hf.metrics.reference import describe_reference, judged_distance, load_extractor, real_features
from edgedit_hf.run.config import RunConfig


@pytest.fixture
def config(tmp_path):
    config = RunConfig(output_dir=str(tmp_path))
    config.evaluate.extractor_steps = 2
    return config


def test_an_extractor_is_trained_once_a_run_and_for_what_is_asked(config):
    images = load_run_images(config)
    first = load_extractor(config, images, torch.device("cpu"))
    again = load_extractor(config, images, torch.device("cpu"))
    assert first.hash == again.hash and first.accuracy == again.accuracy
    config.evaluate.extractor_steps = 3
    with pytest.raises(EdgeDiTError, match="evaluate.extractor_steps = 2, but now evaluate.extractor_steps = 3 is"):
        load_extractor(config, images, torch.device("cpu"))


def test_an_extractor_of_an_earlier_version_is_found_where_it_was(config):
    images = load_run_images(config)
    first = load_extractor(config, images, torch.device("cpu"))
    config.folder("evaluate").mkdir()
    config.folder("extractor").rename(config.folder("evaluate", "extractor"))
    assert load_extractor(config, images, torch.device("cpu")).hash == first.hash
    assert not config.folder("extractor").exists()


def test_features_of_the_real_images_come_in_pieces(config, monkeypatch):
    images = load_run_images(config, "validation")
    extractor = load_extractor(config, load_run_images(config), torch.device("cpu"))
    whole = extractor.features(images.batch(range(len(images)))["images"])
    monkeypatch.setattr(reference, "CHUNK", 50)
    torch.testing.assert_close(real_features(extractor, images), whole, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(reference, "REAL_IMAGES", 120)
    drawn = np.sort(batch_indices(len(images), 120, 0, 0))
    torch.testing.assert_close(real_features(extractor, images), whole[drawn], rtol=1e-4, atol=1e-5)


def test_the_reference_says_what_was_counted(config):
    images, held_out = load_run_images(config), load_run_images(config, "validation")
    extractor = load_extractor(config, images, torch.device("cpu"))
    real = real_features(extractor, images)
    classifier = describe_reference(config, images, extractor, real)
    written = json.loads((config.folder("evaluate", "reference.json")).read_text())
    batch = held_out.batch(range(len(held_out)))
    right = (classifier.predict(batch["images"]) == batch["labels"]).double().mean().item()
    assert written["classifier_accuracy"] == pytest.approx(right) and right > 0.9
    assert written["real_floor_counts"] == [len(held_out), len(images)]
    assert written["real_floor"] == pytest.approx(frechet_distance(extractor.features(batch["images"]), real), rel=1e-4)
    assert written["data"] == images.fingerprint and written["extractor_hash"] == extractor.hash
    assert written["count"] == config.evaluate.samples and written["notes"] == []


def test_the_reference_of_an_extractor_that_was_trained_elsewhere(config):
    images = load_run_images(config, "validation")
    judge = SimpleNamespace(name="inception", hash="0" * 16, features=lambda pixels: pixels.flatten(1)[:, :8])
    describe_reference(config, images, judge, real_features(judge, images), images)
    written = json.loads((config.folder("evaluate", "reference.json")).read_text())
    assert written["extractor_accuracy"] is None and written["extractor"] == "inception"
    assert written["notes"][0].startswith("real images: ") and "have no variance" in written["notes"][0]  # white edges


def test_a_distance_says_how_sure_it_is_and_what_makes_it_worth_less():
    generator = torch.Generator().manual_seed(0)
    real, made = torch.randn(200, 8, generator=generator), torch.randn(40, 8, generator=generator)
    judged = judged_distance("fid[x,n=40]", made, real)
    assert judged["metrics"] == {"fid[x,n=40]": pytest.approx(frechet_distance(made, real), rel=1e-12)}
    assert judged["standard_errors"] == {"fid[x,n=40]": frechet_standard_error(made, real)} and judged["notes"] == []
    made[:, 3] = 0.5
    few, still = judged_distance("fid[x,n=8]", made[:8], real)["notes"]
    assert few.startswith("generated images: 8 images are too few for 8 features") and "(number 3) have no" in still
