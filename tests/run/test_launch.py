"""What all recipes share: exit codes, the accelerator, loading of data and pipelines with one clear error each,
learning rates.
"""

import json
import math
import re
import sys

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.data.loading import load_run_images, load_training_set
from edgedit_hf.diffusion import Diffusion
from edgedit_hf.distill.teacher import check_fits_data, load_teacher, new_pipeline, new_teacher, teacher_path
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.estimate import print_estimate
from edgedit_hf.pipelines.loading import TEXT_TO_IMAGE_VAES, load_pipeline, load_vae, with_transformer
from edgedit_hf.run.config import RunConfig, load_config
from edgedit_hf.run.launch import make_accelerator, recipe_main
from edgedit_hf.run.optimisation import learning_rate_at, set_learning_rate
from edgedit_hf.run.state import Interrupted

NAMES = [f"digit {i}" for i in range(10)]


def configured(folder, *overrides: str) -> RunConfig:
    (folder / "recipe.yaml").touch()
    return load_config(folder / "recipe.yaml", [f"output_dir={folder / 'run'}", *overrides])


def pipeline_of(transformer, vae=None) -> EdgeDiTPipeline:
    return new_pipeline(transformer, vae, NAMES, RunConfig())


@pytest.fixture(scope="module")
def images():
    return load_run_images(RunConfig())


@pytest.fixture(scope="module")
def tiny_vae():
    torch.manual_seed(0)
    channels = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(in_channels=1, out_channels=1, latent_channels=2, **channels, **blocks).eval()


