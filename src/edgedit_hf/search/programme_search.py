"""The integer programme's solutions, each really evaluated: `search.mode: exact`, and what Bayesian optimisation is
compared with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..errors import EdgeDiTError
from ..genotype import Genotype, LayerSpec
from ..search_space import SearchSpace
from .ask_tell import AskTellSearch, Code, first_unseen
from .programme import Block, Programme


class ProgrammeSearch(AskTellSearch):
    """Evaluates what [`Programme.plan`] names, in its order: for the largest latency budget, the smallest, and those
    between them the best genotype that did not come before.

    With `swaps` it first evaluates the teacher with each proxy alone in it; the log of the distance, relative to the
    teacher's, then is the proxy's score in the place of its loss. Ends with the plan, or the budget.

    Args:
        plan: codes to evaluate first; see [`~ProgrammeSearch.of`].
        swaps: whether scores are learned from the plan, and more is asked for by them.
        Others: see [`AskTellSearch`].
    """

    kind = "programme"

    def __init__(
        self,
        space: SearchSpace,
        num_evaluations: int,
        seed: int = 0,
        num_initial: int = 8,
        reference: Sequence[float] | None = None,
        plan: Sequence[Sequence[int]] = (),
        swaps: bool = False,
    ) -> None:
        super().__init__(space, num_evaluations, seed, num_initial, reference)
        self.plan: list[Code] = [space.code(space.from_code(code)) for code in plan]
        self.swaps = bool(swaps)
        self.programme: Programme | None = None
        self._learned: list[Code] | None = None

    @classmethod
    def of(
        cls,
        programme: Programme,
        space: SearchSpace,
        num_evaluations: int,
        seed: int = 0,
        num_initial: int = 8,
        reference: Sequence[float] | None = None,
        swaps: bool = False,
    ) -> ProgrammeSearch:
        """The search of a programme over the replacements of a space.

        Raises:
            EdgeDiTError: there are more proxies to swap in than evaluations.
        """
        if swaps:
            plan = swaps_plan(programme, space, num_evaluations)
        else:
            plan = list(map(space.code, cls._named(programme, num_evaluations)))
        search = cls(space, num_evaluations, seed, num_initial, reference, plan, swaps)
        search.programme = programme
        return search

    @staticmethod
    def _named(programme: Programme, count: int) -> Iterable[Genotype]:
        """The genotypes to evaluate, at most `count`."""
        return (solution.genotype for solution in itertools.islice(programme.plan(), count))

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "plan": [list(code) for code in self.plan], "swaps": self.swaps}

    def resume(self, path: Any) -> AskTellSearch:
        stored = super().resume(path)
        assert isinstance(stored, ProgrammeSearch)
        stored.programme = self.programme
        return stored

    @property
    def budget(self) -> int:
        """Evaluations in all: those of the plan, or with `swaps` as many as asked for."""
        return super().budget if self.swaps else min(self.num_evaluations, len(self.plan))

    def _initial_stream(self) -> Iterator[Code]:
        yield from self.plan

    def propose(self, count: int) -> list[Code]:
        found = first_unseen(self.plan, self.seen(), count)
        if self.swaps and not found and not self._pending:
            found = first_unseen(itertools.chain(self._by_swaps(), self.space.codes()), self.seen(), count)
        return found

    def _by_swaps(self) -> list[Code]:
        """What the programme names by the scores that the swaps gave; a proxy whose swap was not told is left out."""
        if self._learned is None:
            assert self.programme is not None
            told = {tuple(point["code"]): float(point["distance"]) for point in self.told}
            whole = original(self.programme)
            teacher = told.get(self.space.code(whole))
            blocks = []
            for block in self.programme.blocks:
                distance = told.get(self.space.code(swap(whole, block.layer)))
                if teacher is not None and distance is not None:
                    blocks.append(Block(block.layer, math.log(distance / teacher), block.costs))
            sources = {index for block in blocks for index in block.layer.source}
            if len(sources) < self.space.num_layers:
                return []  # the teacher's own evaluation failed
            learned = self.programme.with_blocks(blocks)
            found = itertools.islice(learned.plan(), self.num_evaluations)
            self._learned = [self.space.code(solution.genotype) for solution in found]
        return self._learned


def swaps_plan(programme: Programme, space: SearchSpace, num_evaluations: int) -> list[Code]:
    """Codes of the teacher, the fastest student, and the teacher with each proxy alone in it.

    Raises:
        EdgeDiTError: they are no fewer than the evaluations.
    """
    whole, fastest = original(programme), programme.least("latency_ms").genotype
    genotypes = [whole, fastest, *(swap(whole, block.layer) for block in programme.blocks)]
    plan = list(dict.fromkeys(map(space.code, genotypes)))
    if num_evaluations <= len(plan):
        raise EdgeDiTError(
            f"search.scores is swaps, which takes {len(plan)} evaluations before the first choice, but "
            f"search.evaluations is {num_evaluations}; raise it, or set search.scores to loss."
        )
    return plan


def original(programme: Programme) -> Genotype:
    """The teacher itself, of a programme's replacements: those of one layer whose score is the teacher's, 0, and that
    cost the most parameters.
    """
    layers: list[LayerSpec] = []
    for index in range(programme.num_layers):
        own = [block for block in programme.blocks if block.layer.source == (index,) and block.score == 0]
        layers.append(max(own, key=lambda block: block.costs["parameters"]).layer)
    return Genotype(tuple(layers), programme.hidden_size)


def swap(whole: Genotype, layer: LayerSpec) -> Genotype:
    """A genotype with one layer in the place of those that it replaces."""
    kept = [other for other in whole.layers if not set(other.source) & set(layer.source)]
    return Genotype(tuple(sorted([*kept, layer], key=lambda each: each.source)), whole.hidden_size)
