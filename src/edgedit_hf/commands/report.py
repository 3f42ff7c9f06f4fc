"""`edgedit report`: write a run's report from what its stages measured."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the `edgedit` parser."""
    parser = subparsers.add_parser("report", help="write report.html and report.json of a run")
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="the run's folder (output_dir of its recipe)")
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
    if (args.run_dir / "elastic").is_dir() and not (args.run_dir / "bank").exists():
        from ..errors import EdgeDiTError
        from ..report.elastic import write_elastic_report

        if args.table:
            raise EdgeDiTError(
                f"{args.run_dir} is a run of text to image, which has no latency tables; leave out --table."
            )
        write_elastic_report(args.run_dir)
    else:
        from ..report.edgedit import write_report

        write_report(args.run_dir, args.table)
    print(args.run_dir / "report.html")
