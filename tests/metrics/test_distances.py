"""Metrics against independent truth: closed forms, scipy, torchmetrics, brute force."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from edgedit_hf import metrics
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.metrics import (
    RunningMoments,
    frechet_distance,
    frechet_distance_from_moments,
    frechet_standard_error,
    inception_score,
    precision_recall,
    psnr,
)


def features(seed: int, n: int, d: int, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * scale + rng.normal(size=d)


# ------------------------------------------------------------------ Fréchet distance


def test_frechet_distance_of_one_dimensional_gaussians():
    # (m1 - m2)² + (s1 - s2)²
    assert frechet_distance_from_moments([1.0], [[4.0]], [-2.0], [[0.25]]) == pytest.approx(9 + 1.5**2, rel=1e-14)


def test_frechet_distance_of_commuting_covariances():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    a, b = rng.uniform(0, 3, 6), rng.uniform(0, 3, 6)
    mean = rng.normal(size=6)
    wanted = (mean**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = frechet_distance_from_moments(mean, (basis * a) @ basis.T, np.zeros(6), (basis * b) @ basis.T)
    assert found == pytest.approx(wanted, rel=1e-12)


def test_frechet_distance_equals_scipys_matrix_root():
    a, b = features(0, 500, 16), features(1, 400, 16)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == frechet_distance(a, b)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_frechet_distance_equals_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flatten(torch.nn.Module):
        num_features = 3 * 4 * 4

        def forward(self, images):
            return images.flatten(1).double()

    generator = torch.Generator().manual_seed(0)
    real = torch.rand(200, 3, 4, 4, generator=generator, dtype=torch.float64)
    fake = torch.rand(150, 3, 4, 4, generator=generator, dtype=torch.float64) ** 2
    reference = FrechetInceptionDistance(feature=Flatten(), normalize=True, input_img_size=(3, 4, 4))
    reference.set_dtype(torch.float64)
    reference.update(real, real=True)
    reference.update(fake, real=False)
    assert frechet_distance(real.flatten(1), fake.flatten(1)) == pytest.approx(float(reference.compute()), rel=1e-6)


def test_frechet_distance_without_full_rank():
    few, more = features(0, 5, 64), features(1, 20, 64)  # covariances of rank 4 and 19 in 64 dimensions
    distance = frechet_distance(few, more)
    # The same in the 23-dimensional space that the samples span, where a matrix root is well defined enough.
    centred = np.concatenate([few - few.mean(0), more - more.mean(0), (few.mean(0) - more.mean(0))[None]])
    basis = np.linalg.svd(centred, full_matrices=False)[2][:24].T
    a, b = few @ basis, more @ basis
    eigenvalues = np.linalg.eigvals(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    roots = np.sqrt(np.clip(eigenvalues.real, 0, None)).sum()
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum() - 2 * roots
    assert distance == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-10 * few.var(0).sum())
    assert frechet_distance(few, few[::-1]) >= 0
    constant = np.ones((3, 8))
    assert frechet_distance(constant, constant + 1) == 8


@pytest.mark.parametrize(
    "a, b, message",
    [
        (np.ones((1, 4)), np.ones((5, 4)), r"first set has shape \(1, 4\).*at least 2 samples"),
        (np.ones((5, 4)), np.ones((5, 3)), "width 4 but the second set of width 3"),
        ([[1.0, 2.0], [3.0]], np.ones((5, 4)), "first set is no array of numbers"),
        (np.ones((5, 4)), np.full((5, 4), np.nan), "second set holds 20 NaN or infinite values out of 20"),
        (np.ones((5, 4)), np.ones(5), r"second set has shape \(5,\); expected 2 dimensions"),
        (np.ones((5, 0)), np.ones((5, 0)), "D ≥ 1"),
    ],
)
def test_frechet_distance_refuses(a, b, message):
    with pytest.raises(EdgeDiTError, match=message):
        frechet_distance(a, b)


def test_moments_must_fit():
    with pytest.raises(EdgeDiTError, match=r"covariance has shape \(3, 3\), but the means have width 2"):
        frechet_distance_from_moments([0, 0], np.eye(3), [0, 0], np.eye(2))
    with pytest.raises(EdgeDiTError, match="width 2 but the second mean of width 3"):
        frechet_distance_from_moments([0, 0], np.eye(2), [0, 0, 0], np.eye(3))


def test_running_moments_equal_numpy_in_any_order():
    x = features(0, 300, 8) + 1e4  # far from zero, where sums of squares lose digits
    moments = [RunningMoments() for _ in range(3)]
    for i, part in enumerate(np.array_split(x, 10)):
        moments[i % 3].update(torch.from_numpy(part))
    gathered = RunningMoments()
    for each in (RunningMoments(), *moments):  # a rank that saw nothing adds nothing
        gathered.merge(RunningMoments().load_state_dict(each.state_dict()))
    assert gathered.count == 300
    np.testing.assert_allclose(gathered.mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(gathered.covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)
    with pytest.raises(EdgeDiTError, match="at least 2 samples, but only 1"):
        RunningMoments().update(x[:1]).covariance  # noqa: B018
    with pytest.raises(EdgeDiTError, match="moments so far has features of width 8 but the new batch of width 7"):
        gathered.update(x[:, :7])
    with pytest.raises(EdgeDiTError, match=r"mean has width 2 but its scatter has shape \(3, 3\)"):
        RunningMoments().load_state_dict({"count": 1, "mean": np.zeros(2), "scatter": np.eye(3)})


@pytest.mark.parametrize(("samples", "width"), [(200, 5), (100, 30)])
def test_the_standard_error_of_a_frechet_distance_is_the_spread_of_fresh_samples(samples, width):
    reference = features(1, 400, width)
    pool = features(2, 60 * samples, width).reshape(60, samples, width)
    of_one = [frechet_standard_error(part, reference, 20, seed) for seed, part in enumerate(pool[:20])]
    spread = np.std([frechet_distance(part, reference) for part in pool], ddof=1)
    assert np.mean(of_one) == pytest.approx(spread, rel=0.35)


def test_the_standard_error_of_a_frechet_distance_is_that_of_redrawn_rows():
    x, reference = features(3, 40, 6), features(4, 50, 6)
    rng = np.random.default_rng(9)
    redrawn = [frechet_distance(x[rng.integers(40, size=40)], reference) for _ in range(7)]
    assert frechet_standard_error(x, reference, 7, 9) == pytest.approx(np.std(redrawn, ddof=1), rel=1e-9)
    assert frechet_standard_error(torch.tensor(x), torch.tensor(reference), 7, 9) == frechet_standard_error(
        x, reference, 7, 9
    )
    same = np.ones((5, 6))  # no spread, nothing to redraw
    assert frechet_standard_error(same, reference) == pytest.approx(0, abs=1e-12)
    with pytest.raises(EdgeDiTError, match="resamples is 1"):
        frechet_standard_error(x, reference, 1)
    with pytest.raises(EdgeDiTError, match="width 6 but reference of width 3"):
        frechet_standard_error(x, reference[:, :3])


# ------------------------------------------------------------------ precision, recall


def brute_force(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    def inside(points, centres):
        hits = 0
        for point in points:
            for centre in centres:
                radius = sorted(math.dist(centre, other) for other in centres if other is not centre)[k - 1]
                if math.dist(point, centre) <= radius:
                    hits += 1
                    break
        return hits / len(points)

    real, fake = list(real), list(fake)
    return inside(fake, real), inside(real, fake)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [7, 2048])
def test_precision_and_recall_by_brute_force(k, chunk):
    real, fake = features(0, 40, 3) + 100, features(0, 30, 3)[:, ::-1] * 0.8 + 100
    found = precision_recall(real, fake, k=k, chunk=chunk)
    assert found == brute_force(real, fake, k)
    assert 0 < found[0] < 1 and 0 < found[1] < 1


def test_precision_and_recall_at_the_extremes():
    x = features(0, 50, 4)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 1e3) == (0, 0)
    one_mode = x[:5] + 1e-3 * features(1, 5, 4)
    precision, recall = precision_recall(x, np.repeat(one_mode, 10, axis=0) + 1e-6 * features(2, 50, 4))
    assert precision == 1 and recall < 0.3
    with pytest.raises(EdgeDiTError, match=r"fake has shape \(3, 4\).*at least 4 samples"):
        precision_recall(x, x[:3])
    for k in (0, 2.5, "x", True):
        with pytest.raises(EdgeDiTError, match=f"k is {k!r}; it must be a whole number of at least 1"):
            precision_recall(x, x, k=k)
    with pytest.raises(EdgeDiTError, match="real holds 1 NaN"):
        precision_recall(np.where(np.arange(200).reshape(50, 4) == 3, np.nan, x), x)


# ------------------------------------------------------------------ the rest


def test_inception_score():
    sure = np.where(np.eye(5)[np.arange(100) % 5] > 0, 0.0, -800.0)  # one class each, all classes equally often
    assert inception_score(sure, split_size=25) == (pytest.approx(5), pytest.approx(0, abs=1e-12))
    assert inception_score(np.zeros((20, 7)), split_size=10)[0] == pytest.approx(1)
    logits = np.random.default_rng(0).normal(size=(60, 4)) * 3
    p = scipy.special.softmax(logits, axis=1)
    parts = [np.exp(scipy.special.rel_entr(part, part.mean(0)).sum(1).mean()) for part in (p[:25], p[25:50], p[50:])]
    assert inception_score(logits, split_size=25) == pytest.approx((np.mean(parts), np.std(parts)))
    assert inception_score(np.log(p)) == pytest.approx(inception_score(logits + 50))
    with pytest.raises(EdgeDiTError, match="split_size is 0"):
        inception_score(logits, split_size=0)


def test_psnr():
    a = torch.zeros(2, 3, 4, 4)
    assert psnr(a, a, 2) == math.inf
    assert psnr(a, a + 0.02, 2) == pytest.approx(40, rel=1e-6)
    assert psnr(np.zeros(4), np.array([0, 0, 0, 255.0]), 255) == pytest.approx(10 * math.log10(4))
    with pytest.raises(EdgeDiTError, match=r"shapes \(2, 3, 4, 4\) and \(3, 4, 4\)"):
        psnr(a, a[0], 2)
    with pytest.raises(EdgeDiTError, match="NaN"):
        psnr(a, a / 0, 2)
    with pytest.raises(EdgeDiTError, match="data_range is 0"):
        psnr(a, a, 0)


def test_names_load_lazily(run_python):
    code = """
import sys
import edgedit_hf.metrics as metrics
assert not {"torch", "numpy", "sklearn"} & set(sys.modules)
assert "frechet_distance" in dir(metrics) and callable(metrics.frechet_distance)
"""
    run_python(code)
    assert all(getattr(metrics, name) is not None for name in metrics.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fid'"):
        metrics.fid  # noqa: B018
