"""A pipeline, an autoencoder, a tokenizer from anywhere, or one clear error."""

import json
import re

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDPMPipeline,
    DDPMScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import make_few_step_scheduler
from edgedit_hf.distill.teacher import new_pipeline
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.pipelines.loading import (
    TEXT_TO_IMAGE_VAES,
    load_original_pipeline,
    load_pipeline,
    load_vae,
    with_transformer,
)
from edgedit_hf.run.config import RunConfig

NAMES = [f"digit {i}" for i in range(10)]


def pipeline_of(transformer, vae=None) -> EdgeDiTPipeline:
    return new_pipeline(transformer, vae, NAMES, RunConfig())


@pytest.fixture(scope="module")
def tiny_vae():
    torch.manual_seed(0)
    channels = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(in_channels=1, out_channels=1, latent_channels=2, **channels, **blocks).eval()


def test_another_transformer_in_the_same_pipeline(make_transformer, tiny_vae):
    teacher, student = make_transformer(in_channels=2), make_transformer(1, in_channels=2)
    pipeline = pipeline_of(teacher, tiny_vae)
    other = with_transformer(pipeline, student)
    assert other.transformer is student and other.vae is tiny_vae
    assert other.scheduler is not pipeline.scheduler and other.scheduler.config == pipeline.scheduler.config
    assert pipeline.transformer is teacher
    for name in ("id2label", "default_steps", "default_guidance_scale"):
        assert other.config[name] == pipeline.config[name]


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


def test_vaes_of_text_to_image(tmp_path):
    from flow_pipelines import qwen_image, sana

    for kind, vae in (("AutoencoderDC", sana().vae), ("AutoencoderKLQwenImage", qwen_image().vae)):
        vae.save_pretrained(tmp_path / kind)
        assert type(load_vae(str(tmp_path / kind), kinds=TEXT_TO_IMAGE_VAES)).__name__ == kind
        with pytest.raises(EdgeDiTError, match=f"is a {kind}; it must be one of AutoencoderKL, AutoencoderTiny"):
            load_vae(str(tmp_path / kind))


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


def plain_config(scheduler) -> dict:
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def test_a_few_step_pipeline_is_converted_as_it_is(make_transformer, tmp_path):
    """Its scheduler's config holds -Infinity, as diffusers writes it."""
    pipeline = EdgeDiTPipeline(
        make_transformer(),
        make_few_step_scheduler("epsilon"),
        id2label={"3": "three"},
        few_step_timesteps=[600, 300],
        default_steps=2,
        default_guidance_scale=1.0,
        guidance_channels=1,
    )
    pipeline.save_pretrained(tmp_path)
    assert "-Infinity" in (tmp_path / "scheduler" / "scheduler_config.json").read_text()
    converted = load_original_pipeline(tmp_path)
    assert type(converted.scheduler) is type(pipeline.scheduler)
    assert {**converted.scheduler.config}.items() >= plain_config(pipeline.scheduler).items()
    for name in ("id2label", "few_step_timesteps", "default_steps", "default_guidance_scale", "guidance_channels"):
        assert converted.config[name] == pipeline.config[name]


def test_a_tokenizer_is_not_read_through_a_link_out_of_its_folder(tmp_path):
    from flow_pipelines import clip, tokenizer

    from edgedit_hf.pipelines.loading import load_text_encoder

    clip(projection=False).save_pretrained(tmp_path / "text_encoder")
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    load_text_encoder(tmp_path / "text_encoder")
    (tmp_path / "tokenizer" / "vocab.txt").symlink_to("/etc/hostname")
    with pytest.raises(EdgeDiTError, match="is a link to /etc/hostname"):
        load_text_encoder(tmp_path / "text_encoder")
