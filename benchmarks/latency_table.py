"""What a latency table is worth: networks that it was not fitted to, predicted and measured; what a choice saves.

    python benchmarks/latency_table.py [--preset DiT-S/2] [--layers 8] [--kinds onnxruntime-fp32 …] [--json] [--check]
    python benchmarks/latency_table.py --choices --preset DiT-XL/2

Makes a table for a random teacher of the preset's size, as the stage does: pinned threads, warm-up, interleaved rounds,
more of them while medians are noisy. It is judged by 16 whole networks from the cheapest genotype to the teacher, none
of which it was fitted to: mean and largest relative error, the mean error as a share of that of predicting the
networks' mean for each, Kendall's τ. --check: in every kind a mean error of at most 8 %, at most a quarter of the
baseline's, and τ of at least 0.9, on 16 networks of 20 ms or more.

--choices times networks of two layers instead, one for each choice of a menu, and prints the milliseconds that a layer
saves by it.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from diffusers_dit import fail

from edgedit_hf.menu_space import MenuSpace
from edgedit_hf.models.transformer_edgedit import EdgeDiTTransformer2DModel
from edgedit_hf.runtimes.runners import SessionRunner, example_inputs
from edgedit_hf.runtimes.sessions import open_session
from edgedit_hf.runtimes.timing import environment, governors, load, measure, paired_ratio, paired_timings, pinned
from edgedit_hf.search.latency_measurement import TableMeasurement
from edgedit_hf.search.latency_networks import HELD_OUT, Networks, timed_shapes
from edgedit_hf.search.latency_plan import LEAST_MS, noisy
from edgedit_hf.search_space import SearchSpace

KINDS = ("onnxruntime-fp32", "onnxruntime-int8", "executorch-int4")  # int4 is 8da4w
MENU = (
    {"mlp_ratio": 1.0},
    {"mlp_ratio": 2.0},
    {"mlp_ratio": 3.0},
    {"attention": 4 / 9},
    {"attention": 2 / 3},
    {"heads": 0.5},
    {"heads": 2.0},
    {"attention": 4 / 9, "mlp_ratio": 2.0},
    {"token_merge": 2},
)  # attention: of the hidden size, rounded to a width that the heads divide; heads: of the teacher's


def config_of(preset: str, layers: int | None) -> dict:
    """The config of a preset's model, without its weights."""
    with torch.device("meta"):
        model = EdgeDiTTransformer2DModel.from_preset(preset, **({} if layers is None else {"num_layers": layers}))
    return dict(model.config)


