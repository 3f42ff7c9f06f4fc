"""Fixtures of several test files here: a small teacher, its search space, and its latency table."""

import numpy as np
import pytest
import torch

from edgedit_hf import EdgeDiTPipeline, ProxyBank
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.runtimes.timing import environment
from edgedit_hf.search.latency_measurement import TableMeasurement
from edgedit_hf.search.latency_table import LatencyTable, trunk_of
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
    """A run with a teacher, a bank of untrained proxies with random losses, and a latency table, but no search; and its
    bank.
    """
    teacher = make_transformer()
    EdgeDiTPipeline(teacher, make_scheduler("epsilon")).save_pretrained(tmp_path / "teacher")
    space = SearchSpace.for_config(teacher.config)
    bank, draw = ProxyBank.create(tmp_path / "bank", teacher, space), np.random.default_rng(0)
    torch.manual_seed(0)
    entries = {}
    for layer in space.proxies():
        loss = float(draw.lognormal(-5, 2))
        record = {"loss_before": 1.0, "loss_after": loss, "steps": 0, "seed": 0, "init": "random"}
        entries[bank.key(layer)] = bank.write_proxy(layer, bank.new_block(layer), record)
    bank.write_index(entries)
    times = {"original": 3.0, "mlp": 2.0, "attention": 2.25, "both": 1.5}
    blocks = [
        {"option": name, **dict(zip(("attention_dim", "num_heads", "mlp_ratio"), space.option_shape(name))), "ms": ms}
        for name, ms in times.items()
    ]
    LatencyTable(
        {
            **{"format": 1, "runtime": "onnxruntime", "precision": "int8", "batch": 4, "threads": 1},
            **{"space": space.to_dict(), "trunk": trunk_of(teacher.config), "trunk_ms": 0.5, "blocks": blocks},
            "environment": environment(1),
        }
    ).to_json(tmp_path / "latency" / "table.json")
    return tmp_path, bank
