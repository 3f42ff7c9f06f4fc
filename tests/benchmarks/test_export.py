"""The benchmark of exports at its smallest: two exports of the debug teacher, and (slow) every form of one layer."""

import pytest


def test_two_exports_of_a_trained_net(benchmark, debug_run):
    arguments = ("--parts", "trained", "--model", debug_run / "teacher", "--ways", "onnx-fp32", "onnx-int8")
    table, result = benchmark("export.py", *arguments)
    rows = {row["export"]: row for row in result["trained"]}
    assert list(rows) == ["onnx-fp32", "onnx-int8"] and result.keys() == {"trained", "environment"}
    assert rows["onnx-fp32"]["error"] < 1e-5 < rows["onnx-int8"]["error"] < 0.1
    assert rows["onnx-int8"]["psnr_db"] > 25 and rows["onnx-int8"]["bytes"] < rows["onnx-fp32"]["bytes"]
    assert all(row["ms"] > 0 and row["layers_of_8_bits"] == [] for row in rows.values())
    assert table[-1].startswith("onnx-int8 ")


@pytest.mark.slow
@pytest.mark.export
def test_one_layer_in_every_form(benchmark):
    pytest.importorskip("executorch")
    arguments = ("--parts", "blocks", "--layers", 1, "--repeats", 2, "--max-seconds", 5)
    found = benchmark("export.py", *arguments, threads=2)[1]["blocks"]
    rows = {row["form"]: row for row in found["rows"]}
    errors = {
        "onnxruntime-fp32": 1e-5,
        "onnxruntime-fp16": 2e-3,
        "onnxruntime-int8": 5e-2,
        "executorch-fp32": 1e-5,
        "executorch-8da8w": 5e-2,
    }
    assert all(0 < rows[name]["error"] < largest for name, largest in errors.items())
    for small, large in (
        ("onnxruntime-int8", "onnxruntime-fp16"),
        ("onnxruntime-int4", "onnxruntime-int8"),
        ("executorch-8da4w", "executorch-8da8w"),
    ):
        assert rows[small]["bytes"] < 0.7 * rows[large]["bytes"]
    # The conditioner holds what the split denoiser lost, and the share of what XNNPACK did not take is small.
    split = {row["form"]: row for row in found["split"]}
    for runtime in ("onnxruntime-int8", "executorch-8da4w"):
        whole, denoiser, conditioner = (split[f"{runtime} {part}"] for part in ("whole", "denoiser", "conditioner"))
        assert (
            denoiser["bytes"] + conditioner["bytes"] < 1.05 * whole["bytes"]
            and denoiser["resident_bytes"] < whole["resident_bytes"]
        )
    assert all(share <= 0.1 for share in found["portable_share"].values())
