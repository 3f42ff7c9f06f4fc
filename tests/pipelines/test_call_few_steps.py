"""A pipeline that was distilled for few steps: both families take its timesteps untold."""

import json
import logging

import diffusers
import flow_pipelines
import numpy as np
import pytest
import torch

from edgedit_hf import EdgeDiTError, EdgeDiTPipeline, ElasticDiTPipeline
from edgedit_hf.diffusion import make_few_step_scheduler, make_scheduler
from edgedit_hf.pipelines.loading import load_pipeline, with_components

EPS, FLOW = [800, 600, 400, 200], [1000, 900, 750, 500]


def few_step(pipeline, timesteps, stochastic=False):
    kind = pipeline.transformer.config.get("prediction_type", "flow_prediction")
    pipe = with_components(
        pipeline,
        scheduler=make_few_step_scheduler(kind, stochastic),
        default_steps=len(timesteps),
        default_guidance_scale=1.0,
        few_step_timesteps=timesteps,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def plain(make_transformer):
    """Pipelines as they are before distillation, by family, with what they draw."""
    flow = make_transformer(prediction_type="flow_prediction")
    return {
        "edgedit": (EdgeDiTPipeline(make_transformer(), make_scheduler("epsilon")), [3, 5], EPS),
        "edgedit-flow": (EdgeDiTPipeline(flow, make_scheduler("flow_prediction")), [3, 5], FLOW),
        "elastic": (flow_pipelines.randomise(flow_pipelines.elastic(vae=False)), ["one", "a thick two"], FLOW),
    }


@pytest.fixture(params=["edgedit", "edgedit-flow", "elastic"])
def family(request, plain):
    return plain[request.param]


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


@pytest.fixture
def warned():
    """What diffusers' loggers, of which the pipelines' are children or peers, said."""
    handler = Warnings()
    loggers = [diffusers.utils.logging.get_logger(name) for name in ("diffusers", "edgedit_hf.pipelines.call")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler.said
    for logger in loggers:
        logger.removeHandler(handler)


def seen_by(pipe):
    """(timesteps, rows) of every forward."""
    seen = []

    def see(module, args):
        seen.append((float(args[1].flatten()[0]), len(args[0])))

    return seen, pipe.transformer.register_forward_pre_hook(see)


@torch.no_grad()
def by_hand(pipe, what, x, timesteps):
    """Deterministic sampling in closed form: every step to alpha' x0 + sigma' eps, the last to x0."""
    product = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    flow = pipe.transformer.config.get("prediction_type", "flow_prediction") == "flow_prediction"
    levels = [(1 - t / 1000, t / 1000) if flow else (product[t] ** 0.5, (1 - product[t]) ** 0.5) for t in timesteps]
    levels.append((1.0, 0.0))
    if isinstance(pipe, ElasticDiTPipeline):
        embeds, masks = pipe.encode_prompt(what)
        condition = {"encoder_hidden_states": embeds, "encoder_attention_mask": masks}
    else:
        condition = {"class_labels": torch.tensor(what)}
    for t, (alpha, sigma), (alpha_next, sigma_next) in zip(timesteps, levels, levels[1:]):
        output = pipe.transformer(x.float(), torch.full((len(x),), float(t)), **condition).sample.double()
        clean, noise = (x - sigma * output, x + alpha * output) if flow else ((x - sigma * output) / alpha, output)
        x = alpha_next * clean + sigma_next * noise
    return x


def start(pipe, rows=2):
    config = pipe.transformer.config
    shape = (rows, config.in_channels, config.sample_size, config.sample_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_call_without_arguments_takes_the_timesteps_and_no_guidance(family, count, tmp_path, warned):
    pipeline, what, timesteps = family
    few_step(pipeline, timesteps[:count]).save_pretrained(tmp_path)
    for pipe in (diffusers.DiffusionPipeline.from_pretrained(tmp_path), load_pipeline(tmp_path, kind=KINDS)):
        pipe.set_progress_bar_config(disable=True)
        seen, handle = seen_by(pipe)
        x = start(pipe)
        images = pipe(what, latents=x, output_type="latent").images
        assert [round(t, 3) for t, _ in seen] == timesteps[:count] and {rows for _, rows in seen} == {2}
        handle.remove()
        expected = by_hand(pipe, what, x.double(), timesteps[:count])
        torch.testing.assert_close(images.double(), expected, rtol=0, atol=2e-4 * float(expected.abs().max()))
    assert warned == []


KINDS = ("EdgeDiTPipeline", "ElasticDiTPipeline")


@pytest.mark.parametrize(
    "asked, said",
    [
        ({"num_inference_steps": 3}, ["num_inference_steps is 3"]),
        ({"guidance_scale": 2.5}, ["guidance_scale is 2.5"]),
        ({"num_inference_steps": 8, "guidance_scale": 4.0}, ["num_inference_steps is 8", "guidance_scale is 4"]),
        ({"num_inference_steps": 4, "guidance_scale": 1.0}, []),
        ({"guidance_scale": 0.0}, []),
    ],
)
def test_other_steps_or_guidance_give_one_warning_and_are_done(family, asked, said, warned):
    pipeline, what, timesteps = family
    pipe = few_step(pipeline, timesteps)
    seen, handle = seen_by(pipe)
    pipe(what, **asked, output_type="latent")
    handle.remove()
    assert len(seen) == asked.get("num_inference_steps", 4)
    assert {rows for _, rows in seen} == {4 if asked.get("guidance_scale", 0) > 1 else 2}
    assert len(warned) == (len(said) > 0), warned
    for part in [*said, "distilled for 4 steps without guidance"] if said else []:
        assert part in warned[0]


def test_another_number_of_steps_is_spread_over_the_same_levels(family, warned):
    pipeline, what, timesteps = family
    pipe = few_step(pipeline, timesteps)
    more = {EPS[0]: [800, 700, 600, 500, 400, 300, 200, 100], FLOW[0]: [1000, 950, 900, 825, 750, 625, 500, 250]}
    for steps, expected in ((1, timesteps[:1]), (2, timesteps[::2]), (8, more[timesteps[0]])):
        x = start(pipe)
        found = pipe(what, num_inference_steps=steps, latents=x, output_type="latent").images
        torch.testing.assert_close(
            pipe.scheduler.timesteps.double(), torch.tensor(expected).double(), atol=1e-3, rtol=0
        )
        wanted = by_hand(pipe, what, x.double(), expected)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-4 * float(wanted.abs().max()))
    assert len(warned) == 3


def test_more_steps_than_levels_are_refused(plain):
    """There the net would be asked at timesteps above its first, which it was not made for."""
    pipeline, what, _ = plain["edgedit"]
    pipe = few_step(pipeline, [8, 6, 4, 2])
    pipe(what, num_inference_steps=8, output_type="latent")
    assert pipe.scheduler.timesteps.tolist() == [8, 7, 6, 5, 4, 3, 2, 1]
    with pytest.raises(ValueError, match="num_inference_steps is 9, but .* distilled for the timesteps 8, 6, 4, 2"):
        pipe(what, num_inference_steps=9, output_type="latent")


def test_a_scheduler_that_has_no_so_short_schedule_is_named(plain):
    pipe = few_step(plain["edgedit"][0], [601, 10])
    with pytest.raises(ValueError, match="num_inference_steps is 22, but .* timesteps 601, 10, .* take fewer"):
        pipe(1, num_inference_steps=22)
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="PNDMScheduler makes no schedule of 2 steps .* take another number"):
        pipe(1)


def test_re_noising_is_a_function_of_the_generator(family, tmp_path, warned):
    pipeline, what, timesteps = family
    few_step(pipeline, timesteps, stochastic=True).save_pretrained(tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    x = start(pipe)

    def images(seed):
        generators = [torch.Generator().manual_seed(seed + i) for i in range(2)]
        return pipe(what, latents=x, generator=generators, output_type="latent").images

    first, again, other = images(1), images(1), images(9)
    assert torch.equal(first, again) and (first - other).abs().max() > 1e-3
    assert [round(float(t), 3) for t in pipe.scheduler.timesteps] == timesteps and warned == []


@pytest.mark.parametrize(
    "kind, name, config, takes",
    [
        ("edgedit", "DDIMScheduler", {"clip_sample": False}, False),
        ("edgedit", "UniPCMultistepScheduler", {}, False),
        ("edgedit", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, False),
        ("edgedit", "HeunDiscreteScheduler", {}, False),
        ("edgedit", "DPMSolverMultistepScheduler", {"solver_order": 2}, True),
        ("edgedit", "DDPMScheduler", {"clip_sample": False}, True),
        ("edgedit", "EulerDiscreteScheduler", {}, True),
        ("elastic", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, False),
        ("elastic", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, False),
        ("elastic", "FlowMatchHeunDiscreteScheduler", {}, False),
        (
            "elastic",
            "DPMSolverMultistepScheduler",
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
            False,
        ),
        ("elastic", "UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, True),
    ],
)
def test_other_schedulers_take_the_timesteps_or_say_that_they_do_not(plain, kind, name, config, takes, warned):
    pipeline, what, timesteps = plain[kind]
    pipe = few_step(pipeline, timesteps)
    pipe.scheduler = getattr(diffusers, name)(**config)
    pipe(what, output_type="latent")
    found = [round(float(t)) for t in pipe.scheduler.timesteps]
    assert (np.abs(np.subtract(found[:4], timesteps)).max() <= 1) == takes  # UniPC begins at 999
    if takes:
        assert warned == []
    else:
        expected = getattr(diffusers, name)(**config)
        expected.set_timesteps(4, **({"mu": 1.0} if "use_dynamic_shifting" in config else {}))
        assert len(found) == len(expected.timesteps)
        assert len(warned) == 1 and name in warned[0] and ", ".join(map(str, timesteps)) in warned[0]


BAD = [
    ([], "falling"),
    ([500, 900], "falling"),
    ([500, 500], "falling"),
    ([1001.0, 500], "up to"),
    ([500, 0], "above 0"),
    ([float("nan"), 500], "falling"),
    (["800", "600"], "falling"),
    ([True], "falling"),
    ({"800": 1}, "list"),
    (800, "list"),
    ("abcd", "list"),
    ([900, 800, 700], "has 3 timesteps, but default_steps is 4"),
]


@pytest.mark.parametrize("value, said", BAD)
def test_timesteps_that_cannot_be_are_one_error(family, value, said):
    pipeline, what, timesteps = family
    few = {"scheduler": pipeline.scheduler, "default_steps": 4, "default_guidance_scale": 1.0}
    few["default_steps"] = 4 if "has 3" in said or not isinstance(value, list) else len(value)
    with pytest.raises(ValueError, match=said):
        with_components(pipeline, **few, few_step_timesteps=value)


def test_what_predicts_noise_takes_whole_numbers_below_1000(plain):
    for value in ([1000, 500], [800.5, 300]):
        with pytest.raises(ValueError, match="falling whole numbers above 0 and up to 999"):
            few_step(plain["edgedit"][0], value)
        few_step(plain["edgedit-flow"][0], value)


def test_a_default_guidance_beside_them_is_an_error(family):
    pipeline, _, timesteps = family
    with pytest.raises(ValueError, match="default_guidance_scale is 4.0"):
        with_components(pipeline, default_steps=4, default_guidance_scale=4.0, few_step_timesteps=timesteps)


def test_odd_values_in_a_foreign_folder_are_one_error_that_names_it(family, tmp_path):
    pipeline, _, timesteps = family
    few_step(pipeline, timesteps).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for value, _ in BAD:
        (tmp_path / "model_index.json").write_text(json.dumps({**index, "few_step_timesteps": value}))
        with pytest.raises(EdgeDiTError, match="few_step_timesteps") as raised:
            load_pipeline(tmp_path, kind=KINDS)
        assert str(tmp_path) in str(raised.value)


def test_a_folder_of_before_there_was_such_a_key_loads_unchanged(family, tmp_path):
    pipeline, what, _ = family
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index.pop("few_step_timesteps") is None
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipe, x = load_pipeline(tmp_path, kind=KINDS), start(pipeline)
    assert pipe.config.few_step_timesteps is None
    for each in (pipe, pipeline):
        each.set_progress_bar_config(disable=True)
    first, second = (
        each(what, latents=x, num_inference_steps=2, output_type="latent").images for each in (pipe, pipeline)
    )
    assert torch.equal(first, second)


def test_loads_from_the_hub_and_with_bundled_code(family, tmp_path, make_hub_cache):
    """The list of timesteps in model_index.json is not taken for a component."""
    pipeline, what, timesteps = family
    pipe = few_step(pipeline, timesteps)
    pipe.save_pretrained(tmp_path / "few", bundle_code=True)
    bundled = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "few", trust_remote_code=True)
    assert type(bundled).__module__.startswith("diffusers_modules")
    pipe.save_pretrained(tmp_path / "plain")
    cache = make_hub_cache(tmp_path / "plain", "acme/few")
    downloaded = diffusers.DiffusionPipeline.from_pretrained("acme/few", cache_dir=cache, local_files_only=True)
    x = start(pipe)
    expected = pipe(what, latents=x, output_type="latent").images
    for other in (bundled, downloaded):
        other.set_progress_bar_config(disable=True)
        assert torch.equal(other(what, latents=x, output_type="latent").images, expected)
        assert other.config.few_step_timesteps == timesteps


def test_from_pipe_is_the_same_pipeline(family, tmp_path):
    """Of the very modules, with what is saved beside them, also from and to bundled code; another scheduler may be
    given.
    """
    (pipeline, what, timesteps), latent = family, {"output_type": "latent"}
    pipe = few_step(pipeline, timesteps)
    again = type(pipe).from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    assert again.transformer is pipe.transformer and dict(again.config) == dict(pipe.config)
    x = start(pipe)
    images = (p(what, latents=x, output_type="latent").images for p in (pipe, again))
    assert torch.equal(*images)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    assert type(pipe).from_pipe(pipe, scheduler=scheduler).scheduler is scheduler
    pipe.save_pretrained(tmp_path, bundle_code=True)
    bundled = diffusers.DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    for to, of in ((type(pipe), bundled), (type(bundled), pipe), (type("Own", (type(pipe),), {}), pipe)):
        taken = to.from_pipe(of, trust_remote_code=True)
        taken.set_progress_bar_config(disable=True)
        assert taken.components == of.components
        assert torch.equal(taken(what, latents=x, output_type="latent").images, pipe(what, latents=x, **latent).images)
    pipe.transformer.to(torch.bfloat16)
    assert type(pipe).from_pipe(pipe).transformer.dtype == torch.bfloat16
    pipe.transformer.float()


def test_a_sub_network_of_a_few_step_supernet_is_one_too(plain, tmp_path):
    pipeline, what, timesteps = plain["elastic"]
    pipe = few_step(pipeline, timesteps)
    pipe.save_pretrained(tmp_path)
    small, x = ElasticDiTPipeline.from_pretrained(tmp_path, subnet="small"), start(pipe)
    small.set_progress_bar_config(disable=True)
    assert small.config.few_step_timesteps == timesteps
    found, expected = (
        p(what, latents=x, output_type="latent", **o).images for p, o in ((small, {}), (pipe, {"subnet": "small"}))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
