"""A finished run is believed only while its results are what was written, and its report only while they are what was
judged.
"""

import json
import os
import shutil

import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.report.edgedit import write_report

pytestmark = [pytest.mark.slow, pytest.mark.kills]


@pytest.fixture(scope="module")
def whole(recipes, tmp_path_factory):
    """A whole run at its smallest."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    recipes.run_here("compress", folder, *recipes.tiny)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_is_skipped_and_every_figure_names_the_weights_it_is_of(recipes, run):
    before = {
        path: path.stat().st_mtime_ns
        for path in run.rglob("*")
        if path.is_file() and "report" not in str(path) and path.name != "README.md"
    }
    recipes.run_here("compress", run, *recipes.tiny)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    inputs = json.loads((run / "evaluate" / "run.json").read_text())["inputs"]
    for path in (run / "evaluate").glob("*.json"):
        entry = json.loads(path.read_text())
        if "metrics" in entry:
            assert entry["weights"] == inputs[entry["folder"]]
    assert json.loads((run / "evaluate" / "reference.json").read_text())["extractor_hash"] == inputs["extractor"]
    assert not list(run.rglob("run.lock")) and not list(run.rglob(".*"))


@pytest.mark.parametrize("damage", ["deleted", "halved"])
@pytest.mark.parametrize("stage", ["teacher", "bank", "student", "student-tuned", "exported", "evaluate"])
def test_a_damaged_result_is_refused_by_name(fail, recipes, run, stage, damage):
    path = max(
        (path for path in (run / stage).rglob("*") if path.is_file() and path.suffix != ".jsonl"),
        key=lambda path: path.stat().st_size,
    )
    content = path.read_bytes()
    path.unlink() if damage == "deleted" else path.write_bytes(content[: len(content) // 2])
    message = fail("compress", run, *recipes.tiny)
    assert str(path if "extractor" not in str(path) else path.parent) in message and "delete" in message


def test_after_another_tuning_no_old_figure_is_shown(fail, recipes, run):
    other = [*recipes.tiny, "tune.learning_rate=0.002"]
    (run / "report.html").unlink()
    for stage in ("student-tuned", "teacher-more-steps"):
        shutil.rmtree(run / stage)
    recipes.run_here("finetune", run, *other)
    with pytest.raises(EdgeDiTError, match="figures of .* are those of other weights .*run stage evaluate"):
        write_report(run)
    assert str(run / "exported") in fail("compress", run, *other)
    shutil.rmtree(run / "exported")
    assert str(run / "evaluate") in fail("compress", run, *other)
    shutil.rmtree(run / "evaluate")
    recipes.run_here("compress", run, *other)  # trains the extractor to the same weights: the search stays
    assert (run / "report.html").is_file()


def test_an_export_that_was_damaged_before_the_stage_finished_is_made_again(recipes, run):
    exported = run / "exported"
    broken = next((exported / "onnx-fp32").rglob("*.onnx"))
    content, kept = broken.read_bytes(), (exported / "onnx-int8" / "verify.json").stat().st_mtime_ns
    files = json.loads((exported / "stage.json").read_text())["files"]
    made = {
        name: {path.partition("/")[2]: entry for path, entry in files.items() if path.startswith(name)}
        for name in ("onnx-fp32", "onnx-int8")
    }
    (exported / "progress.json").write_text(json.dumps(made))
    (exported / "stage.json").unlink()
    broken.write_bytes(content[:100])
    recipes.run_here("export_student", run, *recipes.tiny)
    assert len(broken.read_bytes()) == len(content) and not (exported / "progress.json").exists()
    assert (exported / "stage.json").exists() and kept <= (exported / "onnx-int8" / "verify.json").stat().st_mtime_ns


def test_keys_that_no_result_depends_on_may_change(recipes, run):
    recipes.run_here(
        "compress", run, *recipes.tiny, "teacher.log_every=1", "tune.checkpoint_every=7", "data.num_workers=1"
    )
    assert os.path.exists(run / "report.html")
