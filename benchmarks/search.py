"""Ours and other searches on a space of which every genotype was evaluated: hypervolume against evaluations.

    python benchmarks/search.py [--table FILE] [--seeds 5] [--kernels | --scores] [--plot FILE] [--json] [--check]

The table (benchmarks/enumerate_space.py) has the real distance and latency of every genotype, so a search costs nothing
here but itself. Of each search, the hypervolume after 10, 20, 40 and 80 evaluations as a share of the true front's:
mean over the seeds, and half of the 95 % interval of that mean (Student's t); searches that draw nothing have none.

    ours        BayesSearch as it ships, with the programme
    no scores   BayesSearch without the programme
    old pool    the same, as it was: both objectives modelled on all features, the best of 512 drawn genotypes
    k-best      what the programme names along the latency budgets, each really evaluated
    greedy      from the teacher on, the least loss per millisecond saved
    nsga2       pymoo's NSGA-II
    random      uniform genotypes

--kernels compares the models of the distance instead: mean log predictive density of the standardised log distance of
genotypes that they were not fitted to, and the rank correlation of what they foretell.
--scores compares scores of a proxy for the programme: the rank correlation of their sums with the distance, over all
genotypes, and the share of the true hypervolume that the programme's solutions reach with them (swaps: after the
evaluations that it takes to learn them).
--check fails unless ours reaches .97 of the true hypervolume with at most 5 % of the space evaluated, random search
needs at least three times the evaluations of ours for that, and at none of the budgets is ours below k-best by more
than its interval.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch
from botorch.models.kernels.categorical import CategoricalKernel
from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
from diffusers_dit import fail
from enumerate_space import TABLE, Enumerated
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.priors import GammaPrior, LogNormalPrior
from scipy import stats

from edgedit_hf.genotype import LayerSpec
from edgedit_hf.report.plots import hypervolume_plot
from edgedit_hf.search.ask_tell import AskTellSearch, Code, RandomSearch, first_unseen, sobol
from edgedit_hf.search.baselines import GreedySearch, NSGA2Search
from edgedit_hf.search.bayes import BayesSearch
from edgedit_hf.search.blocks import replacement_score
from edgedit_hf.search.encoding import Encoding
from edgedit_hf.search.pareto import hypervolume_trace
from edgedit_hf.search.programme import Block, Programme
from edgedit_hf.search.programme_search import ProgrammeSearch, swap
from edgedit_hf.search.surrogate import Surrogate, distance_kernel, features_kernel
from edgedit_hf.search_space import layer_cost

BUDGETS = (10, 20, 40, 80)
ENOUGH, SHARE, RATIO = 0.97, 0.05, 3.0
INITIAL, BATCH = 8, 4
RANDOM = 5  # times the largest budget that random search gets, to see when it has enough


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="evaluations, with commas")
    parser.add_argument("--searches", help="some of them, with commas")
    comparison = parser.add_mutually_exclusive_group()
    comparison.add_argument("--kernels", action="store_true")
    comparison.add_argument("--scores", action="store_true")
    parser.add_argument("--plot", type=Path, help="a PNG of hypervolume against evaluations")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Enumerated.read(options.table)
    budgets = [int(budget) for budget in options.budgets.split(",")]
    if options.kernels:
        result: dict[str, Any] = {"kernels": compare_kernels(table, budgets, options.seeds)}
        print_kernels(result["kernels"], budgets)
    elif options.scores:
        result = {"scores": compare_scores(table, budgets)}
        print_scores(result["scores"], budgets)
    else:
        result = compare_searches(table, budgets, options.seeds, options.searches)
        print_searches(result)
        if options.plot:
            plot(result, options.plot)
    if options.json:
        print(json.dumps(result))
    if options.check and "searches" in result:
        fail(shortfalls(result))


# -------------------------------------------------------------------- the searches


class PoolSearch(BayesSearch):
    """The search as it was before the programme: GPs with BoTorch's kernel on all features, a fixed pool."""

    POOL = 512

    @staticmethod
    def kernel(encoding: Encoding) -> Kernel:
        places = tuple(range(encoding.num_features))
        return get_covar_module_with_dim_scaled_prior(ard_num_dims=len(places), active_dims=places)

    def _starts(self) -> list[Code]:
        near = first_unseen(self._near(), self.seen(), self.POOL // 2)
        far = sobol(self.space, 8 * self.POOL, self._step_seed())
        return near + first_unseen(far, self.seen() | set(near), self.POOL - len(near))

    def _few_left(self) -> bool:
        return True  # nothing but the pool is looked at


def shipped_score(table: Enumerated, layer: LayerSpec) -> float:
    return replacement_score({"loss_after": table.loss(layer), "source": layer.source})


def programme_of(table: Enumerated, score: Callable[[Enumerated, LayerSpec], float] = shipped_score) -> Programme:
    """The integer programme of a table's bank and latencies, with a score of every layer."""
    space = table.space
    blocks = [
        Block(
            layer,
            score(table, layer),
            {
                "latency_ms": table.layer_ms(layer),
                "parameters": float(layer_cost(space.hidden_size, layer.shape, 1).parameters),
            },
        )
        for layer in space.replacements()
    ]
    return Programme(blocks, space.num_layers, space.hidden_size, {"latency_ms": table.trunk_ms})


def compare_searches(
    table: Enumerated, budgets: Sequence[int], seeds: int, searches: str | None = None
) -> dict[str, Any]:
    """Of every search, or those named, and seed the share of the true hypervolume after each evaluation."""
    space, programme, most = table.space, programme_of(table), min(max(budgets), table.space.size)
    common = (min(INITIAL, most), table.reference)
    makers: dict[str, Callable[[int], AskTellSearch]] = {
        "ours": lambda seed: BayesSearch(space, most, seed, *common, programme=programme),
        "no scores": lambda seed: BayesSearch(space, most, seed, *common),
        "old pool": lambda seed: PoolSearch(space, most, seed, *common),
        "k-best": lambda seed: ProgrammeSearch.of(programme, space, most, seed, *common),
        "greedy": lambda seed: GreedySearch.of(programme, space, most, seed, *common),
        "nsga2": lambda seed: NSGA2Search(space, most, seed, *common),
        "random": lambda seed: RandomSearch(space, min(RANDOM * most, space.size), seed, *common),
    }
    shares: dict[str, list[list[float]]] = {}
    slowest = 0.0
    for name in searches.split(",") if searches else makers:
        make = makers[name]
        for seed in range(1 if name in ("k-best", "greedy") else seeds):
            search = make(seed)
            batch = search.num_evaluations if name == "random" else BATCH
            while not search.finished:
                started = time.perf_counter()
                asked = search.pending or search.ask(batch)
                if name == "ours":
                    slowest = max(slowest, (time.perf_counter() - started) / max(1, len(asked)))
                for genotype in asked:
                    code = space.code(genotype)
                    search.tell(genotype, table.objectives[code], noise=table.entries[code][1])
            trace = hypervolume_trace(search.points, table.reference)
            shares.setdefault(name, []).append([reached / table.hypervolume for reached in trace])
    found = {}
    for name, traces in shares.items():
        at = {str(budget): interval([trace[min(budget, len(trace)) - 1] for trace in traces]) for budget in budgets}
        enough = [next((n for n, share in enumerate(trace, 1) if share >= ENOUGH), None) for trace in traces]
        found[name] = {"at": at, "enough": enough, "traces": [trace[:most] for trace in traces]}
    return {
        "genotypes": space.size,
        "seeds": seeds,
        "budgets": list(budgets),
        "searches": found,
        "seconds_a_suggestion": slowest,
    }


def interval(values: Sequence[float]) -> list[float]:
    """Mean, and half of its 95 % interval."""
    if len(values) < 2:
        return [values[0], 0.0]
    return [mean(values), float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))]


