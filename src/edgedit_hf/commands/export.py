"""`optimum-cli export edgedit`: a verified and timed pipeline folder of ONNX, ExecuTorch or Core ML artefacts, or a web
page around ONNX files. Imports torch only when it runs.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..entry import guard
from ..errors import EdgeDiTError
from ..export.formats import FIXED_BATCH, FORMATS, ExportOptions, Resolution, dtype_words, gate_words
from ..files import read_json, read_prompt_lines
from ..run.outputs import check_output


def add_arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    open_formats = ", ".join(name for name, target in FORMATS.items() if target.dynamic)
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH_OR_ID",
        help="pipeline folder or Hub id of an EdgeDiTPipeline or ElasticDiTPipeline",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="pipeline folder to write")
    parser.add_argument(
        "--format",
        default=ExportOptions.format,
        help=f"artefact format: {', '.join(FORMATS)} (default {ExportOptions.format})",
    )
    parser.add_argument(
        "--dtype",
        default=ExportOptions.dtype,
        help=f"precision: {dtype_words()} (default {ExportOptions.dtype})",
    )
    parser.add_argument(
        "--batch",
        help=f"rows of a forward: a number or, for {open_formats}, 'dynamic'; guidance makes it twice the images "
        f"(default: dynamic for {open_formats}, else {FIXED_BATCH}, without guidance 1)",
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
        help=f"height and width in pixels, or 'dynamic' for {open_formats} (default: what the network was made for)",
    )
    parser.add_argument(
        "--opset", type=int, help="ONNX operator set, 18 or later (default: the newest this package was tested with)"
    )
    parser.add_argument(
        "--activations",
        default=ExportOptions.activations,
        help="of onnx int8: dynamic, static (calibrated on the pipeline's own samples) or by-timestep (scales chosen "
        f"by step) (default {ExportOptions.activations})",
    )
    parser.add_argument(
        "--weights",
        default=ExportOptions.weights,
        help="of int4: nearest, or gptq (error-compensating, calibrated on the pipeline's own samples) (default "
        f"{ExportOptions.weights})",
    )
    parser.add_argument(
        "--backend",
        default=ExportOptions.backend,
        help="of executorch: xnnpack, or coreml or qnn where their SDKs are installed; files of those two are not run "
        f"(default {ExportOptions.backend})",
    )
    parser.add_argument(
        "--one-file",
        action="store_true",
        help="of executorch: write all networks as methods of one more file too, pipeline.pte",
    )
    parser.add_argument(
        "--runtime-url",
        metavar="URL",
        help="of web: address of a folder with onnxruntime-web's files, which the page asks beside its own (default: a "
        "copy beside the page, fetched with npm)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help=f"largest relative error of a forward, over all sampling timesteps (default {gate_words('tolerance')})",
    )
    parser.add_argument(
        "--min-psnr",
        type=float,
        metavar="DB",
        help="least signal-to-noise ratio of the images of the whole loop; in int4, layers get 8 bits until it is "
        f"reached (default {gate_words('min_psnr_db')})",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="text to image: a prompt a line, to calibrate and verify with (default: eight plain ones)",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=ExportOptions.num_images,
        help=f"images that are compared (default {ExportOptions.num_images})",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=ExportOptions.threads,
        help=f"threads of the runtimes that are compared (default {ExportOptions.threads})",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=ExportOptions.seed,
        help=f"seed of the images that are compared (default {ExportOptions.seed})",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an older pipeline folder at --output")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model's repository holds")


def parse_resolution(text: str | None) -> Resolution:
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
    return [line for _, line in read_prompt_lines(path, "--prompts")]


def run_export(args: Any) -> None:
    """Export as the parsed options ask, and print what was measured.

    Raises:
        EdgeDiTError: an option is unknown, the model cannot be loaded, or a gate fails.
    """
    options = ExportOptions(
        format=args.format,
        dtype=args.dtype,
        batch=args.batch,
        one_file=args.one_file,
        split_conditioner=args.split_conditioner,
        subnet=args.subnet,
        resolution=parse_resolution(args.resolution),
        opset=args.opset,
        tolerance=args.tolerance,
        min_psnr_db=args.min_psnr,
        activations=args.activations,
        weights=args.weights,
        backend=args.backend,
        runtime_url=args.runtime_url,
        prompts=read_prompts(args.prompts),
        num_images=args.images,
        seed=args.seed,
        threads=args.threads,
        overwrite=args.overwrite,
        trust_remote_code=args.trust_remote_code,
        inputs=[args.prompts],
    )
    check_output(args.output, [args.model, args.prompts], overwrite=args.overwrite)
    from ..export.pipeline import export_pipeline

    folder = export_pipeline(args.model, args.output, options)
    print(summary(read_json(folder / "verify.json", "the export"), read_json(folder / "bench.json", "the export")))
    if options.format == "web":
        print(f"Wrote {folder}; open it with: python -m http.server --directory {folder} 8000")
    elif options.not_run:
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
        help="Export a diffusion transformer's pipeline to ONNX, ExecuTorch, Core ML or a web page, verified against "
        "the model and timed.",
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
