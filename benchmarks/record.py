"""Keep what was measured: the JSON of a benchmark or of a finished run, with command, commit, machine and date.

    python benchmarks/record.py NAME -- SCRIPT.py [ARGUMENT …]
    python benchmarks/record.py NAME --of FILE --command "COMMAND"

The first form runs a script of this folder with --json. The second takes what a finished run wrote: report.json of its
folder (of which a summary is kept), or ranking/ranking.json; COMMAND is the one that made the run, and the commit is
that of the checkout in which FILE lies. Either writes benchmarks/results/NAME.json, which is all that `make results`
reads: a figure of the documentation that stands in it is never typed.

Nothing that names this machine is kept: a result that holds a path from the root of a disk, or the machine's name, is
refused. Measure with a clean checkout; `dirty` says if it was not.
"""

import argparse
import ast
import datetime
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from results import FORMAT, RESULTS, Record
from tables import tables_of

from edgedit_hf.entry import guard
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.files import atomic_write_text, read_json
from edgedit_hf.private import local_paths
from edgedit_hf.runtimes.timing import environment
from edgedit_hf.schema import held_to

HERE = Path(__file__).resolve().parent
DIGITS = 6  # kept of every number
# What is kept of a model of a run's report.
MODEL = (
    "name stage width parameters flops bytes latency_ms metrics standard_errors notes class_agreement held_out psnr_db "
    "num_samples steps solver guidance_scale forwards_per_image seconds_per_image stamp"
).split()


def rounded(value: Any) -> Any:
    """The same plain value with numbers of [`DIGITS`] digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def lines(value: Any, indent: str = "") -> str:
    """JSON in which what fits into a line stands in one."""
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, dict | list) or len(indent) + len(flat) <= 110:
        return flat
    inner, braces = indent + " ", "{}" if isinstance(value, dict) else "[]"
    if isinstance(value, dict):
        parts = [f"{json.dumps(key, ensure_ascii=False)}: {lines(item, inner)}" for key, item in value.items()]
    else:
        parts = [lines(item, inner) for item in value]
    return f"{braces[0]}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{braces[1]}"


def checkout_of(folder: Path) -> tuple[str, bool]:
    """The commit of the checkout in which a folder lies, and whether tracked files had changed since."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
        if done.returncode:
            raise EdgeDiTError(
                f"{folder} is in no git checkout ({done.stderr.strip()}); a record names the commit that it was "
                "measured with, so record in a clone."
            )
        return done.stdout.strip()

    top = git("rev-parse", "--show-toplevel")
    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", top, f":(exclude,top)benchmarks/{RESULTS.name}"
    )
    return git("rev-parse", "HEAD"), bool(changed)


