"""`edgedit train`: a recipe through accelerate's own launch code, with exit codes and signals kept.

`accelerate launch` runs a stage as a child and, whatever its exit code, prints a traceback of its own and ends with 1;
at Ctrl-C it kills the child before that has saved. Here one process takes the launcher's place (`exec`), and of several
the launcher ends as the first that failed.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..entry import LAUNCHED
from ..errors import EdgeDiTError
from ..run.stage import DRIVERS, STAGES

SCORE = "score"  # no stage of a run: it judges what it is given
SCRIPTS = {
    **{name: script for name, (script, _) in DRIVERS.items()},
    **{stage.name: stage.script for stage in STAGES},
    SCORE: "score.py",
}
PATIENCE_S = 3600  # that processes have to end their step and save after Ctrl-C, before they are killed


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the `edgedit` parser."""
    parser = subparsers.add_parser(
        "train",
        help="run a stage, or all of them, from a recipe",
        description="Run a stage from a recipe: on the CPU in one process where there is no GPU, else as\n"
        "accelerate is configured.",
        epilog="\n".join(
            [
                "stages:",
                *(f"  {stage.name:<17} {stage.label}" for stage in STAGES),
                f"  {SCORE:<17} images of any pipeline or folder, see `edgedit train {SCORE} --help`",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "stage",
        metavar="STAGE",
        help=f"{' or '.join(DRIVERS)}, which run all of a family's; one of the stages below; or the path of a recipe "
        "script of your own",
    )
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="…",
        help="options of `accelerate launch` (--num_processes 2, --mixed_precision bf16, --config_file FILE, …) and of "
        "the stage (--config FILE, --override KEY=VALUE, --dry-run, …; `edgedit train STAGE --help` lists them)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Launch the stage; does not return where one process takes this one's place."""
    script = find_script(args.stage)
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    options, rest = split_options(parser, args.arguments)
    launch(parser.parse_args([*options, str(script), *rest]))


def find_script(stage: str) -> Path:
    """The script of a stage, in the package, or the user's own.

    Raises:
        EdgeDiTError: there is neither.
    """
    if stage in SCRIPTS:
        return Path(next(iter(importlib.import_module("edgedit_hf.training").__path__)), SCRIPTS[stage])
    if stage.endswith(".py") and Path(stage).is_file():
        return Path(stage)
    raise EdgeDiTError(
        f"The stage {stage!r} does not exist; the stages are {', '.join(SCRIPTS)}. A script of your own is given by "
        "its path, such as a/b.py."
    )


def split_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options that accelerate's launcher knows by their full name, and what is left for the stage."""
    known = {
        name: action
        for name, action in parser._option_string_actions.items()
        if name.startswith("--") and name not in ("--help", "--config")
    }
    ours: list[str] = []
    left: list[str] = []
    arguments = list(arguments)
    while arguments:
        argument = arguments.pop(0)
        name, equals, _ = argument.partition("=")
        if name not in known:
            left.append(argument)
            continue
        ours.append(argument)
        if not equals and known[name].nargs != 0 and arguments:
            ours.append(arguments.pop(0))
    return ours, left


def launch(args: argparse.Namespace) -> None:
    """Start the stage as `accelerate launch` would, and end as it ends.

    Raises:
        EdgeDiTError: the options contradict each other.
        SystemExit: with the code of the first process that failed, or 128 + the signal that the launcher got.
    """
    import torch
    from accelerate.commands import launch as accelerate

    logging.disable(
        logging.ERROR
    )  # of the launcher alone: it says what a stage has said already, and which options have defaults
    on_gpu = torch.cuda.is_available() and not args.cpu
    if args.config_file is None and not os.path.isfile(accelerate.default_config_file or ""):
        if args.num_processes is None and not on_gpu:
            args.num_processes = 1
        args.num_machines, args.mixed_precision, args.dynamo_backend = (
            args.num_machines or 1,
            args.mixed_precision or "no",
            args.dynamo_backend or "no",
        )
        if not on_gpu and (args.num_processes or 1) < 2:
            args.cpu = True
    if (args.num_processes or 1) > 1 and not any((args.use_fsdp, args.use_deepspeed, args.tpu, args.use_megatron_lm)):
        # Else accelerate starts one process and says nothing. Without GPUs the recipes ask for the CPU themselves.
        args.multi_gpu, args.cpu = True, False
    os.environ[LAUNCHED] = "1"
    try:
        args, _, _ = accelerate._validate_launch_command(args)
        if args.use_deepspeed or args.tpu:
            raise EdgeDiTError(
                "The recipes run with one process, several (--multi_gpu) or FSDP; leave --use_deepspeed and --tpu out."
            )
        if (args.multi_gpu or args.use_fsdp or args.use_megatron_lm) and not args.cpu:
            _launch_several(accelerate, args)
        else:
            command, environment = accelerate.prepare_simple_launcher_cmd_env(args)
            sys.stdout.flush()
            os.execvpe(command[0], command, environment)
    except (
        ValueError,
        AssertionError,
        ImportError,
    ) as error:  # accelerate's own words for options that do not go together
        if isinstance(error, EdgeDiTError):
            raise
        raise EdgeDiTError(f"accelerate cannot launch the stage: {' '.join(str(error).split())}") from error


def _launch_several(accelerate: Any, args: argparse.Namespace) -> None:
    """Several processes by torch's elastic launcher. They stand in sessions of their own: signals reach them through it
    alone.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args.shutdown_timeout = PATIENCE_S
    if args.main_process_port is None and (args.num_machines or 1) == 1:
        args.main_process_port = 0  # any that is free
    try:
        accelerate.multi_gpu_launcher(args)
    except SignalException as stop:
        raise SystemExit(128 + stop.sigval) from None
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        code = first.exitcode if first.exitcode > 0 else 128 - first.exitcode
        print(
            first.message if first.error_file_data.get("message") else f"error: a process ended with {code}.",
            file=sys.stderr,
        )
        raise SystemExit(code) from None
