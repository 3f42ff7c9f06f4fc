"""The arithmetic of ADM's evaluator, restated from its formulas (benchmarks/adm_evaluator.py), and torchmetrics',
against ours: on random features, and on those of the very Inception-v3.
"""

import runpy
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import torch
from inception import Inception

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.metrics import (
    InceptionExtractor,
    RunningMoments,
    adm_precision_recall,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)

ADM = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "adm_evaluator.py"))
adm_frechet, adm_manifolds, torchmetrics_of = ADM["frechet"], ADM["precision_recall"], ADM["of_torchmetrics"]


def adm_score(logits: np.ndarray, split: int = 5000) -> float:
    return ADM["inception_score"](scipy.special.softmax(logits, 1), split)


def pair(width: int, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Samples and reference as of rectified features: positive, correlated, of uneven scale."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) / width**0.5 + np.eye(width)
    a, b = (np.maximum(rng.normal(size=(count + add, width)) @ mixing + add / 40, 0) for add in (0, 20))
    return a.astype(np.float32), (b * 0.9 + 0.02).astype(np.float32)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """28 colour images of smooth blobs `(28, 3, 64, 64)` in [-1, 1], the last 14 with more contrast and noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(28, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic")
    noise = torch.randn(28, 3, 64, 64, generator=generator)
    later = (torch.arange(28) >= 14).float()[:, None, None, None]
    return (0.4 * smooth * (1 + later / 2) + 0.2 * later * noise).clamp(-1, 1)


@pytest.fixture(scope="module")
def inception(images):
    """The extractor around the exact architecture, and its features and spatial features of the images."""
    extractor = InceptionExtractor(network=Inception())
    return extractor, *(values.numpy() for values in extractor.features_and_spatial(images, batch_size=12))


@pytest.mark.parametrize(("width", "count"), [(16, 200), (64, 300)])
def test_random_features(width, count):
    samples, reference = pair(width, count)
    ours = frechet_distance(samples, reference)
    theirs, kernel = torchmetrics_of(samples, reference)
    assert ours == pytest.approx(adm_frechet(samples, reference), rel=1e-4)
    assert ours == pytest.approx(theirs, rel=1e-4)
    size = min(len(samples), len(reference))
    found, spread = kernel_distance(samples[:size], reference[:size], 1, size)
    assert found == pytest.approx(kernel, rel=1e-4) and spread == 0
    found = adm_precision_recall(reference, samples)
    assert found == pytest.approx(adm_manifolds(reference, samples), abs=0.005)
    assert found == pytest.approx(precision_recall(reference, samples), abs=0.05)
    assert 0 < found[0] < 1 and 0 < found[1] < 1
    assert inception_score(samples)[0] == pytest.approx(adm_score(samples.astype(np.float64)), rel=1e-4)
    assert inception_score(samples, 70)[0] == pytest.approx(adm_score(samples.astype(np.float64), 70), rel=1e-4)


@pytest.mark.slow
def test_the_features_of_inception(inception, images):
    extractor, features, spatial = inception
    assert features.shape == (28, 2048) and spatial.shape == (28, 7 * 17 * 17)
    samples, reference = features[14:], features[:14]
    assert adm_precision_recall(reference, samples) == pytest.approx(adm_manifolds(reference, samples), abs=0.005)
    logits = extractor.head(torch.from_numpy(features)).numpy()
    assert inception_score(logits)[0] == pytest.approx(adm_score(logits.astype(np.float64)), rel=1e-4)
    for values in (features, spatial):
        # Matrix roots need more images than features, as published ones have: of what varies most, so many.
        most = np.argsort(values.var(0))[-8:]
        a, b = values[14:, most].astype(np.float64), values[:14, most].astype(np.float64)
        theirs, kernel = torchmetrics_of(a, b)
        assert frechet_distance(a, b) == pytest.approx(adm_frechet(a, b), rel=1e-4)
        assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-4)
        assert kernel_distance(a, b, 1, 14)[0] == pytest.approx(kernel, rel=1e-4)
        # And of all features, where all that matters lies in the space of the images.
        centred = np.concatenate([part - part.mean(0) for part in (values[14:], values[:14])]).astype(np.float64)
        apart = (values[14:].mean(0, dtype=np.float64) - values[:14].mean(0, dtype=np.float64))[None]
        basis = np.linalg.svd(np.concatenate([centred, apart]), full_matrices=False)[2].T
        a, b = values[14:] @ basis, values[:14] @ basis
        roots = np.sqrt(np.linalg.eigvals(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real.clip(0)).sum()
        wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum() - 2 * roots
        assert frechet_distance(values[14:], values[:14]) == pytest.approx(wanted, rel=1e-4)


def test_spatial_features_are_the_first_channels_of_mixed_6_conv_in_tensorflows_order(inception, images):
    """`mixed_6/conv` is what the block's 1×1 branch ends with, after the rectifier; ADM flattens height, width,
    channels.
    """
    extractor, _, spatial = inception
    kept = {}
    handle = extractor.network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: kept.update(map=call[2]))
    extractor.features(images[:2])
    handle.remove()
    assert kept["map"].shape == (2, 192, 17, 17) and (spatial >= 0).all() and (spatial > 0).any()
    wanted = [kept["map"][1, channel, 5, 11] for channel in range(7)]
    start = (5 * 17 + 11) * 7
    np.testing.assert_allclose(spatial[1, start : start + 7], torch.stack(wanted).numpy(), rtol=1e-3, atol=1e-5)


def test_half_precision_that_overflows_is_left():
    samples, reference = (values * 1e3 for values in pair(16, 80))
    assert (samples**2).sum(1).max() > 65504
    assert adm_precision_recall(reference, samples) == precision_recall(reference, samples)


def test_blocks_change_nothing():
    samples, reference = pair(16, 90)
    assert adm_precision_recall(reference, samples, batch=13) == adm_precision_recall(reference, samples)
    assert adm_precision_recall(reference, reference) == (1, 1)
    with pytest.raises(EdgeDiTError, match=r"fake has shape \(3, 16\).*at least 4 samples"):
        adm_precision_recall(reference, samples[:3])
    with pytest.raises(EdgeDiTError, match="batch is 0"):
        adm_precision_recall(reference, samples, batch=0)


def test_the_kernel_distance_is_unbiased_and_drawn_by_the_seed():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 8))
    mean, spread = kernel_distance(x[:200], x[200:], subsets=50, subset_size=100)
    assert abs(mean) < 3 * spread and spread > 0
    assert kernel_distance(x[:200], x[200:] + 1, 10, 100)[0] > 10 * spread
    state = torch.get_rng_state()
    assert kernel_distance(x[:200], x[200:], 5, 50, seed=3) == kernel_distance(x[:200], x[200:], 5, 50, seed=3)
    assert kernel_distance(x[:200], x[200:], 5, 50, seed=3) != kernel_distance(x[:200], x[200:], 5, 50, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    a, b = x[:6], x[200:206]
    kernel = [(u @ v.T / 8 + 1) ** 3 for u, v in ((a, a), (b, b), (a, b))]
    within = [(k.sum() - np.trace(k)) / 30 for k in kernel[:2]]
    assert kernel_distance(a, b, 1, 6)[0] == pytest.approx(sum(within) - 2 * kernel[2].mean(), rel=1e-12)
    with pytest.raises(EdgeDiTError, match=r"reference has shape \(20, 8\).*at least 50 samples"):
        kernel_distance(x, x[:20], 5, 50)
    with pytest.raises(EdgeDiTError, match="subset_size is 1"):
        kernel_distance(x, x, 5, 1)


def test_what_makes_a_distance_worth_less_is_said():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(10, 4))
    assert RunningMoments().update(features).notes("the samples") == []
    (said,) = RunningMoments().update(features[:4]).notes("the samples")
    assert "the samples: 4 images are too few for 4 features" in said
    features[:, 2] = 0.3  # whose mean may be off by a rounding
    (said,) = RunningMoments().update(features).notes("the reference")
    assert "the reference: 1 of 4 features (number 2) have no variance" in said
    assert frechet_distance(features, features + 1) == pytest.approx(4)