def measured(script: str, arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Run a script of this folder: what it printed, and its JSON object."""
    path = HERE / script
    if not path.is_file():
        there = ", ".join(sorted(file.name for file in HERE.glob("*.py")))
        raise EdgeDiTError(f"benchmarks/ has no {script!r}; it has {there}.")
    printed = []
    command = [sys.executable, str(path), *arguments, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            printed.append(line.rstrip())
            if not line.startswith("{"):
                print(line, end="", flush=True)
    if process.returncode:
        raise EdgeDiTError(f"{script} ended with {process.returncode}; nothing was recorded.")
    try:
        result = json.loads(printed[-1])
    except (IndexError, ValueError):
        said = printed[-1][:80] if printed else "nothing"
        raise EdgeDiTError(f"{script} --json ended with {said!r}; the last line must be one JSON object.") from None
    return printed[:-1], result


def described(model: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a model; precision and recall stand among the metrics."""
    shares = {key: model[key] for key in ("precision", "recall") if model.get(key) is not None}
    kept = {key: model[key] for key in MODEL if model.get(key) is not None}
    return {**kept, "metrics": {**kept.get("metrics", {}), **shares}}


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run's report.json: figures of its models, medians of its bank, the course of its search."""
    kept = {key: report[key] for key in ("seed", "seconds", "few_step", "elastic_steps") if key in report}
    kept["models"] = [described(model) for model in report["models"]]
    if "widths" in kept.get("few_step", {}):
        ways = ("many", "few", "few_step")
        widths = [{**width, **{way: described(width[way]) for way in ways}} for width in kept["few_step"]["widths"]]
        kept["few_step"] = {**kept["few_step"], "widths": widths}
    if "search" in report:
        search = report["search"]
        kept["search"] = {key: search[key] for key in ("hypervolume", "random_hypervolume", "metric") if key in search}
        kept["search"]["front"] = [
            {key: point[key] for key in ("distance", "latency_ms", "code")} for point in search["front"]
        ]
        kept["search"]["reason"] = search.get("chosen", {}).get("reason")
    if "bank" in report:
        kept["bank"] = {key: report["bank"].get(key) for key in ("proxies", "median_losses")}
    latency = report.get("latency") or {}
    kept["latency"] = {key: latency[key] for key in ("batch_size", "speedup") if key in latency}
    return kept


def heading(script: str) -> str:
    """The first sentence of a script's docstring."""
    text = ast.get_docstring(ast.parse((HERE / script).read_text(encoding="utf-8"))) or script
    return re.sub(r"\s+", " ", text.split("\n\n")[0])


def taken(file: Path) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """What kind of result a run's file is, the result, and the machine that it names."""
    values = read_json(file, "a finished run")
    if isinstance(values, dict) and "models" in values:
        try:
            machine = (values.get("latency") or {}).get("environment")
            if machine is not None:
                machine = {**machine, "versions": values.get("versions", machine.get("versions"))}
            return "run", summary(values), machine
        except (LookupError, TypeError, AttributeError) as error:
            raise EdgeDiTError(f"{file} is not whole ({error!r}); make it again with edgedit report.") from None
    if isinstance(values, dict) and "correlations" in values:
        return "ranking", values, None
    raise EdgeDiTError(f"{file} is neither the report.json of a run nor a ranking.json; give one of these to --of.")


def main() -> None:
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    command = arguments[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="of the record, e.g. attention")
    parser.add_argument("--of", type=Path, metavar="FILE", help="what a finished run wrote")
    parser.add_argument("--command", help="what made that run")
    parser.add_argument("--title", help="a sentence about it; default: the first one of the script")
    options = parser.parse_args(arguments[:cut])
    if bool(command) == bool(options.of) or bool(options.of) != bool(options.command):
        parser.error("give either -- SCRIPT.py ARGUMENTS, or --of FILE with --command COMMAND")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", options.name):
        parser.error(f"NAME is {options.name!r}; it may hold small letters and digits, with single dashes between")

    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    machine: dict[str, Any] | None
    printed: list[str] = []
    if options.of:
        kind, result, machine = taken(options.of)
        commit, dirty = checkout_of(options.of.resolve().parent)
        made_by, title = options.command, options.title or "The figures of a finished run."
        date = datetime.datetime.fromtimestamp(options.of.stat().st_mtime, datetime.UTC)
    else:
        commit, dirty = checkout_of(HERE)
        printed, result = measured(command[0], command[1:])
        kind, machine = Path(command[0]).stem, result.pop("environment", None)
        made_by = shlex.join(["python", f"benchmarks/{command[0]}", *command[1:]])
        title = options.title or heading(command[0])
        date = datetime.datetime.now(datetime.UTC)
    found = machine or environment(threads)
    record = {
        "format": FORMAT,
        "kind": kind,
        "title": title,
        "command": made_by,
        "commit": commit,
        "dirty": dirty,
        "date": date.date().isoformat(),
        "machine": {key: found.get(key) for key in ("cpu", "cores", "threads", "versions")},
        "printed": printed,
        "result": rounded(result),
    }
    held_to(record, Record, options.name, "benchmarks/record.py", "a record")
    tables_of(record)  # what has no tables would stop every page from being made
    text = lines(record) + "\n"
    own_name = re.search(rf"\b{re.escape(socket.gethostname())}\b", text)
    if named := next(local_paths(text), own_name and own_name[0]):
        raise EdgeDiTError(
            f"The result names {named!r}, which is this machine's own; run it with paths that begin in the checkout."
        )
    atomic_write_text(RESULTS / f"{options.name}.json", text)
    print(f"benchmarks/results/{options.name}.json written; make results puts it into the pages.")


if __name__ == "__main__":
    sys.exit(guard(main, "record.py"))
