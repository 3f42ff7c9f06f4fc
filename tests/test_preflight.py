"""What would stop a run after hours stops it, and its `--dry-run`, before the first stage; what is not here is only
noted.
"""

import json
import os
from pathlib import Path

import flow_pipelines
import numpy as np
import pytest
from PIL import Image

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.pipelines.loading import with_components
from edgedit_hf.preflight import check_space, check_writable, preflight
from edgedit_hf.run.config import load_config
from edgedit_hf.run.stage import EDGEDIT, FEW_STEP, TEACHER, TEXT_TO_IMAGE

RECIPES = Path(__file__).parents[1] / "training" / "recipes"


def config(output: Path, *overrides: str, recipe: str = "debug.yaml"):
    return load_config(RECIPES / recipe, [f"output_dir={output}", *overrides])


def images(folder: Path, size: int = 8) -> Path:
    """Two classes of ten images each, so many that some are held out."""
    rng = np.random.default_rng(0)
    for label in "ab":
        (folder / label).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(rng.integers(0, 255, (size, size), dtype=np.uint8)).save(folder / label / f"{i}.png")
    return folder


@pytest.mark.parametrize("dry_run", [True, False])
def test_recipes_that_work_pass_and_a_dry_run_writes_nothing(tmp_path, dry_run):
    assert preflight(config(tmp_path / "run"), EDGEDIT, dry_run=dry_run) == []
    assert preflight(config(tmp_path / "menu", recipe="debug-menu.yaml"), EDGEDIT, dry_run=dry_run) == []
    assert preflight(config(tmp_path / "t2i", recipe="debug-t2i.yaml"), TEXT_TO_IMAGE, dry_run=dry_run) == []
    assert (tmp_path / "run").exists() is not dry_run


def test_a_stage_that_is_run_alone_is_checked_though_no_key_asks_for_it(tmp_path):
    assert preflight(config(tmp_path / "run"), (FEW_STEP,), dry_run=True) == []
    (tmp_path / "run" / "elastic").mkdir(parents=True)
    for recipe in ("debug.yaml", "debug-t2i.yaml"):
        asked = config(tmp_path / "run", "few_step.batch_size=31", recipe=recipe)
        with pytest.raises(EdgeDiTError, match=r"few_step\.batch_size 31"):
            preflight(asked, (FEW_STEP,), processes=2)
        assert preflight(asked, EDGEDIT if recipe == "debug.yaml" else TEXT_TO_IMAGE, processes=2) == []


