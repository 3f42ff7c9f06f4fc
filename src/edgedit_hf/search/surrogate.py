"""Models of the two objectives, fitted to the genotypes told, and the value of evaluating one more. BoTorch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.acquisition.multi_objective import logei
from botorch.acquisition.multi_objective.monte_carlo import qExpectedHypervolumeImprovement
from botorch.exceptions.errors import ModelFittingError
from botorch.fit import fit_gpytorch_mll
from botorch.models import ModelList, SingleTaskGP
from botorch.models.deterministic import GenericDeterministicModel
from botorch.models.model import Model
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.sampling.get_sampler import get_sampler
from botorch.utils.multi_objective.box_decompositions.non_dominated import FastNondominatedPartitioning
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel, MaternKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from gpytorch.means import Mean
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import GammaPrior, NormalPrior
from torch import Tensor

from .encoding import Encoding

MC_SAMPLES = 16  # the latency being known, of one dimension
SAME = 1e-6  # a latency told is the programme's sum if it is so to this share of itself


class ScoreMean(Mean):
    """A prior mean: an affine function of one input column, the summed block score."""

    def __init__(self, column: int) -> None:
        super().__init__()
        self.column = column
        self.register_parameter("offset", torch.nn.Parameter(torch.zeros(())))
        self.register_parameter("scale", torch.nn.Parameter(torch.zeros(())))
        self.register_prior("scale_prior", NormalPrior(0.0, 1.0), "scale")

    def forward(self, x: Tensor) -> Tensor:
        return self.offset + self.scale * x[..., self.column]


class Surrogate:
    """Models of the objectives, fitted to what is told, of negated and standardised (log distance, latency): BoTorch
    maximises, and the smoothing widths of its acquisition functions are absolute.

    The log of the distance is a Gaussian process. So is the latency, unless all latencies told are the programme's
    sums: those are known for every genotype.

    Args:
        encoding: of the codes.
        codes: told ones, canonical. points: (distance, latency_ms) of each. noise: the distances' standard errors,
            where they are known.
        reference: the point that bounds the hypervolume.
        kernel, prior_mean: others to compare with; the mean of the distance is an affine function of the programme's
            score.
    """

    def __init__(
        self,
        encoding: Encoding,
        codes: Sequence[Sequence[int]],
        points: Sequence[Sequence[float]],
        noise: Sequence[float | None],
        reference: Sequence[float],
        kernel: Callable[[Encoding], Kernel] | None = None,
        prior_mean: bool = True,
    ) -> None:
        self.encoding = encoding
        self._score = encoding.columns.get("score")
        rows = encoding.rows(codes)
        if self._score is not None:
            scores = rows[:, self._score]
            self._score_scale = scores.mean(), _spread(scores)
        self.x = self.inputs(rows)
        y = _targets(points)
        self.mean, self.std = y.mean(dim=0), torch.stack([_spread(column) for column in y.T])
        self.y = (y - self.mean) / self.std
        self.reference = ((_targets([reference]) - self.mean) / self.std)[0]
        errors = [float("nan") if error is None else error / point[0] for error, point in zip(noise, points)]
        variance = (torch.tensor(errors, dtype=torch.float64) / self.std[0]) ** 2
        variance = torch.where(variance.isnan(), variance.nanmedian(), variance).clamp_min(1e-6)
        self.model = ModelList(
            fit(
                self.x,
                self.y[:, :1],
                (kernel or distance_kernel)(encoding),
                ScoreMean(self._score) if prior_mean and self._score is not None else None,
                None if variance.isnan().any() else variance[:, None],
            ),
            self._latency(rows, points, kernel),
        )

    def _latency(
        self, rows: Tensor, points: Sequence[Sequence[float]], kernel: Callable[[Encoding], Kernel] | None
    ) -> Model:
        encoding = self.encoding
        column = encoding.columns.get("latency_ms")
        told = torch.tensor([point[1] for point in points], dtype=torch.float64)
        if column is None or not torch.allclose(rows[:, column], told, rtol=SAME, atol=0):
            return fit(self.x, self.y[:, 1:], (kernel or features_kernel)(encoding), None, None)
        mean, std = self.mean[1], self.std[1]
        return GenericDeterministicModel(lambda x: (-x[..., column, None] - mean) / std)

    def inputs(self, rows: Tensor) -> Tensor:
        """Rows of the encoding as the models take them: the score is standardised over what is told."""
        if self._score is None:
            return rows
        x = rows.clone()
        x[:, self._score] = (x[:, self._score] - self._score_scale[0]) / self._score_scale[1]
        return x

    def acquisition(self, kind: str, unknown: Tensor | None, seed: int) -> AcquisitionFunction:
        """The value of one more genotype, given the data and the rows whose outcome is still `unknown`."""
        # BoTorch would compile a C++ kernel here on first use: half a minute, a lock file that a killed process leaves
        # behind for the next one to wait on, and other roundings with a compiler than without. This tells it not to
        # try.
        logei._load_attempted = True

        pending = None if unknown is None else self.inputs(unknown)
        y, model = self.y, self.model
        if pending is not None and kind != "qlognehvi":
            with torch.no_grad():
                believed = self.model.posterior(pending).mean
            y, model = torch.cat([y, believed]), self._believing(pending, believed)
        with torch.no_grad():
            sampler = get_sampler(model.posterior(self.x[:1]), torch.Size([MC_SAMPLES]), seed=seed)
        if kind == "qlognehvi":
            return logei.qLogNoisyExpectedHypervolumeImprovement(
                model,
                self.reference,
                X_baseline=self.x,
                sampler=sampler,
                prune_baseline=True,
                X_pending=pending,
                cache_root=False,
            )
        reached = FastNondominatedPartitioning(self.reference, y)
        log = kind == "qlogehvi"
        function = logei.qLogExpectedHypervolumeImprovement if log else qExpectedHypervolumeImprovement
        return function(model, self.reference, reached, sampler=sampler)

    def _believing(self, pending: Tensor, believed: Tensor) -> ModelList:
        """The models, as if the pending ones had come out as `believed`."""

        models: list[Model] = []
        for place, model in enumerate(self.model.models):
            if isinstance(model, SingleTaskGP):
                given = isinstance(model.likelihood, FixedNoiseGaussianLikelihood)
                options = {"noise": model.likelihood.noise.mean().expand(len(pending), 1)} if given else {}
                model = model.condition_on_observations(pending, believed[:, place : place + 1], **options)
            models.append(model)
        return ModelList(*models)


class PointwiseGP(SingleTaskGP):
    """A SingleTaskGP whose posterior at many points that are valued one by one, `[n, 1, d]`, is worked out for all at
    once: BoTorch would factor a matrix for each.
    """

    def posterior(self, X: Tensor, *args, **options) -> GPyTorchPosterior:
        if X.ndim != 3 or X.shape[1] != 1:
            return super().posterior(X, *args, **options)
        joint = super().posterior(X[:, 0], *args, **options)
        return GPyTorchPosterior(MultivariateNormal(joint.mean, joint.variance[..., None]))


def fit(x: Tensor, y: Tensor, kernel: Kernel, mean: Mean | None, variance: Tensor | None) -> SingleTaskGP:
    """A Gaussian process fitted to `y` `[n, 1]` at `x` `[n, d]`; noise of unknown variance is inferred. Where a few
    points, or equal ones, leave nothing to fit, it has its priors' usual values.
    """

    options = {} if mean is None else {"mean_module": mean}
    model = PointwiseGP(x, y, train_Yvar=variance, covar_module=kernel, outcome_transform=None, **options)
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    before = copy.deepcopy(model.state_dict())
    try:
        fit_gpytorch_mll(
            mll, optimizer_kwargs={"options": {"ftol": 1e-6}}, max_attempts=2
        )  # the default takes 4x as long
    except ModelFittingError:
        model.load_state_dict(before)
        mll.eval()
    return model


class KindMatern(Kernel):
    """Matérn 5/2 with a length scale for every kind of input: merged, a narrower MLP, …, the score.

    Args:
        kinds: of each input, numbers from 0 on.
    """

    def __init__(self, kinds: Sequence[int]) -> None:
        super().__init__(active_dims=tuple(range(len(kinds))))
        self._kinds = torch.tensor(kinds)
        # BoTorch's prior of a length scale, which grows with the root of the number of inputs (Hvarfner et al. 2024).
        counts = torch.bincount(self._kinds).to(torch.float64)
        usual = math.sqrt(2) + counts.log() / 2
        self.register_parameter("log_scales", torch.nn.Parameter(usual - 1))
        self.register_prior("log_scales_prior", NormalPrior(usual, torch.ones_like(usual)), "log_scales")
        self._matern = MaternKernel(2.5)
        self._matern.lengthscale = 1.0
        self._matern.raw_lengthscale.requires_grad_(False)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **options) -> Tensor:
        scales = self.log_scales.exp()[self._kinds]
        return self._matern(x1 / scales, x2 / scales, diag=diag, **options)


def features_kernel(encoding: Encoding) -> Kernel:
    """Of the features alone."""
    return ScaleKernel(KindMatern(encoding.kinds), outputscale_prior=GammaPrior(2.0, 0.15))


def distance_kernel(encoding: Encoding) -> Kernel:
    """Of the features and, where there is a programme, its score: of those compared (docs/search.md), among the
    best at the sizes of a search.
    """
    kinds = [*encoding.kinds, 1 + max(encoding.kinds)] if "score" in encoding.columns else encoding.kinds
    return ScaleKernel(KindMatern(kinds), outputscale_prior=GammaPrior(2.0, 0.15))


def _targets(points: Sequence[Sequence[float]]) -> Tensor:
    """-(log distance, latency), shape (n, 2): BoTorch maximises."""
    y = torch.tensor(points, dtype=torch.float64).reshape(-1, 2)
    return -torch.stack([y[:, 0].log(), y[:, 1]], dim=1)


def _spread(values: Tensor) -> Tensor:
    """Their standard deviation; 1 where they do not differ."""
    spread = values.std(correction=0)
    return torch.where(spread > 0, spread, torch.ones_like(spread))
