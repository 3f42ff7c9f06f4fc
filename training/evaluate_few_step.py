"""Stage evaluate-few-step of text to image: judge every width of the few-step net, and the net that it was distilled
from with as few steps by the best standard solver, on the captions and noise of stage evaluate-elastic; and with many
steps, where that is not the run's supernet (few_step.path), which stage evaluate-elastic has judged.

    edgedit train evaluate-few-step --config training/recipes/digits-t2i-few-step.yaml

Writes <output_dir>/evaluate-few-step: solvers.json, seconds.json, and of every width two or three JSON files and their
images (safetensors): <width> of the few-step net, <width>-few-steps and <width>-many-steps of the other.
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

from functools import partial
from typing import NamedTuple

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from edgedit_hf.data.datasets import to_bytes
from edgedit_hf.data.loading import load_run_captions, load_run_images
from edgedit_hf.estimate import print_estimate
from edgedit_hf.export.latencies import Sampled
from edgedit_hf.few_step.checks import check_distilled_from
from edgedit_hf.few_step.solvers import solver_distances, with_solver
from edgedit_hf.files import atomic_write_json, weights_hash
from edgedit_hf.hub import absolute
from edgedit_hf.metrics.distances import frechet_distance, precision_recall
from edgedit_hf.metrics.extractors import train_independent_classifier
from edgedit_hf.metrics.prompt_following import agreements
from edgedit_hf.metrics.reference import judged_by, judged_distance, load_extractor, real_features
from edgedit_hf.pipelines.loading import load_pipeline, source_path
from edgedit_hf.pipelines.sampling import generate_from_captions, sampling_stamp
from edgedit_hf.preflight import preflight
from edgedit_hf.records import Captions, Seconds, WidthSolvers
from edgedit_hf.report.few_step import FEWER, GIVEN, MANY
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main
from edgedit_hf.run.results import pipeline_weights_hash
from edgedit_hf.run.stage import EVALUATE_ELASTIC, EVALUATE_FEW_STEP, FEW_STEP, given_source
from edgedit_hf.run.state import RunState
from edgedit_hf.runtimes.runners import TorchRunner
from edgedit_hf.runtimes.timing import MEASURING_S, measure
from edgedit_hf.schema import read_record
from edgedit_hf.search_space import BYTES, elastic_cost


class Width(NamedTuple):
    """One row: how a pipeline samples at a width."""

    name: str
    stage: str
    subnet: str | None
    sampled: Sampled
    solver: str | None = None

    def images(self, captions: list[str], config: RunConfig) -> torch.Tensor:
        """An image of every caption."""
        pipeline, steps, guidance_scale = self.sampled
        return generate_from_captions(
            pipeline,
            captions,
            subnet=self.subnet,
            seed=config.seed,
            steps=steps,
            guidance_scale=guidance_scale,
            batch_size=config.evaluate.batch_size,
        )


def measure_seconds(rows: list[Width], captions: list[str], config: RunConfig) -> dict[str, float]:
    """Wall-clock seconds an image of whole calls, prompt to pixels: medians of calls in turns."""
    prompts = [captions[index % len(captions)] for index in range(config.evaluate.latency_batch_size)]
    threads = torch.get_num_threads()
    runners = {row.name: TorchRunner(partial(row.images, prompts, config), {}, threads) for row in rows}
    repeats = config.evaluate.latency_repeats
    timings = measure(runners, repeats=repeats, max_seconds=MEASURING_S, progress="Timing whole calls")
    return {name: timing.median_ms / 1e3 / len(prompts) for name, timing in timings.items()}


def run(config: RunConfig, accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    options = config.evaluate
    asked = read_record(config.folder("evaluate", "captions.json"), Captions, EVALUATE_ELASTIC.made_by)
    sets = {name: asked[name] for name in ("captions", "held_out") if asked.get(name)}
    path, given = source_path(config, "few_step.path", "judge"), given_source(config) is not None
    source = load_pipeline(path, kind="ElasticDiTPipeline")
    distilled = source.transformer
    if config.few_step.subnet is not None:
        distilled = distilled.extract_subnet(config.few_step.subnet)
    check_distilled_from(config, path, distilled)
    ours = load_pipeline(config.folder(FEW_STEP.folder), FEW_STEP.made_by, kind="ElasticDiTPipeline")
    own = ours.transformer.subnet_names
    widths = {name: name for name in own} or {config.few_step.subnet or "full": None}
    captioned, held_out = load_run_captions(config), load_run_captions(config, "validation")
    if captioned.label_names:
        images, others = load_run_images(config), load_run_images(config, "validation")
    else:  # of several sizes those of the first are what generated images are compared with
        images, others = captioned.parts[0], held_out.parts[0]
    extractor = load_extractor(config, images, accelerator.device, others)
    state = RunState(
        config,
        EVALUATE_FEW_STEP,
        (2 + given) * len(widths),
        inputs={
            "pipeline": weights_hash(source.transformer.state_dict()),
            "data": captioned.fingerprint,
            "extractor": extractor.hash,
        },
        log_every=1,
        unit="model",
    )
    if state.finished:
        return
    real = real_features(extractor, images)
    classifier = train_independent_classifier(images, validation=others) if images.num_classes else None
    for pipeline in (source, ours):
        pipeline.to(accelerator.device)
    metric = f"fid[{extractor.name},n={options.samples}]"
    steps, guidance = ours.config.default_steps, config.sampling.guidance_scale

    def few_steps(width: str, solved, solver: str | None = None) -> Width:
        subnet = width if source.transformer.subnet_names else None
        return Width(width + FEWER, "subnet-few-steps", subnet, Sampled(solved, steps, guidance), solver)

    def many_steps(width: str) -> Width:
        sampled = Sampled(source, config.sampling.steps, guidance)
        return few_steps(width, source)._replace(name=width + MANY, stage=GIVEN, sampled=sampled)

    def distance_at(width: str, solved) -> float:
        return frechet_distance(extractor.features(few_steps(width, solved).images(sets["captions"], config)), real)

    solvers = state.folder / "solvers.json"
    if not solvers.exists():
        found = {width: solver_distances(source, partial(distance_at, width)) for width in widths}
        atomic_write_json(solvers, {"metric": metric, "distances": found})
    distances = read_record(solvers, WidthSolvers, "this stage")["distances"]
    rows = []
    for width, subnet in widths.items():
        solver = min(distances[width], key=distances[width].get)
        rows.append(few_steps(width, with_solver(source, solver), solver))
        rows.append(Width(width, "few-step", subnet, Sampled(ours, steps, ours.config.default_guidance_scale)))
    if not (state.folder / "seconds.json").exists():
        atomic_write_json(
            state.folder / "seconds.json", {"seconds_per_image": measure_seconds(rows, sets["captions"], config)}
        )
    rows += [many_steps(width) for width in widths] if given else []  # not timed: it is the same net as with few
    brought = (absolute(path), pipeline_weights_hash(path)) if given else (None, None)
    seconds = read_record(state.folder / "seconds.json", Seconds, "this stage")["seconds_per_image"]
    state.continue_at(
        next((i for i, row in enumerate(rows) if not (state.folder / f"{row.name}.json").exists()), len(rows))
    )
    for index in state.steps():
        row = rows[index]
        net = row.sampled.pipeline.transformer
        cost = elastic_cost(net.config, row.subnet)
        made = {key: row.images(captions, config) for key, captions in sets.items()}
        features = extractor.features(made["captions"])
        precision, recall = precision_recall(real, features)
        own = row.stage == "few-step"
        folder, weights = (FEW_STEP.folder, state.inputs["few-step"]) if own else brought
        result = {
            "name": row.name,
            "stage": row.stage,
            "path": str(config.folder(FEW_STEP.folder) if own else path),
            "folder": folder,
            "weights": weights,
            "solver": row.solver,
            "parameters": cost.parameters,
            "flops": cost.flops,
            "bytes": {precision: cost.bytes(precision) for precision in BYTES},
            "latency_ms": {},
            **judged_distance(metric, features, real),
            "precision": precision,
            "recall": recall,
            "num_samples": options.samples,
            "steps": row.sampled.steps,
            "guidance_scale": row.sampled.guidance_scale,
            "forwards_per_image": row.sampled.forwards,
            "seconds_per_image": {row.sampled.runtime: seconds[row.name]} if row.name in seconds else {},
            "stamp": {
                **judged_by(extractor, images, options.samples),
                **sampling_stamp(
                    row.sampled.pipeline,
                    seed=config.seed,
                    steps=row.sampled.steps,
                    guidance_scale=row.sampled.guidance_scale,
                ),
            },
        }
        if classifier is not None:
            result |= agreements(made, sets, classifier)
            state.log(agreement=result["class_agreement"])
        save_file({key: to_bytes(images) for key, images in made.items()}, state.folder / f"{row.name}.safetensors")
        atomic_write_json(state.folder / f"{row.name}.json", result)
        state.log(distance=result["metrics"][metric])
    state.finish()


if __name__ == "__main__":
    recipe_main(run, __doc__, dry_run=print_estimate, check=partial(preflight, stages=(EVALUATE_FEW_STEP,)))
