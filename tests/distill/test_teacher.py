"""The teacher of a run: its own or a given one, new as the recipe says, and data that fits it."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.data.loading import load_run_images
from edgedit_hf.diffusion import Diffusion
from edgedit_hf.distill.teacher import check_fits_data, load_teacher, new_pipeline, new_teacher, teacher_path
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.run.config import RunConfig, load_config

NAMES = [f"digit {i}" for i in range(10)]


def configured(folder, *overrides: str) -> RunConfig:
    (folder / "recipe.yaml").touch()
    return load_config(folder / "recipe.yaml", [f"output_dir={folder / 'run'}", *overrides])


def pipeline_of(transformer, vae=None) -> EdgeDiTPipeline:
    return new_pipeline(transformer, vae, NAMES, RunConfig())


@pytest.fixture(scope="module")
def images():
    return load_run_images(RunConfig())


@pytest.mark.parametrize("kind", ["epsilon", "flow_prediction"])
def test_a_new_pipeline_saves_and_loads_as_it_is(make_transformer, tmp_path, kind):
    config = configured(tmp_path, "sampling.steps=3", "sampling.guidance_scale=1.25")
    transformer = make_transformer(prediction_type=kind)
    pipeline = new_pipeline(transformer, None, NAMES, config)
    assert isinstance(pipeline.scheduler, DDIMScheduler if kind == "epsilon" else FlowMatchEulerDiscreteScheduler)
    assert Diffusion.for_config(pipeline.transformer.config).prediction_type == kind
    pipeline.save_pretrained(config.folder("teacher"))
    again = load_teacher(config)
    assert (again.config.default_steps, again.config.default_guidance_scale) == (3, 1.25)
    assert again.config.id2label == {str(i): name for i, name in enumerate(NAMES)} and not again.transformer.training
    state = transformer.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.transformer.state_dict().items())
    again.set_progress_bar_config(disable=True)
    assert again(["digit 3"], output_type="pt").images.shape == (1, 1, 8, 8)


def test_an_unconditional_pipeline_has_no_label_names(make_transformer):
    assert pipeline_of(make_transformer(num_classes=0)).config.id2label is None


def test_the_teacher_is_the_runs_own_or_the_given_one(make_transformer, tmp_path):
    assert teacher_path(configured(tmp_path)) == tmp_path / "run" / "teacher"
    pipeline_of(make_transformer()).save_pretrained(tmp_path / "given")
    config = configured(tmp_path, f"teacher.path={tmp_path / 'given'}")
    assert teacher_path(config) == str(tmp_path / "given") and load_teacher(config).transformer.config.hidden_size == 32


def test_a_new_teacher_is_what_the_recipe_says(tmp_path):
    config = configured(
        tmp_path, "teacher={hidden_size: 32, num_layers: 3, num_heads: 2, patch_size: 4, learn_sigma: true}"
    )
    model = new_teacher(config, (3, 16, 16), 7)
    assert (model.config.sample_size, model.config.in_channels, model.config.num_classes, model.out_channels) == (
        16,
        3,
        7,
        6,
    )
    assert len(model.blocks) == 3 and model.config.hidden_size == 32 and model.config.patch_size == 4
    config.teacher.conditional = False
    assert new_teacher(config, (3, 16, 16), 7).label_embedder is None
    for shape in ((3, 16, 20), (3, 18, 18)):
        with pytest.raises(EdgeDiTError, match=rf"shape \(3, {shape[1]}, {shape[2]}\).*patch_size 4"):
            new_teacher(config, shape, 7)


def test_data_that_fits_its_model_and_data_that_does_not(make_transformer, images):
    config = make_transformer().config
    check_fits_data(config, images)
    check_fits_data({**config, "num_classes": 0}, images)
    check_fits_data({**config, "num_classes": 12}, images)
    for change, said in (
        ({"sample_size": 16}, r"shape \(1, 8, 8\), the model needs \(1, 16, 16\); set data.resolution"),
        ({"in_channels": 3}, r"the model needs \(3, 8, 8\)"),
        ({"num_classes": 9}, "10 classes, so labels up to 9, but the model only 9"),
    ):
        with pytest.raises(EdgeDiTError, match=said):
            check_fits_data({**config, **change}, images)
