"""A few real optimiser steps of every training stage at the size of DiT-XL/2: seconds a step, memory, finite losses.

    python benchmarks/xl_steps.py [--preset DiT-XL/2] [--until few-step | --only few-step] [--steps 3] [--batch-size 1]
    [--memory-budget-gb 8] [--init copy] [--threads 2] [--json] [--check]

Runs training/train_teacher.py (from scratch), distill_proxies.py (the proxies of EdgeDiT-1; of a student like it for
other presets), finetune.py (that student) and distill_few_step.py (the tuned student; with --only the teacher itself,
at its true size) as a user does, each in its own process, with
training/recipes/imagenet256-edgedit1.yaml as the recipe. What the recipe expects from outside is made up in a temporary
folder: random images of 1,000 classes, a small random autoencoder of factor 8, a random teacher. Needs about 16 GB of
memory and 30 GB of disk for DiT-XL/2.

Prints, a stage, the median seconds of a step (of the bank: over all its groups of proxies; of few-step distillation
without its evaluation), the process's peak resident memory, what the dry run says of both, and the last loss. Of
few-step distillation, whose student, critic and real score share one net, also what weights, optimiser and moving
average take beside nets of their own. --check fails unless all losses are finite, memory is within 1.5 times the dry
run's either way, and (at DiT-XL/2) the shared form takes at most a quarter of nets of their own.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.estimate import estimate
from edgedit_hf.few_step.networks import separate_bytes
from edgedit_hf.models.transformer_edgedit import PRESETS, EdgeDiTTransformer2DModel
from edgedit_hf.pipelines.pipeline_edgedit import EdgeDiTPipeline
from edgedit_hf.run.config import load_config
from edgedit_hf.run.stage import BANK, FEW_STEP, STUDENT, TEACHER, TUNE
from edgedit_hf.runtimes.timing import environment
from edgedit_hf.search_space import UNMERGED, SearchSpace

TRAINING = Path(__file__).resolve().parents[1] / "training"
RECIPE = TRAINING / "recipes" / "imagenet256-edgedit1.yaml"
MEMORY_FACTOR = 1.5  # the dry run must be within it
STAGES = (TEACHER, BANK, STUDENT, TUNE, FEW_STEP)
SHARED = 0.25  # of the bytes of separate nets


def make_inputs(folder: Path, preset: str, classes: int) -> None:
    """Images, autoencoder, teacher and genotype below `folder`; all random, nothing zero."""
    generator = np.random.default_rng(0)
    for label in range(classes):
        path = folder / "images" / f"{label:04d}"
        path.mkdir(parents=True)
        for name in ("0.png", "1.png"):  # one to learn from, one held out
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path / name)
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(
        **blocks,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=256,
    )
    vae.save_pretrained(folder / "vae")
    teacher = EdgeDiTTransformer2DModel.from_preset(preset)
    for linear in (*(block.modulation for block in teacher.blocks), teacher.modulation_out, teacher.proj_out):
        torch.nn.init.normal_(linear.weight, std=0.02)  # zero in a fresh DiT, whose layers then are the identity
    EdgeDiTPipeline(transformer=teacher, scheduler=make_scheduler("epsilon"), vae=vae).save_pretrained(folder / "given")


def student_of(preset: str, folder: Path) -> str:
    """A student of this teacher as recipes name it: EdgeDiT-1, or one like it (an eighth of the pairs merged, MLPs
    halved everywhere).
    """
    if preset == "DiT-XL/2":
        return "EdgeDiT-1"
    with torch.device("meta"):
        space = SearchSpace.for_config(EdgeDiTTransformer2DModel.from_preset(preset).config)
    halved, merged = 4 * 1 + 1, UNMERGED + 1
    pairs = [merged if pair % 8 == 4 else halved for pair in range(space.num_pairs)] + [1] * (space.num_layers % 2)
    path = folder / "student.json"
    path.write_text(space.from_code(pairs).to_json(), encoding="utf-8")
    return str(path)


def resident_peak(pid: int) -> int:
    """Most bytes that a process has had in memory since its peak was last reset; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM:")), 0)


