"""Knowledge of a large flow teacher: losses on its output and last layer, weighed against the data by timestep.

After SnapGen++ (arXiv:2601.08303, eq. 6-8) and the timestep-aware scaling of SnapGen (arXiv:2412.09619). Teacher and
student see the same x_t and t in the same latent space; σ = t / 1000.

Shapes: per-sample losses and σ `(B,)`; velocities `(B, C, H, W)`; last-layer tokens `(B, N, D)` in raster order of an h
× w grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import EdgeDiTError


def data_weight(sigma: torch.Tensor) -> torch.Tensor:
    """a_t of SnapGen: the density of a logit-normal(0, 1) variable at σ over its maximum, which is at ½: 1 in the
    middle, 0 at both ends.

    exp(−logit(σ)² / 2) / (4 σ (1 − σ)).
    """
    sigma = sigma.double().clamp(1e-9, 1 - 1e-9)
    return (torch.exp(-torch.logit(sigma).square() / 2) / (4 * sigma * (1 - sigma))).float()


def timestep_aware_scale(task: torch.Tensor, kd: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """SnapGen's S per sample: a_t·L_task + (1 − a_t)·(|L_task| / |L_kd|)·L_kd.

    At middling noise the data leads, at both ends the teacher. The ratio of magnitudes carries no gradient;
    where L_kd is 0 there is nothing to learn from the teacher and its term is 0.
    """
    a = data_weight(sigma).to(task.device)
    scale, distance = task.detach().abs(), kd.detach().abs()
    some = distance > 0
    ratio = torch.where(
        some, scale / torch.where(some, distance, torch.ones_like(distance)), torch.zeros_like(distance)
    )
    return a * task + (1 - a) * ratio * kd


def feature_distance(projected: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Per-sample mean squared distance of the last layers' tokens (eq. 7): ‖LN(f_teacher) − φ(f_student)‖² / (N·D).

    The teacher's tokens are normalised as its own output head does first (layer norm without affine parameters), so
    that 1 is the distance of predicting zero for every teacher: last layers differ by orders of magnitude in scale, and
    the loss has no other weight in eq. 8.

    Args:
        projected: φ(f_student), from [`FeatureProjector`]. teacher: f_teacher; both `(B, N, D)`.
    """
    if projected.shape != teacher.shape:
        raise EdgeDiTError(
            f"The projected features have shape {tuple(projected.shape)}, the teacher's {tuple(teacher.shape)}; they "
            "must agree."
        )
    target = F.layer_norm(teacher.detach().float(), teacher.shape[-1:])
    return (projected.float() - target).square().flatten(1).mean(1)


def knowledge_loss(
    task: torch.Tensor,
    sigma: torch.Tensor,
    output: torch.Tensor,
    feature: torch.Tensor | None = None,
    output_weight: float = 1.0,
    feature_weight: float = 1.0,
) -> torch.Tensor:
    """Total loss per sample (eq. 8), read as S(L_diff, L_out) + L_feat; the brackets are lost in the source.

    `output_weight` w puts L_diff + w·(S(L_diff, L_out) − L_diff) in place of S: 0 learns from data alone, 1 is the
    paper. `feature_weight` multiplies L_feat; 1 is the paper.

    Args:
        task: L_diff, the flow loss. output: L_out, ‖v_teacher − v_student‖² (eq. 6; [`output_loss`]). feature: L_feat
            or `None`.
    """
    total = task + output_weight * (timestep_aware_scale(task, output, sigma) - task)
    return total if feature is None else total + feature_weight * feature


def grid_of(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Token grid h × w of latents `height` × `width` cut into `tokens` square patches.

    Raises:
        EdgeDiTError: no such patch size exists.
    """
    for patch in range(1, min(height, width) + 1):
        if height % patch == width % patch == 0 and (height // patch) * (width // patch) == tokens:
            return height // patch, width // patch
    raise EdgeDiTError(
        f"No square patches cut latents of {height} × {width} into {tokens} tokens; both networks must take one size "
        "of latents."
    )


class FeatureProjector(torch.nn.Module):
    """φ of eq. 7: the student's tokens brought to the teacher's grid, then one linear layer to its width.

    A finer grid is averaged down to the teacher's, a coarser one interpolated (bilinear). The linear layer stays in
    float32.

    Args:
        student_dim, teacher_dim: widths D of the last layers.
    """

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(student_dim, teacher_dim)

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int], teacher_grid: tuple[int, int]) -> torch.Tensor:
        """`(B, h·w, student_dim)` on `grid` → `(B, H·W, teacher_dim)` on `teacher_grid`."""
        tokens = tokens.float()
        if grid != teacher_grid:
            image = tokens.transpose(1, 2).unflatten(2, grid)
            finer = grid[0] > teacher_grid[0]
            image = (
                F.adaptive_avg_pool2d(image, teacher_grid)
                if finer
                else F.interpolate(image, teacher_grid, mode="bilinear")
            )
            tokens = image.flatten(2).transpose(1, 2)
        return self.linear(tokens)
