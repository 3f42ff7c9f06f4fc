"""The benchmark of quantisation runs at a small size and prints what it promises; its --check knows good figures from
bad ones.
"""

import sys

import pytest

NAMES = ["fp32", "fp16 weights", "int8", "NF4", "RTN-4", "GPTQ-4", "RTN 4.3"]
NAMES += ["k-means 4.3, nearest", "k-means 4.3", "k-means 4.3 + self-distillation"]
SIZES = "teacher.hidden_size=128 teacher.num_layers=2 teacher.num_heads=4 quantize.timesteps=2 quantize.samples=8"


def measured(benchmark, repository, *arguments, overrides: str) -> dict:
    recipe = ["--config", repository / "training" / "recipes" / "debug.yaml"]
    recipe += [part for override in f"{SIZES} {overrides}".split() for part in ("--override", override)]
    table, result = benchmark("quantization.py", *recipe, "--latency-batch", 2, "--repeats", 2, *arguments)
    rows = result["rows"]
    assert list(rows) == NAMES and all(any(line.startswith(f"{name} ") for line in table) for name in NAMES)
    assert (
        rows["fp32"]["bits"],
        rows["fp16 weights"]["bits"],
        rows["fp32"]["error"]["sqnr_db"],
        rows["fp32"]["frechet_ratio"],
    ) == (32, 16, None, 1)
    assert all(4 < rows[name]["bits"] <= 4.3 for name in NAMES[6:]) and 8 < rows["int8"]["bits"] < 9
    assert rows["int8"]["error"]["mse"] < rows["GPTQ-4"]["error"]["mse"] < rows["RTN-4"]["error"]["mse"]
    assert (
        rows["fp16 weights"]["bytes"] < 0.6 * rows["fp32"]["bytes"]
        and rows["NF4"]["bytes"] < 0.3 * rows["fp32"]["bytes"]
    )
    return result


@pytest.mark.slow
def test_every_form_at_its_smallest(benchmark, repository):
    small = "teacher.steps=2 quantize.calibration_images=4 quantize.sensitivity_images=2 quantize.steps=2"
    small += " quantize.batch_size=4 evaluate.extractor_steps=2"
    result = measured(benchmark, repository, "--samples", 16, overrides=small)
    assert result["samples"] == 16 and result["activations"]["dynamic"]["mse"] > 0


@pytest.mark.slow
def test_every_form_of_a_network_that_it_trains_itself(benchmark, repository, tmp_path):
    small = "quantize.calibration_images=4 quantize.sensitivity_images=2 quantize.steps=4 quantize.batch_size=8"
    result = measured(benchmark, repository, "--samples", 32, "--images", tmp_path / "forms.png", overrides=small)
    assert list(result["activations"]) == ["static, 1 bucket", "static, 2 buckets", "dynamic"]
    assert (tmp_path / "forms.png").stat().st_size > 5000


def test_the_check_knows_good_figures_from_bad_ones(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    monkeypatch.delitem(sys.modules, "quantization", raising=False)
    import quantization as benchmark

    def row(ratio: float, decibels: float, bits: float = 4.25) -> dict:
        return {"frechet_ratio": ratio, "bits": bits, "error": {"sqnr_db": decibels}}

    good = {"RTN-4": row(1.3, 27.0), "NF4": row(1.3, 28.0), benchmark.BEST: row(1.01, 40.0)}
    inputs = {"static, 1 bucket": {"mse": 2.0}, "static, 2 buckets": {"mse": 1.0}, "dynamic": {"mse": 0.1}}
    assert benchmark.problems(good, inputs) == []
    bad = {"RTN-4": row(1.3, 27.0, 4.5), "NF4": row(1.3, 28.0), benchmark.BEST: row(1.06, 27.5)}
    found = benchmark.problems(bad, {**inputs, "static, 2 buckets": {"mse": 2.0}})
    assert [text.split(":")[0] for text in found] == [
        benchmark.BEST,
        benchmark.BEST,
        "RTN-4",
        "static scales by bucket",
    ]
    assert "1.060 times" in found[0] and "27.5 dB, NF4 has 28.0" in found[1] and "4.500 bits" in found[2]
