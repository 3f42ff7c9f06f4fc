"""`optimum-cli export edgedit`: a verified and timed pipeline folder around an ONNX or ExecuTorch artefact. Imports torch only when it runs."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..errors import EdgeDiTError

DTYPES = {"onnx": ("fp32", "int8"), "executorch": ("fp32", "int8", "int4")}  # of each format
DTYPE_HELP = "fp32, int8, and for executorch (int8: 8da8w) also int4 (8da4w)"


def add_arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--model", required=True, metavar="PATH_OR_ID", help="pipeline folder or Hub id of an EdgeDiTPipeline"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="pipeline folder to write")
    parser.add_argument("--format", default="onnx", help=f"artefact format: {', '.join(DTYPES)} (default onnx)")
    parser.add_argument("--dtype", default="fp32", help=f"precision: {DTYPE_HELP} (default fp32)")
    parser.add_argument(
        "--batch",
        help="batch of a forward: a number or, for onnx, 'dynamic'; guidance makes it twice the images (default: dynamic, for executorch 2)",
    )
    parser.add_argument(
        "--opset", type=int, help="ONNX operator set, 18 or later (default: the newest this package was tested with)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest relative error of a forward against the model, over all sampling timesteps (default 1e-3 for fp32, 5e-2 for int8, 3e-1 for int4)",
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of the runtimes that are compared (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images that are compared (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an older pipeline folder at --output")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model's repository holds")


def run_export(args: Any) -> None:
    """Export as the parsed options ask, and print what was measured.

    Raises:
        EdgeDiTError: an option is unknown, the model cannot be loaded, or a gate fails.
    """
    if args.format not in DTYPES:
        raise EdgeDiTError(f"--format is {args.format!r}; what exists now is {' and '.join(DTYPES)}.")
    if args.dtype not in DTYPES[args.format]:
        raise EdgeDiTError(f"--dtype is {args.dtype!r}; the format {args.format} exists as {', '.join(DTYPES[args.format])}.")
    from ..export.pipeline import export_pipeline
    from ..run_state import read_json

    folder = export_pipeline(
        args.model,
        args.output,
        format=args.format,
        dtype=args.dtype,
        batch=args.batch,
        opset=args.opset,
        tolerance=args.tolerance,
        seed=args.seed,
        threads=args.threads,
        overwrite=args.overwrite,
        trust_remote_code=args.trust_remote_code,
    )
    print(summary(read_json(folder / "verify.json", "the export"), read_json(folder / "bench.json", "the export")))
    print(f"Wrote {folder}; load it with: import edgedit_hf; DiffusionPipeline.from_pretrained({str(folder)!r})")


def summary(verify: dict, bench: dict) -> str:
    """The measured figures in a few lines."""
    images = "equal images" if verify["psnr_db"] is None else f"images at {verify['psnr_db']:.1f} dB"
    lines = [
        f"{verify['precision']}: relative error {verify['relative_error']:.2g} (tolerance {verify['tolerance']:g}), {images} after "
        f"{verify['steps']} steps, weights {bench['initializer_bytes'] / 1e6:.2f} MB (1/{bench['initializer_shrink']:.2f} of fp32)"
    ]
    if "delegation" in bench:
        layers = ", ".join(f"{count} {scheme}" for scheme, count in bench["linear_layers"].items())
        outside = sum(bench["delegation"]["portable"].values())
        lines.append(f"linear layers: {layers}; operators: {bench['delegation']['delegated']} in XNNPACK, {outside} outside it")
    for entry in bench["latency"]:
        times = ", ".join(f"{name} {timing['median_ms']:.2f} ms" for name, timing in entry["timings"].items())
        lines.append(f"batch {entry['batch']}, {bench['environment']['threads']} threads: {times}")
    return "\n".join(lines)


class EdgeDiTExportCommand(BaseOptimumCLICommand):
    """The subcommand `edgedit` of `optimum-cli export`; ends with exit code 2 and one line on stderr if it cannot."""

    COMMAND = CommandInfo(
        name="edgedit", help="Export an EdgeDiT pipeline to ONNX or ExecuTorch, verified against the model and timed."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Called by optimum-cli to add the options."""
        add_arguments(parser)

    def run(self) -> None:
        """Called by optimum-cli."""
        try:
            run_export(self.args)
        except EdgeDiTError as error:
            print(f"optimum-cli export edgedit: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None
