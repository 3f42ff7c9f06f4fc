"""The arithmetic of ADM's evaluator (of openai/guided-diffusion), restated from its formulas in NumPy
and SciPy, and that of torchmetrics' classes: what ours is held against, in the benchmark and in the tests.
"""

import warnings

import numpy as np
import scipy.linalg
import torch


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """By a matrix root, in float64; `[N, D]` and `[M, D]` with N, M > D."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root))


def inception_score(probabilities: np.ndarray, split: int = 5000) -> float:
    """Of answers `[N, classes]`, in consecutive parts."""
    scores = []
    for start in range(0, len(probabilities), split):
        part = probabilities[start : start + split].astype(np.float64)
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    return float(np.mean(scores))


def precision_recall(reference: np.ndarray, samples: np.ndarray, k: int = 3) -> tuple[float, float]:
    """From distances in half precision, the reference first."""

    def distances(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        u, v = u.astype(np.float16), v.astype(np.float16)
        norms = [(x * x).astype(np.float32).sum(1).astype(np.float16) for x in (u, v)]
        product = (u.astype(np.float32) @ v.astype(np.float32).T).astype(np.float16)
        return np.maximum(norms[0][:, None] - np.float16(2) * product + norms[1], np.float16(0)).astype(np.float32)

    radii = [np.sort(distances(x, x), axis=1)[:, k] for x in (reference, samples)]
    between = distances(reference, samples)
    return float((between <= radii[0][:, None]).any(0).mean()), float((between <= radii[1]).any(1).mean())


def of_torchmetrics(samples: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Fréchet distance by its class in float64, and kernel distance of as many of both as the smaller set has."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Given(torch.nn.Module):
        num_features = samples.shape[1]

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features.flatten(1)

    size = min(len(samples), len(reference))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that all features are kept
        metrics = (
            FrechetInceptionDistance(feature=Given(), normalize=True, input_img_size=(samples.shape[1], 1, 1)),
            KernelInceptionDistance(feature=Given(), subsets=1, subset_size=size),
        )
    for metric, numbers in zip(metrics, ((reference, samples), (reference[:size], samples[:size]))):
        metric.set_dtype(torch.float64)
        for features, real in zip(numbers, (True, False)):
            metric.update(torch.from_numpy(features).double()[:, :, None, None], real=real)
    return float(metrics[0].compute()), float(metrics[1].compute()[0])
