"""Each piece of linear algebra against a brute-force solution."""

import pytest
import torch

from edgedit_hf.distill.least_squares import (
    SELECTION_RIDGE,
    factor_query_key,
    factor_value_output,
    low_rank,
    refit_gated,
    refit_linear,
    select_groups,
    weighted_gram,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Rows whose directions have very different sizes."""
    scales = torch.logspace(0, -2, width, dtype=torch.float64)
    return random(rows, width, seed=seed) * scales @ random(width, width, seed=seed + 1)


# -------------------------------------------------------------------- attention


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_query_and_key_maps_are_the_best_of_their_rank(rank):
    width, count = 8, 60
    query, key = correlated(count, width, seed=0), correlated(count, width, seed=5)
    moments = [(t.mT @ t / count).unsqueeze(0) for t in (query, key)]
    p, r = (maps[0] for maps in factor_query_key(*moments, rank))
    assert p.shape == r.shape == (width, rank)
    scores, narrow = query @ key.mT / width**0.5, (query @ p) @ (key @ r).mT / rank**0.5
    error = (scores - narrow).square().sum()
    # Brute force: every query meets every key, so the best stand-in of this rank is the truncated SVD of the score
    # matrix itself.
    values = torch.linalg.svdvals(scores)
    best = values[rank:].square().sum()
    assert best * (1 - 1e-9) <= error <= best * 1.001 + 1e-9 * values.square().sum()
    truncated = query[:, :rank] @ key[:, :rank].mT / rank**0.5
    assert error < 0.5 * (scores - truncated).square().sum()


def test_query_and_key_maps_of_full_rank_are_exact():
    query, key = random(2, 40, 6), random(2, 40, 6, seed=1)
    p, r = factor_query_key(query.mT @ query / 40, key.mT @ key / 40, 6)
    torch.testing.assert_close((query @ p) @ (key @ r).mT, query @ key.mT, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_value_and_output_maps_are_the_best_of_their_rank(rank):
    width, hidden, count = 6, 10, 60
    values, weight = correlated(count, width), random(width, hidden, seed=3)
    v, o = factor_value_output((values.mT @ values / count).unsqueeze(0), weight.unsqueeze(0), rank)
    assert v.shape == (1, width, rank) and o.shape == (1, rank, hidden)
    error = (values @ weight - values @ v[0] @ o[0]).square().sum()
    singular = torch.linalg.svdvals(values @ weight).square()
    assert error <= singular[rank:].sum() * 1.001 + 1e-9 * singular.sum()


# -------------------------------------------------------------------- MLP


def test_neurons_that_others_can_stand_in_for_are_dropped():
    hidden = random(200, 12)
    hidden[:, 3] = 0  # dead
    hidden[:, 5] = 2 * hidden[:, 1]  # a duplicate at another scale
    hidden[:, 9] = 0.5 * hidden[:, 2] - hidden[:, 7]  # a combination
    out = random(12, 8, seed=1)
    kept, refitted = select_groups(hidden, out, torch.ones(200), 9)
    assert kept.tolist() == sorted(kept.tolist()) and len(set(kept.tolist())) == 9
    dropped = set(range(12)) - set(kept.tolist())
    assert 3 in dropped and len(dropped & {1, 5}) == 1 and len(dropped & {2, 7, 9}) == 1
    # What is left still gives the whole output, with the weights that come along: up to the ridge, exactly.
    exact = torch.linalg.lstsq(hidden[:, kept], hidden @ out).solution
    torch.testing.assert_close(hidden[:, kept] @ exact, hidden @ out, rtol=0, atol=1e-8)
    torch.testing.assert_close(hidden[:, kept] @ refitted, hidden @ out, rtol=0, atol=0.02)


def test_neurons_without_an_output_or_in_rows_that_do_not_count_are_dropped():
    hidden, out = random(200, 8), random(8, 4, seed=1)
    out[2] = 0
    assert 2 not in select_groups(hidden, out, torch.ones(200), 7)[0]
    hidden[:100, 6] = 0
    weights = torch.cat([torch.ones(100), torch.zeros(100)])  # neuron 6 fires only where the gate is closed
    assert 6 not in select_groups(hidden, random(8, 4, seed=1), weights, 7)[0]
    kept, weight = select_groups(hidden, out, torch.ones(200), 8)
    assert kept.tolist() == list(range(8)) and torch.equal(weight, out)


def test_selection_is_better_than_chance():
    hidden, out = correlated(300, 24), random(24, 10, seed=7)

    def lost(kept) -> float:
        refitted = torch.linalg.lstsq(hidden[:, kept], hidden @ out).solution
        return (hidden[:, kept] @ refitted - hidden @ out).square().sum().item()

    chosen = lost(select_groups(hidden, out, torch.ones(300), 12)[0])
    generator = torch.Generator().manual_seed(0)
    chance = sorted(lost(torch.randperm(24, generator=generator)[:12]) for _ in range(50))
    assert chosen <= chance[2]


def test_rounds_of_selection_are_exact():
    """Updating inverse and weights round by round is the same as solving for what is left."""
    hidden, out, weights = correlated(400, 40), random(40, 10, seed=7), random(400, seed=3).abs()
    kept, weight = select_groups(hidden, out, weights, 10)
    gram = hidden.mT @ (hidden * weights[:, None])
    gram.diagonal().add_(SELECTION_RIDGE * 40 / 400 * gram.diagonal().mean())
    torch.testing.assert_close(weight, torch.linalg.solve(gram[kept][:, kept], gram[kept] @ out), rtol=1e-6, atol=1e-8)


def test_whole_heads_are_selected_together():
    width, heads = 3, 5
    hidden, out = random(300, heads * width), random(heads * width, 8, seed=1)
    hidden[:, 3:6] = hidden[:, 9:12] @ random(3, 3, seed=2)  # head 1 says what head 3 says
    hidden[:, 12] *= 10  # a head with one loud channel stays whole
    kept, weight = select_groups(hidden, out, torch.ones(300), 4, group=width)
    assert len(set(kept.tolist()) & {1, 3}) == 1 and {0, 2, 4} <= set(kept.tolist())
    channels = (kept[:, None] * width + torch.arange(width)).flatten()
    assert (hidden[:, channels] @ weight - hidden @ out).norm() < 0.02 * (hidden @ out).norm()


def test_a_gram_matrix_of_single_precision_rows_is_summed_in_double():
    rows, weights = random(9000, 16).float(), random(9000, seed=1).abs().float()
    expected = rows.double().mT @ (rows.double() * weights.double()[:, None])
    found = weighted_gram(rows, weights)
    assert found.dtype == torch.float64 and torch.equal(weighted_gram(rows), weighted_gram(rows, torch.ones(9000)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_linear_refit_stays_near_the_given_weights_only_where_the_data_is_silent():
    linear = torch.nn.Linear(6, 4, dtype=torch.float64)
    features = random(5000, 6)
    features[:, 5] = 0
    wanted = random(7, 4, seed=1)
    found = refit_linear(features, features @ wanted[:6] + wanted[6], linear)
    torch.testing.assert_close(found[[0, 1, 2, 3, 4, 6]], wanted[[0, 1, 2, 3, 4, 6]], rtol=0, atol=0.05)
    torch.testing.assert_close(found[5], linear.weight.data[:, 5])


def test_gated_refit_is_weighted_least_squares_a_column():
    rows, width, hidden = 80, 6, 5
    features, gate, target = random(rows, width), random(rows, hidden, seed=1), random(rows, hidden, seed=2)
    gate[:, 4] = 0  # a closed gate teaches nothing
    start_weight, start_bias = random(width, hidden, seed=3), random(hidden, seed=4)
    weight, bias = refit_gated(features, gate, target, start_weight, start_bias, ridge=0, iterations=200)
    with_ones = torch.cat([features, torch.ones(rows, 1, dtype=torch.float64)], dim=1)
    for column in range(4):
        g = gate[:, column : column + 1]
        expected = torch.linalg.lstsq(g * with_ones, target[:, column : column + 1]).solution[:, 0]
        torch.testing.assert_close(
            torch.cat([weight[:, column], bias[column : column + 1]]), expected, rtol=0, atol=2e-3
        )
    torch.testing.assert_close(weight[:, 4], start_weight[:, 4])
    torch.testing.assert_close(bias[4], start_bias[4])


def test_gated_refit_converges_in_its_few_iterations():
    rows, width, hidden = 400, 32, 16
    features, target = correlated(rows, width), random(rows, hidden, seed=2)
    gate = (
        random(rows, 1, seed=1).abs()
        * torch.logspace(-1, 1, hidden, dtype=torch.float64)
        * (1 + 0.3 * random(rows, hidden, seed=5))
    )
    start = torch.zeros(width, hidden, dtype=torch.float64), torch.zeros(hidden, dtype=torch.float64)

    def error(iterations: int) -> float:
        weight, bias = refit_gated(features, gate, target, *start, iterations=iterations)
        return (gate * (features @ weight + bias) - target).square().sum().item()

    assert error(30) <= error(500) * 1.001 < target.square().sum().item()


def test_gated_refit_leaves_a_perfect_fit_alone():
    features, gate, weight, bias = random(50, 6), random(50, 5, seed=1), random(6, 5, seed=3), random(5, seed=4)
    again = refit_gated(features, gate, gate * (features @ weight + bias), weight, bias)
    torch.testing.assert_close(again[0], weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(again[1], bias, rtol=0, atol=1e-10)


# -------------------------------------------------------------------- modulation


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_low_rank_stand_in_is_the_best_on_its_inputs_and_for_the_outputs_that_matter(rank):
    width, outputs, count = 8, 20, 200
    inputs, weight, importance = correlated(count, width), random(outputs, width, seed=3), random(outputs, seed=4) ** 2
    up, down = low_rank(weight, inputs.mT @ inputs / count, importance, rank)
    assert up.shape == (outputs, rank) and down.shape == (rank, width)
    error = ((inputs @ (weight - up @ down).mT) * importance.sqrt()).square().sum()
    singular = torch.linalg.svdvals(inputs @ weight.mT * importance.sqrt()).square()
    assert error <= singular[rank:].sum() * 1.001 + 1e-6 * singular.sum()
