"""Every example runs with its default arguments, in the order in which a learner would run them; each asserts what it
shows.
"""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def example(monkeypatch, capsys):
    """`example("lora", folder)`: run it there, in this process, which spares the imports; what it printed."""

    def run(name: str, folder: Path, *arguments: str) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all of them run."""
    return tmp_path_factory.mktemp("examples")


@pytest.mark.slow
def test_your_own_data(example, folder):
    assert "of the teacher's weights" in example("own_data", folder)
    assert (folder / "runs" / "example" / "report.html").is_file()
    given = ("--images", "runs/example/images", "--output", "runs/given")  # a folder that is not there yet
    assert "of the teacher's weights" in example("own_data", folder, *given)


@pytest.mark.slow
def test_your_own_teacher(example, folder):
    assert "20 proxies" in example("own_teacher", folder)


@pytest.mark.slow
def test_lora_on_a_compressed_network(example, folder):
    assert "parameters" in example("lora", folder)
    with pytest.raises(AssertionError):  # not trained, it has learned nothing
        example("lora", folder, "--steps", "0")


@pytest.mark.slow
def test_few_steps(example, folder):
    assert "distilled" in example("few_steps", folder)


@pytest.mark.slow
def test_numpy_and_the_runtime_alone(folder):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "numpy_and_runtime.py"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0 and "image.npy: (8, 8, " in done.stdout, done.stderr


@pytest.mark.slow
def test_somebody_elses_pipeline(example, folder):
    assert "Fréchet distance" in example("evaluate_other", folder)


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_an_example_is_short_says_how_it_is_called_and_is_on_a_page(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert f"\n    python examples/{path.name}" in text
    assert f'"{path.stem}"' in Path(__file__).read_text(encoding="utf-8").replace(".py", "")
    assert f"`{path.name}`" in (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
