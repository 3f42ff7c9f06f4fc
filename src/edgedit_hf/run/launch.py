"""What the command lines of all recipes share: arguments, exit codes, the accelerator, data and pipelines of a run."""

from __future__ import annotations

import argparse
import inspect
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging

from .. import entry
from ..data.captions import CaptionedDataset, cache_captioned_latents, load_captioned, open_captioned_latents
from ..data.images import ImageDataset, LatentDataset, cache_latents, load_images, open_latents
from ..diffusion import make_scheduler
from ..errors import EdgeDiTError
from ..files import ask_nothing, check_links, check_output, read_json, release_locks
from ..genotype import Genotype
from ..models.checkpoints import (
    check_size,
    check_weights,
    load_original,
    locate,
    only_variant,
    pipeline_variant,
    weight_files,
)
from ..models.transformer_edgedit import PRESETS, EdgeDiTTransformer2DModel
from ..pipelines.pipeline_edgedit import EdgeDiTPipeline
from ..pipelines.usable import check_scheduler, check_usable
from ..records import PipelineIndex, SchedulerConfig
from ..schema import read_record
from ..search_space import SearchSpace, model_cost
from .config import RunConfig, load_config, unused
from .state import close_progress, on_main


def recipe_main(
    run: Callable[[RunConfig, Any], None],
    doc: str | None,
    flags: Mapping[str, str] = MappingProxyType({}),
    dry_run: Callable[[RunConfig], None] | None = None,
    check: Callable[..., list[str]] | None = None,
) -> None:
    """Command line of a recipe: `--config FILE [--override section.key=value …] [--dry-run]`.

    How it ends: [`entry`].

    Args:
        flags: further options of the recipe and the keys that they set, e.g. `{"--memory-budget-gb":
            "bank.memory_budget_gb"}`.
        dry_run: prints what the run will cost; default [`estimate.print_estimate`], of the stages of EdgeDiT.
        check: [`preflight.preflight`] of the recipe's stages: raises what would stop them later, returns what it could
            not check.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe, e.g. training/recipes/digits.yaml")
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE", help="e.g. teacher.steps=100; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="print time, memory and disk a stage, and stop")
    for flag, key in flags.items():
        parser.add_argument(flag, dest=key, metavar="VALUE", help=f"the same as --override {key}=VALUE")

    def work() -> None:
        arguments = parser.parse_args()
        given = {key: vars(arguments)[key] for key in flags.values()}
        overrides = [*arguments.override, *(f"{key}={value}" for key, value in given.items() if value is not None)]
        diffusers_logging.set_verbosity_error()
        diffusers_logging.disable_progress_bar()  # loading a small pipeline needs no bar of its own
        config = load_config(arguments.config, overrides)
        if int(os.environ.get("RANK", 0)) == 0:
            for note in unused(config):
                entry.tell(f"note: {note}")
        check_run_folder(config)
        if arguments.dry_run:
            from ..estimate import print_estimate

            notes = [] if check is None else check(config, dry_run=True)
            (dry_run or print_estimate)(config)
            for note in notes:
                print(note)
            return
        accelerator = make_accelerator(config)
        if check is not None:
            on_main(lambda: check(config, processes=accelerator.num_processes), accelerator)
        run(config, accelerator)

    again = "Interrupted. Run the same command to continue."
    code = entry.guard(work, "error", interrupted=again, pipe_closed=entry.BROKEN_PIPE, at_end=close_progress)
    release_locks()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if code:
        raise SystemExit(code)


def check_run_folder(config: RunConfig) -> None:
    """Raise unless the run may write into its `output_dir`. An input in it is another stage's folder of such a run, or
    is refused.
    """
    keys = (
        "data.source",
        "data.vae",
        "teacher.path",
        "student.genotype",
        "text.encoder",
        "text.encoder_2",
        "knowledge.teacher",
        "quantize.path",
    )
    given = [operator.attrgetter(key)(config) for key in (*keys, "quantize.prompts")]
    output, inputs = Path(os.path.realpath(config.output_dir)), []
    for path in map(os.path.expanduser, filter(None, given)):
        real = Path(os.path.realpath(path))
        if (
            real == output
            or not real.is_relative_to(output)
            or not (output / real.relative_to(output).parts[0] / "run.json").is_file()
        ):
            inputs.append(path)
    check_output(config.output_dir, inputs, foreign=None)


def make_accelerator(config: RunConfig) -> Any:
    """The Accelerator of this process (mixed precision as launched), with PyTorch's threads shared between the
    processes of a machine.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # The other ranks wait while the main one searches or evaluates, which may take longer than the default half hour.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    if config.threads:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(max(1, config.threads // local))
    return accelerator


# -------------------------------------------------------------------- data


def load_run_images(config: RunConfig, split: str = "train") -> ImageDataset:
    """The run's images."""
    data = config.data
    return load_images(
        data.source,
        split,
        resolution=data.resolution,
        channels=data.channels,
        image_column=data.image_column,
        label_column=data.label_column,
        validation_fraction=data.validation_fraction,
        seed=config.seed,
        data_split=data.split,
        background=data.background,
    )


