"""Export to Core ML: every part converts and, interpreted, computes what it computed; palettes and grids arrive entry
by entry; errors leave nothing.
"""

import errno
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import relative
from torch import nn

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.coreml.lower import METADATA_PREFIX, load_program, lower_coreml, native_inputs
from edgedit_hf.export.coreml.mil import run_package
from edgedit_hf.export.parts import Part, edgedit_parts, elastic_parts, text_encoder_part, vae_parts
from edgedit_hf.models.transformer_elastic_dit import ElasticDiTTransformer2DModel
from edgedit_hf.quantization.layers import dequantize_model, quantizable_layers, quantized_weights
from edgedit_hf.quantization.packing import unpack
from edgedit_hf.quantization.quantize import quantize_weight
from edgedit_hf.quantization.quantizer import quantize_model


def read_metadata(path: Path) -> dict[str, str]:
    """The `edgedit.*` metadata of a package without the prefix."""
    import coremltools

    stored = coremltools.models.MLModel(str(path), skip_model_load=True).user_defined_metadata
    return {
        key.removeprefix(METADATA_PREFIX): value for key, value in stored.items() if key.startswith(METADATA_PREFIX)
    }


# Runs and groups that divide the sizes of the debug net, and some whose last one is shorter.
SPECS = [
    {"scheme": "palette", "bits": 4, "rows_per_palette": 16},
    {"scheme": "palette", "bits": 4, "rows_per_palette": 12},
    {"scheme": "palette", "bits": 8, "rows_per_palette": 0},
    {"scheme": "palette", "bits": 2, "rows_per_palette": 8},
    {"scheme": "palette", "bits": 1, "rows_per_palette": 64},
    {"scheme": "affine", "bits": 4, "group_size": 32, "symmetric": True},
    {"scheme": "affine", "bits": 4, "group_size": 24, "symmetric": False},
    {"scheme": "affine", "bits": 8, "group_size": 0, "symmetric": True},
    {"scheme": "affine", "bits": 8, "group_size": 16, "symmetric": False},
    {"scheme": "affine", "bits": 2, "group_size": 16, "symmetric": True},
]


def randomise(module, scale):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def errors_of(path, part):
    """Relative error of every output of a package."""
    found, expected = run_package(path, part.inputs), part.run()
    assert found.keys() == expected.keys()
    return [float((found[name].float() - expected[name]).norm() / expected[name].norm()) for name in expected]


def linear_part():
    return Part("transformer", "denoiser", nn.Linear(3, 2).eval(), {"sample": torch.zeros(1, 3)}, ("prediction",))


