"""The losses of knowledge distillation in closed form."""

import math

import pytest
import torch
import torch.nn.functional as F

from edgedit_hf.elastic.knowledge_loss import (
    FeatureProjector,
    data_weight,
    feature_distance,
    grid_of,
    knowledge_loss,
    timestep_aware_scale,
)
from edgedit_hf.errors import EdgeDiTError


def test_data_weight_is_the_logit_normal_density_over_its_maximum():
    sigma = torch.linspace(0.001, 0.999, 999)
    density = torch.exp(-torch.logit(sigma).square() / 2) / (sigma * (1 - sigma) * math.sqrt(2 * math.pi))
    weight = data_weight(sigma)
    torch.testing.assert_close(weight, density / density.max(), rtol=1e-4, atol=1e-6)
    assert weight.argmax() == 499 and weight.max() == 1.0
    torch.testing.assert_close(weight, weight.flip(0), rtol=1e-3, atol=1e-6)
    assert data_weight(torch.tensor([0.0, 1.0])).max() < 1e-6
    # The density is that of sigmoid(z), z standard normal: where training draws its timesteps.
    assert density.mean().item() == pytest.approx(1.0, abs=0.01)


def test_the_middle_follows_the_data_and_the_ends_the_teacher():
    task, kd = torch.tensor([2.0, 2.0, 2.0], requires_grad=True), torch.tensor([0.5, 0.5, 0.5], requires_grad=True)
    loss = timestep_aware_scale(task, kd, torch.tensor([0.5, 0.0, 1.0]))
    # Both terms have the magnitude of the task's loss, so their sum is that magnitude everywhere.
    torch.testing.assert_close(loss, task)
    loss.sum().backward()
    torch.testing.assert_close(task.grad, torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(kd.grad, torch.tensor([0.0, 4.0, 4.0]))  # the ratio 2 / 0.5, itself without a gradient


def test_equal_magnitudes_are_an_interpolation():
    sigma = torch.tensor([0.1, 0.35, 0.8])
    task = torch.tensor([0.7, 0.7, 0.7], requires_grad=True)
    kd = task.detach().clone().requires_grad_()
    timestep_aware_scale(task, kd, sigma).sum().backward()
    torch.testing.assert_close(task.grad, data_weight(sigma))
    torch.testing.assert_close(kd.grad, 1 - data_weight(sigma))


def test_a_student_that_equals_the_teacher_learns_from_data_alone():
    student = torch.ones(2, 3, requires_grad=True)
    kd = (student - 1).square().mean(1)
    task = (student - 3).square().mean(1)
    sigma = torch.tensor([0.5, 0.2])
    loss = timestep_aware_scale(task, kd, sigma)
    loss.sum().backward()
    torch.testing.assert_close(loss, data_weight(sigma) * 4)
    torch.testing.assert_close(student.grad, data_weight(sigma)[:, None] * torch.full((2, 3), -4 / 3))


def test_total_is_equation_8():
    task, output, feature, sigma = (
        torch.tensor([1.0, 2.0]),
        torch.tensor([0.1, 0.3]),
        torch.tensor([5.0, 6.0]),
        torch.tensor([0.4, 0.9]),
    )
    scaled = timestep_aware_scale(task, output, sigma)
    torch.testing.assert_close(knowledge_loss(task, sigma, output, feature), scaled + feature)
    torch.testing.assert_close(knowledge_loss(task, sigma, output), scaled)
    torch.testing.assert_close(
        knowledge_loss(task, sigma, output, feature, output_weight=0.0, feature_weight=0.5), task + 0.5 * feature
    )


def test_feature_distance_is_that_to_normalised_tokens_whatever_their_scale():
    teacher = torch.randn(2, 5, 8) * 1000 + 30
    assert feature_distance(F.layer_norm(teacher, (8,)), teacher).max() < 1e-10
    torch.testing.assert_close(feature_distance(torch.zeros(2, 5, 8), teacher), torch.ones(2))
    torch.testing.assert_close(feature_distance(F.layer_norm(teacher, (8,)) + 2, teacher), torch.full((2,), 4.0))
    with pytest.raises(EdgeDiTError, match=r"\(2, 5, 7\).*\(2, 5, 8\)"):
        feature_distance(torch.zeros(2, 5, 7), teacher)


def test_grid_of_tokens():
    assert grid_of(32, 16, 8) == (8, 4) and grid_of(128, 16, 8) == (16, 8)
    with pytest.raises(EdgeDiTError, match="16 × 8 into 30 tokens"):
        grid_of(30, 16, 8)


def test_projector_brings_the_students_grid_to_the_teachers():
    projector = FeatureProjector(3, 5)
    tokens = torch.randn(2, 24, 3)
    torch.testing.assert_close(projector(tokens, (6, 4), (6, 4)), projector.linear(tokens))
    coarse = projector(tokens, (6, 4), (3, 2))
    average = tokens.view(2, 3, 2, 2, 2, 3).mean((2, 4)).reshape(2, 6, 3)
    torch.testing.assert_close(coarse, projector.linear(average))
    fine = projector(tokens, (6, 4), (12, 8)).view(2, 12, 8, 5)
    assert fine.shape == (2, 12, 8, 5)
    torch.testing.assert_close(fine[:, 0, 0], projector.linear(tokens[:, 0]))  # corners keep their values
    torch.testing.assert_close(fine[:, -1, -1], projector.linear(tokens[:, -1]))


def test_an_equal_projection_is_found_by_training():
    torch.manual_seed(0)
    student, mixing = torch.randn(4, 16, 6), torch.randn(6, 8)
    target = student @ mixing
    projector = FeatureProjector(6, 8)
    optimizer = torch.optim.Adam(projector.parameters(), lr=0.05)
    start = feature_distance(projector(student, (4, 4), (4, 4)), target).mean().item()
    for _ in range(100):
        loss = feature_distance(projector(student, (4, 4), (4, 4)), target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * start
