"""Parts of a pipeline rewritten in the operators that XNNPACK runs itself: the same functions, lowered as one piece.
Here EdgeDiT and what all share.

What XNNPACK does not take splits a network into many delegated pieces with ExecuTorch's portable operators between
them, and what it takes literally costs copies. The rewriting, each step exact up to rounding:

- queries, keys and values are three linear layers, not slices of one output; the softmax's scale is in the weights of
  the first;
- attention is matmul, softmax, matmul on `(B·h, N, N)`: no masks of a safe softmax, no expansions of a 4-D product;
- layer norm takes its means as products with a constant row 1/D;
- patches are a permutation and a product, not a convolution, whose layout XNNPACK would have to change twice;
- tokens are merged by sums of slices, and handed back by concatenation;
- tanh-GELU is `x · sigmoid(√(8/π) (x + 0.044715 x³))`: XNNPACK's own GELU is the other one (erf), and ExecuTorch 1.5
  lowers either to it without a word (up to 5e-4 off in every neuron).

Every linear layer of a form knows which rows of which layer of the model it holds ([`Source`]), so that given integers
find their place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ...models.transformer_edgedit import LowRankModulation, StaticModulation, sincos_position_embedding
from ..parts import ConditionerWrapper, ModulatedDenoiserWrapper
from ..wrappers import refuse_adapters

if TYPE_CHECKING:
    from ...models.transformer_edgedit import (
        EdgeDiTAttention,
        EdgeDiTBlock,
        EdgeDiTTransformer2DModel,
        TimestepEmbedder,
    )

# -------------------------------------------------------------------- what all forms share


@dataclass(frozen=True)
class Source:
    """Where the weights of a form's linear layer come from: `factor` times the rows (first, end; `None`: all) of the
    layer `name` of the model.
    """

    name: str
    rows: tuple[int, int] | None = None
    factor: float = 1.0


class FormLinear(nn.Linear):
    """A linear layer of a form: rows of a layer of the model, times a factor. Whole layers share their tensors with the
    model.

    Args:
        layer: the layer. name: what the model calls it. rows, factor: see [`Source`].
    """

    def __init__(self, layer: nn.Linear, name: str, rows: tuple[int, int] | None = None, factor: float = 1.0):
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        if rows is not None:
            weight, bias = weight[slice(*rows)], None if bias is None else bias[slice(*rows)]
        super().__init__(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        if factor != 1:
            weight, bias = weight * factor, None if bias is None else bias * factor
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.source = Source(name, rows, factor)


class XnnpackLayerNorm(nn.Module):
    """Layer norm over the last dimension; both means are matrix products. `weight` and `bias` (optional) are of its
    width.
    """

    def __init__(self, width: int, eps: float, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None):
        super().__init__()
        self.eps = eps
        # Buffers, not layers: quantisation must not find them.
        self.register_buffer("average", torch.full((1, width), 1 / width), persistent=False)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        centred = hidden_states - F.linear(hidden_states, self.average)
        normed = centred * torch.rsqrt(F.linear(centred * centred, self.average) + self.eps)
        if self.weight is not None:
            normed = normed * self.weight
        return normed if self.bias is None else normed + self.bias


class XnnpackGELU(nn.Module):
    """tanh-GELU (Hendrycks & Gimpel, arXiv:1606.08415) by the identity `(1 + tanh z) / 2 = sigmoid(2z)`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        slope = math.sqrt(8 / math.pi)
        return hidden_states * torch.sigmoid(hidden_states * (slope + 0.044715 * slope * hidden_states * hidden_states))


class XnnpackMLP(nn.Module):
    """Two linear layers with tanh-GELU between."""

    def __init__(self, mlp: nn.Module, name: str):
        super().__init__()
        self.proj_in = FormLinear(mlp.proj_in, f"{name}.proj_in")
        self.act = XnnpackGELU()
        self.proj_out = FormLinear(mlp.proj_out, f"{name}.proj_out")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.proj_out(self.act(self.proj_in(hidden_states)))


