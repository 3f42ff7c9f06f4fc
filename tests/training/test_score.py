"""Scores of every kind of model: against figures computed here, on one process and two, left alone and killed."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import vision
from flow_pipelines import autoencoder
from PIL import Image
from text_pipelines import elastic

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.data.datasets import to_bytes
from edgedit_hf.data.images import load_images
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.export.formats import ExportOptions
from edgedit_hf.export.pipeline import export_pipeline
from edgedit_hf.metrics import frechet_distance, frechet_standard_error, open_extractor, train_classifier
from edgedit_hf.pipelines.sampling import generate
from edgedit_hf.schema import check
from edgedit_hf.stamp import Stamp

BIN = Path(sys.executable).parent
SAMPLES, CHUNK = 22, 8


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_transformer):
    """A class-conditional pipeline of 8 × 8 pixels."""
    folder = tmp_path_factory.mktemp("model")
    own = {"default_steps": 2, "default_guidance_scale": 1.5}
    pipeline = EdgeDiTPipeline(make_transformer(num_layers=1), make_scheduler("epsilon"), **own)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "extractor"
    train_classifier(load_images(), steps=3).save(folder)
    return folder


@pytest.fixture
def command(repository, extractor):
    """`command(model, output, "--npz", …)`: the arguments of a small score."""

    def arguments(model, output: Path, *more, reference="digits", samples: int = SAMPLES) -> list[str]:
        script = str(repository / "training" / "score.py")
        fixed = ("--extractor", extractor, "--output", output, "--samples", samples, "--chunk", CHUNK, "--threads", 1)
        return [script, str(model), *map(str, ("--reference", reference, *fixed, *more))]

    return arguments


@pytest.fixture
def score(command, capsys, monkeypatch):
    """`score(…)`, as `command`: scores in this process and returns the result, and what was printed."""

    def run(*arguments, **options) -> tuple[dict, str]:
        capsys.readouterr()
        argv = command(*arguments, **options)
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(argv[0], run_name="__main__")
        return json.loads((Path(arguments[1]) / "result.json").read_text()), capsys.readouterr().out

    return run


@pytest.fixture
def refused(score, capsys):
    """The one line that a score ends with, and exit code 2."""

    def run(*arguments, **options) -> str:
        with pytest.raises(SystemExit) as ended:
            score(*arguments, **options)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert ended.value.code == 2 and len(errors) == 1, errors
        return errors[0]

    return run


def folder_of(npz: Path, folder: Path) -> Path:
    """The grey images of a file of ADM's as a folder of them."""
    folder.mkdir()
    with np.load(npz) as file:
        for number, pixels in enumerate(file["arr_0"]):
            Image.fromarray(pixels[:, :, 0]).save(folder / f"{number:05d}.png")
    return folder


def test_a_pipeline(score, refused, model, extractor, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".request.json.tmp-0-1-2").write_text("{")  # of one that was killed in its first moment
    result, printed = score(model, tmp_path / "out", "--npz", "--seed", 3)
    judge = open_extractor(str(extractor))
    images, labels = generate(EdgeDiTPipeline.from_pretrained(model), SAMPLES, seed=3, steps=2, guidance_scale=1.5)
    assert labels.tolist() == [number % 10 for number in range(SAMPLES)]
    pixels = to_bytes(images)
    ours = judge.features(pixels.float() / 127.5 - 1)
    real = load_images(validation_fraction=0.0)
    theirs = judge.features(((real.batch(range(len(real)))["images"] + 1) * 127.5).round() / 127.5 - 1)
    key = f"fid[digits-cnn,n={SAMPLES}]"
    assert result["metrics"][key] == pytest.approx(frechet_distance(ours, theirs), rel=1e-4)
    assert result["standard_errors"][key] == pytest.approx(frechet_standard_error(ours, theirs, seed=3), rel=1e-3)
    stamp = result["stamp"]
    check(stamp, Stamp)
    assert stamp["extractor_hash"] == judge.hash and stamp["reference_count"] == len(real) == 1797
    assert [stamp[k] for k in ("count", "seed", "steps", "scheduler", "dtype", "rounding", "vae")] == [
        *(SAMPLES, 3, 2, "DDIMScheduler", "float32", "bytes", None),
    ]
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert np.array_equal(file["arr_0"], pixels.repeat(1, 3, 1, 1).permute(0, 2, 3, 1).numpy())
    assert f"Fréchet distance (digits-cnn, n={SAMPLES}): " in printed and " ± " in printed
    assert any(f"{SAMPLES} images are too few for 64 features" in note for note in result["notes"])
    lines = [json.loads(line) for line in (tmp_path / "out" / "telemetry.jsonl").read_text().splitlines()]
    assert lines[-1]["images"] == SAMPLES + 1797 and not (tmp_path / "out" / "chunks").exists()
    # What is done is shown again; another request is refused, and a folder of somebody else is left alone.
    assert score(model, tmp_path / "out", "--npz", "--seed", 3) == (result, printed)
    assert "was made with seed = 3, but now seed = 4 is asked for" in refused(
        model, tmp_path / "out", "--npz", "--seed", 4
    )
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "scheduler" / "scheduler_config.json").read_text())
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "timestep_spacing": "leading"}))
    assert "was made with model = " in refused(other, tmp_path / "out", "--npz", "--seed", 3)
    assert "was made with npz = True, but now npz = False" in refused(model, tmp_path / "out", "--seed", 3)
    assert "has no sub-networks; leave --subnet out" in refused(model, tmp_path / "subnet", "--subnet", "tiny")
    assert "--guidance is nan" in refused(model, tmp_path / "guided", "--guidance", "nan")
    assert "holds metadata.json" not in refused(model, extractor) and not (extractor / "chunks").exists()


