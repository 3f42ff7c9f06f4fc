"""About four bits a weight, every way there is, on a trained digits network: what is stored, and what is left of output
and images.

    python benchmarks/quantization.py [--model PIPELINE] [--config FILE] [--samples 2000] [--images FILE.png] [--json]
    [--check]

Without --model the teacher of the recipe is trained first. Rows: fp32; fp16 weights; int8 (a scale an output row); NF4
(blocks of 64, float16 absmax); RTN-4 (round to nearest, symmetric, groups of 64); GPTQ-4 (the same grids,
error-compensating rounding); and by training/quantize.py, 4 or 8 bits by sensitivity within 4.3 stored bits a weight:
RTN 4.3 (groups of 64), k-means 4.3 rounded to the nearest (SnapGen++'s recipe) and with compensation, and that with
self-distillation. Every layer's weight is quantised, the first and the last too. Columns: stored bits a weight of these
layers, bytes of the whole network's file, signal to quantisation noise of its output along the sampling loop with
guidance (over all timesteps, and at the first, middle and last), on noise that nothing was fitted to; the Fréchet
distance in a digit classifier's features to the real images, and its ratio to fp32's; PSNR of the images against fp32's
from the same noise; milliseconds of a forward in PyTorch, weights unpacked in every forward.

A second table: the output's ratio when the inputs of all layers but the first are rounded to 8 bit (simulated; weights
in fp32), with static scales (one for all timesteps, or one a bucket of timesteps), and with dynamic ones. The first
layer sees the sample itself, where one value (the background's) fills half of it at the end, so that its rounding error
is the same everywhere: its input stays as it is.

--check fails unless k-means 4.3 with self-distillation has at most 1.05 times the Fréchet distance of fp32 and a better
ratio of signal to noise than RTN-4 and NF4, all within 4.3 bits a weight, and scales by bucket are better than one
scale for all.
"""

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path

import torch
from diffusers_dit import fail

from edgedit_hf.data.datasets import to_bytes
from edgedit_hf.data.loading import load_run_images
from edgedit_hf.export.wrappers import DenoiserWrapper
from edgedit_hf.metrics.distances import frechet_distance, psnr
from edgedit_hf.metrics.extractors import FeatureExtractor
from edgedit_hf.metrics.reference import extractor_folder, load_extractor, real_features
from edgedit_hf.pipelines.loading import load_pipeline, with_transformer
from edgedit_hf.pipelines.sampling import generate
from edgedit_hf.quantization.activations import activation_scales, simulated_activations
from edgedit_hf.quantization.calibration import input_ranges, output_error, record, second_moments
from edgedit_hf.quantization.gptq import quantize_compensated
from edgedit_hf.quantization.inputs import Judge
from edgedit_hf.quantization.layers import quantizable_layers, quantized_weights, set_quantized_weight
from edgedit_hf.quantization.quantizer import mark_quantized, quantize_model
from edgedit_hf.report.plots import montage, sample_grid
from edgedit_hf.run.config import load_config
from edgedit_hf.run.launch import make_accelerator
from edgedit_hf.run.outputs import check_output
from edgedit_hf.runtimes.runners import TorchRunner, example_inputs
from edgedit_hf.runtimes.timing import environment, measure
from edgedit_hf.training import quantize, train_teacher

ROOT = Path(__file__).resolve().parents[1]

BUDGET, REQUIRED_DISTANCE = 4.3, 1.05
RTN = {"scheme": "affine", "bits": 4, "group_size": 64, "symmetric": True}
BEST = "k-means 4.3 + self-distillation"
BUCKETS = (1, 2, 4)


def forms(model: torch.nn.Module, calls: list, runs: dict[str, Path]) -> dict[str, torch.nn.Module]:
    """The network in every form, by the name of its row."""
    names = list(quantizable_layers(model))

    def nearest(spec: dict) -> torch.nn.Module:
        made = copy.deepcopy(model)
        quantize_model(made, dict.fromkeys(names, spec))
        return made

    halved = copy.deepcopy(model)
    for name in names:
        weight = halved.get_submodule(name).weight
        weight.data = weight.data.half().float()
    compensated, moments = copy.deepcopy(model), second_moments(model, calls, names)
    for name, layer in quantizable_layers(compensated).items():
        set_quantized_weight(layer, quantize_compensated(layer.weight, RTN, moments[name]))
    mark_quantized(compensated)
    made = {
        "fp32": model,
        "fp16 weights": halved,
        "int8": nearest({"scheme": "affine", "bits": 8, "group_size": 0, "symmetric": True}),
        "NF4": nearest({"scheme": "nf4", "block": 64}),
        "RTN-4": nearest(RTN),
        "GPTQ-4": compensated,
    }
    return made | {name: load_pipeline(folder).transformer for name, folder in runs.items()}


