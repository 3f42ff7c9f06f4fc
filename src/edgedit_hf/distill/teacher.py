"""The teacher of a run: where it is, how a new one is made, and what may replace its layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.datasets import ImageDataset
from ..data.latents import LatentDataset
from ..diffusion import make_scheduler
from ..errors import EdgeDiTError
from ..genotype import Genotype
from ..menu_space import MenuSpace
from ..models.stored_weights import check_weights
from ..models.transformer_edgedit import PRESETS, EdgeDiTTransformer2DModel
from ..pipelines.loading import check_memory, load_pipeline
from ..pipelines.pipeline_edgedit import EdgeDiTPipeline
from ..run.config import RunConfig
from ..run.stage import TEACHER
from ..search_space import SearchSpace, model_cost


def teacher_path(config: RunConfig) -> str | Path:
    """Where the teacher is: `teacher.path`, or the run's own."""
    return config.teacher.path or config.folder("teacher")


def new_teacher(config: RunConfig, shape: Sequence[int], num_classes: int) -> EdgeDiTTransformer2DModel:
    """The untrained teacher of a recipe for data of shape `(C, H, W)`.

    Raises:
        EdgeDiTError: the data is not square, or the patches do not divide it.
    """
    options = config.teacher
    channels, height, width = shape
    if height != width or height % options.patch_size:
        raise EdgeDiTError(
            f"The data has shape {tuple(shape)}; it must be square with a side that teacher.patch_size "
            f"{options.patch_size} divides. Set data.resolution or the patch size."
        )
    layers = Genotype.original(options.num_layers, options.hidden_size, options.num_heads).to_layers()
    sizes = {
        "sample_size": height,
        "patch_size": options.patch_size,
        "in_channels": channels,
        "hidden_size": options.hidden_size,
        "layers": layers,
    }
    kind = {"num_classes": num_classes if options.conditional else 0, "learn_sigma": options.learn_sigma}
    check_memory(model_cost({**sizes, **kind}).weights, "The teacher of this recipe")
    return EdgeDiTTransformer2DModel(
        sample_size=height,
        patch_size=options.patch_size,
        in_channels=channels,
        hidden_size=options.hidden_size,
        num_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        num_classes=num_classes if options.conditional else 0,
        learn_sigma=options.learn_sigma,
        prediction_type=options.prediction_type,
    )


def search_space_of(config: RunConfig, model_config: Any) -> SearchSpace:
    """The search space of a teacher with this model config: of the recipe's menu, or the paper's at its reduced
    sizes.
    """
    bank = config.bank
    if bank.menu is not None:
        return MenuSpace.for_config(model_config, menu=bank.menu)
    return SearchSpace.for_config(
        model_config, reduced_mlp_ratio=bank.reduced_mlp_ratio, reduced_attention_dim=bank.reduced_attention_dim
    )


def read_genotype(name: str, key: str) -> Genotype:
    """The genotype that a recipe's `key` names: a student preset such as `EdgeDiT-1`, or a JSON file."""
    if name in PRESETS and "layers" in PRESETS[name]:
        return Genotype.of(PRESETS[name])
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        students = ", ".join(preset for preset, sizes in PRESETS.items() if "layers" in sizes)
        raise EdgeDiTError(
            f"{key} names {name!r}, which is neither a student preset ({students}) nor a genotype file: {error}"
        ) from None
    try:
        return Genotype.from_json(text)
    except EdgeDiTError as error:
        raise EdgeDiTError(f"{key} names {name!r}: {error}") from None


def load_teacher(config: RunConfig) -> EdgeDiTPipeline:
    """The teacher of the run."""
    pipeline = load_pipeline(teacher_path(config), TEACHER.made_by)
    check_weights(pipeline.transformer, f"The teacher {teacher_path(config)}")
    return pipeline


def check_fits_data(model_config: Any, dataset: ImageDataset | LatentDataset) -> None:
    """Raise unless a model with this config can be trained on the data."""
    size = model_config["sample_size"]
    wanted = (model_config["in_channels"], size, size)
    if tuple(dataset.shape) != wanted:
        raise EdgeDiTError(
            f"The data has shape {tuple(dataset.shape)}, the model needs {wanted}; set data.resolution, data.channels "
            "or data.vae."
        )
    classes = model_config["num_classes"]
    if classes and classes < dataset.num_classes:
        raise EdgeDiTError(
            f"The data has {dataset.num_classes} classes, so labels up to {dataset.num_classes - 1}, but the model "
            f"only {classes}."
        )
    if classes and not dataset.num_classes:
        raise EdgeDiTError(
            f"The model has {classes} classes, but the data has no labels; set data.label_column or use an "
            "unconditional model."
        )


def new_pipeline(transformer: Any, vae: Any, label_names: Sequence[str], config: RunConfig) -> EdgeDiTPipeline:
    """A pipeline around a newly trained transformer, with the scheduler that fits it."""
    return EdgeDiTPipeline(
        transformer=transformer,
        scheduler=make_scheduler(transformer.config.prediction_type),
        vae=vae,
        id2label={str(i): str(name) for i, name in enumerate(label_names)} if transformer.config.num_classes else None,
        default_steps=config.sampling.steps,
        default_guidance_scale=config.sampling.guidance_scale,
    )
