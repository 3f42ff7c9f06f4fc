"""The searches of a stage, one after the other: over all choices at once, the paper's two stages, or what the integer
programme says; then, to compare with, random search.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import EdgeDiTError
from ..genotype import Genotype
from ..run.lock import FolderLock
from ..run.sections import SearchConfig
from ..search_space import SearchSpace
from .ask_tell import AskTellSearch, RandomSearch, check_told
from .bayes import BayesSearch
from .objectives import NonFiniteImages
from .pareto import hypervolume, knee_point
from .programme import Programme
from .programme_search import ProgrammeSearch, swaps_plan

FAILURES = 5  # evaluations in a row that fail before the search takes the cause to be none of the genotypes'
MERGES, FOUND, RANDOM = "merge.json", "state.json", "random.json"  # of the paper's first stage, the last one, random


def most_evaluations(options: SearchConfig) -> int:
    """Genotypes that a [`Campaign`] evaluates, unless its space holds fewer."""
    first = options.evaluations // 2 if options.mode == "two-stage" else options.evaluations
    random = options.evaluations - min(options.initial, first) if options.random_baseline else 0
    return options.evaluations + random


def check_possible(
    options: SearchConfig, space: SearchSpace, programme: Programme | None, caps: Mapping[str, float]
) -> None:
    """Raise, before anything is written, if a [`Campaign`] could not begin: no genotype keeps the caps, or there are
    fewer evaluations than scores need.
    """
    if programme is not None and caps:
        programme.best(caps)
    if programme is not None and options.mode == "exact" and options.scores == "swaps":
        swaps_plan(programme, space, options.evaluations)


class Campaign:
    """Asks for one genotype after the other, and keeps every search in a file: killed at any point, it continues.

    In mode "two-stage" (the paper) it is first asked which pairs merge, then, around the knee point of that front, for
    the option of every layer. In mode "exact" it is asked for what the integer programme says.

    Args:
        folder: of the files; what they hold is continued. It is locked: a second process that would work in it is
            refused.
        programme, caps: of the bank's blocks, and greatest values of their costs; mode "joint" refines what the
            programme says within the caps.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        space: SearchSpace,
        options: SearchConfig,
        seed: int,
        programme: Programme | None = None,
        caps: Mapping[str, float] | None = None,
    ) -> None:
        self.folder, self.space, self.options, self.seed = Path(folder), space, options, seed
        self.programme, self.caps = programme, caps
        FolderLock(self.folder).acquire()  # until the process ends
        self.done: dict[str, AskTellSearch] = {}  # by file: the searches that have spent their budget
        self.file, self.search = self._following()
        self._go_on()

    def _bayes(self, space: SearchSpace, evaluations: int, reference: Sequence[float] | None = None) -> BayesSearch:
        initial = min(self.options.initial, evaluations)
        programme, caps = (self.programme, self.caps) if self.options.mode == "joint" else (None, None)
        acquisition = self.options.acquisition
        return BayesSearch(space, evaluations, self.seed, initial, reference, acquisition, programme, caps)

    def _following(self) -> tuple[str, AskTellSearch | None]:
        """The search after those that are done, with its file."""
        evaluations = self.options.evaluations
        search: AskTellSearch
        if FOUND not in self.done and self.options.mode == "exact":
            if self.programme is None:
                raise EdgeDiTError("search.mode is exact, but there is no programme of the bank and the latency table.")
            initial = min(self.options.initial, evaluations)
            swaps = self.options.scores == "swaps"
            search = ProgrammeSearch.of(self.programme, self.space, evaluations, self.seed, initial, swaps=swaps)
            file = FOUND
        elif FOUND not in self.done and self.options.mode == "joint":
            file, search = FOUND, self._bayes(self.space, evaluations)
        elif FOUND not in self.done and MERGES not in self.done:
            file, search = MERGES, self._bayes(self.space.stage("merge"), evaluations // 2)
        elif FOUND not in self.done:
            merges = self.done[MERGES]
            check_told(merges)
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
        spent = {file: search.evaluated for file, search in {**self.done, self.file: self.search}.items() if search}
        shared = min(self.found.num_initial, self.found.evaluated) if RANDOM in spent else 0
        return sum(spent.values()) - shared

    def ask(self) -> Genotype | None:
        """The genotype to evaluate next; `None`: all searches have spent their budget."""
        while self.search is not None:
            if asked := self.search.pending or self.search.ask(self.options.batch):
                return asked[0]
            self._go_on()  # nothing is left that may be asked for
        return None

    def evaluate(
        self,
        genotype: Genotype,
        judge: Callable[[Genotype], tuple[float, float | None]],
        latency_ms: float,
        extra: Mapping[str, Any],
    ) -> dict[str, float]:
        """Judge a genotype, record and save what came of it; returns figures for the telemetry.

        A judgement that raises, takes longer than `search.timeout_minutes` or gives no finite distance is recorded as
        failed, with the reason, and the search goes on.

        Args:
            judge: gives (distance, its standard error or `None`).

        Raises:
            EdgeDiTError: one that `judge` raised: what is wrong then is not the genotype. Or several evaluations in a
                row have failed.
        """
        try:
            with time_limit(self.options.timeout_minutes):
                distance, noise = judge(genotype)
            if not (math.isfinite(distance) and distance > 0):
                raise FloatingPointError(f"the distance is {distance}")
        except Exception as error:
            if isinstance(error, EdgeDiTError) and not isinstance(error, NonFiniteImages):
                raise
            return self.fail(genotype, f"{type(error).__name__}: {error}")
        return self.tell(genotype, (distance, latency_ms), extra, noise)

    def tell(
        self,
        genotype: Genotype,
        objectives: Sequence[float],
        extra: Mapping[str, Any],
        noise: float | None = None,
    ) -> dict[str, float]:
        """Record and save an evaluation; returns figures for the telemetry."""
        search = self._current()
        search.tell(genotype, objectives, extra, noise)
        self._save()
        figures = {"distance": objectives[0], "latency_ms": objectives[1]}
        if search.reference is not None:
            figures["hypervolume"] = hypervolume(search.points, search.reference)
        return figures

    def fail(self, genotype: Genotype, reason: str) -> dict[str, float]:
        """Record and save an evaluation that failed; returns figures for the telemetry."""
        search = self._current()
        search.fail(genotype, reason)
        row = [point for point in search.failed if point["after"] == len(search.told)]
        file = self.file
        self._save()
        if len(row) >= FAILURES:
            raise EdgeDiTError(
                f"{len(row)} evaluations in a row failed, the last one (genotype {genotype.hash}) by {reason[:500]}. "
                f"The cause is hardly the genotypes': mend it, take the entries of `failed` out of "
                f"{self.folder / file} and run the search again."
            )
        return {"failed": float(len(search.failed))}

    def _current(self) -> AskTellSearch:
        if self.search is None:
            raise EdgeDiTError("All searches have spent their budget; there is nothing to tell.")
        return self.search

    def _save(self) -> None:
        self._current().save(self.folder / self.file)
        self._go_on()

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
    told: dict[tuple[int, ...], dict[str, Any]] = {}
    failed: dict[tuple[int, ...], dict[str, Any]] = {}
    for search in searches:
        reached = [len(told)]
        for point in search.told:
            told[tuple(point["code"])] = point
            reached.append(len(told))
        for point in search.failed:
            failed[tuple(point["code"])] = {**point, "after": reached[point["after"]]}
    failed = {code: point for code, point in failed.items() if code not in told}
    num_initial = min(searches[0].num_initial, len(told) + len(failed))
    whole = RandomSearch(space, len(told) + len(failed), seed, num_initial, searches[0].reference)
    for point in told.values():
        whole.tell_again(point)
    whole.failed = list(failed.values())
    return whole


@contextmanager
def time_limit(minutes: float | None) -> Iterator[None]:
    """Raise `TimeoutError` in the body when it takes longer; `None`: it may take as long as it does. Main thread."""
    if minutes is None:
        yield
        return

    def expired(number: int, frame: Any) -> None:
        raise TimeoutError(f"it took longer than search.timeout_minutes = {minutes:g}")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
