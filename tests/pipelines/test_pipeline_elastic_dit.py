"""ElasticDiTPipeline: how it reads prompts, what it samples at every width, what it refuses, and that it saves and
loads.
"""

import inspect
import json
import logging
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, PipelineQuantizationConfig
from diffusers.callbacks import PipelineCallback
from safetensors import safe_open

from edgedit_hf import ElasticDiTPipeline, ElasticDiTTransformer2DModel
from edgedit_hf.quantization.quantizer import EdgeDiTQuantizationConfig

WORDS = "a photo of digit zero one two three thick thin slanted upright".split()
WINDOW = 8  # positions of the tiny CLIP: six words a window


def make_tokenizer(start: str | None, end: str | None):
    """A word tokenizer of transformers with the special tokens that a model of its kind puts around a prompt."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    single = " ".join(token for token in (start, "$A", end) if token)
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token=start, eos_token=end
    )


def make_encoder(kind: str, width: int):
    """(text encoder, tokenizer) of a kind, tiny, with random weights."""
    import transformers

    torch.manual_seed(0)
    size = {"vocab_size": 4 + len(WORDS), "pad_token_id": 0}
    layers = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "clip":
        config = transformers.CLIPTextConfig(
            **size, **layers, max_position_embeddings=WINDOW, bos_token_id=1, eos_token_id=2
        )
        return transformers.CLIPTextModel(config).eval(), make_tokenizer("<s>", "</s>")
    if kind == "t5":
        config = transformers.T5Config(
            **size, d_model=width, d_kv=width // 2, d_ff=2 * width, num_layers=2, num_heads=2, dropout_rate=0.0
        )
        return transformers.T5EncoderModel(config).eval(), make_tokenizer(None, "</s>")
    decoder = {**size, **layers, "head_dim": width // 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gemma3":
        return transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**decoder)).eval(), make_tokenizer(
            "<s>", None
        )
    if kind == "qwen3":
        return transformers.Qwen3Model(transformers.Qwen3Config(**decoder)).eval(), make_tokenizer("<s>", None)
    if kind == "t5gemma":
        config = transformers.T5GemmaConfig(encoder=dict(decoder), decoder=dict(decoder), is_encoder_decoder=False)
        return transformers.T5GemmaEncoderModel(config).eval(), make_tokenizer("<s>", None)
    if kind == "gemma2-lm":
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**decoder)).eval(), make_tokenizer("<s>", None)
    return transformers.Gemma2Model(transformers.Gemma2Config(**decoder)).eval(), make_tokenizer("<s>", None)


def make_net(seed: int = 0, **config) -> ElasticDiTTransformer2DModel:
    """A tiny net whose every weight is random: a fresh one predicts zero."""
    net = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug", **config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net


def make_pipeline(first: str | None = "clip", second: str | None = "t5", net=None, **components) -> ElasticDiTPipeline:
    net = make_net() if net is None else net
    for suffix, kind, width in zip(("", "_2"), (first, second), net.config.text_dims):
        if kind is not None:
            components[f"text_encoder{suffix}"], components[f"tokenizer{suffix}"] = make_encoder(kind, width)
    pipeline = ElasticDiTPipeline(
        net, components.pop("scheduler", FlowMatchEulerDiscreteScheduler()), **components, default_steps=3
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def shared():
    """One pipeline for the tests that change nothing in it."""
    return make_pipeline()


def noise(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample(pipeline, *args, **kwargs) -> torch.Tensor:
    return pipeline(*args, **{"output_type": "latent", "generator": torch.Generator().manual_seed(0), **kwargs}).images


# -------------------------------------------------------------------- text


@torch.no_grad()
def test_clip_reads_a_prompt_as_transformers_does(shared):
    embeds, masks = shared.encode_prompt(["a thick digit two", "a zero"])
    tokens = shared.tokenizer(["a thick digit two", "a zero"], padding=True, return_tensors="pt")
    expected = shared.text_encoder(**tokens).last_hidden_state
    assert torch.equal(masks[0], tokens.attention_mask.bool()) and masks[0].sum(1).tolist() == [6, 4]
    torch.testing.assert_close(embeds[0][masks[0]], expected[masks[0]])
    assert not embeds[0][~masks[0]].any()


@torch.no_grad()
def test_a_prompt_longer_than_clips_window_is_read_in_windows(shared):
    words = (WORDS * 2)[:15]
    embeds, masks = shared.encode_prompt([" ".join(words), "one"])
    assert embeds[0].shape == (2, 15 + 3 * 2, 16) and masks[0].sum(1).tolist() == [21, 3]  # windows of 6, 6 and 3 words
    windows = [
        shared.text_encoder(**shared.tokenizer(" ".join(words[i : i + 6]), return_tensors="pt")).last_hidden_state[0]
        for i in (0, 6, 12)
    ]
    torch.testing.assert_close(embeds[0][0], torch.cat(windows))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["t5", "gemma2", "gemma3", "gemma2-lm", "t5gemma", "qwen3"])
def test_other_encoders_read_a_prompt_as_transformers_does(kind, caplog):
    pipeline = make_pipeline(None, kind)
    prompts = ["a photo of a thin slanted three", "two"]
    embeds, masks = pipeline.encode_prompt(prompts)
    assert embeds[0] is None and masks[0] is None
    special = 1  # T5 ends a prompt, Gemma starts it with one
    assert masks[1].sum(1).tolist() == [7 + special, 1 + special] and not embeds[1][1, 2:].any()
    for row, prompt in enumerate(prompts):
        tokens = pipeline.tokenizer_2(prompt, return_tensors="pt")
        body = getattr(pipeline.text_encoder_2, "model", pipeline.text_encoder_2)  # a language model without its head
        expected = body(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state[0]
        torch.testing.assert_close(embeds[1][row][masks[1][row]], expected, rtol=1e-5, atol=1e-5)
    assert not caplog.records


def test_a_prompt_that_is_cut_is_a_warning_with_what_is_lost(shared, caplog):
    with caplog.at_level(logging.WARNING):
        embeds, _ = shared.encode_prompt(["one", "a photo of a thick three"], max_sequence_length=5)
    assert embeds[1].shape[1] == 5 and embeds[0].shape[1] > 5  # CLIP is not cut
    (record,) = caplog.records
    for words in ("Prompt 1", "7 tokens", "max_sequence_length is 5", "'thick three'"):
        assert words in record.getMessage()


@pytest.mark.parametrize("first, second", [("clip", None), (None, "t5"), ("clip", "gemma2")])
def test_either_encoder_may_be_missing(first, second):
    pipeline = make_pipeline(first, second)
    embeds, masks = pipeline.encode_prompt("a thick one")
    assert [e is None for e in embeds] == [first is None, second is None] == [m is None for m in masks]
    one, other = sample(pipeline, "a thick one"), sample(pipeline, "a thin two")
    assert (one - other).abs().max() > 1e-3
    assert torch.equal(sample(pipeline, prompt_embeds=embeds, prompt_masks=masks), one)


def test_an_encoder_without_a_pad_token_and_an_empty_prompt():
    pipeline = make_pipeline("clip", "gemma2")
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        tokenizer.pad_token = None
    embeds, masks = pipeline.encode_prompt(["", "a thick one"])
    assert masks[0].sum(1).tolist() == [2, 5] and masks[1].sum(1).tolist() == [1, 4]
    assert all(states.isfinite().all() for states in embeds)


# -------------------------------------------------------------------- sampling


@torch.no_grad()
def plain_loop(pipeline, prompts, negative, steps, scale, latents, subnet):
    """Euler's method on x_t = (1 − σ) x0 + σ ε, image by image and branch by branch."""
    net = pipeline.transformer.extract_subnet(subnet)
    sigmas = torch.linspace(1, 1 / 1000, 1000)[torch.linspace(0, 999, steps).round().long()].tolist() + [0.0]
    images = []
    for row, prompt in enumerate(prompts):

        def velocity(x, sigma, text):
            embeds = None if text is None else pipeline.encode_prompt(text)[0]
            return net(x, torch.tensor(1000 * sigma), embeds).sample

        x = latents[row : row + 1].clone()
        for sigma, following in zip(sigmas, sigmas[1:]):
            conditional = velocity(x, sigma, prompt)
            unconditional = velocity(x, sigma, None if negative is None else negative[row])
            x = x + (following - sigma) * (unconditional + scale * (conditional - unconditional))
        images.append(x)
    return torch.cat(images)