# -------------------------------------------------------------------- the command line of a recipe


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    """`launch(run, *arguments)`: a recipe's command line; returns (exit code, stdout, stderr)."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path / 'run'}\nthreads: 1\nteacher: {{hidden_size: 32, num_layers: 2, num_heads: 2}}\n"
    )

    def run_it(run, *arguments: str):
        monkeypatch.setattr(sys, "argv", ["recipe.py", "--config", str(recipe), *arguments])
        code = 0
        try:
            recipe_main(run, "What the recipe does.", dry_run=print_estimate)
        except SystemExit as end:
            code = end.code
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run_it


def raising(error: BaseException):
    def run(config, accelerator):
        raise error

    return run


def test_a_recipe_gets_its_config_and_an_accelerator(launch):
    seen = []
    code, _, _ = launch(lambda *given: seen.append(given), "--override", "seed=5", "--override", "teacher.steps=3")
    config, accelerator = seen[0]
    assert code == 0 and (config.seed, config.teacher.steps, config.teacher.hidden_size) == (5, 3, 32)
    assert accelerator.num_processes == 1 and accelerator.is_main_process


def test_bad_input_is_one_line_and_exit_code_2(launch):
    assert launch(raising(EdgeDiTError("The bank is of another teacher; make it anew.")))[::2] == (
        2,
        "error: The bank is of another teacher; make it anew.\n",
    )
    code, _, err = launch(raising(AssertionError("not reached")), "--override", "teacher.stps=3")
    assert code == 2 and err == "error: --override: unknown key 'teacher.stps'; did you mean 'steps'?\n"
    code, _, err = launch(raising(AssertionError("not reached")), "--config", "none.yaml")
    assert code == 2 and err.startswith("error: The recipe none.yaml cannot be read") and err.count("\n") == 1


def test_an_interruption_is_exit_code_130(launch):
    assert launch(raising(Interrupted("Stopped at step 3 of 9 of demo; saved.")))[::2] == (
        130,
        "Stopped at step 3 of 9 of demo; saved.\n",
    )
    assert launch(raising(KeyboardInterrupt()))[::2] == (130, "Interrupted. Run the same command to continue.\n")


def test_an_error_of_the_program_itself_is_called_one(launch, monkeypatch):
    code, _, err = launch(lambda *_: 1 / 0)
    assert code == 70 and err.count("\n") == 1 and "a fault of edgedit_hf" in err and "ZeroDivisionError" in err
    monkeypatch.setenv("EDGEDIT_TRACEBACK", "1")
    assert launch(lambda *_: 1 / 0)[2].startswith("Traceback")


def test_a_dry_run_prints_estimates_and_runs_nothing(launch, tmp_path):
    code, out, _ = launch(raising(AssertionError("not reached")), "--dry-run")
    assert code == 0 and [line.split()[0] for line in out.splitlines()[:3]] == ["stage", "teacher", "bank"]
    assert not (tmp_path / "run").exists()


def test_threads_are_those_of_the_recipe(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    try:
        make_accelerator(configured(tmp_path, "threads=2"))
        assert torch.get_num_threads() == 2
        make_accelerator(configured(tmp_path, "threads=0"))
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        make_accelerator(configured(tmp_path, "threads=2"))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


# -------------------------------------------------------------------- pipelines


@pytest.mark.parametrize("kind", ["epsilon", "flow_prediction"])
def test_a_new_pipeline_saves_and_loads_as_it_is(make_transformer, tmp_path, kind):
    config = configured(tmp_path, "sampling.steps=3", "sampling.guidance_scale=1.25")
    transformer = make_transformer(prediction_type=kind)
    pipeline = new_pipeline(transformer, None, NAMES, config)
    assert isinstance(pipeline.scheduler, DDIMScheduler if kind == "epsilon" else FlowMatchEulerDiscreteScheduler)
    assert Diffusion.for_config(pipeline.transformer.config).prediction_type == kind
    pipeline.save_pretrained(config.folder("teacher"))
    again = load_teacher(config)
    assert (again.config.default_steps, again.config.default_guidance_scale) == (3, 1.25)
    assert again.config.id2label == {str(i): name for i, name in enumerate(NAMES)} and not again.transformer.training
    state = transformer.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.transformer.state_dict().items())
    again.set_progress_bar_config(disable=True)
    assert again(["digit 3"], output_type="pt").images.shape == (1, 1, 8, 8)


def test_an_unconditional_pipeline_has_no_label_names(make_transformer):
    assert pipeline_of(make_transformer(num_classes=0)).config.id2label is None


def test_another_transformer_in_the_same_pipeline(make_transformer, tiny_vae):
    teacher, student = make_transformer(in_channels=2), make_transformer(1, in_channels=2)
    pipeline = pipeline_of(teacher, tiny_vae)
    other = with_transformer(pipeline, student)
    assert other.transformer is student and other.vae is tiny_vae
    assert other.scheduler is not pipeline.scheduler and other.scheduler.config == pipeline.scheduler.config
    assert pipeline.transformer is teacher
    for name in ("id2label", "default_steps", "default_guidance_scale"):
        assert other.config[name] == pipeline.config[name]


def test_the_teacher_is_the_runs_own_or_the_given_one(make_transformer, tmp_path):
    assert teacher_path(configured(tmp_path)) == tmp_path / "run" / "teacher"
    pipeline_of(make_transformer()).save_pretrained(tmp_path / "given")
    config = configured(tmp_path, f"teacher.path={tmp_path / 'given'}")
    assert teacher_path(config) == str(tmp_path / "given") and load_teacher(config).transformer.config.hidden_size == 32


@pytest.fixture
def damaged(make_transformer, tmp_path):
    """`damaged(change)`: error message of loading a pipeline whose folder `change` has been at."""
    pipeline_of(make_transformer()).save_pretrained(tmp_path / "teacher")

    def load(change) -> str:
        change(tmp_path / "teacher")
        with pytest.raises(EdgeDiTError) as refused:
            load_pipeline(tmp_path / "teacher", "stage teacher")
        assert str(tmp_path / "teacher") in str(refused.value) and "\n" not in str(refused.value)
        return str(refused.value)

    return load


def cut_weights(folder):
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def change_config(**changes):
    def change(folder):
        path = folder / "transformer" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cut_weights, "cannot be loaded"),
        (lambda folder: (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "transformer" / "config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "model_index.json").write_text('{"_class_name": "NoPipeline"}'), "cannot be loaded"),
        (
            lambda folder: (folder / "model_index.json").unlink(),
            "There is no pipeline in .* written by stage teacher, run that first",
        ),
        (change_config(layers=[]), "do not fit"),
        (change_config(layers=[{"source": [0]}]), "cannot be loaded"),
        (change_config(hidden_size=64), "cannot be loaded"),
    ],
    ids=[
        "truncated",
        "no weights",
        "no config",
        "unknown class",
        "no index",
        "fewer layers",
        "foreign layers",
        "another width",
    ],
)
def test_a_pipeline_that_cannot_be_used_is_one_clear_error(damaged, change, said):
    assert re.search(said, damaged(change))


def test_a_pipeline_of_another_class_is_refused(tmp_path):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
    DDPMPipeline(UNet2DModel(8, 1, 1, layers_per_block=1, **blocks), DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(EdgeDiTError, match="holds a DDPMPipeline; an EdgeDiTPipeline is needed"):
        load_pipeline(tmp_path, "stage teacher")


# -------------------------------------------------------------------- teachers and data


def test_a_new_teacher_is_what_the_recipe_says(tmp_path):
    config = configured(
        tmp_path, "teacher={hidden_size: 32, num_layers: 3, num_heads: 2, patch_size: 4, learn_sigma: true}"
    )
    model = new_teacher(config, (3, 16, 16), 7)
    assert (model.config.sample_size, model.config.in_channels, model.config.num_classes, model.out_channels) == (
        16,
        3,
        7,
        6,
    )
    assert len(model.blocks) == 3 and model.config.hidden_size == 32 and model.config.patch_size == 4
    config.teacher.conditional = False
    assert new_teacher(config, (3, 16, 16), 7).label_embedder is None
    for shape in ((3, 16, 20), (3, 18, 18)):
        with pytest.raises(EdgeDiTError, match=rf"shape \(3, {shape[1]}, {shape[2]}\).*patch_size 4"):
            new_teacher(config, shape, 7)


def test_data_that_fits_its_model_and_data_that_does_not(make_transformer, images):
    config = make_transformer().config
    check_fits_data(config, images)
    check_fits_data({**config, "num_classes": 0}, images)
    check_fits_data({**config, "num_classes": 12}, images)
    for change, said in (
        ({"sample_size": 16}, r"shape \(1, 8, 8\), the model needs \(1, 16, 16\); set data.resolution"),
        ({"in_channels": 3}, r"the model needs \(3, 8, 8\)"),
        ({"num_classes": 9}, "10 classes, so labels up to 9, but the model only 9"),
    ):
        with pytest.raises(EdgeDiTError, match=said):
            check_fits_data({**config, **change}, images)


def test_the_training_set_is_images_or_cached_latents(images, tiny_vae, tmp_path):
    accelerator = make_accelerator(configured(tmp_path, "threads=0"))
    pixels, vae = load_training_set(configured(tmp_path), accelerator)
    assert (
        vae is None
        and pixels.shape == (1, 8, 8)
        and pixels.fingerprint == images.fingerprint
        and pixels.num_classes == 10
    )

    tiny_vae.save_pretrained(tmp_path / "vae")
    config = configured(tmp_path, f"data.vae={tmp_path / 'vae'}")
    latents, vae = load_training_set(config, accelerator)
    assert isinstance(vae, AutoencoderTiny) and not any(p.requires_grad for p in vae.parameters())
    assert latents.shape == (2, 4, 4) and len(latents) == len(images) and latents.num_classes == 10
    batch = images.batch([0, 5])
    with torch.no_grad():
        expected = tiny_vae.encode(batch["images"]).latents * tiny_vae.config.scaling_factor
    torch.testing.assert_close(latents.batch([0, 5])["images"], expected, rtol=0, atol=1e-4)
    again, _ = load_training_set(config, accelerator)
    assert again.fingerprint == latents.fingerprint != images.fingerprint


def test_an_autoencoder_that_cannot_be_used_is_one_clear_error(make_transformer, tiny_vae, tmp_path):
    tiny_vae.save_pretrained(tmp_path / "vae")
    load_vae(str(tmp_path / "vae"))
    make_transformer().save_pretrained(tmp_path / "dit")
    with pytest.raises(
        EdgeDiTError, match="is a EdgeDiTTransformer2DModel; it must be one of AutoencoderKL, AutoencoderTiny"
    ):
        load_vae(str(tmp_path / "dit"))
    with pytest.raises(EdgeDiTError, match="The VAE .*none' cannot be loaded"):
        load_vae(str(tmp_path / "none"))
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["encoder.layers.0.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(EdgeDiTError, match="lack 1 that its config asks for, such as 'encoder.layers.0.weight'"):
        load_vae(str(tmp_path / "vae"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(EdgeDiTError, match="The VAE .*vae' cannot be loaded"):
        load_vae(str(tmp_path / "vae"))
    weights.unlink()
    torch.save(state, weights.with_suffix(".bin"))  # a pickle is not opened
    with pytest.raises(EdgeDiTError, match="The VAE .*vae' cannot be loaded.*safetensors"):
        load_vae(str(tmp_path / "vae"))


# -------------------------------------------------------------------- learning rates


def test_vaes_of_text_to_image(tmp_path):
    from flow_pipelines import qwen_image, sana

    for kind, vae in (("AutoencoderDC", sana().vae), ("AutoencoderKLQwenImage", qwen_image().vae)):
        vae.save_pretrained(tmp_path / kind)
        assert type(load_vae(str(tmp_path / kind), kinds=TEXT_TO_IMAGE_VAES)).__name__ == kind
        with pytest.raises(EdgeDiTError, match=f"is a {kind}; it must be one of AutoencoderKL, AutoencoderTiny"):
            load_vae(str(tmp_path / kind))


def test_the_learning_rate_warms_up_and_decays_to_its_final_share():
    rates = [learning_rate_at(step, 2.0, 10, 110, 0.05) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)]) and rates[10] == 2.0
    assert rates[60] == pytest.approx(2.0 * (0.05 + 0.95 / 2)) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, rel=1e-2) and min(rates[10:]) >= 0.1
    assert learning_rate_at(110, 2.0, 10, 110, 0.05) == pytest.approx(0.1)
    assert learning_rate_at(0, 2.0, 0, 1, 0.05) == 2.0
    assert all(
        math.isfinite(learning_rate_at(step, 1.0, 50, 20, 0.0)) for step in range(20)
    )  # a warm-up longer than the run


def test_every_group_gets_the_learning_rate():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(parameters)])
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


# -------------------------------------------------------------------- code in a repository


def with_remote_code(folder):
    """A text encoder whose config and tokenizer name code of their own, which leaves a mark when it runs."""
    (folder / "code.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Tokens: pass\n"
    )
    auto = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoTokenizer": ["code.Tokens", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto, "tokenizer_class": "Tokens"}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_code_in_a_repository_is_neither_run_nor_asked_for(tmp_path, monkeypatch):
    from edgedit_hf.pipelines.loading import load_text_encoder

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked at the terminal"))
    encoder = tmp_path / "own"
    encoder.mkdir()
    with pytest.raises(EdgeDiTError, match="custom code"):
        load_text_encoder(with_remote_code(encoder))
    folder = tmp_path / "pipeline"
    (folder / "tokenizer").mkdir(parents=True)
    with_remote_code(folder / "tokenizer")
    index = {"_class_name": "ElasticDiTPipeline", "tokenizer": ["transformers", "AutoTokenizer"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(EdgeDiTError, match="cannot be loaded"):
        load_pipeline(folder, kind="ElasticDiTPipeline")
    assert not (encoder / "ran").exists() and not (folder / "tokenizer" / "ran").exists()


def test_a_tokenizer_is_not_read_through_a_link_out_of_its_folder(tmp_path):
    from flow_pipelines import clip, tokenizer

    from edgedit_hf.pipelines.loading import load_text_encoder

    clip(projection=False).save_pretrained(tmp_path / "text_encoder")
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    load_text_encoder(tmp_path / "text_encoder")
    (tmp_path / "tokenizer" / "vocab.txt").symlink_to("/etc/hostname")
    with pytest.raises(EdgeDiTError, match="is a link to /etc/hostname"):
        load_text_encoder(tmp_path / "text_encoder")
