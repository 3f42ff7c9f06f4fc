"""The integer programme's solutions, each really evaluated: `search.mode: exact`, and what Bayesian optimisation is
compared with.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from ..search_space import SearchSpace
from .ask_tell import AskTellSearch, Code, first_unseen
from .programme import Programme


class ProgrammeSearch(AskTellSearch):
    """Evaluates what [`Programme.plan`] names, in its order: for the largest latency budget, the smallest, and those
    between them the best genotype that did not come before. Ends with the plan.

    Args:
        plan: codes; see [`~ProgrammeSearch.of`].
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
    ) -> None:
        super().__init__(space, num_evaluations, seed, num_initial, reference)
        self.plan: list[Code] = [space.code(space.from_code(code)) for code in plan]

    @classmethod
    def of(cls, programme: Programme, space: SearchSpace, num_evaluations: int, *others: Any) -> ProgrammeSearch:
        """The search of a programme over the replacements of a space. `others`: seed, num_initial, reference."""
        plan = itertools.islice(programme.plan(), num_evaluations)
        return cls(space, num_evaluations, *others, plan=[space.code(solution.genotype) for solution in plan])

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "plan": [list(code) for code in self.plan]}

    @property
    def budget(self) -> int:
        """Evaluations in all: those of the plan."""
        return min(self.num_evaluations, len(self.plan))

    def _initial_stream(self) -> Iterator[Code]:
        yield from self.plan

    def propose(self, count: int) -> list[Code]:
        return first_unseen(self.plan, self.seen(), count)
