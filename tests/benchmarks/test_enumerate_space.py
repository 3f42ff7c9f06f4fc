"""The enumerated space: its values are what the search's own objective gives, an interrupted run goes on where it was,
and the table that the searches are compared on is whole.
"""

import json
import runpy
import shutil

import pytest

from edgedit_hf.data.loading import load_run_images
from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.distill.teacher import load_teacher
from edgedit_hf.metrics.reference import load_extractor, real_features
from edgedit_hf.run.config import load_config
from edgedit_hf.search.latency_table import LatencyTable
from edgedit_hf.search.objectives import StudentQuality
from edgedit_hf.search.pareto import hypervolume
from edgedit_hf.search_space import SearchSpace


@pytest.fixture
def script(repository, monkeypatch):
    """The script's names."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return runpy.run_path(str(repository / "benchmarks" / "enumerate_space.py"))


def small_table(levels=(1.0, 2.0, 3.5, 9.0)):
    """A made-up table of a teacher with two layers: the distance is 10 and the levels of what the layers lack."""
    space = SearchSpace(2, 64, 4)
    keys = {
        f"{i:02d}/{option}": [1.0, (1 + 0.1 * i) * loss]
        for i in range(2)
        for option, loss in zip(("mlp", "attention", "both"), levels)
    }
    keys |= {
        f"00-01/{option}": [1.0, levels[3] + n] for n, option in enumerate(("original", "mlp", "attention", "both"))
    }
    shapes = {option: space.option_shape(option) for option in ("original", "mlp", "attention", "both")}
    blocks = [
        {"option": option, "attention_dim": shape[0], "num_heads": shape[1], "mlp_ratio": shape[2], "ms": ms}
        for (option, shape), ms in zip(shapes.items(), (4.0, 3.0, 2.0, 1.0))
    ]
    entries = []
    for code in space.codes():
        layers = [(layer.source, space.option_of(layer)) for layer in space.from_code(code).layers]
        lacks = [keys.get(f"{'-'.join(f'{i:02d}' for i in source)}/{option}", [1, 0.0])[1] for source, option in layers]
        entries.append([list(code), 10.0 + sum(lacks), 0.5])
    again = [[code, distance + 0.3 + (0.7 if n % 2 else -0.7)] for n, (code, distance, _) in enumerate(entries[::2])]
    latency = {"trunk_ms": 0.5, "blocks": blocks}
    return {"space": space.to_dict(), "latency": latency, "bank": keys, "entries": entries, "again": again}


def test_the_reader_knows_distance_latency_and_front_of_every_genotype(script):
    values = small_table()
    table = script["Enumerated"](values)
    space = table.space
    assert len(table.codes) == len(table.points) == space.size == 20
    assert table.objectives[(0,)] == (10.0, 8.5) and table.objectives[(15,)] == pytest.approx((17.35, 2.5))
    assert table.objectives[(19,)] == (22.0, 1.5) and table.objectives[(6,)] == pytest.approx((13.2, 5.5))
    for genotype in space.all():
        assert table.objectives[space.code(genotype)][0] == pytest.approx(10 + table.summed_loss(genotype))
    # Every point that no other is at least as good as in both: by brute force.
    points = table.objectives
    better = {
        code
        for code, (d, ms) in points.items()
        if not any((e <= d and t <= ms and (e, t) != (d, ms)) for e, t in points.values())
    }
    assert set(table.front) == better and [points[c][1] for c in table.front] == sorted(points[c][1] for c in better)
    assert table.reference == pytest.approx((1.1 * 22.0, 1.1 * 8.5))
    assert table.hypervolume == pytest.approx(hypervolume(list(points.values()), table.reference))


def test_what_is_wrong_with_a_table_is_said(script):
    values = small_table()

    def gaps(entries):
        return script["gaps"](script["Enumerated"]({**values, "entries": entries}))

    whole = values["entries"]
    assert gaps(whole) == []
    assert gaps(whole[1:]) == ["19 entries of 19 genotypes, 20 wanted"]
    assert gaps(whole + whole[:1]) == ["21 entries of 20 genotypes, 20 wanted"]
    for bad in ([whole[0][0], float("nan"), 0.5], [whole[0][0], 10.0, 0.0]):
        assert gaps([bad, *whole[1:]]) == ["a distance or a standard error is not finite and above 0"]

    def problems(**changed):
        return script["problems"](script["report"](script["Enumerated"]({**values, **changed})))

    assert problems() == ["20 genotypes, at least 1000 wanted"]  # other noise: ± 0.7 about a shift, 0.5 a distance
    certain = [[code, distance, 0.1] for code, distance, _ in whole]
    assert problems(entries=certain)[1].startswith("the bootstrap's standard error is 0.1, other noise gives 0.5")


def test_the_table_that_the_searches_are_compared_on(benchmark, script, repository):
    table, found = benchmark("enumerate_space.py", threads=None)
    whole = script["Enumerated"].read()
    assert script["gaps"](whole) == script["problems"](found) == []
    assert found["genotypes"] == whole.space.size >= 1000 and (whole.space.num_layers, whole.space.hidden_size) == (
        5,
        128,
    )
    assert len(whole.again) == whole.space.size // 16
    assert set(whole.losses) == {
        f"{'-'.join(f'{i:02d}' for i in layer.source)}/{whole.space.option_of(layer)}"
        for layer in whole.space.proxies()
    }
    assert (repository / "benchmarks" / "data" / "search_digits.json").stat().st_size < 300_000
    recipe = load_config(repository / "training" / "recipes" / "search-digits.yaml")
    made_by, made_from = whole.values["made_by"], whole.values["made_by"]["made_from"]
    assert (made_from["samples"], made_from["steps"]) == (recipe.search.samples, recipe.search.sampling_steps)
    assert made_by["teacher"]["num_layers"] == recipe.teacher.num_layers and made_by["versions"]["torch"]
    assert sum(line.startswith("front ") for line in table) == len(found["front"]) == len(whole.front)


@pytest.fixture
def small_run(debug_run, tmp_path):
    """A copy of the debug run whose space is small: both pairs either as they are, both narrow, or merged."""
    run = shutil.copytree(debug_run, tmp_path / "run")
    index = json.loads((run / "bank" / "index.json").read_text())
    index["space"]["allowed"] = [[0, 15, 19], [0, 15, 19]]
    (run / "bank" / "index.json").write_text(json.dumps(index))
    return run


def test_a_space_is_enumerated_killed_and_finished(benchmark, script, repository, small_run, tmp_path):
    recipe = ("--config", repository / "training" / "recipes" / "debug.yaml", "--override", "threads=1")
    output = tmp_path / "table.json"
    benchmark("enumerate_space.py", small_run, *recipe, "--shard", "2/2", "--output", output, threads=None)
    whole = json.loads(output.read_text())
    file = next((small_run / "enumerated").glob("*/2-of-2.jsonl"))
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]) + lines[3][:20])  # killed in the middle of the fourth line
    table, found = benchmark(
        "enumerate_space.py", small_run, *recipe, "--shard", "1/2", "--output", output, threads=None
    )
    assert json.loads(output.read_text()) == whole and found["genotypes"] == 9
    assert file.read_text() == "".join(lines[:3]) + lines[3][:20]  # the other's file is not touched
    made = sorted(json.loads(line)["code"] for line in (file.parent / "1-of-2.jsonl").read_text().splitlines())
    assert made == sorted(json.loads(line)["code"] for line in lines[3:])  # only what was missing
    file.write_text("".join(lines[:3]) + lines[3][:20])
    (file.parent / "1-of-2.jsonl").unlink()
    benchmark("enumerate_space.py", small_run, *recipe, "--shard", "2/2", "--output", output, threads=None)
    assert json.loads(output.read_text()) == whole and sorted(file.read_text().splitlines(True)) == sorted(lines)

    # What stands in it is what the search's objective alone gives, and the run's latency table.
    config = load_config(recipe[1], ["threads=1", f"output_dir={small_run}"])
    pipeline = load_teacher(config)
    bank, images = ProxyBank(small_run / "bank", pipeline.transformer), load_run_images(config)
    extractor = load_extractor(config, images, "cpu")
    sampling = {"samples": 32, "steps": 2, "guidance_scale": config.search.guidance_scale, "batch_size": 32}
    quality = StudentQuality(bank, pipeline, extractor, real_features(extractor, images), seed=0, **sampling)
    read, latency = script["Enumerated"](whole), LatencyTable.from_json(small_run / "latency" / "table.json")
    for code in ((0, 19), (15, 15)):
        genotype = bank.space.from_code(code)
        assert read.entries[code][0] == pytest.approx(quality(genotype), abs=1e-5)
        assert read.latency_ms(genotype) == pytest.approx(latency.latency_ms(genotype), rel=1e-12)
        assert read.summed_loss(genotype) == pytest.approx(
            sum(bank.entries[key]["loss_after"] for key in map(bank.key, genotype.layers) if key in bank.entries)
        )
