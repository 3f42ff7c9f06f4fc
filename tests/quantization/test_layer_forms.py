"""The forms of a network's layers: what they cost against a copy that really has them, and the same weights whichever
way they are reached.
"""

import copy

import pytest
import torch

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.quantization.calibration import record, replay, second_moments
from edgedit_hf.quantization.gptq import quantize_compensated
from edgedit_hf.quantization.layer_forms import LayerForms
from edgedit_hf.quantization.layers import set_quantized_weight
from edgedit_hf.quantization.quantize import quantize_weight
from edgedit_hf.run.sections import QuantizeConfig

OPTIONS = QuantizeConfig(scheme="affine", group_size=16, budget_bits=7.0)


@pytest.fixture(scope="module")
def pipeline(make_transformer):
    model = make_transformer(num_layers=1).requires_grad_(False)
    return EdgeDiTPipeline(model, make_scheduler("epsilon"), default_steps=2, default_guidance_scale=2.0)


@pytest.fixture(scope="module")
def calls(pipeline):
    return record(pipeline, 3, batch_size=3).calls


def test_a_layer_costs_what_a_copy_of_the_network_with_it_loses(pipeline, calls):
    model = pipeline.transformer
    forms = LayerForms(model, OPTIONS, calls, calls)
    name = "blocks.0.ff.net.2" if "blocks.0.ff.net.2" in forms.names else forms.names[3]
    moments = second_moments(model, calls, [name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = forms.measure(name)
    assert [row["spec"] and row["spec"]["bits"] for row in rows][:2] == [4, 8]
    for row in rows:
        if row["spec"] is None:
            assert row["mse"] == 0 and row["num_bits"] == 32 * forms.sizes[name]
            continue
        other = copy.deepcopy(model)
        weight = quantize_compensated(model.get_submodule(name).weight, row["spec"], moments[name])
        set_quantized_weight(other.get_submodule(name), weight)
        pairs = [(replay(other, call), replay(model, call)) for call in calls]
        lost = torch.cat([(a - b).double().square().flatten() for a, b in pairs]).mean()
        assert row["mse"] == pytest.approx(float(lost), rel=1e-4)
    assert rows[0]["mse"] > rows[1]["mse"] and rows[0]["num_bits"] < rows[1]["num_bits"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_chosen_weights_do_not_depend_on_what_was_measured_before(pipeline, calls):
    forms = LayerForms(pipeline.transformer, OPTIONS, calls, calls[:1])
    measured = {name: forms.measure(name) for name in forms.names}
    chosen = forms.allocate(measured)
    assert chosen.average_bits <= OPTIONS.budget_bits
    made = forms.weights(chosen.plan)
    resumed = LayerForms(pipeline.transformer, OPTIONS, calls, calls[:1]).weights(chosen.plan)
    assert made.keys() == chosen.plan.keys() == resumed.keys()
    for name, weight in made.items():
        assert torch.equal(weight.dequantize(), resumed[name].dequantize()), name
    described = forms.describe(chosen, measured)
    assert all(described[name]["candidates"] == measured[name] for name in forms.names)


def test_without_compensation_weights_are_rounded_to_the_nearest(pipeline, calls):
    options = QuantizeConfig(scheme="affine", group_size=16, budget_bits=7.0, compensate=False)
    forms = LayerForms(pipeline.transformer, options, calls, calls[:1])
    name = forms.names[0]
    spec = forms.specs[name][0]
    nearest = quantize_weight(pipeline.transformer.get_submodule(name).weight, spec).dequantize()
    assert torch.equal(forms.weight(name, spec).dequantize(), nearest)


def test_what_cannot_work_is_said_at_once(pipeline, calls):
    with pytest.raises(EdgeDiTError, match="budget"):
        LayerForms(pipeline.transformer, QuantizeConfig(scheme="affine", budget_bits=2.0), calls, calls[:1])
    silent = copy.deepcopy(pipeline.transformer)
    for parameter in silent.parameters():
        parameter.zero_()
    with pytest.raises(EdgeDiTError, match="predicts zeros alone"):
        LayerForms(silent, OPTIONS, calls, calls[:1])
