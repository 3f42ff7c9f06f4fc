"""What a few-step run starts from: the many-step pipeline, its data, and what a step sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..data.batches import caption_loader, step_loader
from ..data.loading import load_captioned_set, load_run_captions, load_training_set
from ..data.text_table import TextTable
from ..diffusion import Diffusion, draws, make_few_step_scheduler
from ..distill.teacher import check_fits_data
from ..elastic.supernet import load_text_table
from ..errors import EdgeDiTError
from ..metrics.prompt_following import judged_captions
from ..models.stored_weights import check_weights
from ..pipelines.loading import KINDS, load_pipeline, source_path, with_components
from ..run.config import RunConfig
from .checks import check_class_guidance, check_many_step, check_options, check_widths
from .networks import Condition, is_elastic
from .schedule import few_step_timesteps

START_STREAM, CHOICE_STREAM = 30, 31
"""Tell the noise that a step starts from, and what a step is about, from other draws (see `diffusion.draws`)."""


@dataclass
class Source:
    """A many-step pipeline that is to need few steps.

    Args:
        pipeline: of either family. timesteps: of the few-step student. widths: sub-networks that are distilled, the
            full net last; `[None]` for a net that has none.
        real_guidance, knowledge_guidance: of the real score, and of the many-step net as teacher.
    """

    pipeline: Any
    timesteps: list[float]
    widths: list[str | None]
    real_guidance: float
    knowledge_guidance: float

    @property
    def elastic(self) -> bool:
        """Whether it is the text-to-image family."""
        return is_elastic(self.pipeline.transformer)

    @property
    def diffusion(self) -> Diffusion:
        """The process of the net; a variance that it may have learned too is left alone."""
        return Diffusion("flow_prediction" if self.elastic else self.pipeline.transformer.config.prediction_type)

    @property
    def guided_channels(self) -> int | None:
        """How many channels guidance is for; `None`: all."""
        return self.pipeline.config.get("guidance_channels")

    def few_step_pipeline(self, transformer: Any, sampler: str) -> Any:
        """The pipeline of the distilled net, which knows its steps."""
        return with_components(
            self.pipeline,
            transformer=transformer,
            scheduler=make_few_step_scheduler(self.diffusion.prediction_type, stochastic=sampler == "sde"),
            default_steps=len(self.timesteps),
            default_guidance_scale=1.0,
            few_step_timesteps=self.timesteps,
        )


def load_source(config: RunConfig) -> Source:
    """The pipeline that `few_step.path` names, or the run's own.

    Raises:
        EdgeDiTError: there is none, or it cannot be distilled as the recipe says.
    """
    options = config.few_step
    path = source_path(config, "few_step.path", "distil")
    pipeline = load_pipeline(path, kind=KINDS)
    model = pipeline.transformer
    check_many_step(path, pipeline.config, model.config)
    check_weights(model, f"The pipeline {path}")
    elastic = is_elastic(model)
    check_options(options, elastic)
    check_widths(path, options, getattr(model, "subnet_names", []))
    if options.subnet is not None:
        pipeline.register_modules(transformer=model.extract_subnet(options.subnet))
        model = pipeline.transformer
    if not elastic:
        check_class_guidance(path, options, model.config)
    default = float(pipeline.config.default_guidance_scale)
    prediction = "flow_prediction" if elastic else model.config.prediction_type
    if elastic and options.decoupled and options.real_guidance is None and default <= 1:
        raise EdgeDiTError(
            f"few_step.decoupled is true, but {path} samples with guidance {default:g}, so the real score has none "
            "that could be taken apart; give few_step.real_guidance above 1, or leave decoupled out."
        )
    return Source(
        pipeline,
        few_step_timesteps(prediction, options.sampling_steps, options.shift, options.first_signal, options.timesteps),
        list(getattr(model, "subnet_names", [])) or [None],
        options.real_guidance if options.real_guidance is not None else default if elastic else 1.0,
        options.knowledge_guidance if options.knowledge_guidance is not None else default,
    )


# -------------------------------------------------------------------- what a step sees


class Piece(NamedTuple):
    """A rank's micro-batch of a step, on its device."""

    rows: list[int]  # positions in the global batch, which noise is keyed by
    noise: torch.Tensor  # (B, C, H, W), where sampling starts
    condition: Condition
    null: Condition | None  # of no class or text
    images: torch.Tensor  # (B,) rows of the data set

    def draws(self, seed: int, step: int, stream: int) -> Any:
        """Uniform numbers and noise of its rows for another use ([`diffusion.draws`]), on its device."""
        drawn = draws(seed, step, self.rows, self.noise.shape[1:], stream=stream)
        return type(drawn)(*(part.to(self.noise.device) for part in drawn))


