"""The models of the objectives: what is known exactly, what the score adds, and values against plain sums."""

import numpy as np
import pytest
import torch
from botorch.models.deterministic import GenericDeterministicModel

from edgedit_hf.search.encoding import Encoding
from edgedit_hf.search.programme import Block, Programme
from edgedit_hf.search.surrogate import PointwiseGP, Surrogate
from edgedit_hf.search_space import SearchSpace

SPACE = SearchSpace(6, 32, 2)
RNG = np.random.default_rng(0)
BLOCKS = [
    Block(layer, float(RNG.uniform()), {"latency_ms": float(RNG.uniform(1, 2))}) for layer in SPACE.replacements()
]
PROGRAMME = Programme(BLOCKS, 6, 32, {"latency_ms": 0.5})
CODES = [tuple(code) for code in np.random.default_rng(1).permutation(list(SPACE.codes()))[:80].tolist()]


def objectives(codes, measured: float = 0.0) -> list[tuple[float, float]]:
    of = {block.layer: block for block in BLOCKS}
    points = []
    for place, code in enumerate(codes):
        blocks = [of[layer] for layer in SPACE.from_code(code).layers]
        latency = 0.5 + sum(block.costs["latency_ms"] for block in blocks) + measured * (place % 3)
        points.append((float(np.exp(0.3 * sum(block.score for block in blocks))), latency))
    return points


def surrogate(count: int, measured: float = 0.0, noise: float | None = None, **options) -> Surrogate:
    points = objectives(CODES[:count], measured)
    return Surrogate(Encoding(SPACE, PROGRAMME), CODES[:count], points, [noise] * count, (9.0, 12.0), **options)


def test_a_latency_that_adds_up_is_known_and_another_is_modelled():
    exact, modelled = surrogate(20), surrogate(20, measured=0.3)
    assert isinstance(exact.model.models[1], GenericDeterministicModel)
    assert isinstance(modelled.model.models[1], PointwiseGP)
    rows = exact.inputs(Encoding(SPACE, PROGRAMME).rows(CODES[20:]))
    told = torch.tensor([point[1] for point in objectives(CODES)], dtype=torch.float64)
    expected = -(told[20:] - told[:20].mean()) / told[:20].std(correction=0)
    assert torch.allclose(exact.model.models[1].posterior(rows).mean[:, 0], expected)


def test_the_score_foretells_what_the_features_do_not_yet():
    held_out = -torch.tensor([point[0] for point in objectives(CODES[20:])], dtype=torch.float64).log()
    errors = []
    for prior_mean in (True, False):
        fitted = surrogate(20, prior_mean=prior_mean)
        rows = fitted.inputs(fitted.encoding.rows(CODES[20:]))
        foretold = fitted.model.models[0].posterior(rows).mean[:, 0] * fitted.std[0] + fitted.mean[0]
        errors.append((foretold - held_out).square().mean().sqrt().item() / held_out.std().item())
    assert errors[0] < 0.05 and errors[0] < errors[1] + 0.02


def test_values_one_by_one_are_those_of_all_at_once():
    fitted = surrogate(30)
    gp = fitted.model.models[0]
    rows = fitted.inputs(fitted.encoding.rows(CODES[30:]))
    many = gp.posterior(rows[:, None])
    single = super(PointwiseGP, gp).posterior(rows[:, None])
    assert torch.allclose(many.mean, single.mean, atol=1e-6)
    assert torch.allclose(many.variance, single.variance, atol=1e-6)


@pytest.mark.filterwarnings("ignore::botorch.exceptions.warnings.NumericsWarning")
@pytest.mark.parametrize("kind", ["qlogehvi", "qlognehvi", "ehvi"])
def test_a_believed_outcome_lowers_the_value_of_its_genotype(kind):
    fitted = surrogate(30, noise=0.01)
    rows = fitted.encoding.rows(CODES[30:])
    with torch.no_grad():
        values = fitted.acquisition(kind, None, 0)(fitted.inputs(rows)[:, None])
        best = int(values.argmax())
        after = fitted.acquisition(kind, rows[best : best + 1], 0)(fitted.inputs(rows)[best : best + 1, None])
    assert values.isfinite().all() and after.item() < values[best].item()


def test_noise_that_is_given_is_the_likelihoods():
    fitted = surrogate(20, noise=0.5)
    points = objectives(CODES[:20])
    expected = [(0.5 / distance / fitted.std[0].item()) ** 2 for distance, _ in points]
    assert fitted.model.models[0].likelihood.noise.tolist() == pytest.approx(expected)
