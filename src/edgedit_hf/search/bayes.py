"""Multi-objective Bayesian optimisation over genotypes, on BoTorch. How to drive it: [`edgedit_hf.search.ask_tell`]."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import EdgeDiTError
from ..search_space import SearchSpace
from .ask_tell import AskTellSearch, Code, RandomSearch, first_unseen, sobol, summary
from .pareto import pareto_front

if TYPE_CHECKING:
    from botorch.acquisition import AcquisitionFunction
    from botorch.models import ModelListGP

__all__ = ["BayesSearch", "RandomSearch", "summary"]

ACQUISITIONS = ("qlogehvi", "qlognehvi", "ehvi")
MC_SAMPLES = 64


class BayesSearch(AskTellSearch):
    """Multi-objective Bayesian optimisation (EdgeDiT; qLogEHVI: Ament et al. 2023, qNEHVI: Daulton et al. 2021).

    Surrogates: one GP an objective on `space.features`; the distance, which spans orders of magnitude, enters as its
    log. Candidates are taken one after the other, each given the ones before it, from a pool of unseen genotypes:
    neighbours of the current front (at most half of the pool) and Sobol points; the whole rest of the space when that
    is no larger.

    Args:
        acquisition: "qlogehvi", "qlognehvi" or "ehvi" (the paper's, not in logs). Genotypes that were asked for and not
            told yet enter the first and last with their predicted mean (kriging believer: the exact joint value of q of
            them costs 2^q); "qlognehvi" integrates over their outcomes, and over noise in the told ones, at about
            thrice the time.
        pool_size: genotypes among which the acquisition function chooses.
        Others: see [`AskTellSearch`].
    """

    kind = "bayes"

    def __init__(
        self,
        space: SearchSpace,
        num_evaluations: int,
        seed: int = 0,
        num_initial: int = 8,
        reference: Sequence[float] | None = None,
        acquisition: str = "qlogehvi",
        pool_size: int = 512,
    ) -> None:
        if acquisition not in ACQUISITIONS:
            raise EdgeDiTError(f"acquisition is {str(acquisition)[:100]!r}; it must be one of {ACQUISITIONS}.")
        if pool_size < 2:
            raise EdgeDiTError(f"pool_size is {pool_size}; the pool needs at least 2 genotypes.")
        super().__init__(space, num_evaluations, seed, num_initial, reference)
        self.acquisition = acquisition
        self.pool_size = int(pool_size)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "acquisition": self.acquisition, "pool_size": self.pool_size}

    def propose(self, count: int) -> list[Code]:
        if self.reference is None:
            raise EdgeDiTError(
                f"{len(self.told)} of {self.num_initial} initial points are told; tell the pending ones before asking."
            )
        from botorch.optim import optimize_acqf_discrete

        pool = self._pool()
        chosen: list[Code] = []
        with _reproducible(self._step_seed()):
            surrogates = self._fit()
            while pool and len(chosen) < count:
                acquisition = self._acquisition_function(*surrogates, unknown=[*self._pending, *chosen])
                choices = self._features(pool)
                best, _ = optimize_acqf_discrete(acquisition, q=1, choices=choices)
                chosen.append(pool.pop(int((choices == best).all(dim=1).nonzero()[0])))
        return chosen

    def _step_seed(self) -> int:
        return int(np.random.SeedSequence([self.seed, len(self.told), len(self._pending)]).generate_state(1)[0])

    def _features(self, codes: Iterable[Code]) -> Tensor:
        rows = [self.space.features(self.space.from_code(code)) for code in codes]
        return torch.tensor(rows, dtype=torch.float64)

    def _pool(self) -> list[Code]:
        """The unseen genotypes among which the acquisition function chooses."""
        seen = self.seen()
        if self.space.size - len(seen) <= self.pool_size:
            return [code for code in itertools.product(*self.space.allowed) if code not in seen]
        front = [self.space.from_code(self.told[index]["code"]) for index in pareto_front(self.points)]
        near = sorted({self.space.code(g) for parent in front for g in self.space.neighbours(parent)} - seen)
        np.random.default_rng(self._step_seed()).shuffle(near)
        pool = [tuple(int(c) for c in code) for code in near[: self.pool_size // 2]]
        far = sobol(self.space, 8 * self.pool_size, self._step_seed())
        return pool + first_unseen(far, seen | set(pool), self.pool_size - len(pool))

    def _fit(self) -> tuple[ModelListGP, Tensor, Tensor, Tensor]:
        """Fitted GPs on standardised, negated objectives (BoTorch maximises): (model, inputs, outcomes, reference
        point).
        """
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import ModelListGP, SingleTaskGP
        from gpytorch.mlls import SumMarginalLogLikelihood

        x = self._features(tuple(point["code"]) for point in self.told)
        y = _surrogate_targets(self.points)
        mean, std = y.mean(dim=0), y.std(dim=0, correction=0)
        std = torch.where(std > 0, std, 1.0)
        y = (y - mean) / std
        assert self.reference is not None
        reference = ((_surrogate_targets([self.reference]) - mean) / std)[0]
        # Outcomes are standardised here and not inside each GP, so that the acquisition function, whose smoothing
        # widths are absolute, sees objectives of the order of 1.
        model = ModelListGP(*(SingleTaskGP(x, y[:, i : i + 1], outcome_transform=None) for i in range(2)))
        mll = SumMarginalLogLikelihood(model.likelihood, model)
        fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"ftol": 1e-6}})  # a quarter of the default's time
        return model, x, y, reference

    def _acquisition_function(
        self, model: ModelListGP, x: Tensor, y: Tensor, reference: Tensor, unknown: list[Code]
    ) -> AcquisitionFunction:
        """The value of one more genotype, given the data and those whose outcome is still `unknown`."""
        from botorch.acquisition.multi_objective import logei
        from botorch.acquisition.multi_objective.monte_carlo import qExpectedHypervolumeImprovement
        from botorch.sampling import SobolQMCNormalSampler
        from botorch.utils.multi_objective.box_decompositions.non_dominated import FastNondominatedPartitioning

        # BoTorch would compile a C++ kernel here on first use: half a minute, a lock file that a killed process leaves
        # behind for the next one to wait on, and other roundings with a compiler than without. This tells it not to
        # try.
        logei._load_attempted = True

        sampler = SobolQMCNormalSampler(torch.Size([MC_SAMPLES]), seed=self._step_seed() % 2**31)
        pending = self._features(unknown) if unknown else None
        if self.acquisition == "qlognehvi":
            return logei.qLogNoisyExpectedHypervolumeImprovement(
                model, reference, X_baseline=x, sampler=sampler, prune_baseline=True, X_pending=pending
            )
        if pending is not None:
            with torch.no_grad():
                believed = model.posterior(pending).mean
                model = model.condition_on_observations([pending] * 2, believed)
            y = torch.cat([y, believed])
        logs = self.acquisition == "qlogehvi"
        kind = logei.qLogExpectedHypervolumeImprovement if logs else qExpectedHypervolumeImprovement
        return kind(model, reference, FastNondominatedPartitioning(reference, y), sampler=sampler)


def _surrogate_targets(points: Sequence[Sequence[float]]) -> Tensor:
    """-(log distance, latency), shape (n, 2): BoTorch maximises."""
    y = torch.tensor(points, dtype=torch.float64).reshape(-1, 2)
    return -torch.stack([y[:, 0].log(), y[:, 1]], dim=1)


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """One thread and a fixed seed, both given back afterwards, so that what is asked depends on neither. Hushes
    BoTorch's notes that unscaled inputs (the features are 0 and 1 already) and plain EHVI (asked for by name) are
    unusual.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            from botorch.exceptions.warnings import InputDataWarning, NumericsWarning

            warnings.simplefilter("ignore", InputDataWarning)
            warnings.simplefilter("ignore", NumericsWarning)
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
