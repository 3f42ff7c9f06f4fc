"""The benchmark of elasticity runs at a small size and states what each of its networks had of it."""

import pytest


def promised(table: list[str], result: dict, steps: int) -> None:
    assert list(result["loss_ratio"]) == list(result["forward_ratio"]) == ["tiny", "small", "full"]
    drawn = result["steps_in_supernet"]
    assert result["steps"] == drawn["full"] == steps and drawn["tiny"] + drawn["small"] == steps
    assert all(0.8 < ratio < 1.25 for ratio in result["loss_ratio"].values())  # few steps do not take networks apart
    parameters = result["parameters"]
    assert result["switch_ms"] < 1 and parameters["tiny"] < parameters["small"] < parameters["full"]
    assert f"ratio {result['time_ratio']:.3f}" in table[-1]


@pytest.mark.slow
def test_two_steps(benchmark, repository):
    recipe = ("--config", repository / "training" / "recipes" / "debug-t2i.yaml", "--override", "text.steps=1")
    small = ("--steps", 2, "--batch-size", 2, "--validation-samples", 4, "--forward-batch", 2, "--repeats", 2)
    promised(*benchmark("elastic.py", *recipe, "--model", "elastic-dit-debug", *small), 2)


@pytest.mark.slow
def test_it_trains_four_networks_and_states_both_counts(benchmark, repository):
    recipe = ("--config", repository / "training" / "recipes" / "debug-t2i.yaml", "--model", "elastic-dit-debug")
    small = ("--steps", 3, "--batch-size", 4, "--validation-samples", 8, "--repeats", 2)
    promised(*benchmark("elastic.py", *recipe, *small), 3)
