"""Recording a sampling loop and replaying it: determinism, balanced classes, moments and ranges against what layers
really saw.
"""

import pytest
import torch
import torch.nn.functional as F
from flow_pipelines import elastic, randomise
from torch import nn

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.models.transformer_elastic_dit import ElasticCompression
from edgedit_hf.quantization.calibration import (
    CHECK_STREAM,
    OutputError,
    input_ranges,
    layer_inputs,
    moment_batches,
    output_error,
    record,
    replay,
    second_moments,
    spread,
)


@pytest.fixture(scope="module")
def pipeline(make_transformer):
    model = make_transformer()
    return EdgeDiTPipeline(model, make_scheduler("epsilon"), default_steps=4, default_guidance_scale=2.0)


@pytest.fixture(scope="module")
def recording(pipeline):
    return record(pipeline, 6, batch_size=4)


@pytest.fixture(scope="module")
def text_pipeline():
    pipeline = elastic(vae=False)
    randomise(pipeline)
    return pipeline


def test_the_loop_of_the_pipeline_is_what_is_recorded(pipeline, recording):
    assert [call.timestep for call in recording.calls] == [999, 749, 499, 249] * 2
    assert recording.labels.tolist() == [0, 1, 2, 3, 4, 5]
    first = recording.calls[0].inputs
    # Guidance is on: the four images of the first batch, then the same with the null class.
    assert first["class_labels"].tolist() == [0, 1, 2, 3, 10, 10, 10, 10]
    assert torch.equal(first["hidden_states"][:4], first["hidden_states"][4:]) and set(first) == {
        "hidden_states",
        "timestep",
        "class_labels",
    }
    # The samples are the pipeline's own, from the noise that the first forward saw.
    again = pipeline(class_labels=[0, 1, 2, 3], latents=first["hidden_states"][:4], output_type="latent").images
    torch.testing.assert_close(recording.latents[:4], again)


def test_a_recording_depends_on_seed_and_stream_alone(pipeline, recording):
    again = record(pipeline, 6, batch_size=4)
    assert torch.equal(again.latents, recording.latents)
    assert all(
        torch.equal(a.inputs["hidden_states"], b.inputs["hidden_states"]) for a, b in zip(again.calls, recording.calls)
    )
    other_batches = record(pipeline, 6, batch_size=5, keep_calls=False)
    torch.testing.assert_close(other_batches.latents, recording.latents, rtol=1e-4, atol=1e-4)
    assert other_batches.calls == []
    for other in (record(pipeline, 6, seed=1), record(pipeline, 6, stream=CHECK_STREAM)):
        assert (other.latents - recording.latents).abs().mean() > 0.1


def test_replaying_gives_what_the_pipeline_computed(pipeline, recording):
    """The pipeline precomputes modulations; a replay computes them with the layers that are quantised too."""
    model, seen = pipeline.transformer, []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    record(pipeline, 4, batch_size=4, keep_calls=False)
    handle.remove()
    for call, output in zip(recording.calls, seen):
        torch.testing.assert_close(replay(model, call), output, rtol=1e-4, atol=1e-5)
    references = [replay(model, call) for call in recording.calls]
    assert output_error(model, recording.calls, references).sqnr_db == float("inf")


def test_spread_takes_the_first_and_the_last_timestep(recording):
    assert {call.timestep for call in spread(recording.calls, 2)} == {249, 999}
    assert spread(recording.calls, 9) == recording.calls


def test_error_figures_are_the_textbook_ones():
    error = OutputError((1.0, 2.0), (0.1, 0.01), (1.0, 1.0))
    assert error.mean_mse == pytest.approx(0.055) and error.sqnr_by_timestep == pytest.approx((10.0, 20.0))
    assert error.sqnr_db == pytest.approx(10 * torch.log10(torch.tensor(2 / 0.11)).item())
    assert OutputError((1.0,), (0.0,), (1.0,)).to_dict()["sqnr_db"] is None


# -------------------------------------------------------------------- layers


