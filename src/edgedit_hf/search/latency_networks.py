"""Networks to time: whole ones lowered, or joined from parts that are lowered once; and which ones.

A table is fitted to [`fitted_networks`] and judged by other ones, [`held_out`].
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EdgeDiTError
from ..export.formats import MEASURED, RUNTIMES
from ..files import aside_of, explain_write_errors, hash_json, sweep, versions
from ..genotype import Genotype, LayerSpec, Shape
from ..search_space import SearchSpace, grid_tokens, layer_cost

if TYPE_CHECKING:
    import onnx

    from ..models.transformer_edgedit import EdgeDiTTransformer2DModel

HELD_OUT = 16  # networks that a table is judged by
MIXED = 4  # fitted networks of all shapes
DRAWS = 64  # genotypes drawn for each that is held out
SMALL = 1024  # bytes up to which a tensor stays in the graph's file


# -------------------------------------------------------------------- which networks


def timed_shapes(space: SearchSpace) -> list[Shape]:
    """The shapes that a table of this space must time, the teacher's among them, the largest first."""
    found = {layer.shape.timed for layer in space.replacements()}
    return sorted(found, key=lambda shape: (shape.token_merge, *(-size for size in shape[:3])))


def fitted_networks(shapes: Sequence[Shape], num_layers: int, seed: int = 0) -> list[tuple[Shape, ...]]:
    """Networks that tell a trunk and the layers apart: one of equal layers for every shape, nearly as deep as the
    teacher (a shallow one's weights would stay in caches that a whole network's do not); a shallow one of the first
    shape for the trunk; and [`MIXED`] of all shapes in turn, of depths between. The teacher is not among them: it is
    one to judge by.
    """
    deep = num_layers - 1 if num_layers > 4 else num_layers + 1
    shallow = max(1, num_layers // 3)
    networks = [(shape,) * deep for shape in shapes] + [(shapes[0],) * shallow]
    generator = random.Random(seed)
    order = itertools.chain.from_iterable(iter(lambda: generator.sample(shapes, len(shapes)), None))
    if len(shapes) > 1:
        for place in range(MIXED):
            depth = shallow + 1 + round((deep - shallow - 1) * place / (MIXED - 1))
            networks.append(tuple(itertools.islice(order, depth)))
    return list(dict.fromkeys(networks))


def held_out(
    config: Mapping[str, Any],
    space: SearchSpace,
    fitted: Sequence[tuple[Shape, ...]] = (),
    count: int = HELD_OUT,
    seed: int = 0,
) -> list[Genotype]:
    """Genotypes from the cheapest to the teacher in even steps of FLOPs, which mix merges and options. No two of them
    nor a fitted network have the same layers in another order; they are as many as there are, if the space holds fewer.

    Args:
        config: the teacher's model config.
        fitted: the networks that a table is fitted to.
        count: genotypes at most.
    """
    tokens = grid_tokens(config)
    starting: dict[int, list[tuple[LayerSpec, float]]] = {}
    for layer in space.replacements():
        flops = layer_cost(space.hidden_size, layer.shape.timed, tokens).flops
        starting.setdefault(layer.source[0], []).append((layer, float(flops)))
    cheapest: dict[int, tuple[float, tuple[LayerSpec, ...]]] = {space.num_layers: (0.0, ())}
    for first in reversed(range(space.num_layers)):  # the cheapest way from here to the end
        ways = []
        for layer, cost in starting[first]:
            if (after := cheapest.get(first + len(layer.source))) is not None:
                ways.append((cost + after[0], (layer, *after[1])))
        cheapest[first] = min(ways, key=lambda way: way[0])
    teacher = Genotype.of(config)
    whole = float(sum(layer_cost(space.hidden_size, layer.shape, tokens).flops for layer in teacher.layers))
    generator = random.Random(seed)
    pool: dict[tuple[Shape, ...], tuple[float, Genotype]] = {}

    known = {tuple(sorted(network)) for network in fitted}

    def add(layers: tuple[LayerSpec, ...], cost: float) -> None:
        shapes = tuple(sorted(layer.shape.timed for layer in layers))
        if shapes not in pool and shapes not in known:
            genotype = Genotype(layers, space.hidden_size)
            if _legal(space, genotype):
                pool[shapes] = (cost, genotype)

    ends = [(teacher.layers, whole), (cheapest[0][1], cheapest[0][0])]
    for layers, cost in ends:
        add(layers, cost)
    for draw in range(DRAWS * count):
        lean = 24 * (draw / (DRAWS * count - 1) - 0.5)  # from dear layers to cheap ones
        drawn: list[LayerSpec] = []
        cost, first = 0.0, 0
        while first < space.num_layers:
            share = {layer: own * space.num_layers / (whole * len(layer.source)) for layer, own in starting[first]}
            weights = [math.exp(-lean * share[layer]) for layer, _ in starting[first]]
            ((layer, own),) = generator.choices(starting[first], weights)
            drawn.append(layer)
            cost, first = cost + own, first + len(layer.source)
        add(tuple(drawn), cost)
    chosen: list[tuple[float, Genotype]] = []
    left = list(pool.values())
    for place in [*{0, count - 1}, *range(1, count - 1)]:  # the ends first
        target = cheapest[0][0] + (whole - cheapest[0][0]) * place / max(1, count - 1)
        if left:
            chosen.append(min(left, key=lambda entry: abs(entry[0] - target)))
            left.remove(chosen[-1])
    return [genotype for _, genotype in sorted(chosen, key=lambda entry: entry[0])]


def _legal(space: SearchSpace, genotype: Genotype) -> bool:
    try:
        space.code(genotype)
    except EdgeDiTError:
        return False
    return True


# -------------------------------------------------------------------- lowering


def random_model(config: Mapping[str, Any], seed: int = 0) -> EdgeDiTTransformer2DModel:
    """A model with random weights everywhere: zeros and repeated biases, as fresh models have, would be folded away in
    lowering.
    """
    import torch

    from ..models.transformer_edgedit import EdgeDiTTransformer2DModel

    model = EdgeDiTTransformer2DModel.with_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.eval()


def lower_network(config: Mapping[str, Any], runtime: str, precision: str, batch: int, path: Path) -> Path:
    """Write a whole network of random weights as the export stage does; returns the file, `path` with the format's
    suffix.
    """
    from ..export.lowering import lower_denoiser

    target = RUNTIMES[runtime]
    file = path.with_suffix(target.suffix)
    lower_denoiser(random_model(config), file, target.name, precision, None if target.dynamic else batch)
    return file


class Networks:
    """Whole networks by their layers' shapes, lowered once and kept.

    Args:
        config: the teacher's model config.
        shapes: distinct layer shapes.
        runtime: a key of [`MEASURED`]. precision: one that the runtime has. batch: images a forward.
        folder: what is kept stands in a folder of its own in it, named after all that it depends on; others are
            deleted.
    """

    def __init__(
        self, config: Mapping[str, Any], shapes: Sequence[Shape], runtime: str, precision: str, batch: int, folder: Path
    ):
        self.config, self.shapes, self.runtime, self.precision, self.batch = config, shapes, runtime, precision, batch
        rows = None if MEASURED[runtime].dynamic else batch
        # diffusers notes there which values are defaults, in an order that differs from process to process.
        values = {key: value for key, value in config.items() if not key.startswith("_")}
        of = {**values, "layers": None}, [list(shape) for shape in shapes], runtime, precision, rows, versions()
        self.folder = folder / hash_json(json.loads(json.dumps(of, default=str)))
        if folder.is_dir():
            for other in folder.iterdir():
                if other != self.folder:
                    shutil.rmtree(other, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        self.parts = LoweredParts(config, shapes, precision, self.folder) if runtime == "onnxruntime" else None

    def file(self, shapes: Sequence[Shape]) -> Path:
        """The file of a network with layers of these shapes."""
        name = hash_json([self.shapes.index(shape) for shape in shapes])
        if self.parts is not None:
            return self.parts.network(shapes, self.folder / f"{name}.onnx")
        file = self.folder / f"{name}{MEASURED[self.runtime].suffix}"
        if not file.is_file():  # written aside and renamed
            layers = [LayerSpec((i,), *shape).to_dict() for i, shape in enumerate(shapes)]
            lower_network({**self.config, "layers": layers}, self.runtime, self.precision, self.batch, file)
        return file


class LoweredParts:
    """Embedders, output layer and one layer of each shape, each lowered to ONNX once; [`~LoweredParts.network`] joins
    them to what a whole network's lowering gives.

    Args:
        config: the teacher's model config.
        shapes: distinct layer shapes.
        precision: of the networks.
        folder: where the parts are kept, with their weights beside them; those that are there are taken.
    """

    def __init__(self, config: Mapping[str, Any], shapes: Sequence[Shape], precision: str, folder: Path):
        import onnx

        self.folder = folder
        names = ["embed", *(f"layer_{index}" for index in range(len(shapes))), "unembed"]
        files = [folder / f"{name}.onnx" for name in names]
        if not all(file.is_file() for file in files):
            self._lower(config, shapes, precision, files)
        self.embed, *blocks, self.unembed = [onnx.load(str(file), load_external_data=False) for file in files]
        self.blocks = dict(zip(shapes, blocks))

    @staticmethod
    def _lower(config: Mapping[str, Any], shapes: Sequence[Shape], precision: str, files: Sequence[Path]) -> None:
        import onnx

        from ..export.lowering import EXAMPLE_ROWS
        from ..export.onnx.lower import lower_onnx
        from ..export.parts import layer_parts

        layers = [LayerSpec((i,), *shape).to_dict() for i, shape in enumerate(shapes)]
        before, blocks, after = layer_parts(random_model({**config, "layers": layers}), EXAMPLE_ROWS)
        for part, file in zip((before, *blocks, after), files, strict=True):
            if file.is_file():
                continue
            aside = aside_of(file, "tmp")
            try:
                lower_onnx(part, aside / "whole.onnx", precision, {"precision": precision})
                with explain_write_errors(file):
                    onnx.save_model(
                        onnx.load(str(aside / "whole.onnx")),
                        str(aside / file.name),
                        save_as_external_data=True,
                        location=f"{file.name}.data",
                        size_threshold=SMALL,
                    )
                    for name in (f"{file.name}.data", file.name):  # the graph last: it says that both are there
                        if (aside / name).is_file():
                            os.replace(aside / name, file.with_name(name))
            finally:
                shutil.rmtree(aside, ignore_errors=True)

    def network(self, shapes: Sequence[Shape], path: Path) -> Path:
        """Write a whole network with layers of these shapes to a file in the parts' folder, whose weights it uses. In
        memory every layer has its own.
        """
        graph = join([self.embed, *(self.blocks[shape] for shape in shapes), self.unembed])
        path.write_bytes(graph.SerializeToString())
        return path


def join(parts: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
    """Join models end to end: an input `x` of a part is the newest output `x` or `x_out` of the parts before it.

    The first part's inputs are the result's inputs, the last part's outputs its outputs.
    """
    import onnx

    joined = onnx.ModelProto()
    joined.CopyFrom(parts[0])
    for field in ("node", "initializer", "output"):
        joined.graph.ClearField(field)
    known = {value.name: value.name for value in parts[0].graph.input}
    for number, part in enumerate(parts):
        outputs = [value.name for value in part.graph.output]
        last = number == len(parts) - 1
        names = {value.name: known[value.name] for value in part.graph.input}
        names |= {name: name if last else f"{number}.{name}" for name in outputs}

        def rename(name: str, names: dict[str, str] = names, number: int = number) -> str:
            return names.get(name, f"{number}.{name}" if name else "")

        for node in part.graph.node:
            copy = joined.graph.node.add()
            copy.CopyFrom(node)
            copy.name = f"{number}.{node.name}"
            copy.input[:] = map(rename, node.input)
            copy.output[:] = map(rename, node.output)
        for tensor in part.graph.initializer:
            copy = joined.graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = rename(tensor.name)
        there = {entry.domain for entry in joined.opset_import}
        joined.opset_import.extend(entry for entry in part.opset_import if entry.domain not in there)
        known |= {name.removesuffix("_out"): names[name] for name in outputs}
    joined.graph.output.extend(parts[-1].graph.output)
    return joined
