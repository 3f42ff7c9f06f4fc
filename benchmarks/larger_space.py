"""What a larger space than the paper's buys, on the run of a recipe with a menu (its bank and latency table).

    python benchmarks/larger_space.py [--config training/recipes/digits-menu.yaml] [--evaluations 40] [--seeds 3]
    [--samples 1000] [--override key=value] [--json] [--check]

First the choices of the menu, each as a mean over the places where it may stand: the loss of its distilled proxies
(held-out, normalised: 1 is no better than leaving the layers out), and what it saves against the teacher's layers that
it replaces, in ms of the run's latency table and in weights.

Then two searches with the same bank, evaluator, evaluations, seed and reference point (that of the paper's: 1.1 × the
worst initial value of each objective): one may use the paper's choices alone (narrower MLP, narrower attention, both;
pairs (0, 1), (2, 3), … merged), the other the whole menu. The figure is the ratio of their hypervolumes, as found and
with both fronts judged again on other noise, so that no point is there by luck; and which of the menu's other choices
stand on the larger space's front. All evaluations are kept in the run's folder: started again, it goes on. --check:
both mean ratios are at least 1.05, and at least one choice that the paper does not have is on every front.
"""

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers_dit import fail

from edgedit_hf import Genotype, SearchSpace
from edgedit_hf.data.loading import load_run_images
from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.distill.teacher import load_teacher
from edgedit_hf.files import atomic_write_json, read_json
from edgedit_hf.menu_space import MenuSpace
from edgedit_hf.metrics.reference import load_extractor, real_features
from edgedit_hf.report.bank import bank_choices
from edgedit_hf.run.config import load_config
from edgedit_hf.runtimes.timing import environment
from edgedit_hf.search.bayes import BayesSearch
from edgedit_hf.search.blocks import programme_of
from edgedit_hf.search.latency_table import LatencyTable
from edgedit_hf.search.objectives import StudentQuality
from edgedit_hf.search.pareto import hypervolume
from edgedit_hf.search.programme import Programme

REQUIRED = 1.05
ROOT = Path(__file__).resolve().parents[1]
AGAIN = 1000  # added to the recipe's seed for the second judgement


def choices(bank: ProxyBank, table: LatencyTable) -> list[dict[str, Any]]:
    """A row a choice of the menu: what it loses and saves where it may stand, as means."""
    places: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for choice in bank_choices(bank.index, table)["choices"]:
        places.setdefault((len(choice["source"]), choice["option"]), []).append(choice)
    return [
        {
            "merge": merge,
            "option": option,
            "places": len(found),
            "loss": statistics.mean(choice["loss_after"] for choice in found),
            "saved_ms": found[0]["saved_ms"],
            "saved_weights": found[0]["saved_parameters"],
        }
        for (merge, option), found in places.items()
    ]


def papers_part(space: MenuSpace, config: Mapping[str, Any]) -> MenuSpace:
    """The part of a menu's space that the paper has."""
    known = set(SearchSpace.for_config(config).replacements())
    allowed = [
        [
            index
            for index in indices
            if any(
                layer.source[0] == at
                and len(layer.source) == space.choices[index].merge
                and layer.shape == space.choices[index].shape
                for layer in known
            )
        ]
        for at, indices in enumerate(space.allowed)
    ]
    return MenuSpace(**{**space.to_dict(), "allowed": allowed})


class Judge:
    """Distances of students, each generated once and kept in a file."""

    def __init__(self, quality: StudentQuality, file: Path) -> None:
        self.quality, self.file = quality, file
        self.known: dict[str, float] = read_json(file, "this script") if file.exists() else {}

    def __call__(self, genotype: Genotype) -> float:
        if genotype.hash not in self.known:
            self.known[genotype.hash] = self.quality(genotype)
            atomic_write_json(self.file, self.known)
        return self.known[genotype.hash]