def test_what_is_not_here_is_noted(tmp_path):
    notes = preflight(config(tmp_path, recipe="imagenet256-edgedit1.yaml"), EDGEDIT, dry_run=True)
    said = " ".join(notes)
    for words in (
        "teacher.path ./runs/dit-xl-2-256, which is not here",
        "data.vae stabilityai",
        "images of ILSVRC/imagenet-1k",
        "Inception weights",
    ):
        assert words in said
    assert not list(tmp_path.iterdir())
    with pytest.raises(EdgeDiTError, match="Inception weights .* do not exist"):
        preflight(config(tmp_path, recipe="imagenet256-edgedit1.yaml"), EDGEDIT)


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["teacher.batch_size=30", "teacher.gradient_accumulation=4"],
            "teacher.batch_size 30 is not a multiple of processes × gradient_accumulation = 8",
        ),
        (["tune.batch_size=31"], "tune.batch_size 31"),
        (["student.genotype=EdgeDiT-1"], "teacher"),
        (["student.genotype=no.json"], "student.genotype names 'no.json'"),
        (["bank.only=[nobody]"], "bank.only names 'nobody'"),
        (["teacher.patch_size=3"], "teacher.patch_size 3"),
        (["bank.menu=[{token_merge: 2}]", "teacher.patch_size=8"], "'tokens2' has token_merge 2, .* 1 × 1"),
        (["card.repo_id=no spaces/allowed"], "card.repo_id is 'no spaces/allowed'"),
        (["card.license=''"], "card.license is ''"),
        (["few_step.enabled=true", "few_step.batch_size=31"], "few_step.batch_size 31 is not a multiple"),
        (
            ["few_step.enabled=true", "few_step.timesteps=[200, 800]"],
            "few_step.timesteps must fall, but 800 follows 200",
        ),
        (
            ["few_step.enabled=true", "few_step.matching_weight=0", "few_step.knowledge_weight=0"],
            "matching_weight and few_step.knowledge_weight are both 0",
        ),
        (["few_step.enabled=true", "few_step.subnet=tiny"], "few_step.subnet is 'tiny'.* has no sub-networks"),
        (["few_step.enabled=true", "few_step.schedule=alternate"], "the critic would never learn"),
        (["few_step.enabled=true", "few_step.teacher_lora=."], "few_step.teacher_lora is ., but few_step.teacher is"),
        (["quantize.enabled=true", "quantize.batch_size=31"], "quantize.batch_size 31 is not a multiple"),
        (["quantize.enabled=true", "quantize.subnet=tiny"], "quantize.subnet is 'tiny'.* has no sub-networks"),
        (["data.source=/no/such/folder"], "/no/such/folder"),
        (
            ["latency.table=/no/such.json"],
            "latency.table is /no/such.json, but there is no such file; give the table.json",
        ),
    ],
)
def test_settings_that_a_later_stage_would_refuse(tmp_path, overrides, said, dry_run):
    with pytest.raises(EdgeDiTError, match=said):
        preflight(config(tmp_path / "run", *overrides), EDGEDIT, processes=2, dry_run=dry_run)
    assert not (tmp_path / "run").exists()


def test_a_pipeline_to_quantise_that_is_not_here(tmp_path):
    asked = config(tmp_path / "run", "quantize.enabled=true", "quantize.path=/no/such")
    with pytest.raises(EdgeDiTError, match="quantize.path is /no/such, but there is no such folder"):
        preflight(asked, EDGEDIT)
    assert preflight(asked, EDGEDIT, dry_run=True) == ["Not checked: quantize.path /no/such, which is not here."]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["elastic.batch_size=31"], "elastic.batch_size 31"),
        (["text.batch_size=31"], "text.batch_size 31"),
        (["text.encoder=none", "text.encoder_2=none"], "both 'none'"),
        (["elastic.model=nobody"], "elastic.model is 'nobody'"),
        (["elastic.subnets=[odd=0.3]"], "cannot be made"),
        (["knowledge.teacher=./nowhere"], "knowledge.teacher is ./nowhere, but there is no such folder"),
        (["text.encoder=./nowhere"], "text.encoder is ./nowhere"),
        (["data.vae=./nowhere"], "data.vae is ./nowhere"),
        (["knowledge.teacher=me/nowhere"], "knowledge.teacher is me/nowhere: it is neither a local path nor a Hub id"),
        (["data.vae=hf://me/nowhere/vae"], "data.vae is hf://me/nowhere/vae: it is neither a local path nor a Hub id"),
        (["quantize.enabled=true"], "quantize.enabled is true, but a run of text to image has no such stage"),
        (["few_step.enabled=true", "few_step.batch_size=31"], "few_step.batch_size 31"),
        (["few_step.enabled=true", "few_step.teacher=./nowhere"], "few_step.teacher is ./nowhere, but there is no"),
        (["few_step.enabled=true", "few_step.path=./nowhere"], "few_step.path is ./nowhere, but there is no"),
        (["few_step.enabled=true", "few_step.timesteps=[500, 900]"], "must fall, but 900 follows 500"),
        (["few_step.enabled=true", "few_step.subnet=huge"], "few_step.subnet is 'huge', but .* has tiny, small, full"),
        (["few_step.enabled=true", "few_step.feature_weight=1"], "the 3 widths of the net have tokens of different"),
        (["few_step.enabled=true", "few_step.quantization=4bit"], "few_step.quantization is 4bit"),
    ],
)
def test_settings_that_a_later_stage_of_text_to_image_would_refuse(tmp_path, overrides, said):
    with pytest.raises(EdgeDiTError, match=said):
        preflight(config(tmp_path / "run", *overrides, recipe="debug-t2i.yaml"), TEXT_TO_IMAGE, processes=2)