def test_images_of_a_folder_and_of_an_npz(score, refused, model, extractor, tmp_path):
    made, _ = score(model, tmp_path / "made", "--npz")
    grey, _ = score(tmp_path / "made" / "samples.npz", tmp_path / "of-npz")  # grey again, as the extractor wants them
    assert grey["metrics"] == pytest.approx(made["metrics"], rel=1e-9)
    folder_of(tmp_path / "made" / "samples.npz", tmp_path / "images")
    folder, _ = score(tmp_path / "images", tmp_path / "of-folder")
    assert folder["metrics"] == pytest.approx(made["metrics"], rel=1e-9)
    few, _ = score(tmp_path / "images", tmp_path / "of-some", samples=12)  # some of all, not the first ones
    ours = load_images(tmp_path / "images", label_column="", validation_fraction=0.0)
    judge, fid = open_extractor(str(extractor)), "fid[digits-cnn,n=12]"
    digits = load_images(validation_fraction=0.0).batch(range(1797))["images"]
    real = judge.features(((digits + 1) * 127.5).round() / 127.5 - 1)
    first, drawn = (judge.features(part.batch(range(12))["images"]) for part in (ours, ours.at_most(12)))
    assert few["metrics"][fid] == pytest.approx(frechet_distance(drawn, real), rel=1e-4)
    assert few["metrics"][fid] != pytest.approx(frechet_distance(first, real), rel=1e-2)
    assert few["spreads"]["kernel_distance"] > 0
    said = refused(tmp_path / "images", tmp_path / "steps", "--steps", 3, "--subnet", "tiny")
    assert "holds images that are there already; leave --steps, --subnet out" in said
    assert set(made["stamp"]) - set(folder["stamp"]) == {
        *("seed", "scheduler", "steps", "guidance_scale", "dtype", "vae", "vae_hash"),
    }
    assert "has 22 images, but --samples is 30" in refused(tmp_path / "images", tmp_path / "more", samples=30)
    (tmp_path / "images" / "00007.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    assert "00007.png is corrupt or truncated" in refused(tmp_path / "images", tmp_path / "damaged")
    said = refused(model, tmp_path / "few", samples=1)
    assert "--samples is 1; a covariance needs at least 2 images" in said


def test_what_cannot_be_scored_is_said_at_the_start(score, refused, model, tmp_path):
    made, _ = score(model, tmp_path / "made", "--npz")
    folder = folder_of(tmp_path / "made" / "samples.npz", tmp_path / "images")
    said = refused(folder, folder / "score")
    assert f"The output {folder / 'score'} lies in the input {folder}" in said and not (folder / "score").exists()
    (tmp_path / "large").mkdir()
    for number in range(3):
        Image.effect_noise((16, 16), 40 + number).save(tmp_path / "large" / f"{number}.png")
    said = refused(folder, tmp_path / "out", reference=tmp_path / "large")
    assert f"The images of the reference {tmp_path / 'large'} have the shape (1, 16, 16), but the extractor" in said
    assert "takes (1, 8, 8); give images of that size (--resolution)" in said
    (tmp_path / "one").mkdir()
    shutil.copy(tmp_path / "large" / "0.png", tmp_path / "one")
    assert "one has 1 images; a covariance needs at least 2" in refused(
        folder, tmp_path / "out", reference=tmp_path / "one"
    )
    said = refused(folder, tmp_path / "out", "--handover", "geneval")
    assert "A folder for geneval holds images of prompts; give a file of them (--prompts)" in said
    assert "absent.npz does not exist" in refused(folder, tmp_path / "out", reference=tmp_path / "absent.npz")
    assert not (tmp_path / "out").exists()


def test_a_request_that_never_made_an_image_does_not_keep_its_folder(score, refused, model, tmp_path):
    assert "100000" in refused(model, tmp_path / "out", "--steps", 100_000)
    assert json.loads((tmp_path / "out" / "request.json").read_text())["steps"] == 100_000
    result, _ = score(model, tmp_path / "out", "--steps", 3)
    assert result["stamp"]["steps"] == 3
    for file, text in (("request.json", "[]"), ("result.json", "{}"), ("result.json", "{")):
        whole = (tmp_path / "out" / file).read_text()
        (tmp_path / "out" / file).write_text(text)
        said = refused(model, tmp_path / "out", "--steps", 3)
        assert file in said and "delete the folder, and run the command again" in said
        (tmp_path / "out" / file).write_text(whole)
    few, _ = score(model, tmp_path / "few", samples=3)
    assert any("3 images have no 3 neighbours: precision and recall are left out" in note for note in few["notes"])
    assert "precision" not in few["metrics"]


def test_statistics_of_another_extractor_are_refused(refused, model, tmp_path):
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    said = refused(model, tmp_path / "out", reference=tmp_path / "adm.npz")
    assert "adm.npz has statistics of ADM's Inception and no images, but the extractor is digits-cnn" in said


def test_text_to_image_with_clip_and_judges(score, refused, tmp_path):
    elastic(first=True, second=True).save_pretrained(tmp_path / "t2i")
    clip = vision.clip(tmp_path / "clip")
    (tmp_path / "prompts.txt").write_text("a seven\na thin one\n")
    asked = ("--prompts", tmp_path / "prompts.txt", "--clip", clip, "--handover", "hpsv3", "--handover", "dpg")
    result, printed = score(tmp_path / "t2i", tmp_path / "out", *asked, samples=4)
    assert 0 <= result["metrics"]["clip_score"] <= 100 and "clip score: " in printed
    assert len(result["stamp"]["prompts"]) == 16 and result["subnet"] is None
    assert "was made with handover = ['dpg', 'hpsv3'], but now handover = ['hpsv3']" in refused(
        tmp_path / "t2i", tmp_path / "out", *asked[:-2], samples=4
    )
    assert result["stamp"]["steps"] == 3 and result["clip"]["name"] == "clip"
    listed = json.loads((tmp_path / "out" / "hpsv3" / "hpsv3.json").read_text())
    assert [row["prompt"] for row in listed] == ["a seven", "a seven", "a thin one", "a thin one"]
    assert all((tmp_path / "out" / "hpsv3" / row["path"]).is_file() for row in listed)
    assert len(list((tmp_path / "out" / "dpg" / "images").iterdir())) == 2
    assert "give a file of them (--prompts)" in refused(tmp_path / "t2i", tmp_path / "without", samples=4)
    said = refused(tmp_path / "t2i", tmp_path / "without", *asked[:2], "--subnet", "tinyy", samples=4)
    assert "--subnet is 'tinyy', but" in said and not (tmp_path / "without").exists()
    assert "has no 'tag'" in refused(
        tmp_path / "t2i", tmp_path / "geneval", *asked[:2], "--handover", "geneval", samples=4
    )


def test_pipelines_of_diffusers(score, refused, tmp_path):
    import diffusers

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "in_channels": 4, "patch_size": 2}
    for classes in (10, 1000):  # diffusers' pipeline takes the number 1000 for no class, whatever the net has
        net = diffusers.DiTTransformer2DModel(**sizes, out_channels=8, sample_size=4, num_embeds_ada_norm=classes)
        vae = autoencoder(shift_factor=None)
        diffusers.DiTPipeline(net, vae, diffusers.DDIMScheduler()).save_pretrained(tmp_path / f"dit-{classes}")
    reference = tmp_path / "reference"
    reference.mkdir()
    for number in range(6):
        Image.effect_noise((8, 8), 40 + number).convert("RGB").save(reference / f"{number}.png")
    judge = vision.dinov2(tmp_path / "dinov2")
    asked = ("--extractor", judge, "--steps", 2, "--batch-size", 3)
    said = refused(tmp_path / "dit-10", tmp_path / "failing", *asked, reference=reference, samples=9)
    assert "The DiTPipeline makes no images with 2 steps and these inputs: IndexError" in said
    result, _ = score(tmp_path / "dit-1000", tmp_path / "out", *asked, reference=reference, samples=9)
    assert result["stamp"]["vae"] == "AutoencoderKL" and len(result["stamp"]["vae_hash"]) == 16
    assert (result["stamp"]["extractor"], result["stamp"]["guidance_scale"]) == ("dinov2", 4.0)
    again, _ = score(tmp_path / "dit-1000", tmp_path / "two", *asked[:-1], 5, "--npz", reference=reference, samples=9)
    assert again["metrics"] == pytest.approx(result["metrics"], rel=1e-3)  # whatever the batch is
    assert "takes no prompts; leave --prompts out" in refused(
        *(tmp_path / "dit-1000", tmp_path / "p", "--prompts", judge / "config.json", "--extractor", judge),
        reference=reference,
        samples=9,
    )


