"""Training the elastic supernet as a user does: exact resume, two ranks, accumulation, bad input, what the folder
holds.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgedit_hf.elastic.draws import step_subnets
from edgedit_hf.files import read_json

TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
DEBUG = "debug-t2i.yaml"


@pytest.fixture(scope="module")
def start(recipes, tmp_path_factory):
    """`start(folder)`: a run with trained text encoders, ready for stage elastic."""
    made = tmp_path_factory.mktemp("text") / "run"
    recipes.run_here("train_text_encoders", made, config=DEBUG)

    def copy(folder: Path) -> Path:
        shutil.copytree(made / "text", folder / "text")
        return folder

    return copy


@pytest.fixture(scope="module")
def whole(recipes, start, tmp_path_factory):
    """A finished run, left alone."""
    folder = start(tmp_path_factory.mktemp("whole") / "run")
    recipes.run_here("train_elastic", folder, config=DEBUG)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "elastic" / "transformer" / "diffusion_pytorch_model.safetensors")


def close(one: Path, other: Path, tolerance: float) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_the_folder_is_a_pipeline_of_every_width(whole):
    from edgedit_hf import ElasticDiTPipeline

    pipeline = ElasticDiTPipeline.from_pretrained(whole / "elastic")
    pipeline.set_progress_bar_config(disable=True)
    for name in pipeline.transformer.subnet_names:
        images = pipeline(
            "a thick seven",
            subnet=name,
            num_inference_steps=2,
            output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images
        assert images.shape[:3] == (1, 8, 8)


def test_losses_of_every_width_are_on_record(whole):
    stage = read_json(whole / "elastic" / "stage.json", "")
    assert list(stage["validation"]) == ["tiny", "small", "full"] and all(
        0 < loss < 10 for loss in stage["validation"].values()
    )
    drawn = [step_subnets(["tiny", "small", "full"], 0, step)[0] for step in range(12)]
    assert stage["sampled"] == {"tiny": drawn.count("tiny"), "small": drawn.count("small")}
    lines = [json.loads(line) for line in (whole / "elastic" / "telemetry.jsonl").read_text().splitlines()]
    for kind in ("loss_full", "loss_small", "loss_tiny", "distance_tiny", "balance_small"):
        assert any(kind in line for line in lines), kind


@pytest.mark.slow
@pytest.mark.kills
def test_killed_and_rerun_equals_uninterrupted(recipes, start, whole, tmp_path):
    killed = start(tmp_path / "run")
    seconds = read_json(whole / "elastic" / "stage.json", "")["seconds"]
    delays = recipes.run_with_kills("train_elastic", killed, killed / "elastic" / "run.json", seconds, config=DEBUG)
    a, b = weights(whole), weights(killed)
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert a.keys() == b.keys() and not different, f"killed after {delays} s: {different} differ"
    assert (
        read_json(killed / "elastic" / "stage.json", "")["validation"]
        == read_json(whole / "elastic" / "stage.json", "")["validation"]
    )


@pytest.mark.slow
@pytest.mark.kills
def test_ctrl_c_saves_and_the_rerun_continues(recipes, start, whole, tmp_path):
    folder = start(tmp_path / "run")
    if recipes.interrupted("train_elastic", folder, folder / "elastic" / "telemetry.jsonl", config=DEBUG):
        assert list((folder / "elastic" / "checkpoints").glob("step-*"))
    recipes.run("train_elastic", folder, config=DEBUG)
    a, b = weights(whole), weights(folder)
    assert all(torch.equal(a[name], b[name]) for name in a)


# More steps that tell networks and ranks apart: a sandwich, both texts dropped at times, validation along the way.
OTHER = ("elastic.steps=4", "elastic.sampling=sandwich", "elastic.balance_limit=100", "elastic.validate_every=2")


@pytest.fixture(scope="module")
def one_rank(recipes, start, tmp_path_factory):
    folder = start(tmp_path_factory.mktemp("one") / "run")
    recipes.run_here("train_elastic", folder, *OTHER, config=DEBUG)
    return folder


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_equal_one(recipes, start, one_rank, tmp_path):
    folder = start(tmp_path / "run")
    recipes.run("train_elastic", folder, *OTHER, config=DEBUG, launcher=TORCHRUN)
    # Adam divides by tiny second moments in its first steps, which magnifies the rounding of summing gradients in
    # another order.
    close(one_rank, folder, 2e-3)
    one, two = (read_json(run / "elastic" / "stage.json", "")["validation"] for run in (one_rank, folder))
    assert two == pytest.approx(one, rel=1e-3)


@pytest.mark.slow
def test_accumulation_and_recomputed_activations_change_nothing(recipes, start, one_rank, tmp_path):
    folder = start(tmp_path / "run")
    recipes.run_here(
        "train_elastic",
        folder,
        *OTHER,
        "elastic.gradient_accumulation=2",
        "elastic.gradient_checkpointing=true",
        config=DEBUG,
    )
    close(one_rank, folder, 2e-3)
    lines = [json.loads(line) for line in (folder / "elastic" / "telemetry.jsonl").read_text().splitlines()]
    measured = [line["step"] for line in lines if "validation_tiny" in line]
    assert len(measured) == 2 and measured[-1] == 4


def test_a_stand_alone_net_trains_by_the_same_recipe(recipes, start, tmp_path):
    """The reference of a sub-network: the same sizes without a supernet around them."""
    from edgedit_hf import ElasticDiTTransformer2DModel

    model = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug")
    model.set_active_subnet("small")
    (tmp_path / "small.json").write_text(json.dumps(model.active_subnet_config()))
    folder = start(tmp_path / "run")
    recipes.run_here(
        "train_elastic", folder, f"elastic.model={tmp_path / 'small.json'}", "elastic.steps=2", config=DEBUG
    )
    stage = read_json(folder / "elastic" / "stage.json", "")
    assert (
        list(stage["validation"]) == ["full"] and math.isfinite(stage["validation"]["full"]) and stage["sampled"] == {}
    )
    assert json.loads((folder / "elastic" / "transformer" / "config.json").read_text())["subnets"] is None


# -------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["elastic.subnets=[half]"], "elastic.subnets holds 'half'"),
        (["elastic.subnets=[full=0.5]"], "elastic.subnets holds 'full=0.5'"),
        (["elastic.subnets=[small=1.5]"], "a width between 0 and 1"),
        (["elastic.subnets=[small=0.5, small=0.25]"], "holds a name twice"),
        (["elastic.subnets=[odd=0.3]"], "the 16 heads become 4.8 and the 8 key/value heads 2.4"),
        (["elastic.model=elastic-dit-9b"], "'elastic-dit-9b', which is neither a preset (elastic-dit-1.6b"),
        (["data.resolution=9"], "The data has size 9x9 (height x width), but elastic-dit-debug needs multiples of 2"),
        (
            ["elastic.batch_size=9", "elastic.gradient_accumulation=2"],
            "batch_size 9 is not a multiple of processes × gradient_accumulation = 2",
        ),
        (
            ["elastic.learning_rate=1e20", "elastic.max_grad_norm=0", "elastic.warmup_steps=0"],
            "loss_full is nan at step 3; no checkpoint was written yet. Lower the learning rate",
        ),
        (["text.encoder=none", "text.encoder_2=none"], "are both 'none'"),
    ],
)
def test_bad_values(fail, start, tmp_path, overrides, said):
    assert said in fail("train_elastic", start(tmp_path / "run"), *overrides, config=DEBUG)


def test_without_the_text_stage(fail, tmp_path):
    said = fail("train_elastic", tmp_path / "run", config=DEBUG)
    assert "training/train_text_encoders.py" in said and "text_encoder" in said


def test_no_images(fail, start, tmp_path):
    (tmp_path / "images").mkdir()
    assert "images" in fail(
        "train_elastic", start(tmp_path / "run"), f"data.source={tmp_path / 'images'}", config=DEBUG
    )


def test_an_unknown_subnet_of_the_result(whole):
    from edgedit_hf import ElasticDiTPipeline

    pipeline = ElasticDiTPipeline.from_pretrained(whole / "elastic")
    with pytest.raises(ValueError, match="huge.*tiny, small, full"):
        pipeline("seven", subnet="huge")
