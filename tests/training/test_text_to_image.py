"""Text to image from captions to report: what the whole loop leaves, that its figures are of its images, and (slow)
that the demo is good.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from edgedit_hf import ElasticDiTPipeline
from edgedit_hf.data.digits import HELD_OUT, parse_caption
from edgedit_hf.pipelines.sampling import generate_from_captions


@pytest.fixture(scope="module")
def whole(debug_t2i_run, tmp_path_factory):
    """A copy of the session's debug run."""
    return shutil.copytree(debug_t2i_run, tmp_path_factory.mktemp("t2i") / "run")


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


@pytest.mark.slow
def test_few_steps_go_on_with_a_finished_run_and_leave_its_stages_alone(recipes, whole, result_files):
    """Stages few-step and evaluate-few-step (training/evaluate_few_step.py): every width three ways, in the report."""
    before = result_files(whole / "evaluate", ".json", ".safetensors") | result_files(whole / "elastic", ".safetensors")
    recipes.run("text_to_image", whole, "threads=2", "few_step.enabled=true", config="debug-t2i.yaml")
    after = result_files(whole / "evaluate", ".json", ".safetensors") | result_files(whole / "elastic", ".safetensors")
    assert before == after
    report = json.loads((whole / "report.json").read_text())
    widths = {width["name"]: width for width in report["few_step"]["widths"]}
    assert set(widths) == {"tiny", "small", "full"} and "From many steps to few" in (whole / "report.html").read_text()
    for width in widths.values():
        assert width["many"] in report["models"] and width["few_step"]["guidance_scale"] == 1
        assert width["few"]["steps"] == width["few_step"]["steps"] == 2
        assert width["few"]["forwards_per_image"] == 2 * width["few_step"]["forwards_per_image"] == 4
        assert set(width["relative_fall"]) == {"few", "few_step"}
        assert all(width[way]["standard_errors"].keys() == width[way]["metrics"].keys() for way in ("few", "few_step"))
    solvers = json.loads((whole / "evaluate-few-step" / "solvers.json").read_text())["distances"]
    assert {name: min(found, key=found.get) for name, found in solvers.items()} == {
        name: width["few"]["solver"] for name, width in widths.items()
    }
    captions = json.loads((whole / "evaluate" / "captions.json").read_text())["captions"]
    pipeline = ElasticDiTPipeline.from_pretrained(whole / "few-step")
    again = generate_from_captions(pipeline, captions, subnet="small", steps=2, guidance_scale=1.0, batch_size=16)
    images = load_file(whole / "evaluate-few-step" / "small.safetensors")["captions"]
    assert (((again.clamp(-1, 1) + 1) * 127.5).round() - images.float()).abs().max() <= 1


@pytest.mark.slow
def test_few_steps_of_another_net_are_compared_with_that_one(recipes, debug_t2i_run, tmp_path):
    """One width of the run's own supernet, but saved as a net of its own somewhere else, with other weights."""
    run = shutil.copytree(debug_t2i_run, tmp_path / "run")
    given = ElasticDiTPipeline.from_pretrained(run / "elastic", subnet="small")
    with torch.no_grad():
        given.transformer.proj_out.weight.mul_(0.5)
    given.save_pretrained(tmp_path / "given")
    asked = ("few_step.enabled=true", f"few_step.path={tmp_path / 'given'}", "few_step.sampler=sde")
    recipes.run("text_to_image", run, "threads=2", *asked, config="debug-t2i.yaml")
    report = json.loads((run / "report.json").read_text())
    (width,) = report["few_step"]["widths"]
    small = next(model for model in report["models"] if model["name"] == "small")
    many = width["many"]
    assert width["name"] == "full" and many["parameters"] == small["parameters"] and many["metrics"] != small["metrics"]
    assert report["few_step"]["source"] == {"path": str(tmp_path / "given")}
    captions = json.loads((run / "evaluate" / "captions.json").read_text())["captions"]
    sampled = {"steps": many["steps"], "guidance_scale": many["guidance_scale"], "batch_size": 16}
    for pipeline, file, how in (
        (tmp_path / "given", "full-many-steps", sampled),
        (run / "few-step", "full", {"steps": 2, "guidance_scale": 1.0, "batch_size": 5}),
    ):
        again = generate_from_captions(ElasticDiTPipeline.from_pretrained(pipeline), captions, **how)
        images = load_file(run / "evaluate-few-step" / f"{file}.safetensors")["captions"]
        assert (((again.clamp(-1, 1) + 1) * 127.5).round() - images.float()).abs().max() <= 1
    page = (run / "report.html").read_text()
    assert f"All three are of {tmp_path / 'given'}" in page and "Three ways of the width full" in page


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
    environment = recipes.environment(threads=2)
    arguments = ["--config", "training/recipes/digits-t2i.yaml", "--override", f"output_dir={tmp_path / 'run'}"]
    subprocess.run([*command, *arguments], cwd=recipes.root, env=environment, check=True, timeout=3000)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    for model in report["models"]:
        assert model["class_agreement"] >= 0.85, model["name"]
        assert model["held_out"]["class_agreement"] >= 0.7, model["name"]
