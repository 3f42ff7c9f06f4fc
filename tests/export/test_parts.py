"""The parts of a pipeline: run one after the other they compute what the network computes, and share its weights."""

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import T5Config, T5EncoderModel

from edgedit_hf import EdgeDiTPipeline, ElasticDiTTransformer2DModel
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.parts import (
    edgedit_parts,
    elastic_parts,
    latent_size,
    layer_parts,
    pipeline_parts,
    share,
    text_encoder_part,
    vae_parts,
)


def run(part, values):
    """A part's outputs for the values of its inputs' names, by name."""
    with torch.no_grad():
        found = part.module(*(values[name] for name in part.inputs))
    return dict(zip(part.outputs, found if isinstance(found, tuple) else (found,)))


def chain(parts, values):
    for part in parts:
        values = {**values, **run(part, values)}
    return values


@pytest.fixture(scope="module")
def model(make_transformer):
    return make_transformer(num_layers=3)


@pytest.fixture(scope="module")
def edgedit_inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(3, 1, 8, 8, generator=generator),
        "timestep": torch.tensor([900.0, 500.0, 3.0]),
        "class_labels": torch.tensor([0, 10, 4]),
    }


@pytest.mark.parametrize("split", [False, True])
def test_parts_of_an_edgedit_are_the_model(model, edgedit_inputs, split):
    parts = edgedit_parts(model, (8, 8), 2, split)
    assert [part.name for part in parts] == (["conditioner", "denoiser"] if split else ["denoiser"])
    with torch.no_grad():
        expected = model(*edgedit_inputs.values()).sample
    found = chain(parts, edgedit_inputs)["prediction"]
    assert torch.allclose(found, expected, atol=1e-5)
    for part in parts:
        assert all(len(value) == 2 for value in part.inputs.values())
        assert {name: axes[0] for name, axes in part.dynamic.items()} == dict.fromkeys(part.inputs, "batch")
        assert set(part.run()) == set(part.outputs)
    if split:  # together they hold every weight once
        held = {id(tensor) for part in parts for tensor in part.module.parameters()}
        assert held == {id(tensor) for tensor in model.parameters()}
        assert not {id(p) for p in parts[0].module.parameters()} & {id(p) for p in parts[1].module.parameters()}


def test_layers_one_by_one_are_the_model(model, edgedit_inputs):
    before, layers, after = layer_parts(model, 2)
    assert len(layers) == 3
    values = {**edgedit_inputs, **run(before, edgedit_inputs)}
    for layer in layers:
        values["tokens"] = run(layer, values)["tokens_out"]
    with torch.no_grad():
        expected = model(*edgedit_inputs.values()).sample
    assert torch.allclose(run(after, values)["prediction"], expected, atol=1e-6)


@pytest.mark.parametrize("split", [False, True])
def test_parts_of_an_elastic_dit_are_the_model(split):
    model = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug", subnets=None).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    side, dims = model.config.sample_size, model.config.text_dims
    parts = elastic_parts(model, (side, side), 2, split, [5] * len(dims))
    assert [part.name for part in parts] == (["conditioner", "text_conditioner"] if split else []) + ["denoiser"]
    values = {
        "sample": torch.randn(2, model.config.in_channels, side, side, generator=generator),
        "timestep": torch.tensor([700.0, 20.0]),
    }
    texts, masks = [], []
    for index, width in enumerate(dims):
        texts.append(torch.randn(2, 5, width, generator=generator))
        masks.append(torch.tensor([[1.0] * 5, [1.0, 1.0, 0.0, 0.0, 0.0]]))
        values |= {f"text_{index}": texts[-1], f"mask_{index}": masks[-1]}
    with torch.no_grad():
        expected = model(values["sample"], values["timestep"], texts, masks, return_dict=False)[0]
    assert torch.allclose(chain(parts, values)["prediction"], expected, atol=1e-5)


def test_a_vae_is_its_decoder_and_the_mode_of_its_encoder():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    ).eval()
    decoder, encoder = vae_parts(vae, (4, 6), 2, 4, 2)
    latents, image = torch.randn(2, 4, 4, 6), torch.rand(2, 3, 8, 12) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(run(decoder, {"latents": latents})["image"], vae.decode(latents).sample, atol=1e-6)
        mode = vae.encode(image).latent_dist.mode()
    assert torch.allclose(run(encoder, {"image": image})["latents"], mode, atol=1e-6)
    with pytest.raises(EdgeDiTError, match=r"\(8, 12\) from latents of \(4, 6\); 8 times"):
        vae_parts(vae, (4, 6), 8, 4, 2)


def test_a_text_encoders_padding_changes_nothing_before_it():
    torch.manual_seed(0)
    encoder = T5EncoderModel(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()
    part = text_encoder_part("text_encoder", encoder, tokens=6, batch=2)
    ids = torch.tensor([[7, 8, 9, 0, 0, 0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]])
    found = run(part, {"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
    with torch.no_grad():
        expected = encoder(input_ids=ids[:, :3]).last_hidden_state
    assert torch.allclose(found[:, :3], expected, atol=1e-5)


def test_a_share_has_the_tensors_but_not_the_structure(model):
    copy = share(model)
    assert [id(tensor) for tensor in copy.parameters()] == [id(tensor) for tensor in model.parameters()]
    copy.blocks[0] = None
    assert model.blocks[0] is not None


def test_sizes_of_latents(make_transformer):
    pipeline = EdgeDiTPipeline(make_transformer(num_layers=1), make_scheduler("epsilon"))
    assert latent_size(pipeline, None) == (8, 8) and latent_size(pipeline, (16, 4)) == (16, 4)
    with pytest.raises(EdgeDiTError, match="9x8; height and width must be positive multiples of 2 pixels"):
        latent_size(pipeline, (9, 8))
    assert [part.name for part in pipeline_parts(pipeline, split=True, batch=3)] == ["conditioner", "denoiser"]
