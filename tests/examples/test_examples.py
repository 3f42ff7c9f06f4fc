"""Every example runs with its default arguments, in the order in which a learner would run them; each asserts what it
shows.
"""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from edgedit_hf.data.images import load_images

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


def test_emoji_of_microsofts_repository(example, tmp_path):
    """Two layouts of a render (with skin tones and without), one that is left out, one without a render."""
    groups = {"Alarm clock": "Travel & Places", "Artist": "People & Body", "Flag": "Flags", "Bare": "Objects"}
    renders = {"Alarm clock": "3D/alarm_clock_3d", "Artist": "Default/3D/artist_3d_default", "Flag": "3D/flag_3d"}
    for name, group in groups.items():
        folder = tmp_path / "fluentui-emoji" / "assets" / name
        folder.mkdir(parents=True)
        (folder / "metadata.json").write_text(json.dumps({"cldr": name.lower(), "group": group}))
        if name in renders:
            (file := folder / f"{renders[name]}.png").parent.mkdir(parents=True)
            picture = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
            picture.putpixel((3, 4), (255, 0, 0, 255))
            picture.save(file)
    (tmp_path / "fluentui-emoji/assets/Artist/Dark/3D").mkdir(parents=True)
    picture.save(tmp_path / "fluentui-emoji/assets/Artist/Dark/3D/artist_3d_dark.png")
    assert "2 pictures, people-body 1, travel-places 1" in example("fluent_emoji", tmp_path)
    made = {path.relative_to(tmp_path / "fluent-emoji").as_posix() for path in tmp_path.glob("fluent-emoji/*/*")}
    assert made == {"people-body/Artist.png", "travel-places/Alarm clock.png"}
    images = load_images(str(tmp_path / "fluent-emoji"), validation_fraction=0)
    assert tuple(images.label_names) == ("people-body", "travel-places")
    pixels = images.batch([0])["images"][0]  # [3, 16, 16]: a red pixel on white
    assert pixels[:, 4, 3].tolist() == [1.0, -1.0, -1.0] and pixels[:, 0, 0].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "metadata, said",
    [
        *(("{", "names no group"), ("[]", "names no group"), ('{"group": 5}', "names no group")),
        *(('{"cldr": "x"}', "names no group"), ('{"group": "../"}', "names the group '../'")),
        *((None, "has 0 groups of emoji; clone microsoft/fluentui-emoji"), ('{"group": "One"}', "has 0 groups")),
    ],
)
def test_emoji_that_cannot_be_taken_leave_nothing(example, tmp_path, capsys, metadata, said):
    if metadata is not None:
        (tmp_path / "assets" / "One").mkdir(parents=True)
        (tmp_path / "assets" / "One" / "metadata.json").write_text(metadata)
    with pytest.raises(SystemExit, match="2"):
        example("fluent_emoji", tmp_path, "--assets", "assets", "--output", "made")
    assert said in capsys.readouterr().err and not (tmp_path / "made").exists()
    (tmp_path / "made").mkdir()
    with pytest.raises(SystemExit, match="2"):
        example("fluent_emoji", tmp_path, "--assets", "assets", "--output", "made")
    assert "made is there already" in capsys.readouterr().err


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_an_example_is_short_says_how_it_is_called_and_is_on_a_page(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert f"\n    python examples/{path.name}" in text
    assert f'"{path.stem}"' in Path(__file__).read_text(encoding="utf-8").replace(".py", "")
    assert f"`{path.name}`" in (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
