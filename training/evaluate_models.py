"""Stage 8: judge every model of the run alike: Fréchet distance, precision, recall, class agreement, cost, measured
latency, samples. A few-step student samples as it was distilled, the others as `sampling` says; beside it stands the
net that it was distilled from (the tuned student, or what few_step.path names) with as few steps by the best standard
solver.

    edgedit train evaluate --config training/recipes/digits.yaml

Writes <output_dir>/evaluate: reference.json, latency.json, solvers.json (of few steps), and a JSON, a PNG and the
images (safetensors) of each model.
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from edgedit_hf.data.datasets import to_bytes
from edgedit_hf.data.loading import load_run_images
from edgedit_hf.distill.teacher import teacher_path
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.estimate import print_estimate
from edgedit_hf.export.latencies import Sampled, measure_latencies, seconds_an_image
from edgedit_hf.export.verify import weight_bytes
from edgedit_hf.few_step.checks import check_distilled_from
from edgedit_hf.few_step.solvers import solver_distances, with_solver
from edgedit_hf.files import atomic_write_json
from edgedit_hf.genotype import Genotype
from edgedit_hf.hub import absolute
from edgedit_hf.metrics.distances import frechet_distance, precision_recall, psnr
from edgedit_hf.metrics.extractors import class_agreement
from edgedit_hf.metrics.reference import (
    describe_reference,
    judged_by,
    judged_distance,
    load_extractor,
    real_features,
)
from edgedit_hf.pipelines.loading import load_pipeline
from edgedit_hf.pipelines.sampling import generate, sampling_of, sampling_stamp
from edgedit_hf.preflight import preflight
from edgedit_hf.quantization.inputs import transformer_bytes
from edgedit_hf.quantization.layers import quantized_weights
from edgedit_hf.records import Latencies, Solvers
from edgedit_hf.report.few_step import FEWER, GIVEN, TUNED
from edgedit_hf.report.plots import save_montage
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main
from edgedit_hf.run.results import pipeline_weights_hash
from edgedit_hf.run.stage import EVALUATE, FEW_STEP, SELF_DISTIL, TEACHER, TUNE, given_source, maker_of, shipped
from edgedit_hf.run.state import RunState
from edgedit_hf.schema import read_record
from edgedit_hf.search_space import BYTES, Cost, model_cost

CHUNK = 2000  # images that are held as floats at a time: 1.6 GB of 256 × 256 pixels


def bytes_by_precision(transformer, cost: Cost, folder: Path | str) -> dict[str, int]:
    """Bytes of the weights at each precision; of an export, or a network that is quantised, what its files hold."""
    if not isinstance(transformer, torch.nn.Module):
        return {transformer.config.precision: sum(weight_bytes(transformer.path).values())}
    if quantized_weights(transformer):
        return {"quantized": transformer_bytes(Path(folder))}
    return {name: cost.bytes(name) for name in BYTES}


def asked_for(config: RunConfig) -> list[str]:
    """The models that the recipe has judged, by their folders; others that are there may be of earlier settings."""
    tune, export = config.tune, config.export
    left_out = set() if tune.teacher_more_steps else {"teacher-more-steps"}
    left_out |= set() if tune.random_proxies else {"student-random-proxies"}
    left_out |= {stage.folder for stage in (FEW_STEP, SELF_DISTIL) if not stage.needed(config)}
    exports = {f"exported/onnx-{dtype}" for dtype in export.dtypes}
    exports |= {f"exported/executorch-{dtype}" for dtype in export.executorch}
    names = [name for name, at in EVALUATE.inputs if at and name not in left_out]
    return [name for name in names if Path(name).parts[0] != "exported" or config.evaluate.exports and name in exports]


def judge(
    row: Sampled, config: RunConfig, extractor, classifier, accelerator: Accelerator
) -> tuple[torch.Tensor, torch.Tensor, float | None]:
    """A model's images as bytes `(n, C, H, W)`, their features `(n, D)`, and how many show their class (`None` without
    labels or classifier).

    A torch model runs on the accelerator's device meanwhile. Its images are in the launch's precision, unless exports,
    which have a precision of their own, are compared with them.
    """
    options, pipeline = config.evaluate, row.pipeline
    if row.eager:
        pipeline.to(accelerator.device)
    images, features, agreeing = [], [], []
    for start in range(0, options.samples, CHUNK):
        with nullcontext() if options.exports else accelerator.autocast():
            samples, labels = generate(
                pipeline,
                min(CHUNK, options.samples - start),
                first=start,
                seed=config.seed,
                steps=row.steps,
                guidance_scale=row.guidance_scale,
                batch_size=options.batch_size,
            )
        features.append(extractor.features(samples))
        images.append(to_bytes(samples))
        if classifier is not None and labels is not None:
            agreeing.append(len(samples) * class_agreement(classifier, samples, labels))
    if row.eager:
        pipeline.to("cpu")
    return torch.cat(images), torch.cat(features), sum(agreeing) / options.samples if agreeing else None


def rows_of(pipelines: dict, config: RunConfig, distilled: str, solver: str | None) -> dict[str, Sampled]:
    """What is judged, by name, in order: a few-step pipeline as it was distilled, the others as the recipe says; and
    what it was distilled from with as few steps by a standard solver.
    """
    asked = config.sampling.steps, config.sampling.guidance_scale
    rows = {}
    for name, pipeline in pipelines.items():
        rows[name] = Sampled(pipeline, **sampling_of(pipeline, *asked))
        if name == distilled and solver is not None:
            steps = pipelines[FEW_STEP.folder].config.default_steps
            rows[name + FEWER] = Sampled(with_solver(pipeline, solver), steps, config.sampling.guidance_scale)
    return rows


def run(config: RunConfig, accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    options, given = config.evaluate, given_source(config) if FEW_STEP.needed(config) else None
    folders = {name: config.folder(name) for name in asked_for(config)} | {"teacher": teacher_path(config)}
    for stage in dict.fromkeys((TUNE, shipped(config))):
        if not (folders[stage.folder] / "model_index.json").exists():
            raise EdgeDiTError(
                f"There is no pipeline in {folders[stage.folder]}; it is written by {stage.made_by}, run that first."
            )
    if not Path(folders["teacher"]).exists():  # of the Hub, or missing
        load_pipeline(folders["teacher"], TEACHER.made_by)
    names = [name for name, path in folders.items() if name == "teacher" or (path / "model_index.json").exists()]
    if given is not None:
        folders[GIVEN] = given
    distilled = GIVEN if given is not None else TUNED
    source = load_pipeline(folders[distilled]) if FEW_STEP.needed(config) else None
    made_from = source and check_distilled_from(config, folders[distilled], source.transformer)
    images = load_run_images(config)
    extractor = load_extractor(config, images, accelerator.device)
    state = RunState(
        config,
        EVALUATE,
        len(names) + FEW_STEP.needed(config) + (given is not None),
        inputs={
            "data": images.fingerprint,
            "extractor": extractor.hash,
            GIVEN: None if given is None else made_from,
            **{name: None for name, at in EVALUATE.inputs if at and name not in names},
        },
        log_every=1,
        unit="model",
    )
    if state.finished:
        return
    pipelines = {name: load_pipeline(folders[name], maker_of(name).made_by) for name in names}
    if source is not None:
        pipelines[distilled] = source
    real = real_features(extractor, images)
    classifier = describe_reference(config, images, extractor, real)
    metric = f"fid[{extractor.name},n={options.samples}]"

    def file(name: str, suffix: str) -> Path:
        return state.folder / (name.replace("/", "-").removeprefix("exported-") + suffix)

    def distance_in_few_steps(pipeline) -> float:
        steps = pipelines[FEW_STEP.folder].config.default_steps
        row = Sampled(pipeline, steps, config.sampling.guidance_scale)
        return frechet_distance(judge(row, config, extractor, None, accelerator)[1], real)

    solver, solvers = None, state.folder / "solvers.json"
    if FEW_STEP.needed(config):
        if not solvers.exists():
            found = solver_distances(source, distance_in_few_steps)
            atomic_write_json(solvers, {"metric": metric, "distances": found})
        distances = read_record(solvers, Solvers, "this stage")["distances"]
        solver = min(distances, key=distances.get)
    rows = rows_of(pipelines, config, distilled, solver)
    if not (state.folder / "latency.json").exists():
        judged_weights = {name: state.inputs[name] for name in ("teacher", TUNED)}
        measured = measure_latencies(pipelines, config)
        timed = {name: row for name, row in rows.items() if name != SELF_DISTIL.folder}  # it unpacks as it goes
        measured |= {**seconds_an_image(timed, measured, config), "weights": judged_weights}
        atomic_write_json(state.folder / "latency.json", measured)
    latency = read_record(state.folder / "latency.json", Latencies, "this stage")
    names = list(rows)
    weights = {**state.inputs, **({} if given is None else {GIVEN: pipeline_weights_hash(given)})}
    brought = {GIVEN} if config.teacher.path is None else {GIVEN, "teacher"}  # from outside the run
    state.continue_at(next((i for i, name in enumerate(names) if not file(name, ".json").exists()), len(names)))
    for index in state.steps():
        name = names[index]
        row, made_of = rows[name], name.removesuffix(FEWER)
        pipeline, stage = row.pipeline, "exported" if name.startswith("exported/") else name
        bytes_of, features, agreement = judge(row, config, extractor, classifier, accelerator)
        precision, recall = precision_recall(real, features)
        judged = judged_distance(metric, features, real)
        model = pipeline.transformer.config
        cost = model_cost(model)
        genotype = Genotype.of(model)
        runtimes = {} if stage == SELF_DISTIL.folder else latency["latency_ms"].get(genotype.hash, {})
        seconds = latency.get("seconds_per_image", {})
        result = {
            "name": name.removeprefix("exported/"),
            "stage": stage,
            "path": str(folders[made_of]),
            "folder": absolute(folders[made_of]) if made_of in brought else made_of,
            "weights": weights[made_of],
            "genotype_hash": genotype.hash,
            "parameters": cost.parameters,
            "flops": cost.flops,
            "bytes": bytes_by_precision(pipeline.transformer, cost, folders[made_of]),
            "latency_ms": runtimes if stage != "exported" else {k: v for k, v in runtimes.items() if k == row.runtime},
            **judged,
            "metrics": {**judged["metrics"], "precision": precision, "recall": recall},
            "precision": precision,
            "recall": recall,
            "num_samples": options.samples,
            "steps": row.steps,
            "guidance_scale": row.guidance_scale,
            "forwards_per_image": row.forwards,
            "seconds_per_image": {row.runtime: seconds[name]} if name in seconds else {},
            "grid": f"evaluate/{file(name, '.png').name}",
        }
        sampled = {"seed": config.seed, "steps": row.steps, "guidance_scale": row.guidance_scale}
        mixed = "no" if options.exports else accelerator.mixed_precision
        result["stamp"] = {
            **judged_by(extractor, images, options.samples),
            **sampling_stamp(pipeline, **sampled, precision=mixed),
        }
        if name != made_of:
            result["solver"] = solver
        if agreement is not None:
            result["class_agreement"] = agreement
        save_file({"images": bytes_of}, file(name, ".safetensors"))
        if stage == "exported" or stage == SELF_DISTIL.folder and config.quantize.path is None:
            # Against the same images from PyTorch in fp32: what lowering and quantising changed. None: not one 8-bit
            # value.
            eager = load_file(file(shipped(config).folder, ".safetensors"))["images"]
            result["psnr_db"] = None if torch.equal(bytes_of, eager) else psnr(bytes_of.numpy(), eager.numpy(), 255.0)
        columns = model["num_classes"] if 2 <= model["num_classes"] <= 16 else 8
        save_montage(file(name, ".png"), bytes_of[: columns * options.grid].permute(0, 2, 3, 1).numpy(), columns)
        atomic_write_json(file(name, ".json"), result)
        state.log(distance=judged["metrics"][metric])
    state.finish()


if __name__ == "__main__":
    recipe_main(run, __doc__, dry_run=print_estimate, check=partial(preflight, stages=(EVALUATE,)))
