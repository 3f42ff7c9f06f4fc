"""Who makes which proxies, and when: shares of ranks, groups that fit the memory, and the memory model behind them.
Pure, no torch.

The unit is what shares its features: in the paper's space a pair of teacher layers with all its proxies (3 + 3 + 4, or
3 for a last odd layer); in a menu, whose merges start at any layer, the proxies that start at one teacher layer. A rank
owns a contiguous range of units, because it runs the teacher up to its deepest layer whatever it does with the layers
before.

A rank whose units do not fit the memory takes them in contiguous groups. Each group visits the device once, for all its
steps, and then goes to disk for good. The alternative, to move every proxy in and out each step, would move 12 bytes a
parameter (weight and two moments; 32 GB a step for the 2.65 G parameters of DiT-XL/2's proxies), whereas a further
group only runs the teacher's prefix again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from ..errors import EdgeDiTError
from ..genotype import Genotype, LayerSpec, Shape
from ..search_space import SearchSpace, layer_cost, position_weights, trunk_cost

TRAIN_FORWARDS = 3  # forward and backward cost about three forwards
UPDATE_FLOPS = 200  # an AdamW update moves 28 bytes a weight and computes little; that many FLOPs take as long
# interpreter with torch, diffusers, accelerate and a small data set, resident before the teacher is loaded
PROCESS_BYTES = 800_000_000
# a token and channel that autograd keeps of one DiT block and its loss in fp32, temporaries of backward included
ACTIVATION_BYTES = 160
# a calibration token and MLP neuron while a merge, which pools two layers' neurons, is fitted in closed form (measured)
FIT_ROW_BYTES = 44
# a pair of MLP neurons meanwhile: float64 Gram matrices of the pooled neurons, their factors and inverses (measured)
FIT_MATRIX_BYTES = 170


def units_of(space: SearchSpace, proxies: Iterable[LayerSpec]) -> list[tuple[LayerSpec, ...]]:
    """Proxies by what they share their features with, in order: the pair of teacher layers that they stand for, or, of
    a menu, the first one; units without any are left out.
    """
    units: dict[int, list[LayerSpec]] = {}
    for layer in proxies:
        units.setdefault(layer.source[0] // space.stride, []).append(layer)
    return [tuple(units[unit]) for unit in sorted(units)]


def depth_of(layers: Iterable[LayerSpec]) -> int:
    """Number of teacher layers that must run to give these proxies their inputs and targets."""
    return max(layer.source[-1] for layer in layers) + 1


def combined(space: SearchSpace, layer: LayerSpec) -> bool:
    """Whether a proxy is put together from two others once these are trained: the paper's "both". Of a menu every one
    starts on its own.
    """
    return space.option_of(layer) == "both"


def wanted_proxies(space: SearchSpace, genotypes: Sequence[Genotype] | None) -> list[LayerSpec]:
    """The proxies to make: all of the space, or what these genotypes need, in the space's order.

    A "both" starts from the trained "attention" and "mlp" proxies of the same layers, so these come along.

    Raises:
        EdgeDiTError: a genotype belongs to another teacher or space, or none of them needs any proxy.
    """
    if genotypes is None:
        return space.proxies()
    needed: set[LayerSpec] = set()
    for genotype in genotypes:
        space.code(genotype)
        for layer in genotype.layers:
            option = space.option_of(layer)
            options = ("attention", "mlp", "both") if combined(space, layer) else (option,)
            needed.update(
                space.layer(layer.source, name) for name in options if len(layer.source) > 1 or name != "original"
            )
    if not needed:
        raise EdgeDiTError(
            "bank.only names genotypes that keep every teacher layer as it is: they need no proxies. Leave it null to "
            "make all."
        )
    return [layer for layer in space.proxies() if layer in needed]


def step_cost(space: SearchSpace, layer: LayerSpec, tokens: int, batch_size: int) -> float:
    """FLOPs of one training step of a proxy: forward, backward, and the update as the FLOPs that take as long."""
    cost = layer_cost(space.hidden_size, layer.shape, tokens)
    return TRAIN_FORWARDS * batch_size * cost.flops + UPDATE_FLOPS * cost.weights


def prefix_cost(space: SearchSpace, depth: int, tokens: int, batch_size: int) -> float:
    """FLOPs of the teacher's first `depth` layers on a batch."""
    return batch_size * depth * layer_cost(space.hidden_size, space.option_shape("original"), tokens).flops


