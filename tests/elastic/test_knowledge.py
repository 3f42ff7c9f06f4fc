"""A teacher beside a student: loaded from a folder, its captions cached, and the student drawn to it."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from flow_pipelines import autoencoder, elastic, flux, randomise

from edgedit_hf.diffusion import Diffusion
from edgedit_hf.elastic.knowledge import load_knowledge, teacher_note
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.models.transformer_elastic_dit import ElasticDiTTransformer2DModel
from edgedit_hf.run.config import RunConfig


def captioned(*shapes):
    """What of a data set is needed here: the captions and sizes of its rows."""
    return SimpleNamespace(captions=["one", "a thin two", "one", "three"], shapes=list(shapes) or [(1, 8, 8)])


@pytest.fixture
def config(tmp_path):
    config = RunConfig()
    config.output_dir, config.knowledge.teacher = str(tmp_path / "run"), str(tmp_path / "teacher")
    return config


def student(**options):
    torch.manual_seed(5)
    return ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug", **options)


@pytest.mark.parametrize("make", [lambda: elastic(vae=False), flux], ids=["elastic", "flux"])
def test_the_full_net_comes_nearer_to_its_teacher(config, tmp_path, make):
    teacher = randomise(make())
    pixels = teacher.vae is None
    teacher.save_pretrained(tmp_path / "teacher")
    model = student(in_channels=1 if pixels else 4)
    knowledge = load_knowledge(
        config,
        Accelerator(cpu=True),
        model,
        captioned((model.config.in_channels, 8, 8)),
        None if pixels else autoencoder(),
    )
    diffusion, generator = Diffusion("flow_prediction"), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([*model.parameters(), *knowledge.projector.parameters()], lr=3e-3)
    x0, noise = (torch.randn(4, model.config.in_channels, 8, 8, generator=generator) for _ in range(2))
    t = torch.tensor([30.0, 950.0, 70.0, 980.0])  # where the teacher leads; this one knows nothing of the data
    x_t, rows, history = diffusion.noisy(x0, noise, t), torch.arange(4), []
    for _ in range(40):
        output = model(x_t, t, return_features=True)
        task = diffusion.loss(output.sample, x0, noise, t)
        loss, distances = knowledge.loss(
            task, output.sample, output.features, x_t, t / 1000, rows, torch.tensor([False, False, True, False])
        )
        assert loss.shape == (4,) and set(distances) == {"output_kd", "feature_kd"}
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        history.append(torch.stack(list(distances.values())).detach())
    assert (history[-1] < 0.7 * history[0]).all(), history


def test_captions_are_read_once_and_the_encoders_let_go(config, tmp_path):
    randomise(elastic(vae=False)).save_pretrained(tmp_path / "teacher")
    first = load_knowledge(config, Accelerator(cpu=True), student(), captioned(), None)
    assert first.teacher.pipeline.text_encoder is None
    shards = sorted((tmp_path / "run").rglob("text.safetensors"))
    stamps = [shard.stat().st_mtime_ns for shard in shards]
    again = load_knowledge(config, Accelerator(cpu=True), student(), captioned(), None)
    assert [shard.stat().st_mtime_ns for shard in shards] == stamps and len(stamps) == 1
    assert all(torch.equal(a, b) for a, b in zip(first.projector.parameters(), again.projector.parameters()))
    for ours, theirs in zip(first.texts.batch([0, 1]), again.texts.batch([0, 1])):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    # Another teacher's text gets a folder of its own.
    elastic(vae=False, seed=1).save_pretrained(tmp_path / "teacher")
    load_knowledge(config, Accelerator(cpu=True), student(), captioned(), None)
    assert len(sorted((tmp_path / "run").rglob("text.safetensors"))) == 2


def test_a_teacher_on_other_latents_is_refused_before_its_weights_are_read(config, tmp_path):
    elastic(vae=True).save_pretrained(tmp_path / "teacher")
    next((tmp_path / "teacher" / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(EdgeDiTError, match="another latent space: channels is 4 there and 1 for the student"):
        load_knowledge(config, Accelerator(cpu=True), student(), captioned(), None)


def test_sizes_that_the_teacher_does_not_take_are_refused(config, tmp_path):
    elastic(vae=False).save_pretrained(tmp_path / "teacher")
    with pytest.raises(EdgeDiTError, match=r"does not take latents of shape \(1, 8, 7\): .*data.buckets") as error:
        load_knowledge(config, Accelerator(cpu=True), student(), captioned((1, 8, 8), (1, 8, 7)), None)
    assert "\n" not in str(error.value)


def test_without_a_teacher_there_is_nothing_to_load(config):
    config.knowledge.teacher = None
    assert load_knowledge(config, None, None, [], None) is None


def test_the_memory_of_a_teacher_is_told_without_loading_it(config, tmp_path):
    assert "is not here" in teacher_note(config)[0]
    elastic(vae=False).save_pretrained(tmp_path / "teacher")
    next((tmp_path / "teacher" / "transformer").glob("*.safetensors")).unlink()
    assert "on top, 0.00 GB on the CPU" in teacher_note(config)[0]
    config.knowledge.teacher = None
    assert teacher_note(config) == []
