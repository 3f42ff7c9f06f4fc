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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import EdgeDiTError
from ..files import check_finite, parse_json
from ..hub import component_folder
from .stored_weights import WEIGHT_FILES, locate, one_line, read_lora, read_tensors, state_dict_in, weight_files
from .transformer_edgedit import EdgeDiTTransformer2DModel, sincos_position_embedding

FAMILIES = ("dit", "sit", "mdt")
NUMERICS = ("original", "diffusers")
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width: S, B, L and XL of DiT, SiT and MDT
# SiT's time runs from noise at 0 to data at 1 and its velocity points to the data; ours from data at 0 to noise at
# 1000, with the velocity ε − x0: the embedder sees 1 − t/1000, and the output projection's sign is turned.
SIT_TIME = {"timestep_scale": -1e-3, "timestep_offset": 1.0}
# Classes of diffusers that are this architecture, by the name in config.json; the second is what old DiT folders say.
DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
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
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of an original training run

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
    hub: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    path = locate(path_or_id, **hub)
    source = _read_folder(path, variant) if path.is_dir() else _read_file(path)
    adapter = None if lora is None else read_lora(component_folder(lora, **{**hub, "revision": None}))
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
                f"{source.name} cannot be converted, its weights are not of the shapes of a DiT: {one_line(error)}"
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


# -------------------------------------------------------------------- reading


def _read_file(path: Path) -> _Source:
    if path.suffix not in WEIGHT_FILES:
        raise EdgeDiTError(f"{path} is no weights file; they end in {', '.join(WEIGHT_FILES)}.")
    content = read_tensors(path)
    arguments: Mapping[str, Any] = {}
    if isinstance(content, Mapping) and isinstance(content.get("args"), argparse.Namespace):
        arguments = vars(content["args"])
    return _Source(str(path), state_dict_in(path, content), arguments=arguments)


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
        state.update(state_dict_in(file, read_tensors(file)))
    return _Source(str(folder), state, config=config)


def check_size(folder: Path, config: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Raise if a config of this package's describes a network that the weight files cannot hold, before one of that
    size is made.

    A lower bound: the weights of every layer's modulation or attention alone (of an EdgeDiT's attention only where the
    modulation is not whole), at one bit each.
    """
    try:
        if config["_class_name"] == EdgeDiTTransformer2DModel.__name__:
            layers = len(config["layers"]) if config.get("layers") else config["num_layers"]
            width, weights = config["hidden_size"], 6 * layers * config["hidden_size"] ** 2
            for layer in config.get("layers") or ():
                if (rank := layer.get("modulation_rank")) is not None:
                    weights += 7 * width * rank + 4 * width * layer["attention_dim"] - 6 * width * width
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
