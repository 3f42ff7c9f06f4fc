"""The estimate of a supernet's training knows what autograd keeps, what a step holds for a weight, and how its work
scales.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from edgedit_hf.elastic.cost import activation_bytes, elastic_estimate, print_elastic_estimate
from edgedit_hf.models.transformer_elastic_dit import ElasticDiTTransformer2DModel
from edgedit_hf.run.config import RunConfig, load_config
from edgedit_hf.run.cost import Machine, gpus

COUNTING = Machine("counting", 1, 1e9, 1e9, 1e9, 1e30)  # one FLOP a nanosecond, updates for nothing: times are FLOPs


@pytest.fixture
def configured(repository, tmp_path):
    def make(*overrides: str) -> RunConfig:
        given = [f"output_dir={tmp_path / 'run'}", "threads=1", *overrides]
        return load_config(repository / "training" / "recipes" / "debug-t2i.yaml", given)

    return make


def test_counting_without_memory_is_counting():
    real = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug")
    with FakeTensorMode():
        fake = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug")
        counted, smaller = activation_bytes(fake, (1, 8, 8), 5), activation_bytes(fake, (1, 4, 4), 5)
        fake.enable_gradient_checkpointing()
        recomputed = activation_bytes(fake, (1, 8, 8), 5)
    assert counted == activation_bytes(real, (1, 8, 8), 5) and smaller < counted / 2 and recomputed < counted / 3


def test_times_scale_with_the_work(configured):
    def seconds(*overrides: str, processes: int = 1) -> float:
        machine = Machine("counting", processes, 1e9, 1e9, 1e9, 1e30)
        return elastic_estimate(configured(*overrides), machine)[0].seconds

    one = seconds()
    assert seconds("elastic.steps=24", "elastic.batch_size=16") == pytest.approx(4 * one)
    assert seconds("elastic.gradient_checkpointing=true") == pytest.approx(4 / 3 * one)
    assert seconds(processes=2) == pytest.approx(one / 2)
    assert (
        seconds("elastic.subnets=[]") < one < seconds("elastic.sampling=sandwich") < 3 * seconds("elastic.subnets=[]")
    )


@pytest.mark.slow
def test_memory_of_the_weights(configured):
    """At 1.6 B, 24 bytes a weight of the supernet, and little else with checkpointing and a small batch."""
    large = (
        "elastic.model=elastic-dit-1.6b",
        "elastic.batch_size=1",
        "elastic.gradient_checkpointing=true",
        "text.hidden_size=16",
    )
    row, _, _ = elastic_estimate(configured(*large, "data.resolution=16"), COUNTING)
    weights = row.disk / 4
    assert 1.6e9 < weights < 1.8e9 and 24 * weights < row.memory < 25 * weights
    sandwich, _, _ = elastic_estimate(configured(*large, "data.resolution=16", "elastic.sampling=sandwich"), COUNTING)
    assert sandwich.memory - row.memory == pytest.approx(4 * weights)
    on_gpus, _, _ = elastic_estimate(configured(*large, "data.resolution=16"), gpus(8, COUNTING))
    assert on_gpus.device == "gpu" and on_gpus.processes == 8


def test_what_a_user_sees(configured, capsys):
    threads = torch.get_num_threads()
    print_elastic_estimate(configured("data.source=someone/captions", "data.resolution=8", "data.channels=1"))
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert (
        "elastic" in printed
        and "8 × A100" in printed
        and "taken to hold" in printed
        and "fsdp.yaml an eighth" in printed
    )
