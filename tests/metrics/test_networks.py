"""Extractors around other people's networks: what they make of images, against Pillow and the models themselves."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
import vision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.metrics import (
    InceptionExtractor,
    ModuleExtractor,
    TransformersExtractor,
    open_extractor,
    train_classifier,
)
from edgedit_hf.metrics.networks import INCEPTION_FILE, Preprocessing


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    return vision.dinov2(tmp_path_factory.mktemp("dinov2-tiny"))


@pytest.fixture
def images():
    """Bytes `(3, 40, 52, 3)` of smooth pictures, and the same in [-1, 1]."""
    coarse = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
    pixels = np.stack([Image.fromarray(one).resize((52, 40), Image.Resampling.BICUBIC) for one in coarse])
    return pixels, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def by_pillow(pixels: np.ndarray) -> torch.Tensor:
    """Shortest edge to 32, the middle 28 × 28, normalised as ImageNet is."""
    found = []
    for one in pixels:
        image = Image.fromarray(one).resize((int(32 * 52 / 40), 32), Image.Resampling.BICUBIC)
        left, top = (image.width - 28) // 2, (image.height - 28) // 2
        values = np.asarray(image.crop((left, top, left + 28, top + 28))) / 255
        found.append((values - vision.IMAGENET["image_mean"]) / vision.IMAGENET["image_std"])
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float()


def test_images_are_prepared_as_pillow_would(dinov2, images):
    pixels, tensors = images
    found = Preprocessing(dinov2)(tensors)
    assert found.shape == (3, 3, 28, 28)
    torch.testing.assert_close(found, by_pillow(pixels), atol=3 / 255 / 0.22, rtol=0)  # Pillow rounds to bytes


def test_dinov2_gives_its_class_token(dinov2, images):
    from transformers import AutoModel

    extractor = TransformersExtractor(dinov2)
    assert (extractor.name, extractor.width) == (dinov2.name, 16)
    features = extractor.features(images[1], batch_size=2)
    model = AutoModel.from_pretrained(dinov2).eval()
    with torch.no_grad():
        wanted = model(pixel_values=Preprocessing(dinov2)(images[1])).last_hidden_state[:, 0]
    torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-5)
    assert features.dtype == torch.float32 and features.std(0).min() > 0


def test_a_grey_image_is_one_of_three_equal_channels(dinov2, images):
    grey, extractor = images[1][:, :1], TransformersExtractor(dinov2)
    torch.testing.assert_close(extractor.features(grey), extractor.features(grey.repeat(1, 3, 1, 1)))


def test_convolutional_networks_and_clip(tmp_path, images):
    (tmp_path / "resnet").mkdir()
    (tmp_path / "clip").mkdir()
    resnet, clip = (TransformersExtractor(make(tmp_path / make.__name__)) for make in (vision.resnet, vision.clip))
    assert (resnet.width, clip.width) == (12, 8)
    from transformers import CLIPModel, ResNetModel

    with torch.no_grad():
        pixels = Preprocessing(tmp_path / "resnet")(images[1])
        wanted = ResNetModel.from_pretrained(tmp_path / "resnet").eval()(pixels).pooler_output[:, :, 0, 0]
        torch.testing.assert_close(resnet.features(images[1]), wanted, rtol=1e-4, atol=1e-5)
        model = CLIPModel.from_pretrained(tmp_path / "clip").eval()
        states = model.vision_model(pixel_values=Preprocessing(tmp_path / "clip")(images[1])).pooler_output
        wanted = states @ model.visual_projection.weight.T
        torch.testing.assert_close(clip.features(images[1]), wanted, rtol=1e-4, atol=1e-5)


def test_the_hash_is_of_weights_and_preparation(dinov2, tmp_path):
    hashed = TransformersExtractor(dinov2).hash
    same = shutil.copytree(dinov2, tmp_path / "same")
    assert TransformersExtractor(same).hash == hashed
    vision.with_processor(same, resample=2)
    assert TransformersExtractor(same).hash != hashed
    weights = load_file(dinov2 / "model.safetensors")
    next(iter(weights.values())).add_(1e-3)
    changed = shutil.copytree(dinov2, tmp_path / "changed")
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    assert TransformersExtractor(changed).hash != hashed


def test_the_hash_is_of_what_the_config_says_too(dinov2, tmp_path):
    """Not of where it came from and what wrote it."""
    found = {}
    changes = {"same": {"_name_or_path": "elsewhere", "transformers_version": "4.0"}, "other": {"hidden_act": "relu"}}
    for name, change in changes.items():
        folder = shutil.copytree(dinov2, tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        found[name] = TransformersExtractor(folder)
    assert found["same"].hash == TransformersExtractor(dinov2).hash != found["other"].hash


def test_a_folder_named_inception_is_not_taken_for_adms(dinov2, tmp_path):
    folder = shutil.copytree(dinov2, tmp_path / "inception")
    assert open_extractor(str(folder)).name == "inception-transformers"


@pytest.mark.slow
def test_a_hub_name_is_found_in_the_cache(dinov2, make_hub_cache, run_python):
    cache = make_hub_cache(dinov2, "facebook/dinov2-small")
    code = """
