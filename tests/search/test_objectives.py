"""What a search may minimise: the distance of a student's images, against scipy and the teacher itself; losses on
held-out images, against the training's own; summed losses of proxies.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from edgedit_hf import EdgeDiTPipeline, ProxyBank, SearchSpace
from edgedit_hf.data.batches import batch_indices
from edgedit_hf.data.images import load_images
from edgedit_hf.diffusion import Diffusion, draws, make_scheduler
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.pipelines.sampling import generate
from edgedit_hf.search.objectives import (
    HELD_OUT_STREAM,
    HeldOutLosses,
    StudentLoss,
    StudentQuality,
    summed_proxy_loss,
)

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


def test_a_distance_comes_with_what_other_images_would_make_of_it(judged):
    pipeline, bank, real = judged
    quality = StudentQuality(bank, pipeline, EXTRACTOR, real, samples=40, **SAMPLING)
    genotype = bank.space.from_code((15,))
    score = quality.score(bank.assemble(genotype))
    assert score.value == quality(genotype)
    others = [
        StudentQuality(bank, pipeline, EXTRACTOR, real, samples=40, **{**SAMPLING, "seed": seed})(genotype)
        for seed in range(12)
    ]
    assert 0.4 * np.std(others) < score.error < 2.5 * np.std(others)
    assert quality.score(bank.assemble(genotype), num_images=10).value != score.value


@pytest.mark.parametrize("prediction", ["epsilon", "flow_prediction"])
def test_held_out_losses_are_those_of_training_and_of_distillation(make_transformer, prediction):
    teacher, other = (make_transformer(prediction_type=prediction, seed=seed) for seed in (0, 1))
    images = load_images("digits", "validation")
    losses = HeldOutLosses(teacher, images, samples=5, buckets=3, seed=9, batch_size=2, device=torch.device("cpu"))
    assert losses.edges == pytest.approx(
        [333, 666] if prediction == "epsilon" else [394.0, 606.0], abs=0.5
    )  # equal shares of what training draws
    own, theirs = losses(teacher), losses(other)
    assert own["output_error"].abs().max() == 0 and theirs["output_error"].min() > 0
    assert torch.equal(losses(other)["denoising"], theirs["denoising"])
    # One bucket by hand: the same images, noise and timesteps through the network, all at once.
    rows = batch_indices(len(images), 5, 9 + HELD_OUT_STREAM, 1)
    batch, drawn = images.batch(rows), draws(9, 1, range(5), images.shape, stream=HELD_OUT_STREAM)
    diffusion = Diffusion(prediction)
    t = diffusion.timesteps((1 + drawn.time) / 3)
    assert (t >= losses.edges[0]).all() and (t <= losses.edges[1]).all()
    noisy = diffusion.noisy(batch["images"], drawn.noise, t)
    with torch.no_grad():
        output, reference = (net(noisy, t, batch["labels"]).sample for net in (other, teacher))
    expected = diffusion.loss(output, batch["images"], drawn.noise, t)
    torch.testing.assert_close(theirs["denoising"][1].float(), expected, rtol=1e-4, atol=1e-5)
    expected = (output - reference).square().flatten(1).mean(1)
    torch.testing.assert_close(theirs["output_error"][1].float(), expected, rtol=1e-4, atol=1e-5)
    (overall, buckets) = losses.scores(other)["denoising"]
    assert overall.value == pytest.approx(float(theirs["denoising"].mean())) and len(buckets) == 3
    assert overall.error == pytest.approx(sum(bucket.error**2 for bucket in buckets) ** 0.5 / 3)


def test_proxy_losses_add_up_over_the_layers_that_a_proxy_replaces(judged):
    _, bank, _ = judged
    space = bank.space
    for number, entry in enumerate(bank.entries.values(), 1):
        entry["loss_after"] = number / 10
    assert summed_proxy_loss(bank, space.from_code((0,))) == 0
    merged, apart = space.from_code((16,)), space.from_code((4 + 3,))
    assert summed_proxy_loss(bank, merged) == bank.entries["00-01/original"]["loss_after"]
    expected = bank.entries["00/mlp"]["loss_after"] + bank.entries["01/both"]["loss_after"]
    assert summed_proxy_loss(bank, apart) == pytest.approx(expected)
    del bank.entries["01/both"]
    with pytest.raises(EdgeDiTError, match="has no proxy '01/both', whose loss is asked for"):
        summed_proxy_loss(bank, apart)


def test_a_loss_as_an_objective_is_above_zero_for_the_teacher_too(judged):
    _, bank, _ = judged
    images = load_images("digits", "validation")
    sizes = {"samples": 4, "buckets": 2, "seed": 0, "batch_size": 4, "device": torch.device("cpu")}
    losses = HeldOutLosses(bank.teacher, images, **sizes)
    denoising, error = (StudentLoss(bank, losses, name) for name in ("denoising", "output_error"))
    original, reduced = (bank.space.from_code((code,)) for code in (0, 15))
    assert error(original) == denoising(original) > 0
    found = losses.scores(bank.assemble(reduced))
    assert denoising(reduced) == pytest.approx(found["denoising"][0].value)
    assert error(reduced) == denoising(original) + found["output_error"][0].value > error(original)
    assert error.score(bank.assemble(reduced)).error == found["output_error"][0].error > 0
    own, theirs = (losses(network)["denoising"] for network in (bank.teacher, bank.assemble(reduced)))
    expected = float(((theirs - own).var(1) / 4).sum().sqrt() / 2)  # of the paired difference, a bucket a stratum
    assert denoising.score(bank.assemble(reduced)).error == pytest.approx(expected)
    assert denoising.score(bank.teacher).error == 0
