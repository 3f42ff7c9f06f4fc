"""`edgedit pull`: a whole copy of a repository of the Hub in a folder, checked."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the `edgedit` parser."""
    parser = subparsers.add_parser("pull", help="copy a repository of the Hub into a folder, whole and checked")
    parser.add_argument(
        "name",
        metavar="NAME",
        help="org/name of a pipeline, export, proxy bank or latency table, or hf://org/name[@revision][/folder]",
    )
    parser.add_argument("output", metavar="OUT", help="folder to write; it must not be there yet")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit (default: the default branch)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Fetch, check, write, and say what it is."""
    from ..errors import EdgeDiTError
    from ..hub import is_name, pull
    from ..run.outputs import check_place, check_writable

    if not is_name(args.name):
        raise EdgeDiTError(f"{args.name} is a path on this machine, or no name on the Hub; give org/name.")
    output = check_place(args.output)
    if output.exists() and any(output.iterdir()):
        raise EdgeDiTError(f"{args.output} is there already and is left as it is; choose another output.")
    check_writable(output, args.output)
    pulled = pull(args.name, output, revision=args.revision)
    print(
        f"{args.output}: {pulled.files} files, {pulled.size / 1e6:,.2f} MB, of {args.name} at commit "
        f"{pulled.commit[:12]}"
    )
