"""`edgedit phone`: networks out, a latency table back, a student chosen by it."""

import json
import shutil

import pytest
from phones import LAYER_MS, measure
from unsearched import write_unsearched

from edgedit_hf import Genotype
from edgedit_hf.commands.cli import main
from edgedit_hf.phone.bundle import Bundle
from edgedit_hf.phone.results import append_rows
from edgedit_hf.search.device_tables import DeviceTables
from edgedit_hf.search.latency_table import LatencyTable


@pytest.fixture(scope="module")
def run(make_transformer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_unsearched(folder, make_transformer())
    assert main(["phone", "pack", str(folder), str(folder / "phone" / "onnxruntime-int8"), "--precision", "int8"]) == 0
    return folder


def test_from_a_run_to_a_student_chosen_by_the_phone(run, tmp_path, capsys):
    bundle = Bundle.read(run / "phone" / "onnxruntime-int8")
    assert (bundle.precision, bundle.batch) == ("int8", 1)
    append_rows(tmp_path / "phone.csv", measure(bundle))
    arguments = ["phone", "import", str(tmp_path / "phone.csv"), str(run), "--device", "Galaxy S25 Ultra"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    table = LatencyTable.from_json(tmp_path / "table.json")
    assert f"onnxruntime-int8 on Galaxy S25 Ultra, hash {table.hash}" in said and "Kendall's τ 1.00" in said
    assert [table.blocks[shape] for shape in bundle.plan.shapes] == pytest.approx(LAYER_MS)
    assert main(arguments) == 0  # its own table may be written again
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.copy(tmp_path / "table.json", copy / "latency" / "table.json")
    whole = table.latency_ms(Genotype.of(json.loads((run / "teacher/transformer/config.json").read_text())))
    capsys.readouterr()
    assert main(["select", str(copy), "--max-latency-ms", repr(0.7 * whole)]) == 0  # though it is not this machine's
    choice = json.loads((copy / "student" / "choice.json").read_text())
    assert choice["teacher_latency_ms"] == pytest.approx(whole) and choice["predicted_latency_ms"] <= 0.7 * whole


def test_select_by_two_phones(run, tmp_path, capsys):
    bundle = Bundle.read(run / "phone" / "onnxruntime-int8")
    tables = []
    for name, layer in (("one", LAYER_MS), ("two", (30.0, 14.0, 29.0, 13.0))):
        append_rows(tmp_path / f"{name}.csv", measure(bundle, layer=layer))
        arguments = [
            str(tmp_path / f"{name}.csv"),
            str(run),
            "--device",
            name,
            "--output",
            str(tmp_path / f"{name}.json"),
        ]
        assert main(["phone", "import", *arguments]) == 0
        tables.append(LatencyTable.from_json(tmp_path / f"{name}.json"))
    copy = shutil.copytree(run, tmp_path / "copy")
    DeviceTables(tables).to_json(copy / "latency" / "table.json")
    capsys.readouterr()
    assert main(["select", str(copy), "--max-latency-ms", "110", "--k", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["caps"] == {"latency_ms[one]": 110.0, "latency_ms[two]": 110.0}
    assert all(max(row["latency_ms[one]"], row["latency_ms[two]"]) <= 110 for row in found["rows"])
    assert main(["bank", str(copy)]) == 0  # times of the first


def test_what_is_refused(run, tmp_path, capsys):
    append_rows(tmp_path / "phone.csv", measure(Bundle.read(run / "phone" / "onnxruntime-int8")))
    (tmp_path / "mine.txt").write_text("precious")
    base = ["phone", "import", str(tmp_path / "phone.csv"), str(run), "--device", "a phone"]
    for arguments, said in (
        (["--output", str(tmp_path / "mine.txt")], "exists and is no latency table; it is left as it is"),
        (["--output", str(tmp_path / "phone.csv")], "is a folder, or the results themselves"),
        (["--output", str(tmp_path)], "is a folder, or the results themselves"),
    ):
        assert main([*base, *arguments]) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "precious"
    assert main(["phone", "pack", str(run), str(run / "phone" / "onnxruntime-int8")]) == 2
    assert "is there already and is left as it is" in capsys.readouterr().err
    assert main(["phone", "pack", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "is written by stage bank" in capsys.readouterr().err and not (tmp_path / "out").exists()
