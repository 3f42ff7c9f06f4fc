"""The sweep with bad inputs of our own: a table of counts, and of every bad case the command that repeats it.

python tests/sweep/sweep.py [--match REGEX] [--area AREA] [--case ID] [--a-file N] [--fuzz N] [--share S] [--jobs N]
[--fixtures DIR] [--results FILE]
"""

import argparse
import os
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[name] = "1"
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["COLUMNS"] = "200"

import sweep_forks  # noqa: E402
import sweep_inputs  # noqa: E402


def table(results: list[dict]) -> str:
    """Counts by area and class."""
    classes = (*sweep_forks.CLASSES, "harness")
    counts = Counter((each["area"], each["class"]) for each in results)
    areas = [
        area
        for area in ("options", "outputs", "recipe keys", "files", "fuzz")
        if any(each["area"] == area for each in results)
    ]
    rows = [["area", "cases", *classes]]
    for area in areas:
        rows.append([area, sum(counts[area, c] for c in classes), *(counts[area, c] for c in classes)])
    rows.append(["all", len(results), *(sum(counts[a, c] for a in areas) for c in classes)])
    return "\n".join("| " + " | ".join(str(cell).rjust(9) for cell in row) + " |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", help="only cases whose name matches")
    parser.add_argument("--area", action="append", help="only this area: options, outputs, recipe keys, files, fuzz")
    parser.add_argument("--case", action="append", help="only the case of this id")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--a-file", type=int, default=12, help="damaged fields of every file and reader (default 12)")
    parser.add_argument("--fuzz", type=int, default=400, help="files with random bytes (default 400)")
    parser.add_argument(
        "--share", type=float, default=1.0, help="run this share of the cases, the same ones every time (default all)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="of the given fixtures: `edgedit`, its reports, and dry runs alone, with fewer imports",
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--fixtures", type=Path, help="folder of the fixtures; kept and used again (default: a temporary one)"
    )
    parser.add_argument("--results", type=Path, help="JSON lines, one a case")
    args = parser.parse_args()
    started = time.monotonic()
    sweep_forks.warm_up(args.quick)
    with tempfile.TemporaryDirectory(dir=sweep_inputs.scratch_folder(), prefix="sweep-") as scratch:
        fixtures = (args.fixtures or Path(scratch, "fixtures")).resolve()
        if args.quick:
            cases = sweep_inputs.quick_cases(fixtures, args.seed, args.a_file)
        else:
            sweep_inputs.build_fixtures(fixtures)
            cases = sweep_inputs.all_cases(fixtures, args.seed, args.a_file, args.fuzz)
        print(f"ready after {time.monotonic() - started:.0f} s", flush=True)
        cases = [
            each
            for each in cases
            if (not args.area or each["area"] in args.area)
            and (not args.case or each["id"] in args.case)
            and (not args.match or re.search(args.match, each["name"]))
        ]
        cases = [each for each in cases if int(each["id"], 16) % 10_000 < 10_000 * args.share or args.case]
        results = sweep_forks.run_cases(
            cases,
            fixtures,
            Path(scratch, "cases"),
            (args.results or Path(scratch, "results.jsonl")).resolve(),
            args.jobs,
        )
    bad = [each for each in results if each["class"] in (*sweep_forks.BAD, "harness")]
    for each in bad:
        print(
            f"{each['class']}: {each['name']}\n    {each['text'][:300]}\n    again: python tests/sweep/sweep.py "
            f"--a-file {args.a_file} --fuzz {args.fuzz} --seed {args.seed} --case {each['id']}"
        )
    print(table(results))
    print(f"{len(results)} cases, {len(bad)} bad, {time.monotonic() - started:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
