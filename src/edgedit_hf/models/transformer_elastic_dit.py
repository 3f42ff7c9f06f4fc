"""Elastic DiT: a compact text-to-image diffusion transformer whose width can be chosen at run time. One self-contained
file.

After SnapGen++ (arXiv:2601.08303): three stages (Down, Middle, Up; one 2 × 2 down- and one up-sample between them),
adaptive sparse self-attention in Down and Up, long skips in Middle (U-ViT, arXiv:2209.12152), adaLN-single and
cross-attention to text (PixArt-α, arXiv:2310.00426), flow matching with the velocity ε − x0 as output. One set of
weights holds several sub-networks: a narrower one uses the first rows and columns of every matrix (slimmable networks,
arXiv:1812.08928); norms and modulation exist once a width; what depends on the text alone (its projection, keys and
values of the cross-attention) is not sliced, so it is the same for all.

What the paper leaves open and this file decides: the hidden size is 2304 with heads of 72 channels; keys and values of
the self-attention have a quarter of the heads at every width, those of the cross-attention a fixed number, and query
head i reads head i mod that number, so that a head keeps its partner in every width; keys are compressed before norm
and rotation, which are then those of the compressed grid; the down-sample is a linear layer on 2 × 2 tokens, the
up-sample a linear layer whose output is repeated 2 × 2 and added to Down's output.

Shapes: B batch, C latent channels, H × W latent size, P patch size, N = (H/P)·(W/P) tokens (a quarter of that in
Middle), D residual width of the active sub-network, h query heads, k key/value heads, d channels a head, T text tokens,
E text width, L layers.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.model_loading_utils import load_state_dict
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from safetensors import SafetensorError, safe_open
from torch import nn

FREQUENCIES = 256  # width of the sinusoidal timestep features (DiT)
SLICED_METHODS = ("edgedit", "torchao")  # ways of quantising that leave elastic layers in place
WRAPPERS = (
    "base_layer",
    "_orig_mod",
    "module",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
)  # what PEFT, torch and DDP call a layer in theirs
_LOADED_SUBNET: ContextVar[str | None] = ContextVar(
    "_LOADED_SUBNET", default=None
)  # while `from_pretrained(subnet=…)` runs: which
NO_BITSANDBYTES = (
    "bitsandbytes works with a GPU only, as diffusers calls it. On CPUs quantise with edgedit_hf's own schemes: "
    'quantization_config=EdgeDiTQuantizationConfig(default={"scheme": "nf4"}), or {"scheme": "affine", "bits": 8}, '
    "from edgedit_hf."
)
SUBNETS = {"tiny": 0.375, "small": 0.5, "full": 1.0}

PRESETS: dict[str, dict[str, Any]] = {
    # TinyCLIP (512) and Gemma 3 4B (2560), Qwen-Image's VAE (16 channels, 8 × 8 pixels a latent) at 1024 × 1024.
    "elastic-dit-1.6b": {},
    # 8 × 8 pixels, one channel: the embedded digits.
    "elastic-dit-digits": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 1,
        "num_attention_heads": 8,
        "attention_head_dim": 16,
        "num_layers": [2, 2, 2],
        "text_dims": [64, 64],
        "text_width": 64,
        "num_text_key_value_heads": 1,
        "attention_blocks": 4,
    },
    "elastic-dit-debug": {
        "sample_size": 8,
        "patch_size": 1,
        "in_channels": 1,
        "num_attention_heads": 16,
        "attention_head_dim": 4,
        "num_layers": [1, 3, 1],
        "text_dims": [16, 24],
        "text_width": 32,
        "num_text_key_value_heads": 2,
        "attention_blocks": 8,
    },
}


# -------------------------------------------------------------------- elastic layers


# The width belongs to the call: it goes down the forward as `*width`, nothing for the full net and for a stand-alone
# one, whose layers may be any that take a tensor (of PEFT, of a quantiser), and the name of a narrower sub-network for
# elastic layers.
Width = tuple[str, ...]


class ElasticLinear(nn.Linear):
    """A linear layer of which a sub-network uses the first rows and columns (a view, nothing is copied).

    Args:
        sizes: (outputs, inputs) of every sub-network.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, sizes: Mapping[str, tuple[int, int]]):
        super().__init__(in_features, out_features, bias)
        self.sizes = dict(sizes)

    def forward(self, hidden_states: torch.Tensor, subnet: str | None = None) -> torch.Tensor:
        """`subnet`: the sub-network whose part of the weight is used; `None`: all of it."""
        weight = self.weight  # asked for once: a quantised layer unpacks it
        if subnet is None:
            return F.linear(hidden_states, weight, self.bias)
        rows, columns = self.sizes[subnet]
        return F.linear(hidden_states, weight[:rows, :columns], None if self.bias is None else self.bias[:rows])


