"""Few-step distillation as a user runs it: what the folder holds, exact resume, ranks, both families, bad input."""

import json
import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from flow_pipelines import elastic, randomise
from safetensors.torch import load_file
from sharded import sharded

from edgedit_hf import EdgeDiTPipeline, quantize_model
from edgedit_hf.data.loading import load_run_images
from edgedit_hf.diffusion import make_few_step_scheduler, make_scheduler
from edgedit_hf.few_step.judge import JUDGE_SEED
from edgedit_hf.files import read_json
from edgedit_hf.metrics.distances import frechet_distance
from edgedit_hf.metrics.reference import load_extractor, real_features
from edgedit_hf.pipelines.loading import with_components
from edgedit_hf.pipelines.sampling import generate
from edgedit_hf.quantization.layers import quantizable_layers
from edgedit_hf.run.config import load_config

TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
RECIPE = "distill_few_step"
FAR = ("few_step.timesteps=[400, 200]", "few_step.learning_rate=0.1", "few_step.evaluate_every=1")
FAR += (
    "few_step.final_learning_rate=1.0",
    "few_step.warmup_steps=0",
    "few_step.ema_decay=0",
    "few_step.max_grad_norm=0",
)
"""Steps that are far too large, from samples of bounded contrast on: the later, the worse."""


@pytest.fixture(scope="module")
def sources(make_transformer, tmp_path_factory):
    """Many-step pipelines of which only the folders are there."""
    folder = tmp_path_factory.mktemp("sources")
    EdgeDiTPipeline(
        make_transformer(), make_scheduler("epsilon"), default_steps=3, default_guidance_scale=1.5
    ).save_pretrained(folder / "edgedit")
    randomise(elastic(vae=False)).save_pretrained(folder / "text")
    return folder


@pytest.fixture(scope="module")
def distil(recipes, sources, tmp_path_factory):
    """`distil(name, *overrides)`: a finished run from the source of this name, in a new folder, which it returns."""
    extractor = tmp_path_factory.mktemp("extractor") / "extractor"

    def run(name: str, *overrides: str, folder: Path | None = None, process: bool = False, **options) -> Path:
        folder = folder or tmp_path_factory.mktemp("run") / "run"
        if extractor.exists() and not folder.exists():  # the images are the same for all
            shutil.copytree(extractor, folder / "extractor")
        start = recipes.run if process else recipes.run_here
        start(RECIPE, folder, f"few_step.path={sources / name}", *overrides, **options)
        if not extractor.exists():
            shutil.copytree(folder / "extractor", extractor)
        return folder

    return run


@pytest.fixture(scope="module")
def whole(distil):
    """A finished run, left alone."""
    return distil("edgedit")


@pytest.fixture(scope="module")
def whole_text(distil):
    return distil("text")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "few-step" / "transformer" / "diffusion_pytorch_model.safetensors")


def facts(folder: Path) -> dict:
    return read_json(folder / "few-step" / "stage.json", "")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "few-step" / "telemetry.jsonl").read_text().splitlines()]


AT_THE_END = "few_step.evaluate_every=6"
"""The only look is the last: what is published has seen every step."""


def assert_equal(one: Path, other: Path, source: Path | None = None, share: float = 0.0, measured: bool = True) -> None:
    """The published weights, and what was measured of student and critic in the last step.

    Args:
        source: where training began. share: of the way from there that the two may be apart, where sums were taken in
            another order. measured: whether both measured the same rows; of several processes the main one tells
            its own.
    """
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    if source is None:
        different = [name for name in a if not torch.equal(a[name], b[name])]
        assert not different, different
    else:
        begun = load_file(source / "transformer" / "diffusion_pytorch_model.safetensors")
        apart, way = (
            sum(float((x[name] - y[name]).double().square().sum()) for name in a) ** 0.5
            for x, y in ((a, b), (a, begun))
        )
        assert way > 0 and apart <= share * way, (apart, way)
    last = [lines(folder)[-1] for folder in (one, other)]
    for name in {"loss", "knowledge", "matching", "critic", "gap", "cosine"} & last[0].keys() if measured else ():
        assert last[0][name] == pytest.approx(last[1][name], rel=share, abs=share / 10), name


# -------------------------------------------------------------------- what it makes


