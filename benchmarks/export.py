"""Every runtime and precision side by side: DiT-XL/2-shaped blocks, a whole trained net, and the paper's students
against their teacher.

    python benchmarks/export.py [--model PIPELINE] [--parts blocks trained students] [--ways onnx-int8 …]
    [--json] [--check]

blocks: a network of --layers DiT-XL/2 layers (random weights; latency does not depend on them), timed interleaved in
eager PyTorch (fp32, bf16), ONNX Runtime (fp32, fp16, int8 with dynamic and with static activations, 4-bit weights) and
ExecuTorch with XNNPACK (fp32, 8da8w, 8da4w); bytes of the files, error of the output, and the conditioner split off:
bytes that stay resident and time of a step, with and without it.

trained: a trained pipeline (--model; default: the digits teacher is trained first) exported in every way by the code
behind `optimum-cli export edgedit`: error of a forward, PSNR of the images after the loop, and which layers of the
4-bit exports needed 8 bits.

students: `named_students.py` in both runtimes: EdgeDiT-1 and -6 against DiT-XL/2, whole networks.

--check, of the parts that run: ONNX Runtime fp32 at least as fast as eager and its int8 4 times as fast as its fp32
(2.5 times on a processor without AMX, whose int8 products are at most 4 times as fast as fp32's); ExecuTorch fp32 at
least .85 of eager's speed, 8da8w and 8da4w twice as fast as it; the 8da4w file at most .17 of the fp32 bytes; images of
the trained net at 25 dB or more in every quantised export; the students' speed-up at least .97 of the FLOP ratio.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers_dit import AMX, fail, random_transformer

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.export.executorch.lower import lower_executorch
from edgedit_hf.export.formats import ExportOptions
from edgedit_hf.export.onnx.lower import lower_onnx
from edgedit_hf.export.parts import edgedit_parts
from edgedit_hf.export.pipeline import export_pipeline
from edgedit_hf.export.verify import relative_error
from edgedit_hf.quantization.activations import activation_scales
from edgedit_hf.quantization.calibration import input_ranges, record
from edgedit_hf.runtimes.footprint import footprint
from edgedit_hf.runtimes.runners import SessionRunner, TorchRunner
from edgedit_hf.runtimes.sessions import open_session
from edgedit_hf.runtimes.timing import environment, measure, paired_ratio

HERE = Path(__file__).resolve().parent
# Faster than what, and by how much: (name, against, least ratio of their times).
SPEED = (
    ("onnxruntime-fp32", "torch-fp32", 1.0),
    ("onnxruntime-int8", "onnxruntime-fp32", 4.0 if AMX else 2.5),
    ("executorch-fp32", "torch-fp32", 0.85),
    ("executorch-8da8w", "executorch-fp32", 2.0),
    ("executorch-8da4w", "executorch-fp32", 2.0),
)
SIZE = 0.17  # of the fp32 bytes, at most, in 8da4w
DECIBELS, STUDENTS = 25.0, 0.97
WAYS = (  # format, dtype and what else, of the trained net
    ("onnx", "fp32", {}),
    ("onnx", "fp16", {}),
    ("onnx", "int8", {}),
    ("onnx", "int8", {"activations": "static"}),
    ("onnx", "int8", {"activations": "by-timestep"}),
    ("onnx", "int4", {}),
    ("onnx", "int4", {"weights": "gptq"}),
    ("executorch", "fp32", {}),
    ("executorch", "int8", {}),
    ("executorch", "int4", {}),
    ("executorch", "int4", {"weights": "gptq"}),
)
WAY_NAMES = ["-".join([format, dtype, *options.values()]) for format, dtype, options in WAYS]


def artefact(path: Path, inputs: dict[str, torch.Tensor], threads: int) -> SessionRunner:
    """A run of a file."""
    return SessionRunner(open_session(path, threads), inputs)


def blocks(arguments, folder: Path) -> dict:
    """Times, bytes and errors of the XL blocks in every form."""
    model = random_transformer("DiT-XL/2", torch.float32, num_layers=arguments.layers)
    size = (model.config.sample_size,) * 2
    (whole,) = edgedit_parts(model, size, arguments.batch, split=False)
    conditioner, split = edgedit_parts(model, size, arguments.batch, split=True)
    facts: dict[str, str] = {}
    pipeline = EdgeDiTPipeline(model, make_scheduler(model.config.prediction_type), default_steps=4)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    timesteps, ranges = input_ranges(model, record(pipeline, arguments.batch).calls, layers)
    files = {f"onnxruntime-{name}": folder / f"{name}.onnx" for name in ("fp32", "fp16", "int8", "int8-static", "int4")}
    for name in ("fp32", "fp16", "int8", "int4"):
        lower_onnx(whole, files[f"onnxruntime-{name}"], name, facts, open_sizes=())
    lower_onnx(
        whole,
        files["onnxruntime-int8-static"],
        "int8",
        facts,
        open_sizes=(),
        scales=activation_scales(timesteps, ranges),
        layers=model,
    )
    delegation = {}
    for name, precision in (("fp32", "fp32"), ("8da8w", "int8"), ("8da4w", "int4")):
        files[f"executorch-{name}"] = folder / f"{name}.pte"
        delegation[name] = lower_executorch(whole, files[f"executorch-{name}"], precision, facts)["delegation"]
    half = random_transformer("DiT-XL/2", torch.bfloat16, num_layers=arguments.layers)
    (halved,) = edgedit_parts(half, size, arguments.batch, split=False)
    calls = {
        "torch-fp32": TorchRunner(whole.module, whole.inputs, arguments.threads),
        "torch-bf16": TorchRunner(
            halved.module, {**whole.inputs, "sample": whole.inputs["sample"].bfloat16()}, arguments.threads
        ),
        **{name: artefact(path, whole.inputs, arguments.threads) for name, path in files.items()},
    }
    reference = calls["torch-fp32"]()
    errors = {name: relative_error(torch.from_numpy(calls[name]()[0]), reference) for name in files}
    timings = measure(calls, warmup=1, repeats=arguments.repeats, max_seconds=arguments.max_seconds)
    fp32_bytes = 4 * sum(p.numel() for p in model.parameters())
    rows = []
    print(
        f"{arguments.layers} DiT-XL/2 layers, batch {arguments.batch}, {arguments.threads} threads, "
        f"{'AMX' if AMX else 'no AMX'}"
    )
    print(f"{'form':<26} {'ms':>8} {'eager/it':>9} {'MB':>8} {'of fp32':>8} {'error':>9}")
    for name, timing in timings.items():
        stored = files[name].stat().st_size if name in files else None
        row = {
            "form": name,
            "ms": timing.median_ms,
            "speedup": paired_ratio(timings["torch-fp32"], timing),
            "bytes": stored,
            "error": errors.get(name),
        }
        rows.append(row)
        size_of = f"{stored / 1e6:>8.1f} {stored / fp32_bytes:>8.3f}" if stored else f"{'':>17}"
        error = "" if row["error"] is None else f"{row['error']:>9.2e}"
        print(f"{name:<26} {timing.median_ms:>8.1f} {row['speedup']:>9.3f} {size_of} {error}", flush=True)
    ratios = {f"{name} over {other}": paired_ratio(timings[other], timings[name]) for name, other, _ in SPEED}
    print("\n".join(f"{name}: {ratio:.3f}" for name, ratio in ratios.items()))

    # What splitting the conditioner off saves, in the forms that ship.
    parts, halves = [], {}
    for name, precision, suffix in (("onnxruntime-int8", "int8", "onnx"), ("executorch-8da4w", "int4", "pte")):
        lower = (
            (lambda part, path, p: lower_onnx(part, path, p, facts, open_sizes=()))
            if suffix == "onnx"
            else lower_executorch
        )
        for part in (conditioner, split):
            path = folder / f"split-{part.name}.{suffix}"
            lower(part, path, precision)
            halves[f"{name} {part.name}"] = artefact(path, part.inputs, arguments.threads)
        halves[f"{name} whole"] = calls[name]
    timed = measure(halves, warmup=1, repeats=arguments.repeats, max_seconds=arguments.max_seconds)
    print(f"\n{'conditioner split off':<38} {'ms a step':>9} {'MB file':>8} {'MB resident':>12}")
    for name, suffix in (("onnxruntime-int8", "onnx"), ("executorch-8da4w", "pte")):
        for part, path in (
            (whole, files[name]),
            (split, folder / f"split-denoiser.{suffix}"),
            (conditioner, folder / f"split-conditioner.{suffix}"),
        ):
            label = f"{name} {'whole' if part is whole else part.name}"
            held = footprint(path, part.inputs, arguments.threads)
            row = {"form": label, "ms": timed[label].median_ms, "bytes": path.stat().st_size, **held}
            parts.append(row)
            print(
                f"{label:<38} {row['ms']:>9.1f} {row['bytes'] / 1e6:>8.1f} "
                f"{(held['resident_bytes'] or 0) / 1e6:>12.1f}",
                flush=True,
            )
    shares = {name: entry["portable_share"] for name, entry in delegation.items()}
    print(
        "share of time outside XNNPACK: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
    )
    return {"rows": rows, "ratios": ratios, "split": parts, "fp32_bytes": fp32_bytes, "portable_share": shares}


def trained(arguments, folder: Path) -> list[dict]:
    """Error, PSNR and layers of 8 bits of a trained net in every export."""
    source = arguments.model
    if source is None:
        recipe = [
            "--config",
            "recipes/digits.yaml",
            "--override",
            f"output_dir={folder / 'run'}",
            "--override",
            f"threads={arguments.threads}",
        ]
        subprocess.run(
            [sys.executable, "train_teacher.py", *recipe], cwd=HERE.parent / "training", check=True, stdout=sys.stderr
        )
        source = folder / "run" / "teacher"
    print(f"\n{source}\n{'export':<34} {'error':>9} {'PSNR dB':>8} {'MB':>7} {'ms':>7} {'layers of 8 bits'}")
    rows = []
    for name, (format, dtype, options) in zip(WAY_NAMES, WAYS):
        if name not in arguments.ways:
            continue
        output = folder / name
        export_pipeline(
            source,
            output,
            ExportOptions(format=format, dtype=dtype, threads=arguments.threads, bench_batches=(2,), **options),
        )
        verified, cost = (json.loads((output / name).read_text()) for name in ("verify.json", "bench.json"))
        latency = next(
            t["median_ms"] for name, t in cost["latency"][0]["timings"].items() if not name.startswith("torch")
        )
        row = {
            "export": output.name,
            "error": verified["relative_error"],
            "psnr_db": verified["psnr_db"],
            "bytes": cost["file_bytes"],
            "ms": latency,
        }
        row["layers_of_8_bits"] = verified.get("layers_of_8_bits", [])
        rows.append(row)
        decibels = "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        kept = ", ".join(row["layers_of_8_bits"])
        print(
            f"{row['export']:<34} {row['error']:>9.2e} {decibels:>8} {row['bytes'] / 1e6:>7.2f} {latency:>7.2f} {kept}",
            flush=True,
        )
    return rows


def students(arguments) -> dict:
    """EdgeDiT-1 and -6 against DiT-XL/2 in both runtimes."""
    command = [
        sys.executable,
        str(HERE / "named_students.py"),
        "--runtimes",
        "onnxruntime",
        "executorch",
        "--json",
        "--threads",
        str(arguments.threads),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    *lines, last = done.stdout.strip().splitlines()
    print("\n" + "\n".join(lines), flush=True)
    return json.loads(last)


def problems(found: dict) -> list[str]:
    """What is not as --check demands."""
    missing = []
    if "blocks" in found:
        ratios, rows = found["blocks"]["ratios"], {row["form"]: row for row in found["blocks"]["rows"]}
        for name, other, least in SPEED:
            if ratios[f"{name} over {other}"] < least:
                missing.append(
                    f"{name} is {ratios[f'{name} over {other}']:.3f} times as fast as {other}, {least} wanted"
                )
        share = rows["executorch-8da4w"]["bytes"] / found["blocks"]["fp32_bytes"]
        if share > SIZE:
            missing.append(f"the 8da4w file has {share:.3f} of the fp32 bytes, at most {SIZE} wanted")
    for row in found.get("trained", []):
        if row["psnr_db"] is not None and row["psnr_db"] < DECIBELS:
            missing.append(f"{row['export']}: images at {row['psnr_db']:.1f} dB, {DECIBELS} wanted")
    for row in found.get("students", {}).get("rows", []):
        if row["share"] < STUDENTS:
            missing.append(
                f"{row['network']} in {row['runtime']}: {row['share']:.3f} of the FLOP ratio, {STUDENTS} wanted"
            )
    return missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=("blocks", "trained", "students"), default=["blocks", "trained", "students"]
    )
    parser.add_argument("--model", type=Path, help="a trained pipeline; default: the digits teacher is trained first")
    parser.add_argument("--ways", nargs="+", choices=WAY_NAMES, default=WAY_NAMES, help="exports of the trained net")
    parser.add_argument("--layers", type=int, default=4, help="DiT-XL/2 layers")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--max-seconds", type=float, default=60.0, help="of timed calls, a comparison")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless the requirements are met")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        if "blocks" in arguments.parts:
            found["blocks"] = blocks(arguments, Path(folder))
        if "trained" in arguments.parts:
            found["trained"] = trained(arguments, Path(folder))
    if "students" in arguments.parts:
        found["students"] = students(arguments)
    if arguments.json:
        print(json.dumps({**found, "environment": environment(arguments.threads)}))
    if arguments.check:
        fail(problems(found))


if __name__ == "__main__":
    main()