class ElasticCompression(nn.Conv2d):
    """Depthwise 2 × 2 convolution of stride 2 over a grid of tokens, of which a sub-network uses the first channels;
    starts as the mean.
    """

    def __init__(self, channels: int, sizes: Mapping[str, int] | None = None):
        super().__init__(channels, channels, kernel_size=2, stride=2, groups=channels)
        self.sizes = sizes

    def forward(self, tokens: torch.Tensor, rows: int, columns: int, subnet: str | None = None) -> torch.Tensor:
        """`(B, N, c)` → `(B, N/4, c)`, as a weighted sum of the four tokens of a window: a convolution would want the
        channels first.
        """
        channels = self.out_channels if subnet is None else self.sizes[subnet]
        windows = tokens.unflatten(1, (rows // 2, 2, columns // 2, 2))  # [B, rows/2, 2, columns/2, 2, c]
        compressed, weight = self.bias[:channels], self.weight
        for row in range(2):
            for column in range(2):
                compressed = torch.addcmul(compressed, windows[:, :, row, :, column], weight[:channels, 0, row, column])
        return compressed.flatten(1, 2)


class PerWidth(nn.ModuleDict):
    """A module of which every sub-network has one of its own, by name; the last is the full net's."""

    name_of_full = ""  # on the class: no sub-network can have this name then

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__(modules)
        self.name_of_full = list(modules)[-1]

    def forward(self, inputs: torch.Tensor, subnet: str | None = None) -> torch.Tensor:
        return self[self.name_of_full if subnet is None else subnet](inputs)


class _Layers:
    """Makes the layers of a net: elastic ones for a supernet (`subnets` given, the narrowest first), plain ones for a
    stand-alone net.
    """

    def __init__(self, subnets: Mapping[str, float] | None):
        self.subnets = subnets

    def linear(
        self, inputs: int, outputs: int, bias: bool = True, slice_inputs: bool = True, slice_outputs: bool = True
    ) -> nn.Linear:
        if self.subnets is None:
            return nn.Linear(inputs, outputs, bias)
        sizes = {
            name: (
                round(outputs * width) if slice_outputs else outputs,
                round(inputs * width) if slice_inputs else inputs,
            )
            for name, width in self.subnets.items()
        }
        return ElasticLinear(inputs, outputs, bias, sizes)

    def compression(self, channels: int) -> ElasticCompression:
        sizes = (
            None if self.subnets is None else {name: round(channels * width) for name, width in self.subnets.items()}
        )
        return ElasticCompression(channels, sizes)

    def per_width(self, make: Callable[[float], nn.Module]) -> nn.Module:
        """`make(width)` gives the module of a sub-network that has this share of the full width."""
        if self.subnets is None:
            module = make(1.0)
            module.is_per_width = True  # under another name in a supernet: see `_source_names`
            return module
        return PerWidth({name: make(width) for name, width in self.subnets.items()})


# -------------------------------------------------------------------- adapters


def _adapts(module: nn.Module) -> bool:
    """Whether a module is a layer in PEFT's wrapper that an adapter changes: one that is on, and not merged into the
    weights.
    """
    if not hasattr(module, "base_layer") or module.disable_adapters or module.merged:
        return False
    return any(
        name in getattr(module, parts) for parts in module.adapter_layer_names for name in module.active_adapters
    )


def _factors(layer: nn.Module, inputs: torch.Tensor) -> Iterator[tuple[nn.Module, nn.Module, torch.Tensor, float]]:
    """A, B, their input and their scale, of every LoRA adapter that changes a layer in PEFT's wrapper."""
    others = [parts for parts in layer.adapter_layer_names if parts not in ("lora_A", "lora_B")]
    variants = getattr(layer, "lora_variant", {})
    for name in layer.active_adapters:
        if name in variants or any(name in getattr(layer, parts) for parts in others):
            kind = type(variants.get(name, layer))
            raise ValueError(
                f"The adapter {name!r} is of the kind {kind.__module__}.{kind.__name__}, but only plain LoRA can be "
                "cut to a sub-network. Merge it with fuse_lora() and call unload_lora(), call disable_adapters(), or "
                "run the full net."
            )
        if name in layer.lora_A:
            down = layer.lora_A[name]
            given = layer.lora_dropout[name](layer._cast_input_dtype(inputs, down.weight.dtype))
            yield down, layer.lora_B[name], given, layer.scaling[name]


def _corner_of(linear: nn.Module, inputs: torch.Tensor, outputs: int) -> torch.Tensor:
    """The first `outputs` of a linear layer on its first inputs."""
    if type(linear) is not nn.Linear or "forward" in linear.__dict__:  # a hook brings the weight
        return linear(F.pad(inputs, (0, linear.in_features - inputs.shape[-1])))[..., :outputs]
    bias = None if linear.bias is None else linear.bias[:outputs]
    return F.linear(inputs, linear.weight[:outputs, : inputs.shape[-1]], bias)


def _linear(layer: nn.Module, hidden_states: torch.Tensor, *width: str) -> torch.Tensor:
    """`layer(hidden_states, *width)` of an [`ElasticLinear`] that PEFT may have wrapped: a sub-network uses the first
    columns of A and the first rows of B.
    """
    if not width or isinstance(layer, ElasticLinear) or not _adapts(layer):
        return layer(hidden_states, *width)
    plain = _linear(layer.base_layer, hidden_states, *width)
    adapted = plain
    for down, up, given, scale in _factors(layer, hidden_states):
        adapted = adapted + _corner_of(up, _corner_of(down, given, down.out_features), plain.shape[-1]) * scale
    return adapted.to(plain.dtype)


# -------------------------------------------------------------------- attention


class Positions(NamedTuple):
    """A grid of tokens: its size, and the rotations (cos, sin), each `(N, d/2)`, of its tokens and of its 2 × 2
    compressed ones.
    """

    rows: int
    columns: int
    rotation: tuple[torch.Tensor, torch.Tensor]
    compressed: tuple[torch.Tensor, torch.Tensor] | None


def rotation_table(
    rows: int, columns: int, stride: int, channels: int, theta: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each `(rows·columns, d/2)` float32, of axial 2-D rotary embeddings (RoPE) of a grid.

    The first quarter of the angles encodes the row, the second the column. Coordinates are the centres of the tokens on
    the finest grid, of which a token covers `stride` × `stride`, so that all stages and compressed keys share one
    coordinate system.
    """
    frequencies = theta ** (-torch.arange(channels // 4, dtype=torch.float32, device=device) / (channels // 4))
    angles = []
    for count in (rows, columns):
        centres = (torch.arange(count, dtype=torch.float32, device=device) + 0.5) * stride - 0.5
        angles.append(centres[:, None] * frequencies)  # [count, d/4]
    by_row = angles[0][:, None].expand(-1, columns, -1)
    by_column = angles[1][None].expand(rows, -1, -1)
    table = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)  # [N, d/2]
    return table.cos(), table.sin()


def rotate(heads: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate `(B, h, N, d)`: channel i and channel i + d/2 turn by the i-th angle of their token."""
    cos, sin = (table.to(heads.dtype) for table in rotation)  # [N, d/2]
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Softmax attention of queries `(B, h, N, d)` to keys and values `(B, k, M, d)`: `(B, h, N, d)`. Query head i reads
    head ⌊i · k / h⌋.
    """
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] != key.shape[1])


def strip_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: int, radius: int
) -> torch.Tensor:
    """Blockwise neighbourhood attention (SnapGen++, eq. 2): the raster sequence is cut into strips of ⌈N / blocks⌉
    tokens (the last may be shorter), and strip b attends to the strips b − radius … b + radius that exist.

    A loop over the strips, whose keys and values are views: gathering the neighbourhoods into one batch was slower than
    full attention.

    Args:
        query: `(B, h, N, d)`. key, value: `(B, k, N, d)`; contiguous ones are the fastest.
    """
    tokens = query.shape[2]
    length = -(-tokens // blocks)
    parts = []
    for start in range(0, tokens, length):
        window = slice(max(0, start - radius * length), min(tokens, start + (radius + 1) * length))
        parts.append(attend(query[:, :, start : start + length], key[:, :, window], value[:, :, window]))
    return torch.cat(parts, dim=2)


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    compressed_key: torch.Tensor,
    compressed_value: torch.Tensor,
    gate: torch.Tensor,
    blocks: int,
    radius: int,
) -> torch.Tensor:
    """Adaptive sparse self-attention (SnapGen++, eq. 1-3): g · global + (1 − g) · local.

    Args:
        query: `(B, h, N, d)`. key, value: `(B, k, N, d)`, for the local branch ([`strip_attention`]).
        compressed_key, compressed_value: `(B, k, N/4, d)`, for the global branch, in which every query attends to all
            of them.
        gate: g in (0, 1), `(B, h, N, 1)`.
    """
    near = strip_attention(query, key, value, blocks, radius)
    everywhere = attend(query, compressed_key, compressed_value)
    return torch.addcmul(near, gate, everywhere - near)  # lerp would be exported with a branch


class ElasticSelfAttention(nn.Module):
    """Grouped-query self-attention with normed, rotated queries and keys: full, or adaptive sparse (SnapGen++, eq.
    1-3).

    Sparse attention has two branches on the same queries, keys and values: a global one over keys and values compressed
    2 × 2, and a local one over strips ([`strip_attention`]). A gate in (0, 1), one a head and token, from the layer's
    input mixes them: g · global + (1 − g) · local.
    """

    def __init__(
        self,
        make: _Layers,
        dim: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
        sparse: bool,
        blocks: int,
        radius: int,
    ):
        super().__init__()
        self.head_dim, self.sparse, self.blocks, self.radius = head_dim, sparse, blocks, radius
        self.to_q = make.linear(dim, heads * head_dim)
        self.to_k = make.linear(dim, kv_heads * head_dim)
        self.to_v = make.linear(dim, kv_heads * head_dim)
        self.to_out = make.linear(heads * head_dim, dim)
        self.norm_q = make.per_width(lambda width: nn.LayerNorm(head_dim, eps=eps))
        self.norm_k = make.per_width(lambda width: nn.LayerNorm(head_dim, eps=eps))
        if sparse:
            self.compress_k = make.compression(kv_heads * head_dim)
            self.compress_v = make.compression(kv_heads * head_dim)
            self.gate = make.linear(dim, heads)

    def _heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, h, N, d]

    def keys_and_values(
        self, key: torch.Tensor, value: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], *width: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Projections `(B, N, k·d)` → keys and values `(B, k, N, d)`, contiguous (the norm of the keys makes them
        so).
        """
        return rotate(self.norm_k(self._heads(key), *width), rotation), self._heads(value).contiguous()

    def forward(self, hidden_states: torch.Tensor, positions: Positions, *width: str) -> torch.Tensor:
        """`(B, N, D)` → `(B, N, D)`."""
        query = rotate(
            self.norm_q(self._heads(_linear(self.to_q, hidden_states, *width)), *width), positions.rotation
        )  # [B, h, N, d]
        key, value = _linear(self.to_k, hidden_states, *width), _linear(self.to_v, hidden_states, *width)  # [B, N, k·d]
        keys, values = self.keys_and_values(key, value, positions.rotation, *width)
        if self.sparse:
            grid = positions.rows, positions.columns
            compressed = self.compress_k(key, *grid, *width), self.compress_v(value, *grid, *width)
            compressed = self.keys_and_values(*compressed, positions.compressed, *width)
            gate = _linear(self.gate, hidden_states, *width).sigmoid().transpose(1, 2).unsqueeze(-1)  # [B, h, N, 1]
            attention = sparse_attention(query, keys, values, *compressed, gate, self.blocks, self.radius)
        else:
            attention = attend(query, keys, values)
        return _linear(self.to_out, attention.transpose(1, 2).flatten(2), *width)


class ElasticCrossAttention(nn.Module):
    """Attention to the text. Keys and values, of `kv_heads` heads, are the same for every sub-network; query head i
    reads head i mod kv_heads.
    """

    def __init__(self, make: _Layers, dim: int, heads: int, kv_heads: int, head_dim: int, text_width: int, eps: float):
        super().__init__()
        self.head_dim, self.kv_heads = head_dim, kv_heads
        self.to_q = make.linear(dim, heads * head_dim)
        self.to_k = nn.Linear(text_width, kv_heads * head_dim)
        self.to_v = nn.Linear(text_width, kv_heads * head_dim)
        self.to_out = make.linear(heads * head_dim, dim)
        self.norm_q = make.per_width(lambda width: nn.LayerNorm(head_dim, eps=eps))
        self.norm_k = make.per_width(lambda width: nn.LayerNorm(head_dim, eps=eps))

    def forward(
        self, hidden_states: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None, *width: str
    ) -> torch.Tensor:
        """`(B, N, D)`, `(B, T, E)`, mask `(B, 1, 1, T)` of the tokens that are there (`None`: all) → `(B, N, D)`."""
        query = self.norm_q(
            _linear(self.to_q, hidden_states, *width).unflatten(-1, (-1, self.head_dim)), *width
        ).transpose(1, 2)  # [B, h, N, d]
        key = self.norm_k(self.to_k(text).unflatten(-1, (-1, self.head_dim)), *width).transpose(1, 2)  # [B, k, T, d]
        value = self.to_v(text).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        group = query.shape[1] // self.kv_heads
        key, value = (heads.repeat(1, group, 1, 1) for heads in (key, value))
        mask = None if mask is None else mask.expand(-1, -1, query.shape[2], -1)  # ONNX Runtime wants a row a query
        attention = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return _linear(self.to_out, attention.transpose(1, 2).flatten(2), *width)


# -------------------------------------------------------------------- blocks


class ElasticMLP(nn.Module):
    """Two linear layers with tanh-GELU between: D → ratio·D → D."""

    def __init__(self, make: _Layers, dim: int, inner: int):
        super().__init__()
        self.proj_in = make.linear(dim, inner)
        self.proj_out = make.linear(inner, dim)

    def forward(self, hidden_states: torch.Tensor, *width: str) -> torch.Tensor:
        return _linear(self.proj_out, F.gelu(_linear(self.proj_in, hidden_states, *width), approximate="tanh"), *width)


class LongSkip(nn.Module):
    """A linear layer on [hidden states, skip] (U-ViT), as the sum of one on each, so that both can be sliced. Starts as
    the identity.
    """

    def __init__(self, make: _Layers, dim: int):
        super().__init__()
        self.hidden = make.linear(dim, dim)
        self.skip = make.linear(dim, dim, bias=False)

    def forward(self, hidden_states: torch.Tensor, skip: torch.Tensor, *width: str) -> torch.Tensor:
        return _linear(self.hidden, hidden_states, *width) + _linear(self.skip, skip, *width)


class Modulation(nn.Module):
    """adaLN-single (PixArt-α): one timestep MLP and one projection for all layers, plus a learned table a layer."""

    def __init__(self, dim: int, layers: int):
        super().__init__()
        self.linear_1 = nn.Linear(FREQUENCIES, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.projection = nn.Linear(dim, 6 * dim)
        self.table = nn.Parameter(torch.zeros(layers, 6, dim))
        self.table_out = nn.Parameter(torch.zeros(2, dim))

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """Timesteps `(B,)` on the scale 0 … 1000 → `(B, 6L + 2, D)`: six rows a layer (shift, scale, gate of the
        attention and of the MLP), then shift and scale of the output."""
        half = FREQUENCIES // 2
        exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        angles = timestep.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)[None]
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        embedded = self.linear_2(F.silu(self.linear_1(features)))  # [B, D]
        shared = self.projection(F.silu(embedded)).unflatten(-1, (1, 6, -1))  # [B, 1, 6, D]
        layers = (shared + self.table).flatten(1, 2)  # [B, 6L, D]
        return torch.cat([layers, embedded.unsqueeze(1) + self.table_out], dim=1)


class ElasticDiTBlock(nn.Module):
    """One layer: modulated self-attention, cross-attention to the text, modulated MLP; in late Middle layers a long
    skip before them.
    """

    def __init__(
        self,
        make: _Layers,
        dim: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        text_width: int,
        text_kv_heads: int,
        mlp_ratio: float,
        eps: float,
        sparse: bool = False,
        blocks: int = 16,
        radius: int = 1,
        long_skip: bool = False,
    ):
        super().__init__()
        self.eps = eps
        self.long_skip = LongSkip(make, dim) if long_skip else None
        self.attn = ElasticSelfAttention(make, dim, heads, kv_heads, head_dim, eps, sparse, blocks, radius)
        self.cross_attn = ElasticCrossAttention(make, dim, heads, text_kv_heads, head_dim, text_width, eps)
        self.mlp = ElasticMLP(make, dim, round(dim * mlp_ratio))

    def _norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        text: torch.Tensor,
        mask: torch.Tensor | None,
        modulation: torch.Tensor,
        positions: Positions,
        skip: torch.Tensor | None = None,
        width: Width = (),
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `(B, N, D)`. text: `(B, T, E)`. mask: `(B, 1, 1, T)` or `None`.
            modulation: `(B, 6, D)`: shift, scale, gate of the attention, then of the MLP.
            skip: `(B, N, D)` for a block with a long skip.
            width: of this call; an argument, so that gradient checkpointing computes the same again in the backward
                pass.
        """
        if self.long_skip is not None:
            hidden_states = self.long_skip(hidden_states, skip, *width)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.unsqueeze(2).unbind(
            1
        )  # each [B, 1, D]
        attention = self.attn(torch.addcmul(shift_attn, self._norm(hidden_states), 1 + scale_attn), positions, *width)
        hidden_states = torch.addcmul(hidden_states, gate_attn, attention)
        hidden_states = hidden_states + self.cross_attn(hidden_states, text, mask, *width)
        mlp = self.mlp(torch.addcmul(shift_mlp, self._norm(hidden_states), 1 + scale_mlp), *width)
        return torch.addcmul(hidden_states, gate_mlp, mlp)


class TextEmbedder(nn.Module):
    """Projects and concatenates the tokens of the text encoders. One learned token an encoder is always there, so that
    any of them, or all, may be absent: an encoder whose tokens are all masked is the same as one that is not given."""

    def __init__(self, dims: Sequence[int], width: int, eps: float):
        super().__init__()
        self.projections = nn.ModuleList([nn.Linear(dim, width) for dim in dims])
        self.norms = nn.ModuleList([nn.LayerNorm(width, eps=eps) for _ in dims])
        self.tokens = nn.Parameter(torch.zeros(len(dims), width))

    def forward(
        self, embeddings: Sequence[torch.Tensor | None], masks: Sequence[torch.Tensor | None], batch: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One `(B, T_i, dim_i)` and one `(B, T_i)` (or `None`) an encoder → text `(B, T, E)`, and the mask `(B, 1, 1,
        T)` if any was given.
        """
        parts = [self.tokens.expand(batch, -1, -1)]
        present = [torch.ones(batch, len(self.projections), dtype=torch.bool, device=self.tokens.device)]
        for projection, norm, embedding, mask in zip(self.projections, self.norms, embeddings, masks):
            if embedding is None:
                continue
            parts.append(norm(projection(embedding.to(self.tokens.dtype))))
            present.append(present[0].new_ones(embedding.shape[:2]) if mask is None else mask.bool())
        masked = any(mask is not None and embedding is not None for mask, embedding in zip(masks, embeddings))
        return torch.cat(parts, dim=1), torch.cat(present, dim=1)[:, None, None] if masked else None


@dataclass
class ElasticDiTOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor` of shape `(B, C, H, W)`): The velocity ε − x0.
        features (`torch.Tensor` of shape `(B, N, D)`, *optional*): Tokens after the last layer.
    """

    sample: torch.Tensor
    features: torch.Tensor | None = None


class ElasticDiTTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    A text-to-image diffusion transformer in three stages, and a supernet of several widths of itself.

    Args:
        sample_size (`int`, defaults to 128): Height and width of the latent input it was made for; every other size
            works too.
        patch_size (`int`, defaults to 2): Side of the square patches.
        in_channels (`int`, defaults to 16): Channels of input and output.
        num_attention_heads (`int`, defaults to 32): Query heads; the hidden size D is heads · `attention_head_dim`.
        attention_head_dim (`int`, defaults to 72): Channels a head, a multiple of 4; the same in every sub-network.
        num_key_value_heads (`int`, defaults to 8): Key/value heads of the self-attention (grouped-query attention).
        num_layers (`list[int]`, defaults to `[6, 8, 10]`): Layers of the stages Down, Middle and Up.
        mlp_ratios (`list[float]`, defaults to `[4.0, 3.0, 4.0]`): Their MLP ratios.
        text_dims (`list[int]`, defaults to `[512, 2560]`): Width of the embeddings of every text encoder.
        text_width (`int`, defaults to 1536): Width E that they are projected to.
        num_text_key_value_heads (`int`, defaults to 4): Key/value heads of the cross-attention, the same in every
            sub-network.
        attention_blocks (`int`, defaults to 16), attention_radius (`int`, defaults to 1): Strips of the local attention
        in Down and Up, and how
            many neighbours on either side a strip sees.
        subnets (`dict[str, float]`, *optional*): Name and width of every sub-network, as a share of the full width; one
        has 1.0. `None`: a
            stand-alone net.
        norm_eps (`float`, defaults to 1e-6): Epsilon of the layer norms.
        rope_theta (`float`, defaults to 10000): Base of the rotary embedding's wavelengths.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["ElasticDiTBlock"]
    _repeated_blocks = ["ElasticDiTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "modulation", "text_embedder", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_attention_heads: int = 32,
        attention_head_dim: int = 72,
        num_key_value_heads: int = 8,
        num_layers: Sequence[int] = (6, 8, 10),
        mlp_ratios: Sequence[float] = (4.0, 3.0, 4.0),
        text_dims: Sequence[int] = (512, 2560),
        text_width: int = 1536,
        num_text_key_value_heads: int = 4,
        attention_blocks: int = 16,
        attention_radius: int = 1,
        subnets: Mapping[str, float] | None = SUBNETS,
        norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
    ):
        super().__init__()
        self.register_to_config(
            num_layers=list(num_layers),
            mlp_ratios=list(mlp_ratios),
            text_dims=list(text_dims),
            subnets=None if subnets is None else dict(subnets),
        )
        _check(self.config)
        if (
            subnets is not None
        ):  # the order of the modules follows from the widths: config.json keeps no order of the names
            subnets = dict(sorted(subnets.items(), key=lambda item: (item[1], item[0])))
            self.register_to_config(subnets=subnets)
        self._full = self._active = None if subnets is None else list(subnets)[-1]
        self.gradient_checkpointing = False
        make = _Layers(subnets)
        dim = num_attention_heads * attention_head_dim

        self.patch_embed = make.linear(patch_size * patch_size * in_channels, dim, slice_inputs=False)
        self.text_embedder = TextEmbedder(text_dims, text_width, norm_eps)
        depth = sum(num_layers)
        self.modulation = make.per_width(lambda width: Modulation(round(dim * width), depth))

        def block(stage: int, long_skip: bool = False) -> ElasticDiTBlock:
            return ElasticDiTBlock(
                make,
                dim,
                num_attention_heads,
                num_key_value_heads,
                attention_head_dim,
                text_width,
                num_text_key_value_heads,
                mlp_ratios[stage],
                norm_eps,
                sparse=stage != 1,
                blocks=attention_blocks,
                radius=attention_radius,
                long_skip=long_skip,
            )

        down, middle, up = num_layers
        # U-ViT's symmetric pairs, the innermost of an even number left out: its skip would join a layer's output to
        # itself.
        self._num_skips = (middle - 1) // 2
        self.down_blocks = nn.ModuleList([block(0) for _ in range(down)])
        self.down_sample = make.linear(4 * dim, dim)
        self.middle_blocks = nn.ModuleList(
            [block(1, long_skip=index >= middle - self._num_skips) for index in range(middle)]
        )
        self.up_sample = make.linear(dim, dim)
        self.up_blocks = nn.ModuleList([block(2) for _ in range(up)])
        self.proj_out = make.linear(dim, patch_size * patch_size * in_channels, slice_outputs=False)
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ElasticCompression):
                nn.init.constant_(module.weight, 0.25)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.normal_(module.linear_1.weight, std=0.02)
                nn.init.normal_(module.linear_2.weight, std=0.02)
                nn.init.zeros_(module.projection.weight)  # adaLN-zero: every layer starts as the identity
            elif isinstance(module, ElasticCrossAttention):
                nn.init.zeros_(module.to_out.weight)
            elif isinstance(module, LongSkip):
                nn.init.eye_(module.hidden.weight)
                nn.init.zeros_(module.skip.weight)
        nn.init.normal_(self.text_embedder.tokens, std=0.02)
        nn.init.zeros_(self.proj_out.weight)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "ElasticDiTTransformer2DModel":
        """A newly initialised model by name ([`PRESETS`]); `overrides` replace config values."""
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}; the presets are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    # ---------------------------------------------------------------- sub-networks

    @property
    def hidden_size(self) -> int:
        """Residual width of the full net."""
        return self.config.num_attention_heads * self.config.attention_head_dim

    @property
    def subnet_names(self) -> list[str]:
        """Names of the sub-networks, the narrowest first; the last is the full net. Empty for a stand-alone net."""
        subnets = self.config.subnets or {}
        return sorted(subnets, key=subnets.get)

    @property
    def active_subnet(self) -> str | None:
        """Name of the sub-network that calls run which name none (`None` for a stand-alone net)."""
        return self._active

    def _known(self, name: str) -> str:
        if self.config.subnets is None:
            raise ValueError(
                f"The sub-network {name!r} was asked for, but this is a stand-alone net (subnets is None)."
            )
        if name not in self.config.subnets:
            raise ValueError(f"There is no sub-network {name!r}; this net has {', '.join(self.subnet_names)}.")
        return name

    def set_active_subnet(self, name: str) -> None:
        """Make this sub-network that of the calls which begin from now on and name none; one that names its `subnet`,
        or has begun, keeps its own. Takes no time and copies nothing: layers use views of the full weights."""
        self.__dict__["_active"] = self._known(name)  # a module's own assignment takes three times as long

    def resolve_subnet(self, name: str | None = None) -> str | None:
        """Name of the sub-network that a call with `subnet=name` runs now (`None` for a stand-alone net); a ValueError
        if there is none.
        """
        return self._active if name is None else self._known(name)

    def _width(self, name: str | None) -> Width:
        """What the layers are told of the sub-network `name`, for a call that has just begun."""
        name = self.resolve_subnet(name)
        if name == self._full:
            return ()
        if getattr(self, "quantization_method", None) not in (None, *SLICED_METHODS):
            raise ValueError(
                f"The net is quantised by {self.quantization_method}, whose layers cannot be cut to the sub-network "
                f"{name!r}; load that alone, from_pretrained(…, subnet={name!r}, quantization_config=…), or run "
                f"{self._full!r}."
            )
        return (name,)

    def active_subnet_config(self) -> dict[str, Any]:
        """Config of the stand-alone net that equals the active sub-network (what [`extract_subnet`] makes): what the
        class takes.
        """
        return self._own(_subnet_config(self.config, self.active_subnet))

    def extract_subnet(self, name: str) -> "ElasticDiTTransformer2DModel":
        """A stand-alone net whose output is that of the sub-network, with copies of its weights and no trace of the
        supernet.
        """
        twin = self._empty_twin(self.config, self._known(name))
        target, sources = twin.state_dict(), _source_names(twin, name)
        if any(".base_layer." in key for key in self.state_dict()):
            raise ValueError(
                "The net's layers are wrapped for adapters; merge them with fuse_lora() and call unload_lora() first."
            )
        state, trained = {}, {}
        for key, source in sources.items():
            tensor = attrgetter(source)(
                self
            )  # not a parameter if it was unpacked, from a quantised layer: the twin's never are
            if type(tensor) not in (nn.Parameter, torch.Tensor):
                tensor = tensor.dequantize()  # torchao's
            state[key], trained[key] = (
                tensor.detach()[_corner(target[key])].clone(),
                tensor.requires_grad or not isinstance(tensor, nn.Parameter),
            )
        twin.load_state_dict(state, assign=True)
        for key, ours in twin.named_parameters():
            ours.requires_grad_(trained[key])
        return twin.train(self.training)

    @classmethod
    def _own(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a config that the class takes: not those of diffusers, and of whoever registered some of their
        own.
        """
        taken = inspect.signature(cls.__init__).parameters
        return {key: value for key, value in config.items() if key in taken}

    @classmethod
    def _empty_twin(cls, config: Mapping[str, Any], name: str | None) -> "ElasticDiTTransformer2DModel":
        values = _subnet_config(config, name)
        with torch.device("meta"):
            twin = cls(**cls._own(values))
        twin.register_to_config(**values)  # keys that are not ours are kept, as diffusers keeps them
        return twin

    # ---------------------------------------------------------------- forward

    def _positions(self, rows: int, columns: int, stride: int, sparse: bool, device: torch.device) -> Positions:
        arguments = self.config.attention_head_dim, self.config.rope_theta, device
        compressed = rotation_table(rows // 2, columns // 2, 2 * stride, *arguments) if sparse else None
        return Positions(rows, columns, rotation_table(rows, columns, stride, *arguments), compressed)

    def precompute_modulation(self, timesteps: torch.Tensor, subnet: str | None = None) -> torch.Tensor:
        """The modulations `(T, 6L + 2, D)` of a sub-network (default: the active one) at timesteps `(T,)`, for a whole
        schedule at once; `table[step]`, expanded to the batch, is the `modulation` that [`forward`] takes."""
        return self.modulation(timesteps, *self._width(subnet))

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | None,
        encoder_hidden_states: Sequence[torch.Tensor | None] | None = None,
        encoder_attention_mask: Sequence[torch.Tensor | None] | None = None,
        return_dict: bool = True,
        return_features: bool = False,
        modulation: torch.Tensor | None = None,
        subnet: str | None = None,
    ) -> ElasticDiTOutput | tuple[torch.Tensor | None, ...]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, C, H, W)`): Noisy input; H and W multiples of 2 · `patch_size`.
            timestep (`torch.Tensor` of shape `(B,)` or a scalar): Timestep 1000·σ on the scale 0 … 1000.
            encoder_hidden_states: A `(B, T_i, text_dims[i])` for every text encoder, or `None` for one that is absent;
                `None`: no text.
            encoder_attention_mask: A `(B, T_i)` for every text encoder that tells tokens from padding, or `None` where
                all are tokens.
            return_features: Whether to return the tokens after the last layer too (for feature distillation).
            modulation (`torch.Tensor` of shape `(B, 6L + 2, D)`, *optional*): A step of [`precompute_modulation`];
            `timestep` is not used then.
            subnet (`str`, *optional*): The sub-network to run, for this call alone. Default: the active one as the call
                begins.

        Returns:
            [`ElasticDiTOutput`], or a tuple of its values.
        """
        width = self._width(subnet)
        batch, channels, *size = hidden_states.shape
        patch = self.config.patch_size
        if channels != self.config.in_channels or any(side % (2 * patch) for side in size):
            raise ValueError(
                f"The input has the shape {tuple(hidden_states.shape)}; it needs {self.config.in_channels} channels "
                f"and a height and width that are multiples of {2 * patch} (patches of {patch}, down-sampled once)."
            )
        text, mask = self.embed_text(encoder_hidden_states, encoder_attention_mask, batch)
        if modulation is None:
            modulation = self.modulation(timestep.reshape(-1).expand(batch), *width)
        sample, tokens = self._denoise(hidden_states, modulation, text, mask, width)
        features = tokens if return_features else None
        return ElasticDiTOutput(sample=sample, features=features) if return_dict else (sample, features)

    def denoise(
        self,
        hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        text: torch.Tensor,
        mask: torch.Tensor | None,
        subnet: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The network between its conditions and its output: what a step computes once [`embed_text`] and
        [`precompute_modulation`] are done.

        Args:
            hidden_states: `(B, C, H, W)`. modulation: `(B, 6L + 2, D)`. text: `(B, T, E)`. mask: `(B, 1, 1, T)` or
                `None`.

        Returns:
            The velocity `(B, C, H, W)` and the tokens `(B, N, D)` after the last layer.
        """
        return self._denoise(hidden_states, modulation, text, mask, self._width(subnet))

    def _denoise(
        self,
        hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        text: torch.Tensor,
        mask: torch.Tensor | None,
        width: Width,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, channels = hidden_states.shape[:2]
        patch = self.config.patch_size
        rows, columns = hidden_states.shape[2] // patch, hidden_states.shape[3] // patch
        patches = hidden_states.view(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
        patches = patches.reshape(batch, rows * columns, patch * patch * channels)
        tokens = _linear(self.patch_embed, patches, *width)  # [B, N, D]

        layer = 0

        def run(
            block: ElasticDiTBlock, tokens: torch.Tensor, positions: Positions, skip: torch.Tensor | None = None
        ) -> torch.Tensor:
            nonlocal layer
            arguments = tokens, text, mask, modulation[:, 6 * layer : 6 * layer + 6], positions, skip, width
            layer += 1
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                return self._gradient_checkpointing_func(block, *arguments)
            return block(*arguments)

        fine = self._positions(rows, columns, 1, True, tokens.device)
        coarse = self._positions(rows // 2, columns // 2, 2, False, tokens.device)
        for block in self.down_blocks:
            tokens = run(block, tokens, fine)
        kept = tokens
        # Channel by channel, so that a sub-network's inputs are the first ones of the linear layer: [B, N/4, D·4].
        grouped = tokens.view(batch, rows // 2, 2, columns // 2, 2, -1).permute(0, 1, 3, 5, 2, 4)
        tokens = _linear(self.down_sample, grouped.reshape(batch, rows * columns // 4, -1), *width)
        skips: list[torch.Tensor] = []
        for index, block in enumerate(self.middle_blocks):
            tokens = run(block, tokens, coarse, skips.pop() if block.long_skip is not None else None)
            if index < self._num_skips:
                skips.append(tokens)
        coarse_tokens = _linear(self.up_sample, tokens, *width).view(batch, rows // 2, 1, columns // 2, 1, -1)
        tokens = kept + coarse_tokens.expand(-1, -1, 2, -1, 2, -1).reshape(kept.shape)
        for block in self.up_blocks:
            tokens = run(block, tokens, fine)

        shift, scale = modulation[:, -2:].unsqueeze(2).unbind(1)  # each [B, 1, D]
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=self.config.norm_eps)
        sample = _linear(self.proj_out, torch.addcmul(shift, normed, 1 + scale), *width).view(
            batch, rows, columns, patch, patch, channels
        )
        return sample.permute(0, 5, 1, 3, 2, 4).reshape(hidden_states.shape), tokens

    def embed_text(
        self, embeddings: Sequence[torch.Tensor | None] | None, masks: Sequence[torch.Tensor | None] | None, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Text `(B, T, E)` and its mask `(B, 1, 1, T)` (`None` where all tokens count) of what [`forward`] takes for
        every text encoder.
        """
        dims = self.config.text_dims
        embeddings = [None] * len(dims) if embeddings is None else list(embeddings)
        masks = [None] * len(dims) if masks is None else list(masks)
        if len(embeddings) != len(dims) or len(masks) != len(dims):
            raise ValueError(
                f"{len(embeddings)} text embeddings and {len(masks)} masks were given; this net has {len(dims)} text "
                "encoders."
            )
        for index, (embedding, mask, dim) in enumerate(zip(embeddings, masks, dims)):
            if embedding is None:
                continue
            if embedding.ndim != 3 or embedding.shape[0] != batch or embedding.shape[2] != dim:
                raise ValueError(
                    f"encoder_hidden_states[{index}] has the shape {tuple(embedding.shape)}; it must be ({batch}, "
                    f"tokens, {dim})."
                )
            if mask is not None and mask.shape != embedding.shape[:2]:
                raise ValueError(
                    f"encoder_attention_mask[{index}] has the shape {tuple(mask.shape)}; it must be "
                    f"{tuple(embedding.shape[:2])}."
                )
        return self.text_embedder(embeddings, masks, batch)

    # ---------------------------------------------------------------- loading and saving

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subnet: str | None = None, **kwargs):
        """As in diffusers, but a missing or unexpected weight is an error, not a warning. A quantised net stays packed,
        unless `quantization_config=EdgeDiTQuantizationConfig(dequantize=True)` is given.

        Args:
            subnet (`str`, *optional*): Load this sub-network of a saved supernet as a stand-alone net; only its part of
                the weights is read (of a quantised one all, packed; the stand-alone net is not quantised). Every other
                option is diffusers' and means what it
                means without: `quantization_config` names the layers of the stand-alone net.
        """
        if subnet is not None:
            return cls._subnet_from_pretrained(pretrained_model_name_or_path, subnet, **kwargs)
        return_info = kwargs.pop("output_loading_info", False)
        quantization = kwargs.get("quantization_config")
        unpack = getattr(quantization, "quant_method", None) == "edgedit" and quantization.dequantize
        if unpack:
            del kwargs["quantization_config"]  # diffusers would prefer the one in config.json
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except RuntimeError as error:
            if "No GPU found" not in str(error):
                raise
            raise ValueError(NO_BITSANDBYTES) from error
        missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        if missing or unexpected:
            raise ValueError(
                f"The weights in {pretrained_model_name_or_path} do not fit their config: {len(missing)} missing "
                f"({', '.join(missing[:3]) or 'none'}), {len(unexpected)} unexpected "
                f"({', '.join(unexpected[:3]) or 'none'}). "
                "Config and weights must come from the same model; save it again with save_pretrained."
            )
        if unpack:
            model.dequantize()
        elif quantization is not None and model.hf_quantizer.pre_quantized:
            raise ValueError(
                f"{pretrained_model_name_or_path} is quantised already ({model.quantization_method}); load it without "
                "quantization_config."
            )
        return (model, info) if return_info else model

    @classmethod
    def _subnet_from_pretrained(cls, path, name: str, **kwargs):
        """[`from_pretrained`] of a sub-network: diffusers' own loader, to which [`load_config`] and
        [`_load_pretrained_model`] show the stand-alone net's config and weights."""
        others = [
            option for option in ("parallel_config", "use_flashpack") if kwargs.get(option)
        ]  # read the file in ways of their own
        if others:
            raise ValueError(
                f"subnet={name!r} cannot be combined with {', '.join(others)}; extract the sub-network, save it, and "
                "load that."
            )
        config = cls.load_config(path, **kwargs)
        subnets = config.get("subnets")
        if not subnets or name not in subnets:
            there = (
                f"has the sub-networks {', '.join(sorted(subnets, key=subnets.get))}"
                if subnets
                else "is a stand-alone net"
            )
            raise ValueError(f"subnet={name!r} was asked for, but {path} {there}.")
        if config.get("quantization_config"):
            if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
                kwargs["torch_dtype"] = torch.float32
            return_info = kwargs.pop("output_loading_info", False)
            net, info = cls.from_pretrained(path, output_loading_info=True, **kwargs)
            if len(set(getattr(net, "hf_device_map", {}).values())) > 1:
                raise ValueError(
                    f"subnet={name!r} of the quantised net {path} cannot be combined with a device_map of several "
                    "devices; load it on one."
                )
            twin = net.extract_subnet(name)
            twin.register_to_config(_name_or_path=str(path))
            return (twin.eval(), info) if return_info else twin.eval()
        loading = _LOADED_SUBNET.set(name)
        try:
            return cls.from_pretrained(path, **kwargs)
        except OSError as error:
            if "Unable to load weights" not in str(error):
                raise
            raise ValueError(f"The weights of {path} cannot be read ({error}); download or save them again.") from error
        finally:
            _LOADED_SUBNET.reset(loading)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """As in diffusers; while a sub-network is loaded, the config of the stand-alone net."""
        found, name = super().load_config(*args, **kwargs), _LOADED_SUBNET.get()
        if name is None:
            return found
        config, *others = found if isinstance(found, tuple) else (found,)
        config = {**config, **_subnet_config(config, name)}
        return (config, *others) if others else config

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, resolved_model_file, path, loaded_keys, *args, **kwargs):
        name = _LOADED_SUBNET.get()
        if name is not None:
            state_dict = cls._read_subnet(
                model, name, state_dict, resolved_model_file, path, kwargs.get("disable_mmap", False)
            )
            resolved_model_file, loaded_keys = resolved_model_file[:1], list(state_dict)
        return super()._load_pretrained_model(
            model, state_dict, resolved_model_file, path, loaded_keys, *args, **kwargs
        )

    @classmethod
    def _read_subnet(
        cls, model, name: str, state_dict, files: Sequence[str], path, disable_mmap: bool
    ) -> dict[str, torch.Tensor]:
        """The weights of a stand-alone net from the files of a supernet. `state_dict`: what diffusers has of an only
        file, as a map of it where it can.
        """
        twin = cls._empty_twin(model.config, None)
        target, state = twin.state_dict(), {}
        wanted = {source: key for key, source in _source_names(twin, name).items()}
        try:
            for file in files:
                if str(file).endswith(".safetensors") and not disable_mmap:
                    with safe_open(file, framework="pt") as tensors:
                        for source in wanted.keys() & set(tensors.keys()):
                            state[wanted[source]] = tensors.get_slice(source)[_corner(target[wanted[source]])]
                    continue
                whole = load_state_dict(file, disable_mmap=disable_mmap) if state_dict is None else state_dict
                for source in wanted.keys() & set(whole):
                    state[wanted[source]] = whole[source][_corner(target[wanted[source]])].clone()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"The weights of {path} cannot be read ({error}); download or save them again.") from error
        absent = [key for key in target if key not in state or state[key].shape != target[key].shape]
        if absent:
            raise ValueError(
                f"The weights of {path} lack {len(absent)} tensors of the sub-network {name!r}, such as {absent[0]!r}; "
                "save the net again."
            )
        return state

    def fuse_lora(self, *args, **kwargs):
        """As in diffusers, but refuses where weights are unpacked at every use: what is added to them would be lost."""
        if getattr(self, "quantization_method", None) == "edgedit":
            raise ValueError(
                "The model is quantised, so adapters cannot be merged into its weights; call dequantize() first, or "
                "keep them apart."
            )
        return super().fuse_lora(*args, **kwargs)

    @functools.wraps(
        ModelMixin.save_pretrained, assigned=()
    )  # pipelines pass `variant` and others only if the signature names them
    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in diffusers, but refuses while layers are wrapped (PEFT adapters, torch.compile): their weights would
        reload as random ones.
        """
        wrapped = {part for name in self.state_dict() for part in name.split(".") if part in WRAPPERS}
        if wrapped - {"base_layer"}:
            raise ValueError(
                f"Layers of the model are wrapped ({', '.join(sorted(wrapped))} stands in the names of their weights), "
                "so the file would not load. Put the layers back (layer._orig_mod, accelerator.unwrap_model(model, "
                "keep_torch_compile=False)); model.compile() and compile_repeated_blocks() need no wrapper."
            )
        if wrapped:  # delete_adapters() leaves the wrappers behind
            raise ValueError(
                f"The model's layers are wrapped for the adapters {sorted(getattr(self, 'peft_config', {}))}; keep an "
                "adapter with save_lora_adapter(), or merge it with fuse_lora(); then call unload_lora() and save the "
                "model."
            )
        return super().save_pretrained(save_directory, *args, **kwargs)


# -------------------------------------------------------------------- sub-networks of configs and checkpoints


# Above any model that exists: a config.json from elsewhere may say anything, and building comes before its weights are
# looked at.
MAX_LAYERS, MAX_TOKENS = 4096, 1 << 22


def _check(config: Mapping[str, Any]) -> None:
    """Raise unless every sub-network of a config has whole heads and dimensions, and the net is not beyond any size
    that exists.
    """
    if sum(config["num_layers"]) > MAX_LAYERS or (config["sample_size"] // config["patch_size"]) ** 2 > MAX_TOKENS:
        raise ValueError(
            f"The config has num_layers {config['num_layers']}, sample_size {config['sample_size']} and patch_size "
            f"{config['patch_size']}; at most {MAX_LAYERS} layers and {MAX_TOKENS} tokens are made."
        )
    heads, kv_heads, text_kv = (
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["num_text_key_value_heads"],
    )
    if config["attention_head_dim"] % 4:
        raise ValueError(
            f"attention_head_dim is {config['attention_head_dim']}; the rotary embedding needs a multiple of 4."
        )
    if len(config["num_layers"]) != 3 or len(config["mlp_ratios"]) != 3:
        raise ValueError(
            f"num_layers is {config['num_layers']} and mlp_ratios {config['mlp_ratios']}; give three values each: "
            "Down, Middle, Up."
        )
    if min(config["num_layers"]) < 0 or config["attention_blocks"] < 1 or config["attention_radius"] < 0:
        raise ValueError(
            f"num_layers {config['num_layers']} and attention_radius {config['attention_radius']} must not be "
            f"negative, attention_blocks {config['attention_blocks']} at least 1."
        )
    subnets = config["subnets"]
    if subnets is not None:
        if (
            sorted(subnets.values())[-1:] != [1.0]
            or len(set(subnets.values())) != len(subnets)
            or min(subnets.values()) <= 0
        ):
            raise ValueError(
                f"subnets is {subnets}; widths must differ, lie in (0, 1], and one must be 1.0 (the full net)."
            )
        for name in subnets:
            if not name.isidentifier() or hasattr(PerWidth, name):
                raise ValueError(f"A sub-network cannot be named {name!r}; use a plain word such as 'small'.")
    for name, width in (subnets or {"this net": 1.0}).items():
        narrow, narrow_kv = heads * width, kv_heads * width
        if narrow % 1 or narrow_kv % 1:
            raise ValueError(
                f"At width {width} ({name}) the {heads} heads become {narrow:g} and the {kv_heads} key/value heads "
                f"{narrow_kv:g}; choose counts and widths that give whole numbers."
            )
        if narrow % narrow_kv or narrow % text_kv:
            raise ValueError(
                f"At width {width} ({name}) there are {narrow:g} query heads, which {narrow_kv:g} key/value heads and "
                f"{text_kv} of the text must divide."
            )
        for ratio in config["mlp_ratios"]:
            if round(heads * config["attention_head_dim"] * ratio) * width % 1:
                raise ValueError(
                    f"At width {width} ({name}) an MLP of ratio {ratio} has a fractional width; choose another ratio."
                )
            if round(heads * config["attention_head_dim"] * ratio) * width < 1:
                raise ValueError(
                    f"At width {width} ({name}) an MLP of ratio {ratio} has no neuron; choose a larger ratio."
                )


def _subnet_config(config: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """Config of the stand-alone twin of a sub-network (of the net itself if it is one already)."""
    values = {key: value for key, value in config.items() if not key.startswith("_") and key != "quantization_config"}
    if name is not None:
        width = values["subnets"][name]
        for key in ("num_attention_heads", "num_key_value_heads"):
            values[key] = round(values[key] * width)
        values["subnets"] = None
    return values


def _source_names(twin: nn.Module, name: str) -> dict[str, str]:
    """For every tensor of a stand-alone twin, in order, the name of the supernet's tensor that it is a corner of."""
    per_width = {prefix for prefix, module in twin.named_modules() if getattr(module, "is_per_width", False)}
    names = {}
    for key in twin.state_dict():
        parts = key.split(".")
        prefix = next(
            (".".join(parts[:end]) for end in range(1, len(parts)) if ".".join(parts[:end]) in per_width), None
        )
        names[key] = key if prefix is None else f"{prefix}.{name}{key[len(prefix) :]}"
    return names


def _corner(like: torch.Tensor) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in like.shape)
