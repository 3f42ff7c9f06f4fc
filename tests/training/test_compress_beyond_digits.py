"""The recipes beyond digits: valid, affordable, and whole loops on images of their kind at the smallest scale."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from PIL import Image

from edgedit_hf.estimate import estimate
from edgedit_hf.preflight import preflight
from edgedit_hf.run.config import load_config
from edgedit_hf.run.cost import Machine
from edgedit_hf.run.stage import EDGEDIT

SETS = {"fashion": ("L", 28, 10), "emoji": ("RGBA", 160, 8)}
"""What stands for the images of a recipe: their mode, side and number of classes."""
CORES = Machine("two cores", 1, 45e9, 45e9, 50e9, 5e9)  # of which the recipes say that two hours are enough
DECODE_FLOPS = 8.8e9  # of TAESD, an image of 128 × 128; the tests' autoencoder is smaller


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """`images("fashion")`: overrides that name synthetic images of a recipe's kind, as class folders, and an
    autoencoder if it works in latents.
    """
    made = {}

    def make(recipe: str) -> list[str]:
        if recipe in made:
            return made[recipe]
        folder, rng = tmp_path_factory.mktemp(recipe), np.random.default_rng(0)
        mode, side, classes = SETS[recipe]
        for number in range(12 * classes):
            at = folder / "images" / f"class {number % classes}"
            at.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 255, (4, 4, len(mode)), dtype=np.uint8)
            picture = Image.fromarray(coarse.squeeze(), mode)
            picture.resize((side, side), Image.Resampling.BICUBIC).save(at / f"{number}.png")
        made[recipe] = [f"data.source={folder / 'images'}"]
        if recipe == "emoji":
            torch.manual_seed(0)
            blocks = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
            vae = AutoencoderTiny(**blocks, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4, latent_channels=4)
            vae.save_pretrained(folder / "vae")
            made[recipe].append(f"data.vae={folder / 'vae'}")
        return made[recipe]

    return make


@pytest.mark.parametrize("recipe", SETS)
def test_a_recipe_is_sound_and_takes_two_hours_of_two_cores(repository, images, tmp_path, recipe):
    path = repository / "training" / "recipes" / f"{recipe}.yaml"
    config = load_config(path, [f"output_dir={tmp_path / 'run'}", *images(recipe)])
    assert preflight(config, EDGEDIT, dry_run=True) == []
    rows = estimate(config, CORES)
    assert [row.stage for row in rows] == [stage.name for stage in EDGEDIT]  # few steps and four bits among them
    decoded = 13 * config.evaluate.samples * (recipe == "emoji")
    assert sum(row.seconds for row in rows) + decoded * DECODE_FLOPS / CORES.conv_flops < 2 * 3600
    assert config.tune.steps * 4 == config.teacher.steps and config.tune.batch_size == config.teacher.batch_size
    assert config.tune.random_proxies and config.tune.teacher_more_steps and config.evaluate.exports
    assert any(choice.get("merge") == 3 for choice in config.bank.menu)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SETS)
def test_the_whole_loop_at_its_smallest(recipes, images, tmp_path, recipe):
    small = [
        *recipes.tiny,
        *("teacher.num_layers=3", "teacher.patch_size=4", "bank.menu=[{mlp_ratio: 2}, {merge: 2}, {merge: 3}]"),
        *("few_step.steps=2", "few_step.batch_size=8", "few_step.samples=16", "few_step.evaluate_every=1"),
        *("few_step.mean_drift=100", "few_step.std_drift=100", "few_step.knowledge_steps=1"),
        *("quantize.calibration_images=2", "quantize.sensitivity_images=1", "quantize.samples=8", "quantize.steps=2"),
        *("quantize.batch_size=4", "quantize.sampling_batch_size=4", "export.tolerance=0.3"),
    ]
    recipes.run("compress", tmp_path, *small, *images(recipe), config=f"{recipe}.yaml")
    report = json.loads((tmp_path / "report.json").read_text())
    assert {model["name"] for model in report["models"]} == {
        *("teacher", "teacher-more-steps", "student", "student-random-proxies", "student-tuned"),
        *("student-tuned-few-steps", "few-step", "quantized", "onnx-int8"),
        *(["onnx-fp32"] if recipe == "fashion" else []),
    }
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "quantized")
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline([0, 1], output_type="np").images
    side, channels = (28, 1) if recipe == "fashion" else (128, 3)
    assert pictures.shape == (2, side, side, channels) and np.isfinite(pictures).all()
