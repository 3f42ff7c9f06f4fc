"""Quantising a pipeline as a user does: what the folder holds, exact resume, two ranks, both families, bad input."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from flow_pipelines import elastic, randomise
from safetensors.torch import load_file

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import make_few_step_scheduler, make_scheduler
from edgedit_hf.files import read_json
from edgedit_hf.quantization.allocation import candidate_specs
from edgedit_hf.quantization.inputs import print_quantization_estimate, tuning_options
from edgedit_hf.quantization.layers import quantizable_layers, quantized_weights
from edgedit_hf.run.config import load_config

TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
DEBUG = {"config": "debug-quantize.yaml"}


@pytest.fixture(scope="module")
def source(make_transformer, tmp_path_factory):
    """A pipeline of which only the folder is there."""
    folder = tmp_path_factory.mktemp("source") / "pipeline"
    EdgeDiTPipeline(make_transformer(), make_scheduler("epsilon"), default_steps=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_source(tmp_path_factory):
    """A text-to-image supernet, and overrides that name it and prompts."""
    folder = tmp_path_factory.mktemp("text-source")
    randomise(elastic(vae=False)).save_pretrained(folder / "pipeline")
    (folder / "prompts.txt").write_text("a cat\n\na dog \na cat\n")
    return f"quantize.path={folder / 'pipeline'}", f"quantize.prompts={folder / 'prompts.txt'}"


@pytest.fixture(scope="module")
def whole(recipes, source, tmp_path_factory):
    """A finished run, left alone."""
    folder = tmp_path_factory.mktemp("whole")
    recipes.run_here("quantize", folder, f"quantize.path={source}", **DEBUG)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_the_folder_is_a_small_pipeline(whole, source):
    pipeline = DiffusionPipeline.from_pretrained(whole / "quantized")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([1, 2], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 1) and math.isfinite(images.sum())
    record = read_json(whole / "quantized" / "quantization.json", "")
    packed = quantized_weights(pipeline.transformer)
    assert {name: weight.num_bits for name, weight in packed.items()} == {
        n: row["num_bits"] for n, row in record["layers"].items() if row["spec"]
    }
    stored = sum(row["num_bits"] for row in record["layers"].values()) / sum(
        row["weights"] for row in record["layers"].values()
    )
    assert record["average_bits"] == pytest.approx(stored) and 4 < stored <= 4.3
    assert record["summed_mse"] == pytest.approx(record["summed_mse_bound"], rel=1e-6)
    assert all(min(c["mse"] for c in row["candidates"]) <= row["mse"] for row in record["layers"].values())
    sizes = [
        sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
        for folder in (whole / "quantized", source)
    ]
    assert record["bytes"] == sizes[0] < 0.3 * sizes[1]


def test_only_biases_norms_and_modulation_are_tuned(whole):
    before, after = tensors(whole / "quantized-untuned"), tensors(whole / "quantized")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed and all(name.endswith(".bias") for name in changed)
    error = read_json(whole / "quantized" / "quantization.json", "")["error"]
    assert list(error) == ["untuned", "tuned"] and error["untuned"]["full"]["timesteps"] == [332, 666, 999]
    assert 10 < error["untuned"]["full"]["sqnr_db"] < 60 and len(error["tuned"]["full"]["sqnr_db_by_timestep"]) == 3


def test_a_finished_run_is_not_done_again(recipes, whole, source):
    before = (whole / "quantized" / "stage.json").stat().st_mtime_ns
    recipes.run_here("quantize", whole, f"quantize.path={source}", **DEBUG)
    assert (whole / "quantized" / "stage.json").stat().st_mtime_ns == before


def test_a_few_step_pipeline_is_quantised_as_it_samples(recipes, make_transformer, repository, tmp_path):
    """At its timesteps and without guidance, in calibration, judgement and self-distillation; and it stays one."""
    few = {"default_steps": 2, "default_guidance_scale": 1.0, "few_step_timesteps": [800.0, 400.0]}
    pipeline = EdgeDiTPipeline(make_transformer(), make_few_step_scheduler("epsilon"), **few)
    pipeline.save_pretrained(tmp_path / "few")
    own = [f"quantize.path={tmp_path / 'few'}", "quantize.sampling_steps=null", "quantize.guidance_scale=null"]
    recipes.run_here("quantize", tmp_path / "run", *own, **DEBUG)
    found = read_json(tmp_path / "run" / "quantized" / "quantization.json", "")["error"]
    assert all(found[when]["full"]["timesteps"] == [400, 800] for when in ("untuned", "tuned"))
    again = DiffusionPipeline.from_pretrained(tmp_path / "run" / "quantized")
    assert {name: again.config[name] for name in few} == few and type(again.scheduler) is type(pipeline.scheduler)

    def drawing(*overrides):
        recipe = repository / "training" / "recipes" / "debug-quantize.yaml"
        return tuning_options(load_config(recipe, [*own, *overrides]), pipeline)

    assert drawing() == {"dropout": 0.0, "timesteps": [800.0, 400.0]}
    asked = drawing("quantize.sampling_steps=4", "quantize.guidance_scale=2.0")
    assert asked == {"dropout": 0.3, "timesteps": [800.0, 600.0, 400.0, 200.0]}


def test_the_estimate_counts_forwards_and_writes_nothing(source, repository, tmp_path, capsys):
    config = load_config(
        repository / "training" / "recipes" / "debug-quantize.yaml",
        [f"quantize.path={source}", f"output_dir={tmp_path / 'run'}"],
    )
    print_quantization_estimate(config)
    printed = capsys.readouterr().out
    layers = quantizable_layers(EdgeDiTPipeline.from_pretrained(source).transformer)
    forms = sum(spec is not None for layer in layers.values() for spec in candidate_specs(layer.weight.shape))
    assert f"25 layers in {forms} forms" in printed and f"{forms * 2 * 2 * 2:,} images through the network" in printed
    assert "self-distillation" in printed and f"{4 * 12 * 8:,} images" in printed and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_self_distillation_lessens_the_error(recipes, tmp_path):
    """Of a trained network, whose samples are like what it was trained on."""
    recipes.run_here(
        "train_teacher", tmp_path, "teacher.steps=200", "teacher.learning_rate=3e-3", "teacher.ema_decay=0.95"
    )
    more = (
        "quantize.steps=200",
        "quantize.learning_rate=1e-3",
        "quantize.batch_size=32",
        "quantize.samples=64",
        "quantize.compensate=false",
    )
    recipes.run_here("quantize", tmp_path, f"quantize.path={tmp_path / 'teacher'}", *more, **DEBUG)
    error = read_json(tmp_path / "quantized" / "quantization.json", "")["error"]
    assert error["tuned"]["full"]["mse"] < 0.8 * error["untuned"]["full"]["mse"]
    lines = [json.loads(line) for line in (tmp_path / "quantized" / "telemetry.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


@pytest.mark.slow
@pytest.mark.kills
def test_killed_and_rerun_equals_uninterrupted(recipes, source, whole, tmp_path):
    for stage in ("quantized-untuned", "quantized"):
        folder = tmp_path / stage
        if stage == "quantized":
            shutil.copytree(whole / "quantized-untuned", folder / "quantized-untuned")
        seconds = read_json(whole / stage / "stage.json", "")["seconds"]
        delays = recipes.run_with_kills(
            "quantize", folder, folder / stage / "run.json", seconds, f"quantize.path={source}", kills=2, **DEBUG
        )
        a, b = tensors(whole / "quantized"), tensors(folder / "quantized")
        different = [name for name in a if not torch.equal(a[name], b[name])]
        assert a.keys() == b.keys() and not different, f"{stage} killed after {delays} s: {different} differ"
        records = [read_json(run / "quantized" / "quantization.json", "") for run in (whole, folder)]
        assert records[0] == records[1]


@pytest.mark.slow
@pytest.mark.kills
def test_ctrl_c_saves_and_the_rerun_continues(recipes, source, whole, tmp_path):
    telemetry = tmp_path / "quantized-untuned" / "telemetry.jsonl"
    recipes.interrupted("quantize", tmp_path, telemetry, f"quantize.path={source}", **DEBUG)
    recipes.run("quantize", tmp_path, f"quantize.path={source}", **DEBUG)
    a, b = tensors(whole / "quantized"), tensors(tmp_path / "quantized")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_and_accumulation_equal_one(recipes, source, whole, tmp_path):
    recipes.run("quantize", tmp_path / "two", f"quantize.path={source}", launcher=TORCHRUN, **DEBUG)
    recipes.run_here(
        "quantize", tmp_path / "pieces", f"quantize.path={source}", "quantize.gradient_accumulation=2", **DEBUG
    )
    one = tensors(whole / "quantized")
    for other in ("two", "pieces"):
        found = tensors(tmp_path / other / "quantized")
        for name in one:
            torch.testing.assert_close(found[name], one[name], rtol=2e-3, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_a_supernet_is_quantised_and_tuned_at_every_width(recipes, text_source, tmp_path):
    recipes.run_here("quantize", tmp_path, *text_source, **DEBUG)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "quantized")
    pipeline.set_progress_bar_config(disable=True)
    record = read_json(tmp_path / "quantized" / "quantization.json", "")
    assert list(record["error"]["tuned"]) == pipeline.transformer.subnet_names == ["tiny", "small", "full"]
    for name in pipeline.transformer.subnet_names:
        assert pipeline("a cat", subnet=name, num_inference_steps=2, output_type="np").images.shape[:3] == (1, 8, 8)
    before, after = tensors(tmp_path / "quantized-untuned"), tensors(tmp_path / "quantized")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {
        f"modulation.{name}.table" for name in pipeline.transformer.subnet_names
    } <= changed and "text_embedder.tokens" not in changed
    assert not any("weight_" in name for name in changed)


@pytest.mark.slow
def test_a_sub_network_alone_and_affine_groups(recipes, text_source, tmp_path):
    options = (
        "quantize.subnet=small",
        "quantize.scheme=affine",
        "quantize.group_size=32",
        "quantize.budget_bits=5.5",
        "quantize.steps=0",
    )
    recipes.run_here("quantize", tmp_path, *text_source, *options, **DEBUG)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "quantized")
    assert pipeline.transformer.config.subnets is None and list(
        read_json(tmp_path / "quantized" / "quantization.json", "")["error"]["tuned"]
    ) == ["full"]
    assert {weight.scheme for weight in quantized_weights(pipeline.transformer).values()} == {"affine"}
    a, b = tensors(tmp_path / "quantized-untuned"), tensors(tmp_path / "quantized")
    assert all(torch.equal(a[name], b[name]) for name in a)


# -------------------------------------------------------------------- bad input


def test_what_is_no_unquantised_pipeline(fail, whole, tmp_path):
    line = fail("quantize", tmp_path / "run", **DEBUG)
    assert "neither student-tuned nor elastic, and quantize.path is null" in line
    assert "There is no pipeline in" in fail(
        "quantize", tmp_path / "run", f"quantize.path={tmp_path / 'nothing'}", **DEBUG
    )
    line = fail("quantize", tmp_path / "run", f"quantize.path={whole / 'quantized'}", **DEBUG)
    assert "is quantised already (" in line and "give the pipeline that it was made from" in line
    assert not (tmp_path / "run" / "quantized").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["quantize.budget_bits=4.0"],
            "The budget is 4 bits a weight, but the smallest candidates of the 25 layers have 4.0",
        ),
        (["quantize.subnet=tiny"], "quantize.subnet is 'tiny', but"),
        (
            ["quantize.batch_size=9", "quantize.gradient_accumulation=2"],
            "batch_size 9 is not a multiple of processes × gradient_accumulation = 2",
        ),
    ],
)
def test_bad_values(fail, source, tmp_path, overrides, said):
    assert said in fail("quantize", tmp_path / "run", f"quantize.path={source}", *overrides, **DEBUG)


def test_a_loss_that_is_not_finite_ends_with_the_checkpoint_before_it(fail, whole, source, tmp_path):
    shutil.copytree(whole / "quantized-untuned", tmp_path / "quantized-untuned")
    options = (
        "quantize.learning_rate=1e30",
        "quantize.max_grad_norm=0",
        "quantize.warmup_steps=0",
        "quantize.log_every=1",
        "quantize.checkpoint_every=1",
    )
    line = fail("quantize", tmp_path, f"quantize.path={source}", *options, **DEBUG)
    assert "self-distil: loss is" in line and "step-000000001 before it is kept" in line
    assert not (tmp_path / "quantized" / "stage.json").exists()


def test_prompts(fail, text_source, tmp_path):
    path, _ = text_source
    assert "none.txt cannot be read (" in fail(
        "quantize", tmp_path / "run", path, f"quantize.prompts={tmp_path / 'none.txt'}", **DEBUG
    )
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "empty.txt has no prompt" in fail(
        "quantize", tmp_path / "run", path, f"quantize.prompts={tmp_path / 'empty.txt'}", **DEBUG
    )


def test_other_weights_are_not_continued_with(fail, whole, source, make_transformer, tmp_path):
    shutil.copytree(whole / "quantized-untuned", tmp_path / "quantized-untuned")
    shutil.copytree(source, tmp_path / "kept")
    EdgeDiTPipeline(make_transformer(seed=1), make_scheduler("epsilon"), default_steps=3).save_pretrained(source)
    line = fail("quantize", tmp_path, f"quantize.path={source}", **DEBUG)
    shutil.rmtree(source)
    shutil.copytree(tmp_path / "kept", source)
    assert "inputs.pipeline" in line