@pytest.mark.parametrize("subnet, negative", [("tiny", None), ("full", ["a thick one", ""])])
def test_sampling_agrees_with_a_plain_loop(shared, subnet, negative):
    prompts, latents = ["a thin slanted three", "two"], noise(2, 1, 8, 8)
    found = sample(shared, prompts, negative, num_inference_steps=4, guidance_scale=2.5, latents=latents, subnet=subnet)
    expected = plain_loop(shared, prompts, negative, 4, 2.5, latents, subnet)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * expected.abs().max().item())


def test_no_guidance_takes_one_pass_and_guidance_two_in_one_batch(shared):
    batches = []
    handle = shared.transformer.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    shared(["one", "two"], guidance_scale=1.0)
    shared(["one", "two"], guidance_scale=3.0)
    handle.remove()
    assert batches == [2, 2, 2, 4, 4, 4]


def test_prompts_are_encoded_once_and_one_negative_prompt_serves_all(shared):
    calls = []
    handle = shared.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    shared(["one", "two"], "zero", num_inference_steps=5)
    handle.remove()
    assert len(calls) == 2
    latents = noise(2, 1, 8, 8)
    both = sample(shared, ["one", "two"], ["zero", "zero"], latents=latents)
    torch.testing.assert_close(sample(shared, ["one", "two"], "zero", latents=latents), both, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        sample(shared, ["one", "two"], latents=latents), both, atol=1e-2
    )  # no text at all is something else


