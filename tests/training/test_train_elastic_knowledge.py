"""Distilling the supernet from a teacher as a user does: --teacher, exact resume, two ranks, bad input, what the folder
holds.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from flow_pipelines import clip, elastic, t5, tokenizer
from safetensors.torch import load_file

from edgedit_hf.files import read_json

TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
OPTIONS = {"config": "debug-t2i.yaml"}
MORE = ("elastic.steps=20", "elastic.learning_rate=3e-3", "elastic.log_every=5", "elastic.checkpoint_every=10")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Overrides that give the runs two small untrained text encoders."""
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    for name, encoder in (("one", clip(False)), ("two", t5())):
        encoder.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    return f"text.encoder={folder / 'one'}", f"text.encoder_2={folder / 'two'}"


@pytest.fixture(scope="module")
def teacher(recipes, encoders, tmp_path_factory):
    """A supernet that learned from data alone, to teach another one."""
    folder = tmp_path_factory.mktemp("teacher")
    recipes.run_here("train_elastic", folder, *encoders, *MORE, "elastic.steps=40", **OPTIONS)
    return f"knowledge.teacher={folder / 'elastic'}"


@pytest.fixture(scope="module")
def whole(recipes, encoders, teacher, tmp_path_factory):
    """A finished run with the teacher, left alone."""
    folder = tmp_path_factory.mktemp("whole")
    recipes.run_here("train_elastic", folder, *encoders, teacher, *MORE, "seed=1", **OPTIONS)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "elastic" / "transformer" / "diffusion_pytorch_model.safetensors")


def telemetry(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "elastic" / "telemetry.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_distances_to_the_teacher_fall(whole):
    lines = telemetry(whole)
    assert (
        lines[-1]["output_kd"] < 0.7 * lines[0]["output_kd"] and lines[-1]["feature_kd"] < 0.9 * lines[0]["feature_kd"]
    )
    # The projector is no part of what is published.
    assert not any("projector" in name for name in weights(whole))
    assert read_json(whole / "elastic" / "stage.json", "")["config"]["knowledge"]["output_weight"] == 1.0


@pytest.mark.slow
@pytest.mark.kills
def test_killed_and_rerun_equals_uninterrupted(recipes, encoders, teacher, whole, tmp_path):
    seconds = read_json(whole / "elastic" / "stage.json", "")["seconds"]
    arguments = (*encoders, teacher, *MORE, "seed=1")
    delays = recipes.run_with_kills(
        "train_elastic", tmp_path, tmp_path / "elastic" / "run.json", seconds, *arguments, **OPTIONS
    )
    a, b = weights(whole), weights(tmp_path)
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert a.keys() == b.keys() and not different, f"killed after {delays} s: {different} differ"
    assert telemetry(tmp_path)[-1]["feature_kd"] == telemetry(whole)[-1]["feature_kd"]


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_equal_one(recipes, encoders, teacher, tmp_path):
    few = (*encoders, teacher, "elastic.steps=4", "elastic.log_every=4")
    recipes.run_here("train_elastic", tmp_path / "one", *few, **OPTIONS)
    recipes.run("train_elastic", tmp_path / "two", *few, **OPTIONS, launcher=TORCHRUN)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=2e-3, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_accumulation_changes_nothing(recipes, encoders, teacher, tmp_path):
    few = (*encoders, teacher, "elastic.steps=4", "elastic.log_every=4")
    recipes.run_here("train_elastic", tmp_path / "one", *few, **OPTIONS)
    recipes.run_here("train_elastic", tmp_path / "two", *few, "elastic.gradient_accumulation=2", **OPTIONS)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=2e-3, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


# -------------------------------------------------------------------- bad input


def test_a_teacher_that_cannot_teach_is_one_line(fail, encoders, tmp_path):
    elastic(vae=True).save_pretrained(tmp_path / "latents")
    (tmp_path / "pixart").mkdir()
    (tmp_path / "pixart" / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
    for name, said in (
        ("latents", "another latent space: channels is 4 there and 1 for the student"),
        ("pixart", "is a PixArtSigmaPipeline; it must be a flow pipeline"),
        ("nothing", "there is no such folder; give a folder or a Hub id"),
    ):
        line = fail("train_elastic", tmp_path / "run", *encoders, f"knowledge.teacher={tmp_path / name}", **OPTIONS)
        assert said in line, line
    if not torch.cuda.is_available():
        line = fail(
            "train_elastic",
            tmp_path / "run",
            *encoders,
            "knowledge.teacher=a/b",
            "knowledge.quantization=4bit",
            **OPTIONS,
        )
        assert "A 4bit teacher needs a CUDA GPU" in line


@pytest.mark.slow
@pytest.mark.kills
def test_a_changed_teacher_is_not_continued_with(recipes, fail, encoders, teacher, whole, tmp_path):
    shutil.copytree(whole / "elastic", tmp_path / "run" / "elastic")
    torch.manual_seed(3)
    pipeline = elastic(vae=False)
    pipeline.save_pretrained(tmp_path / "other")
    line = fail(
        "train_elastic",
        tmp_path / "run",
        *encoders,
        f"knowledge.teacher={tmp_path / 'other'}",
        *MORE,
        "seed=1",
        **OPTIONS,
    )
    assert "knowledge.teacher" in line
