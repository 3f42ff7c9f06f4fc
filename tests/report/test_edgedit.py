"""The run report: what it assembles, what it leaves out, and the page in a browser."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.files import file_sha256
from edgedit_hf.report.card import write_card
from edgedit_hf.report.edgedit import build_report, write_report
from edgedit_hf.report.front import paper_students
from edgedit_hf.report.tables import comparison_table, metric_label, scaled
from edgedit_hf.search.latency_table import LatencyTable

METRIC = "fid[digits-cnn,n=64]"


def change(path, **values) -> None:
    """Change what a real stage recorded."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, debug_run):
    """A copy of the session's debug run, on a processor with a name of its own, with the curves of a benchmark."""
    folder = shutil.copytree(debug_run, tmp_path_factory.mktemp("runs") / "digits")
    latency = json.loads((folder / "evaluate" / "latency.json").read_text())
    change(folder / "evaluate" / "latency.json", environment={**latency["environment"], "cpu": "a <fast> processor"})
    curves = {"distilled proxies": {"steps": [0, 5, 10], "values": [9.0, 3.0, 1.7]}}
    (folder / "evaluate" / "curves.json").write_text(json.dumps(curves))
    return folder


@pytest.fixture(scope="module")
def page(run_dir):
    return write_report(run_dir)


def test_report_json_holds_every_figure(run_dir, page):
    report = json.loads((run_dir / "report.json").read_text())
    assert report == json.loads(json.dumps(build_report(run_dir)))
    names = ["teacher", "teacher-more-steps", "student", "student-tuned", "onnx-fp32", "onnx-int8"]
    judged = {name: json.loads((run_dir / "evaluate" / f"{name}.json").read_text()) for name in names}
    assert sorted(m["name"] for m in report["models"]) == sorted(names)
    assert all(model == judged[model["name"]] for model in report["models"])
    assert [m["name"] for m in report["models"]][:4] == names[:4]
    (metric,) = {key for model in report["models"] for key in model["metrics"] if key.startswith("fid[")}
    assert all(list(model["standard_errors"]) == [metric] for model in report["models"])
    assert all("images are too few for 64 features" in model["notes"][0] for model in report["models"])
    assert report["seed"] == 0 and "torch" in report["versions"]
    assert set(report["seconds"]) >= {"teacher", "bank", "search"}
    assert report["bank"]["proxies"] == 20 and report["genotype"]["num_teacher_layers"] == 4
    assert report["genotype"]["hash"] == judged["student-tuned"]["genotype_hash"]
    assert len(report["search"]["hypervolume"]) == len(report["search"]["random_hypervolume"]) == 8
    assert report["search"]["chosen"]["code"] in [entry["code"] for entry in report["search"]["front"]]
    starts = report["bank"]["median_losses"]
    assert set(starts) == {
        f"{merged}{option}" for merged in ("", "merged ") for option in ("original", "mlp", "attention", "both")
    } - {"original"}
    assert (
        set(starts["both"]) == {"random", "copied", "closed_form", "combined", "after"}
        and "combined" not in starts["mlp"]
    )
    losses = [
        entry["losses"]["after"]
        for entry in json.loads((run_dir / "bank" / "index.json").read_text())["entries"].values()
        if entry["option"] == "mlp" and len(entry["source"]) == 1
    ]
    assert starts["mlp"]["after"] == pytest.approx(np.median(losses)) and len(losses) == 4
    ratios, tuned, int8 = report["ratios"], judged["student-tuned"], judged["onnx-int8"]
    for name in ("teacher", "teacher-more-steps"):
        expected = tuned["metrics"][METRIC] / judged[name]["metrics"][METRIC]
        assert ratios["against"][name]["distance"][METRIC] == pytest.approx(expected)
    measured = json.loads((run_dir / "evaluate" / "latency.json").read_text())
    assert ratios["speedup"] == measured["speedup"]  # the paired one, not that of the medians
    speeds = tuned["latency_ms"]
    assert ratios["int8"]["speedup"] == pytest.approx(speeds["onnxruntime-fp32"] / speeds["onnxruntime-int8"])
    assert ratios["int8"]["psnr_db"] == int8["psnr_db"] > 20
    assert ratios["parameters"] == tuned["parameters"] / judged["teacher"]["parameters"] < 1


