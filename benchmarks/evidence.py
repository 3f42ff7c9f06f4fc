"""The papers' claims on finished runs beyond digits, and the ablations that a run does not hold.

    python benchmarks/evidence.py RUN [RUN …] [--config FILE] [--override KEY=VALUE …]
        [--ablations starts,merges,terms,objectives] [--picture FILE] [--json] [--check]

Every RUN is a finished run of compress.py with tune.random_proxies, few_step.enabled and quantize.enabled, of one
recipe and a seed of its own. The claims are read from what its evaluation judged alike: ratios of Fréchet distances in
the run's extractor, with 95 % intervals of a bootstrap over images (every model's image i has the same noise and class,
and is redrawn with the others'); over several runs, the mean.

Ablations, each made in RUN/evidence and judged as the evaluation judges (samples, noise, steps, extractor):
  starts      the student's proxies distilled from copied and from random weights for as many steps as from closed form:
              held-out losses before and after, and the distance of the student assembled from them, untuned
  merges      the best student by the bank's losses under some latency budgets, with and without merges of three layers:
              losses, and distances untuned
  terms       the tuned student distilled to few steps by knowledge alone and by matching alone, beside the run's own
  objectives  stage rank: which objective of a search foretells the quality after tuning (its results stay in the run)
Interrupted, run it again: what is finished is not made anew.

--check fails unless every claim's mean over the runs is kept.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers_dit import fail
from few_step import TERMS
from safetensors.torch import load_file

from edgedit_hf.data.batches import stream_generator
from edgedit_hf.data.loading import load_run_images
from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.distill.teacher import load_teacher
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.files import atomic_write_json, atomic_write_text, read_json
from edgedit_hf.genotype import Genotype
from edgedit_hf.metrics.distances import (
    RunningMoments,
    frechet_distance,
    frechet_distance_from_moments,
    precision_recall,
)
from edgedit_hf.metrics.reference import load_extractor, real_features
from edgedit_hf.pipelines.loading import load_pipeline, with_transformer
from edgedit_hf.pipelines.sampling import generate, sampling_of
from edgedit_hf.records import Model
from edgedit_hf.report.plots import montage, sample_grid
from edgedit_hf.report.tables import MODEL_LABELS
from edgedit_hf.run.config import RunConfig, load_config
from edgedit_hf.run.launch import make_accelerator
from edgedit_hf.run.results import pipeline_weights_hash
from edgedit_hf.run.stage import EVALUATE, RANK
from edgedit_hf.runtimes.timing import environment
from edgedit_hf.schema import read_record
from edgedit_hf.search.blocks import programme_of
from edgedit_hf.search.device_tables import load_table
from edgedit_hf.training import distill_few_step, distill_proxies, rank_objectives

ROOT = Path(__file__).resolve().parents[1]
BOOTSTRAP_STREAM, RESAMPLES = 9, 200
# Of the teacher's latency, for students with and without merges of three: pairs alone get to about a third of it.
BUDGETS = (0.55, 0.4, 0.34, 0.27)
STUDENT, FEW_FOLDER = "student-tuned", "few-step"


class Claim(NamedTuple):
    """What a paper or the project says of a ratio of distances: `of / to`, or the share of a gap that is closed.

    Args:
        paper: its figure, in words. bar: what ours must keep. most: whether the bar is a most or a least.
        gap: the third model of a share: (to - of) / (to - gap).
    """

    name: str
    of: str
    to: str
    paper: str
    bar: float
    most: bool
    gap: str = ""

    def __call__(self, distances: dict[str, float]) -> float | None:
        of, to = distances[self.of], distances[self.to]
        if not self.gap:
            return of / to
        gap = to - distances[self.gap]
        return (to - of) / gap if gap > 0 else None  # few steps that cost nothing leave nothing to win back

    def kept(self, value: float | None) -> bool:
        """Whether a value is on the right side of the bar."""
        return value is not None and (value <= self.bar if self.most else value >= self.bar)


WON_BACK = Claim(
    "what four steps cost, won back",
    *(FEW_FOLDER, f"{STUDENT}-few-steps"),
    "DPG .97, GenEval .99 of 28 steps",
    *(0.8, False),
    STUDENT,
)
CLAIMS = (
    Claim(
        "student / teacher trained on for as many steps",
        *(STUDENT, "teacher-more-steps"),
        ".76, .76 (teacher without those steps)",
        *(1.05, True),
    ),
    Claim("random / distilled proxies, tuned alike", "student-random-proxies", STUDENT, "clearly worse", 1.1, False),
    WON_BACK,
    Claim("about four bits / fp32", "quantized", FEW_FOLDER, "no figure", 1.05, True),
    Claim("int8 export / fp32", "onnx-int8", FEW_FOLDER, "no figure", 1.05, True),
)
"""Papers: EdgeDiT-1 and -6 (arXiv:2603.28405) for the first two, SnapGen++ (arXiv:2601.08303) for the next two."""
PAPERS_COSTS = {"parameters": ".70, .79", "flops": ".61, .72"}
PAPERS_LATENCY = ".60, .61 (iPhone); .67, .69 (S25 Ultra)"


class Run:
    """A finished run, its judge, and what was judged of it so far.

    Args:
        folder: of the run. options: the command line's.
    """

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.asked = folder.resolve(), [*options.override, f"output_dir={folder.resolve()}"]
        self.seed = read_json(folder / "evaluate" / "stage.json", EVALUATE.made_by)["seed"]
        self.seconds = read_json(folder / "report.json", "edgedit report")["seconds"]
        self.recipe = options.config
        self.config = self.configured()
        torch.set_num_threads(self.config.threads or torch.get_num_threads())
        self.accelerator = make_accelerator(self.config)
        self.images = load_run_images(self.config)
        self.extractor = load_extractor(self.config, self.images, torch.device("cpu"))
        self.real = real_features(self.extractor, self.images)
        self.models = {
            model["name"]: model
            for path in sorted((folder / "evaluate").glob("*.json"))
            if (folder / "evaluate" / f"{path.stem}.safetensors").is_file()
            for model in [read_record(path, Model, EVALUATE.made_by)]
        }
        self.metric = f"fid[{self.extractor.name},n={self.config.evaluate.samples}]"
        if absent := {name for claim in CLAIMS for name in (claim.of, claim.to)} - self.models.keys():
            raise EdgeDiTError(
                f"{folder} has no figures of {', '.join(sorted(absent))}; evidence needs a finished run with "
                "tune.random_proxies, few_step.enabled and quantize.enabled."
            )
        wrong = {n: m["metrics"] for n, m in self.models.items() if self.metric not in m["metrics"]}
        if wrong:
            raise EdgeDiTError(f"{folder} was judged by {next(iter(wrong.values()))}, not by {self.metric}.")
        judges = {(m["stamp"]["extractor_hash"], m["stamp"]["reference"]) for m in self.models.values()}
        if judges != {(self.extractor.hash, self.images.fingerprint)}:
            raise EdgeDiTError(f"The models of {folder} were not all judged by its extractor and images: {judges}.")
        self.teacher = load_teacher(self.config)
        networks = ("student", STUDENT, FEW_FOLDER, "quantized")
        self.made_of = {name: pipeline_weights_hash(self.folder / name) for name in networks} | {"metric": self.metric}

    def configured(self, *changes: str) -> RunConfig:
        """The recipe of the run, with changes."""
        return load_config(self.recipe, [*self.asked, f"seed={self.seed}", *changes])

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once a run (RUN/evidence/<name>.json), as long as its networks stay the same."""
        file = self.folder / "evidence" / f"{name}.json"
        if file.is_file() and (found := read_json(file, "this script"))["made_of"] == self.made_of:
            return found["result"]
        result = make()
        file.parent.mkdir(exist_ok=True)
        atomic_write_json(file, {"made_of": self.made_of, "result": result})
        return result

    def beside(self, name: str, *changes: str) -> RunConfig:
        """A run in RUN/evidence of the same teacher, extractor and latents, with changes."""
        folder = self.folder / "evidence" / name
        for made in ("extractor", "latents"):
            if (self.folder / made).is_dir() and not (folder / made).is_dir():
                shutil.copytree(self.folder / made, folder / made)
        return self.configured(f"output_dir={folder}", f"teacher.path={self.folder / 'teacher'}", *changes)

    def sampled(self, pipeline: Any) -> dict[str, float]:
        """Distance and recall of a pipeline, sampled as the evaluation samples it."""
        options = self.config.evaluate
        asked = sampling_of(pipeline, self.config.sampling.steps, self.config.sampling.guidance_scale)
        images, _ = generate(pipeline, options.samples, seed=self.config.seed, batch_size=options.batch_size, **asked)
        features = self.extractor.features(images)
        return {
            "distance": frechet_distance(features, self.real),
            "recall": precision_recall(self.real, features)[1],
        }

    def network(self, transformer: torch.nn.Module) -> dict[str, float]:
        """[`sampled`] of a network in the place of the teacher's."""
        return self.sampled(with_transformer(self.teacher, transformer.eval()))

    def judged(self, name: str) -> dict[str, float]:
        """The same figures of a model that the run's evaluation judged."""
        return {"distance": self.models[name]["metrics"][self.metric], "recall": self.models[name]["recall"]}

    def bytes_of(self, name: str) -> torch.Tensor:
        """The images `(n, C, H, W)` that a model was judged by, as bytes."""
        stem = next(m["grid"] for m in [self.models[name]]).removesuffix(".png")
        return load_file(self.folder / f"{stem}.safetensors")["images"]

    def made(self) -> dict[str, Any]:
        """How the run's models were judged, and the seconds that its stages took."""
        return {
            "stamps": {name: model["stamp"] for name, model in self.models.items()},
            "seconds": self.seconds,
        }

    def claims(self) -> dict[str, Any]:
        """Every claim's value, with its interval, and the run's costs against the teacher's."""

        def make() -> list[list[float]]:
            names = list(dict.fromkeys(n for c in CLAIMS for n in (c.of, c.to, c.gap) if n))
            features = {name: self.extractor.features(self.bytes_of(name).float() / 127.5 - 1) for name in names}
            draws = stream_generator(self.seed, BOOTSTRAP_STREAM).integers(
                self.config.evaluate.samples, size=(RESAMPLES, self.config.evaluate.samples)
            )
            real = RunningMoments().update(self.real)

            def distance(values: torch.Tensor) -> float:
                drawn = RunningMoments().update(values)
                return frechet_distance_from_moments(drawn.mean, drawn.covariance, real.mean, real.covariance)

            again = [
                {name: distance(values[rows]) for name, values in features.items()}
                for rows in map(torch.from_numpy, draws)
            ]
            found = [[value for d in again if (value := claim(d)) is not None] for claim in CLAIMS]
            return [np.percentile(values, [2.5, 97.5]).tolist() if values else [] for values in found]

        distances = {name: model["metrics"][self.metric] for name, model in self.models.items()}
        intervals = self.kept("intervals", make)
        teacher, student = self.models["teacher"], self.models[STUDENT]
        common = teacher["latency_ms"].keys() & student["latency_ms"].keys()
        return {
            "distances": distances,
            "claims": {c.name: {"value": c(distances), "interval": i} for c, i in zip(CLAIMS, intervals)},
            "costs": {
                **{key: student[key] / teacher[key] for key in PAPERS_COSTS},
                **{key: student["latency_ms"][key] / teacher["latency_ms"][key] for key in sorted(common)},
            },
        }


