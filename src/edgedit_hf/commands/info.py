"""`edgedit info`: parameters, multiply-accumulates, FLOPs and bytes of a preset or a saved model, in closed form."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import EdgeDiTError

CONFIG, INDEX = "config.json", "model_index.json"
CLASSES = ("EdgeDiTTransformer2DModel", "OnnxEdgeDiTTransformer2DModel")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the `edgedit` parser."""
    parser = subparsers.add_parser("info", help="count a model's parameters, FLOPs and bytes")
    parser.add_argument("model", metavar="NAME_OR_PATH", help="a preset (DiT-XL/2, EdgeDiT-1, …), a pipeline or model folder, or a Hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print what [`describe`] finds."""
    facts = describe(args.model)
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    channels, height, width = facts["input"]
    sizes = ", ".join(f"{precision} {_short(count)}B" for precision, count in facts["bytes"].items())
    print(f"{facts['name']}  (one input of {height} x {width} x {channels}, {facts['tokens']} tokens)")
    print(f"  parameters  {_short(facts['parameters'])}  (learned: {_short(facts['weights'])})")
    print(f"  compute     {_short(facts['flops'])}FLOPs  ({_short(facts['macs'])}MACs)")
    print(f"  weights     {sizes}")
    merged = f", merged {facts['merged']}" if facts["merged"] else ""
    print(f"  layers      {facts['layers']} of {facts['teacher_layers']} teacher layers{merged}")
    print(f"  genotype    {facts['genotype']}")


def _short(count: int) -> str:
    for prefix, unit in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        # Parameters are customarily given in millions: 1,043.21 M, not 1.04 G, keeps the digits that papers print.
        if count >= unit and not (prefix == "G" and count < 1e10):
            return f"{count / unit:,.2f} {prefix}"
    return f"{count} "


def describe(name: str) -> dict[str, Any]:
    """The figures of a preset or a saved model.

    Returns:
        `parameters` (with the fixed position embedding, as published), `weights` (learned ones), `macs` and `flops` of one forward
        of one image, `bytes` of the weights at each precision, `layers`, `teacher_layers`, `merged`, `genotype` (its hash), `input`
        (channels, height, width), `tokens`, `name`.

    Raises:
        EdgeDiTError: there is no such preset or model, or its config is not an EdgeDiT's.
    """
    from ..genotype import Genotype
    from ..search_space import BYTES, model_cost

    config = _folder_config(Path(name)) or _preset_config(name) or _hub_config(name)
    try:
        if config.get("layers") is None:
            sizes = (config["num_layers"], config["hidden_size"], config["num_attention_heads"], config["mlp_ratio"])
            config["layers"] = Genotype.original(*sizes).to_layers()
        cost = model_cost(config)
        genotype = Genotype.from_layers(config["layers"], config["hidden_size"])
        shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    except (KeyError, TypeError) as error:
        raise EdgeDiTError(f"The config of {name} is not an EdgeDiT's: {type(error).__name__} {error}.") from None
    return {
        "name": name,
        "parameters": cost.parameters,
        "weights": cost.weights,
        "macs": cost.macs,
        "flops": cost.flops,
        "bytes": {precision: cost.bytes(precision) for precision in BYTES},
        "layers": len(genotype.layers),
        "teacher_layers": genotype.num_teacher_layers,
        "merged": [list(pair) for pair in genotype.merged],
        "genotype": genotype.hash,
        "input": shape,
        "tokens": (shape[1] // config["patch_size"]) ** 2,
    }


def _preset_config(name: str) -> dict[str, Any] | None:
    """The full config of a preset, without building the network; `None` if there is none of this name."""
    from ..models.transformer_edgedit import PRESETS, EdgeDiTTransformer2DModel

    if name not in PRESETS:
        return None
    parameters = inspect.signature(EdgeDiTTransformer2DModel.__init__).parameters
    return {key: value.default for key, value in parameters.items() if key != "self"} | PRESETS[name]


def _folder_config(folder: Path) -> dict[str, Any] | None:
    """The config of the denoiser in a pipeline folder or in its own; `None` if there is no such folder."""
    if not folder.is_dir():
        return None
    path = folder / "transformer" / CONFIG if (folder / INDEX).is_file() else folder / CONFIG
    if not path.is_file():
        models = sorted(str(index.parent) for index in folder.glob(f"*/{INDEX}"))
        hint = f"the models in it are {', '.join(models)}" if models else "give a pipeline or model folder"
        raise EdgeDiTError(f"{folder} holds no {path.relative_to(folder)}; {hint}.")
    return _read_config(path)


def _hub_config(name: str) -> dict[str, Any]:
    """The config of the denoiser in a Hub repository, from the cache if the Hub is out of reach."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from ..models.transformer_edgedit import PRESETS

    if name.count("/") == 1:
        for filename in (f"transformer/{CONFIG}", CONFIG):
            try:
                return _read_config(Path(hf_hub_download(name, filename)))
            except (EntryNotFoundError, LocalEntryNotFoundError):
                continue
            except (HFValidationError, HfHubHTTPError, OSError):
                break
    near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4)
    hint = f"near it: {', '.join(near)}" if near else f"presets: {', '.join(PRESETS)}"
    if Path(name).is_file():
        hint = f"if it is a DiT, SiT or MDT checkpoint, convert it first: edgedit convert {name} OUT"
    raise EdgeDiTError(f"{name!r} is neither a folder, nor a preset, nor a model in reach on the Hub; {hint}.")


def _read_config(path: Path) -> dict[str, Any]:
    from ..run_state import read_json

    config = read_json(path, "save_pretrained")
    kind = config.get("_class_name") if isinstance(config, Mapping) else type(config).__name__
    if kind not in CLASSES:
        raise EdgeDiTError(f"{path} describes a {kind}; edgedit info counts {' and '.join(CLASSES)}.")
    return dict(config)
