"""Precisions of an ONNX file below fp32: dynamic and static int8, 4-bit weights, and fp16.

All but fp16 rewrite the fp32 file's linear layers (MatMul with a constant matrix, after [`gemm_to_matmul`]), so they
work on every network that the exporter can trace; fp16 is traced from a network in half precision ([`half_precision`]).
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from ...errors import EdgeDiTError
from ...quantization.affine import quantize_affine
from ...quantization.packing import unpack
from ...quantization.weights import AffineWeight

if TYPE_CHECKING:
    from ...quantization.activations import ActivationScales

MIN_QUANTIZED_ELEMENTS = 1024  # smaller matrices stay fp32: their scales and extra operators cost more than they save
GROUP = 32  # inputs that share a scale in 4 bits
INT8_ACCURACY = (
    4  # MatMulNBits' accuracy level that multiplies in int8: activations are rounded to 8 bits a block of inputs
)
HALF_LIMIT = 3e4  # half of float16's largest value: other inputs than the examples may reach further


# -------------------------------------------------------------------- linear layers of a graph


def gemm_to_matmul(proto: onnx.ModelProto) -> None:
    """Rewrite every Gemm with a constant second input as MatMul + Add, in place (the transposed weight is stored)."""
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    uses: dict[str, int] = {}
    for node in proto.graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    nodes = []
    for node in proto.graph.node:
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        plain = options.get("alpha", 1.0) == 1.0 and options.get("beta", 1.0) == 1.0 and not options.get("transA", 0)
        if node.op_type != "Gemm" or not plain or node.input[1] not in weights:
            nodes.append(node)
            continue
        source, weight, *bias = node.input
        if options.get("transB", 0):
            array = np.ascontiguousarray(numpy_helper.to_array(weights[weight]).T)
            if uses[weight] == 1:
                weights[weight].CopyFrom(numpy_helper.from_array(array, weight))
            else:
                weight = f"{weight}.transposed"
                if weight not in weights:
                    weights[weight] = numpy_helper.from_array(array, weight)
                    proto.graph.initializer.append(weights[weight])
        name = node.name or node.output[0]
        product = f"{node.output[0]}.product" if bias else node.output[0]
        nodes.append(helper.make_node("MatMul", [source, weight], [product], name=f"{name}.matmul"))
        if bias:
            nodes.append(helper.make_node("Add", [product, bias[0]], [node.output[0]], name=f"{name}.add"))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def linear_nodes(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Every MatMul of the graph with a constant float32 matrix of [`MIN_QUANTIZED_ELEMENTS`] or more. Gemms become
    MatMuls first, in place.
    """
    gemm_to_matmul(proto)
    tensors = (t for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2)
    matrices = {tensor.name for tensor in tensors if np.prod(tensor.dims) >= MIN_QUANTIZED_ELEMENTS}
    return [node for node in proto.graph.node if node.op_type == "MatMul" and node.input[1] in matrices]


def name_layers(proto: onnx.ModelProto, module: nn.Module) -> dict[str, str]:
    """Which linear layer of `module` every node of [`linear_nodes`] is: node name → layer name, found by the weights'
    bytes.

    The exporter folds the transposition of a weight and so loses its name. Layers of equal weights are told apart by
    their order.
    """
    layers: dict[bytes, list[str]] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            layers.setdefault(_digest(layer.weight.detach().t().contiguous().numpy()), []).append(name)
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    digests: dict[str, bytes] = {}
    names = {}
    for node in linear_nodes(proto):
        weight = node.input[1]
        if weight not in digests:
            digests[weight] = _digest(numpy_helper.to_array(weights[weight]))
        candidates = layers.get(digests[weight], [])
        if candidates:
            names[node.name] = candidates.pop(0) if len(candidates) > 1 else candidates[0]
    return names


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array)).digest()


def _rewrite(
    proto: onnx.ModelProto,
    make: Callable[[onnx.NodeProto, np.ndarray], tuple[list[onnx.NodeProto], list[onnx.TensorProto]]],
) -> None:
    """Replace every linear node by what `make(node, matrix (K, N))` returns, its last node giving the same output;
    unused matrices go.
    """
    chosen = {node.output[0] for node in linear_nodes(proto)}
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    added: dict[str, np.ndarray] = {}
    for node in proto.graph.node:
        if node.output[0] not in chosen:
            nodes.append(node)
            continue
        new_nodes, tensors = make(node, numpy_helper.to_array(weights[node.input[1]]))
        nodes += new_nodes
        added |= {tensor.name: tensor for tensor in tensors}
    kept = [copy.deepcopy(node) for node in nodes]
    used = {name for node in kept for name in node.input}
    tensors = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(kept)
    proto.graph.initializer.extend([*tensors, *added.values()])


# -------------------------------------------------------------------- int8