def test_moments_are_those_of_the_inputs(pipeline, recording):
    model, name = pipeline.transformer, "blocks.1.mlp.proj_in"
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten(0, -2))
    )
    for call in recording.calls:
        replay(model, call)
    handle.remove()
    inputs = torch.cat(seen).double()
    found = second_moments(model, recording.calls, [name, "patch_embed", "blocks.0.modulation"])
    torch.testing.assert_close(found[name][0].double(), inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-5)
    assert (
        found["patch_embed"].shape == (1, 4, 4)
        and float(found["blocks.0.modulation"].diagonal(dim1=1, dim2=2).min()) > 0
    )


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"padding": 1}, {"groups": 2, "stride": 2, "padding": 1}, {"dilation": 2}]
)
def test_a_convolution_is_its_inputs_times_its_weight(options):
    torch.manual_seed(0)
    layer, image = nn.Conv2d(4, 6, 3, **options), torch.randn(2, 4, 8, 8)
    weight = layer.weight.reshape(layer.groups, 6 // layer.groups, -1)
    output = (layer_inputs(layer, (image,)) @ weight.transpose(1, 2)).permute(0, 2, 1)  # [G, R, B·places]
    expected = layer(image) - layer.bias[:, None, None]
    torch.testing.assert_close(output.reshape(6, 2, -1), expected.flatten(2).transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_the_compression_of_tokens_is_one_too():
    torch.manual_seed(0)
    layer = ElasticCompression(6)
    nn.init.normal_(layer.weight)
    tokens = torch.randn(2, 16, 6)
    inputs = layer_inputs(layer, (tokens, 4, 4))
    assert inputs.shape == (6, 8, 4)
    output = (inputs @ layer.weight.reshape(6, 4, 1))[..., 0] + layer.bias[:, None]
    torch.testing.assert_close(output.reshape(6, 2, 4).permute(1, 2, 0), layer(tokens, 4, 4))
    narrow = ElasticCompression(6, {"half": 3})
    assert float(layer_inputs(narrow, (tokens[..., :3], 4, 4))[3:].abs().max()) == 0


def test_layers_are_observed_in_batches_that_fit(pipeline):
    names = [name for name, module in pipeline.transformer.named_modules() if isinstance(module, nn.Linear)]
    batches = moment_batches(pipeline.transformer, names, memory_bytes=2 * 4 * 32 * 32)
    assert [name for batch in batches for name in batch] == names
    sizes = [sum(4 * pipeline.transformer.get_submodule(name).in_features ** 2 for name in batch) for batch in batches]
    assert all(size <= 2 * 4 * 32 * 32 or len(batch) == 1 for size, batch in zip(sizes, batches)) and len(
        batches
    ) < len(names)


def test_ranges_by_timestep(pipeline, recording):
    timesteps, ranges = input_ranges(pipeline.transformer, recording.calls, ["patch_embed", "blocks.0.mlp.proj_out"])
    assert timesteps == [249, 499, 749, 999] and ranges["patch_embed"].shape == (4, 2)
    seen = torch.cat([call.inputs["hidden_states"] for call in recording.calls if call.timestep == 499])
    assert ranges["patch_embed"][1].tolist() == [float(seen.min()), float(seen.max())]
    gelu = F.gelu(torch.linspace(-3, 3, 1000), approximate="tanh").min()
    assert (ranges["blocks.0.mlp.proj_out"][:, 0] >= gelu - 1e-4).all()


# -------------------------------------------------------------------- text to image


def test_every_width_of_a_supernet(text_pipeline):
    options = {"prompts": ["a", "bc"], "steps": 2, "guidance_scale": 2.0, "batch_size": 2}
    model = text_pipeline.transformer
    calls = {name: record(text_pipeline, 3, subnet=name, **options).calls for name in ("tiny", "full")}
    assert [call.subnet for call in calls["tiny"]] == ["tiny"] * 4 and model.active_subnet == "full"
    first, second = (call.inputs["encoder_hidden_states"] for call in calls["full"][:2])
    assert first is second and first[0].shape[0] == 4, (
        "the text of all steps is held once, two prompts with and without it"
    )
    name = "middle_blocks.0.mlp.proj_in"
    narrow = second_moments(model, calls["tiny"], [name])[name][0]
    whole = second_moments(model, calls["tiny"] + calls["full"], [name])[name][0]
    width = round(model.hidden_size * 0.375)
    assert float(narrow[width:].abs().max()) == 0 and float(whole.diagonal().min()) > 0
    full = second_moments(model, calls["full"], [name])[name][0]
    torch.testing.assert_close(whole, (narrow + full) / 2, rtol=1e-4, atol=1e-5)


def test_bad_input(pipeline, text_pipeline):
    with pytest.raises(EdgeDiTError, match="calibrated with prompts, but none are given"):
        record(text_pipeline, 1)
    broken = EdgeDiTPipeline(pipeline.transformer, make_scheduler("epsilon"), default_steps=2)
    with pytest.raises(EdgeDiTError, match="After 2 steps the latents hold NaN or infinite values"):
        record(broken, 2, guidance_scale=1e30)
