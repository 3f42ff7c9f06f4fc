"""One image, from diffusers' DiTPipeline at DiT-XL/2's true size to what this package ships, and every stage between.

    python benchmarks/end_to_end.py [--runtimes onnxruntime executorch] [--rounds 3] [--json] [--check]

The rows: diffusers' DiTPipeline (50 steps, guidance 4) in fp32 and bf16; this package's pipeline around the same
network in fp32; around the compressed network, EdgeDiT-1; that with 4 steps and no guidance; and this one exported by
the code behind `optimum-cli export edgedit` at batch 1 with the conditioner split off, int8 in ONNX Runtime and 8da8w
in ExecuTorch, sampled by the loop of the export's own sample_min.py. All weights are random, which changes neither time
nor memory: the images mean nothing. With --layers N the networks have what became of the teacher's first N layers
alone, which tries the script, not the claim.

Seconds are those of the denoising, all steps of it, timed interleaved in one process. A row of many steps runs
--timed-steps of them (fewer where one takes long) and is multiplied, which the table marks with *. Peak memory is
that of a process of its own that makes one whole image, decoded by AutoencoderTiny in every row; for the exports that
process is `python sample_min.py`. Decoding by AutoencoderKL and by AutoencoderTiny has rows of its own, and the last
columns say what the whole image takes with each, decoded by the runtime of the row. Needs about 14 GB of memory.

--check: the denoising in ONNX Runtime int8 at least 100 times as fast as diffusers' in fp32 (200 times on a processor
with AMX), and the peak memory of its process at most .25 of that of diffusers'.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiTPipeline
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers_dit import AMX, fail, peak_bytes, random_diffusers_transformer, random_transformer, shortened

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import make_few_step_scheduler, make_scheduler
from edgedit_hf.export import sample_min
from edgedit_hf.export.exported import stem
from edgedit_hf.export.formats import MEASURED, ExportOptions
from edgedit_hf.export.lowering import LOWER, Lowering
from edgedit_hf.export.parts import DecoderWrapper, Part, vae_parts
from edgedit_hf.export.pipeline import export_pipeline
from edgedit_hf.few_step.schedule import few_step_timesteps
from edgedit_hf.runtimes.runners import SessionRunner, TorchRunner
from edgedit_hf.runtimes.sessions import open_session
from edgedit_hf.runtimes.timing import environment, measure, paired_ratio

LEAST_SPEED = 200 if AMX else 100
MOST_MEMORY = 0.25
LABEL = 207
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KL, TINY = "AutoencoderKL", "AutoencoderTiny"
# A program's peak resident memory, on its last line: python -c PEAK program.py [argument…]
PEAK = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    if end.code:
        raise
with open("/proc/self/status", encoding="ascii") as file:
    print(next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM")))
"""


@dataclass(frozen=True)
class Row:
    """A way to make the image: its runtime (`"diffusers"`, `"torch"` or a runtime of exports), the size of its network
    and the sampling.
    """

    label: str
    runtime: str
    network: str  # "teacher" or "student"
    dtype: str
    steps: int
    guidance: float

    @property
    def few(self) -> bool:
        """Whether its network is one for few steps without guidance."""
        return self.guidance == 1

    @property
    def forwards(self) -> int:
        """Forwards of one image each."""
        return self.steps * (1 if self.few else 2)


ROWS = {
    "diffusers-fp32": Row("diffusers' DiTPipeline, fp32", "diffusers", "teacher", "fp32", 50, 4.0),
    "diffusers-bf16": Row("diffusers' DiTPipeline, bf16", "diffusers", "teacher", "bf16", 50, 4.0),
    "teacher-fp32": Row("EdgeDiTPipeline, fp32", "torch", "teacher", "fp32", 50, 4.0),
    "compressed-fp32": Row("compressed", "torch", "student", "fp32", 50, 4.0),
    "few-step-fp32": Row("few steps, no guidance", "torch", "student", "fp32", 4, 1.0),
    "onnxruntime-int8": Row("ONNX Runtime, int8", "onnxruntime", "student", "int8", 4, 1.0),
    "executorch-8da8w": Row("ExecuTorch, 8da8w", "executorch", "student", "int8", 4, 1.0),
}
BASE, OURS = "diffusers-fp32", "onnxruntime-int8"


# -------------------------------------------------------------------- networks