# Weights are symmetric, but stored about 128 without a sign: ONNX Runtime adds up pairs of products of unsigned with
# signed bytes in 16 bits where an x86 processor lacks VNNI, and they saturate there.
UNSIGNED_ZERO = 128


def _without_sign(weight: np.ndarray) -> np.ndarray:
    return (weight.astype(np.int16) + UNSIGNED_ZERO).astype(np.uint8)


def _unsigned_weights(proto: onnx.ModelProto) -> None:
    """Store the weights of all integer products without a sign; the products stay the same."""
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    names = {node.input[place] for node in proto.graph.node if node.op_type == "MatMulInteger" for place in (1, 3)}
    for name in names:
        signed = numpy_helper.to_array(tensors[name])
        tensors[name].CopyFrom(numpy_helper.from_array(_without_sign(signed), name))


def dynamic_int8(proto: onnx.ModelProto, external: bool) -> onnx.ModelProto:
    """Dynamic int8: weights of all linear layers symmetric per output channel, activations unsigned per tensor at run
    time.

    The adaLN layers and embedders act on `(B, D)` and lower to Gemm, which ONNX Runtime's dynamic quantiser skips; they
    are rewritten to MatMul + Add first (they are a third of a DiT's weights). What stays fp32: biases, the position
    table, the label table (a look-up, no arithmetic), the patch convolution (`patch_size² · channels` inputs:
    ConvInteger costs more than it saves) and matrices below [`MIN_QUANTIZED_ELEMENTS`].
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    chosen = [node.name for node in linear_nodes(proto)]
    if not chosen:
        raise EdgeDiTError(
            f"The network holds no linear layer to quantise (matrices of {MIN_QUANTIZED_ELEMENTS} elements or more)."
        )
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the quantiser logs its advice to the root logger
    try:
        with TemporaryDirectory() as folder:
            path = Path(folder, "int8.onnx")
            quantize_dynamic(
                proto,
                str(path),
                op_types_to_quantize=["MatMul"],  # "Attention" would be taken for com.microsoft's
                nodes_to_quantize=chosen,
                per_channel=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=external,
            )
            quantized = onnx.load(str(path))
    finally:
        root.setLevel(level)
    _unsigned_weights(quantized)
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(proto.metadata_props)
    return quantized


def static_int8(proto: onnx.ModelProto, scales: ActivationScales, module: nn.Module) -> int:
    """Static int8 in place (QDQ): weights symmetric per output channel, activations unsigned with the calibrated scale
    of their layer.

    With several buckets every layer holds a table of scales, and the bucket is looked up from the input `timestep` of
    the first row (a file without one gets it): one file serves the whole schedule. ONNX Runtime fuses each layer to one
    MatMulIntegerToFloat, which has one scale for all rows; so the rows of a run share a bucket, for which the component
    and `sample_min` see.

    Args:
        scales: by the names of `module`'s layers; a layer that it does not name stays fp32.
        module: the network that was traced.

    Returns:
        Number of quantised layers.
    """
    names = name_layers(proto, module)
    many = scales.num_buckets > 1
    count = 0

    def make(node: onnx.NodeProto, matrix: np.ndarray) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        nonlocal count
        layer = names.get(node.name)
        if layer is None or layer not in scales.scale:
            return [node], []
        count += 1
        weight_scale = np.maximum(np.abs(matrix).max(axis=0) / 127, np.finfo(np.float32).tiny).astype(np.float32)
        values = np.clip(np.round(matrix / weight_scale), -127, 127).astype(np.int8)
        prefix = f"{layer}.{node.name}"
        scale = scales.scale[layer].numpy().astype(np.float32)
        zero_point = scales.zero_point[layer].numpy().astype(np.uint8)
        tensors = [
            numpy_helper.from_array(_without_sign(values), f"{prefix}.weight"),
            numpy_helper.from_array(weight_scale, f"{prefix}.weight_scale"),
            numpy_helper.from_array(
                np.full(weight_scale.shape, UNSIGNED_ZERO, np.uint8), f"{prefix}.weight_zero_point"
            ),
            numpy_helper.from_array(scale if many else scale[0], f"{prefix}.scales" if many else f"{prefix}.scale"),
            numpy_helper.from_array(
                zero_point if many else zero_point[0], f"{prefix}.zero_points" if many else f"{prefix}.zero_point"
            ),
        ]
        nodes = []
        if many:
            for kind in ("scale", "zero_point"):
                nodes.append(
                    helper.make_node(
                        "Gather", [f"{prefix}.{kind}s", BUCKET], [f"{prefix}.{kind}"], name=f"{prefix}.{kind}"
                    )
                )
        grid = [f"{prefix}.scale", f"{prefix}.zero_point"]
        nodes += [
            helper.make_node(
                "QuantizeLinear", [node.input[0], *grid], [f"{prefix}.quantized"], name=f"{prefix}.quantize"
            ),
            helper.make_node(
                "DequantizeLinear", [f"{prefix}.quantized", *grid], [f"{prefix}.input"], name=f"{prefix}.dequantize"
            ),
            helper.make_node(
                "DequantizeLinear",
                [f"{prefix}.weight", f"{prefix}.weight_scale", f"{prefix}.weight_zero_point"],
                [f"{prefix}.matrix"],
                name=f"{prefix}.weights",
                axis=1,
            ),
            helper.make_node("MatMul", [f"{prefix}.input", f"{prefix}.matrix"], list(node.output), name=node.name),
        ]
        return nodes, tensors

    _rewrite(proto, make)
    if not count:
        raise EdgeDiTError("None of the calibrated layers is in this network; calibrate the network that is exported.")
    _subtract_biases(proto)
    if many:
        _find_bucket(proto, scales.edges)
    return count


def _subtract_biases(proto: onnx.ModelProto) -> None:
    """Turn every `product + bias` with a constant bias into `product - (-bias)`.

    ONNX Runtime makes a Gemm of a MatMul and an Add before it looks for quantised products, and then computes in
    float32, four times slower.
    """
    products = {node.output[0] for node in proto.graph.node if node.op_type == "MatMul"}
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    negated = {}
    for node in proto.graph.node:
        if node.op_type != "Add":
            continue
        product, bias = node.input if node.input[0] in products else reversed(node.input)
        if product in products and bias in tensors:
            negated[f"{bias}.negated"] = numpy_helper.from_array(
                -numpy_helper.to_array(tensors[bias]), f"{bias}.negated"
            )
            node.op_type = "Sub"
            node.input[:] = [product, f"{bias}.negated"]
    used = {name for node in proto.graph.node for name in node.input}
    kept = [tensor for name, tensor in tensors.items() if name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend([*kept, *negated.values()])


BUCKET = "edgedit.bucket"  # the tensor that holds the index of the timestep's bucket


def _find_bucket(proto: onnx.ModelProto, edges: list[float]) -> None:
    """Compute [`BUCKET`] at the start of the graph: the number of borders at or below the first row's timestep."""
    if "timestep" not in {value.name for value in proto.graph.input}:
        proto.graph.input.append(helper.make_tensor_value_info("timestep", TensorProto.FLOAT, ["batch"]))
    prefix = BUCKET
    proto.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(0, np.int64), f"{prefix}.first"),
            numpy_helper.from_array(np.array(edges, np.float32), f"{prefix}.edges"),
            numpy_helper.from_array(np.array([0], np.int64), f"{prefix}.axes"),
        ]
    )
    nodes = [
        helper.make_node("Gather", ["timestep", f"{prefix}.first"], [f"{prefix}.timestep"], name=f"{prefix}.timestep"),
        helper.make_node(
            "GreaterOrEqual", [f"{prefix}.timestep", f"{prefix}.edges"], [f"{prefix}.passed"], name=f"{prefix}.passed"
        ),
        helper.make_node("Cast", [f"{prefix}.passed"], [f"{prefix}.ones"], name=f"{prefix}.ones", to=TensorProto.INT64),
        helper.make_node("ReduceSum", [f"{prefix}.ones", f"{prefix}.axes"], [BUCKET], name=BUCKET, keepdims=0),
    ]
    rest = list(proto.graph.node)
    kept = [copy.deepcopy(node) for node in rest]
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *kept])


