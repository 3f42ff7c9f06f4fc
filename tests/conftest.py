"""What every test shares: an environment without network, a cache of its own, tiny real models, child processes, a Hub
cache.
"""

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hub_server import Hub
from recipe_runs import DEBUG_COMMANDS, Recipes
from small_disks import small_disk as small_disk
from stderr import beside_progress

# Before anything imports huggingface_hub, and inherited by every child process.
_HOME = tempfile.mkdtemp(prefix="edgedit-tests-")
# Of the user's own cache only onnxruntime-web is taken, which `make install` has fetched.
_CACHE = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
os.environ.setdefault(
    "HF_ASSETS_CACHE", os.path.join(os.environ.get("HF_HOME", os.path.join(_CACHE, "huggingface")), "assets")
)
os.environ["HF_HOME"] = _HOME
for _name in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN"):
    os.environ.pop(_name, None)
for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_name] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

ROOT = Path(__file__).resolve().parents[1]


PARTS = ("demos", "kills", "ranks", "export", "browser", "sweep")
"""Of `make test-slow`, as markers; what has none of them is the rest."""
SHARED = {"debug_run", "debug_t2i_run"}


def pytest_sessionfinish(session, exitstatus):
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Every slow test is in exactly one part; and no worker waits while another makes the shared runs."""
    for item in items:
        parts = sorted({mark.name for mark in item.iter_markers()}.intersection(PARTS))
        if len(parts) > 1:
            raise pytest.UsageError(f"{item.nodeid} is in {len(parts)} parts of the slow tests: {', '.join(parts)}.")
        if not parts and item.get_closest_marker("slow"):
            item.add_marker("rest")
    if hasattr(config, "workerinput"):  # of xdist, which gives files away in the order of the items
        files: dict[Path, list] = {}
        for item in items:
            files.setdefault(item.path, []).append(item)
        many = sorted(files.values(), key=len, reverse=True)
        first, *sharing = [tests for tests in many if any(SHARED & set(test.fixturenames) for test in tests)] or [[]]
        others = [tests for tests in many if tests is not first and tests not in sharing]
        items[:] = [test for tests in (first, *others, *sharing) for test in tests]


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def web_runtime() -> Path:
    """The folder of onnxruntime-web; where it cannot be had, its tests are skipped with the reason."""
    from edgedit_hf.errors import EdgeDiTError
    from edgedit_hf.export.web.runtime import runtime_folder

    try:
        return runtime_folder()
    except EdgeDiTError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def recipes() -> Recipes:
    """Starts recipes of this checkout as processes, at debug scale."""
    return Recipes()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """`made_once("name", make)`: a folder that `make(folder)` fills once a session, in whichever worker needs it first.

    It is everybody's: read it, or change a copy.
    """
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def folder_of(name: str, make) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def debug_run(recipes, made_once) -> Path:
    """The finished run of debug.yaml that the session shares (about 40 s): read it, or change a copy."""
    return _debug_run("debug", recipes, made_once)


@pytest.fixture(scope="session")
def debug_t2i_run(recipes, made_once) -> Path:
    """The finished run of debug-t2i.yaml that the session shares (about 25 s): read it, or change a copy."""
    return _debug_run("debug-t2i", recipes, made_once)


def _debug_run(name: str, recipes, made_once) -> Path:
    def make(folder: Path) -> None:
        (folder / "training").symlink_to(ROOT / "training")
        recipes.shell(shlex.split(DEBUG_COMMANDS[name]), folder, stderr=folder / "stderr.txt")

    return made_once(f"clone-{name}", make) / "runs" / name


@pytest.fixture(scope="session")
def make_transformer():
    """`make_transformer(seed=0, **config)`: a tiny transformer whose every weight is random (a fresh DiT predicts
    zero).
    """
    import torch

    from edgedit_hf import EdgeDiTTransformer2DModel

    def make(seed: int = 0, **config):
        model = EdgeDiTTransformer2DModel.from_preset("DiT-debug/2", **config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


@pytest.fixture(scope="session")
def run_python():
    """`run_python(code, *args, env={})`: run a program in a fresh interpreter outside the checkout; returns its
    stdout. `quiet`: nothing but progress may be on its stderr.
    """

    def run(code: str, *args, env: dict | None = None, expect: int = 0, quiet: bool = False) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, args)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            cwd=_HOME,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert not quiet or beside_progress(done.stderr) == []
        return done.stdout

    return run


@pytest.fixture
def make_hub_cache(tmp_path):
    """`make_hub_cache(folder, "org/name", listing=True)`: the folder as a Hub repository in a cache, as a download
    leaves it.

    `listing` also stores the repository's file list, from which diffusers decides offline which files it needs. Returns
    the path for `HF_HUB_CACHE` (or `cache_dir`).
    """

    def make(folder: Path, repo_id: str, listing: bool = True) -> Path:
        cache = tmp_path / "hub"
        repository = cache / f"models--{repo_id.replace('/', '--')}"
        commit = hashlib.sha1(repo_id.encode()).hexdigest()
        files = {}
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            content = path.read_bytes()
            blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            blob, link = repository / "blobs" / blob_id, repository / "snapshots" / commit / name
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            link.symlink_to(os.path.relpath(blob, link.parent))
            files[name] = {"size": len(content), "blob_id": blob_id}
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        if listing:
            (repository / "trees").mkdir()
            (repository / "trees" / f"{commit}.json").write_text(json.dumps({"format_version": 1, "files": files}))
        return cache

    return make


@pytest.fixture
def hub(tmp_path):
    """A Hub on the loopback interface that can be pushed to (`hub_server.Hub`), empty."""
    with Hub(tmp_path / "hub-state") as server:
        yield server


@pytest.fixture
def make_hub_server(hub, tmp_path):
    """`make_hub_server({"org/name": folder, …})`: repositories on `hub`, to download from as from the real one.

    Returns the environment of a child process that uses it, with an empty cache.
    """

    def make(repositories: dict[str, Path]) -> dict[str, str]:
        for name, folder in repositories.items():
            hub.add(name, folder)
        return hub.env(tmp_path / "downloaded")

    return make


@pytest.fixture
def run_with_hub(hub, run_python, tmp_path):
    """`run_with_hub(code, *args, home="home", token=…, offline=False)`: `run_python` with a client of `hub`, whose
    cache is `tmp_path / home`.
    """

    def run(code: str, *args, home="home", env: dict | None = None, expect: int = 0, quiet: bool = False, **who) -> str:
        env = {**hub.env(tmp_path / home, **who), **(env or {})}
        return run_python(code, *args, env=env, expect=expect, quiet=quiet)

    return run
