"""The claims and ablations of a run beyond its own figures, on the debug run: read from what was judged, made once."""

import importlib
import json
import shutil

import pytest
import yaml

from edgedit_hf.errors import EdgeDiTError

ASKED = ("few_step.enabled=true", "quantize.enabled=true", "tune.random_proxies=true", "export.dtypes=[int8]")


def test_a_run_that_lacks_a_model_is_named(benchmark, repository, debug_run):
    recipe = ("--config", repository / "training" / "recipes" / "debug.yaml", "--override", "threads=1")
    with pytest.raises(EdgeDiTError, match="no figures of few-step, quantized, .*student-random-proxies.* needs"):
        benchmark("evidence.py", debug_run, *recipe, threads=None)


@pytest.fixture(scope="module")
def recipe(repository, tmp_path_factory):
    """debug.yaml with the menu of debug-menu.yaml, which has merges of three."""
    folder = repository / "training" / "recipes"
    debug, menu = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("debug", "debug-menu"))
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(yaml.safe_dump({**debug, "bank": menu["bank"]}))
    return file


@pytest.mark.slow
def test_claims_and_ablations_of_a_run(benchmark, repository, recipes, recipe, tmp_path, monkeypatch):
    run = tmp_path / "run"
    recipes.run("compress", run, *ASKED, config=str(recipe))
    overrides = [part for value in ("threads=1", *ASKED) for part in ("--override", value)]
    arguments = ("evidence.py", run, "--config", recipe, *overrides, "--picture", tmp_path / "samples.png")
    table, result = benchmark(*arguments, threads=None)
    (found,) = result["runs"]

    distances, recalls = {}, {}
    for path in (run / "evaluate").glob("*.json"):
        model = json.loads(path.read_text())
        if "metrics" in model:
            distances[model["name"]], recalls[model["name"]] = model["metrics"]["fid[digits-cnn,n=64]"], model["recall"]
    few, many, ours = (distances[name] for name in ("student-tuned-few-steps", "student-tuned", "few-step"))
    expected = {
        "student / teacher trained on for as many steps": many / distances["teacher-more-steps"],
        "random / distilled proxies, tuned alike": distances["student-random-proxies"] / many,
        "what four steps cost, won back": (few - ours) / (few - many) if few > many else None,
        "about four bits / fp32": distances["quantized"] / ours,
        "int8 export / fp32": distances["onnx-int8"] / ours,
    }
    bars = {"random / distilled proxies, tuned alike": (1.1, 1e9), "what four steps cost, won back": (0.8, 1e9)}
    kept = {}
    for name, value in expected.items():
        low, high = bars.get(name, (0.0, 1.05))
        kept[name] = value is not None and low <= value <= high
        assert found["claims"][name]["value"] == (None if value is None else pytest.approx(value)), name
        if not name.startswith("what"):  # of whose gap little is left on these nets
            low, high = found["claims"][name]["interval"]
            assert low < high and low < 1.2 * value and high > value / 1.2, name
        (row,) = [line for line in table if line.startswith(name)]
        assert row.endswith("NOT KEPT") != kept[name]
    assert len(result["missed"]) == list(kept.values()).count(False)

    starts = found["ablations"]["starts"]
    assert starts["closed_form"]["distance"] == distances["student"]
    for other in ("copy", "random"):
        assert starts[other]["before"] > starts["closed_form"]["before"]
        assert starts[other]["proxies"] == starts["closed_form"]["proxies"] > 0
        assert starts[other]["after"] < starts[other]["before"]
        index = json.loads((run / "evidence" / f"starts-{other}" / "bank" / "index.json").read_text())
        assert len(index["entries"]) == starts[other]["proxies"]  # those of the student alone

    merges = found["ablations"]["merges"]
    assert merges
    for budget, both in merges.items():
        assert all(one["latency_ratio"] <= float(budget) * (1 + 1e-6) for one in both.values())
        if len(both) == 2:
            assert both["with"]["score"] <= both["without"]["score"] + 1e-9
            assert all(len(source) == 2 for source in both["without"]["merged"])

    terms = found["ablations"]["terms"]
    assert (terms["both"]["distance"], terms["both"]["recall"]) == (ours, recalls["few-step"])
    assert len({round(one["distance"], 6) for one in terms.values()}) == 3
    for one in terms.values():
        share = pytest.approx((few - one["distance"]) / (few - many)) if few > many else None
        assert one["won_back"] == share

    ranking = json.loads((run / "ranking" / "ranking.json").read_text())
    assert found["ablations"]["objectives"]["distance"] == ranking["correlations"]["distance"]["distance"]
    assert (tmp_path / "samples.png").stat().st_size > 10_000

    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    made = importlib.import_module("tables").evidence(result)
    assert list(made) == ["claims", "costs", "distances", "seconds", "starts", "merges", "terms", "objectives"]
    assert found["stamps"].keys() == found["distances"].keys() and found["seconds"]["teacher"] > 0
    assert len(made["distances"].splitlines()) == 2 + len(distances)

    made = {path: path.stat().st_mtime_ns for path in (run / "evidence").glob("*.json")}
    assert {path.stem for path in made} >= {"starts", "merges", "terms", "objectives", "intervals"}
    again = benchmark(*arguments, threads=None)[1]
    assert again["runs"] == result["runs"]
    assert all(path.stat().st_mtime_ns == when for path, when in made.items() if path.stem != "student")
    with pytest.raises(SystemExit) as ended:
        benchmark(*arguments, "--check", "--ablations", "", threads=None)
    assert (ended.value.code != 0) == bool(result["missed"])
    shutil.rmtree(run)
