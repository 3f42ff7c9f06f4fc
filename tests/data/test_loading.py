"""The data of a run: the training set is images or cached latents."""

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
)

from edgedit_hf.data.loading import load_run_images, load_training_set
from edgedit_hf.run.config import RunConfig, load_config
from edgedit_hf.run.launch import make_accelerator


def configured(folder, *overrides: str) -> RunConfig:
    (folder / "recipe.yaml").touch()
    return load_config(folder / "recipe.yaml", [f"output_dir={folder / 'run'}", *overrides])


@pytest.fixture(scope="module")
def images():
    return load_run_images(RunConfig())


@pytest.fixture(scope="module")
def tiny_vae():
    torch.manual_seed(0)
    channels = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(in_channels=1, out_channels=1, latent_channels=2, **channels, **blocks).eval()


def test_the_training_set_is_images_or_cached_latents(images, tiny_vae, tmp_path):
    accelerator = make_accelerator(configured(tmp_path, "threads=0"))
    pixels, vae = load_training_set(configured(tmp_path), accelerator)
    assert (
        vae is None
        and pixels.shape == (1, 8, 8)
        and pixels.fingerprint == images.fingerprint
        and pixels.num_classes == 10
    )

    tiny_vae.save_pretrained(tmp_path / "vae")
    config = configured(tmp_path, f"data.vae={tmp_path / 'vae'}")
    latents, vae = load_training_set(config, accelerator)
    assert isinstance(vae, AutoencoderTiny) and not any(p.requires_grad for p in vae.parameters())
    assert latents.shape == (2, 4, 4) and len(latents) == len(images) and latents.num_classes == 10
    batch = images.batch([0, 5])
    with torch.no_grad():
        expected = tiny_vae.encode(batch["images"]).latents * tiny_vae.config.scaling_factor
    torch.testing.assert_close(latents.batch([0, 5])["images"], expected, rtol=0, atol=1e-4)
    again, _ = load_training_set(config, accelerator)
    assert again.fingerprint == latents.fingerprint != images.fingerprint
