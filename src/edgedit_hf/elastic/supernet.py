"""What a run of the elastic family is made of: the untrained supernet of its recipe, its pipeline, its encoded
captions.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.text_table import TextTable, text_table
from ..diffusion import make_scheduler
from ..errors import EdgeDiTError
from ..models.transformer_elastic_dit import PRESETS, ElasticDiTTransformer2DModel
from ..pipelines.loading import check_memory, load_text_encoder
from ..pipelines.pipeline_elastic_dit import ElasticDiTPipeline
from ..records import ElasticModel
from ..run.config import RunConfig
from ..run.stage import TEXT
from ..schema import read_record, shorten
from ..search_space import elastic_weights


def load_text_table(
    config: RunConfig, accelerator: Any, pipeline: ElasticDiTPipeline, captions: Sequence[str], split: str = "train"
) -> TextTable:
    """What the run's text encoders made of the captions of a split. The main process writes the cache."""
    folder = config.folder("text-embeddings", split)
    if accelerator.is_main_process:
        pipeline.to(accelerator.device)
        try:
            text_table(pipeline, captions, folder)
        except EdgeDiTError:
            raise
        except ValueError as error:  # a tokenizer that does not belong to its encoder
            raise EdgeDiTError(f"The captions cannot be encoded: {error}") from error
        pipeline.to("cpu")
    accelerator.wait_for_everyone()
    return TextTable(folder, captions)


def new_elastic(
    config: RunConfig, shapes: Sequence[Sequence[int]], text_dims: Sequence[int]
) -> ElasticDiTTransformer2DModel:
    """The untrained supernet of a recipe (a stand-alone net if its config has no sub-networks).

    Args:
        shapes: `(C, H, W)` of every bucket of the data.
        text_dims: width of every text encoder; for one that is absent (0) the model keeps its own.

    Raises:
        EdgeDiTError: there is no such model, its sub-networks have fractions of heads, or the data does not fit it.
    """
    name, widths = config.elastic.model, config.elastic.widths()
    defaults = dict(inspect.signature(ElasticDiTTransformer2DModel.__init__).parameters)
    values = PRESETS.get(name)
    if values is None:
        if not Path(name).is_file():
            raise EdgeDiTError(
                f"elastic.model is {name!r}, which is neither a preset ({', '.join(PRESETS)}) nor a JSON file."
            )
        values = read_record(name, ElasticModel, "save_config", "an elastic net")
        saved = (
            "_class_name" in values
        )  # by diffusers: keys that are not ours are somebody's notes; in a file written by hand they are mistakes
        values = {
            key: value for key, value in values.items() if not key.startswith("_") and (key in defaults or not saved)
        }
    own_dims, patch = (
        values.get("text_dims", defaults["text_dims"].default),
        values.get("patch_size", defaults["patch_size"].default),
    )
    for _, height, width in shapes:
        if height % (2 * patch) or width % (2 * patch):
            raise EdgeDiTError(
                f"The data has size {height}x{width} (height x width), but {name} needs multiples of {2 * patch}: "
                f"patches of {patch}, down-sampled once. Set data.resolution or data.buckets to such sizes."
            )
    if len(own_dims) != len(text_dims):
        raise EdgeDiTError(
            f"elastic.model {name} reads {len(own_dims)} text encoders, but there are {len(text_dims)}; give it as "
            "many text_dims."
        )
    values = {**values, **({} if widths is None else {"subnets": widths})}
    given = {
        "sample_size": max(max(shape[1:]) for shape in shapes),
        "in_channels": shapes[0][0],
        "text_dims": [dim or own for dim, own in zip(text_dims, own_dims)],
    }
    known = [key for key in defaults if key != "self"]
    if unknown := sorted(values.keys() - set(known)):
        raise EdgeDiTError(
            f"elastic.model {name} cannot be made: it holds {shorten(unknown[0])}; it may hold {', '.join(known)}."
        )
    whole = {**{key: defaults[key].default for key in known}, **values, **given}
    try:
        check_memory(elastic_weights(whole), f"elastic.model {name}")
        return ElasticDiTTransformer2DModel(**{**values, **given})
    except ValueError as error:  # how the model refuses sizes that do not fit together
        if isinstance(error, EdgeDiTError):
            raise
        raise EdgeDiTError(
            f"elastic.model {name} with the sub-networks {values.get('subnets', 'of its own')} cannot be made: {error}"
        ) from error


def new_elastic_pipeline(
    config: RunConfig, transformer: ElasticDiTTransformer2DModel | None, vae: Any = None
) -> ElasticDiTPipeline:
    """A pipeline around a newly trained supernet and the run's text encoders; without a transformer it encodes
    prompts.
    """
    text_encoder, tokenizer, text_encoder_2, tokenizer_2 = load_text(config)
    try:
        return ElasticDiTPipeline(
            transformer=transformer,
            scheduler=make_scheduler("flow_prediction"),
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            default_steps=config.sampling.steps,
            default_guidance_scale=config.sampling.guidance_scale,
        )
    except ValueError as error:
        raise EdgeDiTError(f"The text encoders cannot be used: {error}") from error


def load_text(config: RunConfig) -> tuple[Any, Any, Any, Any]:
    """(text_encoder, tokenizer, text_encoder_2, tokenizer_2) of the run: its own, or those that `text` names; None for
    'none'.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # as diffusers' in `recipe_main`
    given = {"": config.text.encoder, "_2": config.text.encoder_2}
    if set(given.values()) == {"none"}:
        raise EdgeDiTError(
            "text.encoder and text.encoder_2 are both 'none'; captions need one, set the other to null or to an "
            "encoder."
        )
    found: list[Any] = []
    for suffix, path in given.items():
        own = config.folder("text", f"text_encoder{suffix}")
        if path is None and not own.is_dir():
            raise EdgeDiTError(f"There is no text encoder in {own}; it is written by {TEXT.made_by}, run that first.")
        found += (None, None) if path == "none" else load_text_encoder(own if path is None else path)
    return tuple(found)