def search(space, programme: Programme, judge: Judge, table: LatencyTable, arguments, seed: int, reference=None):
    """A finished search."""
    blocks = [block for block in programme.blocks if block.layer in set(space.replacements())]
    part = programme.with_blocks(blocks)
    found = BayesSearch(space, arguments.evaluations, seed, reference=reference, programme=part)
    while not found.finished:
        for genotype in found.pending or found.ask(1):
            found.tell(genotype, (judge(genotype), table.latency_ms(genotype)))
        if len(found.told) % 10 == 0:
            print(f"  {len(found.told)} of {found.budget} evaluations", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "training" / "recipes" / "digits-menu.yaml")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--evaluations", type=int, default=40, help="of each search")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1000, help="images that a student is judged by")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument(
        "--check", action="store_true", help=f"exit with 1 unless the mean ratio is at least {REQUIRED}"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = load_config(arguments.config, arguments.override)
    pipeline, images = load_teacher(config), load_run_images(config)
    model_config = dict(pipeline.transformer.config)
    bank = ProxyBank(config.folder("bank"), pipeline.transformer)
    table = LatencyTable.from_json(config.folder("latency", "table.json"))
    extractor = load_extractor(config, images, torch.device("cpu"))
    real = real_features(extractor, images)

    def judge(seed: int) -> Judge:
        options = config.search
        quality = StudentQuality(
            bank,
            pipeline,
            extractor,
            real,
            samples=arguments.samples,
            steps=options.sampling_steps,
            guidance_scale=options.guidance_scale,
            seed=seed,
            batch_size=arguments.samples,
        )
        return Judge(quality, config.folder("larger-space", f"distances-{arguments.samples}-{seed}.json"))

    rows = choices(bank, table)
    print(f"{'layers':>6} {'choice':<22} {'places':>6} {'loss':>8} {'ms saved':>9} {'weights saved':>14}")
    for row in rows:
        print(
            f"{row['merge']:>6} {row['option']:<22} {row['places']:>6} {row['loss']:>8.4f} {row['saved_ms']:>9.3f} "
            f"{row['saved_weights']:>14,}"
        )
    space, whole = bank.space, Genotype.of(model_config)
    spaces = {"paper": papers_part(space, model_config), "menu": space}
    programme = programme_of(bank, table)
    print(f"genotypes: {spaces['paper'].size:,} of the paper's choices, {space.size:,} of the whole menu")
    distance, again, results = judge(config.seed), judge(config.seed + AGAIN), []
    teachers = table.latency_ms(whole), distance(whole)
    print(f"the teacher: {teachers[0]:.3f} ms, distance {teachers[1]:.3f}")
    papers_layers = set(spaces["paper"].replacements())
    for seed in range(arguments.seeds):
        papers = search(spaces["paper"], programme, distance, table, arguments, seed)
        menus = search(spaces["menu"], programme, distance, table, arguments, seed, papers.reference)
        ratio = menus.hypervolume() / papers.hypervolume()
        fronts = {
            name: [
                space.from_code(point["code"])
                for point in found.front()
                if all(
                    value < bound for value, bound in zip((point["distance"], point["latency_ms"]), papers.reference)
                )
            ]
            for name, found in (("paper", papers), ("menu", menus))
        }  # beyond the reference point a point counts nothing
        new = sorted(
            {
                f"{'merge' + str(len(layer.source)) + ' ' if len(layer.source) > 1 else ''}{space.option_of(layer)}"
                for genotype in fronts["menu"]
                for layer in genotype.layers
                if layer not in papers_layers
            }
        )
        held = {
            name: hypervolume([(again(g), table.latency_ms(g)) for g in front], papers.reference)
            for name, front in fronts.items()
        }
        row = {
            "seed": seed,
            "reference": list(papers.reference),
            "paper": papers.hypervolume(),
            "menu": menus.hypervolume(),
            "ratio": ratio,
            "ratio_on_other_noise": held["menu"] / held["paper"],
            "new_choices": new,
            "fronts": {
                name: [[p["distance"], p["latency_ms"], p["code"]] for p in found.front()]
                for name, found in (("paper", papers), ("menu", menus))
            },
        }
        results.append(row)
        print(
            f"seed {seed}: hypervolume {row['paper']:.3f} (paper's choices), {row['menu']:.3f} (menu), ratio "
            f"{ratio:.3f}, {row['ratio_on_other_noise']:.3f} on other noise; new on the front: "
            f"{', '.join(new) or 'none'}",
            flush=True,
        )
    mean = statistics.mean(row["ratio"] for row in results)
    held_mean = statistics.mean(row["ratio_on_other_noise"] for row in results)
    print(f"mean ratio {mean:.3f}, {held_mean:.3f} on other noise")
    if arguments.json:
        print(
            json.dumps(
                {
                    "choices": rows,
                    "searches": results,
                    "ratio": mean,
                    "ratio_on_other_noise": held_mean,
                    "environment": environment(arguments.threads),
                }
            )
        )
    if arguments.check:
        wrong = [f"the mean ratio is {min(mean, held_mean):.3f}; {REQUIRED} wanted"] * (min(mean, held_mean) < REQUIRED)
        wrong += [f"seed {row['seed']}: no new choice on the front" for row in results if not row["new_choices"]]
        fail(wrong)


if __name__ == "__main__":
    main()
