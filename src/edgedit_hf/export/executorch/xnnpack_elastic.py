"""The elastic DiT rewritten in the operators that XNNPACK runs itself, with the building blocks of [`xnnpack`]: the
same function up to rounding.

- What depends on sizes alone (rotary tables, strips, the learned text tokens of every row) is a constant or a slice.
- Queries are laid out once as `(B·k, strips · g · length, d)`, k key/value heads with g queries each: both branches of
  the sparse attention read them as views, no key or value is repeated, and all strips with a whole neighbourhood are
  one matrix product.
- Norm, rotation and the softmax's scale are one expression: with x̂ the normed head and x̂' its halves exchanged, `x̂ ·
  a + x̂' · b + c`, whose tables a, b, c hold cos, sin, and the norm's weight and bias.
- Masks are additive and finite; the softmax of [`MASKED`] is 0 in float32 beside any token that is there, and the
  learned ones always are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ...models.transformer_elastic_dit import FREQUENCIES
from ..parts import ElasticConditionerWrapper, ModulatedElasticDenoiserWrapper, TextConditionerWrapper
from ..wrappers import refuse_adapters
from .xnnpack import FormLinear, XnnpackLayerNorm, XnnpackMLP, from_patches, modulate, to_patches

if TYPE_CHECKING:
    from ...models.transformer_elastic_dit import (
        ElasticCompression,
        ElasticCrossAttention,
        ElasticDiTBlock,
        ElasticDiTTransformer2DModel,
        ElasticSelfAttention,
        Modulation,
        Positions,
        TextEmbedder,
    )

MASKED = -1e4  # added to the scores of text tokens that are not there


class RotatedNorm(nn.Module):
    """Layer norm and rotation of heads `(B, N, h, d)`, times `factor`."""

    def __init__(self, norm: nn.LayerNorm, rotation: tuple[torch.Tensor, torch.Tensor], factor: float = 1.0):
        super().__init__()
        self.half = norm.weight.shape[0] // 2
        self.norm = XnnpackLayerNorm(2 * self.half, norm.eps)
        weight, bias = norm.weight.detach() * factor, norm.bias.detach() * factor
        cos, sin = (table.repeat(1, 2) for table in rotation)  # [N, d]
        sin[:, : self.half] *= -1
        exchanged = torch.cat([torch.arange(self.half, 2 * self.half), torch.arange(self.half)])
        for name, table in (
            ("direct", weight * cos),
            ("crossed", weight[exchanged] * sin),
            ("constant", bias * cos + bias[exchanged] * sin),
        ):
            self.register_buffer(name, table[:, None].contiguous(), persistent=False)  # [N, 1, d]

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        normed = self.norm(heads)
        exchanged = torch.cat([normed[..., self.half :], normed[..., : self.half]], dim=-1)
        return normed * self.direct + exchanged * self.crossed + self.constant


class XnnpackCompression(nn.Module):
    """[`ElasticCompression`] for one grid of tokens: `(B, N, c)` → `(B, N/4, c)`."""

    def __init__(self, layer: ElasticCompression, rows: int, columns: int):
        super().__init__()
        self.grid = rows // 2, 2, columns // 2, 2
        for place, weight in enumerate(layer.weight.detach().flatten(1).unbind(1)):  # each [c]
            self.register_buffer(f"weight_{place}", weight.contiguous(), persistent=False)
        self.register_buffer("bias", layer.bias.detach(), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, count, channels = tokens.shape
        windows = tokens.reshape(batch, *self.grid, channels)
        compressed = self.bias
        for row in range(2):
            for column in range(2):
                part = windows[:, :, row : row + 1, :, column : column + 1]
                compressed = compressed + part * getattr(self, f"weight_{2 * row + column}")
        return compressed.reshape(batch, count // 4, channels)


class XnnpackSelfAttention(nn.Module):
    """[`ElasticSelfAttention`] for one grid of tokens: `(B, N, D)` → `(B, N, D)`."""

    def __init__(self, attn: ElasticSelfAttention, positions: Positions, name: str):
        super().__init__()
        self.head_dim, self.kv_heads = attn.head_dim, attn.to_k.out_features // attn.head_dim
        self.group = attn.to_q.out_features // attn.to_k.out_features
        for part in ("to_q", "to_k", "to_v", "to_out"):
            self.add_module(part, FormLinear(getattr(attn, part), f"{name}.{part}"))
        self.norm_q = RotatedNorm(attn.norm_q, positions.rotation, attn.head_dim**-0.5)
        self.norm_k = RotatedNorm(attn.norm_k, positions.rotation)
        self.tokens = positions.rows * positions.columns
        self.length, self.radius, self.gate = self.tokens, 0, None  # one strip
        if attn.sparse:
            self.length, self.radius = -(-self.tokens // attn.blocks), attn.radius
            self.compress_k = XnnpackCompression(attn.compress_k, positions.rows, positions.columns)
            self.compress_v = XnnpackCompression(attn.compress_v, positions.rows, positions.columns)
            self.norm_compressed = RotatedNorm(attn.norm_k, positions.compressed)
            self.gate = FormLinear(attn.gate, f"{name}.gate")
        self.strips = -(-self.tokens // self.length)

    def _rows(self, heads: torch.Tensor) -> torch.Tensor:
        """Of queries: `(B, N, h, d)` → `(B·k, strips, g·length, d)`, the last strip filled up with zeros."""
        batch, width = heads.shape[0], heads.shape[-1]
        heads = heads.reshape(batch, self.tokens, self.kv_heads * self.group * width)
        if self.strips * self.length > self.tokens:
            heads = F.pad(heads, (0, 0, 0, self.strips * self.length - self.tokens))
        heads = heads.reshape(batch, self.strips, self.length, self.kv_heads, self.group, width).permute(
            0, 3, 1, 4, 2, 5
        )
        return heads.reshape(batch * self.kv_heads, self.strips, self.group * self.length, width)

    def _tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Back to `(B, N, h·d)`."""
        width = rows.shape[-1]
        rows = rows.reshape(-1, self.kv_heads, self.strips, self.group, self.length, width).permute(0, 2, 4, 1, 3, 5)
        tokens = rows.reshape(rows.shape[0], self.strips * self.length, self.kv_heads * self.group * width)
        return tokens if self.strips * self.length == self.tokens else tokens[:, : self.tokens]

    def _keys(self, heads: torch.Tensor) -> torch.Tensor:
        """Of keys and values: `(B, M, k, d)` → `(B·k, M, d)`."""
        return heads.permute(0, 2, 1, 3).reshape(-1, heads.shape[1], self.head_dim)

    @staticmethod
    def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """`(R, n, d)`, `(R, m, d)`, `(R, m, d)` → `(R, n, d)`."""
        return torch.bmm(torch.softmax(torch.bmm(query, key.permute(0, 2, 1)), dim=-1), value)

    def _near(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Every strip to its neighbours, as [`strip_attention`]: `(B·k, strips, g·length, d)` of queries and
        results.
        """
        heads, _, rows, width = query.shape
        inner = range(self.radius, self.tokens // self.length - self.radius)  # strips whose neighbourhood is whole
        if len(inner) < 2:
            inner = range(0)

        def one(strip: int) -> torch.Tensor:
            first, last = (
                max(0, strip - self.radius) * self.length,
                min(self.tokens, (strip + self.radius + 1) * self.length),
            )
            queries = query if self.strips == 1 else query[:, strip : strip + 1]
            keys, values = (tensor if last - first == self.tokens else tensor[:, first:last] for tensor in (key, value))
            return self._attend(queries.reshape(heads, rows, width), keys, values).reshape(heads, 1, rows, width)

        def neighbourhoods(tensor: torch.Tensor) -> torch.Tensor:
            span = len(inner) * self.length
            shifted = [
                tensor[:, shift * self.length : shift * self.length + span] for shift in range(2 * self.radius + 1)
            ]
            parts = [part.reshape(heads, len(inner), self.length, width) for part in shifted]
            return (
                torch.cat(parts, dim=2).reshape(heads * len(inner), -1, width)
                if self.radius
                else parts[0].reshape(-1, self.length, width)
            )

        parts = [one(strip) for strip in range(inner.start if inner else 0)]
        if inner:
            queries = query[:, inner.start : inner.stop].reshape(heads * len(inner), rows, width)
            parts.append(
                self._attend(queries, neighbourhoods(key), neighbourhoods(value)).reshape(
                    heads, len(inner), rows, width
                )
            )
        parts += [one(strip) for strip in range(inner.stop if inner else 0, self.strips)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = hidden_states.shape
        shape = batch, tokens, -1, self.head_dim
        query = self._rows(self.norm_q(self.to_q(hidden_states).reshape(shape)))
        key, value = self.to_k(hidden_states), self.to_v(hidden_states)  # [B, N, k·d]
        attention = self._near(query, self._keys(self.norm_k(key.reshape(shape))), self._keys(value.reshape(shape)))
        if self.gate is not None:
            shape = batch, tokens // 4, -1, self.head_dim
            far_key = self._keys(self.norm_compressed(self.compress_k(key).reshape(shape)))
            far_value = self._keys(self.compress_v(value).reshape(shape))
            far = self._attend(query.reshape(len(far_key), -1, self.head_dim), far_key, far_value).reshape(
                attention.shape
            )
            gate = self._rows(torch.sigmoid(self.gate(hidden_states)).reshape(batch, tokens, -1, 1))
            attention = attention + gate * (far - attention)
        return self.to_out(self._tokens(attention))


class XnnpackCrossAttention(nn.Module):
    """[`ElasticCrossAttention`]: tokens `(B, N, D)`, text `(B, T, E)` and what is added to its scores, `(B, 1, T)` →
    `(B, N, D)`.
    """

    def __init__(self, attn: ElasticCrossAttention, name: str):
        super().__init__()
        self.head_dim, self.kv_heads = attn.head_dim, attn.kv_heads
        for part in ("to_q", "to_k", "to_v", "to_out"):
            self.add_module(part, FormLinear(getattr(attn, part), f"{name}.{part}"))
        factor = attn.head_dim**-0.5
        for part, scale in (("norm_q", factor), ("norm_k", 1.0)):
            norm = getattr(attn, part)
            self.add_module(
                part,
                XnnpackLayerNorm(attn.head_dim, norm.eps, norm.weight.detach() * scale, norm.bias.detach() * scale),
            )

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        (batch, tokens, _), count = hidden_states.shape, text.shape[1]
        heads, width = self.kv_heads, self.head_dim
        query = self.norm_q(self.to_q(hidden_states).reshape(batch, tokens, -1, width))
        # Query head i reads head i mod k: [B, N, g, k, d] → [B·k, g·N, d].
        query = query.reshape(batch, tokens, -1, heads, width).permute(0, 3, 2, 1, 4).reshape(batch * heads, -1, width)
        key = (
            self.norm_k(self.to_k(text).reshape(batch, count, heads, width))
            .permute(0, 2, 3, 1)
            .reshape(batch * heads, width, count)
        )
        value = (
            self.to_v(text).reshape(batch, count, heads, width).permute(0, 2, 1, 3).reshape(batch * heads, count, width)
        )
        scores = torch.bmm(query, key)
        scores = (scores.reshape(batch, -1, count) + mask).reshape(scores.shape)
        output = torch.bmm(torch.softmax(scores, dim=-1), value).reshape(batch, heads, -1, tokens, width)
        return self.to_out(output.permute(0, 3, 2, 1, 4).reshape(batch, tokens, -1))


class XnnpackElasticBlock(nn.Module):
    """[`ElasticDiTBlock`] for one grid of tokens."""

    def __init__(self, block: ElasticDiTBlock, positions: Positions, name: str):
        super().__init__()
        self.skip_layers = None
        if block.long_skip is not None:
            self.skip_layers = nn.ModuleList(
                [FormLinear(getattr(block.long_skip, part), f"{name}.long_skip.{part}") for part in ("hidden", "skip")]
            )
        self.norm = XnnpackLayerNorm(block.mlp.proj_in.in_features, block.eps)
        self.attn = XnnpackSelfAttention(block.attn, positions, f"{name}.attn")
        self.cross_attn = XnnpackCrossAttention(block.cross_attn, f"{name}.cross_attn")
        self.mlp = XnnpackMLP(block.mlp, f"{name}.mlp")

    def forward(
        self,
        hidden_states: torch.Tensor,
        text: torch.Tensor,
        mask: torch.Tensor,
        modulation: torch.Tensor,
        skip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens `(B, N, D)`, text `(B, T, E)`, mask `(B, 1, T)`, modulation `(B, 6, D)`, skip `(B, N, D)` → `(B, N,
        D)`.
        """
        if skip is not None:
            hidden_states = self.skip_layers[0](hidden_states) + self.skip_layers[1](skip)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = (
            modulation[:, row : row + 1] for row in range(6)
        )
        hidden_states = hidden_states + gate_attn * self.attn(
            modulate(self.norm(hidden_states), shift_attn, scale_attn)
        )
        hidden_states = hidden_states + self.cross_attn(hidden_states, text, mask)
        return hidden_states + gate_mlp * self.mlp(modulate(self.norm(hidden_states), shift_mlp, scale_mlp))


class XnnpackModulation(nn.Module):
    """[`Modulation`]: timesteps `(B,)` → `(B, 6L + 2, D)`."""

    def __init__(self, modulation: Modulation, name: str):
        super().__init__()
        half = FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10000.0) * (torch.arange(half, dtype=torch.float32) / half))[None]
        self.register_buffer("frequencies", frequencies, persistent=False)
        for part in ("linear_1", "linear_2", "projection"):
            self.add_module(part, FormLinear(getattr(modulation, part), f"{name}.{part}"))
        self.register_buffer("table", modulation.table.detach()[None], persistent=False)  # [1, L, 6, D]
        self.register_buffer("table_out", modulation.table_out.detach()[None], persistent=False)  # [1, 2, D]

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        angles = timestep.reshape(-1, 1) * self.frequencies
        embedded = self.linear_2(F.silu(self.linear_1(torch.cat([angles.cos(), angles.sin()], dim=-1))))  # [B, D]
        batch, width = embedded.shape
        layers = self.projection(F.silu(embedded)).reshape(batch, 1, 6, width) + self.table
        return torch.cat([layers.reshape(batch, -1, width), embedded.reshape(batch, 1, width) + self.table_out], dim=1)


