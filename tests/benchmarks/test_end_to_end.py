"""The benchmark of one image at its smallest: every row is there, and its figures belong together. Its bars are for the
real sizes.
"""

import importlib

import pytest

SIZES = ("--teacher", "DiT-S/8", "--student", "DiT-S/8", "--vae-width", 8, "--layers", 1)
SMALL = (*SIZES, "--rounds", 2, "--timed-steps", 2)


def check_rows(table: list[str], result: dict, runtimes: list[str]) -> dict[str, dict]:
    """The rows by name."""
    rows = {row["row"]: row for row in result["rows"]}
    base, seconds = rows["diffusers-fp32"], {(d["decoder"], d["runtime"]): d["seconds"] for d in result["decoders"]}
    assert seconds.keys() == {(d, r) for d in ("AutoencoderKL", "AutoencoderTiny") for r in ("torch", *runtimes)}
    for name, row in rows.items():
        few = name.startswith(("few-step", *runtimes))
        assert (row["steps"], row["guidance"], row["forwards"]) == ((4, 1.0, 4) if few else (50, 4.0, 100))
        assert row["timed_steps"] == (4 if few else 2)  # the others are multiplied
        # A ratio is the median of the rounds' own: of two rounds it lies between theirs.
        assert 0.2 < row["ratio"] * row["seconds"] / base["seconds"] < 5
        assert row["memory_ratio"] == row["peak_bytes"] / base["peak_bytes"]
        runtime = next((r for r in runtimes if name.startswith(r)), "torch")
        for decoder, whole in row["whole_seconds"].items():
            assert whole == row["seconds"] + seconds[decoder, runtime] > seconds[decoder, runtime] > 0
    assert result["weights"] == "random" and "random weights" in table[0]
    assert result["exports"].keys() == set(runtimes)
    return rows


@pytest.mark.slow
def test_the_smallest_network(benchmark, tmp_path):
    table, result = benchmark("end_to_end.py", *SMALL, "--runtimes", "onnxruntime", "--folder", tmp_path)
    rows = check_rows(table, result, ["onnxruntime"])
    assert list(rows) == [
        "diffusers-fp32",
        "diffusers-bf16",
        "teacher-fp32",
        "compressed-fp32",
        "few-step-fp32",
        "onnxruntime-int8",
    ]
    # The export's own sampler needs neither torch nor the package: its process is small.
    assert 30e6 < rows["onnxruntime-int8"]["peak_bytes"] < 250e6
    parameters = sum(entry["parameters"] for entry in result["decoders"])
    assert parameters > 0 and 2e6 < result["exports"]["onnxruntime"]["transformer_bytes"] < 1e7
    assert list(tmp_path.iterdir()) == []  # it leaves nothing behind
    made = importlib.import_module("tables").end_to_end(result)
    assert len(made["denoising"].splitlines()) == 2 + len(rows) and len(made["decoding"].splitlines()) == 2 + 4


def test_what_the_check_demands(benchmark, monkeypatch, repository):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import end_to_end

    least, most = end_to_end.LEAST_SPEED, end_to_end.MOST_MEMORY
    assert least == (200 if end_to_end.AMX else 100) and most == 0.25

    def found(ratio: float, memory: float) -> list[str]:
        return end_to_end.problems([{"row": "onnxruntime-int8", "ratio": ratio, "memory_ratio": memory}])

    assert found(least, most) == []
    assert len(found(least - 1, most)) == len(found(least, most + 0.01)) == 1 and len(found(0, 1)) == 2
    assert end_to_end.problems([{"row": "few-step-fp32"}])  # the row that the bar is on must have run


@pytest.mark.slow
@pytest.mark.export
def test_both_runtimes_in_processes_of_their_own(benchmark, tmp_path):
    pytest.importorskip("executorch")
    table, result = benchmark("end_to_end.py", *SMALL, "--folder", tmp_path, children=True)
    rows = check_rows(table, result, ["onnxruntime", "executorch"])
    assert list(rows)[-1] == "executorch-8da8w"
    # A process of torch and diffusers takes more than one of numpy and ONNX Runtime.
    assert rows["onnxruntime-int8"]["memory_ratio"] < 0.5
