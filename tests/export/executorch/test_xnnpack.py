"""Every part of both families in ExecuTorch: the rewritten networks are the models, XNNPACK runs them whole, given
integers arrive, errors are clear.
"""

import dataclasses
import importlib.util
import json
import os

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.executorch.lower import form_of, lower_executorch, quantize_linears, quantized_weight
from edgedit_hf.export.executorch.xnnpack import FormLinear
from edgedit_hf.export.parts import edgedit_parts, elastic_parts, share, text_encoder_part, vae_parts
from edgedit_hf.files import aside_of
from edgedit_hf.models.transformer_elastic_dit import ElasticDiTTransformer2DModel
from edgedit_hf.quantization.affine import quantize_affine
from edgedit_hf.runtimes.sessions import open_session


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def outputs_of(module, part):
    with torch.no_grad():
        values = module(*part.inputs.values())
    return values if isinstance(values, tuple) else (values,)


def worst_error(found, part):
    return max(relative_error(value, expected) for value, expected in zip(found, part.run().values(), strict=True))


def outputs_in_executorch(path, part):
    return [torch.from_numpy(value) for value in open_session(path).run(part.inputs)]


def small_elastic(**overrides):
    torch.manual_seed(0)
    model = (
        ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug", subnets=None, **overrides)
        .eval()
        .requires_grad_(False)
    )
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # no zeros of an initialisation
    return model


@pytest.fixture(scope="module")
def tiny(make_transformer):
    return make_transformer(num_layers=1)


@pytest.fixture(scope="module")
def lowered(tiny, tmp_path_factory):
    """The split denoiser of an EdgeDiT, and what the lowering says."""
    _, part = edgedit_parts(tiny, (8, 8), 1, split=True)
    path = tmp_path_factory.mktemp("parts") / "model.pte"
    return part, path, lower_executorch(part, path, "fp32", {"config": "{}"}, profile_runs=2)


# -------------------------------------------------------------------- the rewritten networks


@pytest.mark.parametrize(
    ("overrides", "size", "tokens"),
    [
        ({"num_layers": [1, 5, 0]}, (4, 4), [5, 7]),  # two long skips
        ({"attention_blocks": 5, "num_layers": [1, 0, 0]}, (8, 12), [5, 7]),  # a last strip that is shorter
        ({"attention_blocks": 4, "attention_radius": 2, "num_layers": [0, 1, 1]}, (16, 8), [1, 3]),
        ({"attention_radius": 0, "patch_size": 2, "in_channels": 3, "num_layers": [0, 1, 1]}, (16, 24), [5, 7]),
    ],
    ids=["skips", "ragged", "wide", "no-neighbours"],
)
def test_the_rewritten_elastic_net_is_the_model(overrides, size, tokens):
    model = small_elastic(**overrides)
    for split in (False, True):
        for part in elastic_parts(model, size, 2, split, tokens):
            assert worst_error(outputs_of(form_of(part), part), part) < 1e-5


def test_a_rewritten_net_shares_the_weights():
    model = small_elastic()
    (part,) = elastic_parts(model, (8, 8), 1, False, [3, 3])
    form = form_of(part)
    layers = [layer for layer in form.modules() if isinstance(layer, FormLinear)]
    assert {layer.source.name for layer in layers} == {
        name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)
    }
    assert all(layer.weight.data_ptr() == model.get_submodule(layer.source.name).weight.data_ptr() for layer in layers)


def encoder_parts():
    torch.manual_seed(0)
    sizes = {"block_out_channels": (16, 32), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 8}
    down, up = ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2
    full = AutoencoderKL(down_block_types=down, up_block_types=up, **sizes).eval()
    small = {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    }
    tiny = AutoencoderTiny(**small).eval()
    clip = CLIPTextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    t5 = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    parts = [*vae_parts(full, (4, 6), 2, 4, 1), *vae_parts(tiny, (4, 6), 2, 4, 2)]
    for name, encoder in (("text_encoder", CLIPTextModel(clip)), ("text_encoder_2", T5EncoderModel(t5))):
        parts.append(text_encoder_part(name, encoder.eval(), 9, 2))
    return parts


def test_rewritten_vaes_and_text_encoders_are_the_models():
    for part in encoder_parts():
        before = part.run()
        assert worst_error(outputs_of(form_of(part), part), part) < 1e-5
        assert all(torch.equal(value, before[name]) for name, value in part.run().items())  # the model is as it was


# -------------------------------------------------------------------- weights


