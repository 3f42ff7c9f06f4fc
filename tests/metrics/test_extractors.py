"""The feature extractor, the independent classifier, and what they refuse."""

import json

import numpy as np
import pytest
import torch

from edgedit_hf.data.datasets import ImageDataset
from edgedit_hf.data.images import load_images, stratified_split
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.metrics import (
    FeatureExtractor,
    class_agreement,
    frechet_distance,
    train_classifier,
    train_independent_classifier,
)


@pytest.fixture(scope="module")
def digits():
    return load_images(), load_images(split="validation")


@pytest.fixture(scope="module")
def extractor(digits):
    return train_classifier(digits[0], validation=digits[1])


def stripes(shape: tuple[int, int, int], count: int = 40) -> ImageDataset:
    """Two classes, horizontal and vertical stripes, with some noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 2
    wave = 80 * np.sin(np.arange(max(shape[1:])) * 1.5)
    images = [np.broadcast_to(wave[: shape[2]] if y else wave[: shape[1], None], shape) for y in labels]
    noisy = np.stack(images) + 128 + rng.normal(size=(count, *shape)) * 10
    return ImageDataset(noisy.clip(0, 255).astype(np.uint8), labels, ["horizontal", "vertical"], name="stripes")


def test_extractor_knows_held_out_digits(digits, extractor):
    assert extractor.accuracy >= 0.98
    images, labels = digits[1].batch(range(len(digits[1]))).values()
    right = (extractor.logits(images).argmax(1) == labels).float().mean()
    assert extractor.accuracy == pytest.approx(float(right))
    features = extractor.features(images, batch_size=100)
    assert features.shape == (len(images), 64) and features.dtype == torch.float32
    assert torch.allclose(features, extractor.features(images), atol=1e-4)
    assert extractor.name == "digits-cnn"


def test_distance_in_its_features_orders_images_by_damage(digits, extractor):
    images = digits[0].batch(range(len(digits[0])))["images"]
    first, second = stratified_split(digits[0].labels.numpy(), 0.5, seed=0)
    real = extractor.features(images[first])
    noise = torch.randn(images[second].shape, generator=torch.Generator().manual_seed(0))
    distances = [
        frechet_distance(real, extractor.features((images[second] + sigma * noise).clamp(-1, 1)))
        for sigma in (0, 0.2, 0.5, 1.0)
    ]
    assert distances == sorted(distances)
    assert distances[-1] > 10 * distances[0]


def test_same_seed_same_weights_and_saved_ones_too(tmp_path):
    data = stripes((3, 8, 8))
    state = torch.get_rng_state()
    first, again, other = (train_classifier(data, seed=seed, steps=5) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert first.hash == again.hash != other.hash
    first.save(tmp_path / "extractor")
    loaded = FeatureExtractor.load(tmp_path / "extractor")
    assert (loaded.name, loaded.accuracy, loaded.hash) == (first.name, first.accuracy, first.hash)
    images = data.batch(range(7))["images"]
    assert torch.equal(loaded.features(images), first.features(images))
    other.save(tmp_path / "extractor")
    assert FeatureExtractor.load(tmp_path / "extractor").hash == other.hash


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 13), (2, 28, 28), (3, 64, 64)])
def test_any_size(shape):
    data = stripes(shape)
    extractor = train_classifier(data, steps=30, batch_size=16)
    assert extractor.features(data.batch([0, 1])["images"]).shape == (2, 64)
    assert extractor.accuracy >= 0.75


@pytest.mark.parametrize("steps", [1, 2, 10, 19])
def test_any_number_of_steps(steps):
    assert 0 <= train_classifier(stripes((1, 9, 13)), steps=steps, batch_size=4).accuracy <= 1


def test_rotation_needs_no_labels(digits):
    unlabelled = load_images(label_column="").subset(range(600))
    extractor = train_classifier(unlabelled, steps=40, pretext="rotation", batch_size=32)
    assert extractor.name == "digits-rotation-cnn" and extractor.accuracy > 0.5  # chance: 0.25
    assert extractor.logits(unlabelled.batch([0])["images"]).shape == (1, 4)


def test_extractor_refuses(digits, extractor, tmp_path):
    with pytest.raises(EdgeDiTError, match="0 classes; use pretext='rotation'"):
        train_classifier(load_images(label_column=""))
    with pytest.raises(EdgeDiTError, match="pretext is 'colour'"):
        train_classifier(digits[0], pretext="colour")
    with pytest.raises(EdgeDiTError, match="are 9x13; set resolution"):
        train_classifier(stripes((1, 9, 13)), pretext="rotation")
    with pytest.raises(EdgeDiTError, match="images are 6x8; the classifier needs at least 8x8"):
        train_classifier(stripes((1, 6, 8)))
    with pytest.raises(EdgeDiTError, match="leave none to measure the accuracy on"):
        train_classifier(stripes((1, 8, 8), count=2))
    with pytest.raises(EdgeDiTError, match=r"shape \(2, 3, 8, 8\), but the extractor takes \('n', 1, 8, 8\)"):
        extractor.features(torch.zeros(2, 3, 8, 8))
    broken = torch.zeros(3, 1, 8, 8)
    broken[1, 0, 0, 0] = torch.nan
    with pytest.raises(EdgeDiTError, match="1 of 3 images hold NaN"):
        extractor.features(broken)


def test_damaged_extractor_files(extractor, tmp_path):
    with pytest.raises(EdgeDiTError, match="extractor.json does not exist"):
        FeatureExtractor.load(tmp_path)
    extractor.save(tmp_path / "e")
    about = json.loads((tmp_path / "e" / "extractor.json").read_text())
    for change, message in [({"hash": "0" * 16}, "description says 0000"), ({"num_classes": 3}, "is damaged")]:
        (tmp_path / "e" / "extractor.json").write_text(json.dumps({**about, **change}))
        with pytest.raises(EdgeDiTError, match=message):
            FeatureExtractor.load(tmp_path / "e")
    weights = tmp_path / "e" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(EdgeDiTError, match="is damaged"):
        FeatureExtractor.load(tmp_path / "e")


def test_independent_classifier(digits):
    train, validation = digits
    classifier = train_independent_classifier(train, validation=validation)
    images, labels = validation.batch(range(len(validation))).values()
    assert classifier.accuracy >= 0.97
    assert class_agreement(classifier, images, labels) == classifier.accuracy
    assert class_agreement(classifier, images, (labels + 1) % 10) <= 0.03
    assert classifier.predict(images).dtype == torch.int64
    large = train_independent_classifier(stripes((3, 40, 48)))
    assert large.accuracy >= 0.75
    with pytest.raises(EdgeDiTError, match="0 classes"):
        train_independent_classifier(load_images(label_column=""))
    with pytest.raises(EdgeDiTError, match="2 images and 3 labels"):
        class_agreement(classifier, images[:2], labels[:3])
    with pytest.raises(EdgeDiTError, match=r"but the extractor takes \('n', 1, 8, 8\)"):
        classifier.predict(torch.zeros(1, 3, 8, 8))


@pytest.mark.slow
def test_digits_accuracy_over_seeds(digits):
    train, validation = digits
    assert all(train_classifier(train, seed=seed, validation=validation).accuracy >= 0.98 for seed in range(1, 5))
