"""The folders of `evaluate` modules as Spaces, and the page that serves them."""

import configparser
import importlib.util
import json
import math
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version

FOLDERS = sorted(Path(importlib.util.find_spec("edgedit_hf.metrics").origin).parent.glob("evaluate_*"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_is_ready_to_be_a_space(folder, repository, monkeypatch, tmp_path):
    """gradio, whose Pillow is older than ours, is on no machine of these tests: its names are stood in for, and what
    the page calls is called.
    """
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {
        *("README.md", "app.py", "requirements.txt", f"{folder.name}.py")
    }
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(head)
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and card["tags"] == ["evaluate", "metric"]
    assert f'evaluate.load("{folder.name}")' in text
    assert (folder / "requirements.txt").read_text().split() == ["edgedit_hf", "evaluate"]
    # The launcher that comes with evaluate wants gradio 3, which wants NumPy 1.
    assert int(card["sdk_version"].split(".")[0]) >= 6
    setup = configparser.ConfigParser()
    setup.read(repository / "setup.cfg")
    assert Version(card["python_version"]) in SpecifierSet(setup["options"]["python_requires"])

    shown = []

    class Interface:
        def __init__(self, compute, inputs, output, *, title, description, api_name):
            assert title == folder.name.removeprefix("evaluate_") and description
            self.made = inputs, compute

        def launch(self):
            shown.append(self.made)

    class Error(Exception):
        pass

    names = {"Interface": Interface, "Error": Error, "JSON": object, "Textbox": lambda label: label}
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(**names))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    shutil.copytree(folder, tmp_path / "app")  # a Space's folder has a name of its own
    runpy.run_path(str(tmp_path / "app" / "app.py"))
    ((inputs, compute),) = shown
    features = np.random.default_rng(0).normal(size=(2, 40, 6))
    found = compute(*(json.dumps(part.tolist()) for part in features[: len(inputs)]))
    assert len(FOLDERS) == 4 and found and all(math.isfinite(value) for value in found.values())
    with pytest.raises(Error, match="delimiter"):
        compute("[[0, 1]", "[[1, 1]]")
