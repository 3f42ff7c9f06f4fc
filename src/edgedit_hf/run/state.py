"""Run folders: progress and JSONL telemetry, checkpoints in safetensors + JSON, exact resume. Shared by every recipe.

A stage owns one folder. While it runs the folder holds `run.json` (what was asked), `telemetry.jsonl` and
`checkpoints/`; when it has finished, its results and, written last, `stage.json`. A stage that was killed at any moment
is run again with the same arguments and continues from its newest complete checkpoint; a finished one is skipped, if
its results are still the bytes that `stage.json` lists: one whose results were changed, damaged or deleted is refused,
as nobody but the user can tell what is to be kept. While a process works in the folder, `run.lock` says which.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import math
import os
import shutil
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EdgeDiTError
from ..files import (
    atomic_write_json,
    atomic_write_text,
    changed_file,
    check_finite_files,
    explain_write_errors,
    file_record,
    fsync_path,
    publish_into,
    sweep,
    sync_tree,
    versions,
)
from ..records import Asked, Checkpoint, Results
from ..schema import held_to, read_record
from .checkpoint import first_non_finite, load_state, save_state
from .comparison import (
    AFTER_NAN,
    FORMAT,
    NO_RESULT,
    asked_values,
    comparable,
    declared_inputs,
    first_difference,
    switched,
    with_value,
    without_keys,
)
from .config import RunConfig, refuse_renamed
from .lock import FolderLock
from .outputs import STAGE_FILES
from .results import UNLISTED, check_sources, input_hash
from .stage import Stage

if TYPE_CHECKING:
    from accelerate import Accelerator

# -------------------------------------------------------------------- one stage


class Interrupted(SystemExit):
    """The state is saved; the process ends with `code`: 130 after Ctrl-C, 143 after SIGTERM."""

    def __init__(self, message: str, code: int = 130) -> None:
        super().__init__(code)
        self.message = message


STAGE_LABEL: contextvars.ContextVar[str] = contextvars.ContextVar("STAGE_LABEL", default="")
"""What the progress bars of this context put before the stage's name, e.g. `[3/9] `."""


_OPEN_BARS: weakref.WeakSet = weakref.WeakSet()


def close_progress() -> None:
    """End every progress bar that an error left open, so that what is printed next starts on a line of its own."""
    for bar in list(_OPEN_BARS):
        bar.close()


def on_main(work: Callable[[], Any], accelerator: Accelerator | None) -> None:
    """Do it on the main process while the others wait; what it raises there is raised on all, so that none waits for
    ever.
    """
    if accelerator is None or accelerator.num_processes == 1:
        work()
        return
    from accelerate.utils import broadcast_object_list

    said: list[Exception | None] = [None]
    cause = None
    if accelerator.is_main_process:
        try:
            work()
        except Exception as error:
            cause, plain = (
                error,
                type(error) is EdgeDiTError or isinstance(error, OSError) and type(error).__module__ == "builtins",
            )
            said = [
                error if plain else RuntimeError(f"{type(error).__name__} on the main process: {error}")
            ]  # others may not know the class
    broadcast_object_list(said)
    if said[0] is not None:
        raise said[0] if cause is None else cause


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


SHARED = {"extractor", "reference.json"}  # in the folder of `evaluate`, which earlier versions used before it