def usual(enough: Sequence[int | None]) -> float:
    """The median of the evaluations needed; infinite where fewer than half of the seeds had enough."""
    return median(math.inf if count is None else count for count in enough)


def print_searches(result: Mapping[str, Any]) -> None:
    print(f"{result['genotypes']} genotypes, {result['seeds']} seeds; share of the true hypervolume after …")
    print(f"{'':<10}" + "".join(f"{budget:>16}" for budget in result["budgets"]) + f"{f'evaluations to {ENOUGH}':>22}")
    for name, found in result["searches"].items():
        cells = "".join(f"{f'{middle:.4f} ± {half:.4f}':>16}" for middle, half in found["at"].values())
        print(f"{name:<10}{cells}{usual(found['enough']):>22.0f}")
    print(f"The slowest suggestion of ours took {result['seconds_a_suggestion']:.2f} s.")


def shortfalls(result: Mapping[str, Any]) -> list[str]:
    """What the comparison does not show."""
    searches, allowed = result["searches"], SHARE * result["genotypes"]
    ours, random = usual(searches["ours"]["enough"]), usual(searches["random"]["enough"])
    said = []
    if ours > allowed:
        said.append(f"ours needs {ours} evaluations for {ENOUGH} of the hypervolume, more than {allowed:.0f}")
    if random < RATIO * ours:
        said.append(f"random search needs {random} evaluations for it, fewer than {RATIO:.0f} x {ours}")
    for budget, (best, _) in searches["k-best"]["at"].items():
        middle, half = searches["ours"]["at"][budget]
        if middle + half < best - 1e-9:
            said.append(f"after {budget} evaluations ours has {middle:.4f} ± {half:.4f}, k-best {best:.4f}")
    return said


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Share of the true hypervolume against evaluations."""
    traces = {}
    for name, found in result["searches"].items():
        longest = max(map(len, found["traces"]))
        traces[name] = [trace + trace[-1:] * (longest - len(trace)) for trace in found["traces"]]
    hypervolume_plot(path, traces, INITIAL, 1.0, "share of the true front's hypervolume")


# -------------------------------------------------------------------- the scores of a proxy


def before(table: Enumerated, layer: LayerSpec) -> float:
    """The loss of the closed-form start."""
    space = table.space
    return 0.0 if space.is_teachers(layer) else table.values["bank"][space.key(layer)][0]


def swapped(table: Enumerated, layer: LayerSpec) -> float:
    """The log of the distance with the layer alone in the teacher, relative to the teacher's own."""
    whole = max(table.space.ends(), key=lambda genotype: len(genotype.layers))
    own, other = (table.objectives[table.space.code(genotype)][0] for genotype in (whole, swap(whole, layer)))
    return math.log(other / own)


