"""What images are compared in: the protocol of all extractors, a small classifier's features, and a classifier that is
independent of them. Networks of others stand in [`metrics.networks`].

Shapes: n images `[n, C, H, W]` in [-1, 1], 64 features. The classifier is trained on the run's own data, so a distance
in its features compares the models of one run: a "Fréchet distance (digits-cnn)", never an FID.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..data.batches import batch_indices
from ..data.datasets import ImageDataset
from ..data.images import stratified_split
from ..errors import EdgeDiTError
from ..files import atomic_folder, atomic_write_json, weights_hash
from ..records import Extractor as ExtractorRecord
from ..schema import read_record

WIDTH = 64  # features
MIN_SIDE = 8  # pixels
HELD_OUT = 0.1  # share of the images that the accuracy is measured on when no validation set is given
SVC_SIDE = 16  # the independent classifier sees at most 16x16 pixels …
SVC_IMAGES = 5000  # … of at most so many images: its training time grows with their square


class Extractor(Protocol):
    """What every extractor has.

    Beside it an extractor may have `head(features)`, logits `[n, classes]` of features, which the inception score
    takes; `features_and_spatial(images)`, which gives the features that sFID is computed in too; and `accuracy` on
    held-out real images.

    Attributes:
        name: what a metric calls it.
        hash: 16 hex digits of the SHA-256 over all that decides about the features.
        width: features of an image.
    """

    name: str
    hash: str
    width: int

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features `[n, width]` float32, on the CPU, of images `[n, C, H, W]` in [-1, 1]."""
        ...


