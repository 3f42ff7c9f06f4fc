"""Networks to time: joined parts compute what the model computes, by the operators of its export; and those that a
table is judged by span its space.
"""

import random
from collections import Counter

import numpy as np
import onnx
import pytest
import torch

from edgedit_hf import EdgeDiTTransformer2DModel
from edgedit_hf.export.onnx.lower import initializer_bytes
from edgedit_hf.genotype import Genotype, LayerSpec
from edgedit_hf.menu_space import MenuSpace
from edgedit_hf.runtimes.runners import example_inputs
from edgedit_hf.runtimes.sessions import open_session
from edgedit_hf.search.latency_networks import (
    LoweredParts,
    Networks,
    fitted_networks,
    held_out,
    lower_network,
    random_model,
    timed_shapes,
)
from edgedit_hf.search_space import SearchSpace, model_cost


@pytest.mark.slow
@pytest.mark.export
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
    joined = LoweredParts(teacher_config, shapes, precision, tmp_path).network(shapes, tmp_path / "joined.onnx")
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


def test_what_is_kept_is_found_by_a_config_in_another_order(teacher_config, teacher_space, tmp_path):
    """diffusers notes in a config which values were defaults, in an order that differs from process to process."""
    shapes = timed_shapes(teacher_space)
    orders = (["sample_size", "layers"], ["layers", "sample_size"])
    folders = [
        Networks({**teacher_config, "_use_default_values": order}, shapes, "executorch", "fp32", 2, tmp_path).folder
        for order in orders
    ]
    assert folders[0] == folders[1] and folders[0].is_dir()
    assert Networks({**teacher_config, "patch_size": 4}, shapes, "executorch", "fp32", 2, tmp_path).folder != folders[0]


MENU = [{"mlp_ratio": 2.0}, {"merge": 2}, {"merge": 3, "mlp_ratio": 2.0}, {"token_merge": 2}, {"modulation_rank": 0}]


@pytest.mark.parametrize("menu", [None, MENU], ids=["paper", "menu"])
def test_networks_to_judge_by_span_the_space(menu):
    """From the cheapest to the teacher, in even steps, all different in time and none of them fitted."""
    config = {**EdgeDiTTransformer2DModel.from_preset("DiT-S/8").config}
    space = SearchSpace.for_config(config) if menu is None else MenuSpace.for_config(config, menu=menu)
    shapes = timed_shapes(space)
    assert len(shapes) == (4 if menu is None else 3) and all(shape.modulation_rank is None for shape in shapes)
    fitted = fitted_networks(shapes, space.num_layers)
    assert len(fitted) == len(set(fitted)) == len(shapes) + 5
    genotypes = held_out(config, space, fitted)
    layers = {tuple(sorted(layer.shape.timed for layer in genotype.layers)) for genotype in genotypes}
    assert len(layers) == 16 and not layers & {tuple(sorted(network)) for network in fitted}
    assert [space.from_code(space.code(genotype)) for genotype in genotypes] == genotypes  # all legal
    costs = [timed_cost(config, genotype) for genotype in genotypes]
    assert genotypes[-1] == Genotype.of(config) and costs[0] == min(
        timed_cost(config, genotype) for genotype in (*genotypes, *drawn(space, 300))
    )
    steps = np.diff(costs)
    assert steps.min() > 0.5 * steps.mean() and steps.max() < 1.5 * steps.mean()
    assert len({layer.shape.timed for genotype in genotypes for layer in genotype.layers}) == len(shapes)
    assert {len(layer.source) for genotype in genotypes for layer in genotype.layers} == (
        {1, 2} if menu is None else {1, 2, 3}
    )
    assert held_out(config, space, fitted) == genotypes  # the same every time


def timed_cost(config, genotype) -> float:
    layers = [{**layer, "modulation_rank": None} for layer in genotype.to_layers()]
    layers = [{key: value for key, value in layer.items() if value is not None} for layer in layers]
    return model_cost({**config, "layers": layers}).flops


def drawn(space, count):
    generator = random.Random(0)
    for _ in range(count):
        yield space.decode([generator.random() for _ in range(space.dimension)])


def test_a_space_of_few_networks_gives_those_there_are(make_transformer):
    config = dict(make_transformer(num_layers=2).config)
    space = SearchSpace.for_config(config)
    different = {tuple(sorted(layer.shape for layer in genotype.layers)) for genotype in space.all()}
    assert len(held_out(config, space)) == len(different) == 4 + 10
