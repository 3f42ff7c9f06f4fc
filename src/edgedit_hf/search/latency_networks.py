"""Networks to time: whole ones lowered, or joined from parts that are lowered once."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.formats import MEASURED
from ..genotype import LayerSpec, Shape

if TYPE_CHECKING:
    import onnx

    from ..models.transformer_edgedit import EdgeDiTTransformer2DModel


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

    target = MEASURED[runtime]
    file = path.with_suffix(target.suffix)
    lower_denoiser(random_model(config), file, target.name, precision, None if target.dynamic else batch)
    return file


class LoweredParts:
    """Embedders, output layer and one layer of each shape, each lowered to ONNX once; [`~LoweredParts.network`] joins
    them to what a whole network's lowering gives.

    Args:
        config: the teacher's model config.
        shapes: distinct layer shapes.
        precision: of the networks.
    """

    def __init__(self, config: Mapping[str, Any], shapes: Sequence[Shape], precision: str):
        import onnx

        from ..export.lowering import EXAMPLE_ROWS
        from ..export.onnx.lower import lower_onnx
        from ..export.parts import layer_parts

        layers = [LayerSpec((i,), *shape).to_dict() for i, shape in enumerate(shapes)]
        before, blocks, after = layer_parts(random_model({**config, "layers": layers}), EXAMPLE_ROWS)
        lowered = []
        with tempfile.TemporaryDirectory() as folder:
            for part in (before, *blocks, after):
                file = Path(folder, part.name, "model.onnx")
                lower_onnx(part, file, precision, {"precision": precision})
                lowered.append(onnx.load(str(file)))
        self.embed, *blocks, self.unembed = lowered
        self.blocks = dict(zip(shapes, blocks))

    def network(self, shapes: Sequence[Shape], path: Path) -> Path:
        """Write a whole network with layers of these shapes; every layer has its own copy of the weights."""
        from ..export.onnx.lower import save_onnx

        return save_onnx(join([self.embed, *(self.blocks[shape] for shape in shapes), self.unembed]), path)


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