def sizes(name: str, model: torch.nn.Module) -> tuple[float, int]:
    """(stored bits a weight of the quantisable layers, bytes of all tensors); of fp16 weights what such a file would
    hold.
    """
    layers, packed = quantizable_layers(model), quantized_weights(model)
    total = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    weights = {key: layer.weight.numel() for key, layer in layers.items()}
    plain = 16 if name == "fp16 weights" else 32
    bits = sum(packed[key].num_bits if key in packed else plain * count for key, count in weights.items())
    if plain == 16:
        total -= 2 * sum(weights.values())
    return bits / sum(weights.values()), total


def activations(model: torch.nn.Module, calls: list, judge: Judge) -> dict[str, dict]:
    """Errors of the output with 8-bit inputs of all layers but the first: static scales, one or several, and dynamic
    ones.
    """
    names = [name for name in quantizable_layers(model) if name != "patch_embed"]
    timesteps, ranges = input_ranges(model, calls, names)
    buckets = [count for count in BUCKETS if count < len(timesteps)] + [len(timesteps)]
    ways = {
        f"static, {count} bucket{'s' if count > 1 else ''}": activation_scales(timesteps, ranges, count)
        for count in buckets
    }
    found = {}
    for name, scales in {**ways, "dynamic": None}.items():
        with simulated_activations(model, names, scales):
            found[name] = output_error(model, judge.calls[None], judge.references[None]).to_dict()
    return found


