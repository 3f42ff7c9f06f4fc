"""Modules with tensors in, tensors out, by position: what an exporter can trace. Parts of a network can be lowered on
their own.

Also what all lowerings share: the check of the model, and silence while exporters talk.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import EdgeDiTError

if TYPE_CHECKING:
    from ..models.transformer_edgedit import EdgeDiTTransformer2DModel


def refuse_adapters(model: nn.Module) -> None:
    """Raise an [`EdgeDiTError`] where PEFT adapters wrap layers."""
    if any(".base_layer." in name for name, _ in model.named_parameters()):
        raise EdgeDiTError(
            "The model's layers are wrapped for adapters; merge them with fuse_lora(), call unload_lora(), then export."
        )


def check_model(model: EdgeDiTTransformer2DModel) -> None:
    """Raise an [`EdgeDiTError`] unless the model's parameters are float32 and have their own names."""
    refuse_adapters(model)
    compiled = next((name for name, _ in model.named_parameters() if "_orig_mod" in name.split(".")), None)
    if compiled is not None:
        raise EdgeDiTError(
            f"A layer of the model is compiled ({compiled}); put it back (layer._orig_mod), then export."
        )
    kinds = sorted({str(p.dtype) for p in model.parameters()})
    if kinds != ["torch.float32"]:
        raise EdgeDiTError(
            f"The model's parameters are {', '.join(kinds)}; export needs float32: load it without a torch_dtype."
        )


def plain_config(model: EdgeDiTTransformer2DModel) -> dict:
    """The model's config without diffusers' own entries."""
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what exporters say on every call about absent torchvision, renamed dimensions and their own deprecations;
    errors pass.
    """
    level = logging.root.manager.disable
    logging.disable(max(level, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class DenoiserWrapper(nn.Module):
    """A denoiser with the positional signature `(sample, timestep[, class_labels]) → sample`.

    Args:
        model: `EdgeDiTTransformer2DModel`.

    `sample` is `(B, C, H, W)`, `timestep` float `(B,)`, `class_labels` int64 `(B,)`; unconditional models have no third
    input.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.model(sample, timestep, class_labels, return_dict=False)[0]


class EmbedWrapper(DenoiserWrapper):
    """What comes before the layers: `(sample, timestep[, class_labels]) → tokens (B, N, D), conditioning (B, D)`."""

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.embed(sample, timestep, class_labels)


class UnembedWrapper(nn.Module):
    """What comes after the layers: `(tokens, conditioning) → prediction (B, out_channels, H, W)`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        size = self.model.config.sample_size
        return self.model.unembed(tokens, conditioning, size, size)


class BlockWrapper(nn.Module):
    """One layer: `(tokens (B, N, D), conditioning (B, D)) → tokens`."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, tokens: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        return self.block(tokens, conditioning)


class OnnxAttentionProcessor:
    """Self-attention as ONNX's Attention operator on `(B, N, A)`: the split into heads happens inside the operator.

    The same numbers as the model's own processor with half the nodes: no slices, reshapes and transposes around each
    attention.
    """

    def __call__(self, attn: nn.Module, hidden_states: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)  # each [B, N, A]
        output, *_ = torch.onnx.ops.attention(
            query, key, value, attn_mask=bias, q_num_heads=attn.heads, kv_num_heads=attn.heads
        )
        return attn.to_out(output)


@contextlib.contextmanager
def onnx_attention(module: nn.Module) -> Iterator[None]:
    """Within the block, every attention layer of `module` uses [`OnnxAttentionProcessor`]; afterwards its own processor
    again.
    """
    layers = [m for m in module.modules() if hasattr(m, "to_qkv") and hasattr(m, "processor")]
    processors = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.processor = OnnxAttentionProcessor()
        yield
    finally:
        for layer, processor in zip(layers, processors):
            layer.processor = processor
