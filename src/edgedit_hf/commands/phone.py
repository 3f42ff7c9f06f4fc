"""`edgedit phone`: measure a run's networks on a phone, and make a latency table of what it measured."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the `edgedit` parser."""
    parser = subparsers.add_parser("phone", help="measure on a phone: networks out, a latency table back")
    steps = parser.add_subparsers(title="steps", metavar="STEP", required=True)
    pack = steps.add_parser("pack", help="write the networks of a latency table with the scripts that time them")
    _add_subject(pack)
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
    pack.set_defaults(run=run_pack)
    web = steps.add_parser("serve", help="serve a page that times them in the browser that opens it")
    _add_subject(web)
    web.add_argument("--precision", default="fp32", choices=("fp32", "int8"), help="default fp32")
    web.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where to listen; default 127.0.0.1, which only this machine reaches, and a phone after `adb reverse`; "
        "0.0.0.0 is every network",
    )
    web.add_argument("--port", type=int, default=8765, metavar="N", help="default 8765")
    web.add_argument("--certfile", metavar="FILE", type=Path, help="certificate for https, PEM")
    web.add_argument("--keyfile", metavar="FILE", type=Path, help="its key, where it is in a file of its own, PEM")
    web.add_argument(
        "--device",
        metavar="NAME",
        help='what the first device that is through is, such as "Galaxy S25 Ultra": write its table, and end; without '
        "it, devices are measured until Ctrl-C",
    )
    web.add_argument("--output", metavar="FILE", type=Path, help="that table; default table.json beside its results")
    web.set_defaults(run=run_serve)
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


def _add_subject(parser: argparse.ArgumentParser) -> None:
    """Of what networks are made."""
    parser.add_argument(
        "run_dir", metavar="RUN", type=Path, help="the run's folder (output_dir of its recipe); with a bank"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images a forward; default 1")
    parser.add_argument(
        "--teacher", metavar="PATH", help="folder of the teacher's pipeline, of a run that was given one"
    )


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


def run_serve(args: argparse.Namespace) -> None:
    """Make the bundle if it is not there, serve it, and write the table of one device or say how."""
    import shlex

    from ..errors import EdgeDiTError
    from ..export.web.runtime import check_available
    from ..phone.bundle import bundle_in_run, subject_of
    from ..phone.devices import Device
    from ..phone.serve import Bars, serve, tls_of
    from ..run.outputs import check_writable
    from ..run.sections import BATCH
    from ..schema import Rule, check_option, convert

    check_option("batch", args.batch, Rule(minimum=1, maximum=BATCH))
    check_option("port", args.port, Rule(minimum=1, maximum=65535))
    convert(args.host, str, "--host", Rule(length=(1, 253)))
    device = None if args.device is None else convert(args.device, str, "--device", Rule(length=(1, 300)))
    if args.output is not None:
        if device is None:
            raise EdgeDiTError(f"--output is {args.output}, but no --device says whose table it is; give its name.")
        _check_table_place(args.output)
    subject = subject_of(args.run_dir, args.teacher)
    tls = tls_of(args.certfile, args.keyfile)
    check_available()
    check_writable(args.run_dir, args.run_dir)
    bundle = bundle_in_run(args.run_dir, subject, runtime="web", precision=args.precision, batch=args.batch, tell=print)

    def whole(found: Device, bars: Bars) -> None:
        results = found.results()
        if results.throttled:
            bars.tell(f"{found.setting['device']} was {results.drift:.0%} slower in the last rounds: it throttled")
        if device is None:
            name = str(found.setting["device"])
            words = ["edgedit", "phone", "import", str(found.file), str(args.run_dir), "--device", name]
            bars.tell(f"{name} is through; its latency table: {shlex.join(words)}")

    found = serve(
        bundle,
        Path(args.run_dir, "phone", "results", bundle.hash),
        host=args.host,
        port=args.port,
        tls=tls,
        once=device is not None,
        whole=whole,
    )
    assert device is not None, "without a name it ends by Ctrl-C alone"
    _write_table(found.file, bundle.folder, device, args.output)


def run_import(args: argparse.Namespace) -> None:
    """Read, fit, judge, write, and say how good it is."""
    from ..schema import Rule, convert

    device = convert(args.device, str, "--device", Rule(length=(1, 300)))
    _write_table(args.results, args.place, device, args.output)


def _check_table_place(output: Path, results: Path | None = None) -> None:
    """Raise an error where no table may be written."""
    from ..errors import EdgeDiTError
    from ..run.outputs import check_writable
    from ..search.device_tables import load_table

    if output.is_dir() or results is not None and output.resolve() == results.resolve():
        raise EdgeDiTError(f"The output {output} is a folder, or the results themselves; give a file to write.")
    if output.exists():
        try:
            load_table(output)
        except EdgeDiTError:
            raise EdgeDiTError(
                f"{output} exists and is no latency table; it is left as it is. Give another --output."
            ) from None
    check_writable(output.parent, output)


def _write_table(results: Path, place: Path, device: str, output: Path | None) -> None:
    """Make a table of results, and say how good it is."""
    from ..phone.table import import_table

    output = results.parent / "table.json" if output is None else output
    _check_table_place(output, results)
    table = import_table(results, place, device)
    for remark in table.remarks:
        print(f"{device}: {remark}.")
    table.to_json(output)
    prediction = table.to_dict()["prediction"]
    print(
        f"{output}: {table.runtime}-{table.precision} on {device}, hash {table.hash}; whole networks predicted within "
        f"{prediction['mean']:.1%} on average, Kendall's τ {prediction['kendall'] or 0:.2f}"
    )
