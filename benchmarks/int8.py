"""The int8 path for PyTorch users: the exported int8 denoiser behind the same call, against eager fp32 and bf16.

    python benchmarks/int8.py [--preset DiT-XL/2] [--batches 1 2] [--json] [--check]

Exports a random network of the preset's size to dynamic int8 (signed per-channel weights) in a process of its own,
loads it back as the component that `DiffusionPipeline.from_pretrained` gives, and times it interleaved with the eager
model in fp32 and bf16. --check: at least 1.3 times the faster of the two.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers_dit import fail, random_transformer

from edgedit_hf.export.components import OnnxEdgeDiTTransformer2DModel
from edgedit_hf.export.lowering import lower_denoiser
from edgedit_hf.export.wrappers import DenoiserWrapper, plain_config
from edgedit_hf.runtimes.runners import TorchRunner, example_inputs
from edgedit_hf.runtimes.timing import environment, measure, paired_ratio

REQUIRED = 1.3


def export(preset: str, folder: Path) -> None:
    """Write the int8 component of a random network."""
    model = random_transformer(preset, torch.float32)
    component = OnnxEdgeDiTTransformer2DModel(**plain_config(model), precision="int8", batch="dynamic", split=False)
    component.save_config(folder / "transformer")
    lower_denoiser(model, folder / "transformer" / component.part_file("denoiser"), "onnx", "int8")


def int8_runner(component: OnnxEdgeDiTTransformer2DModel, batch: int):
    """A callable that runs the component as the pipeline does, tensors in, tensor out."""
    inputs = tuple(example_inputs(component.config, batch).values())
    return lambda: component(*inputs, return_dict=False)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="DiT-XL/2")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--max-seconds", type=float, default=100.0, help="of timed calls, a batch")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 unless int8 is {REQUIRED} times as fast")
    parser.add_argument("--export-to", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.export_to:
        export(arguments.preset, arguments.export_to)
        return

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--preset", arguments.preset, "--export-to", folder]
        subprocess.run(
            command, check=True
        )  # quantising a large network needs several times its size: not in this process
        component = OnnxEdgeDiTTransformer2DModel.from_pretrained(
            Path(folder, "transformer"), num_threads=arguments.threads
        )
        models = {
            "fp32": random_transformer(arguments.preset, torch.float32),
            "bf16": random_transformer(arguments.preset, torch.bfloat16),
        }
        print(f"{'batch':>5} {'fp32':>9} {'bf16':>9} {'int8':>9} {'speedup':>8} {'error':>8}")
        for batch in arguments.batches:
            calls: dict = {}
            for name, model in models.items():
                inputs = example_inputs(model.config, batch, dtype=model.dtype)
                calls[name] = TorchRunner(DenoiserWrapper(model), inputs, arguments.threads)
            calls["int8"] = int8_runner(component, batch)
            reference = calls["fp32"]()
            timings = measure(calls, warmup=1, repeats=arguments.repeats, max_seconds=arguments.max_seconds)
            row = {
                "batch": batch,
                "ms": {name: timing.median_ms for name, timing in timings.items()},
                "speedup": min(paired_ratio(timings[name], timings["int8"]) for name in models),
                "relative_error": ((calls["int8"]() - reference).norm() / reference.norm()).item(),
            }
            rows.append(row)
            times = " ".join(f"{row['ms'][name]:>6.0f} ms" for name in (*models, "int8"))
            print(f"{batch:>5} {times} {row['speedup']:>8.3f} {row['relative_error']:>8.3f}", flush=True)
    if arguments.json:
        print(json.dumps({"preset": arguments.preset, "rows": rows, "environment": environment(arguments.threads)}))
    if arguments.check:
        slow = [
            f"batch {r['batch']}: int8 {r['speedup']:.3f} times as fast, at least {REQUIRED} wanted"
            for r in rows
            if r["speedup"] < REQUIRED
        ]
        fail(slow)


if __name__ == "__main__":
    main()
