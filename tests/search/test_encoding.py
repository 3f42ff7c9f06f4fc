"""Rows of codes: the space's features and the programme's sums, looked up instead of made from genotypes."""

import numpy as np
import pytest
import torch

from edgedit_hf.menu_space import MenuSpace
from edgedit_hf.search.encoding import Encoding
from edgedit_hf.search.programme import Block, Peak, Programme
from edgedit_hf.search_space import SearchSpace

MENU = [
    {"mlp_ratio": 2.0},
    {"num_heads": 1, "modulation_rank": 0},
    {"merge": 2, "attention_dim": 16},
    {"merge": 3},
    {"token_merge": 2},
]
SPACES = {
    "paper": SearchSpace(5, 32, 2),
    "menu": MenuSpace(5, 32, 2, menu=MENU),
    "stage": MenuSpace(5, 32, 2, menu=MENU).stage("merge"),
}


PEAKS = {"memory": Peak("bytes", "live")}


def programme(space) -> Programme:
    rng = np.random.default_rng(0)
    names = ("latency_ms", "bytes", "live")
    costs = [dict(zip(names, (rng.uniform(1, 2), *rng.uniform(5, 9, 2).tolist()))) for _ in space.replacements()]
    blocks = [Block(layer, rng.uniform(), cost) for layer, cost in zip(space.replacements(), costs)]
    return Programme(blocks, space.num_layers, space.hidden_size, {"latency_ms": 0.5, "live": 6.0}, None, PEAKS)


@pytest.mark.parametrize("name", SPACES)
def test_rows_hold_what_genotypes_say(name):
    space = SPACES[name]
    solver = programme(space)
    of = {block.layer: block for block in solver.blocks}
    encoding = Encoding(space, solver)
    assert (
        set(encoding.columns) == {"score", "latency_ms", "bytes", "live", "memory"}
        and len(encoding.kinds) == encoding.num_features
    )
    codes = list(space.codes())[:: max(1, space.size // 200)]
    rows = encoding.rows(codes)
    for code, row in zip(codes, rows):
        genotype = space.from_code(code)
        assert row[: encoding.num_features].tolist() == space.features(genotype)
        blocks = [of[layer] for layer in genotype.layers]
        assert row[encoding.columns["score"]].item() == pytest.approx(sum(block.score for block in blocks))
        milliseconds = 0.5 + sum(block.costs["latency_ms"] for block in blocks)
        assert row[encoding.columns["latency_ms"]].item() == pytest.approx(milliseconds)
        memory = sum(block.costs["bytes"] for block in blocks) + max(6.0, *(block.costs["live"] for block in blocks))
        assert row[encoding.columns["memory"]].item() == pytest.approx(memory)
    assert Encoding(space).rows(codes).tolist() == rows[:, : encoding.num_features].tolist()


@pytest.mark.parametrize("name", SPACES)
def test_codes_are_made_canonical_as_the_space_does(name):
    space = SPACES[name]
    rng = np.random.default_rng(1)
    drawn = torch.tensor(np.stack([rng.choice(choices, 300) for choices in space.allowed], axis=1))
    codes, legal = Encoding(space).canonical(drawn)
    for raw, code, sound in zip(drawn.tolist(), codes.tolist(), legal.tolist()):
        assert sound and tuple(code) == space.code(space.from_code(raw))
    _, legal = Encoding(space).canonical(torch.full((1, len(space.allowed)), space.allowed[-1][-1]))
    assert legal.item() == (space.allowed[-1][-1] in space.allowed[0])


def test_what_the_programme_lacks_is_not_legal():
    space = SearchSpace(2, 32, 2)
    blocks = [Block(layer, 0.0, {"latency_ms": 1.0}) for layer in space.replacements() if len(layer.source) == 1]
    codes = torch.arange(20)[:, None]
    _, legal = Encoding(space, Programme(blocks, 2, 32)).canonical(codes)
    assert legal.tolist() == [True] * 16 + [False] * 4
