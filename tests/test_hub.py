"""Names of things on the Hub: told from paths, fetched with the real client from its cache or a server here, or one
clear line.
"""

import json
import os
from pathlib import Path

import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.hub import HubName, explain, fetch, is_name, parse_name, resolve


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
    with pytest.raises(EdgeDiTError, match="nor a Hub id that is in the cache, and HF_HUB_OFFLINE"):
        fetch("org/other", cache_dir=cache)
    with pytest.raises(EdgeDiTError, match="a Hub id that is in the cache"):
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
