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
