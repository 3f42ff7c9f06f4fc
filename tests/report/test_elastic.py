"""The report of a supernet: a line a width, pictures of the images that were judged, what is missing."""

import json
import shutil

import pytest
from drawn import Drawn
from safetensors.torch import load_file

from edgedit_hf import ElasticDiTPipeline
from edgedit_hf.commands.cli import main
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.report import plots
from edgedit_hf.report.elastic import draw_elastic_figures, headlines, spread, write_elastic_report
from edgedit_hf.report.few_step import few_step_widths_table
from edgedit_hf.report.page import render_html


@pytest.fixture(scope="module")
def whole(debug_t2i_run, tmp_path_factory):
    """A copy of the session's debug run."""
    return shutil.copytree(debug_t2i_run, tmp_path_factory.mktemp("t2i") / debug_t2i_run.name)


def test_the_report_has_a_line_a_width(whole):
    report = json.loads((whole / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["tiny", "small", "full"]
    for model in report["models"]:
        assert (
            model["stage"] == "subnet"
            and model["latency_ms"]["torch-fp32"] > 0
            and model["bytes"]["fp32"] == 4 * model["parameters"]
        )
        assert 0 <= model["class_agreement"] <= 1 and set(model["style_agreement"]) <= {"stroke", "width", "slant"}
        assert model["standard_errors"]["fid[digits-cnn,n=16]"] > 0
        assert "16 images are too few for 64 features" in model["notes"][0]
        assert (
            model["metrics"].keys() == {"fid[digits-cnn,n=16]", "validation_loss"}
            and model["metrics"]["validation_loss"] > 0
        )
    assert (
        report["seconds"].keys() == {"text", "elastic", "evaluate"}
        and sum(report["sampled"].values()) == report["elastic_steps"] == 12
    )
    assert report["seed"] == 0 and report["versions"]["diffusers"]
    twin = ElasticDiTPipeline.from_pretrained(whole / "elastic", subnet="small").transformer
    assert report["models"][1]["parameters"] == sum(p.numel() for p in twin.parameters())
    page = (whole / "report.html").read_text()
    assert (
        all(word in page for word in ("tiny", "never seen", "edgedit train text-to-image"))
        and page.count('src="data:image/png') == 3
    )


def test_the_pictures_show_the_images_that_were_judged_and_the_losses_that_were_logged(whole, monkeypatch):
    """Every tile is the image of its width and caption, pixel for pixel; every curve goes through what was logged."""
    figures, save = {}, plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (save(figure, path), figures.update({path: figure})))
    report = json.loads((whole / "report.json").read_text())
    draw_elastic_figures(whole, report)
    shown = {path.stem: Drawn(path, figure) for path, figure in figures.items()}
    assert sorted(shown) == ["curves", "held-out", "samples"]
    captions = json.loads((whole / "evaluate" / "captions.json").read_text())
    count = captions["shown"]
    titles = [axes.get_title().replace("\n", " ") for axes in shown["samples"].figure.axes[:count]]
    assert titles == captions["captions"][:count]
    for row, name in enumerate(("tiny", "small", "full")):
        images = load_file(whole / "evaluate" / f"{name}.safetensors")["captions"]
        for column in range(count):
            for x, y in ((0, 0), (3, 4), (7, 7)):
                grey = images[column, 0, y, x].item()
                assert shown["samples"].colour(x, y, row * count + column) == "#" + 3 * f"{grey:02X}"
    logged = [json.loads(line) for line in (whole / "elastic" / "telemetry.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(logged) if "loss_full" in line)
    assert shown["curves"].legend() == ["tiny", "small", "full"]
    assert shown["curves"].colour(last["step"], last["loss_full"]) in (plots.BLUE, plots.ORANGE, plots.GREEN)


def few_step_page(whole, folder, names: list[str], labels: bool, **facts) -> str:
    """The text of the page of a run whose widths of these names were distilled, and whose captions have labels or not;
    made of the debug run's figures.
    """
    report = json.loads((whole / "report.json").read_text())
    if not labels:
        report["reference"]["classifier"] = None
        for model in report["models"]:
            for key in ("class_agreement", "style_agreement", "held_out"):
                del model[key]
    widths = []
    for model in (model for model in report["models"] if model["name"] in names):
        few = {**model, "solver": "Euler", "forwards_per_image": 4, "seconds_per_image": {"torch-fp32": 0.1}}
        width = {"name": model["name"], "many": model, "few": few, "few_step": {**few, "guidance_scale": 1.0}}
        widths.append({**width, "relative_fall": {"few": 0.1, "few_step": 0.01}} if labels else width)
    report["few_step"] = {"widths": widths, **facts}
    table = few_step_widths_table(widths)
    return render_html("report-elastic.html.jinja", report, [], headlines(report), folder, table)


def test_the_page_explains_the_columns_that_it_has(whole, tmp_path):
    with_labels = few_step_page(whole, tmp_path, ["tiny", "small", "full"], True)
    assert "Fall of prompt agreement: relative" in with_labels and ">fall of prompt agreement</th>" in with_labels
    assert "Three ways of each of 3 widths" in with_labels and "with many guided steps" in with_labels
    assert "agreement is better when higher" in with_labels and "in the place of" not in with_labels
    without = few_step_page(whole, tmp_path, ["small"], False, source={"path": "someone/pipeline"})
    assert "agreement" not in without and "Three ways of the width small," in without
    assert "All three are of someone/pipeline, which was distilled in the place of" in without


def test_a_single_width_is_counted(whole, tmp_path):
    report = json.loads((whole / "report.json").read_text())
    report["models"] = report["models"][1:2]
    assert headlines(report)[0] == ("1", "width in one set of weights")
    page = render_html("report-elastic.html.jinja", report, [], [], tmp_path)
    assert "whose weights hold 1 network, trained" in page


def test_what_is_missing_is_named(whole, tmp_path):
    with pytest.raises(EdgeDiTError, match="is not a folder"):
        write_elastic_report(tmp_path / "nothing")
    with pytest.raises(EdgeDiTError, match=r"stage.json does not exist.*train_elastic.py"):
        write_elastic_report(tmp_path)


def test_the_command_writes_the_report_of_this_family(whole, tmp_path, capsys):
    before = (whole / "report.json").read_bytes()
    (whole / "report.json").unlink()
    assert main(["report", str(whole)]) == 0 and (whole / "report.json").read_bytes() == before
    (tmp_path / "elastic").mkdir()
    assert main(["report", str(tmp_path)]) == 2 and "train_elastic.py" in capsys.readouterr().err


def test_shown_captions_differ():
    captions = ["a thick 3", "the digit 3, thick", "a thin 7", "a thick 3", "a wide four"]
    assert [captions[i] for i in spread(captions, 3)] == ["a thick 3", "a wide four", "a thin 7"]
