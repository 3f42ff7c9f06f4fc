"""onnxruntime-web, which runs an export in a browser: the files of one pinned release, fetched with npm, checked, and
kept in the Hub's cache of assets.

`python -m edgedit_hf.export.web.runtime` fetches them ahead, as `make install` does. No torch.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from ...errors import EdgeDiTError
from ...files import atomic_folder, file_sha256

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# What a page needs of it: the build for the CPU, and that for WebGPU and WebNN, which is twice as large and loaded only
# where a browser has one of them. The package's own description says its licence (MIT).
FILES = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    "ort.webgpu.min.mjs": "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0",
    "ort-wasm-simd-threaded.asyncify.mjs": "3d1c85995364bb643302fc6fd877a0c3ba5ae72401815e0f24828a53d9191e28",
    "ort-wasm-simd-threaded.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
    "package.json": "16f69f755509990539aeb1c8445884960e91adcacab2e8dca8e44ee43601df5c",
}
PACKAGE_BYTES = 41_300_000  # of the files
SECONDS = 600  # for 33 MB of archive


def runtime_folder() -> Path:
    """The folder with [`FILES`], every one checked: from the cache, or fetched with npm now.

    Raises:
        EdgeDiTError: it is not in the cache, and npm is missing, fails, or brings something else than the pinned
            release.
    """
    folder = _cached()
    if not _whole(folder):
        npm = _npm()
        with tempfile.TemporaryDirectory() as aside, atomic_folder(folder) as target:
            _unpack(_download(npm, Path(aside)), target)
    return folder


def check_available(url: str | None = None) -> None:
    """Raise an [`EdgeDiTError`] with the remedy where a page could not be given its runtime: a light check, which
    fetches nothing.

    Args:
        url: of `--runtime-url`.
    """
    if url is not None:
        runtime_origin(url)
    elif not all((_cached() / name).is_file() for name in FILES):
        _npm()


def runtime_origin(url: str) -> str:
    """The origin of `--runtime-url`, as a policy for content names it: `""` for a path on the page's own.

    Args:
        url: of the folder that holds [`FILES`]: `https://…`, `http://…` or a path relative to the page.

    Raises:
        EdgeDiTError: it is something else.
    """
    plain = bool(re.fullmatch(r"[\w.~:/@%+-]+", url, re.ASCII))
    parts = urlsplit(url if plain else "")
    absolute = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
    relative = not parts.scheme and not parts.netloc
    if not plain or not (absolute or relative):
        raise EdgeDiTError(
            f"--runtime-url is {url!r}; give the address of a folder with the files of {PACKAGE} {VERSION}, such as "
            f"https://cdn.jsdelivr.net/npm/{PACKAGE}@{VERSION}/dist/, or a path relative to the page."
        )
    return f"{parts.scheme}://{parts.netloc}" if absolute else ""


def _cached() -> Path:
    from huggingface_hub import cached_assets_path

    return Path(cached_assets_path("edgedit_hf", namespace=PACKAGE, subfolder=VERSION)) / "files"


def _whole(folder: Path) -> bool:
    """Whether every file is there and the pinned one."""
    return all((folder / name).is_file() and file_sha256(folder / name) == sha256 for name, sha256 in FILES.items())


def _npm() -> str:
    npm = shutil.which("npm")
    if npm is None:
        raise EdgeDiTError(
            f"A page runs networks with {PACKAGE} {VERSION}, but it is not in the cache, and there is no npm here to "
            "fetch it. Install Node.js with npm; for an export, --runtime-url can name the address of a copy (such as "
            f"https://cdn.jsdelivr.net/npm/{PACKAGE}@{VERSION}/dist/)."
        )
    return npm


def _download(npm: str, folder: Path) -> Path:
    """The package's archive, checked."""
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--pack-destination", str(folder), "--ignore-scripts", "--silent"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
        said = (done.stderr or done.stdout).strip().splitlines() if done.returncode else []
    except (OSError, subprocess.TimeoutExpired) as error:
        said = [str(error)]
    archives = sorted(folder.glob("*.tgz"))
    if len(archives) != 1:
        raise EdgeDiTError(
            f"npm could not fetch {PACKAGE}@{VERSION} ({said[-1] if said else 'it wrote no archive'}). Try again "
            "with a network; for an export, --runtime-url can name the address of a copy."
        )
    found = "sha512-" + base64.b64encode(hashlib.sha512(archives[0].read_bytes()).digest()).decode()
    if found != INTEGRITY:
        raise EdgeDiTError(
            f"npm brought a {PACKAGE}@{VERSION} with the integrity {found}, but this package was made for {INTEGRITY}; "
            "nothing of it was kept. Look at what your registry serves."
        )
    return archives[0]


def _unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as file:
        for name in FILES:
            member = file.extractfile(f"package/{name}" if name == "package.json" else f"package/dist/{name}")
            assert member is not None, f"{archive} is the pinned archive, which holds {name}"
            (folder / name).write_bytes(member.read())


def main() -> int:
    """Fetch the files into the cache; says in one line why not."""
    try:
        print(f"{PACKAGE} {VERSION} is in {runtime_folder()}")
    except EdgeDiTError as error:
        print(f"edgedit_hf: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
