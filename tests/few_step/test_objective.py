"""Losses of student and critic on tiny real nets: who has gradients, what the noise depends on, that pieces add up."""

import pytest
import torch
from accelerate import Accelerator

from edgedit_hf.few_step.knowledge import own_knowledge
from edgedit_hf.few_step.losses import guidance_gradient, matching_gradient
from edgedit_hf.few_step.networks import CRITIC, REAL, STUDENT, Networks
from edgedit_hf.few_step.objective import CRITIC_STREAM, GUIDANCE_STREAM, MATCHING_STREAM, Objective
from edgedit_hf.few_step.schedule import walk
from edgedit_hf.run.config import RunConfig

MOMENTS = torch.tensor([-0.4]), torch.tensor([0.75])


def objective_of(family, disturb, shared=True, guidance=1.0, seed=0, **options) -> Objective:
    """With networks that already differ."""
    config = RunConfig()
    for name, value in {"knowledge_steps": 2, **options}.items():
        setattr(config.few_step, name, value)
    source = family.source(real_guidance=guidance)
    networks = Networks(source.pipeline.transformer, shared, True, rank=4, alpha=8.0)
    for number, role in enumerate((STUDENT, CRITIC)):
        disturb([p for _, p in networks.trained(role)], number, 0.05)
    knowledge = own_knowledge(config, source, networks) if config.few_step.knowledge_weight else None
    return Objective(networks, source, config.few_step, knowledge, MOMENTS, seed)


def gradients(networks: Networks) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in networks.named_parameters() if p.grad is not None}


def learners(networks: Networks, role: str) -> set[str]:
    return {name for name, _ in networks.trained(role)}


@pytest.mark.parametrize(("shared", "guidance"), [(True, 3.0), (False, 1.0)], ids=["adapters", "full"])
def test_each_loss_teaches_its_own_net(family, disturb, shared, guidance):
    objective = objective_of(family, disturb, shared, guidance, moments_weight=0.5)
    networks, piece = objective.networks, family.piece([0, 1])
    assert objective.decoupled == (guidance > 1)
    for width in {family.widths[0], family.widths[-1]}:
        x_t = objective.student_input(piece, 3, 2, width)
        loss, x0, said = objective.student_loss(piece, x_t, 3, 2, width)
        assert loss.isfinite() and not x0.requires_grad and not x_t.requires_grad
        assert {"knowledge", "matching", "moments", "gap", "cosine"} <= said.keys()
        assert all(torch.as_tensor(value).isfinite() for value in said.values())
        loss.backward()
        found = gradients(networks)
        assert found and found.keys() <= learners(networks, STUDENT) and any(g.any() for g in found.values())
        networks.zero_grad()
        torch.testing.assert_close(objective.sample(piece, x_t, 2, width), x0)
        loss = objective.critic_loss(piece, x0, 3, width)
        loss.backward()
        found = gradients(networks)
        assert loss.isfinite() and found and found.keys() <= learners(networks, CRITIC)
        networks.zero_grad()


def test_pieces_add_up_to_the_batch(family, disturb):
    objective = objective_of(family, disturb, guidance=3.0, moments_weight=0.5)
    networks, width = objective.networks, family.widths[0]
    found = []
    for split in ([[0, 1, 2, 3]], [[0, 1], [2, 3]]):
        pieces = [family.piece(rows) for rows in split]
        whole = objective.moments(pieces, 5, 1, width, Accelerator(cpu=True))
        assert (whole is None) == (len(pieces) == 1)
        for piece in pieces:
            x_t = objective.student_input(piece, 5, 1, width)
            loss, x0, _ = objective.student_loss(piece, x_t, 5, 1, width, whole)
            (loss / len(pieces)).backward()
            (objective.critic_loss(piece, x0, 5, width) / len(pieces)).backward()
        found.append(gradients(networks))
        networks.zero_grad()
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_noise_depends_on_seed_step_and_row_alone(families, disturb):
    family = families["edgedit"]
    objective = objective_of(family, disturb, sampler="sde")

    def said(rows: list[int], step: int, at: int, seed: int = 0) -> torch.Tensor:
        """x_t, x0, the matching gradient of row `at`, and the critic's noisy input's loss."""
        objective.seed, piece = seed, family.piece(rows)
        x_t = objective.student_input(piece, step, 2, family.widths[-1])
        x0 = objective.sample(piece, x_t, 2, family.widths[-1])
        gradient, _ = objective.matching(piece, x0, step, 2, family.widths[-1])
        return torch.stack([part[at] for part in (x_t, x0, gradient)])

    one = said([0, 1, 2, 3], 4, 2)
    torch.testing.assert_close(said([2, 3], 4, 0), one, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(said([2], 4, 0), one, rtol=1e-3, atol=1e-3)
    assert torch.equal(said([0, 1, 2, 3], 4, 2), one)
    for other in (said([0, 1, 2, 3], 5, 2), said([0, 1, 2, 3], 4, 2, seed=1)):
        assert ((other - one).abs().mean((1, 2, 3)) > 1e-3).all()


def test_the_terms_have_noise_of_their_own(family, disturb):
    piece = family.piece([0, 1])
    drawn = [piece.draws(0, 3, stream) for stream in (MATCHING_STREAM, GUIDANCE_STREAM, CRITIC_STREAM, 40, 41)]
    noises = [piece.noise, *(one.noise for one in drawn)]
    for i, one in enumerate(noises):
        for other in noises[:i]:
            assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].abs() < 0.5


