"""Run folders: files that are whole or absent, state that round-trips, and runs that end the same however often they
are stopped.
"""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from demo_stage import demo_run, finished_with_results
from safetensors.torch import save_file
from small_disks import fill
from small_nets import optimised, train_step

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.files import (
    atomic_write_json,
    file_sha256,
    read_json,
    weights_hash,
)
from edgedit_hf.run.checkpoint import Facts
from edgedit_hf.run.state import STAGE_LABEL, Interrupted, RunState

STEPS = 9


# -------------------------------------------------------------------- runs


class Stop(Exception):
    """What interrupts a run in these tests."""


def train(folder, at=None, action=None, config=None, steps: int = STEPS, **options):
    """A whole stage; `action(run, loss)` is called after the optimiser step `at` and may return another loss."""
    run = demo_run(
        folder, "demo", config or {"rate": 0.01}, steps, **{"checkpoint_every": 2, "log_every": 3, **options}
    )
    model, optimizer, ema = optimised(0)
    start = run.track(model=model, optimizer=optimizer, ema=ema)
    for step in run.steps():
        loss = train_step(model, optimizer, ema, step)
        if step == at:
            changed = action(run, loss)
            loss = loss if changed is None else changed
        run.log(loss=loss, step_number=step)
    run.finish(note="done")
    return start, model, ema


def stop(run, loss):
    raise Stop


def final(folder, start: int | None = None, **options) -> str:
    """Hash of the final weights and their average of a run that must begin at `start`."""
    began, model, ema = train(folder, **options)
    assert start in (None, began)
    return weights_hash({**model.state_dict(), **{f"ema {i}": p for i, p in enumerate(ema.shadow_params)}})


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "telemetry.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, final(folder)


def without_seconds(telemetry: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in telemetry]


def test_a_finished_stage(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    assert sorted(path.name for path in folder.iterdir()) == ["run.json", "stage.json", "telemetry.jsonl"]
    stage = json.loads((folder / "stage.json").read_text())
    assert {key: stage[key] for key in ("stage", "config", "inputs", "seed", "steps", "note")} == {
        "stage": "demo",
        "config": {"rate": 0.01},
        "inputs": {},
        "seed": 0,
        "steps": STEPS,
        "note": "done",
    }
    assert stage["seconds"] >= 0 and stage["versions"]["torch"] == importlib.metadata.version("torch")
    assert demo_run(folder, "demo", {"rate": 0.01}, STEPS).finished
    assert not demo_run(tmp_path, "demo", {"rate": 0.01}, STEPS).finished


def test_telemetry_holds_means_over_the_interval(uninterrupted):
    telemetry = lines(uninterrupted[0])
    assert [line["step"] for line in telemetry] == [2, 3, 4, 6, 8, 9]  # every third, every checkpoint, the last
    assert [line["step_number"] for line in telemetry] == [0.5, 2, 3, 4.5, 6.5, 8]
    assert all(line["stage"] == "demo" and line["loss"] > 0 for line in telemetry)


@pytest.mark.parametrize("at", range(STEPS))
def test_interrupted_anywhere_and_continued_the_result_is_the_same(uninterrupted, tmp_path, at):
    with pytest.raises(Stop):
        train(tmp_path, at, stop)
    assert [path.name for path in (tmp_path / "checkpoints").glob("*")] == (
        [f"step-{at // 2 * 2:09d}"] if at >= 2 else []
    )
    with open(tmp_path / "telemetry.jsonl", "a") as file:
        file.write('{"stage": "demo", "st')  # a line cut by a kill
    run = demo_run(tmp_path, "demo", {"rate": 0.01}, STEPS)
    assert run.track(**dict(zip(("model", "optimizer", "ema"), optimised(0)))) == at // 2 * 2
    assert final(tmp_path) == uninterrupted[1]
    assert without_seconds(lines(tmp_path)) == without_seconds(lines(uninterrupted[0]))


def test_interrupted_at_every_step_in_turn(uninterrupted, tmp_path):
    for at in range(STEPS):
        with pytest.raises(Stop):
            train(tmp_path, at, stop, checkpoint_every=1)
    assert final(tmp_path, start=STEPS - 1, checkpoint_every=1) == uninterrupted[1]
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, STEPS + 1))