def test_the_grids_of_the_page_show_the_images_that_were_judged(run_dir, page):
    """Every tile of every model's panel is the image of its seed and class, as the evaluation kept it."""
    report = json.loads((run_dir / "report.json").read_text())
    for model in report["models"]:
        grid = np.asarray(Image.open(run_dir / model["grid"]))
        images = load_file(run_dir / "evaluate" / f"{model['name']}.safetensors")["images"].numpy()
        columns = (grid.shape[1] + 1) // 9
        assert columns == 10  # a column a class
        for index in range((grid.shape[0] + 1) // 9 * columns):
            top, left = index // columns * 9, index % columns * 9
            assert (grid[top : top + 8, left : left + 8, 0] == images[index, 0]).all(), (model["name"], index)


def test_page_is_self_contained_and_accessible(run_dir, page):
    html = page.read_text()
    assert page == run_dir / "report.html" and len(html) < 3e6
    assert not re.search(r"(?:src|href)=\"(?!data:)|@import|url\(", html)
    images = re.findall(r"<img [^>]*>", html)
    assert len(images) == 8 and all(re.search(r'alt="[^"]{20,}"', image) for image in images)
    assert "Fréchet distance (digits-cnn, n=64)" in html and "FID" not in re.sub(r"base64,[^\"]+", "", html)
    assert "a &lt;fast&gt; processor" in html and 'name="viewport"' in html
    names = {path.stem for path in (run_dir / "report").glob("*.png")}
    assert names == {"samples", "genotype", "pareto", "front", "hypervolume", "latency", "proxies", "curves"}


def test_the_papers_students_are_marked_where_the_search_evaluated_them(tmp_path, debug_run):
    folder = shutil.copytree(debug_run, tmp_path / "run")
    named = build_report(folder)["search"]["named"]
    table = LatencyTable.from_json(folder / "latency" / "table.json")
    state = json.loads((folder / "search" / "state.json").read_text())
    distances = {tuple(point["code"]): point["distance"] for point in state["told"]}  # which these are, latency decides
    for name, genotype in paper_students(table.space).items():
        code = tuple(table.space.code(genotype))
        assert named[name] == [distances.get(code), table.latency_ms(genotype)] and name.startswith("like EdgeDiT-")
    state["told"] = [point for point in state["told"] if tuple(point["code"]) != code]
    state["told"][0] |= {"code": list(code), "distance": 3.25}
    (folder / "search" / "state.json").write_text(json.dumps(state))
    assert build_report(folder)["search"]["named"][name][0] == 3.25


def test_stages_that_have_not_run_are_left_out(tmp_path, debug_run):
    folder = shutil.copytree(debug_run, tmp_path / "unfinished")
    for stage in ("student-tuned", "teacher-more-steps", "exported", "evaluate"):
        shutil.rmtree(folder / stage)
    (folder / "search" / "random.json").unlink()
    html = write_report(folder).read_text()
    report = json.loads((folder / "report.json").read_text())
    assert report["models"] == [] and report["ratios"] == {} and report["search"]["random_points"] == []
    assert not {"reference", "exported", "curves"} & set(report) and set(report["latency"]) == {"table"}
    assert "Teacher and students" not in html and "The proxy blocks" in html


def test_a_student_that_no_search_chose_is_reported_as_such(tmp_path, debug_run):
    folder = shutil.copytree(debug_run, tmp_path / "run")
    shutil.rmtree(folder / "search")
    path = folder / "student" / "choice.json"
    choice = json.loads(path.read_text())
    del choice["distance"]
    choice |= {
        "chosen_by": "programme",
        "score": 0.0125,
        "gap": 0.0,
        "caps": {"latency_ms": 8.0},
        "reason": "the least",
    }
    path.write_text(json.dumps(choice))
    html, report = write_report(folder).read_text(), build_report(folder)
    assert "search" not in report and report["choice"]["score"] == 0.0125
    assert "No search chose this student: the least. Its summed loss is 0.0125." in html
    assert f"the chosen student {choice['predicted_latency_ms']:.2f} ms" in html
    assert "chosen by an integer programme" in write_card(folder / "student-tuned", report).read_text()
    path.write_text(json.dumps({**choice, "score": None}))
    with pytest.raises(EdgeDiTError, match="choice.json does not describe .*score is None"):
        build_report(folder)


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("bank/index.json", "stage bank"),
        ("search/front.json", "stage search"),
        ("student/choice.json", "stage student"),
    ],
)
def test_missing_and_damaged_files_name_their_stage(tmp_path, run_dir, file, stage):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    (folder / file).write_text("{}")
    with pytest.raises(EdgeDiTError, match="run that stage again"):
        build_report(folder)
    (folder / file).unlink()
    with pytest.raises(EdgeDiTError, match=f"{file}.*{stage}.*run that first"):
        build_report(folder)
    with pytest.raises(EdgeDiTError, match="is not a folder"):
        build_report(tmp_path / "nowhere")


def test_a_bank_of_before_that_records_only_two_losses_is_reported_too(tmp_path, run_dir):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    index = json.loads((folder / "bank" / "index.json").read_text())
    for entry in index["entries"].values():
        del entry["losses"], entry["curve"]
    (folder / "bank" / "index.json").write_text(json.dumps(index))
    for stage in folder.glob("*/stage.json"):
        inputs = json.loads(stage.read_text())["inputs"]
        if "bank" in inputs:
            change(stage, inputs={**inputs, "bank": file_sha256(folder / "bank" / "index.json")})
    html = write_report(folder).read_text()
    assert "The proxy blocks" in html and "copied weights" not in html
    assert json.loads((folder / "report.json").read_text())["bank"]["median_losses"] == {}
    assert "copied weights" in (run_dir / "report.html").read_text()


