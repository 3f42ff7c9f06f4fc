"""VAEs of diffusers and text encoders of transformers with those of their layers rewritten that XNNPACK does not take:
the same function up to rounding.

- Group norm takes its means as a pooling over the image and a product with a constant matrix that averages the channels
  of a group.
- Nearest upsampling is a product with ones that broadcasts; attention is matmul, softmax, matmul on `(B·h, N, N)`.
- Layer norm and RMS norm take their means as products; tanh-GELU is a sigmoid (see [`xnnpack`]).
- T5's relative position bias is a constant.

Everything else stays as it is: look-ups of embeddings, and the masks that transformers builds, are ExecuTorch's
portable operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from ...errors import EdgeDiTError
from ..parts import EncoderWrapper, TextEncoderWrapper, share
from ..wrappers import refuse_adapters
from .xnnpack import FormLinear, XnnpackGELU, XnnpackLayerNorm

ATTENTION = "edgedit_xnnpack"  # the name under which transformers finds [`attend`]


class XnnpackGroupNorm(nn.Module):
    """Group norm of `(B, C, H, W)`, or of `(B, C, N)`."""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.eps = norm.eps
        size = norm.num_channels // norm.num_groups
        group = torch.arange(norm.num_channels) // size
        self.register_buffer("average", (group[:, None] == group).float() / size, persistent=False)  # [C, C]
        affine = norm.weight is not None
        self.register_buffer("weight", norm.weight.detach() if affine else None, persistent=False)
        self.register_buffer("bias", norm.bias.detach().reshape(1, -1, 1, 1) if affine else None, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        shape = hidden_states.shape
        batch, channels = shape[:2]
        images = hidden_states if hidden_states.ndim == 4 else hidden_states.reshape(batch, channels, -1, 1)

        def mean(images: torch.Tensor) -> torch.Tensor:
            return F.linear(images.mean((2, 3), keepdim=True).reshape(batch, channels), self.average)  # [B, C]

        centred = images - mean(images).reshape(batch, channels, 1, 1)
        scale = torch.rsqrt(mean(centred * centred) + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        normed = centred * scale.reshape(batch, channels, 1, 1)
        return (normed if self.bias is None else normed + self.bias).reshape(shape)


class XnnpackUpsample(nn.Module):
    """Nearest upsampling by 2, then a convolution (optional)."""

    def __init__(self, conv: nn.Module | None = None):
        super().__init__()
        self.conv = conv
        self.register_buffer("ones", torch.ones(1, 2, 1, 2), persistent=False)

    def forward(self, hidden_states: torch.Tensor, *unused: Any) -> torch.Tensor:
        batch, channels, height, width = hidden_states.shape
        spread = hidden_states.reshape(batch * channels, height, 1, width, 1) * self.ones
        spread = spread.reshape(batch, channels, 2 * height, 2 * width)
        return spread if self.conv is None else self.conv(spread)


class XnnpackRMSNorm(nn.Module):
    """`x · weight / √(mean(x²) + ε)` over the last dimension."""

    def __init__(self, weight: torch.Tensor, eps: float):
        super().__init__()
        self.eps = eps
        self.register_buffer("average", torch.full((1, len(weight)), 1 / len(weight)), persistent=False)
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return (
            hidden_states * torch.rsqrt(F.linear(hidden_states * hidden_states, self.average) + self.eps) * self.weight
        )


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: queries `(B, h, N, d)`, keys and values `(B, k, M, d)`, additive mask and
    bias → `(B, N, h, d)`.
    """
    (batch, heads, tokens, width), (kv_heads, count) = query.shape, key.shape[1:3]
    query = query.reshape(batch * kv_heads, -1, width) * (width**-0.5 if scaling is None else scaling)
    scores = torch.bmm(query, key.reshape(batch * kv_heads, count, width).permute(0, 2, 1)).reshape(
        batch, heads, tokens, count
    )
    for added in (position_bias, attention_mask):
        if added is not None:
            scores = scores + (added if added.shape[-1] == count else added[..., :count])
    weights = torch.softmax(scores, dim=-1).reshape(batch * kv_heads, -1, count)
    output = torch.bmm(weights, value.reshape(batch * kv_heads, count, width)).reshape(batch, heads, tokens, width)
    return output.permute(0, 2, 1, 3), None


