"""The Hub on the loopback interface that other tests push to, against the unmodified client of huggingface_hub."""

import json
import random

import pytest

CARD = "---\nlicense: cc-by-nc-4.0\nbase_model: acme/teacher\nbase_model_relation: quantized\n---\n# A student\n"
PUSH = """
import sys
from huggingface_hub import HfApi
api, (folder, repo_id) = HfApi(), sys.argv[1:3]
api.create_repo(repo_id, private=True, exist_ok=True)
print(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="push").oid)
"""
PULL = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download(sys.argv[1], revision=sys.argv[2]))
"""


@pytest.fixture
def folder(tmp_path):
    """Files of git and of LFS (by name, and by what they hold), one in parts, one in a folder, one empty."""
    content, folder = random.Random(0), tmp_path / "student"
    (folder / "transformer").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "transformer" / "config.json").write_text("{}")
    (folder / "empty.txt").touch()
    (folder / "grid.png").write_bytes(b"\x89PNG\0" + content.randbytes(1000))
    (folder / "transformer" / "model.safetensors").write_bytes(content.randbytes(250_000))
    (folder / "program.pte").write_bytes(content.randbytes(50_000))
    return folder


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pushed_and_pulled(hub, folder, run_with_hub, tmp_path):
    """Twice, then changed: what is there is not sent again; what is pulled is what was pushed, also offline."""
    hub.part_size = 100_000
    first = run_with_hub(PUSH, folder, "me/student").strip()
    assert {path: file.read_bytes() for path, file in hub.files("me/student").items()} == contents(folder)
    parts = hub.requests("PUT /storage/.*/[123]$")
    assert [part["received"] for part in parts] == [100_000, 100_000, 50_000]
    assert hub.sent("PUT /storage/") == 250_000 + 50_000 + 1005

    hub.forget()
    assert run_with_hub(PUSH, folder, "me/student").strip() == first
    assert hub.sent() == 0 and not hub.requests("/commit/")
    (folder / "transformer" / "config.json").write_text('{"new": 1}')
    (folder / "program.pte").write_bytes(b"\0" * 10)
    second = run_with_hub(PUSH, folder, "me/student").strip()
    assert second != first and hub.sent("PUT /storage/") == 10

    hub.stop(), hub.start()
    (pulled,) = run_with_hub(PULL, "me/student", "main", home="empty").split()
    assert {**contents(folder), ".gitattributes": b""} == {**contents(tmp_path / pulled), ".gitattributes": b""}
    hub.stop()
    assert run_with_hub(PULL, "me/student", "main", home="empty", offline=True).split() == [pulled]
    assert json.loads((tmp_path / pulled / "transformer" / "config.json").read_text()) == {"new": 1}
    hub.start()