# -------------------------------------------------------------------- ablations


def starts(run: Run) -> dict[str, Any]:
    """Proxies of the student from each of three starts: mean held-out losses, and the student assembled from them."""
    genotype = Genotype.of(load_pipeline(run.folder / "student").transformer.config)
    file = run.folder / "evidence" / "student.json"
    file.parent.mkdir(exist_ok=True)
    atomic_write_text(file, genotype.to_json())
    found = {}
    for init in ("closed_form", "copy", "random"):
        config = run.config
        if init != "closed_form":
            config = run.beside(f"starts-{init}", f"bank.init={init}", f"bank.only=[{file}]")
            distill_proxies.run(config, make_accelerator(config))
        bank = ProxyBank(config.folder("bank"), run.teacher.transformer)
        entries = [bank.entries[key] for key in map(bank.key, genotype.layers) if key in bank.entries]
        judged = run.judged("student") if init == "closed_form" else run.network(bank.assemble(genotype))
        losses = {when: mean(entry[f"loss_{when}"] for entry in entries) for when in ("before", "after")}
        found[init] = {**losses, **judged, "proxies": len(entries)}
    return found


def merges(run: Run) -> dict[str, Any]:
    """The best students by the bank's losses under some budgets of latency, with merges of three and without."""
    bank = ProxyBank(run.folder / "bank", run.teacher.transformer)
    table = load_table(run.folder / "latency" / "table.json")
    programme = programme_of(bank, table)
    if not any(len(block.layer.source) == 3 for block in programme.blocks):
        raise EdgeDiTError(f"The bank {bank.folder} has no merges of three layers; give the run a bank.menu with some.")
    pairs = programme.with_blocks([block for block in programme.blocks if len(block.layer.source) < 3])
    whole = table.latency_ms(Genotype.of(run.teacher.transformer.config))
    judged: dict[str, dict[str, float]] = {}
    found: dict[str, Any] = {}
    for budget in BUDGETS:
        for name, part in (("with", programme), ("without", pairs)):
            try:
                best = part.best({"latency_ms": budget * whole})
            except EdgeDiTError:  # none is so fast
                continue
            genotype = best.genotype
            if genotype.hash not in judged:
                judged[genotype.hash] = run.network(bank.assemble(genotype))
            found.setdefault(f"{budget:g}", {})[name] = {
                "score": best.score,
                "latency_ratio": best.costs["latency_ms"] / whole,
                "merged": [list(source) for source in genotype.merged],
                "hash": genotype.hash,
                **judged[genotype.hash],
            }
    return found


