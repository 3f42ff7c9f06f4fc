"""What a call of either pipeline promises, as diffusers has it: its properties, its callbacks, and that calls at once
do not mix.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import flow_pipelines
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import (
    MultiPipelineCallbacks,
    PipelineCallback,
    SD3CFGCutoffCallback,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
)

from edgedit_hf import EdgeDiTPipeline, ElasticDiTPipeline

SCALE = 3.0


class EdgeDiT:
    """A tiny class-conditional pipeline, and the same sampling written out."""

    conditioning = "class_labels"
    kind = EdgeDiTPipeline

    def __init__(self, make_transformer):
        self.pipe = EdgeDiTPipeline(make_transformer(), DDIMScheduler(beta_schedule="linear", clip_sample=False))
        self.pipe.set_progress_bar_config(disable=True)
        self.what = [3, 5, 8]

    def call(self, what, pipe=None, **options):
        return (pipe or self.pipe)(
            what, **{"num_inference_steps": 4, "guidance_scale": SCALE, "output_type": "latent", **options}
        ).images

    def predictions(self, pipe, what):
        labels = torch.tensor(what)
        null = torch.full_like(labels, pipe.transformer.config.num_classes)
        return [lambda x, t, rows=rows: pipe.transformer(x, t.expand(len(x)), rows).sample for rows in (labels, null)]


class Elastic:
    """The same of a tiny text-to-image pipeline."""

    conditioning = "prompt_embeds_2"
    kind = ElasticDiTPipeline

    def __init__(self):
        self.pipe = flow_pipelines.randomise(flow_pipelines.elastic(vae=False))
        self.pipe.set_progress_bar_config(disable=True)
        self.what = ["one", "a thick two", "zero"]

    def call(self, what, pipe=None, **options):
        return (pipe or self.pipe)(
            what, **{"num_inference_steps": 4, "guidance_scale": SCALE, "output_type": "latent", **options}
        ).images

    def predictions(self, pipe, what):
        embeds, masks = pipe.encode_prompt(what)
        return [
            lambda x, t, e=e, m=m: (
                pipe.transformer(x, t.expand(len(x)), encoder_hidden_states=e, encoder_attention_mask=m).sample
            )
            for e, m in ((embeds, masks), ([None, None], [None, None]))
        ]


@pytest.fixture(params=["edgedit", "elastic"])
def family(request, make_transformer):
    return EdgeDiT(make_transformer) if request.param == "edgedit" else Elastic()


def noise(family, rows=1, seed=0):
    config = family.pipe.transformer.config
    shape = (rows, config.in_channels, config.sample_size, config.sample_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def plain_loop(family, whats, x, scales):
    """Sampling with this conditioning and this guidance in every step."""
    integrator = type(family.pipe.scheduler).from_config(family.pipe.scheduler.config)
    integrator.set_timesteps(len(scales))
    for t, what, scale in zip(integrator.timesteps, whats, scales):
        conditional, unconditional = family.predictions(family.pipe, what)
        prediction = conditional(x, t)
        if scale > 1:
            without = unconditional(x, t)
            prediction = without + scale * (prediction - without)
        x = integrator.step(prediction, t, x).prev_sample
    return x


def at_step(step, change):
    """A callback that does something after one step."""

    def callback(pipe, index, timestep, tensors):
        if index == step:
            change(pipe, tensors)
        return tensors

    return callback


def rows_of(family, batches):
    return family.pipe.transformer.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))


# -------------------------------------------------------------------- properties and callbacks


def test_properties_in_a_callback_and_after_the_call(family):
    pipe, seen = family.pipe, []
    assert pipe.guidance_scale == pipe.config.default_guidance_scale and pipe.num_timesteps == 0 and not pipe.interrupt

    def look(pipe, index, timestep, tensors):
        seen.append((pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.num_timesteps, pipe.interrupt))
        assert float(pipe.scheduler.timesteps[index]) == float(timestep)
        return tensors

    own = pipe.scheduler
    family.call(family.what[:1], callback_on_step_end=look)
    assert seen == [(SCALE, True, 4, False)] * 4
    assert pipe.guidance_scale == SCALE and pipe.num_timesteps == 4 and not pipe.interrupt
    assert pipe.scheduler is own and len(own.timesteps) == 4  # as after a call of diffusers
    family.call(family.what[:1], guidance_scale=1.0)
    assert not pipe.do_classifier_free_guidance


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("cutoff", ["official", "several", "as in diffusers' guide", "scale alone"])
def test_guidance_may_end_in_the_middle(family, cutoff, count):
    def chunk(pipe, tensors):
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        pipe._guidance_scale = 0.0

    official = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    options = {
        "official": {"callback_on_step_end": official},
        "several": {
            "callback_on_step_end": MultiPipelineCallbacks([official, SDCFGCutoffCallback(cutoff_step_ratio=0.5)])
        },
        "as in diffusers' guide": {
            "callback_on_step_end": at_step(1, chunk),
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        },
        "scale alone": {"callback_on_step_end": at_step(1, lambda pipe, _: setattr(pipe, "_guidance_scale", 0.0))},
    }[cutoff]
    batches = []
    handle = rows_of(family, batches)
    found = family.call(family.what[:count], latents=noise(family, count), **options)
    handle.remove()
    assert batches == [2 * count, 2 * count, count, count]
    expected = plain_loop(family, [family.what[:count]] * 4, noise(family, count), [SCALE, SCALE, 0, 0])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_guidance_may_begin_and_change_in_the_middle(family):
    def change(pipe, index, timestep, tensors):
        pipe._guidance_scale = [1.0, 2.0, 5.0, 5.0][index]

    found = family.call(family.what[:2], latents=noise(family, 2), guidance_scale=1.0, callback_on_step_end=change)
    expected = plain_loop(family, [family.what[:2]] * 4, noise(family, 2), [1.0, 1.0, 2.0, 5.0])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_a_callback_may_change_the_conditioning(family, scale):
    texts = family.kind is ElasticDiTPipeline
    what, other = (
        (["one", "two"], ["ten", "six"]) if texts else ([3, 5], [5, 8])
    )  # texts of one length, so that their masks stay
    names = [name for name in family.pipe._callback_tensor_inputs if name != "latents"]
    handed = {}
    keep = at_step(0, lambda pipe, tensors: handed.update({name: value.clone() for name, value in tensors.items()}))
    family.call(other, guidance_scale=scale, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=names)
    assert list(handed) == names

    def change(pipe, tensors):
        for name, value in tensors.items():
            value[-2:] = handed[name][-2:]  # in place

    changing = {"callback_on_step_end": at_step(1, change), "callback_on_step_end_tensor_inputs": names}
    found = family.call(what, latents=noise(family, 2), guidance_scale=scale, **changing)
    expected = plain_loop(family, [what, what, other, other], noise(family, 2), [scale] * 4)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_tensors_that_are_not_there_or_of_a_wrong_shape_are_refused(family):
    for callback in (SDXLCFGCutoffCallback(), SD3CFGCutoffCallback()):
        with pytest.raises(ValueError, match="tensors are .*latents.*prompt_embeds") as error:
            family.call(family.what, callback_on_step_end=callback)
        assert str(callback.tensor_inputs[-1]) in str(error.value)

    def wrong(pipe, tensors):
        tensors[family.conditioning] = tensors[family.conditioning][:0]

    with pytest.raises(ValueError, match=f"returned {family.conditioning} of shape.*handed"):
        family.call(
            family.what,
            callback_on_step_end=at_step(0, wrong),
            callback_on_step_end_tensor_inputs=[family.conditioning],
        )


def test_labels_of_a_callback_are_checked_and_an_unconditional_net_has_none(make_transformer):
    family = EdgeDiT(make_transformer)

    def wrong(pipe, tensors):
        tensors["class_labels"][-1] = 99

    with pytest.raises(ValueError, match="99.*0 … 9"):
        family.call([1], callback_on_step_end=at_step(0, wrong), callback_on_step_end_tensor_inputs=["class_labels"])
    pipe = EdgeDiTPipeline(make_transformer(num_classes=0), DDIMScheduler())
    assert (
        not pipe(batch_size=2, num_inference_steps=2, callback_on_step_end=SDCFGCutoffCallback(), output_type="pt")
        .images.isnan()
        .any()
    )
    assert not pipe.do_classifier_free_guidance


class Interrupt(PipelineCallback):
    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 1
        return tensors


def test_a_callback_may_stop_and_the_next_call_starts_afresh(family):
    steps = []
    handle = rows_of(family, steps)
    family.call(family.what[:1], callback_on_step_end=Interrupt())
    assert len(steps) == 2 and family.pipe.interrupt
    family.call(family.what[:1])
    handle.remove()
    assert len(steps) == 6 and not family.pipe.interrupt


# -------------------------------------------------------------------- calls at once


@pytest.mark.parametrize("pipes", ["one pipeline", "two around the same components"])
@pytest.mark.parametrize("multistep", [False, True])
def test_calls_at_once_equal_the_same_calls_one_at_a_time(family, pipes, multistep):
    if multistep:  # which keeps earlier outputs
        given = (
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
            if family.kind is ElasticDiTPipeline
            else {"beta_schedule": "linear"}
        )
        family.pipe.scheduler = DPMSolverMultistepScheduler(**given)
    other = family.pipe if pipes == "one pipeline" else family.kind(**family.pipe.components)
    other.set_progress_bar_config(disable=True)
    barrier = threading.Barrier(2, timeout=60)

    def cut(pipe, index, timestep, tensors):
        if index == 2:
            pipe._guidance_scale = 0.0

    jobs = [
        (family.pipe, family.what[:1], {"num_inference_steps": 4, "callback_on_step_end": cut, "guidance_scale": 2.0}),
        (
            other,
            family.what[1:],
            {"num_inference_steps": 6, "callback_on_step_end": Interrupt(), "guidance_scale": SCALE},
        ),
        (family.pipe, family.what[:2], {"num_inference_steps": 5, "guidance_scale": 1.0}),
        (other, family.what, {"num_inference_steps": 3}),
    ]

    def run(job, together=False):
        pipe, what, options = job
        if together:
            barrier.wait()
        return family.call(what, pipe, latents=noise(family, len(what)), **options)

    expected = [run(job) for job in jobs]
    assert not torch.equal(expected[0], expected[2][:1])
    for pair in ((0, 1), (2, 3)):
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda index: run(jobs[index], together=True), pair))
        assert all(torch.equal(image, expected[index]) for image, index in zip(found, pair))
    assert not family.pipe._running_calls


def test_a_call_within_a_callback_leaves_the_outer_one_alone(family):
    alone = family.call(family.what[:1], latents=noise(family))

    def inner(pipe, tensors):
        family.call(family.what[1:2], num_inference_steps=2, guidance_scale=1.0)
        assert (pipe.guidance_scale, pipe.num_timesteps) == (SCALE, 4)

    assert torch.equal(
        family.call(family.what[:1], latents=noise(family), callback_on_step_end=at_step(1, inner)), alone
    )


def test_another_thread_may_stop_the_calls_in_progress(family):
    steps = []

    def stop(pipe, tensors):
        thread = threading.Thread(target=lambda: (steps.append(pipe.num_timesteps), setattr(pipe, "_interrupt", True)))
        thread.start()
        thread.join()

    batches = []
    handle = rows_of(family, batches)
    family.call(family.what[:1], callback_on_step_end=at_step(1, stop))
    handle.remove()
    assert steps == [4] and len(batches) == 2


def test_a_callback_that_raises_leaves_nothing_behind(family):
    alone = family.call(family.what[:1], latents=noise(family))

    def fail(pipe, tensors):
        pipe._guidance_scale = 9.0
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        family.call(family.what[:1], num_inference_steps=7, callback_on_step_end=at_step(1, fail))
    assert torch.equal(family.call(family.what[:1], latents=noise(family)), alone) and not family.pipe._running_calls


# -------------------------------------------------------------------- arguments and components


def test_a_tuple_of_generators_is_a_list_of_them(family):
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    found = family.call(family.what[:2], generator=tuple(generators()))
    assert torch.equal(found, family.call(family.what[:2], generator=generators()))
    with pytest.raises(ValueError, match="2 generators were given for 1 images"):
        family.call(family.what[:1], generator=tuple(generators()))


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_guidance_that_is_not_finite_is_refused(family, scale):
    with pytest.raises(ValueError, match=f"guidance_scale is {scale}"):
        family.call(family.what, guidance_scale=scale)


@pytest.mark.parametrize("steps", ["4", 2.5, True, 0, -1])
def test_steps_are_a_whole_number(family, steps):
    with pytest.raises(ValueError, match=f"num_inference_steps is {steps!r}; it must be at least 1"):
        family.call(family.what, num_inference_steps=steps)
    one, other = (family.call(family.what, num_inference_steps=n, generator=seeded()) for n in (2, np.int64(2)))
    assert torch.equal(one, other)


def seeded():
    return torch.Generator().manual_seed(0)


def test_a_pipeline_without_transformer_or_scheduler_decodes_but_does_not_generate(family, tmp_path):
    components = family.pipe.components
    if family.kind is EdgeDiTPipeline:
        components["id2label"] = {"0": "zero"}
    without = family.kind(**{**components, "transformer": None})
    assert without.decode(noise(family)).shape == noise(family).shape
    with pytest.raises(ValueError, match="transformer=None.*pipeline.transformer"):
        family.call(family.what, without)
    with pytest.raises(ValueError, match="scheduler=None"):
        family.call(family.what, family.kind(**{**components, "scheduler": None}))
    family.kind(**components).save_pretrained(tmp_path)
    loaded = family.kind.from_pretrained(tmp_path, transformer=None)
    assert loaded.transformer is None
    loaded.transformer = family.pipe.transformer
    loaded.set_progress_bar_config(disable=True)
    latents = noise(family, len(family.what))
    assert torch.equal(family.call(family.what, loaded, latents=latents), family.call(family.what, latents=latents))


def test_names_of_foreign_classes_are_refused_when_the_transformer_comes_later(make_transformer):
    pipe = EdgeDiTPipeline(None, DDIMScheduler(), id2label={"10": "ten"})
    pipe.transformer = make_transformer()
    with pytest.raises(ValueError, match="'10'.*0 … 9"):
        pipe("ten")


def flow(family, make_transformer, **config):
    """The pipeline with a scheduler for flow matching."""
    if family.kind is EdgeDiTPipeline:
        family.pipe = EdgeDiTPipeline(
            make_transformer(prediction_type="flow_prediction"), FlowMatchEulerDiscreteScheduler(**config)
        )
        family.pipe.set_progress_bar_config(disable=True)
    else:
        family.pipe.scheduler = FlowMatchEulerDiscreteScheduler(**config)
    return family


def test_one_step_of_a_schedule_with_a_shifted_terminal_is_an_error_that_names_it(family, make_transformer):
    family = flow(family, make_transformer, shift_terminal=0.1)
    with pytest.raises(ValueError, match="num_inference_steps is 1.*shift_terminal 0.1"):
        family.call(family.what, num_inference_steps=1)
    assert family.call(family.what, num_inference_steps=2).isfinite().all()
    assert float(family.pipe.scheduler.timesteps[-1]) == pytest.approx(100.0)


def test_a_scheduler_config_of_a_wrong_type_is_an_error_that_names_the_scheduler(family, make_transformer):
    family = flow(family, make_transformer, shift_terminal="text")
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler makes no timesteps with its config"):
        family.call(family.what, num_inference_steps=2)


def test_dynamic_shifting_follows_the_number_of_tokens(family, make_transformer):
    family = flow(family, make_transformer, use_dynamic_shifting=True)
    family.call(family.what[:1])
    config, tokens = (
        family.pipe.scheduler.config,
        (family.pipe.transformer.config.sample_size // family.pipe.transformer.config.patch_size) ** 2,
    )
    share = (tokens - config.base_image_seq_len) / (config.max_image_seq_len - config.base_image_seq_len)
    expected = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    expected.set_timesteps(4, mu=config.base_shift + share * (config.max_shift - config.base_shift))
    torch.testing.assert_close(family.pipe.scheduler.timesteps, expected.timesteps)


# -------------------------------------------------------------------- not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_output_that_is_not_finite_stops_at_the_first_step_and_names_the_culprit(family, value):
    steps = []
    handle = rows_of(family, steps)
    latents = noise(family)
    latents[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="latents holds NaN or infinite"):
        family.call(family.what[:1], latents=latents)
    weight = dict(family.pipe.transformer.named_parameters())["proj_out.weight"]
    whole = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = value
    with pytest.raises(ValueError, match="1 of .* weights.*proj_out.weight"):
        family.call(family.what[:1], latents=noise(family))
    with torch.no_grad():
        weight.copy_(whole * 3e38)
        weight.clamp_(-3e38, 3e38)
    with pytest.raises(ValueError, match="overflows in float32"):
        family.call(family.what[:1], latents=noise(family))
    handle.remove()
    assert len(steps) == 3
