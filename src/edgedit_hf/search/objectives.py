"""What a search may minimise besides latency, all of it before any tuning: the Fréchet distance of an assembled
student, its losses on held-out images, or the summed loss of its proxies.

`training/rank_objectives.py` measures which of them foretells the quality after tuning.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from ..data.batches import batch_indices
from ..data.datasets import ImageDataset
from ..data.latents import encode
from ..data.loading import load_run_images
from ..diffusion import Diffusion, draws
from ..distill.output_loss import output_loss
from ..distill.proxy_bank import ProxyBank
from ..errors import EdgeDiTError
from ..genotype import Genotype
from ..metrics.distances import frechet_distance, frechet_standard_error
from ..metrics.reference import real_features
from ..models.transformer_edgedit import EdgeDiTTransformer2DModel
from ..pipelines.loading import with_transformer
from ..pipelines.pipeline_edgedit import EdgeDiTPipeline
from ..pipelines.sampling import generate
from ..run.config import RunConfig

HELD_OUT_STREAM = 5  # noise and timesteps that networks are judged on
BUCKETS = 5  # of timesteps, where a search minimises a loss
LOSSES = ("denoising", "output_error")
"""Of [`HeldOutLosses`]: mean squared distance of the output to what training asks for, and to the teacher's output."""


class Score(NamedTuple):
    """An objective's value, the smaller the better, and its standard error: how far other samples would move it."""

    value: float
    error: float = 0.0


class NonFiniteImages(EdgeDiTError):
    """A student's images are not finite: a search records it as failed and goes on."""


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

    def features(self, student: EdgeDiTTransformer2DModel, **sampling: Any) -> torch.Tensor:
        """Features `[n, D]` of a network's images; `sampling` takes the place of what they are sampled with."""
        device = next(self.pipeline.transformer.parameters()).device
        with self.autocast():
            images, _ = generate(with_transformer(self.pipeline, student.to(device)), **{**self.sampling, **sampling})
        if bad := int((~torch.isfinite(images).flatten(1).all(dim=1)).sum()):
            raise NonFiniteImages(f"{bad} of the student's {len(images)} images hold NaN or infinite values.")
        return self.extractor.features(images)

    def score(self, student: EdgeDiTTransformer2DModel, **sampling: Any) -> Score:
        """A network's distance, with its bootstrap standard error."""
        features = self.features(student, **sampling)
        error = frechet_standard_error(features, self.real_features)
        return Score(frechet_distance(features, self.real_features), error)

    def __call__(self, genotype: Genotype) -> float:
        """The distance; deterministic for a bank, a seed and a thread count."""
        return frechet_distance(self.features(self.bank.assemble(genotype)), self.real_features)


