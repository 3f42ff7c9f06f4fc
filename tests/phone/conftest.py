"""Fixtures of several test files here: a real bundle of a small teacher."""

import json
import shutil

import pytest
from unsearched import write_unsearched

from edgedit_hf.phone.bundle import BUNDLE, Bundle, Subject, make_bundle
from edgedit_hf.search_space import SearchSpace


@pytest.fixture(scope="package")
def subject(make_transformer):
    config = dict(make_transformer().config)
    space = SearchSpace.for_config(config)
    return Subject(config, space, space.from_code((17,) + (5,) * (space.num_pairs - 1)))


@pytest.fixture(scope="package")
def bundle(subject, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    return make_bundle(folder, subject, runtime="onnxruntime", precision="fp32", batch=2)


@pytest.fixture(scope="package")
def web_bundle(subject, tmp_path_factory):
    folder = tmp_path_factory.mktemp("web-bundle")
    return make_bundle(folder, subject, runtime="web", precision="fp32", batch=2)


@pytest.fixture
def small_bundle(web_bundle, tmp_path):
    """A copy of it with three networks, which are measured fast."""
    folder = shutil.copytree(web_bundle.folder, tmp_path / "small")
    networks = [entry for entry in web_bundle.data["networks"] if entry["name"] in ("fitted-00", "student", "teacher")]
    small = Bundle(folder, {**web_bundle.data, "networks": networks})
    (folder / BUNDLE).write_text(json.dumps({**small.data, "hash": small.hash}))
    return Bundle.read(folder)


@pytest.fixture
def bundle_copy(bundle, tmp_path):
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def unsearched(make_transformer, tmp_path):
    """See [`unsearched.write_unsearched`]."""
    return tmp_path / "run", write_unsearched(tmp_path / "run", make_transformer())
