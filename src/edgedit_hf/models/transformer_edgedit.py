"""EdgeDiT: a class-conditional diffusion transformer whose layers may differ (compressed DiT). One self-contained file.

The network is DiT with adaLN-zero (Peebles & Xie, 2023, arXiv:2212.09748) with one timestep/label embedder shared by
all layers. Every layer has its own attention width, head count and MLP ratio (EdgeDiT, arXiv:2603.28405); the residual
width is the teacher's. A layer may also have a modulation of low rank, or one that is a learned vector, in the place of
adaLN's projection, and may work on the means of 2 × 2 tokens. Config fields cover DiT's relatives: SiT
(arXiv:2401.08740), MDT and MDTv2 (arXiv:2303.14389), and diffusers' own DiT.

Shapes: B batch, C latent channels, H × W latent size, P patch size, N = (H/P)·(W/P) tokens, D residual width
(`hidden_size`), A attention width of a layer, h heads, L layers, G = H/P tokens a side, V visible tokens of a masked
input.
"""

import contextlib
import functools
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

FREQUENCIES = 256  # width of the sinusoidal timestep features (DiT)
WRAPPERS = (
    "base_layer",
    "_orig_mod",
    "module",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
)  # what PEFT, torch and DDP call a layer in theirs
LAYER_KEYS = ("source", "attention_dim", "num_heads", "mlp_ratio")
OPTIONAL_LAYER_KEYS = ("modulation_rank", "token_merge")
TOKEN_MERGES = (1, 2)
# Above any model that exists: a config.json from elsewhere may say anything, and building comes before its weights are
# looked at.
MAX_LAYERS, MAX_POSITIONS = 4096, 1 << 27

NO_BITSANDBYTES = (
    "bitsandbytes works with a GPU only, as diffusers calls it. On CPUs quantise with edgedit_hf's own schemes: "
    'quantization_config=EdgeDiTQuantizationConfig(default={"scheme": "nf4"}), or {"scheme": "affine", "bits": 8}, '
    "from edgedit_hf."
)

