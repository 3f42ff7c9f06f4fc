"""Text to image from captions to report: what the whole loop leaves, that its figures are of its images, and (slow)
that the demo is good.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from edgedit_hf import ElasticDiTPipeline
from edgedit_hf.commands.cli import main
from edgedit_hf.data.digits import HELD_OUT, parse_caption
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.pipelines.sampling import generate_from_captions
from edgedit_hf.report.elastic import spread, write_elastic_report

SMALL = (
    "text.steps=1 elastic.steps=3 elastic.validation_samples=8 evaluate.samples=16 evaluate.extractor_steps=2 "
    "evaluate.latency_repeats=3"
).split()


@pytest.fixture(scope="module")
def whole(recipes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t2i") / "run"
    recipes.run_here("text_to_image", folder, *SMALL, config="debug-t2i.yaml")
    return folder


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
        and sum(report["sampled"].values()) == report["elastic_steps"] == 3
    )
    assert report["seed"] == 0 and report["versions"]["diffusers"]
    twin = ElasticDiTPipeline.from_pretrained(whole / "elastic", subnet="small").transformer
    assert report["models"][1]["parameters"] == sum(p.numel() for p in twin.parameters())
    page = (whole / "report.html").read_text()
    assert (
        all(word in page for word in ("tiny", "never seen", "training/text_to_image.py"))
        and page.count("data:image/png") == 3
    )
    for name in ("samples", "held-out", "curves"):
        assert np.asarray(Image.open(whole / "report" / f"{name}.png").convert("L")).std() > 5


def test_the_images_are_the_pipelines(whole):
    captions = json.loads((whole / "evaluate" / "captions.json").read_text())
    said = [parse_caption(caption) for caption in captions["captions"][:10]]
    assert [one["digit"] for one in said] == list(range(10))
    assert all(
        any((one["digit"], one[style]) in HELD_OUT for style in ("stroke", "width", "slant"))
        for one in map(parse_caption, captions["held_out"])
    )
    assert not any((one["digit"], word) in HELD_OUT for one in said for word in one.values())
    images = {
        name: load_file(whole / "evaluate" / f"{name}.safetensors")["captions"] for name in ("tiny", "small", "full")
    }
    assert len(images["tiny"]) == 16 and not torch.equal(images["tiny"], images["full"])
    pipeline = ElasticDiTPipeline.from_pretrained(whole / "elastic", subnet="small")
    settings = json.loads((whole / "evaluate" / "small.json").read_text())
    assert settings["steps"] == 2
    again = generate_from_captions(
        pipeline, captions["captions"], steps=2, guidance_scale=settings["guidance_scale"], batch_size=5
    )
    difference = ((again.clamp(-1, 1) + 1) * 127.5).round() - images["small"].float()
    assert difference.abs().max() <= 1  # other batches, other rounding


def test_agreement_counts_what_captions_say(recipes, monkeypatch):
    monkeypatch.syspath_prepend(str(recipes.root / "training"))
    from evaluate_elastic import agreement, judged_captions

    from edgedit_hf.data.captions import load_captioned
    from edgedit_hf.data.images import load_images
    from edgedit_hf.metrics.extractors import train_independent_classifier

    classifier = train_independent_classifier(load_images("digits"))
    real = load_captioned("digits", "validation")
    images = real.batch(range(len(real)))["images"]
    shares = agreement(images, real.captions, classifier)
    assert shares.pop("class_agreement") > 0.95 and set(shares.values()) == {
        1.0
    }  # captions were written from these very images
    shuffled = agreement(images.roll(7, 0), real.captions, classifier)
    assert 0.03 < shuffled["class_agreement"] < 0.2 and all(0.1 < shuffled[style] < 0.6 for style in shares)
    captions = judged_captions(real, 2 * len(real))
    assert sorted(captions) == sorted(2 * real.captions)


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


@pytest.mark.slow
@pytest.mark.demos
def test_the_demo_follows_its_captions_at_every_width(recipes, tmp_path):
    """What `make demo-t2i` runs after installing."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "training/accelerate/cpu.yaml",
        "training/text_to_image.py",
    ]
    environment = {**recipes.environment(), "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    arguments = ["--config", "training/recipes/digits-t2i.yaml", "--override", f"output_dir={tmp_path / 'run'}"]
    subprocess.run([*command, *arguments], cwd=recipes.root, env=environment, check=True, timeout=3000)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    for model in report["models"]:
        assert model["class_agreement"] >= 0.85, model["name"]
        assert model["held_out"]["class_agreement"] >= 0.7, model["name"]
