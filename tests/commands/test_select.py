"""`edgedit select`: another point of a finished search becomes the student."""

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
    (run / "bank" / "index.json").write_text((run / "bank" / "index.json").read_text() + "\n")
    assert main(["select", str(run)]) == 2
    assert "search was made from another" in capsys.readouterr().err
