"""`edgedit push`: a pipeline, an export, a proxy bank or a latency table onto the Hub, checked and with its card."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the `edgedit` parser."""
    parser = subparsers.add_parser("push", help="put a folder on the Hub, checked, with a card made of its figures")
    parser.add_argument("folder", metavar="SOURCE", type=Path, help="folder of a pipeline, export, bank or table")
    parser.add_argument("repo_id", metavar="REPO_ID", help="where to: organisation/name")
    parser.add_argument("--path-in-repo", metavar="FOLDER", default="", help="a folder of the repository, not its root")
    parser.add_argument("--license", metavar="ID", help="the Hub's licence identifier, where the card cannot know it")
    parser.add_argument("--base-model", metavar="ORG/NAME", help="the Hub's model that it was made from")
    parser.add_argument("--report", metavar="FILE", type=Path, help="report.json of its figures; default its run's")
    parser.add_argument("--subnet", metavar="NAME", help="of a supernet: this width, as a pipeline of its own")
    parser.add_argument("--collection", metavar="TITLE", help="a collection of yours that it is put into")
    parser.add_argument("--public", action="store_true", help="make a new repository public, not private")
    parser.add_argument("--bundle-code", action="store_true", help="with the code, for users without this package")
    parser.add_argument("--unverified", action="store_true", help="also an export that could not be run here")
    parser.add_argument("--replace", action="store_true", help="also over another kind of thing")
    parser.add_argument(
        "--own-card", action="store_true", help="with the README.md that lies there, not a card made now"
    )
    parser.add_argument("--dry-run", action="store_true", help="list files and bytes, and stop; asks nobody")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Plan, say what goes, and send it."""
    with _source(args.folder, args.subnet) as folder:
        _push(args, folder)


@contextmanager
def _source(folder: Path, subnet: str | None) -> Iterator[Path]:
    """The folder that is pushed: the given one, or one for as long as it takes with a width of the supernet there."""
    if subnet is None:
        yield folder
        return
    from ..errors import EdgeDiTError
    from ..folders import look_at

    contents = look_at(folder)
    widths = sorted(contents.config.get("subnets") or {})
    if contents.kind not in ("supernet", "few-step", "quantized") or subnet not in widths:
        raise EdgeDiTError(
            f"{folder} has no width {subnet!r}; its widths are {', '.join(widths) or 'none: it is no supernet'}."
        )
    from ..pipelines import ElasticDiTPipeline

    with tempfile.TemporaryDirectory(prefix="edgedit-push-") as aside:
        target = Path(aside, f"{folder.resolve().name}-{subnet}")
        ElasticDiTPipeline.from_pretrained(folder, subnet=subnet).save_pretrained(target)
        if (folder / "README.md").is_file():
            shutil.copyfile(folder / "README.md", target / "README.md")
        yield target


def _push(args: argparse.Namespace, folder: Path) -> None:
    from ..publish.push import plan, push

    beside = args.folder.resolve().parent / "report.json"
    planned = plan(
        folder,
        args.repo_id,
        path=args.path_in_repo,
        license=args.license,
        base_model=args.base_model,
        report=beside if args.report is None and args.subnet is not None and beside.is_file() else args.report,
        unverified=args.unverified,
        bundle_code=args.bundle_code,
        own_card=args.own_card,
    )
    if args.dry_run:
        for item in planned.items:
            print(f"{item.size:>15,}  {item.name}")
        print(f"{planned.size:>15,}  bytes in {len(planned.items)} files to {planned.repo_id}, tag {planned.tag}")
        print(f"commit: {planned.message}")
        if planned.left_out:
            print(f"stays here: {', '.join(planned.left_out)}")
        return
    done = push(planned, private=not args.public, replace=args.replace, collection=args.collection)
    said = "" if done.changed else " (nothing had changed, nothing was sent)"
    print(f"{done.url} at {done.commit[:12]}, tag {done.tag}{said}")
