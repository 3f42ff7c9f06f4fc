"""onnxruntime-web from npm: the pinned release or nothing, kept once, and one clear error where it cannot be had."""

import os
import re
import shutil
import stat
import tarfile

import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.web import runtime


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache of assets, and a folder of programs that alone are found."""
    monkeypatch.setattr("edgedit_hf.export.web.runtime._cached", lambda: tmp_path / "assets" / "files")
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    return programs


def npm(programs, script):
    """An npm of our own: `$4` is the folder that the archive goes to."""
    path = programs / "npm"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def refused() -> str:
    with pytest.raises(EdgeDiTError) as error:
        runtime.runtime_folder()
    return str(error.value)


def test_without_npm_and_without_a_copy_the_remedies_are_said(cache):
    said = refused()
    assert "onnxruntime-web 1.30.0" in said and "no npm" in said and "--runtime-url" in said
    with pytest.raises(EdgeDiTError, match="no npm here"):
        runtime.check_available()
    assert runtime.main() == 1
    runtime.check_available("https://example.org/ort/")  # which needs none


def test_an_npm_that_fails_is_quoted(cache):
    npm(cache, "echo 'npm error network request failed' >&2; exit 1")
    assert "could not fetch onnxruntime-web@1.30.0 (npm error network request failed)" in refused()
    npm(cache, "exit 0")
    assert "it wrote no archive" in refused()


def test_another_archive_than_the_pinned_one_is_refused_and_nothing_kept(cache, tmp_path):
    npm(cache, 'echo evil > "$4/onnxruntime-web-1.30.0.tgz"')
    said = refused()
    assert "with the integrity sha512-" in said and runtime.INTEGRITY in said
    assert not any(path.is_file() for path in (tmp_path / "assets").rglob("*"))


def test_the_pinned_files_are_kept_and_a_damaged_copy_is_fetched_again(cache, monkeypatch, tmp_path):
    """With a small archive in the place of the real one, whose files and hash are pinned instead."""
    package = tmp_path / "package"
    (package / "dist").mkdir(parents=True)
    names = [name for name in runtime.FILES if name != "package.json"]
    for name in names:
        (package / "dist" / name).write_text(f"// {name}")
    (package / "package.json").write_text("{}")
    archive = tmp_path / "small.tgz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(package, "package")
    import base64
    import hashlib

    integrity = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    monkeypatch.setattr(runtime, "INTEGRITY", integrity)
    pinned = {name: hashlib.sha256(f"// {name}".encode()).hexdigest() for name in names}
    monkeypatch.setattr(runtime, "FILES", pinned | {"package.json": hashlib.sha256(b"{}").hexdigest()})
    npm(
        cache,
        f'{shutil.which("cp", path=os.defpath)} {archive} "$4/onnxruntime-web-1.30.0.tgz"; echo >> {tmp_path}/calls',
    )
    folder = runtime.runtime_folder()
    assert {path.name for path in folder.iterdir()} == set(runtime.FILES)
    assert runtime.runtime_folder() == folder and (tmp_path / "calls").read_text() == "\n"
    (folder / "package.json").write_text("damaged")
    assert (runtime.runtime_folder() / "package.json").read_text() == "{}"
    assert (tmp_path / "calls").read_text() == "\n\n"
    (cache / "npm").unlink()
    runtime.check_available()  # from the cache


@pytest.mark.parametrize(
    "url, origin",
    [
        ("https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/", "https://cdn.jsdelivr.net"),
        ("http://localhost:8001/ort", "http://localhost:8001"),
        ("../shared/ort/", ""),
    ],
)
def test_the_origin_of_a_runtime_of_ones_own(url, origin):
    assert runtime.runtime_origin(url) == origin


@pytest.mark.parametrize(
    "url",
    [
        *("", "ftp://example.org/", "javascript:alert(1)", "//example.org/", "https://", "https://me:pw@example.org/"),
        *(
            "https://example.org/ 'unsafe-eval'",
            "https://example.org/;script-src",
            'x"><script>',
            "https://ex\nample.org/",
        ),
    ],
)
def test_what_is_no_address_of_a_runtime(url):
    with pytest.raises(EdgeDiTError, match=re.escape(f"--runtime-url is {url!r}; give the address")):
        runtime.runtime_origin(url)
