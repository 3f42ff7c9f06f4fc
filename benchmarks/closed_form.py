"""What closed-form starts are worth: against random initialisation trained until it no longer improves, and against
copied weights.

    python benchmarks/closed_form.py RUN [--config FILE] [--layers 0,2,4] [--json] [--check]

RUN is a run of compress.py, or of train_teacher.py alone. For a few of its teacher's layers, and for the pairs that
begin there, every kind of proxy starts three ways: at random (Xavier), with copied (truncated) teacher weights, and in
closed form. Prints the normalised feature loss on held-out draws
 1. of copied and closed-form starts of every kind at some step counts of the bank's training, in which a proxy's peak
    rate follows its start;
 2. of random MLP and attention proxies after their full budget, with the closed form beside it, no step taken. The
    budget is --budget steps of the bank's training (warm-up, cosine), doubled once, from scratch, if the last tenth of
    the steps gained 1 % or more.
--check fails unless the closed form, untrained, beats every random MLP and attention proxy after that (one that still
gains: even if it gained as much ten times more), beats the copied start at every step count for every kind, and is
never above where it started.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from statistics import median

from tqdm import tqdm

from edgedit_hf.data.loading import load_training_set
from edgedit_hf.distill.closed_form import closed_form_block, truncated_block
from edgedit_hf.distill.feature_loss import rate_scale
from edgedit_hf.distill.proxy_group import Features, Proxy, held_out_losses, new_optimizer, random_block, train_step
from edgedit_hf.distill.teacher import load_teacher, search_space_of
from edgedit_hf.distill.teacher_features import CALIBRATION_STREAM, TEST_STREAM, TRAIN_STREAM, features_at
from edgedit_hf.run.config import RunConfig, load_config
from edgedit_hf.run.launch import make_accelerator
from edgedit_hf.run.optimisation import learning_rate_at, set_learning_rate
from edgedit_hf.search_space import OPTIONS, can_merge

ROOT = Path(__file__).resolve().parents[1]

MARKS = (0, 10, 20, 30, 60, 100, 200, 300)
PLATEAU_GAIN = 0.01  # of the loss, in the last tenth of the budget
MOST_DOUBLINGS = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "training" / "recipes" / "digits.yaml",
        help="the recipe RUN was made with",
    )
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE", help="as given when RUN was made"
    )
    parser.add_argument(
        "--layers", help="teacher layers, with commas; default the first ones of the first and the middle pair"
    )
    parser.add_argument(
        "--budget", type=int, default=6000, help="steps of random proxies, doubled once if they have not plateaued"
    )
    parser.add_argument("--steps", type=int, default=MARKS[-1], help="steps of copied and closed-form starts")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless the closed form is better throughout")
    arguments = parser.parse_args()

    config = load_config(arguments.config, [*arguments.override, f"output_dir={arguments.run}"])
    bench = Bench(config)
    pairs = bench.space.num_pairs
    layers = [int(i) for i in arguments.layers.split(",")] if arguments.layers else sorted({0, 2 * (pairs // 2)})
    single = {(i, option): bench.space.layer((i,), option) for i in layers for option in OPTIONS[1:]}
    merged = {
        (i, f"merged {option}"): bench.space.layer((i, i + 1), option)
        for i in layers
        if i + 1 < bench.space.num_layers and can_merge(bench.teacher.config, i)
        for option in OPTIONS
    }

    closed, started = {}, time.monotonic()
    calibration = Features.cat(bench.features(CALIBRATION_STREAM, config.bank.calibration_samples))
    for place, layer in (single | merged).items():
        x, conditioning = calibration.inputs[layer.source[0]], calibration.conditioning
        sources = [bench.teacher.blocks[i] for i in layer.source]
        closed[place] = layer, closed_form_block(sources, x, conditioning, layer)
    seconds = (time.monotonic() - started) / len(closed)
    untrained = held_out_losses(closed, bench.test)

    print(
        f"normalised held-out loss, {config.bank.calibration_samples} calibration images, {seconds:.1f} s a closed form"
    )
    marks = [mark for mark in MARKS if mark < arguments.steps] + [arguments.steps]
    copied = {
        place: (layer, truncated_block(bench.teacher.blocks[layer.source[0]], layer))
        for place, (layer, _) in closed.items()
    }
    curves = {
        "copied": bench.curves(copied, arguments.steps, marks),
        "closed form": bench.curves(closed, arguments.steps, marks),
    }
    print(f"{'layer':>5}  {'kind':<18}{'start':<13}" + "".join(f"{f'step {mark}':>10}" for mark in marks))
    for i, option in closed:
        for start, found in curves.items():
            print(
                f"{i:>5}  {option:<18}{start:<13}" + "".join(f"{loss:>10.5f}" for loss in found[i, option]), flush=True
            )

    print()
    alone = {place: layer for place, layer in single.items() if place[1] != "both"}
    random = bench.plateaus(alone, arguments.budget)
    print(
        "\n" + f"{'layer':>5}  "
        f"{'kind':<16}{'random, half':>14}{'plateau':>10}{'steps':>8}{'last tenth':>12}"
        f"{'closed form, 0 steps':>22}{'ratio':>8}"
    )
    for (i, option), row in random.items():
        row["closed_form"] = untrained[i, option]
        row["ratio"] = row["loss"] / row["closed_form"]
        print(
            f"{i:>5}  {option:<16}{row['half']:>14.5f}{row['loss']:>10.5f}{row['steps']:>8}{row['gain']:>11.2%} "
            f"{row['closed_form']:>22.5f}{row['ratio']:>8.1f}"
        )

    ahead = {
        place: min(a / b for a, b in zip(curves["copied"][place], curves["closed form"][place])) for place in closed
    }
    rise = {place: max(losses) / losses[0] - 1 for place, losses in curves["closed form"].items()}
    least, highest = min(row["ratio"] for row in random.values()), max(rise.values())
    print(
        f"\nrandom at its plateau / closed form untrained: least {least:.1f}, median "
        f"{median(row['ratio'] for row in random.values()):.1f}"
    )
    print(
        f"copied / closed form, least over step counts and kinds: {min(ahead.values()):.2f}; most that a closed form "
        f"rose: {highest:.2%}"
    )
    if arguments.json:

        def named(values: dict) -> dict:
            return {f"{i}/{option}": value for (i, option), value in values.items()}

        curves = {start: named(found) for start, found in curves.items()}
        print(
            json.dumps(
                {
                    "random": named(random),
                    "marks": marks,
                    "curves": curves,
                    "copied_ratio": named(ahead),
                    "rise": named(rise),
                }
            )
        )
    if arguments.check:
        # One that still gains at the largest budget must stay behind if it gained as much as in its last tenth ten
        # times more.
        unsettled = [
            f"{i}/{option}"
            for (i, option), row in random.items()
            if row["gain"] >= PLATEAU_GAIN and row["loss"] * (1 - row["gain"]) ** 10 <= row["closed_form"]
        ]
        failures = [
            f"random proxies still gain: {unsettled}" if unsettled else "",
            f"a random proxy at its plateau is only {least:.2f} times the untrained closed form" if least <= 1 else "",
            *(
                f"{option} of layer {i}: the copied start is ahead, {ratio:.2f}"
                for (i, option), ratio in ahead.items()
                if ratio <= 1
            ),
            f"a closed form rises by {highest:.2%} before it falls" if highest > 0 else "",
        ]
        if any(failures):
            sys.exit("; ".join(filter(None, failures)))


class Bench:
    """A teacher, its features, and training of some proxies on them as in the bank."""

    def __init__(self, config: RunConfig) -> None:
        self.accelerator = make_accelerator(config)
        self.config, self.device = config, self.accelerator.device
        self.dataset, _ = load_training_set(config, self.accelerator)
        self.teacher = load_teacher(config).transformer.eval().requires_grad_(False).to(self.device)
        self.space = search_space_of(config, self.teacher.config)
        self.test = self.features(TEST_STREAM, config.bank.calibration_samples)

    def at(self, step: int, stream: int, depth: int) -> Features:
        config = self.config
        drawn = config.bank.batch_size, config.bank.class_dropout, config.seed, step, stream
        return features_at(self.teacher, self.dataset, *drawn, self.device, "no", depth)

    def features(self, stream: int, samples: int) -> list[Features]:
        """At least so many images' features of all layers, in batches."""
        return [
            self.at(step, stream, len(self.teacher.blocks))
            for step in range(-(-samples // self.config.bank.batch_size))
        ]

    def curves(self, blocks: dict, steps: int, marks: list[int]) -> dict[tuple, list[float]]:
        """Held-out losses of these blocks, trained from copies, at some of `steps` steps."""
        options, proxies = self.config.bank, {}
        starts = held_out_losses(blocks, self.test)
        for place, (layer, block) in blocks.items():
            block = copy.deepcopy(block).to(self.device).requires_grad_(True)
            proxies[place] = Proxy(
                layer, block, new_optimizer(options.optimizer, block.parameters(), options.learning_rate)
            )
        depth = max(layer.source[-1] for layer, _ in blocks.values()) + 1
        found: dict[tuple, list[float]] = {place: [] for place in blocks}
        for step in tqdm(range(steps + 1), desc=f"{len(blocks)} proxies", mininterval=10, leave=False):
            if step in marks:
                for place, loss in held_out_losses(
                    {p: (x.layer, x.block) for p, x in proxies.items()}, self.test
                ).items():
                    found[place].append(loss)
            if step < steps:
                rate = learning_rate_at(
                    step, options.learning_rate, options.warmup_steps, steps, options.final_learning_rate
                )
                for place, proxy in proxies.items():
                    set_learning_rate(proxy.optimizer, rate * rate_scale(starts[place]))
                train_step(proxies.values(), self.at(step, TRAIN_STREAM, depth), "normalised")
        return found

    def plateaus(self, layers: dict, budget: int) -> dict[tuple, dict[str, float]]:
        """Random proxies after the first budget, of some doublings, in whose last tenth they gain less than
        [`PLATEAU_GAIN`].
        """
        done: dict[tuple, dict[str, float]] = {}
        for _ in range(MOST_DOUBLINGS + 1):
            left = {
                place: layer
                for place, layer in layers.items()
                if place not in done or done[place]["gain"] >= PLATEAU_GAIN
            }
            if not left:
                break
            blocks = {
                place: (layer, random_block(self.teacher.new_block(layer.to_dict()), self.config.seed, str(place)))
                for place, layer in left.items()
            }
            for place, (half, before, last) in self.curves(
                blocks, budget, [budget // 2, budget * 9 // 10, budget]
            ).items():
                done[place] = {"half": half, "loss": last, "steps": budget, "gain": 1 - last / before}
                print(
                    f"random {place[1]} of layer {place[0]} after {budget} steps: {last:.5f}, {1 - last / before:.2%} "
                    "in the last tenth",
                    flush=True,
                )
            budget *= 2
        return {place: done[place] for place in layers}


if __name__ == "__main__":
    main()
