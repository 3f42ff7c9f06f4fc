"""How far generated images are from real ones: pure functions of features, in float64.

What ADM's evaluator (of openai/guided-diffusion) computes is here with its arithmetic: FID and sFID are
[`frechet_distance`] of its two kinds of features, then [`inception_score`] and [`adm_precision_recall`].

N: samples, D: feature width. Every function takes NumPy arrays or torch tensors and raises [`EdgeDiTError`] on values
that are not finite, on shapes that do not fit and on too few samples. What the features are is the caller's business:
"FID" without more means ADM's Inception features, everything else is a "Fréchet distance (extractor)".
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from ..errors import EdgeDiTError


def _array(values, name: str, ndim: int) -> np.ndarray:
    """`values` as float64, checked to have `ndim` dimensions and only finite entries."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().to(torch.float64).numpy()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:  # rows of several lengths, things that are no numbers
        raise EdgeDiTError(f"{name} is no array of numbers ({error}).") from None
    if array.ndim != ndim:
        raise EdgeDiTError(f"{name} has shape {array.shape}; expected {ndim} dimensions.")
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise EdgeDiTError(
            f"{name} holds {bad} NaN or infinite values out of {array.size}; find out what produced them."
        )
    return array


def _features(values, name: str, at_least: int) -> np.ndarray:
    """`values` as an [N, D] array with N ≥ `at_least`."""
    array = _array(values, name, 2)
    if array.shape[0] < at_least or array.shape[1] == 0:
        raise EdgeDiTError(
            f"{name} has shape {array.shape}; expected [N, D] with at least {at_least} samples and D ≥ 1."
        )
    return array


def _check_counts(least: int = 1, **counts: int) -> None:
    """Raise unless these are whole numbers of at least `least`."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise EdgeDiTError(f"{name} is {value!r}; it must be a whole number of at least {least}.")


def _check_width(a: np.ndarray, b: np.ndarray, names: tuple[str, str]) -> None:
    if a.shape[-1] != b.shape[-1]:
        raise EdgeDiTError(
            f"{names[0]} has features of width {a.shape[-1]} but {names[1]} of width {b.shape[-1]}; "
            "compute both with the same extractor."
        )


# ------------------------------------------------------------------ Fréchet distance


class RunningMoments:
    """Mean and covariance of features that arrive in batches, without keeping the features.

    Batches and other moments (of other ranks) are joined by the pairwise update of Chan, Golub and LeVeque (1979),
    which does not lose digits the way sums of squares do.

    Attributes:
        count: samples seen.
        mean: `[D]` (None before the first batch).
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: np.ndarray | None = None
        self._scatter: np.ndarray | None = None  # [D, D], sum of (x - mean)(x - mean)ᵀ

    def update(self, features) -> RunningMoments:
        """Add a batch `[n, D]`, n ≥ 1. Returns self."""
        batch = _features(features, "features", at_least=1)
        mean = batch.mean(axis=0)
        centred = batch - mean
        return self._join(len(batch), mean, centred.T @ centred)

    def merge(self, other: RunningMoments) -> RunningMoments:
        """Add what `other` has seen. Returns self."""
        return self._join(other.count, other.mean, other._scatter) if other.count else self

    def _join(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> RunningMoments:
        if self.mean is None:
            self.count, self.mean, self._scatter = count, mean.copy(), scatter.copy()
            return self
        _check_width(self.mean, mean, ("the moments so far", "the new batch"))
        total = self.count + count
        delta = mean - self.mean
        self._scatter = self._scatter + scatter + np.outer(delta, delta) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total
        return self

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance `[D, D]`; needs at least two samples."""
        if self.count < 2:
            raise EdgeDiTError(f"A covariance needs at least 2 samples, but only {self.count} were seen.")
        assert self._scatter is not None
        return self._scatter / (self.count - 1)

    def notes(self, what: str) -> list[str]:
        """What makes a distance of these moments worth less, in words: too few samples, features that do not vary.

        Args:
            what: whose moments they are, such as "the samples".
        """
        covariance, said = self.covariance, []
        assert self.mean is not None
        if self.count <= (width := len(self.mean)):
            said.append(
                f"{what}: {self.count} images are too few for {width} features, the covariance is singular and a "
                f"Fréchet distance biased upwards; take more than {width}, or an extractor with fewer features."
            )
        # Equal values may have a mean that is off by its rounding, and so a variance of almost nothing.
        still = np.flatnonzero(np.sqrt(covariance.diagonal()) <= 1e-9 * np.abs(self.mean))
        if len(still):
            named = ", ".join(map(str, still[:3])) + (", …" if len(still) > 3 else "")
            said.append(f"{what}: {len(still)} of {width} features (number {named}) have no variance.")
        return said

    def state_dict(self) -> dict:
        """`{"count", "mean", "scatter"}`, to be gathered from ranks or stored."""
        return {"count": self.count, "mean": self.mean, "scatter": self._scatter}

    def load_state_dict(self, state: Mapping) -> RunningMoments:
        """Take over what [`~RunningMoments.state_dict`] returned. Returns self."""
        count = int(state["count"])
        if count == 0:
            self.count, self.mean, self._scatter = 0, None, None
            return self
        mean, scatter = _array(state["mean"], "mean", 1), _array(state["scatter"], "scatter", 2)
        if scatter.shape != (len(mean), len(mean)):
            raise EdgeDiTError(f"The state's mean has width {len(mean)} but its scatter has shape {scatter.shape}.")
        self.count, self.mean, self._scatter = count, mean, scatter
        return self


def _factor(covariance: np.ndarray) -> np.ndarray:
    """F `[D, rank]` with F Fᵀ = the positive semi-definite matrix; eigenvalues not above zero are rounding and left
    out.
    """
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return vectors[:, values > 0] * np.sqrt(values[values > 0])


def frechet_distance_from_moments(mean_a, covariance_a, mean_b, covariance_b) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians, |μa − μb|² + Tr(A + B − 2 (AB)^½) (Dowson & Landau
    1982).

    With A = F Fᵀ and B = G Gᵀ, Tr (AB)^½ is the sum of the singular values of Fᵀ G: always real, and exact to rounding
    for covariances without full rank (fewer samples than features), where a matrix root of AB is not.

    Args:
        mean_a, mean_b: `[D]`.
        covariance_a, covariance_b: `[D, D]`, symmetric positive semi-definite.

    Returns:
        The distance, ≥ 0.
    """
    mean_a, mean_b = _array(mean_a, "the first mean", 1), _array(mean_b, "the second mean", 1)
    cov_a, cov_b = _array(covariance_a, "the first covariance", 2), _array(covariance_b, "the second covariance", 2)
    _check_width(mean_a, mean_b, ("the first mean", "the second mean"))
    for cov in (cov_a, cov_b):
        if cov.shape != (len(mean_a), len(mean_a)):
            raise EdgeDiTError(f"A covariance has shape {cov.shape}, but the means have width {len(mean_a)}.")
    trace_root = np.linalg.svd(_factor(cov_a).T @ _factor(cov_b), compute_uv=False).sum()
    distance = float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_root)
    return max(distance, 0.0)  # two equal Gaussians may come out at minus a rounding error