def test_given_integers_arrive_as_they_are(tiny):
    (part,) = edgedit_parts(tiny, (8, 8), 1, split=False)
    layers = {name: layer for name, layer in tiny.named_modules() if isinstance(layer, nn.Linear)}
    affine = {name: quantize_affine(layer.weight, 4, 32, True) for name, layer in layers.items()}
    affine["proj_out"] = quantize_affine(tiny.proj_out.weight, 4, 0, True)  # one group of all inputs
    affine["blocks.0.mlp.proj_in"] = quantize_affine(
        tiny.blocks[0].mlp.proj_in.weight, 4, 32, False
    )  # a grid that XNNPACK has not
    affine["modulation_out"] = quantize_affine(tiny.modulation_out.weight, 8, 0, True)
    form = form_of(part)
    said = quantize_linears(form, "8da4w", ["modulation_out", "elsewhere"], affine)
    assert said["kept_8bit"] == ["modulation_out"] and said["rounded_again"] == ["blocks.0.mlp.proj_in"]
    assert set(said["given"]) == set(affine) - {"blocks.0.mlp.proj_in"} and set(said["linear_layers"]) == {
        "8da4w",
        "8da8w",
    }
    width = tiny.blocks[0].attn.to_qkv.out_features // 3
    expected = affine["blocks.0.attn.to_qkv"].dequantize()
    scale = (width // tiny.blocks[0].attn.heads) ** -0.5
    attn = form.blocks[0].attn
    for layer, rows, factor in (
        (attn.to_q, slice(0, width), scale),
        (attn.to_k, slice(width, 2 * width), 1),
        (attn.to_v, slice(2 * width, None), 1),
    ):
        assert torch.allclose(layer.weight.dequantize(), factor * expected[rows], atol=1e-7)
    for layer, name in ((form.proj_out, "proj_out"), (form.conditioner.layers[-1], "modulation_out")):
        assert torch.allclose(layer.weight.dequantize(), affine[name].dequantize(), atol=1e-7)
    affine["proj_out"] = affine["modulation_out"]
    with pytest.raises(EdgeDiTError, match="given weights of proj_out have the shape"):
        quantize_linears(form_of(part), "8da4w", (), affine)


def test_fitted_grids_are_better_than_the_largest_value():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    found = quantized_weight(weight, "8da4w")
    scale = found.scale
    assert torch.equal(scale, scale.bfloat16().float()) and int(found.qdata.min()) >= -8 and int(found.qdata.max()) <= 7
    assert relative_error(found.dequantize(), weight) < 0.96 * relative_error(
        quantize_affine(weight, 4, 32, True).dequantize(), weight
    )
    assert relative_error(quantized_weight(weight, "8da8w").dequantize(), weight) < 0.01
    assert not quantized_weight(torch.zeros(2, 32), "8da4w").dequantize().any()


# -------------------------------------------------------------------- files


@pytest.mark.slow
@pytest.mark.export
def test_xnnpack_runs_a_split_denoiser_whole(lowered):
    part, path, said = lowered
    session = open_session(path)
    assert worst_error(outputs_in_executorch(path, part), part) < 1e-5
    assert said["backend"] == "xnnpack" and said["not_run"] is None and said["bytes"] == path.stat().st_size
    delegation = said["delegation"]
    assert delegation["portable"] == {} and delegation["subgraphs"] == 1 and 0 <= delegation["portable_share"] <= 0.1
    assert "ETDump" in delegation["portable_share_method"] and delegation["forward_ms"] > 0
    assert session.metadata == {"config": "{}", "scheme": "fp32"} and os.listdir(path.parent) == [path.name]


def test_inputs_that_do_not_fit_are_one_clear_error(lowered):
    part, path, _ = lowered
    session = open_session(path)
    sample, modulation = part.inputs.values()
    for inputs in (
        {"sample": sample.repeat(2, 1, 1, 1), "modulation": modulation},
        {"sample": sample.double(), "modulation": modulation},
        {"sample": sample},
        {"sample": sample[..., :4], "modulation": modulation},
    ):
        wanted = r"sample float32 \(1, 1, 8, 8\), modulation float32 \(1, 8, 32\)"
        with pytest.raises(EdgeDiTError, match=f"The inputs are .* but .*model.pte was exported for {wanted}"):
            session.run(inputs)
    assert session.run({"modulation": modulation, "sample": sample})[0].shape == sample.shape


def test_what_cannot_be_lowered_leaves_no_file(tiny, tmp_path, monkeypatch):
    (part,) = edgedit_parts(tiny, (8, 8), 1, split=False)
    path = tmp_path / "out/model.pte"
    monkeypatch.delenv("QNN_SDK_ROOT", raising=False)
    for options, message in (
        ({"precision": "fp16"}, "precision is 'fp16'; ExecuTorch exports exist as fp32, int8, int4"),
        ({"backend": "vulkan"}, "backend is 'vulkan'; the backends of ExecuTorch here are xnnpack, coreml, qnn"),
        ({"backend": "coreml", "precision": "int4"}, "only fp32 is exported"),
        ({"backend": "qnn"}, "QNN_SDK_ROOT is '', not a folder"),
    ):
        with pytest.raises(EdgeDiTError, match=message):
            lower_executorch(part, path, **options)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "coremltools" else find(name, *rest)
    )
    with pytest.raises(EdgeDiTError, match="pip install 'edgedit_hf\\[coreml\\]'"):
        lower_executorch(part, path, backend="coreml")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_half_written_file(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    model = small_elastic(num_layers=[0, 1, 0])
    conditioner, *_ = elastic_parts(model, (4, 4), 1, True, [1, 1])
    path = tmp_path / "model.pte"
    os.symlink("/dev/full", aside_of(path))
    with pytest.raises(EdgeDiTError, match="No space left on the disk of .*model.pte"):
        lower_executorch(conditioner, path, profile_runs=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.export
def test_every_part_of_both_families_lowers(tiny, tmp_path):
    elastic = small_elastic(num_layers=[1, 1, 1], attention_blocks=4)
    parts = [
        *edgedit_parts(tiny, (8, 12), 2, False),
        *elastic_parts(elastic, (8, 8), 1, False, [5, 7]),
        *elastic_parts(elastic, (8, 8), 2, True, [5, 7]),
    ]
    for part in [*parts, *encoder_parts()]:
        path = tmp_path / "model.pte"
        said = lower_executorch(part, path)
        assert worst_error(outputs_in_executorch(path, part), part) < 1e-5
        if part.component == "transformer":  # attention, norms and modulation are all XNNPACK's
            assert said["delegation"]["subgraphs"] == 1 and set(said["delegation"]["portable"]) <= {
                "aten_embedding_default"
            }
            assert said["delegation"]["portable_share"] <= 0.1


@pytest.mark.slow
@pytest.mark.export
def test_patches_of_one_value_stay_float(tmp_path):
    """A grey pixel a token has no range to quantise by; the other layers are quantised as ever."""
    model = small_elastic(patch_size=1, in_channels=1)
    (part,) = elastic_parts(model, (8, 8), 1, False, [5, 7])
    said = lower_executorch(part, tmp_path / "net.pte", "int8")
    assert model.patch_embed.in_features == 1 and said["linear_layers"]["fp32"] == 1
    assert sum(said["linear_layers"].values()) > 10
    assert worst_error(outputs_in_executorch(tmp_path / "net.pte", part), part) < 0.3


@pytest.mark.slow
@pytest.mark.export
def test_4_bit_files_of_given_integers(tiny, tmp_path):
    model = share(tiny)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    affine = {name: quantize_affine(layer.weight, 4, 32, True) for name, layer in layers.items()}
    affine = {
        name: dataclasses.replace(weight, scale=weight.scale.bfloat16().half()) for name, weight in affine.items()
    }  # XNNPACK's scales
    for name, layer in layers.items():
        layer.weight = nn.Parameter(affine[name].dequantize(), requires_grad=False)
    (part,) = edgedit_parts(model, (8, 8), 1, split=False)
    said = lower_executorch(part, tmp_path / "given.pte", "int4", affine=affine, profile_runs=0)
    assert said["given"] == sorted(affine) and said["linear_layers"].keys() == {"8da4w"}
    found = outputs_in_executorch(tmp_path / "given.pte", part)
    form = form_of(part)
    quantize_linears(form, "8da4w", (), affine)
    assert relative_error(found[0], outputs_of(form, part)[0]) < 1e-5


@pytest.mark.slow
@pytest.mark.export
def test_core_mls_delegate_is_lowered_but_not_run(tiny, tmp_path):
    pytest.importorskip("coremltools")
    (part,) = edgedit_parts(tiny, (8, 8), 1, split=False)
    said = lower_executorch(part, tmp_path / "model.pte", facts={"config": json.dumps({})}, backend="coreml")
    assert (
        "Apple" in said["not_run"]
        and said["delegation"]["subgraphs"] == 1
        and "portable_share" not in said["delegation"]
    )
    assert said["bytes"] > 4 * sum(p.numel() for p in tiny.parameters()) / 3  # 16-bit weights
