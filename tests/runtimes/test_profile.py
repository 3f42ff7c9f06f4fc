"""Profiles of real files name the operators that are in them."""

import onnx
import pytest

from edgedit_hf.runtimes.profile import SHARE_METHOD, executorch_profile, onnx_profile


def test_an_onnx_profile_names_the_operators(part, files):
    found = onnx_profile(files["onnxruntime"], part.inputs, threads=1)
    linear = {"Gemm", "FusedGemm", "MatMul"}
    assert linear & {node.op_type for node in onnx.load(files["onnxruntime"]).graph.node}
    assert linear & found.keys() and all(milliseconds >= 0 for milliseconds in found.values())


@pytest.mark.parametrize("runtime", ["executorch", "older"])
def test_an_executorch_profile_splits_delegate_and_portable(part, files, runtime):
    found = executorch_profile(files[runtime], part.inputs, runs=3)
    assert 0 <= found["portable_share"] < 1 and found["portable_share_method"] == SHARE_METHOD
    # the table of labels is the one operator that XNNPACK leaves
    assert list(found["portable_ms"]) == ["embedding.out"] and 0 < found["portable_ms"]["embedding.out"]
    assert found["portable_ms"]["embedding.out"] < found["forward_ms"]