def frechet_distance(a, b) -> float:
    """Fréchet distance of two sets of features `[N, D]` and `[M, D]`, N, M ≥ 2, fitted by Gaussians (Heusel et al.
    2017).

    It is biased upwards for small sets: compare only values of the same N and M.

    Example:
        >>> frechet_distance(real_features, generated_features)
    """
    a, b = _features(a, "the first set", at_least=2), _features(b, "the second set", at_least=2)
    _check_width(a, b, ("the first set", "the second set"))
    first, second = RunningMoments().update(a), RunningMoments().update(b)
    return frechet_distance_from_moments(first.mean, first.covariance, second.mean, second.covariance)


def frechet_standard_error(features, reference, resamples: int = 20, seed: int = 0) -> float:
    """Bootstrap standard error of `frechet_distance(features, reference)` from the sampling of `features` alone.

    The rows of `features` are drawn anew with replacement, `resamples` times; the reference, which all distances that
    are compared share, stays. A redrawn set's distance is biased upwards further than the set's own, so only the
    spread of the redrawn distances is given; with fewer samples than features it errs on the high side. Memory: three
    times the features in float64.

    Args:
        features: `[N, D]`. reference: `[M, D]`, or its mean `[D]` and covariance `[D, D]`. N, M ≥ 2.
        resamples: ≥ 2; 20 give the standard error to about 16 %.
        seed: of the draws.
    """
    _check_counts(least=2, resamples=resamples)
    x = _features(features, "features", at_least=2)
    if not isinstance(reference, tuple):
        moments = RunningMoments().update(_features(reference, "reference", at_least=2))
        reference = moments.mean, moments.covariance
    reference_mean, covariance = reference
    _check_width(x, reference_mean, ("features", "reference"))
    # Tr (AB)^½ is the sum of the roots of the eigenvalues of Gᵀ A G, that is of the covariance of x G (B = G Gᵀ).
    x = x - reference_mean
    squares, y = (x**2).sum(axis=1), x @ _factor(covariance)
    rng, distances = np.random.default_rng(seed), []
    for _ in range(resamples):
        rows = rng.integers(len(x), size=len(x))
        mean, centred = x[rows].mean(axis=0), y[rows] - y[rows].mean(axis=0)
        gram = centred @ centred.T if len(x) < y.shape[1] else centred.T @ centred
        roots = np.sqrt(np.maximum(np.linalg.eigvalsh(gram / (len(x) - 1)), 0)).sum()
        offset = mean @ mean
        distances.append(offset + (squares[rows].mean() - offset) * len(x) / (len(x) - 1) - 2 * roots)
    return float(np.std(distances, ddof=1))


