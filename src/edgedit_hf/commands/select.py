"""`edgedit select`: build another point of a finished search's front, without searching again; where no search was run,
the best student by the bank and the latency table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COUNT = 1000  # most genotypes that are listed


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the `edgedit` parser."""
    from ..search_space import BYTES

    parser = subparsers.add_parser(
        "select", help="choose another point of a finished search, or without one the best by the bank; assemble it"
    )
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="the run's folder (output_dir of its recipe)")
    parser.add_argument(
        "--max-latency-ms",
        type=float,
        metavar="MS",
        help="latency budget, by the run's table; without any bound the knee point",
    )
    parser.add_argument(
        "--max-parameters-ratio", type=float, metavar="R", help="parameters at most this share of the teacher's"
    )
    parser.add_argument(
        "--accept-other", action="store_true", help="take the run's latency table though it is of another machine"
    )
    parser.add_argument("--max-flops-ratio", type=float, metavar="R", help="FLOPs at most this share of the teacher's")
    parser.add_argument("--max-bytes-mb", type=float, metavar="MB", help="weights at most this large (10^6 bytes)")
    parser.add_argument(
        "--max-memory-mb",
        type=float,
        metavar="MB",
        help="weights, and what the largest layer holds at the latency table's batch, at most this large: a low "
        "estimate of peak memory, without what the runtime's arena takes beyond",
    )
    parser.add_argument(
        "--bytes-precision",
        choices=tuple(BYTES),
        help="of the weights that --max-bytes-mb and --max-memory-mb are about; default the latency table's",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="by the integer programme though the run has a search; without a search that is what chooses",
    )
    parser.add_argument(
        "--teacher", metavar="PATH", help="the teacher's pipeline of a run that was given one (without a search)"
    )
    listed = parser.add_mutually_exclusive_group()
    listed.add_argument("--k", type=int, metavar="N", help="list the programme's N best within the bounds; builds none")
    listed.add_argument(
        "--front", type=int, metavar="N", help="list its best for N latency budgets, fast to slow; builds none"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--output", metavar="DIR", help="pipeline folder to write; default RUN/student")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Choose, assemble, and say what was chosen; or list what could be."""
    from ..errors import EdgeDiTError
    from ..schema import Rule, check_option

    check_option("max-latency-ms", args.max_latency_ms, Rule(above=0.0, maximum=1e9))
    check_option("max-parameters-ratio", args.max_parameters_ratio, Rule(above=0.0, maximum=1e6))
    check_option("max-flops-ratio", args.max_flops_ratio, Rule(above=0.0, maximum=1e6))
    check_option("max-bytes-mb", args.max_bytes_mb, Rule(above=0.0, maximum=1e9))
    check_option("max-memory-mb", args.max_memory_mb, Rule(above=0.0, maximum=1e9))
    check_option("k", args.k, Rule(minimum=1, maximum=COUNT))
    check_option("front", args.front, Rule(minimum=1, maximum=COUNT))
    from diffusers.utils import logging as diffusers_logging

    from ..run.stage import DRIVERS, EDGEDIT, STUDENT
    from ..search.exact import ExactChoice, was_searched
    from ..search.selection import select

    diffusers_logging.disable_progress_bar()  # as in `recipe_main`
    bounds = {
        "max_latency_ms": args.max_latency_ms,
        "max_parameters_ratio": args.max_parameters_ratio,
        "max_flops_ratio": args.max_flops_ratio,
        "max_bytes_mb": args.max_bytes_mb,
        "max_memory_mb": args.max_memory_mb,
    }
    lists = args.k is not None or args.front is not None
    if args.bytes_precision is not None and not lists and args.max_bytes_mb is None and args.max_memory_mb is None:
        raise EdgeDiTError(
            f"--bytes-precision is {args.bytes_precision}, but there is no bound that it is about; add --max-bytes-mb "
            "or --max-memory-mb, or leave it out."
        )
    exact = None
    chooses = args.exact or lists or not was_searched(args.run_dir)
    if args.teacher is not None and not chooses:
        raise EdgeDiTError(
            f"--teacher is {args.teacher}, but {args.run_dir} has a search, which says what its teacher is; leave "
            "--teacher out, or add --exact."
        )
    if chooses:
        exact = ExactChoice.of(args.run_dir, args.teacher, args.bytes_precision, args.accept_other)
    if exact is not None and lists:
        caps, programme = exact.caps(**bounds), exact.programme
        found = programme.front(args.front, caps=caps) if args.k is None else programme.k_best(args.k, caps)
        rows = exact.rows(found)
        proved = "the next best" if args.front is None else "the best of its budget"
        print("\n".join(table(rows, exact.precision, proved)))
        if args.json:
            print(json.dumps({"caps": caps, "bytes_precision": exact.precision, "rows": rows}))
        return
    output = args.run_dir / STUDENT.folder if args.output is None else args.output
    choice = select(
        args.run_dir,
        **bounds,
        bytes_precision=args.bytes_precision,
        accept_other=args.accept_other,
        output=output,
        exact=exact,
    )
    print(f"{output}: genotype {choice['genotype_hash']}, code {choice['code']}, {choice['reason']}")
    print(
        f"table latency {choice['predicted_latency_ms']:.3g} ms of the teacher's {choice['teacher_latency_ms']:.3g} ms"
    )
    if output == args.run_dir / STUDENT.folder:
        later = ", ".join(stage.folder for stage in EDGEDIT[EDGEDIT.index(STUDENT) + 1 :])
        print(
            f"{later}, if they are there, still belong to the earlier choice: delete them and run "
            f"{DRIVERS['compress'][0]} again."
        )
    if args.json:
        print(json.dumps(choice))


def table(rows: list[dict[str, Any]], precision: str, proved: str) -> list[str]:
    """Lines of a table of genotypes; `proved`: what each of them is proved to be."""
    lines = [
        f"{'':>4}{'loss':>12}{'ms':>10}{'parameters':>14}{'MB ' + precision:>12}{'memory':>10}{'layers':>8}  genotype"
    ]
    for number, row in enumerate(rows, 1):
        lines.append(
            f"{number:>4}{row['score']:>12.4g}{row['latency_ms']:>10.4g}{row['parameters']:>14,.0f}"
            f"{row['bytes'] / 1e6:>12.4g}{row['memory'] / 1e6:>10.4g}{row['layers']:>8}  {row['genotype_hash']}"
        )
    worst = max(row["gap"] for row in rows)
    count = "1 genotype," if len(rows) == 1 else f"{len(rows)} genotypes, each"
    proof = "gap 0" if worst == 0 else f"but for at most {worst:.2g} of its loss"
    return [*lines, f"{count} proved to be {proved} ({proof})"]
