"""The noise of a seed: the same in every port of the contract, and standard normal."""

import itertools
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.numpy import load_file
from scipy import stats

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.export import sample_min
from edgedit_hf.export.formats import ExportOptions
from edgedit_hf.export.pipeline import export_pipeline
from edgedit_hf.hub import recorded_hashes
from edgedit_hf.report.card import card_files

LARGEST = 2**63 - 1


@pytest.fixture(scope="module")
def exported(tmp_path_factory, make_transformer):
    """An ONNX export."""
    torch.manual_seed(0)
    scheduler = DDIMScheduler(prediction_type="epsilon", clip_sample=False)
    pipeline = EdgeDiTPipeline(make_transformer(num_layers=1), scheduler, default_steps=3)
    options = ExportOptions(threads=1, bench_batches=(2,), bench_repeats=2, num_images=2)
    return export_pipeline(pipeline, tmp_path_factory.mktemp("exported") / "out", options)


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    """Those that its authors publish with Random123."""
    words = sample_min.philox([np.array([word], np.uint64) for word in counter], key)
    assert " ".join(f"{int(word[0]):08x}" for word in words) == expected


def by_the_contract(rule, seed, count):
    """The noise in Python's whole numbers and floats, from what the contract says alone."""
    values, low = [], 2**32 - 1
    for block in range(-(-count // 4)):
        key = [seed % 2**32, seed // 2**32]
        a, b, c, d = block % 2**32, block // 2**32, 0, 0
        for _ in range(rule["rounds"]):
            p, q = a * rule["multipliers"][0], c * rule["multipliers"][1]
            a, b, c, d = (q >> 32) ^ b ^ key[0], q & low, (p >> 32) ^ d ^ key[1], p & low
            key = [(part + step) % 2**32 for part, step in zip(key, rule["key_increments"])]
        u = [(word + 0.5) / 2**32 for word in (a, b, c, d)]
        for radius, turn in (u[:2], u[2:]):
            radius = math.sqrt(-2 * math.log(radius))
            values += [radius * math.cos(2 * math.pi * turn), radius * math.sin(2 * math.pi * turn)]
        if block == rule["example"]["block"] and seed == rule["example"]["seed"]:
            assert [a, b, c, d] == rule["example"]["words"]
    return np.array(values[:count], np.float32)


def ulps(found, expected):
    """The largest distance in float32's steps."""
    return float(np.max(np.abs(found.astype(np.float64) - expected) / np.spacing(np.abs(expected)), initial=0))


def test_the_contract_alone_gives_the_noise(exported):
    contract = json.loads((exported / "contract.json").read_text())
    rule = contract["noise"]
    assert contract["contract_version"] == 2 and rule["example"]["seed"] >= 2**32
    for seed, count in ((0, 1), (1, 6), (2**32 - 1, 8), (2**32, 7), (LARGEST, 101), (rule["example"]["seed"], 8)):
        assert ulps(sample_min.standard_normal(seed, (count,)), by_the_contract(rule, seed, count)) <= 1
    block = rule["example"]["block"]
    found = sample_min.standard_normal(rule["example"]["seed"], (4 * block + 4,))[4 * block :]
    assert ulps(found, np.array(rule["example"]["values"], np.float32)) <= 1
    reference = load_file(exported / "reference.safetensors")["noise"]
    assert ulps(sample_min.standard_normal(contract["reference"]["seed"], reference.shape), reference) <= 1
    text = (exported / "PORTING.md").read_text()
    assert str(rule["example"]["words"][3]) in text and str(rule["multipliers"][1]) in text


def test_values_stay_what_they_are():
    """A picture of a seed is the same in the next version of this package."""
    pinned = {
        0: [0.991137683391571, -0.9246625900268555, -0.6176089644432068, -0.48206859827041626, -0.15363822877407074],
        1: [0.38040074706077576, -0.29627788066864014, -0.2492334246635437, -1.00383722782135, 0.6269478797912598],
        LARGEST: [-1.586754322052002, -0.8442155122756958, 0.223788782954216, 0.07733798772096634, 0.3361884653568268],
    }
    for seed, values in pinned.items():
        found = sample_min.standard_normal(seed, (1, 5))
        assert found.dtype == np.float32 and found.shape == (1, 5)
        assert ulps(found[0], np.array(values, np.float32)) <= 1
    assert np.array_equal(sample_min.standard_normal(3, (2, 3)).ravel(), sample_min.standard_normal(3, (9,))[:6])
    assert sample_min.standard_normal(3, (0,)).shape == (0,)


def test_the_noise_is_standard_normal():
    count = 400_000
    for seed in (0, 5, LARGEST):
        values = sample_min.standard_normal(seed, (count,)).astype(np.float64)
        moments = values.mean(), (values**2).mean() - 1, (values**3).mean(), (values**4).mean() - 3
        for moment, variance in zip(moments, (1, 2, 15, 96)):
            assert abs(moment) < 4 * math.sqrt(variance / count)
        assert stats.kstest(values, "norm").pvalue > 1e-3
        # each place of a block alone, so that a wrong sine or word would show
        assert all(stats.kstest(values[place::4], "norm").pvalue > 1e-3 for place in range(4))
        for lag in (1, 2, 3, 4, 64):
            assert abs(np.mean(values[lag:] * values[:-lag])) < 4 / math.sqrt(count)


def test_seeds_have_nothing_in_common():
    seeds = [0, 1, 2, 3, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**53, 2**53 + 1, LARGEST - 1, LARGEST]
    count = 40_000
    noise = [sample_min.standard_normal(seed, (count,)).astype(np.float64) for seed in seeds]
    for one, other in itertools.combinations(noise, 2):
        for a, b in ((one, other), (one**2 - 1, other**2 - 1)):
            assert abs(np.mean(a * b)) < 5 * np.std(a) * np.std(b) / math.sqrt(count)


# -------------------------------------------------------------------- the command line, and older contracts


@pytest.fixture
def first_version(exported, tmp_path):
    """The export as the first version of the contract described it: no rule for noise."""
    folder = tmp_path / "first"
    shutil.copytree(exported, folder)
    contract = json.loads((folder / "contract.json").read_text())
    del contract["noise"]
    contract["contract_version"] = 1
    (folder / "contract.json").write_text(json.dumps(contract))
    return folder


def drawn(folder, tmp_path, monkeypatch, *arguments):
    """The noise that sample_min.py starts from, and the bytes of its image."""
    seen = []
    sample = sample_min.sample
    monkeypatch.setattr(sample_min, "sample", lambda *given: seen.append(given[2]) or sample(*given))
    monkeypatch.setattr(sample_min, "__file__", str(folder / "sample_min.py"))
    output = tmp_path / "image.png"
    monkeypatch.setattr(sys, "argv", ["sample_min.py", "--output", str(output), *map(str, arguments)])
    assert sample_min.main() == 0
    monkeypatch.undo()
    return seen[0], output.read_bytes()


def test_a_seed_of_the_command_line_is_the_contracts(exported, tmp_path, monkeypatch):
    reference, image = drawn(exported, tmp_path, monkeypatch, "--reference")
    again, same = drawn(exported, tmp_path, monkeypatch, "--seed", 0)
    assert np.array_equal(reference, again) and image == same  # reference.seed is 0
    other, different = drawn(exported, tmp_path, monkeypatch, "--seed", LARGEST)
    assert np.array_equal(other, sample_min.standard_normal(LARGEST, reference.shape)) and image != different


def test_a_contract_of_the_first_version_runs_as_it_did(first_version, tmp_path, monkeypatch):
    noise, _ = drawn(first_version, tmp_path, monkeypatch, "--seed", 3)
    assert np.array_equal(noise, np.random.default_rng(3).standard_normal(noise.shape, dtype=np.float32))
    monkeypatch.setattr(sample_min, "__file__", str(first_version / "sample_min.py"))
    monkeypatch.setattr(sys, "argv", ["sample_min.py", "--check"])
    assert sample_min.main() == 0


def test_cards_and_pushes_read_both_versions(exported, first_version):
    assert recorded_hashes(first_version) == recorded_hashes(exported) and len(recorded_hashes(exported)) >= 3
    cards = [card_files(folder, "someone/net", license="mit") for folder in (exported, first_version)]
    assert "README.md" in cards[0] and cards[0].keys() == cards[1].keys()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"contract_version": 3}, "contract.json has the version 3, this program reads 1 and 2"),
        ({"noise": {"generator": "mt19937", "transform": "box-muller"}}, "mt19937 and box-muller, this program makes"),
        ({"noise": None}, "contract.json: noise is None"),
        ({"contract_version": "2"}, "contract.json: contract_version is '2'"),
    ],
)
def test_noise_of_another_kind_is_refused(exported, tmp_path, monkeypatch, change, message):
    shutil.copytree(exported, tmp_path / "other")
    contract = json.loads((exported / "contract.json").read_text())
    (tmp_path / "other" / "contract.json").write_text(json.dumps(contract | change))
    with pytest.raises(SystemExit, match=message):
        drawn(tmp_path / "other", tmp_path, monkeypatch, "--seed", 3)