def menu_of(config: dict) -> list[dict]:
    """[`MENU`] in the sizes of a model."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    menu = []
    for entry in MENU:
        choice = {key: value for key, value in entry.items() if key in ("mlp_ratio", "token_merge")}
        if "attention" in entry:
            choice["attention_dim"] = max(1, round(width * entry["attention"] / (8 * heads))) * 8 * heads
        if "heads" in entry:
            choice["num_heads"] = max(1, int(heads * entry["heads"]))
        menu.append(choice)
    different = [choice for place, choice in enumerate(menu) if choice not in menu[:place]]
    return [choice for choice in different if choice.get("attention_dim", 0) < width]


def table_row(config: dict, kind: str, arguments: argparse.Namespace, folder: Path) -> dict:
    """A table and what it is worth."""
    runtime, precision = kind.split("-")
    started = time.monotonic()
    space = SearchSpace.for_config(config)
    measurement = TableMeasurement(
        config, space, batch=arguments.batch, threads=arguments.threads, runtime=runtime, precision=precision
    )
    with pinned(arguments.threads) as processors:
        before = load()
        measurement.lower(folder)
        lowered = time.monotonic() - started
        while measurement.rounds < arguments.repeats and not measurement.long_enough(arguments.max_seconds):
            measurement.round()
        while not measurement.long_enough(arguments.max_seconds) and measurement.unsettled(arguments.repeats):
            measurement.round()
        protocol = {
            "processors": processors,
            "governors": governors(processors or []),
            "load": [before, load()],
            "seconds_to_lower": round(lowered, 1),
            "seconds": round(time.monotonic() - started, 1),
        }
    data = measurement.table(protocol).to_dict()
    return {"kind": kind, **{key: data[key] for key in ("prediction", "protocol", "noisy", "blocks", "trunk_ms")}}


def choices_row(config: dict, kind: str, arguments: argparse.Namespace, folder: Path) -> list[dict]:
    """What each choice saves a layer: half of what networks of two such layers differ by."""
    runtime, precision = kind.split("-")
    space = MenuSpace.for_config(config, menu=menu_of(config))
    shapes = timed_shapes(space)
    kept = Networks(config, shapes, runtime, precision, arguments.batch, folder)
    inputs, original = example_inputs(config, arguments.batch), space.option_shape("original")
    networks = {(original,): (original,), **{shape: (shape,) * 2 for shape in shapes}}
    with pinned(arguments.threads):
        runners = {
            key: SessionRunner(open_session(kept.file(layers), arguments.threads), inputs)
            for key, layers in networks.items()
        }
        timings = measure(runners, repeats=arguments.repeats, max_seconds=arguments.max_seconds)
    paired = paired_timings(timings)
    layer = paired[original].median_ms - paired[(original,)].median_ms
    disturbed = set(noisy(paired))
    return [
        {
            "kind": kind,
            "choice": space.name_of(shape),
            "two_layers_ms": paired[shape].median_ms,
            "iqr_ms": paired[shape].iqr_ms,
            "noisy": shape in disturbed,
            "saved_ms": (paired[original].median_ms - paired[shape].median_ms) / 2,
            "saved_share": (paired[original].median_ms - paired[shape].median_ms) / 2 / layer,
            "ratio": paired_ratio(timings[original], timings[shape]),
        }
        for shape in shapes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="DiT-S/2")
    parser.add_argument("--layers", type=int, help="of the teacher; default 8, with --choices the preset's")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="runtime-precision")
    parser.add_argument("--choices", action="store_true", help="what each choice of a menu saves a layer, instead")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--max-seconds", type=float, default=200.0, help="of timed calls, a kind")
    parser.add_argument("--folder", type=Path, help="where lowered networks are kept for another run; default nowhere")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless every table keeps its bars")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    layers = arguments.layers if arguments.layers or arguments.choices else 8
    config = config_of(arguments.preset, layers)

    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.folder or Path(temporary)
        if arguments.choices:
            print(f"{'kind':<17} {'choice':<16} {'2 layers':>9} {'saved a layer':>14} {'of a layer':>10}")
        else:
            print(
                f"{'kind':<17} {'networks':>8} {'ms':>12} {'mean':>6} {'max':>6} {'ratio':>6} {'τ':>6} {'ρ':>6} "
                f"{'rounds':>6} {'noisy':>5}"
            )
        for kind in arguments.kinds:
            folder = root / f"{'choices-' if arguments.choices else ''}{kind}"
            if arguments.choices:
                found = choices_row(config, kind, arguments, folder)
                for row in found:
                    print(
                        f"{kind:<17} {row['choice']:<16} {row['two_layers_ms']:>6.1f} ms {row['saved_ms']:>11.2f} ms "
                        f"{row['saved_share']:>10.1%}{' noisy' if row['noisy'] else ''}",
                        flush=True,
                    )
                rows += found
                continue
            row = table_row(config, kind, arguments, folder)
            rows.append(row)
            said = row["prediction"]
            measured = [network["measured_ms"] for network in said["networks"]]
            print(
                f"{kind:<17} {len(measured):>8} {min(measured):>5.0f} – {max(measured):<4.0f} {said['mean']:>6.1%} "
                f"{said['max']:>6.1%} {said['ratio']:>6.3f} {said['kendall']:>6.3f} {said['spearman']:>6.3f} "
                f"{row['protocol']['rounds']:>6} {'yes' if row['noisy'] else 'no':>5}",
                flush=True,
            )
            for remark in said["remarks"]:
                print(f"  {remark}")
    if arguments.json:
        about = {"preset": arguments.preset, "layers": len(config["layers"]), "batch": arguments.batch}
        print(json.dumps({**about, "rows": rows, "environment": environment(arguments.threads)}))
    if arguments.check and not arguments.choices:
        problems = []
        for row in rows:
            said = row["prediction"]
            if not said["passed"]:
                problems.append(f"{row['kind']}: {'; '.join(said['remarks'])}")
            if len(said["networks"]) < HELD_OUT or said["least_ms"] < LEAST_MS:
                problems.append(
                    f"{row['kind']}: {len(said['networks'])} networks from {said['least_ms']:.1f} ms, at least "
                    f"{HELD_OUT} from {LEAST_MS:.0f} ms wanted; raise --batch or --layers"
                )
        fail(problems)


if __name__ == "__main__":
    main()
