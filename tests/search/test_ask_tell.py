"""Ask/tell searches: the ends of the space, every genotype once, state that is JSON, hypervolumes by brute force."""

import json

import numpy as np
import pytest
import torch

from edgedit_hf import EdgeDiTTransformer2DModel, SearchSpace
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.search.ask_tell import RandomSearch, sobol, summary
from edgedit_hf.search.bayes import BayesSearch

SPACE = SearchSpace(4, 32, 2)
SMALL = SearchSpace(2, 32, 2)  # 20 genotypes


def judge(genotype) -> tuple[float, float]:
    """Two objectives that pull apart, and no two genotypes alike."""
    size = sum(layer.attention_dim + 32 * layer.mlp_ratio for layer in genotype.layers)
    return 1000 / size + int(genotype.hash[:4], 16) / 1e6, size / 10


def run(search, count: int = 2):
    while not search.finished:
        for genotype in search.pending or search.ask(count):
            search.tell(genotype, judge(genotype))
    return search


def test_the_ends_have_the_most_and_the_fewest_weights_of_all():
    def weights(genotype) -> int:
        with torch.device("meta"):
            model = EdgeDiTTransformer2DModel.from_preset("DiT-debug/2", layers=genotype.to_layers())
        return sum(parameter.numel() for parameter in model.parameters())

    by_code = {SMALL.code(g): weights(g) for g in map(SMALL.from_code, [(c,) for c in range(20)])}
    most, fewest = map(SMALL.code, SMALL.ends())
    assert by_code[most] == max(by_code.values()) > by_code[fewest] == min(by_code.values())
    assert [*map(SPACE.code, SPACE.ends())] == [most * 2, fewest * 2]  # pairs cost what they cost


def test_the_first_points_are_the_ends_and_depend_on_nothing_told():
    one, other = RandomSearch(SPACE, 12, num_initial=6), RandomSearch(SPACE, 12, num_initial=6)
    together = [SPACE.code(genotype) for genotype in one.ask(6)]
    apart = []
    for value in range(6):
        (genotype,) = other.ask(1)
        apart.append(SPACE.code(genotype))
        other.tell(genotype, (1.0 + value, 7.0))
    assert together == apart and together[:2] == [*map(SPACE.code, SPACE.ends())] and len(set(together)) == 6
    assert set(together[2:]) <= set(sobol(SPACE, 64, 0))
    seeds = [[SPACE.code(g) for g in RandomSearch(SPACE, 12, seed, 6).ask(6)] for seed in (0, 1)]
    assert seeds[0] == together and seeds[1][:2] == together[:2] and seeds[1] != together


def test_a_small_space_is_searched_to_its_end_and_every_genotype_once():
    search = RandomSearch(SMALL, 100, num_initial=3)
    assert search.budget == 20 and len(search.ask(50)) == 3  # the initial points end a round
    search.tell(search.pending[1], (1.0, 1.0))
    assert len(search.pending) == 2 and not search.finished
    run(search, 7)
    assert sorted(tuple(point["code"]) for point in search.told) == [(code,) for code in range(20)]
    assert search.ask(1) == []


def test_random_proposals_are_uniform():
    """Of what a uniform point of the cube decodes to: the share of merged pairs is that of all points."""
    search = RandomSearch(SearchSpace(28, 32, 2), 400, num_initial=1)
    search.tell(*[(g, judge(g)) for g in search.ask(1)][0])
    pairs = np.array([search.space.code(genotype) for genotype in search.ask(399)])
    points = np.random.default_rng(123).random((4000, search.space.dimension))
    wanted = np.array([search.space.code(search.space.decode(x)) for x in points])
    for code in range(20):
        share, expected = (pairs == code).mean(), (wanted == code).mean()
        assert abs(share - expected) < 5 * np.sqrt(expected / pairs.size) + 1e-3


@pytest.mark.parametrize("told", [0, 1, 4, 7])
def test_a_search_that_was_killed_ends_with_the_same_bytes(tmp_path, told):
    whole = run(RandomSearch(SPACE, 10, seed=3, num_initial=4))
    part = RandomSearch(SPACE, 10, seed=3, num_initial=4)
    while len(part.told) < told:
        for genotype in part.pending or part.ask(2):
            part.tell(genotype, judge(genotype), {"parameters": 1})
    for point in part.told:
        del point["parameters"]
    part.save(tmp_path / "state.json")
    again = RandomSearch(SPACE, 10, seed=3, num_initial=4).resume(tmp_path / "state.json")
    assert again.pending == part.pending and run(again).to_json() == whole.to_json()
    assert json.dumps(again.front()) == json.dumps(whole.front())


def test_a_state_of_other_settings_is_refused_by_name(tmp_path):
    path = tmp_path / "state.json"
    RandomSearch(SPACE, 10, seed=3, num_initial=4).save(path)
    with pytest.raises(EdgeDiTError, match="was made with num_evaluations = 10, this run has num_evaluations = 11"):
        RandomSearch(SPACE, 11, seed=3, num_initial=4).resume(path)
    with pytest.raises(EdgeDiTError, match="was made with seed = 3, this run has seed = 4"):
        RandomSearch(SPACE, 10, seed=4, num_initial=4).resume(path)
    path.write_text(path.read_text().replace('"random"', '"bayes"'))
    with pytest.raises(EdgeDiTError, match=f"{path}: .* kind 'bayes'; expected .*'random'.* Delete it to search anew"):
        RandomSearch(SPACE, 10, seed=3, num_initial=4).resume(path)
    path.write_text("{")
    with pytest.raises(EdgeDiTError, match="Delete it to search anew"):
        RandomSearch(SPACE, 10).resume(path)
    with pytest.raises(EdgeDiTError, match="num_initial is 5 and num_evaluations is 4"):
        RandomSearch(SPACE, 4, num_initial=5)


