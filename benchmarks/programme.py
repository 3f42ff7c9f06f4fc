"""How long the integer programme takes for a whole teacher: the best student under a cap, a sweep, the K best.

    python benchmarks/programme.py [--layers 28] [--choices 16] [--points 16] [--k 8] [--json] [--check]

Replacements of one, two and three teacher layers at any offset, `--choices` sizes each (1,296 of 28 layers and 16
choices), with DiT-XL/2's parameters, times in proportion to the products of a layer with some scatter, and log-normal
losses. Seconds are those of the CPU, all threads together; "least of the cost" is the fastest student.

--check fails if the best student under a latency cap takes 2 s or more, or an answer is not proved (gap 0).
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable

import numpy as np

from edgedit_hf.genotype import LayerSpec
from edgedit_hf.search.programme import Block, Programme
from edgedit_hf.search_space import layer_cost

HIDDEN, HEADS, TOKENS, SECONDS = 1152, 16, 256, 2.0


def programme(layers: int, choices: int, seed: int = 0) -> Programme:
    """Replacements with drawn times and losses."""
    draw, blocks = np.random.default_rng(seed), []
    widths, ratios = (1152, 896, 640, 384), (4.0, 3.0, 2.0, 1.0)
    shapes = list(itertools.product(widths, ratios))[:choices]
    times = {shape: draw.uniform(0.95, 1.05) for shape in shapes}
    for span in (1, 2, 3):
        for first in range(layers - span + 1):
            damage = draw.lognormal(-6 + 1.5 * (span - 1), 1.0)
            for width, ratio in shapes:
                layer = LayerSpec(tuple(range(first, first + span)), width, HEADS, ratio)
                cost = layer_cost(HIDDEN, layer.shape, TOKENS)
                own = span == 1 and (width, ratio) == shapes[0]
                loss = 0.0 if own else damage * (HIDDEN / width) ** 0.5 * 4 / ratio * draw.lognormal(0, 0.3)
                costs = {"latency_ms": times[width, ratio] * cost.flops / 2e9, "parameters": float(cost.parameters)}
                blocks.append(Block(layer, loss, costs))
    return Programme(blocks, layers, HIDDEN, {"latency_ms": 2.0})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--choices", type=int, default=16, help="sizes a span, at most 16")
    parser.add_argument("--points", type=int, default=16, help="budgets of the sweep")
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless the bars are met")
    arguments = parser.parse_args()

    solver = programme(arguments.layers, arguments.choices)
    rows: dict[str, dict[str, float]] = {}
    proved = True

    def timed(label: str, answer: Callable):
        nonlocal proved
        started = time.process_time()
        found = answer()
        seconds = time.process_time() - started
        solutions = found if isinstance(found, list) else [found]
        proved &= all(solution.gap == 0.0 for solution in solutions)
        rows[label] = {"seconds": seconds, "solutions": len(solutions), "score": solutions[0].score}
        return found

    fastest = timed("least of the cost", lambda: solver.least("latency_ms")).costs["latency_ms"]
    whole = timed("best without a cap", solver.best).costs
    for share in (0.25, 0.5, 0.75):
        cap = fastest + share * (whole["latency_ms"] - fastest)
        timed(f"best under {cap:.3g} ms", lambda cap=cap: solver.best({"latency_ms": cap}))
    slowest = max(row["seconds"] for label, row in rows.items() if label.startswith("best under"))
    both = {"latency_ms": cap, "parameters": 0.6 * whole["parameters"]}
    timed("best under two caps", lambda: solver.best(both))
    timed(f"sweep of {arguments.points} budgets", lambda: solver.front(arguments.points))
    timed(f"{arguments.k} best under {cap:.3g} ms", lambda: solver.k_best(arguments.k, {"latency_ms": cap}))

    print(f"{len(solver.blocks)} replacements of {arguments.layers} layers")
    print(f"{'':<28}{'seconds':>9}{'solutions':>11}{'loss':>11}")
    for label, row in rows.items():
        print(f"{label:<28}{row['seconds']:>9.2f}{row['solutions']:>11}{row['score']:>11.4g}")
    print(f"under one cap at most {slowest:.2f} s; {'all' if proved else 'not all'} proved (gap 0)")
    if arguments.json:
        print(json.dumps({"replacements": len(solver.blocks), "rows": rows, "slowest": slowest, "proved": proved}))
    if arguments.check and (slowest >= SECONDS or not proved):
        sys.exit(f"the slowest took {slowest:.2f} s, {SECONDS} s are allowed; proved: {proved}")


if __name__ == "__main__":
    main()
