"""The benchmark of the int8 component at a small size: its error is asserted here, speed is not."""

import pytest


@pytest.mark.slow
@pytest.mark.export
def test_int8(benchmark):
    arguments = ("--preset", "DiT-S/8", "--batches", 2, "--repeats", 3)
    _, result = benchmark("int8.py", *arguments, children=True)
    (row,) = result["rows"]
    assert 0 < row["relative_error"] < 0.1 and row["speedup"] > 0
