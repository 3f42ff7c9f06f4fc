"""Few-step samples while the student learns: the same whatever their batches, judged as the shipped pipeline's are."""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from edgedit_hf.data.loading import load_run_images
from edgedit_hf.few_step.diagnosis import Moments
from edgedit_hf.few_step.judge import Judge
from edgedit_hf.few_step.networks import CRITIC, REAL, STUDENT, Networks
from edgedit_hf.few_step.source import Conditions, load_conditions
from edgedit_hf.metrics.distances import frechet_distance, precision_recall
from edgedit_hf.metrics.reference import real_features
from edgedit_hf.pipelines.sampling import generate, generate_from_captions
from edgedit_hf.run.config import RunConfig


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    made = RunConfig(output_dir=str(tmp_path_factory.mktemp("judge")))
    made.evaluate = replace(made.evaluate, extractor_steps=20)
    made.few_step = replace(made.few_step, samples=30, batch_size=16)
    return made


@pytest.fixture(scope="module")
def judge(config, families):
    images = load_run_images(config)
    source = families["edgedit"].source()
    return Judge(config, Accelerator(cpu=True), source, Conditions(source, images), None)


@pytest.fixture(scope="module")
def networks(families, disturb):
    made = Networks(families["edgedit"].model, True, True, rank=4, alpha=8.0)
    for seed, role in enumerate((STUDENT, CRITIC)):
        disturb([p for _, p in made.trained(role)], seed, 0.05)
    return made


def test_it_judges_what_ships(judge, networks, families):
    """The student as a pipeline, sampled by the pipeline's own call."""
    judged = judge(networks, None)
    pipeline = judge.source.few_step_pipeline(copy.deepcopy(networks).finished().eval(), "ode")
    images, _ = generate(pipeline, 30, seed=judge.seed, steps=4, guidance_scale=1.0)
    torch.testing.assert_close(judge.images(judged.latents), images, rtol=0, atol=2e-3)
    features = judge.extractor.features(images)
    assert judged.distance == pytest.approx(frechet_distance(features, judge.real), rel=1e-2)
    assert judged.recall == pytest.approx(precision_recall(judge.real, features)[1], abs=0.01)
    assert judged.moments.mean == pytest.approx(float(judged.latents.mean()), abs=1e-4)


def test_it_judges_the_text_to_image_that_ships(config, families, disturb):
    source, alone = families["elastic"].source(), Accelerator(cpu=True)
    judge = Judge(config, alone, source, *load_conditions(config, alone, source))
    networks = Networks(source.pipeline.transformer, True, False, rank=4, alpha=8.0)
    disturb([p for _, p in networks.trained(STUDENT)], 0, 0.05)
    pipeline = source.few_step_pipeline(copy.deepcopy(networks).finished().eval(), "ode")
    for width in source.widths:
        found = judge(networks, width)
        asked = {"subnet": width, "seed": judge.seed, "steps": 4, "guidance_scale": 1.0}
        images = generate_from_captions(pipeline, judge.judged.dataset, **asked)
        torch.testing.assert_close(judge.images(found.latents), images, rtol=0, atol=2e-3)
        wanted = frechet_distance(judge.extractor.features(images), judge.real)
        assert found.distance == pytest.approx(wanted, rel=1e-2)


def test_samples_do_not_depend_on_their_batches(judge, networks, config):
    whole = judge.latents(networks, None, 30)
    assert whole.shape == (30, 1, 8, 8)
    torch.testing.assert_close(judge.latents(networks, None, 10), whole[:10], rtol=1e-3, atol=1e-3)
    judge.options = replace(config.few_step, batch_size=7)
    torch.testing.assert_close(judge.latents(networks, None, 30), whole, rtol=1e-3, atol=1e-3)
    judge.options = config.few_step


def test_strips_show_the_student_its_first_step_and_the_critic(judge, networks):
    latents = judge.latents(networks, None, 30)
    strips = judge.strips(networks, None, latents, True)
    assert strips.shape == (30, 1, 8, 8) and judge.strips(networks, None, latents, False).shape == (20, 1, 8, 8)
    first = judge.latents(networks, None, 10, steps=[judge.source.timesteps[0]])
    torch.testing.assert_close(strips[:20], judge.images(torch.cat([latents[:10], first])), rtol=1e-3, atol=1e-3)
    assert not torch.equal(judge.latents(networks, None, 3, REAL), judge.latents(networks, None, 3, CRITIC))


def test_the_datas_moments_are_of_everywhere(judge, config, families):
    """Folders lie class by class: the first images are of some classes alone."""
    images = load_run_images(config)
    whole = Moments.of(images.batch(range(len(images)))["images"])
    assert judge.moments.mean == pytest.approx(whole.mean, abs=0.01)
    order = images.labels.argsort(stable=True).tolist()

    class ByClass:
        shape, dataset = images.shape, images

        def __len__(self):
            return len(order)

        def batch(self, rows):
            return images.batch([order[row] for row in rows])

    judge.conditions = Conditions(judge.source, ByClass())
    assert Moments.of(judge._data()).mean == pytest.approx(whole.mean, abs=0.01)
    assert real_features(judge.extractor, images).shape == judge.real.shape
