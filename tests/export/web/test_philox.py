"""The noise of the page is that of sample_min.py."""

import numpy as np
import pytest
from node import ask_node, needs_node

from edgedit_hf.export import sample_min

SEEDS = [0, 1, 12345, 2**32 - 1, 2**32, 2**53 - 1, 2**53, 2**53 + 1, 2**63 - 1]
COUNTS = [0, 1, 2, 3, 4, 5, 101, 4096, 65537]


@needs_node
def test_philox_gives_the_known_answers():
    rng = np.random.default_rng(0)
    given = rng.integers(0, 2**32, (2000, 6), dtype=np.uint64)
    given[0], given[1] = 0, 2**32 - 1
    given[2] = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    found = np.array(ask_node([{"words": [[row[:4], row[4:]] for row in given.tolist()]}])[0])
    for row, words in zip(given, found):
        assert words.tolist() == [int(word[0]) for word in sample_min.philox(row[:4, None], row[4:])]
    assert " ".join(f"{word:08x}" for word in found[2]) == "d16cfe09 94fdcceb 5001e420 24126ea1"


@needs_node
def test_a_seed_means_the_same_noise():
    asked = [[str(seed), count] for seed in SEEDS for count in COUNTS]
    answers, different = ask_node([{"noise": asked}])[0], 0
    for (seed, count), bits in zip(asked, answers):
        found = np.array(bits, np.uint32).view(np.float32)
        expected = sample_min.standard_normal(int(seed), (count,))
        assert found.shape == expected.shape
        ulps = np.abs(found.astype(np.float64) - expected) / np.spacing(np.abs(expected))
        assert ulps.max(initial=0) <= 1
        different += int((ulps > 0).sum())
    assert different < 100  # of 600,000: where a float64 lies between two of float32


@needs_node
@pytest.mark.parametrize("seed", [-1, str(2**63), 2**53 + 1, 1.5, "x", None])
def test_what_is_no_seed_is_refused(seed):
    assert ask_node([{"noise": [[seed, 4]]}])[0].keys() == {"error"}
