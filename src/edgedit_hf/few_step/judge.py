"""Few-step samples while the student learns: their distance to the data, their moments, and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from ..data.latents import LatentDataset
from ..data.loading import load_run_captions, load_run_images
from ..diffusion import draws
from ..metrics.distances import frechet_distance, precision_recall
from ..metrics.reference import load_extractor, real_features
from ..pipelines.sampling import EVALUATION_STREAM
from ..run.config import RunConfig
from .diagnosis import Moments
from .networks import CRITIC, STUDENT
from .schedule import walk
from .source import Conditions, Source

MOMENT_IMAGES, STRIP = 2000, 10
JUDGE_SEED = 2**31
"""Added to the run's: the best student is not chosen on the images that it is then evaluated by."""

CRITIC_STEPS = 20
"""Steps that the critic is sampled with: it is a many-step net of what the student makes."""


@dataclass
class Judged:
    """What few-step samples are."""

    distance: float
    recall: float
    moments: Moments
    latents: torch.Tensor  # (n, C, H, W)


class Judge:
    """Distances of few-step samples, made by all processes together.

    Args:
        conditions: of the training set. judged: captions that samples are made of; `None`: classes in turn.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Any,
        source: Source,
        conditions: Conditions,
        judged: Conditions | None,
    ) -> None:
        self.options, self.seed, self.accelerator = config.few_step, config.seed + JUDGE_SEED, accelerator
        self.source, self.judged, self.conditions = source, judged, conditions
        held_out = None
        if judged is None:
            images = load_run_images(config)
        else:
            captioned = load_run_captions(config)
            images = load_run_images(config) if captioned.label_names else captioned.parts[0]
            held_out = None if captioned.label_names else load_run_captions(config, "validation").parts[0]
        with accelerator.main_process_first():  # one process trains it
            self.extractor = load_extractor(config, images, accelerator.device, held_out)
        self.real = real_features(self.extractor, images)
        self.shape = tuple(conditions.dataset.shape if judged is None else conditions.dataset.shapes[0])
        self.moments = Moments.of(self._data())

    def _data(self) -> torch.Tensor:
        dataset: Any = self.conditions.dataset
        parts = getattr(dataset, "parts", [dataset])
        some = parts[0]
        count = min(len(some), MOMENT_IMAGES)
        rows = [index * len(some) // count for index in range(count)]  # of everywhere: folders lie class by class
        images = some.batch(rows)["images"]
        return images.float() if isinstance(some, LatentDataset) else images

    @property
    def _most_rows(self) -> int:
        """Of a forward on a process: a micro-batch, as training has."""
        return max(1, self.options.batch_size // (self.accelerator.num_processes * self.options.gradient_accumulation))

    def _condition(self, rows: torch.Tensor) -> Any:
        device = self.accelerator.device
        if self.judged is not None and self.judged.texts is not None:
            return self.judged.of_texts(self.judged.texts, rows, device)[0]
        classes = self.source.pipeline.transformer.config.num_classes
        return self.conditions.of_labels(rows % max(classes, 1), device)[0]

    @torch.no_grad()
    def latents(
        self, networks: Any, width: str | None, count: int, role: str = STUDENT, steps: list[float] | None = None
    ) -> torch.Tensor:
        """What a role samples, `(count, C, H, W)`: image i of noise and condition i, whatever the number of processes.

        Args:
            steps: timesteps to go through; default the student's.
        """
        accelerator = self.accelerator
        world, rank = accelerator.num_processes, accelerator.process_index
        size = min(self._most_rows, -(-count // world))
        steps, found = steps or self.source.timesteps, []
        for start in range(0, count, size * world):
            mine = torch.arange(start + rank * size, start + (rank + 1) * size) % count  # every rank has as many
            x = draws(self.seed, 0, mine.tolist(), self.shape, stream=EVALUATION_STREAM).noise.to(accelerator.device)
            condition = self._condition(mine)

            def output_of(x: torch.Tensor, t: torch.Tensor, condition: Any = condition) -> torch.Tensor:
                with accelerator.autocast():
                    return networks(role, x, t, condition, subnet=width)[0]

            def fresh(index: int, mine: torch.Tensor = mine) -> torch.Tensor:
                noise = draws(self.seed, index + 1, mine.tolist(), self.shape, stream=EVALUATION_STREAM).noise
                return noise.to(accelerator.device)

            noisy = role == STUDENT and self.options.sampler == "sde"
            x = walk(output_of, self.source.diffusion, x, steps, len(steps), fresh if noisy else None)
            found.append(accelerator.gather(x).cpu())
        return torch.cat(found)[:count]

    def images(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as images in [-1, 1]."""
        vae = self.source.pipeline.vae
        device = self.accelerator.device
        if vae is not None:
            vae.to(device)
        decode = self.source.pipeline.decode
        pieces = [decode(piece.to(device)).cpu() * 2 - 1 for piece in latents.split(self._most_rows)]
        return torch.cat(pieces)

    def __call__(self, networks: Any, width: str | None) -> Judged | None:
        """What the student samples at a width; `None`: NaN or infinite values. The same on every process, as the main
        one's figures are taken.
        """
        latents = self.latents(networks, width, self.options.samples)
        if not latents.isfinite().all():
            return None
        figures = [0.0, 0.0]
        if self.accelerator.is_main_process:
            features = self.extractor.features(self.images(latents))
            figures = [frechet_distance(features, self.real), precision_recall(self.real, features)[1]]
        distance, recall = broadcast_object_list(figures)
        return Judged(distance, recall, Moments.of(latents), latents)

    def strips(self, networks: Any, width: str | None, latents: torch.Tensor, critic: bool) -> torch.Tensor:
        """Pictures `(rows · count, C, H, W)` in [-1, 1]: the student's samples, what its first step takes for them, and
        the critic's own samples of many steps. Ten of each.
        """
        first = self.source.timesteps[0]
        rows = [latents[:STRIP], self.latents(networks, width, STRIP, steps=[first])]
        if critic:
            many = [first * (1 - index / CRITIC_STEPS) for index in range(CRITIC_STEPS)]
            whole = self.source.diffusion.prediction_type == "epsilon"
            many = [float(round(t)) for t in many] if whole else many
            rows.append(self.latents(networks, width, STRIP, CRITIC, many))
        return self.images(torch.cat(rows))
