"""Fixtures of several test files here: a real bundle of a small teacher."""

import shutil

import pytest
from unsearched import write_unsearched

from edgedit_hf.phone.bundle import Subject, make_bundle
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


@pytest.fixture
def bundle_copy(bundle, tmp_path):
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def unsearched(make_transformer, tmp_path):
    """See [`unsearched.write_unsearched`]."""
    return tmp_path / "run", write_unsearched(tmp_path / "run", make_transformer())
