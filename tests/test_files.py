"""Files that others can trust: what killed processes leave is cleared up, one process works in a folder, results are
what was written.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from demo_stage import demo_run
from safetensors.torch import save_file
from small_disks import fill

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.files import (
    aside_of,
    atomic_folder,
    atomic_write_json,
    atomic_write_text,
    changed_file,
    check_finite,
    check_finite_files,
    file_record,
    file_sha256,
    hash_json,
    publish_into,
    read_json,
    sweep,
    weights_hash,
)


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


KILLED = """
import os, sys
from edgedit_hf.files import atomic_folder
with atomic_folder(sys.argv[1]) as folder:
    (folder / "file").write_text("new")
    os._exit(9)
"""


def test_hashes_depend_on_content_alone(tmp_path):
    assert (
        hash_json({"a": 1, "b": [1.5, None]})
        == hash_json({"b": [1.5, None], "a": 1})
        != hash_json({"a": 1, "b": [1.5, 0]})
    )
    (tmp_path / "file").write_bytes(b"abc")
    assert file_sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(1)}
    same = {"c": torch.tensor(1), "b": state["b"].clone(), "a": state["a"].mT.contiguous().mT}
    assert weights_hash(state) == weights_hash(same)
    others = [
        {**state, "a": state["a"].view(3, 2)},
        {**state, "a": state["a"].double()},
        {**state, "c": torch.tensor(2)},
        {"d" if name == "c" else name: tensor for name, tensor in state.items()},
    ]
    assert len({weights_hash(state), *map(weights_hash, others)}) == 5


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "new" / "file.json"
    atomic_write_json(path, {"a": [1, 2]})
    atomic_write_json(path, {"b": None})
    assert read_json(path, "this test") == {"b": None} and contents(tmp_path).keys() == {"new/file.json"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic_write_json(path, {"a": float("nan")})
    assert read_json(path, "this test") == {"b": None}


def test_json_that_is_missing_or_damaged_names_who_writes_it(tmp_path):
    with pytest.raises(EdgeDiTError, match="table.json does not exist; it is written by stage latency, run that first"):
        read_json(tmp_path / "table.json", "stage latency")
    for content in (b'{"a": ', b"\xff\xfe"):
        (tmp_path / "table.json").write_bytes(content)
        with pytest.raises(EdgeDiTError, match="table.json is not JSON.*stage latency writes it"):
            read_json(tmp_path / "table.json", "stage latency")


def test_folders_are_replaced_whole(tmp_path):
    folder = tmp_path / "runs" / "result"
    for name in ("first", "second"):
        with atomic_folder(folder) as aside:
            (aside / "deep").mkdir()
            (aside / "deep" / name).write_text(name)
            assert contents(folder) == ({} if name == "first" else {"deep/first": "first"})
    assert contents(tmp_path) == {"runs/result/deep/second": "second"}


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path):
    folder = tmp_path / "result"
    with atomic_folder(folder) as aside:
        (aside / "file").write_text("old")
    with pytest.raises(KeyError), atomic_folder(folder) as aside:
        (aside / "file").write_text("new")
        raise KeyError("failed half-way")
    assert contents(tmp_path) == {"result/file": "old"}


def test_a_killed_process_leaves_the_old_folder(tmp_path, run_python):
    folder = tmp_path / "result"
    with atomic_folder(folder) as aside:
        (aside / "file").write_text("old")
    run_python(KILLED, folder, expect=9)
    assert contents(folder) == {"file": "old"}
    with atomic_folder(folder) as aside:
        (aside / "file").write_text("newer")
    assert contents(folder) == {"file": "newer"}


def test_publishing_adds_to_a_folder_entry_by_entry(tmp_path):
    (tmp_path / "telemetry.jsonl").write_text("kept")
    for name in ("first", "second"):
        with publish_into(tmp_path) as aside:
            (aside / "model").mkdir()
            (aside / "model" / name).write_text(name)
            (aside / "index.json").write_text(name)
    assert contents(tmp_path) == {"telemetry.jsonl": "kept", "model/second": "second", "index.json": "second"}
    with pytest.raises(KeyError), publish_into(tmp_path) as aside:
        (aside / "index.json").write_text("third")
        raise KeyError
    assert contents(tmp_path)["index.json"] == "second" and not (tmp_path / ".publish").exists()


def test_a_full_disk_is_one_clear_error_and_old_content_stays(small_disk):
    atomic_write_text(small_disk / "a.json", "old")
    with atomic_folder(small_disk / "model") as aside:
        save_file({"weight": torch.zeros(10)}, aside / "model.safetensors")
    old = file_sha256(small_disk / "model" / "model.safetensors")
    fill(small_disk)
    with pytest.raises(EdgeDiTError, match="No space left on the disk of .*a.json; free some"):
        atomic_write_text(small_disk / "a.json", "x" * 10_000)
    with (
        pytest.raises(EdgeDiTError, match="No space left on the disk of .*model"),
        atomic_folder(small_disk / "model") as aside,
    ):
        save_file({"weight": torch.zeros(10_000)}, aside / "model.safetensors")  # not an OSError in safetensors
    (small_disk / "ballast").unlink()
    assert sorted(contents(small_disk)) == ["a.json", "model/model.safetensors"]
    assert (small_disk / "a.json").read_text() == "old" and file_sha256(
        small_disk / "model" / "model.safetensors"
    ) == old


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(EdgeDiTError, match="Cannot write .*file.*choose a folder you may write to"):
            demo_run(path, "demo", {}, 1)
    with pytest.raises(EdgeDiTError, match="Cannot write"):
        atomic_write_text(tmp_path / "file" / "a.json", "{}")
