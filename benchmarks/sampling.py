"""Whole pipelines: EdgeDiTPipeline against diffusers' DiTPipeline at the same weights, scheduler, seed and guidance.

    python benchmarks/sampling.py [--preset DiT-XL/2] [--steps 50] [--dtypes fp32 bf16] [--device cpu] [--json]
    [--check]

One image with guidance (a batch of two), decoded by the same small autoencoder, in interleaved rounds. Also the weights
that each holds, and what this package's transformer holds while it samples with its adaLN weights released to disk.
--check (CPU): at least 1.02 times diffusers' speed in fp32 and 1.08 in bf16, equal images in fp32, weights at most
0.905 of diffusers' and 0.63 when released.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from diffusers_dit import diffusers_twin, fail, random_transformer, weight_bytes

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.runtimes.timing import environment

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REQUIRED = {"fp32": 1.02, "bf16": 1.08}
MOST_WEIGHTS, MOST_RELEASED = 0.905, 0.63
MOST_DIFFERENCE = 1e-3  # of images in [0, 1], fp32
LABEL, GUIDANCE = 207, 4.0


def pipelines(preset: str, dtype: torch.dtype, device: str) -> dict:
    """Both pipelines around the same weights."""
    transformer = random_transformer(preset, dtype, device)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        norm_num_groups=4,
    )
    vae.to(device, dtype).eval()
    scheduler = DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False)
    twin = diffusers_twin(transformer)
    twin.config.num_embeds_ada_norm = transformer.config.num_classes
    found = {
        "ours": EdgeDiTPipeline(transformer, scheduler, vae),
        "diffusers": DiTPipeline(twin, vae, DDIMScheduler.from_config(scheduler.config)),
    }
    for pipeline in found.values():
        pipeline.set_progress_bar_config(disable=True)
    return found


def sample(pipeline, steps: int, device: str):
    """One image `(1, H, W, 3)`, and the seconds it took."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    generator = torch.Generator(device).manual_seed(0)
    labels = (
        torch.tensor([LABEL % pipeline.transformer.config.get("num_classes", 1000)])
        if isinstance(pipeline, EdgeDiTPipeline)
        else [LABEL]
    )
    images = pipeline(
        labels, guidance_scale=GUIDANCE, num_inference_steps=steps, generator=generator, output_type="np"
    ).images
    if device != "cpu":
        torch.cuda.synchronize()
    return images, time.perf_counter() - start


def compare(arguments, dtype: str) -> dict:
    """Times, ratio, difference of the images and weights of one precision."""
    found = pipelines(arguments.preset, DTYPES[dtype], arguments.device)
    images = {name: sample(pipeline, arguments.warmup_steps, arguments.device)[0] for name, pipeline in found.items()}
    seconds = {name: [] for name in found}
    for number in range(arguments.rounds):
        order = list(found) if number % 2 == 0 else list(found)[::-1]  # neither always follows the other
        for name in order:
            images[name], taken = sample(found[name], arguments.steps, arguments.device)
            seconds[name].append(taken)
    ours, theirs = found["ours"].transformer, found["diffusers"].transformer
    row = {
        "dtype": dtype,
        "seconds": {name: median(values) for name, values in seconds.items()},
        "speedup": median(b / a for a, b in zip(seconds["ours"], seconds["diffusers"])),
        "difference": float(abs(images["ours"] - images["diffusers"]).max()),
        "weights": {"ours": weight_bytes(ours), "diffusers": weight_bytes(theirs)},
    }
    row["weight_ratio"] = row["weights"]["ours"] / row["weights"]["diffusers"]
    with tempfile.TemporaryDirectory() as folder:
        ours.offload_modulation(Path(folder, "modulation.safetensors"))
        labels = torch.tensor([LABEL, ours.config.num_classes], device=arguments.device)
        table = ours.precompute_modulation(torch.linspace(999, 0, arguments.steps, device=arguments.device), labels)
        released = weight_bytes(ours) + table.numel() * table.element_size()
        image, _ = sample(found["ours"], arguments.steps, arguments.device)
        row["released"] = {
            "bytes": released,
            "ratio": released / row["weights"]["diffusers"],
            "difference": float(abs(image - images["ours"]).max()),
        }
        ours.restore_modulation()
    return row


def problems(rows: list[dict], device: str) -> list[str]:
    """Requirements that are not met."""
    found = []
    for row in rows:
        if device == "cpu" and row["speedup"] < REQUIRED[row["dtype"]]:
            found.append(
                f"{row['dtype']}: {row['speedup']:.3f} times diffusers' speed, at least {REQUIRED[row['dtype']]} wanted"
            )
        if row["dtype"] == "fp32" and not row["difference"] <= MOST_DIFFERENCE:
            found.append(f"fp32: images differ by {row['difference']:.2g}, at most {MOST_DIFFERENCE} wanted")
        for what, ratio, most in (
            ("weights", row["weight_ratio"], MOST_WEIGHTS),
            ("released", row["released"]["ratio"], MOST_RELEASED),
        ):
            if ratio > most:
                found.append(f"{row['dtype']}: {what} {ratio:.4f} of diffusers', at most {most} wanted")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="DiT-XL/2")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup-steps", type=int, default=2, help="steps of the untimed image before the first round")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless the figures above are met")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    print(f"{'':<5} {'ours':>9} {'diffusers':>10} {'speedup':>8} {'difference':>11} {'weights':>8} {'released':>9}")
    for dtype in arguments.dtypes:
        row = compare(arguments, dtype)
        rows.append(row)
        print(
            f"{dtype:<5} {row['seconds']['ours']:>7.1f} s {row['seconds']['diffusers']:>8.1f} s {row['speedup']:>8.3f} "
            f"{row['difference']:>11.1e} {row['weight_ratio']:>8.4f} {row['released']['ratio']:>9.4f}",
            flush=True,
        )
    if arguments.json:
        print(
            json.dumps(
                {
                    "preset": arguments.preset,
                    "steps": arguments.steps,
                    "rows": rows,
                    "environment": environment(arguments.threads),
                }
            )
        )
    if arguments.check:
        fail(problems(rows, arguments.device))


if __name__ == "__main__":
    main()
