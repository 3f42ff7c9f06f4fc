"""The allocation of bits against brute force, and the error of a network with one other weight."""

import itertools

import numpy as np
import pytest
import torch

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.quantization.allocation import Candidate, allocate, candidate_specs, replaced_weight_error
from edgedit_hf.quantization.calibration import record, replay


def problem(seed: int, layers: int, options: int):
    """Random layers whose candidates are the better the more bits they take, most of the time."""
    rng = np.random.default_rng(seed)
    sizes = {f"layer{i}": int(rng.integers(50, 5000)) for i in range(layers)}
    candidates = {}
    for name, size in sizes.items():
        bits = np.sort([rng.uniform(4, 4.8), *rng.uniform(4, 8.5, options - 1)])
        errors = rng.lognormal(-8, 2) * 4.0 ** -(bits - 4) * rng.uniform(0.8, 1.2, options)
        candidates[name] = [Candidate({"bits": float(b)}, round(b * size), float(e)) for b, e in zip(bits, errors)]
    return candidates, sizes


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [5.0, 6.5])
def test_the_choice_is_the_best_of_all(seed, budget):
    candidates, sizes = problem(seed, 6, 3)
    allowed = budget * sum(sizes.values())
    choices = itertools.product(*candidates.values())
    feasible = [choice for choice in choices if sum(c.num_bits for c in choice) <= allowed]
    best = min(sum(c.error for c in choice) for choice in feasible)
    found = allocate(candidates, sizes, budget)
    assert found.error == pytest.approx(best, rel=1e-9) and found.bound == pytest.approx(best, rel=1e-6)
    assert found.average_bits <= budget and found.average_bits == sum(c.num_bits for c in found.chosen.values()) / sum(
        sizes.values()
    )


def test_hundreds_of_layers_within_the_budget_to_the_bit():
    candidates, sizes = problem(3, 400, 4)
    candidates = {
        name: [Candidate(c.spec, c.num_bits * 4001, c.error) for c in options] for name, options in candidates.items()
    }
    sizes = {name: size * 4001 for name, size in sizes.items()}
    found = allocate(candidates, sizes, 5.3)
    assert sum(c.num_bits for c in found.chosen.values()) <= 5.3 * sum(sizes.values()) and found.average_bits > 5.2999
    assert found.bound <= found.error <= found.bound * (1 + 1e-6)


def test_a_budget_for_all_takes_the_best_of_each_and_layers_may_stay():
    candidates, sizes = problem(1, 4, 2)
    candidates["layer0"].append(Candidate(None, 32 * sizes["layer0"], 0.0))
    found = allocate(candidates, sizes, 32)
    assert found.error == pytest.approx(sum(min(c.error for c in options) for options in candidates.values()))
    assert "layer0" not in found.plan and set(found.plan) == {"layer1", "layer2", "layer3"}


def test_what_cannot_be_allocated_is_refused():
    candidates, sizes = problem(0, 3, 2)
    with pytest.raises(
        EdgeDiTError, match=r"budget is 3 bits a weight, but the smallest candidates of the 3 layers have \d\.\d{3}"
    ):
        allocate(candidates, sizes, 3)
    candidates["layer1"][0] = Candidate({"bits": 4}, 10, float("nan"))
    with pytest.raises(EdgeDiTError, match=r"layer1 as \{'bits': 4\} is nan"):
        allocate(candidates, sizes, 5)


def test_the_error_of_one_other_weight_is_that_of_the_output(make_transformer):
    model = make_transformer()
    calls = record(EdgeDiTPipeline(model, make_scheduler("epsilon")), 4, steps=3, guidance_scale=2.0).calls
    references = [replay(model, call) for call in calls]
    name = "blocks.2.mlp.proj_in"
    before = model.get_submodule(name).weight.detach().clone()
    changed = before + 0.02 * torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    error = replaced_weight_error(model, name, changed, calls, references)
    assert torch.equal(model.get_submodule(name).weight, before)
    with torch.no_grad():
        model.get_submodule(name).weight.copy_(changed)
    outputs = [replay(model, call) for call in calls]
    expected = {call.timestep: float((a - b).pow(2).mean()) for call, a, b in zip(calls, outputs, references)}
    assert error.mse == pytest.approx([expected[t] for t in error.timesteps], rel=1e-5) and error.timesteps == tuple(
        sorted(expected)
    )


def test_candidates_are_forms_that_fit_their_layer():
    from edgedit_hf.quantization.weights import spec_bits

    specs = candidate_specs((384, 128))
    assert [(spec["bits"], spec["rows_per_palette"]) for spec in specs] == [(4, 0), (4, 8), (4, 32), (8, 0)]
    for shape in ((384, 128), (1152, 4608), (96, 1152), (300, 200), (7, 2000)):
        for spec in candidate_specs(shape)[:-1]:
            assert shape[0] % (spec["rows_per_palette"] or shape[0]) == 0, "Core ML wants palettes of equally many rows"
            share = spec_bits(spec, shape) / (shape[0] * shape[1])
            assert 4 < share < 4.35, (shape, spec, share)
    assert candidate_specs((32, 1, 2, 2))[-1] is None and candidate_specs((64, 64))[-1] is not None
    assert [spec["rows_per_palette"] for spec in candidate_specs((384, 128), rows_per_palette=16)] == [16, 0]
    assert candidate_specs((384, 128), "affine", group_size=32) == [
        {"scheme": "affine", "bits": bits, "group_size": 32, "symmetric": True} for bits in (4, 8)
    ]
