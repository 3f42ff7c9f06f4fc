"""The evaluation's latencies are those of the files that the run ships."""

import json


def test_what_the_run_exported_is_what_is_timed(debug_run):
    latency = json.loads((debug_run / "evaluate" / "latency.json").read_text())
    runners = {"torch-fp32", "onnxruntime-fp32", "onnxruntime-int8"}
    assert latency["shipped"] == {
        f"student-tuned onnxruntime-{dtype}": f"exported/onnx-{dtype}" for dtype in ("fp32", "int8")
    }
    assert set(latency["timings"]) == {f"{name} {key}" for name in ("teacher", "student-tuned") for key in runners}
    assert set(latency["speedup"]) == runners