def test_images_of_a_prompt_follow_one_another(shared):
    latents = noise(4, 1, 8, 8)
    repeated = sample(shared, ["one", "two"], num_images_per_prompt=2, latents=latents)
    torch.testing.assert_close(repeated, sample(shared, ["one", "one", "two", "two"], latents=latents))


def test_no_text_at_all_is_the_unconditional_net(shared):
    latents = noise(1, 1, 8, 8)
    without = sample(shared, prompt_embeds=[None, None], latents=latents)
    unguided = sample(shared, prompt_embeds=[None, None], latents=latents, guidance_scale=1.0)
    torch.testing.assert_close(without, unguided, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(without, sample(shared, "one", latents=latents), atol=1e-3)


def test_a_call_leaves_the_active_subnet_as_it_was(shared):
    shared.transformer.set_active_subnet("small")
    outputs = {name: sample(shared, "one", subnet=name) for name in shared.transformer.subnet_names}
    assert shared.transformer.active_subnet == "small" and torch.equal(sample(shared, "one"), outputs["small"])
    assert not torch.equal(outputs["tiny"], outputs["full"])

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        shared("one", subnet="tiny", callback_on_step_end=fail)
    assert shared.transformer.active_subnet == "small"
    shared.transformer.set_active_subnet("full")


def test_pipelines_at_once_on_one_transformer_do_not_mix_their_widths(shared):
    names = shared.transformer.subnet_names
    expected = {name: sample(shared, "a thick two", subnet=name) for name in names}
    together = threading.Barrier(len(names), timeout=60)

    def generate(name: str) -> torch.Tensor:
        pipeline = ElasticDiTPipeline(
            **{**shared.components, "scheduler": FlowMatchEulerDiscreteScheduler()}, default_steps=3
        )
        pipeline.set_progress_bar_config(disable=True)
        return sample(pipeline, "a thick two", subnet=name, callback_on_step_end=lambda *_: (together.wait(), {})[1])

    handle = shared.transformer.down_sample.register_forward_pre_hook(
        lambda *_: (together.wait(), None)[1]
    )  # in the middle of a forward, too
    with ThreadPoolExecutor(len(names)) as pool:
        found = dict(zip(names, pool.map(generate, names)))
    handle.remove()
    assert all(torch.equal(found[name], expected[name]) for name in names)
    assert shared.transformer.active_subnet == "full" and torch.equal(sample(shared, "a thick two"), expected["full"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_whatever_ends_a_call_leaves_the_width_alone(shared, error):
    def fail(pipeline, *_):
        assert pipeline.transformer.active_subnet == "full"  # the width is the call's, not the net's
        raise error

    with pytest.raises(error):
        shared("one", subnet="tiny", callback_on_step_end=fail)
    assert shared.transformer.active_subnet == "full"


def test_a_call_keeps_its_width_while_others_come_and_go(shared):
    expected = {name: sample(shared, "one", subnet=name) for name in ("tiny", "full")}
    inner = []

    def meddle(pipeline, step, *_):
        pipeline.transformer.set_active_subnet("tiny")
        if step == 0:
            inner.append(sample(pipeline, "one", subnet="tiny"))
        return {}

    def images():  # abandoned in the middle, as by a client that hangs up
        yield sample(shared, "one", subnet="tiny")
        yield sample(shared, "one", subnet="tiny")

    try:
        assert torch.equal(sample(shared, "one", callback_on_step_end=meddle), expected["full"]) and torch.equal(
            inner[0], expected["tiny"]
        )
        assert torch.equal(sample(shared, "one"), expected["tiny"])  # a call that begins after the switch
    finally:
        shared.transformer.set_active_subnet("full")
    stream = images()
    next(stream)
    del stream
    assert shared.transformer.active_subnet == "full" and torch.equal(sample(shared, "one"), expected["full"])


def test_one_generator_an_image_makes_images_independent_of_their_batch(shared):
    def generate(prompts, seeds):
        return sample(shared, prompts, generator=[torch.Generator().manual_seed(seed) for seed in seeds])

    together = generate(["one", "a thick digit two", "zero"], [11, 12, 13])
    for row, prompt in enumerate(["one", "a thick digit two", "zero"]):
        torch.testing.assert_close(together[row : row + 1], generate([prompt], [11 + row]), atol=1e-4, rtol=1e-4)


def test_sizes_and_output_types(shared):
    tensor = sample(shared, "one", height=12, width=16, output_type="pt")
    assert tensor.shape == (1, 1, 12, 16) and tensor.dtype == torch.float32 and 0 <= tensor.min() and tensor.max() <= 1
    array = sample(shared, "one", height=12, width=16, output_type="np")
    np.testing.assert_array_equal(array[..., 0], tensor[:, 0].numpy())
    pictures = shared("one", height=12, width=16, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
    assert pictures[0].mode == "L" and pictures[0].size == (16, 12)
    np.testing.assert_allclose(np.asarray(pictures[0]) / 255, array[0, ..., 0], atol=0.5 / 255 + 1e-6)
    torch.testing.assert_close((sample(shared, "one", height=12, width=16) / 2 + 0.5).clamp(0, 1), tensor)


def test_bf16_net_keeps_float32_latents():
    pipeline = make_pipeline()
    full = sample(pipeline, "one")
    pipeline.transformer.to(torch.bfloat16)
    half = sample(pipeline, "one")
    assert half.dtype == torch.float32 and (half - full).norm() < 0.1 * full.norm()


class PointNet(ElasticDiTTransformer2DModel):
    """The exact network for data in which every image is the constant n/10, n the number of its tokens of the first
    text encoder.

    Whatever the scheduler, sampling with it must end there: it checks timesteps, signs, masks and guidance.
    """

    def forward(
        self, hidden_states, timestep, encoder_hidden_states, encoder_attention_mask, return_dict=True, subnet=None
    ):
        assert encoder_hidden_states[0].shape[:2] == encoder_attention_mask[0].shape
        point = encoder_attention_mask[0].sum(1).view(-1, 1, 1, 1) / 10
        return (
            (hidden_states - point) / (timestep / 1000).view(-1, 1, 1, 1),
        )  # x = (1 − σ) x0 + σ ε, velocity ε − x0 = (x − x0) / σ


@pytest.mark.parametrize(
    "name, config",
    [
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    ],
)
def test_every_scheduler_for_flow_matching_reaches_the_data(name, config):
    pipeline = make_pipeline(
        "clip", None, PointNet.from_preset("elastic-dit-debug"), scheduler=getattr(diffusers, name)(**config)
    )
    for scale, expected in ((1.0, [0.3, 0.6]), (2.5, [0.75, 1.5])):
        found = sample(pipeline, ["one", "a thick digit two"], num_inference_steps=20, guidance_scale=scale)
        torch.testing.assert_close(found, torch.tensor(expected).view(2, 1, 1, 1).expand(2, 1, 8, 8), atol=0.06, rtol=0)


def test_dynamic_shifting_follows_the_number_of_tokens(shared):
    pipeline = make_pipeline(
        net=shared.transformer, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    )
    sigmas = []
    for size in (8, 16, 64):
        pipeline._set_timesteps(4, size * size)
        sigmas.append(pipeline.scheduler.sigmas[1].item())
    assert sigmas == sorted(set(sigmas))
    assert sigmas[1] == pytest.approx(np.exp(0.5) / (np.exp(0.5) + 1 / 0.66734 - 1), abs=1e-3)  # 256 tokens: base_shift


def test_offloading_changes_nothing(shared):
    from accelerate import cpu_offload

    expected = sample(shared, "a thick two", subnet="small")
    pipeline = make_pipeline()
    for component in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
        cpu_offload(component, "cpu")  # weights are on the meta device but while a layer runs
    assert next(pipeline.transformer.parameters()).is_meta
    assert torch.equal(sample(pipeline, "a thick two", subnet="small"), expected)
    pipeline = make_pipeline()
    pipeline.enable_group_offload(onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(sample(pipeline, "a thick two", subnet="small"), expected)


# -------------------------------------------------------------------- callbacks


def test_callback_sees_every_step_and_may_change_latents_or_stop(shared):
    seen = []

    def zero_then_stop(pipe, step, timestep, tensors):
        seen.append(step)
        if step == 1:
            pipe._interrupt = True
            return {"latents": torch.zeros_like(tensors["latents"])}

    assert not sample(shared, "one", num_inference_steps=5, callback_on_step_end=zero_then_stop).any()
    assert seen == [0, 1]


class GuidanceCutoff(PipelineCallback):
    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step, timestep, tensors):
        if step == int(pipeline.num_timesteps * self.config.cutoff_step_ratio):
            pipeline._guidance_scale = 0.0
        return tensors


def test_a_callback_may_end_guidance(shared):
    batches = []
    handle = shared.transformer.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    shared("one", num_inference_steps=4, callback_on_step_end=GuidanceCutoff(cutoff_step_ratio=0.5))
    handle.remove()
    assert batches == [2, 2, 2, 1] and shared.guidance_scale == 0.0 and not shared.interrupt


# -------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({}, ["prompt", "prompt_embeds"]),
        ({"prompt": []}, ["[]", "non-empty"]),
        ({"prompt": ["one", 2]}, ["['one', 2]", "string"]),
        ({"prompt": "one", "prompt_embeds": [None, None]}, ["Both prompt and prompt_embeds"]),
        ({"prompt": "one", "prompt_masks": [None, None]}, ["prompt_masks", "without prompt_embeds"]),
        (
            {"prompt": "one", "negative_prompt": "two", "negative_prompt_embeds": [None, None]},
            ["Both negative_prompt and"],
        ),
        ({"prompt": ["one", "two"], "negative_prompt": ["a"] * 3}, ["3 negative prompts", "2 prompts"]),
        ({"prompt_embeds": [torch.zeros(1, 4, 17), None]}, ["prompt_embeds[0]", "(1, 4, 17)", "16", "text_dims[0]"]),
        ({"prompt_embeds": [None, torch.zeros(4, 24)]}, ["prompt_embeds[1]", "(4, 24)", "24"]),
        ({"prompt_embeds": [torch.zeros(1, 4, 16)]}, ["1 entries", "2 text encoders"]),
        ({"prompt_embeds": [torch.zeros(1, 4, 16), torch.zeros(2, 4, 24)]}, ["[1, 2] prompts"]),
        (
            {"prompt_embeds": [torch.zeros(2, 4, 16), None], "prompt_masks": [torch.ones(2, 5), None]},
            ["prompt_masks[0]", "(2, 5)", "(2, 4)"],
        ),
        (
            {"prompt_embeds": [None, None], "prompt_masks": [torch.ones(2, 5), None]},
            ["prompt_masks[0]", "without prompt_embeds[0]"],
        ),
        ({"prompt": "one", "subnet": "huge"}, ["'huge'", "tiny, small, full"]),
        ({"prompt": "one", "height": 9}, ["height is 9", "multiple of 2"]),
        ({"prompt": "one", "width": 0}, ["width is 0"]),
        ({"prompt": "one", "num_images_per_prompt": 0}, ["num_images_per_prompt is 0"]),
        ({"prompt": "one", "num_inference_steps": 0}, ["num_inference_steps is 0"]),
        ({"prompt": "one", "max_sequence_length": 0}, ["max_sequence_length is 0"]),
        ({"prompt": "one", "output_type": "jpg"}, ["'jpg'", "'pil'"]),
        ({"prompt": ["one", "two"], "latents": torch.zeros(1, 1, 8, 8)}, ["(1, 1, 8, 8)", "(2, 1, 8, 8)"]),
        ({"prompt": ["one", "two"], "generator": [torch.Generator()]}, ["1 generators", "2 images"]),
        (
            {"prompt": "one", "callback_on_step_end_tensor_inputs": ["pooled_prompt_embeds"]},
            ["pooled_prompt_embeds", "latents"],
        ),
    ],
    ids=lambda value: "-".join(value) or "nothing" if isinstance(value, dict) else "",
)
def test_bad_arguments_are_errors_that_quote_them(shared, arguments, said):
    with pytest.raises(ValueError) as error:
        shared(**arguments)
    assert all(words in str(error.value) for words in said), str(error.value)
    assert shared.transformer.active_subnet == "full"


@pytest.mark.parametrize(
    "name, config", [("DDIMScheduler", {}), ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"})]
)
def test_a_scheduler_that_is_not_for_flow_matching_is_an_error(shared, name, config):
    pipeline = make_pipeline(net=shared.transformer, scheduler=getattr(diffusers, name)(**config))
    with pytest.raises(ValueError, match=f"'flow_prediction'.*{name}.*FlowMatchEulerDiscreteScheduler"):
        pipeline("one")


def test_text_encoders_that_do_not_fit_are_errors(shared):
    net, scheduler = shared.transformer, shared.scheduler
    encoder, tokenizer = make_encoder("clip", 16)
    with pytest.raises(ValueError, match="tokenizer without a text_encoder"):
        ElasticDiTPipeline(net, scheduler, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="text_encoder_2 without a tokenizer_2"):
        ElasticDiTPipeline(net, scheduler, text_encoder_2=encoder)
    with pytest.raises(ValueError, match=r"text_encoder_2 is 16.*takes 24 \(text_dims\[1\]\)"):
        ElasticDiTPipeline(net, scheduler, text_encoder_2=encoder, tokenizer_2=tokenizer)
    encoder.resize_token_embeddings(10)
    with pytest.raises(ValueError, match="16 tokens.*CLIPTextModel, has 10 rows"):
        ElasticDiTPipeline(net, scheduler, text_encoder=encoder, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="no text encoder.*prompt_embeds"):
        ElasticDiTPipeline(net, scheduler)("one")
    with pytest.raises(ValueError, match="text_encoder_2.*the text of 1"):
        make_pipeline(None, None, make_net(text_dims=[16]), text_encoder_2=encoder, tokenizer_2=tokenizer)


def test_a_token_beyond_the_embedding_is_an_error():
    pipeline = make_pipeline("clip", None)
    pipeline.tokenizer.add_tokens(["sixteen"])  # not in vocab_size, as Gemma 3's image tokens
    assert pipeline.encode_prompt("a thick one")[0][0] is not None
    with pytest.raises(ValueError, match="17 tokens.*16 rows"):
        pipeline.encode_prompt("a thick sixteen")


# -------------------------------------------------------------------- VAE


def make_vae(kind: str):
    torch.manual_seed(0)
    if kind == "tiny":
        blocks = {
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
        }
        return diffusers.AutoencoderTiny(latent_channels=4, scaling_factor=0.7, **blocks)
    if kind == "qwen":
        statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.0, 1.5, 2.0]}
        return diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], **statistics
        ).eval()
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.1,
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["kl", "tiny", "qwen"])
def test_latent_space_decodes_and_survives_saving(kind, tmp_path):
    vae = make_vae(kind)
    pipeline = make_pipeline(None, None, make_net(in_channels=4), vae=vae)
    assert pipeline.vae_scale_factor == 2
    embeds, latents = [noise(1, 3, 16), None], noise(1, 4, 8, 8)
    x0 = sample(pipeline, prompt_embeds=embeds, latents=latents)
    images = sample(pipeline, prompt_embeds=embeds, latents=latents, output_type="pt")
    assert images.shape == (1, 3, 16, 16)
    if kind == "qwen":
        mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, 4, 1, 1) for name in ("mean", "std"))
        decoded = vae.decode((x0 * std + mean).unsqueeze(2)).sample[:, :, 0]
    else:
        decoded = vae.decode(x0 / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)).sample
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert pipeline(prompt_embeds=embeds, height=8, width=12).images[0].size == (12, 8)
    with pytest.raises(ValueError, match="height is 6.*multiple of 4"):
        pipeline(prompt_embeds=embeds, height=6)
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.vae) is type(vae)
    assert torch.equal(sample(loaded, prompt_embeds=embeds, latents=latents, output_type="pt"), images)