# -------------------------------------------------------------------- int4


def weight_only(
    proto: onnx.ModelProto,
    module: nn.Module,
    given: Mapping[str, AffineWeight] | None = None,
    keep_8bit: frozenset[str] = frozenset(),
) -> dict[str, int]:
    """4-bit weights in place: every linear layer becomes ONNX Runtime's MatMulNBits, in groups of [`GROUP`] inputs.

    Args:
        module: the network that was traced.
        given: integers to use as they are, by the names of `module`'s layers (4 or 8 bits, groups of a power of two
            from 16 on, or one a row); other layers are rounded to the nearest.
        keep_8bit: layers that get 8 bits.

    Returns:
        Number of layers by bits.
    """
    names = name_layers(proto, module)
    counts: dict[str, int] = {}

    def make(node: onnx.NodeProto, matrix: np.ndarray) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        layer = names.get(node.name, node.name)
        weight = (given or {}).get(layer)
        if not isinstance(weight, AffineWeight):  # no palette is a grid: what it stands for is rounded again
            weight = quantize_affine(
                torch.from_numpy(np.ascontiguousarray(matrix.T)), 8 if layer in keep_8bit else 4, GROUP, symmetric=True
            )
        counts[f"{weight.bits} bit"] = counts.get(f"{weight.bits} bit", 0) + 1
        return _matmul_nbits(node, weight, f"{layer}.{node.name}")

    _rewrite(proto, make)
    if "com.microsoft" not in {entry.domain for entry in proto.opset_import}:
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return dict(sorted(counts.items()))


