"""Searches that Bayesian optimisation is compared with, beside random search and the programme's solutions: NSGA-II,
and the greedy path by loss per millisecond.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import EdgeDiTError
from ..genotype import Genotype
from .ask_tell import AskTellSearch, Code, first_unseen
from .programme import Programme
from .programme_search import ProgrammeSearch

GENERATIONS = 200  # that bring nothing new, after which NSGA-II's rest is taken in order
FAILED = 1e30  # what an evaluation that failed counts as


class NSGA2Search(AskTellSearch):
    """NSGA-II (Deb et al. 2002) by pymoo, over codes: uniform crossover, and mutation that draws an entry anew. Its
    first population are the initial points.

    What it asks is found by going through its generations again with what was told: nothing of pymoo is stored.
    """

    kind = "nsga2"

    def propose(self, count: int) -> list[Code]:
        try:
            from pymoo.core.evaluator import Evaluator
            from pymoo.problems.static import StaticProblem
        except ImportError as error:
            raise EdgeDiTError(f"NSGA-II needs pymoo ({error}); pip install 'edgedit_hf[search]'.") from None
        values = {tuple(point["code"]): (point["distance"], point["latency_ms"]) for point in self.told}
        values |= {tuple(point["code"]): (FAILED, FAILED) for point in self.failed}
        algorithm, problem = self._algorithm()
        for _ in range(GENERATIONS):
            population = algorithm.ask()
            if population is None or not len(population):
                break
            codes = [self._code(x) for x in population.get("X")]
            if new := first_unseen(codes, self.seen(), count):
                return new
            if any(code not in values for code in codes):
                return []  # first the pending ones of this generation
            outcomes = np.array([values[code] for code in codes])
            Evaluator().eval(StaticProblem(problem, F=outcomes), population)
            algorithm.tell(infills=population)
        return first_unseen(self.space.codes(), self.seen(), count)

    def _code(self, x: Sequence[int]) -> Code:
        code = [choices[int(place)] for place, choices in zip(x, self.space.allowed)]
        return self.space.code(self.space.from_code(code))

    def _algorithm(self) -> tuple[Any, Any]:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.mutation import Mutation
        from pymoo.core.problem import Problem
        from pymoo.operators.crossover.ux import UniformCrossover

        class DrawAnew(Mutation):
            def _do(self, problem: Any, X: np.ndarray, random_state: Any = None, **kwargs: Any) -> np.ndarray:
                drawn = random_state.integers(0, problem.xu.astype(int) + 1, size=X.shape)
                return np.where(random_state.random(X.shape) < 1 / X.shape[1], drawn, X)

        allowed = self.space.allowed
        limits = {"xl": np.zeros(len(allowed), dtype=int), "xu": np.array([len(choices) - 1 for choices in allowed])}
        problem = Problem(n_var=len(allowed), n_obj=2, vtype=int, **limits)
        first = first_unseen(self._initial_stream(), set(), self.num_initial)
        start = [[c.index(e) if e in c else 0 for e, c in zip(code, allowed)] for code in first]
        operators = {"crossover": UniformCrossover(), "mutation": DrawAnew()}
        algorithm = NSGA2(pop_size=self.num_initial, sampling=np.array(start), **operators)
        algorithm.setup(problem, termination=("n_gen", 10**6), seed=self.seed, verbose=False)
        return algorithm, problem


class GreedySearch(ProgrammeSearch):
    """From the teacher on, step by step the replacement that loses the least score per millisecond saved; its path is
    evaluated, or, where that is longer than the budget, evenly spread points of it.
    """

    kind = "greedy"

    @staticmethod
    def _named(programme: Programme, count: int) -> Iterable[Genotype]:
        path = list(greedy_path(programme))
        return (path[place] for place in np.linspace(0, len(path) - 1, min(count, len(path))).round().astype(int))


def greedy_path(programme: Programme) -> Iterator[Genotype]:
    """The teacher, and what each step of [`GreedySearch`] makes of it."""
    blocks = {block.layer: block for block in programme.blocks}
    layers = {block.layer for block in programme.blocks if block.score == 0 and len(block.layer.source) == 1}
    while True:
        yield Genotype(tuple(sorted(layers, key=lambda layer: layer.source)), programme.hidden_size)
        best = None
        for block in programme.blocks:
            replaced = {layer for layer in layers if set(layer.source) & set(block.layer.source)}
            if {index for layer in replaced for index in layer.source} != set(block.layer.source):
                continue  # it would cut a merged layer
            before = sum(programme.added(blocks[layer], "latency_ms") for layer in replaced)
            saved = before - programme.added(block, "latency_ms")
            lost = block.score - sum(blocks[layer].score for layer in replaced)
            if saved > 0 and (best is None or lost / saved < best[0]):
                best = lost / saved, block.layer, replaced
        if best is None:
            return
        layers = (layers - best[2]) | {best[1]}
