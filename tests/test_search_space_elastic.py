"""Closed-form costs of elastic nets against the modules themselves."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edgedit_hf import ElasticDiTTransformer2DModel
from edgedit_hf.search_space import elastic_cost, elastic_weights

OTHER = {
    "num_layers": [2, 4, 1],
    "mlp_ratios": [2.0, 3.0, 4.0],
    "attention_blocks": 6,
    "attention_radius": 2,
    "text_dims": [8, 16, 24],
}


@pytest.mark.parametrize(
    "preset, changes",
    [
        ("elastic-dit-1.6b", {}),
        ("elastic-dit-digits", {}),
        ("elastic-dit-debug", OTHER),
        ("elastic-dit-debug", {"num_layers": [0, 2, 0]}),
    ],
)
def test_weights_are_counted_exactly(preset, changes):
    with torch.device("meta"):
        net = ElasticDiTTransformer2DModel.from_preset(preset, **changes)
        assert elastic_weights(net.config) == sum(parameter.numel() for parameter in net.parameters())
        for name in net.subnet_names:
            net.set_active_subnet(name)
            twin = ElasticDiTTransformer2DModel(**net.active_subnet_config())
            weights = sum(parameter.numel() for parameter in twin.parameters())
            assert elastic_cost(net.config, name).weights == elastic_weights(twin.config) == weights
            assert elastic_cost(net.config, name) == elastic_cost(twin.config)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, OTHER], ids=["preset", "other"])
@pytest.mark.parametrize("size", [(8, 8), (12, 20)], ids=str)
def test_multiplications_are_those_that_torch_counts(changes, size):
    net = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug", **changes).eval()
    text = [torch.randn(1, 5, width) for width in net.config.text_dims]
    for name in net.subnet_names:
        net.set_active_subnet(name)
        # The counter sees attention only as plain matrix products, and two operations a multiplication.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            net(torch.randn(1, 1, *size), torch.tensor(5.0), text)
        cost = elastic_cost(net.config, name, *size, text_tokens=5)
        assert 2 * cost.macs == counter.get_total_flops() < cost.flops < 1.05 * 2 * cost.macs