def contiguous_shares(
    work: Sequence[float], prefix: Sequence[float], ranks: int, what: str = "pairs of layers"
) -> list[range]:
    """Cut 0 … n-1 into `ranks` non-empty ranges that minimise the slowest: the sum of its `work` plus `prefix` of its
    last element.

    Exact, by dynamic programming over (ranks, elements).

    Args:
        work: cost of every element itself. prefix: cost that a range ending with this element adds; it must not fall.
        what: what messages call the elements.

    Raises:
        EdgeDiTError: more ranks than elements.
    """
    count = len(work)
    if ranks > count:
        raise EdgeDiTError(f"{ranks} processes share {count} {what}; start at most that many.")
    total = [0.0]
    for value in work:
        total.append(total[-1] + value)
    # best[end] = (cost of the slowest, ends of the ranges) for the first `end` elements and the ranges so far
    best: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ()), *[None] * count]
    for _ in range(ranks):
        longer: list[tuple[float, tuple[int, ...]] | None] = [None] * (count + 1)
        for end in range(1, count + 1):
            options = [
                (max(best[start][0], total[end] - total[start] + prefix[end - 1]), (*best[start][1], end))
                for start in range(end)
                if best[start] is not None
            ]
            longer[end] = min(options, default=None)
        best = longer
    ends = best[count][1]
    return [range(start, end) for start, end in zip((0, *ends), ends)]


@dataclass(frozen=True)
class MemoryModel:
    """Bytes that a process needs for its teacher prefix and a group of proxies; what is counted is said in [`predict`].

    Args:
        space: the teacher's. model_config: its config. tokens: of an image.
        batch_size, calibration_samples: images a step, and images that starts are fitted to.
        teacher_bytes: a teacher weight (4 in fp32, 2 in bf16). state_bytes: optimiser state a weight (8 for AdamW, 2
            for its 8-bit form).
        closed_form: whether starts are fitted.
        process_bytes: held before anything is loaded; 0 where the budget is a GPU's.
    """

    space: SearchSpace
    model_config: dict
    tokens: int
    batch_size: int
    calibration_samples: int
    teacher_bytes: int = 4
    state_bytes: int = 8
    closed_form: bool = True
    process_bytes: int = PROCESS_BYTES

    def weights(self, layers: Iterable[LayerSpec]) -> int:
        """Learned weights of these layers."""
        return sum(self._weights(layer.shape) for layer in layers)

    def _weights(self, shape: Shape) -> int:
        return layer_cost(self.space.hidden_size, shape, self.tokens, position_weights(self.model_config)).weights

    def teacher(self, depth: int) -> int:
        """Weights of the teacher's trunk and its first `depth` layers."""
        layer = self._weights(self.space.option_shape("original"))
        return trunk_cost(self.model_config, self.tokens).weights + depth * layer

    def predict(self, layers: Sequence[LayerSpec], depth: int) -> int:
        """Peak bytes while a rank whose prefix is `depth` layers makes these proxies.

        The largest of four moments: the teacher being loaded (fp32, all layers); the starts of the last unit
        (calibration and held-out features of a unit, the fit's matrices); training of the single reductions; training
        of "both". Training holds weights and optimiser states of the group, and the gradients, activations and
        low-precision copy of one proxy; every moment but the first holds the prefix and the features of a batch.
        """
        width, tokens = self.space.hidden_size, self.tokens
        both = [layer for layer in layers if combined(self.space, layer)]
        single = [layer for layer in layers if not combined(self.space, layer)]
        merged = max([2, *(len(layer.source) for layer in layers)])  # teacher layers whose neurons a fit pools
        original = self._weights(self.space.option_shape("original"))
        feature = 4 * tokens * width  # one tensor of one image: the residual stream stays in fp32
        held = self.process_bytes + self.teacher_bytes * self.teacher(depth) + (depth + 1) * self.batch_size * feature
        neurons = int(width * self.space.mlp_ratio) * merged // 2
        fitting = (
            (FIT_ROW_BYTES * self.calibration_samples * tokens + FIT_MATRIX_BYTES * neurons) * neurons
            if self.closed_form
            else 0
        )
        start = 4 * self.weights(single) + 4 * (4 + merged) * original
        start += 11 * self.calibration_samples * feature + fitting
        one = 6 * original + ACTIVATION_BYTES * self.batch_size * tokens * width
        train = (4 + self.state_bytes) * max(self.weights(single), self.weights(both)) + one
        combine = 4 * self.weights(layers) + one
        load = self.process_bytes + 4 * self.teacher(self.space.num_layers) if self.process_bytes else 0
        return max(load, held + max(start, train, combine))