def test_a_dry_run_fetches_nothing(tmp_path):
    names = ["teacher.path=me/teacher", "data.vae=hf://me/teacher/vae", "latency.table=me/table"]
    notes = preflight(config(tmp_path / "run", "data.resolution=32", *names), EDGEDIT, dry_run=True)
    for name in names:
        assert f"Not checked: {name.replace('=', ' ')}, which is not on this machine yet." in notes


def test_a_page_needs_its_runtime_before_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.setattr("edgedit_hf.export.web.runtime._cached", lambda: tmp_path / "assets" / "files")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EdgeDiTError, match="no npm here"):
        preflight(config(tmp_path / "run", "export.web=[int8]"), EDGEDIT)
    assert preflight(config(tmp_path / "run", "export.web=[int8]"), (TEACHER,)) == []


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_few_step_names_is_looked_at_before_the_first_stage(tmp_path, make_transformer, dry_run):
    """Of either family, in a run of either family: what could not be distilled, or teach, is refused by its configs."""
    text = flow_pipelines.elastic(vae=False)
    classes = EdgeDiTPipeline(make_transformer(), make_scheduler("epsilon"))
    for name, pipeline in (("text", text), ("classes", classes)):
        pipeline.save_pretrained(tmp_path / name)
        few = {"few_step_timesteps": [600, 300], "default_steps": 2, "default_guidance_scale": 1.0}
        with_components(pipeline, **few).save_pretrained(tmp_path / f"{name}-few")
    (tmp_path / "empty").mkdir()
    for recipe, stages, own, other in (
        ("debug.yaml", EDGEDIT, "classes", "text"),
        ("debug-t2i.yaml", TEXT_TO_IMAGE, "text", "classes"),
    ):
        for key, value, said in (
            ("path", other, "few_step.path is .*, which holds a "),
            ("path", f"{own}-few", "was distilled for 2 steps already"),
            ("teacher", other, "holds a ElasticDiTPipeline" if own == "classes" else "is a EdgeDiTPipeline"),
            ("teacher", "empty", "without model_index.json" if own == "classes" else "no pipeline in"),
        ):
            asked = config(
                tmp_path / "run", "few_step.enabled=true", f"few_step.{key}={tmp_path / value}", recipe=recipe
            )
            with pytest.raises(EdgeDiTError, match=said):
                preflight(asked, stages, dry_run=dry_run)


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_damaged_held_out_image_is_found_before_the_first_stage_and_by_no_stage_that_does_not_use_it(
    tmp_path, monkeypatch, dry_run
):
    monkeypatch.setattr("edgedit_hf.data.datasets.IN_MEMORY_BYTES", 0)  # as of a set that is not decoded at once
    source = f"data.source={images(tmp_path / 'images')}"
    from edgedit_hf.data.loading import load_run_images

    run = config(tmp_path / "run", source, "teacher.conditional=false")
    first = load_run_images(run, "validation").batch([0])["images"][0, 0].numpy()
    held_out = [
        path
        for path in (tmp_path / "images").rglob("*.png")
        if np.allclose(np.asarray(Image.open(path)) / 127.5 - 1, first, atol=1e-3)
    ]
    assert len(held_out) == 1
    held_out[0].write_bytes(held_out[0].read_bytes()[:60])
    with pytest.raises(EdgeDiTError, match=str(held_out[0])):
        preflight(run, EDGEDIT, dry_run=dry_run)
    assert preflight(run, (TEACHER,), dry_run=dry_run) == []
    held_out[0].unlink()
    assert preflight(run, EDGEDIT, dry_run=dry_run) == []