def test_tiling_and_slicing_are_those_of_the_vae(shared):
    pipeline = make_pipeline(None, None, make_net(in_channels=4), vae=make_vae("kl"))
    pipeline.enable_vae_tiling()
    pipeline.enable_vae_slicing()
    assert pipeline.vae.use_tiling and pipeline.vae.use_slicing
    pipeline.disable_vae_tiling()
    pipeline.disable_vae_slicing()
    assert not pipeline.vae.use_tiling and not pipeline.vae.use_slicing
    with pytest.raises(ValueError, match="no VAE"):
        shared.enable_vae_tiling()


def test_a_vae_of_another_latent_space_is_an_error():
    with pytest.raises(ValueError, match="4 latent channels.*takes 1"):
        make_pipeline(None, None, vae=make_vae("kl"))


# -------------------------------------------------------------------- saving, loading


@pytest.fixture(scope="module")
def saved(shared, tmp_path_factory):
    """A pipeline folder with both text encoders, and what it generates."""
    folder = tmp_path_factory.mktemp("elastic") / "pipeline"
    shared.save_pretrained(folder)
    return folder, sample(shared, "a thick two")


def test_saves_and_loads_with_everything(saved):
    folder, expected = saved
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "ElasticDiTPipeline" and index["transformer"] == [
        "edgedit_hf",
        "ElasticDiTTransformer2DModel",
    ]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"] and index["vae"] == [None, None]
    loaded = DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is ElasticDiTPipeline and loaded.config.default_steps == 3
    assert torch.equal(sample(loaded, "a thick two"), expected)


