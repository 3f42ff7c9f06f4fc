"""Fixtures of several test files here: a small teacher, its search space, and its latency table."""

import pytest
from unsearched import write_unsearched

from edgedit_hf.search.latency_measurement import TableMeasurement
from edgedit_hf.search_space import SearchSpace


@pytest.fixture(scope="package")
def teacher_config(make_transformer):
    return dict(make_transformer().config)


@pytest.fixture(scope="package")
def teacher_space(teacher_config):
    return SearchSpace.for_config(teacher_config)


@pytest.fixture(scope="package")
def measure_table():
    def measure(config, space, rounds=40, folder=None, **options):
        measurement = TableMeasurement(config, space, **options)
        measurement.lower(folder)
        for _ in range(rounds):
            measurement.round()
        return measurement.table()

    return measure


@pytest.fixture(scope="package")
def kept_networks(tmp_path_factory):
    """Where the networks of `table` are kept."""
    return tmp_path_factory.mktemp("networks")


@pytest.fixture(scope="package")
def table(teacher_config, teacher_space, measure_table, kept_networks):
    return measure_table(teacher_config, teacher_space, batch=64, threads=1, rounds=5, folder=kept_networks)


@pytest.fixture
def unsearched(make_transformer, tmp_path):
    """See [`unsearched.write_unsearched`]."""
    return tmp_path, write_unsearched(tmp_path, make_transformer())
