"""A network with every kind of layer through every lowering: each file computes what the network computes."""

import json

import pytest
import torch
from kinds import MIXED

from edgedit_hf import EdgeDiTPipeline, Genotype
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.export.executorch.lower import form_of
from edgedit_hf.export.formats import ExportOptions
from edgedit_hf.export.lowering import lower_denoiser
from edgedit_hf.export.onnx.lower import initializer_bytes, lower_onnx
from edgedit_hf.export.parts import edgedit_parts, layer_parts
from edgedit_hf.export.pipeline import export_pipeline
from edgedit_hf.export.verify import relative_error
from edgedit_hf.quantization.layers import quantizable_layers
from edgedit_hf.quantization.quantizer import quantize_model
from edgedit_hf.runtimes.sessions import open_session


@pytest.fixture(scope="module")
def model(make_transformer):
    """Small weights: a network that amplifies rounding says nothing about low precision."""
    made = make_transformer(layers=MIXED).requires_grad_(False)
    for parameter in made.parameters():
        parameter.mul_(0.5)
    return made


def run(path, inputs):
    return torch.from_numpy(open_session(path, 1).run(inputs)[0])


@pytest.mark.parametrize("size", [(8, 8), (8, 12)], ids=str)
def test_the_forms_of_a_runtime_are_the_parts(model, size):
    parts = [part for split in (False, True) for part in edgedit_parts(model, size, 2, split)]
    for part in parts:
        with torch.no_grad():
            found = form_of(part)(*part.inputs.values())
        (expected,) = part.run().values()
        assert relative_error(found, expected) < 1e-5, part.name
    conditioner = next(part for part in parts if part.name == "conditioner")
    held = sum(p.numel() for p in conditioner.module.parameters())
    trunk = 256 * 32 + 32 + 32 * 32 + 32 + 11 * 32 + 2 * 32 * 33
    assert held == trunk + 6 * 32 * 33 + 6 * 32 + (7 * 32 * 4 + 6 * 32)  # a whole, a static, one of rank 4


@pytest.mark.slow
@pytest.mark.export
def test_onnx_computes_every_kind_of_layer(model, make_transformer, tmp_path):
    conditioner, denoiser = edgedit_parts(model, (8, 8), 2, True)
    for part in (conditioner, denoiser):
        lower_onnx(part, tmp_path / f"{part.name}.onnx", "fp32", {})
        found = run(tmp_path / f"{part.name}.onnx", part.inputs)
        assert relative_error(found, *part.run().values()) < 1e-5, part.name
    # What adaLN holds is what the file is smaller by.
    whole = make_transformer(layers=[{k: v for k, v in layer.items() if k != "modulation_rank"} for layer in MIXED])
    lower_onnx(edgedit_parts(whole, (8, 8), 2, True)[0], tmp_path / "whole.onnx", "fp32", {})
    sizes = [sum(initializer_bytes(tmp_path / f"{name}.onnx").values()) for name in ("conditioner", "whole")]
    assert sizes[1] - sizes[0] == pytest.approx(4 * (6 * 32 * 32 + 6 * 32 * 32 - 7 * 32 * 4), abs=64)


@pytest.mark.slow
@pytest.mark.export
@pytest.mark.parametrize(
    "format, dtype, tolerance",
    [
        ("onnx", "fp16", 5e-3),
        ("onnx", "int8", 5e-2),
        ("onnx", "int4", 0.3),
        ("executorch", "fp32", 1e-5),
        ("executorch", "int8", 5e-2),
        ("executorch", "int4", 0.3),
    ],
)
def test_every_precision_computes_every_kind_of_layer(model, tmp_path, format, dtype, tolerance):
    path = tmp_path / {"onnx": "model.onnx", "executorch": "model.pte"}[format]
    said = lower_denoiser(model, path, format, dtype, batch=2)
    (part,) = edgedit_parts(model, (8, 8), 2, False)
    assert relative_error(run(path, part.inputs), part.run()["prediction"]) < tolerance
    if format == "executorch":  # merging tokens and handing them back split nothing; a static modulation may, once
        assert said["delegation"]["subgraphs"] <= 2


