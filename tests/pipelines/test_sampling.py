import pytest
import torch
from diffusers import DDIMScheduler

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import make_few_step_scheduler, make_scheduler
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.pipelines.sampling import generate, sampling_of


@pytest.fixture(scope="module")
def pipeline(make_transformer):
    # Flow matching: DDIM's first step divides by √ᾱ = 0.006 and would magnify the rounding of other batch sizes.
    return EdgeDiTPipeline(make_transformer(prediction_type="flow_prediction"), make_scheduler("flow_prediction"))


def test_images_do_not_depend_on_the_batch_size(pipeline):
    whole, labels = generate(pipeline, 12, seed=3, steps=2, batch_size=12)
    parts, _ = generate(pipeline, 12, seed=3, steps=2, batch_size=5)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    assert labels.tolist() == [i % 10 for i in range(12)]
    assert whole.shape == (12, 1, 8, 8) and whole.abs().max() <= 1


def test_more_images_begin_with_the_same_ones_and_seeds_differ(pipeline):
    few, _ = generate(pipeline, 4, seed=3, steps=2)
    more, _ = generate(pipeline, 6, seed=3, steps=2)
    other, _ = generate(pipeline, 4, seed=4, steps=2)
    torch.testing.assert_close(more[:4], few, rtol=1e-4, atol=1e-4)
    assert (other - few).abs().max() > 0.01


def test_a_set_can_be_made_in_pieces(pipeline):
    whole, labels = generate(pipeline, 12, seed=3, steps=2, batch_size=4)
    pieces = [generate(pipeline, 4, first=first, seed=3, steps=2, batch_size=4) for first in (0, 4, 8)]
    assert torch.equal(torch.cat([images for images, _ in pieces]), whole)
    assert torch.equal(torch.cat([names for _, names in pieces]), labels)


def test_unconditional(make_transformer):
    images, labels = generate(EdgeDiTPipeline(make_transformer(num_classes=0), make_scheduler("epsilon")), 3, steps=1)
    assert labels is None and len(images) == 3


def test_the_pipeline_is_left_as_it_was(make_transformer):
    """Its progress bar, also after a call that fails: an ε-prediction's first step divides by a signal of zero."""
    usual = make_scheduler("epsilon")
    pipeline = EdgeDiTPipeline(make_transformer(), usual)
    pipeline.set_progress_bar_config(leave=False)
    generate(pipeline, 2, steps=1)
    assert pipeline._progress_bar_config == {"leave": False}
    pipeline.scheduler = DDIMScheduler.from_config(
        usual.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    with pytest.raises(EdgeDiTError, match="After 3 steps the latents hold NaN or infinite values.*DDIMScheduler"):
        generate(pipeline, 2, steps=3)
    assert pipeline._progress_bar_config == {"leave": False}


def test_a_few_step_pipeline_is_judged_as_it_was_distilled(pipeline):
    assert sampling_of(pipeline, 20, 1.5) == {"steps": 20, "guidance_scale": 1.5}
    few = {"default_steps": 2, "default_guidance_scale": 1.0, "few_step_timesteps": [1000, 500]}
    student = EdgeDiTPipeline(pipeline.transformer, make_few_step_scheduler("flow_prediction"), **few)
    assert sampling_of(student, 20, 1.5) == {"steps": 2, "guidance_scale": 1.0}
    images, _ = generate(student, 2, **sampling_of(student, 20, 1.5))
    assert torch.isfinite(images).all() and student.scheduler.timesteps.tolist() == [1000, 500]