@pytest.fixture(scope="module")
def quantised(make_transformer, tmp_path_factory):
    """A quantised net's part, its weights, its package and what was reported."""
    model = make_transformer(num_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    quantize_model(model, {name: SPECS[index % len(SPECS)] for index, name in enumerate(quantizable_layers(model))})
    weights = quantized_weights(model)
    dequantize_model(model, torch.float32)
    (part,) = edgedit_parts(model, (8, 8), 2, split=False)
    path = tmp_path_factory.mktemp("coreml") / "model.mlpackage"
    elsewhere = {"blocks.7.mlp.proj_in": quantize_weight(torch.randn(32, 32), SPECS[0])}
    report = lower_coreml(
        part, path, "fp16", {"genotype": '{"a": 1}', "batch": "2"}, quantized={**weights, **elsewhere}
    )
    return part, weights, path, report


def test_a_package_describes_itself(quantised):
    import coremltools as ct

    part, _, path, report = quantised
    assert read_metadata(path) == {"genotype": '{"a": 1}', "batch": "2"}
    spec = ct.models.MLModel(str(path), skip_model_load=True).get_spec()
    assert spec.specificationVersion == 9 and report["minimum_deployment_target"] == "iOS18"
    float32, int32 = (
        spec.description.input[0].type.multiArrayType.ArrayDataType.Value(kind) for kind in ("FLOAT32", "INT32")
    )
    described = {
        entry.name: (list(entry.type.multiArrayType.shape), entry.type.multiArrayType.dataType)
        for entry in spec.description.input
    }
    assert described == {"sample": ([2, 1, 8, 8], float32), "timestep": ([2], float32), "class_labels": ([2], int32)}
    assert [(entry.name, entry.type.multiArrayType.dataType) for entry in spec.description.output] == [
        ("prediction", float32)
    ]
    assert report["inputs"] == {name: list(value.shape) for name, value in part.inputs.items()} and report[
        "outputs"
    ] == {"prediction": [2, 1, 8, 8]}
    assert report["operators"]["scaled_dot_product_attention"] == 1 and report["operators"]["linear"] == 9
    assert {entry.name for entry in path.iterdir()} == {"Manifest.json", "Data"} and [
        entry.name for entry in path.parent.iterdir()
    ] == [path.name]
    files = [file for file in path.rglob("*") if file.is_file()]
    assert report["bytes"] == sum(file.stat().st_size for file in files)
    assert not any(
        b"site-packages" in file.read_bytes() or b"edgedit_hf/" in file.read_bytes() for file in files
    )  # no paths of this machine


def test_a_package_computes_what_the_part_computes(quantised):
    part, _, path, _ = quantised
    # Timesteps in half precision would be off by about a quarter of a radian in the fastest of their features.
    (error,) = errors_of(path, part)
    assert error < 5e-3


def test_palettes_and_grids_are_written_entry_by_entry(quantised):
    _, weights, path, report = quantised
    assert report["mapped"] == sorted(weights) and report["dense"] == []
    operators = [op for op in load_program(path).functions["main"].operations if op.op_type.startswith("constexpr")]
    assert len(operators) == len(weights)
    unseen = dict(weights)
    for operator in operators:
        # coremltools' own unpacking says which weight this is ...
        dense = operator.materialized_val_inference()
        name = next(
            name
            for name, weight in unseen.items()
            if dense.shape == tuple(weight.shape) and np.array_equal(dense, weight.dequantize().half().numpy())
        )
        weight = unseen.pop(name)
        columns = int(np.prod(weight.shape[1:]))
        if weight.scheme == "palette":  # ... and inside are the entries and indices that we stored.
            assert operator.op_type == "constexpr_lut_to_dense" and operator.indices.dtype.get_bitwidth() == weight.bits
            assert np.array_equal(
                operator.indices.val.reshape(len(dense), -1), unpack(weight.indices, weight.bits, columns).numpy()
            )
            repeats = len(operator.lut.val) // len(weight.palette)
            if not weight.rows_per_palette or len(dense) % weight.rows_per_palette == 0:
                assert repeats == 1
                assert np.array_equal(operator.lut.val.reshape(weight.palette.shape), weight.palette.numpy())
        else:
            assert operator.op_type == "constexpr_blockwise_shift_scale" and operator.data.dtype.get_bitwidth() == max(
                4, weight.bits
            )
            values = unpack(weight.values, weight.bits, columns).numpy().astype(int) - (
                2 ** (weight.bits - 1) if weight.zero_point is None else 0
            )
            assert np.array_equal(operator.data.val.reshape(len(dense), -1).astype(int), values)
    assert not unseen
    stored = sum(count["bytes"] for kind, count in report["weights"].items() if kind.startswith(("palettes", "grids")))
    assert (
        stored < 1.25 * sum(weight.num_bits for weight in weights.values()) / 8
    )  # short last runs and 2-bit grids take more than ours
    assert sum(
        count["elements"] for kind, count in report["weights"].items() if kind.startswith(("palettes", "grids"))
    ) == sum(int(np.prod(weight.shape)) for weight in weights.values())


@pytest.mark.parametrize("shape", [(32, 48), (24, 40), (40, 4, 2, 2), (6, 1, 2, 2)])
def test_native_operators_unpack_to_the_weight(shape):
    from coremltools.converters.mil.mil.ops.defs.iOS18.compression import (
        constexpr_blockwise_shift_scale,
        constexpr_lut_to_dense,
    )

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for spec in SPECS:
        quantized = quantize_weight(weight, spec)
        inputs = native_inputs(quantized, np.dtype("float32"))
        if "lut" in inputs:
            dense = constexpr_lut_to_dense.decompress(inputs["indices"], inputs["lut"], None)
        else:
            dense = constexpr_blockwise_shift_scale.decompress(inputs["data"], inputs["scale"], inputs.get("offset"))
        assert np.array_equal(dense, quantized.dequantize().numpy())
    cut = quantize_weight(torch.randn(8, 4, 3, 3), {"scheme": "affine", "bits": 4, "group_size": 32})
    assert native_inputs(cut, np.dtype("float32")) is None  # 32 inputs are three and a half kernels of nine


class Peculiar(nn.Module):
    """What coremltools gets wrong or does not take: both GELUs, grouped heads (plain and masked), expansions of six
    dimensions.
    """

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key = x.reshape(2, 4, 6, 4), x[:, :, :8].reshape(2, 2, 6, 4)
        plain = F.scaled_dot_product_attention(query, key, 1 - key, enable_gqa=True)
        masked = F.scaled_dot_product_attention(
            query, key, 1 - key, attn_mask=mask[:, None, None] > 0.5, enable_gqa=True
        )
        wide = x.reshape(2, 3, 1, 2, 1, 16).expand(-1, -1, 2, -1, 2, -1).reshape(2, 6, 4, 16)
        return F.gelu(x + 1, approximate="tanh"), F.gelu(x), plain, masked, wide


def test_what_coremltools_does_not_take_is_rewritten(tmp_path):
    mask = torch.ones(2, 6)
    mask[1, 3:] = 0
    inputs = {"x": torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)), "mask": mask}
    part = Part("transformer", "denoiser", Peculiar().eval(), inputs, ("tanh", "erf", "plain", "masked", "wide"))
    report = lower_coreml(part, tmp_path / "model.mlpackage", "fp32", {})
    # With the other GELU the first error would be 2e-4, with the other order of heads the next ones about 1.
    assert max(errors_of(tmp_path / "model.mlpackage", part)) < 1e-6
    assert report["operators"]["gelu"] == 2 and report["operators"]["scaled_dot_product_attention"] == 2
    program = load_program(tmp_path / "model.mlpackage").functions["main"]
    assert max(output.rank for operation in program.operations for output in operation.outputs) <= 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int2"}, "precision is 'int2'; Core ML exports exist as fp32, fp16, int8, int4"),
        ({"path": "model.onnx"}, "does not end in .mlpackage"),
        ({"dynamic": True}, "fixed shapes"),
        ({"precision": "int4", "quantized": SPECS[0]}, "precision is 'int4', but the model is quantised already"),
        ({"quantized": {"scheme": "nf4"}}, "proj is quantised as 'nf4', which Core ML does not have"),
    ],
)
def test_wrong_requests_are_one_error(options, message, tmp_path):
    options = {"path": "model.mlpackage", "precision": "fp16", **options}
    path, precision = tmp_path / options.pop("path"), options.pop("precision")
    if "quantized" in options:
        options["quantized"] = {"proj": quantize_weight(torch.randn(8, 8), options["quantized"])}
    with pytest.raises(EdgeDiTError, match=message):
        lower_coreml(linear_part(), path, precision, {}, **options)
    assert not list(tmp_path.iterdir())


