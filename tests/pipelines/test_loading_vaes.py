"""Every VAE class that the package takes: what training encodes, both pipelines, the port contract and teachers agree
on the latents' scale.
"""

import functools

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from flow_pipelines import sana

from edgedit_hf import EdgeDiTPipeline, EdgeDiTTransformer2DModel, ElasticDiTPipeline, ElasticDiTTransformer2DModel
from edgedit_hf.data import latents
from edgedit_hf.data.datasets import ImageDataset, to_bytes
from edgedit_hf.data.latents import cache_latents
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.elastic.flow_teacher import latent_space
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.contract import _to_decoder
from edgedit_hf.export.parts import vae_parts
from edgedit_hf.pipelines.call import postprocess
from edgedit_hf.pipelines.loading import TEXT_TO_IMAGE_VAES, VAES

STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.0, 1.5, 2.0]}


def kl(**options):
    return diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=1,
        **options,
    )


def tiny(**options):
    blocks = {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    }
    return diffusers.AutoencoderTiny(latent_channels=4, **blocks, **options)


def qwen(**options):
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], **options
    )


def dc(**options):
    vae = sana().vae
    vae.register_to_config(**options)
    return vae


# Class → its tiny instances: every number that its config can scale latents by, and what diffusers' pipelines make of
# them (x · multiply + add).
MAKERS = {
    "AutoencoderKL": [
        (lambda: kl(), 1 / 0.18215, 0.0),
        (lambda: kl(scaling_factor=0.5, shift_factor=0.1), 2.0, 0.1),
        (
            lambda: kl(scaling_factor=0.5, **STATISTICS),
            [1.0, 2.0, 3.0, 4.0],
            [0.1, -0.2, 0.3, 0.0],
        ),  # StableDiffusionXLPipeline
        (lambda: kl(scaling_factor=0.5, shift_factor=0.7, **STATISTICS), [1.0, 2.0, 3.0, 4.0], [0.1, -0.2, 0.3, 0.0]),
        (lambda: kl(scaling_factor=0.5, latents_mean=STATISTICS["latents_mean"]), 2.0, 0.0),  # both, or none
    ],
    "AutoencoderTiny": [(lambda: tiny(), 1.0, 0.0), (lambda: tiny(scaling_factor=0.7, shift_factor=0.2), 1 / 0.7, 0.2)],
    "AutoencoderDC": [(lambda: dc(scaling_factor=0.4), 2.5, 0.0)],
    "AutoencoderKLQwenImage": [
        (lambda: qwen(**STATISTICS), [0.5, 1.0, 1.5, 2.0], [0.1, -0.2, 0.3, 0.0])
    ],  # QwenImagePipeline
}
CASES = [pytest.param(*case, id=f"{name}-{i}") for name, cases in MAKERS.items() for i, case in enumerate(cases)]


def build(maker):
    torch.manual_seed(0)
    return maker().eval().requires_grad_(False)


def own_latents(vae, images):
    """What the VAE itself encodes and decodes, by its documented calls alone."""
    if type(vae).__name__ == "AutoencoderKLQwenImage":
        return vae.encode(images[:, :, None]).latent_dist.mode()[:, :, 0]
    encoded = vae.encode(images)
    return (
        encoded.latent_dist.mode()
        if hasattr(encoded, "latent_dist")
        else encoded.latents
        if hasattr(encoded, "latents")
        else encoded.latent
    )


def own_image(vae, z):
    return (
        vae.decode(z[:, :, None]).sample[:, :, 0]
        if type(vae).__name__ == "AutoencoderKLQwenImage"
        else vae.decode(z).sample
    )


def pipelines(vae):
    edgedit = EdgeDiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=2, num_attention_heads=2, num_classes=0
    )
    elastic = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug", in_channels=4, text_dims=[16])
    flow = make_scheduler("flow_prediction")
    return EdgeDiTPipeline(edgedit, make_scheduler("epsilon"), vae), ElasticDiTPipeline(elastic, flow, vae)


def test_every_class_is_tried():
    assert set(MAKERS) == set(TEXT_TO_IMAGE_VAES) and set(VAES) <= set(MAKERS)


