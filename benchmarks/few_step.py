"""What few-step distillation is worth, which of its terms carries it, and whether one run may serve all widths.

    python benchmarks/few_step.py RUN [--config FILE] [--override KEY=VALUE …] [--terms both,knowledge,matching]
        [--seeds 3] [--subnets tiny,full] [--joint] [--samples 2000] [--json] [--check]

RUN is a finished run: of compress.py, whose student-tuned is distilled, or of text_to_image.py, whose supernet is;
--subnets names the widths that are distilled, each alone, and --joint, where these are all and "both" is among the
terms, distils them in one run of as many steps as they took together. For every seed and set of terms the many-step net
is distilled as the recipe's section few_step says. Distance, recall and agreement are means over three sampling seeds,
beside those of the net itself with 28 steps and its guidance (many), and with as few steps by the best of the standard
solvers (few). A run whose samples drifted by more than the recipe allows at any time counts as collapsed; it goes on
all the same, and its best student is judged.
Every distillation is a run folder in RUN/few-step-benchmark: interrupted, run it again.

--check fails unless "both" closes 80 % of the gap between few and many, is within 15 % of many, and loses at most .05
of recall and 2 points of agreement; with --joint unless its mean distance over the widths is within 2 % of distilling
each alone.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from edgedit_hf.data.loading import load_run_captions, load_run_images
from edgedit_hf.few_step.solvers import solver_distances, with_solver
from edgedit_hf.few_step.source import load_source
from edgedit_hf.files import read_json
from edgedit_hf.metrics.distances import frechet_distance, precision_recall
from edgedit_hf.metrics.extractors import class_agreement, train_independent_classifier
from edgedit_hf.metrics.prompt_following import agreement, judged_captions
from edgedit_hf.metrics.reference import load_extractor, real_features
from edgedit_hf.pipelines.loading import KINDS, load_pipeline
from edgedit_hf.pipelines.sampling import generate, generate_from_captions
from edgedit_hf.run.config import RunConfig, load_config
from edgedit_hf.run.launch import make_accelerator
from edgedit_hf.run.stage import FEW_STEP
from edgedit_hf.training import distill_few_step

ROOT = Path(__file__).resolve().parents[1]
MANY, SAMPLING_SEEDS = 28, (10, 11, 12)
TERMS = {
    "both": [],
    "knowledge": ["few_step.matching_weight=0"],
    "matching": ["few_step.knowledge_weight=0", "few_step.matching_weight=1"],
    "coupled": ["few_step.decoupled=false"],
    "guided": ["few_step.real_guidance=1.5"],
    "fading": ["few_step.knowledge_last=0.25"],
    "full": ["few_step.backbone=full"],
    "adapters": ["few_step.backbone=adapters"],
    **{f"from-{t}": [f"few_step.first_signal={s}"] for t, s in ((999, 0.006), (800, 0.0388), (700, 0.0829))},
}
"""What each variant changes of the recipe. Matching alone has weight 1, as weights are relative."""
CLOSED, NEAR, RECALL_LOSS, AGREEMENT_LOSS, JOINT = 0.8, 1.15, 0.05, 0.02, 1.02
EXTRACTOR = "extractor"


class Measure:
    """Distance, recall and agreement of a pipeline, means over the sampling seeds."""

    def __init__(self, config: RunConfig, elastic: bool, samples: int) -> None:
        self.samples, self.batch, self.elastic = samples, config.evaluate.batch_size, elastic
        images, others = load_run_images(config), load_run_images(config, "validation")
        self.extractor = load_extractor(config, images, torch.device("cpu"))
        self.real = real_features(self.extractor, images)
        self.classifier = train_independent_classifier(images, validation=others)
        self.captions = judged_captions(load_run_captions(config, "validation"), samples) if elastic else []

    def sample(self, pipeline: Any, seed: int, width: str | None, **sampling: Any) -> tuple[torch.Tensor, float]:
        """Images, and the share of them that shows what was asked for."""
        if self.elastic:
            images = generate_from_captions(
                pipeline, self.captions, subnet=width, seed=seed, batch_size=self.batch, **sampling
            )
            return images, mean(agreement(images, self.captions, self.classifier).values())
        images, labels = generate(pipeline, self.samples, seed=seed, batch_size=self.batch, **sampling)
        return images, class_agreement(self.classifier, images, labels)

    def distance(self, images: torch.Tensor) -> float:
        return frechet_distance(self.extractor.features(images), self.real)

    def __call__(self, pipeline: Any, steps: int, guidance_scale: float, width: str | None = None) -> dict[str, float]:
        rows = []
        for seed in SAMPLING_SEEDS:
            images, right = self.sample(pipeline, seed, width, steps=steps, guidance_scale=guidance_scale)
            recall = precision_recall(self.real, self.extractor.features(images))[1]
            rows.append({"distance": self.distance(images), "recall": recall, "agreement": right})
        return {name: mean(row[name] for row in rows) for name in rows[0]}


def distil(
    arguments: argparse.Namespace, source: Path, name: str, seed: int, changes: list[str]
) -> tuple[Any, dict[str, Any]]:
    """The few-step pipeline of a variant and seed, made now or earlier; its best step, and whether it collapsed."""
    folder = arguments.run / "few-step-benchmark" / f"seed-{seed}" / name
    sibling = next(folder.parent.glob(f"*/{EXTRACTOR}"), None)
    if sibling is not None and not (folder / EXTRACTOR).exists():  # the same data and seed: the same extractor
        shutil.copytree(sibling, folder / EXTRACTOR)
    fixed = [f"output_dir={folder}", f"seed={seed}", f"few_step.path={source}"]
    open_ended = ["few_step.mean_drift=1000", "few_step.std_drift=1000"]
    config = load_config(arguments.config, [*arguments.override, *fixed, *open_ended, *changes])
    allowed = load_config(arguments.config, arguments.override).few_step
    distill_few_step.run(config, make_accelerator(config))
    stage = read_json(folder / FEW_STEP.folder / "stage.json", "the benchmark")
    real = load_run_images(config)
    values = real.batch(range(len(real)))["images"]
    data_mean, data_std = float(values.mean()), float(values.std())
    collapsed, seconds = False, 0.0
    for line in (folder / FEW_STEP.folder / "telemetry.jsonl").read_text().splitlines():
        entry = json.loads(line)
        seconds = entry["seconds"]
        for key, value in entry.items():
            drifted = key.startswith("sample_mean") and abs(value - data_mean) > allowed.mean_drift * data_std
            drifted |= key.startswith("sample_std") and abs(value / data_std - 1) > allowed.std_drift
            collapsed |= drifted
    facts = {"best_step": stage["best"]["step"], "collapsed": collapsed, "seconds": seconds}
    return load_pipeline(folder / FEW_STEP.folder, kind=KINDS), facts


def row(label: str, figures: dict[str, Any]) -> str:
    told = f"{figures['collapsed']:>10}" if "collapsed" in figures else ""
    return (
        f"{label:<34}{figures['distance']:>10.3f}{figures['recall']:>9.3f}{100 * figures['agreement']:>11.1f} %{told}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "training" / "recipes" / "digits-few-step.yaml",
        help="the recipe of the distillation",
    )
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--terms", default="both,knowledge,matching", help=f"of {', '.join(TERMS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--subnets", default="", help="of a supernet: widths to distil, each alone")
    parser.add_argument("--joint", action="store_true", help="also all widths in one run of as many steps")
    parser.add_argument("--samples", type=int, default=2000, help="images a distance")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless the bars are met")
    arguments = parser.parse_args()

    arguments.run = arguments.run.resolve()
    config = load_config(arguments.config, [*arguments.override, f"output_dir={arguments.run}", "few_step.path=null"])
    torch.set_num_threads(config.threads)
    source = load_source(config)
    folder = arguments.run / ("elastic" if source.elastic else "student-tuned")
    widths: list[str | None] = list(filter(None, arguments.subnets.split(","))) or [source.widths[-1]]
    if arguments.joint and (set(widths) != set(source.widths) or "both" not in arguments.terms.split(",")):
        sys.exit(
            f"error: --joint compares one run for all widths with each alone, of both terms: give --subnets "
            f"{','.join(map(str, source.widths))} and both among --terms (they are {arguments.subnets!r}, "
            f"{arguments.terms!r})."
        )
    measure = Measure(config, source.elastic, arguments.samples)
    steps, guidance = len(source.timesteps), float(source.pipeline.config.default_guidance_scale)
    print(
        f"Fréchet distance ({measure.extractor.name}, n={arguments.samples}), {steps} steps at "
        f"{', '.join(f'{t:g}' for t in source.timesteps)}; means over {len(SAMPLING_SEEDS)} sampling seeds"
    )
    print(f"{'':<34}{'distance':>10}{'recall':>9}{'agreement':>13}{'collapsed':>10}")
    result: dict[str, Any] = {"timesteps": source.timesteps, "widths": {}}
    missed: list[str] = []
    for width in widths:
        named = "" if width is None else f"{width}: "

        def judge(pipeline: Any, width: str | None = width) -> float:
            images, _ = measure.sample(pipeline, 0, width, steps=steps, guidance_scale=guidance)
            return measure.distance(images)

        many = measure(source.pipeline, MANY, guidance, width)
        print(row(f"{named}many: {MANY} steps", many), flush=True)
        solver = next(iter(solver_distances(source.pipeline, judge)))
        few = measure(with_solver(source.pipeline, solver), steps, guidance, width)
        print(row(f"{named}few: {solver}", few), flush=True)
        variants: dict[str, Any] = {}
        for term in arguments.terms.split(","):
            runs = []
            for seed in range(arguments.seeds):
                name = term if width is None else f"{term}-{width}"
                chosen = [] if width is None else [f"few_step.subnet={width}"]
                student, facts = distil(arguments, folder, name, seed, [*TERMS[term], *chosen])
                runs.append({**measure(student, steps, 1.0), **facts})
            figures = {key: mean(one[key] for one in runs) for key in ("distance", "recall", "agreement", "seconds")}
            figures |= {"collapsed": sum(one["collapsed"] for one in runs), "runs": runs}
            figures["closed"] = (few["distance"] - figures["distance"]) / (few["distance"] - many["distance"])
            variants[term] = figures
            print(
                row(f"{named}{term}, {arguments.seeds} seed(s)", figures),
                f" {100 * figures['closed']:.0f} % of the gap",
                flush=True,
            )
        result["widths"][width or "full"] = {"many": many, "few": {"solver": solver, **few}, "terms": variants}
        if (both := variants.get("both")) is not None:
            bars = {
                f"closes {both['closed']:.2f} of the gap, {CLOSED} is wanted": both["closed"] >= CLOSED,
                f"is {both['distance'] / many['distance']:.3f} of many, {NEAR} is allowed": both["distance"]
                <= NEAR * many["distance"],
                f"loses {many['recall'] - both['recall']:.3f} of recall, {RECALL_LOSS} is allowed": both["recall"]
                >= many["recall"] - RECALL_LOSS,
                f"loses {many['agreement'] - both['agreement']:.3f} of agreement, {AGREEMENT_LOSS} is allowed": both[
                    "agreement"
                ]
                >= many["agreement"] - AGREEMENT_LOSS,
            }
            for words, met in bars.items():
                print(f"{named}both {words}: {'met' if met else 'MISSED'}")
                missed += [] if met else [f"{named}both {words}"]
    if arguments.joint:
        ratio = joint(arguments, folder, source, measure, steps, result)
        if ratio > JOINT:
            missed.append(f"one run for all widths is {ratio:.3f} of each alone, {JOINT} is allowed")
    if arguments.json:
        print(json.dumps(result))
    if arguments.check and missed:
        sys.exit("; ".join(missed))


def joint(
    arguments: argparse.Namespace, folder: Path, source: Any, measure: Measure, steps: int, result: dict[str, Any]
) -> float:
    """Mean distance over the widths of one run for all, over that of each alone, at equal steps in all."""
    budget = load_config(arguments.config, arguments.override).few_step.steps
    alone = {width: found["terms"]["both"]["distance"] for width, found in result["widths"].items()}
    together = []
    for seed in range(arguments.seeds):
        changes = [f"few_step.steps={budget * len(source.widths)}", "few_step.subnet=null"]
        student, _ = distil(arguments, folder, "joint", seed, changes)
        together.append({width: measure(student, steps, 1.0, width) for width in source.widths})
    for width in source.widths:
        figures = {key: mean(one[width][key] for one in together) for key in ("distance", "recall", "agreement")}
        print(row(f"{width}: joint, {arguments.seeds} seed(s)", figures), flush=True)
    result["joint"] = together
    ratio = mean(one[width]["distance"] for one in together for width in alone) / mean(alone.values())
    print(f"mean distance over {', '.join(alone)}: one run for all / each alone {ratio:.3f}")
    return ratio


if __name__ == "__main__":
    main()