def test_components_can_be_left_out_and_replaced(saved):
    folder, _ = saved
    encoders = ElasticDiTPipeline.from_pretrained(folder, transformer=None)  # to encode prompts with little memory
    embeds, masks = encoders.encode_prompt("a thick two")
    bare = ElasticDiTPipeline.from_pretrained(
        folder, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None
    )
    assert bare.text_encoder is None
    assert torch.equal(sample(bare, prompt_embeds=embeds, prompt_masks=masks), saved[1])
    other = make_net(seed=1)
    assert ElasticDiTPipeline.from_pretrained(folder, transformer=other).transformer is other


def test_loading_a_subnet_reads_its_slice_alone_and_samples_the_same(shared, saved, monkeypatch, make_hub_cache):
    folder, _ = saved
    read = {}

    class Watched:
        """A safetensors file that notes how many values of which tensor are read."""

        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            raise AssertionError(f"{name} is read as a whole")

        def get_slice(self, name):
            found = self.file.get_slice(name)

            class Slice:
                def __getitem__(_, part):
                    read[name] = found[part].numel()
                    return found[part]

            return Slice()

    monkeypatch.setattr("edgedit_hf.models.transformer_elastic_dit.safe_open", Watched)
    loaded = ElasticDiTPipeline.from_pretrained(folder, subnet="small")
    monkeypatch.undo()
    weights = sum(tensor.numel() for tensor in loaded.transformer.state_dict().values())
    assert sum(read.values()) == weights < 0.6 * sum(t.numel() for t in shared.transformer.state_dict().values())
    assert not any(".tiny." in name or ".full." in name for name in read)
    assert loaded.transformer.config.subnets is None
    torch.testing.assert_close(
        sample(loaded, "a thick two"), sample(shared, "a thick two", subnet="small"), rtol=1e-4, atol=1e-4
    )
    cache = make_hub_cache(folder, "acme/elastic")
    cached = ElasticDiTPipeline.from_pretrained(
        "acme/elastic", subnet="small", cache_dir=cache, torch_dtype=torch.bfloat16
    )
    assert (
        cached.transformer.dtype == torch.bfloat16 and cached.transformer.hidden_size == loaded.transformer.hidden_size
    )
    for wrong in (loaded, cached):
        with pytest.raises(ValueError, match="'small'.*stand-alone"):
            wrong("one", subnet="small")


