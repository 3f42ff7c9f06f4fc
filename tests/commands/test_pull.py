"""`edgedit pull` in processes of its own, from the Hub on the loopback interface."""

import hashlib
import json
import os
import re

import pytest
from small_disks import fill, small_disk  # noqa: F401

PULL = """
import sys
from edgedit_hf.commands.cli import main
codes = [main(["pull", *arguments.split()]) for arguments in sys.argv[1:]]
assert not {"torch", "diffusers"} & sys.modules.keys()
print("codes", *codes)
"""


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def export(tmp_path):
    """As far as pulling looks at it, an export."""
    folder = tmp_path / "export"
    (folder / "transformer" / "onnx").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    for name in ("model.onnx", "model.onnx.data"):
        (folder / "transformer" / "onnx" / name).write_bytes(os.urandom(200_000))
    artefacts = {path: path.stat().st_size for path in folder.rglob("*.onnx*") if path.is_file()}
    files = {
        path.relative_to(folder).as_posix(): {"bytes": size, "sha256": sha256(path)} for path, size in artefacts.items()
    }
    (folder / "contract.json").write_text(json.dumps({"files": files}))
    return folder


def test_a_copy_whole_or_in_part_online_and_offline(hub, export, run_with_hub, tmp_path):
    commit = hub.add("me/export", export)
    said = run_with_hub(
        PULL, f"me/export {tmp_path}/whole", f"hf://me/export/transformer {tmp_path}/part", f"me/export {tmp_path}/part"
    )
    assert contents(tmp_path / "whole") == contents(export)
    assert contents(tmp_path / "part") == contents(export / "transformer")
    assert said.splitlines()[0] == f"{tmp_path}/whole: 4 files, 0.40 MB, of me/export at commit {commit[:12]}"
    assert said.splitlines()[-1] == "codes 0 0 2"
    hub.forget()
    said = run_with_hub(PULL, f"me/export {tmp_path}/again --revision {commit}", offline=True)
    assert contents(tmp_path / "again") == contents(export) and "codes 0" in said and not hub.requests()
    for path in (tmp_path / "whole").rglob("*"):
        assert not path.is_symlink()


@pytest.mark.slow
def test_what_is_cut_continues(hub, export, run_with_hub, tmp_path):
    hub.add("me/export", export)
    torn = hub.fault(f"/storage/.*{sha256(export / 'transformer/onnx/model.onnx')[:8]}", reset=1000, times=None)
    impatient = f"import time; time.sleep = lambda seconds: None\n{PULL}"
    assert "codes 2" in run_with_hub(impatient, f"me/export {tmp_path}/out")
    assert torn.hits and not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    hub.faults.clear(), hub.forget()
    assert "codes 0" in run_with_hub(PULL, f"me/export {tmp_path}/out")
    assert sum(entry["answered"] for entry in hub.requests("GET /storage/")) == 200_000  # the other is not sent again
    assert contents(tmp_path / "out") == contents(export)


CHECKED = """
import sys
from pathlib import Path
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.hub import pull

name, output = sys.argv[1:3]
try:
    print(pull(name, output))
except EdgeDiTError as error:
    print(error)
assert not Path(output).exists() and not list(Path(output).parent.glob(f".{Path(output).name}*"))
"""


@pytest.mark.parametrize(
    "what, said",
    [
        ("damaged before", r"model.onnx has the SHA-256 \w{64}, but contract.json says \w{64}"),
        pytest.param(
            "pushed in part",
            "contract.json lists transformer/onnx/model.onnx.data, which is not there",
            marks=pytest.mark.slow,
        ),
        pytest.param("outside", "contract.json lists '../../x', which is not in its folder", marks=pytest.mark.slow),
        pytest.param(
            "damaged in the cache",
            r"model.onnx \(200000 bytes\) has not the hash that the Hub gave it: .* Delete /",
            marks=pytest.mark.slow,
        ),
        pytest.param("bank", "00-mlp.safetensors has the SHA-256 .* but index.json says", marks=pytest.mark.slow),
        pytest.param("stage", "student.json has the SHA-256 .* but stage.json says", marks=pytest.mark.slow),
    ],
)
def test_what_is_not_what_it_was_is_refused(what, said, hub, export, run_with_hub, tmp_path):
    contract, model = export / "contract.json", export / "transformer" / "onnx" / "model.onnx"
    if what == "damaged before":
        model.write_bytes(os.urandom(200_000))
    elif what == "pushed in part":
        model.with_name("model.onnx.data").unlink()
    elif what == "outside":
        contract.write_text(json.dumps({"files": {"../../x": {"bytes": 1, "sha256": "0" * 64}}}))
    elif what == "bank":
        contract.unlink()
        (export / "00-mlp.safetensors").write_bytes(b"proxy")
        index = {"format": "edgedit-proxy-bank-1", "teacher_hash": "0" * 16, "space": SPACE}
        entries = {"00/mlp": {"file": "00-mlp.safetensors", "sha256": "0" * 64}}
        (export / "index.json").write_text(json.dumps({**index, "entries": entries}))
    elif what == "stage":
        contract.unlink()
        (export / "student.json").write_text("{}")
        listed = {"student.json": {"size": 2, "mtime_ns": 1, "sha256": "0" * 64}}
        (export / "stage.json").write_text(json.dumps({"files": listed}))
    hub.add("me/export", export)
    if what == "damaged in the cache":
        assert "codes 0" in run_with_hub(PULL, f"me/export {tmp_path}/first")
        (cached,) = (tmp_path / "home").rglob("snapshots/*/transformer/onnx/model.onnx")
        cached.resolve().write_bytes(os.urandom(200_000))
    line = run_with_hub(CHECKED, "me/export", tmp_path / "out").strip()
    assert re.search(said, line) and line.count("\n") == 0, line


SPACE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 2,
}


def test_a_full_disk_leaves_nothing(hub, export, run_with_hub, small_disk, tmp_path):  # noqa: F811
    hub.add("me/export", export)
    fill(small_disk)
    (small_disk / "ballast").write_bytes(b"x" * 300_000)  # what is left is too little for all
    line = run_with_hub(CHECKED, "me/export", small_disk / "out").strip()
    assert "No space left on the disk" in line and [path.name for path in small_disk.iterdir()] == ["ballast"]
