"""What three stages and sparse attention buy at 1024 × 1024: PixArt-like baselines against the elastic net's stages, in
ONNX Runtime.

    python benchmarks/stages.py [--heads 12] [--latents 128] [--layers 24] [--variants PixArt A B C D]
    [--json] [--check]

One image of 16 × 128 × 128 latents (4096 tokens), 2 × 128 text tokens, 24 layers, heads of 72 channels, fp32. The
default width, 12 heads, is that of the sub-network "tiny" of `elastic-dit-1.6b`. SnapGen++'s steps (arXiv:2601.08303,
fig. 3):

- PixArt: diffusers' PixArtTransformer2DModel of that depth and width: what one would use instead (MLP ratio 4, a
  key/value head a query head).
- A: all 24 layers at full resolution, of this package's blocks: full attention, one key/value head, MLP ratio 3, no
  skips. (It is the class with the stages 0/0/24, so it has their down- and up-sample too, half a percent of its FLOPs.)
- B: three stages of 4/12/8 layers, of which Middle works on a quarter of the tokens.
- C: B with adaptive sparse self-attention in Down and Up.
- D: as shipped: 6/8/10 layers, long skips in Middle, a key/value head for four query heads, MLP ratio 4 in Down and Up.

Each is exported in a process of its own, which also profiles one run by operator; then all are timed interleaved. A
speedup over A is split into the ratio of the FLOPs (of all matrix products) and that of the rates at which they are
done, which is what softmax, memory traffic and small operators cost or save. --check: C at least 2.0 times as fast as
PixArt and as A.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
import torch
from diffusers import PixArtTransformer2DModel
from diffusers_dit import fail
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgedit_hf.export.onnx.lower import lower_onnx, save_onnx
from edgedit_hf.export.parts import Part
from edgedit_hf.models.transformer_elastic_dit import ElasticDiTTransformer2DModel
from edgedit_hf.runtimes.profile import onnx_profile
from edgedit_hf.runtimes.runners import SessionRunner
from edgedit_hf.runtimes.sessions import open_session
from edgedit_hf.runtimes.timing import environment, measure, paired_ratio

VARIANTS = ("PixArt", "A", "B", "C", "D")
PUBLISHED_MS = {"A": 2000, "B": 550, "C": 293, "D": 360}  # iPhone 16 Pro Max, SnapGen++ fig. 3
CHANNELS, HEAD_CHANNELS, TEXT_TOKENS, TEXT_DIMS = 16, 72, 128, (512, 2560)
REQUIRED = 2.0
KINDS = {
    "Attention": "attention",
    "MatMul": "linear",
    "Gemm": "linear",
    "FusedMatMul": "linear",
    "FusedGemm": "linear",
}  # of operators


class Denoiser(nn.Module):
    """One forward on tensors alone: latents `(1, 16, H, W)`, timestep `(1,)` and the text tokens of two encoders, `(1,
    128, dim)` each.
    """

    input_names = ["hidden_states", "timestep", "text_1", "text_2"]

    def __init__(self, model: ElasticDiTTransformer2DModel):
        super().__init__()
        self.model = model

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
        return self.model(hidden_states, timestep, text, return_dict=False)[0]


class PixArtDenoiser(nn.Module):
    """The same for diffusers' class, whose one encoder gives as many tokens, `(1, 256, dim)`."""

    input_names = ["hidden_states", "timestep", "text"]

    def __init__(self, model: PixArtTransformer2DModel):
        super().__init__()
        self.model = model

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.model(hidden_states, text, timestep, return_dict=False)[0]


