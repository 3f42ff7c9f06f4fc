"""Schedulers as numbers: closed forms, the schedulers of diffusers themselves, and the ones that are not linear."""

import copy
import json

import diffusers
import pytest
import torch

from edgedit_hf.diffusion import alphas_cumprod, make_scheduler
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.schedule import linear_schedule

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def ready(scheduler, steps=7, **options):
    scheduler.set_timesteps(steps, **options)
    return scheduler


def test_flow_matching_is_eulers_method():
    scheduler = ready(make_scheduler("flow_prediction"), 5)
    schedule = linear_schedule(scheduler)
    sigmas = scheduler.sigmas.tolist()
    assert schedule.sigmas == tuple(sigmas) and schedule.init_noise_sigma == 1 and schedule.history == 0
    for index, step in enumerate(schedule.steps):
        assert step.samples == {index: 1.0} and step.input_scale == 1.0
        assert step.predictions[index] == pytest.approx(sigmas[index + 1] - sigmas[index], rel=1e-6)
        assert step.timestep == pytest.approx(1000 * sigmas[index], rel=1e-6)


def test_the_default_scheduler_is_ddim_of_its_formula():
    """Song et al. (2021), equation 12 with σ = 0."""
    schedule = linear_schedule(ready(make_scheduler("epsilon"), 10))
    assert [step.timestep for step in schedule.steps] == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    kept = alphas_cumprod().double()[[int(step.timestep) for step in schedule.steps]].tolist() + [1.0]
    for index, step in enumerate(schedule.steps):
        now, following = kept[index : index + 2]
        shrink = (following / now) ** 0.5
        assert step.samples == {index: pytest.approx(shrink, rel=1e-5)}
        assert step.predictions == {index: pytest.approx((1 - following) ** 0.5 - shrink * (1 - now) ** 0.5, rel=1e-5)}


@pytest.mark.parametrize(
    "name, config, history",
    [
        ("DDIMScheduler", {"clip_sample": False}, 0),
        (
            "DDIMScheduler",
            {
                "clip_sample": False,
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
            },
            0,
        ),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, 0),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 0),
        ("FlowMatchHeunDiscreteScheduler", {}, 1),
        ("HeunDiscreteScheduler", {}, 1),
        ("DPMSolverMultistepScheduler", {}, 1),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, **FLOW}, 2),
        ("UniPCMultistepScheduler", {}, 5),
        ("UniPCMultistepScheduler", FLOW, 5),
        ("PNDMScheduler", {}, 12),
        ("PNDMScheduler", {"skip_prk_steps": True}, 4),
        ("LMSDiscreteScheduler", {}, 3),
    ],
)
def test_coefficients_sample_as_the_scheduler_does(name, config, history):
    scheduler = ready(getattr(diffusers, name)(**config))
    before = copy.deepcopy(scheduler.__dict__)
    schedule = linear_schedule(scheduler)
    assert str(scheduler.__dict__) == str(before), "the scheduler was left changed"
    noise, *drift = torch.randn(1 + len(scheduler.timesteps), 1, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for index, timestep in enumerate(scheduler.timesteps):
        given = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(drift[index] + 0.3 * torch.tanh(given), timestep, x, return_dict=False)[0]
    found = schedule.sample(noise, lambda index, given: drift[index] + 0.3 * torch.tanh(given))
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5 * float(x.abs().max()))
    assert schedule.history == history


def test_a_shift_by_the_number_of_tokens_is_in_the_numbers():
    first = [
        linear_schedule(ready(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), mu=mu))
        .steps[1]
        .timestep
        for mu in (0.5, 1.15)
    ]
    assert first[0] < first[1] < 1000


def test_json_holds_every_number_exactly():
    schedule = linear_schedule(ready(diffusers.UniPCMultistepScheduler()))
    written = json.loads(json.dumps(schedule.to_json(), allow_nan=False))
    for step, entry in zip(schedule.steps, written["steps"]):
        assert dict(map(tuple, entry["x"])) == step.samples and dict(map(tuple, entry["m"])) == step.predictions
        assert (entry["timestep"], entry["input_scale"]) == (step.timestep, step.input_scale)
    assert written["scheduler"] == "UniPCMultistepScheduler" and written["history"] == schedule.history


@pytest.mark.parametrize(
    "name, config, words",
    [
        ("DDPMScheduler", {}, ["adds noise", "use DDIMScheduler"]),
        ("DDPMScheduler", {"variance_type": "learned_range"}, ["DDPMScheduler", "DDIMScheduler"]),
        ("EulerAncestralDiscreteScheduler", {}, ["adds noise", "use EulerDiscreteScheduler"]),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, ["adds noise", "stochastic_sampling=False"]),
        ("LCMScheduler", {"clip_sample": False}, ["adds noise", "use DPMSolverMultistepScheduler with solver_order=1"]),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++"},
            ["adds noise", "algorithm_type='dpmsolver++'"],
        ),
        ("DDIMScheduler", {}, ["clips", "clip_sample=False"]),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, ["clips", "thresholding=False"]),
    ],
)
def test_schedulers_that_are_not_linear_are_refused_with_the_remedy(name, config, words):
    with pytest.raises(EdgeDiTError) as error:
        linear_schedule(ready(getattr(diffusers, name)(**config)))
    for word in [name, *words]:
        assert word in str(error.value)
