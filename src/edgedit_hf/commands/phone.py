"""`edgedit phone`: measure a run's networks on a phone, and make a latency table of what it measured."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the `edgedit` parser."""
    parser = subparsers.add_parser("phone", help="measure on a phone: networks out, a latency table back")
    steps = parser.add_subparsers(title="steps", metavar="STEP", required=True)
    pack = steps.add_parser("pack", help="write the networks of a latency table with the scripts that time them")
    pack.add_argument(
        "run_dir", metavar="RUN", type=Path, help="the run's folder (output_dir of its recipe); with a bank"
    )
    pack.add_argument("output", metavar="OUT", help="folder to write; it must not be there yet")
    pack.add_argument(
        "--runtime",
        default="onnxruntime",
        choices=("onnxruntime", "executorch", "coreml"),
        help="onnxruntime and executorch over adb, coreml in an app from Xcode; default onnxruntime",
    )
    pack.add_argument(
        "--precision",
        metavar="P",
        help="fp32, int8, int4 (executorch: 8da4w) or fp16 (coreml); default fp32, coreml fp16",
    )
    pack.add_argument("--batch", type=int, default=1, metavar="N", help="images a forward; default 1")
    pack.add_argument("--teacher", metavar="PATH", help="folder of the teacher's pipeline, of a run that was given one")
    pack.set_defaults(run=run_pack)
    load = steps.add_parser("import", help="make a latency table of what a device measured")
    load.add_argument("results", metavar="RESULTS", type=Path, help="CSV file of the device's results")
    load.add_argument(
        "place",
        metavar="RUN_OR_BUNDLE",
        type=Path,
        help="what was measured: the folder of a bundle, or the run it is of",
    )
    load.add_argument("--device", required=True, metavar="NAME", help='what it is, such as "Galaxy S25 Ultra"')
    load.add_argument("--output", metavar="FILE", type=Path, help="table to write; default table.json beside RESULTS")
    load.set_defaults(run=run_import)


def run_pack(args: argparse.Namespace) -> None:
    """Lower, write, and say what to do with it."""
    from ..phone.bundle import check_kind, subject_of
    from ..phone.pack import PRECISION, write_pack
    from ..run.sections import BATCH
    from ..schema import Rule, check_option

    check_option("batch", args.batch, Rule(minimum=1, maximum=BATCH))
    check_kind(args.runtime, args.precision or PRECISION[args.runtime])
    bundle = write_pack(
        args.output,
        subject_of(args.run_dir, args.teacher),
        runtime=args.runtime,
        precision=args.precision,
        batch=args.batch,
        tell=print,
    )
    print(
        f"{args.output}: {len(bundle.networks)} networks of {bundle.runtime}-{bundle.precision}, bundle {bundle.hash}; "
        "README.md says how they are measured"
    )


def run_import(args: argparse.Namespace) -> None:
    """Read, fit, judge, write, and say how good it is."""
    from ..errors import EdgeDiTError
    from ..phone.table import import_table
    from ..run.outputs import check_writable
    from ..schema import Rule, convert
    from ..search.device_tables import load_table

    device = convert(args.device, str, "--device", Rule(length=(1, 300)))
    output = args.results.parent / "table.json" if args.output is None else args.output
    if output.is_dir() or output.resolve() == args.results.resolve():
        raise EdgeDiTError(f"The output {output} is a folder, or the results themselves; give a file to write.")
    if output.exists():
        try:
            load_table(output)
        except EdgeDiTError:
            raise EdgeDiTError(
                f"{output} exists and is no latency table; it is left as it is. Give another --output."
            ) from None
    check_writable(output.parent, output)
    table = import_table(args.results, args.place, device)
    for remark in table.remarks:
        print(f"{device}: {remark}.")
    table.to_json(output)
    prediction = table.to_dict()["prediction"]
    print(
        f"{output}: {table.runtime}-{table.precision} on {device}, hash {table.hash}; whole networks predicted within "
        f"{prediction['mean']:.1%} on average, Kendall's τ {prediction['kendall'] or 0:.2f}"
    )
