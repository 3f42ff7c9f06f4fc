"""The timesteps of a few-step student, and its way along them: what is simulated in training is what ships."""

import math

import flow_pipelines
import pytest
import torch
from gaussians import output_for

from edgedit_hf import EdgeDiTError, EdgeDiTPipeline
from edgedit_hf.diffusion import Diffusion, make_few_step_scheduler, make_scheduler
from edgedit_hf.few_step.schedule import after, at, few_step_timesteps, shifted, walk
from edgedit_hf.pipelines.loading import with_components

EPS, FLOW = [800.0, 600.0, 400.0, 200.0], [1000.0, 900.0, 750.0, 500.0]

# -------------------------------------------------------------------- which


def test_four_steps_of_the_flow_follow_from_the_shift():
    assert few_step_timesteps("flow_prediction", 4, shift=3.0) == FLOW
    assert few_step_timesteps("flow_prediction", 4, shift=1.0) == [1000.0, 750.0, 500.0, 250.0]
    assert shifted(0.0, 3.0) == 0.0 and shifted(1.0, 3.0) == 1.0 and shifted(0.5, 3.0) == 0.75


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
@pytest.mark.parametrize("steps", range(1, 9))
def test_any_number_of_steps(prediction_type, steps):
    found = few_step_timesteps(prediction_type, steps, first_signal=0.04)
    assert len(found) == steps and found == sorted(set(found), reverse=True) and found[-1] > 0
    assert few_step_timesteps(prediction_type, steps, timesteps=found) == found
    if prediction_type == "flow_prediction":
        assert found[0] == 1000
        return
    assert all(t == int(t) < 1000 for t in found)
    # DiT's betas by hand: the first timestep is the noisiest that has .04 of signal to noise.
    product = [math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(t + 1)) for t in (int(found[0]), 999)]
    beyond = product[0] * (1 - (1e-4 + (0.02 - 1e-4) * (found[0] + 1) / 999))
    signal = [math.sqrt(a / (1 - a)) for a in (product[0], beyond, product[1])]
    assert signal[0] >= 0.04 > signal[1] > signal[2] == pytest.approx(0.0064, abs=1e-4)
    assert max(abs(t - found[0] * (1 - i / steps)) for i, t in enumerate(found)) <= 0.5


def test_more_signal_begins_later():
    firsts = [few_step_timesteps("epsilon", 4, first_signal=signal)[0] for signal in (0.001, 0.01, 0.1, 1.0)]
    assert firsts[0] == 999 and firsts == sorted(firsts, reverse=True)
    with pytest.raises(EdgeDiTError, match="first_signal is 50.*too few for 4 steps; lower it"):
        few_step_timesteps("epsilon", 4, first_signal=50.0)


@pytest.mark.parametrize("steps", [0, 9])
def test_numbers_of_steps_out_of_range(steps):
    with pytest.raises(EdgeDiTError, match=f"sampling_steps is {steps}; it must be from 1 to 8"):
        few_step_timesteps("epsilon", steps)


@pytest.mark.parametrize(
    ("prediction_type", "given", "said"),
    [
        ("flow_prediction", [1000, 750, 750, 500], "must fall, but 750 follows 750"),
        ("flow_prediction", [500, 750, 900, 1000], "must fall, but 750 follows 500"),
        ("flow_prediction", [1000, 900, 500], "holds 3 timesteps, but few_step.sampling_steps is 4"),
        ("flow_prediction", [1001, 900, 750, 500], "holds 1001; they must be numbers above 0, at most 1000"),
        ("flow_prediction", [1000, 900, 750, 0], "holds 0; they must be numbers above 0"),
        ("flow_prediction", [1000, 900, float("nan"), 500], "holds nan"),
        ("epsilon", [1000, 900, 750, 500], "holds 1000; they must be whole numbers above 0, at most 999"),
        ("epsilon", [999, 900, 750.5, 500], "holds 750.5; they must be whole numbers"),
        ("epsilon", [999, 900, 750, -1], "holds -1"),
    ],
)
def test_given_timesteps_that_cannot_be(prediction_type, given, said):
    with pytest.raises(EdgeDiTError, match=said):
        few_step_timesteps(prediction_type, 4, timesteps=given)


def test_the_last_step_leads_to_clean_data():
    device = torch.device("cpu")
    assert [int(after(EPS, index, device)) for index in range(3)] == [600, 400, 200] and after(EPS, 3, device) is None
    assert at(EPS, 0, device).dtype == torch.int64 and float(at([987.5], 0, device)) == 987.5


