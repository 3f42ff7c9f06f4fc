"""The benchmark of sparse attention at a small size: equal outputs are asserted here, speed is not."""

import pytest


@pytest.mark.slow
def test_attention(benchmark):
    arguments = ("--side", 16, "--kv-heads", 4, "--repeats", 2, "--runtimes", "onnxruntime-fp32")
    _, result = benchmark("attention.py", *arguments)
    (row,) = result["rows"]
    assert row["relative_error"] < 1e-5
    assert row["ms"].keys() == row["speedup"].keys() == {"core", "layer"}
    assert row["ms"]["core"].keys() == row["peak_bytes"].keys() == {"full", "ASSA"}
