"""Distillation of a whole student from the teacher's output."""

from __future__ import annotations

import torch


def output_loss(student: torch.Tensor, teacher: torch.Tensor, channels: int) -> torch.Tensor:
    """Per-sample mean squared distance `(B,)` of the predictions (the first `channels` channels; a learned variance is
    left alone).

    Args:
        student, teacher: model outputs `(B, C or 2C, H, W)` for the same noisy input, timestep and label.
        channels: C.
    """
    return (student[:, :channels].float() - teacher[:, :channels].float()).pow(2).flatten(1).mean(1)
