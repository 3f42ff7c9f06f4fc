"""The table of formats: what it says holds for all who read it, and the options of an export are checked against it."""

import dataclasses
import re

import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.formats import DTYPES, FORMATS, MEASURED, PRECISIONS, ExportOptions, dtype_words, gate_words
from edgedit_hf.run.config import load_config


def test_the_table_is_whole():
    assert list(FORMATS) == ["onnx", "executorch", "coreml", "web"] and DTYPES == ("fp32", "fp16", "int8", "int4")
    assert {name: list(target.precisions) for name, target in FORMATS.items()} == {
        "onnx": ["fp32", "fp16", "int8", "int4"],
        "executorch": ["fp32", "int8", "int4"],
        "coreml": ["fp32", "fp16", "int8", "int4"],
        "web": ["fp32", "fp16", "int8", "int4"],
    }
    for name, target in FORMATS.items():
        assert target.name == name and target.suffix.startswith(".") and set(target.measured) <= set(target.precisions)
        for precision in target.precisions.values():
            gates = PRECISIONS[precision.name]  # whatever the format adds, the gates are those of the precision
            assert (precision.tolerance, precision.min_psnr_db) == (gates.tolerance, gates.min_psnr_db)
    assert [PRECISIONS[name].tolerance for name in ("fp32", "fp16", "int8", "int4")] == [1e-3, 1e-2, 5e-2, 3e-1]
    own = [target for target in FORMATS.values() if target.lowered_as == target.name]
    assert len({target.suffix for target in own}) == len(own)
    page = FORMATS["web"]
    assert (page.lowered_as, page.suffix, page.precisions) == ("onnx", ".onnx", FORMATS["onnx"].precisions)


def test_the_help_says_what_the_table_says():
    assert dtype_words() == (
        "fp32, fp16 (not executorch), int8 (executorch: 8da8w) or int4 (executorch: 8da4w; coreml: palettes of 16 "
        "entries)"
    )
    assert gate_words("tolerance") == "0.001 for fp32, 0.01 for fp16, 0.05 for int8, 0.3 for int4"


@pytest.mark.parametrize("runtime", MEASURED)
def test_recipes_take_what_the_table_measures(runtime, tmp_path):
    recipe = tmp_path / "run.yaml"
    for dtype in DTYPES:
        recipe.write_text(f"latency: {{runtime: {runtime}, precision: {dtype}}}")
        if dtype in MEASURED[runtime].measured:
            assert load_config(recipe).latency.precision == dtype
        else:
            with pytest.raises(EdgeDiTError, match="latency.precision"):
                load_config(recipe)
    key = {"onnxruntime": "dtypes", "executorch": "executorch"}[runtime]
    recipe.write_text(f"export: {{{key}: [{', '.join(MEASURED[runtime].measured)}]}}")
    assert getattr(load_config(recipe).export, key) == list(MEASURED[runtime].measured)
    recipe.write_text(f"export: {{{key}: [fp16]}}")
    with pytest.raises(EdgeDiTError, match=f"export.{key} holds 'fp16'; it may hold fp32, int8"):
        load_config(recipe)


@pytest.mark.parametrize("name", FORMATS)
def test_defaults_of_a_format(name):
    options = ExportOptions(format=name)
    assert options.rows == ("dynamic" if name == "onnx" else 2) and options.precision.name == "fp32"
    assert (options.not_run is None) == (name != "coreml")
    assert ExportOptions(format=name, batch="4").rows == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.dtype = "int8"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"format": "tflite"}, "--format is 'tflite'; the formats are onnx, executorch, coreml, web."),
        ({"dtype": "int2"}, "--dtype is 'int2'; the format onnx exists as fp32, fp16, int8, int4."),
        ({"format": "executorch", "batch": "dynamic"}, "--batch is 'dynamic'; give a number of at least 1."),
        ({"batch": -1}, "--batch is -1; give 'dynamic' or a number of at least 1."),
        ({"batch": 1025}, "--batch is 1025; give a whole number from 1 to 1024."),
        ({"opset": 17}, "--opset is 17; give a whole number from 18 to 99."),
        ({"resolution": (64, 4097)}, "--resolution is 4097; give a whole number from 8 to 4096."),
        ({"tolerance": 0.0}, "--tolerance is 0.0; give a number above 0, up to 1e+06."),
        ({"min_psnr_db": float("inf")}, "--min-psnr is inf; give a number from 0 to 200."),
        ({"num_images": 2.5}, "--images is 2.5; give a whole number from 1 to 10000."),
        ({"seed": 2**63}, f"--seed is {2**63}; give a whole number from 0 to 2^63 - 1."),
        ({"threads": True}, "--threads is True; give a whole number from 1 to 1024."),
        ({"backend": "qnn"}, "backend is 'qnn'; backends belong to ExecuTorch. Leave it out for onnx."),
        (
            {"one_file": True},
            "one-file is asked, but the export is onnx; one file with all methods is written by executorch for "
            "xnnpack. Leave it out.",
        ),
        (
            {"format": "executorch", "backend": "coreml", "dtype": "int4"},
            "precision is 'int4'; through ExecuTorch's coreml delegate only fp32 is exported (it computes in 16 bits "
            "there). For small Core ML weights use the format coreml.",
        ),
        (
            {"format": "executorch", "dtype": "int8", "activations": "static"},
            "activations is 'static', but the export is executorch int8; calibrated activations are for onnx and web "
            "int8.",
        ),
        (
            {"format": "coreml", "dtype": "int4", "weights": "gptq"},
            "weights is 'gptq', but the export is coreml int4; compensated rounding is for onnx, executorch and web "
            "int4.",
        ),
        (
            {"format": "web", "resolution": "dynamic"},
            "The resolution is 'dynamic', but web files are made for one size; give HxW, or export to onnx.",
        ),
        (
            {"runtime_url": "https://example.org/"},
            "runtime-url is 'https://example.org/'; a page alone loads a runtime. Leave it out for onnx.",
        ),
        ({"weights": "best"}, "weights is 'best'; it may be nearest, gptq."),
    ],
)
def test_what_does_not_exist_is_said(options, message):
    with pytest.raises(EdgeDiTError, match=re.escape(message) + "$"):
        ExportOptions(**options)