def to_patches(sample: torch.Tensor, patch: int, order: Sequence[int]) -> torch.Tensor:
    """`(B, C, H, W)` → `(B, N, C·P·P)`; `order` permutes `(B, C, H/P, P, W/P, P)` so that batch, row and column of the
    patches come first.
    """
    batch, channels, height, width = sample.shape
    parts = sample.reshape(batch, channels, height // patch, patch, width // patch, patch).permute(order)
    return parts.reshape(batch, (height // patch) * (width // patch), -1)


def from_patches(tokens: torch.Tensor, size: tuple[int, int], patch: int) -> torch.Tensor:
    """`(B, N, P·P·C)` → `(B, C, H, W)`, `size` being H and W."""
    batch, (height, width) = tokens.shape[0], size
    parts = tokens.reshape(batch, height // patch, width // patch, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return parts.reshape(batch, -1, height, width)


def modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`shift + hidden_states · (1 + scale)`; the sum 1 + scale is of one row an image."""
    return hidden_states * (scale + 1.0) + shift


# -------------------------------------------------------------------- EdgeDiT


class XnnpackAttention(nn.Module):
    """Self-attention `(B, N, D)` → `(B, N, D)`."""

    def __init__(self, attn: EdgeDiTAttention, name: str):
        super().__init__()
        self.heads = attn.heads
        width = attn.to_qkv.out_features // 3
        scale = (width // attn.heads) ** -0.5
        self.to_q = FormLinear(attn.to_qkv, f"{name}.to_qkv", (0, width), scale)
        self.to_k = FormLinear(attn.to_qkv, f"{name}.to_qkv", (width, 2 * width))
        self.to_v = FormLinear(attn.to_qkv, f"{name}.to_qkv", (2 * width, 3 * width))
        self.to_out = FormLinear(attn.to_out, f"{name}.to_out")
        bias = None if attn.position_bias is None else attn.position_bias().detach()  # [1, h, N, N]
        self.register_buffer("bias", bias, persistent=False)

    def _split(self, hidden_states: torch.Tensor, *order: int) -> torch.Tensor:
        batch, tokens, _ = hidden_states.shape
        parts = hidden_states.reshape(batch, tokens, self.heads, -1).permute(order)  # [B, h, N, A/h] or [B, h, A/h, N]
        return parts.reshape(batch * self.heads, *parts.shape[2:])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = hidden_states.shape
        query = self._split(self.to_q(hidden_states), 0, 2, 1, 3)
        key = self._split(self.to_k(hidden_states), 0, 2, 3, 1)
        value = self._split(self.to_v(hidden_states), 0, 2, 1, 3)
        scores = torch.bmm(query, key)  # [B·h, N, N]
        if self.bias is not None:
            scores = (scores.reshape(batch, self.heads, tokens, tokens) + self.bias).reshape(-1, tokens, tokens)
        output = torch.bmm(torch.softmax(scores, dim=-1), value).reshape(batch, self.heads, tokens, -1)
        return self.to_out(output.permute(0, 2, 1, 3).reshape(batch, tokens, -1))


class XnnpackBlock(nn.Module):
    """One layer with adaLN-zero: tokens `(B, N, D)` and its modulation `(B, 6, D)` → `(B, N, D)`.

    Args:
        grid: rows and columns of the tokens.
    """

    def __init__(self, block: EdgeDiTBlock, name: str, grid: tuple[int, int]):
        super().__init__()
        self.token_merge, self.grid = block.token_merge, grid
        width = block.mlp.proj_in.in_features
        self.norm1 = XnnpackLayerNorm(width, block.norm1.eps)
        self.attn = XnnpackAttention(block.attn, f"{name}.attn")
        self.norm2 = XnnpackLayerNorm(width, block.norm2.eps)
        self.mlp = XnnpackMLP(block.mlp, f"{name}.mlp")

    def forward(self, hidden_states: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            modulation[:, row : row + 1] for row in range(6)
        )  # each [B, 1, D]
        full = hidden_states
        if self.token_merge > 1:
            hidden_states = self._merge(full)
        update = gate_msa * self.attn(modulate(self.norm1(hidden_states), shift_msa, scale_msa))
        hidden_states = hidden_states + update
        mlp = gate_mlp * self.mlp(modulate(self.norm2(hidden_states), shift_mlp, scale_mlp))
        return hidden_states + mlp if self.token_merge == 1 else self._hand_back(full, update + mlp)

    def _merge(self, tokens: torch.Tensor) -> torch.Tensor:
        """Means of 2 × 2 neighbours, `(B, N, D)` → `(B, N / 4, D)`."""
        (rows, columns), width = self.grid, tokens.shape[-1]
        pairs = tokens.reshape(-1, 2, columns * width)
        pairs = (pairs[:, :1] + pairs[:, 1:]).reshape(-1, 2, width)
        return ((pairs[:, :1] + pairs[:, 1:]) * 0.25).reshape(-1, rows * columns // 4, width)

    def _hand_back(self, full: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """Each token of `full` `(B, N, D)` with its group's row of `update` `(B, N / 4, D)` added."""
        (rows, columns), width = self.grid, full.shape[-1]
        update = update.reshape(-1, 1, width)
        update = torch.cat([update, update], dim=1).reshape(-1, 1, columns * width)
        return (full.reshape(-1, 2, columns * width) + update).reshape(-1, rows * columns, width)


class XnnpackTimestepEmbedder(nn.Module):
    """[`TimestepEmbedder`] with its frequencies (and a scale of the time) as constants: `(B,)` → `(B, D)`."""

    def __init__(self, embedder: TimestepEmbedder, name: str):
        super().__init__()
        half = embedder.linear_1.in_features // 2
        exponent = torch.arange(half, dtype=torch.float32) / (half - embedder.frequency_shift)
        frequencies = torch.exp(-math.log(10000.0) * exponent)[None]
        self.register_buffer("frequencies", embedder.scale * frequencies, persistent=False)
        self.register_buffer("phases", embedder.offset * frequencies if embedder.offset else None, persistent=False)
        self.linear_1 = FormLinear(embedder.linear_1, f"{name}.linear_1")
        self.act = embedder.act
        self.linear_2 = FormLinear(embedder.linear_2, f"{name}.linear_2")

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        angles = timestep.reshape(-1, 1) * self.frequencies  # [B, F/2]
        if self.phases is not None:
            angles = angles + self.phases
        return self.linear_2(self.act(self.linear_1(torch.cat([angles.cos(), angles.sin()], dim=-1))))


class XnnpackModulation(nn.Module):
    """adaLN of a layer, whatever its rank: `(B, D)` → `(B, 6D)`. A static one is a constant row for every image."""

    def __init__(self, layer: nn.Module, name: str):
        super().__init__()
        static = isinstance(layer, StaticModulation)
        self.register_buffer("row", layer.bias.detach()[None] if static else None, persistent=False)
        self.layers = nn.Sequential()
        if isinstance(layer, LowRankModulation):
            self.layers = nn.Sequential(FormLinear(layer.down, f"{name}.down"), FormLinear(layer.up, f"{name}.up"))

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        return self.layers(conditioning) if self.row is None else torch.cat([self.row] * conditioning.shape[0])


class XnnpackConditioner(nn.Module):
    """adaLN of a whole EdgeDiT: `(timestep (B,)[, class_labels (B,)])` → the modulations `(B, 6, D)` of every layer and
    `(B, 2, D)` of the output.

    Args:
        joined: whether they are one tensor, `(B, 6L + 2, D)`.
    """

    def __init__(
        self, timestep_embedder: nn.Module, label_embedder: nn.Module | None, layers: Sequence[nn.Module], joined: bool
    ):
        super().__init__()
        self.timestep_embedder, self.label_embedder = (
            XnnpackTimestepEmbedder(timestep_embedder, "timestep_embedder"),
            label_embedder,
        )
        names = [*(f"blocks.{index}.modulation" for index in range(len(layers) - 1)), "modulation_out"]
        self.layers = nn.ModuleList(
            [
                FormLinear(layer, name) if isinstance(layer, nn.Linear) else XnnpackModulation(layer, name)
                for layer, name in zip(layers, names)
            ]
        )
        self.joined = joined

    def forward(
        self, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        conditioning = self.timestep_embedder(timestep)
        if class_labels is not None:
            conditioning = conditioning + self.label_embedder(class_labels)
        conditioning = F.silu(conditioning)
        batch, width = conditioning.shape
        rows = [layer(conditioning).reshape(batch, -1, width) for layer in self.layers]
        return torch.cat(rows, dim=1) if self.joined else rows


class XnnpackEdgeDiT(nn.Module):
    """An EdgeDiT for one size of input: `(sample, timestep[, class_labels])`, or `(sample, modulation)` for one without
    its conditioner.
    """

    def __init__(self, model: EdgeDiTTransformer2DModel, size: tuple[int, int], conditioned: bool):
        super().__init__()
        config = model.config
        self.size, self.patch, self.source_layers = (
            size,
            config.patch_size,
            [layer["source"] for layer in config.layers],
        )
        self.decoder_start, self.skip_start = (
            config.decoder_start,
            {end: start for start, end in config.long_skips or []},
        )
        self.conditioner = None
        if not conditioned:
            layers = [*(block.modulation for block in model.blocks), model.modulation_out]
            self.conditioner = XnnpackConditioner(model.timestep_embedder, model.label_embedder, layers, joined=False)
        self.register_buffer("patch_weight", model.patch_embed.weight.detach().flatten(1), persistent=False)
        self.register_buffer("patch_bias", model.patch_embed.bias.detach(), persistent=False)
        rows, columns = (side // self.patch for side in size)
        native = rows == columns == config.sample_size // self.patch
        position = model.pos_embed.detach() if native else sincos_position_embedding(rows, columns, config.hidden_size)
        self.register_buffer("position", position, persistent=False)
        decoder = None if config.decoder_start is None else model.decoder_pos_embed.detach()
        self.register_buffer("decoder_position", decoder, persistent=False)
        self.blocks = nn.ModuleList(
            [XnnpackBlock(block, f"blocks.{index}", (rows, columns)) for index, block in enumerate(model.blocks)]
        )
        self.skips = nn.ModuleDict({end: FormLinear(layer, f"skips.{end}") for end, layer in model.skips.items()})
        self.norm_out = XnnpackLayerNorm(config.hidden_size, config.norm_eps)
        self.proj_out = FormLinear(model.proj_out, "proj_out")

    def forward(self, sample: torch.Tensor, *condition: torch.Tensor) -> torch.Tensor:
        if self.conditioner is None:
            (table,) = condition
            rows = [table[:, 6 * index : 6 * index + 6] for index in range(len(self.blocks))] + [table[:, -2:]]
        else:
            rows = self.conditioner(*condition)
        tokens = (
            F.linear(to_patches(sample, self.patch, (0, 2, 4, 1, 3, 5)), self.patch_weight, self.patch_bias)
            + self.position
        )
        kept = {-1: tokens}
        for source, block, row in zip(self.source_layers, self.blocks, rows):
            if source[0] == self.decoder_start:
                tokens = tokens + self.decoder_position
            if source[0] in self.skip_start:
                tokens = self.skips[str(source[0])](torch.cat([tokens, kept[self.skip_start[source[0]]]], dim=-1))
            tokens = block(tokens, row)
            kept[source[-1]] = tokens
        shift, scale = rows[-1][:, :1], rows[-1][:, 1:]
        return from_patches(self.proj_out(modulate(self.norm_out(tokens), shift, scale)), self.size, self.patch)


def edgedit_form(module: nn.Module, inputs: Sequence[torch.Tensor]) -> nn.Module:
    """The form of one of EdgeDiT's parts: a [`DenoiserWrapper`], a [`ModulatedDenoiserWrapper`] or a
    [`ConditionerWrapper`].

    Args:
        inputs: examples; the first one's size is the form's.

    Raises:
        EdgeDiTError: PEFT adapters wrap the layers.
    """
    refuse_adapters(module)
    if isinstance(module, ConditionerWrapper):
        labels = module.embedders[1] if len(module.embedders) > 1 else None
        return XnnpackConditioner(module.embedders[0], labels, list(module.layers), joined=True).eval()
    return XnnpackEdgeDiT(module.model, tuple(inputs[0].shape[2:]), isinstance(module, ModulatedDenoiserWrapper)).eval()
