"""The benchmark of the int8 component: its error at the smallest size, and (slow) at a size that int8 is for."""

import pytest


@pytest.mark.slow
def test_the_smallest_network(benchmark):
    table, result = benchmark("int8.py", "--preset", "DiT-digits/2", "--batches", 2, "--repeats", 2)
    (row,) = result["rows"]
    assert row["batch"] == 2 and row["ms"].keys() == {"fp32", "bf16", "int8"} and min(row["ms"].values()) > 0
    assert 1e-6 < row["relative_error"] < 0.1  # it is another network than the fp32 one, and the same function
    assert len(table) == 2 and f"{row['speedup']:.3f}" in table[1]


@pytest.mark.slow
@pytest.mark.export
def test_int8(benchmark):
    arguments = ("--preset", "DiT-S/8", "--batches", 2, "--repeats", 3)
    _, result = benchmark("int8.py", *arguments, children=True)
    (row,) = result["rows"]
    assert 0 < row["relative_error"] < 0.1 and row["speedup"] > 0
