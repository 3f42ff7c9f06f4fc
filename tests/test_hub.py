"""Names of things on the Hub: told from paths, fetched with the real client from its cache or a server here, or one
clear line.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from hub_server import READER, STRANGER
from small_disks import fill, small_disk  # noqa: F401

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.hub import HubName, explain, fetch, is_name, loaded_files, parse_name, pinned, resolve


@pytest.mark.parametrize(
    "text, name",
    [
        ("org/name", True),
        ("hf://org/name", True),
        ("hf://org/name@v1/transformer", True),
        ("name", False),
        ("runs/demo/teacher", False),
        ("./org/name", False),
        ("~/name", False),
        ("/org", False),
        ("org/name/", False),
        ("weights/dit.pt", False),
        ("latency/table.json", False),
        (Path("org/name"), False),
    ],
)
def test_what_is_a_name(text, name):
    assert is_name(text) is name


def test_what_is_here_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_name("org/name") and resolve("org/name") == Path("org/name")
    assert resolve(Path("org/other")) == Path("org/other")


def test_parts_of_a_name():
    assert parse_name("org/name") == HubName("org/name")
    whole = HubName("org/name", "feature/x", "a/b")
    assert parse_name(str(whole)) == whole and str(whole) == "hf://org/name@feature%2Fx/a/b"
    for name, said in (
        ("hf://org/name/../../x", "outside"),
        ("hf://datasets/org/name", "a dataset"),
        ("hf://org", "no name on the Hub"),
        ("a--b/c", "no name on the Hub"),
        ("org/na me", "no name on the Hub"),
        ("org/a\0\n", "^org/a\0 : this is no name on the Hub"),
        ("org/" + "a" * 5000, "^.{200}…: this is no name on the Hub"),
        ("hf://", "no name on the Hub"),
    ):
        with pytest.raises(EdgeDiTError, match=said):
            parse_name(name)


@pytest.fixture
def cache(tmp_path, make_hub_cache):
    for name in ("a.json", "deep/b.json", "deep/c.bin", "beside/d.txt"):
        path = tmp_path / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(name))
    return make_hub_cache(tmp_path / "repository", "org/name")


def test_from_the_cache(cache):
    root = fetch("org/name", cache_dir=cache)
    assert sorted(path.name for path in root.rglob("*.*")) == ["a.json", "b.json", "c.bin", "d.txt"]
    assert fetch("hf://org/name/deep", ["*.json", "../beside/*"], cache_dir=cache) == root / "deep"
    assert fetch("hf://org/name/deep/c.bin", cache_dir=cache) == root / "deep" / "c.bin"
    assert fetch("org/name", revision=root.name, cache_dir=cache) == root
    with pytest.raises(EdgeDiTError, match="has no elsewhere at commit"):
        fetch("hf://org/name/elsewhere", cache_dir=cache)
    with pytest.raises(EdgeDiTError, match="nor a Hub id that is whole in the cache, and HF_HUB_OFFLINE"):
        fetch("org/other", cache_dir=cache)
    with pytest.raises(EdgeDiTError, match="a Hub id that is whole in the cache"):
        fetch("hf://org/name@v1", cache_dir=cache)
    with pytest.raises(EdgeDiTError, match="two revisions"):
        fetch("hf://org/name@v1", revision="v2", cache_dir=cache)


def test_a_cache_that_lacks_a_file(cache):
    os.unlink(next(cache.rglob("snapshots/*/deep/c.bin")))
    assert fetch("org/name", ["*.json"], cache_dir=cache).is_dir()
    with pytest.raises(EdgeDiTError, match="only part of it is in the cache"):
        fetch("org/name", cache_dir=cache)


def test_an_error_of_ours_stays(tmp_path):
    error = EdgeDiTError("mine")
    assert explain(error, "x") is error


def test_which_weights_are_loaded():
    plain = ["config.json", "diffusion_pytorch_model.safetensors"]
    assert loaded_files([*plain, "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"]) == plain
    shards = ["config.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2)), "model.safetensors.index.json"]
    others = ["model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json", "pytorch_model.bin"]
    assert loaded_files(shards + others) == sorted(shards)
    assert loaded_files(["a.json", "model.fp16.safetensors", "model.onnx"]) == ["a.json", "model.fp16.safetensors"]
    assert loaded_files(["a.json", "pytorch_model.bin"]) == ["a.json", "pytorch_model.bin"]
    exported = ["config.json", "onnx/model.onnx", "onnx/model.onnx.data", "tokenizer.model", "model_index.json"]
    assert loaded_files(exported) == sorted(exported)


# -------------------------------------------------------------------- against a Hub

WHAT_GOES_WRONG = """
import sys, time
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.hub import fetch