def test_a_missing_coremltools_is_one_error(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "coremltools" else find_spec(name, *rest)
    )
    with pytest.raises(EdgeDiTError, match=r"pip install 'edgedit_hf\[coreml\]'"):
        lower_coreml(linear_part(), tmp_path / "model.mlpackage", "fp16", {})


def test_an_operator_that_does_not_convert_is_one_error(tmp_path):
    class Sorted(nn.Module):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvalsh(sample)

    part = Part("vae", "decoder", Sorted().eval(), {"sample": torch.eye(3)}, ("prediction",))
    with pytest.raises(EdgeDiTError, match="cannot convert the decoder of vae .*export this part as onnx"):
        lower_coreml(part, tmp_path / "model.mlpackage", "fp32", {})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_package(monkeypatch, tmp_path):
    path = tmp_path / "model.mlpackage"
    lower_coreml(linear_part(), path, "fp32", {"which": "old"})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(EdgeDiTError, match="No space left on the disk"):
        lower_coreml(linear_part(), path, "fp32", {"which": "new"})
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name] and read_metadata(path) == {"which": "old"}


# -------------------------------------------------------------------- every part


def every_part(family, make_transformer):
    if family == "edgedit":
        model = make_transformer()
        return [part for split in (False, True) for part in edgedit_parts(model, (8, 8), 2, split)] + edgedit_parts(
            model, (8, 12), 1, False
        )
    if family == "elastic":
        model = randomise(
            ElasticDiTTransformer2DModel.from_preset(
                "elastic-dit-debug", subnets=None, num_layers=[1, 3, 1], attention_blocks=3
            ),
            0.2,
        )
        return [part for split in (False, True) for part in elastic_parts(model, (8, 12), 2, split, [5, 7])]
    if family == "vae":
        from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderTiny

        blocks = {
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        }
        tiny = {f"{kind}_block_out_channels": (8, 8) for kind in ("encoder", "decoder")} | {
            f"num_{kind}_blocks": (1, 1) for kind in ("encoder", "decoder")
        }
        video = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}
        vaes = [
            AutoencoderKL(norm_num_groups=4, latent_channels=4, **blocks),
            AutoencoderTiny(**tiny),
            AutoencoderKLQwenImage(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, **video),
        ]
        return [part for vae in vaes for part in vae_parts(randomise(vae, 0.1), (8, 8), 2, 4, 1)]
    import transformers

    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    grouped = {**sizes, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    t5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    encoders = [
        transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, max_position_embeddings=12)),
        transformers.T5EncoderModel(transformers.T5Config(**t5)),
        transformers.UMT5EncoderModel(transformers.UMT5Config(**t5, feed_forward_proj="gated-gelu")),
        transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**grouped, sliding_window=8)),
        transformers.Qwen3Model(transformers.Qwen3Config(**grouped)),
    ]
    return [text_encoder_part("text_encoder", randomise(encoder, 0.1), 12, 2) for encoder in encoders]


