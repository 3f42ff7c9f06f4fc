"""The searches of a stage, one after the other: over all choices at once, the paper's two stages, or what the integer
programme says; then, to compare with, random search.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EdgeDiTError
from ..genotype import Genotype
from ..run.sections import SearchConfig
from ..search_space import SearchSpace
from .ask_tell import AskTellSearch, RandomSearch
from .bayes import BayesSearch
from .pareto import hypervolume, knee_point
from .programme import Programme
from .programme_search import ProgrammeSearch

MERGES, FOUND, RANDOM = "merge.json", "state.json", "random.json"  # of the paper's first stage, the last one, random


def most_evaluations(options: SearchConfig) -> int:
    """Genotypes that a [`Campaign`] evaluates, unless its space holds fewer."""
    first = options.evaluations // 2 if options.mode == "two-stage" else options.evaluations
    random = options.evaluations - min(options.initial, first) if options.random_baseline else 0
    return options.evaluations + random


class Campaign:
    """Asks for one genotype after the other, and keeps every search in a file: killed at any point, it continues.

    In mode "two-stage" (the paper) it is first asked which pairs merge, then, around the knee point of that front, for
    the option of every layer. In mode "exact" it is asked for what the integer programme says.

    Args:
        folder: of the files; what they hold is continued.
        programme: of the space's replacements, for the modes that take it.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        space: SearchSpace,
        options: SearchConfig,
        seed: int,
        programme: Programme | None = None,
    ) -> None:
        self.folder, self.space, self.options, self.seed = Path(folder), space, options, seed
        self.programme = programme
        self.done: dict[str, AskTellSearch] = {}  # by file: the searches that have spent their budget
        self.file, self.search = self._following()
        self._go_on()

    def _bayes(self, space: SearchSpace, evaluations: int, reference: Sequence[float] | None = None) -> BayesSearch:
        initial = min(self.options.initial, evaluations)
        return BayesSearch(space, evaluations, self.seed, initial, reference, acquisition=self.options.acquisition)

    def _following(self) -> tuple[str, AskTellSearch | None]:
        """The search after those that are done, with its file."""
        evaluations = self.options.evaluations
        search: AskTellSearch
        if FOUND not in self.done and self.options.mode == "exact":
            if self.programme is None:
                raise EdgeDiTError("search.mode is exact, but there is no programme of the bank and the latency table.")
            initial = min(self.options.initial, evaluations)
            search = ProgrammeSearch.of(self.programme, self.space, evaluations, self.seed, initial)
            file = FOUND
        elif FOUND not in self.done and self.options.mode == "joint":
            file, search = FOUND, self._bayes(self.space, evaluations)
        elif FOUND not in self.done and MERGES not in self.done:
            file, search = MERGES, self._bayes(self.space.stage("merge"), evaluations // 2)
        elif FOUND not in self.done:
            merges = self.done[MERGES]
            around = self.space.stage("options", knee_genotype(merges))
            file, search = FOUND, self._bayes(around, evaluations - len(merges.told), merges.reference)
        elif RANDOM not in self.done and self.options.random_baseline:
            file, search = RANDOM, RandomSearch.sharing_initial(self.found)
        else:
            return "", None
        return file, search.resume(self.folder / file)

    def _go_on(self) -> None:
        while self.search is not None and self.search.finished:
            self.done[self.file] = self.search
            self.file, self.search = self._following()

    @property
    def evaluated(self) -> int:
        """Evaluations so far."""
        told = {file: len(search.told) for file, search in {**self.done, self.file: self.search}.items() if search}
        shared = min(self.found.num_initial, len(self.found.told)) if RANDOM in told else 0
        return sum(told.values()) - shared

    def ask(self) -> Genotype | None:
        """The genotype to evaluate next; `None`: all searches have spent their budget."""
        return None if self.search is None else (self.search.pending or self.search.ask(self.options.batch))[0]

    def tell(self, genotype: Genotype, objectives: Sequence[float], extra: Mapping[str, Any]) -> dict[str, float]:
        """Record and save an evaluation; returns figures for the telemetry."""
        search = self.search
        if search is None:
            raise EdgeDiTError("All searches have spent their budget; there is nothing to tell.")
        search.tell(genotype, objectives, extra)
        search.save(self.folder / self.file)
        self._go_on()
        figures = {"distance": objectives[0], "latency_ms": objectives[1]}
        if search.reference is not None:
            figures["hypervolume"] = hypervolume(search.points, search.reference)
        return figures

    @property
    def found(self) -> AskTellSearch:
        """What the searches found but the random one, once they are done; two stages as one search of the whole
        space.
        """
        if MERGES not in self.done:
            return self.done[FOUND]
        return joined(self.space, [self.done[MERGES], self.done[FOUND]], self.seed)

    @property
    def random(self) -> AskTellSearch | None:
        """The random search, if there is one and it is done."""
        return self.done.get(RANDOM)


def knee_genotype(search: AskTellSearch) -> Genotype:
    """The genotype at the knee point of a search's front."""
    front = search.front()
    return search.space.from_code(front[knee_point([(e["distance"], e["latency_ms"]) for e in front])]["code"])


def joined(space: SearchSpace, searches: list[AskTellSearch], seed: int) -> AskTellSearch:
    """Both stages' evaluations as one search over the joint space, for the front and the trace."""
    told = {tuple(point["code"]): point for search in searches for point in search.told}
    whole = RandomSearch(space, len(told), seed, searches[0].num_initial, searches[0].reference)
    for code, point in told.items():
        extra = {k: v for k, v in point.items() if k not in ("code", "distance", "latency_ms")}
        whole.tell(space.from_code(code), (point["distance"], point["latency_ms"]), extra)
    return whole
