"""What proxies are distilled from: the teacher's features of a step, a function of (seed, stream, step)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..data.batches import batch_indices
from ..data.datasets import ImageDataset
from ..data.latents import LatentDataset
from ..diffusion import Diffusion, draws, drop_labels
from ..models.transformer_edgedit import EdgeDiTTransformer2DModel
from . import proxy_group
from .proxy_group import Features

TRAIN_STREAM, CALIBRATION_STREAM, TEST_STREAM = 0, 2, 3


def features_at(
    teacher,
    dataset,
    rows: int,
    class_dropout: float,
    seed: int,
    step: int,
    stream: int,
    device,
    precision: str,
    depth: int,
) -> Features:
    """Teacher features of the images and noise of a step: functions of (seed, stream, step), whatever the rank or
    group. A share `class_dropout` of them is without its class.
    """
    batch = dataset.batch(batch_indices(len(dataset), rows, seed + stream, step))
    drawn = draws(seed, step, range(rows), batch["images"].shape[1:], stream=stream)
    diffusion, classes = Diffusion.for_config(teacher.config), teacher.config.num_classes
    t = diffusion.timesteps(drawn.time)
    labels = drop_labels(batch["labels"], drawn.drop, class_dropout, classes).to(device) if classes else None
    noisy = diffusion.noisy(batch["images"], drawn.noise, t)
    return proxy_group.teacher_features(teacher, noisy.to(device), t.to(device), labels, depth, precision)


@dataclass(frozen=True)
class FeatureSource:
    """The images of a bank or a study as features of its teacher: of training steps, and of the fixed sets that starts
    are fitted to and judged by.

    Args:
        batch_size: images of a training step, and the most that go through the teacher together.
        fixed: images of each fixed set.
        class_dropout: share of them, and of a step's, that is without its class.
        precision: of the teacher's forward, "no" or "bf16".
    """

    teacher: EdgeDiTTransformer2DModel
    dataset: ImageDataset | LatentDataset
    batch_size: int
    fixed: int
    class_dropout: float
    seed: int
    device: torch.device
    precision: str = "no"

    def _at(self, rows: int, step: int, stream: int, depth: int) -> Features:
        drawn = rows, self.class_dropout, self.seed, step, stream
        return features_at(self.teacher, self.dataset, *drawn, self.device, self.precision, depth)

    def training(self, step: int, depth: int) -> Features:
        """Features of the first `depth` layers on a step's batch."""
        return self._at(self.batch_size, step, TRAIN_STREAM, depth)

    def _set(self, stream: int, depth: int) -> Iterator[Features]:
        rows = min(self.batch_size, self.fixed)
        return (self._at(rows, step, stream, depth) for step in range(-(-self.fixed // rows)))

    def calibration(self, depth: int) -> Iterator[Features]:
        """What starts are fitted to, a batch at a time."""
        return self._set(CALIBRATION_STREAM, depth)

    def held_out(self, depth: int) -> Iterator[Features]:
        """What proxies are judged by, a batch at a time."""
        return self._set(TEST_STREAM, depth)
