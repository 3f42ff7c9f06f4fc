"""Adaptive sparse self-attention (ASSA) against full attention at the tokens of a 1024 × 1024 image.

    python benchmarks/attention.py [--side 64] [--kv-heads 16] [--json] [--check]

16 heads of 64 channels on 64 × 64 tokens, one image, 16 strips, radius 1. Two pairs are timed, each interleaved, in
eager PyTorch (fp32 and bf16) and exported to ONNX Runtime (fp32):

- core: queries, keys and values are given, normed and rotated, as the layer has them before attention. Full:
  `scaled_dot_product_attention`. ASSA: compressing keys and values 2 × 2, norm and rotation of the compressed keys,
      both branches, the gate's mix.
- layer: all of `ElasticSelfAttention`, with its four projections (and the gate's), norms and rotations, on hidden
  states of width 1024.

Peak memory is that of a core's run above what its process held before, each in a process of its own. --check: the core
at least 1.5 times as fast in each of the three. The scores that are computed allow 2.33 times.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers_dit import fail, peak_bytes
from torch import nn

from edgedit_hf.export.onnx.lower import lower_onnx
from edgedit_hf.export.parts import Part
from edgedit_hf.models.transformer_elastic_dit import (
    ElasticDiTTransformer2DModel,
    Positions,
    attend,
    rotation_table,
    sparse_attention,
)
from edgedit_hf.runtimes.runners import SessionRunner
from edgedit_hf.runtimes.sessions import open_session
from edgedit_hf.runtimes.timing import environment, measure, paired_ratio

HEADS, CHANNELS = 16, 64
REQUIRED = 1.5
TOLERANCE = 1e-4  # relative difference of ONNX Runtime's output
RUNTIMES = {"torch-fp32": torch.float32, "torch-bf16": torch.bfloat16, "onnxruntime-fp32": torch.float32}
KINDS = ("full", "ASSA")


class Layer(nn.Module):
    """A self-attention layer on its hidden states `(B, N, D)`."""

    input_names = ["hidden_states"]

    def __init__(self, attention: nn.Module, positions: Positions):
        super().__init__()
        self.attention, self.positions = attention, positions

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.attention(hidden_states, self.positions)


class FullCore(nn.Module):
    """Full attention on queries, keys and values `(B, h, N, d)`."""

    input_names = ["query", "key", "value"]

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend(query, key, value)


class SparseCore(Layer):
    """The same by ASSA, which also gets keys and values as they were projected, `(B, N, k·d)`, and the gate `(B, h, N,
    1)`.
    """

    input_names = [*FullCore.input_names, "projected_key", "projected_value", "gate"]

    def forward(self, query, key, value, projected_key, projected_value, gate) -> torch.Tensor:
        layer, grid = self.attention, (self.positions.rows, self.positions.columns)
        compressed = layer.compress_k(projected_key, *grid), layer.compress_v(projected_value, *grid)
        compressed = layer.keys_and_values(*compressed, self.positions.compressed)
        return sparse_attention(query, key, value, *compressed, gate, layer.blocks, layer.radius)


def cases(
    side: int, kv_heads: int, dtype: torch.dtype
) -> dict[str, dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]]]:
    """part → kind → (module, its inputs), with random weights; both kinds of a layer have the same projections."""
    config = {
        "num_attention_heads": HEADS,
        "attention_head_dim": CHANNELS,
        "num_key_value_heads": kv_heads,
        "num_layers": [1, 0, 1],
        "subnets": None,
    }
    torch.manual_seed(0)
    net = ElasticDiTTransformer2DModel(**config, text_dims=[8], text_width=8).eval().requires_grad_(False)
    theta = net.config.rope_theta
    tables = [
        rotation_table(side // stride, side // stride, stride, CHANNELS, theta, torch.device("cpu"))
        for stride in (1, 2)
    ]
    positions = Positions(side, side, *tables)
    sparse, full = (blocks[0].attn.to(dtype) for blocks in (net.down_blocks, net.up_blocks))
    full.load_state_dict(sparse.state_dict())
    full.sparse = False
    tokens = side * side
    hidden_states = torch.randn(1, tokens, net.hidden_size, dtype=dtype)
    heads = tuple(torch.randn(1, count, tokens, CHANNELS, dtype=dtype) for count in (HEADS, kv_heads, kv_heads))
    projected = tuple(torch.randn(1, tokens, kv_heads * CHANNELS, dtype=dtype) for _ in range(2))
    gate = torch.rand(1, HEADS, tokens, 1, dtype=dtype)
    return {
        "core": {"full": (FullCore(), heads), "ASSA": (SparseCore(sparse, positions), (*heads, *projected, gate))},
        "layer": {
            "full": (Layer(full, positions), (hidden_states,)),
            "ASSA": (Layer(sparse, positions), (hidden_states,)),
        },
    }


def call_of(runtime: str, module: nn.Module, inputs: tuple[torch.Tensor, ...], threads: int):
    """A callable that runs a module once in a runtime."""
    if runtime.startswith("torch"):
        return torch.inference_mode()(lambda: module(*inputs))
    part = Part("transformer", "attention", module, dict(zip(module.input_names, inputs)), ("output",))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "attention.onnx")
        lower_onnx(part, path, "fp32", {})
        return SessionRunner(open_session(path, threads), part.inputs)


def memory_of(kind: str, runtime: str, side: int, kv_heads: int, threads: int) -> None:
    """In a process of its own: print the peak resident bytes that a run of the core adds."""
    call = call_of(runtime, *cases(side, kv_heads, RUNTIMES[runtime])["core"][kind], threads)
    small = call_of(runtime, *cases(8, kv_heads, RUNTIMES[runtime])["core"][kind], threads)
    small()  # what a runtime sets up once
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak starts again from what is held now
    before = peak_bytes()
    call()
    print(json.dumps(peak_bytes() - before))


def compare(arguments, runtime: str) -> dict:
    """Times and ratios in one runtime and precision."""
    row: dict = {"runtime": runtime, "ms": {}, "speedup": {}, "peak_bytes": {}}
    for part, kinds in cases(arguments.side, arguments.kv_heads, RUNTIMES[runtime]).items():
        calls = {kind: call_of(runtime, *case, arguments.threads) for kind, case in kinds.items()}
        if runtime.startswith("onnx"):
            for kind, (module, inputs) in kinds.items():
                expected = module(*inputs)
                error = ((torch.from_numpy(calls[kind]()[0]) - expected).norm() / expected.norm()).item()
                row["relative_error"] = max(error, row.get("relative_error", 0.0))
        timings = measure(calls, warmup=1, repeats=arguments.repeats, max_seconds=arguments.max_seconds)
        row["ms"][part] = {kind: timing.median_ms for kind, timing in timings.items()}
        row["speedup"][part] = paired_ratio(timings["full"], timings["ASSA"])
    for kind in KINDS:
        command = [sys.executable, __file__, "--memory-of", kind, "--runtimes", runtime, "--side", str(arguments.side)]
        command += ["--kv-heads", str(arguments.kv_heads), "--threads", str(arguments.threads)]
        variables = {
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": "65536",
        }  # freed blocks go back to the system, not to the next allocation
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=variables)
        row["peak_bytes"][kind] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def problems(rows: list[dict]) -> list[str]:
    """Requirements that are not met."""
    found = [
        f"{row['runtime']}: ASSA {row['speedup']['core']:.2f} times as fast as full attention, at least {REQUIRED} "
        "wanted"
        for row in rows
        if row["speedup"]["core"] < REQUIRED
    ]
    for row in rows:
        if not row.get("relative_error", 0.0) <= TOLERANCE:
            found.append(
                f"{row['runtime']}: outputs differ by {row['relative_error']:.2g} from PyTorch's, at most {TOLERANCE} "
                "wanted"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=64, help="tokens a side")
    parser.add_argument(
        "--kv-heads", type=int, default=HEADS, help="key/value heads; fewer than 16 are shared by groups of query heads"
    )
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--max-seconds", type=float, default=60.0, help="of timed calls, a pair")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument(
        "--check", action="store_true", help=f"exit with 1 unless the core is {REQUIRED} times as fast everywhere"
    )
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        memory_of(arguments.memory_of, arguments.runtimes[0], arguments.side, arguments.kv_heads, arguments.threads)
        return

    rows = []
    print(
        f"{arguments.side}² tokens, {HEADS} heads × {CHANNELS}, {arguments.kv_heads} key/value heads, "
        f"{arguments.threads} threads"
    )
    print(
        f"{'':<17} {'core: full':>11} {'ASSA':>9} {'speedup':>8} {'layer: full':>13} {'ASSA':>9} {'speedup':>8} "
        f"{'peak: full':>12} {'ASSA':>8}"
    )
    for runtime in arguments.runtimes:
        row = compare(arguments, runtime)
        rows.append(row)
        core, layer, peak = row["ms"]["core"], row["ms"]["layer"], row["peak_bytes"]
        print(
            f"{runtime:<17} {core['full']:>8.1f} ms {core['ASSA']:>6.1f} ms {row['speedup']['core']:>8.2f} "
            f"{layer['full']:>10.1f} ms {layer['ASSA']:>6.1f} ms {row['speedup']['layer']:>8.2f} "
            f"{peak['full'] / 2**20:>8.0f} MiB {peak['ASSA'] / 2**20:>4.0f} MiB",
            flush=True,
        )
    if arguments.json:
        sizes = {"side": arguments.side, "heads": HEADS, "channels": CHANNELS, "kv_heads": arguments.kv_heads}
        print(json.dumps({**sizes, "rows": rows, "environment": environment(arguments.threads)}))
    if arguments.check:
        fail(problems(rows))


if __name__ == "__main__":
    main()