def test_a_grid_outside_the_run_is_not_read(tmp_path, run_dir):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    for file in (folder / "evaluate").glob("*.json"):
        text = file.read_text()
        file.write_text(text.replace('"grid": "evaluate/', '"grid": "../run/../outside/'))
    shutil.copytree(run_dir / "evaluate", tmp_path / "outside")
    assert "Same place, same seed" not in write_report(folder).read_text()


def test_words_for_metrics_and_counts():
    assert metric_label("fid[digits-cnn,n=2000]") == "Fréchet distance (digits-cnn, n=2,000)"
    assert metric_label("fid[inception,n=50000]") == "FID (n=50,000)"
    assert metric_label("fid[fashion_mnist-cnn,n=50]") == "Fréchet distance (fashion_mnist-cnn, n=50)"
    assert metric_label("adm_precision") == "adm precision"
    assert metric_label("fid[inception-cnn,n=50]") == "Fréchet distance (inception-cnn, n=50)"  # of a folder so called
    assert [scaled(v) for v in (950, 88_312, 1_812_345, 675_130_000, 1.2e12)] == [
        "950",
        "88.3 k",
        "1.81 M",
        "675 M",
        "1,200 G",
    ]
    assert comparison_table([])[1] == []


@pytest.fixture
def judged(run_dir, tmp_path):
    """A copy of the run, which a test changes."""
    return shutil.copytree(run_dir, tmp_path / "run")


def test_figures_of_other_weights_are_refused_and_the_stage_is_named(judged, make_transformer, tmp_path):
    report = json.loads(json.dumps(build_report(judged)))
    assert write_card(judged / "student-tuned", report, repo_id="me/digits", license="mit").is_file()
    EdgeDiTPipeline(make_transformer(seed=1), make_scheduler("epsilon")).save_pretrained(
        judged / "student-tuned"
    )  # a new tuning
    with pytest.raises(
        EdgeDiTError,
        match=f"figures of 'student-tuned' are those of other weights .* delete {judged / 'evaluate'} and run stage "
        "evaluate",
    ):
        build_report(judged)
    card = (judged / "student-tuned" / "README.md").read_text()
    with pytest.raises(
        EdgeDiTError, match="figures of 'student-tuned' are those of other weights .* run stage evaluate again"
    ):
        write_card(judged / "student-tuned", report, repo_id="me/digits", license="mit")
    assert (judged / "student-tuned" / "README.md").read_text() == card
    shutil.rmtree(judged / "student-tuned")  # to save space: the figures still are what was measured
    build_report(judged)


def test_figures_without_hashes_are_refused_where_the_model_is_another(judged):
    """As the version before wrote them: no weights beside the figures, no format in run.json."""
    path, run = judged / "evaluate" / "student-tuned.json", judged / "student-tuned" / "run.json"
    entry = json.loads(path.read_text())
    own = entry["genotype_hash"]
    old = {key: value for key, value in entry.items() if key not in ("folder", "weights")}
    path.write_text(json.dumps(old))
    made = json.loads(run.read_text())
    run.write_text(json.dumps({key: value for key, value in made.items() if key != "format"}))
    build_report(judged)
    run.write_text(json.dumps(made))  # tuned again, by this version
    with pytest.raises(
        EdgeDiTError,
        match="figures of 'student-tuned' are of an earlier version.* made after them: delete .*evaluate.* run stage "
        "evaluate",
    ):
        build_report(judged)
    run.write_text(json.dumps({key: value for key, value in made.items() if key != "format"}))
    path.write_text(json.dumps({**old, "genotype_hash": "0" * 16}))  # another genotype was selected since
    with pytest.raises(EdgeDiTError, match=f"student-tuned holds the genotype {own} now, not {'0' * 16}"):
        build_report(judged)
    shutil.rmtree(judged / "student-tuned")
    build_report(judged)


def test_a_search_of_another_bank_is_refused(judged):
    build_report(judged)
    (judged / "bank" / "index.json").write_text((judged / "bank" / "index.json").read_text() + "\n")
    with pytest.raises(
        EdgeDiTError,
        match="search was made from another .*index.json than is there now: delete .*search and run stage search",
    ):
        build_report(judged)


def test_inputs_of_a_stage_that_are_none_are_refused(tmp_path, run_dir):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    change(copy / "student" / "stage.json", inputs=None)
    with pytest.raises(EdgeDiTError, match="inputs is None"):
        build_report(copy)
