"""Latency of the paper's students EdgeDiT-1 and EdgeDiT-6 against their teacher DiT-XL/2, side by side in three
runtimes.

    python benchmarks/named_students.py [--runtimes torch onnxruntime executorch] [--batch 1] [--run RUN] [--layers N]
    [--json] [--check]

Every network is exported (ONNX Runtime, ExecuTorch) in a process of its own and then timed interleaved with the others
of its runtime, fp32. In PyTorch it runs as in the pipeline, with its modulations computed beforehand.
Latency does not depend on the weights, which are random; with --run, the folder of a run with an XL teacher and bank,
the students are first assembled from the bank, saved, loaded and sampled, and these are the networks that are timed.
With --layers N all three have what became of the teacher's first N layers alone, which tries the script, not the claim.
The figures to compare with are the ratio of the FLOPs and the published speed-ups on phones. --check: at least 0.97 of
the FLOP ratio in every runtime.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers_dit import fail, preset_config, random_transformer, shortened

from edgedit_hf import EdgeDiTPipeline, EdgeDiTTransformer2DModel, Genotype
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.export.formats import MEASURED
from edgedit_hf.pipelines.loading import load_pipeline
from edgedit_hf.run.stage import maker_of
from edgedit_hf.runtimes.runners import SessionRunner, example_inputs
from edgedit_hf.runtimes.sessions import open_session
from edgedit_hf.runtimes.timing import environment, measure, paired_ratio
from edgedit_hf.search_space import model_cost

TEACHER, STUDENTS = "DiT-XL/2", ("EdgeDiT-1", "EdgeDiT-6")
# The paper's latencies in ms (EdgeDiT, arXiv:2603.28405).
PUBLISHED_MS = {
    "iPhone": {TEACHER: 118.56, "EdgeDiT-1": 70.86, "EdgeDiT-6": 72.53},
    "S25 Ultra": {TEACHER: 129.00, "EdgeDiT-1": 86.13, "EdgeDiT-6": 89.22},
}
RUNTIMES = ("torch", *MEASURED)
REQUIRED = 0.97


def config_of(name: str, layers: int | None):
    """The config of a named network."""
    return preset_config(name, **shortened(name, layers))


def network(name: str, folder: Path | None, layers: int | None) -> EdgeDiTTransformer2DModel:
    """A named network: assembled earlier, or random."""
    if folder is not None and (folder / name).is_dir():
        return EdgeDiTTransformer2DModel.from_pretrained(folder / name / "transformer")
    return random_transformer(name, torch.float32, **shortened(name, layers))


def assemble(run: Path, folder: Path) -> None:
    """Both students from a run's bank: assembled, saved as pipelines, loaded and sampled."""
    teacher = load_pipeline(run / "teacher", maker_of("teacher").made_by)
    bank = ProxyBank(run / "bank", teacher.transformer)
    for name in STUDENTS:
        config = preset_config(name)
        student = bank.assemble(Genotype.of(config))
        pipeline = EdgeDiTPipeline(student, make_scheduler(student.config.prediction_type))
        pipeline.save_pretrained(folder / name.replace("/", "-"))
        loaded = DiffusionPipeline.from_pretrained(folder / name)
        loaded.set_progress_bar_config(disable=True)
        latents = loaded(
            [207], num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0)
        ).images
        parameters = sum(p.numel() for p in loaded.transformer.parameters())
        print(
            f"{name}: assembled, saved, loaded and sampled; {parameters / 1e6:.2f} M weights, latents finite: "
            f"{bool(latents.isfinite().all())}"
        )
        if not latents.isfinite().all():
            sys.exit(f"{name} samples values that are not finite.")


def export(name: str, runtime: str, batch: int, path: Path, folder: Path | None, layers: int | None) -> None:
    """Write one network for one runtime."""
    from edgedit_hf.export.lowering import lower_denoiser

    lower_denoiser(network(name, folder, layers), path, MEASURED[runtime].name, batch=batch)