def test_killed_between_the_last_checkpoint_and_the_end(uninterrupted, tmp_path):
    def killed(self, **facts):
        raise Stop

    run_class = type("Killed", (RunState,), {"finish": killed})
    run = demo_run(tmp_path, "demo", {"rate": 0.01}, STEPS, kind=run_class, checkpoint_every=2, log_every=3)
    model, optimizer, ema = optimised(0)
    run.track(model=model, optimizer=optimizer, ema=ema)
    for step in run.steps():
        run.log(loss=train_step(model, optimizer, ema, step), step_number=step)
    with pytest.raises(Stop):
        run.finish()
    assert train(tmp_path)[0] == STEPS and (tmp_path / "stage.json").exists()
    assert without_seconds(lines(tmp_path)) == without_seconds(lines(uninterrupted[0]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(uninterrupted, tmp_path, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as stopped:
        train(tmp_path, 4, lambda run, loss: os.kill(os.getpid(), number))
    assert stopped.value.code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert stopped.value.message == "Stopped at step 5 of 9 of demo; saved. Run the same command to continue."
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000005"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert final(tmp_path) == uninterrupted[1]


def test_a_second_signal_does_not_wait(tmp_path):
    def twice(run, loss):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 4, twice)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000004"]
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint_before(uninterrupted, tmp_path, value):
    with pytest.raises(
        EdgeDiTError,
        match=rf"demo: loss is {value} at step 8; the checkpoint step-000000006 before it is kept. Lower the",
    ):
        train(tmp_path, 6, lambda run, loss: torch.tensor(float(value)), log_every=100)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000006"]
    assert final(tmp_path) == uninterrupted[1]


def test_a_loss_that_is_no_number_before_the_first_checkpoint(tmp_path):
    with pytest.raises(EdgeDiTError, match="loss is nan at step 1; no checkpoint was written yet"):
        train(tmp_path, 0, lambda run, loss: float("nan"), log_every=1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": {"rate": 0.5}}, "was made with config.rate = 0.01, but now config.rate = 0.5 is asked for"),
        ({"config": {"rate": 0.01, "more": 1}}, "config.more = None, but now config.more = 1"),
        ({"seed": 3}, "seed = 0, but now seed = 3"),
        ({"inputs": {"teacher": "ab12"}}, "inputs.teacher = None, but now inputs.teacher = 'ab12'"),
    ],
)
def test_a_folder_made_with_other_values_is_refused(tmp_path, change, said):
    with pytest.raises(Stop):
        train(tmp_path, 4, stop)
    checkpoint = tmp_path / "checkpoints" / "step-000000004" / "state.safetensors"
    before = file_sha256(checkpoint)
    with pytest.raises(EdgeDiTError, match=f"{said}.*another output_dir, or delete"):
        train(tmp_path, **change)
    assert file_sha256(checkpoint) == before and not (tmp_path / "stage.json").exists()


@pytest.mark.parametrize("key", ["num_workers", "log_every", "checkpoint_every"])
@pytest.mark.parametrize("finish", [True, False])
def test_keys_that_no_result_depends_on_may_change(uninterrupted, tmp_path, key, finish):
    def config(value):
        return {"data": {key: value}, "tune": {"rate": 0.01}}

    if finish:
        train(tmp_path, config=config(0))
        assert demo_run(tmp_path, "demo", config(3), STEPS).finished
        return
    with pytest.raises(Stop):
        train(tmp_path, 4, stop, config=config(0))
    assert final(tmp_path, start=4, config=config(3)) == uninterrupted[1]


# -------------------------------------------------------------------- what is finished


@pytest.mark.parametrize("damage", ["deleted", "halved", "changed"])
def test_finished_is_not_believed_when_results_are_not_what_was_written(tmp_path, damage):
    finished_with_results(tmp_path)
    path = tmp_path / "model" / "weights.safetensors"
    content = path.read_bytes()
    (tmp_path / "README.md").write_text("a card, written later")
    assert demo_run(tmp_path, "demo", {}, 1).finished
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "halved" else content[:-1] + b"x")
    with pytest.raises(
        EdgeDiTError,
        match=f"Stage demo had finished, but .*weights.safetensors .*Put the file back, or delete {tmp_path}",
    ):
        demo_run(tmp_path, "demo", {}, 1)
    path.write_bytes(content)  # put back, with another time
    assert demo_run(tmp_path, "demo", {}, 1).finished and not (tmp_path / "run.lock").exists()