def test_the_folder_samples_in_its_steps_without_being_told(whole, sources):
    pipeline = DiffusionPipeline.from_pretrained(whole / "few-step")
    pipeline.set_progress_bar_config(disable=True)
    steps = pipeline.config.few_step_timesteps
    assert isinstance(pipeline, EdgeDiTPipeline) and len(steps) == pipeline.config.default_steps == 2
    assert pipeline.config.default_guidance_scale == 1.0 and facts(whole)["timesteps"] == steps
    seen, forward = [], pipeline.transformer.forward

    def look(x, t, *args, **kwargs):
        seen.append((len(x), float(torch.as_tensor(t).flatten()[0])))
        return forward(x, t, *args, **kwargs)

    pipeline.transformer.forward = look
    images = pipeline([1, 2], output_type="np").images
    assert images.shape == (2, 8, 8, 1) and math.isfinite(images.sum())
    assert seen == [(2, steps[0]), (2, steps[1])]  # two forwards a row, without guidance
    source = load_file(sources / "edgedit" / "transformer" / "diffusion_pytorch_model.safetensors")
    found = tensors(whole)
    assert found.keys() == source.keys() and any(not torch.equal(found[name], source[name]) for name in found)


def distance_of(folder: Path, repository: Path, pipeline=None, count: int = 32) -> float:
    """The Fréchet distance of the published pipeline's own samples, or another's, as the recipe would judge them."""
    config = load_config(repository / "training" / "recipes" / "debug.yaml", [f"output_dir={folder}"])
    images = load_run_images(config)
    extractor = load_extractor(config, images, torch.device("cpu"))
    pipeline = pipeline or EdgeDiTPipeline.from_pretrained(folder / "few-step")
    made, _ = generate(pipeline, count, seed=config.seed + JUDGE_SEED, steps=2, guidance_scale=1.0)
    return frechet_distance(extractor.features(made), real_features(extractor, images))


def test_what_is_published_is_the_best_and_not_the_last(distil, repository):
    folder = distil("edgedit", *FAR, "few_step.steps=3")
    told = {line["step"]: line["distance"] for line in lines(folder)}
    best = facts(folder)["best"]
    assert list(told) == [1, 2, 3] and told[best["step"]] == min(told.values())
    assert best["step"] < 3 and told[3] > 1.1 * best["distance"] == pytest.approx(1.1 * min(told.values()))
    assert distance_of(folder, repository) == pytest.approx(best["distance"], rel=1e-3)


@pytest.mark.slow
def test_distillation_brings_the_samples_nearer(recipes, repository, tmp_path):
    """Of a trained net: its own few steps without guidance are far from the data, the student's are not."""
    recipes.run_here(
        "train_teacher", tmp_path, "teacher.steps=400", "teacher.learning_rate=3e-3", "teacher.ema_decay=0.98"
    )
    options = ("few_step.steps=200", "few_step.evaluate_every=50", "few_step.samples=200", "few_step.batch_size=32")
    options += ("few_step.rank=16", "few_step.alpha=32", "few_step.ema_decay=0.95", "few_step.learning_rate=2e-3")
    recipes.run_here(RECIPE, tmp_path, f"few_step.path={tmp_path / 'teacher'}", *options)
    timesteps = facts(tmp_path)["timesteps"]
    undistilled = with_components(
        EdgeDiTPipeline.from_pretrained(tmp_path / "teacher"),
        scheduler=make_few_step_scheduler("epsilon"),
        default_steps=len(timesteps),
        default_guidance_scale=1.0,
        few_step_timesteps=timesteps,
    )
    before = distance_of(tmp_path, repository, undistilled, 200)
    after = distance_of(tmp_path, repository, count=200)
    assert after == pytest.approx(facts(tmp_path)["best"]["distance"], rel=1e-3)
    assert after < 0.8 * before, (before, after)


def test_telemetry_and_pictures(whole):
    told = lines(whole)
    names = {name for line in told for name in line}
    assert {"loss", "knowledge", "matching", "critic", "gap", "cosine", "mean", "std", "norm_student"} <= names
    assert {"norm_critic", "distance", "recall", "sample_mean", "sample_std"} <= names
    assert [line["step"] for line in told if "distance" in line] == [3, 6]
    assert sorted(path.name for path in (whole / "few-step" / "samples").iterdir()) == [
        "step-000003.png",
        "step-000006.png",
    ]
    memory = facts(whole)["memory"]
    assert memory["student: optimiser"] == 2 * memory["student: weights"] == 2 * memory["critic: weights"]
    assert not (whole / "few-step" / "checkpoints").exists()


