"""Put what was recorded into the pages: `make results`.

    python benchmarks/results.py [--check]

Every file of benchmarks/results/ is a record (benchmarks/record.py). A page of docs/, or the README, has the tables of
one between two marks, and docs/results.md those of all:

    <!-- results: NAME -->             all tables of the record NAME, or one: NAME/TABLE
    <!-- /results -->

What stands between them is written here and nowhere else. --check writes nothing, and fails where a page has other
tables than the records.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tables import tables_of

from edgedit_hf.entry import guard
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.files import atomic_write_text
from edgedit_hf.markup import code, markdown
from edgedit_hf.schema import key, read_record

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
FORMAT = "edgedit-record-1"
ALL = "all"
MARK = re.compile(r"^<!-- (/?)results(?:: .+?)? -->$", flags=re.MULTILINE)
REGION = re.compile(r"^<!-- results: (.+?) -->\n.*?^<!-- /results -->$", flags=re.DOTALL | re.MULTILINE)
# Of the libraries whose versions a record has, those that a table names.
NAMED = ("torch", "onnxruntime", "executorch", "diffusers")


@dataclass(kw_only=True)
class Machine:
    """What a record was measured on; nothing that tells one machine of a kind from another."""

    cpu: str = key()
    cores: int = key(minimum=1, maximum=4096)
    threads: int = key(minimum=1, maximum=4096)
    versions: dict[str, str] = key()


@dataclass(kw_only=True)
class Record:
    """A file of benchmarks/results/.

    `kind` is the script that measured it, "run" for a run's report or "ranking" for a study of objectives; `printed`
    is what a script printed before its JSON object, `result` that object; `dirty` says whether tracked files differed
    from the commit.
    """

    format: str = key(choices=(FORMAT,))
    kind: str = key()
    title: str = key()
    command: str = key()
    commit: str = key()
    dirty: bool = key()
    date: str = key()
    machine: Machine = key()
    printed: list[str] = key(length=(0, 4096), free=True)
    result: dict[str, Any] = key()


def read(path: Path) -> dict[str, Any]:
    """A record.

    Raises:
        EdgeDiTError: the file is no JSON, or of another layout.
    """
    return read_record(path, Record, "python benchmarks/record.py", "a record of results")


def provenance(record: dict[str, Any]) -> str:
    """What a record was measured with, in one line."""
    machine, versions = record["machine"], record["machine"]["versions"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    libraries = ", ".join(f"{name} {versions[name]}" for name in NAMED if name in versions)
    commit = f"commit {record['commit'][:7]}{', with changes since' if record['dirty'] else ''}"
    return (
        f"{code(record['command'])}, {record['date']}, {commit}; {markdown(machine['cpu'])}, "
        f"{machine['cores']} cores, {threads}; {libraries}."
    )


def chosen(name: str) -> str:
    """The tables that a mark names: `NAME` or `NAME/TABLE`, with a line that says where they are from.

    Raises:
        EdgeDiTError: there is no such record, or it has no such table.
    """
    record, _, one = name.partition("/")
    path = RESULTS / f"{record}.json"
    if not path.is_file():
        there = ", ".join(file.stem for file in sorted(RESULTS.glob("*.json")))
        raise EdgeDiTError(f"A page asks for the record {record!r}; benchmarks/results/ has {there}.")
    values = read(path)
    made = tables_of(values)
    if one and one not in made:
        raise EdgeDiTError(f"A page asks for the table {name!r}; the record has {', '.join(map(repr, made))}.")
    return "\n\n".join([made[one]] if one else made.values())


def every() -> str:
    """All records, a section each."""
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        record = read(path)
        tables = [f"*{label}*\n\n{table}" if label else table for label, table in tables_of(record).items()]
        parts.append("\n\n".join([f"### {path.stem}", record["title"], provenance(record), *tables]))
    return "\n\n".join(parts)


def without_partner(text: str) -> re.Match | None:
    """The first mark that begins a region without an end, or ends none."""
    opened = None
    for mark in MARK.finditer(text):
        ends = bool(mark[1])
        if ends != (opened is not None):
            return opened or mark
        opened = None if ends else mark
    return opened


def filled(page: Path) -> str:
    """A page with the tables of the records between its marks."""
    beside, text = Path(os.path.relpath(PAGE, page.parent)).as_posix(), page.read_text(encoding="utf-8")
    if alone := without_partner(text):
        line = text.count("\n", 0, alone.start()) + 1
        raise EdgeDiTError(f"{page}, line {line}: {alone[0]} has no other mark that belongs to it; add it.")

    def between(found: re.Match) -> str:
        name = found[1]
        if name == ALL:
            text = every()
        else:
            record = name.partition("/")[0]
            text = f"{chosen(name)}\n\n[How and where it was measured]({beside}#{record})"
        return f"<!-- results: {name} -->\n\n{text}\n\n<!-- /results -->"

    return REGION.sub(between, text)


def pages() -> Iterator[Path]:
    """The pages that have marks."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        if MARK.search(page.read_text(encoding="utf-8")):
            yield page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page has other tables")
    arguments = parser.parse_args()
    other = [page for page in pages() if filled(page) != page.read_text(encoding="utf-8")]
    if arguments.check and other:
        names = ", ".join(str(page.relative_to(ROOT)) for page in other)
        raise EdgeDiTError(f"{names} has other tables than benchmarks/results/; run make results.")
    for page in other:
        atomic_write_text(page, filled(page))
        print(page.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(guard(main, "results.py"))
