"""`edgedit`: look at models, convert foreign checkpoints, get the recipes, start a run, choose another point of its front, write its report.

Exit codes: 0 done, 2 a clear message about the input (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import EdgeDiTError
from . import convert, info, init, recipes, report, select

COMMANDS = (info, convert, init, recipes, select, report)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; building it imports neither torch nor diffusers."""
    parser = argparse.ArgumentParser(prog="edgedit", description="Compress a diffusion transformer into one a phone can run.")
    parser.add_argument("--version", action="version", version=f"edgedit_hf {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except EdgeDiTError as error:
        print(f"edgedit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`edgedit init | head`); without this, Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