def terms(run: Run) -> dict[str, Any]:
    """Few-step students of single terms, beside the run's own, of both."""
    found = {"both": run.judged(FEW_FOLDER)}
    for term in ("knowledge", "matching"):
        open_ended = ["few_step.mean_drift=1000", "few_step.std_drift=1000"]  # a single term may drift
        config = run.beside(f"terms-{term}", f"few_step.path={run.folder / STUDENT}", *open_ended, *TERMS[term])
        distill_few_step.run(config, make_accelerator(config))
        found[term] = run.sampled(load_pipeline(config.folder(FEW_FOLDER)))
    ends = {name: run.judged(name)["distance"] for name in (WON_BACK.to, WON_BACK.gap)}
    for figures in found.values():
        figures["won_back"] = WON_BACK({**ends, WON_BACK.of: figures["distance"]})
    return found


def objectives(run: Run) -> dict[str, Any]:
    """Of every objective: Spearman's correlation with the distance after tuning, and what is left of it at equal
    latency, with 95 % intervals.
    """
    rank_objectives.run(run.config, run.accelerator)
    ranking = read_json(run.folder / RANK.folder / "ranking.json", RANK.made_by)
    kept = ("proxy_loss", "distance", "denoising", "output_error")
    return {name: ranking["correlations"]["distance"][name] for name in kept}


