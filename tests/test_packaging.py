"""What is installed: every package and data file, and (slow) that a pip user in an empty folder has what a clone
has.
"""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def setup_cfg(repository):
    config = configparser.ConfigParser()
    config.read(repository / "setup.cfg")
    return config


def _requirements(text: str) -> list[str]:
    return [
        re.split(r"[<>=~!\[; ]", line.strip())[0].lower().replace("_", "-")
        for line in text.splitlines()
        if line.strip()
    ]


def test_every_package_is_listed(setup_cfg, repository):
    source = repository / "src"
    folders = {path.parent.relative_to(source) for path in source.rglob("*.py")} - {Path("edgedit_hf/optimum_register")}
    expected = {".".join(folder.parts) for folder in folders}
    expected |= {"edgedit_hf.hub_cards", "edgedit_hf.training", "optimum.commands.register"}
    assert set(setup_cfg["options"]["packages"].split()) == expected


def test_every_requirement_is_in_the_tested_set(setup_cfg, repository):
    pinned = set(_requirements((repository / "constraints.txt").read_text().split("\n", 1)[1]))
    wanted = _requirements(setup_cfg["options"]["install_requires"])
    for extra in setup_cfg["options.extras_require"].values():
        wanted += [name for name in _requirements(extra) if name != "edgedit-hf"]  # an extra may include another
    assert set(wanted) <= pinned, f"add {set(wanted) - pinned} to constraints.txt"
    lines = (repository / "constraints.txt").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-]+==[0-9A-Za-z.]+", line) for line in lines)


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory):
    """A wheel built from a copy of the sources (a build inside the checkout could pick up files of an older one)."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "training", "hub_cards"):
        shutil.copytree(repository / name, sources / name, ignore=ignore)
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md"):
        shutil.copy(repository / name, sources / name)
    build = [
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        sources,
    ]
    subprocess.run([sys.executable, *map(str, build)], check=True, capture_output=True, text=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_code_recipes_and_templates(wheel, repository):
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    (top_level,) = [name for name in names if name.endswith("dist-info/top_level.txt")]
    assert archive.read(top_level).decode().split() == ["edgedit_hf"]
    mapped = {
        "src/edgedit_hf/optimum_register": "optimum/commands/register",
        "src": "",
        "training": "edgedit_hf/training",
    }
    mapped["hub_cards"] = "edgedit_hf/hub_cards"
    for folder, target in mapped.items():
        for path in (repository / folder).rglob("*"):
            inside = folder == "src" and "optimum_register" in path.parts
            if path.suffix not in (".py", ".yaml", ".jinja", ".typed", ".js", ".css", ".sh", ".swift", ".md") or inside:
                continue
            name = (Path(target) / path.relative_to(repository / folder)).as_posix()
            assert name in names, f"{path} is not in the wheel as {name}"
    assert not [name for name in names if name.startswith(("tests/", "training/", "hub_cards/"))]
    assert not [name for name in names if "optimum_register" in name]
    assert "optimum/__init__.py" not in names and "optimum/commands/register/__init__.py" not in names


def test_the_description_of_a_package_index_has_no_link_into_the_repository(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith("dist-info/METADATA")]
    text = archive.read(metadata).decode()
    assert "Description-Content-Type: text/markdown" in text and "# edgedit_hf" in text and "make demo" in text
    links = re.findall(r"\]\((.*?)\)", text)
    assert links and all(link.startswith("https://") for link in links)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh environment with the wheel installed and the tested dependencies; returns its bin folder and an empty
    folder.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=False)
    here = Path(sysconfig.get_path("purelib"))
    there = folder / "venv" / here.relative_to(sys.prefix)
    # The dependencies are linked rather than installed again, into the same folder, as pip would put them: optimum-cli
    # finds our command only beside optimum's own files.
    for entry in here.iterdir():
        if entry.name == "optimum":
            shutil.copytree(entry, there / entry.name)
        elif "edgedit" not in entry.name and not (there / entry.name).exists():
            (there / entry.name).symlink_to(entry)
    python = folder / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(list(map(str, install)), check=True, capture_output=True, text=True)
    empty = folder / "empty"
    empty.mkdir()
    return python.parent, empty


@pytest.mark.slow
def test_a_pip_user_has_what_a_clone_has(installed, repository):
    binaries, empty = installed
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*command) -> str:
        done = subprocess.run(list(map(str, command)), cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def python(*arguments) -> str:
        return run(binaries / "python", *arguments)

    def edgedit(*arguments) -> str:
        return run(binaries / "edgedit", *arguments)

    where = Path(python("-c", "import edgedit_hf; print(edgedit_hf.__file__)").strip())
    assert where.is_relative_to(binaries.parent) and not where.is_relative_to(repository)
    assert json.loads(edgedit("info", "DiT-debug/2", "--json"))["layers"] == 4

    edgedit("recipes", "copy", "training")
    for path in (repository / "training").rglob("*.yaml"):
        assert (empty / "training" / path.relative_to(repository / "training")).read_text() == path.read_text()
    (empty / "run.yaml").write_text(edgedit("init", "--data", "digits"))
    launch = ["-m", "accelerate.commands.launch", "--config_file", "training/accelerate/cpu.yaml"]
    planned = python(*launch, "training/compress.py", "--config", "run.yaml", "--dry-run")
    assert "teacher" in planned and "export" in planned and not (empty / "runs").exists()

    templates = python(
        "-c", "import importlib.resources as r; print([p.name for p in r.files('edgedit_hf.hub_cards').iterdir()])"
    )
    for path in (repository / "hub_cards").glob("*.jinja"):
        assert path.name in templates
    assert "--format" in python("-m", "optimum.commands.optimum_cli", "export", "edgedit", "--help")

    program = (
        "import edgedit_hf; from diffusers import DDIMScheduler, DiffusionPipeline; "
        "model = edgedit_hf.EdgeDiTTransformer2DModel.from_preset('DiT-debug/2'); "
        "edgedit_hf.EdgeDiTPipeline(model, DDIMScheduler()).save_pretrained('model'); "
        "DiffusionPipeline.from_pretrained('model')(3, num_inference_steps=2).images[0].save('three.png')"
    )
    python("-c", program)
    assert (empty / "three.png").is_file()
