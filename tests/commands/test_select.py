"""`edgedit select`: another point of a finished search becomes the student, or the programme's best."""

import json
import shutil

from edgedit_hf import EdgeDiTTransformer2DModel, Genotype
from edgedit_hf.commands.cli import main


def test_the_best_point_within_the_limit_is_assembled(debug_run, tmp_path, capsys):
    run = shutil.copytree(debug_run, tmp_path / "run")
    front = json.loads((run / "search" / "front.json").read_text())["front"]
    for entry in front:  # with its own latency as the limit, nothing on the front is better
        assert main(["select", str(run), "--max-latency-ms", repr(entry["latency_ms"])]) == 0
        assert entry["hash"] in capsys.readouterr().out
        choice = json.loads((run / "student" / "choice.json").read_text())
        assert choice["code"] == entry["code"] and choice["distance"] == entry["distance"]
        student = EdgeDiTTransformer2DModel.from_pretrained(run / "student" / "transformer")
        assert Genotype.of(student.config).hash == entry["hash"]
    fastest = min(entry["latency_ms"] for entry in front)
    assert main(["select", str(run), "--max-latency-ms", repr(fastest / 2)]) == 2
    assert "latency_ms" in capsys.readouterr().err
    assert main(["select", str(run), "--teacher", "elsewhere"]) == 2
    assert f"--teacher is elsewhere, but {run} has a search" in capsys.readouterr().err
    (run / "bank" / "index.json").write_text((run / "bank" / "index.json").read_text() + "\n")
    assert main(["select", str(run)]) == 2
    assert "search was made from another" in capsys.readouterr().err


def test_without_a_search_the_programme_chooses_and_lists(debug_run, tmp_path, capsys):
    run = tmp_path / "run"
    for name in ("teacher", "bank", "latency"):
        shutil.copytree(debug_run / name, run / name)
    teacher_ms = json.loads((debug_run / "search" / "front.json").read_text())["teacher"]["latency_ms"]
    bounds = ["--max-latency-ms", repr(0.8 * teacher_ms), "--max-bytes-mb", "1", "--bytes-precision", "int8"]
    assert main(["select", str(run), *bounds, "--k", "3", "--json"]) == 0
    *table, last = capsys.readouterr().out.strip().splitlines()
    listed = json.loads(last)
    scores = [row["score"] for row in listed["rows"]]
    assert scores == sorted(scores) and len(scores) == 3 and len(table) == 5 and not (run / "student").exists()
    assert listed["caps"] == {"latency_ms": 0.8 * teacher_ms, "bytes": 1e6}
    assert main(["select", str(run), *bounds]) == 0
    assert "by the integer programme" in capsys.readouterr().out
    choice = json.loads((run / "student" / "choice.json").read_text())
    assert choice["genotype_hash"] == listed["rows"][0]["genotype_hash"] and choice["score"] == scores[0]
    assert main(["select", str(run), "--bytes-precision", "int8"]) == 2
    assert "there is no bound that it is about; add --max-bytes-mb or --max-memory-mb" in capsys.readouterr().err
    memory = choice["memory"] / 1e6
    assert main(["select", str(run), *bounds, "--max-memory-mb", repr(0.99 * memory), "--k", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    assert all(row["memory"] <= 0.99e6 * memory for row in rows) and rows[0]["score"] >= choice["score"]
    assert main(["select", str(run), "--front", "6", "--json"]) == 0
    swept = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    assert main(["select", str(run), "--front", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 genotype, proved to be the best of its budget (gap 0)"
    assert swept[-1]["score"] == 0.0 and swept[-1]["latency_ms"] == max(row["latency_ms"] for row in swept)
    assert main(["select", str(run), "--max-latency-ms", "1e-6"]) == 2
    assert "but the least is" in capsys.readouterr().err
    (run / "search").mkdir()
    (run / "search" / "run.json").write_text("{}")  # begun, not finished
    assert main(["select", str(run)]) == 2
    assert "written by stage search" in capsys.readouterr().err
    assert main(["select", str(run), "--exact", "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "choice.json").read_text())["chosen_by"] == "programme"