class RunState:
    """Progress, telemetry, checkpoints and resume of one stage.

    Args:
        config: of the run. Of it the stage's sections decide the result; a folder made with others is refused.
        stage: its row in the tables.
        total_steps: number of steps.
        inputs: hashes of what the script opened itself, all that the row declares without a place; `None`: not read in
            this run, also of an input with a place, whose hash is taken here otherwise. They must agree on resume.
        also: further plain values that decide the result, nested like a recipe.
        folder: of the stage's folders that is meant; default its first.
        seed: default the recipe's, or 0 where the row says that it decides nothing.
        accelerator: for several processes; only the main one writes and shows progress.
        checkpoint_every, log_every: in steps.
        sharded: every rank holds state of its own (else rank 0's stands for all).
        unit: what a step is called in the progress bar.

    Example:
        >>> run = RunState(config, TEACHER, total_steps=100, inputs={"data": dataset.fingerprint})
        >>> if not run.finished:
        ...     run.track(model=model, optimizer=optimizer)
        ...     for step in run.steps():
        ...         run.log(loss=train_step(step))
        ...     run.finish()
    """

    def __init__(
        self,
        config: RunConfig,
        stage: Stage,
        total_steps: int,
        *,
        inputs: Mapping[str, str | None] | None = None,
        also: Mapping[str, Any] | None = None,
        folder: str | None = None,
        seed: int | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_every: int = 500,
        log_every: int = 10,
        sharded: bool = False,
        unit: str = "step",
    ) -> None:
        self.folder = config.folder(folder or stage.folder)
        self.stage = stage
        self.name = folder if stage.more and folder else stage.name
        self.total_steps = int(total_steps)
        self.seed = seed if seed is not None else config.seed if "seed" in stage.sections else 0
        self.accelerator = accelerator
        self.checkpoint_every = max(1, int(checkpoint_every))
        self.log_every = max(1, int(log_every))
        self.sharded = sharded
        self.unit = unit
        self.is_main = accelerator is None or accelerator.is_main_process
        self.rank = 0 if accelerator is None else accelerator.process_index
        self.world_size = 1 if accelerator is None else accelerator.num_processes
        self.step = 0
        self.seconds_before = 0.0
        self._tracked: dict[str, Any] = {}
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self._shown: dict[str, float] = {}
        self._stop = 0
        self._better = False
        self._said = ""
        self._started = time.monotonic()
        self._asked = {
            "stage": self.name,
            "config": json.loads(json.dumps(asked_values(stage, config, also or {}))),
            "inputs": declared_inputs(stage, inputs or {}),
            "seed": self.seed,
        }
        self._lock = FolderLock(self.folder)
        self._record: dict[str, Any] = {}
        self._changed: dict[str, Any] = {}
        on_main(lambda: self._open(config, inputs or {}), accelerator)

    def _open(self, config: RunConfig, given: Mapping[str, str | None]) -> None:
        """Take the folder: clear up after killed processes, lock it, and compare what was asked with what it was made
        with.
        """
        with explain_write_errors(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            sweep(self.folder.parent, self.folder.name)
            self.folder.mkdir(parents=True, exist_ok=True)
        read = {name: at for name, at in self.stage.inputs if at and name not in given}
        found = {name: input_hash(config, at) for name, at in read.items()}
        self._asked["inputs"] |= {name: value for name, value in found.items() if value is not None}
        sources = [Path(at).parts[0] for at in read.values()]
        if self.finished:  # nothing will be written: no lock, the folder may be read-only
            self._compare()
            self._check_results()
            check_sources(config, sources)
            return
        self._lock.acquire()
        try:
            sweep(self.folder)
            shutil.rmtree(self.folder / ".publish", ignore_errors=True)
            new = not (self.folder / "run.json").exists()
            if not new:
                self._compare()
            check_sources(config, sources)
            if new:  # only now: a run.json names hashes, which the remedy for older sources changes
                self._compare()
        except BaseException:
            self._lock.release()
            raise

    @property
    def inputs(self) -> Mapping[str, str]:
        """The hashes of what the stage reads, by name; on the main process."""
        return self._asked["inputs"]

    def _compare(self) -> None:
        path = self.folder / "run.json"
        if not path.exists():
            foreign = sorted(
                entry.name
                for entry in self.folder.iterdir()
                if entry.name not in STAGE_FILES | SHARED and not entry.name.startswith(".")
            )
            if foreign:
                raise EdgeDiTError(
                    f"{self.folder} holds {foreign[0]}, but no run.json of stage {self.name}, which would write over "
                    "it; it is left as it is. Choose another output_dir, or move the folder away."
                )
            self._record = {**self._asked, "format": FORMAT}
            atomic_write_json(path, self._record)
            return
        try:
            found = read_record(path, Asked, f"stage {self.name}")
        except EdgeDiTError as error:
            raise EdgeDiTError(f"{error} Delete {self.folder} to make it anew.") from None
        refuse_renamed(found["config"], str(path), f"Delete {self.folder} to make it anew.")
        made, asked = comparable(found, self._asked, self.stage)
        stopped = bool(found.get("aborted")) and not self.finished
        ignored = NO_RESULT + (AFTER_NAN if stopped else ())
        old, new = ({key: without_keys(record.get(key), ignored) for key in asked} for record in (made, asked))
        if (difference := first_difference(old, new)) is not None:
            name, before, now = difference
            earlier = (
                "An earlier version made it, which read and divided images in another way: finish it there, or "
                "keep its teacher by teacher.path. "
            )
            earlier = earlier if name == "inputs.data" and "format" not in found else ""
            raise EdgeDiTError(
                f"{self.folder} was made with {name} = {before!r}, but now {name} = {now!r} is asked for. {earlier}"
                f"Use the old value, another output_dir, or delete {self.folder} to make it anew."
            )
        if stopped and (difference := switched(made["config"], asked["config"])) is not None:
            name, before, now = difference
            raise EdgeDiTError(
                f"{self.folder} was made with {name} = {before!r}, but now {name} = {now!r} is asked for: its "
                "checkpoint holds other networks than are trained then. Keep it above 0, or at 0; or take another "
                f"output_dir, or delete {self.folder} to make it anew."
            )
        self._record = found
        old, new = (without_keys(record["config"], NO_RESULT) for record in (made, asked))
        while (difference := first_difference(old, new)) is not None:
            name, before, now = difference
            self._changed[name] = [before, now]
            old = with_value(old, name.split("."), now)
        if self._changed:
            newest = self._newest_checkpoint()
            change = {"step": 0 if newest is None else int(newest.name[5:]), **self._changed}
            changes = [*found.get("changes", []), change]
            self._record = {
                **{k: v for k, v in found.items() if k != "aborted"},
                "config": self._asked["config"],
                "changes": changes,
            }
            atomic_write_json(path, self._record)

    def _check_results(self) -> None:
        stage = read_record(self.folder / "stage.json", Results, f"stage {self.name}")
        changed = changed_file(self.folder, stage.get("files", {}))  # older runs list none
        if changed is not None:
            raise EdgeDiTError(
                f"Stage {self.name} had finished, but since then its results were changed: {changed}. Put the file "
                f"back, or delete {self.folder} and run the same command: the stage is then done again."
            )

    @property
    def finished(self) -> bool:
        """Whether the stage was completed, by this or an earlier process, and its results are there as they were
        written.
        """
        return (self.folder / "stage.json").exists()

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    # ---------------------------------------------------------------- resume

    def track(self, from_best: bool = False, **objects: Any) -> int:
        """Objects with `state_dict()` and `load_state_dict()` whose state makes up a checkpoint; loads the newest one.

        Args:
            from_best: load that of [`keep_best`] in its place, where there is one; the steps after it are done anew.

        Returns:
            the step to continue at (0 at first).
        """
        self._tracked = objects
        newest, best = self._newest_checkpoint(), self._newest_checkpoint("best")
        if from_best and best is None and newest is not None and self.is_main:
            tell = f"No best checkpoint was kept yet; {self.name} continues from the last one, {newest.name}."
            print(tell, file=sys.stderr)
        newest = (best if from_best else None) or newest
        if newest is not None:
            state = load_state(newest, self._state_name())
            held_to(state, Checkpoint, newest / f"{self._state_name()}.json", f"stage {self.name}", "a checkpoint")
            if state["world_size"] != self.world_size and self.sharded:
                raise EdgeDiTError(
                    f"{newest} was written by {state['world_size']} processes, but {self.world_size} are running; "
                    "continue with the same number, or delete the checkpoint."
                )
            if state["objects"].keys() != objects.keys():
                raise EdgeDiTError(
                    f"{newest} holds {', '.join(state['objects'])}, but {', '.join(objects)} are needed: it was "
                    "written by another version of edgedit_hf, or with another mixed precision. Finish the stage with "
                    "those, or delete the checkpoint."
                )
            try:
                for name, thing in objects.items():
                    thing.load_state_dict(state["objects"][name])
            except EdgeDiTError:
                raise
            except (
                KeyError,
                IndexError,
                TypeError,
                ValueError,
                AttributeError,
                RuntimeError,
            ) as error:  # of torch, or of whoever reads its state
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                raise EdgeDiTError(
                    f"The checkpoint {newest} does not fit what stage {self.name} tracks ({why}); delete it to start "
                    "anew."
                ) from error
            self.step = state["step"]
            self.seconds_before = state["seconds"]
            if from_best and self.is_main:
                self._go_back_to(newest)
            self.barrier()
        if self.is_main:
            self._cut_telemetry()
            if self._changed:
                self.write_telemetry({"changed": self._changed})
        return self.step

    def continue_at(self, step: int) -> None:
        """For a stage that keeps its state in files of its own: the step they stand at."""
        self.step = step
        if self.is_main:
            self._cut_telemetry()

    def _state_name(self) -> str:
        return f"state-rank{self.rank}" if self.sharded else "state"

    def _newest_checkpoint(self, kind: str = "step") -> Path | None:
        found = sorted((self.folder / "checkpoints").glob(f"{kind}-*"))
        return found[-1] if found else None

    def keep_best(self) -> None:
        """Write a checkpoint after this step, and keep it as the best one until a better one is (see [`track`])."""
        self._better = True

    def _link_best(self) -> None:
        root = self.folder / "checkpoints"
        final = root / f"best-{self.step:09d}"
        if self.is_main and not final.exists():
            self._link_checkpoint(root / f"step-{self.step:09d}", final)
            for old in root.glob("best-*"):
                if old != final:
                    shutil.rmtree(old, ignore_errors=True)
        self.barrier()

    def _go_back_to(self, checkpoint: Path) -> None:
        """Make it the newest one, so that a run which goes on from it is continued from it, whatever then stops it."""
        root = self.folder / "checkpoints"
        final = root / f"step-{self.step:09d}"
        if not final.exists():
            self._link_checkpoint(checkpoint, final)
        for later in root.glob("step-*"):
            if int(later.name[5:]) > self.step:
                shutil.rmtree(later)

    def _link_checkpoint(self, made: Path, final: Path) -> None:
        aside = final.with_name(f".tmp-{final.name}")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(made, aside, copy_function=_link)  # one copy on the disk
        sync_tree(aside)
        os.rename(aside, final)
        fsync_path(final.parent)

    def _cut_telemetry(self) -> None:
        # Lines of steps that will be done again would stand twice.
        path = self.folder / "telemetry.jsonl"
        if path.exists():
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # a last line cut by a kill
                    entry = json.loads(line)
                    if isinstance(entry, dict) and isinstance(entry.get("step"), int) and entry["step"] <= self.step:
                        kept.append(line)
            atomic_write_text(path, "".join(f"{line}\n" for line in kept))

    def checkpoint(self) -> None:
        """Write the tracked objects' state: aside, fsync, rename; then drop older checkpoints."""
        if not self._tracked:
            return  # a stage that keeps its state in files of its own
        root = self.folder / "checkpoints"
        aside, final = root / f".tmp-{self.step:09d}", root / f"step-{self.step:09d}"
        if final.exists():
            return
        with explain_write_errors(final):
            if self.is_main:
                for left in root.glob(".tmp-*"):
                    shutil.rmtree(left, ignore_errors=True)
                aside.mkdir(parents=True, exist_ok=True)
            self.barrier()
            bad = None
            if self.is_main or self.sharded:
                state = {
                    "step": self.step,
                    "seconds": self.seconds,
                    "world_size": self.world_size,
                    "objects": {name: thing.state_dict() for name, thing in self._tracked.items()},
                }
                bad = first_non_finite(state["objects"])
            if self._any(bad is not None):
                raise self.abort(
                    f"{bad or 'the state of another process'} holds NaN or infinite values after {self.unit} "
                    f"{self.step}"
                )
            if self.is_main or self.sharded:
                save_state(aside, state, self._state_name())
            self.barrier()
            if self.is_main:
                sync_tree(aside)
                os.rename(aside, final)
                fsync_path(root)
                for old in root.glob("step-*"):
                    if old != final:
                        shutil.rmtree(old, ignore_errors=True)
            self.barrier()

    # ---------------------------------------------------------------- the loop

    @property
    def seconds(self) -> float:
        """Seconds of work so far, those of earlier processes included."""
        return self.seconds_before + time.monotonic() - self._started

    def steps(self) -> Iterator[int]:
        """The steps that are left, with progress bar, telemetry, checkpoints, and a clean end on Ctrl-C or SIGTERM."""
        from tqdm.auto import tqdm

        handlers = {}
        with contextlib.suppress(ValueError):  # not the main thread: no handlers, Ctrl-C behaves as usual
            for number in (
                signal.SIGINT,
                signal.SIGTERM,
            ):  # also where they were ignored, as in a script's background jobs
                handlers[number] = signal.signal(number, self._on_signal) or signal.SIG_DFL
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            desc=STAGE_LABEL.get() + self.name,
            unit=self.unit,
            disable=not self.is_main,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )
        _OPEN_BARS.add(bar)
        try:
            while self.step < self.total_steps:
                yield self.step
                self.step += 1
                bar.update(1)
                last = self.step == self.total_steps
                if self.step % self.log_every == 0 or last:
                    self._flush(bar)
                stop = self._stopped_by()
                if self.step % self.checkpoint_every == 0 or last or stop or self._better:
                    self._flush(bar)  # a checkpoint never holds weights whose loss was not looked at
                    self.checkpoint()
                if self._better:
                    self._link_best()
                    self._better = False
                if stop:
                    self._lock.release()
                    raise Interrupted(
                        f"Stopped at {self.unit} {self.step} of {self.total_steps} of {self.name}; saved. Run the "
                        "same command to continue.",
                        128 + stop,
                    )
            self._tracked = {}  # what publishing comes to needs the room of optimisers
        finally:
            bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._stop:  # a second signal does not wait for the step
            if number == signal.SIGTERM:
                raise Interrupted(
                    f"Stopped at once in {self.name} by a second signal. Run the same command to continue.",
                    128 + number,
                )
            raise KeyboardInterrupt
        self._stop = number

    def _sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes."""
        if self.accelerator is None or self.world_size == 1:
            return list(values)
        import torch

        assert self.accelerator is not None, "several processes have an accelerator"
        return self.accelerator.reduce(torch.tensor(values, device=self.accelerator.device), reduction="sum").tolist()

    def _any(self, flag: bool) -> bool:
        return self._sum([float(flag)])[0] > 0

    def _stopped_by(self) -> int:
        """The signal that any process got; 0: none did."""
        terminated, interrupted = self._sum([float(self._stop == signal.SIGTERM), float(self._stop == signal.SIGINT)])
        return int(signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0)

    def log(self, **metrics: Any) -> None:
        """Numbers or 0-d tensors of this step; their mean over the interval is shown and written every `log_every`
        steps.
        """
        for name, value in metrics.items():
            value = value.detach().double() if hasattr(value, "detach") else float(value)
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def _flush(self, bar: Any) -> None:
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        bad = next(((name, value) for name, value in means.items() if not math.isfinite(value)), None)
        if self._any(bad is not None):
            name, value = bad or ("a loss of another process", "not finite")
            raise self.abort(f"{name} is {value} at {self.unit} {self.step}")
        if not means:
            return
        self._shown.update(means)
        figures = {name: f"{value:.4g}" for name, value in self._shown.items()}
        bar.set_postfix(figures | ({"note": self._said} if self._said else {}), refresh=False)
        self.write_telemetry({**means, **({"note": self._said} if self._said else {})})

    @property
    def shown(self) -> Mapping[str, float]:
        """The figures in the progress line: means over the last interval that each was logged in."""
        return self._shown

    def remark(self, words: str) -> None:
        """Words that stand in the progress line and the telemetry from now on; empty: none."""
        self._said = words

    def abort(
        self, what: str, remedy: str = "Lower the learning rate, lengthen the warm-up, or look at the data"
    ) -> EdgeDiTError:
        """Note in `run.json` that the stage was stopped, so that the keys of `AFTER_NAN` may change; returns what to
        raise.
        """
        newest = self._newest_checkpoint()
        kept = f"the checkpoint {newest.name} before it is kept" if newest else "no checkpoint was written yet"
        here = {name for section in self._asked["config"].values() if isinstance(section, dict) for name in section}
        changeable = [name for name in AFTER_NAN if name in here]
        if self.is_main:
            self._record = {**self._record, "aborted": {"step": self.step, "why": what}}
            atomic_write_json(self.folder / "run.json", self._record)
            self._lock.release()
        return EdgeDiTError(
            f"{self.name}: {what}; {kept}. {remedy}; then run again: {', '.join(changeable)} may now change, and it "
            f"continues "
            f"{'from there' if newest else 'at the start'}."
        )

    def write_telemetry(self, metrics: Mapping[str, Any]) -> None:
        """Append one line to `telemetry.jsonl`."""
        if self.is_main:
            line = {"stage": self.name, "step": self.step, "seconds": round(self.seconds, 3), **metrics}
            with (
                explain_write_errors(self.folder),
                open(self.folder / "telemetry.jsonl", "a", encoding="utf-8") as file,
            ):
                file.write(json.dumps(line) + "\n")

    # ---------------------------------------------------------------- the end

    @contextlib.contextmanager
    def publish(self) -> Iterator[Path]:
        """[`publish_into`] the stage's folder, unless a weight is not finite. Call it on the main process."""
        with publish_into(self.folder) as aside:
            yield aside
            check_finite_files(
                aside,
                f"Stage {self.name}",
                f"nothing was published. Look at its input, or delete {self.folder} and lower its learning rate.",
            )

    def finish(self, **facts: Any) -> None:
        """Mark the stage as finished (`stage.json`) and drop its checkpoints."""
        self.barrier()
        if self.is_main:
            about = {
                "format": FORMAT,
                "steps": self.total_steps,
                "seconds": round(self.seconds, 2),
                "versions": versions(),
            }
            changes = {"changes": self._record["changes"]} if "changes" in self._record else {}
            files = file_record(self.folder, UNLISTED)
            atomic_write_json(self.folder / "stage.json", {**self._asked, **about, **changes, **facts, "files": files})
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
            self._lock.release()
        self.barrier()