# A plain literal: `edgedit info` reads it by `ast`, without importing torch.
PRESETS: dict[str, dict[str, Any]] = {
    "DiT-S/2": {"patch_size": 2, "hidden_size": 384, "num_layers": 12, "num_attention_heads": 6},
    "DiT-S/4": {"patch_size": 4, "hidden_size": 384, "num_layers": 12, "num_attention_heads": 6},
    "DiT-S/8": {"patch_size": 8, "hidden_size": 384, "num_layers": 12, "num_attention_heads": 6},
    "DiT-B/2": {"patch_size": 2, "hidden_size": 768, "num_layers": 12, "num_attention_heads": 12},
    "DiT-B/4": {"patch_size": 4, "hidden_size": 768, "num_layers": 12, "num_attention_heads": 12},
    "DiT-B/8": {"patch_size": 8, "hidden_size": 768, "num_layers": 12, "num_attention_heads": 12},
    "DiT-L/2": {"patch_size": 2, "hidden_size": 1024, "num_layers": 24, "num_attention_heads": 16},
    "DiT-L/4": {"patch_size": 4, "hidden_size": 1024, "num_layers": 24, "num_attention_heads": 16},
    "DiT-L/8": {"patch_size": 8, "hidden_size": 1024, "num_layers": 24, "num_attention_heads": 16},
    "DiT-XL/2": {"patch_size": 2, "hidden_size": 1152, "num_layers": 28, "num_attention_heads": 16},
    "DiT-XL/4": {"patch_size": 4, "hidden_size": 1152, "num_layers": 28, "num_attention_heads": 16},
    "DiT-XL/8": {"patch_size": 8, "hidden_size": 1152, "num_layers": 28, "num_attention_heads": 16},
    # 25 equal layers on 28 teacher layers. Which three pairs the paper merged is unknown; these spread over the middle.
    "EdgeDiT-1": {
        "patch_size": 2,
        "hidden_size": 1152,
        "num_layers": 28,
        "num_attention_heads": 16,
        "layers": [
            {"source": [0], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [1], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [2], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [3], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [4], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [5], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [6], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [7], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [8, 9], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [10], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [11], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [12], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [13], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [14, 15], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [16], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [17], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [18], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [19], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [20, 21], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [22], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [23], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [24], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [25], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [26], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
            {"source": [27], "attention_dim": 1152, "num_heads": 16, "mlp_ratio": 2.0},
        ],
    },
    "EdgeDiT-6": {
        "patch_size": 2,
        "hidden_size": 1152,
        "num_layers": 28,
        "num_attention_heads": 16,
        "layers": [
            {"source": [0], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [1], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [2], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [3], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [4], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [5], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [6], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [7], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [8, 9], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [10], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [11], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [12], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [13], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [14, 15], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [16], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [17], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [18], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [19], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [20, 21], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [22], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [23], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [24], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [25], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [26], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
            {"source": [27], "attention_dim": 512, "num_heads": 16, "mlp_ratio": 4.0},
        ],
    },
    "DiT-debug/2": {
        "sample_size": 8,
        "in_channels": 1,
        "num_classes": 10,
        "learn_sigma": False,
        "patch_size": 2,
        "hidden_size": 32,
        "num_layers": 4,
        "num_attention_heads": 2,
    },
    "DiT-digits/2": {
        "sample_size": 8,
        "in_channels": 1,
        "num_classes": 10,
        "learn_sigma": False,
        "patch_size": 2,
        "hidden_size": 128,
        "num_layers": 6,
        "num_attention_heads": 4,
    },
    # A student of DiT-digits/2 for runs that search none.
    "EdgeDiT-digits": {
        "sample_size": 8,
        "in_channels": 1,
        "num_classes": 10,
        "learn_sigma": False,
        "patch_size": 2,
        "hidden_size": 128,
        "num_layers": 6,
        "num_attention_heads": 4,
        "layers": [
            {"source": [0], "attention_dim": 128, "num_heads": 4, "mlp_ratio": 2.0},
            {"source": [1], "attention_dim": 128, "num_heads": 4, "mlp_ratio": 2.0},
            {"source": [2, 3], "attention_dim": 128, "num_heads": 4, "mlp_ratio": 4.0},
            {"source": [4], "attention_dim": 128, "num_heads": 4, "mlp_ratio": 2.0},
            {"source": [5], "attention_dim": 128, "num_heads": 4, "mlp_ratio": 2.0},
        ],
    },
}


def sincos_position_embedding(height: int, width: int, dim: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine position embedding of DiT (after MAE), float32 of shape `(height * width, dim)`.

    The first half of the channels encodes the column, the second the row, each as `[sin, cos]`.
    """
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    parts = []
    for positions in (columns, rows):
        angles = positions.reshape(-1, 1).double() * omega
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=1).float()


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of offset + scale · timestep, then a two-layer MLP: `(B,)` → `(B, D)`."""

    def __init__(self, hidden_size: int, scale: float = 1.0, offset: float = 0.0, frequency_shift: float = 0.0):
        super().__init__()
        self.scale, self.offset, self.frequency_shift = scale, offset, frequency_shift
        self.linear_1 = nn.Linear(FREQUENCIES, hidden_size)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        half = FREQUENCIES // 2
        exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / (half - self.frequency_shift)
        time = timestep.float()
        if (self.scale, self.offset) != (1.0, 0.0):
            time = self.offset + self.scale * time
        angles = time[:, None] * torch.exp(-math.log(10000.0) * exponent)[None]  # [B, F/2]
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)  # [B, F]
        return self.linear_2(self.act(self.linear_1(features.to(self.linear_1.weight.dtype))))


class EdgeDiTAttnProcessor:
    """Self-attention through diffusers' backend dispatcher (`model.set_attention_backend(...)`)."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: "EdgeDiTAttention", hidden_states: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        batch, tokens, _ = hidden_states.shape
        qkv = attn.to_qkv(hidden_states)  # [B, N, 3A]
        query, key, value = qkv.view(batch, tokens, 3, attn.heads, -1).unbind(2)  # each [B, N, h, A/h]
        hidden_states = dispatch_attention_fn(
            query, key, value, attn_mask=bias, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out(hidden_states.flatten(2))  # [B, N, D]


class RelativePositionBias(nn.Module):
    """Learned additive bias of the attention scores by head and relative position on a G × G grid (BEiT, MDT): `(1, h,
    N, N)`. With a `stride`, only of the tokens in every so many rows and columns.
    """

    def __init__(self, grid: int, heads: int, stride: int = 1):
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.zeros((2 * grid - 1) ** 2, heads))
        places = torch.arange(0, grid, stride)
        rows, columns = (t.flatten() for t in torch.meshgrid(places, places, indexing="ij"))
        index = (rows[:, None] - rows + grid - 1) * (2 * grid - 1) + (columns[:, None] - columns + grid - 1)
        self.register_buffer("index", index, persistent=False)  # [N, N]

    def forward(self, visible: torch.Tensor | None = None) -> torch.Tensor:
        """`visible`: `(B, V)` positions of the tokens that are there, for a bias `(B, h, V, V)`; default: all."""
        index = self.index[None] if visible is None else self.index[visible[:, :, None], visible[:, None]]
        return self.table[index].permute(0, 3, 1, 2)


class EdgeDiTAttention(nn.Module, AttentionModuleMixin):
    """Self-attention of inner width A, independent of the residual width: qkv D → 3A, output A → D."""

    _default_processor_cls = EdgeDiTAttnProcessor
    _available_processors = [EdgeDiTAttnProcessor]
    _supports_qkv_fusion = False  # the projection is one matrix already

    def __init__(
        self, hidden_size: int, attention_dim: int, heads: int, bias_grid: int | None = None, bias_stride: int = 1
    ):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(hidden_size, 3 * attention_dim)
        self.to_out = nn.Linear(attention_dim, hidden_size)
        self.position_bias = RelativePositionBias(bias_grid, heads, bias_stride) if bias_grid else None
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        bias = None if self.position_bias is None else self.position_bias(visible)
        return self.processor(self, hidden_states, bias)


def fuses(dtype: torch.dtype) -> bool:
    """Whether this processor has oneDNN's fused linear layers in a type: those of 16 bits need instructions that many
    lack."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


class EdgeDiTMLP(nn.Module):
    """Two linear layers with tanh-GELU between: D → mlp_dim → D."""

    def __init__(self, hidden_size: int, mlp_dim: int):
        super().__init__()
        self.proj_in = nn.Linear(hidden_size, mlp_dim)
        self.act = nn.GELU(approximate="tanh")
        self.proj_out = nn.Linear(mlp_dim, hidden_size)
        self.fused = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # Asked for, and neither traced, differentiated, quantised nor under an adapter, whose wrapper would be passed
        # over.
        plain = type(self.proj_in) is nn.Linear and type(self.proj_in.weight) is nn.Parameter
        plain = plain and hidden_states.device.type == "cpu" and not torch.is_grad_enabled()
        if self.fused and plain and not torch.compiler.is_compiling() and fuses(hidden_states.dtype):
            weight, bias = self.proj_in.weight, self.proj_in.bias
            return self.proj_out(torch.ops.mkldnn._linear_pointwise(hidden_states, weight, bias, "gelu", [], "tanh"))
        return self.proj_out(self.act(self.proj_in(hidden_states)))


class StaticModulation(nn.Module):
    """A learned vector in the place of adaLN's projection, the same for every conditioning: `(B, D)` → `(B, 6D)`."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(6 * hidden_size))

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        return self.bias.repeat(conditioning.shape[0], 1)  # an expansion would be a view of a weight


class LowRankModulation(nn.Module):
    """adaLN's projection with weights of rank r: `(B, D)` → `(B, 6D)`."""

    def __init__(self, hidden_size: int, rank: int):
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, 6 * hidden_size)

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(conditioning))


