"""Multi-objective Bayesian optimisation over genotypes, on BoTorch. How to drive it: [`edgedit_hf.search.ask_tell`]."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import EdgeDiTError
from ..search_space import SearchSpace
from .ask_tell import AskTellSearch, Code, RandomSearch, fingerprint, first_unseen, sobol, summary
from .encoding import Encoding
from .pareto import pareto_front
from .programme import SLACK, Programme

if TYPE_CHECKING:
    from gpytorch.kernels import Kernel

    from .surrogate import Surrogate

__all__ = ["BayesSearch", "RandomSearch", "summary"]

ACQUISITIONS = ("qlogehvi", "qlognehvi", "ehvi")
EXHAUSTIVE = 512  # genotypes left at which all of them are looked at
STARTS, PLANNED = 128, 4  # genotypes looked at first: of neighbours of the front and of Sobol points; the programme's
CLIMBS = 3  # of these, the best from which local search starts
BATCH = 1024  # genotypes valued at a time


class BayesSearch(AskTellSearch):
    """Multi-objective Bayesian optimisation (EdgeDiT; qLogEHVI: Ament et al. 2023, qNEHVI: Daulton et al. 2021).

    It refines what a programme of block scores and costs says ([`programme`]): the initial points are the ends of the
    space, the programme's best solutions along the budgets, and Sobol points; the log of the distance is a Gaussian
    process whose prior mean is an affine function of the summed score; the latency, where it is the programme's sum, is
    known and not modelled. Without a programme each objective is a process on the features alone.

    Candidates are taken one after the other, each given the ones before it, by BoTorch's discrete local search over
    codes from several starts: neighbours of the front, further solutions of the programme, Sobol points; where few
    genotypes are left, among all of them.

    Args:
        acquisition: "qlogehvi", "qlognehvi" or "ehvi" (the paper's, not in logs). Genotypes that were asked for and not
            told yet enter the first and last with their predicted mean (kriging believer: the exact joint value of q of
            them costs 2^q); "qlognehvi" integrates over their outcomes, and over the noise of the told ones: what
            `tell` was given, else what the process infers.
        programme: of the space's replacements, with the cost "latency_ms".
        caps: greatest values of the programme's costs: a genotype that breaks one is never asked for.
        Others: see [`AskTellSearch`].
    """

    kind = "bayes"
    kernel: Callable[[Encoding], Kernel] | None = None  # another than the surrogate's own, to compare with

    def __init__(
        self,
        space: SearchSpace,
        num_evaluations: int,
        seed: int = 0,
        num_initial: int = 8,
        reference: Sequence[float] | None = None,
        acquisition: str = "qlogehvi",
        programme: Programme | None = None,
        caps: Mapping[str, float] | None = None,
    ) -> None:
        if acquisition not in ACQUISITIONS:
            raise EdgeDiTError(f"acquisition is {str(acquisition)[:100]!r}; it must be one of {ACQUISITIONS}.")
        if caps and not programme:
            raise EdgeDiTError(f"There are caps on {sorted(caps)} but no programme, which knows what a genotype costs.")
        super().__init__(space, num_evaluations, seed, num_initial, reference)
        self.acquisition = acquisition
        self.programme = programme
        self.caps = dict(caps or {})
        self.encoding = Encoding(space, programme)
        self._planned: list[Code] = []
        self._plan = programme.plan("latency_ms", self.caps) if programme else iter(())

    def settings(self) -> dict[str, Any]:
        own = {"acquisition": self.acquisition, "programme": fingerprint(self.programme), "caps": self.caps}
        return {**super().settings(), **own}

    # ---------------------------------------------------------------- what may be asked

    def _planned_codes(self) -> Iterator[Code]:
        """The programme's solutions in the order of its plan, solved once."""
        for place in itertools.count():
            if place == len(self._planned):
                if (solution := next(self._plan, None)) is None:
                    return
                self._planned.append(self.space.code(solution.genotype))
            yield self._planned[place]

    def _initial_stream(self) -> Iterator[Code]:
        ends = map(self.space.code, self.space.ends())
        planned = max(1, self.num_initial - 2 - self.num_initial // 4)  # the rest are Sobol points
        spread = sobol(self.space, 64 * self.num_initial, self.seed)
        first = itertools.islice(self._planned_codes(), planned)
        return filter(self.keeps_caps, itertools.chain(ends, first, spread, self.all_codes()))

    def keeps_caps(self, code: Code) -> bool:
        return not self.caps or bool(self._within(self.encoding.rows([code])))

    def all_codes(self) -> Iterator[Code]:
        return self._planned_codes() if self.programme else self.space.codes()

    def _within(self, rows: Tensor) -> Tensor:
        """Which rows keep the caps."""
        kept = torch.ones(len(rows), dtype=torch.bool)
        for name, cap in self.caps.items():
            kept &= rows[:, self.encoding.columns[name]] <= cap * (1 + SLACK)
        return kept

    # ---------------------------------------------------------------- what is asked

    def propose(self, count: int) -> list[Code]:
        if self.reference is None:
            raise EdgeDiTError(
                f"{len(self.told)} of {self.num_initial} initial points are told; tell the pending ones before asking."
            )
        chosen: list[Code] = []
        from .surrogate import Surrogate

        with _reproducible(self._step_seed()):
            codes = [point["code"] for point in self.told]
            noisy = self.acquisition == "qlognehvi"
            noise = [point.get("noise") if noisy else None for point in self.told]
            surrogate = Surrogate(self.encoding, codes, self.points, noise, self.reference, self.kernel)
            starts = self._starts()
            while len(chosen) < count:
                if (best := self._best(surrogate, starts, [*self._pending, *chosen])) is None:
                    break
                chosen.append(best)
        return chosen

    def _step_seed(self) -> int:
        known = [self.seed, self.evaluated, len(self._pending)]
        return int(np.random.SeedSequence(known).generate_state(1)[0])

    def _starts(self) -> list[Code]:
        """Genotypes from which the best next one may be near; all that are left, where they are few."""
        seen = self.seen()
        if self._few_left():
            return [code for code in self.space.codes() if code not in seen]
        planned = first_unseen(self._planned_codes(), seen, PLANNED)
        far = sobol(self.space, 2 * STARTS, self._step_seed())
        return first_unseen(itertools.chain(planned, self._near()), seen, PLANNED + STARTS) + first_unseen(
            far, seen, STARTS
        )

    def _near(self) -> list[Code]:
        """Genotypes in which one entry of the code of a point of the front is another one, shuffled."""
        changed = []
        for index in pareto_front(self.points):
            code = self.told[index]["code"]
            for place, choices in enumerate(self.space.allowed):
                changed += [[*code[:place], choice, *code[place + 1 :]] for choice in choices]
        codes, legal = self.encoding.canonical(torch.tensor(changed))
        near = codes[legal].unique(dim=0)
        return list(map(tuple, near[torch.randperm(len(near))].tolist()))

    def _best(self, surrogate: Surrogate, starts: Sequence[Code], unknown: Sequence[Code]) -> Code | None:
        """The genotype of the greatest value that is neither seen nor `unknown` and keeps the caps; `None`: there is
        none.
        """
        from botorch.optim import optimize_acqf_discrete_local_search

        seen = {*self.seen(), *unknown}
        rows = self.encoding.rows(unknown) if unknown else None
        acquisition = surrogate.acquisition(self.acquisition, rows, self._step_seed() % 2**31)

        def value(x: Tensor) -> Tensor:
            """Of codes `[n, 1, places]`; minus infinity for those that may not be asked for."""
            codes, usable = self.encoding.canonical(x[:, 0])
            places: dict[
                Code, int
            ] = {}  # equal codes are one genotype: another choice where a layer covers changes nothing
            for place, code in enumerate(map(tuple, codes.tolist())):
                if usable[place] and code not in seen:
                    places.setdefault(code, place)
            chosen = torch.tensor(list(places.values()), dtype=torch.long)
            rows = self.encoding.rows(codes[chosen])
            kept = self._within(rows)
            values = torch.full((len(x),), -torch.inf, dtype=torch.float64)
            if kept.any():
                with torch.no_grad():
                    values[chosen[kept]] = acquisition(surrogate.inputs(rows[kept])[:, None])
            return values

        codes = torch.tensor(starts, dtype=torch.float64).reshape(len(starts), 1, -1)
        values = torch.cat([value(part) for part in codes.split(BATCH)]) if starts else torch.empty(0)
        if not values.isfinite().any():
            return None
        order = values.argsort(descending=True, stable=True)
        if self._few_left():
            return tuple(map(int, codes[order[0], 0]))
        order = order[: min(CLIMBS, int(values.isfinite().sum()))]
        best, _ = optimize_acqf_discrete_local_search(
            value,
            [torch.tensor(choices, dtype=torch.float64) for choices in self.space.allowed],
            q=1,
            num_restarts=len(order),
            batch_initial_conditions=codes[order],
            X_avoid=torch.tensor(sorted(seen), dtype=torch.float64),
            max_batch_size=BATCH,
            return_acq_values=False,
        )
        return tuple(map(int, self.encoding.canonical(best)[0][0]))

    def _few_left(self) -> bool:
        return self.space.size - len(self.seen()) <= EXHAUSTIVE


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """One thread and a fixed seed, both given back afterwards, so that what is asked depends on neither. Hushes
    BoTorch's notes that unscaled inputs (the features are 0 and 1 already) and plain EHVI (asked for by name) are
    unusual, and that a fit was not the smoothest.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            from botorch.exceptions.warnings import InputDataWarning, NumericsWarning, OptimizationWarning

            for kind in (InputDataWarning, NumericsWarning, OptimizationWarning):
                warnings.simplefilter("ignore", kind)
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
