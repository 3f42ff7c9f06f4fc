"""Stage 8: judge every model of the run alike: Fréchet distance, precision, recall, class agreement, cost, measured
latency, samples.

    edgedit train evaluate --config training/recipes/digits.yaml

Writes <output_dir>/evaluate: reference.json, latency.json, and a JSON, a PNG and the images (safetensors) of each
model.
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from edgedit_hf.data.datasets import to_bytes
from edgedit_hf.data.loading import load_run_images
from edgedit_hf.distill.teacher import teacher_path
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.estimate import print_estimate
from edgedit_hf.export.formats import FORMATS
from edgedit_hf.export.lowering import denoiser_file
from edgedit_hf.export.verify import weight_bytes
from edgedit_hf.export.wrappers import DenoiserWrapper
from edgedit_hf.files import atomic_write_json
from edgedit_hf.genotype import Genotype
from edgedit_hf.metrics.distances import frechet_distance, precision_recall, psnr
from edgedit_hf.metrics.extractors import class_agreement
from edgedit_hf.metrics.reference import describe_reference, load_extractor, real_features
from edgedit_hf.pipelines.loading import load_pipeline
from edgedit_hf.pipelines.sampling import generate, sampling_of
from edgedit_hf.preflight import preflight
from edgedit_hf.records import Latencies
from edgedit_hf.report.plots import save_montage
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main
from edgedit_hf.run.stage import EVALUATE, TEACHER, TUNE, maker_of
from edgedit_hf.run.state import RunState
from edgedit_hf.runtimes.runners import SessionRunner, TorchRunner, example_inputs
from edgedit_hf.runtimes.sessions import open_session
from edgedit_hf.runtimes.timing import environment, measure, paired_ratio
from edgedit_hf.schema import read_record
from edgedit_hf.search_space import BYTES, Cost, model_cost

CHUNK = 2000  # images that are held as floats at a time: 1.6 GB of 256 × 256 pixels


def measure_latencies(pipelines: dict, config: RunConfig) -> dict:
    """Whole networks of each architecture in torch, ONNX Runtime (fp32 and int8) and, where exported, ExecuTorch:
    interleaved in one run. What the run has exported is timed as it ships; the rest is lowered here.
    """
    options, threads, batch = config.evaluate, config.latency.threads, config.evaluate.latency_batch_size
    asked = [("onnx", dtype) for dtype in FORMATS["onnx"].measured] + [
        ("executorch", dtype) for dtype in config.export.executorch
    ]
    runners, hashes, shipped = {}, {}, {}
    with TemporaryDirectory() as folder:
        for name in ("teacher", "student-tuned"):
            model = pipelines[name].transformer
            hashes[name] = Genotype.of(model.config).hash
            inputs = example_inputs(model.config, batch)
            runners[name, "torch-fp32"] = TorchRunner(DenoiserWrapper(model), inputs, threads)
            for kind, dtype in asked:
                export, runtime = pipelines.get(f"exported/{kind}-{dtype}"), f"{FORMATS[kind].runtime}-{dtype}"
                exported = None if export is None else export.transformer
                file = denoiser_file(model, Path(folder, name), kind, dtype, batch, exported)
                if not file.is_relative_to(folder):
                    shipped[f"{name} {runtime}"] = f"exported/{kind}-{dtype}"
                runners[name, runtime] = SessionRunner(open_session(file, threads), inputs)
        timings = measure(runners, repeats=options.latency_repeats)
    measured = {hashes[name]: {} for name in hashes}
    for (name, runtime), timing in timings.items():
        measured[hashes[name]][runtime] = timing.median_ms
    ratios = {
        runtime: paired_ratio(timings["teacher", runtime], timings["student-tuned", runtime])
        for name, runtime in runners
        if name == "teacher"
    }
    return {
        "latency_ms": measured,
        "speedup": ratios,
        "shipped": shipped,
        "timings": {f"{name} {runtime}": timing.to_dict() for (name, runtime), timing in timings.items()},
        "batch_size": options.latency_batch_size,
        "threads": threads,
        "environment": environment(threads),
    }


def bytes_by_precision(transformer, cost: Cost) -> dict[str, int]:
    """Bytes of the weights at each precision; of an export what its file holds."""
    if isinstance(transformer, torch.nn.Module):
        return {name: cost.bytes(name) for name in BYTES}
    return {transformer.config.precision: sum(weight_bytes(transformer.path).values())}


def asked_for(config: RunConfig) -> list[str]:
    """The models that the recipe has judged, by their folders; others that are there may be of earlier settings."""
    tune, export = config.tune, config.export
    left_out = set() if tune.teacher_more_steps else {"teacher-more-steps"}
    left_out |= set() if tune.random_proxies else {"student-random-proxies"}
    exports = {f"exported/onnx-{dtype}" for dtype in export.dtypes}
    exports |= {f"exported/executorch-{dtype}" for dtype in export.executorch}
    names = [name for name, at in EVALUATE.inputs if at and name not in left_out]
    return [name for name in names if Path(name).parts[0] != "exported" or config.evaluate.exports and name in exports]


def judge(
    pipeline, config: RunConfig, extractor, classifier, accelerator: Accelerator
) -> tuple[torch.Tensor, torch.Tensor, float | None]:
    """A model's images as bytes `(n, C, H, W)`, their features `(n, D)`, and how many show their class (`None` without
    labels or classifier).

    A torch model runs on the accelerator's device meanwhile. Its images are in the launch's precision, unless exports,
    which have a precision of their own, are compared with them.
    """
    options = config.evaluate
    eager = isinstance(pipeline.transformer, torch.nn.Module)
    if eager:
        pipeline.to(accelerator.device)
    images, features, agreeing = [], [], []
    for start in range(0, options.samples, CHUNK):
        with nullcontext() if options.exports else accelerator.autocast():
            samples, labels = generate(
                pipeline,
                min(CHUNK, options.samples - start),
                first=start,
                seed=config.seed,
                batch_size=options.batch_size,
                **sampling_of(pipeline, config.sampling.steps, config.sampling.guidance_scale),
            )
        features.append(extractor.features(samples))
        images.append(to_bytes(samples))
        if classifier is not None and labels is not None:
            agreeing.append(len(samples) * class_agreement(classifier, samples, labels))
    if eager:
        pipeline.to("cpu")
    return torch.cat(images), torch.cat(features), sum(agreeing) / options.samples if agreeing else None


def run(config: RunConfig, accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    options = config.evaluate
    folders = {name: config.folder(name) for name in asked_for(config)} | {"teacher": teacher_path(config)}
    if not (folders["student-tuned"] / "model_index.json").exists():
        raise EdgeDiTError(
            f"There is no pipeline in {folders['student-tuned']}; it is written by {TUNE.made_by}, run that first."
        )
    if not Path(folders["teacher"]).exists():  # of the Hub, or missing
        load_pipeline(folders["teacher"], TEACHER.made_by)
    names = [name for name, path in folders.items() if name == "teacher" or (path / "model_index.json").exists()]
    images = load_run_images(config)
    extractor = load_extractor(config, images, accelerator.device)
    state = RunState(
        config,
        EVALUATE,
        len(names),
        inputs={
            "data": images.fingerprint,
            "extractor": extractor.hash,
            **{name: None for name, at in EVALUATE.inputs if at and name not in names},
        },
        log_every=1,
        unit="model",
    )
    if state.finished:
        return
    pipelines = {name: load_pipeline(folders[name], maker_of(name).made_by) for name in names}
    real = real_features(extractor, images)
    classifier = describe_reference(config, images, extractor, real)
    metric = f"fid[{extractor.name},n={options.samples}]"
    if not (state.folder / "latency.json").exists():
        judged_weights = {name: state.inputs[name] for name in ("teacher", "student-tuned")}
        atomic_write_json(
            state.folder / "latency.json", {**measure_latencies(pipelines, config), "weights": judged_weights}
        )
    latency = read_record(state.folder / "latency.json", Latencies, "this stage")["latency_ms"]

    def file(name: str, suffix: str) -> Path:
        return state.folder / (name.replace("/", "-").removeprefix("exported-") + suffix)

    state.continue_at(next((i for i, name in enumerate(names) if not file(name, ".json").exists()), len(names)))
    for index in state.steps():
        name = names[index]
        pipeline, stage = pipelines[name], "exported" if name.startswith("exported/") else name
        bytes_of, features, agreement = judge(pipeline, config, extractor, classifier, accelerator)
        precision, recall = precision_recall(real, features)
        distance = frechet_distance(features, real)
        model = pipeline.transformer.config
        cost = model_cost(model)
        genotype = Genotype.of(model)
        runtimes = latency.get(genotype.hash, {})
        shipped = f"{'executorch' if 'executorch' in name else 'onnxruntime'}-{model.get('precision')}"
        result = {
            "name": name.removeprefix("exported/"),
            "stage": stage,
            "path": str(folders[name]),
            "folder": str(Path(folders[name]).absolute()) if name == "teacher" and config.teacher.path else name,
            "weights": state.inputs[name],
            "genotype_hash": genotype.hash,
            "parameters": cost.parameters,
            "flops": cost.flops,
            "bytes": bytes_by_precision(pipeline.transformer, cost),
            "latency_ms": runtimes if stage != "exported" else {k: v for k, v in runtimes.items() if k == shipped},
            "metrics": {metric: distance, "precision": precision, "recall": recall},
            "precision": precision,
            "recall": recall,
            "num_samples": options.samples,
            **sampling_of(pipeline, config.sampling.steps, config.sampling.guidance_scale),
            "grid": f"evaluate/{file(name, '.png').name}",
        }
        if agreement is not None:
            result["class_agreement"] = agreement
        save_file({"images": bytes_of}, file(name, ".safetensors"))
        if stage == "exported":
            # Against the same images from PyTorch in fp32: what lowering and quantising changed. None: not one 8-bit
            # value.
            eager = load_file(file("student-tuned", ".safetensors"))["images"]
            result["psnr_db"] = None if torch.equal(bytes_of, eager) else psnr(bytes_of.numpy(), eager.numpy(), 255.0)
        columns = model["num_classes"] if 2 <= model["num_classes"] <= 16 else 8
        save_montage(file(name, ".png"), bytes_of[: columns * options.grid].permute(0, 2, 3, 1).numpy(), columns)
        atomic_write_json(file(name, ".json"), result)
        state.log(distance=distance)
    state.finish()


if __name__ == "__main__":
    recipe_main(run, __doc__, dry_run=print_estimate, check=partial(preflight, stages=(EVALUATE,)))
