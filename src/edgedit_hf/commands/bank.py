"""`edgedit bank`: what the choices of a proxy bank cost and what they save."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the `edgedit` parser."""
    parser = subparsers.add_parser("bank", help="list a proxy bank's choices with loss, latency and size")
    parser.add_argument(
        "bank", metavar="RUN", help="the folder of a run or of a bank, or a bank's name on the Hub (org/name)"
    )
    parser.add_argument(
        "--table",
        metavar="FILE",
        help="latency table (table.json, or its name on the Hub) that has the times; default the run's own, of several "
        "devices the first one's",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print what [`describe`] finds."""
    from ..report.bank import bank_table

    found = describe(args.bank, args.table)
    print(json.dumps(found, indent=2) if args.json else "\n".join(bank_table(found)))


def describe(name: str, table: str | None = None) -> dict[str, Any]:
    """The choices of a bank that is given by its run, folder or name on the Hub, see [`report.bank.bank_choices`].

    Raises:
        EdgeDiTError: there is no bank, or the table belongs to another teacher.
    """
    from ..errors import EdgeDiTError
    from ..folders import BANK_INDEX, look_at
    from ..hub import resolve
    from ..records import BankFigures
    from ..report.bank import bank_choices
    from ..run.stage import BANK, LATENCY
    from ..schema import held_to
    from ..search.device_tables import load_table

    folder = resolve(name, [BANK_INDEX])
    if not (folder / BANK_INDEX).is_file() and (folder / BANK.folder).is_dir():
        folder = folder / BANK.folder
    contents = look_at(folder)
    if contents.kind != "bank":
        raise EdgeDiTError(f"{folder} holds a {contents.kind}, no proxy bank; give the folder of a run or of a bank.")
    held_to(contents.config, BankFigures, folder / BANK_INDEX, BANK.made_by, "a proxy bank")
    if table is None and (file := folder.parent / LATENCY.folder / "table.json").is_file():
        table = str(file)
    times = None if table is None else next(iter(load_table(table).devices.values()))
    return {"bank": str(folder), "table": table, **bank_choices(contents.config, times)}