class XnnpackTextEmbedder(nn.Module):
    """[`TextEmbedder`] for a batch: `(text_0, mask_0, text_1, mask_1, …)` → text `(B, T, E)` and its mask `(B, T)` of 0
    and 1.
    """

    def __init__(self, embedder: TextEmbedder, batch: int, name: str):
        super().__init__()
        self.projections = nn.ModuleList(
            [FormLinear(layer, f"{name}.projections.{index}") for index, layer in enumerate(embedder.projections)]
        )
        norms = [
            XnnpackLayerNorm(len(norm.weight), norm.eps, norm.weight.detach(), norm.bias.detach())
            for norm in embedder.norms
        ]
        self.norms = nn.ModuleList(norms)
        self.register_buffer("tokens", embedder.tokens.detach()[None].repeat(batch, 1, 1), persistent=False)
        self.register_buffer("present", torch.ones(batch, len(norms)), persistent=False)

    def forward(self, *texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [norm(projection(text)) for projection, norm, text in zip(self.projections, self.norms, texts[::2])]
        return torch.cat([self.tokens, *parts], dim=1), torch.cat([self.present, *texts[1::2]], dim=1)


class XnnpackElasticDiT(nn.Module):
    """An elastic DiT for one size of input and a batch: `(sample, timestep, text_0, mask_0, …)`, or `(sample,
    modulation, text, text_mask)` for one without its conditioners."""

    def __init__(self, model: ElasticDiTTransformer2DModel, size: tuple[int, int], batch: int, conditioned: bool):
        super().__init__()
        self.size, self.patch = size, model.config.patch_size
        self.rows, self.columns = (side // self.patch for side in size)
        self.modulation = None if conditioned else XnnpackModulation(model.modulation, "modulation")
        self.text_embedder = None if conditioned else XnnpackTextEmbedder(model.text_embedder, batch, "text_embedder")
        self.patch_embed = FormLinear(model.patch_embed, "patch_embed")
        fine = model._positions(self.rows, self.columns, 1, True, torch.device("cpu"))
        coarse = model._positions(self.rows // 2, self.columns // 2, 2, False, torch.device("cpu"))
        for stage, positions in (("down_blocks", fine), ("middle_blocks", coarse), ("up_blocks", fine)):
            blocks = [
                XnnpackElasticBlock(block, positions, f"{stage}.{index}")
                for index, block in enumerate(getattr(model, stage))
            ]
            self.add_module(stage, nn.ModuleList(blocks))
        self.num_skips = sum(block.skip_layers is not None for block in self.middle_blocks)
        for part in ("down_sample", "up_sample", "proj_out"):
            self.add_module(part, FormLinear(getattr(model, part), part))
        self.norm_out = XnnpackLayerNorm(model.proj_out.in_features, model.config.norm_eps)

    def forward(self, sample: torch.Tensor, condition: torch.Tensor, *texts: torch.Tensor) -> torch.Tensor:
        modulation = condition if self.modulation is None else self.modulation(condition)
        text, mask = texts if self.text_embedder is None else self.text_embedder(*texts)
        mask = ((mask - 1.0) * -MASKED).reshape(mask.shape[0], 1, -1)
        layers = iter(range(len(self.down_blocks) + len(self.middle_blocks) + len(self.up_blocks)))

        def run(block: nn.Module, tokens: torch.Tensor, *skip: torch.Tensor) -> torch.Tensor:
            layer = next(layers)
            return block(tokens, text, mask, modulation[:, 6 * layer : 6 * layer + 6], *skip)

        tokens = self.patch_embed(to_patches(sample, self.patch, (0, 2, 4, 3, 5, 1)))
        for block in self.down_blocks:
            tokens = run(block, tokens)
        kept, (batch, _, width) = tokens, tokens.shape
        grid = batch, self.rows // 2, 2, self.columns // 2, 2, width
        tokens = self.down_sample(tokens.reshape(grid).permute(0, 1, 3, 5, 2, 4).reshape(batch, -1, 4 * width))
        skips: list[torch.Tensor] = []
        for index, block in enumerate(self.middle_blocks):
            tokens = run(block, tokens) if block.skip_layers is None else run(block, tokens, skips.pop())
            if index < self.num_skips:
                skips.append(tokens)
        coarse = self.up_sample(tokens).reshape(batch, self.rows // 2, 1, self.columns // 2, 1, width)
        tokens = (kept.reshape(grid) + coarse).reshape(kept.shape)
        for block in self.up_blocks:
            tokens = run(block, tokens)
        shift, scale = modulation[:, -2:-1], modulation[:, -1:]
        return from_patches(self.proj_out(modulate(self.norm_out(tokens), shift, scale)), self.size, self.patch)


def elastic_form(module: nn.Module, inputs: Sequence[torch.Tensor]) -> nn.Module:
    """The form of one of the elastic DiT's parts: a wrapper of the denoiser, whole or without its conditioners, or one
    of those.

    Args:
        inputs: examples; their sizes are the form's.

    Raises:
        EdgeDiTError: PEFT adapters wrap the layers.
    """
    refuse_adapters(module)
    if isinstance(module, ElasticConditionerWrapper):
        return XnnpackModulation(module.modulation, "modulation").eval()
    if isinstance(module, TextConditionerWrapper):
        return XnnpackTextEmbedder(module.embedder, inputs[0].shape[0], "text_embedder").eval()
    split = isinstance(module, ModulatedElasticDenoiserWrapper)
    return XnnpackElasticDiT(module.model, tuple(inputs[0].shape[2:]), inputs[0].shape[0], split).eval()
