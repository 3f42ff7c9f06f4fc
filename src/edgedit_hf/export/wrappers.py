"""Modules with tensors in, tensors out, by position: what an exporter can trace. Parts of a network can be lowered on their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class DenoiserWrapper(nn.Module):
    """A denoiser with the positional signature `(sample, timestep[, class_labels]) → sample`.

    Args:
        model: `EdgeDiTTransformer2DModel`.

    `sample` is `(B, C, H, W)`, `timestep` float `(B,)`, `class_labels` int64 `(B,)`; unconditional models have no third input.
    """

    output_names = ["prediction"]

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.input_names = ["sample", "timestep"] + (["class_labels"] if model.config.num_classes else [])

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.model(sample, timestep, class_labels, return_dict=False)[0]


class EmbedWrapper(DenoiserWrapper):
    """What comes before the layers: `(sample, timestep[, class_labels]) → tokens (B, N, D), conditioning (B, D)`."""

    output_names = ["tokens", "conditioning"]

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.embed(sample, timestep, class_labels)


class UnembedWrapper(nn.Module):
    """What comes after the layers: `(tokens, conditioning) → prediction (B, out_channels, H, W)`."""

    input_names = ["tokens", "conditioning"]
    output_names = ["prediction"]

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        size = self.model.config.sample_size
        return self.model.unembed(tokens, conditioning, size, size)


class BlockWrapper(nn.Module):
    """One layer: `(tokens (B, N, D), conditioning (B, D)) → tokens`."""

    input_names = ["tokens", "conditioning"]
    output_names = ["tokens"]

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, tokens: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        return self.block(tokens, conditioning)


class OnnxAttentionProcessor:
    """Self-attention as ONNX's Attention operator on `(B, N, A)`: the split into heads happens inside the operator.

    The same numbers as the model's own processor with half the nodes: no slices, reshapes and transposes around each attention.
    """

    def __call__(self, attn: nn.Module, hidden_states: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)  # each [B, N, A]
        output, *_ = torch.onnx.ops.attention(
            query, key, value, attn_mask=bias, q_num_heads=attn.heads, kv_num_heads=attn.heads
        )
        return attn.to_out(output)


@contextlib.contextmanager
def onnx_attention(module: nn.Module) -> Iterator[None]:
    """Within the block, every attention layer of `module` uses [`OnnxAttentionProcessor`]; afterwards its own processor again."""
    layers = [m for m in module.modules() if hasattr(m, "to_qkv") and hasattr(m, "processor")]
    processors = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.processor = OnnxAttentionProcessor()
        yield
    finally:
        for layer, processor in zip(layers, processors):
            layer.processor = processor
