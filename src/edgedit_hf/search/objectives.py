"""What the search minimises besides latency: the Fréchet distance of an assembled, not yet tuned student."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from ..distill.proxy_bank import ProxyBank
from ..genotype import Genotype
from ..metrics.distances import frechet_distance
from ..pipelines.loading import with_transformer
from ..pipelines.pipeline_edgedit import EdgeDiTPipeline
from ..pipelines.sampling import generate


class StudentQuality:
    """Fréchet distance between real features and those of images that a genotype's student generates.

    All genotypes are judged on the same noise and classes, so differences between them are theirs.

    Args:
        bank: assembles the students.
        pipeline: the teacher's pipeline; its scheduler and VAE generate.
        extractor: `.features(images) -> [n, D]`.
        real_features: `[N, D]`.
        samples, steps, guidance_scale, seed, batch_size: of the generated images, made where the pipeline's transformer
            is.
        autocast: the precision that images are generated in, e.g. `accelerator.autocast`.
    """

    def __init__(
        self,
        bank: ProxyBank,
        pipeline: EdgeDiTPipeline,
        extractor,
        real_features: torch.Tensor,
        *,
        samples: int,
        steps: int,
        guidance_scale: float,
        seed: int,
        batch_size: int = 250,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.bank = bank
        self.pipeline = pipeline
        self.extractor = extractor
        self.real_features = real_features
        self.sampling = {
            "num_images": samples,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "seed": seed,
            "batch_size": batch_size,
        }
        self.autocast = autocast

    def __call__(self, genotype: Genotype) -> float:
        """The distance; deterministic for a bank, a seed and a thread count."""
        device = next(self.pipeline.transformer.parameters()).device
        student = with_transformer(self.pipeline, self.bank.assemble(genotype).to(device))
        with self.autocast():
            images, _ = generate(student, **self.sampling)
        return frechet_distance(self.extractor.features(images), self.real_features)
