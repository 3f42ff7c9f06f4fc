"""Folders of pictures that several tests of data read."""

from pathlib import Path

import pytest
from pictures import save_captioned, save_pictures

from edgedit_hf.data.captions import load_captioned


@pytest.fixture
def class_folders(tmp_path) -> Path:
    """Three classes of five images; one class has a name that `datasets` would take for a split."""
    root = tmp_path / "animals [small]"
    for first, name in enumerate(["cat", "dog", "test"]):
        save_pictures(root / name, 5, first=10 * first)
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return save_captioned(tmp_path_factory.mktemp("captioned") / "pictures")


@pytest.fixture(scope="module")
def bucketed(pictures):
    return load_captioned(str(pictures), buckets=["32x32", "16x48", "48x16"], validation_fraction=0)


@pytest.fixture(scope="module")
def digits():
    return {split: load_captioned(split=split) for split in ("train", "validation", "held_out")}
