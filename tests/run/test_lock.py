"""One process works in a folder: who it is, when its lock ends, and locks that are never taken over."""

import json
import os
import socket
import subprocess
import sys

import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.run.lock import FolderLock, release_locks

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