class VaeAttention:
    """An attention processor of diffusers: self-attention over the pixels of `(B, C, H, W)`."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: None = None,
    ) -> torch.Tensor:
        batch, channels, height, width = hidden_states.shape
        tokens = attn.group_norm(hidden_states).reshape(batch, channels, height * width).permute(0, 2, 1)
        query, key, value = (
            layer(tokens).reshape(batch, height * width, attn.heads, -1) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key, value = (heads.permute(0, 2, 1, 3) for heads in (query, key, value))
        output, _ = attend(attn, query, key, value, None, attn.scale)
        output = (
            attn.to_out[0](output.reshape(batch, height * width, -1)).permute(0, 2, 1).reshape(batch, -1, height, width)
        )
        return (output + hidden_states if attn.residual_connection else output) / attn.rescale_output_factor


class XnnpackVaeEncoder(nn.Module):
    """[`EncoderWrapper`] of an [`AutoencoderKL`]: the mode is a slice, not a portable operator's chunk."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae, self.channels = vae, vae.config.latent_channels

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.vae._encode(image)[:, : self.channels]


def _replacement(name: str, module: nn.Module) -> nn.Module | None:
    kind = type(module).__name__
    if type(module) is nn.Linear:
        return FormLinear(module, name)
    if type(module) is nn.LayerNorm and module.weight is not None and len(module.normalized_shape) == 1:
        return XnnpackLayerNorm(
            len(module.weight),
            module.eps,
            module.weight.detach(),
            None if module.bias is None else module.bias.detach(),
        )
    if type(module) is nn.GroupNorm:
        return XnnpackGroupNorm(module)
    if kind in ("T5LayerNorm", "LlamaRMSNorm", "Qwen2RMSNorm"):
        return XnnpackRMSNorm(module.weight.detach(), module.variance_epsilon)
    if kind == "Gemma3RMSNorm":
        return XnnpackRMSNorm(1 + module.weight.detach(), module.eps)
    if kind in ("NewGELUActivation", "GELUTanh", "PytorchGELUTanh") or (
        type(module) is nn.GELU and module.approximate == "tanh"
    ):
        return XnnpackGELU()
    if kind == "Upsample2D" and module.norm is None and module.interpolate and not module.use_conv_transpose:
        return XnnpackUpsample(getattr(module, "conv", None) if module.use_conv else None)
    if type(module) is nn.Upsample and module.mode == "nearest" and module.scale_factor in (2, 2.0):
        return XnnpackUpsample()
    return None


def _rewrite(module: nn.Module, prefix: str = "", linears: bool = True) -> None:
    """Replace what has a replacement, in place; `linears`: also linear layers, so that they can be quantised."""
    for name, child in list(module.named_children()):
        path = f"{prefix}{name}"
        replacement = None if type(child) is nn.Linear and not linears else _replacement(path, child)
        if replacement is not None:
            setattr(module, name, replacement)
        _rewrite(getattr(module, name), f"{path}.", linears)


def encoder_form(module: nn.Module, inputs: Sequence[torch.Tensor]) -> nn.Module:
    """The form of a VAE's decoder or encoder, or of a text encoder. Linear layers of a VAE stay plain: they are not
    quantised.

    Args:
        module: one of the wrappers in [`parts`]. inputs: examples.
    """
    refuse_adapters(module)
    form = share(module)
    if isinstance(form, TextEncoderWrapper):
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        AttentionInterface.register(ATTENTION, attend)
        AttentionMaskInterface.register(ATTENTION, eager_mask)
        for part in form.encoder.modules():
            if hasattr(part, "config"):
                part.config._attn_implementation_internal = ATTENTION
            if getattr(part, "has_relative_attention_bias", False):
                tokens = inputs[0].shape[1]
                part.register_buffer(
                    "constant_bias", part.compute_bias(tokens, tokens).detach().contiguous(), persistent=False
                )
                part.compute_bias = lambda *sizes, part=part, **options: part.constant_bias
        _rewrite(form.encoder)
        return form.eval()
    _rewrite(form.vae, linears=False)
    for part in form.vae.modules():
        if type(part).__name__ == "Attention" and part.group_norm is not None and part.spatial_norm is None:
            part.set_processor(VaeAttention())
    if isinstance(form, EncoderWrapper) and type(form.vae) is AutoencoderKL:
        if len(inputs[0]) > 1:  # the file runs, and its latents are wrong
            raise EdgeDiTError(
                f"ExecuTorch computes this VAE's encoder wrongly for a batch of {len(inputs[0])}; export it for a "
                "batch of 1."
            )
        form = XnnpackVaeEncoder(form.vae)
    return form.eval()
