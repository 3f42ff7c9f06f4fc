"""A table of what a device measured: a device of known times is recovered, and what is no measurement is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from phones import LAYER_MS, TRUNK_MS, measure, true_ms

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.phone.bundle import Bundle
from edgedit_hf.phone.results import append_rows
from edgedit_hf.phone.table import find_bundle, import_table
from edgedit_hf.records import Table
from edgedit_hf.schema import check
from edgedit_hf.search.latency_table import LatencyTable


def test_a_device_of_known_times_is_recovered(bundle, subject, tmp_path):
    append_rows(tmp_path / "phone.csv", measure(bundle))
    table = import_table(tmp_path / "phone.csv", bundle.folder, "Galaxy S25 Ultra")
    assert table.trunk_ms == pytest.approx(TRUNK_MS)
    assert [table.blocks[shape] for shape in bundle.plan.shapes] == pytest.approx(LAYER_MS)
    for genotype in (subject.student, *subject.space.ends()):
        assert table.latency_ms(genotype) == pytest.approx(true_ms(bundle, genotype))
    data = table.to_dict()
    assert (table.runtime, table.precision, table.batch, table.threads) == ("onnxruntime", "fp32", 2, 4)
    assert table.device == "Galaxy S25 Ultra" and data["environment"]["versions"] == {"onnxruntime": "1.31.1"}
    protocol = data["protocol"]
    assert protocol["imported"] is True and protocol["bundle"] == bundle.hash and protocol["device"] == "SM-S938B"
    assert (protocol["cold_loads"], protocol["warmups"], protocol["rounds"]) == (3, 3, 20)
    assert protocol["networks"]["student"]["median_ms"] == pytest.approx(true_ms(bundle, subject.student))
    assert protocol["networks"]["teacher"]["cold_ms"] == pytest.approx(5 * true_ms(bundle, subject.space.ends()[0]))
    assert data["prediction"]["passed"] and data["prediction"]["mean"] < 1e-9 and table.remarks == []
    assert len(data["prediction"]["networks"]) == len(bundle.plan.check)
    check(data, Table, "the table")
    table.to_json(tmp_path / "table.json")
    assert LatencyTable.from_json(tmp_path / "table.json").hash == table.hash


def test_scatter_and_throttling_are_said(bundle, subject, tmp_path):
    """A device that gets a third slower as it goes: relative times hold, and the table says that it was so."""
    append_rows(tmp_path / "phone.csv", measure(bundle, np.linspace(1, 1.33, 20), scatter=0.01))
    table = import_table(tmp_path / "phone.csv", bundle.folder, "a phone")
    protocol = table.to_dict()["protocol"]
    assert protocol["throttled"] is True and 0.2 < protocol["drift"] < 0.33
    assert any("slower in the last rounds than in the first, above 5%: it throttled" in text for text in table.remarks)
    whole, fast = (true_ms(bundle, genotype) for genotype in (subject.space.ends()[0], subject.student))
    found = table.latency_ms(subject.student) / table.latency_ms(subject.space.ends()[0])
    assert found == pytest.approx(fast / whole, rel=0.01)


def test_a_device_that_does_not_add_up_says_so(bundle, tmp_path):
    """Every network takes what its name's order says: no sum of layers. The judgement fails, in words."""
    places = {name: place for place, name in enumerate(bundle.networks)}
    rows = [dataclasses.replace(row, ms=30.0 + 7 * (places[row.network] * 5 % 11)) for row in measure(bundle)]
    append_rows(tmp_path / "phone.csv", rows)
    try:
        table = import_table(tmp_path / "phone.csv", bundle.folder, "a phone")
    except EdgeDiTError as error:
        assert "must be positive" in str(error)
    else:
        assert any("mean error" in text for text in table.remarks)


def test_which_bundle_the_results_are_of(bundle, bundle_copy, tmp_path):
    """Of a run the one that they name, whatever else was made of it."""
    run = tmp_path / "run"
    shutil.copytree(bundle_copy, run / "phone" / "onnxruntime-fp32")
    data = json.loads((bundle_copy / "bundle.json").read_text())
    del data["hash"]
    other = Bundle(run, {**data, "runtime": "web"})
    (run / "phone" / "web-fp32").mkdir()
    (run / "phone" / "web-fp32" / "bundle.json").write_text(json.dumps({**other.data, "hash": other.hash}))
    assert find_bundle(run, bundle.hash).runtime == "onnxruntime" and find_bundle(run, other.hash).runtime == "web"
    assert find_bundle(bundle_copy, bundle.hash).hash == bundle.hash
    with pytest.raises(EdgeDiTError, match=rf"of the bundle ffff, but .* holds .*{bundle.hash} \(onnxruntime-fp32\)"):
        find_bundle(run, "ffff")
    with pytest.raises(EdgeDiTError, match="holds no bundle.json, and no run whose bundles"):
        find_bundle(tmp_path, bundle.hash)


def test_results_that_are_no_measurement_of_the_bundle(bundle, tmp_path):
    rows = measure(bundle)
    path = tmp_path / "phone.csv"
    for given, said in (
        ([dataclasses.replace(row, bundle="f" * 16) for row in rows], f"of the bundle ffff.* holds {bundle.hash}"),
        ([row for row in rows if row.network != "teacher"], "teacher has 0 cold runs"),
        (rows[:-1], "has 19 timed runs, the protocol asks for 20"),
        ([dataclasses.replace(row, ms=5.0) for row in rows], "must be positive"),
    ):
        path.unlink(missing_ok=True)
        append_rows(path, given)
        with pytest.raises(EdgeDiTError, match=said):
            import_table(path, bundle.folder, "a phone")
    path.write_text("")
    with pytest.raises(EdgeDiTError, match="it lacks bundle"):
        import_table(path, bundle.folder, "a phone")