def test_runs_that_were_made_before_results_and_inputs_were_listed_go_on_working(tmp_path):
    finished_with_results(tmp_path)
    for name, keys in (("stage.json", ("files",)), ("run.json", ("format",))):
        values = read_json(tmp_path / name, "this test")
        atomic_write_json(tmp_path / name, {key: value for key, value in values.items() if key not in keys})
    (tmp_path / "model" / "weights.safetensors").unlink()
    assert demo_run(tmp_path, "demo", {}, 1, inputs={"weights": "new"}).finished
    assert demo_run(tmp_path, "demo", {"later_key": 1}, 1, inputs={"weights": "new"}).finished
    with pytest.raises(EdgeDiTError, match="seed = 0, but now seed = 1"):
        demo_run(tmp_path, "demo", {}, 1, seed=1)


# -------------------------------------------------------------------- weights that are not finite


def test_weights_that_are_not_finite_are_never_kept_and_a_lower_rate_continues_before_them(uninterrupted, tmp_path):
    def spoil(run, loss):  # the last update, after which no loss is looked at
        run._tracked["model"].state_dict()["0.weight"][0, 0] = float("nan")

    config = {"tune": {"learning_rate": 1.0, "warmup_steps": 0, "depth": 1}}
    with pytest.raises(
        EdgeDiTError,
        match=r"demo: model.0.weight holds NaN or infinite values after step 9; the checkpoint step-000000008 before "
        r"it is kept",
    ):
        train(tmp_path, STEPS - 1, spoil, config=config)
    assert not (tmp_path / "stage.json").exists()
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-000000008"]
    with pytest.raises(EdgeDiTError, match="config.tune.depth = 1, but now config.tune.depth = 2"):
        demo_run(tmp_path, "demo", {"tune": {**config["tune"], "depth": 2, "learning_rate": 0.1}}, STEPS)
    lower = {"tune": {**config["tune"], "learning_rate": 0.1, "warmup_steps": 3}}
    assert final(tmp_path, start=8, config=lower) == uninterrupted[1]
    changed = {"tune.learning_rate": [1.0, 0.1], "tune.warmup_steps": [0, 3]}
    stage = read_json(tmp_path / "stage.json", "this test")
    assert stage["changes"] == [{"step": 8, **changed}] and stage["config"] == lower
    assert [line["changed"] for line in lines(tmp_path) if "changed" in line] == [changed]
    with pytest.raises(EdgeDiTError, match="tune.learning_rate = 0.1, but now config.tune.learning_rate = 0.05"):
        demo_run(tmp_path, "demo", {"tune": {**lower["tune"], "learning_rate": 0.05}}, STEPS)


def test_the_rate_may_change_after_a_nan_only(tmp_path):
    config = {"tune": {"learning_rate": 1.0}}
    with pytest.raises(Stop):
        train(tmp_path, 4, stop, config=config)
    with pytest.raises(EdgeDiTError, match="tune.learning_rate = 1.0, but now"):
        demo_run(tmp_path, "demo", {"tune": {"learning_rate": 0.1}}, STEPS)


