"""`edgedit report`: write a run's report from what its stages measured, or one page of several runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the `edgedit` parser."""
    parser = subparsers.add_parser("report", help="write report.html and report.json of a run, or a page of several")
    parser.add_argument(
        "run_dirs", metavar="RUN", nargs="+", type=Path, help="the run's folder (output_dir of its recipe)"
    )
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="of several runs: the HTML file to write, which compares them"
    )
    parser.add_argument(
        "--table",
        metavar="FILE",
        action="append",
        default=[],
        help="latency table of another device (edgedit phone import) to compare the run's with; may be given again",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the report, of either family, and say where it is."""
    from ..errors import EdgeDiTError
    from ..report.page import is_text_to_image

    if len(args.run_dirs) > 1:
        from ..report.merged import write_merged

        if args.output is None:
            raise EdgeDiTError(f"{len(args.run_dirs)} runs are given, but no --output; say which page to write.")
        if args.table:
            raise EdgeDiTError("--table compares devices in the report of one run; give one run, or leave it out.")
        print(write_merged(args.run_dirs, args.output))
        return
    (run_dir,) = args.run_dirs
    if args.output is not None:
        raise EdgeDiTError(
            f"--output {args.output} is for the page of several runs; that of one is {run_dir / 'report.html'}. Leave "
            "it out."
        )
    if is_text_to_image(run_dir):
        from ..report.elastic import write_elastic_report

        if args.table:
            raise EdgeDiTError(f"{run_dir} is a run of text to image, which has no latency tables; leave out --table.")
        write_elastic_report(run_dir)
    else:
        from ..report.edgedit import write_report

        write_report(run_dir, args.table)
    print(run_dir / "report.html")