VAES = ("AutoencoderKL", "AutoencoderTiny")
TEXT_TO_IMAGE_VAES = (*VAES, "AutoencoderDC", "AutoencoderKLQwenImage")
"""Autoencoders that EdgeDiT, and that the elastic family works with."""


def load_vae(path: str, use_safetensors: bool | None = True, kinds: Sequence[str] = VAES) -> torch.nn.Module:
    """An autoencoder of diffusers, of one of these classes, from a folder or Hub id (`use_safetensors`: as in
    diffusers).
    """
    import diffusers

    try:
        name = diffusers.AutoencoderKL.load_config(path).get("_class_name")
        if name not in kinds:
            raise EdgeDiTError(f"The VAE {path!r} is a {name}; it must be one of {', '.join(kinds)}.")
        variant = only_variant(Path(path))
        vae, info = getattr(diffusers, name).from_pretrained(
            path, use_safetensors=use_safetensors, variant=variant, output_loading_info=True
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
    return vae.eval().requires_grad_(False)


def load_training_set(
    config: RunConfig, accelerator: Any
) -> tuple[ImageDataset | LatentDataset, torch.nn.Module | None]:
    """What the denoiser is trained on (images, or cached latents) and the VAE, if any. The main process writes the
    cache.
    """
    images = load_run_images(config)
    if config.data.vae is None:
        return images, None
    vae = load_vae(config.data.vae)
    folder = config.folder("latents")
    if accelerator.is_main_process:
        cache_latents(images, vae.to(accelerator.device), folder)
    accelerator.wait_for_everyone()
    return open_latents(folder), vae.cpu()


def load_run_captions(config: RunConfig, split: str = "train") -> CaptionedDataset:
    """The run's captioned images; `split` as of [`captions.load_captioned`]."""
    data = config.data
    return load_captioned(
        data.source,
        split,
        resolution=data.resolution,
        channels=data.channels,
        image_column=data.image_column,
        caption_column=data.caption_column,
        validation_fraction=data.validation_fraction,
        seed=config.seed,
        data_split=data.split,
        buckets=data.buckets or (),
        background=data.background,
    )


def load_captioned_set(
    config: RunConfig, accelerator: Any, split: str = "train"
) -> tuple[CaptionedDataset, torch.nn.Module | None]:
    """Captioned images, or their cached latents, and the VAE, if any. The main process writes the cache."""
    images = load_run_captions(config, split)
    if config.data.vae is None:
        return images, None
    vae = load_vae(config.data.vae, kinds=TEXT_TO_IMAGE_VAES)
    folder = config.folder("captioned-latents", split)
    if accelerator.is_main_process:
        cache_captioned_latents(images, vae.to(accelerator.device), folder)
    accelerator.wait_for_everyone()
    return open_captioned_latents(images, folder), vae.cpu()


# -------------------------------------------------------------------- text encoders


TEXT_MODELS = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
}
"""Classes of text encoders by their config's model_type; Gemma's have an AutoModel each."""


