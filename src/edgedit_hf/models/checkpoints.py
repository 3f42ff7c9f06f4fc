"""Foreign checkpoints in: DiT, SiT, MDT and MDTv2 weights of the original repositories, and diffusers' DiT folders and
Hub ids.

Every conversion is exact: it renames, fuses, de-duplicates and checks, and changes no number except SiT's sign (see
[`SIT_TIME`]). What a checkpoint does not say (heads of an unusual width, DiT or SiT, where MDT's decoder begins) is
asked for, never guessed.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import math
import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import EdgeDiTError
from ..files import check_finite, parse_json
from ..records import Adapter
from ..schema import held_to
from .transformer_edgedit import EdgeDiTTransformer2DModel, sincos_position_embedding

FAMILIES = ("dit", "sit", "mdt")
NUMERICS = ("original", "diffusers")
WEIGHT_FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width: S, B, L and XL of DiT, SiT and MDT
# SiT's time runs from noise at 0 to data at 1 and its velocity points to the data; ours from data at 0 to noise at
# 1000, with the velocity ε − x0: the embedder sees 1 − t/1000, and the output projection's sign is turned.
SIT_TIME = {"timestep_scale": -1e-3, "timestep_offset": 1.0}
# Classes of diffusers that are this architecture, by the name in config.json; the second is what old DiT folders say.
DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
STEM = "diffusion_pytorch_model"  # of the weight files in a diffusers folder
# What training scripts wrap a state dict in, the moving average first: the originals' own samplers take it too.
WRAPPERS = ("ema", "ema_state_dict", "model_ema", "ema_model", "state_dict", "model_state_dict", "model", "module")
# What DataParallel, torch.compile, FSDP and activation checkpointing put into the names of weights, anywhere in them.
WRAPPED_NAMES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
COMMON_PREFIXES = (
    "model.",
    "ema_model.",
    "net.",
    "diffusion_model.",
    "transformer.",
)  # taken off where all names have them
SHARED = 4  # a file's tensors may stand for so many times its bytes (weights under two names), not for more
POSITION_TOLERANCE = (
    1e-3  # a stored position embedding nearer than this to the formula is the formula (fp16 files round it)
)

_TRUNK = {
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "modulation_out",
    "final_layer.linear": "proj_out",
}
_BLOCK = {
    "attn.qkv": "attn.to_qkv",
    "attn.proj": "attn.to_out",
    "mlp.fc1": "mlp.proj_in",
    "mlp.fc2": "mlp.proj_out",
    "adaLN_modulation.1": "modulation",
}
_DIFFUSERS_TRUNK = {"pos_embed.proj": "patch_embed", "proj_out_1": "modulation_out", "proj_out_2": "proj_out"}
_DIFFUSERS_BLOCK = {
    "attn1.to_out.0": "attn.to_out",
    "ff.net.0.proj": "mlp.proj_in",
    "ff.net.2": "mlp.proj_out",
    "norm1.linear": "modulation",
}


@dataclass
class _Source:
    """A checkpoint as read: its tensors under their own names, where it lies, and what it says about itself."""

    name: str
    state: dict[str, torch.Tensor]
    config: dict[str, Any] | None = None  # of a diffusers folder
    arguments: dict[str, Any] = field(default_factory=dict)  # of an original training run

    def take(self, key: str) -> torch.Tensor:
        if key not in self.state:
            raise EdgeDiTError(
                f"{self.name} lacks the weight {key!r} ({len(self.state)} others are left to convert): it is damaged, "
                "or not of this family."
            )
        return self.state.pop(key)

    def move(self, names: Mapping[str, str], source: str, target: str, into: dict[str, torch.Tensor]) -> None:
        """Weight and bias of every layer in `names`, from below the prefix `source` to below `target`."""
        for old, new in names.items():
            for part in ("weight", "bias"):
                into[f"{target}{new}.{part}"] = self.take(f"{source}{old}.{part}")

    def count(self, stem: str) -> int:
        """Number of blocks `<stem>.0`, `<stem>.1`, …"""
        numbers = {int(key[len(stem) + 1 :].split(".")[0]) for key in self.state if key.startswith(stem + ".")}
        if numbers != set(range(len(numbers))):
            raise EdgeDiTError(
                f"{self.name} has the blocks {sorted(numbers)} below {stem!r}; they must be 0, 1, 2, … without a gap."
            )
        return len(numbers)


# -------------------------------------------------------------------- public


def load_original(
    path_or_id: str | os.PathLike,
    *,
    family: str | None = None,
    sample_size: int | None = None,
    allow_resize: bool = False,
    num_classes: int | None = None,
    num_attention_heads: int | None = None,
    decoder_layers: int | None = None,
    numerics: str = "original",
    lora: str | os.PathLike | None = None,
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> EdgeDiTTransformer2DModel:
    """A foreign diffusion transformer as an [`EdgeDiTTransformer2DModel`] in float32, in eval mode.

    Args:
        path_or_id: a weights file of facebookresearch/DiT, willisma/SiT or sail-sg/MDT (.pt, .safetensors, …; of a
            training checkpoint the moving average is taken), a diffusers `DiTTransformer2DModel` or `DiTPipeline`
            folder, or a Hub id of one.
        family: `"dit"`, `"sit"` or `"mdt"`; needed for a DiT or SiT file whose name and contents do not say which: they
            have the same keys.
        sample_size: the input size you expect, in latent pixels (32 for 256² images, 64 for 512²). A checkpoint of
            another size is an error, unless `allow_resize`: then the model gets this size, with position embeddings
                computed for it as the original does.
        num_classes: the number of classes you expect, without the null class; another number is an error.
        num_attention_heads: needed for widths other than those of the papers: the weights do not tell.
        decoder_layers: MDT (first version) only: how many last layers form the decoder; MDTv2's keys tell.
        numerics: `"original"` computes what the training code computes; `"diffusers"` what diffusers' class computes
            with the same weights, whose timestep frequencies and one epsilon differ. They are the config fields
            `frequency_shift` and `mlp_norm_eps`.
        lora: a LoRA adapter (folder or file of peft or diffusers) that is fused first; it may name the layers as the
            checkpoint or as [`EdgeDiTTransformer2DModel`] does.
        variant: of a diffusers folder, the weights of `diffusion_pytorch_model.<variant>.safetensors`, as in diffusers.
            Default: those without a variant, or, where there are none, those of the only variant.
        revision, token, cache_dir, local_files_only: as in diffusers, for Hub ids.

    Raises:
        EdgeDiTError: missing, truncated or foreign file, unknown class (the nearest supported one is named), another
            size or number of classes than asked for, weights that are missing, left over, of a wrong shape or not
            finite, duplicated embedders that differ.
    """
    for name, value, allowed in (("family", family, (None, *FAMILIES)), ("numerics", numerics, NUMERICS)):
        if value not in allowed:
            raise EdgeDiTError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    path = locate(path_or_id, **hub)
    source = _read_folder(path, variant) if path.is_dir() else _read_file(path)
    adapter = None if lora is None else _read_lora(Path(lora))
    if adapter is not None:
        _fuse(adapter, source.state)
    if source.config is not None and source.config.get("_class_name") == EdgeDiTTransformer2DModel.__name__:
        if source.config.get("quantization_config"):
            raise EdgeDiTError(
                f"{source.name} is a quantised EdgeDiT; load it with EdgeDiTTransformer2DModel.from_pretrained(…, "
                "quantization_config=EdgeDiTQuantizationConfig(dequantize=True)) and save it, or use it as it is."
            )
        parameters = inspect.signature(EdgeDiTTransformer2DModel.__init__).parameters
        config = {name: value.default for name, value in parameters.items() if name != "self"} | source.config
        state, source.state = source.state, {}
    else:
        try:
            if source.config is not None:
                config, state = _from_diffusers(source, numerics)
            else:
                config, state = _from_original(source, family, num_attention_heads, decoder_layers)
        except (
            IndexError,
            KeyError,
            TypeError,
            RuntimeError,
            ArithmeticError,
        ) as error:  # a weight without the dimensions that its name has
            raise EdgeDiTError(
                f"{source.name} cannot be converted, its weights are not of the shapes of a DiT: {_one_line(error)}"
            ) from error
        if source.config is None and numerics == "diffusers":
            config.update(frequency_shift=1.0, mlp_norm_eps=1e-5)
    if source.state:
        left = sorted(source.state)
        raise EdgeDiTError(
            f"{source.name} holds {len(left)} weights that this architecture has no place for, such as {left[0]!r}."
        )
    if num_classes is not None and num_classes != config["num_classes"]:
        raise EdgeDiTError(
            f"{source.name} has {config['num_classes']} classes, but {num_classes} are asked for; use a checkpoint of "
            "your classes, or do not ask for a number."
        )
    if sample_size is not None and sample_size != config["sample_size"]:
        config, state = _resize(source, config, state, sample_size, allow_resize)
    if adapter is not None:
        _fuse(adapter, state)
        if adapter:
            raise EdgeDiTError(
                f"The adapter {lora} changes layers that {source.name} does not have, such as {sorted(adapter)[0]!r}."
            )
    return _build(source.name, config, state)


def locate(path_or_id: str | os.PathLike, **hub: Any) -> Path:
    """The local file or folder of a path or Hub id (of which a transformer's, scheduler's and VAE's files are
    downloaded).
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    path = Path(path_or_id)
    if path.exists():
        return path
    text = str(path_or_id)
    if (
        isinstance(path_or_id, Path)
        or text.startswith((".", "/", "~"))
        or text.count("/") != 1
        or path.suffix in WEIGHT_FILES
    ):
        raise EdgeDiTError(
            f"There is no file or folder {text}; give a weights file, a diffusers folder or a Hub id "
            "(organisation/name)."
        )
    wanted = ["*.json", "transformer/*", "scheduler/*", "vae/*", "diffusion_pytorch_model*"]
    try:
        return Path(snapshot_download(text, allow_patterns=wanted, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise EdgeDiTError(
            f"{text} is neither a local path nor a Hub id that can be downloaded: {' '.join(str(error).split())}"
        ) from error


# -------------------------------------------------------------------- reading


def only_variant(folder: Path, stem: str = STEM, variant: str | None = None) -> str | None:
    """Which variant of the weights in a folder of diffusers or transformers is meant: the given one, or none where
    there are plain files, or the only one that is there.

    Raises:
        EdgeDiTError: there are several variants and no plain files.
    """
    if variant is not None:
        return variant
    found: set[str | None] = set()
    for path in folder.glob(f"{stem}[.-]*"):
        if path.suffix in (".safetensors", ".bin", ".json"):
            rest = re.sub(r"-\d+-of-\d+", "", path.name[len(stem) :]).split(".")
            found.add(
                ".".join(part for part in rest if part not in ("", "safetensors", "bin", "index", "json")) or None
            )
    if None in found or len(found) < 2:
        return None if None in found or not found else found.pop()
    raise EdgeDiTError(
        f"{folder} holds the variants {', '.join(sorted(found))} of its weights and none without; say which with "
        "variant."
    )


def pipeline_variant(folder: Path) -> str | None:
    """The variant that a pipeline folder's weights must be loaded in, if a component has none without.

    Raises:
        EdgeDiTError: the components are there in different variants.
    """
    variants = {}
    for config in sorted(folder.glob("*/config.json")):
        stem = "model" if any(config.parent.glob("model[.-]*")) else STEM
        variants[only_variant(config.parent, stem)] = config.parent.name
    variants.pop(None, None)
    if len(variants) > 1:
        raise EdgeDiTError(
            f"The components of {folder} are there in different variants only ({variants}); load and save them in one."
        )
    return next(iter(variants), None)


def weight_files(folder: Path, stem: str = STEM, variant: str | None = None) -> list[Path]:
    """The files of a model's weights, as diffusers finds them: sharded or whole, safetensors before pickles, of a
    variant or not.

    Raises:
        EdgeDiTError: there are none, an index is damaged, or it names files elsewhere or files that are not there.
    """
    variant = only_variant(folder, stem, variant)
    middle = "" if variant is None else f".{variant}"
    for kind in (".safetensors", ".bin"):
        # The second is how diffusers wrote the index of a variant once.
        for index in (folder / f"{stem}{kind}.index{middle}.json", folder / f"{stem}{middle}{kind}.index.json"):
            if not index.is_file():
                continue
            try:
                files = sorted(set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise EdgeDiTError(f"{index} is no index of weight files ({type(error).__name__}: {error}).") from error
            if any(not isinstance(file, str) or Path(file).name != file for file in files):
                raise EdgeDiTError(f"{index} names files outside its folder: {files}.")
            missing = [file for file in files if not (folder / file).is_file()]
            if missing:
                raise EdgeDiTError(
                    f"{index} names {len(files)} files, of which {missing[0]} is not there; copy or download the whole "
                    "folder again."
                )
            return [folder / file for file in files]
        if (folder / f"{stem}{middle}{kind}").is_file():
            return [folder / f"{stem}{middle}{kind}"]
    raise EdgeDiTError(
        f"{folder} has no weights; expected {stem}{middle}.safetensors or {stem}{middle}.bin, or an index of their "
        "parts."
    )


def _look_at(path: Path) -> None:
    """Raise if a weights file is evidently something else; torch and safetensors would speak of pickles and headers."""
    if not path.is_file():
        raise EdgeDiTError(f"{path} is not a regular file, so no weights can be read from it.")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        raise EdgeDiTError(f"{path} is empty (0 bytes); download or save it again.")
    if start.startswith(b"version https://git-lfs"):
        claimed = re.search(rb"size (\d+)", start)
        raise EdgeDiTError(
            f"{path} ({size} bytes) is a Git LFS pointer, not the weights it stands "
            f"for{f' ({int(claimed[1])} bytes)' if claimed else ''}; fetch them: git lfs pull."
        )
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise EdgeDiTError(
            f"{path} ({size} bytes) is a web page, not weights; download the file itself (on the Hub its address has "
            "/resolve/, not /blob/)."
        )


def _read_tensors(path: Path) -> Any:
    """What a weights file holds; pickles only as far as `weights_only` trusts them (plus the plain namespace of a
    training run).
    """
    _look_at(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )  # old files are no archives
    except pickle.UnpicklingError as error:
        # Without torch's advice, which is to trust the file.
        said = re.search(r"GLOBAL [\w.]+|unrecognized function \S+|[Uu]nsupported class \S+", str(error))
        if said is not None:
            raise EdgeDiTError(
                f"{path} holds more than tensors and is not opened ({said[0]}); save its state_dict, best as "
                "safetensors."
            ) from error
        raise EdgeDiTError(
            f"{path} ({path.stat().st_size} bytes) is no readable weights file, or truncated: it is no pickle of "
            "tensors."
        ) from error
    except Exception as error:  # what a malformed pickle ends in depends on its bytes
        if isinstance(error, EdgeDiTError):
            raise
        raise EdgeDiTError(
            f"{path} ({path.stat().st_size} bytes) is no readable weights file, or truncated: {_one_line(error)}"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _state_of(path: Path, content: Any) -> dict[str, torch.Tensor]:
    """The state dict in what a file holds, out of its wrappers, under the names that the bare model has; checked, and
    nothing allocated.

    Raises:
        EdgeDiTError: there is none, two names are the same weight's, or a tensor is not a plain one whose values stand
            in the file.
    """
    for _ in range(len(WRAPPERS)):
        key = next(
            (key for key in WRAPPERS if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)), None
        )
        if key is None:
            break
        content = content[key]
    if not isinstance(content, Mapping) or not content:
        held = f"a {type(content).__name__}" if not isinstance(content, Mapping) else "an empty dict"
        raise EdgeDiTError(f"{path} holds {held}, not a state dict of tensors.")
    if foreign := [
        key for key, value in content.items() if not isinstance(key, str) or not isinstance(value, torch.Tensor)
    ]:
        kind = type(content[foreign[0]]).__name__
        raise EdgeDiTError(
            f"{path} is not a state dict of tensors: {foreign[0]!r}, one of its keys {sorted(map(str, content))[:4]}, "
            + (f"is a {kind}." if isinstance(foreign[0], str) else f"is no name but a {type(foreign[0]).__name__}.")
        )
    state: dict[str, torch.Tensor] = {}
    common = next((prefix for prefix in COMMON_PREFIXES if all(_bare(key).startswith(prefix) for key in content)), "")
    for key, value in content.items():
        name = _bare(key).removeprefix(common)
        if name in state:
            raise EdgeDiTError(f"{path} holds the weight {name!r} twice, once as {key!r}; keep one of the two.")
        state[name] = value
    _check_tensors(path, state)
    return state


def _bare(key: str) -> str:
    """The name of a weight without those of its wrappers."""
    *parents, last = key.split(".")
    return ".".join([part for part in parents if f"{part}." not in WRAPPED_NAMES] + [last])


def _check_tensors(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Raise unless every tensor is a plain array of floats (the index of a relative position bias: of integers) that
    the file really holds.
    """
    size = path.stat().st_size
    claimed = 0
    for name, value in state.items():
        odd = None
        if value.is_meta:
            odd = "has a shape but no values (it is on the meta device)"
        elif value.layout != torch.strided:
            odd = f"is sparse ({value.layout})"
        elif value.is_quantized:
            odd = f"is quantised ({value.dtype})"
        elif type(value) not in (torch.Tensor, torch.nn.Parameter):
            odd = f"is a {type(value).__name__}"
        elif value.is_complex():
            odd = f"is complex ({value.dtype})"
        elif not value.is_floating_point() and not name.endswith("relative_position_index"):
            odd = f"holds integers ({value.dtype})"
        if odd is not None:
            raise EdgeDiTError(f"{path}: the weight {name!r} {odd}; save the model with plain floating-point weights.")
        needed = value.numel() * value.element_size()
        claimed += needed
        if needed > value.untyped_storage().nbytes() or claimed > SHARED * size:
            raise EdgeDiTError(
                f"{path} has {size} bytes, but its weights up to {name!r}, of shape {tuple(value.shape)}, stand for "
                f"{claimed}: tensors in it were expanded without their values. Save the model with .contiguous() "
                "weights."
            )


def _read_file(path: Path) -> _Source:
    if path.suffix not in WEIGHT_FILES:
        raise EdgeDiTError(f"{path} is no weights file; they end in {', '.join(WEIGHT_FILES)}.")
    content = _read_tensors(path)
    arguments: dict[str, Any] = {}
    if isinstance(content, Mapping) and isinstance(content.get("args"), argparse.Namespace):
        arguments = vars(content["args"])
    return _Source(str(path), _state_of(path, content), arguments=arguments)


def _read_folder(path: Path, variant: str | None = None) -> _Source:
    """A diffusers transformer's folder, or the transformer of a pipeline's folder."""
    folder = path / "transformer" if (path / "model_index.json").is_file() else path
    try:
        config = parse_json((folder / "config.json").read_text(encoding="utf-8"))
        name = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EdgeDiTError(
            f"{folder} has no readable config.json of a diffusers model ({type(error).__name__}: {error})."
        ) from error
    supported = (*DIFFUSERS_CLASSES, EdgeDiTTransformer2DModel.__name__)
    if name not in supported:
        nearest = difflib.get_close_matches(str(name), supported, 1, cutoff=0.0)[0]
        raise EdgeDiTError(
            f"{folder} holds a {name}, which cannot be converted; the nearest supported class is {nearest} (supported: "
            f"{', '.join(supported)})."
        )
    if name == "Transformer2DModel" and config.get("norm_type") != "ada_norm_zero":
        raise EdgeDiTError(
            f"{folder} holds a Transformer2DModel with norm_type {config.get('norm_type')!r}; only 'ada_norm_zero' is "
            "a DiT. The nearest supported class is DiTTransformer2DModel."
        )
    files = weight_files(folder, variant=variant)
    check_size(folder, config, files)
    state: dict[str, torch.Tensor] = {}
    for file in files:
        state.update(_state_of(file, _read_tensors(file)))
    return _Source(str(folder), state, config=config)


def check_size(folder: Path, config: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Raise if a config of this package's describes a network that the weight files cannot hold, before one of that
    size is made.

    A lower bound: the weights of every layer's modulation or attention alone, at one bit each.
    """
    try:
        if config["_class_name"] == EdgeDiTTransformer2DModel.__name__:
            layers = len(config["layers"]) if config.get("layers") else config["num_layers"]
            weights = 6 * layers * config["hidden_size"] ** 2
        elif config["_class_name"] == "ElasticDiTTransformer2DModel":
            layers = sum(config["num_layers"])
            weights = layers * (config["num_attention_heads"] * config["attention_head_dim"]) ** 2
        else:
            return
        too_many = weights // 8 > sum(file.stat().st_size for file in files)
    except (KeyError, TypeError, AttributeError) as error:
        raise EdgeDiTError(
            f"The config.json of {folder} describes no model ({type(error).__name__}: {error})."
        ) from error
    if too_many:
        raise EdgeDiTError(
            f"The config.json of {folder} describes {layers} layers with at least {weights} weights, but its weight "
            f"files have {sum(file.stat().st_size for file in files)} bytes; config and weights must come from "
            "the same "
            "model."
        )


def check_weights(model: torch.nn.Module, what: str) -> None:
    """Raise unless all weights are finite and no layer is all zeros: nothing can be learned from such a network, and
    what fails is far from the cause.
    """
    check_finite(model.state_dict(), what, "train or convert it anew.")
    for name, layers in model.named_children():
        for index, layer in enumerate(layers if isinstance(layers, torch.nn.ModuleList) else ()):
            parameters = list(layer.parameters())
            if parameters and not any(parameter.any() for parameter in parameters):
                raise EdgeDiTError(
                    f"{what}: every weight of its layer {name}.{index} is 0, it is no trained network; train or "
                    "convert it anew."
                )


# -------------------------------------------------------------------- conversions


def _sizes(source: _Source, projection: str, output: str, table: str | None) -> dict[str, Any]:
    """Config fields that the shapes of the patch projection, the output layer and the label table tell."""
    weight, out = source.state.get(projection), source.state.get(output)
    if weight is None or out is None or weight.ndim != 4:
        raise EdgeDiTError(
            f"{source.name} lacks the patch projection {projection!r} or the output layer {output!r} of a DiT."
        )
    hidden_size, channels, patch = weight.shape[0], weight.shape[1], weight.shape[2]
    ratio = out.shape[0] / (channels * patch * patch)
    if ratio not in (1, 2):
        raise EdgeDiTError(
            f"{source.name} predicts {out.shape[0]} values a patch of {patch}² × {channels}; a DiT predicts as many or "
            "twice as many."
        )
    rows = source.state[table].shape[0] if table in source.state else 0
    return {
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden_size,
        "learn_sigma": ratio == 2,
        "num_classes": max(0, rows - 1),
        "prediction_type": "epsilon",
    }


def _from_diffusers(source: _Source, numerics: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    theirs, stem = source.config, "transformer_blocks.0.norm1.emb."
    config = _sizes(
        source, "pos_embed.proj.weight", "proj_out_2.weight", stem + "class_embedder.embedding_table.weight"
    )
    depth = source.count("transformer_blocks")
    config.update(
        sample_size=theirs["sample_size"],
        num_layers=depth,
        num_attention_heads=theirs["num_attention_heads"],
        mlp_ratio=_ratio(source, "transformer_blocks.0.ff.net.0.proj.weight", config["hidden_size"]),
    )
    expected = {
        "activation_fn": "gelu-approximate",
        "norm_elementwise_affine": False,
        "attention_bias": True,
        "norm_type": "ada_norm_zero",
    }
    for key, value in expected.items():
        if theirs.get(key, value) != value:
            raise EdgeDiTError(f"{source.name} has {key} {theirs[key]!r}; only {value!r}, DiT's own, can be converted.")
    if numerics == "diffusers":
        config.update(frequency_shift=1.0, mlp_norm_eps=float(theirs.get("norm_eps", 1e-5)))
    state: dict[str, torch.Tensor] = {}
    source.state.pop("pos_embed.pos_embed", None)  # always the formula
    source.move(_DIFFUSERS_TRUNK, "", "", state)
    embedder = {f"timestep_embedder.linear_{i}": f"timestep_embedder.linear_{i}" for i in (1, 2)}
    for index in range(depth):
        old, new = f"transformer_blocks.{index}.", f"blocks.{index}."
        source.move(_DIFFUSERS_BLOCK, old, new, state)
        for part in ("weight", "bias"):
            parts = [source.take(f"{old}attn1.to_{kind}.{part}") for kind in "qkv"]
            state[f"{new}attn.to_qkv.{part}"] = torch.cat(parts)
        copy: dict[str, torch.Tensor] = {}
        source.move(embedder, f"{old}norm1.emb.", "", copy)
        copy["label_embedder.weight"] = source.take(f"{old}norm1.emb.class_embedder.embedding_table.weight")
        for key, value in copy.items():
            if not torch.equal(state.setdefault(key, value), value):
                difference = (state[key].float() - value.float()).abs().max().item()
                raise EdgeDiTError(
                    f"{source.name}: layer {index}'s own copy of {key} differs from layer 0's by up to "
                    f"{difference:.3g}; this architecture has one embedder for all layers, so only checkpoints whose "
                    "copies are equal can be converted."
                )
    return config, state


def _from_original(
    source: _Source, family: str | None, heads: int | None, decoder_layers: int | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    found = _family(source, family)
    config = _sizes(source, "x_embedder.proj.weight", "final_layer.linear.weight", "y_embedder.embedding_table.weight")
    hidden_size = config["hidden_size"]
    state: dict[str, torch.Tensor] = {}
    source.move(_TRUNK, "", "", state)
    if config["num_classes"]:
        state["label_embedder.weight"] = source.take("y_embedder.embedding_table.weight")

    stacks = ("en_inblocks", "en_outblocks", "de_blocks") if found == "mdtv2" else ("blocks",)
    depths = [source.count(stem) for stem in stacks]
    stems = [f"{stem}.{i}." for stem, depth in zip(stacks, depths) for i in range(depth)]
    if not stems:
        raise EdgeDiTError(f"{source.name} has no transformer blocks below {', '.join(stacks)}.")
    config["num_layers"] = len(stems)
    config["mlp_ratio"] = _ratio(source, f"{stems[0]}mlp.fc1.weight", hidden_size)
    tables = [v for k, v in source.state.items() if k.endswith("relative_position_bias_table")]
    config["num_attention_heads"] = heads or (tables[0].shape[1] if tables else _heads(source, hidden_size))
    _take_positions(source, "pos_embed", config, state, required=found in ("mdt", "mdtv2"))

    if found == "mdtv2":
        half = depths[0]
        skips = [[half - 1 - i, half + i] for i in range(half)] + [[-1, 2 * half + i] for i in range(depths[2])]
        config.update(long_skips=skips, decoder_start=2 * half)
        for _, end in skips:
            source.move({"skip_linear": f"skips.{end}"}, stems[end], "", state)
    elif found == "mdt":
        if decoder_layers is None:
            raise EdgeDiTError(
                f"{source.name} is an MDT of the first version, whose weights do not tell where the decoder begins; "
                "give decoder_layers (2 for the published MDT-XL/2)."
            )
        if not 0 < decoder_layers < len(stems):
            raise EdgeDiTError(f"decoder_layers is {decoder_layers}; {source.name} has {len(stems)} layers.")
        config["decoder_start"] = len(stems) - decoder_layers
    if found in ("mdt", "mdtv2"):
        config["position_bias"] = True
        config["side_layers"] = source.count("sideblocks")
        state["mask_token"] = source.take("mask_token")
        state["decoder_pos_embed"] = source.take("decoder_pos_embed")[0]
        for index in range(config["side_layers"]):
            _move_block(source, f"sideblocks.{index}.", f"side_blocks.{index}.", state)
    for index, stem in enumerate(stems):
        _move_block(source, stem, f"blocks.{index}.", state)
    if found == "sit":
        config.update(prediction_type="flow_prediction", learn_sigma=False, **SIT_TIME)
        channels = config["in_channels"]
        for part in ("weight", "bias"):
            value = state[f"proj_out.{part}"]
            # The last axis of a patch's values is the channel; SiT throws away the second half where DiT's variance
            # stands.
            values = value.unflatten(0, (config["patch_size"] ** 2, -1))[:, :channels]
            state[f"proj_out.{part}"] = -values.flatten(0, 1)
    return config, state


def _family(source: _Source, asked: str | None) -> str:
    """`dit`, `sit`, `mdt` or `mdtv2`."""
    keys = source.state
    if any(key.startswith("transformer_blocks.") for key in keys):
        raise EdgeDiTError(
            f"{source.name} is the weights file of a diffusers model; give its folder, which has the config.json."
        )
    if "x_embedder.proj.weight" not in keys or "final_layer.linear.weight" not in keys:
        raise EdgeDiTError(f"{source.name} is no DiT, SiT or MDT checkpoint: its keys begin with {sorted(keys)[:3]}.")
    masked = "mdtv2" if any(key.startswith("en_inblocks.") for key in keys) else "mdt" if "mask_token" in keys else None
    if masked or asked == "mdt":
        if asked not in (None, "mdt") or not masked:
            raise EdgeDiTError(
                f"{source.name} has the keys of {masked or 'DiT or SiT'}, but family {asked!r} is asked for."
            )
        return masked
    said = str(source.arguments.get("model", "")).lower() or Path(source.name).stem.lower()
    named = [family for family in ("dit", "sit") if family in said]
    if asked is None and len(named) != 1:
        raise EdgeDiTError(
            f"{source.name} may be DiT or SiT: the keys are the same, and neither its name nor its contents say which. "
            "Give family='dit' or family='sit' (--family)."
        )
    family = asked or named[0]
    if family == "sit":
        for key, value in (("prediction", "velocity"), ("path_type", "Linear")):
            if source.arguments.get(key, value) != value:
                raise EdgeDiTError(
                    f"{source.name} was trained with {key} {source.arguments[key]!r}; only SiT's {value!r} can be "
                    "converted."
                )
    return family


def _move_block(source: _Source, old: str, new: str, state: dict[str, torch.Tensor]) -> None:
    source.move(_BLOCK, old, new, state)
    table = f"{old}attn.rel_pos_bias.relative_position_bias_table"
    if table in source.state:
        # The last three rows stand for a class token, which there is none of (BEiT's code, from which MDT has it).
        state[f"{new}attn.position_bias.table"] = source.take(table)[:-3]
        source.take(f"{old}attn.rel_pos_bias.relative_position_index")


def _take_positions(
    source: _Source, key: str, config: dict[str, Any], state: dict[str, torch.Tensor], required: bool
) -> None:
    """The input size, and the position embedding if it is not the formula's (MDT trains it)."""
    stored = source.take(key)[0]  # (N, D)
    grid = math.isqrt(len(stored))
    if grid * grid != len(stored):
        raise EdgeDiTError(f"{source.name} has position embeddings for {len(stored)} tokens, which is no square.")
    config["sample_size"] = grid * config["patch_size"]
    formula = sincos_position_embedding(grid, grid, config["hidden_size"])
    if required or (stored.float() - formula).abs().max() > POSITION_TOLERANCE:
        config["learned_position"] = True
        state["pos_embed"] = stored


def _ratio(source: _Source, key: str, hidden_size: int) -> float:
    weight = source.state.get(key)
    if weight is None:
        raise EdgeDiTError(f"{source.name} lacks the weight {key!r}: it is damaged, or not of this family.")
    return weight.shape[0] / hidden_size


def _heads(source: _Source, hidden_size: int) -> int:
    if hidden_size not in HEADS:
        raise EdgeDiTError(
            f"{source.name} has width {hidden_size}, for which no published model gives the number of heads (known: "
            f"{HEADS}); give num_attention_heads."
        )
    return HEADS[hidden_size]


def _resize(
    source: _Source, config: dict[str, Any], state: dict[str, torch.Tensor], sample_size: int, allowed: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The same weights at another input size: the originals compute their position embedding for the size at hand."""
    native = config["sample_size"]
    if not allowed:
        raise EdgeDiTError(
            f"{source.name} was trained at sample size {native} ({8 * native}² images with a VAE of factor 8), but "
            f"{sample_size} is asked for. If you mean to run it at another resolution than it learned, say so with "
            "allow_resize (--allow-resize)."
        )
    if config.get("learned_position") or config.get("position_bias"):
        raise EdgeDiTError(
            f"{source.name} learned its positions at sample size {native}; it cannot be resized to {sample_size}."
        )
    return {**config, "sample_size": sample_size}, state


def _build(name: str, config: dict[str, Any], state: dict[str, torch.Tensor]) -> EdgeDiTTransformer2DModel:
    from accelerate import init_empty_weights

    try:
        with init_empty_weights():
            model = EdgeDiTTransformer2DModel.with_config(config)
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise EdgeDiTError(f"{name} describes no model: {error}") from error
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    if expected != found:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        key = wrong[0]
        raise EdgeDiTError(
            f"{name}: {len(wrong)} weights do not fit; {key!r} has the shape {found.get(key, 'none: it is missing')}, "
            f"the model needs {expected.get(key, 'none: it has no such weight')}."
        )
    # Cloned: a tensor that stays mapped to its file would change with it.
    state = {key: value.to(torch.float32, copy=True) for key, value in state.items()}
    check_finite(state, name, "take a checkpoint of before they did.")
    model.load_state_dict(state, assign=True)
    return model.eval()


# -------------------------------------------------------------------- adapters


def _read_lora(path: Path) -> dict[str, torch.Tensor]:
    """Layer name → its change α/r · B·A, of a peft adapter folder or a diffusers LoRA file."""
    names = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
    file = next((path / name for name in names if (path / name).is_file()), path)
    if not file.is_file() or file.suffix != ".safetensors":
        raise EdgeDiTError(
            f"{path} is no LoRA adapter: expected a .safetensors file, or a folder with {' or '.join(names)}."
        )
    tensors = _read_tensors(file)
    check_finite(tensors, f"The adapter {path}", "take one of before they did.")
    with safe_open(file, framework="pt") as opened:
        metadata = (opened.metadata() or {}).get("lora_adapter_metadata")
    beside = file.parent / "adapter_config.json"
    try:
        text = metadata or (beside.read_text(encoding="utf-8") if beside.is_file() else "{}")
        options = {key.removeprefix("transformer."): value for key, value in parse_json(text).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise EdgeDiTError(f"The options of the adapter {path} are not JSON: {error}.") from error
    held_to(options, Adapter, file if metadata else beside, "peft", "a LoRA adapter")
    for key in ("use_dora", "rank_pattern", "alpha_pattern"):
        if options.get(key):
            raise EdgeDiTError(
                f"The adapter {path} has {key} {options[key]!r}; only plain LoRA can be fused. Merge it with peft "
                "first."
            )
    changes: dict[str, torch.Tensor] = {}
    for key in [k for k in tensors if k.endswith(".lora_A.weight")]:
        stem = key.removesuffix(".lora_A.weight")
        try:
            down, up = tensors.pop(key).float(), tensors.pop(f"{stem}.lora_B.weight").float()
        except KeyError:
            raise EdgeDiTError(f"The adapter {path} has {key!r} without its lora_B.") from None
        rank = down.shape[0]
        alpha = tensors.pop(f"{stem}.alpha", None)
        alpha = float(options.get("lora_alpha", rank) if alpha is None else alpha)
        scale = alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)
        changes[stem.removeprefix("base_model.model.").removeprefix("transformer.")] = scale * (up @ down)
    if tensors or not changes:
        raise EdgeDiTError(
            f"{file} holds {sorted(tensors)[:3] or 'no LoRA weights'}; expected pairs <layer>.lora_A.weight, "
            "<layer>.lora_B.weight."
        )
    return changes


def _fuse(changes: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    """Add the changes whose layers `state` names, and take them out of `changes`."""
    for layer in [name for name in changes if f"{name}.weight" in state]:
        weight, change = state[f"{layer}.weight"], changes.pop(layer)
        if weight.shape != change.shape:
            raise EdgeDiTError(
                f"The adapter changes {layer} by {tuple(change.shape)}, but the checkpoint's weight is "
                f"{tuple(weight.shape)}."
            )
        state[f"{layer}.weight"] = weight.float() + change
