"""`edgedit card`: write the model card of a folder from what was measured of it."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the `edgedit` parser."""
    parser = subparsers.add_parser("card", help="write the model card (README.md) of a pipeline, export, bank or table")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="what the card is of; it is written into it")
    parser.add_argument(
        "--repo-id",
        metavar="ID",
        help="where it will live on the Hub; without it the card loads the folder by its own name",
    )
    parser.add_argument(
        "--license",
        metavar="L",
        help="the Hub's identifier, or name=link for another; default that of the base model, where it is known",
    )
    parser.add_argument("--base-model", metavar="ID", help="the Hub's id of what it was made from")
    parser.add_argument(
        "--report", metavar="FILE", type=Path, help="report.json that has its figures; default that of its run"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the card and say where it is."""
    from ..report.card import write_card

    options = {"repo_id": args.repo_id, "license": args.license, "base_model": args.base_model}
    print(write_card(args.folder, args.report, **options))