# -------------------------------------------------------------------- the walk is what ships


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Something that depends on x and t."""
    return torch.sin(2 * x + t.view(-1, 1, 1, 1).to(x.dtype) / 300) + 0.3 * x.roll(1, -1)


def scheduler_of(prediction_type: str, timesteps: list[float], stochastic: bool):
    scheduler = make_few_step_scheduler(prediction_type, stochastic)
    if prediction_type == "epsilon":
        scheduler.set_timesteps(timesteps=[int(t) for t in timesteps])
    else:
        scheduler.set_timesteps(sigmas=[t / 1000 for t in timesteps])
    return scheduler


@pytest.mark.parametrize(("prediction_type", "timesteps"), [("epsilon", EPS), ("flow_prediction", FLOW)])
@pytest.mark.parametrize("stochastic", [False, True])
def test_every_step_is_the_schedulers(prediction_type, timesteps, stochastic):
    """To rounding, also where every step noises anew: the scheduler's noise is drawn again by its seed."""
    start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler, diffusion = scheduler_of(prediction_type, timesteps, stochastic), Diffusion(prediction_type)
    assert scheduler.timesteps.tolist() == timesteps and getattr(scheduler, "init_noise_sigma", 1) == 1
    torch.manual_seed(1)
    fresh = [torch.randn(start.shape) for _ in timesteps]
    torch.manual_seed(1)
    x = start
    for index, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(x, t.expand(2)), t, x).prev_sample
        ours = walk(network, diffusion, start, timesteps, index + 1, fresh.__getitem__ if stochastic else None)
        torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4, msg=lambda m, i=index: f"step {i}: {m}")


def test_the_deterministic_step_of_noise_is_ddims():
    """Song et al. (2021), eq. 12 with η = 0, from betas written out here."""
    a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    x = start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t, to in zip(EPS, [*EPS[1:], None]):
        noise, now = network(x, torch.full((2,), t)), a[int(t)]
        then = a.new_ones(()) if to is None else a[int(to)]
        x = then.sqrt() * (x - (1 - now).sqrt() * noise) / now.sqrt() + (1 - then).sqrt() * noise
    torch.testing.assert_close(walk(network, Diffusion("epsilon"), start, EPS, 4), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("prediction_type", "timesteps"), [("epsilon", EPS), ("flow_prediction", FLOW)])
def test_noising_anew_has_the_shipped_samplers_distribution(prediction_type, timesteps):
    """Of a net that always takes the same image for x0, x after a step is α x0 + σ ε: its moments are known."""
    clean, diffusion = torch.linspace(-1, 1, 4).view(1, 1, 2, 2), Diffusion(prediction_type)
    start = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return output_for(diffusion, clean.expand_as(x), x, t)

    def fresh(index: int) -> torch.Tensor:
        return torch.randn(start.shape, generator=generator)

    x = walk(net, diffusion, start, timesteps, 2, fresh)
    alpha, sigma = diffusion.alpha_sigma(at(timesteps, 2, x.device), x)
    torch.testing.assert_close(x.mean(0, keepdim=True), alpha * clean, rtol=0, atol=0.06)
    torch.testing.assert_close(x.std(0), sigma[0].expand(1, 2, 2), rtol=0, atol=0.04)
    assert torch.corrcoef(torch.stack([x.flatten(), start.flatten()]))[0, 1].abs() < 0.7  # mostly of clean's spread
    left = (x - alpha * clean).flatten()
    assert torch.corrcoef(torch.stack([left, start.flatten()]))[0, 1].abs() < 0.05  # the first noise is forgotten
    torch.testing.assert_close(walk(net, diffusion, start, timesteps, 4, fresh), clean.expand_as(x), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def pipelines(make_transformer):
    return {
        "epsilon": EdgeDiTPipeline(make_transformer(), make_scheduler("epsilon")),
        "flow_prediction": EdgeDiTPipeline(
            make_transformer(prediction_type="flow_prediction"), make_scheduler("flow_prediction")
        ),
        "elastic": flow_pipelines.randomise(flow_pipelines.elastic(vae=False)),
    }


@pytest.mark.parametrize("kind", ["epsilon", "flow_prediction", "elastic"])
@pytest.mark.parametrize("stochastic", [False, True])
@torch.no_grad()
def test_the_shipped_pipelines_own_call(pipelines, kind, stochastic):
    prediction_type = "epsilon" if kind == "epsilon" else "flow_prediction"
    timesteps = EPS if kind == "epsilon" else FLOW
    pipeline = with_components(
        pipelines[kind],
        scheduler=make_few_step_scheduler(prediction_type, stochastic),
        default_steps=4,
        default_guidance_scale=1.0,
        few_step_timesteps=timesteps,
    )
    pipeline.set_progress_bar_config(disable=True)
    model = pipeline.transformer
    start = torch.randn(2, model.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    if kind == "elastic":
        what = ["a cat", "two"]
        embeds, masks = pipeline.encode_prompt(what)
        condition = {"encoder_hidden_states": embeds, "encoder_attention_mask": masks}
    else:
        what, condition = [3, 5], {"class_labels": torch.tensor([3, 5])}
    made = []
    torch.manual_seed(1)
    fresh = [torch.randn(start.shape) for _ in timesteps]
    torch.manual_seed(1)

    def look(pipe, index, t, tensors):
        made.append(tensors["latents"])
        return tensors

    generator = torch.default_generator
    pipeline(what, latents=start, output_type="latent", callback_on_step_end=look, generator=generator)
    assert len(made) == 4

    def output_of(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return model(x, t, **condition).sample[:, : x.shape[1]]

    for count, theirs in enumerate(made, 1):
        ours = walk(
            output_of, Diffusion(prediction_type), start, timesteps, count, fresh.__getitem__ if stochastic else None
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=lambda m, i=count: f"step {i}: {m}")
