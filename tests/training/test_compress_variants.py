"""The same recipes on other data and parametrisations: unlabelled photos in latent space, learned variance, the paper's
two stages.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from edgedit_hf.quantization.inputs import transformer_bytes


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 unlabelled RGB images of 32 × 32 and a tiny autoencoder that makes 4 × 8 × 8 latents of them."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(24):
        coarse = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(folder / "images" / f"{i:02d}.png")
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    )
    vae.save_pretrained(folder / "vae")
    return folder


def latent_overrides(recipes, photos) -> list[str]:
    return [
        *recipes.tiny,
        f"data.source={photos / 'images'}",
        f"data.vae={photos / 'vae'}",
        "teacher.prediction_type=flow_prediction",
        "search.samples=12",
    ]


def test_unconditional_flow_matching_in_latent_space(recipes, photos, tmp_path):
    recipes.run("train_teacher", tmp_path, *latent_overrides(recipes, photos))
    import edgedit_hf  # noqa: F401

    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "teacher")
    assert pipeline.transformer.config.num_classes == 0 and pipeline.transformer.config.in_channels == 4
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" and pipeline.vae is not None
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 32, 32, 3) and np.isfinite(images).all()
    assert (tmp_path / "latents" / "index.json").exists()


@pytest.mark.slow
def test_whole_loop_unconditional_in_latent_space(recipes, photos, tmp_path):
    recipes.run("compress", tmp_path, *latent_overrides(recipes, photos))
    report = json.loads((tmp_path / "report.json").read_text())
    assert {m["name"] for m in report["models"]} >= {"teacher", "student-tuned", "teacher-more-steps", "onnx-int8"}
    assert all("class_agreement" not in m or m["class_agreement"] is None for m in report["models"])


@pytest.mark.slow
def test_learned_variance_two_stage_search_accumulation_and_checkpointing(recipes, tmp_path):
    recipes.run(
        "compress",
        tmp_path,
        *recipes.tiny,
        "teacher.num_layers=3",
        "teacher.learn_sigma=true",
        "teacher.gradient_accumulation=2",
        "teacher.gradient_checkpointing=true",
        "search.mode=two-stage",
        "search.evaluations=8",
        "tune.random_proxies=true",
        "tune.output_kd=1.0",
    )
    stages = {m["stage"] for m in json.loads((tmp_path / "report.json").read_text())["models"]}
    assert "student-random-proxies" in stages
    merges = json.loads((tmp_path / "search" / "merge.json").read_text())["told"]
    assert all(code in (0, 16) for point in merges for code in point["code"][:1])


@pytest.mark.slow
def test_a_run_that_quantises_its_few_step_student(recipes, debug_run, fail, tmp_path):
    run = shutil.copytree(debug_run, tmp_path / "run")
    for folder in ("exported", "evaluate"):
        shutil.rmtree(run / folder)
    asked = ("few_step.enabled=true", "quantize.enabled=true", "export.dtypes=[int8]")
    recipes.run("compress", run, *asked)
    models = {model["name"]: model for model in json.loads((run / "report.json").read_text())["models"]}
    few, ours = models["few-step"], models["quantized"]
    assert ours["stage"] == "quantized" and ours["latency_ms"] == {} and "seconds_per_image" in ours
    for key in ("steps", "guidance_scale", "num_samples", "genotype_hash", "parameters"):
        assert ours[key] == few[key], key
    assert ours["bytes"] == {"quantized": transformer_bytes(run / "quantized")}
    assert ours["bytes"]["quantized"] < 0.5 * few["bytes"]["fp32"]
    images = {name: load_file(run / "evaluate" / f"{name}.safetensors")["images"] for name in ("few-step", "quantized")}
    error = (images["few-step"].double() - images["quantized"].double()).square().mean()
    assert error > 0 and ours["psnr_db"] == pytest.approx(float(10 * torch.log10(255**2 / error)), rel=1e-6)
    made = (run / "quantized" / "stage.json").stat().st_mtime_ns
    recipes.run("compress", run, *asked)  # finished: nothing is made anew
    assert (run / "quantized" / "stage.json").stat().st_mtime_ns == made
    message = fail("quantize", run, "few_step.enabled=false")
    assert "quantized-untuned was made with inputs.pipeline = " in message  # of the tuned student it would be another