# ------------------------------------------------------------------ precision and recall


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances `[len(a), len(b)]` by one matrix product."""
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :]
    return np.maximum(squares - 2 * (a @ b.T), 0)


def _squared_radii(points: np.ndarray, k: int, chunk: int) -> np.ndarray:
    """Squared distance of every point to its k-th nearest other point, `[N]`."""
    radii = np.empty(len(points))
    for start in range(0, len(points), chunk):
        distances = _squared_distances(points[start : start + chunk], points)
        rows = np.arange(len(distances))
        distances[rows, start + rows] = np.inf  # a point is not its own neighbour
        radii[start : start + chunk] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return radii


def _covered(points: np.ndarray, centres: np.ndarray, squared_radii: np.ndarray, chunk: int) -> float:
    """Fraction of the points that lie in at least one of the balls."""
    inside = 0
    for start in range(0, len(points), chunk):
        distances = _squared_distances(points[start : start + chunk], centres)
        inside += int((distances <= squared_radii).any(axis=1).sum())
    return inside / len(points)


def precision_recall(real, fake, k: int = 3, chunk: int = 2048) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eqs. 1-2).

    Precision is the fraction of generated samples inside the real manifold (the union of the balls that reach from
    each real sample to its k-th nearest real neighbour), recall the same with the roles exchanged.

    Args:
        real, fake: features `[N, D]` and `[M, D]`, N, M > k.
        k: neighbours.
        chunk: rows of the distance matrix held at a time (memory: chunk · max(N, M) · 8 bytes).

    Returns:
        (precision, recall), both in [0, 1].
    """
    _check_counts(k=k, chunk=chunk)
    real, fake = _features(real, "real", at_least=k + 1), _features(fake, "fake", at_least=k + 1)
    _check_width(real, fake, ("real", "fake"))
    centre = real.mean(axis=0)  # small norms keep the digits that the matrix product would cancel
    real, fake = real - centre, fake - centre
    precision = _covered(fake, real, _squared_radii(real, k, chunk), chunk)
    recall = _covered(real, fake, _squared_radii(fake, k, chunk), chunk)
    return precision, recall