@pytest.mark.slow
def test_exports(score, debug_run, tmp_path):
    asked = ("--extractor", debug_run / "extractor", "--steps", 2)
    eager, _ = score(debug_run / "student-tuned", tmp_path / "eager", *asked)
    onnx, _ = score(debug_run / "exported" / "onnx-fp32", tmp_path / "onnx", *asked)
    assert onnx["metrics"] == pytest.approx(eager["metrics"], rel=1e-2, abs=1e-2)
    assert (eager["stamp"]["dtype"], onnx["stamp"]["dtype"]) == ("float32", "fp32")


@pytest.mark.slow
@pytest.mark.export
@pytest.mark.parametrize("form", ["executorch", "web"])
def test_exports_for_phones_and_pages(request, score, debug_run, tmp_path, form):
    if form == "web":
        request.getfixturevalue("web_runtime")
    options = ExportOptions(format=form, dtype="fp32", num_images=2, bench_repeats=2, threads=1)
    export_pipeline(debug_run / "student-tuned", tmp_path / form, options)
    asked = ("--extractor", debug_run / "extractor", "--steps", 2)
    eager, _ = score(debug_run / "student-tuned", tmp_path / "eager", *asked)
    made, _ = score(tmp_path / form, tmp_path / "made", *asked)
    assert made["metrics"] == pytest.approx(eager["metrics"], rel=1e-2, abs=1e-2)
    assert made["stamp"]["dtype"] == "fp32"