def few(values: list) -> list:
    """The first, middle and last."""
    return [values[0], values[len(values) // 2], values[-1]]


def decibels(values: list) -> str:
    return "".join(f"{'∞' if value is None else format(value, '.1f'):>7}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="a trained EdgeDiT pipeline without a VAE; default: the recipe's teacher is trained"
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "training" / "recipes" / "digits.yaml",
        help="the recipe of data, sampling and quantisation",
    )
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE", help="of the recipe, e.g. quantize.steps=2000"
    )
    parser.add_argument("--samples", type=int, default=2000, help="images a form")
    parser.add_argument("--latency-batch", type=int, default=32, help="images of a timed forward")
    parser.add_argument("--repeats", type=int, default=30, help="rounds of the forwards")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--output", type=Path, help="folder of the runs, which a second call continues; default: a temporary one"
    )
    parser.add_argument(
        "--images", type=Path, metavar="FILE.png", help="write samples of every form from the same noise"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless the requirements are met")
    arguments = parser.parse_args()
    if arguments.output is not None:
        check_output(arguments.output, [arguments.model, arguments.config], foreign=None)
    if (
        arguments.images is not None
        and arguments.images.exists()
        and not arguments.images.read_bytes().startswith(b"\x89PNG")
    ):
        parser.error(f"--images {arguments.images} exists and is no PNG; choose another name")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output or Path(temporary)

        def config_of(name: str, *overrides: str):
            given = [f"output_dir={folder / name}", f"threads={arguments.threads}", f"quantize.budget_bits={BUDGET}"]
            return load_config(arguments.config, [*arguments.override, *given, *overrides])

        config = config_of("source")
        accelerator = make_accelerator(config)
        if arguments.model is None:
            train_teacher.run(config, accelerator)
        source = arguments.model or config.folder("teacher")
        pipeline = load_pipeline(source)
        sampling = {"steps": config.sampling.steps, "guidance_scale": config.sampling.guidance_scale}
        loop = [
            f"quantize.path={source}",
            f"quantize.sampling_steps={sampling['steps']}",
            f"quantize.guidance_scale={sampling['guidance_scale']}",
        ]
        nearest = ["quantize.compensate=false", "quantize.steps=0"]
        for name, more in {
            "groups": ["quantize.scheme=affine", *nearest],
            "nearest": nearest,
            "compensated": [],
        }.items():
            quantize.run(config_of(name, *loop, *more), accelerator)
        made = folder / "compensated"
        runs = {"RTN 4.3": folder / "groups" / "quantized", "k-means 4.3, nearest": folder / "nearest" / "quantized"}
        runs |= {"k-means 4.3": made / "quantized-untuned", BEST: made / "quantized"}
        images, beside = load_run_images(config), extractor_folder(Path(source).parent)
        # Of the run that the pipeline is from, if it has one.
        extractor = (
            FeatureExtractor.load(beside) if beside.is_dir() else load_extractor(config, images, accelerator.device)
        )
        real = real_features(extractor, images)

        options = {"batch_size": config.quantize.sampling_batch_size, **sampling}
        calls = record(pipeline, config.quantize.calibration_images, **options).calls
        judge = Judge(pipeline, config.quantize.calibration_images, **options)
        models = forms(pipeline.transformer.eval(), calls, runs)
        runners = {}
        for name, model in models.items():
            inputs = example_inputs(model.config, arguments.latency_batch, dtype=model.dtype)
            runners[name] = TorchRunner(DenoiserWrapper(model), inputs, arguments.threads)
        timings = measure(runners, repeats=arguments.repeats)
        rows, pixels = {}, {}
        heads = "".join(f"{f't={t:.0f}':>7}" for t in few(judge_timesteps(judge)))
        print(
            f"{source}, {arguments.samples} images, extractor {extractor.name}, batch {arguments.latency_batch} a "
            f"forward, {arguments.threads} threads"
        )
        print(f"{'form':<33}{'bits':>6}{'bytes':>10}{'dB':>7}{heads}{'Fréchet':>9}{'ratio':>7}{'PSNR':>7}{'ms':>7}")
        for name, model in models.items():
            error = judge(model)["full"]
            drawn, _ = generate(
                with_transformer(pipeline, model),
                arguments.samples,
                seed=config.seed,
                batch_size=config.evaluate.batch_size,
                **sampling,
            )
            distance = frechet_distance(extractor.features(drawn), real)
            bits, size = sizes(name, model)
            pixels[name] = to_bytes(drawn).permute(0, 2, 3, 1).numpy()
            likeness = None if name == "fp32" else psnr(pixels[name], pixels["fp32"], 255.0)
            ratio = distance / rows["fp32"]["frechet"] if rows else 1.0
            rows[name] = {
                "bits": bits,
                "bytes": size,
                "error": error,
                "frechet": distance,
                "frechet_ratio": ratio,
                "psnr_db": likeness,
            }
            rows[name]["ms"] = timings[name].median_ms
            noise = decibels([error["sqnr_db"], *few(error["sqnr_db_by_timestep"])])
            print(
                f"{name:<33}{bits:>6.2f}{size:>10}{noise}{distance:>9.3f}{ratio:>7.3f}{decibels([likeness])}{timings[name].median_ms:>7.2f}",
                flush=True,
            )
        inputs = activations(pipeline.transformer, calls, judge)
        print(f"\n{'8-bit inputs but the first':<33}{'dB':>7}{heads}")
        for name, error in inputs.items():
            print(f"{name:<33}{decibels([error['sqnr_db'], *few(error['sqnr_db_by_timestep'])])}", flush=True)
        print(f"{(time.monotonic() - started) / 60:.1f} minutes")
        if arguments.images:
            sample_grid(arguments.images, {name: montage(images[:40], 10) for name, images in pixels.items()})
    if arguments.json:
        about = {"model": str(source), "samples": arguments.samples, "extractor": extractor.name, **sampling}
        print(json.dumps({**about, "rows": rows, "activations": inputs, "environment": environment(arguments.threads)}))
    if arguments.check:
        fail(problems(rows, inputs))


def judge_timesteps(judge: Judge) -> list[float]:
    """Timesteps of the sampling loop, ascending."""
    return sorted({call.timestep for call in judge.calls[None]})


def problems(rows: dict[str, dict], inputs: dict[str, dict]) -> list[str]:
    """What is not as --check demands."""
    best, found = rows[BEST], []
    if best["frechet_ratio"] > REQUIRED_DISTANCE:
        found.append(
            f"{BEST}: {best['frechet_ratio']:.3f} times the Fréchet distance of fp32, at most {REQUIRED_DISTANCE} "
            "wanted"
        )
    for name in ("RTN-4", "NF4"):
        if rows[name]["error"]["sqnr_db"] >= best["error"]["sqnr_db"]:
            found.append(f"{BEST}: {best['error']['sqnr_db']:.1f} dB, {name} has {rows[name]['error']['sqnr_db']:.1f}")
    for name in (BEST, "RTN-4", "NF4"):
        if rows[name]["bits"] > BUDGET:
            found.append(f"{name}: {rows[name]['bits']:.3f} bits a weight, at most {BUDGET} wanted")
    one, *several = [error["mse"] for name, error in inputs.items() if name.startswith("static")]
    if min(several) >= one:
        found.append(f"static scales by bucket: an error of {min(several):.2e}, one scale for all has {one:.2e}")
    return found


if __name__ == "__main__":
    main()