class Conditions:
    """The training set as conditions: classes, or captions as the pipeline's encoders see them. Its images are not
    looked at.

    Args:
        source: what is distilled. dataset: images with labels, or captioned. texts: of the captions.
    """

    def __init__(self, source: Source, dataset: Any, texts: TextTable | None = None) -> None:
        self.source, self.dataset, self.texts = source, dataset, texts

    def loader(self, batch_size: int, seed: int, start: int, steps: int, rank: int, world_size: int, workers: int):
        """Batches of the steps that are left, as of [`step_loader`]."""
        kind = caption_loader if self.texts is not None else step_loader
        return kind(self.dataset, batch_size, seed, start, steps, rank, world_size, workers)

    def of_labels(self, labels: torch.Tensor, device: torch.device) -> tuple[Condition, Condition | None]:
        """Conditions with and without the class, of `labels` `(B,)`."""
        classes = self.source.pipeline.transformer.config.num_classes
        if not classes:
            return {"class_labels": None}, None
        labels = labels.to(device)
        return {"class_labels": labels}, {"class_labels": torch.full_like(labels, classes)}

    @staticmethod
    def of_texts(texts: TextTable, rows: torch.Tensor, device: torch.device) -> tuple[Condition, Condition | None]:
        """Conditions with and without the text of some rows of a table."""
        embeds, masks = texts.batch(rows)
        embeds = [None if part is None else part.to(device) for part in embeds]
        masks = [None if part is None else part.to(device) for part in masks]
        none = [None if part is None else torch.zeros_like(part) for part in masks]
        names = ("encoder_hidden_states", "encoder_attention_mask")
        return dict(zip(names, (embeds, masks))), dict(zip(names, (embeds, none)))

    def pieces(self, batch: dict, rows: torch.Tensor, count: int, seed: int, step: int, device) -> list[Piece]:
        """A rank's batch in so many micro-batches."""
        shape = batch["images"].shape[1:]
        found = []
        for places in torch.arange(len(rows)).chunk(count):
            positions = rows[places].tolist()
            if self.texts is not None:
                condition, null = self.of_texts(self.texts, batch["rows"][places], device)
            else:
                condition, null = self.of_labels(batch["labels"][places], device)
            noise = draws(seed, step, positions, shape, stream=START_STREAM).noise.to(device)
            images = batch["rows"][places] if "rows" in batch else places
            found.append(Piece(positions, noise, condition, null, images))
        return found


def load_conditions(config: RunConfig, accelerator: Any, source: Source) -> tuple[Conditions, Conditions | None]:
    """What the run's data conditions training on, and the captions that samples are judged by (`None` for classes).

    Raises:
        EdgeDiTError: the data does not fit the net.
    """
    model = source.pipeline.transformer
    if not source.elastic:
        dataset, _ = load_training_set(config, accelerator)
        check_fits_data(model.config, dataset)
        return Conditions(source, dataset), None
    captioned, _ = load_captioned_set(config, accelerator)
    for channels, height, width in captioned.shapes:
        unit = 2 * model.config.patch_size
        if channels != model.config.in_channels or height % unit or width % unit:
            raise EdgeDiTError(
                f"The data has the shape {(channels, height, width)}, but the net takes {model.config.in_channels} "
                f"channels and sides that are multiples of {unit}; set data.vae, data.resolution or data.buckets."
            )
    own = "" if config.few_step.path is None else "few-step-"
    texts = load_text_table(config, accelerator, source.pipeline, captioned.captions, f"{own}train")
    judged = judged_captions(load_run_captions(config, "validation"), config.few_step.samples)
    judged_texts = load_text_table(config, accelerator, source.pipeline, judged, "few-step-judged")
    return Conditions(source, captioned, texts), Conditions(source, judged, judged_texts)


def step_choice(seed: int, step: int, steps: int, widths: Sequence[str | None]) -> tuple[int, str | None]:
    """The denoising step and the sub-network that a training step is about: the same for every rank."""
    drawn = draws(seed, step, [0], (1,), stream=CHOICE_STREAM)
    return int(float(drawn.time[0]) * steps), widths[min(int(float(drawn.drop[0]) * len(widths)), len(widths) - 1)]