def sampling_step(model: EdgeDiTTransformer2DModel, batch: int):
    """A forward as the pipeline runs it: with the modulations computed before the first step."""
    inputs = example_inputs(model.config, batch)
    table = model.precompute_modulation(inputs["timestep"][:1], inputs["class_labels"])[0]

    @torch.inference_mode()
    def run():
        return model(inputs["sample"], None, modulation=table).sample

    return run


def runners(arguments, runtime: str, scratch: Path, folder: Path | None) -> dict:
    """A callable a network."""
    found = {}
    for name in (TEACHER, *STUDENTS):
        if runtime == "torch":
            found[name] = sampling_step(network(name, folder, arguments.layers), arguments.batch)
            continue
        path = scratch / f"{name.replace('/', '-')}{MEASURED[runtime].suffix}"
        command = [sys.executable, __file__, "--export", name, runtime, str(path), "--batch", str(arguments.batch)]
        command += ["--assembled", str(folder)] if folder else []
        command += ["--layers", str(arguments.layers)] if arguments.layers else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        inputs = example_inputs(config_of(name, arguments.layers), arguments.batch)
        found[name] = SessionRunner(open_session(path, arguments.threads), inputs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--max-seconds", type=float, default=60.0, help="of timed calls, a runtime")
    parser.add_argument(
        "--run", type=Path, help="a run with an XL teacher and a bank that holds both students' proxies"
    )
    parser.add_argument("--layers", type=int, help="of the teacher, and what became of them; default: all")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument(
        "--check", action="store_true", help=f"exit with 1 unless every speed-up is {REQUIRED} of the FLOP ratio"
    )
    parser.add_argument("--export", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--assembled", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run and arguments.layers:
        parser.error("--layers shortens random networks; those of --run are whole.")
    torch.set_num_threads(arguments.threads)
    if arguments.export:
        name, runtime, path = arguments.export
        export(name, runtime, arguments.batch, Path(path), arguments.assembled, arguments.layers)
        return

    flops = {name: model_cost(config_of(name, arguments.layers)).flops for name in (TEACHER, *STUDENTS)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        assembled = None
        if arguments.run:
            assembled = Path(folder, "assembled")
            assemble(arguments.run, assembled)
        print(
            f"{'runtime':<12} {'network':<10} {'ms':>7} {'speed-up':>9} {'FLOP ratio':>11} {'of it':>6}   published "
            "(iPhone, S25 Ultra)"
        )
        for runtime in arguments.runtimes:
            with tempfile.TemporaryDirectory() as scratch:
                timings = measure(
                    runners(arguments, runtime, Path(scratch), assembled),
                    warmup=1,
                    repeats=arguments.repeats,
                    max_seconds=arguments.max_seconds,
                )
            for name in STUDENTS:
                speedup, ratio = paired_ratio(timings[TEACHER], timings[name]), flops[TEACHER] / flops[name]
                row = {
                    "runtime": runtime,
                    "network": name,
                    "teacher_ms": timings[TEACHER].median_ms,
                    "ms": timings[name].median_ms,
                }
                rows.append({**row, "speedup": speedup, "flop_ratio": ratio, "share": speedup / ratio})
                phones = ", ".join(f"{ms[TEACHER] / ms[name]:.2f}" for ms in PUBLISHED_MS.values())
                print(
                    f"{runtime:<12} {name:<10} {row['ms']:>7.0f} {speedup:>9.3f} {ratio:>11.3f} "
                    f"{speedup / ratio:>6.3f}   {phones}",
                    flush=True,
                )
    if arguments.json:
        print(json.dumps({"batch": arguments.batch, "rows": rows, "environment": environment(arguments.threads)}))
    if arguments.check:
        low = [r for r in rows if r["share"] < REQUIRED]
        fail(
            [
                f"{r['network']} in {r['runtime']}: {r['speedup']:.3f}, {r['share']:.3f} of the FLOP ratio, {REQUIRED} "
                "wanted"
                for r in low
            ]
        )


if __name__ == "__main__":
    main()