@dataclass(frozen=True)
class Group:
    """Proxies that are on the device together, and the bytes a process is expected to need meanwhile."""

    layers: tuple[LayerSpec, ...]
    predicted_bytes: int


def fitting_groups(
    units: Sequence[tuple[LayerSpec, ...]], predict: Callable[[Sequence[LayerSpec]], int], budget_bytes: float | None
) -> list[Group]:
    """Cut a rank's units into the fewest contiguous groups that fit; greedy is exact, as a longer group never needs
    less.

    Raises:
        EdgeDiTError: one unit alone needs more than the budget.
    """
    groups: list[Group] = []
    for unit in units:
        longer = (*groups[-1].layers, *unit) if groups else unit
        if groups and (budget_bytes is None or predict(longer) <= budget_bytes):
            groups[-1] = Group(longer, predict(longer))
            continue
        alone = predict(unit)
        if budget_bytes is not None and alone > budget_bytes:
            raise EdgeDiTError(
                f"The proxies of teacher layers {unit[0].source[0]}–{depth_of(unit) - 1} need {alone / 1e9:.2f} GB "
                f"with their teacher prefix, but bank.memory_budget_gb is {budget_bytes / 1e9:g}. Raise it, or lower "
                "bank.batch_size or bank.calibration_samples, or use bank.optimizer adamw8bit, bf16 (accelerate "
                "launch --mixed_precision bf16) or more processes."
            )
        groups.append(Group(unit, alone))
    return groups


def plan_bank(
    proxies: Sequence[LayerSpec], memory: MemoryModel, ranks: int, budget_bytes: float | None
) -> list[list[Group]]:
    """The groups of every rank, in order.

    Shares minimise the slowest rank's cost of a step: its proxies' forward, backward and update, and its teacher
    prefix.

    Args:
        budget_bytes: what a process may use; `None`: no bound, so one group a rank.
    """
    space, units = memory.space, units_of(memory.space, proxies)
    work = [sum(step_cost(space, layer, memory.tokens, memory.batch_size) for layer in unit) for unit in units]
    # A unit may reach deeper than the one after it, where a merge of two is not allowed or not wanted.
    depths = accumulate(map(depth_of, units), max)
    prefix = [prefix_cost(space, depth, memory.tokens, memory.batch_size) for depth in depths]
    what = "pairs of layers" if space.stride == 2 else "layers at which proxies start"
    plans = []
    for share in contiguous_shares(work, prefix, ranks, what):
        owned = [units[i] for i in share]
        depth = depth_of(layer for unit in owned for layer in unit)
        plans.append(fitting_groups(owned, partial(memory.predict, depth=depth), budget_bytes))
    return plans