def autoencoder(name: str, width: int) -> torch.nn.Module:
    """Random weights in the sizes of Stable Diffusion's autoencoder, which DiT decodes with, or of the tiny one
    (`width` 128; smaller to try the script).
    """
    torch.manual_seed(0)
    if name == TINY:
        channels = (width // 2,) * 4
        return AutoencoderTiny(encoder_block_out_channels=channels, decoder_block_out_channels=channels).eval()
    return AutoencoderKL(
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=min(32, width),
        sample_size=256,
    ).eval()


class NoDecoder(torch.nn.Module):
    """Decodes nothing, so that a DiTPipeline's call is its denoising alone."""

    config = SimpleNamespace(scaling_factor=1.0)
    device = torch.device("cpu")

    def decode(self, latents: torch.Tensor) -> DecoderOutput:
        return DecoderOutput(sample=latents)


def new_pipeline(row: Row, transformer: torch.nn.Module, vae: torch.nn.Module | None):
    """The pipeline of a row that runs in PyTorch (or is to be exported)."""
    scheduler = make_few_step_scheduler("epsilon") if row.few else make_scheduler("epsilon")
    if row.runtime == "diffusers":
        pipeline = DiTPipeline(transformer, NoDecoder() if vae is None else vae, scheduler)
    else:
        pipeline = EdgeDiTPipeline(
            transformer,
            scheduler,
            vae,
            default_steps=row.steps,
            default_guidance_scale=row.guidance,
            few_step_timesteps=few_step_timesteps("epsilon", row.steps) if row.few else None,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_pipeline(pipeline, row: Row, steps: int) -> None:
    """One image of label [`LABEL`], decoded where the pipeline has a decoder."""
    decoded = row.runtime == "diffusers" or pipeline.vae is not None
    pipeline(
        [LABEL],
        guidance_scale=row.guidance,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="np" if decoded else "latent",
    )


@cache
def random_network(preset: str, layers: int | None, dtype: str, diffusers: bool) -> torch.nn.Module:
    """The transformer of a row that runs in PyTorch; rows of the same one share it."""
    make = random_diffusers_transformer if diffusers else random_transformer
    return make(preset, DTYPES[dtype], **shortened(preset, layers))


def network_of(row: Row, arguments: argparse.Namespace) -> torch.nn.Module:
    """The same, for a row."""
    return random_network(getattr(arguments, row.network), arguments.layers, row.dtype, row.runtime == "diffusers")


# -------------------------------------------------------------------- exports


def export(arguments: argparse.Namespace, runtime: str, folder: Path) -> None:
    """Export the few-step pipeline for a runtime to `folder/<runtime>`, and AutoencoderKL's decoder beside it."""
    row = next(row for row in ROWS.values() if row.runtime == runtime)
    model = random_network(arguments.student, arguments.layers, "fp32", diffusers=False)
    pipeline = new_pipeline(row, model, autoencoder(TINY, arguments.vae_width))
    target = MEASURED[runtime]
    options = ExportOptions(
        format=target.name,
        dtype=row.dtype,
        batch=1,
        split_conditioner=True,
        threads=arguments.threads,
        bench_repeats=2,
        num_images=1,
    )
    export_pipeline(pipeline, folder / runtime, options)
    LOWER[target.name](kl_decoder(arguments), kl_file(folder, runtime), "fp32", {}, Lowering())


def kl_decoder(arguments: argparse.Namespace) -> Part:
    """AutoencoderKL's decoder for one image."""
    return vae_parts(autoencoder(KL, arguments.vae_width), (32, 32), 8, 4, 1)[0]


def kl_file(folder: Path, runtime: str) -> Path:
    """Where AutoencoderKL's decoder stands for a runtime."""
    return folder / f"{KL}{MEASURED[runtime].suffix}"


def exported_loop(folder: Path, threads: int) -> Callable[[], object]:
    """The denoising of an export by the loop of its sample_min.py: conditioner and denoiser, without the decoder."""
    contract = sample_min.read_contract(folder)
    entries = contract["artefacts"]
    del entries["decoder"]  # the loop then ends with the latents

    def opener(key: str):
        session = open_session(folder / entries[key]["file"], threads)
        names = [tensor["name"] for tensor in entries[key]["inputs"]]
        return lambda arrays: session.run(dict(zip(names, arrays)))

    artefacts = sample_min.Artefacts(contract, opener)
    noise = np.random.default_rng(0).standard_normal(contract["latents"]["shape"], dtype=np.float32)
    condition = sample_min.conditioning(contract, artefacts, LABEL)
    return partial(sample_min.sample, contract, artefacts, noise, condition)


# -------------------------------------------------------------------- measuring


def peak_of(arguments: argparse.Namespace, name: str, folder: Path) -> int:
    """Peak resident memory of a process of its own that makes one image in the way of a row."""
    row = ROWS[name]
    if row.runtime in MEASURED:
        image = folder / f"{name}.png"
        command = [sys.executable, "-c", PEAK, str(folder / row.runtime / "sample_min.py"), "--output", str(image)]
    else:
        command = [*own_command(arguments), "--peak", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.strip().splitlines()[-1])


def own_command(arguments: argparse.Namespace) -> list[str]:
    """This script again, for the same networks."""
    names = ("teacher", "student", "layers", "vae_width", "threads")
    options = {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in names}
    given = (part for option, value in options.items() if value is not None for part in (option, str(value)))
    return [sys.executable, __file__, *given]


def denoise(arguments: argparse.Namespace, names: list[str], folder: Path) -> dict[str, dict]:
    """Seconds of the denoising by row, and how many steps of it were timed."""
    calls, timed = {}, {}
    for name in names:
        row = ROWS[name]
        if row.runtime in MEASURED:
            calls[name], timed[name] = exported_loop(folder / row.runtime, arguments.threads), row.steps
            continue
        pipeline = new_pipeline(row, network_of(row, arguments), None)
        timed[name] = row.steps
        if not row.few:
            start = time.perf_counter()
            run_pipeline(pipeline, row, 1)
            possible = int(arguments.max_seconds / (time.perf_counter() - start))
            timed[name] = max(1, min(row.steps, arguments.timed_steps, possible))
        calls[name] = partial(run_pipeline, pipeline, row, timed[name])
    timings = measure(calls, warmup=0, repeats=arguments.rounds)
    factors = {name: ROWS[name].steps / timed[name] for name in names}
    return {
        name: {
            "seconds": timing.median_ms / 1e3 * factors[name],
            "ratio": paired_ratio(timings[BASE], timing) * factors[BASE] / factors[name],
            "timed_steps": timed[name],
        }
        for name, timing in timings.items()
    }


def decode(arguments: argparse.Namespace, folder: Path) -> list[dict]:
    """Seconds of decoding an image by every autoencoder in PyTorch and in the runtimes of the exports."""
    latents = {"latents": torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))}
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    weights = {}
    for name in (KL, TINY):
        vae = autoencoder(name, arguments.vae_width).requires_grad_(False)
        weights[name] = sum(p.numel() for p in vae.decoder.parameters())
        calls[name, "torch"] = TorchRunner(DecoderWrapper(vae), latents, arguments.threads)
        for runtime in arguments.runtimes:
            target = MEASURED[runtime]
            tiny = folder / runtime / "vae" / target.name / f"{stem('decoder')}{target.suffix}"
            path = kl_file(folder, runtime) if name == KL else tiny
            calls[name, runtime] = SessionRunner(open_session(path, arguments.threads), latents)
    timings = measure(calls, warmup=0, repeats=arguments.rounds)
    return [
        {"decoder": name, "runtime": runtime, "seconds": timing.median_ms / 1e3, "parameters": weights[name]}
        for (name, runtime), timing in timings.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="DiT-XL/2", help="a preset of 1,000 classes and 32 × 32 latents")
    parser.add_argument("--student", default="EdgeDiT-1", help="the same")
    parser.add_argument("--layers", type=int, help="of the teacher, and what became of them; default: all")
    parser.add_argument("--vae-width", type=int, default=128, help="channels of the autoencoders; 128 is the real size")
    parser.add_argument("--runtimes", nargs="+", choices=MEASURED, default=list(MEASURED), help="of the exports")
    parser.add_argument("--timed-steps", type=int, default=5, help="of a row of more steps")
    parser.add_argument("--max-seconds", type=float, default=40.0, help="of a timed call; such a row times fewer steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless the figures above are met")
    parser.add_argument("--export", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.export:
        export(arguments, arguments.export[0], Path(arguments.export[1]))
        return
    if arguments.peak:
        row = ROWS[arguments.peak]
        vae = autoencoder(TINY, arguments.vae_width).to(DTYPES[row.dtype])
        run_pipeline(new_pipeline(row, network_of(row, arguments), vae), row, row.steps if row.few else 1)
        print(peak_bytes())
        return

    names = [name for name, row in ROWS.items() if row.runtime not in MEASURED or row.runtime in arguments.runtimes]
    exports, peaks = {}, {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        for runtime in arguments.runtimes:
            start = time.monotonic()
            # Lowering a large network needs several times its size: not in this process.
            command = [*own_command(arguments), "--export", runtime, str(folder)]
            subprocess.run(command, check=True, stdout=sys.stderr)
            size = sum(file.stat().st_size for file in (folder / runtime / "transformer").rglob("*"))
            exports[runtime] = {"seconds": time.monotonic() - start, "transformer_bytes": size}
        peaks = {name: peak_of(arguments, name, folder) for name in names}
        decoders = decode(arguments, folder)
        measured = denoise(arguments, names, folder)
    seconds = {(entry["decoder"], entry["runtime"]): entry["seconds"] for entry in decoders}
    rows = []
    for name in names:
        row, found = ROWS[name], measured[name]
        runtime = "torch" if row.runtime == "diffusers" else row.runtime
        rows.append(
            {
                "row": name,
                "network": getattr(arguments, row.network),
                "steps": row.steps,
                "guidance": row.guidance,
                "forwards": row.forwards,
                **found,
                "peak_bytes": peaks[name],
                "memory_ratio": peaks[name] / peaks[BASE],
                "whole_seconds": {decoder: found["seconds"] + seconds[decoder, runtime] for decoder in (KL, TINY)},
            }
        )
    print_table(rows, decoders, exports, arguments)
    if arguments.json:
        found = {"weights": "random", "amx": AMX, "rows": rows, "decoders": decoders, "exports": exports}
        print(json.dumps({**found, "environment": environment(arguments.threads)}))
    if arguments.check:
        fail(problems(rows))


def print_table(rows: list[dict], decoders: list[dict], exports: dict, arguments: argparse.Namespace) -> None:
    """A line a way to make the image, a line a decoder."""
    print(
        f"one image of 256 × 256, random weights, {arguments.threads} threads, {'AMX' if AMX else 'no AMX'}; seconds "
        "of the denoising, and of the whole image decoded by AutoencoderKL and by AutoencoderTiny"
    )
    print(
        f"{'':<30} {'network':<10} {'steps':>5} {'timed':>6} {'forwards':>8} {'seconds':>8} {'ratio':>8} "
        f"{'peak MB':>8} {'of it':>6} {'with KL':>8} {'with tiny':>9}"
    )
    for row in rows:
        timed, whole = f"{row['timed_steps']}{'*' if row['timed_steps'] < row['steps'] else ' '}", row["whole_seconds"]
        print(
            f"{ROWS[row['row']].label:<30} {row['network']:<10} {row['steps']:>5} {timed:>6} {row['forwards']:>8} "
            f"{row['seconds']:>8.2f} {row['ratio']:>8.2f} {row['peak_bytes'] / 1e6:>8.0f} "
            f"{row['memory_ratio']:>6.3f} {whole[KL]:>8.2f} {whole[TINY]:>9.2f}"
        )
    print("* the seconds of these steps are multiplied to all steps")
    print(f"{'decoding':<30} {'runtime':<12} {'seconds':>8} {'weights, M':>11}")
    for entry in decoders:
        print(
            f"{entry['decoder']:<30} {entry['runtime']:<12} {entry['seconds']:>8.3f} {entry['parameters'] / 1e6:>11.2f}"
        )
    for runtime, entry in exports.items():
        print(
            f"export for {runtime}: {entry['seconds']:.0f} s, {entry['transformer_bytes'] / 1e6:.0f} MB without decoder"
        )


def problems(rows: list[dict]) -> list[str]:
    """What is not as --check demands."""
    ours = next((row for row in rows if row["row"] == OURS), None)
    if ours is None:
        return [f"{OURS} did not run; leave onnxruntime in --runtimes"]
    found = []
    if ours["ratio"] < LEAST_SPEED:
        found.append(f"{OURS} denoises {ours['ratio']:.1f} times as fast as {BASE}, at least {LEAST_SPEED} wanted")
    if ours["memory_ratio"] > MOST_MEMORY:
        found.append(f"{OURS} peaks at {ours['memory_ratio']:.3f} of {BASE}'s memory, at most {MOST_MEMORY} wanted")
    return found


if __name__ == "__main__":
    main()