def test_weights_that_are_not_finite_are_not_published(tmp_path):
    run = demo_run(tmp_path, "demo", {}, 1)
    for _ in run.steps():
        pass
    with (
        pytest.raises(
            EdgeDiTError, match="Stage demo: 1 of 1 tensors of model.safetensors hold NaN .*nothing was published"
        ),
        run.publish() as aside,
    ):
        save_file({"weight": torch.tensor([float("inf")])}, aside / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


# -------------------------------------------------------------------- one process a folder

WORKING = """
import sys, time
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.stage import Stage
from edgedit_hf.run.state import RunState
run = RunState(RunConfig(output_dir=sys.argv[1]), Stage("demo", "demo.py", ".", "a test", ()), 1000)
for step in run.steps():
    print(step, flush=True)
    time.sleep(0.05)
"""


@pytest.fixture
def working(tmp_path):
    """A process that works in `tmp_path / "stage"`, started where Ctrl-C is ignored, as in a script's background."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKING, str(tmp_path / "stage")],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert process.stdout.readline() == "0\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_on_a_stage_is_refused_and_loses_nothing(tmp_path, working):
    with pytest.raises(EdgeDiTError, match=f"stage is in use by process {working.pid} on"):
        demo_run(tmp_path / "stage", "demo", {}, 1000)
    assert working.poll() is None
    working.kill()
    working.wait()
    assert not demo_run(tmp_path / "stage", "demo", {}, 1000).finished


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_process_with_its_code_also_where_it_was_ignored(tmp_path, working, number, code):
    working.send_signal(number)
    assert working.wait(20) == code
    assert not (tmp_path / "stage" / "run.lock").exists()


def test_a_full_disk_stops_a_run_that_then_continues(uninterrupted, small_disk):
    with pytest.raises(EdgeDiTError, match="No space left on the disk"):
        train(small_disk / "demo", 4, lambda run, loss: fill(small_disk))
    assert [path.name for path in (small_disk / "demo" / "checkpoints").glob("step-*")] == ["step-000000004"]
    (small_disk / "ballast").unlink()
    assert final(small_disk / "demo", start=4) == uninterrupted[1]


def test_facts_belong_to_the_checkpoint(tmp_path):
    for expected in ({}, {"losses": [1, 2]}):
        run, facts = demo_run(tmp_path, "demo", {}, 4, checkpoint_every=2), Facts()
        run.track(facts=facts)
        assert facts == expected
        with pytest.raises(Stop):
            for step in run.steps():
                facts["losses"] = [*facts.get("losses", []), step + 1]
                if step == 2:
                    raise Stop


def test_a_stage_may_keep_its_state_in_files_of_its_own(tmp_path):
    for start, stop_at in ((0, 2), (2, 4)):
        run = demo_run(tmp_path, "search", {}, 4, log_every=1, checkpoint_every=1, unit="genotype")
        run.continue_at(start)
        for step in run.steps():
            run.log(volume=step)
            if step + 1 == stop_at and stop_at < 4:
                break
    assert not (tmp_path / "checkpoints").exists()
    assert [line["step"] for line in lines(tmp_path)] == [1, 3, 4]


def test_the_progress_bar_names_stage_eta_and_metric(tmp_path, capsys):
    label = STAGE_LABEL.set("[2/9] ")
    try:
        train(tmp_path)
    finally:
        STAGE_LABEL.reset(label)
    shown = capsys.readouterr()
    assert "[2/9] demo: 100%" in shown.err and "9/9" in shown.err and "loss=" in shown.err and not shown.out


def test_a_folder_of_somebody_elses_is_no_stage(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "model_index.json").write_text("mine")
    for _ in range(2):
        with pytest.raises(EdgeDiTError, match="holds model_index.json, but no run.json of stage teacher"):
            demo_run(tmp_path / "teacher", "teacher", {}, 1)
    assert {path.name: path.read_text() for path in (tmp_path / "teacher").iterdir() if path.name != "run.lock"} == {
        "model_index.json": "mine"
    }


MAIN_ALONE = """
import sys
from accelerate import Accelerator
from edgedit_hf.run.state import on_main

def work():
    raise {"missing": FileNotFoundError(2, "gone", "there"), "bug": KeyError("name")}[sys.argv[1]]

accelerator = Accelerator(cpu=True)
try:
    on_main(work, accelerator)
except Exception as error:
    print(f"{accelerator.process_index} {type(error).__name__} {error}\\n", end="", flush=True)
"""


@pytest.mark.slow
@pytest.mark.ranks
def test_no_process_waits_for_a_main_one_that_failed_in_whatever_way(tmp_path):
    (tmp_path / "alone.py").write_text(MAIN_ALONE)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        tmp_path / "alone.py",
    ]
    for kind, said in (
        ("missing", ["0 FileNotFoundError [Errno 2] gone: 'there'", "1 FileNotFoundError [Errno 2] gone: 'there'"]),
        ("bug", ["0 KeyError 'name'", "1 RuntimeError KeyError on the main process: 'name'"]),
    ):
        done = subprocess.run([*launcher, kind], capture_output=True, text=True, timeout=300)
        assert sorted(done.stdout.splitlines()) == said, done.stderr


def test_images_that_an_earlier_version_read_are_said_to_be(tmp_path):
    demo_run(tmp_path / "teacher", "teacher", {}, 1, inputs={"data": "a"})
    path = tmp_path / "teacher" / "run.json"
    with pytest.raises(EdgeDiTError, match="inputs.data = 'b' is asked for. Use the old value"):
        demo_run(tmp_path / "teacher", "teacher", {}, 1, inputs={"data": "b"})
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "format"}))
    with pytest.raises(
        EdgeDiTError,
        match="inputs.data = 'b' is asked for. An earlier version made it.* keep its teacher by teacher.path. Use the "
        "old value",
    ):
        demo_run(tmp_path / "teacher", "teacher", {}, 1, inputs={"data": "b"})


# -------------------------------------------------------------------- the best checkpoint


def judged(folder, best_at=(3,), at=None, action=None, config=None, from_best=False, steps=STEPS):
    """A stage that keeps the checkpoints after some steps as its best; the hash of its final weights, and its start."""
    run = demo_run(folder, "demo", config or {"rate": 0.01}, steps, checkpoint_every=2, log_every=3)
    model, optimizer, ema = optimised(0)
    start = run.track(from_best, model=model, optimizer=optimizer, ema=ema)
    for step in run.steps():
        loss = train_step(model, optimizer, ema, step)
        run.log(loss=loss)
        if step + 1 in best_at:
            run.keep_best()
        if step + 1 == at:
            action(run)
    return weights_hash(model.state_dict()), start


def kept(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_best_checkpoint_stays_beside_the_last_and_is_one_copy(tmp_path):
    judged(tmp_path, best_at=(1, 3, 5))
    assert kept(tmp_path) == ["best-000000005", "step-000000009"]
    judged(tmp_path / "at-the-end", best_at=(9,))
    assert kept(tmp_path / "at-the-end") == ["best-000000009", "step-000000009"]
    for file in (tmp_path / "at-the-end" / "checkpoints" / "best-000000009").iterdir():
        assert file.stat().st_nlink == 2


def test_both_can_be_continued_from_to_the_same_end(tmp_path):
    whole, _ = judged(tmp_path / "whole")
    for from_best, begins in ((False, 6), (True, 3)):
        folder = tmp_path / f"from-{from_best}"
        with pytest.raises(Stop):
            judged(folder, at=7, action=lambda run: stop(run, None))
        assert kept(folder) == ["best-000000003", "step-000000006"]
        assert judged(folder, from_best=from_best) == (whole, begins)
        steps = [line["step"] for line in lines(folder)]
        assert steps == sorted(set(steps)) and steps[-1] == STEPS  # no step stands twice
    assert judged(tmp_path / "nothing", from_best=True) == (whole, 0)


def test_whoever_went_back_to_the_best_goes_on_from_there(tmp_path):
    """Stopped before another checkpoint, and continued without the word: not at step 0, nor at what was left behind."""
    with pytest.raises(Stop):
        judged(tmp_path, at=7, action=lambda run: stop(run, None))
    with pytest.raises(Stop):
        judged(tmp_path, from_best=True, at=4, action=lambda run: stop(run, None))
    assert kept(tmp_path) == ["best-000000003", "step-000000003"]
    whole, _ = judged(tmp_path / "whole")
    assert judged(tmp_path) == (whole, 3)


def drift(run):
    raise run.abort("the samples' mean has drifted", "Lower the weight")


def test_a_stage_that_stops_itself_says_why_and_how_to_go_on(tmp_path):
    values = {"few_step": {"matching_weight": 1.0, "moments_weight": 0.0, "learning_rate": 0.1, "rank": 4}}
    with pytest.raises(EdgeDiTError) as error:
        judged(tmp_path, at=7, action=drift, config=values)
    said = str(error.value)
    assert said.startswith(
        "demo: the samples' mean has drifted; the checkpoint step-000000006 before it is kept. Lower"
    )
    assert (
        "learning_rate, matching_weight, moments_weight may now change" in said
        and "rank" not in said.split("again:")[1]
    )
    assert kept(tmp_path) == ["best-000000003", "step-000000006"]
    assert read_json(tmp_path / "run.json", "")["aborted"] == {"step": 6, "why": "the samples' mean has drifted"}
    refused = {"few_step": {**values["few_step"], "rank": 8}}
    with pytest.raises(EdgeDiTError, match="rank = 4"):
        judged(tmp_path, config=refused)
    without = {"few_step": {**values["few_step"], "matching_weight": 0.0}}
    with pytest.raises(EdgeDiTError, match=r"few_step\.matching_weight = 1\.0.*few_step\.matching_weight = 0\.0"):
        judged(tmp_path, config=without)  # the critic is in the checkpoint; the folder stays as it was
    lower = {"few_step": {**values["few_step"], "matching_weight": 0.1, "moments_weight": 0.5}}
    _, start = judged(tmp_path, config=lower, from_best=True)
    assert start == 3
    changes = read_json(tmp_path / "run.json", "")["changes"]
    assert len(changes) == 1 and changes[0]["few_step.matching_weight"] == [1.0, 0.1]
    with pytest.raises(EdgeDiTError, match="matching_weight"):  # only once
        judged(tmp_path, config=values)


def test_a_limit_may_be_relaxed_and_a_missing_best_is_said(tmp_path, capsys):
    values = {"few_step": {"mean_drift": 0.1, "learning_rate": 0.1}}
    with pytest.raises(EdgeDiTError):
        judged(tmp_path, at=7, action=drift, config=values)
    shutil.rmtree(tmp_path / "checkpoints" / "best-000000003")
    whole, _ = judged(tmp_path / "whole", config=values)
    relaxed = {"few_step": {**values["few_step"], "mean_drift": 100.0}}
    assert judged(tmp_path, config=relaxed, from_best=True) == (whole, 6)
    assert "No best checkpoint was kept yet; demo continues from the last one" in capsys.readouterr().err


def test_remarks_stand_in_the_progress_line_and_the_telemetry(tmp_path, capsys):
    run = demo_run(tmp_path, "demo", {"rate": 0.01}, 4, checkpoint_every=9, log_every=1)
    model, _, _ = optimised(0)
    run.track(model=model)
    for step in run.steps():
        run.log(loss=step)
        if step:
            assert run.shown["loss"] == step - 1
        run.remark(("", "critic lags", "", "guidance too strong")[step])
    assert [line.get("note") for line in lines(tmp_path)] == [None, "critic lags", None, "guidance too strong"]
    assert "note=guidance too strong" in capsys.readouterr().err