time.sleep = lambda seconds: None  # the client tries again after seconds
for name in sys.argv[1:]:
    try:
        print(name, "came:", fetch(name))
    except EdgeDiTError as error:
        assert "\\n" not in str(error)
        print(error)
"""


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(300_000))
    return folder


def test_every_error_is_one_clear_line(hub, files, run_with_hub, tmp_path):
    what = {  # repository, how it fails → what is said
        "limited": ({"status": 429, "retry_after": 7, "message": "slow down"}, r"too many requests .*; wait 7 seconds"),
        "down": ({"status": 503, "message": "maintenance"}, r"the Hub has a fault \(503: maintenance\); run it again"),
        "unauthorised": ({"status": 401, "message": "Invalid credentials in Authorization header"}, "take the token"),
        "forbidden": ({"status": 403, "message": "no"}, r"the token may not do this \(403: no\)"),
        "conflict": ({"status": 409, "message": "busy"}, r"at the same time, or it is there already \(409: busy\)"),
        "disabled": ({"status": 403, "message": "Access to this resource is disabled."}, "was disabled by the Hub"),
        "reset": ({"reset": 10}, "cut the connection; run it again, it continues"),
    }
    for name, (fault, _) in what.items():
        hub.add(f"me/{name}", files)
        hub.fault(f"/api/models/me/{name}(/revision/main)?$", times=None, **fault)
    for name, fault in {"short": {"short": 60_000}, "torn": {"reset": 60_000}}.items():
        hub.add(f"me/{name}", files)
        hub.fault(f"GET /storage/models/me/{name}/", times=None, **fault)
        what[name] = (fault, "the download was cut short .*run it again" if name == "short" else "cut the connection")
    what["nowhere"] = ({}, r"neither a local path nor a Hub id that http://127.* knows, or it is private \(40")
    names = [*(f"me/{name}" for name in what), "hf://me/torn@v9", "hf://me/torn/sub"]
    said = run_with_hub(WHAT_GOES_WRONG, *names, quiet=True)
    lines = said.splitlines()
    assert len(lines) == len(what) + 2, said
    for line, (name, (_, expected)) in zip(lines, what.items()):
        assert line.startswith(f"me/{name}: ") and re.search(expected, line), line
    assert "the repository has no such revision" in lines[-2] and "has no sub at commit" in lines[-1]
    assert not list((tmp_path / "home").rglob("*.incomplete"))
    hub.faults.clear()
    assert "came:" in run_with_hub(WHAT_GOES_WRONG, "me/torn")
    hub.stop()  # what was fetched is still there, without the Hub too
    lines = run_with_hub(WHAT_GOES_WRONG, "me/torn", "me/limited").splitlines()
    assert "came:" in lines[0] and "cannot be reached; look at your connection" in lines[1]
    hub.start()


@pytest.mark.slow
def test_private_and_gated(hub, files, run_with_hub):
    hub.add("me/private", files, private=True)
    hub.add("acme/gated", files, gated="auto")
    assert "came:" in run_with_hub(WHAT_GOES_WRONG, "me/private", token=READER)
    lines = run_with_hub(WHAT_GOES_WRONG, "me/private", "acme/gated", home="other", token=STRANGER).splitlines()
    assert "or it is private" in lines[0] and "the repository is gated" in lines[1], lines


def test_a_full_disk(hub, files, run_with_hub, small_disk):  # noqa: F811
    (files / "model.safetensors").write_bytes(os.urandom(700_000))
    hub.add("me/big", files)
    said = run_with_hub(WHAT_GOES_WRONG, "me/big", home=small_disk)
    assert "me/big: no space left on the disk; free some and run the same command again" in said
    assert not list(small_disk.rglob("*.incomplete"))


@pytest.mark.slow
def test_a_branch_that_moves_and_a_commit(hub, files, run_with_hub, tmp_path):
    first = hub.add("me/moves", files)
    assert first in run_with_hub(WHAT_GOES_WRONG, "me/moves")
    shutil.rmtree(hub.repository("me/moves").folder)
    (files / "config.json").write_text('{"new": 1}')
    second = hub.add("me/moves", files)
    lines = run_with_hub(WHAT_GOES_WRONG, "me/moves", f"hf://me/moves@{first}").splitlines()
    assert second != first and second in lines[0] and first in lines[1]  # the second from the cache
    assert second in run_with_hub(WHAT_GOES_WRONG, "me/moves", offline=True)


def test_a_name_at_its_commit(tmp_path):
    root = tmp_path / "snapshots" / ("a" * 40)
    assert pinned("org/name", root) == f"hf://org/name@{'a' * 40}"
    assert pinned("hf://org/name/b/c", root / "b" / "c") == f"hf://org/name@{'a' * 40}/b/c"