@pytest.mark.slow
@pytest.mark.export
@pytest.mark.parametrize("family", ["edgedit", "elastic", "vae", "text"])
def test_every_part_computes_what_it_computed(family, make_transformer, tmp_path):
    for part in every_part(family, make_transformer):
        for precision, tolerance in (("fp32", 1e-4), ("fp16", 5e-3)):
            path = tmp_path / f"{part.name}.mlpackage"
            report = lower_coreml(part, path, precision, {})
            assert max(errors_of(path, part)) < tolerance, (part.name, type(part.module), precision)
            assert report["compute_precision"] == precision
            program = load_program(path).functions["main"]
            assert max(output.rank for operation in program.operations for output in operation.outputs) <= 5


@pytest.mark.slow
@pytest.mark.export
def test_linear_layers_and_convolutions_are_quantised(make_transformer, tmp_path):
    model = make_transformer(num_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    (part,) = edgedit_parts(model, (8, 8), 2, split=False)
    large = {
        name: layer.weight.numel() for name, layer in quantizable_layers(model).items() if layer.weight.numel() >= 1024
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sizes = {}
    for precision, kind, bits, tolerance in (
        ("int8", "grids of 8 bits", 8, 3e-2),
        ("int4", "palettes of 4 bits", 4, 4e-1),
    ):
        path = tmp_path / f"{precision}.mlpackage"
        report = lower_coreml(part, path, precision, {})
        assert report["compute_precision"] == "fp16" and report["weights"][kind]["elements"] == sum(large.values())
        assert len(report["mapped"]) == len(large) and report["dense"] == []
        assert report["weights"][kind]["bytes"] < 1.2 * report["weights"][kind]["elements"] * bits / 8
        assert max(errors_of(path, part)) < tolerance
        sizes[precision] = report["bytes"]
    assert sizes["int4"] < sizes["int8"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.export
def test_an_elastic_net_keeps_its_palettes(tmp_path):
    model = randomise(
        ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug", subnets=None, num_layers=[1, 1, 0]), 0.15
    )
    quantize_model(model, {name: SPECS[index % 2] for index, name in enumerate(quantizable_layers(model))})
    weights = quantized_weights(model)
    dequantize_model(model, torch.float32)
    mapped = set()
    for part in elastic_parts(model, (8, 8), 1, True, [5, 7]):
        report = lower_coreml(part, tmp_path / f"{part.name}.mlpackage", "fp16", {}, quantized=weights)
        assert report["dense"] == [] and max(errors_of(tmp_path / f"{part.name}.mlpackage", part)) < 5e-3
        mapped |= set(report["mapped"])
    assert mapped == set(weights)  # the kernels that compress keys and values among them


@pytest.mark.slow
@pytest.mark.export
@pytest.mark.parametrize("name", ["sit", "mdtv2"])
def test_relatives_compute_what_the_original_computed(name, tmp_path):
    model, inputs, expected = relative(name, tmp_path)
    sample = inputs["sample"]
    (part,) = edgedit_parts(model, tuple(sample.shape[2:]), len(sample), split=False)
    lower_coreml(part, tmp_path / "model.mlpackage", "fp32", {})
    found = run_package(tmp_path / "model.mlpackage", inputs)["prediction"]
    assert (found - expected).norm() <= 1e-4 * expected.norm()
