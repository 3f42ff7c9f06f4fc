"""Ask/tell searches over genotypes for two minimised objectives, (Fréchet distance, latency in ms): the shared part,
and random search.

A search keeps its whole state in JSON, and what it asks next is a function of that state alone: one that was killed and
resumed asks for the same genotypes and ends with the same bytes.

    search = BayesSearch(space, num_evaluations=24, seed=0).resume("search/state.json")
    while not search.finished:
        for genotype in search.pending or search.ask(4):
            search.tell(genotype, (distance(genotype), table.latency_ms(genotype)))
            search.save("search/state.json")
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import EdgeDiTError
from ..files import atomic_write_text, hash_json, parse_json
from ..genotype import Genotype
from ..records import SearchState
from ..schema import check
from ..search_space import SearchSpace
from .pareto import hypervolume, hypervolume_trace, pareto_front
from .programme import Programme

FORMAT = 1
POINT = ("code", "distance", "latency_ms", "noise")  # of a point told; what else it holds was given as `extra`
Code = tuple[int, ...]


class AskTellSearch(ABC):
    """What both searches share: the points told and pending, the front, the hypervolume, the JSON state.

    Args:
        space: the legal genotypes; also a restricted one (`space.stage(...)`).
        num_evaluations: the budget; `ask` never asks for more in all, and for no more than the space holds.
        seed: what the asked genotypes depend on besides the points told.
        num_initial: the first points, which do not depend on the objectives: the most and the least expensive genotype,
            then a scrambled Sobol sequence in [0, 1]^L. The reference point is fixed when that many are told.
        reference: (distance, latency_ms) that bounds the hypervolume; default 1.1 × the worst initial value of each.
    """

    kind = ""

    def __init__(
        self,
        space: SearchSpace,
        num_evaluations: int,
        seed: int = 0,
        num_initial: int = 8,
        reference: Sequence[float] | None = None,
    ) -> None:
        if not 1 <= num_initial <= num_evaluations:
            raise EdgeDiTError(
                f"num_initial is {num_initial} and num_evaluations is {num_evaluations}; the first must be at least 1 "
                "and at most the second."
            )
        self.space = space
        self.num_evaluations = int(num_evaluations)
        self.seed = int(seed)
        self.num_initial = int(num_initial)
        self.given_reference = None if reference is None else _objectives(reference)
        self.reference: tuple[float, float] | None = self.given_reference
        self.told: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []
        self._pending: list[Code] = []
        self._exhausted = False

    # ---------------------------------------------------------------- ask and tell

    @property
    def budget(self) -> int:
        """Evaluations in all: `num_evaluations`, or the whole space if that is smaller."""
        return min(self.num_evaluations, self.space.size)

    @property
    def finished(self) -> bool:
        """True when everything that may be evaluated has been told, or has failed."""
        return self.evaluated >= self.budget or self._exhausted

    @property
    def evaluated(self) -> int:
        """Evaluations so far, those that failed among them."""
        return len(self.told) + len(self.failed)

    @property
    def pending(self) -> list[Genotype]:
        """Genotypes asked for and not told yet, in the order asked. Evaluate these first after a restart."""
        return [self.space.from_code(code) for code in self._pending]

    def ask(self, count: int) -> list[Genotype]:
        """The next genotypes to evaluate, at most `count`: fewer where the initial points, the budget or the space end.
        Never one that is told, pending or failed."""
        known = self.evaluated + len(self._pending)
        count = min(int(count), self.budget - known)
        if count <= 0:
            return []
        if known < self.num_initial:
            asked = first_unseen(self._initial_stream(), self.seen(), min(count, self.num_initial - known))
        elif not self.told and not self._pending:  # all initial evaluations failed
            asked = first_unseen(self._initial_stream(), self.seen(), 1)
        else:
            asked = self.propose(count)
        self._pending += asked
        if not self._pending:  # fewer genotypes than the budget may be asked for
            self._exhausted = True
            self._settle()
        return [self.space.from_code(code) for code in asked]

    @abstractmethod
    def propose(self, count: int) -> list[Code]:
        """Codes of `count` unseen genotypes (fewer if the space ends), a function of the state alone."""

    def tell(
        self,
        genotype: Genotype,
        objectives: Sequence[float],
        extra: Mapping[str, Any] | None = None,
        noise: float | None = None,
    ) -> None:
        """Record one evaluation.

        Args:
            genotype: one that was asked for, or any other legal one.
            objectives: (Fréchet distance, latency in ms), finite and greater than 0.
            extra: plain JSON values kept with the point, e.g. parameters and FLOPs.
            noise: standard error of the distance, where it is known.

        Raises:
            EdgeDiTError: a value is not finite and positive, or the genotype was told before.
        """
        distance, latency = _objectives(objectives)
        point = {"distance": distance, "latency_ms": latency}
        if noise is not None:
            if not (math.isfinite(noise) and noise >= 0):
                raise EdgeDiTError(f"The distance's noise is {noise}; a standard error is finite and at least 0.")
            point["noise"] = float(noise)
        self.told.append({**(extra or {}), "code": list(self._evaluated_code(genotype)), **point})
        self._settle()

    def fail(self, genotype: Genotype, reason: str) -> None:
        """Record an evaluation that gave no objectives. It counts against the budget and is not asked for again."""
        code = self._evaluated_code(genotype)
        self.failed.append({"code": list(code), "reason": reason[:500], "after": len(self.told)})
        self._settle()

    def _evaluated_code(self, genotype: Genotype) -> Code:
        """The code of a genotype whose evaluation is over; it is pending no more."""
        code = self.space.code(genotype)
        if any(point["code"] == list(code) for point in [*self.told, *self.failed]):
            raise EdgeDiTError(f"Genotype {genotype.hash} (code {list(code)}) was told before; each is evaluated once.")
        if code in self._pending:
            self._pending.remove(code)
        return code

    def _settle(self) -> None:
        """Fix the reference point once the initial points are there."""
        if self.reference is None and self.told and (self.evaluated >= self.num_initial or self.finished):
            self.reference = tuple(1.1 * max(column) for column in zip(*self.points))

    def seen(self) -> set[Code]:
        """Codes that are told, pending or failed."""
        return {tuple(point["code"]) for point in [*self.told, *self.failed]} | set(self._pending)

    def failed_initial(self) -> int:
        """How many of the initial evaluations failed."""
        return sum(point["after"] + place < self.num_initial for place, point in enumerate(self.failed))

    def _initial_stream(self) -> Iterator[Code]:
        """The ends of the space, then Sobol points; for a space so small that those repeat, then all of it in order."""
        yield from map(self.space.code, self.space.ends())
        yield from sobol(self.space, 64 * self.num_initial, self.seed)
        yield from self.space.codes()

    def keeps_caps(self, code: Code) -> bool:
        """Whether a genotype may be asked for at all."""
        return True

    def all_codes(self) -> Iterator[Code]:
        """Every code that may be asked for, in an order that is always the same."""
        return self.space.codes()

    # ---------------------------------------------------------------- results

    @property
    def points(self) -> list[tuple[float, float]]:
        """(distance, latency_ms) of every point told, in order."""
        return [(point["distance"], point["latency_ms"]) for point in self.told]

    def front(self) -> list[dict[str, Any]]:
        """The Pareto front by rising distance: what was told with each point, its `genotype` (layers) and `hash`."""
        entries = []
        for index in pareto_front(self.points):
            genotype = self.space.from_code(self.told[index]["code"])
            entry = {**self.told[index], "hash": genotype.hash, "genotype": json.loads(genotype.to_json())}
            entries.append(
                dict(sorted(entry.items()))
            )  # the state file sorts its keys too: a resumed search gives the same bytes
        return entries

    def hypervolume(self) -> float | None:
        """Hypervolume of everything told, in distance × ms; None until the reference point is fixed."""
        return None if self.reference is None else hypervolume(self.points, self.reference)

    # ---------------------------------------------------------------- state

    def settings(self) -> dict[str, Any]:
        """What the search was made with, as plain values."""
        return {
            "kind": self.kind,
            "space": self.space.to_dict(),
            "num_evaluations": self.num_evaluations,
            "seed": self.seed,
            "num_initial": self.num_initial,
            "reference": None if self.given_reference is None else list(self.given_reference),
        }

    def to_json(self) -> str:
        """The whole state; equal searches give equal text."""
        state = {
            "format": FORMAT,
            "settings": self.settings(),
            "reference": None if self.reference is None else list(self.reference),
            "told": self.told,
            "failed": self.failed,
            "pending": [list(code) for code in self._pending],
        }
        return json.dumps(state, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, programme: Programme | None = None) -> AskTellSearch:
        """Rebuild a search from [`~AskTellSearch.to_json`]'s text; anything else is an error.

        Args:
            programme: the one that the search was made with, of which the state holds a hash.
        """
        try:
            state = parse_json(text)
        except ValueError as error:
            raise EdgeDiTError(f"The search state cannot be read ({error}). Delete it to search anew.") from None
        try:
            check(state, SearchState)
            settings = dict(state["settings"])
            if state["format"] != FORMAT or settings.pop("kind") != cls.kind:
                raise EdgeDiTError(
                    f"The search state is of format {state['format']} and kind {state['settings']['kind']!r}; expected "
                    f"format {FORMAT} and kind {cls.kind!r}. Delete it to search anew."
                )
            if unknown := sorted(set(settings) - set(inspect.signature(cls).parameters)):
                raise EdgeDiTError(f"It was made with {', '.join(unknown)}, which this version does not have.")
            if "programme" in settings:
                if (now := fingerprint(programme)) != settings["programme"]:
                    raise EdgeDiTError(
                        f"It was made with block scores and costs {settings['programme']}, this run has {now}: the "
                        "bank or the latency table is another one."
                    )
                settings["programme"] = programme
            search = cls(space=SearchSpace.from_dict(settings.pop("space")), **settings)
            for point in state["told"]:
                search.tell_again(point)
            search.failed = [dict(point) for point in state.get("failed") or []]
            search.reference = None if state["reference"] is None else _objectives(state["reference"])
            search._pending = [search.space.code(search.space.from_code(code)) for code in state["pending"]]
        except EdgeDiTError as error:
            raise EdgeDiTError(
                f"The search state cannot be read: {str(error).removesuffix(' Delete it to search anew.')} Delete it "
                "to search anew."
            ) from None
        return search

    def tell_again(self, point: Mapping[str, Any]) -> None:
        """Tell what another search of these genotypes was told."""
        extra = {key: value for key, value in point.items() if key not in POINT}
        objectives = point["distance"], point["latency_ms"]
        self.tell(self.space.from_code(point["code"]), objectives, extra, point.get("noise"))

    def save(self, path: str | os.PathLike) -> None:
        """Write the state atomically."""
        atomic_write_text(path, self.to_json())

    def resume(self, path: str | os.PathLike) -> AskTellSearch:
        """The state at `path` if there is one, made with the same settings as this search; else this search.

        Raises:
            EdgeDiTError: the state was made with other settings; quotes the first that differs.
        """
        path = Path(path)
        if not path.exists():
            return self
        try:
            stored = type(self).from_json(path.read_text(encoding="utf-8"), getattr(self, "programme", None))
        except (OSError, UnicodeDecodeError, EdgeDiTError) as error:
            raise EdgeDiTError(f"{path}: {error}") from None
        for key, value in self.settings().items():
            if stored.settings()[key] != value:
                raise EdgeDiTError(
                    f"{path} was made with {key} = {stored.settings()[key]}, this run has {key} = {value}. "
                    "Use the old setting, or delete the file to search anew."
                )
        return stored


def fingerprint(programme: Programme | None) -> str | None:
    """Hash of a programme's replacements, scores and costs; without peaks, which the layers' shapes say already."""
    if programme is None:
        return None

    def sums(costs: Mapping[str, float]) -> dict[str, float]:
        return {name: cost for name, cost in costs.items() if name not in programme.largest}

    blocks = [[block.layer.to_dict(), block.score, sums(block.costs)] for block in programme.blocks]
    return hash_json([blocks, sums(programme.fixed), *([programme.worst] if programme.worst else [])])


class RandomSearch(AskTellSearch):
    """Unseen genotypes, each decoded from a uniform point of [0, 1]^L: what Bayesian optimisation is compared with."""

    kind = "random"
    compared: AskTellSearch | None = None  # whose caps it keeps

    @classmethod
    def sharing_initial(cls, search: AskTellSearch) -> RandomSearch:
        """A random search at `search`'s budget that starts from its initial points and its reference point, so that the
        two traces differ only after them."""
        if search.reference is None:
            raise EdgeDiTError(
                f"{len(search.told)} of {search.num_initial} initial points are told; finish them first."
            )
        random = cls(search.space, search.num_evaluations, search.seed, search.num_initial, search.reference)
        failed = search.failed_initial()
        random.told = [dict(point) for point in search.told[: search.num_initial - failed]]
        random.failed = [dict(point) for point in search.failed[:failed]]
        random.compared = search
        return random

    def resume(self, path: str | os.PathLike) -> AskTellSearch:
        stored = super().resume(path)
        assert isinstance(stored, RandomSearch)
        stored.compared = self.compared
        return stored

    def propose(self, count: int) -> list[Code]:
        draws = np.random.default_rng(self.seed).random((64 * self.num_evaluations, self.space.dimension))
        like, codes = self.compared or self, (self.space.code(self.space.decode(x)) for x in draws)
        return first_unseen(itertools.chain(filter(like.keeps_caps, codes), like.all_codes()), self.seen(), count)


def check_told(search: AskTellSearch) -> None:
    """Raise if a finished search has nothing to show, as all of its evaluations failed."""
    if search.finished and not search.told:
        raise EdgeDiTError(
            f"All {len(search.failed)} evaluations of the search failed, the last one of code "
            f"{search.failed[-1]['code']} by {search.failed[-1]['reason']}. Mend the cause, delete the search's folder "
            "and run it again."
        )


def summary(search: AskTellSearch, random: AskTellSearch | None = None) -> dict[str, Any]:
    """What `search/front.json` holds: the front, the reference point, the hypervolume after each evaluation (distance ×
    ms).
    """
    check_told(search)
    if search.reference is None:
        raise EdgeDiTError(
            f"{len(search.told)} of {search.num_initial} initial points are told; finish the search first."
        )
    result = {
        "front": search.front(),
        "reference": list(search.reference),
        "reference_rule": "given" if search.given_reference else "1.1 x the worst initial value of each objective",
        "evaluations": len(search.told),
        "failed": search.failed,
        "hypervolume": hypervolume_trace(search.points, search.reference),
    }
    if random is not None:
        result["random_hypervolume"] = hypervolume_trace(random.points, search.reference)
    return result


def _objectives(values: Sequence[float]) -> tuple[float, float]:
    pair = tuple(float(value) for value in values)
    if len(pair) != 2 or not all(math.isfinite(value) and value > 0 for value in pair):
        raise EdgeDiTError(
            f"The objectives are {list(pair)}; expected (distance, latency_ms), both finite and greater than 0. A NaN "
            "means that the samples or the features behind the distance are broken: fix those, nothing was recorded."
        )
    return pair


def first_unseen(stream: Iterable[Code], seen: set[Code], count: int) -> list[Code]:
    """The first `count` distinct codes of `stream` that are not in `seen`."""
    chosen: dict[Code, None] = {}
    for code in stream:
        if len(chosen) >= count:
            break
        if code not in seen:
            chosen[code] = None
    return list(chosen)


def sobol(space: SearchSpace, count: int, seed: int) -> Iterator[Code]:
    """Codes of the first `count` points of a scrambled Sobol sequence in [0, 1]^L; they may repeat."""
    engine = torch.quasirandom.SobolEngine(space.dimension, scramble=True, seed=seed)
    for x in engine.draw(count, dtype=torch.float64).tolist():
        yield space.code(space.decode(x))
