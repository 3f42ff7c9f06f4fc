"""`edgedit recipes`: give an installed package's training recipes to its user."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors import EdgeDiTError

SUFFIXES = (".py", ".yaml")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the `edgedit` parser."""
    parser = subparsers.add_parser("recipes", help="copy the training recipes into a folder of yours")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    copy = actions.add_parser("copy", help="copy the recipes, their YAML files and the launch configurations")
    copy.add_argument("folder", metavar="DIR", help="folder to copy into; made if it does not exist")
    copy.add_argument("--force", action="store_true", help="replace files there that differ")
    copy.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Copy, and say how to start."""
    written = copy_recipes(args.folder, args.force)
    folder = Path(args.folder)
    print(f"{len(written)} files are in {folder}. To start:")
    print(f"  edgedit train {folder / 'compress.py'} --config {folder / 'recipes' / 'digits.yaml'}")
    print(
        f"or  accelerate launch --config_file {folder / 'accelerate' / 'cpu.yaml'} {folder / 'compress.py'} --config …"
    )


def copy_recipes(folder: str | os.PathLike, force: bool = False) -> list[Path]:
    """Copy training/ of the installed package into `folder`; returns the files there. Files that are equal are left
    alone.

    Raises:
        EdgeDiTError: files of these names with another content are there (and `force` is false), or the folder cannot
            be written. Nothing has been copied then.
    """
    from importlib.resources import as_file, files

    from ..files import atomic_write_text
    from ..run.outputs import check_output

    with as_file(files("edgedit_hf.training")) as source:
        check_output(folder, [source], foreign=None)
        texts = {
            path.relative_to(source): path.read_text(encoding="utf-8")
            for path in sorted(source.rglob("*"))
            if path.suffix in SUFFIXES and path.name != "__init__.py" and "__pycache__" not in path.parts
        }
    folder = Path(folder)
    outside = [
        name
        for name in texts
        if not Path(os.path.realpath((folder / name).parent)).is_relative_to(os.path.realpath(folder))
    ]
    if outside:
        raise EdgeDiTError(
            f"{folder / outside[0]} would be written through a link, to "
            f"{os.path.realpath((folder / outside[0]).parent)}; remove the link."
        )
    differing = [name for name, text in texts.items() if (folder / name).exists() and not _holds(folder / name, text)]
    if differing and not force:
        shown = ", ".join(map(str, differing[:3])) + (", …" if len(differing) > 3 else "")
        raise EdgeDiTError(
            f"{folder} already holds {len(differing)} of these files with other content ({shown}); "
            "copy into another folder, or replace them with --force."
        )
    for name, text in texts.items():
        if not (folder / name).exists() or name in differing:
            atomic_write_text(folder / name, text)
    return [folder / name for name in texts]


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except (UnicodeDecodeError, IsADirectoryError):
        return False
