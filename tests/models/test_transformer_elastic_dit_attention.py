"""Adaptive sparse self-attention against a dense reference with a mask, and in ONNX Runtime."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgedit_hf.models.transformer_elastic_dit import ElasticDiTTransformer2DModel, rotate, strip_attention

# (rows, columns) of the grid, strips, radius: strips of whole rows and of parts, a last strip that is shorter, fewer
# strips than asked for (11 tokens in strips of 2 are 6), fewer tokens than strips, each strip alone, all strips seen.
STRIPS = [
    ((8, 8), 8, 1),
    ((8, 12), 16, 1),
    ((6, 4), 5, 1),
    ((1, 11), 8, 1),
    ((2, 2), 16, 1),
    ((8, 8), 16, 0),
    ((4, 10), 7, 2),
    ((6, 6), 16, 3),
    ((4, 4), 1, 0),
]
GRIDS = [(8, 8), (4, 10), (12, 2), (2, 2)]


def neighbourhood(tokens: int, blocks: int, radius: int) -> torch.Tensor:
    """Which token sees which, `(N, N)`: those whose strips are at most `radius` apart."""
    strip = torch.arange(tokens) // -(-tokens // blocks)
    return (strip[:, None] - strip).abs() <= radius


def dense(query, key, value, mask=None):
    """Attention with every score written out; key and value heads are repeated in groups."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.einsum("bhnd,bhmd->bhnm", query, key) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhnm,bhmd->bhnd", scores.softmax(dim=-1), value)


@pytest.mark.parametrize("grid, blocks, radius", STRIPS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_strips_equal_dense_attention_with_a_mask(grid, blocks, radius, kv_heads):
    tokens = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn(2, 4, tokens, 8, generator=generator).requires_grad_()
    key, value = (torch.randn(2, kv_heads, tokens, 8, generator=generator).requires_grad_() for _ in range(2))
    weight = torch.randn(2, 4, tokens, 8, generator=generator)
    ours = strip_attention(query, key, value, blocks, radius)
    expected = dense(query, key, value, neighbourhood(tokens, blocks, radius))
    assert torch.allclose(ours, expected, atol=1e-5, rtol=0)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (query, key, value)),
        torch.autograd.grad((expected * weight).sum(), (query, key, value)),
    ):
        assert torch.allclose(a, b, atol=1e-5, rtol=0)


def test_strips_are_runs_of_the_raster():
    """At 64 × 64 tokens, 16 strips and radius 1: strips of 4 rows see 12 rows, the first and the last 8 (SnapGen++,
    supplement D).
    """
    value = torch.eye(64).repeat_interleave(64, dim=0)[None, None]  # every token carries its row
    rows = (
        strip_attention(torch.zeros(1, 1, 4096, 64), torch.zeros(1, 1, 4096, 64), value, 16, 1)[0, 0].view(64, 64, 64)
        > 0
    ).sum(-1)
    assert (rows == torch.tensor([8] * 4 + [12] * 56 + [8] * 4)[:, None]).all()


def make_layer(**config):
    """The first layer's attention of a tiny net with random weights, and the net, which knows the positions."""
    net = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug", subnets=None, **config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net.down_blocks[0].attn, net


def reference(layer, tokens, positions, blocks, radius):
    """The layer written out: one convolution each for keys and values, dense attention, the gate's two branches."""
    grid = positions.rows, positions.columns

    def split(projected):
        return projected.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)

    def convolve(compression, projected):
        grid_of = projected.transpose(1, 2).unflatten(2, grid)
        convolved = F.conv2d(grid_of, compression.weight, compression.bias, stride=2, groups=compression.groups)
        return convolved.flatten(2).transpose(1, 2)

    query, key, value = layer.to_q(tokens), layer.to_k(tokens), layer.to_v(tokens)
    query = rotate(layer.norm_q(split(query)), positions.rotation)
    keys = rotate(layer.norm_k(split(key)), positions.rotation)
    near = dense(query, keys, split(value), neighbourhood(tokens.shape[1], blocks, radius))
    keys = rotate(layer.norm_k(split(convolve(layer.compress_k, key))), positions.compressed)
    everywhere = dense(query, keys, split(convolve(layer.compress_v, value)))
    gate = layer.gate(tokens).sigmoid().transpose(1, 2)[..., None]
    return layer.to_out((gate * everywhere + (1 - gate) * near).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("blocks, radius", [(8, 1), (5, 2), (16, 0)])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_layer_equals_its_dense_reference(grid, blocks, radius):
    layer, net = make_layer(attention_blocks=blocks, attention_radius=radius, num_key_value_heads=4)
    positions = net._positions(*grid, 1, True, torch.device("cpu"))
    tokens = torch.randn(2, grid[0] * grid[1], 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ours, expected = layer(tokens, positions), reference(layer, tokens, positions, blocks, radius)
    assert torch.allclose(ours, expected, atol=1e-5, rtol=0)
    weights = [tokens, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(ours.square().mean(), weights), torch.autograd.grad(expected.square().mean(), weights)
    ):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)


def test_the_gate_chooses_between_the_branches():
    layer, net = make_layer()
    positions = net._positions(8, 8, 1, True, torch.device("cpu"))
    tokens = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(1))
    far_away = tokens.clone()
    far_away[:, -8:] += 1.0  # the last row, which the first row's strips do not see
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.bias.fill_(-100.0)  # the local branch alone
        assert torch.equal(layer(tokens, positions)[:, :8], layer(far_away, positions)[:, :8])
        layer.gate.bias.fill_(100.0)
        assert not torch.allclose(layer(tokens, positions)[:, :8], layer(far_away, positions)[:, :8], atol=1e-3)


@pytest.mark.parametrize("opset", [18, pytest.param(23, marks=(pytest.mark.slow, pytest.mark.export))])
def test_an_exported_layer_agrees(opset):
    import onnxruntime

    layer, net = make_layer(num_key_value_heads=4)
    positions = net._positions(8, 12, 1, True, torch.device("cpu"))

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, tokens):
            return self.layer(tokens, positions)

    tokens = torch.randn(2, 96, 64, generator=torch.Generator().manual_seed(1))
    program = torch.onnx.export(
        Layer().eval(), (tokens,), dynamo=True, opset_version=opset, input_names=["tokens"], verbose=False
    )
    operators = {node.op_type for node in program.model_proto.graph.node}
    assert not operators & {"If", "Loop", "Where", "GatherND", "ScatterND"}, operators
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = layer(tokens, positions).numpy()
    assert np.abs(session.run(None, {"tokens": tokens.numpy()})[0] - expected).max() < 1e-5