def test_images_are_decoded_once_a_run(tmp_path, monkeypatch):
    run = config(tmp_path / "run", f"data.source={images(tmp_path / 'images')}")
    preflight(run, EDGEDIT)
    assert set(json.loads((tmp_path / "run" / "images-checked.json").read_text())) == {"train", "validation"}
    monkeypatch.setattr("edgedit_hf.preflight.check_images", lambda dataset: pytest.fail("decoded again"))
    preflight(run, EDGEDIT)


def test_images_that_the_extractor_cannot_take(tmp_path):
    source = images(tmp_path / "images", size=4)
    with pytest.raises(EdgeDiTError, match="4x4; the classifier needs at least 8x8"):
        preflight(config(tmp_path / "run", f"data.source={source}"), EDGEDIT)
    preflight(config(tmp_path / "run", f"data.source={source}"), (TEACHER,))


def test_a_given_teacher_with_a_short_schedule_or_a_file_cut_short(tmp_path, make_transformer):
    scheduler = make_scheduler("epsilon").from_config(make_scheduler("epsilon").config, num_train_timesteps=50)
    EdgeDiTPipeline(make_transformer(sample_size=8, in_channels=1), scheduler).save_pretrained(tmp_path / "teacher")
    run = config(tmp_path / "run", f"teacher.path={tmp_path / 'teacher'}")
    assert preflight(run, EDGEDIT) == []
    with pytest.raises(EdgeDiTError, match="sampling.steps is 51, but the schedule of DDIMScheduler has 50 timesteps"):
        preflight(config(tmp_path / "run", f"teacher.path={tmp_path / 'teacher'}", "sampling.steps=51"), EDGEDIT)
    path = next((tmp_path / "teacher" / "transformer").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(EdgeDiTError, match=f"{path} cannot be read"):
        preflight(run, EDGEDIT, dry_run=True)


def test_finished_stages_are_not_looked_at(tmp_path):
    for folder in (stage.folder for stage in EDGEDIT):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "stage.json").write_text("{}")
    assert preflight(config(tmp_path, "data.source=/gone", "tune.batch_size=31"), EDGEDIT, processes=2) == []


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path, said in (
        (tmp_path / "file" / "run", "is not a folder"),
        (tmp_path / ("x" * 300), "longer than 255 bytes"),
        (Path("a\0b"), "NUL byte"),
    ):
        with pytest.raises(EdgeDiTError, match=said):
            check_writable(path)
    check_writable(tmp_path / "new" / "deep")
    assert sorted(os.listdir(tmp_path)) == ["file"]
    with pytest.raises(
        EdgeDiTError, match=r"The run will write 1000000000.00 GB below .*, but its disk has .* GB left"
    ):
        check_space(tmp_path / "new", 1e18, "The run")


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("scheduler/scheduler_config.json", "[]", "must hold keys and values"),
        (
            "scheduler/scheduler_config.json",
            '{"_class_name": "Nobody"}',
            "a scheduler of class 'Nobody', which diffusers does not have",
        ),
        (
            "scheduler/scheduler_config.json",
            '{"_class_name": "DDIMScheduler", "num_train_timesteps": "many"}',
            "scheduler",
        ),
        ("model_index.json", "[]", "must hold keys and values"),
        ("model_index.json", '{"_class_name": ["own", "SomebodysPipeline"]}', "holds a SomebodysPipeline"),
    ],
)
def test_a_given_teacher_with_a_damaged_config(tmp_path, make_transformer, file, text, said):
    EdgeDiTPipeline(make_transformer(sample_size=8, in_channels=1), make_scheduler("epsilon")).save_pretrained(
        tmp_path / "teacher"
    )
    (tmp_path / "teacher" / file).write_text(text)
    with pytest.raises(EdgeDiTError, match=said):
        preflight(config(tmp_path / "run", f"teacher.path={tmp_path / 'teacher'}"), EDGEDIT)
