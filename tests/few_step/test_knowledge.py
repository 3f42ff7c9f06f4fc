"""Where the student's x_t leads, against probability flows that are known in closed form, and whose teacher says so."""

from types import SimpleNamespace

import flow_pipelines
import pytest
import torch
from accelerate import Accelerator
from gaussians import Mixture
from peft import LoraConfig, get_peft_model_state_dict

from edgedit_hf import EdgeDiTError
from edgedit_hf.data.text_table import text_table
from edgedit_hf.diffusion import Diffusion
from edgedit_hf.few_step.knowledge import Knowledge, chord_velocity, given_knowledge, own_knowledge, substeps
from edgedit_hf.few_step.losses import on_flow
from edgedit_hf.few_step.networks import REAL, Networks, predict
from edgedit_hf.few_step.objective import Objective
from edgedit_hf.few_step.source import Conditions
from edgedit_hf.pipelines.loading import with_components
from edgedit_hf.run.config import RunConfig

DATA = Mixture.of((1.0, 0.4, 0.3))


def exact(diffusion: Diffusion, x_t: torch.Tensor, t: float, to: float | None) -> torch.Tensor:
    """Velocity of the chord on the flow's path: of a Gaussian the probability flow keeps how many standard deviations
    x is from the mean.
    """
    mean, std = 0.4, 0.3

    def path(at):  # mean, std and level of x / (α + σ)
        if at is None:
            return mean, std, 0.0
        alpha, sigma = (float(part) for part in diffusion.alpha_sigma(torch.tensor([at]), torch.zeros(1).double()))
        whole = alpha + sigma
        return alpha * mean / whole, (alpha**2 * std**2 + sigma**2) ** 0.5 / whole, sigma / whole

    m_t, s_t, level_t = path(t)
    m_s, s_s, level_s = path(to)
    start = on_flow(x_t, *diffusion.alpha_sigma(torch.tensor([t]), x_t))
    return (start - (m_s + s_s / s_t * (start - m_t))) / (level_t - level_s)


