"""The distance of a student's prediction to its teacher's."""

import pytest
import torch

from edgedit_hf.distill.output_loss import output_loss


def test_it_is_the_mean_squared_distance_of_each_sample():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(5, 3, 4, 4, generator=generator), torch.randn(5, 3, 4, 4, generator=generator)
    expected = torch.stack([((a - b) ** 2).mean() for a, b in zip(student, teacher)])
    torch.testing.assert_close(output_loss(student, teacher, 3), expected)
    assert not output_loss(teacher, teacher, 3).any()


def test_a_learned_variance_is_left_alone():
    student = torch.randn(2, 6, 4, 4, requires_grad=True)
    teacher = torch.randn(2, 6, 4, 4)
    (gradient,) = torch.autograd.grad(output_loss(student, teacher, 3).sum(), student)
    assert gradient[:, :3].abs().amin() > 0 and not gradient[:, 3:].any()
    changed = torch.cat([teacher[:, :3], teacher[:, 3:] + 7], dim=1)
    assert torch.equal(output_loss(student, changed, 3), output_loss(student, teacher, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_give_a_single_precision_loss(dtype):
    output = torch.randn(2, 3, 4, 4)
    loss = output_loss(output.to(dtype), output.to(dtype) + 1, 3)
    assert loss.dtype == torch.float32 and loss.shape == (2,)
    torch.testing.assert_close(loss, torch.ones(2), rtol=0.02, atol=0)
