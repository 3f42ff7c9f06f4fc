"""Files that others can trust: what killed processes leave is cleared up, one process works in a folder, results are
what was written.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.files import (
    aside_of,
    atomic_folder,
    atomic_write_text,
    changed_file,
    check_finite,
    check_finite_files,
    file_record,
    publish_into,
    sweep,
)
from edgedit_hf.run.lock import FolderLock, release_locks


def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def contents(folder) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


# -------------------------------------------------------------------- what killed processes leave

KILLED_AT = """
import os, sys
from pathlib import Path
from edgedit_hf import files
place, folder = sys.argv[1], sys.argv[2]
renames = []
def killed(source, target, rename=os.rename):
    rename(source, target)
    renames.append(target)
    if place == f"rename {len(renames)}":
        os.kill(os.getpid(), 9)
os.rename = killed
with files.atomic_folder(folder) as aside:
    (aside / "a").write_text("new")
    (aside / "b").write_text("new")
    if place == "writing":
        os.kill(os.getpid(), 9)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("place", ["writing", "rename 1", "rename 2", "end"])
def test_a_folder_replaced_under_sigkill_is_old_or_new_at_the_next_start_and_nothing_stays(tmp_path, run_python, place):
    folder = tmp_path / "result"
    with atomic_folder(folder) as aside:
        (aside / "a").write_text("old")
    run_python(KILLED_AT, place, folder, expect=-signal.SIGKILL)
    sweep(tmp_path)
    new = {"result/a": "new", "result/b": "new"}
    assert contents(tmp_path) == (new if place in ("rename 2", "end") else {"result/a": "old"})


def test_asides_of_running_processes_and_of_other_hosts_stay(tmp_path):
    alive, dead = os.getpid(), gone()
    kept = [f".a.tmp-{alive}", aside_of(tmp_path / "a").name, f".a.tmp-ffffff-{dead}-77", ".hidden", ".a.other-3"]
    left = [
        f".a.tmp-{dead}",
        aside_of(tmp_path / "a").name.replace(f"-{alive}-", f"-{dead}-"),
        aside_of(tmp_path / "b").name + "9",
    ]
    for name in kept + left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    (tmp_path / f".file.json.tmp-{dead}").write_text("half")
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_what_was_only_moved_aside_comes_back_unless_something_else_is_there(tmp_path):
    for name in ("lost", "there"):
        aside = tmp_path / f".{name}.old-{gone()}"
        aside.mkdir()
        (aside / "file").write_text("old")
    (tmp_path / "there").mkdir()
    sweep(tmp_path)
    assert contents(tmp_path) == {"lost/file": "old"} and (tmp_path / "there").is_dir()


@pytest.mark.parametrize("writer", [atomic_folder, publish_into])
def test_the_next_writer_of_a_folder_clears_up(tmp_path, writer):
    parent = tmp_path if writer is atomic_folder else tmp_path / "result"
    parent.mkdir(exist_ok=True)
    (parent / f".result.tmp-{gone()}").mkdir()
    with writer(tmp_path / "result") as aside:
        (aside / "file").write_text("new")
    assert contents(tmp_path) == {"result/file": "new"} and not list(parent.glob(".*"))


# -------------------------------------------------------------------- locks

