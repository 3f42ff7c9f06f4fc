"""The study of what foretells the quality after tuning: its table, and that a killed one, or one on two processes, ends
with the same figures.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.report.edgedit import write_report
from edgedit_hf.report.ranking import correlation

OBJECTIVES = [
    *("proxy_loss", "distance", "denoising", "denoising 1", "denoising 2"),
    *("output_error", "output_error 1", "output_error 2"),
    *("distance early", "denoising early", "output_error early", "parameters", "latency"),
]


@pytest.fixture(scope="module")
def start(debug_run, tmp_path_factory):
    """A run with what the study reads."""
    folder = tmp_path_factory.mktemp("rank") / "run"
    for name in ("teacher", "bank", "latency", "extractor"):
        shutil.copytree(debug_run / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def study(recipes, start, tmp_path_factory):
    folder = shutil.copytree(start, tmp_path_factory.mktemp("ranked") / "run")
    return folder, recipes.run("rank_objectives", folder)


@pytest.mark.parametrize(
    "figure, text",
    [
        ([0.876, -0.5, 1.0], "0.88 [−0.50, 1.00]"),
        ([-0.0004, -0.004, 0.0], "0.00 [0.00, 0.00]"),
        ([None, None, None], "–"),
    ],
)
def test_correlations_are_read_without_a_minus_before_nothing(figure, text):
    assert correlation(figure) == text


@pytest.mark.slow
def test_table_and_plot(recipes, study):
    folder, done = study
    ranking = json.loads((folder / "ranking" / "ranking.json").read_text())
    rows = ranking["genotypes"]
    assert [row["group"] for row in rows] == [0, 0, 1, 1] and [row["kind"] for row in rows] == ["best", "worst"] * 2
    assert len({row["hash"] for row in rows}) == 4 and ranking["early_steps"] == 2
    for number, row in enumerate(rows, 1):
        own = folder / "ranking" / f"{number:02d}-{row['hash']}"
        assembled, early, tuned = (
            json.loads((own / f"{name}.json").read_text()) for name in ("assembled", "early", "tuned")
        )
        assert list(row["objectives"]) == OBJECTIVES
        assert row["objectives"]["distance"] == assembled["distance"][0] != early["distance"][0]
        assert row["objectives"]["denoising 2"] == assembled["denoising"][2][0]
        mean = sum(value for value, _ in assembled["denoising"][1:]) / 2
        assert row["objectives"]["denoising"] == pytest.approx(mean)
        assert row["quality"] == {"distance": tuned["distance"], "denoising": tuned["denoising"][0]}
        assert early["denoising"] != assembled["denoising"] != tuned["denoising"]
        assert row["objectives"]["parameters"] == -row["parameters"]
        steps = [json.loads(line)["step"] for line in (own / "telemetry.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 4, 5, 6] and not (own / "checkpoints").exists()
    assert list(ranking["correlations"]) == ["distance", "denoising"]
    for figures in ranking["correlations"].values():
        assert list(figures) == OBJECTIVES
    table = (folder / "ranking" / "table.md").read_text()
    assert (
        table in done.stdout
        and table.count("\n| ") == 2 * (1 + len(OBJECTIVES))
        and "denoising loss, t 500–1000" in table
    )
    assert "[1/4] rank" in done.stderr and (folder / "ranking" / "plot.png").stat().st_size > 10_000
    again = recipes.run("rank_objectives", folder)  # finished: nothing is done again
    assert table not in again.stdout


@pytest.mark.slow
@pytest.mark.kills
def test_killed_and_rerun_equals_uninterrupted(recipes, start, study, tmp_path):
    folder, _ = study
    killed = shutil.copytree(start, tmp_path / "run")
    delays = recipes.run_with_kills("rank_objectives", killed, killed / "ranking" / "run.json", 4.0, kills=3)
    for name in ("ranking.json", "table.md"):
        assert (killed / "ranking" / name).read_bytes() == (folder / "ranking" / name).read_bytes(), (
            f"killed after {delays} s"
        )


@pytest.mark.slow
@pytest.mark.ranks
def test_two_processes_find_what_one_does(recipes, start, study, tmp_path):
    folder, _ = study
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    two = shutil.copytree(start, tmp_path / "run")
    recipes.run("rank_objectives", two, launcher=launcher)
    one, both = (json.loads((run / "ranking" / "ranking.json").read_text())["genotypes"] for run in (folder, two))
    for a, b in zip(one, both, strict=True):
        assert a["hash"] == b["hash"] and a["objectives"]["distance"] == b["objectives"]["distance"]
        assert b["quality"]["denoising"] == pytest.approx(a["quality"]["denoising"], rel=1e-3)


def test_an_impossible_division_is_refused_before_anything_runs(tmp_path, fail):
    message = fail("rank_objectives", tmp_path / "run", "rank.genotypes=5", "rank.groups=3")
    assert "rank.genotypes 5 leaves some of rank.groups 3 fewer than two; take at least 6" in message


@pytest.mark.slow
def test_the_report_shows_it_and_refuses_what_another_bank_gave(debug_run, study, tmp_path):
    folder, _ = study
    run = shutil.copytree(debug_run, tmp_path / "run")
    shutil.copytree(folder / "ranking", run / "ranking")
    page = write_report(run).read_text()
    assert "What foretells the quality after tuning" in page and "ρ given latency" in page
    report = json.loads((run / "report.json").read_text())
    assert report["ranking"] == json.loads((folder / "ranking" / "ranking.json").read_text())
    assert report["seconds"]["ranking"] > 0 and (run / "report" / "ranking.png").stat().st_size > 10_000
    index = json.loads((run / "bank" / "index.json").read_text())
    (run / "bank" / "index.json").write_text(json.dumps(index))  # other bytes
    with pytest.raises(EdgeDiTError, match="was made from another"):
        write_report(run)


@pytest.mark.slow
def test_a_search_can_minimise_a_loss_without_any_images(recipes, start, tmp_path):
    run = shutil.copytree(start, tmp_path / "run", ignore=shutil.ignore_patterns("extractor"))
    recipes.run_here("search_architecture", run, "search.objective=output_error", "search.samples=20")
    told = json.loads((run / "search" / "state.json").read_text())["told"]
    stage = json.loads((run / "search" / "stage.json").read_text())
    assert "extractor" not in stage["inputs"] and not (run / "extractor").exists()
    original = next(point for point in told if set(point["code"]) == {0})
    assert original["distance"] == min(point["distance"] for point in told) > 0  # the teacher's own
