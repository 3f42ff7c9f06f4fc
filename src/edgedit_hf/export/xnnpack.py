"""The denoiser rewritten in the operators that XNNPACK runs itself: the same function, lowered as one piece.

What XNNPACK does not take splits a network into many delegated pieces with ExecuTorch's portable operators between them, and what it takes
literally costs copies. The rewriting, each step exact up to rounding:

- queries, keys and values are three linear layers, not slices of one output; the softmax's scale is in the weights of the first;
- attention is matmul, softmax, matmul on `(B·h, N, N)`: no masks of a safe softmax, no expansions of a 4-D product;
- layer norm takes its means as products with a constant row 1/D;
- the 1 of adaLN's `1 + scale` is in the bias of the modulation layer, and the six modulations are slices of one row;
- tanh-GELU is `x · sigmoid(√(8/π) (x + 0.044715 x³))`: XNNPACK's own GELU is the other one (erf), and ExecuTorch 1.5 lowers either to it
  without a word (up to 5e-4 off in every neuron).
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import EdgeDiTError

if TYPE_CHECKING:
    from ..models.transformer_edgedit import EdgeDiTAttention, EdgeDiTBlock, EdgeDiTTransformer2DModel, TimestepEmbedder


def xnnpack_form(model: EdgeDiTTransformer2DModel) -> EdgeDiTTransformer2DModel:
    """A copy of the model that computes the same in XNNPACK's operators. Weights that do not change are shared with `model`, not copied.

    Raises:
        EdgeDiTError: PEFT adapters wrap the layers.
    """
    if any(".base_layer." in name for name, _ in model.named_parameters()):
        raise EdgeDiTError("The model's layers are wrapped for adapters; merge them with fuse_lora(), call unload_lora(), then export.")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    form = copy.deepcopy(model, shared).eval().requires_grad_(False)
    form.timestep_embedder = XnnpackTimestepEmbedder(form.timestep_embedder)
    form.blocks = nn.ModuleList([XnnpackBlock(block) for block in form.blocks])
    form.norm_out = XnnpackLayerNorm(model.config.hidden_size, model.config.norm_eps)
    form.side_blocks = nn.ModuleList()  # they serve masked training inputs only
    return form


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    """A linear layer around existing tensors."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


class XnnpackLayerNorm(nn.Module):
    """Layer norm without weights over the last dimension; both means are matrix products."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        # A buffer, not a linear layer: quantisation must not find it.
        self.register_buffer("average", torch.full((1, width), 1 / width), persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        centred = hidden_states - F.linear(hidden_states, self.average)
        return centred * torch.rsqrt(F.linear(centred * centred, self.average) + self.eps)


class XnnpackGELU(nn.Module):
    """tanh-GELU (Hendrycks & Gimpel, arXiv:1606.08415) by the identity `(1 + tanh z) / 2 = sigmoid(2z)`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        slope = math.sqrt(8 / math.pi)
        return hidden_states * torch.sigmoid(hidden_states * (slope + 0.044715 * slope * hidden_states * hidden_states))


class XnnpackAttention(nn.Module):
    """Self-attention `(B, N, D)` → `(B, N, D)`."""

    def __init__(self, attn: EdgeDiTAttention):
        super().__init__()
        self.heads = attn.heads
        width = attn.to_qkv.out_features // 3
        weights, biases = attn.to_qkv.weight.split(width), attn.to_qkv.bias.split(width)
        scale = (width // attn.heads) ** -0.5
        self.to_q = _linear(weights[0] * scale, biases[0] * scale)
        self.to_k = _linear(weights[1], biases[1])
        self.to_v = _linear(weights[2], biases[2])
        self.to_out = attn.to_out
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
    """One layer with adaLN-zero, called as [`EdgeDiTBlock`] is; the modulations are always those of `conditioning`."""

    def __init__(self, block: EdgeDiTBlock):
        super().__init__()
        width = block.mlp.proj_in.in_features
        self.norm1 = XnnpackLayerNorm(width, block.norm1.eps)
        self.attn = XnnpackAttention(block.attn)
        self.norm2 = XnnpackLayerNorm(width, block.norm2.eps)
        self.mlp = block.mlp
        self.mlp.act = XnnpackGELU()
        bias = block.modulation.bias.detach().clone()
        for scale in (1, 4):  # of shift, scale, gate, shift, scale, gate
            bias[scale * width : (scale + 1) * width] += 1
        self.modulation = _linear(block.modulation.weight, bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        modulation: torch.Tensor | None = None,
        visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(B, N, D)` and `(B, D)` → `(B, N, D)`; `modulation` and `visible` are there for the signature and must be `None`."""
        batch, _, width = hidden_states.shape
        row = self.modulation(conditioning).reshape(batch, 1, -1)  # [B, 1, 6D]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (row[:, :, i * width : (i + 1) * width] for i in range(6))
        hidden_states = hidden_states + gate_msa * self.attn(self.norm1(hidden_states) * scale_msa + shift_msa)
        return hidden_states + gate_mlp * self.mlp(self.norm2(hidden_states) * scale_mlp + shift_mlp)


class XnnpackTimestepEmbedder(nn.Module):
    """[`TimestepEmbedder`] with its frequencies (and a scale of the time) as constants: `(B,)` → `(B, D)`."""

    def __init__(self, embedder: TimestepEmbedder):
        super().__init__()
        half = embedder.linear_1.in_features // 2
        exponent = torch.arange(half, dtype=torch.float32) / (half - embedder.frequency_shift)
        frequencies = torch.exp(-math.log(10000.0) * exponent)[None]
        self.register_buffer("frequencies", embedder.scale * frequencies, persistent=False)
        self.register_buffer("phases", embedder.offset * frequencies if embedder.offset else None, persistent=False)
        self.linear_1, self.act, self.linear_2 = embedder.linear_1, embedder.act, embedder.linear_2

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        angles = timestep.unsqueeze(-1) * self.frequencies  # [B, F/2]
        if self.phases is not None:
            angles = angles + self.phases
        return self.linear_2(self.act(self.linear_1(torch.cat([angles.cos(), angles.sin()], dim=-1))))
