"""`edgedit info`: parameters, multiply-accumulates, FLOPs and bytes of a preset or a saved model, in closed form."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import EdgeDiTError
from ..hub import is_name, resolve
from ..models.presets import preset_configs

CONFIG, INDEX = "config.json", "model_index.json"
WANTED = [INDEX, CONFIG, f"transformer/{CONFIG}"]  # of a repository of the Hub
ELASTIC = "ElasticDiTTransformer2DModel"
CLASSES = ("EdgeDiTTransformer2DModel", "OnnxEdgeDiTTransformer2DModel", ELASTIC)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the `edgedit` parser."""
    parser = subparsers.add_parser("info", help="count a model's parameters, FLOPs and bytes")
    parser.add_argument(
        "model",
        metavar="NAME_OR_PATH",
        help="a preset (DiT-XL/2, EdgeDiT-1, elastic-dit-1.6b, …), a pipeline or model folder, or a Hub id (also "
        "hf://org/name[@revision][/folder])",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print what [`describe`] finds."""
    facts = describe(args.model)
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    channels, height, width = facts["input"]
    elastic = "text_tokens" in facts
    text = f", {facts['text_tokens']} text tokens an encoder" if elastic else ""
    print(f"{facts['name']}  (one input of {height} x {width} x {channels}, {facts['tokens']} tokens{text})")
    learned = "" if elastic else f"  (learned: {_short(facts['weights'])})"
    print(f"  parameters  {_short(facts['parameters'])}{learned}")
    print(f"  compute     {_short(facts['flops'])}FLOPs  ({_short(facts['macs'])}MACs)")
    print(f"  weights     {_sizes(facts)}")
    if "few_step" in facts:
        few = facts["few_step"]
        steps, timesteps = few["steps"], ", ".join(f"{t:g}" for t in few["timesteps"])
        print(f"  made for    {steps} step{'s' * (steps > 1)}, no guidance  (at timesteps {timesteps})")
    if elastic:
        print(f"  layers      {' / '.join(map(str, facts['layers']))} (Down / Middle / Up)")
        for name, subnet in facts["subnets"].items():
            count = subnet["parameters"]
            rounded = f"{count / 1e9:.1f} B = " if count >= 1e8 else ""
            share, size = f"{subnet['width']:g} of the width", f"bf16 {_short(subnet['bytes']['bf16'])}B"
            print(
                f"  {name:10}  {rounded}{_short(count).strip()} parameters ({share}), {_short(subnet['flops'])}FLOPs, "
                f"{size}"
            )
        return
    merged = f", merged {facts['merged']}" if facts["merged"] else ""
    print(f"  layers      {facts['layers']} of {facts['teacher_layers']} teacher layers{merged}")
    ranks = {rank: _places(facts["modulation_rank"], rank) for rank in facts["modulation_rank"] if rank is not None}
    if ranks:
        said = (f"{f'rank {rank}' if rank else 'static'} in layers {places}" for rank, places in sorted(ranks.items()))
        print(f"  modulation  {', '.join(said)}")
    for merge in sorted({merge for merge in facts["token_merge"] if merge > 1}):
        print(f"  tokens      merged {merge} × {merge} in layers {_places(facts['token_merge'], merge)}")
    print(f"  genotype    {facts['genotype']}")


def _places(values: list, value: int) -> list[int]:
    return [index for index, given in enumerate(values) if given == value]


def _sizes(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{precision} {_short(count)}B" for precision, count in facts["bytes"].items())


def _short(count: int) -> str:
    for prefix, unit in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        # Parameters are customarily given in millions: 1,043.21 M, not 1.04 G, keeps the digits that papers print.
        if count >= unit and not (prefix == "G" and count < 1e10):
            return f"{count / unit:,.2f} {prefix}"
    return f"{count} "


def describe(name: str) -> dict[str, Any]:
    """The figures of a preset or a saved model.

    Returns:
        `parameters`, `macs` and `flops` of one forward of one image, `bytes` of the weights at each precision,
        `layers`, `input` (channels, height, width), `tokens`, `name`. Of an EdgeDiT, whose `parameters` include the
        fixed position embedding, as published: `weights` (learned ones), `teacher_layers`, `merged`,
        `modulation_rank` and `token_merge` (of every layer), `genotype` (its hash). Of an elastic net, whose `macs` and
        `flops` are the full net's: `text_tokens` an encoder, and `subnets` (`width`, `parameters`, `macs`, `flops`,
        `bytes` of each as a net of its own). Of a pipeline that was distilled for few steps: `few_step` (`steps`,
        `guidance_scale`, `timesteps`).

    Raises:
        EdgeDiTError: there is no such preset or model, or its config is not one of this package's.
    """
    config = _folder_config(Path(name)) or preset_configs().get(name) or _hub_config(name)
    elastic = config["_class_name"] == ELASTIC
    try:
        facts = _elastic_facts(config) if elastic else _edgedit_facts(config)
        shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, EdgeDiTError):
            raise EdgeDiTError(f"The config of {name}: {error}") from None
        kind = "an elastic net's" if elastic else "an EdgeDiT's"
        raise EdgeDiTError(f"The config of {name} is not {kind}: {type(error).__name__} {error}.") from None
    timesteps = _few_step_timesteps(name)
    few = {"few_step": {"steps": len(timesteps), "guidance_scale": 1.0, "timesteps": timesteps}} if timesteps else {}
    return {"name": name, **facts, **few, "input": shape, "tokens": (shape[1] // config["patch_size"]) ** 2}


def _elastic_facts(config: dict[str, Any]) -> dict[str, Any]:
    from ..search_space import BYTES, TEXT_TOKENS, elastic_cost, elastic_weights

    def figures(parameters: int, cost: Any) -> dict[str, Any]:
        sizes = {precision: int(parameters * size) for precision, size in BYTES.items()}
        return {"parameters": parameters, "macs": cost.macs, "flops": cost.flops, "bytes": sizes}

    subnets = {}
    for subnet, width in sorted((config["subnets"] or {}).items(), key=lambda item: item[1]):
        cost = elastic_cost(config, subnet)
        subnets[subnet] = {"width": width, **figures(cost.parameters, cost)}
    whole = figures(elastic_weights(config), elastic_cost(config))
    return {**whole, "layers": config["num_layers"], "text_tokens": TEXT_TOKENS, "subnets": subnets}


def _edgedit_facts(config: dict[str, Any]) -> dict[str, Any]:
    from ..genotype import Genotype
    from ..search_space import BYTES, model_cost

    if config.get("layers") is None:
        sizes = (config["num_layers"], config["hidden_size"], config["num_attention_heads"], config["mlp_ratio"])
        config["layers"] = Genotype.original(*sizes).to_layers()
    cost = model_cost(config)
    genotype = Genotype.of(config)
    return {
        "parameters": cost.parameters,
        "weights": cost.weights,
        "macs": cost.macs,
        "flops": cost.flops,
        "bytes": {precision: cost.bytes(precision) for precision in BYTES},
        "layers": len(genotype.layers),
        "teacher_layers": genotype.num_teacher_layers,
        "merged": [list(pair) for pair in genotype.merged],
        "modulation_rank": [layer.modulation_rank for layer in genotype.layers],
        "token_merge": [layer.token_merge for layer in genotype.layers],
        "genotype": genotype.hash,
    }


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


def _few_step_timesteps(name: str) -> list[float] | None:
    """Timesteps of a pipeline that was distilled for few steps, in a folder or a Hub repository; `None` of any other
    model.
    """
    from ..records import FewSteps
    from ..schema import read_record

    if name in preset_configs() and not Path(name).is_dir():
        return None
    path = resolve(name, WANTED) / INDEX
    if not path.is_file():
        return None
    return read_record(path, FewSteps, "save_pretrained", "a pipeline").get("few_step_timesteps")


def _hub_config(name: str) -> dict[str, Any]:
    """The config of the denoiser in a Hub repository."""
    said = ""
    if is_name(name):
        try:
            folder = resolve(name, WANTED)
            for filename in (f"transformer/{CONFIG}", CONFIG):
                if (folder / filename).is_file():
                    return _read_config(folder / filename)
            said = f" (the repository is there, but has no transformer/{CONFIG})"
        except EdgeDiTError as error:
            said = f" ({error})"
    presets = preset_configs()
    near = difflib.get_close_matches(name, presets, n=3, cutoff=0.4)
    hint = f"near it: {', '.join(near)}" if near else f"presets: {', '.join(presets)}"
    if Path(name).is_file():
        hint = f"if it is a DiT, SiT or MDT checkpoint, convert it first: edgedit convert {name} OUT"
    raise EdgeDiTError(f"{name!r} is neither a folder, nor a preset, nor a model in reach on the Hub{said}; {hint}.")


def _read_config(path: Path) -> dict[str, Any]:
    from ..files import read_json
    from ..records import NetConfig
    from ..schema import held_to, shorten

    config = read_json(path, "save_pretrained")
    kind = config.get("_class_name") if isinstance(config, Mapping) else type(config).__name__
    if kind not in CLASSES:
        raise EdgeDiTError(f"{path} describes a {shorten(kind)}; edgedit info counts {', '.join(CLASSES)}.")
    held_to(config, NetConfig, path, "save_pretrained", "a denoiser")
    return dict(config)
