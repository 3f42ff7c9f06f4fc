"""EdgeDiTPipeline: what it generates with every kind of scheduler, what it refuses, and that it saves and loads."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from edgedit_hf import EdgeDiTPipeline

BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
NAMES = {"0": "zero, nought", "1": "one", "2": "two", "3": "crane, bird", "4": "crane, machine"}


class PointDenoiser(ModelMixin, ConfigMixin):
    """The exact network for data in which every image of class c is the constant c/10, and every image without class 0.

    Whatever the scheduler, sampling with it must end at that constant: it checks timesteps, scalings, signs, labels and
    guidance.
    """

    @register_to_config
    def __init__(
        self,
        prediction_type: str = "epsilon",
        learn_sigma: bool = False,
        variance: float = 0.0,
        num_classes: int = 10,
        sample_size: int = 4,
        patch_size: int = 2,
        in_channels: int = 1,
    ):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        log_alpha = torch.from_numpy(np.log(1 - np.linspace(1e-4, 0.02, 1000))).cumsum(0)
        self.register_buffer("log_alpha", log_alpha, persistent=False)

    def forward(self, sample, timestep, labels=None, return_dict=True):
        null = torch.zeros(len(sample)) if labels is None else torch.where(labels == self.config.num_classes, 0, labels)
        point = (null / 10).view(-1, 1, 1, 1)
        if self.config.prediction_type == "epsilon":
            position = timestep.double().clamp(0, 999)  # schedulers with sigmas ask for timesteps between the integers
            low = position.long().clamp(max=998)
            weight = position - low
            alpha = ((1 - weight) * self.log_alpha[low] + weight * self.log_alpha[low + 1]).exp().view(-1, 1, 1, 1)
            prediction = (sample - alpha.sqrt() * point) / (1 - alpha).sqrt()
        else:  # x = (1 - s) x0 + s ε, velocity ε - x0 = (x - x0) / s
            prediction = (sample - point) / (timestep.float() / 1000).view(-1, 1, 1, 1)
        if self.config.learn_sigma:
            prediction = torch.cat([prediction, torch.full_like(prediction, self.config.variance)], dim=1)
        return (prediction.float(),)


def scheduler(name: str, **config):
    defaults = BETAS if not name.startswith("FlowMatch") else {}
    return getattr(diffusers, name)(**{**defaults, **config})


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(make_transformer):
    return quiet(EdgeDiTPipeline(make_transformer(), scheduler("DDIMScheduler"), id2label=NAMES, default_steps=3))


# -------------------------------------------------------------------- schedulers

EPSILON = [
    ("DDIMScheduler", {"clip_sample": False}),
    ("DDPMScheduler", {"clip_sample": False}),
    ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"}),
    ("DEISMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    ("DPMSolverSinglestepScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("HeunDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("UniPCMultistepScheduler", {}),
]
FLOW = [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 1.0}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
]


@pytest.mark.parametrize(
    "kind, name, config",
    [("epsilon", *entry) for entry in EPSILON] + [("flow_prediction", *entry) for entry in FLOW],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "default",
)
def test_every_fitting_scheduler_reaches_the_data(kind, name, config):
    pipeline = quiet(EdgeDiTPipeline(PointDenoiser(kind), scheduler(name, **config)))
    latents = pipeline(
        [0, 2, 7],
        guidance_scale=1.0,
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    expected = torch.tensor([0.0, 0.2, 0.7]).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    torch.testing.assert_close(latents, expected, atol=0.06, rtol=0)


@pytest.mark.parametrize(
    "kind, name", [("epsilon", "DDIMScheduler"), ("flow_prediction", "FlowMatchEulerDiscreteScheduler")]
)
def test_guidance_extrapolates_from_the_unconditional_prediction(kind, name):
    config = {"clip_sample": False} if kind == "epsilon" else {}
    pipeline = quiet(EdgeDiTPipeline(PointDenoiser(kind), scheduler(name, **config)))
    latents = pipeline([1, 3], guidance_scale=2.5, num_inference_steps=20, output_type="latent").images
    torch.testing.assert_close(latents.mean((1, 2, 3)), torch.tensor([0.25, 0.75]), atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_variance_channels_are_dropped_for_schedulers_that_take_none(name):
    denoiser = PointDenoiser(learn_sigma=True, variance=1e6)
    pipeline = quiet(EdgeDiTPipeline(denoiser, scheduler(name)))
    latents = pipeline([5], guidance_scale=1.5, num_inference_steps=20, output_type="latent").images
    torch.testing.assert_close(latents, torch.full_like(latents, 0.75), atol=0.06, rtol=0)


def test_ddpm_takes_the_learned_variance():
    def sample(variance_type, variance):
        denoiser = PointDenoiser(learn_sigma=True, variance=variance)
        pipeline = quiet(
            EdgeDiTPipeline(denoiser, scheduler("DDPMScheduler", variance_type=variance_type, clip_sample=False))
        )
        trace = []
        pipeline(
            [4, 6],
            guidance_scale=2.0,
            num_inference_steps=10,
            generator=torch.Generator().manual_seed(1),
            callback_on_step_end=lambda _, i, t, tensors: trace.append(tensors["latents"]),
        )
        return trace[5]

    # v = -1 is the lower end of the learned range, which is the fixed small variance; v = 1 is the upper end.
    torch.testing.assert_close(sample("learned_range", -1.0), sample("fixed_small", 0.0))
    assert not torch.allclose(sample("learned_range", 1.0), sample("fixed_small", 0.0), atol=1e-3)


@pytest.mark.parametrize(
    "denoiser, integrator, said",
    [
        (
            {},
            ("FlowMatchEulerDiscreteScheduler", {}),
            ["'epsilon'", "FlowMatchEulerDiscreteScheduler", "'flow_prediction'"],
        ),
        ({}, ("DDIMScheduler", {"prediction_type": "v_prediction"}), ["'epsilon'", "DDIMScheduler", "'v_prediction'"]),
        ({}, ("EDMEulerScheduler", {}), ["EDMEulerScheduler", "EDM"]),
        (
            {"prediction_type": "flow_prediction"},
            ("DDIMScheduler", {}),
            ["'flow_prediction'", "DDIMScheduler", "'epsilon'"],
        ),
        (
            {"prediction_type": "flow_prediction"},
            ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}),
            ["UniPCMultistepScheduler", "use_flow_sigmas"],
        ),
        ({}, ("DDPMScheduler", {"variance_type": "learned_range"}), ["'learned_range'", "learn_sigma=False"]),
        (
            {"learn_sigma": True, "in_channels": 4},
            ("DPMSolverMultistepScheduler", {"variance_type": "learned_range"}),
            ["'learned_range'", "4 channels", "variance_type=None"],
        ),
    ],
)
def test_a_scheduler_that_does_not_fit_is_an_error_naming_both(denoiser, integrator, said):
    name, config = integrator
    integrator = getattr(diffusers, name)(**config)
    with pytest.raises(ValueError) as error:
        EdgeDiTPipeline(PointDenoiser(**denoiser), integrator)([1])
    assert all(words in str(error.value) for words in said), str(error.value)


# -------------------------------------------------------------------- calls


def test_output_types(pipeline):
    def generate(output_type, **kwargs):
        return pipeline([1, 2], generator=torch.Generator().manual_seed(0), output_type=output_type, **kwargs)

    tensor = generate("pt").images
    assert tensor.shape == (2, 1, 8, 8) and tensor.dtype == torch.float32
    assert 0 <= tensor.min() and tensor.max() <= 1 and tensor.std() > 0.01
    array = generate("np").images
    assert array.shape == (2, 8, 8, 1)
    np.testing.assert_array_equal(array[..., 0], tensor[:, 0].numpy())
    pictures = generate("pil", return_dict=False)[0]
    assert [(picture.mode, picture.size) for picture in pictures] == [("L", (8, 8))] * 2
    np.testing.assert_allclose(np.asarray(pictures[0]) / 255, array[0, ..., 0], atol=0.5 / 255 + 1e-6)
    torch.testing.assert_close((generate("latent").images / 2 + 0.5).clamp(0, 1), tensor)


def test_colour_images_and_other_sizes(make_transformer):
    pipeline = quiet(EdgeDiTPipeline(make_transformer(in_channels=3), scheduler("DDIMScheduler"), default_steps=2))
    picture = pipeline(3, height=12, width=6).images[0]
    assert picture.mode == "RGB" and picture.size == (6, 12)


def test_labels_by_number_and_by_name(pipeline):
    assert pipeline.get_label_ids(3) == [3]
    assert pipeline.get_label_ids("one") == [1]
    assert pipeline.get_label_ids(["nought", "zero, nought", "bird", 9, np.int64(4)]) == [0, 0, 3, 9, 4]
    assert pipeline.get_label_ids(torch.tensor([2, 5])) == [2, 5]
    assert pipeline.get_label_ids(torch.tensor(7)) == [7]
    latents = torch.randn(2, 1, 8, 8)
    by_name = pipeline(["two", "one"], latents=latents, output_type="pt").images
    torch.testing.assert_close(by_name, pipeline([2, 1], latents=latents, output_type="pt").images, rtol=0, atol=0)
    assert not torch.equal(by_name, pipeline([1, 2], latents=latents, output_type="pt").images)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"class_labels": 10}, ["10", "0 … 9"]),
        ({"class_labels": [0, -1]}, ["-1", "0 … 9"]),
        ({"class_labels": 1.5}, ["1.5", "0 … 9"]),
        ({"class_labels": torch.tensor([[1, 2]])}, ["0 … 9"]),
        ({"class_labels": "tow"}, ["'tow'", "'two'"]),
        ({"class_labels": "crane"}, ["'crane'", "[3, 4]"]),
        ({"class_labels": []}, ["empty"]),
        ({}, ["class_labels", "0 … 9"]),
        ({"class_labels": 1, "batch_size": 2}, ["batch_size=2"]),
        ({"class_labels": 1, "num_images_per_label": 0}, ["num_images_per_label is 0"]),
        ({"class_labels": 1, "num_inference_steps": 0}, ["num_inference_steps is 0"]),
        ({"class_labels": 1, "output_type": "jpg"}, ["'jpg'", "'pil'"]),
        ({"class_labels": 1, "height": 9}, ["height is 9", "multiple of 2"]),
        ({"class_labels": [1, 2], "latents": torch.zeros(1, 1, 8, 8)}, ["(1, 1, 8, 8)", "(2, 1, 8, 8)"]),
        ({"class_labels": [1, 2], "generator": [torch.Generator()]}, ["1 generators", "2 images"]),
        (
            {"class_labels": 1, "callback_on_step_end_tensor_inputs": ["pooled_prompt_embeds"]},
            ["pooled_prompt_embeds", "latents"],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_errors_that_quote_them(pipeline, arguments, said):
    with pytest.raises(ValueError) as error:
        pipeline(**arguments)
    assert all(words in str(error.value) for words in said), str(error.value)


def test_names_without_id2label_and_foreign_id2label_are_errors(make_transformer):
    with pytest.raises(ValueError, match="no id2label"):
        EdgeDiTPipeline(make_transformer(), scheduler("DDIMScheduler"))("two")
    with pytest.raises(ValueError, match="'12'.*0 … 9"):
        EdgeDiTPipeline(make_transformer(), scheduler("DDIMScheduler"), id2label={12: "dozen"})


def test_unconditional(make_transformer):
    pipeline = quiet(EdgeDiTPipeline(make_transformer(num_classes=0), scheduler("DDIMScheduler"), default_steps=2))
    assert len(pipeline(batch_size=3).images) == 3
    assert len(pipeline(num_images_per_label=2).images) == 2
    with pytest.raises(ValueError, match="unconditional.*class_labels=1"):
        pipeline(1)


def test_one_generator_an_image_makes_images_independent_of_their_batch(make_transformer):
    pipeline = quiet(EdgeDiTPipeline(make_transformer(), scheduler("DDPMScheduler"), default_steps=4))

    def generate(labels, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(labels, generator=generators, output_type="pt").images

    together = generate([1, 2, 3], [11, 12, 13])
    torch.testing.assert_close(together[1:2], generate([2], [12]), atol=1e-5, rtol=0)
    torch.testing.assert_close(together[2:], generate([3], [13]), atol=1e-5, rtol=0)


def test_num_images_per_label_repeats_every_label(pipeline):
    latents = torch.randn(4, 1, 8, 8)
    repeated = pipeline([4, 6], num_images_per_label=2, latents=latents, output_type="pt").images
    torch.testing.assert_close(repeated, pipeline([4, 4, 6, 6], latents=latents, output_type="pt").images)


def test_no_guidance_takes_one_pass_and_guidance_two_in_one_batch(pipeline):
    batches = []
    pipeline.transformer.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    pipeline([1, 2], guidance_scale=1.0)
    pipeline([1, 2], guidance_scale=3.0)
    assert batches == [2, 2, 2, 4, 4, 4]


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_modulations_of_the_schedule_change_nothing(pipeline, chunk, monkeypatch):
    def sample():
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            [3, 1, 3], guidance_scale=2.0, num_inference_steps=5, generator=generator, output_type="latent"
        ).images

    monkeypatch.setattr(type(pipeline.transformer), "modulation_steps", lambda self, labels: chunk)
    found = sample()
    monkeypatch.delattr(type(pipeline.transformer), "precompute_modulation")
    expected = sample()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_sampling_goes_on_without_the_modulation_weights(pipeline, tmp_path):
    def sample():
        return pipeline(
            [3, 1], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np"
        ).images

    expected = sample()
    pipeline.transformer.offload_modulation(tmp_path / "modulation.safetensors")
    np.testing.assert_allclose(sample(), expected, atol=1e-5)
    pipeline.transformer.restore_modulation()
    np.testing.assert_allclose(sample(), expected, atol=1e-5)


def test_only_the_chosen_channels_are_guided(make_transformer):
    def sample(channels):
        pipeline = quiet(
            EdgeDiTPipeline(transformer, scheduler("DDIMScheduler", clip_sample=False), guidance_channels=channels)
        )
        return pipeline([3], guidance_scale=3.0, num_inference_steps=1, latents=noise, output_type="latent").images

    transformer, noise = (
        make_transformer(in_channels=4),
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    everything, some, nothing = sample(None), sample(3), sample(0)
    assert torch.equal(some[:, :3], everything[:, :3]) and torch.equal(some[:, 3:], nothing[:, 3:])
    assert not torch.equal(everything[:, 3:], nothing[:, 3:])


def test_callback_sees_every_step_and_may_change_latents_or_stop(pipeline):
    seen = []

    def zero_then_stop(pipe, step, timestep, tensors):
        seen.append((step, int(timestep)))
        if step == 1:
            pipe._interrupt = True
            return {"latents": torch.zeros_like(tensors["latents"])}

    latents = pipeline(1, num_inference_steps=5, callback_on_step_end=zero_then_stop, output_type="latent").images
    assert seen == [(0, 800), (1, 600)] and not latents.any()


def test_bf16_model_keeps_float32_latents(pipeline):
    latents = torch.randn(1, 1, 8, 8)
    full = pipeline(1, latents=latents, guidance_scale=1.0, output_type="latent").images
    pipeline.to(torch.bfloat16)
    half = pipeline(1, latents=latents, guidance_scale=1.0, output_type="latent").images
    assert pipeline.transformer.dtype == torch.bfloat16 and half.dtype == torch.float32
    assert (half - full).norm() < 0.1 * full.norm()


# -------------------------------------------------------------------- VAE


@pytest.fixture(params=["kl", "tiny"])
def vae(request):
    torch.manual_seed(0)
    if request.param == "tiny":
        return diffusers.AutoencoderTiny(
            in_channels=3,
            out_channels=3,
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
            latent_channels=4,
            scaling_factor=0.7,
        )
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.1,
    )


def test_latent_space_decodes_and_survives_saving(vae, make_transformer, tmp_path):
    pipeline = quiet(
        EdgeDiTPipeline(make_transformer(in_channels=4), scheduler("DDIMScheduler"), vae=vae, default_steps=2)
    )
    assert pipeline.vae_scale_factor == 4
    noise = torch.randn(1, 4, 8, 8)
    latents = pipeline(1, latents=noise, output_type="latent").images
    images = pipeline(1, latents=noise, output_type="pt").images
    assert images.shape == (1, 3, 32, 32) and pipeline(1, height=16).images[0].size == (32, 16)
    with torch.no_grad():
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        decoded = vae.decode(latents / vae.config.scaling_factor + shift).sample
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert type(loaded.vae) is type(vae)
    torch.testing.assert_close(loaded(1, latents=noise, output_type="pt").images, images, rtol=0, atol=0)


# -------------------------------------------------------------------- saving


def test_saves_and_loads_with_everything(pipeline, tmp_path):
    latents = torch.randn(2, 1, 8, 8)
    before = pipeline([1, 2], latents=latents, output_type="pt").images
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "EdgeDiTPipeline"
    assert index["transformer"] == ["edgedit_hf", "EdgeDiTTransformer2DModel"]
    assert not list(tmp_path.rglob("*.py"))
    loaded = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert type(loaded) is EdgeDiTPipeline and loaded.vae is None
    assert loaded.config.id2label == NAMES and loaded.config.default_steps == 3
    torch.testing.assert_close(loaded(["one", "two"], latents=latents, output_type="pt").images, before, rtol=0, atol=0)


def test_components_and_settings_can_be_passed_when_loading(pipeline, make_transformer, tmp_path):
    pipeline.save_pretrained(tmp_path)
    other = make_transformer(seed=1)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, transformer=other, default_steps=7)
    assert loaded.transformer is other and loaded.config.default_steps == 7


def test_variants_share_a_folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    pipeline.to(torch.bfloat16).save_pretrained(tmp_path, variant="bf16")
    loaded = EdgeDiTPipeline.from_pretrained(tmp_path, variant="bf16", torch_dtype=torch.bfloat16)
    assert loaded.transformer.dtype == torch.bfloat16
    assert EdgeDiTPipeline.from_pretrained(tmp_path).transformer.dtype == torch.float32


def test_bundled_code_loads_only_with_trust_and_saves_again(pipeline, tmp_path):
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    latents = torch.randn(1, 1, 8, 8)
    before = pipeline("one", latents=latents, output_type="pt").images
    pipeline.save_pretrained(first, bundle_code=True)
    index = json.loads((first / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_edgedit", "EdgeDiTPipeline"]
    assert index["transformer"] == ["transformer_edgedit", "EdgeDiTTransformer2DModel"]
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        diffusers.DiffusionPipeline.from_pretrained(first)
    loaded = quiet(diffusers.DiffusionPipeline.from_pretrained(first, trust_remote_code=True))
    torch.testing.assert_close(loaded("one", latents=latents, output_type="pt").images, before, rtol=0, atol=0)

    loaded.save_pretrained(second)  # its code came from a folder, so the code goes along
    again = quiet(diffusers.DiffusionPipeline.from_pretrained(second, trust_remote_code=True))
    torch.testing.assert_close(again("one", latents=latents, output_type="pt").images, before, rtol=0, atol=0)
    for name in ("pipeline_edgedit.py", "transformer/transformer_edgedit.py"):
        assert (second / name).read_bytes() == (first / name).read_bytes()
    with pytest.raises(ValueError, match="save first"):
        loaded.save_pretrained(third, push_to_hub=True)
    assert not third.exists()


def test_code_that_is_not_self_contained_is_not_bundled(tmp_path):
    pipeline = EdgeDiTPipeline(PointDenoiser(), scheduler("DDIMScheduler"))
    with pytest.raises(ValueError, match="PointDenoiser is not self-contained"):
        pipeline.save_pretrained(tmp_path / "bundle", bundle_code=True)
