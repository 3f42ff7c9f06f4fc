"""The benchmark of few-step distillation on the debug runs of both families: every variant in a run folder of its own,
and bars that follow from the figures.
"""

import shutil

import pytest


def test_terms_of_a_class_conditional_net(benchmark, repository, debug_run, tmp_path):
    run = shutil.copytree(debug_run, tmp_path / "run")
    recipe = ("--config", repository / "training" / "recipes" / "debug.yaml", "--override", "threads=1")
    small = ("--terms", "both,knowledge", "--seeds", 1, "--samples", 32)
    table, result = benchmark("few_step.py", run, *recipe, *small, threads=None)
    found = result["widths"]["full"]
    many, few, both = found["many"], found["few"], found["terms"]["both"]
    assert result["timesteps"] == [601.0, 300.0] and few["solver"].split(",")[0] in ("DDIM", "DPM-Solver++", "UniPC")
    assert list(found["terms"]) == ["both", "knowledge"] and both["distance"] != found["terms"]["knowledge"]["distance"]
    closed = (few["distance"] - both["distance"]) / (few["distance"] - many["distance"])
    assert both["closed"] == closed and both["runs"][0]["distance"] == both["distance"]
    assert all(0 <= figures["recall"] <= 1 and 0 <= figures["agreement"] <= 1 for figures in (many, few, both))
    folders = run / "few-step-benchmark" / "seed-0"
    assert sorted(path.name for path in folders.iterdir()) == ["both", "knowledge"]
    assert [line.split(":")[1].strip() for line in table if line.startswith("both ")] == [
        "met" if met else "MISSED"
        for met in (
            both["closed"] >= 0.8,
            both["distance"] <= 1.15 * many["distance"],
            both["recall"] >= many["recall"] - 0.05,
            both["agreement"] >= many["agreement"] - 0.02,
        )
    ]
    before = (folders / "both" / "few-step" / "stage.json").stat().st_mtime_ns
    again = benchmark("few_step.py", run, *recipe, *small, threads=None)[1]
    assert again == result and (folders / "both" / "few-step" / "stage.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_widths_of_a_supernet_alone_and_in_one_run(benchmark, repository, debug_t2i_run, tmp_path):
    run = shutil.copytree(debug_t2i_run, tmp_path / "run")
    recipe = ("--config", repository / "training" / "recipes" / "debug-t2i.yaml", "--override", "threads=1")
    small = ("--terms", "both", "--seeds", 1, "--samples", 32, "--subnets", "tiny,small,full", "--joint")
    table, result = benchmark("few_step.py", run, *recipe, *small, threads=None)
    assert list(result["widths"]) == ["tiny", "small", "full"] and set(result["joint"][0]) == {"tiny", "small", "full"}
    assert result["widths"]["tiny"]["few"]["solver"] in ("Euler", "DPM-Solver++", "UniPC")
    alone = [result["widths"][width]["terms"]["both"]["distance"] for width in ("tiny", "small", "full")]
    together = [result["joint"][0][width]["distance"] for width in ("tiny", "small", "full")]
    assert f"one run for all / each alone {sum(together) / sum(alone):.3f}" in table[-1]
