"""Devices compared: rank correlations and fronts against their definitions, and the page that shows them."""

import itertools
import json

import numpy as np
import pytest
from run_folder import make_run
from scipy.stats import kendalltau

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.report.devices import compare_devices, in_words, sample, tables_of
from edgedit_hf.report.edgedit import build_report, write_report
from edgedit_hf.search.device_tables import DeviceTables


def test_devices_that_agree_and_that_do_not(device, space):
    """Twice as slow everywhere: the same ranking and front. The opposite: τ −1."""
    one, twice = device("one", (30.0, 20.0, 12.0, 6.0)), device("twice", (60.0, 40.0, 24.0, 12.0), 10.0)
    found = compare_devices({"one": one, "twice": twice})
    pair = found["space"]["pairs"][0]
    assert pair["pair"] == ["one", "twice"] and pair["kendall"] == pytest.approx(1) == pair["spearman"]
    assert found["space"]["count"] == min(256, space.size) and "fronts" not in found
    assert [each["name"] for each in found["devices"]] == ["one", "twice"]
    assert found["devices"][1]["teacher_ms"] == pytest.approx(4 * 60 + 10)
    assert found["devices"][0]["backend"] == "wasm" and found["devices"][0]["prediction"]["passed"]


def test_the_correlations_are_those_of_scipy(device, space):
    tables = {"a": device("a", (30.0, 20.0, 12.0, 6.0)), "b": device("b", (30.0, 8.0, 29.0, 7.0))}
    genotypes = sample(space, 256)
    assert len({genotype.hash for genotype in genotypes}) == len(genotypes) == 256
    times = [[table.latency_ms(genotype) for genotype in genotypes] for table in tables.values()]
    found = compare_devices(tables)["space"]["pairs"]
    assert found[0]["kendall"] == pytest.approx(kendalltau(*times).statistic) and found[0]["kendall"] < 0.9
    assert [pair["pair"] for pair in found] == [["a", "b"], ["a", "FLOPs"], ["b", "FLOPs"]]


def test_the_front_on_the_other_device(device, space):
    """Against fronts by definition: a point that no other one beats in both."""
    tables = {"a": device("a", (30.0, 20.0, 12.0, 6.0)), "b": device("b", (30.0, 8.0, 29.0, 7.0))}
    draw = np.random.default_rng(0)
    codes = list(itertools.islice(space.codes(), 0, None, 5))[:60]
    points = [(code, float(draw.uniform(1, 5))) for code in codes]
    found = compare_devices(tables, points)
    fronts = {}
    for name, table in tables.items():
        values = [(distance, table.latency_ms(space.from_code(code))) for code, distance in points]
        fronts[name] = {
            points[i][0]
            for i, (d, ms) in enumerate(values)
            if not any(e <= d and t <= ms and (e, t) != (d, ms) for e, t in values)
        }
        assert {tuple(code) for code in found["fronts"][name]["codes"]} == {tuple(code) for code in fronts[name]}
    assert found["fronts"]["a"]["kept"] == 1 and found["fronts"]["a"]["shared"] == len(fronts["a"])
    assert found["fronts"]["b"]["shared"] == len(fronts["a"] & fronts["b"])
    assert 0 < found["fronts"]["b"]["kept"] < 1
    words = in_words(found)
    assert "Kendall's τ over 256 genotypes" in words and "On b the front would have" in words


def test_a_report_of_several_devices(device, make_transformer, tmp_path):
    run = make_run(tmp_path / "run", make_transformer())
    one, two = device("one", (30.0, 20.0, 12.0, 6.0)), device("<two>", (30.0, 8.0, 29.0, 7.0))
    one.to_json(run / "latency" / "table.json")
    two.to_json(tmp_path / "two.json")
    assert "devices" not in build_report(run)
    html = write_report(run, [tmp_path / "two.json"]).read_text()
    report = json.loads((run / "report.json").read_text())
    assert [each["name"] for each in report["devices"]["devices"]] == ["one", "<two>"]
    assert (run / "report" / "devices.png").is_file() and "Devices compared" in html
    assert "&lt;two&gt;" in html and "<two>" not in html
    DeviceTables([one, two]).to_json(run / "latency" / "table.json")
    again = build_report(run)
    assert again["devices"] == report["devices"] and "table" not in again.get("latency", {})
    write_report(run)
    other = device("three", (30.0, 8.0, 29.0, 7.0), batch=7)
    other.to_json(tmp_path / "three.json")
    with pytest.raises(EdgeDiTError, match=r"batch 2 \(one\) / 7 \(three\)"):
        build_report(run, [tmp_path / "three.json"])
    (run / "latency" / "table.json").unlink()
    with pytest.raises(EdgeDiTError, match="has no latency table to compare"):
        tables_of(run, [tmp_path / "two.json"])