def load_text_encoder(path: str | Path) -> tuple[Any, Any]:
    """A text encoder of transformers (CLIP-, T5- or Gemma-type) and its tokenizer, from a folder or Hub id.

    The tokenizer is looked for beside the weights, or, of a local `…/text_encoder`, in `…/tokenizer` next to it, as
    pipelines have it.
    """
    import transformers
    from transformers.utils import cached_file

    source = str(path)
    folder = Path(source)
    if not folder.is_dir() and (isinstance(path, Path) or source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise EdgeDiTError(
            f"There is no text encoder in {source}: the folder does not exist; give a folder or a Hub id "
            "(organisation/name)."
        )
    beside = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    tokenizer_source = str(beside) if beside.is_dir() and not list(folder.glob("tokenizer*")) else source
    try:
        kind = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
        if kind not in TEXT_MODELS and not kind.startswith("gemma"):
            raise EdgeDiTError(
                f"The text encoder {source} is a {kind!r}; it must be one of {', '.join(TEXT_MODELS)}, or a Gemma."
            )
        loader = getattr(transformers, TEXT_MODELS.get(kind, "AutoModel"))
        variant = only_variant(folder, "model")
        encoder, info = loader.from_pretrained(
            source, dtype="auto", variant=variant, trust_remote_code=False, output_loading_info=True
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
    if Path(tokenizer_source).is_dir():
        check_links(tokenizer_source)  # its files are copied into every pipeline that is made with it
    # Without these transformers would make a tokenizer that knows no words.
    files = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
    if not any(cached_file(tokenizer_source, name, _raise_exceptions_for_missing_entries=False) for name in files):
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
            raise EdgeDiTError(
                f"There is no text encoder in {own}; it is written by stage text (training/train_text_encoders.py), "
                "run that first."
            )
        found += (None, None) if path == "none" else load_text_encoder(own if path is None else path)
    return tuple(found)


# -------------------------------------------------------------------- pipelines


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def load_pipeline(
    path: str | Path,
    made_by: str | None = None,
    *,
    trust_remote_code: bool = False,
    kind: str | Sequence[str] = "EdgeDiTPipeline",
) -> Any:
    """A pipeline of this package in float32 from a folder or Hub id; whatever is wrong with it is one [`EdgeDiTError`].

    Args:
        path: a folder (always so if a `Path`) or a Hub id.
        made_by: the stage that writes it, named if nothing is there.
        trust_remote_code: whether code in the pipeline's repository may run.
        kind: class that it must be of, or several.
    """
    from diffusers import DiffusionPipeline

    source = str(path)
    local = isinstance(path, Path) or source.startswith((".", "/", "~")) or source.count("/") != 1
    if local and not Path(source, "model_index.json").is_file():
        remedy = (
            f"it is written by {made_by}, run that first"
            if made_by
            else "give a pipeline folder or a Hub id (organisation/name)"
        )
        if Path(source).is_file() or Path(source, "config.json").is_file():
            remedy = f"if it is a DiT, SiT or MDT checkpoint, convert it first: edgedit convert {source} OUT"
        raise EdgeDiTError(f"There is no pipeline in {source}; {remedy}.")
    for tokenizer in ("tokenizer", "tokenizer_2"):
        if Path(source, tokenizer).is_dir():
            check_links(Path(source, tokenizer))
    try:
        variant = pipeline_variant(Path(source))
        if local:
            _check_transformer(Path(source))
        with ask_nothing(trust_remote_code):
            pipeline = DiffusionPipeline.from_pretrained(
                source, dtype=torch.float32, trust_remote_code=trust_remote_code, variant=variant
            )
    except Exception as error:  # diffusers, huggingface_hub and safetensors each have their own, without a common base
        said = " ".join(str(error).split())
        remedy = (
            " Download the repository (hf download) and give its folder: then the variant that is there is taken."
            if "variant" in said
            else ""
        )
        raise EdgeDiTError(f"The pipeline {source} cannot be loaded: {said}{remedy}") from error
    # By name: a class that came as code with the pipeline is another object.
    kinds = (kind,) if isinstance(kind, str) else tuple(kind)
    if type(pipeline).__name__ not in kinds:
        remedy = f"; convert it first: edgedit convert {source} OUT" if type(pipeline).__name__ == "DiTPipeline" else ""
        raise EdgeDiTError(f"{source} holds a {type(pipeline).__name__}; an {' or '.join(kinds)} is needed{remedy}.")
    check_usable(pipeline, source)
    return pipeline


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

    name = read_record(folder / "scheduler_config.json", SchedulerConfig, "save_pretrained")["_class_name"]
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise EdgeDiTError(f"{folder} has a scheduler of class {name!r}, which diffusers does not have.")
    try:
        scheduler = kind.from_pretrained(folder)
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
    hub = {name: options[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in options}
    path = locate(path, **hub)
    transformer = load_original(path, **options)
    scheduler, labels, decoder = make_scheduler(transformer.config.prediction_type), None, None
    if vae is not None:
        decoder = load_vae(vae)
    if (path / "model_index.json").is_file():
        labels = read_record(path / "model_index.json", PipelineIndex, "save_pretrained").get("id2label")
        scheduler = load_scheduler(path / "scheduler")
        if decoder is None and (path / "vae").is_dir():
            decoder = load_vae(str(path / "vae"), use_safetensors=None)
    if decoder is not None and decoder.config.latent_channels != transformer.config.in_channels:
        raise EdgeDiTError(
            f"The VAE has {decoder.config.latent_channels} latent channels, the transformer takes "
            f"{transformer.config.in_channels}; give the VAE that it was trained with."
        )
    return EdgeDiTPipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=decoder,
        id2label=labels,
        guidance_channels=3
        if path.is_file() and transformer.config.in_channels > 3 and transformer.config.num_classes
        else None,
    )


def teacher_path(config: RunConfig) -> str | Path:
    """Where the teacher is: `teacher.path`, or the run's own."""
    return config.teacher.path or config.folder("teacher")


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
    """The search space of a teacher with this model config, at the recipe's reduced sizes."""
    bank = config.bank
    return SearchSpace.for_config(
        model_config, reduced_mlp_ratio=bank.reduced_mlp_ratio, reduced_attention_dim=bank.reduced_attention_dim
    )


def read_genotype(name: str, key: str) -> Genotype:
    """The genotype that a recipe's `key` names: a student preset such as `EdgeDiT-1`, or a JSON file."""
    if name in PRESETS and "layers" in PRESETS[name]:
        return Genotype.from_layers(PRESETS[name]["layers"], PRESETS[name]["hidden_size"])
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
    pipeline = load_pipeline(teacher_path(config), "stage teacher (training/train_teacher.py)")
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
        default_steps=config.evaluate.sampling_steps,
        default_guidance_scale=config.evaluate.guidance_scale,
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


# -------------------------------------------------------------------- optimisation


def learning_rate_at(step: int, peak: float, warmup: int, total: int, final_share: float) -> float:
    """Linear warm-up to `peak`, then cosine decay to `final_share · peak` at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value
