"""What a step draws depends on (seed, step, row) alone, and each text encoder is dropped on its own."""

import pytest
import torch

from edgedit_hf.elastic.draws import drop_texts, step_subnets, text_uniforms

NAMES = ["tiny", "small", "wide", "full"]


def test_one_subnetwork_a_step_uniform_over_all_but_the_full_net():
    drawn = [step_subnets(NAMES, 3, step) for step in range(3000)]
    assert all(len(names) == 1 for names in drawn)
    counts = {name: drawn.count([name]) for name in NAMES}
    assert counts["full"] == 0 and all(abs(counts[name] - 1000) < 120 for name in NAMES[:-1])
    assert drawn[700:710] == [step_subnets(NAMES, 3, step) for step in range(700, 710)]
    assert drawn[:50] != [step_subnets(NAMES, 4, step) for step in range(50)]


@pytest.mark.parametrize("sampling", ["one", "sandwich"])
def test_few_subnetworks(sampling):
    assert step_subnets([], 0, 0, sampling) == step_subnets(["full"], 0, 0, sampling) == []
    assert step_subnets(["small", "full"], 0, 5, sampling) == ["small"]


def test_the_sandwich_always_holds_the_narrowest():
    drawn = [step_subnets(NAMES, 0, step, "sandwich") for step in range(400)]
    assert all(names[0] == "tiny" and len(names) == 2 for names in drawn)
    assert {names[1] for names in drawn} == {"small", "wide"} and 140 < sum(names[1] == "wide" for names in drawn) < 260


def test_texts_are_dropped_each_encoder_on_its_own():
    uniforms = torch.cat([text_uniforms(0, step, range(64), 2) for step in range(40)])
    kept = torch.stack([mask[:, 0] for mask in drop_texts([torch.ones(len(uniforms), 3)] * 2, uniforms, 0.3)], dim=1)
    for first, second, share in ((False, False, 0.09), (False, True, 0.21), (True, False, 0.21), (True, True, 0.49)):
        assert ((kept[:, 0] == first) & (kept[:, 1] == second)).float().mean() == pytest.approx(share, abs=0.03)


def test_drops_keep_padding_and_are_a_matter_of_the_row():
    masks = [torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.ones(2, 1)]
    dropped = drop_texts(masks, torch.tensor([[0.9, 0.1], [0.1, 0.9]]), 0.5)
    assert dropped[0].tolist() == [[True, True, False], [False] * 3] and dropped[1].tolist() == [[False], [True]]
    assert torch.equal(text_uniforms(1, 2, range(8), 2)[5:], text_uniforms(1, 2, [5, 6, 7], 2))
    assert not torch.equal(text_uniforms(1, 2, range(8), 2), text_uniforms(1, 3, range(8), 2))
