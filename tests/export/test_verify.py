"""The gates of an export: errors and sizes against numpy's, and where a gate stands."""

import math

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.formats import PRECISIONS
from edgedit_hf.export.onnx.lower import lower_onnx
from edgedit_hf.export.parts import Part
from edgedit_hf.export.verify import (
    benchmark,
    check,
    check_part,
    compare_part,
    relative_error,
    sampling_arguments,
    weight_bytes,
    with_rows,
)

FOUND = {
    "finite": True,
    "relative_error": 0.0,
    "worst_timestep": 10.0,
    "psnr_db": 60.0,
    "steps": 4,
    "per_timestep": [],
}


def test_relative_error_is_that_of_the_norms():
    generator = np.random.default_rng(0)
    reference, found = generator.normal(size=(2, 3, 5)), generator.normal(size=(2, 3, 5))
    expected = math.sqrt(((found - reference) ** 2).sum() / (reference**2).sum())
    assert relative_error(torch.tensor(found), torch.tensor(reference)) == pytest.approx(expected, rel=1e-6)
    zero = torch.zeros(3)
    assert relative_error(zero, zero) == 0.0 and relative_error(torch.ones(3), zero) == math.inf


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_gate_stands_at_the_precisions_own_values(precision):
    tolerance, least = PRECISIONS[precision].tolerance, PRECISIONS[precision].min_psnr_db
    passed = check({**FOUND, "relative_error": tolerance, "psnr_db": least}, precision)
    assert passed["passed"] and (passed["tolerance"], passed["min_psnr_db"]) == (tolerance, least)
    with pytest.raises(EdgeDiTError, match=f"the tolerance is {tolerance:g}. Nothing was written"):
        check({**FOUND, "relative_error": 1.01 * tolerance}, precision)
    with pytest.raises(EdgeDiTError, match=f"the gate is {least:g} dB"):
        check({**FOUND, "psnr_db": least - 0.1}, precision)
    assert check({**FOUND, "psnr_db": None}, precision)["passed"]  # equal images
    with pytest.raises(EdgeDiTError, match="NaN or infinite"):
        check({**FOUND, "finite": False}, precision)
    part = Part("vae", "decoder", nn.Identity(), {"x": torch.zeros(1)}, ("x",))
    assert check_part(part, precision, tolerance)["relative_error"] == tolerance
    for error in (1.01 * tolerance, math.nan):
        with pytest.raises(EdgeDiTError, match="of the decoder of vae differs"):
            check_part(part, precision, error)


def test_masked_tokens_of_a_text_encoder_do_not_count():
    class Encoder(nn.Module):
        def forward(self, input_ids, attention_mask):
            return input_ids.float().unsqueeze(-1)

    inputs = {"input_ids": torch.tensor([[3, 4], [5, 6]]), "attention_mask": torch.tensor([[1.0, 0.0], [1.0, 1.0]])}
    part = Part("text_encoder", "text_encoder", Encoder(), inputs, ("last_hidden_state",))
    wrong = torch.zeros(2, 2, 1)
    wrong[0, 1] = 100.0  # behind the mask
    right = part.run()["last_hidden_state"]
    assert compare_part(part, [(right + wrong).numpy()]) == 0.0
    wrong[0, 0] = 1.0
    assert compare_part(part, [(right + wrong).numpy()]) == pytest.approx(1 / math.sqrt(3**2 + 5**2 + 6**2))


def test_rows_are_repeated():
    inputs = {"x": torch.arange(6.0).reshape(3, 2)}
    assert with_rows(inputs, 5)["x"][:, 0].tolist() == [0, 2, 4, 0, 2]
    assert with_rows(inputs, 2)["x"][:, 0].tolist() == [0, 2]


def test_what_is_sampled_covers_the_classes(make_transformer):
    from edgedit_hf import EdgeDiTPipeline
    from edgedit_hf.diffusion import make_scheduler

    pipeline = EdgeDiTPipeline(make_transformer(num_layers=1), make_scheduler("epsilon"))
    classes = pipeline.transformer.config.num_classes
    labels = sampling_arguments(pipeline, 2 * classes + 1)["class_labels"]
    assert labels == [*range(classes), *range(classes), 0]


def test_bytes_and_times_of_a_file(tmp_path):
    layer = nn.Linear(64, 32)
    part = Part("transformer", "denoiser", layer.eval(), {"x": torch.randn(2, 64)}, ("y",), {"x": {0: "batch"}})
    for precision in ("fp32", "int8"):
        lower_onnx(part, tmp_path / f"{precision}.onnx", precision, {})
    file = tmp_path / "int8.onnx"
    stored = [numpy_helper.to_array(tensor) for tensor in onnx.load(str(file)).graph.initializer]
    assert sum(weight_bytes(file).values()) == sum(array.nbytes for array in stored)
    assert weight_bytes(file)["uint8"] >= 64 * 32 and weight_bytes(tmp_path / "fp32.onnx") == {"float32": 4 * 65 * 32}
    files = {precision: tmp_path / f"{precision}.onnx" for precision in ("fp32", "int8")}
    found = benchmark(part, files, [1, 3], threads=1, repeats=5)
    assert found["precision"] == "int8" and found["initializer_bytes_fp32"] == 4 * 65 * 32
    assert found["file_bytes"] == file.stat().st_size > found["initializer_bytes"]
    assert [entry["batch"] for entry in found["latency"]] == [1, 3]
    for entry in found["latency"]:
        assert set(entry["timings"]) == {"torch-fp32", "onnxruntime-fp32", "onnxruntime-int8"}
        assert set(entry["speedup"]) == {"torch-fp32", "onnxruntime-fp32"}