# -------------------------------------------------------------------- processes


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


def finished(command: list[str]) -> None:
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def same(one: Path, two: Path) -> None:
    a, b = (json.loads((folder / "result.json").read_text()) for folder in (one, two))
    for key in ("metrics", "standard_errors"):
        assert a[key] == pytest.approx(b[key], rel=1e-9, abs=1e-9)
    assert a["stamp"] == b["stamp"] and len(a["metrics"]) >= 6


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["torchrun", "edgedit"])
def test_two_ranks_give_the_figures_of_one(command, model, tmp_path, kind):
    finished([sys.executable, *command(model, tmp_path / "one", "--npz", samples=60)])
    script, *arguments = command(model, tmp_path / "two", "--npz", samples=60)
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", script]
    if kind == "edgedit":
        launcher = [str(BIN / "edgedit"), "train", "score", "--num_processes", "2"]
    finished([*launcher, *arguments])
    same(tmp_path / "one", tmp_path / "two")


@pytest.fixture
def images(model, score, tmp_path):
    """A folder of 60 images."""
    score(model, tmp_path / "made", "--npz", samples=60)
    return folder_of(tmp_path / "made" / "samples.npz", tmp_path / "images")


@pytest.mark.slow
@pytest.mark.kills
@pytest.mark.parametrize("source, ranks", [("model", 1), ("images", 1), ("images", 2)])
def test_a_score_killed_twice_gives_the_figures_of_one_left_alone(command, request, tmp_path, source, ranks):
    """One process left alone is the truth, for two that are killed as well."""
    asked = {"samples": 60}
    model = request.getfixturevalue(source)
    finished([sys.executable, *command(model, tmp_path / "whole", **asked)])
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(ranks)]
    again, seen = [*launcher, *command(model, tmp_path / "killed", **asked)], []
    for least in (40, 229):  # of 225 chunks of the reference and 8 of the samples
        with subprocess.Popen(again, env=environment(), stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list((tmp_path / "killed").glob("chunks/*.safetensors"))) < least:
                time.sleep(0.002)
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for member in family:  # torchrun's workers outlive it
                member.kill()
            psutil.wait_procs(family, timeout=30)
        seen.append(len(list((tmp_path / "killed").glob("chunks/*.safetensors"))))
        assert not (tmp_path / "killed" / "result.json").exists()
    assert 0 < seen[0] < seen[1] < 233
    finished(again)
    same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.kills
def test_ctrl_c_ends_in_one_line_and_the_rerun_continues(command, model, tmp_path):
    again = [sys.executable, *command(model, tmp_path / "out", samples=60)]
    with subprocess.Popen(again, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and len(list((tmp_path / "out").glob("chunks/*.safetensors"))) < 20:
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Interrupted. Run the same command to continue." in err
    assert "Traceback" not in err and len(list((tmp_path / "out").glob("chunks/*.safetensors"))) >= 20
    finished(again)
