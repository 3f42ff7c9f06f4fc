"""The latent cache: what the autoencoder says, continued after a kill, refused where it does not fit."""

import multiprocessing
import shutil
import time

import pytest
import torch
from pictures import everything

from edgedit_hf.data.batches import caption_loader, step_loader
from edgedit_hf.data.captions import (
    cache_captioned_latents,
    open_captioned_latents,
)
from edgedit_hf.data.images import load_images
from edgedit_hf.data.latents import cache_latents, open_latents
from edgedit_hf.errors import EdgeDiTError


def tiny_vae(seed: int = 0, kind: str = "tiny"):
    from diffusers import AutoencoderKL, AutoencoderTiny

    torch.manual_seed(seed)
    if kind == "kl":
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        sizes = {"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16}
        return AutoencoderKL(**blocks, **sizes, scaling_factor=0.5, shift_factor=0.1).eval()
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(**sizes, **blocks, latent_channels=4, upsampling_scaling_factor=2).eval()


@pytest.fixture(scope="module")
def colour_digits():
    return load_images(resolution=16, channels=3).subset(range(150))


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_latents_are_what_the_vae_says(tmp_path, colour_digits, kind, monkeypatch):
    vae = tiny_vae(kind=kind)
    latents = cache_latents(colour_digits, vae, tmp_path, batch_size=2, progress=False)
    assert len(latents) == 150 and latents.shape == (4, 8, 8)
    assert latents.num_classes == 10 and torch.equal(latents.labels, colour_digits.labels)
    order = [149, 3, 70, -1]
    images = colour_digits.batch(order)["images"]
    with torch.no_grad():
        encoded = vae.encode(images)
    wanted = encoded.latents if kind == "tiny" else (encoded.latent_dist.mode() - 0.1) * 0.5
    batch = latents.batch(order)
    assert torch.allclose(batch["images"], wanted, atol=1e-5) and batch["labels"].dtype == torch.int64
    monkeypatch.setattr("edgedit_hf.data.latents.IN_MEMORY_BYTES", 100)
    big = open_latents(tmp_path)
    assert big._memory is None and torch.equal(big.batch(order)["images"], batch["images"])
    for _, _, part in step_loader(big, 8, 0, 0, 2, num_workers=1):
        assert part["images"].shape == (8, 4, 8, 8)
    with pytest.raises(IndexError):
        big.batch([150])


def test_latents_of_the_vaes_of_sana_and_qwen_image(tmp_path, colour_digits):
    from flow_pipelines import qwen_image, sana

    few = colour_digits.subset(range(3))
    images = few.batch(range(3))["images"]
    for name, vae in (("sana", sana().vae.eval()), ("qwen", qwen_image().vae.eval())):
        batch = cache_latents(few, vae, tmp_path / name, progress=False).batch(range(3))["images"]
        with torch.no_grad():
            if name == "sana":
                wanted = vae.encode(images).latent * 0.4
            else:  # as the pipeline undoes it: latents · std + mean
                wanted = (vae.encode(images.unsqueeze(2)).latent_dist.mode()[:, :, 0] - 0.1) / 0.9
        assert batch.shape == (3, 4, 8, 8) and torch.allclose(batch, wanted, atol=1e-5)


def test_latent_cache_of_other_data_or_another_vae(tmp_path, colour_digits):
    few = colour_digits.subset(range(4))
    made = cache_latents(few, tiny_vae(), tmp_path, progress=False)
    assert open_latents(tmp_path).fingerprint == made.fingerprint
    others = colour_digits.subset(range(4, 8))
    with pytest.raises(
        EdgeDiTError, match=f"made from the dataset {few.fingerprint}.*the dataset {others.fingerprint}"
    ):
        cache_latents(others, tiny_vae(), tmp_path, progress=False)
    with pytest.raises(EdgeDiTError, match="made from the vae [0-9a-f]{16}, but this run has the vae [0-9a-f]{16}"):
        cache_latents(few, tiny_vae(seed=1), tmp_path, progress=False)


def test_latent_cache_refuses_what_does_not_fit(tmp_path, colour_digits):
    with pytest.raises(EdgeDiTError, match="images have 1 channels, but the VAE takes 3"):
        cache_latents(load_images(), tiny_vae(), tmp_path, progress=False)
    odd = load_images(resolution=15, channels=3).subset([0])
    with pytest.raises(EdgeDiTError, match=r"images of \(15, 15\) into latents of \(8, 8\)"):
        cache_latents(odd, tiny_vae(), tmp_path, progress=False)
    broken = tiny_vae()
    with torch.no_grad():
        next(broken.encoder.parameters()).fill_(torch.nan)
    with pytest.raises(EdgeDiTError, match="NaN or infinite"):
        cache_latents(colour_digits, broken, tmp_path, progress=False)
    assert not (tmp_path / "index.json").exists()
    with pytest.raises(EdgeDiTError, match="index.json does not exist"):
        open_latents(tmp_path)


def test_damaged_and_foreign_latent_caches(tmp_path, colour_digits):
    cache_latents(colour_digits, tiny_vae(), tmp_path, batch_size=2, progress=False)
    part = tmp_path / "shard-00001" / "latents.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(EdgeDiTError, match="shard-00001/latents.safetensors is damaged.*delete"):
        open_latents(tmp_path)
    shutil.rmtree(part.parent)
    with pytest.raises(EdgeDiTError, match="unfinished: 1 of 3 parts are missing"):
        open_latents(tmp_path)
    cache_latents(colour_digits, tiny_vae(), tmp_path, batch_size=2, progress=False)
    assert len(open_latents(tmp_path)) == 150
    (tmp_path / "index.json").write_text('{"format": 9}')
    with pytest.raises(EdgeDiTError, match="does not describe a latent cache"):
        open_latents(tmp_path)


def _encode_in_child(images, vae, folder):
    torch.set_num_threads(1)
    cache_latents(images, vae, folder, batch_size=1, progress=False)


def test_latent_cache_continues_after_a_kill(tmp_path):
    images, vae = load_images(resolution=16, channels=3).subset(range(500)), tiny_vae()
    cache, second = tmp_path / "cache", tmp_path / "cache" / "shard-00001"
    child = multiprocessing.get_context("fork").Process(target=_encode_in_child, args=(images, vae, cache))
    child.start()
    while child.is_alive() and not second.exists():
        time.sleep(0.005)
    child.kill()
    child.join()
    written = {path: path.stat().st_mtime_ns for path in cache.glob("shard-*/*")}
    assert len(written) >= 2
    resumed = cache_latents(images, vae, cache, batch_size=1, progress=False)
    assert all(path.stat().st_mtime_ns == at for path, at in written.items())
    assert sorted(path.name for path in cache.iterdir()) == ["index.json", *[f"shard-{i:05d}" for i in range(16)]]
    whole = cache_latents(images, vae, tmp_path / "whole", batch_size=1, progress=False)
    assert torch.allclose(everything(resumed)["images"], everything(whole)["images"], atol=1e-6)
    assert torch.equal(resumed.labels, images.labels)


@pytest.fixture(scope="module")
def vae():
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    blocks = {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    }
    return AutoencoderTiny(latent_channels=4, **blocks).eval().requires_grad_(False)


def test_cached_latents_of_buckets(bucketed, vae, tmp_path):
    with pytest.raises(EdgeDiTError, match="does not exist"):
        open_captioned_latents(bucketed, tmp_path / "latents")
    latents = cache_captioned_latents(bucketed, vae, tmp_path / "latents", batch_size=2)
    assert latents.captions == bucketed.captions and torch.equal(latents.bucket_of, bucketed.bucket_of)
    assert latents.shapes == [(4, 16, 16), (4, 8, 24), (4, 24, 8)] and latents.fingerprint != bucketed.fingerprint
    for rows in ([0, 6], [4], [8, 2]):
        wanted = vae.encode(bucketed.batch(rows)["images"]).latents * vae.config.scaling_factor
        torch.testing.assert_close(latents.batch(rows)["images"], wanted)
    shutil.rmtree(tmp_path / "latents" / "bucket-1" / "shard-00000")  # as a killed run leaves it
    again = cache_captioned_latents(bucketed, vae, tmp_path / "latents", batch_size=2)
    assert again.fingerprint == latents.fingerprint
    streams = zip(caption_loader(latents, 2, 0, 0, 6), caption_loader(bucketed, 2, 0, 0, 6))
    assert all(torch.equal(a[2]["rows"], b[2]["rows"]) for a, b in streams)
