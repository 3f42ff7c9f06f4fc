"""Files of weights: where they lie, which variant is meant, and what they hold, read without trusting them."""

from __future__ import annotations

import argparse
import math
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import EdgeDiTError
from ..files import check_finite, parse_json
from ..hub import resolve
from ..records import Adapter
from ..schema import held_to

WEIGHT_FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
STEM = "diffusion_pytorch_model"  # of the weight files in a diffusers folder
# What training scripts wrap a state dict in, the moving average first: the originals' own samplers take it too.
WRAPPERS = ("ema", "ema_state_dict", "model_ema", "ema_model", "state_dict", "model_state_dict", "model", "module")
# What DataParallel, torch.compile, FSDP and activation checkpointing put into the names of weights, anywhere in them.
WRAPPED_NAMES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Taken off where all names have them.
COMMON_PREFIXES = ("model.", "ema_model.", "net.", "diffusion_model.", "transformer.")
SHARED = 4  # a file's tensors may stand for so many times its bytes (weights under two names), not for more


def locate(path_or_id: str | os.PathLike, **hub: Any) -> Path:
    """The local file or folder of a path or Hub id (of which a transformer's, scheduler's and VAE's files are
    downloaded).
    """
    wanted = ["*.json", "transformer/*", "scheduler/*", "vae/*", "diffusion_pytorch_model*"]
    path = resolve(path_or_id, wanted, **hub)
    if not path.exists():
        raise EdgeDiTError(
            f"There is no file or folder {path_or_id}; give a weights file, a diffusers folder or a Hub id "
            "(organisation/name)."
        )
    return path


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


def read_tensors(path: Path) -> Any:
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
            f"{path} ({path.stat().st_size} bytes) is no readable weights file, or truncated: {one_line(error)}"
        ) from error


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters; its class where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def state_dict_in(path: Path, content: Any) -> dict[str, torch.Tensor]:
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


def read_lora(path: Path) -> dict[str, torch.Tensor]:
    """Layer name → its change α/r · B·A, of a peft adapter folder or a diffusers LoRA file."""
    names = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
    file = next((path / name for name in names if (path / name).is_file()), path)
    if not file.is_file() or file.suffix != ".safetensors":
        raise EdgeDiTError(
            f"{path} is no LoRA adapter: expected a .safetensors file, or a folder with {' or '.join(names)}."
        )
    tensors = read_tensors(file)
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
