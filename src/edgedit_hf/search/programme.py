"""The best genotype by additive scores, proved: an integer programme over the replacements of a teacher's layers.

One binary a replacement; every teacher layer is covered exactly once, so layers that stand for two or three of the
teacher's come without more; any named cost that adds up over layers may have a cap. HiGHS (`scipy.optimize.milp`)
solves it to gap 0. The same form as Puzzletron's (NVIDIA Model-Optimizer). No torch.

    programme = Programme(blocks, num_layers=28, hidden_size=1152, fixed={"latency_ms": 2.1})
    programme.best({"latency_ms": 80.0}).genotype
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack, vstack

from ..errors import EdgeDiTError
from ..genotype import Genotype, LayerSpec
from ..quiet import HIGHS, without_native_lines
from .pareto import pareto_front

SECONDS = 60.0  # of one solution; what is not proved by then says so by its gap
# HiGHS takes a row as kept that is broken by 1e-6, and an optimum as proved within 1e-6, in whatever units: rows and
# objective are scaled so that neither matters, and a cap is then held to by this share of itself.
ROW, OBJECTIVE, SLACK = 1e3, 1e6, 1e-9


@dataclass(frozen=True)
class Block:
    """A layer that may stand in a student, what is lost by it, and what it costs; both add up over a student's
    layers.
    """

    layer: LayerSpec
    score: float
    costs: Mapping[str, float]


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

    Where there are static layers (`modulation_rank` 0), a student keeps at least one layer that is conditioned.
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        num_layers: int,
        hidden_size: int,
        fixed: Mapping[str, float] | None = None,
        worst: Mapping[str, Mapping[str, float]] | None = None,
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
        self.known_costs = (*self.cost_names, *self.worst)
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
        self._rows: list[tuple[csr_array, float, float]] = [(csr_array(cover), 1.0, 1.0)]
        conditioned = [block.layer.modulation_rank != 0 for block in self.blocks]
        if not all(conditioned):
            self._rows.append((csr_array([[float(c) for c in conditioned]]), 1.0, np.inf))

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
        cuts = [cut for genotype in exclude if (cut := self._chosen(genotype)) is not None]
        found = self._solve(self._scores, caps, cuts)
        if found is None and cuts and self._solve(self._scores, caps, []) is not None:
            raise EdgeDiTError(f"All genotypes that keep {said(caps) or 'no cap'} are among the {len(cuts)} excluded.")
        if found is None:
            raise self._infeasible(caps)
        return found

    def k_best(self, k: int, caps: Mapping[str, float] | None = None) -> list[Solution]:
        """The `k` different genotypes of the least scores within the caps, the best first; all, if they are fewer."""
        if k < 1:
            raise EdgeDiTError(f"k is {k}; ask for at least 1 genotype.")
        caps = self._checked(caps)
        found = [self.best(caps)]
        while len(found) < k and (following := self._solve(self._scores, caps, self._cuts(found))) is not None:
            found.append(following)
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
        found = [self.best({**caps, cost: budget}) for budget in np.linspace(low, high, points)]
        kept = pareto_front([(solution.costs[cost], solution.score) for solution in found])
        return [found[index] for index in kept]

    def plan(self, cost: str = "latency_ms", caps: Mapping[str, float] | None = None) -> Iterator[Solution]:
        """Genotypes worth evaluating, the first ones spread the widest: for the largest budget of a cost, the smallest,
        the middle one, the quarters, … the best genotype that did not come before. Ends with the space.
        """
        caps = self._checked(caps)
        low, high = self._ends(cost, caps)
        found: list[Solution] = []
        for share in itertools.chain((1.0, 0.0), _bisections()):
            within = {**caps, cost: low + share * (high - low)}
            following = self._solve(self._scores, within, self._cuts(found))
            if following is None and (following := self._solve(self._scores, caps, self._cuts(found))) is None:
                return
            found.append(following)
            yield following

    def _ends(self, cost: str, caps: dict[str, float]) -> tuple[float, float]:
        """The least of a cost, and that of the best score."""
        if cost not in self.known_costs:
            raise EdgeDiTError(f"There is no cost {cost!r}; the replacements have {', '.join(self.known_costs)}.")
        return self.least(cost, caps).costs[cost], self.best(caps).costs[cost]

    # ---------------------------------------------------------------- solving

    def _least(self, cost: str, caps: Mapping[str, float]) -> Solution | None:
        """The optimum of a cost within caps; `None`: there is none."""
        if cost not in self.worst:
            return self._solve(self._costs[cost], caps, [])
        return self._solve(np.zeros(len(self.blocks)), caps, [], greatest=self.worst[cost])

    def _solve(
        self,
        objective: np.ndarray,
        caps: Mapping[str, float],
        cuts: Sequence[np.ndarray],
        greatest: Mapping[str, float] | None = None,
    ) -> Solution | None:
        """The optimum, of all that keep the caps and are none of the cuts' genotypes; `None`: there is none.

        Args:
            greatest: costs with factors: the objective is then the greatest of these, a variable of its own that is
                above each.
        """
        cuts = list(cuts)
        if greatest:
            unit = max(factor * float(np.abs(self._costs[name]).max()) for name, factor in greatest.items())
            objective = np.append(objective, max(unit, np.finfo(float).tiny * OBJECTIVE))  # × the variable: the cost
        scale = OBJECTIVE / max(float(np.abs(objective).max()), np.finfo(float).tiny * OBJECTIVE)
        while True:
            rows = [*self._rows, *self._capped(caps)]
            if cuts:
                chosen = np.zeros((len(cuts), len(self.blocks)))
                for row, cut in zip(chosen, cuts):
                    row[cut] = 1.0
                rows.append((csr_array(chosen), -np.inf, chosen.sum(axis=1) - 1))
            matrix = vstack([row for row, _, _ in rows])
            lower, upper = (
                np.concatenate([np.broadcast_to(row[side], row[0].shape[0]) for row in rows]) for side in (1, 2)
            )
            constraints = [(matrix, lower, upper)]
            if greatest:
                constraints = self._above(matrix, lower, upper, greatest, float(objective[-1]))
            whole = np.r_[np.ones(len(self.blocks)), np.zeros(len(objective) - len(self.blocks))]
            with without_native_lines(HIGHS, stream=1):
                result = milp(
                    scale * objective,
                    integrality=whole,
                    bounds=Bounds(0, np.where(whole > 0, 1.0, np.inf)),
                    constraints=[LinearConstraint(*each) for each in constraints],
                    options={"mip_rel_gap": 0.0, "time_limit": SECONDS},
                )
            if result.status == 2:
                return None
            if result.x is None:
                raise EdgeDiTError(f"The integer programme was not solved within {SECONDS:.0f} s: {result.message}")
            chosen = np.flatnonzero(result.x[: len(self.blocks)] > 0.5)
            solution = self._solution(chosen, _gap(result))
            if all(solution.costs[name] <= cap * (1 + SLACK) for name, cap in caps.items()):
                return solution
            cuts.append(chosen)  # kept the cap by the solver's tolerance alone

    def _above(
        self, matrix: csr_array, lower: np.ndarray, upper: np.ndarray, greatest: Mapping[str, float], unit: float
    ) -> list[tuple[csr_array, np.ndarray, np.ndarray]]:
        """Constraints with a variable more, in units of `unit`, which is at least each of these costs of the whole."""
        rows = [np.append(-ROW * factor * self._costs[name] / unit, ROW) for name, factor in greatest.items()]
        fixed = [ROW * factor * self.fixed[name] / unit for name, factor in greatest.items()]
        empty = csr_array((matrix.shape[0], 1))
        return [
            (hstack([matrix, empty]), lower, upper),
            (csr_array(np.array(rows)), np.array(fixed), np.full(len(fixed), np.inf)),
        ]

    def _capped(self, caps: Mapping[str, float]) -> list[tuple[csr_array, float, float]]:
        rows = []
        parts = [
            (part, cap / factor)
            for name, cap in caps.items()
            for part, factor in self.worst.get(name, {name: 1.0}).items()
        ]
        for name, cap in parts:
            scale = ROW / max(float(np.abs(self._costs[name]).max()), np.finfo(float).tiny * ROW)
            room = scale * (cap * (1 + SLACK) - self.fixed[name])
            rows.append((csr_array(scale * self._costs[name][None]), -np.inf, room))
        return rows

    def _solution(self, chosen: np.ndarray, gap: float | None = None) -> Solution:
        blocks = sorted((self.blocks[number] for number in chosen), key=lambda block: block.layer.source)
        genotype = Genotype(tuple(block.layer for block in blocks), self.hidden_size)
        costs = {
            name: math.fsum([self.fixed[name], *(block.costs[name] for block in blocks)]) for name in self.cost_names
        }
        for name, parts in self.worst.items():
            costs[name] = max(factor * costs[part] for part, factor in parts.items())
        return Solution(genotype, math.fsum(block.score for block in blocks), costs, gap)

    def _chosen(self, genotype: Genotype) -> np.ndarray | None:
        """The places of a genotype's layers; `None`: it has one that is no replacement here."""
        places = [self._place.get(layer) for layer in genotype.layers]
        return None if None in places else np.array(places)

    def _cuts(self, solutions: Iterable[Solution]) -> list[np.ndarray]:
        return [cut for solution in solutions if (cut := self._chosen(solution.genotype)) is not None]

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
        if not caps or self._solve(self._scores, {}, []) is None:
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