def noise(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("t", "to"), [(800, 600), (400, 200), (200, None), (900, None)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_sub_steps_converge_to_the_exact_chord(prediction_type, t, to):
    diffusion = Diffusion(prediction_type)
    net, x_t = DATA.network(diffusion), noise()
    wanted = exact(diffusion, x_t, t, to)
    errors = [
        float((chord_velocity(net, diffusion, x_t, float(t), to, count) - wanted).abs().max())
        for count in (1, 8, 64, 200)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.02 and errors[3] < 0.25 * errors[1]


def test_one_step_of_a_flow_is_its_own_velocity():
    diffusion, x_t = Diffusion("flow_prediction"), noise()
    net = DATA.network(diffusion)
    for t, to in ((1000.0, 900.0), (900.0, 750.0), (500.0, None)):
        found = chord_velocity(net, diffusion, x_t, t, to, 1)
        torch.testing.assert_close(found, net(x_t, torch.full((3,), t)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("to", [200, None])
def test_both_families_agree_at_matched_noise_levels(to):
    """The same field, one step from and to the same signal-to-noise ratios."""
    ddpm, flow = Diffusion("epsilon"), Diffusion("flow_prediction")
    x_t = noise()
    now = torch.tensor([600])
    level, then = (None if t is None else 1000 * float(ddpm.noise_level(torch.tensor([t]))) for t in (600, to))
    there = on_flow(x_t, *ddpm.alpha_sigma(now, x_t))
    one = chord_velocity(DATA.network(ddpm), ddpm, x_t, 600.0, to, 1)
    other = chord_velocity(DATA.network(flow), flow, there, level, then, 1)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    fine = [
        chord_velocity(DATA.network(d), d, x, t, s, 300)
        for d, x, t, s in ((ddpm, x_t, 600.0, to), (flow, there, level, then))
    ]
    torch.testing.assert_close(*fine, rtol=0, atol=0.02)


def test_sub_steps_are_even_and_whole_ones_never_repeat():
    assert substeps(1000.0, 900.0, 4, False) == [1000.0, 975.0, 950.0, 925.0]
    assert substeps(500.0, None, 2, False) == [500.0, 250.0]
    for t in (1, 2, 7, 250, 999):
        for to in (None, *(end for end in (1, 3, 240) if end < t)):
            for count in (1, 3, 8, 300):
                found = substeps(float(t), to, count, True)
                end = 0 if to is None else to
                assert found[0] == t and found == sorted(set(found), reverse=True) and len(found) <= count
                assert all(value == int(value) and value > end for value in found[1:])
                assert len(found) == min(count, t - end) or count > (t - end) / 2


# -------------------------------------------------------------------- whose


def config_of(**options) -> RunConfig:
    config = RunConfig()
    for name, value in options.items():
        setattr(config.few_step, name, value)
    return config


def test_the_nets_own_knowledge_is_its_guided_chord(family):
    source = family.source(knowledge_guidance=2.5)
    diffusion, piece = source.diffusion, family.piece([0, 1])
    plain = family.pipeline.transformer
    networks = Networks(source.pipeline.transformer, True, False, rank=4, alpha=8.0)
    knowledge = own_knowledge(config_of(knowledge_steps=3), source, networks)
    t, to = family.timesteps[1], family.timesteps[2]

    def guided(x: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        return predict(plain, x, now, piece.condition, piece.null, 2.5)[0]

    target = chord_velocity(guided, diffusion, piece.noise, t, to, 3)
    velocity = torch.zeros_like(target)
    loss, said = knowledge.loss(velocity, None, piece, piece.noise, t, to)
    torch.testing.assert_close(loss, target.square().mean((1, 2, 3)), rtol=1e-3, atol=1e-5)
    assert float(said["knowledge"]) == pytest.approx(float(loss.mean())) and knowledge.parameters() == []


def test_features_are_of_the_same_x_t(families):
    family = families["edgedit"]
    source, piece = family.source(), family.piece([0, 1])
    networks = Networks(source.pipeline.transformer, True, False, rank=4, alpha=8.0)
    knowledge = own_knowledge(config_of(knowledge_steps=1, feature_weight=0.5), source, networks)
    t = torch.full((2,), 600)
    with torch.no_grad():
        _, tokens = networks(REAL, piece.noise, t, piece.condition, features=True)
    velocity = torch.zeros_like(piece.noise)
    without, _ = knowledge.loss(velocity, None, piece, piece.noise, 600.0, 400.0)
    same, said = knowledge.loss(velocity, tokens, piece, piece.noise, 600.0, 400.0)
    torch.testing.assert_close(same, without)
    assert float(said["features"]) == pytest.approx(0, abs=1e-5)
    other, _ = knowledge.loss(velocity, tokens.flip(0), piece, piece.noise, 600.0, 400.0)
    assert (other > without).all()


@pytest.mark.parametrize("few", [True, False])
def test_a_text_teacher_of_ours_is_asked_as_it_samples(families, few, tmp_path):
    """One that needs few steps itself: once, without guidance; another one: guided as its own pipeline is."""
    own = {"default_steps": 2, "default_guidance_scale": 1.0, "few_step_timesteps": [1000.0, 500.0]} if few else {}
    teacher = with_components(flow_pipelines.randomise(flow_pipelines.elastic(vae=False, seed=5), 5), **own)
    teacher.save_pretrained(tmp_path / "teacher")
    config = config_of(teacher=str(tmp_path / "teacher"), knowledge_steps=2)
    config.output_dir = str(tmp_path / "run")
    what, source = ["a cat", "a longer prompt"], families["elastic"].source(knowledge_guidance=7.0)
    conditions = Conditions(source, SimpleNamespace(captions=what, shapes=[(1, 8, 8)]))
    knowledge = given_knowledge(config, Accelerator(cpu=True), source, conditions)
    piece = families["elastic"].piece([0, 1])
    with torch.no_grad():
        texts = text_table(teacher, what, tmp_path / "texts")
        both, guidance = Conditions.of_texts(texts, piece.images, piece.noise.device), 1.0 if few else 4.0
        assert teacher.config.default_guidance_scale == guidance
        target = chord_velocity(
            lambda x, t: predict(teacher.transformer, x, t, *both, guidance)[0],
            source.diffusion,
            *(piece.noise, 900.0, 750.0, 1 if few else 2),
        )
        loss, _ = knowledge.loss(torch.zeros_like(target), None, piece, piece.noise, 900.0, 750.0)
    torch.testing.assert_close(loss, target.square().mean((1, 2, 3)), rtol=1e-3, atol=1e-4)


def test_an_adapter_is_put_on_its_teacher(families, tmp_path):
    """The same as the teacher that it is fused into; one that does not fit is named."""
    teacher = flow_pipelines.randomise(flow_pipelines.elastic(vae=False, seed=5), 5)
    teacher.save_pretrained(tmp_path / "teacher")
    model = teacher.transformer
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "few")
    layers = get_peft_model_state_dict(model, adapter_name="few")
    type(teacher).save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
    model.fuse_lora()
    model.unload_lora()
    teacher.save_pretrained(tmp_path / "fused")
    what, source = ["a cat", "a dog"], families["elastic"].source()
    conditions = Conditions(source, SimpleNamespace(captions=what, shapes=[(1, 8, 8)]))
    piece, found = families["elastic"].piece([0, 1]), []
    for name, lora in (("teacher", "lora"), ("fused", None), ("teacher", None), ("teacher", "nothing")):
        config = config_of(teacher=str(tmp_path / name), teacher_lora=lora and str(tmp_path / lora), knowledge_steps=1)
        config.few_step.knowledge_guidance = 4.0  # the pipeline's own, which a LoRA's need not be
        config.output_dir = str(tmp_path / "run")
        if lora == "nothing":
            with pytest.raises(EdgeDiTError, match="few_step.teacher_lora .*nothing cannot be put on ElasticDiTPipe"):
                given_knowledge(config, Accelerator(cpu=True), source, conditions)
            continue
        knowledge = given_knowledge(config, Accelerator(cpu=True), source, conditions)
        with torch.no_grad():
            loss, _ = knowledge.loss(torch.zeros_like(piece.noise), None, piece, piece.noise, 900.0, 750.0)
        found.append((knowledge.fingerprint, loss))
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)
    assert found[2][0] != found[0][0] and not torch.allclose(found[2][1], found[0][1], rtol=1e-2)


def test_nothing_is_given_by_default(families):
    assert given_knowledge(config_of(), None, families["elastic"].source(), None) is None


def test_a_target_is_never_learned_from(families):
    """The student's velocity has the gradient; the teacher, which may share its base, has none."""
    family = families["edgedit"]
    scale = torch.ones((), requires_grad=True)
    knowledge = Knowledge(lambda x, t, piece, features: (scale * x, None), Diffusion("epsilon"), 2)
    piece = family.piece([0, 1])
    velocity = torch.zeros_like(piece.noise, requires_grad=True)
    loss, _ = knowledge.loss(velocity, None, piece, piece.noise, 600.0, 400.0)
    loss.sum().backward()
    assert velocity.grad is not None and scale.grad is None


def test_the_objective_weighs_knowledge_by_noise(family):
    source = family.source()
    config = config_of(matching_weight=0.0, knowledge_last=0.25, knowledge_steps=1)
    networks = Networks(source.pipeline.transformer, True, False, rank=4, alpha=8.0)
    objective = Objective(networks, source, config.few_step, own_knowledge(config, source, networks), (), 0)
    piece = family.piece([0, 1])
    for k, share in ((0, 1.0), (3, 0.25)):
        with torch.no_grad():
            loss, _, said = objective.student_loss(piece, piece.noise, 5, k, family.widths[-1])
        torch.testing.assert_close(loss, share * said["knowledge"])
