from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from flow_pipelines import autoencoder, elastic, randomise

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import draws, make_few_step_scheduler, make_scheduler, own_generators
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.pipelines.loading import with_components
from edgedit_hf.pipelines.sampling import (
    EVALUATION_STREAM,
    denoiser_of,
    generate,
    generate_from_captions,
    generate_rows,
    sampling_of,
    sampling_stamp,
)
from edgedit_hf.quantization.calibration import record


def test_a_pipeline_without_one_denoiser_is_refused():
    with pytest.raises(EdgeDiTError, match="SimpleNamespace has neither a transformer nor a unet, but prior, decoder"):
        denoiser_of(SimpleNamespace(components={"prior": None, "decoder": None}))


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


# -------------------------------------------------------------------- samplers that draw noise at every step


def few_step(pipeline, kind: str, timesteps: list[float], sampler: str = "sde"):
    """A pipeline as it would be after few-step distillation."""
    scheduler = make_few_step_scheduler(kind, stochastic=sampler == "sde")
    facts = {"default_steps": len(timesteps), "default_guidance_scale": 1.0, "few_step_timesteps": timesteps}
    return with_components(pipeline, scheduler=scheduler, **facts)


@pytest.fixture(scope="module")
def noisy(make_transformer):
    """Pipelines that noise anew after every step, of every kind, and the sets of images that they give."""
    text, captions = elastic(vae=False), [f"digit {number}" for number in range(5)]
    randomise(text)
    with torch.no_grad():
        text.transformer.proj_out.weight.mul_(0.1)  # pixels within [-1, 1]
    text = few_step(text, "flow_prediction", [1000.0, 900.0, 500.0])
    found = {}
    for kind, timesteps in (("epsilon", [601, 300, 150]), ("flow_prediction", [1000.0, 900.0, 500.0])):
        of = EdgeDiTPipeline(make_transformer(prediction_type=kind), make_scheduler(kind))
        of = few_step(of, kind, timesteps)
        found[kind] = of, lambda of=of, **how: generate(of, 5, **sampling_of(of, 9, 2.0), **how)[0]
    found["text"] = text, lambda **how: generate_from_captions(text, captions, **sampling_of(text, 9, 2.0), **how)
    return found


@pytest.mark.parametrize("kind", ["epsilon", "flow_prediction", "text"])
def test_fresh_noise_depends_on_seed_and_image_alone(noisy, kind):
    pipeline, images = noisy[kind]
    torch.manual_seed(1)
    whole = images(seed=3)
    torch.manual_seed(2)  # of no account: nothing is drawn from the global state
    assert torch.equal(images(seed=3), whole)
    for size in (1, 2, 4):
        torch.testing.assert_close(images(seed=3, batch_size=size), whole, rtol=1e-3, atol=1e-3)
    assert (images(seed=4) - whole).abs().mean() > 0.01
    config = pipeline.transformer.config
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    asked = {"prompt": ["digit 2"]} if kind == "text" else {"class_labels": [2]}
    alone, other = (
        pipeline(
            **asked,
            latents=draws(3, 0, [2], shape, stream=EVALUATION_STREAM).noise,
            generator=own_generators(3, [row], stream=EVALUATION_STREAM),
            output_type="pt",
        ).images
        for row in (2, 1)
    )
    torch.testing.assert_close(alone[0] * 2 - 1, whole[2], rtol=1e-3, atol=1e-3)
    assert (alone - other).abs().mean() > 0.01  # the fresh noise is the generator's


def test_a_calibration_of_such_a_sampler_is_reproducible_too(noisy):
    for kind in ("epsilon", "text"):
        pipeline = noisy[kind][0]
        prompts = ["digit 2"] if kind == "text" else None
        first, again = (record(pipeline, 3, batch_size=size, prompts=prompts).latents for size in (3, 2))
        torch.testing.assert_close(first, again, rtol=1e-3, atol=1e-3)


def test_a_deterministic_sampler_gives_what_it_gives_without_generators(pipeline):
    images, labels = generate(pipeline, 4, seed=3, steps=3, guidance_scale=1.5)
    noise = draws(3, 0, range(4), (1, 8, 8), stream=EVALUATION_STREAM).noise
    plain = pipeline(
        class_labels=labels.tolist(), latents=noise, num_inference_steps=3, guidance_scale=1.5, output_type="pt"
    ).images
    assert torch.equal(images, plain * 2 - 1)


def test_images_of_captions_can_be_made_in_pieces(noisy):
    text, captions = noisy["text"][0], [f"number {i}" for i in range(5)]
    asked = {"seed": 3, **sampling_of(text, 9, 2.0)}
    whole = generate_from_captions(text, captions, **asked)
    part = generate_rows(text, range(2, 5), prompts=captions[2:], batch_size=2, **asked)
    torch.testing.assert_close(part, whole[2:], rtol=1e-3, atol=1e-3)


def test_a_sampler_is_stamped(pipeline, make_transformer):
    stamp = sampling_stamp(pipeline, seed=5, steps=2, guidance_scale=1.5, precision="bf16")
    assert stamp == {
        **{"seed": 5, "scheduler": "FlowMatchEulerDiscreteScheduler", "steps": 2, "guidance_scale": 1.5},
        **{"dtype": "bf16", "vae": None, "vae_hash": None},
    }
    assert sampling_stamp(pipeline, seed=5, steps=2, guidance_scale=1.5)["dtype"] == "float32"
    nets = [autoencoder(), autoencoder()]
    nets[1].load_state_dict(nets[0].state_dict())
    hashes = [
        sampling_stamp(
            EdgeDiTPipeline(make_transformer(in_channels=4), make_scheduler("epsilon"), vae=vae),
            **{"seed": 0, "steps": 1, "guidance_scale": None},
        )["vae_hash"]
        for vae in (*nets, autoencoder())
    ]
    assert hashes[0] == hashes[1] != hashes[2]
