"""A pipeline, an autoencoder, a text encoder or a scheduler from anywhere: loaded and sound, or one clear error."""

from __future__ import annotations

import inspect
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from .. import hub
from ..diffusion import make_scheduler
from ..errors import EdgeDiTError
from ..files import (
    ask_nothing,
    check_links,
    read_json,
)
from ..models.checkpoints import check_size, load_original
from ..models.stored_weights import locate, only_variant, pipeline_variant, weight_files
from ..records import PipelineIndex, SchedulerConfig
from ..run.config import RunConfig
from ..run.stage import ELASTIC, TUNE
from ..schema import read_record
from .pipeline_edgedit import EdgeDiTPipeline
from .usable import check_scheduler, check_usable

KINDS = ("EdgeDiTPipeline", "ElasticDiTPipeline")
"""Our pipelines, by class name."""

PIPELINE_FACTS = ("id2label", "default_steps", "default_guidance_scale", "guidance_channels", "few_step_timesteps")
"""What an EdgeDiTPipeline knows beside its components."""

VAES = ("AutoencoderKL", "AutoencoderTiny")


TEXT_TO_IMAGE_VAES = (*VAES, "AutoencoderDC", "AutoencoderKLQwenImage")
"""Autoencoders that EdgeDiT, and that the elastic family works with."""


def load_vae(path: str, use_safetensors: bool | None = True, kinds: Sequence[str] = VAES) -> torch.nn.Module:
    """An autoencoder of diffusers, of one of these classes, by its folder or name on the Hub, see [`hub`]
    (`use_safetensors`: as in diffusers).
    """
    import diffusers

    folder = hub.component_folder(path)
    try:
        name = diffusers.AutoencoderKL.load_config(folder).get("_class_name")
        if name not in kinds:
            raise EdgeDiTError(f"The VAE {path!r} is a {name}; it must be one of {', '.join(kinds)}.")
        variant = only_variant(folder)
        vae, info = getattr(diffusers, name).from_pretrained(
            folder, use_safetensors=use_safetensors, variant=variant, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        if isinstance(error, EdgeDiTError):
            raise
        raise EdgeDiTError(f"The VAE {path!r} cannot be loaded: {_first_line(error)}") from error
    if info["missing_keys"]:
        raise EdgeDiTError(
            f"The weights of the VAE {path!r} lack {len(info['missing_keys'])} that its config asks for, such as "
            f"{sorted(info['missing_keys'])[0]!r}; give an autoencoder whose config and weights belong together."
        )
    vae.register_to_config(_name_or_path=str(path))  # and no place in this machine's cache
    return vae.eval().requires_grad_(False)


TEXT_MODELS = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
}
"""Classes of text encoders by their config's model_type; Gemma's have an AutoModel each."""


def load_text_encoder(path: str | Path) -> tuple[Any, Any]:
    """A text encoder of transformers (CLIP-, T5- or Gemma-type) and its tokenizer, by its folder or name on the
    Hub, see [`hub`].

    The tokenizer is looked for beside the weights, or, of a `…/text_encoder`, in `…/tokenizer` next to it, as
    pipelines have it.
    """
    import transformers

    source = str(path)
    folder = encoder_folder(path)
    if not folder.is_dir():
        raise EdgeDiTError(
            f"There is no text encoder in {source}: the folder does not exist; give a folder or a Hub id "
            "(organisation/name)."
        )
    beside = _tokenizer_of(folder)
    tokenizer_source = beside if beside.is_dir() and not list(folder.glob("tokenizer*")) else folder
    try:
        kind = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
        if kind not in TEXT_MODELS and not kind.startswith("gemma"):
            raise EdgeDiTError(
                f"The text encoder {source} is a {kind!r}; it must be one of {', '.join(TEXT_MODELS)}, or a Gemma."
            )
        loader = getattr(transformers, TEXT_MODELS.get(kind, "AutoModel"))
        variant = only_variant(folder, "model")
        encoder, info = loader.from_pretrained(
            folder, dtype="auto", variant=variant, trust_remote_code=False, output_loading_info=True
        )
    except EdgeDiTError:
        raise
    except Exception as error:  # transformers, huggingface_hub and safetensors each have their own
        raise EdgeDiTError(f"The text encoder {source} cannot be loaded: {_first_line(error)}") from error
    if info["missing_keys"]:
        raise EdgeDiTError(
            f"The weights of the text encoder {source} lack {len(info['missing_keys'])} that its config asks for, such "
            f"as {sorted(info['missing_keys'])[0]!r}; give an encoder whose config and weights belong together."
        )
    check_links(tokenizer_source)  # its files are copied into every pipeline that is made with it
    # Without these transformers would make a tokenizer that knows no words.
    files = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
    if not any((tokenizer_source / name).is_file() for name in files):
        raise EdgeDiTError(
            f"The text encoder {source} has no tokenizer beside it (none of {', '.join(files)}); put the one there "
            "that it was trained with."
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_source, trust_remote_code=False)
    except Exception as error:
        raise EdgeDiTError(
            f"The tokenizer of the text encoder {source} cannot be loaded: {_first_line(error)}"
        ) from error
    rows = encoder.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise EdgeDiTError(
            f"The tokenizer in {tokenizer_source} has {len(tokenizer)} tokens, but the text encoder {source} embeds "
            f"only {rows}; give the tokenizer that the encoder was trained with."
        )
    return encoder.eval().requires_grad_(False), tokenizer


