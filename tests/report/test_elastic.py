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
from edgedit_hf.report.elastic import draw_elastic_figures, spread, write_elastic_report


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
        and page.count("data:image/png") == 3
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