@pytest.mark.slow
@pytest.mark.export
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-4), ("fp16", 1e-2), ("int8", 5e-2), ("int4", 0.4)])
def test_core_ml_computes_every_kind_of_layer(model, tmp_path, dtype, tolerance):
    from edgedit_hf.export.coreml.lower import lower_coreml
    from edgedit_hf.export.coreml.mil import load_program, run_package

    parts = [part for split in (False, True) for part in edgedit_parts(model, (8, 8), 2, split)]
    for part in parts if dtype == "fp32" else parts[:1]:
        path = tmp_path / f"{part.name}.mlpackage"
        lower_coreml(part, path, dtype, {})
        found = run_package(path, part.inputs)
        assert relative_error(torch.as_tensor(found[part.outputs[0]]), part.run()[part.outputs[0]]) < tolerance
        operations = load_program(path).functions["main"].operations
        assert max(output.rank for operation in operations for output in operation.outputs) <= 4


@pytest.mark.slow
@pytest.mark.export
def test_layers_on_their_own_compute_every_kind(model, tmp_path):
    before, layers, after = layer_parts(model, 2)
    values = {**before.inputs, **before.run()}
    for part in layers:
        path = tmp_path / f"{part.name}.onnx"
        lower_onnx(part, path, "fp32", {})
        inputs = {name: values[name] for name in part.inputs}
        with torch.no_grad():
            values["tokens"] = part.module(*inputs.values())
        assert relative_error(run(path, inputs), values["tokens"]) < 1e-5, part.name
    with torch.no_grad():
        expected = model(*before.inputs.values()).sample
        assert torch.equal(after.module(values["tokens"], values["conditioning"]), expected)


@pytest.mark.slow
@pytest.mark.export
@pytest.mark.parametrize("split, resolution", [(True, None), (False, "dynamic")], ids=["split", "open"])
def test_an_exported_pipeline_of_every_kind_verifies_and_loads(model, tmp_path, split, resolution):
    pipeline = EdgeDiTPipeline(model, make_scheduler("epsilon"), default_steps=2, default_guidance_scale=1.5)
    pipeline.set_progress_bar_config(disable=True)
    options = {"split_conditioner": split, "resolution": resolution, "threads": 1}
    folder = export_pipeline(pipeline, tmp_path / "out", ExportOptions(**options, bench_batches=(2,), bench_repeats=2))
    verified = json.loads((folder / "verify.json").read_text())
    assert verified["relative_error"] <= verified["tolerance"]
    assert (folder / "contract.json").is_file() and (folder / "sample_min.py").is_file()
    loaded = EdgeDiTPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    assert Genotype.of(loaded.transformer.config) == Genotype.of(model.config)
    for size in ({}, {"height": 8, "width": 12})[: 1 + (resolution is not None)]:
        images = [
            each([3], generator=torch.Generator().manual_seed(1), output_type="pt", **size).images
            for each in (pipeline, loaded)
        ]
        assert torch.allclose(*images, atol=1e-4)
    if split:
        assert loaded.transformer.modulation_steps(1) == model.modulation_steps(1)


@pytest.mark.parametrize(
    "spec", [{"scheme": "affine", "bits": 4, "group_size": 32}, {"scheme": "palette", "bits": 4}], ids=str
)
@torch.no_grad()
def test_low_bit_weights_hold_every_kind_of_layer(make_transformer, tmp_path, spec):
    model = make_transformer(layers=MIXED).requires_grad_(False)
    (part,) = edgedit_parts(model, (8, 8), 2, False)
    expected = part.run()["prediction"]
    plan = {name: spec for name in quantizable_layers(model) if name.startswith("blocks.")}
    assert {"blocks.2.modulation.down", "blocks.2.modulation.up"} < plan.keys() and "blocks.1.modulation" not in plan
    quantize_model(model, plan)
    found = part.run()["prediction"]
    assert 0 < relative_error(found, expected) < 0.5
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(edgedit_parts(again, (8, 8), 2, False)[0].run()["prediction"], found)