def encoder_folder(path: str | Path, **hub_options: Any) -> Path:
    """The folder of a text encoder given by its path or name; of a name, its tokenizer is fetched too.

    Args:
        hub_options: of [`hub.fetch`].
    """
    beside = _tokenizer_of(Path(hub.parse_name(str(path)).path)).name if hub.is_name(path) else ""
    return hub.component_folder(path, [beside] if beside else [], **hub_options)


def _tokenizer_of(folder: Path) -> Path:
    return folder.with_name(folder.name.replace("text_encoder", "tokenizer")) if folder.name else folder


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def load_pipeline(
    path: str | Path,
    made_by: str | None = None,
    *,
    trust_remote_code: bool = False,
    kind: str | Sequence[str] | None = "EdgeDiTPipeline",
) -> Any:
    """A pipeline in float32 by its folder or name on the Hub, see [`hub`]; whatever is wrong with it is one
    [`EdgeDiTError`].

    Args:
        path: a folder (always so if a `Path`) or a name.
        made_by: the stage that writes it, named if nothing is there.
        trust_remote_code: whether code in the pipeline's repository may run.
        kind: class that it must be of, or several; `None`: any of diffusers.
    """
    from diffusers import DiffusionPipeline

    source, folder = str(path), hub.pipeline_folder(path)
    if not (folder / "model_index.json").is_file():
        remedy = (
            f"it is written by {made_by}, run that first"
            if made_by
            else "give a pipeline folder or a Hub id (organisation/name)"
        )
        if folder.is_file() or (folder / "config.json").is_file():
            remedy = f"if it is a DiT, SiT or MDT checkpoint, convert it first: edgedit convert {source} OUT"
        raise EdgeDiTError(f"There is no pipeline in {source}; {remedy}.")
    for tokenizer in ("tokenizer", "tokenizer_2"):
        if (folder / tokenizer).is_dir():
            check_links(folder / tokenizer)
    try:
        variant = pipeline_variant(folder)
        _check_transformer(folder)
        with ask_nothing(trust_remote_code):
            pipeline = DiffusionPipeline.from_pretrained(
                str(folder), dtype=torch.float32, trust_remote_code=trust_remote_code, variant=variant
            )
    except Exception as error:  # diffusers and safetensors each have their own, without a common base
        said = " ".join(str(error).split())
        raise EdgeDiTError(f"The pipeline {source} cannot be loaded: {said}") from error
    # By name: a class that came as code with the pipeline is another object.
    kinds = (kind,) if isinstance(kind, str) else tuple(kind or ())
    if kinds and type(pipeline).__name__ not in kinds:
        remedy = f"; convert it first: edgedit convert {source} OUT" if type(pipeline).__name__ == "DiTPipeline" else ""
        raise EdgeDiTError(f"{source} holds a {type(pipeline).__name__}; an {' or '.join(kinds)} is needed{remedy}.")
    if type(pipeline).__name__ in KINDS:
        check_usable(pipeline, source)
    if hub.is_name(path):  # no place in this machine's cache is saved
        pipeline.register_to_config(_name_or_path=source)
        for name, component in pipeline.components.items():
            if "_name_or_path" in getattr(component, "config", ()) and hasattr(component, "register_to_config"):
                component.register_to_config(_name_or_path=f"{source}/{name}")
    return pipeline


def source_path(config: RunConfig, key: str, verb: str) -> str | Path:
    """What a stage of either family starts from: the pipeline that its key names, or the run's tuned student or
    supernet.

    Args:
        key: such as "quantize.path". verb: what is done with it, for the message.

    Raises:
        EdgeDiTError: there is none.
    """
    given = operator.attrgetter(key)(config)
    if given is not None:
        return given
    for stage in (TUNE, ELASTIC):
        if config.folder(stage.folder).exists():
            return config.folder(stage.folder)
    raise EdgeDiTError(
        f"There is nothing to {verb}: {config.output_dir} has neither {TUNE.folder} nor {ELASTIC.folder}, and {key} is "
        "null; set it."
    )


def _check_transformer(folder: Path) -> None:
    """Raise if the transformer's weights in a pipeline folder cannot hold what its config describes."""
    path = folder / "transformer" / "config.json"
    if any(path.parent.glob("diffusion_pytorch_model[.-]*")) and path.is_file():
        config = read_json(path, "save_pretrained")
        if not isinstance(config, dict) or "_class_name" not in config:
            raise EdgeDiTError(f"{path} is not the config of a diffusers model.")
        check_size(path.parent, config, weight_files(path.parent))


