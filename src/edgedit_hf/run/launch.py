"""What the command lines of all recipes share: arguments, exit codes, the accelerator, data and pipelines of a run."""

from __future__ import annotations

import argparse
import importlib.util
import operator
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging

from .. import entry
from ..errors import EdgeDiTError
from ..hub import is_name
from .config import RunConfig, load_config, unused
from .lock import release_locks
from .outputs import check_output
from .stage import Stage
from .state import close_progress, on_main


def recipe_main(
    run: Callable[[RunConfig, Any], None],
    doc: str | None,
    flags: Mapping[str, str] = MappingProxyType({}),
    *,
    dry_run: Callable[[RunConfig], None],
    check: Callable[..., list[str]] | None = None,
    reports: Mapping[str, tuple[str, Callable[[RunConfig], None]]] = MappingProxyType({}),
) -> None:
    """Command line of a recipe: `--config FILE [--override section.key=value …] [--dry-run]`.

    How it ends: [`entry`].

    Args:
        flags: further options of the recipe and the keys that they set, e.g. `{"--memory-budget-gb":
            "bank.memory_budget_gb"}`.
        dry_run: prints what the run will cost.
        check: [`preflight.preflight`] of the recipe's stages: raises what would stop them later, returns what it could
            not check.
        reports: options that print something of a run and stop: what each says of itself, and what prints.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe, e.g. training/recipes/digits.yaml")
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE", help="e.g. teacher.steps=100; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="print time, memory and disk a stage, and stop")
    for flag, key in flags.items():
        parser.add_argument(flag, dest=key, metavar="VALUE", help=f"the same as --override {key}=VALUE")
    for flag, (about, _) in reports.items():
        parser.add_argument(flag, dest=flag, action="store_true", help=f"{about}, and stop")

    def work() -> None:
        arguments = parser.parse_args()
        given = {key: vars(arguments)[key] for key in flags.values()}
        overrides = [*arguments.override, *(f"{key}={value}" for key, value in given.items() if value is not None)]
        diffusers_logging.set_verbosity_error()
        diffusers_logging.disable_progress_bar()  # loading a small pipeline needs no bar of its own
        config = load_config(arguments.config, overrides)
        if int(os.environ.get("RANK", 0)) == 0:
            for note in unused(config):
                entry.tell(f"note: {note}")
        check_run_folder(config)
        if asked := [report for flag, (_, report) in reports.items() if vars(arguments)[flag]]:
            for report in asked:
                report(config)
            return
        if arguments.dry_run:
            notes = [] if check is None else check(config, dry_run=True)
            dry_run(config)
            for note in notes:
                print(note)
            return
        accelerator = make_accelerator(config)
        if check is not None:
            on_main(lambda: check(config, processes=accelerator.num_processes), accelerator)
        run(config, accelerator)

    run_script(work)


def run_script(work: Callable[[], None]) -> None:
    """Do the work of a script that accelerate may have launched, and end as [`entry`] says."""
    again = "Interrupted. Run the same command to continue."
    code = entry.guard(work, "error", interrupted=again, pipe_closed=entry.BROKEN_PIPE, at_end=close_progress)
    release_locks()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if code:
        raise SystemExit(code)


def stage_runs(stages: Iterable[Stage], folder: Path) -> dict[Stage, Callable[[RunConfig, Any], None]]:
    """What the scripts of stages, which lie in one folder, do: their `run`, of one that is several stages each its own
    function.
    """
    found, modules = {}, {}
    for stage in stages:
        if stage.script not in modules:
            modules[stage.script] = _module(folder / stage.script, stage)
        found[stage] = getattr(modules[stage.script], stage.does)
    return found


def _module(path: Path, stage: Stage) -> Any:
    if not path.is_file():
        raise EdgeDiTError(
            f"{path}, the script of stage {stage.name}, is not there; `edgedit recipes copy DIR` gives them all."
        )
    about = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert about is not None and about.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(about)
    sys.modules[about.name] = module
    about.loader.exec_module(module)
    return module


def check_run_folder(config: RunConfig) -> None:
    """Raise unless the run may write into its `output_dir`. An input in it is another stage's folder of such a run, or
    is refused.
    """
    keys = (
        "data.source",
        "data.vae",
        "teacher.path",
        "student.genotype",
        "text.encoder",
        "text.encoder_2",
        "knowledge.teacher",
        "quantize.path",
        "few_step.path",
        "few_step.teacher",
        "few_step.teacher_lora",
    )
    tables = config.latency.table if isinstance(config.latency.table, list) else [config.latency.table]
    given = [*tables, *(operator.attrgetter(key)(config) for key in (*keys, "quantize.prompts"))]
    output, inputs = Path(os.path.realpath(config.output_dir)), []
    for path in (os.path.expanduser(path) for path in given if path and not is_name(path)):
        real = Path(os.path.realpath(path))
        if (
            real == output
            or not real.is_relative_to(output)
            or not (output / real.relative_to(output).parts[0] / "run.json").is_file()
        ):
            inputs.append(path)
    check_output(config.output_dir, inputs, foreign=None)


def make_accelerator(config: RunConfig) -> Any:
    """The Accelerator of a recipe's process, see [`accelerator_of`]."""
    return accelerator_of(config.threads)


def accelerator_of(threads: int) -> Any:
    """The Accelerator of this process (mixed precision as launched), with PyTorch's threads shared between the
    processes of a machine (0: as PyTorch chooses).
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # The other ranks wait while the main one searches or evaluates, which may take longer than the default half hour.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    if threads:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(max(1, threads // local))
    return accelerator