@pytest.mark.parametrize("sampler", ["ode", "sde"])
@torch.no_grad()
def test_the_students_input_is_its_own_way(families, disturb, sampler):
    family = families["edgedit"]
    objective = objective_of(family, disturb, sampler=sampler)
    piece, width = family.piece([0, 1]), family.widths[0]

    def output_of(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return objective.networks(STUDENT, x, t, piece.condition, subnet=width)[0]

    def fresh(index: int) -> torch.Tensor:
        return piece.draws(0, 9, 40 + index).noise

    for k in range(4):
        noisy = None if sampler == "ode" else fresh
        wanted = walk(output_of, objective.diffusion, piece.noise, family.timesteps, k, noisy)
        assert torch.equal(objective.student_input(piece, 9, k, width), wanted)
    assert torch.equal(objective.student_input(piece, 9, 0, width), piece.noise)


@torch.no_grad()
def test_the_gradient_is_made_of_these_parts(family, disturb):
    """The decoupled form by hand: matching unguided, guidance at noise of its own."""
    objective = objective_of(family, disturb, guidance=3.0)
    piece, width, diffusion = family.piece([0, 1]), family.widths[-1], objective.diffusion
    x0 = 0.5 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found, said = objective.matching(piece, x0, 4, 2, width)
    clean = {}
    for stream, most in ((MATCHING_STREAM, family.timesteps[0]), (GUIDANCE_STREAM, family.timesteps[2])):
        drawn = piece.draws(0, 4, stream)
        t = objective._timesteps(drawn.time, most)
        noisy = diffusion.noisy(x0, drawn.noise, t)
        for role, condition in ((REAL, piece.condition), (REAL, piece.null), (CRITIC, piece.condition)):
            output, _ = objective.networks(role, noisy, t, condition, subnet=width)
            clean[stream, role, condition is piece.null] = diffusion.predict_x0(output, noisy, t)
    wanted = matching_gradient(x0, clean[MATCHING_STREAM, REAL, False], clean[MATCHING_STREAM, CRITIC, False], 0.01)
    wanted += guidance_gradient(x0, clean[GUIDANCE_STREAM, REAL, False], clean[GUIDANCE_STREAM, REAL, True], 3.0, 0.01)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert 0 < said["gap"] and -1 <= said["cosine"] <= 1


@torch.no_grad()
def test_guidance_one_is_the_plain_form(families, disturb):
    family = families["edgedit"]
    piece = family.piece([0, 1])
    x0 = 0.5 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    plain, decoupled = (
        objective_of(family, disturb, decoupled=decoupled).matching(piece, x0, 4, 2, family.widths[-1])[0]
        for decoupled in (False, True)
    )
    assert torch.equal(plain, decoupled)
    coupled = objective_of(family, disturb, guidance=3.0, decoupled=False)
    assert not coupled.decoupled
    assert not torch.equal(coupled.matching(piece, x0, 4, 2, family.widths[-1])[0], plain)


def test_the_guidance_terms_noise_is_never_above_the_students(family, disturb):
    objective = objective_of(family, disturb, guidance=3.0)
    u = torch.cat([torch.linspace(1e-6, 1 - 1e-6, 1001), torch.rand(2000, generator=torch.Generator().manual_seed(0))])
    top = family.timesteps[0]
    for most in [*family.timesteps, 10.0]:
        t = objective._timesteps(u, most)
        assert (t <= most).all() and (t >= min(20, most)).all()
        assert most == 10 or t.float().std() > 0.15 * most
        if family.name == "edgedit":
            assert t.dtype == torch.int64
    t = objective._timesteps(u, top)
    assert t.max() >= 0.95 * top and t.max() <= 980 and t.min() < 30
    if family.name == "elastic":  # uniform before the shift of 3
        assert float(objective._timesteps(torch.tensor([0.5]), 1000.0)) == pytest.approx(750.0, rel=1e-4)
        assert float(objective._timesteps(torch.tensor([0.5]), 750.0)) == pytest.approx(500.0, rel=1e-4)
