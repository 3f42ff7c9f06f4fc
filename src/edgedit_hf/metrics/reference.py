"""What models are judged by: a feature extractor trained on the data, the real images' features, an independent
classifier. Not a stage of its own: search, few-step distillation and evaluation call it, and the extractor is trained
once a run (<output_dir>/extractor).
"""

import os
from pathlib import Path
from typing import Any

import torch

from ..data.datasets import ImageDataset
from ..data.loading import load_run_images
from ..errors import EdgeDiTError
from ..files import atomic_write_json
from ..run.comparison import first_difference
from ..run.config import RunConfig
from .distances import RunningMoments, frechet_distance, frechet_distance_from_moments, frechet_standard_error
from .extractors import (
    Extractor,
    FeatureExtractor,
    train_classifier,
    train_independent_classifier,
)
from .networks import InceptionExtractor

REAL_IMAGES = 50_000  # more add nothing to the distance's precision at the sample counts used
CHUNK = 1000


def extractor_folder(run_dir: str | os.PathLike) -> Path:
    """Where a run has its extractor; earlier versions kept it in `evaluate`."""
    earlier = Path(run_dir, "evaluate", "extractor")
    return earlier if earlier.is_dir() else Path(run_dir, "extractor")


def load_extractor(config: RunConfig, images: ImageDataset, device: torch.device, held_out: ImageDataset | None = None):
    """The run's extractor, trained now if it has none; `device`: where Inception runs; `held_out`: default the run's
    own.
    """
    folder = extractor_folder(config.output_dir)
    if config.evaluate.extractor == "inception":
        return InceptionExtractor(device)
    steps = config.evaluate.extractor_steps
    asked = {"data": images.fingerprint, "seed": config.seed, "evaluate.extractor_steps": steps}
    if folder.exists():
        extractor = FeatureExtractor.load(folder)
        difference = None if extractor.made_from is None else first_difference(extractor.made_from, asked)
        if difference is not None:
            name, before, now = difference
            raise EdgeDiTError(
                f"{folder} was trained with {name} = {before!r}, but now {name} = {now!r} is asked for. Use the old "
                f"value, another output_dir, or delete {folder} and the stages that used it."
            )
        return extractor
    pretext = "labels" if images.num_classes else "rotation"
    held_out = held_out or load_run_images(config, "validation")
    extractor = train_classifier(images, config.seed, steps, pretext, validation=held_out)
    extractor.made_from = asked
    extractor.save(folder)
    return extractor


def real_features(extractor, images: ImageDataset) -> torch.Tensor:
    """Features `[N, D]` of the images, of many so many of all kinds, decoded some at a time."""
    images = images.at_most(REAL_IMAGES)
    pieces = [range(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)]
    return torch.cat([extractor.features(images.batch(piece)["images"]) for piece in pieces])


def judged_by(extractor: Extractor, images: ImageDataset, count: int) -> dict[str, Any]:
    """The parts of a [`stamp.Stamp`] that a run's stages share: extractor, reference, number of images, no rounding.

    Args:
        count: generated images.
    """
    return {
        "extractor": extractor.name,
        "extractor_hash": extractor.hash,
        "reference": images.fingerprint,
        "reference_count": min(len(images), REAL_IMAGES),
        "count": count,
        "rounding": "bytes" if extractor.name == "inception" else "none",
    }


def judged_distance(metric: str, features: torch.Tensor, real: torch.Tensor) -> dict[str, Any]:
    """The Fréchet distance of a model's features `[N, D]` to the real ones `[M, D]`, as a model's file has it:
    `metrics`, `standard_errors` (of a bootstrap over the generated images) and `notes` (too few images for so many
    features, features that do not vary). N, M ≥ 2.
    """
    ours, theirs = RunningMoments().update(features), RunningMoments().update(real)
    reference = theirs.mean, theirs.covariance
    return {
        "metrics": {metric: frechet_distance_from_moments(ours.mean, ours.covariance, *reference)},
        "standard_errors": {metric: frechet_standard_error(features, reference)},
        "notes": ours.notes("generated images"),
    }


def describe_reference(
    config: RunConfig, images: ImageDataset, extractor, real: torch.Tensor, held_out: ImageDataset | None = None
):
    """Write `evaluate/reference.json` (accuracies, the distance of held-out real images); returns the independent
    classifier.
    """
    held_out = held_out or load_run_images(config, "validation")
    others = real_features(extractor, held_out)
    classifier = train_independent_classifier(images, validation=held_out) if images.num_classes else None
    atomic_write_json(
        config.folder("evaluate", "reference.json"),
        {
            "extractor": extractor.name,
            "extractor_hash": extractor.hash,
            "data": images.fingerprint,
            "extractor_accuracy": getattr(extractor, "accuracy", None),
            "classifier": None if classifier is None else f"{classifier.name} on pixels",
            "classifier_accuracy": None if classifier is None else classifier.accuracy,
            "real_floor": frechet_distance(others, real),
            "real_floor_counts": [len(others), len(real)],
            "count": config.evaluate.samples,
            "notes": [
                *RunningMoments().update(real).notes("real images"),
                *RunningMoments().update(others).notes("held-out real images, of the distance between real images"),
            ],
        },
    )
    return classifier
