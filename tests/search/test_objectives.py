"""The objective of a search: the distance of a student's images, against scipy and the teacher itself."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from edgedit_hf import EdgeDiTPipeline, ProxyBank, SearchSpace
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.pipelines.sampling import generate
from edgedit_hf.search.objectives import StudentQuality

EXTRACTOR = SimpleNamespace(features=lambda images: images.flatten(1)[:, ::16].double())
SAMPLING = {"steps": 2, "guidance_scale": 1.5, "seed": 7, "batch_size": 5}


@pytest.fixture
def judged(make_transformer, tmp_path):
    """A teacher's pipeline, its bank of untrained proxies, and features of no images in particular."""
    teacher = make_transformer(num_layers=2)
    bank = ProxyBank.create(tmp_path / "bank", teacher, SearchSpace.for_config(teacher.config))
    torch.manual_seed(0)
    record = {"loss_before": 1.0, "loss_after": 1.0, "steps": 0, "seed": 0}
    bank.write_index({bank.key(x): bank.write_proxy(x, bank.new_block(x), record) for x in bank.space.proxies()})
    real = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return EdgeDiTPipeline(teacher, make_scheduler("epsilon")), bank, real


def scipy_distance(a: np.ndarray, b: np.ndarray) -> float:
    means, covariances = [x.mean(0) for x in (a, b)], [np.cov(x, rowvar=False) for x in (a, b)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    return ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)


def test_the_original_genotype_is_judged_as_the_teacher_would_be(judged):
    pipeline, bank, real = judged
    assert EXTRACTOR.features(torch.zeros(1, 1, 8, 8)).shape == (1, 4)
    quality = StudentQuality(bank, pipeline, EXTRACTOR, real, samples=12, **SAMPLING)
    images, labels = generate(pipeline, 12, **SAMPLING)
    expected = scipy_distance(EXTRACTOR.features(images).numpy(), real.numpy())
    original, reduced = (bank.space.from_code((code,)) for code in (0, 15))
    assert quality(original) == pytest.approx(expected, rel=1e-4)
    assert quality(original) == quality(original) != quality(reduced)
    assert labels.tolist() == [*range(10), 0, 1]


def test_every_genotype_is_judged_on_the_same_noise(judged):
    """A student that computes what the teacher does is as far away, to the digit; another seed is another distance."""
    pipeline, bank, real = judged
    first, again, other = (
        StudentQuality(bank, pipeline, EXTRACTOR, real, samples=12, **{**SAMPLING, "seed": seed}) for seed in (7, 7, 8)
    )
    original = bank.space.from_code((0,))
    assert first(original) == again(original) != other(original)


def test_the_teacher_stays_as_it_is_and_the_precision_is_asked_for(judged):
    pipeline, bank, real = judged
    before, asked = pipeline.transformer, []

    def autocast():
        asked.append("bf16")
        return torch.autocast("cpu", dtype=torch.bfloat16)

    exact, rounded = (
        StudentQuality(bank, pipeline, EXTRACTOR, real, samples=12, **SAMPLING, **more)(bank.space.from_code((0,)))
        for more in ({}, {"autocast": autocast})
    )
    assert pipeline.transformer is before and asked == ["bf16"]
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.2)
