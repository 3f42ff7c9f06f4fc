"""What feature-wise distillation is worth: the same genotype, tuned for the same steps, from distilled and from random
proxies.

    python benchmarks/feature_distillation.py RUN [--config FILE] [--steps N] [--seeds 3] [--json] [--check]

RUN is a finished run of compress.py. For every seed the student is assembled twice from its bank (distilled proxies;
DiT's random initialisation), both are fine-tuned on the same batches and noise, and the Fréchet distance of the
averaged weights is measured along the way. Prints the distances, and their ratio at the end; writes
RUN/evaluate/curves.json, which the report draws. --check fails unless random is worse by 1.1 for every seed. The
default budget is a quarter of the teacher's own training, as in the paper (100K of 400K steps): tuned for long enough,
a network this small forgets what it started from.
"""

import argparse
import copy
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean

import torch

from edgedit_hf.data.loading import load_run_images, load_training_set
from edgedit_hf.distill.denoiser import train_denoiser
from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.distill.teacher import load_teacher
from edgedit_hf.files import atomic_write_json
from edgedit_hf.genotype import Genotype
from edgedit_hf.metrics.distances import frechet_distance
from edgedit_hf.metrics.reference import load_extractor, real_features
from edgedit_hf.pipelines.loading import load_pipeline, with_transformer
from edgedit_hf.pipelines.sampling import generate
from edgedit_hf.run.config import RunConfig, load_config
from edgedit_hf.run.launch import make_accelerator
from edgedit_hf.run.stage import STUDENT, Stage
from edgedit_hf.run.state import RunState

ROOT = Path(__file__).resolve().parents[1]

REQUIRED_RATIO = 1.1
POINTS = 3  # places on each curve besides its start


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
    parser.add_argument("--steps", type=int, help="tuning steps; default a quarter of teacher.steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1000, help="images a distance")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument(
        "--check", action="store_true", help=f"exit with 1 unless random / distilled is at least {REQUIRED_RATIO}"
    )
    arguments = parser.parse_args()

    config = load_config(arguments.config, [*arguments.override, f"output_dir={arguments.run}"])
    accelerator = make_accelerator(config)
    teacher = load_teacher(config)
    student = load_pipeline(config.folder(STUDENT.folder), STUDENT.made_by)
    genotype = Genotype.of(student.transformer.config)
    bank = ProxyBank(config.folder("bank"), teacher.transformer)
    dataset, _ = load_training_set(config, accelerator)
    images = load_run_images(config)
    extractor = load_extractor(config, images, accelerator.device)
    real = real_features(extractor, images)
    options = dataclasses.replace(config.tune, steps=arguments.steps or max(1, config.teacher.steps // 4))
    places = sorted({round(options.steps * i / POINTS) for i in range(POINTS + 1)})

    def distance(model: torch.nn.Module) -> float:
        images, _ = generate(
            with_transformer(teacher, model.eval()),
            arguments.samples,
            seed=config.seed,
            steps=config.sampling.steps,
            guidance_scale=config.sampling.guidance_scale,
            batch_size=config.evaluate.batch_size,
        )
        return frechet_distance(extractor.features(images), real)

    curves: dict[str, list[list[float]]] = {"distilled proxies": [], "random proxies": []}
    for seed in range(arguments.seeds):
        for label, runs in curves.items():
            model = bank.assemble(genotype, random_seed=seed if label == "random proxies" else None)
            values = [distance(model)]

            def measure(step: int, model: torch.nn.Module, ema, values: list[float] = values) -> None:
                if step in places:
                    averaged = copy.deepcopy(model)
                    ema.copy_to(averaged.parameters())
                    values.append(distance(averaged))

            with tempfile.TemporaryDirectory() as folder:
                state = RunState(
                    RunConfig(output_dir=folder),
                    Stage(f"{label}, seed {seed}", Path(__file__).name, ".", label, ()),
                    options.steps,
                    seed=1000 + seed,
                    checkpoint_every=options.steps,
                )
                train_denoiser(
                    model,
                    dataset,
                    options,
                    state,
                    accelerator,
                    teacher.transformer if options.output_kd else None,
                    options.output_kd,
                    measure,
                )
            runs.append(values)

    print(
        f"Fréchet distance ({extractor.name}, n={arguments.samples}), {arguments.seeds} seeds, genotype {genotype.hash}"
    )
    print(f"{'tuning steps':<20}" + "".join(f"{place:>10}" for place in places))
    means = {label: [mean(values) for values in zip(*runs)] for label, runs in curves.items()}
    for label, values in means.items():
        print(f"{label:<20}" + "".join(f"{value:>10.3f}" for value in values))
    ratios = [b[-1] / a[-1] for a, b in zip(curves["distilled proxies"], curves["random proxies"])]
    print(
        "random / distilled after tuning: "
        + ", ".join(f"{ratio:.2f}" for ratio in ratios)
        + f"; mean {mean(ratios):.2f}"
    )
    atomic_write_json(
        config.folder("evaluate", "curves.json"),
        {label: {"steps": places, "values": values} for label, values in means.items()},
    )
    if arguments.json:
        print(
            json.dumps(
                {
                    "steps": places,
                    "curves": curves,
                    "ratios": ratios,
                    "samples": arguments.samples,
                    "extractor": extractor.name,
                }
            )
        )
    if arguments.check and min(ratios) < REQUIRED_RATIO:
        sys.exit(f"random proxies must be worse by {REQUIRED_RATIO}; the smallest ratio is {min(ratios):.2f}")


if __name__ == "__main__":
    main()
