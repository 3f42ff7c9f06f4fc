"""k-means in one dimension, against the exact optimum (dynamic programming) and scikit-learn."""

import numpy as np
import pytest
import torch

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.quantization.kmeans import kmeans_1d, nearest


def optimum(values: np.ndarray, clusters: int, weights: np.ndarray | None = None) -> float:
    """The least possible error: the best last cluster for every number of values and clusters."""
    order = np.argsort(values)
    x = values[order].astype(np.float64)
    w = np.ones_like(x) if weights is None else weights[order].astype(np.float64)
    mass, first, second = (np.r_[0, np.cumsum(w * x**power)] for power in range(3))
    count = np.arange(len(x) + 1)
    between = mass[None] - mass[:, None]
    cost = (second[None] - second[:, None]) - (first[None] - first[:, None]) ** 2 / np.where(between > 0, between, 1)
    cost[count[:, None] > count[None]] = np.inf
    best = cost[0].copy()
    for _ in range(clusters - 1):
        best = (best[:, None] + cost).min(axis=0)
    return float(best[-1])


def draw(name: str, count: int) -> torch.Tensor:
    torch.manual_seed(0)
    normal = torch.randn(2, count)
    return {
        "normal": normal,
        "heavy tails": normal * torch.where(torch.rand(2, count) < 0.02, 20.0, 1.0),
        "two heaps": normal * 0.1 + (torch.rand(2, count) < 0.3) * 5.0,
        "uniform": torch.rand(2, count),
    }[name]


def error(values: torch.Tensor, centres: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return (values - centres.gather(1, indices.long())).double().pow(2).sum(dim=1)


@pytest.mark.parametrize("name", ["normal", "heavy tails", "two heaps", "uniform"])
@pytest.mark.parametrize("clusters, above", [(4, 1.01), (16, 1.01), (64, 1.2)])
def test_the_error_is_near_the_optimum(name, clusters, above):
    values = draw(name, 500)
    centres, indices = kmeans_1d(values, clusters)
    for found, row in zip(error(values, centres, indices).tolist(), values.numpy()):
        assert optimum(row, clusters) * 0.999 <= found <= above * optimum(row, clusters)
    assert (centres.diff(dim=1) > 0).all() and indices.dtype == torch.uint8
    assert all(len(row.unique()) == clusters for row in indices)  # no cluster is empty


def test_it_is_no_worse_than_scikit_learn():
    from sklearn.cluster import KMeans

    values = draw("normal", 5000)[:1]
    other = KMeans(16, n_init=5, random_state=0).fit(values.numpy().T).inertia_
    assert float(error(values, *kmeans_1d(values, 16))[0]) <= 1.02 * other


def test_weighted_errors_are_what_is_minimised():
    values = draw("normal", 400)
    weights = torch.rand(400) ** 8
    centres, indices = kmeans_1d(values, 8, weights[None])
    for row in range(2):
        found = float((weights * (values[row] - centres[row][indices[row].long()]) ** 2).sum())
        assert found <= 1.1 * optimum(values[row].numpy(), 8, weights.numpy())
    repeated = torch.tensor([[0.0, 1.0, 10.0]])
    centres, _ = kmeans_1d(repeated, 2, torch.tensor([[3.0, 1.0, 1.0]]))
    assert torch.allclose(centres, torch.tensor([[0.25, 10.0]]))


def test_few_distinct_values_are_kept_exactly():
    values = torch.tensor([[3.0, -1.0, 3.0, 7.5, -1.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    centres, indices = kmeans_1d(values, 16)
    assert torch.equal(centres.gather(1, indices.long()), values)
    assert torch.equal(kmeans_1d(torch.tensor([[5.0]]), 4)[0], torch.full((1, 4), 5.0))


def test_an_offset_costs_no_precision():
    values = draw("normal", 300) * 1e-3
    plain, shifted = (error(v, *kmeans_1d(v, 16)) for v in (values, values + 1))
    assert torch.allclose(plain, shifted, rtol=0.05)


def test_many_groups_are_the_groups_one_by_one():
    values = torch.randn(5, 257, generator=torch.Generator().manual_seed(0))
    together, alone = kmeans_1d(values, 8)[0], torch.cat([kmeans_1d(row[None], 8)[0] for row in values])
    assert torch.allclose(together, alone)


def test_nearest_is_the_nearest():
    centres = torch.tensor([[-1.0, 0.0, 4.0]])
    assert nearest(torch.tensor([[-9.0, -0.6, -0.4, 1.9, 2.1, 9.0]]), centres).tolist() == [[0, 0, 1, 1, 2, 2]]


def test_bad_input():
    with pytest.raises(EdgeDiTError, match="1 of the 2 values"):
        kmeans_1d(torch.tensor([[1.0, float("nan")]]), 2)
    with pytest.raises(EdgeDiTError, match="300 clusters"):
        kmeans_1d(torch.zeros(1, 4), 300)
    with pytest.raises(EdgeDiTError, match=r"\(4,\)"):
        kmeans_1d(torch.zeros(4), 2)
