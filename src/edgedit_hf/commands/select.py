"""`edgedit select`: build another point of a finished search's front, without searching again."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the `edgedit` parser."""
    parser = subparsers.add_parser("select", help="choose another point of a finished search and assemble its student")
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="the run's folder (output_dir of its recipe)")
    parser.add_argument(
        "--max-latency-ms",
        type=float,
        metavar="MS",
        help="latency budget, by the run's table; without it the knee point",
    )
    parser.add_argument(
        "--max-parameters-ratio", type=float, metavar="R", help="parameters at most this share of the teacher's"
    )
    parser.add_argument(
        "--accept-other", action="store_true", help="take the run's latency table though it is of another machine"
    )
    parser.add_argument("--output", metavar="DIR", help="pipeline folder to write; default RUN/student")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Choose, assemble, and say what was chosen."""
    from ..schema import Rule, check_option

    check_option("max-latency-ms", args.max_latency_ms, Rule(above=0.0, maximum=1e9))
    check_option("max-parameters-ratio", args.max_parameters_ratio, Rule(above=0.0, maximum=1e6))
    from diffusers.utils import logging as diffusers_logging

    from ..run.stage import DRIVERS, EDGEDIT, STUDENT
    from ..search.selection import select

    diffusers_logging.disable_progress_bar()  # as in `recipe_main`
    output = args.run_dir / STUDENT.folder if args.output is None else args.output
    choice = select(
        args.run_dir,
        max_latency_ms=args.max_latency_ms,
        max_parameters_ratio=args.max_parameters_ratio,
        accept_other=args.accept_other,
        output=output,
    )
    print(f"{output}: genotype {choice['genotype_hash']}, code {choice['code']}, {choice['reason']}")
    print(
        f"table latency {choice['predicted_latency_ms']:.3g} ms of the teacher's {choice['teacher_latency_ms']:.3g} ms"
    )
    if output == args.run_dir / STUDENT.folder:
        later = ", ".join(stage.folder for stage in EDGEDIT[EDGEDIT.index(STUDENT) + 1 :])
        print(
            f"{later}, if they are there, still belong to the earlier choice: delete them and run "
            f"{DRIVERS['compress'][0]} again."
        )