def _adm_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared distances `[len(a), len(b)]` float32 as ADM rounds them: in half precision, unless one overflows."""
    half_a, half_b = a.half(), b.half()
    norm_a, norm_b = ((half * half).float().sum(1).half() for half in (half_a, half_b))
    product = (half_a.float() @ half_b.float().T).half()  # accumulated in float32, as GPUs do
    found = norm_a[:, None] - 2 * product + norm_b[None, :]
    if not torch.isfinite(found).all():
        found = (a**2).sum(1)[:, None] - 2 * (a @ b.T) + (b**2).sum(1)[None, :]
    return found.clamp(min=0).float()


def _adm_radii(points: torch.Tensor, k: int, batch: int) -> torch.Tensor:
    """Squared distance to the k-th nearest neighbour, `[N]`; a point counts as its own nearest."""
    radii = [
        torch.cat([_adm_distances(rows, columns) for columns in points.split(batch)], dim=1).kthvalue(k + 1).values
        for rows in points.split(batch)
    ]
    return torch.cat(radii)


def adm_precision_recall(real, fake, k: int = 3, batch: int = 10_000) -> tuple[float, float]:
    """Precision and recall as ADM's evaluator computes them: what published figures of diffusion models are.

    The definition is that of [`precision_recall`], but distances are rounded to half precision (float32 in a block
    where one overflows), so that points near a ball's surface may change sides: figures move by up to about .005, and
    with the order of `real` and `fake`, whose roles in the rounding differ.

    Args:
        real, fake: features `[N, D]` and `[M, D]`, N, M > k. ADM takes the 10,000 images of its reference file and all
            samples.
        k: neighbours.
        batch: rows and columns of a block (memory: batch · max(N, M) · 6 bytes).

    Returns:
        (precision, recall), both in [0, 1].
    """
    _check_counts(k=k, batch=batch)
    real, fake = _features(real, "real", at_least=k + 1), _features(fake, "fake", at_least=k + 1)
    _check_width(real, fake, ("real", "fake"))
    ours, theirs = (torch.from_numpy(points).float() for points in (fake, real))
    radii, their_radii = _adm_radii(ours, k, batch), _adm_radii(theirs, k, batch)
    inside, covered = torch.zeros(len(ours), dtype=torch.bool), torch.zeros(len(theirs), dtype=torch.bool)
    for row in range(0, len(theirs), batch):
        for column in range(0, len(ours), batch):
            rows, columns = slice(row, row + batch), slice(column, column + batch)
            distances = _adm_distances(theirs[rows], ours[columns])
            covered[rows] |= (distances <= radii[columns]).any(1)
            inside[columns] |= (distances <= their_radii[rows, None]).any(0)
    return float(inside.double().mean()), float(covered.double().mean())


# ------------------------------------------------------------------ kernel distance


def kernel_distance(
    features, reference, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance (KID in Inception's features): the unbiased squared maximum mean discrepancy with the kernel
    (x·y / D + 1)³ (Bińkowski et al. 2018), over random subsets of both sets.

    torchmetrics' arithmetic, in float64; the subsets are drawn by `seed`, where its class takes the global generator.

    Args:
        features: `[N, D]`. reference: `[M, D]`. N, M ≥ subset_size ≥ 2.
        subsets: ≥ 1.

    Returns:
        (mean, standard deviation) over the subsets.
    """
    from torchmetrics.image.kid import poly_mmd

    _check_counts(subsets=subsets)
    _check_counts(least=2, subset_size=subset_size)
    _check_counts(least=0, seed=seed)
    x = _features(features, "features", at_least=subset_size)
    y = _features(reference, "reference", at_least=subset_size)
    _check_width(x, y, ("features", "reference"))
    rng, found = np.random.default_rng(seed), []
    for _ in range(subsets):
        parts = [torch.from_numpy(z[rng.choice(len(z), subset_size, replace=False)]) for z in (y, x)]
        found.append(float(poly_mmd(*parts)))
    return float(np.mean(found)), float(np.std(found))


# ------------------------------------------------------------------ inception score, PSNR


def inception_score(logits, split_size: int = 5000) -> tuple[float, float]:
    """Inception score exp(E KL(p(y|x) ‖ p(y))) of a classifier's answers (Salimans et al. 2016), as ADM computes it.

    torchmetrics' is another: it shuffles by the global generator and cuts into 10 parts, whatever their size.

    Args:
        logits: `[N, classes]` logits or log-probabilities (the same to a softmax). ADM leaves out the last layer's
            bias.
        split_size: samples of the consecutive parts that the score is computed on; the last may be smaller.

    Returns:
        (mean, standard deviation) over the parts.
    """
    _check_counts(split_size=split_size)
    logits = _features(logits, "logits", at_least=1)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    scores = []
    for start in range(0, len(log_p), split_size):
        part = log_p[start : start + split_size]
        p = np.exp(part)
        marginal = np.log(np.clip(p.mean(axis=0), np.finfo(np.float64).tiny, None))
        scores.append(np.exp((p * (part - marginal)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def psnr(a, b, data_range: float) -> float:
    """Peak signal-to-noise ratio in dB of two arrays of one shape over all their elements; infinite when they are
    equal.

    Args:
        a, b: images of any equal shape.
        data_range: largest minus smallest value an image can have (2 for [-1, 1], 255 for bytes).
    """
    a, b = _array(a, "a", np.ndim(a)), _array(b, "b", np.ndim(b))
    if a.shape != b.shape or a.size == 0:
        raise EdgeDiTError(f"The images have the shapes {a.shape} and {b.shape}; they must be equal and not empty.")
    if not data_range > 0:
        raise EdgeDiTError(f"data_range is {data_range}; it must be greater than 0.")
    error = float(((a - b) ** 2).mean())
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)
