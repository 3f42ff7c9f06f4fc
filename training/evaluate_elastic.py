"""Stage evaluate of text to image: judge every sub-network alike, on the same captions from the same noise.

    edgedit train evaluate-elastic --config training/recipes/digits-t2i.yaml

Writes <output_dir>/evaluate: reference.json, captions.json, latency.json, and a JSON and the images (safetensors) of
each sub-network: Fréchet distance, cost, measured latency, and, of the embedded digits, how many show the digit and the
style that their caption says, also for combinations that training never saw.
"""

if __name__ == "__main__":
    from edgedit_hf.entry import starting

    starting()  # the imports take seconds: Ctrl-C ends them in one line

from functools import partial

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from edgedit_hf.data.datasets import to_bytes
from edgedit_hf.data.loading import load_run_captions, load_run_images
from edgedit_hf.estimate import print_estimate
from edgedit_hf.files import atomic_write_json
from edgedit_hf.metrics.prompt_following import agreements, judged_captions
from edgedit_hf.metrics.reference import describe_reference, judged_by, judged_distance, load_extractor, real_features
from edgedit_hf.pipelines.loading import load_pipeline
from edgedit_hf.pipelines.pipeline_elastic_dit import ElasticDiTPipeline
from edgedit_hf.pipelines.sampling import generate_from_captions, sampling_of, sampling_stamp
from edgedit_hf.preflight import preflight
from edgedit_hf.records import ElasticStage, Latencies
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.launch import recipe_main
from edgedit_hf.run.stage import ELASTIC, EVALUATE_ELASTIC
from edgedit_hf.run.state import RunState
from edgedit_hf.runtimes.runners import TorchRunner
from edgedit_hf.runtimes.timing import MEASURING_S, environment, measure
from edgedit_hf.schema import read_record
from edgedit_hf.search_space import BYTES, elastic_cost

SHOWN = 10  # captions at the head of the list, whose images the report shows: of digits one each


def measure_latencies(pipeline: ElasticDiTPipeline, config: RunConfig) -> dict:
    """Median milliseconds of a forward of every sub-network as a stand-alone net in torch, timed in turns."""
    options, model, threads = config.evaluate, pipeline.transformer, torch.get_num_threads()
    text, masks = pipeline.encode_prompt(
        judged_captions(load_run_captions(config, "validation"), options.latency_batch_size)
    )
    count, size = options.latency_batch_size, model.config.sample_size
    inputs = {
        "sample": torch.randn(count, model.config.in_channels, size, size),
        "timestep": torch.linspace(1, 999, count),
        "text": text,
        "masks": masks,
    }
    runners = {name: TorchRunner(model.extract_subnet(name).eval(), inputs, threads) for name in model.subnet_names}
    timings = measure(runners, repeats=options.latency_repeats, max_seconds=MEASURING_S, progress="Timing forwards")
    return {
        "latency_ms": {name: {"torch-fp32": timing.median_ms} for name, timing in timings.items()},
        "batch_size": count,
        "threads": threads,
        "environment": environment(threads),
    }


def run(config: RunConfig, accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    options = config.evaluate
    trained = read_record(config.folder("elastic", "stage.json"), ElasticStage, ELASTIC.made_by)
    pipeline = load_pipeline(config.folder("elastic"), ELASTIC.made_by, kind="ElasticDiTPipeline")
    names = pipeline.transformer.subnet_names
    captioned, held_out = load_run_captions(config), load_run_captions(config, "validation")
    if captioned.label_names:
        images, others = load_run_images(config), None
    else:  # of several sizes those of the first are what generated images are compared with
        images, others = captioned.parts[0], held_out.parts[0]
    extractor = load_extractor(config, images, accelerator.device, others)
    state = RunState(
        config,
        EVALUATE_ELASTIC,
        len(names),
        inputs={"data": captioned.fingerprint, "extractor": extractor.hash},
        also={"subnets": names},
        log_every=1,
        unit="model",
    )
    if state.finished:
        return
    real = real_features(extractor, images)
    classifier = describe_reference(config, images, extractor, real, others)
    sets = {"captions": judged_captions(held_out, options.samples)}
    if captioned.label_names:
        unseen = load_run_captions(config, "held_out")
        sets["held_out"] = [unseen.captions[i % len(unseen)] for i in range(max(SHOWN, options.samples // 4))]
    atomic_write_json(state.folder / "captions.json", {**sets, "shown": min(SHOWN, options.samples)})
    if not (state.folder / "latency.json").exists():
        judged_weights = {"weights": state.inputs["weights"]}
        atomic_write_json(state.folder / "latency.json", {**measure_latencies(pipeline, config), **judged_weights})
    latency = read_record(state.folder / "latency.json", Latencies, "this stage")["latency_ms"]

    pipeline.to(accelerator.device)
    metric = f"fid[{extractor.name},n={options.samples}]"
    sampling = sampling_of(pipeline, config.sampling.steps, config.sampling.guidance_scale)
    state.continue_at(
        next((i for i, name in enumerate(names) if not (state.folder / f"{name}.json").exists()), len(names))
    )
    for index in state.steps():
        name = names[index]
        cost = elastic_cost(pipeline.transformer.config, name)
        made = {
            key: generate_from_captions(
                pipeline, captions, subnet=name, seed=config.seed, batch_size=options.batch_size, **sampling
            )
            for key, captions in sets.items()
        }
        judged = judged_distance(metric, extractor.features(made["captions"]), real)
        result = {
            "name": name,
            "stage": "subnet",
            "path": str(config.folder("elastic")),
            "folder": "elastic",
            "weights": state.inputs["weights"],
            "parameters": cost.parameters,
            "flops": cost.flops,
            "bytes": {precision: cost.bytes(precision) for precision in BYTES},
            "latency_ms": latency.get(name, {}),
            **judged,
            "metrics": {**judged["metrics"], "validation_loss": trained.get("validation", {}).get(name)},
            "num_samples": options.samples,
            **sampling,
            "stamp": {
                **judged_by(extractor, images, options.samples),
                **sampling_stamp(pipeline, seed=config.seed, **sampling),
            },
        }
        if classifier is not None:
            result |= agreements(made, sets, classifier)
            state.log(agreement=result["class_agreement"])
        save_file({key: to_bytes(images) for key, images in made.items()}, state.folder / f"{name}.safetensors")
        atomic_write_json(state.folder / f"{name}.json", result)
        state.log(distance=judged["metrics"][metric])
    state.finish()


if __name__ == "__main__":
    recipe_main(run, __doc__, dry_run=print_estimate, check=partial(preflight, stages=(EVALUATE_ELASTIC,)))