from edgedit_hf.metrics import open_extractor
extractor = open_extractor("facebook/dinov2-small")
print(extractor.name, extractor.hash)
"""
    printed = run_python(code, env={"HF_HUB_CACHE": str(cache)}, quiet=True)
    assert printed.split() == ["dinov2-small", TransformersExtractor(dinov2).hash]


def test_what_is_no_vision_model_is_refused(dinov2, tmp_path):
    with pytest.raises(EdgeDiTError, match=r"There is no model in .*nothing"):
        open_extractor(str(tmp_path / "nothing"))
    damaged = shutil.copytree(dinov2, tmp_path / "damaged")
    weights = load_file(dinov2 / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EdgeDiTError, match="lack 1 that its config asks for, such as 'layernorm.weight'"):
        TransformersExtractor(damaged)
    others = ({"do_flip_channel_order": True}, {"do_rescale": False}, {"include_top": True}, {"do_pad": True})
    for changed in ({"crop_pct": 0.875}, {"rescale_factor": 1}, {"resample": 5}, {"size": {}}, *others):
        vision.with_processor(shutil.copytree(dinov2, tmp_path / "other", dirs_exist_ok=True), **changed)
        with pytest.raises(EdgeDiTError, match="describes no image processor that is known here"):
            TransformersExtractor(tmp_path / "other")
    (tmp_path / "other" / "preprocessor_config.json").unlink()
    with pytest.raises(EdgeDiTError, match=r"preprocessor_config.json does not exist"):
        TransformersExtractor(tmp_path / "other")
    config = json.loads((dinov2 / "config.json").read_text())
    coded = shutil.copytree(dinov2, tmp_path / "coded")
    config |= {"model_type": "of-its-own", "auto_map": {"AutoModel": "own.Model", "AutoConfig": "own.Config"}}
    (coded / "config.json").write_text(json.dumps(config))
    (coded / "own.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(EdgeDiTError, match="cannot be loaded"):
        TransformersExtractor(coded)


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images):
        return self.scale * images.mean((2, 3))


def test_any_module(images):
    extractor = ModuleExtractor(Mean(), "mean", 3)
    torch.testing.assert_close(extractor.features(images[1], batch_size=2), 2 * images[1].mean((2, 3)))
    assert extractor.hash == ModuleExtractor(Mean(), "other", 3).hash
    assert extractor.hash != ModuleExtractor(Mean(), "mean", 3, settings={"size": 8}).hash
    with pytest.raises(EdgeDiTError, match=r"gave features of shape \(3, 3\) for 3 images; expected \(3, 4\)"):
        ModuleExtractor(Mean(), "mean", 4).features(images[1])
    with pytest.raises(EdgeDiTError, match="1 of 3 images hold NaN"):
        extractor.features(torch.where(torch.arange(3)[:, None, None, None] == 1, torch.nan, images[1]))


def test_a_classifier_is_opened_by_its_folder(tmp_path):
    from edgedit_hf.data.images import load_images

    trained = train_classifier(load_images(), steps=2)
    trained.save(tmp_path / "extractor")
    opened = open_extractor(str(tmp_path / "extractor"))
    assert (opened.name, opened.hash, opened.width) == ("digits-cnn", trained.hash, 64)


def test_inception_without_its_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(EdgeDiTError, match=f"{INCEPTION_FILE} do not exist. Download https://"):
        open_extractor("inception")
    wrong = tmp_path / "hub" / "checkpoints" / INCEPTION_FILE
    wrong.parent.mkdir(parents=True)
    wrong.write_bytes(b"something else")
    with pytest.raises(EdgeDiTError, match=f"SHA-256 {hashlib.sha256(b'something else').hexdigest()[:16]}…"):
        InceptionExtractor()
