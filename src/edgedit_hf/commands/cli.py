"""`edgedit`: look at models and banks, convert foreign checkpoints, get the recipes, start a run, choose another point
of its front, write its report, fetch from the Hub.

Exit codes: 0 done, 2 a clear message about the input (one line on stderr), 130 and 143 interrupted, 70 our fault
([`entry`]).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .. import __version__
from ..entry import guard
from . import bank, card, convert, info, init, phone, pull, push, recipes, report, select, train

COMMANDS = (info, convert, init, recipes, train, bank, select, phone, report, card, push, pull)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; building it imports neither torch nor diffusers."""
    parser = argparse.ArgumentParser(
        prog="edgedit", description="Compress a diffusion transformer into one a phone can run."
    )
    parser.add_argument("--version", action="version", version=f"edgedit_hf {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""

    def work() -> None:
        args = build_parser().parse_args(argv)
        args.run(args)

    return guard(work, "edgedit")