SCORES: dict[str, Callable[[Enumerated, LayerSpec], float]] = {
    "loss after distillation": Enumerated.loss,
    "-log(1 - loss)": lambda table, layer: -math.log1p(-table.loss(layer)),
    "loss x layers (ships)": shipped_score,
    "closed-form loss": before,
    "closed-form loss x layers": lambda table, layer: before(table, layer) * len(layer.source),
    "sqrt loss": lambda table, layer: math.sqrt(table.loss(layer)),
    "swaps": swapped,
}


def compare_scores(table: Enumerated, budgets: Sequence[int]) -> dict[str, dict[str, Any]]:
    """By score: Spearman's correlation of its sums with the distance, and the share of the true hypervolume."""
    space, most = table.space, min(max(budgets), table.space.size)
    distances = [distance for distance, _ in table.points]
    found = {}
    for name, score in SCORES.items():
        worth = {layer: score(table, layer) for layer in space.replacements()}
        sums = [sum(worth[layer] for layer in space.from_code(code).layers) for code in table.codes]
        programme = programme_of(table, shipped_score if name == "swaps" else score)
        search = ProgrammeSearch.of(programme, space, most, 0, INITIAL, table.reference, swaps=name == "swaps")
        while not search.finished:
            for genotype in search.pending or search.ask(1):
                search.tell(genotype, table.objectives[space.code(genotype)])
        trace = hypervolume_trace(search.points, table.reference)
        found[name] = {
            "spearman": float(stats.spearmanr(sums, distances).statistic),
            "at": {str(budget): trace[min(budget, len(trace)) - 1] / table.hypervolume for budget in budgets},
        }
    return found


def print_scores(found: Mapping[str, Mapping[str, Any]], budgets: Sequence[int]) -> None:
    print("rank correlation with the distance, and share of the true hypervolume after …")
    print(f"{'':<28}{'Spearman':>10}" + "".join(f"{budget:>8}" for budget in budgets))
    for name, row in found.items():
        print(f"{name:<28}{row['spearman']:>10.3f}" + "".join(f"{share:>8.3f}" for share in row["at"].values()))


# -------------------------------------------------------------------- the models of the distance


class Overlap(Kernel):
    """The share of equal columns: a sum over layers."""

    def forward(self, x1: torch.Tensor, x2: torch.Tensor, diag: bool = False, **options: Any) -> torch.Tensor:
        equal = (x1.unsqueeze(-2) == x2.unsqueeze(-3)).to(x1).mean(-1)
        return torch.diagonal(equal, dim1=-1, dim2=-2) if diag else equal