def run_recipe(script: str, options: list[str]) -> int:
    """Run a recipe in a process of its own; returns its peak resident memory in bytes.

    Read while it runs: stage bank resets the system's own peak to tell its groups apart.
    """
    command = [sys.executable, str(TRAINING / script), "--config", str(RECIPE), *options]
    environment_of_child = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    peak = 0
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment_of_child)
        try:
            while process.poll() is None:
                peak = max(peak, resident_peak(process.pid))
                time.sleep(0.05)
        finally:
            process.kill()
        if process.returncode:
            log.seek(0)
            sys.exit(f"{script} ended with {process.returncode}:\n{log.read()[-3000:]}")
    return peak


def read_telemetry(folder: Path) -> tuple[float, float]:
    """Seconds that a step takes, and the last loss. Runs of neighbouring steps are a bank's groups, which a step of the
    bank adds up.
    """
    lines = [json.loads(line) for line in (folder / "telemetry.jsonl").read_text().splitlines()]
    groups: list[list[float]] = [[]]
    for before, after in itertools.pairwise(lines):
        if after["step"] == before["step"] + 1:
            groups[-1].append(after["seconds"] - before["seconds"])
        else:
            groups.append([])
    return sum(statistics.median_low(group) for group in groups), lines[-1]["loss"]


def main() -> None:
    stages = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", default="DiT-XL/2", choices=[name for name, sizes in PRESETS.items() if "layers" not in sizes]
    )
    parser.add_argument("--classes", type=int, default=1000, help="of the made-up images, two images each")
    parser.add_argument("--until", default=stages[-1], choices=stages, help="the last stage that runs")
    parser.add_argument("--only", choices=["few-step"], help="that stage alone, of the teacher itself")
    parser.add_argument("--steps", type=int, default=3, help="of every stage; at least 2")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--memory-budget-gb", type=float, default=8.0, help="of the proxy bank")
    parser.add_argument("--init", default="copy", help="start of the proxies; closed_form takes minutes more")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"exit with 1 unless losses are finite and memory is within {MEMORY_FACTOR}× the dry run's",
    )
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be at least 2: the first step is not timed")

    sizes = PRESETS[arguments.preset]
    rows = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        make_inputs(folder, arguments.preset, arguments.classes)
        student = student_of(arguments.preset, folder)
        common = [
            f"data={{source: {folder / 'images'}, resolution: 256, vae: {folder / 'vae'}, num_workers: 0, "
            "validation_fraction: 0.5}",
            f"teacher={{patch_size: {sizes['patch_size']}, hidden_size: {sizes['hidden_size']}, "
            f"num_layers: {sizes['num_layers']}}}",
            f"teacher={{num_heads: {sizes['num_attention_heads']}, path: {folder / 'given'}}}",
            f"bank={{only: [{student}], init: {arguments.init}, calibration_samples: {arguments.batch_size}, "
            "both_steps: 0, warmup_steps: 1}",
            f"bank.memory_budget_gb={arguments.memory_budget_gb}",
            f"student.genotype={student}",
            "tune={teacher_more_steps: false, warmup_steps: 1}",
            f"threads={arguments.threads}",
            f"output_dir={folder / 'run'}",
        ]
        for section in ("teacher", "tune"):
            common.append(
                f"{section}={{steps: {arguments.steps}, batch_size: {arguments.batch_size}, "
                "gradient_accumulation: 1, log_every: 1}"
            )
        few = "samples: 16, sampling_steps: 2, knowledge_steps: 1, warmup_steps: 1, mean_drift: 1.0e6, std_drift: 1.0e6"
        common.append(
            f"few_step={{enabled: true, steps: {arguments.steps}, batch_size: {arguments.batch_size}, log_every: 1, "
            f"gradient_accumulation: 1, evaluate_every: {arguments.steps}, {few}}}"
        )
        common.append("evaluate={extractor: classifier, extractor_steps: 1}")
        if arguments.only:
            common.append(f"few_step.path={folder / 'given'}")
        common.append(f"bank={{steps: {arguments.steps}, batch_size: {arguments.batch_size}, log_every: 1}}")
        if arguments.preset != "DiT-XL/2":
            common.append("bank.reduced_attention_dim=null")
        wanted = STAGES[: stages.index(arguments.until) + 1] if arguments.only is None else (FEW_STEP,)
        for stage in wanted:
            overrides = [*common, "teacher.path=null"] if stage is TEACHER else common
            expected = {row.stage: row for row in estimate(load_config(RECIPE, overrides))}[stage.name]
            started = time.monotonic()
            peak = run_recipe(stage.script, [part for text in overrides for part in ("--override", text)])
            rows[stage.name] = {
                "all_seconds": time.monotonic() - started,
                "peak_gb": peak / 1e9,
                "expected_gb": expected.memory / 1e9,
            }
            if stage.name != "student":
                seconds, loss = read_telemetry(folder / "run" / stage.folder)
                rows[stage.name] |= {
                    "step_seconds": seconds,
                    "expected_step_seconds": (expected.seconds - expected.before) / arguments.steps,
                    "loss": loss,
                }
            if stage.name == "bank":
                record = json.loads((folder / "run" / "bank" / "stage.json").read_text())
                rows["bank"] |= {
                    "proxies": record["proxies"],
                    "groups": record["ranks"][0],
                    "budget_gb": arguments.memory_budget_gb,
                }
            if stage is FEW_STEP:
                record = json.loads((folder / "run" / stage.folder / "stage.json").read_text())
                weights = record["memory"]["frozen weights"] // 4
                rows[stage.name]["held_bytes"] = sum(record["memory"].values())
                rows[stage.name]["separate_bytes"] = separate_bytes(weights)
            if stage.name == "teacher":
                shutil.rmtree(
                    folder / "run" / "teacher"
                )  # the later stages compress the given one; room for their files

    print_table(rows, arguments)
    fits = all(1 / MEMORY_FACTOR <= row["peak_gb"] / row["expected_gb"] <= MEMORY_FACTOR for row in rows.values())
    finite = all(math.isfinite(row.get("loss", 0.0)) for row in rows.values())
    if arguments.json:
        print(
            json.dumps(
                {
                    "preset": arguments.preset,
                    "steps": arguments.steps,
                    "stages": rows,
                    "environment": environment(arguments.threads),
                }
            )
        )
    large = arguments.preset == "DiT-XL/2"  # on a narrow net, adapters of rank 64 are not small
    shared = not large or all(
        row.get("held_bytes", 0) <= SHARED * row.get("separate_bytes", 0) for row in rows.values()
    )
    if arguments.check and not (fits and finite and shared):
        sys.exit(
            f"required: finite losses, memory within {MEMORY_FACTOR}× of the dry run's, the shared form within "
            f"{SHARED} of nets of their own"
        )


