"""A device of known times, for the tests that compare them."""

import pytest

from edgedit_hf.runtimes.timing import Timing
from edgedit_hf.search.latency_plan import TablePlan
from edgedit_hf.search_space import SearchSpace


@pytest.fixture(scope="module")
def config(make_transformer):
    return dict(make_transformer().config)


@pytest.fixture(scope="module")
def space(config):
    return SearchSpace.for_config(config, reduced_attention_dim=8)


@pytest.fixture(scope="module")
def device(config, space):
    """A device of known times, its table made as any other."""

    def make(name: str, layer, trunk: float = 5.0, batch: int = 2):
        plan = TablePlan(config, space)
        costs = dict(zip(plan.shapes, layer, strict=True))
        times = {
            key: Timing.from_samples((trunk + sum(costs[shape] for shape in network),) * 3)
            for key, network in plan.networks.items()
        }
        said = {"runtime": "web", "precision": "fp32", "batch": batch, "threads": 1}
        protocol = {"imported": True, "bundle": "a", "backend": "wasm", "cold_loads": 3, "warmups": 3, "drift": 0.0}
        environment = {"cpu": name, "versions": {"web": "1"}}
        return plan.table(times, **said, environment=environment, protocol=protocol)

    return make
