"""`edgedit init`: print a recipe with every key and what it means."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the `edgedit` parser."""
    parser = subparsers.add_parser("init", help="print a recipe (YAML, every key commented): edgedit init … > run.yaml")
    parser.add_argument(
        "--teacher", metavar="PATH_OR_ID", help="the trained model to compress; without it one is trained"
    )
    parser.add_argument("--data", metavar="SOURCE", help="'digits', an image folder, or a `datasets` id")
    parser.add_argument("--output", metavar="DIR", help="folder of the run")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the recipe."""
    from ..run.config import commented_yaml

    given = {"teacher.path": args.teacher, "data.source": args.data, "output_dir": args.output}
    print(commented_yaml([f"{key}={value}" for key, value in given.items() if value is not None]), end="")
