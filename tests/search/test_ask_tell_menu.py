"""Searches over the space of a menu: every genotype once, the ends first, a state that is JSON."""

from edgedit_hf.menu_space import MenuSpace
from edgedit_hf.search.ask_tell import RandomSearch

SPACE = MenuSpace(3, 32, 2, menu=[{"mlp_ratio": 2}, {"modulation_rank": 0}, {"merge": 2}, {"merge": 3, "mlp_ratio": 1}])


def judge(genotype) -> tuple[float, float]:
    size = sum(layer.attention_dim + 32 * layer.mlp_ratio for layer in genotype.layers)
    return 1000 / size + int(genotype.hash[:4], 16) / 1e6, size / 10


def test_a_menu_is_searched_to_its_end_and_resumed_on_the_way(tmp_path):
    search = RandomSearch(SPACE, 1000, num_initial=4)
    asked = []
    while not search.finished:
        genotypes = search.pending or search.ask(3)
        asked += genotypes
        for genotype in genotypes:
            search.tell(genotype, judge(genotype))
        search.save(tmp_path / "state.json")
        search = RandomSearch(SPACE, 1000, num_initial=4).resume(tmp_path / "state.json")
        assert isinstance(search.space, MenuSpace)
    assert len(asked) == len(set(asked)) == SPACE.size and set(asked) == set(SPACE.all())
    assert tuple(asked[:2]) == SPACE.ends()
    for point in search.front():
        assert list(SPACE.code(SPACE.from_code(point["code"]))) == point["code"]
