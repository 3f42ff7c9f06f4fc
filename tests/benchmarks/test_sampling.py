"""The benchmark of whole pipelines at a small size: equal images are asserted here, speed is not."""


def test_sampling(benchmark):
    arguments = ("--preset", "DiT-S/8", "--steps", 3, "--rounds", 1, "--dtypes", "fp32")
    _, result = benchmark("sampling.py", *arguments)
    (row,) = result["rows"]
    assert row["difference"] < 1e-4 and row["released"]["difference"] < 1e-4
    assert row["released"]["ratio"] < row["weight_ratio"] < 1
