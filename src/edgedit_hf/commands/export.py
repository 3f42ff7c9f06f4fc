"""`optimum-cli export edgedit`: a verified and timed pipeline folder of ONNX, ExecuTorch or Core ML artefacts. Imports
torch only when it runs.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..entry import guard
from ..errors import EdgeDiTError
from ..export.options import check_ranges
from ..files import read_json
from ..run.outputs import check_output

DTYPES = {  # of each format
    "onnx": ("fp32", "fp16", "int8", "int4"),
    "executorch": ("fp32", "int8", "int4"),
    "coreml": ("fp32", "fp16", "int8", "int4"),
}
DTYPE_HELP = (
    "fp32, fp16 (not executorch), int8 (executorch: 8da8w) or int4 (executorch: 8da4w; coreml: palettes of 16 entries)"
)


def add_arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH_OR_ID",
        help="pipeline folder or Hub id of an EdgeDiTPipeline or ElasticDiTPipeline",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="pipeline folder to write")
    parser.add_argument("--format", default="onnx", help=f"artefact format: {', '.join(DTYPES)} (default onnx)")
    parser.add_argument("--dtype", default="fp32", help=f"precision: {DTYPE_HELP} (default fp32)")
    parser.add_argument(
        "--batch",
        help="rows of a forward: a number or, for onnx, 'dynamic'; guidance makes it twice the images (default: "
        "dynamic for onnx, else 2)",
    )
    parser.add_argument("--subnet", metavar="NAME", help="sub-network of an elastic supernet (default: the full net)")
    parser.add_argument(
        "--split-conditioner",
        action="store_true",
        help="write adaLN, a third of a DiT's weights, as an artefact of its own, which a schedule needs once",
    )
    parser.add_argument(
        "--resolution",
        metavar="HxW",
        help="height and width in pixels, or 'dynamic' for onnx (default: what the network was made for)",
    )
    parser.add_argument(
        "--opset", type=int, help="ONNX operator set, 18 or later (default: the newest this package was tested with)"
    )
    parser.add_argument(
        "--activations",
        default="dynamic",
        help="of onnx int8: dynamic, static (calibrated on the pipeline's own samples) or by-timestep (scales chosen "
        "by step) (default dynamic)",
    )
    parser.add_argument(
        "--weights",
        default="nearest",
        help="of int4: nearest, or gptq (error-compensating, calibrated on the pipeline's own samples) (default "
        "nearest)",
    )
    parser.add_argument(
        "--backend",
        default="xnnpack",
        help="of executorch: xnnpack, or coreml or qnn where their SDKs are installed; files of those two are not run "
        "(default xnnpack)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest relative error of a forward, over all sampling timesteps (default 1e-3 for fp32, 1e-2 for fp16, "
        "5e-2 for int8, 3e-1 for int4)",
    )
    parser.add_argument(
        "--min-psnr",
        type=float,
        metavar="DB",
        help="least signal-to-noise ratio of the images of the whole loop; in int4, layers get 8 bits until it is "
        "reached (default 50 for fp32, 40 for fp16, else 25)",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="text to image: a prompt a line, to calibrate and verify with (default: eight plain ones)",
    )
    parser.add_argument("--images", type=int, default=8, help="images that are compared (default 8)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the runtimes that are compared (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images that are compared (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an older pipeline folder at --output")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model's repository holds")


def parse_resolution(text: str | None) -> tuple[int, int] | str | None:
    """`"HxW"` → (height, width); `"dynamic"` and `None` as they are.

    Raises:
        EdgeDiTError: it is something else.
    """
    if text is None or text == "dynamic":
        return text
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise EdgeDiTError(f"--resolution is {text!r}; give height and width in pixels, such as 256x256, or dynamic.")
    return int(match[1]), int(match[2])


def read_prompts(path: str | None) -> list[str] | None:
    """The lines of a file that are not empty (`None` for no file).

    Raises:
        EdgeDiTError: it cannot be read, or is empty.
    """
    if path is None:
        return None
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeDiTError(
            f"--prompts {path} cannot be read ({error}); give a text file with a prompt a line."
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise EdgeDiTError(f"--prompts {path} holds no prompt; give a text file with a prompt a line.")
    return prompts


def run_export(args: Any) -> None:
    """Export as the parsed options ask, and print what was measured.

    Raises:
        EdgeDiTError: an option is unknown, the model cannot be loaded, or a gate fails.
    """
    if args.format not in DTYPES:
        raise EdgeDiTError(f"--format is {args.format!r}; the formats are {', '.join(DTYPES)}.")
    if args.dtype not in DTYPES[args.format]:
        raise EdgeDiTError(
            f"--dtype is {args.dtype!r}; the format {args.format} exists as {', '.join(DTYPES[args.format])}."
        )
    resolution, prompts = parse_resolution(args.resolution), read_prompts(args.prompts)
    check_ranges(
        batch=None if args.batch == "dynamic" else args.batch,
        opset=args.opset,
        tolerance=args.tolerance,
        min_psnr=args.min_psnr,
        images=args.images,
        threads=args.threads,
        seed=args.seed,
    )
    for side in resolution if isinstance(resolution, tuple) else ():
        check_ranges(resolution=side)
    check_output(args.output, [args.model, args.prompts], overwrite=args.overwrite)
    from ..export.pipeline import export_pipeline

    folder = export_pipeline(
        args.model,
        args.output,
        format=args.format,
        dtype=args.dtype,
        batch=args.batch,
        split_conditioner=args.split_conditioner,
        subnet=args.subnet,
        resolution=resolution,
        opset=args.opset,
        tolerance=args.tolerance,
        min_psnr_db=args.min_psnr,
        activations=args.activations,
        weights=args.weights,
        backend=args.backend,
        prompts=prompts,
        num_images=args.images,
        seed=args.seed,
        threads=args.threads,
        overwrite=args.overwrite,
        trust_remote_code=args.trust_remote_code,
        inputs=[args.prompts],
    )
    print(summary(read_json(folder / "verify.json", "the export"), read_json(folder / "bench.json", "the export")))
    if args.format == "coreml" or args.backend != "xnnpack":
        print(f"Wrote {folder}; PORTING.md in it says how to run it on a device.")
    else:
        print(f"Wrote {folder}; load it with: import edgedit_hf; DiffusionPipeline.from_pretrained({str(folder)!r})")


def summary(verify: dict, bench: dict) -> str:
    """The measured figures in a few lines."""
    if verify["passed"] is None:
        sizes = ", ".join(f"{file} {facts['bytes'] / 1e6:.2f} MB" for file, facts in bench["parts"].items())
        return f"{verify['precision']}: {sizes}\n{verify['not_run']}"
    images = "equal images" if verify["psnr_db"] is None else f"images at {verify['psnr_db']:.1f} dB"
    lines = [
        f"{verify['precision']}: relative error {verify['relative_error']:.2g} (tolerance {verify['tolerance']:g}), "
        f"{images} after {verify['steps']} steps, weights {bench['initializer_bytes'] / 1e6:.2f} MB "
        f"(1/{bench['initializer_shrink']:.2f} of fp32)"
    ]
    if "linear_layers" in bench:
        lines.append("linear layers: " + ", ".join(f"{count} {kind}" for kind, count in bench["linear_layers"].items()))
    if "delegation" in bench:
        outside = sum(bench["delegation"]["portable"].values())
        lines.append(f"operators: {bench['delegation']['delegated']} in XNNPACK, {outside} outside it")
    for entry in bench["latency"]:
        times = ", ".join(f"{name} {timing['median_ms']:.2f} ms" for name, timing in entry["timings"].items())
        lines.append(f"batch {entry['batch']}, {bench['environment']['threads']} threads: {times}")
    for file, facts in bench["parts"].items():
        lines.append(f"{file}: {facts['file_bytes'] / 1e6:.2f} MB")
    return "\n".join(lines)


class EdgeDiTExportCommand(BaseOptimumCLICommand):
    """The subcommand `edgedit` of `optimum-cli export`; ends with exit code 2 and one line on stderr if it cannot."""

    COMMAND = CommandInfo(
        name="edgedit",
        help="Export a diffusion transformer's pipeline to ONNX, ExecuTorch or Core ML, verified against the model and "
        "timed.",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Called by optimum-cli to add the options."""
        add_arguments(parser)

    def run(self) -> None:
        """Called by optimum-cli."""
        code = guard(lambda: run_export(self.args), "optimum-cli export edgedit")
        if code:
            raise SystemExit(code)
