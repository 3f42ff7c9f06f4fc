"""The benchmark of feature-wise distillation on a copy of the debug run: both curves start where their students are."""

import json
import shutil
from statistics import mean


def test_both_curves_are_drawn_into_the_run(benchmark, repository, debug_run, tmp_path):
    run = shutil.copytree(debug_run, tmp_path / "run")
    recipe = ("--config", repository / "training" / "recipes" / "debug.yaml", "--override", "threads=1")
    arguments = ("--steps", 3, "--seeds", 2, "--samples", 32)
    table, result = benchmark("feature_distillation.py", run, *recipe, *arguments, threads=None)
    assert result["steps"] == [0, 1, 2, 3] and result["samples"] == 32 and result["extractor"] == "digits-cnn"
    distilled, random = (result["curves"][f"{kind} proxies"] for kind in ("distilled", "random"))
    assert distilled[0][0] == distilled[1][0] != distilled[0][-1]  # one start from the bank; tuning moves it
    assert random[0][0] == random[1][0] != distilled[0][0]  # new blocks of a DiT do nothing yet, whatever their seed
    assert random[0][-1] != random[1][-1]
    assert result["ratios"] == [b[-1] / a[-1] for a, b in zip(distilled, random)]
    drawn = json.loads((run / "evaluate" / "curves.json").read_text())
    assert drawn["random proxies"] == {"steps": result["steps"], "values": [mean(pair) for pair in zip(*random)]}
    assert any(f"mean {mean(result['ratios']):.2f}" in line for line in table)