def load_scheduler(folder: Path) -> Any:
    """The scheduler in a folder; whatever is wrong with it is one [`EdgeDiTError`]."""
    import diffusers

    config = folder / "scheduler_config.json"  # where diffusers writes -Infinity
    name = read_record(config, SchedulerConfig, "save_pretrained", nan=True)["_class_name"]
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        raise EdgeDiTError(f"{folder} has a scheduler of class {name!r}, which diffusers does not have.")
    try:
        scheduler = getattr(diffusers, name).from_pretrained(folder)
    except Exception as error:  # every scheduler has its own
        raise EdgeDiTError(
            f"The scheduler {folder} cannot be loaded: {type(error).__name__} {_first_line(error)}"
        ) from error
    check_scheduler(scheduler, str(folder.parent))
    return scheduler


def load_original_pipeline(path: str | Path, *, vae: str | None = None, **options: Any) -> EdgeDiTPipeline:
    """A pipeline around a foreign checkpoint: what `edgedit convert` writes.

    Of a diffusers `DiTPipeline` scheduler, VAE and class names are kept. A weights file gets the scheduler that its
    parametrisation needs (DDIM, or flow matching for SiT), and guides as many channels as its own repository does.

    Args:
        path: as [`load_original`].
        vae: an AutoencoderKL or AutoencoderTiny (folder or Hub id) that decodes its latents.
        options: further arguments of [`load_original`].
    """
    of_hub = {name: options[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in options}
    source, path = path, locate(path, **of_hub)
    transformer = load_original(path, **options)
    scheduler, decoder = make_scheduler(transformer.config.prediction_type), None
    facts: dict[str, Any] = {}
    if path.is_file() and transformer.config.in_channels > 3 and transformer.config.num_classes:
        facts = {"guidance_channels": 3}
    if vae is not None:
        decoder = load_vae(vae)
    if (path / "model_index.json").is_file():
        index = read_record(path / "model_index.json", PipelineIndex, "save_pretrained")
        facts = {name: index[name] for name in PIPELINE_FACTS if index.get(name) is not None}
        scheduler = load_scheduler(path / "scheduler")
        if decoder is None and (path / "vae").is_dir():
            decoder = load_vae(str(path / "vae"), use_safetensors=None)
            decoder.register_to_config(_name_or_path=f"{source}/vae")
    if decoder is not None and decoder.config.latent_channels != transformer.config.in_channels:
        raise EdgeDiTError(
            f"The VAE has {decoder.config.latent_channels} latent channels, the transformer takes "
            f"{transformer.config.in_channels}; give the VAE that it was trained with."
        )
    try:
        return EdgeDiTPipeline(transformer=transformer, scheduler=scheduler, vae=decoder, **facts)
    except ValueError as error:
        raise EdgeDiTError(f"The pipeline {path} cannot be taken over: {error}") from error


def check_memory(weights: int, what: str) -> None:
    """Raise if a new network's float32 weights do not fit into this machine's memory; not if it is made on the meta
    device.
    """
    if torch.get_default_device().type == "meta" or not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * weights > memory:
        raise EdgeDiTError(
            f"{what} has {weights:,} weights, {4 * weights / 1e9:,.0f} GB; this machine has {memory / 1e9:,.0f} GB of "
            "memory. Make it smaller."
        )


def with_components(pipeline: Any, **components: Any) -> Any:
    """The same pipeline (labels, defaults, all other components) around other components, with a scheduler of its own:
    a scheduler has state.
    """
    names = inspect.signature(type(pipeline).__init__).parameters
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    kept = {
        name: pipeline.components[name] if name in pipeline.components else pipeline.config[name]
        for name in names
        if name != "self"
    }
    other = type(pipeline)(**{**kept, "scheduler": scheduler, **components})
    other.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return other


def with_transformer(pipeline: Any, transformer: Any) -> Any:
    """[`with_components`] with another transformer."""
    return with_components(pipeline, transformer=transformer)


SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}  # assumed where the VAE is not here


SD_BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


def meta_vae(path: str, assumed: list[str], shape: Sequence[int]) -> AutoencoderKL | Any:
    """The autoencoder for images of shape `(C, H, W)` on the meta device, or one like Stable Diffusion's if it is not
    on this machine.
    """
    from diffusers import AutoencoderTiny

    classes = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    with torch.device("meta"):
        try:
            values = AutoencoderKL.load_config(hub.here(path, "config.json") or path, local_files_only=True)
            vae = classes[values["_class_name"]].from_config(values)
        except (OSError, KeyError):
            assumed.append(f"the VAE {path} is not here: taken to be like Stable Diffusion's (factor 8, 4 channels)")
            return AutoencoderKL(**SD_VAE, **SD_BLOCKS, in_channels=shape[0], out_channels=shape[0])
    check_vae_takes(shape, vae.config)
    return vae


def check_vae_takes(shape: Sequence[int], config: Mapping[str, Any]) -> None:
    """Raise unless an autoencoder with this config encodes images of shape `(C, H, W)`."""
    channels = config.get("in_channels") or config["input_channels"]
    if shape[0] != channels:
        raise EdgeDiTError(
            f"The images have {shape[0]} channels, but the VAE takes {channels}; set channels to {channels}."
        )
