"""The best genotype by additive scores, proved: an integer programme over the replacements of a teacher's layers.

One binary a replacement; every teacher layer is covered exactly once, so layers that stand for two or three of the
teacher's come without more; any named cost that adds up over layers may have a cap. HiGHS (`scipy.optimize.milp`)
solves it to gap 0; the next best ones come from [`enumeration`]. The same form as Puzzletron's (NVIDIA
Model-Optimizer). No torch.

    programme = Programme(blocks, num_layers=28, hidden_size=1152, fixed={"latency_ms": 2.1})
    programme.best({"latency_ms": 80.0}).genotype
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from tqdm.auto import tqdm

from ..errors import EdgeDiTError
from ..genotype import Genotype, LayerSpec
from ..quiet import HIGHS, without_native_lines
from .enumeration import Limit, TooManyOpen, ways_in_order
from .pareto import pareto_front

SECONDS = 60.0  # of one solution; what is not proved by then says so by its gap
DELAY = 3.0  # seconds after which several solutions show their progress
# HiGHS takes a row as kept that is broken by 1e-6, and an optimum as proved within 1e-6, in whatever units: rows and
# objective are scaled so that neither matters, and a cap is then held to by this share of itself.
ROW, OBJECTIVE, SLACK = 1e3, 1e6, 1e-9


@dataclass(frozen=True)
class Block:
    """A layer that may stand in a student, what is lost by it, and what it costs; both add up over a student's layers,
    but for costs that are peaks (see [`Programme`]).
    """

    layer: LayerSpec
    score: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Peak:
    """A cost that is a sum and a peak: that of `added` and, of all layers, the greatest `largest`."""

    added: str
    largest: str


@dataclass(frozen=True)
class Solution:
    """A genotype with its score and costs; `gap` 0: no legal genotype within the caps has a lower score, else by which
    share at most one may; `None`: it was not solved for.
    """

    genotype: Genotype
    score: float
    costs: dict[str, float]
    gap: float | None = None


class Programme:
    """The integer programme of a teacher's replacements.

    Args:
        blocks: every layer that a student may have, the teacher's own among them; all with the same costs.
        num_layers, hidden_size: the teacher's.
        fixed: what every student costs besides its layers, by the costs' names; default 0.
        worst: costs that are the greatest of some of the others, each times a factor: name → other → factor. They may
            have caps and be minimised as others.
        peaks: costs that are a sum and a peak, by name, as others too. What they have as `largest` is itself no sum:
            of a student it is that of its layer that has the most, or what is fixed. It is at least 0.

    Where there are static layers (`modulation_rank` 0), a student keeps at least one layer that is conditioned.
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        num_layers: int,
        hidden_size: int,
        fixed: Mapping[str, float] | None = None,
        worst: Mapping[str, Mapping[str, float]] | None = None,
        peaks: Mapping[str, Peak] | None = None,
    ) -> None:
        self.blocks, self.num_layers, self.hidden_size = list(blocks), num_layers, hidden_size
        self._place = {block.layer: number for number, block in enumerate(self.blocks)}
        covered = {index for block in self.blocks for index in block.layer.source}
        if lacking := sorted(set(range(num_layers)) - covered):
            raise EdgeDiTError(
                f"None of the {len(self.blocks)} replacements stands for the teacher layers {lacking}, so there is no "
                "student; give at least the teacher's own layers."
            )
        if foreign := sorted(covered - set(range(num_layers))):
            raise EdgeDiTError(f"Replacements stand for the layers {foreign} of a teacher that has {num_layers}.")
        if len(self._place) < len(self.blocks):
            raise EdgeDiTError(
                f"{len(self.blocks)} replacements are given, {len(self._place)} different ones; give each once."
            )
        self.cost_names = tuple(self.blocks[0].costs)
        self.fixed = {name: float((fixed or {}).get(name, 0.0)) for name in self.cost_names}
        if unknown := sorted(set(fixed or {}) - set(self.cost_names)):
            raise EdgeDiTError(f"{unknown} are fixed costs, but the replacements' are {list(self.cost_names)}.")
        self.worst = {name: dict(parts) for name, parts in (worst or {}).items()}
        self.peaks = dict(peaks or {})
        self.largest = {peak.largest for peak in self.peaks.values()}
        self.known_costs = (*(n for n in self.cost_names if n not in self.largest), *self.worst, *self.peaks)
        for block in self.blocks:
            values = {"score": block.score, **block.costs}
            if tuple(block.costs) != self.cost_names or not all(map(math.isfinite, values.values())):
                raise EdgeDiTError(
                    f"The replacement {block.layer.to_dict()} has {values}; it needs a finite score and finite "
                    f"{', '.join(self.cost_names)}. Make the bank's entry, or the latency table, anew."
                )
        self._scores = np.array([block.score for block in self.blocks])
        self._costs = {name: np.array([float(block.costs[name]) for block in self.blocks]) for name in self.cost_names}
        cover = np.zeros((num_layers, len(self.blocks)))
        for number, block in enumerate(self.blocks):
            cover[list(block.layer.source), number] = 1.0
        self._cover = cover  # [layers, replacements]
        self._conditioned = np.array([float(block.layer.modulation_rank != 0) for block in self.blocks])

    def with_blocks(self, blocks: Iterable[Block]) -> Programme:
        """The programme of these blocks, all else the same."""
        return Programme(blocks, self.num_layers, self.hidden_size, self.fixed, self.worst, self.peaks)

    # ---------------------------------------------------------------- answers

    def best(self, caps: Mapping[str, float] | None = None, exclude: Iterable[Genotype] = ()) -> Solution:
        """The genotype of the least score within the caps.

        Args:
            caps: greatest values of costs, by name; of the whole student, what is fixed included.
            exclude: genotypes that shall not be the answer.

        Raises:
            EdgeDiTError: nothing keeps the caps; quotes them and the least value that is attainable.
        """
        caps = self._checked(caps)
        excluded = set(exclude)
        found = next(self._without(caps, excluded), None) if excluded else self._solve(self._scores, caps)
        if found is None and excluded and self._solve(self._scores, caps) is not None:
            raise EdgeDiTError(
                f"All genotypes that keep {said(caps) or 'no cap'} are among the {len(excluded)} excluded."
            )
        if found is None:
            raise self._infeasible(caps)
        return found

    def k_best(self, k: int, caps: Mapping[str, float] | None = None) -> list[Solution]:
        """The `k` different genotypes of the least scores within the caps, the best first; all, if they are fewer.
        Shows its progress where that takes seconds.
        """
        if k < 1:
            raise EdgeDiTError(f"k is {k}; ask for at least 1 genotype.")
        caps = self._checked(caps)
        following = itertools.islice(self._without(caps, set()), k)
        found = list(
            tqdm(following, desc="Next best", total=k, unit="genotype", delay=DELAY, leave=False, disable=None)
        )
        if not found:
            raise self._infeasible(caps)
        return sorted(found, key=lambda solution: solution.score)

    def of(self, genotype: Genotype) -> Solution:
        """The score and the costs of any genotype of these replacements."""
        chosen = self._chosen(genotype)
        if chosen is None:
            raise EdgeDiTError(
                f"The genotype {genotype.hash} has a layer that is none of the {len(self.blocks)} replacements: the "
                "bank lacks it, or it belongs to another teacher."
            )
        return self._solution(chosen)

    def least(self, cost: str, caps: Mapping[str, float] | None = None) -> Solution:
        """The genotype that costs the least of `cost` within the caps."""
        caps = self._checked(caps)
        found = self._least(cost, caps)
        if found is None:
            raise self._infeasible(caps)
        return found

    def added(self, block: Block, cost: str) -> float:
        """What a block adds to a cost; to a greatest one, on average over those that it is the greatest of."""
        parts = self.worst.get(cost, {cost: 1.0})
        return math.fsum(factor * block.costs[name] for name, factor in parts.items()) / len(parts)

    def front(self, points: int, cost: str = "latency_ms", caps: Mapping[str, float] | None = None) -> list[Solution]:
        """The best genotypes for `points` budgets of a cost, evenly from the least that is attainable to that of the
        best score; those that another one beats in both, or that come twice, are left out. By rising cost.
        """
        if points < 1:
            raise EdgeDiTError(f"points is {points}; ask for at least 1 budget.")
        caps = self._checked(caps)
        low, high = self._ends(cost, caps)
        budgets = np.linspace(low, high, points).tolist()
        shown = tqdm(budgets, desc="Budgets", unit="budget", delay=DELAY, leave=False, disable=None)
        found = [self.best({**caps, cost: budget}) for budget in shown]
        kept = pareto_front([(solution.costs[cost], solution.score) for solution in found])
        return [found[index] for index in kept]

    def plan(self, cost: str = "latency_ms", caps: Mapping[str, float] | None = None) -> Iterator[Solution]:
        """Genotypes worth evaluating, the first ones spread the widest: for the largest budget of a cost, the smallest,
        the middle one, the quarters, … the best genotype that did not come before. Ends with the space.
        """
        caps = self._checked(caps)
        low, high = self._ends(cost, caps)
        found: set[Genotype] = set()
        for share in itertools.chain((1.0, 0.0), _bisections()):
            within = {**caps, cost: low + share * (high - low)}
            following = next(self._without(within, found), None) or next(self._without(caps, found), None)
            if following is None:
                return
            found.add(following.genotype)
            yield following

    def _ends(self, cost: str, caps: dict[str, float]) -> tuple[float, float]:
        """The least of a cost, and that of the best score."""
        if cost not in self.known_costs:
            raise EdgeDiTError(f"There is no cost {cost!r}; the replacements have {', '.join(self.known_costs)}.")
        return self.least(cost, caps).costs[cost], self.best(caps).costs[cost]

    # ---------------------------------------------------------------- solving

    def _without(self, caps: Mapping[str, float], excluded: set[Genotype]) -> Iterator[Solution]:
        """The genotypes within caps by rising score, without those that are excluded."""
        passed = []
        try:
            for chosen in self._in_order(caps):
                solution = self._solution(np.array(chosen), 0.0)
                if self._keeps(solution, caps):
                    passed.append(np.array(chosen))
                    if solution.genotype not in excluded:
                        yield solution
        except TooManyOpen:  # one by one then, each solved anew
            cuts = [*passed, *(cut for each in excluded if (cut := self._chosen(each)) is not None)]
            while (following := self._solve(self._scores, caps, cuts)) is not None:
                cuts.append(self._chosen(following.genotype))
                yield following

    def _in_order(self, caps: Mapping[str, float]) -> Iterator[list[int]]:
        """The replacements of genotypes by rising score: of all that keep the caps, and of some that rounding lets
        through."""
        limits = [Limit(-self._conditioned, -1.0), *self._limits(caps)]
        spans = [(block.layer.source[0], block.layer.source[-1] + 1) for block in self.blocks]
        return ways_in_order(self._scores, spans, self.num_layers, limits)

    def _limits(self, caps: Mapping[str, float]) -> Iterator[Limit]:
        """Caps as limits on what the layers cost."""
        for name, cap in caps.items():
            for part, factor in self.worst.get(name, {name: 1.0}).items():
                room, peak = cap / factor * (1 + SLACK), self.peaks.get(part)
                if peak is None:
                    yield Limit(self._costs[part], room - self.fixed[part])
                else:
                    largest, least = self._costs[peak.largest], self.fixed[peak.largest]
                    yield Limit(self._costs[peak.added], room - self.fixed[peak.added], largest, least)

    def _keeps(self, solution: Solution, caps: Mapping[str, float]) -> bool:
        return all(solution.costs[name] <= cap * (1 + SLACK) for name, cap in caps.items())

    def _least(self, cost: str, caps: Mapping[str, float]) -> Solution | None:
        """The optimum of a cost within caps; `None`: there is none."""
        if cost in self.peaks:
            peak = self.peaks[cost]
            level = self._peak(self._costs[peak.largest], self.fixed[peak.largest])
            return self._solve(self._costs[peak.added], caps, level=level)
        if cost not in self.worst:
            return self._solve(self._costs[cost], caps)
        parts = self.worst[cost].items()
        rows = np.array([factor * self._costs[name] for name, factor in parts])
        level = _Level(rows, np.array([factor * self.fixed[name] for name, factor in parts]))
        return self._solve(np.zeros(len(self.blocks)), caps, level=level)

    def _peak(self, largest: np.ndarray, least: float) -> _Level:
        """The greatest of a genotype's layers: each teacher layer is covered once, so it has one row."""
        return _Level(self._cover * largest, np.zeros(self.num_layers), least)

    def _solve(
        self,
        objective: np.ndarray,
        caps: Mapping[str, float],
        cuts: Sequence[np.ndarray] = (),
        level: _Level | None = None,
    ) -> Solution | None:
        """The optimum, of all that keep the caps and are none of the cuts' genotypes; `None`: there is none.

        Args:
            level: is added to the objective.
        """
        cuts, count, limits = list(cuts), len(self.blocks), list(self._limits(caps))
        levels = [self._peak(limit.largest, limit.least) for limit in limits if limit.largest is not None]
        first = count + len(levels)  # the objective's level
        levels += [] if level is None else [level]
        objective = np.append(objective, [0.0] * (first - count) + [each.unit for each in levels[first - count :]])
        scale = OBJECTIVE / max(float(np.abs(objective).max()), np.finfo(float).tiny * OBJECTIVE)
        rows = [(self._cover, 1.0, 1.0), (self._conditioned[None], 1.0, np.inf)]
        rows = [(np.pad(row, ((0, 0), (0, len(levels)))), low, high) for row, low, high in rows]
        for place, each in enumerate(levels, count):  # in its unit, at least each of its rows
            own = np.zeros((len(each.rows), len(objective)))
            own[:, :count], own[:, place] = -ROW * each.rows / each.unit, ROW
            rows.append((own, ROW * each.fixed / each.unit, np.inf))
        units = enumerate(levels, count)
        for limit in limits:
            row = np.zeros((1, len(objective)))
            row[0, :count] = limit.added
            if limit.largest is not None:
                place, each = next(units)
                row[0, place] = each.unit
            scaled = ROW / max(float(np.abs(row).max()), np.finfo(float).tiny * ROW)
            rows.append((scaled * row, -np.inf, scaled * limit.room))
        whole = np.r_[np.ones(count), np.zeros(len(levels))]
        bounds = Bounds(
            np.r_[np.zeros(count), [each.least / each.unit for each in levels]], np.where(whole > 0, 1.0, np.inf)
        )
        while True:
            chosen = np.zeros((len(cuts), len(objective)))
            for row, cut in zip(chosen, cuts):
                row[cut] = 1.0
            constraints = [*rows, (chosen, -np.inf, chosen.sum(axis=1) - 1)] if cuts else rows
            with without_native_lines(HIGHS, stream=1):
                result = milp(
                    scale * objective,
                    integrality=whole,
                    bounds=bounds,
                    constraints=[LinearConstraint(*each) for each in constraints],
                    options={"mip_rel_gap": 0.0, "time_limit": SECONDS},
                )
            if result.status == 2:
                return None
            if result.x is None:
                raise EdgeDiTError(f"The integer programme was not solved within {SECONDS:.0f} s: {result.message}")
            found = np.flatnonzero(result.x[:count] > 0.5)
            solution = self._solution(found, _gap(result))
            if self._keeps(solution, caps):
                return solution
            cuts.append(found)  # kept the cap by the solver's tolerance alone

    def _solution(self, chosen: np.ndarray, gap: float | None = None) -> Solution:
        blocks = sorted((self.blocks[number] for number in chosen), key=lambda block: block.layer.source)
        genotype = Genotype(tuple(block.layer for block in blocks), self.hidden_size)
        costs = {}
        for name in self.cost_names:
            values = [self.fixed[name], *(block.costs[name] for block in blocks)]
            costs[name] = max(values) if name in self.largest else math.fsum(values)
        for name, parts in self.worst.items():
            costs[name] = max(factor * costs[part] for part, factor in parts.items())
        for name, peak in self.peaks.items():
            costs[name] = costs[peak.added] + costs[peak.largest]
        return Solution(genotype, math.fsum(block.score for block in blocks), costs, gap)

    def _chosen(self, genotype: Genotype) -> np.ndarray | None:
        """The places of a genotype's layers; `None`: it has one that is no replacement here."""
        places = [self._place.get(layer) for layer in genotype.layers]
        return None if None in places else np.array(places)

    def _checked(self, caps: Mapping[str, float] | None) -> dict[str, float]:
        for name, cap in (caps or {}).items():
            if name not in self.known_costs:
                raise EdgeDiTError(
                    f"There is a cap on {name}, but the replacements' costs are {', '.join(self.known_costs)}."
                )
            if not (math.isfinite(cap) and cap > 0):
                raise EdgeDiTError(f"The cap on {name} is {cap}; it must be a finite number above 0.")
        return {name: float(cap) for name, cap in (caps or {}).items()}

    def _infeasible(self, caps: Mapping[str, float]) -> EdgeDiTError:
        """What to say where nothing keeps the caps."""
        if not caps or self._solve(self._scores, {}) is None:
            return EdgeDiTError(
                f"No choice of the {len(self.blocks)} replacements stands for each of the {self.num_layers} teacher "
                "layers exactly once and keeps a layer that is conditioned; give at least the teacher's own layers."
            )
        least = {name: self.least(name).costs[name] for name in caps}
        above = [name for name, cap in caps.items() if least[name] > cap * (1 + SLACK)]
        if above:
            wanted = " and ".join(f"{name} <= {caps[name]:.6g}, but the least is {least[name]:.6g}" for name in above)
            return EdgeDiTError(f"No student has {wanted}. Raise the cap, or take a bank with smaller replacements.")
        told = []
        for name in caps:
            others = {other: cap for other, cap in caps.items() if other != name}
            found = self._least(name, others)
            if found is not None:
                told.append(f"with the other caps, the least {name} is {found.costs[name]:.6g}")
        return EdgeDiTError(
            f"No student has {said(caps)}, though each can be had alone{''.join(f'; {text}' for text in told)}. Raise "
            "one of the caps."
        )


class _Level(NamedTuple):
    """A variable that is at least each of `rows · x + fixed`, and `least`."""

    rows: np.ndarray
    fixed: np.ndarray
    least: float = 0.0

    @property
    def unit(self) -> float:
        """What the solver counts it in."""
        return max(float(np.abs(self.rows).max()), self.least, np.finfo(float).tiny * OBJECTIVE)


def said(caps: Mapping[str, float]) -> str:
    """Caps in words."""
    return " and ".join(f"{name} <= {cap:.6g}" for name, cap in caps.items())


def _gap(result: Any) -> float:
    """By which share of its own value a solution may at most be improved."""
    room = max(0.0, float(result.fun) - float(result.mip_dual_bound))
    return 0.0 if room <= 1e-6 else room / abs(float(result.fun))


def _bisections() -> Iterator[float]:
    """1/2, 1/4, 3/4, 1/8, 3/8, …"""
    for depth in itertools.count(1):
        yield from ((2 * i + 1) / 2**depth for i in range(2 ** (depth - 1)))
