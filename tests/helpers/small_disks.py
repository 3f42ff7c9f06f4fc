"""A disk that is soon full."""

import errno
import shutil
import subprocess

import pytest


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, 512 kB large."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command to make a small file system with")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(
        ["umount", "--lazy", folder], check=True
    )  # tensors that were loaded from there still map their files


def fill(folder) -> None:
    """Take every byte that is left on the file system of `folder`."""
    with pytest.raises(OSError) as full, open(folder / "ballast", "ab", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    assert full.value.errno == errno.ENOSPC
