"""The loop with a browser as the device, on the debug run at its smallest."""

import pytest
from browser import CHROMIUM
from phone_servers import free_port

from edgedit_hf.search.latency_table import LatencyTable


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this machine")
def test_from_a_bank_to_a_page(benchmark, debug_run, recipes, tmp_path):
    work = tmp_path / "work"
    config = recipes.arguments("", work)[2]
    arguments = (debug_run, "--config", config, "--work", work, "--batch", 2, "--port", free_port())
    _, result = benchmark("browser_loop.py", *arguments, threads=None)

    first, second = (LatencyTable.from_json(work / f"{name}.json") for name in ("first", "second"))
    assert first.runtime == second.runtime == "web" and first.batch == 2 and first.imported
    found = result["second"]
    measured = {entry["genotype"]: entry["measured_ms"] for entry in second.to_dict()["prediction"]["networks"]}
    assert found["student_measured_ms"] in measured.values() and found["networks"] >= 8
    assert found["speedup"] == found["teacher_measured_ms"] / found["student_measured_ms"]
    assert {name for name in result["speedups"]} == {"Chromium, WebAssembly", "onnxruntime", "executorch"}
    assert all(said["db"] is None or said["db"] >= 40 for said in result["pages"].values())

    files = {file: file.stat().st_mtime_ns for file in work.glob("*.json")}
    again = benchmark("browser_loop.py", *arguments, threads=None)[1]  # everything is there
    assert again["second"] == found and {file: file.stat().st_mtime_ns for file in files} == files
