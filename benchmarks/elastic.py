"""What elasticity costs: one supernet against its three networks trained apart, on the captioned digits.

    python benchmarks/elastic.py [--steps 1500] [--batch-size 32] [--threads 2] [--json] [--check]

The supernet trains for some steps by training/train_elastic.py: the full net in every step, one narrower network drawn
in each. Each of the three networks is then trained alone for as many steps by the same recipe (data, noise, learning
rate), which is more than the narrow ones were drawn. Printed: validation losses (flow loss of the averaged
weights on held-out images at the same noise and timesteps), seconds of training (validation apart), the time of a
switch, and the forward of an active sub-network against that of its extracted twin (paired rounds within one process;
at small batches the price of slicing shows, a few µs a layer). SnapGen++ has 0.5093 elastic against 0.5090 alone for
its 0.4 B network on ImageNet.

--check fails unless every width's loss is at most 1.02 times that of the network alone, the supernet trains in at most
0.92 times the three networks' time, a switch takes less than 1 ms, and an active sub-network's forward at most 1.05
times its twin's.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from edgedit_hf.files import read_json
from edgedit_hf.models.transformer_elastic_dit import ElasticDiTTransformer2DModel
from edgedit_hf.run.config import load_config
from edgedit_hf.run.launch import make_accelerator
from edgedit_hf.run.outputs import check_output
from edgedit_hf.runtimes.timing import environment, measure, paired_ratio
from edgedit_hf.training import train_elastic, train_text_encoders

ROOT = Path(__file__).resolve().parents[1]

REQUIRED_LOSS, REQUIRED_TIME, REQUIRED_SWITCH_MS, REQUIRED_FORWARD = 1.02, 0.92, 1.0, 1.05
SWITCHES, TOKENS = 1000, 12


def train(arguments: argparse.Namespace, folder: Path, name: str, model: str) -> dict:
    """Train one network by the recipe; its validation losses, seconds of training, and how often its sub-networks were
    drawn.
    """
    overrides = [
        f"output_dir={folder / name}",
        f"threads={arguments.threads}",
        f"text.encoder={folder / 'text' / 'text_encoder'}",
        f"text.encoder_2={folder / 'text' / 'text_encoder_2'}",
        f"elastic.model={model}",
        f"elastic.steps={arguments.steps}",
        f"elastic.batch_size={arguments.batch_size}",
        f"elastic.validation_samples={arguments.validation_samples}",
        "elastic.subnets=null",
        f"elastic.checkpoint_every={arguments.steps}",
    ]
    config = load_config(arguments.config, [*arguments.override, *overrides])
    train_elastic.run(config, make_accelerator(config))
    stage = read_json(folder / name / "elastic" / "stage.json", "the benchmark")
    last = json.loads((folder / name / "elastic" / "telemetry.jsonl").read_text().splitlines()[-1])
    return {"validation": stage["validation"], "seconds": last["seconds"], "sampled": stage["sampled"]}


def forwards(model: ElasticDiTTransformer2DModel, batch: int, repeats: int) -> dict[str, float]:
    """Paired ratio of an active sub-network's forward to its extracted twin's, a width."""
    size, dims = model.config.sample_size, model.config.text_dims
    x, t = torch.randn(batch, model.config.in_channels, size, size), torch.full((batch,), 500.0)
    text, masks = (
        [torch.randn(batch, TOKENS, dim) for dim in dims],
        [torch.ones(batch, TOKENS, dtype=torch.bool) for _ in dims],
    )

    def active(name: str) -> None:
        model.set_active_subnet(name)
        model(x, t, text, masks)

    ways = {}
    for name in model.subnet_names:
        ways[f"{name} active"] = partial(active, name)
        ways[f"{name} twin"] = partial(model.extract_subnet(name), x, t, text, masks)
    with torch.inference_mode():
        timings = measure(ways, repeats=repeats)
    return {name: paired_ratio(timings[f"{name} active"], timings[f"{name} twin"]) for name in model.subnet_names}


def switch_ms(model: ElasticDiTTransformer2DModel) -> float:
    """Median milliseconds of `set_active_subnet`."""
    samples = []
    for index in range(SWITCHES):
        name = model.subnet_names[index % len(model.subnet_names)]
        start = time.perf_counter()
        model.set_active_subnet(name)
        samples.append(1e3 * (time.perf_counter() - start))
    return statistics.median(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "training" / "recipes" / "digits-t2i.yaml",
        help="the recipe of all four networks",
    )
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the recipe, e.g. elastic.distillation=0.5",
    )
    parser.add_argument("--model", default="elastic-dit-digits", help="preset of the supernet")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--validation-samples", type=int, default=320)
    parser.add_argument("--forward-batch", type=int, default=64, help="images of the timed forwards")
    parser.add_argument("--repeats", type=int, default=60, help="rounds of the forwards")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--output", type=Path, help="folder of the four runs, which a second call continues; default: a temporary one"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless the four ratios are met")
    arguments = parser.parse_args()

    if arguments.output is not None:
        check_output(arguments.output, [arguments.config], foreign=None)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output or Path(temporary)
        config = load_config(
            arguments.config, [*arguments.override, f"output_dir={folder}", f"threads={arguments.threads}"]
        )
        train_text_encoders.run(config, make_accelerator(config))
        supernet = train(arguments, folder, "supernet", arguments.model)
        model = ElasticDiTTransformer2DModel.from_pretrained(folder / "supernet" / "elastic" / "transformer").eval()
        alone, parameters = {}, {}
        for name in model.subnet_names:
            model.set_active_subnet(name)
            (folder / f"{name}.json").write_text(json.dumps(model.active_subnet_config()))
            alone[name] = train(arguments, folder, f"{name}-alone", str(folder / f"{name}.json"))
            parameters[name] = sum(p.numel() for p in model.extract_subnet(name).parameters())
    ratios = {name: supernet["validation"][name] / run["validation"]["full"] for name, run in alone.items()}
    time_ratio = supernet["seconds"] / sum(run["seconds"] for run in alone.values())
    switch, forward = switch_ms(model), forwards(model, arguments.forward_batch, arguments.repeats)
    drawn = {**supernet["sampled"], model.subnet_names[-1]: arguments.steps}
    print(
        f"{arguments.model}, {arguments.steps} steps of {arguments.batch_size} captioned digits, {arguments.threads} "
        "threads"
    )
    print(
        f"{'network':<9}{'parameters':>12}{'steps in supernet':>19}{'steps alone':>13}{'loss in supernet':>18}"
        f"{'loss alone':>12}{'ratio':>8}{'forward':>9}"
    )
    for name, run in alone.items():
        losses = f"{supernet['validation'][name]:>18.4f}{run['validation']['full']:>12.4f}"
        losses += f"{ratios[name]:>8.4f}{forward[name]:>9.3f}"
        print(f"{name:<9}{parameters[name]:>12,}{drawn[name]:>19}{arguments.steps:>13}{losses}")
    each = " + ".join(f"{run['seconds']:.0f}" for run in alone.values())
    print(
        f"training: supernet {supernet['seconds']:.0f} s, the three alone {each} s, ratio {time_ratio:.3f}; a switch "
        f"takes {1e3 * switch:.2f} µs"
    )
    if arguments.json:
        result = {
            "steps": arguments.steps,
            "steps_in_supernet": drawn,
            "parameters": parameters,
            "loss_supernet": supernet["validation"],
            "loss_alone": {name: run["validation"]["full"] for name, run in alone.items()},
            "loss_ratio": ratios,
            "seconds_supernet": supernet["seconds"],
            "seconds_alone": {name: run["seconds"] for name, run in alone.items()},
            "time_ratio": time_ratio,
            "switch_ms": switch,
            "forward_ratio": forward,
            "environment": environment(arguments.threads),
        }
        print(json.dumps(result))
    met = max(ratios.values()) <= REQUIRED_LOSS and time_ratio <= REQUIRED_TIME
    if arguments.check and not (met and switch < REQUIRED_SWITCH_MS and max(forward.values()) <= REQUIRED_FORWARD):
        sys.exit(
            f"required: losses at most {REQUIRED_LOSS}×, time at most {REQUIRED_TIME}×, a switch under 1 ms, forwards "
            f"at most {REQUIRED_FORWARD}×"
        )


if __name__ == "__main__":
    main()