def _matmul_nbits(
    node: onnx.NodeProto, weight: AffineWeight, prefix: str
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    rows, columns = weight.shape  # N, K
    whole = 1 << (columns - 1).bit_length()
    group = min(
        weight.group_size or whole, max(whole, 256)
    )  # a larger one is a group of all inputs too, and the file would be filled up to it
    if weight.bits not in (4, 8) or group < 16 or group & (group - 1):
        raise EdgeDiTError(
            f"The layer {prefix} is quantised to {weight.bits} bits in groups of {group}; ONNX Runtime's MatMulNBits "
            "takes 4 or 8 bits and groups of a power of two from 16 on. Quantise it with such groups."
        )
    blocks = -(-columns // group)
    middle = 1 << (weight.bits - 1)
    values = unpack(weight.values, weight.bits, columns)
    values = torch.nn.functional.pad(values, (0, blocks * group - columns), value=middle).numpy()
    if weight.bits == 4:
        values = values[:, ::2] | values[:, 1::2] << 4
    tensors = [
        numpy_helper.from_array(np.ascontiguousarray(values.reshape(rows, blocks, -1)), f"{prefix}.values"),
        # Stored in half precision and widened when the file is opened: a scale a group in float32 is another bit a
        # weight.
        numpy_helper.from_array(weight.scale.reshape(-1).numpy(), f"{prefix}.scale"),
    ]
    inputs = [node.input[0], f"{prefix}.values", f"{prefix}.wide_scale"]
    if weight.zero_point is not None:
        points = unpack(weight.zero_point, weight.bits, blocks)
        if weight.bits == 4:
            points = torch.nn.functional.pad(points, (0, blocks % 2), value=middle)
            points = points[:, ::2] | points[:, 1::2] << 4
        tensors.append(numpy_helper.from_array(points.reshape(-1).numpy(), f"{prefix}.zero_point"))
        inputs.append(f"{prefix}.zero_point")
    nodes = [
        helper.make_node(
            "Cast", [f"{prefix}.scale"], [f"{prefix}.wide_scale"], name=f"{prefix}.widen", to=TensorProto.FLOAT
        ),
        helper.make_node(
            "MatMulNBits",
            inputs,
            list(node.output),
            name=node.name,
            domain="com.microsoft",
            K=columns,
            N=rows,
            bits=weight.bits,
            block_size=group,
            accuracy_level=INT8_ACCURACY,
        ),
    ]
    return nodes, tensors


# -------------------------------------------------------------------- fp16


class HalfPrecision(nn.Module):
    """A network in float16 between float32 inputs and outputs."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        # Timesteps and masks stay: half precision cannot tell 999 from 999.4, and the networks compute what they make
        # of them in float32.
        values = [value.half() if value.is_floating_point() and value.ndim > 2 else value for value in inputs]
        outputs = self.module(*values)
        return tuple(value.float() for value in outputs) if isinstance(outputs, tuple) else outputs.float()


class HalfLayer(nn.Module):
    """A linear or convolution layer in float16 within a network that computes in float32 around it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    @property
    def weight(self) -> torch.Tensor:
        """The layer's weight: some networks ask for its type."""
        return self.layer.weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden_states.half()).float()


def half_precision(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> tuple[nn.Module, list[str]]:
    """A copy of a network in float16.

    Where a layer's output for the example inputs comes near float16's largest value, all between the linear and
    convolution layers (residual stream, norms, softmax) stays float32 instead, and a layer that overflows itself stays
    float32 too.

    Returns:
        The network, and the fp32 islands: names of what stays float32 (`["between the layers", …]`, or empty).
    """
    large = set(_large_outputs(module, inputs))
    half = copy.deepcopy(module).eval()
    if not large:
        return HalfPrecision(half.half()), []
    islands = ["between the layers"]
    for name, layer in list(half.named_modules()):
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        if name in large:
            islands.append(name)
            continue
        parent, _, child = name.rpartition(".")
        setattr(half.get_submodule(parent), child, HalfLayer(layer.half()))
    return half, islands


def _large_outputs(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Names of the modules with an output beyond [`HALF_LIMIT`]."""
    found: list[str] = []

    def look(name: str) -> Callable:
        def hook(_: nn.Module, __: tuple, output: Any) -> None:
            if torch.is_tensor(output) and output.is_floating_point() and output.abs().amax() > HALF_LIMIT:
                found.append(name)

        return hook

    handles = [child.register_forward_hook(look(name)) for name, child in module.named_modules()]
    try:
        with torch.no_grad():
            module(*inputs.values())
    finally:
        for handle in handles:
            handle.remove()
    yield from found
