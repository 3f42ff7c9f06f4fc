"""Values of a config that constructors keep unlooked at are looked at when a command loads the pipeline."""

import json

import diffusers
import pytest
import torch

from edgedit_hf import EdgeDiTError, EdgeDiTPipeline
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.pipelines.loading import load_pipeline
from edgedit_hf.pipelines.usable import check_scheduler


@pytest.fixture(scope="module")
def folder(make_transformer, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    EdgeDiTPipeline(make_transformer(), make_scheduler("epsilon")).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "file, key, value, words",
    [
        ("transformer/config.json", "norm_eps", "text", "a finite number"),
        ("transformer/config.json", "norm_eps", float("nan"), "NaN, which is no number"),
        ("transformer/config.json", "frequency_shift", [], "a finite number"),
        ("transformer/config.json", "timestep_scale", True, "a finite number"),
        ("model_index.json", "guidance_channels", "text", "a whole number"),
        ("model_index.json", "default_steps", 2.5, "a whole number"),
        ("scheduler/scheduler_config.json", "timestep_spacing", True, "True"),
        ("scheduler/scheduler_config.json", "rescale_betas_zero_snr", "text", "NaN or infinite"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 0, "no step can be made"),
    ],
)
def test_a_value_that_no_forward_and_no_step_can_use_is_named(folder, tmp_path, file, key, value, words):
    for path in folder.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    values = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**values, key: value}))
    with pytest.raises(EdgeDiTError, match=words) as raised:
        load_pipeline(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_a_sound_pipeline_passes_and_the_generator_of_torch_stands_where_it_stood(folder):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_pipeline(folder)
    assert torch.equal(torch.rand(2), expected)


def every_scheduler() -> list[str]:
    """Those that diffusers counts as interchangeable with DDIM's, and the flow-matching ones."""
    compatible = [kind.__name__ for kind in diffusers.DDIMScheduler().compatibles if not hasattr(kind, "_backends")]
    return sorted({*compatible, "DDIMScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"})


@pytest.mark.parametrize("name", every_scheduler())
def test_every_scheduler_of_diffusers_that_a_pipeline_may_have_passes(name):
    check_scheduler(getattr(diffusers, name)(), "here")
    if name in ("DDPMScheduler", "DDPMParallelScheduler"):
        check_scheduler(getattr(diffusers, name)(variance_type="learned_range"), "here")
    if "use_dynamic_shifting" in getattr(diffusers, name)().config and name.startswith("FlowMatch"):
        check_scheduler(getattr(diffusers, name)(use_dynamic_shifting=True), "here")
