"""Networks to time: joined parts compute what the model computes, by the operators of its export."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch

from edgedit_hf.export.onnx.lower import initializer_bytes
from edgedit_hf.genotype import LayerSpec
from edgedit_hf.runtimes.runners import example_inputs
from edgedit_hf.runtimes.sessions import open_session
from edgedit_hf.search.latency_networks import LoweredParts, lower_network, random_model


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("int8", 5e-2)])
def test_joined_parts_are_the_model_as_it_ships(teacher_config, teacher_space, tmp_path, precision, tolerance):
    """What the model computes, by the operators on the weights of its export as a whole, whatever their order and
    names.
    """
    shapes = [teacher_space.option_shape(option) for option in ("original", "both")]
    network = {**teacher_config, "layers": [LayerSpec((i,), *shape).to_dict() for i, shape in enumerate(shapes)]}
    inputs = example_inputs(teacher_config, 5)
    with torch.no_grad():
        expected = random_model(network)(*inputs.values()).sample.numpy()
    joined = LoweredParts(teacher_config, shapes, precision).network(shapes, tmp_path / "joined.onnx")
    (found,) = open_session(joined, 1).run(inputs)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < tolerance

    def operators(path):
        counts = Counter(node.op_type for node in onnx.load(str(path)).graph.node)
        return {name: counts[name] for name in ("Attention", "MatMul", "Gemm", "MatMulInteger", "LayerNormalization")}

    whole = lower_network(network, "onnxruntime", precision, 5, tmp_path / "whole")
    assert operators(joined) == operators(whole) and (operators(joined)["MatMulInteger"] > 0) == (precision == "int8")
    assert initializer_bytes(joined).get("int8") == initializer_bytes(whole).get("int8")
    shipped = open_session(whole, 1).run(inputs)[0]
    assert np.linalg.norm(found - shipped) <= 1e-5 * np.linalg.norm(shipped)
