"""`edgedit report`: the same report again, of either family, from what a run holds."""

import shutil

import pytest

from edgedit_hf.commands.cli import main


@pytest.mark.parametrize("family", ["debug_run", "debug_t2i_run"])
def test_a_report_that_is_gone_is_written_again(family, request, tmp_path, capsys):
    run = shutil.copytree(request.getfixturevalue(family), tmp_path / request.getfixturevalue(family).name)
    before = {name: (run / name).read_bytes() for name in ("report.json", "report.html")}
    for name in before:
        (run / name).unlink()
    assert main(["report", str(run)]) == 0 and str(run / "report.html") in capsys.readouterr().out
    assert (run / "report.json").read_bytes() == before["report.json"]
    assert len((run / "report.html").read_bytes()) == pytest.approx(len(before["report.html"]), rel=0.01)
    shutil.rmtree(run / "evaluate")
    (run / "bank" / "index.json").unlink(missing_ok=True)
    assert main(["report", str(run)]) == 2 and "run that first" in capsys.readouterr().err