def denoiser(variant: str, heads: int, latents: int, depth: int) -> nn.Module:
    """A variant with newly initialised weights."""
    common = {
        "num_attention_heads": heads,
        "attention_head_dim": HEAD_CHANNELS,
        "in_channels": CHANNELS,
        "sample_size": latents,
    }
    if variant == "PixArt":
        text = {"cross_attention_dim": heads * HEAD_CHANNELS, "caption_channels": TEXT_DIMS[1]}
        model = PixArtTransformer2DModel(
            **common, **text, out_channels=CHANNELS, num_layers=depth, use_additional_conditions=False
        )
        return PixArtDenoiser(model.eval().requires_grad_(False))
    common |= {"text_dims": TEXT_DIMS, "subnets": None}
    if variant == "D":
        layers = [depth // 4, depth // 3, depth - depth // 4 - depth // 3]
        model = ElasticDiTTransformer2DModel(**common, num_key_value_heads=max(1, heads // 4), num_layers=layers)
    else:
        layers = [0, 0, depth] if variant == "A" else [depth // 6, depth // 2, depth // 3]
        model = ElasticDiTTransformer2DModel(
            **common, num_key_value_heads=1, num_layers=layers, mlp_ratios=[3.0, 3.0, 3.0]
        )
        for block in model.middle_blocks:
            block.long_skip = None
    if variant in "AB":
        for block in (*model.down_blocks, *model.up_blocks):
            attention = block.attn
            attention.sparse = False
            del attention.compress_k, attention.compress_v, attention.gate
    return Denoiser(model.eval().requires_grad_(False))


def example(variant: str, latents: int) -> dict[str, torch.Tensor]:
    """Inputs by name."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, CHANNELS, latents, latents, generator=generator),
        "timestep": torch.tensor([500.0]),
    }
    texts = [(2 * TEXT_TOKENS, TEXT_DIMS[1])] if variant == "PixArt" else [(TEXT_TOKENS, dim) for dim in TEXT_DIMS]
    names = PixArtDenoiser.input_names[2:] if variant == "PixArt" else Denoiser.input_names[2:]
    return inputs | {name: torch.randn(1, *shape, generator=generator) for name, shape in zip(names, texts)}


def keep_tokens(path: Path) -> None:
    """PixArt's squeeze(1) of the tokens, which does nothing, is exported as if it did: take it out of the file."""
    proto = onnx.load(str(path))
    for node in proto.graph.node:
        if node.op_type == "Squeeze":
            node.op_type = "Identity"
            del node.input[1:]
    save_onnx(proto, path)


def export(variant: str, heads: int, latents: int, depth: int, threads: int, path: Path) -> None:
    """Write a variant as ONNX, and print its weights, the FLOPs of its matrix products, and where one run's time goes,
    as JSON.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module = denoiser(variant, heads, latents, depth)
        module(*(torch.empty_like(value) for value in example(variant, latents).values()))
    flops = {"attention": 0, "linear": 0}
    for operator, count in counter.get_flop_counts()["Global"].items():
        flops["attention" if operator is torch.ops.aten.bmm else "linear"] += count
    module, inputs = denoiser(variant, heads, latents, depth), example(variant, latents)
    lower_onnx(Part("transformer", "denoiser", module, inputs, ("sample",)), path, "fp32", {})
    if variant == "PixArt":
        keep_tokens(path)
    weights = sum(p.numel() for p in module.parameters())
    del module
    spent = {"attention": 0.0, "linear": 0.0, "other": 0.0}
    for operator, milliseconds in onnx_profile(path, inputs, threads).items():
        spent[KINDS.get(operator, "other")] += milliseconds
    print(json.dumps({"weights": weights, "flops": flops, "profile_ms": spent}))


def table(rows: dict[str, dict]) -> None:
    """Print the comparison."""
    print(
        f"{'':<7} {'weights':>9} {'GFLOPs':>7} {'(attention)':>12} {'ms':>8} {'speedup over A':>15} {'= FLOPs':>8} "
        f"{'x rate':>7} {'paper':>8} {'speedup':>8}"
    )
    for variant, row in rows.items():
        flops = sum(row["flops"].values())
        paper = (
            f"{PUBLISHED_MS[variant]:>5} ms {PUBLISHED_MS['A'] / PUBLISHED_MS[variant]:>8.2f}"
            if variant in PUBLISHED_MS
            else ""
        )
        print(
            f"{variant:<7} {row['weights'] / 1e6:>7.1f} M {flops / 1e9:>7.0f} {row['flops']['attention'] / 1e9:>12.0f} "
            f"{row['ms']:>8.0f} {row['speedup']['A']:>15.2f} {row['flops_ratio']:>8.2f} "
            f"{row['speedup']['A'] / row['flops_ratio']:>7.2f} {paper:>17}"
        )
    print("\nwhere one run's time goes (a profiled run each, ms): softmax is in the attention operator")
    for variant, row in rows.items():
        rate = {kind: row["flops"][kind] / 1e6 / row["profile_ms"][kind] for kind in ("attention", "linear")}
        parts = "   ".join(
            f"{kind} {spent:>6.0f}" + (f" ({rate[kind]:.0f} GFLOP/s)" if kind in rate else "")
            for kind, spent in row["profile_ms"].items()
        )
        print(f"{variant:<7} {parts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--heads",
        type=int,
        default=12,
        help="width in heads of 72 channels, a multiple of 4: 12, 16 and 32 are tiny, small and full",
    )
    parser.add_argument("--latents", type=int, default=128, help="latents a side")
    parser.add_argument("--layers", type=int, default=24, help="of every variant, a multiple of 6")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="A always; --check needs PixArt and C"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument(
        "--check", action="store_true", help=f"exit with 1 unless C is {REQUIRED} times as fast as PixArt and A"
    )
    parser.add_argument("--export", nargs=2, metavar=("VARIANT", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.export:
        variant, path = arguments.export
        export(variant, arguments.heads, arguments.latents, arguments.layers, arguments.threads, Path(path))
        return

    variants = [variant for variant in VARIANTS if variant in ("A", *arguments.variants)]
    if arguments.layers % 6:
        parser.error(f"--layers {arguments.layers} is not a multiple of 6")
    if arguments.check and not {"PixArt", "C"} <= set(variants):
        parser.error("--check compares C with PixArt and A; leave --variants out.")
    rows, calls = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in variants:
            path = Path(folder, f"{variant}.onnx")
            command = [sys.executable, __file__, "--export", variant, str(path), "--heads", str(arguments.heads)]
            command += ["--latents", str(arguments.latents), "--layers", str(arguments.layers)]
            command += ["--threads", str(arguments.threads)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows[variant] = json.loads(done.stdout.strip().splitlines()[-1])
            session = open_session(path, arguments.threads)
            calls[variant] = SessionRunner(session, example(variant, arguments.latents))
            print(f"{variant} is exported", flush=True)
        timings = measure(calls, warmup=0, repeats=arguments.repeats)
    bases = [base for base in ("PixArt", "A") if base in rows]
    for variant, row in rows.items():
        row["ms"] = timings[variant].median_ms
        row["speedup"] = {base: paired_ratio(timings[base], timings[variant]) for base in bases}
        row["flops_ratio"] = sum(rows["A"]["flops"].values()) / sum(row["flops"].values())
    table(rows)
    if arguments.json:
        sizes = {"heads": arguments.heads, "latents": arguments.latents, "layers": arguments.layers}
        print(
            json.dumps(
                {**sizes, "rows": rows, "published_ms": PUBLISHED_MS, "environment": environment(arguments.threads)}
            )
        )
    if arguments.check:
        least = rows["C"]["speedup"]
        fail(
            [
                f"C is {ratio:.2f} times as fast as {base}, at least {REQUIRED} wanted"
                for base, ratio in least.items()
                if ratio < REQUIRED
            ]
        )


if __name__ == "__main__":
    main()