ABLATIONS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "starts": starts,
    "merges": merges,
    "terms": terms,
    "objectives": objectives,
}


# -------------------------------------------------------------------- what is printed


def picture(run: Run, file: Path) -> None:
    """The same noise and class of every model, a panel each, three images a class."""
    names = ("teacher", "teacher-more-steps", STUDENT, "student-random-proxies", f"{STUDENT}-few-steps", FEW_FOLDER)
    panels = {}
    for name in (*names, "quantized", "onnx-int8"):
        classes = run.teacher.transformer.config["num_classes"] or 8
        images = run.bytes_of(name)[: 3 * classes].permute(0, 2, 3, 1).numpy()
        panels[MODEL_LABELS.get(name, name)] = montage(images, classes)
    sample_grid(file, panels)


def summary(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of every claim its terms, the mean over the runs that have a value, and whether that is kept."""
    found = {}
    for claim in CLAIMS:
        known = [value for result in results if (value := result["claims"][claim.name]["value"]) is not None]
        value = mean(known) if known else None
        bar = f"{'≤' if claim.most else '≥'} {claim.bar:g}"
        found[claim.name] = {"paper": claim.paper, "bar": bar, "mean": value, "kept": claim.kept(value)}
    return found


def print_claims(
    claims: dict[str, dict[str, Any]], papers_costs: dict[str, str], results: list[dict[str, Any]]
) -> None:
    """The tables of claims and of costs."""
    seeds = "".join(f"{'seed ' + str(result['seed']):>26}" for result in results)
    print(f"{'claim':<48}{'paper':<48}{'bar':>8}{seeds}{'mean':>8}")
    for name, claim in claims.items():
        found = [result["claims"][name] for result in results]
        cells = "".join(f"{_figure(one['value'], one['interval']):>26}" for one in found)
        told = f"{_figure(claim['mean']):>8}  {'kept' if claim['kept'] else 'NOT KEPT'}"
        print(f"{name:<48}{claim['paper']:<48}{claim['bar']:>8}{cells}{told}")
    for name, paper in papers_costs.items():
        told = "".join(f"{result['costs'][name]:>26.2f}" for result in results)
        print(f"{'student / teacher, ' + name:<48}{paper:<48}{'':>8}{told}")


def print_ablation(name: str, results: list[dict[str, Any]]) -> None:
    """Every figure of an ablation, a line a variant and run."""
    print(f"\n{name}")
    for result in results:
        for variant, figures in result["ablations"][name].items():
            print(f"  seed {result['seed']}  {variant:<14}{_words(figures)}")


def _figure(value: float | None, interval: Sequence[float] = ()) -> str:
    told = "–" if value is None else f"{value:.3f}"
    return f"{told} [{', '.join(f'{end:.3f}' for end in interval)}]" if interval else told


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {_words(part)}" for key, part in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(map(_words, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "training" / "recipes" / "fashion.yaml",
        help="the recipe the runs were made with",
    )
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE", help="as given when they were made"
    )
    parser.add_argument("--ablations", default=",".join(ABLATIONS), help=f"of {', '.join(ABLATIONS)}; '' for none")
    parser.add_argument(
        "--picture", type=Path, help="write samples of the first run's models side by side (a name such as FILE.webp)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless every claim is kept")
    arguments = parser.parse_args()
    asked = list(filter(None, arguments.ablations.split(",")))
    if unknown := sorted(set(asked) - ABLATIONS.keys()):
        parser.error(f"--ablations holds {', '.join(unknown)}; it may hold {', '.join(ABLATIONS)}")

    results = []
    for folder in arguments.runs:
        run = Run(folder, arguments)
        figures = run.claims()
        ablations = {name: run.kept(name, partial(ABLATIONS[name], run)) for name in asked}
        results.append({"run": folder.name, "seed": run.seed, **figures, **run.made(), "ablations": ablations})
        if arguments.picture is not None and len(results) == 1:
            picture(run, arguments.picture)
    print(
        f"Fréchet distance ({run.extractor.name}, n={run.config.evaluate.samples}), {run.config.sampling.steps} steps, "
        f"guidance {run.config.sampling.guidance_scale:g}; in brackets 95 % of {RESAMPLES} bootstraps over images"
    )
    claims = summary(results)
    papers_costs = {name: PAPERS_COSTS.get(name, PAPERS_LATENCY) for name in results[0]["costs"]}
    print_claims(claims, papers_costs, results)
    for name in asked:
        print_ablation(name, results)
    missed = [f"{n} is {_figure(c['mean'])}; {c['bar']} wanted" for n, c in claims.items() if not c["kept"]]
    if arguments.json:
        about = {
            "extractor": run.extractor.name,
            "samples": run.config.evaluate.samples,
            "sampling": run.config.section("sampling")["sampling"],
            "claims": claims,
            "papers_costs": papers_costs,
            "environment": environment(run.config.threads),
        }
        print(json.dumps({**about, "runs": results, "missed": missed}))
    if arguments.check:
        fail(missed)


if __name__ == "__main__":
    main()