def test_loading_a_subnet_that_does_not_exist_or_with_a_transformer_is_an_error(shared, saved):
    with pytest.raises(ValueError, match="'huge'.*tiny, small, full"):
        ElasticDiTPipeline.from_pretrained(saved[0], subnet="huge")
    with pytest.raises(ValueError, match="'small'.*no transformer"):
        ElasticDiTPipeline.from_pretrained(saved[0], subnet="small", transformer=shared.transformer)


OPTIONS = {  # of DiffusionPipeline.from_pretrained; what is refused by name has None
    "cache_dir": "cache",
    "force_download": True,
    "proxies": {},
    "local_files_only": True,
    "token": "secret",
    "revision": "main",
    "torch_dtype": torch.bfloat16,
    "dtype": {"transformer": torch.float16, "default": torch.float32},
    "custom_pipeline": None,
    "custom_revision": "main",
    "provider": "CPUExecutionProvider",
    "sess_options": [],
    "provider_options": [],
    "device_map": "cpu",
    "max_memory": {"cpu": "1GB"},
    "offload_folder": "offload",
    "offload_state_dict": False,
    "low_cpu_mem_usage": False,
    "variant": "half",
    "use_safetensors": True,
    "use_onnx": False,
    "load_connected_pipeline": False,
    "quantization_config": lambda: PipelineQuantizationConfig(
        quant_mapping={"transformer": EdgeDiTQuantizationConfig(default={"scheme": "nf4"})}
    ),
    "use_flashpack": None,
    "disable_mmap": True,
    "trust_remote_code": False,
    "something_new": None,
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Folders of a pipeline with a supernet, and of one with its sub-network "small" alone; weights, and others as a
    variant.
    """
    folder, net = tmp_path_factory.mktemp("both"), make_net()
    for name, model in (("net", net), ("alone", net.extract_subnet("small"))):
        pipeline = make_pipeline("clip", None, model)
        pipeline.save_pretrained(folder / name)
        with torch.no_grad():
            model.proj_out.bias += 1.0
        model.save_pretrained(folder / name / "transformer", variant="half")
    return folder


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_diffusers_means_with_subnet_what_it_means_without(both, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value, load = OPTIONS[option], ElasticDiTPipeline.from_pretrained
    if value is None:
        if option == "custom_pipeline":
            return  # another class
        with pytest.raises(ValueError, match=f"'small' cannot be combined with {option}.*transformer="):
            load(both / "net", subnet="small", **{option: True})
        return
    value = {option: value() if callable(value) else value}
    found, expected = (
        load(both / name, **given, **value) for name, given in (("net", {"subnet": "small"}), ("alone", {}))
    )
    for name in ("transformer", "text_encoder"):
        ours, theirs = getattr(found, name).state_dict(), getattr(expected, name).state_dict()
        assert list(ours) == list(theirs)
        for key, tensor in theirs.items():
            assert (ours[key].dtype, ours[key].device) == (tensor.dtype, tensor.device) and torch.equal(
                ours[key], tensor
            ), key
    assert getattr(found.transformer, "hf_device_map", None) == getattr(expected.transformer, "hf_device_map", None)


def test_no_option_of_diffusers_is_forgotten(both):
    source = inspect.getsource(DiffusionPipeline.from_pretrained)
    assert set(re.findall(r"""kwargs\.pop\(\s*["'](\w+)["']""", source)) == {*OPTIONS} - {"something_new"}
    for option, value, said in (
        ("device_map", "balanced", "device_map='balanced'"),
        ("quantization_config", {}, "is a dict; a pipeline takes a PipelineQ"),
    ):
        with pytest.raises(ValueError, match=said):
            ElasticDiTPipeline.from_pretrained(both / "net", subnet="small", **{option: value})


def test_a_subnet_of_a_folder_with_code(shared, tmp_path):
    shared.save_pretrained(tmp_path, bundle_code=True)
    loaded = ElasticDiTPipeline.from_pretrained(tmp_path, subnet="small", trust_remote_code=True)
    torch.testing.assert_close(
        sample(loaded, "a thick two"), sample(shared, "a thick two", subnet="small"), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        ElasticDiTPipeline.from_pretrained(tmp_path, subnet="small")


def test_bundled_code_loads_with_trust_and_saves_again(shared, saved, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    shared.save_pretrained(first, bundle_code=True)
    index = json.loads((first / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_elastic_dit", "ElasticDiTPipeline"]
    assert index["transformer"] == ["transformer_elastic_dit", "ElasticDiTTransformer2DModel"]
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(first)
    for folder in (first, second):
        loaded = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(sample(loaded, "a thick two"), saved[1])
        if folder == first:
            loaded.save_pretrained(second)  # its code came from a folder, so the code goes along
    with pytest.raises(ValueError, match="save first"):
        loaded.save_pretrained(tmp_path / "third", push_to_hub=True)
    with pytest.raises(ValueError, match="PointNet is not self-contained"):
        make_pipeline(None, None, PointNet.from_preset("elastic-dit-debug")).save_pretrained(
            tmp_path / "fourth", bundle_code=True
        )


# -------------------------------------------------------------------- LoRA


def test_lora_changes_every_width_and_saves_and_loads(tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline, widths = make_pipeline("clip", None), ("tiny", "small", "full")
    before = {name: sample(pipeline, "one", subnet=name) for name in widths}
    pipeline.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "proj_in"], init_lora_weights=False), "style"
    )
    changed = {name: sample(pipeline, "one", subnet=name) for name in widths}
    assert all((changed[name] - before[name]).norm() > 0.01 * before[name].norm() for name in widths)
    layers = get_peft_model_state_dict(pipeline.transformer, adapter_name="style")
    ElasticDiTPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    pipeline.disable_lora()
    for name in widths:
        assert torch.equal(sample(pipeline, "one", subnet=name), before[name])  # adapters that are off
    pipeline.unload_lora_weights()
    assert torch.equal(sample(pipeline, "one"), before["full"])
    pipeline.load_lora_weights(tmp_path, adapter_name="style")
    for name in widths:
        torch.testing.assert_close(sample(pipeline, "one", subnet=name), changed[name])
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "fused")
    for name in widths:
        torch.testing.assert_close(sample(pipeline, "one", subnet=name), changed[name], rtol=1e-3, atol=1e-3)
        alone = ElasticDiTPipeline.from_pretrained(tmp_path / "fused", subnet=name)
        torch.testing.assert_close(sample(alone, "one"), changed[name], rtol=1e-3, atol=1e-3)


def test_lora_on_an_extracted_subnet():
    from peft import LoraConfig

    pipeline = make_pipeline("clip", None, make_net().extract_subnet("tiny"))
    before = sample(pipeline, "one")
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    assert (sample(pipeline, "one") - before).norm() > 0.001 * before.norm()
