"""The benchmark of the searches on a small made-up table: what it prints holds together; that ours wins is for the real
one.
"""

import itertools
import json

import pytest

from edgedit_hf.search_space import SearchSpace

SPACE = SearchSpace(4, 32, 2)  # 400 genotypes


@pytest.fixture
def table(tmp_path):
    """A file as benchmarks/enumerate_space.py writes it: distances that grow with the square of what is lost."""
    options = {(d, r): i for i, (d, r) in enumerate(itertools.product((32, SPACE.reduced_attention_dim), (4.0, 2.0)))}
    bank, entries = {}, []

    def loss(layer) -> float:
        kind = options[layer.attention_dim, layer.mlp_ratio]
        return (kind + 2 * (len(layer.source) - 1)) * (1 + layer.source[0] / 3)

    for layer in SPACE.replacements():
        sources = "-".join(f"{i:02d}" for i in layer.source)
        bank[f"{sources}/{SPACE.option_of(layer)}"] = [0.9, loss(layer) / 100]
    for code in SPACE.codes():
        lost = sum(map(loss, SPACE.from_code(code).layers))
        entries.append([list(code), 7.0 + lost**2 / 50 + 0.1 * (sum(code) % 3), 0.1])
    blocks = [{"attention_dim": d, "num_heads": 2, "mlp_ratio": r, "ms": 4.0 - i} for (d, r), i in options.items()]
    values = {"made_by": {}, "space": SPACE.to_dict(), "latency": {"trunk_ms": 0.5, "blocks": blocks}}
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**values, "bank": bank, "entries": entries, "again": []}))
    return path


@pytest.mark.slow
def test_search(benchmark, table, tmp_path):
    arguments = ("--table", table, "--seeds", 2, "--budgets", "8,12", "--plot", tmp_path / "plot.png")
    printed, result = benchmark("search.py", *arguments)
    names = ["ours", "no scores", "old pool", "k-best", "greedy", "nsga2", "random"]
    assert list(result["searches"]) == names and result["genotypes"] == 400
    assert [line.split("  ")[0] for line in printed[2:9]] == names
    for found in result["searches"].values():
        for trace in found["traces"]:
            assert all(0 <= a <= b <= 1 + 1e-9 for a, b in zip(trace, trace[1:]))
        middle, half = found["at"]["12"]
        assert half >= 0 and middle == pytest.approx(sum(t[-1] for t in found["traces"]) / len(found["traces"]))
    assert result["searches"]["ours"]["at"]["12"][0] > result["searches"]["random"]["at"]["12"][0]
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.slow
def test_kernels(benchmark, table):
    printed, result = benchmark("search.py", "--table", table, "--seeds", 1, "--budgets", "12", "--kernels")
    assert len(result["kernels"]) == 14 == len(printed) - 2
    for row in result["kernels"].values():
        density, rank = row["12"]
        assert -20 < density < 5 and -1 <= rank <= 1


def test_scores(benchmark, table):
    printed, result = benchmark("search.py", "--table", table, "--budgets", "12,40", "--scores")
    assert len(result["scores"]) == 7 == len(printed) - 2
    for row in result["scores"].values():
        assert 0 <= row["at"]["12"] <= row["at"]["40"] <= 1 + 1e-9
    # The distances of this table grow with the sum of the losses; its closed-form losses are all the same.
    assert result["scores"]["loss after distillation"]["spearman"] > 0.99
    assert result["scores"]["closed-form loss"]["spearman"] < 0.9