def print_table(rows: dict[str, dict], arguments: argparse.Namespace) -> None:
    """A line a stage."""
    print(
        f"{arguments.preset}, {arguments.steps} steps of {arguments.batch_size} images of 256 × 256, fp32, "
        f"{arguments.threads} threads"
    )
    print(
        f"{'stage':<9}{'s a step':>10}{'dry run':>10}{'peak GB':>10}{'dry run':>10}{'last loss':>11}{'whole stage':>13}"
    )
    for name, row in rows.items():
        step, expected = (f"{row[key]:.2f}" if key in row else "" for key in ("step_seconds", "expected_step_seconds"))
        loss = f"{row['loss']:.4g}" if "loss" in row else ""
        print(
            f"{name:<9}{step:>10}{expected:>10}{row['peak_gb']:>10.2f}{row['expected_gb']:>10.2f}"
            f"{loss:>11}{row['all_seconds']:>11.0f} s"
        )
    if "few-step" in rows:
        held, separate = rows["few-step"]["held_bytes"], rows["few-step"]["separate_bytes"]
        print(
            f"few-step: weights, optimiser and average {held / 1e9:.2f} GB; student, critic and real score of their "
            f"own {separate / 1e9:.2f} GB: {held / separate:.3f} of it"
        )
    if "bank" not in rows:
        return
    bank = rows["bank"]
    print(
        f"bank: {bank['proxies']} proxies in {len(bank['groups'])} groups under a budget of {bank['budget_gb']:g} GB, "
        "peaks of the groups",
        end=" ",
    )
    print(", ".join(f"{group['peak_gb']:.2f} GB" for group in bank["groups"]))


if __name__ == "__main__":
    main()