HOLDER = """
import sys, time
from edgedit_hf.run.lock import FolderLock
FolderLock(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_told_who_works_in_the_folder(tmp_path, holder):
    with pytest.raises(
        EdgeDiTError,
        match=rf"in use by process {holder.pid} on {socket.gethostname()} .*Wait for it or stop it.*delete .*run\.lock",
    ):
        FolderLock(tmp_path).acquire()
    FolderLock(tmp_path).release()  # not ours: it stays
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == holder.pid
    holder.kill()
    holder.wait()
    with FolderLock(tmp_path):  # taken over
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_lock_ends_with_its_process(tmp_path, run_python):
    run_python(
        "import sys\nfrom edgedit_hf.run.lock import FolderLock\nFolderLock(sys.argv[1]).acquire()\n"
        "raise SystemExit(3)",
        tmp_path,
        expect=3,
    )
    assert not list(tmp_path.iterdir())


def test_the_own_lock_may_be_taken_again_and_all_be_given_back(tmp_path):
    FolderLock(tmp_path).acquire()
    FolderLock(tmp_path).acquire()
    release_locks()
    assert not list(tmp_path.iterdir())


def test_a_number_that_another_process_has_by_now_holds_nothing(tmp_path, holder):
    found = json.loads((tmp_path / "run.lock").read_text())
    (tmp_path / "run.lock").write_text(json.dumps({**found, "started": "1"}))
    FolderLock(tmp_path).acquire()
    release_locks()


@pytest.mark.parametrize("content", ['{"host": "elsewhere", "pid": 1, "started": "1"}', '{"pid": 1', "[]", ""])
def test_a_lock_of_another_host_or_a_damaged_one_is_never_taken_over(tmp_path, content):
    (tmp_path / "run.lock").write_text(content)
    with pytest.raises(EdgeDiTError, match=r"delete .*" if "elsewhere" in content else "delete that file"):
        FolderLock(tmp_path).acquire()
    assert (tmp_path / "run.lock").read_text() == content


# -------------------------------------------------------------------- records


def test_what_changed_in_a_folder_is_named(tmp_path):
    for name in ("a.json", "deep/b.bin"):
        atomic_write_text(tmp_path / name, "content")
    (tmp_path / "run.json").write_text("left out")
    record = file_record(tmp_path, ["run.json"])
    assert sorted(record) == ["a.json", "deep/b.bin"] and changed_file(tmp_path, record) is None
    (tmp_path / "new").write_text("of others")
    os.utime(tmp_path / "a.json", (1, 1))  # as copying does
    assert changed_file(tmp_path, record) is None
    (tmp_path / "a.json").write_text("CONTENT")
    os.utime(tmp_path / "a.json", ns=(0, record["a.json"]["mtime_ns"]))
    assert "a.json holds other bytes" in changed_file(tmp_path, record)
    (tmp_path / "a.json").write_text("cont")
    assert "a.json has 4 bytes instead of 7" in changed_file(tmp_path, record)
    (tmp_path / "a.json").unlink()
    assert "a.json is missing" in changed_file(tmp_path, record)


def test_a_large_file_is_hashed_again_only_when_its_time_differs(tmp_path, monkeypatch):
    monkeypatch.setattr("edgedit_hf.files.HASHED_ALWAYS", 3)
    (tmp_path / "large").write_text("content")
    record = file_record(tmp_path)
    (tmp_path / "large").write_text("CONTENT")
    assert "other bytes" in changed_file(tmp_path, record)
    os.utime(tmp_path / "large", ns=(time.time_ns(), record["large"]["mtime_ns"]))
    assert changed_file(tmp_path, record) is None


# -------------------------------------------------------------------- finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_only_finite_weights_pass_in_every_type(tmp_path, dtype):
    good = {
        "a": torch.tensor(3 * [torch.finfo(dtype).max], dtype=torch.float64).to(dtype),
        "n": torch.arange(3),
        "e": torch.zeros(0, dtype=dtype),
    }
    bad = {**good, "b": torch.tensor([1.0, float("nan")]).to(dtype)}
    check_finite(good, "model", "remedy")
    save_file(good, tmp_path / "good.safetensors")
    check_finite_files(tmp_path, "model", "remedy")
    save_file(bad, tmp_path / "bad.safetensors")
    with pytest.raises(EdgeDiTError, match="model: 1 of 4 tensors hold NaN or infinite values, the first is b; remedy"):
        check_finite(bad, "model", "remedy")
    with pytest.raises(
        EdgeDiTError, match="model: 1 of 4 tensors of bad.safetensors hold NaN .* the first is b; remedy"
    ):
        check_finite_files(tmp_path, "model", "remedy")