@torch.no_grad()
@pytest.mark.parametrize(("maker", "multiply", "add"), CASES)
def test_training_pipelines_and_contract_share_one_scale(tmp_path, maker, multiply, add):
    vae = build(maker)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    dataset = ImageDataset(pixels)
    images = dataset.batch(range(3))["images"]
    multiply, add = (torch.tensor(value, dtype=torch.float32).reshape(1, -1, 1, 1) for value in (multiply, add))
    z = own_latents(vae, images)
    wanted = own_image(vae, z)

    x = cache_latents(dataset, vae, tmp_path / "latents", progress=False).batch(range(3))[
        "images"
    ]  # what is trained on
    torch.testing.assert_close(x * multiply + add, z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(latents.encode(vae, images), x, rtol=0, atol=0)
    torch.testing.assert_close(latents.decode(vae, x), wanted, rtol=1e-4, atol=1e-4)

    for pipeline in pipelines(vae):
        assert pipeline.vae_scale_factor == 2
        decoded = pipeline.decode(x)
        torch.testing.assert_close(decoded, VaeImageProcessor.denormalize(wanted), rtol=1e-4, atol=1e-4)
        numbers = _to_decoder(pipeline)
        scale = {
            name: np.float32(numbers[name]).reshape(1, -1, 1, 1) for name in ("multiply", "add")
        }  # as sample_min.py does
        np.testing.assert_allclose(x.numpy() * scale["multiply"] + scale["add"], z, rtol=1e-5, atol=1e-5)
    decoder, encoder = vae_parts(vae, (8, 8), 2, 4, batch=1)
    torch.testing.assert_close(
        decoder.module(torch.from_numpy(x.numpy() * scale["multiply"] + scale["add"])), wanted, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(encoder.module(images), z, rtol=0, atol=0)
    space = latent_space(vae.config, 3)
    assert space[:2] == (4, 2) and space[2:] == latents.latent_scale(vae.config)


@torch.no_grad()
def test_the_scales_are_those_of_diffusers_own_pipelines(monkeypatch):
    from flow_pipelines import qwen_image

    seen = []
    for pipeline in (qwen_image(), sana()):
        vae = pipeline.vae.eval()
        decode = type(vae).decode
        monkeypatch.setattr(
            type(vae), "decode", lambda self, z, decode=decode, **options: seen.append(z) or decode(self, z, **options)
        )
        given = {
            "prompt": "a cat",
            "height": 32,
            "width": 32,
            "num_inference_steps": 1,
            "generator": torch.Generator().manual_seed(0),
        }
        options = {"use_resolution_binning": False} if type(vae).__name__ == "AutoencoderDC" else {}
        x = pipeline(**given, **options, output_type="latent").images
        given["generator"] = torch.Generator().manual_seed(0)
        pipeline(**given, **options, output_type="np")
        if type(vae).__name__ == "AutoencoderKLQwenImage":
            x = pipeline._unpack_latents(x, 32, 32, pipeline.vae_scale_factor)
        torch.testing.assert_close(latents.unscaled(x, vae.config), seen.pop(), rtol=1e-5, atol=1e-5)


def test_numbers_that_do_not_fit_are_an_error():
    for options, said in (
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "3 latents_mean .* 4 channels"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 3}, "latents_mean"),
    ):
        vae, x = build(lambda options=options: kl(**options)), torch.zeros(1, 4, 8, 8)
        for decode in (functools.partial(latents.decode, vae), *(pipeline.decode for pipeline in pipelines(vae))):
            with pytest.raises(ValueError, match=said):
                decode(x)
    with pytest.raises(EdgeDiTError, match=r"latents_std \[1.0, 0.0\]; it needs a number and a positive one a channel"):
        latents.latent_scale({"latents_mean": [0, 0], "latents_std": [1, 0]})
    with pytest.raises(EdgeDiTError, match="scaling_factor inf"):
        latents.latent_scale({"scaling_factor": float("inf")})


def test_images_become_bytes_as_in_diffusers():
    # Every byte's own value, the ties between two, and what is beyond the range.
    values = torch.cat([torch.linspace(-1, 1, 511), torch.linspace(-1.2, 1.2, 4097)]).view(1, 1, 64, 72)
    wanted = np.asarray(VaeImageProcessor().postprocess(values, "pil")[0])
    assert np.array_equal(to_bytes(values)[0, 0].numpy(), wanted)
    unit = VaeImageProcessor.denormalize(values)
    assert np.array_equal(np.asarray(postprocess(unit, "pil")[0]), wanted)
    without = EdgeDiTPipeline(None, None), ElasticDiTPipeline(None, None)
    for pipeline in without:
        assert torch.equal(pipeline.decode(values), unit)
    assert np.array_equal(
        np.round(np.clip(values.numpy() / 2 + 0.5, 0, 1) * 255).astype(np.uint8)[0, 0], wanted
    )  # sample_min.py
    colours = torch.rand(2, 3, 4, 5) * 2 - 1
    for kind in ("np", "pt"):
        found = postprocess(VaeImageProcessor.denormalize(colours), kind)
        assert np.array_equal(found, VaeImageProcessor().postprocess(colours, kind))
    # And back: what the pipelines write is what training reads.
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    assert np.array_equal(to_bytes(ImageDataset(pixels).batch([0])["images"]).numpy(), pixels)