def scaled(kernel: Kernel) -> Kernel:
    return ScaleKernel(kernel, outputscale_prior=GammaPrior(2.0, 0.15))


def plain(kind: type[Kernel], count: int, **options: Any) -> Kernel:
    """On the first `count` inputs with one length scale, with BoTorch's prior of it."""
    prior = LogNormalPrior(math.sqrt(2) + math.log(count) / 2, math.sqrt(3))
    return scaled(kind(active_dims=tuple(range(count)), lengthscale_prior=prior, **options))


def ard(encoding: Encoding) -> Kernel:
    places = tuple(range(encoding.num_features))
    return scaled(get_covar_module_with_dim_scaled_prior(len(places), use_rbf_kernel=False, active_dims=places))


KERNELS: dict[str, Callable[[Encoding], Kernel]] = {
    "Matérn": lambda encoding: plain(MaternKernel, encoding.num_features, nu=2.5),
    "Matérn, ARD": ard,
    "squared exponential": lambda encoding: plain(RBFKernel, encoding.num_features),
    "Hamming": lambda encoding: scaled(
        CategoricalKernel(active_dims=tuple(range(encoding.num_features)), lengthscale_prior=GammaPrior(3.0, 6.0))
    ),
    "additive": lambda encoding: scaled(Overlap(active_dims=tuple(range(encoding.num_features)))),
    "Matérn, by kind": features_kernel,
    "Matérn, by kind, score": distance_kernel,
}


def designs(table: Enumerated, count: int, seed: int) -> list[Code]:
    """Half at random, half near the front: of its points and their neighbours."""
    rng, codes = np.random.default_rng([count, seed]), table.codes
    near = dict.fromkeys(table.front)
    for code in table.front:
        near |= dict.fromkeys(map(table.space.code, table.space.neighbours(table.space.from_code(code))))
    around = [list(near)[place] for place in rng.permutation(len(near))[: count // 2]]
    anywhere = (codes[place] for place in rng.permutation(len(codes)))
    return around + first_unseen(anywhere, set(around), count - len(around))


def compare_kernels(table: Enumerated, sizes: Sequence[int], seeds: int) -> dict[str, dict[str, list[float]]]:
    """By model and number of points: mean log predictive density, and Spearman's correlation, of all others."""
    encoding = Encoding(table.space, programme_of(table))
    found: dict[str, dict[str, list[float]]] = {}
    for name, kernel in KERNELS.items():
        for prior_mean in (False, True):
            label = f"{name}{' + mean' if prior_mean else ''}"
            for size in sizes:
                scores = [predict(table, encoding, size, seed, kernel, prior_mean) for seed in range(seeds)]
                found.setdefault(label, {})[str(size)] = [mean(column) for column in zip(*scores)]
    return found


def predict(
    table: Enumerated, encoding: Encoding, size: int, seed: int, kernel: Callable, prior_mean: bool
) -> tuple[float, float]:
    codes = designs(table, size, seed)
    others = [code for code in table.codes if code not in set(codes)]
    torch.manual_seed(seed)
    points = [table.objectives[code] for code in codes]
    fitted = Surrogate(encoding, codes, points, [None] * size, table.reference, kernel, prior_mean)
    gp = fitted.model.models[0]
    x = fitted.inputs(encoding.rows(others))
    logs = -torch.tensor([table.objectives[code][0] for code in others], dtype=torch.float64).log()
    y = (logs - fitted.mean[0]) / fitted.std[0]
    with torch.no_grad():
        posterior = gp.posterior(x[:, None])
        middle, variance = posterior.mean.flatten(), posterior.variance.flatten() + gp.likelihood.noise.mean()
    density = -0.5 * ((2 * math.pi * variance).log() + (y - middle) ** 2 / variance)
    return float(density.mean()), float(stats.spearmanr(middle, y).statistic)


def print_kernels(found: Mapping[str, Mapping[str, Sequence[float]]], sizes: Sequence[int]) -> None:
    print("log predictive density (Spearman) of the genotypes not told, after …")
    print(f"{'':<30}" + "".join(f"{size:>16}" for size in sizes))
    for name, row in found.items():
        print(f"{name:<30}" + "".join(f"{f'{density:.3f} ({rank:.3f})':>16}" for density, rank in row.values()))


if __name__ == "__main__":
    main()
