"""A module as a torch.export program that coremltools converts: `coreml_program`.

torch.export, not torch.jit.trace: with torch 2.13, coremltools 9 stumbles over the shapes that a trace leaves as
tensors, and a trace cannot pass on `enable_gqa`. Of the exported graph, coremltools lacks a few operators, which torch
itself takes apart; two more things are rewritten, exactly:

- attention with fewer key than query heads, which coremltools would not know from an error: the queries of a key head
  become rows of one head (with a mask, keys and values are repeated);
- expansions of tensors of more than five dimensions, which Core ML does not have: neighbouring dimensions that stay as
  they are become one.

Also, queries, keys and values of an EdgeDiT are cut from the last dimension, so that no tensor has five dimensions (the
neural engine takes four), and the compression of keys and values of an elastic DiT is a convolution.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ...models.transformer_elastic_dit import ElasticCompression
from ..parts import share

MAX_RANK = 5
aten = torch.ops.aten


class CoreMLAttentionProcessor:
    """Self-attention `(B, N, D)` → `(B, N, D)` of an EdgeDiT in tensors of at most four dimensions."""

    def __call__(self, attn: nn.Module, hidden_states: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        query, key, value = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in attn.to_qkv(hidden_states).chunk(3, dim=-1)
        )  # each [B, h, N, A/h]
        return attn.to_out(
            nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
        )


class CoreMLCompression(nn.Module):
    """[`ElasticCompression`] of a stand-alone net as the depthwise convolution that it is: its weighted sum of windows
    has six dimensions.
    """

    def __init__(self, layer: ElasticCompression):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        grid = tokens.transpose(1, 2).unflatten(2, (rows, columns))  # [B, c, rows, columns]
        return (
            nn.functional.conv2d(grid, self.weight, self.bias, stride=2, groups=len(self.weight))
            .flatten(2)
            .transpose(1, 2)
        )


def coreml_program(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.export.ExportedProgram:
    """Export a module for coremltools.

    Args:
        module: with positional tensor inputs, in eval mode; it is not changed.
        inputs: example inputs; their shapes become the program's.
    """
    form = share(module)
    for layer in list(form.modules()):
        for name, child in layer.named_children():
            if isinstance(child, ElasticCompression):
                setattr(layer, name, CoreMLCompression(child))
        if hasattr(layer, "to_qkv") and hasattr(layer, "processor"):
            layer.processor = CoreMLAttentionProcessor()
    with torch.no_grad():
        program = torch.export.export(form, inputs, strict=False)
        for node in list(program.graph.nodes):
            if node.target is aten.scaled_dot_product_attention.default and node.kwargs.get("enable_gqa"):
                _group_heads(program.graph, node)
            elif node.target is aten.expand.default and node.meta["val"].ndim > MAX_RANK:
                _expand_flat(program.graph, node)
        program.graph_module.recompile()
        return program.run_decompositions(_decompositions())


def _decompositions() -> dict:
    """Operators that coremltools 9 lacks, by others that it has. All others, attention and norms among them, stay
    whole.
    """
    return torch._decomp.get_decompositions([aten.addcmul, aten.new_ones]) | {
        aten.alias.default: lambda x: x.clone(),
        aten.__and__.Tensor: lambda x, y: torch.bitwise_and(x, y),
        aten.gelu.default: _gelu,
        # At whole factors the two kinds of nearest neighbours are one, and others do not occur.
        aten._upsample_nearest_exact2d.vec: lambda x, size, factors: aten.upsample_nearest2d.vec(x, size, factors),
        aten.where.ScalarOther: lambda condition, x, y: torch.where(condition, x, torch.full_like(x, y)),
    }


def _gelu(x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    """tanh-GELU in the form that coremltools recognises as such: it passes over `approximate` and would take either for
    the other one (erf).
    """
    if approximate == "none":
        return NotImplemented
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def _group_heads(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """Rewrite attention in which query head i reads key head ⌊i · k / h⌋."""
    query, key, value = node.args[:3]
    batch, heads, rows, channels = query.meta["val"].shape
    key_heads = key.meta["val"].shape[1]
    group = heads // key_heads
    node.kwargs = {name: given for name, given in node.kwargs.items() if name != "enable_gqa"}
    if len(node.args) > 3 and node.args[3] is not None or node.kwargs.get("attn_mask") is not None:
        with graph.inserting_before(node):
            key, value = (
                graph.call_function(aten.repeat_interleave.self_int, (heads, group, 1)) for heads in (key, value)
            )
        node.args = (query, key, value, *node.args[3:])
        return
    with graph.inserting_before(node):
        rows_of_head = graph.call_function(aten.reshape.default, (query, [batch, key_heads, group * rows, channels]))
    with graph.inserting_after(node):
        apart = graph.call_function(aten.reshape.default, (node, [batch, heads, rows, value.meta["val"].shape[-1]]))
    node.replace_all_uses_with(apart, delete_user_cb=lambda user: user is not apart)
    node.args = (rows_of_head, key, value, *node.args[3:])


def _expand_flat(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """Rewrite an expansion of many dimensions as one of few between two reshapes (which coremltools merges with their
    neighbours).
    """
    source = node.args[0]
    shapes = list(zip(source.meta["val"].shape, node.meta["val"].shape))
    merged: list[list[int]] = []
    for index, (before, after) in enumerate(shapes):
        if index and before == after and shapes[index - 1][0] == shapes[index - 1][1]:
            merged[-1] = [size * before for size in merged[-1]]
        else:
            merged.append([before, after])
    with graph.inserting_before(node):
        flat = graph.call_function(aten.reshape.default, (source, [before for before, _ in merged]))
        expanded = graph.call_function(aten.expand.default, (flat, [after for _, after in merged]))
        whole = graph.call_function(aten.reshape.default, (expanded, [after for _, after in shapes]))
    node.replace_all_uses_with(whole)
    graph.erase_node(node)
