"""What proxies are distilled from: the teacher's features of a step, a function of (seed, stream, step)."""

from __future__ import annotations

from ..data.batches import batch_indices
from ..diffusion import Diffusion, draws, drop_labels
from . import proxy_group
from .proxy_group import Features

CLASS_DROPOUT = 0.1  # features are distilled with and without a class, as guidance will need both


TRAIN_STREAM, CALIBRATION_STREAM, TEST_STREAM = 0, 2, 3


def features_at(
    teacher, dataset, rows: int, seed: int, step: int, stream: int, device, precision: str, depth: int
) -> Features:
    """Teacher features of the images and noise of a step: functions of (seed, stream, step), whatever the rank or
    group.
    """
    batch = dataset.batch(batch_indices(len(dataset), rows, seed + stream, step))
    drawn = draws(seed, step, range(rows), batch["images"].shape[1:], stream=stream)
    diffusion, classes = Diffusion.for_config(teacher.config), teacher.config.num_classes
    t = diffusion.timesteps(drawn.time)
    labels = drop_labels(batch["labels"], drawn.drop, CLASS_DROPOUT, classes).to(device) if classes else None
    noisy = diffusion.noisy(batch["images"], drawn.noise, t)
    return proxy_group.teacher_features(teacher, noisy.to(device), t.to(device), labels, depth, precision)