def new_modulation(hidden_size: int, rank: int | None) -> nn.Module:
    """adaLN of a layer with this `modulation_rank`: `(B, D)` → `(B, 6D)`."""
    if rank is None:
        return nn.Linear(hidden_size, 6 * hidden_size)
    return LowRankModulation(hidden_size, rank) if rank else StaticModulation(hidden_size)


class EdgeDiTBlock(nn.Module):
    """One layer with adaLN-zero.

    Args:
        hidden_size: D. attention_dim, num_heads, mlp_ratio, modulation_rank, token_merge: as in a layer of the config.
        norm_eps: epsilon of the layer norms. mlp_norm_eps: of the one before the MLP, where it differs.
        bias_grid: side G of the token grid if the attention has a relative position bias.
    """

    def __init__(
        self,
        hidden_size: int,
        attention_dim: int,
        num_heads: int,
        mlp_ratio: float,
        modulation_rank: int | None = None,
        token_merge: int = 1,
        norm_eps: float = 1e-6,
        mlp_norm_eps: float | None = None,
        bias_grid: int | None = None,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=norm_eps, elementwise_affine=False)
        self.attn = EdgeDiTAttention(hidden_size, attention_dim, num_heads, bias_grid, token_merge)
        mlp_norm_eps = norm_eps if mlp_norm_eps is None else mlp_norm_eps
        self.norm2 = nn.LayerNorm(hidden_size, eps=mlp_norm_eps, elementwise_affine=False)
        self.mlp = EdgeDiTMLP(hidden_size, int(hidden_size * mlp_ratio))
        self.modulation = new_modulation(hidden_size, modulation_rank)
        self.token_merge = token_merge

    def _check_grid(self, tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
        """The token grid (default: a square), if this layer can merge it."""
        if grid is None:
            side = math.isqrt(tokens)
            if side * side != tokens:
                raise ValueError(
                    f"The layer merges {self.token_merge} × {self.token_merge} tokens and got {tokens}, which make no "
                    "square; give their grid, (rows, columns)."
                )
            grid = (side, side)
        if any(side % self.token_merge for side in grid):
            raise ValueError(
                f"The layer merges {self.token_merge} × {self.token_merge} tokens, but their grid is {grid[0]} × "
                f"{grid[1]}; both sides must be multiples of {self.token_merge}."
            )
        return grid

    def merge_tokens(self, hidden_states: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Means of `token_merge` × `token_merge` neighbours: `(B, N, D)` → `(B, N / token_merge², D)`."""
        batch, tokens, width = hidden_states.shape
        rows, columns = self._check_grid(tokens, grid)
        merge = self.token_merge
        # One side after the other: tensors of three dimensions, contiguous throughout.
        means = hidden_states.reshape(batch * (rows // merge), merge, columns * width).mean(1)
        means = means.reshape(batch * (rows // merge) * (columns // merge), merge, width).mean(1)
        return means.reshape(batch, (rows // merge) * (columns // merge), width)

    def _hand_back(
        self, hidden_states: torch.Tensor, update: torch.Tensor, grid: tuple[int, int] | None
    ) -> torch.Tensor:
        """`hidden_states` `(B, N, D)`, each token with its group's row of `update` `(B, N / token_merge², D)` added."""
        batch, tokens, width = hidden_states.shape
        rows, columns = self._check_grid(tokens, grid)
        merge = self.token_merge
        update = update.reshape(batch * (rows // merge) * (columns // merge), 1, width).expand(-1, merge, -1)
        update = update.reshape(batch * (rows // merge), 1, columns * width)
        full = hidden_states.reshape(batch * (rows // merge), merge, columns * width) + update
        return full.reshape(batch, tokens, width)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor | None,
        modulation: torch.Tensor | None = None,
        visible: torch.Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `(B, N, D)`.
            conditioning: `(B, D)`, already activated (SiLU), as [`EdgeDiTTransformer2DModel.embed`] gives it; not used
                where `modulation`, `(B, 6, D)` from [`~EdgeDiTTransformer2DModel.precompute_modulation`], is given.
            visible: `(B, N)` positions of the tokens, if they are not the whole grid (only the position bias asks).
            grid: rows and columns of the tokens (default: a square); only a layer that merges tokens asks.
        """
        if modulation is None:
            modulation = self.modulation(conditioning).unflatten(-1, (6, -1))  # [B, 6, D]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.unsqueeze(2).unbind(
            1
        )  # each [B, 1, D]
        if self.token_merge > 1:
            full, hidden_states = hidden_states, self.merge_tokens(hidden_states, grid)
        # addcmul(a, b, c) is a + b·c in one pass over memory instead of two.
        attention = self.attn(torch.addcmul(shift_msa, self.norm1(hidden_states), 1 + scale_msa), visible)  # [B, N, D]
        if self.token_merge > 1:  # the update is kept apart: the difference of two hidden states would lose digits
            update = gate_msa * attention
            hidden_states = hidden_states + update
            mlp = self.mlp(torch.addcmul(shift_mlp, self.norm2(hidden_states), 1 + scale_mlp))  # [B, N / merge², D]
            return self._hand_back(full, torch.addcmul(update, gate_mlp, mlp), grid)
        hidden_states = torch.addcmul(hidden_states, gate_msa, attention)
        mlp = self.mlp(torch.addcmul(shift_mlp, self.norm2(hidden_states), 1 + scale_mlp))  # [B, N, D]
        return torch.addcmul(hidden_states, gate_mlp, mlp)


def modulation_steps(config: Mapping[str, Any], num_labels: int) -> int:
    """As [`EdgeDiTTransformer2DModel.modulation_steps`], of a model with this config."""
    width, layers = config["hidden_size"], config["layers"]
    ranks = [layer.get("modulation_rank") for layer in layers]
    weights = sum(6 * width * width if rank is None else 7 * width * rank for rank in ranks)
    return max(1, weights // max(1, 6 * len(layers) * width * num_labels))


class EdgeDiTTransformer2DModel(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    A diffusion transformer with per-layer sizes, and DiT itself when all layers are equal.

    Args:
        sample_size (`int`, defaults to 32): Height and width of the latent (or pixel) input; other sizes work too.
        patch_size (`int`, defaults to 2): Side of the square patches.
        in_channels (`int`, defaults to 4): Input channels.
        hidden_size (`int`, defaults to 1152): Residual width D; a multiple of 4.
        num_layers (`int`, defaults to 28): Layers when `layers` is not given.
        num_attention_heads (`int`, defaults to 16): Heads when `layers` is not given.
        mlp_ratio (`float`, defaults to 4.0): MLP ratio when `layers` is not given.
        num_classes (`int`, defaults to 1000): Classes; label `num_classes` is the null class of guidance. 0:
            unconditional.
        learn_sigma (`bool`, defaults to `True`): Whether the output also holds the variance channels of DiT.
        prediction_type (`str`, defaults to `"epsilon"`): What the output means: `"epsilon"` or `"flow_prediction"` (ε −
        x0). norm_eps (`float`, defaults to 1e-6): Epsilon of the layer norms.
        layers (`list[dict]`, *optional*): The genotype: a dict `{source, attention_dim, num_heads, mlp_ratio}` a layer;
            it may also hold `modulation_rank` (0: a learned vector stands in the place of adaLN's projection; r: the
            projection has rank r) and `token_merge` (2: the layer works on the means of 2 × 2 tokens, and what it adds
            goes to each of the four).
        mlp_norm_eps (`float`, *optional*): Epsilon of the norms before the MLPs where it differs (diffusers' DiT:
            1e-5).
        frequency_shift (`float`, defaults to 0): Subtracted from the number of timestep frequencies in their exponents'
            denominator (diffusers' DiT: 1).
        timestep_scale (`float`, defaults to 1), timestep_offset (`float`, defaults to 0): The embedder sees offset +
        scale · timestep
            (SiT, whose time runs from noise at 0 to data at 1: -1/1000 and 1).
        learned_position (`bool`, defaults to `False`): The position embedding is a weight (MDT); such a model has one
            input size.
        position_bias (`bool`, defaults to `False`): Attention has a learned relative position bias (MDT); one input
            size.
        long_skips (`list[list[int]]`, *optional*): `[i, j]`: the output of teacher layer i (-1: the embedded input) is
        joined to the
            input of teacher layer j by a linear layer 2D → D (MDTv2). Numbers are those in the `source` of the layers,
            so that they stay right when layers are merged.
        decoder_start (`int`, *optional*): Teacher layer before which a second position embedding is added (MDT's
            decoder).
        side_layers (`int`, defaults to 0): Side blocks, which fill in the masked tokens of a masked input (MDT's
            training).
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["EdgeDiTBlock"]
    _repeated_blocks = ["EdgeDiTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "timestep_embedder", "label_embedder", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        prediction_type: str = "epsilon",
        norm_eps: float = 1e-6,
        layers: list[dict[str, Any]] | None = None,
        mlp_norm_eps: float | None = None,
        frequency_shift: float = 0.0,
        timestep_scale: float = 1.0,
        timestep_offset: float = 0.0,
        learned_position: bool = False,
        position_bias: bool = False,
        long_skips: list[list[int]] | None = None,
        decoder_start: int | None = None,
        side_layers: int = 0,
    ):
        super().__init__()
        if max(num_layers if layers is None else len(layers), side_layers) > MAX_LAYERS:
            raise ValueError(
                f"The config has {num_layers if layers is None else len(layers)} layers; at most {MAX_LAYERS} are "
                "built."
            )
        if (sample_size // patch_size) ** 2 * hidden_size > MAX_POSITIONS:
            raise ValueError(
                f"sample_size {sample_size}, patch_size {patch_size} and hidden_size {hidden_size} need a position "
                f"embedding of {(sample_size // patch_size) ** 2 * hidden_size} values; at most {MAX_POSITIONS} are "
                "made."
            )
        if layers is None:
            layers = [
                {
                    "source": [i],
                    "attention_dim": hidden_size,
                    "num_heads": num_attention_heads,
                    "mlp_ratio": float(mlp_ratio),
                }
                for i in range(num_layers)
            ]
        if hidden_size % 4:
            raise ValueError(f"hidden_size is {hidden_size}; the position embedding needs a multiple of 4.")
        if sample_size % patch_size:
            raise ValueError(f"sample_size {sample_size} is not a multiple of patch_size {patch_size}.")
        if prediction_type not in ("epsilon", "flow_prediction"):
            raise ValueError(f"prediction_type is {prediction_type!r}; it must be 'epsilon' or 'flow_prediction'.")
        for index, layer in enumerate(layers):
            self._check_layer(index, layer, hidden_size, sample_size // patch_size)
        starts, ends = {layer["source"][0] for layer in layers}, {layer["source"][-1] for layer in layers} | {-1}
        for start, end in long_skips or []:
            if start not in ends or end not in starts or start >= end:
                raise ValueError(
                    f"The long skip [{start}, {end}] needs a layer whose source ends with {start} and a later one "
                    f"whose source starts with {end}; the sources are {[layer['source'] for layer in layers]}: a merge "
                    "must not cross a skip's end."
                )
        if decoder_start is not None and decoder_start not in starts:
            raise ValueError(f"decoder_start is {decoder_start}; no layer's source starts with it.")
        if side_layers and decoder_start is None:
            raise ValueError(
                f"side_layers is {side_layers}, but there is no decoder_start, before which side blocks stand."
            )
        # The genotype in the config is what the model is built from, never a default that somebody has to recompute.
        self.register_to_config(layers=layers, num_layers=len(layers))

        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        grid = sample_size // patch_size
        position = sincos_position_embedding(grid, grid, hidden_size)
        if learned_position:
            self.pos_embed = nn.Parameter(position)
        else:
            self.register_buffer("pos_embed", position, persistent=False)
        self.timestep_embedder = TimestepEmbedder(hidden_size, timestep_scale, timestep_offset, frequency_shift)
        self.label_embedder = nn.Embedding(num_classes + 1, hidden_size) if num_classes else None
        self.blocks = nn.ModuleList([self.new_block(layer) for layer in layers])
        self.skips = nn.ModuleDict({str(end): nn.Linear(2 * hidden_size, hidden_size) for _, end in long_skips or []})
        self._skip_start = {end: start for start, end in long_skips or []}
        if decoder_start is not None:
            self.decoder_pos_embed = nn.Parameter(position.clone())
        side = {"source": [], "attention_dim": hidden_size, "num_heads": num_attention_heads, "mlp_ratio": mlp_ratio}
        self.side_blocks = nn.ModuleList([self.new_block(side) for _ in range(side_layers)])
        self.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size)) if side_layers else None
        self.norm_out = nn.LayerNorm(hidden_size, eps=norm_eps, elementwise_affine=False)
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj_out = nn.Linear(hidden_size, patch_size * patch_size * self.out_channels)
        self.gradient_checkpointing = False
        self._modulation_file: str | None = None
        self._modulation_tag: str | None = None
        self.reset_parameters()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "EdgeDiTTransformer2DModel":
        """A randomly initialised model of a published or debug size, e.g. `from_preset("DiT-XL/2", sample_size=64)`."""
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}; the presets are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def with_config(cls, config: Mapping[str, Any], **changes: Any) -> "EdgeDiTTransformer2DModel":
        """A new model with the config of another (or of a config.json) and these changes. Keys that this class does not
        know are kept as they are, as diffusers does with those that a trainer has added; how the other was quantised is
        not.
        """
        values = {
            key: value
            for key, value in {**config, **changes}.items()
            if not key.startswith("_") and key != "quantization_config"
        }
        known = cls._get_init_keys(cls) - {"self"}
        model = cls(**{key: value for key, value in values.items() if key in known})
        model.register_to_config(**{key: value for key, value in values.items() if key not in known})
        return model

    @staticmethod
    def _check_layer(index: int, layer: Mapping[str, Any], hidden_size: int, grid: int) -> None:
        """Refuse a layer of the config that no block can be built from; `grid`: side of the native token grid."""
        keys = set(layer) if isinstance(layer, Mapping) else layer
        if not isinstance(layer, Mapping) or keys - set(OPTIONAL_LAYER_KEYS) != set(LAYER_KEYS):
            raise ValueError(
                f"Layer {index} has the keys {sorted(keys) if isinstance(keys, set) else keys!r}; it must have exactly "
                f"{sorted(LAYER_KEYS)}, and may have {list(OPTIONAL_LAYER_KEYS)}."
            )
        width, heads, ratio = layer["attention_dim"], layer["num_heads"], layer["mlp_ratio"]
        rank, merge = layer.get("modulation_rank"), layer.get("token_merge", 1)
        source = layer["source"]
        if not isinstance(source, (list, tuple)) or not source or not all(type(i) is int and i >= 0 for i in source):
            raise ValueError(f"Layer {index}: source is {source!r}; it must list teacher layers, e.g. [4] or [4, 5].")
        if any(not isinstance(value, int) or isinstance(value, bool) or value < 1 for value in (width, heads)):
            raise ValueError(
                f"Layer {index}: attention_dim {width!r} and num_heads {heads!r} must be integers above 0."
            )
        if width % heads:
            raise ValueError(f"Layer {index}: attention_dim {width} is not a multiple of num_heads {heads}.")
        if not isinstance(ratio, (int, float)) or not 0 < ratio < float("inf"):
            raise ValueError(f"Layer {index}: mlp_ratio is {ratio!r}; it must be a number above 0.")
        if int(hidden_size * ratio) < 1:
            raise ValueError(f"Layer {index}: mlp_ratio {ratio} of hidden_size {hidden_size} leaves no neuron.")
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank <= hidden_size):
            raise ValueError(
                f"Layer {index}: modulation_rank is {rank!r}; it must be an integer from 0 (static) to the hidden_size "
                f"{hidden_size}, or left out (adaLN's whole projection)."
            )
        if isinstance(merge, bool) or merge not in TOKEN_MERGES:
            raise ValueError(f"Layer {index}: token_merge is {merge!r}; it must be one of {TOKEN_MERGES}.")
        if grid % merge:
            raise ValueError(
                f"Layer {index}: token_merge {merge} needs a token grid whose sides are multiples of {merge}; "
                f"sample_size and patch_size make {grid} × {grid}."
            )

    def new_block(self, layer: dict[str, Any]) -> EdgeDiTBlock:
        """An untrained block of a layer's sizes, as this model needs it."""
        config = self.config
        bias_grid = config.sample_size // config.patch_size if config.position_bias else None
        sizes = layer["attention_dim"], layer["num_heads"], layer["mlp_ratio"]
        options = layer.get("modulation_rank"), layer.get("token_merge", 1)
        return EdgeDiTBlock(config.hidden_size, *sizes, *options, config.norm_eps, config.mlp_norm_eps, bias_grid)

    def reset_parameters(self) -> None:
        """DiT's initialisation: Xavier for linear layers, zero for modulations and the output, so that layers start as
        identity.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.patch_embed.weight.shape[0], -1))
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.normal_(self.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(self.timestep_embedder.linear_2.weight, std=0.02)
        if self.label_embedder is not None:
            nn.init.normal_(self.label_embedder.weight, std=0.02)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        modulations = [block.modulation for block in (*self.blocks, *self.side_blocks)]
        last = [layer.up if isinstance(layer, LowRankModulation) else layer for layer in modulations]
        for layer in (*last, self.modulation_out, self.proj_out):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    # ---------------------------------------------------------------- forward

    def embed(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Input of the first block and the activated conditioning that all blocks share.

        Args:
            hidden_states: `(B, C, H, W)`.
            timestep: `(B,)` or a scalar, on the scale 0 … 1000.
            class_labels: `(B,)` integers in `[0, num_classes]`; `None` only for an unconditional model.

        Returns:
            tokens `(B, N, D)` and conditioning `(B, D)`.
        """
        if timestep.ndim == 0:
            timestep = timestep[None]
        return self.embed_patches(hidden_states), self.embed_condition(
            timestep.expand(hidden_states.shape[0]), class_labels
        )

    def embed_patches(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Patches and their positions: `(B, C, H, W)` → `(B, N, D)`."""
        height, width = hidden_states.shape[-2:]
        patch = self.config.patch_size
        if (
            hidden_states.ndim != 4
            or hidden_states.shape[1] != self.config.in_channels
            or height % patch
            or width % patch
        ):
            raise ValueError(
                f"The input has shape {tuple(hidden_states.shape)}; this model needs (batch, "
                f"{self.config.in_channels}, height, width) with height and width multiples of {patch}."
            )
        rows, columns = height // patch, width // patch
        # Contiguous from the start: every layer would otherwise inherit the convolution's layout and copy for its norms
        # and products.
        tokens = self.patch_embed(hidden_states).flatten(2).transpose(1, 2).contiguous()  # [B, N, D]
        native = self.config.sample_size // patch
        if (rows, columns) == (native, native):
            position = self.pos_embed
        elif self.config.learned_position or self.config.position_bias:
            raise ValueError(
                f"The input has shape {tuple(hidden_states.shape)}, but this model's positions are learned: it takes "
                f"only {self.config.sample_size} × {self.config.sample_size}."
            )
        else:
            position = sincos_position_embedding(rows, columns, self.config.hidden_size).to(tokens.device)
        return tokens + position.to(tokens.dtype)

    def embed_condition(self, timestep: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """Activated conditioning `(B, D)` of timesteps `(B,)` and labels `(B,)`."""
        if (class_labels is None) != (self.label_embedder is None):
            given = "no class_labels were given" if class_labels is None else "class_labels were given"
            raise ValueError(f"The model has num_classes={self.config.num_classes}, but {given}.")
        conditioning = self.timestep_embedder(timestep)  # [B, D]
        if self.label_embedder is not None:
            conditioning = conditioning + self.label_embedder(class_labels)
        return F.silu(conditioning)

    @torch.no_grad()
    def precompute_modulation(self, timesteps: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """What adaLN makes of every timestep and label, for a whole schedule at once: sampling need not compute it
        again a step.

        About a third of a DiT's weights (adaLN) is read here once instead of once a step. With 2·N FLOPs a weight for N
        = T·K rows it is also one matrix product instead of T thin ones. The table outgrows adaLN's weights beyond
        [`modulation_steps`] timesteps.

        Args:
            timesteps: `(T,)`. class_labels: `(K,)`, or `None` for an unconditional model (K = 1).

        Returns:
            `(T, K, 6L + 2, D)`: rows 6i … 6i + 5 modulate layer i, the last two the output. `table[step]`, with a row
            an image, is the `modulation` that [`forward`] takes.
        """
        count = 1 if class_labels is None else len(class_labels)
        labels = None if class_labels is None else class_labels.repeat(len(timesteps))
        device = timesteps.device
        conditioning = self.embed_condition(timesteps.repeat_interleave(count), labels)  # [T·K, D]
        table = conditioning.new_empty(len(conditioning), 6 * len(self.blocks) + 2, conditioning.shape[-1])

        def fill(rows: slice, layer: nn.Module) -> None:
            weight = next(layer.parameters())
            if weight.is_meta:  # an offloading hook brings the weights
                values = layer(conditioning)
            else:
                values = layer(conditioning.to(weight.device)).to(device)
            table[:, rows] = values.unflatten(-1, (-1, table.shape[-1]))

        if self._modulation_file is None:
            for index, block in enumerate(self.blocks):
                fill(slice(6 * index, 6 * index + 6), block.modulation)
        else:
            with self._stored_modulations() as file:
                for index in range(len(self.blocks)):
                    fill(slice(6 * index, 6 * index + 6), self._stored_modulation(file, index))
        fill(slice(6 * len(self.blocks), None), self.modulation_out)
        return table.view(len(timesteps), count, *table.shape[1:])

    def modulation_steps(self, num_labels: int) -> int:
        """Timesteps whose table of [`precompute_modulation`] is as large as the adaLN weights themselves (D rows where
        every layer has its whole projection), at least one.
        """
        return modulation_steps(self.config, num_labels)

    def offload_modulation(self, path: str | os.PathLike) -> None:
        """Move the layers' adaLN weights from memory to a new safetensors file; [`precompute_modulation`] then reads
        them from there, a layer at a time. The model needs a `modulation` until [`restore_modulation`] brings them
        back.
        """
        if self._modulation_file is not None:
            raise ValueError(
                f"The modulation weights are in {self._modulation_file} already; call restore_modulation() first."
            )
        if os.path.exists(path):
            raise ValueError(f"{path} exists; offload_modulation writes a file of its own. Give another path.")
        state = {
            k: v.detach().cpu().contiguous()
            for k, v in self.blocks.state_dict(prefix="blocks.").items()
            if ".modulation." in k
        }
        with torch.device("meta"):
            expected = [
                f"blocks.{index}.modulation.{name}"
                for index, layer in enumerate(self.config.layers)
                for name in new_modulation(self.config.hidden_size, layer.get("modulation_rank")).state_dict()
            ]
        if set(state) != set(expected):
            raise ValueError(
                f"The modulation layers hold {len(state)} tensors, not the {len(expected)} of plain ones: unload their "
                "adapters, or dequantise them, first."
            )
        aside, tag = f"{os.fspath(path)}.tmp-{os.getpid()}", uuid.uuid4().hex
        save_file(state, aside, {"tag": tag})
        os.replace(aside, path)
        for block in self.blocks:
            block.modulation = None
        self._modulation_file, self._modulation_tag = os.fspath(path), tag

    @contextlib.contextmanager
    def _stored_modulations(self) -> Iterator[Any]:
        """The file of [`offload_modulation`], opened; a ValueError if it is another one by now."""
        try:
            with safe_open(self._modulation_file, framework="pt") as file:
                if (file.metadata() or {}).get("tag") != self._modulation_tag:
                    raise ValueError(
                        f"{self._modulation_file} is not the file that offload_modulation() wrote; put that one back, "
                        "or load the model again."
                    )
                yield file
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"The modulation weights in {self._modulation_file} cannot be read ({error}); put them back or load "
                "the model again."
            ) from error

    def _stored_modulation(self, file: Any, index: int, copy: bool = False) -> nn.Module:
        """The adaLN layer of a block, read from the open file of [`offload_modulation`] to where the model is; without
        `copy`, on CPUs, it is mapped: it changes with the file."""
        like = self.modulation_out.bias
        with torch.device("meta"):
            layer = new_modulation(self.config.hidden_size, self.config.layers[index].get("modulation_rank"))
        state = {
            name: file.get_tensor(f"blocks.{index}.modulation.{name}").to(like.device, copy=copy)
            for name in layer.state_dict()
        }
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_(like.requires_grad)

    def restore_modulation(self) -> None:
        """Undo [`offload_modulation`]; the file stays."""
        if self._modulation_file is None:
            return
        with self._stored_modulations() as file:
            for index, block in enumerate(self.blocks):
                block.modulation = self._stored_modulation(file, index, copy=True)
        self._modulation_file = None

    def fuse_gelu(self, fused: bool = True) -> None:
        """On CPUs, without gradients: apply GELU inside the matrix product before it (oneDNN), not in a pass of its own
        over the widest activation. The same result within rounding; worth most in bf16. Not for weights that hooks cast
        or offload.
        """
        for block in (*self.blocks, *self.side_blocks):
            block.mlp.fused = fused

    def join(
        self,
        source: Sequence[int],
        tokens: torch.Tensor,
        kept: dict[int, torch.Tensor],
        conditioning: torch.Tensor | None = None,
        visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Input of the layer with this `source`, given the tokens before it and what long skips kept, by teacher
        layer.
        """
        if source[0] == self.config.decoder_start:
            if visible is None:
                tokens = tokens + self.decoder_pos_embed.to(tokens.dtype)
            else:
                tokens = self._unmask(tokens, conditioning, visible)
        if source[0] in self._skip_start:
            tokens = self.skips[str(source[0])](torch.cat([tokens, kept[self._skip_start[source[0]]]], dim=-1))
        return tokens

    def layer_features(
        self, tokens: torch.Tensor, conditioning: torch.Tensor, depth: int | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Inputs and outputs, each `(B, N, D)`, of the first `depth` layers (default: all), for feature distillation.

        Args:
            tokens, conditioning: what [`embed`] returns.
        """
        inputs, outputs, kept = [], [], {-1: tokens}
        for layer, block in zip(self.config.layers[:depth], self.blocks):
            inputs.append(self.join(layer["source"], tokens, kept))
            tokens = block(inputs[-1], conditioning)
            outputs.append(tokens)
            kept[layer["source"][-1]] = tokens
        return inputs, outputs

    def unembed(
        self,
        tokens: torch.Tensor,
        conditioning: torch.Tensor | None,
        height: int,
        width: int,
        modulation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Output layer: tokens `(B, N, D)` → sample `(B, out_channels, height, width)`; `modulation`: `(B, 2, D)`."""
        if modulation is None:
            modulation = self.modulation_out(conditioning).unflatten(-1, (2, -1))
        shift, scale = modulation.unsqueeze(2).unbind(1)  # each [B, 1, D]
        tokens = self.proj_out(torch.addcmul(shift, self.norm_out(tokens), 1 + scale))  # [B, N, P·P·out]
        patch = self.config.patch_size
        rows, columns = height // patch, width // patch
        sample = tokens.view(-1, rows, columns, patch, patch, self.out_channels)
        return sample.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, height, width)

    def _unmask(self, tokens: torch.Tensor, conditioning: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Visible tokens `(B, V, D)` → all `(B, N, D)`: the side blocks fill in the masked ones (MDT's
        side-interpolater).
        """
        batch, _, width = tokens.shape
        filled = self.mask_token.to(tokens.dtype).repeat(batch, self.decoder_pos_embed.shape[0], 1)
        place = visible.unsqueeze(-1).expand(-1, -1, width)
        filled = filled.scatter(1, place, tokens) + self.decoder_pos_embed.to(tokens.dtype)
        interpolated = filled
        for block in self.side_blocks:
            interpolated = block(interpolated, conditioning)
        return interpolated.scatter(1, place, filled.gather(1, place))

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | None,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        modulation: torch.Tensor | None = None,
        visible: torch.Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Noisy input.
            timestep (`torch.Tensor` of shape `(batch,)` or a scalar): Timestep on the scale 0 … 1000.
            class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): Classes; `num_classes` means "no class".
            return_dict (`bool`, defaults to `True`): Whether to return a [`Transformer2DModelOutput`].
            modulation (`torch.Tensor` of shape `(batch, 6 * layers + 2, hidden_size)`, *optional*): A step of the table
            of
                [`precompute_modulation`]; with it, `timestep` and `class_labels` are not used and may be `None`.
            visible (`torch.Tensor` of shape `(batch, visible tokens)`, *optional*): For a model with side blocks: the
            tokens that the
                layers before `decoder_start` see; the side blocks fill in the others (MDT's masked training).

        Returns:
            The prediction, of shape `(batch, out_channels, height, width)`.
        """
        height, width = hidden_states.shape[-2:]
        tokens, conditioning, table = self.embed_patches(hidden_states), None, None
        if modulation is None:
            if self._modulation_file is not None:
                raise ValueError(
                    f"The modulation weights are in {self._modulation_file}: give the forward a step of "
                    "precompute_modulation(), or call restore_modulation()."
                )
            if timestep.ndim == 0:
                timestep = timestep[None]
            conditioning = self.embed_condition(timestep.expand(tokens.shape[0]), class_labels)
        else:
            expected = (tokens.shape[0], 6 * len(self.blocks) + 2, self.config.hidden_size)
            if tuple(modulation.shape) != expected:
                raise ValueError(
                    f"modulation has the shape {tuple(modulation.shape)}; this model and batch need {expected}."
                )
            table = modulation
        if visible is not None and (self.mask_token is None or conditioning is None):
            raise ValueError(
                f"visible needs a model with side blocks (side_layers is {self.config.side_layers}) and no precomputed "
                "modulation."
            )
        if visible is not None:
            for index, layer in enumerate(self.config.layers):
                if layer["source"][0] == self.config.decoder_start:
                    break
                if layer.get("token_merge", 1) > 1:
                    raise ValueError(
                        f"Layer {index} merges {layer['token_merge']} × {layer['token_merge']} tokens, but a masked "
                        f"input has only its visible ones before teacher layer {self.config.decoder_start} "
                        "(decoder_start), so it has no grid there; train without visible."
                    )
        grid = (height // self.config.patch_size, width // self.config.patch_size)
        kept = {-1: tokens} if self._skip_start else {}
        if visible is not None:
            tokens = tokens.gather(1, visible.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        for index, (layer, block) in enumerate(zip(self.config.layers, self.blocks)):
            tokens = self.join(layer["source"], tokens, kept, conditioning, visible)
            if layer["source"][0] == self.config.decoder_start:
                visible = None  # from here on all tokens are there
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, conditioning, None, visible, grid)
            else:
                rows = None if table is None else table[:, 6 * index : 6 * index + 6]
                tokens = block(tokens, conditioning, rows, visible, grid)
            if layer["source"][-1] in self._skip_start.values():
                kept[layer["source"][-1]] = tokens
        sample = self.unembed(tokens, conditioning, height, width, None if table is None else table[:, -2:])
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    # ---------------------------------------------------------------- loading and saving

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in diffusers, but a missing or unexpected weight is an error, not a warning. A quantised model stays
        packed, unless `quantization_config=EdgeDiTQuantizationConfig(dequantize=True)` is given."""
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
                "The config's `layers` and the weights must come from the same model; save it again with "
                "save_pretrained."
            )
        if unpack:
            model.dequantize()
        elif quantization is not None and model.hf_quantizer.pre_quantized:
            raise ValueError(
                f"{pretrained_model_name_or_path} is quantised already ({model.quantization_method}); load it without "
                "quantization_config."
            )
        return (model, info) if return_info else model

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
        if self._modulation_file is not None:
            raise ValueError(
                f"The modulation weights are in {self._modulation_file}; call restore_modulation() before saving the "
                "model."
            )
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