@pytest.mark.parametrize("objectives", [(float("nan"), 1.0), (1.0, 0.0), (-1.0, 1.0), (1.0, float("inf")), (1.0,)])
def test_what_is_no_objective_is_not_recorded(objectives):
    search = RandomSearch(SPACE, 10)
    (genotype,) = search.ask(1)
    with pytest.raises(EdgeDiTError, match="both finite and greater than 0"):
        search.tell(genotype, objectives)
    assert search.told == [] and search.pending == [genotype]
    search.tell(genotype, (1.0, 2.0), {"flops": 5})
    assert search.told == [{"code": list(SPACE.code(genotype)), "distance": 1.0, "latency_ms": 2.0, "flops": 5}]
    with pytest.raises(EdgeDiTError, match=f"{genotype.hash}.* was told before"):
        search.tell(genotype, (1.0, 2.0))


def dominated_area(points: np.ndarray, reference: np.ndarray, steps: int = 600) -> float:
    """Share of a grid of the box below the reference that some point is below of, times the box."""
    axes = [np.linspace(0, bound, steps, endpoint=False) + bound / steps / 2 for bound in reference]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    below = np.zeros(grid.shape[:2], dtype=bool)
    for point in points:
        below |= (grid >= point).all(-1)
    return below.mean() * reference.prod()


def test_the_summary_is_of_the_points_told():
    search = RandomSearch(SPACE, 12, num_initial=5)
    search.tell(*[(g, judge(g)) for g in search.ask(1)][0])
    assert search.reference is None and search.hypervolume() is None
    for early in (lambda: summary(search), lambda: RandomSearch.sharing_initial(search)):
        with pytest.raises(EdgeDiTError, match="1 of 5 initial points are told"):
            early()
    run(search)
    points = np.array(search.points)
    found = summary(search)
    reference = 1.1 * points[:5].max(axis=0)  # of the initial points, whatever comes later
    assert found["reference"] == pytest.approx(list(reference)) and found["evaluations"] == 12
    for count in (1, 5, 12):
        inside = points[:count][(points[:count] < reference).all(1)]
        assert found["hypervolume"][count - 1] == pytest.approx(dominated_area(inside, reference), rel=0.02)
    kept = [i for i, p in enumerate(points) if not any((q <= p).all() and (q < p).any() for q in points)]
    assert sorted(entry["distance"] for entry in found["front"]) == sorted(points[kept, 0])
    assert all(SPACE.from_code(entry["code"]).hash == entry["hash"] for entry in found["front"])


def test_a_random_search_shares_the_initial_points_and_the_reference():
    search = run(RandomSearch(SPACE, 12, num_initial=5))
    random = RandomSearch.sharing_initial(search)
    assert random.told == search.told[:5] and random.reference == search.reference and not random.finished
    run(random)
    both = summary(search, random)
    assert len(both["random_hypervolume"]) == 12 and both["random_hypervolume"][:5] == both["hypervolume"][:5]
    given = RandomSearch(SPACE, 12, num_initial=5, reference=(9.0, 8.0))
    assert given.reference == (9.0, 8.0) and summary(run(given))["reference_rule"] == "given"


def test_a_search_of_which_everything_fails_says_so():
    search = RandomSearch(SMALL, 5, num_initial=2)
    while not search.finished:
        for genotype in search.pending or search.ask(2):
            search.fail(genotype, "it crashed")
    assert len({tuple(point["code"]) for point in search.failed}) == 5 and search.front() == []
    assert RandomSearch.from_json(search.to_json()).to_json() == search.to_json()
    with pytest.raises(EdgeDiTError, match="All 5 evaluations of the search failed.*it crashed"):
        summary(search)
    with pytest.raises(EdgeDiTError, match="was told before"):
        search.tell(SMALL.from_code(search.failed[0]["code"]), (1.0, 1.0))


def test_states_of_earlier_versions_are_read_or_refused():
    search = run(RandomSearch(SPACE, 6, num_initial=3))
    state = json.loads(search.to_json())
    del state["failed"]
    assert RandomSearch.from_json(json.dumps(state)).to_json() == search.to_json()
    state["settings"] |= {"kind": "bayes", "acquisition": "qlogehvi", "pool_size": 512}
    with pytest.raises(EdgeDiTError, match="made with pool_size, which this version does not have.*Delete it"):
        BayesSearch.from_json(json.dumps(state))


@pytest.mark.parametrize("noise", [-1.0, float("nan"), float("inf")])
def test_noise_is_a_standard_error(noise):
    search = RandomSearch(SPACE, 6, num_initial=2)
    with pytest.raises(EdgeDiTError, match="a standard error is finite"):
        search.tell(search.ask(1)[0], (1.0, 1.0), noise=noise)