class HeldOutLosses:
    """Losses of a network on held-out images, by timestep bucket: [`LOSSES`].

    All networks see the same images, noise and timesteps. The buckets part the timesteps that training draws into equal
    shares, so that the mean over them is what training minimises (without a learned variance's part).

    Args:
        teacher: whose outputs are compared with.
        images: held out. vae: encodes them, where the denoiser works in latents.
        samples: images a bucket. buckets: how many.
        batch_size: images a forward. device: where networks are judged.
        autocast: the precision of the forwards.
    """

    def __init__(
        self,
        teacher: EdgeDiTTransformer2DModel,
        images: ImageDataset,
        vae: Any = None,
        *,
        samples: int,
        buckets: int,
        seed: int,
        batch_size: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.device, self.autocast = device, autocast
        self.diffusion, self.channels = Diffusion.for_config(teacher.config), teacher.config.in_channels
        edges = torch.arange(1, buckets) / buckets
        self.edges = [float(t) for t in self.diffusion.timesteps(edges)]  # timesteps between the buckets
        self.batches: list[list[tuple[torch.Tensor | None, ...]]] = []
        teacher.to(device).eval()
        for bucket in range(buckets):
            batch = images.batch(batch_indices(len(images), samples, seed + HELD_OUT_STREAM, bucket))
            parts = batch["images"].split(batch_size)
            x0 = torch.cat([part if vae is None else encode(vae, part.to(vae.device)).float().cpu() for part in parts])
            drawn = draws(seed, bucket, range(samples), x0.shape[1:], stream=HELD_OUT_STREAM)
            t = self.diffusion.timesteps((bucket + drawn.time) / buckets)
            noisy, target = self.diffusion.noisy(x0, drawn.noise, t), self.diffusion.target(x0, drawn.noise)
            labels = batch["labels"] if teacher.config.num_classes else None
            pieces = []
            for rows in torch.arange(samples).split(batch_size):
                inputs = [None if tensor is None else tensor[rows].to(device) for tensor in (noisy, t, labels)]
                pieces.append((*inputs, target[rows].to(device), self._output(teacher, *inputs)))
            self.batches.append(pieces)

    @torch.no_grad()
    def _output(self, network: EdgeDiTTransformer2DModel, *inputs: torch.Tensor | None) -> torch.Tensor:
        with self.autocast():
            return network(*inputs).sample

    @torch.no_grad()
    def __call__(self, network: EdgeDiTTransformer2DModel) -> dict[str, torch.Tensor]:
        """Every image's losses, `(buckets, samples)` each, by their names in [`LOSSES`]."""
        network = network.to(self.device).eval()
        found: dict[str, list[torch.Tensor]] = {name: [] for name in LOSSES}
        for pieces in self.batches:
            rows: dict[str, list[torch.Tensor]] = {name: [] for name in LOSSES}
            for *inputs, target, reference in pieces:
                output = self._output(network, *inputs)
                for name, other in zip(LOSSES, (target, reference)):
                    rows[name].append(output_loss(output, other, self.channels).double().cpu())
            for name in LOSSES:
                found[name].append(torch.cat(rows[name]))
        return {name: torch.stack(losses) for name, losses in found.items()}

    def scores(self, network: EdgeDiTTransformer2DModel) -> dict[str, tuple[Score, list[Score]]]:
        """Of each of [`LOSSES`] the mean over all timesteps, and that of every bucket, with standard errors."""
        found = {}
        for name, losses in self(network).items():
            found[name] = mean_of(losses), [mean_of(bucket[None]) for bucket in losses]
        return found


class StudentLoss:
    """One of [`LOSSES`] of a genotype's student as the objective of a search, in the place of [`StudentQuality`].

    The output error counts from the teacher's own denoising loss on, so that it is above 0 for the teacher too: it is
    what the student's denoising loss would be if no network predicted better than the teacher, with far less noise.
    As all networks see the same images and noise, standard errors are those of the distance to the teacher's loss.
    """

    def __init__(self, bank: ProxyBank, losses: HeldOutLosses, name: str) -> None:
        self.bank, self.losses, self.name = bank, losses, name
        self.teachers = losses(bank.teacher)["denoising"]

    def score(self, student: EdgeDiTTransformer2DModel) -> Score:
        """A network's loss, with its standard error."""
        found = self.losses(student)[self.name]
        above, error = mean_of(found - self.teachers if self.name == "denoising" else found)
        return Score(float(self.teachers.mean()) + above, error)

    def __call__(self, genotype: Genotype) -> float:
        """The loss; deterministic for a bank, a seed and a thread count."""
        return self.score(self.bank.assemble(genotype)).value


def mean_of(losses: torch.Tensor) -> Score:
    """Mean of `(buckets, samples)`, with its standard error: samples are drawn within buckets."""
    if losses.shape[1] == 1:
        return Score(float(losses.mean()))
    return Score(float(losses.mean()), float((losses.var(1) / losses.shape[1]).sum().sqrt()) / len(losses))


def search_objective(
    config: RunConfig,
    bank: ProxyBank,
    pipeline: EdgeDiTPipeline,
    images: ImageDataset,
    extractor: Any,
    accelerator: Any,
) -> StudentQuality | StudentLoss:
    """What a run's search minimises beside latency, `search.objective`; `extractor`: needed for a distance alone."""
    options = config.search
    if options.objective == "distance":
        return student_quality(config, bank, pipeline, images, extractor, accelerator)
    samples = max(1, options.samples // BUCKETS)
    losses = network_losses(config, bank.teacher, pipeline.vae, samples, BUCKETS, accelerator)
    return StudentLoss(bank, losses, options.objective)


def student_quality(
    config: RunConfig,
    bank: ProxyBank,
    pipeline: EdgeDiTPipeline,
    images: ImageDataset,
    extractor: Any,
    accelerator: Any,
) -> StudentQuality:
    """The distance of a bank's students as a run's search judges it."""
    return StudentQuality(
        bank,
        pipeline,
        extractor,
        real_features(extractor, images),
        samples=config.search.samples,
        steps=config.search.sampling_steps,
        guidance_scale=config.search.guidance_scale,
        **_how(config, accelerator),
    )


def network_losses(
    config: RunConfig, teacher: EdgeDiTTransformer2DModel, vae: Any, samples: int, buckets: int, accelerator: Any
) -> HeldOutLosses:
    """The losses of networks on a run's held-out images; `samples`: of every bucket."""
    sizes = {"samples": samples, "buckets": buckets, "device": accelerator.device}
    return HeldOutLosses(teacher, load_run_images(config, "validation"), vae, **sizes, **_how(config, accelerator))


def _how(config: RunConfig, accelerator: Any) -> dict[str, Any]:
    """How a run's networks are judged, by whichever objective."""
    return {
        "seed": config.seed,
        "batch_size": min(config.search.samples, config.evaluate.batch_size),
        "autocast": accelerator.autocast,
    }


def summed_proxy_loss(bank: ProxyBank, genotype: Genotype) -> float:
    """Sum of the held-out, normalised losses of the proxies that a genotype's student is assembled from."""
    if missing := bank.missing(genotype):
        raise EdgeDiTError(
            f"The bank {bank.folder} has no proxy {missing[0]!r}, whose loss is asked for; finish stage bank first."
        )
    own = set(map(bank.key, genotype.layers)) & bank.entries.keys()  # the teacher's own layers lose nothing
    return sum(float(bank.entries[key]["loss_after"]) for key in sorted(own))