def test_a_finished_run_is_not_done_again(distil, whole):
    before = (whole / "few-step" / "stage.json").stat().st_mtime_ns
    distil("edgedit", folder=whole)
    distil("edgedit", "few_step.continue_from=best", "few_step.log_every=3", folder=whole)
    assert (whole / "few-step" / "stage.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_supernet_is_distilled_at_every_width(whole_text, sources):
    pipeline = DiffusionPipeline.from_pretrained(whole_text / "few-step")
    pipeline.set_progress_bar_config(disable=True)
    names = pipeline.transformer.subnet_names
    assert names == ["tiny", "small", "full"] and pipeline.config.few_step_timesteps == [1000.0, 750.0]
    assert facts(whole_text)["best"]["widths"].keys() == set(names)
    assert {f"distance_{name}" for name in names} <= {name for line in lines(whole_text) for name in line}
    latents = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for name in names:
        asked = {"latents": latents, "output_type": "latent"}
        images = pipeline("a cat", subnet=name, **asked).images
        alone = with_components(pipeline, transformer=pipeline.transformer.extract_subnet(name))
        torch.testing.assert_close(alone("a cat", **asked).images, images, rtol=1e-4, atol=1e-4)
    source = load_file(sources / "text" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert tensors(whole_text).keys() == source.keys()


@pytest.mark.slow
def test_one_width_alone_with_features(distil):
    folder = distil("text", "few_step.subnet=small", "few_step.feature_weight=0.3")
    pipeline = DiffusionPipeline.from_pretrained(folder / "few-step")
    assert pipeline.transformer.config.subnets is None and facts(folder)["best"]["widths"].keys() == {"full"}
    assert any("features" in line for line in lines(folder))


VARIANTS = {
    "noising anew": ["few_step.sampler=sde", "few_step.sampling_steps=3"],
    "full nets, the critic pulled": ["few_step.backbone=full", "few_step.critic_merge=0.9"],
    "one or the other": ["few_step.schedule=alternate", "few_step.student_every=2"],
    "every second step": ["few_step.student_every=2"],
    "knowledge alone": ["few_step.matching_weight=0"],
    "matching alone": ["few_step.knowledge_weight=0", "few_step.moments_weight=0.5"],
    "guided, decoupled": ["few_step.real_guidance=2.0"],
    "guided, coupled": ["few_step.real_guidance=2.0", "few_step.decoupled=false"],
    "one step": ["few_step.sampling_steps=1"],
    "own features": ["few_step.feature_weight=0.5"],
    "recomputed": ["few_step.gradient_checkpointing=true"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(distil, name, whole, sources):
    folder = distil("edgedit", *VARIANTS[name])
    pipeline = DiffusionPipeline.from_pretrained(folder / "few-step")
    pipeline.set_progress_bar_config(disable=True)
    assert math.isfinite(pipeline([1, 2], output_type="np").images.sum())
    told = lines(folder)
    updates = {word: [line["step"] for line in told if word in line] for word in ("loss", "critic")}
    every, none = [1, 2, 3, 4, 5, 6], []
    wanted = {
        "one or the other": ([1, 3, 5], [2, 4, 6]),
        "every second step": ([1, 3, 5], every),
        "knowledge alone": (every, none),
    }.get(name, (every, every))
    assert (updates["loss"], updates["critic"]) == wanted
    if name == "noising anew":
        assert type(pipeline.scheduler).__name__ == "LCMScheduler"
    if name == "knowledge alone":
        assert not any(part.startswith("critic") for part in facts(folder)["memory"])
    if name == "recomputed":
        assert_equal(whole, folder, sources / "edgedit", 1e-4)


@pytest.mark.slow
def test_a_teacher_that_is_given(distil, make_transformer, tmp_path):
    """Another size of the same family, with a projection of the tokens; and one that needs few steps itself."""
    teacher = EdgeDiTPipeline(
        make_transformer(seed=1, hidden_size=48, num_layers=2), make_scheduler("epsilon"), default_guidance_scale=2.0
    )
    teacher.save_pretrained(tmp_path / "teacher")
    folder = distil("edgedit", f"few_step.teacher={tmp_path / 'teacher'}", "few_step.feature_weight=0.5")
    assert any("features" in line for line in lines(folder)) and facts(folder)["inputs"]["knowledge"]
    few = with_components(
        teacher,
        scheduler=make_few_step_scheduler("epsilon"),
        default_steps=2,
        default_guidance_scale=1.0,
        few_step_timesteps=[800.0, 400.0],
    )
    few.save_pretrained(tmp_path / "few")
    again = distil("edgedit", f"few_step.teacher={tmp_path / 'few'}", "few_step.knowledge_steps=4")
    assert facts(again)["inputs"]["knowledge"] == facts(folder)["inputs"]["knowledge"]  # of the same weights


@pytest.mark.slow
def test_a_text_teacher_of_another_family(distil, whole_text, sources, tmp_path):
    randomise(elastic(vae=False, seed=5), seed=5).save_pretrained(tmp_path / "teacher")
    options = ("few_step.backbone=full", f"few_step.teacher={tmp_path / 'teacher'}")
    folder = distil("text", *options, "few_step.subnet=small", "few_step.feature_weight=0.5")
    assert any("features" in line for line in lines(folder)) and (folder / "knowledge").exists()


# -------------------------------------------------------------------- the same however it runs


@pytest.mark.slow
@pytest.mark.kills
@pytest.mark.parametrize("name", ["edgedit", "text"])
def test_killed_and_rerun_equals_uninterrupted(recipes, sources, request, tmp_path, name):
    whole = request.getfixturevalue("whole" if name == "edgedit" else "whole_text")
    path, marker = f"few_step.path={sources / name}", tmp_path / "few-step" / "run.json"
    recipes.run_with_kills(RECIPE, tmp_path, marker, facts(whole)["seconds"], path, kills=2)
    assert_equal(whole, tmp_path)
    assert facts(tmp_path)["best"] == facts(whole)["best"]


@pytest.mark.slow
@pytest.mark.kills
def test_ctrl_c_saves_and_the_rerun_continues(recipes, sources, whole, tmp_path):
    path = f"few_step.path={sources / 'edgedit'}"
    recipes.interrupted(RECIPE, tmp_path, tmp_path / "few-step" / "telemetry.jsonl", path)
    recipes.run(RECIPE, tmp_path, path)
    assert_equal(whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["adapters", "full"])
def test_pieces_change_nothing(distil, sources, backbone):
    options = [AT_THE_END, f"few_step.backbone={backbone}", "few_step.student_every=2", "few_step.real_guidance=2.0"]
    options.append("few_step.moments_weight=0.1")
    one = distil("edgedit", *options)
    two = distil("edgedit", *options, "few_step.gradient_accumulation=2")
    # Adam divides by tiny second moments in its first steps, which magnifies rounding.
    assert_equal(one, two, sources / "edgedit", 0.02)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("name", ["edgedit", "text"])
def test_two_ranks_equal_one(distil, request, sources, name, tmp_path):
    """With a projection beside the wrapped networks for classes; a width a step, in pieces, for text."""
    options = [f"few_step.teacher={sources / 'edgedit'}", "few_step.feature_weight=0.5"] if name == "edgedit" else []
    options += ["few_step.moments_weight=0.1", AT_THE_END]
    one = distil(name, *options)
    options += [] if name == "edgedit" else ["few_step.gradient_accumulation=2"]
    two = distil(name, *options, folder=tmp_path / "two", process=True, launcher=TORCHRUN)
    assert_equal(one, two, sources / name, 0.02, measured=False)
    assert facts(two)["best"]["distance"] == pytest.approx(facts(one)["best"]["distance"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("backbone", ["adapters", "full"])
def test_sharded_training_equals_one_process_and_continues(distil, recipes, sources, tmp_path, backbone):
    options = (f"few_step.backbone={backbone}", "few_step.steps=4", "few_step.evaluate_every=4")
    one = distil("text", *options)
    two, script = tmp_path / "two", sharded(RECIPE, tmp_path)
    pieces = "few_step.gradient_accumulation=2"
    arguments = recipes.arguments(RECIPE, two, f"few_step.path={sources / 'text'}", *options, pieces)[1:]
    for die_at in ("2", ""):
        done = subprocess.run(
            [*TORCHRUN, str(script), *arguments],
            env={**recipes.environment(), "DIE_AT": die_at},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert (done.returncode != 0) == bool(die_at), done.stderr[-4000:]
        if die_at:
            assert list((two / "few-step" / "checkpoints" / "step-000000002").glob("*.safetensors"))
    assert_equal(one, two, sources / "text", 0.02, measured=False)


# -------------------------------------------------------------------- trouble on the way


def test_a_drift_stops_the_run_which_then_goes_on_from_the_best(fail, recipes, sources, tmp_path):
    path = f"few_step.path={sources / 'edgedit'}"
    line = fail(RECIPE, tmp_path, path, *FAR)
    assert "has drifted to" in line and "is allowed (few_step." in line and "before it is kept" in line
    assert "continue from the best checkpoint (few_step.continue_from=best)" in line
    assert "critic_learning_rate, matching_weight, real_guidance, moments_weight, mean_drift, std_drift may now" in line
    kept = sorted(checkpoint.name for checkpoint in (tmp_path / "few-step" / "checkpoints").iterdir())
    assert kept[0] == "best-000000001" and kept[1:] > ["step-000000001"]
    assert not (tmp_path / "few-step" / "stage.json").exists()
    lower = ("few_step.learning_rate=1e-6", "few_step.continue_from=best")
    recipes.run_here(RECIPE, tmp_path, path, *FAR, *lower)
    assert facts(tmp_path)["changes"][0]["few_step.learning_rate"] == [0.1, 1e-6]
    told = lines(tmp_path)
    assert [line["step"] for line in told if "distance" in line] == [1, 2, 3, 4, 5, 6]
    near = [line["distance"] for line in told if "distance" in line]
    assert near == pytest.approx(near[:1] * 6, rel=0.02)  # of that one on


def test_a_loss_that_is_not_finite_ends_with_the_checkpoint_before_it(fail, sources, tmp_path):
    options = (
        *("few_step.learning_rate=1e30", "few_step.max_grad_norm=0", "few_step.warmup_steps=0"),
        *("few_step.checkpoint_every=1", "few_step.evaluate_every=100"),
    )
    line = fail(RECIPE, tmp_path, f"few_step.path={sources / 'edgedit'}", *options)
    assert "few-step: " in line and ("is nan" in line or "is inf" in line or "NaN or infinite" in line)
    assert not (tmp_path / "few-step" / "stage.json").exists()


def test_samples_that_are_not_finite_end_it_too_and_the_rates_may_change(fail, recipes, sources, tmp_path):
    """Where nothing was looked at before they were judged."""
    path = f"few_step.path={sources / 'edgedit'}"
    options = (
        *("few_step.max_grad_norm=0", "few_step.warmup_steps=0", "few_step.final_learning_rate=1.0"),
        *("few_step.checkpoint_every=50", "few_step.evaluate_every=2", "few_step.log_every=50"),
    )
    line = fail(RECIPE, tmp_path, path, *options, "few_step.learning_rate=1e30")
    assert "few-step: the few-step samples hold NaN or infinite values at step 2; no checkpoint" in line
    recipes.run_here(RECIPE, tmp_path, path, *options, "few_step.learning_rate=1e-3")
    assert facts(tmp_path)["changes"][0]["few_step.learning_rate"] == [1e30, 1e-3]


# -------------------------------------------------------------------- before it runs


def test_memory_and_estimate_write_nothing(recipes, sources, tmp_path, capsys):
    for name, more, flag in (
        ("edgedit", (), "--dry-run"),
        ("text", ("few_step.subnet=tiny",), "--report-memory"),
        ("text", ("few_step.subnet=huge",), "--report-memory"),
        ("nothing", (), "--report-memory"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            arguments = recipes.arguments(RECIPE, tmp_path / "run", f"few_step.path={sources / name}", *more)
            patch.setattr(sys, "argv", [*arguments, flag])
            if name == "nothing" or "few_step.subnet=huge" in more:
                with pytest.raises(SystemExit) as ended:
                    runpy.run_path(arguments[0], run_name="__main__")
                said = capsys.readouterr().err
                assert ended.value.code == 2 and said.count("error: ") == 1 and "Traceback" not in said
                assert ("few_step.subnet is 'huge'" if more else str(sources / name)) in said
                continue
            runpy.run_path(arguments[0], run_name="__main__")
        printed = capsys.readouterr().out
        assert "student: optimiser" in printed and "frozen weights" in printed and "of it is needed" in printed
        assert ("few-step" in printed) == (flag == "--dry-run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["few_step.sampling_steps=0"], "few_step.sampling_steps"),
        (["few_step.sampling_steps=9"], "few_step.sampling_steps"),
        (["few_step.timesteps=[200, 400]"], "few_step.timesteps must fall, but 400 follows 200"),
        (["few_step.timesteps=[400]"], "few_step.timesteps holds 1 timesteps, but few_step.sampling_steps is 2"),
        (["few_step.timesteps=[800, 400.5]"], "must be whole numbers"),
        (["few_step.matching_weight=0", "few_step.knowledge_weight=0"], "are both 0: nothing to learn from"),
        (["few_step.schedule=alternate"], "the critic would never learn"),
        (["few_step.subnet=tiny"], "few_step.subnet is 'tiny', but"),
        (["few_step.teacher_lora=adapter"], "few_step.teacher_lora is adapter, but there is no such folder"),
        (
            ["few_step.batch_size=9", "few_step.gradient_accumulation=2"],
            "batch_size 9 is not a multiple of processes × gradient_accumulation = 2",
        ),
    ],
)
def test_bad_values(fail, sources, tmp_path, overrides, said):
    assert said in fail(RECIPE, tmp_path / "run", f"few_step.path={sources / 'edgedit'}", *overrides)
    assert not (tmp_path / "run" / "few-step").exists()


def test_bad_values_of_text(fail, sources, tmp_path):
    path = f"few_step.path={sources / 'text'}"
    line = fail(RECIPE, tmp_path / "run", path, "few_step.subnet=huge")
    assert "few_step.subnet is 'huge', but" in line and "tiny, small, full" in line
    line = fail(RECIPE, tmp_path / "run", path, "few_step.feature_weight=0.5")
    assert "widths of the net have tokens of different sizes" in line


def test_what_is_no_many_step_pipeline(fail, whole, sources, tmp_path):
    line = fail(RECIPE, tmp_path / "run")
    assert "neither student-tuned nor elastic, and few_step.path is null" in line
    line = fail(RECIPE, tmp_path / "run", f"few_step.path={tmp_path / 'nothing'}")
    assert "few_step.path is" in line and "there is no such folder" in line
    line = fail(RECIPE, tmp_path / "run", f"few_step.path={whole / 'few-step'}")
    assert "was distilled for 2 steps already, and is no real score" in line
    shutil.copytree(sources / "text", tmp_path / "guided")
    path = tmp_path / "guided" / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "guidance_embeds": True}))
    line = fail(RECIPE, tmp_path / "run", f"few_step.path={tmp_path / 'guided'}")
    assert "has guidance distilled into it (guidance_embeds), and is no real score" in line


def test_a_quantised_net(fail, sources, tmp_path):
    pipeline = EdgeDiTPipeline.from_pretrained(sources / "edgedit")
    plan = {name: {"scheme": "palette", "bits": 4} for name in list(quantizable_layers(pipeline.transformer))[:2]}
    quantize_model(pipeline.transformer, plan)
    pipeline.save_pretrained(tmp_path / "small")
    line = fail(RECIPE, tmp_path / "run", f"few_step.path={tmp_path / 'small'}")
    assert "is quantised; distil first, then quantise" in line


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"prediction_type": "flow_prediction"}, "has prediction_type 'flow_prediction', the net that is distilled"),
        ({"num_classes": 4}, "has num_classes 4"),
        ({"in_channels": 4}, "has in_channels 4"),
    ],
)
def test_teachers_that_do_not_fit(fail, sources, make_transformer, tmp_path, made, said):
    model = make_transformer(num_layers=1, **made)
    EdgeDiTPipeline(model, make_scheduler(model.config.prediction_type)).save_pretrained(tmp_path / "teacher")
    line = fail(
        RECIPE, tmp_path / "run", f"few_step.path={sources / 'edgedit'}", f"few_step.teacher={tmp_path / 'teacher'}"
    )
    assert said in line and "they must agree" in line


def test_teachers_of_another_latent_space_or_family(fail, sources, make_transformer, tmp_path):
    """The same net on the latents of an autoencoder; a net that takes text; and the other way round."""
    vae = AutoencoderKL(in_channels=1, out_channels=1, latent_channels=1, block_out_channels=(32,))
    EdgeDiTPipeline(make_transformer(num_layers=1), make_scheduler("epsilon"), vae).save_pretrained(tmp_path / "latent")
    for name, teacher, said in (
        ("edgedit", tmp_path / "latent", "has another latent space"),
        ("edgedit", sources / "text", "ElasticDiTPipeline"),
        ("text", sources / "edgedit", "EdgeDiTPipeline"),
    ):
        line = fail(RECIPE, tmp_path / "run", f"few_step.path={sources / name}", f"few_step.teacher={teacher}")
        assert said in line and str(teacher) in line


def test_guidance_needs_classes(fail, make_transformer, tmp_path):
    model = make_transformer(num_layers=1, num_classes=0)
    EdgeDiTPipeline(model, make_scheduler("epsilon")).save_pretrained(tmp_path / "none")
    line = fail(RECIPE, tmp_path / "run", f"few_step.path={tmp_path / 'none'}", "few_step.real_guidance=2")
    assert "few_step.real_guidance is 2, but" in line and "has no classes" in line