def check_images(images: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless these are images of this shape (C, H, W), all finite."""
    if images.ndim != 4 or tuple(images.shape[1:]) != tuple(shape):
        raise EdgeDiTError(f"The images have shape {tuple(images.shape)}, but the extractor takes {('n', *shape)}.")
    if not torch.isfinite(images).all():
        bad = int((~torch.isfinite(images).flatten(1).all(1)).sum())
        raise EdgeDiTError(f"{bad} of {len(images)} images hold NaN or infinite values; find out what produced them.")


# ------------------------------------------------------------------ the small classifier


class _Classifier(nn.Module):
    """Convolutions, group norm and SiLU down to 4x4, a linear layer to 64 features, and one to the classes."""

    def __init__(self, channels: int, side: int, num_classes: int) -> None:
        super().__init__()
        stride = max(1, side // 32)  # large images come down to about 32 pixels in the first layer, which sees them all
        layers: list[nn.Module] = [nn.Conv2d(channels, 32, 2 * stride + 1, stride, padding=stride)]
        layers += [nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU()]
        width = 32
        for _ in range(max(1, round(math.log2(min(side, 32) / 4)))):
            layers += [nn.Conv2d(width, WIDTH, 3, stride=2, padding=1), nn.GroupNorm(8, WIDTH), nn.SiLU()]
            width = WIDTH
        layers += [nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(8, WIDTH), nn.SiLU()]
        layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * WIDTH, WIDTH), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))  # [n, classes]


class FeatureExtractor:
    """The penultimate layer of a small classifier; made by [`train_classifier`] or [`~FeatureExtractor.load`].

    Attributes:
        name: what a metric calls it, e.g. "digits-cnn".
        accuracy: on held-out real images, a fraction.
        shape: (C, H, W) of the images it takes.
        hash: of its weights.
        made_from: what it was trained with, plain values by name; `None`: it does not say.
    """

    made_from: dict[str, Any] | None = None
    width = WIDTH

    def __init__(self, model: nn.Module, name: str, accuracy: float, shape: tuple[int, int, int]) -> None:
        self._model = model.eval().requires_grad_(False)
        self.name = name
        self.accuracy = accuracy
        self.shape = tuple(shape)
        self.hash = weights_hash(model.state_dict())

    @torch.inference_mode()
    def features(self, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
        """Features `[n, 64]` float32 of images `[n, C, H, W]` in [-1, 1]; NaN or another shape is an error."""
        check_images(images, self.shape)
        return torch.cat([self._model.body(part.float()) for part in images.split(batch_size)])

    @torch.inference_mode()
    def head(self, features: torch.Tensor) -> torch.Tensor:
        """Logits `[n, classes]` float32, of the classes (or rotations) it was trained on, of features."""
        return self._model.head(features)

    def logits(self, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
        """Logits `[n, classes]` float32 of images, see [`~FeatureExtractor.head`]."""
        return self.head(self.features(images, batch_size))

    def save(self, folder: str | os.PathLike) -> None:
        """Write `model.safetensors` and `extractor.json`, replacing the folder in one step."""
        about = {"name": self.name, "accuracy": self.accuracy, "shape": list(self.shape), "hash": self.hash}
        with atomic_folder(folder) as aside:
            save_file(self._model.state_dict(), aside / "model.safetensors")
            about |= {"num_classes": self._model.head.out_features, "made_from": self.made_from}
            atomic_write_json(aside / "extractor.json", about)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> FeatureExtractor:
        """Read what [`~FeatureExtractor.save`] wrote; a damaged file raises [`EdgeDiTError`]."""
        folder = Path(folder)
        about = read_record(folder / "extractor.json", ExtractorRecord, "FeatureExtractor.save", "a feature extractor")
        try:
            channels, height, width = about["shape"]
            with torch.device("meta"):  # nothing of a size that the weights do not have
                model = _Classifier(channels, min(height, width), about["num_classes"])
            model.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
            extractor = cls(model, about["name"], about["accuracy"], about["shape"])
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise EdgeDiTError(
                f"The feature extractor {str(folder)!r} is damaged ({error}); delete it, the next run trains it anew."
            ) from error
        if extractor.hash != about["hash"]:
            raise EdgeDiTError(
                f"The feature extractor {str(folder)!r} has weights {extractor.hash}, but its description says "
                f"{about['hash']}; delete it, the next run trains it anew."
            )
        extractor.made_from = about.get("made_from")
        return extractor


def _distort(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn by up to 12°, scale by up to 10 % and shift by up to an eighth of the width, each image by its own
    amount.
    """
    angle, scale, dx, dy = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, scale = angle * math.pi / 15, 1 + scale / 10
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix = torch.stack([cos, -sin, dx / 4, sin, cos, dy / 4], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _rotations(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every image in its four orientations `[4n, C, H, H]`, and which one it is `[4n]`."""
    turned = [torch.rot90(images, turns, dims=(2, 3)) for turns in range(4)]
    return torch.cat(turned), torch.arange(4).repeat_interleave(len(images))


def _train_and_held_out(
    dataset: ImageDataset, validation: ImageDataset | None, seed: int
) -> tuple[ImageDataset, ImageDataset]:
    if validation is not None:
        return dataset, validation
    kept, held_out = stratified_split(dataset.labels.numpy(), HELD_OUT, seed)
    if len(held_out) == 0:
        raise EdgeDiTError(
            f"The {len(dataset)} images leave none to measure the accuracy on; a class needs at least 2."
        )
    return dataset.subset(kept), dataset.subset(held_out)


def check_classifiable(dataset: ImageDataset, pretext: str) -> None:
    """Raise unless [`train_classifier`] can be trained on the images."""
    _, height, width = dataset.shape
    if min(height, width) < MIN_SIDE:
        raise EdgeDiTError(
            f"The images are {height}x{width}; the classifier needs at least {MIN_SIDE}x{MIN_SIDE} pixels."
        )
    if pretext not in ("labels", "rotation"):
        raise EdgeDiTError(f"pretext is {pretext!r}; it must be 'labels' or 'rotation'.")
    if pretext == "labels" and dataset.num_classes < 2:
        raise EdgeDiTError(f"The images have {dataset.num_classes} classes; use pretext='rotation' without labels.")
    if pretext == "rotation" and height != width:
        raise EdgeDiTError(f"pretext='rotation' needs square images, these are {height}x{width}; set resolution.")


def train_classifier(
    dataset: ImageDataset,
    seed: int = 0,
    steps: int = 300,
    pretext: str = "labels",
    validation: ImageDataset | None = None,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
) -> FeatureExtractor:
    """Train the feature extractor on real images, on the CPU; the same seed and thread count give the same weights.

    Args:
        dataset: real images, at least 8x8.
        seed: of the weights, the order and the distortions.
        steps: of Adam, with a one-cycle learning rate.
        pretext: "labels", or "rotation" for unlabelled square images (which of four orientations; Gidaris et al. 2018).
        validation: images that the accuracy is measured on; default a tenth of the dataset, then not trained on.
        batch_size: images a step ("rotation" shows each in four orientations).
        learning_rate: peak.
    """
    check_classifiable(dataset, pretext)
    channels, height, width = dataset.shape
    train, held_out = _train_and_held_out(dataset, validation, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _Classifier(channels, min(height, width), dataset.num_classes if pretext == "labels" else 4)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    total = max(steps, 3)
    warm = max(0.1, 2 / total)  # a rise of less than two steps divides by zero
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=total, pct_start=warm)
    for step in range(steps):
        batch = train.batch(batch_indices(len(train), batch_size, seed, step))
        images, targets = batch["images"], batch["labels"]
        if pretext == "rotation":
            images, targets = _rotations(images)
        loss = F.cross_entropy(model(_distort(images, generator)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    name = f"{dataset.name}-cnn" if pretext == "labels" else f"{dataset.name}-rotation-cnn"
    extractor = FeatureExtractor(model, name, 0.0, dataset.shape)
    right = total = 0
    for start in range(0, len(held_out), 256):
        batch = held_out.batch(range(start, min(start + 256, len(held_out))))
        images, targets = (batch["images"], batch["labels"]) if pretext == "labels" else _rotations(batch["images"])
        right += int((extractor.logits(images).argmax(1) == targets).sum())
        total += len(targets)
    extractor.accuracy = right / total
    return extractor


# ------------------------------------------------------------------ the independent classifier


class IndependentClassifier:
    """A support vector machine on pixels, which shares nothing with the feature extractor.

    Attributes:
        accuracy: on held-out real images, a fraction.
    """

    name = "svc"

    def __init__(self, train: ImageDataset, held_out: ImageDataset) -> None:
        from sklearn.svm import SVC

        self.shape = train.shape
        batch = train.batch(range(len(train)))
        self._model = SVC(C=10.0, gamma="scale").fit(self._pixels(batch["images"]), batch["labels"].numpy())
        batch = held_out.batch(range(len(held_out)))
        self.accuracy = class_agreement(self, batch["images"], batch["labels"])

    def _pixels(self, images: torch.Tensor) -> np.ndarray:
        check_images(images, self.shape)
        size = [min(side, SVC_SIDE) for side in images.shape[-2:]]
        return F.interpolate(images.float(), size=size, mode="area").flatten(1).numpy()

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Classes `[n]` int64 of images `[n, C, H, W]` in [-1, 1]."""
        return torch.from_numpy(self._model.predict(self._pixels(images))).long()


def train_independent_classifier(
    dataset: ImageDataset, seed: int = 0, validation: ImageDataset | None = None
) -> IndependentClassifier:
    """Fit a classifier that judges whether generated images show their class.

    Args:
        dataset: labelled real images; at most 5,000 of them, drawn with the seed, are used.
        seed: of the draw, and of the held-out tenth when no validation set is given.
        validation: images that the accuracy is measured on.
    """
    if dataset.num_classes < 2:
        raise EdgeDiTError(f"The images have {dataset.num_classes} classes; agreement with labels needs at least 2.")
    train, held_out = _train_and_held_out(dataset, validation, seed)
    if len(train) > SVC_IMAGES:
        train = train.subset(batch_indices(len(train), SVC_IMAGES, seed, 0))
    if len(held_out) > SVC_IMAGES:
        held_out = held_out.subset(batch_indices(len(held_out), SVC_IMAGES, seed, 0))
    return IndependentClassifier(train, held_out)


def class_agreement(classifier: IndependentClassifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Fraction of the images `[n, C, H, W]` that the classifier gives the class they were made for, labels `[n]`."""
    if len(images) != len(labels) or len(images) == 0:
        raise EdgeDiTError(f"There are {len(images)} images and {len(labels)} labels; both must be equal and not 0.")
    return float((classifier.predict(images) == torch.as_tensor(labels).cpu()).double().mean())
