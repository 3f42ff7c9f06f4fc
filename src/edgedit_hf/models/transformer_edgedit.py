"""EdgeDiT: a class-conditional diffusion transformer whose layers may differ (compressed DiT). One self-contained file.

The network is DiT with adaLN-zero (Peebles & Xie, 2023, arXiv:2212.09748) with one timestep/label embedder shared by all layers.
Every layer has its own attention width, head count and MLP ratio (EdgeDiT, arXiv:2603.28405); the residual width is the teacher's.

Shapes: B batch, C latent channels, H × W latent size, P patch size, N = (H/P)·(W/P) tokens, D residual width (`hidden_size`),
A attention width of a layer, h heads.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

FREQUENCIES = 256  # width of the sinusoidal timestep features (DiT)

_DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def _edgedit_layers(attention_dim: int, mlp_ratio: float) -> list[dict[str, Any]]:
    """25 equal layers on 28 teacher layers. Which three pairs the paper merged is unknown; these spread over the middle."""
    sources, layer = [], 0
    while layer < 28:
        step = 2 if layer in (8, 14, 20) else 1
        sources.append(list(range(layer, layer + step)))
        layer += step
    return [{"source": s, "attention_dim": attention_dim, "num_heads": 16, "mlp_ratio": mlp_ratio} for s in sources]


def _presets() -> dict[str, dict[str, Any]]:
    presets: dict[str, dict[str, Any]] = {}
    for size, (depth, width, heads) in _DIT_SIZES.items():
        for patch in (2, 4, 8):
            presets[f"DiT-{size}/{patch}"] = {
                "patch_size": patch,
                "hidden_size": width,
                "num_layers": depth,
                "num_attention_heads": heads,
            }
    xl = presets["DiT-XL/2"]
    presets["EdgeDiT-1"] = {**xl, "layers": _edgedit_layers(1152, 2.0)}
    presets["EdgeDiT-6"] = {**xl, "layers": _edgedit_layers(512, 4.0)}
    tiny = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "learn_sigma": False}
    presets["DiT-debug/2"] = {**tiny, "patch_size": 2, "hidden_size": 32, "num_layers": 4, "num_attention_heads": 2}
    presets["DiT-digits/2"] = {**tiny, "patch_size": 2, "hidden_size": 128, "num_layers": 6, "num_attention_heads": 4}
    return presets


PRESETS: dict[str, dict[str, Any]] = _presets()


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
    """Sinusoidal features of the timestep, then a two-layer MLP: `(B,)` → `(B, D)`."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(FREQUENCIES, hidden_size)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        half = FREQUENCIES // 2
        exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        angles = timestep[:, None].float() * torch.exp(-math.log(10000.0) * exponent)[None]  # [B, F/2]
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)  # [B, F]
        return self.linear_2(self.act(self.linear_1(features.to(self.linear_1.weight.dtype))))


class EdgeDiTAttnProcessor:
    """Self-attention through diffusers' backend dispatcher (`model.set_attention_backend(...)`)."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "EdgeDiTAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = hidden_states.shape
        qkv = attn.to_qkv(hidden_states)  # [B, N, 3A]
        query, key, value = qkv.view(batch, tokens, 3, attn.heads, -1).unbind(2)  # each [B, N, h, A/h]
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out(hidden_states.flatten(2))  # [B, N, D]


class EdgeDiTAttention(nn.Module, AttentionModuleMixin):
    """Self-attention of inner width A, independent of the residual width: qkv D → 3A, output A → D."""

    _default_processor_cls = EdgeDiTAttnProcessor
    _available_processors = [EdgeDiTAttnProcessor]
    _supports_qkv_fusion = False  # the projection is one matrix already

    def __init__(self, hidden_size: int, attention_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(hidden_size, 3 * attention_dim)
        self.to_out = nn.Linear(attention_dim, hidden_size)
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)


class EdgeDiTMLP(nn.Module):
    """Two linear layers with tanh-GELU between: D → mlp_dim → D."""

    def __init__(self, hidden_size: int, mlp_dim: int):
        super().__init__()
        self.proj_in = nn.Linear(hidden_size, mlp_dim)
        self.act = nn.GELU(approximate="tanh")
        self.proj_out = nn.Linear(mlp_dim, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.proj_out(self.act(self.proj_in(hidden_states)))


class EdgeDiTBlock(nn.Module):
    """One layer with adaLN-zero. `conditioning` is already activated (SiLU), as [`EdgeDiTTransformer2DModel.embed`] gives it."""

    def __init__(self, hidden_size: int, attention_dim: int, num_heads: int, mlp_ratio: float, norm_eps: float = 1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=norm_eps, elementwise_affine=False)
        self.attn = EdgeDiTAttention(hidden_size, attention_dim, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=norm_eps, elementwise_affine=False)
        self.mlp = EdgeDiTMLP(hidden_size, int(hidden_size * mlp_ratio))
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        # [B, D] → six [B, 1, D]
        modulation = self.modulation(conditioning).unsqueeze(1).chunk(6, dim=-1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        # addcmul(a, b, c) is a + b·c in one pass over memory instead of two.
        attention = self.attn(torch.addcmul(shift_msa, self.norm1(hidden_states), 1 + scale_msa))  # [B, N, D]
        hidden_states = torch.addcmul(hidden_states, gate_msa, attention)
        mlp = self.mlp(torch.addcmul(shift_mlp, self.norm2(hidden_states), 1 + scale_mlp))  # [B, N, D]
        return torch.addcmul(hidden_states, gate_mlp, mlp)


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
        num_classes (`int`, defaults to 1000): Classes; label `num_classes` is the null class of guidance. 0: unconditional.
        learn_sigma (`bool`, defaults to `True`): Whether the output also holds the variance channels of DiT.
        prediction_type (`str`, defaults to `"epsilon"`): What the output means: `"epsilon"` or `"flow_prediction"` (ε − x0).
        norm_eps (`float`, defaults to 1e-6): Epsilon of the layer norms.
        layers (`list[dict]`, *optional*): The genotype: a dict `{source, attention_dim, num_heads, mlp_ratio}` a layer.
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
    ):
        super().__init__()
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
            if layer["attention_dim"] % layer["num_heads"]:
                raise ValueError(
                    f"Layer {index}: attention_dim {layer['attention_dim']} is not a multiple of num_heads {layer['num_heads']}."
                )
        # The genotype in the config is what the model is built from, never a default that somebody has to recompute.
        self.register_to_config(layers=layers, num_layers=len(layers))

        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        grid = sample_size // patch_size
        self.register_buffer("pos_embed", sincos_position_embedding(grid, grid, hidden_size), persistent=False)
        self.timestep_embedder = TimestepEmbedder(hidden_size)
        self.label_embedder = nn.Embedding(num_classes + 1, hidden_size) if num_classes else None
        self.blocks = nn.ModuleList(
            [
                EdgeDiTBlock(hidden_size, layer["attention_dim"], layer["num_heads"], layer["mlp_ratio"], norm_eps)
                for layer in layers
            ]
        )
        self.norm_out = nn.LayerNorm(hidden_size, eps=norm_eps, elementwise_affine=False)
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj_out = nn.Linear(hidden_size, patch_size * patch_size * self.out_channels)
        self.gradient_checkpointing = False
        self.reset_parameters()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "EdgeDiTTransformer2DModel":
        """A randomly initialised model of a published or debug size, e.g. `from_preset("DiT-XL/2", sample_size=64)`."""
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}; the presets are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    def reset_parameters(self) -> None:
        """DiT's initialisation: Xavier for linear layers, zero for modulations and the output, so that layers start as identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.patch_embed.weight.shape[0], -1))
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.normal_(self.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(self.timestep_embedder.linear_2.weight, std=0.02)
        if self.label_embedder is not None:
            nn.init.normal_(self.label_embedder.weight, std=0.02)
        for layer in (*(block.modulation for block in self.blocks), self.modulation_out, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

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
        batch, channels, height, width = hidden_states.shape
        patch = self.config.patch_size
        if channels != self.config.in_channels or height % patch or width % patch:
            raise ValueError(
                f"The input has shape {tuple(hidden_states.shape)}; this model needs (batch, {self.config.in_channels}, height, width) "
                f"with height and width multiples of {patch}."
            )
        if (class_labels is None) != (self.label_embedder is None):
            given = "no class_labels were given" if class_labels is None else "class_labels were given"
            raise ValueError(f"The model has num_classes={self.config.num_classes}, but {given}.")
        rows, columns = height // patch, width // patch
        tokens = self.patch_embed(hidden_states).flatten(2).transpose(1, 2)  # [B, N, D]
        native = self.config.sample_size // patch
        if (rows, columns) == (native, native):
            position = self.pos_embed
        else:
            position = sincos_position_embedding(rows, columns, self.config.hidden_size).to(tokens.device)
        tokens = tokens + position.to(tokens.dtype)

        if timestep.ndim == 0:
            timestep = timestep[None]
        conditioning = self.timestep_embedder(timestep.expand(batch))  # [B, D]
        if self.label_embedder is not None:
            conditioning = conditioning + self.label_embedder(class_labels)
        return tokens, F.silu(conditioning)

    def unembed(self, tokens: torch.Tensor, conditioning: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Output layer: tokens `(B, N, D)` → sample `(B, out_channels, height, width)`."""
        shift, scale = self.modulation_out(conditioning).unsqueeze(1).chunk(2, dim=-1)
        tokens = self.proj_out(torch.addcmul(shift, self.norm_out(tokens), 1 + scale))  # [B, N, P·P·out]
        patch = self.config.patch_size
        rows, columns = height // patch, width // patch
        sample = tokens.view(-1, rows, columns, patch, patch, self.out_channels)
        return sample.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, height, width)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Noisy input.
            timestep (`torch.Tensor` of shape `(batch,)` or a scalar): Timestep on the scale 0 … 1000.
            class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): Classes; `num_classes` means "no class".
            return_dict (`bool`, defaults to `True`): Whether to return a [`Transformer2DModelOutput`].

        Returns:
            The prediction, of shape `(batch, out_channels, height, width)`.
        """
        height, width = hidden_states.shape[-2:]
        tokens, conditioning = self.embed(hidden_states, timestep, class_labels)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, conditioning)
            else:
                tokens = block(tokens, conditioning)
        sample = self.unembed(tokens, conditioning, height, width)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    # ---------------------------------------------------------------- loading and saving

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in diffusers, but a missing or unexpected weight is an error, not a warning."""
        return_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        if missing or unexpected:
            raise ValueError(
                f"The weights in {pretrained_model_name_or_path} do not fit their config: {len(missing)} missing "
                f"({', '.join(missing[:3]) or 'none'}), {len(unexpected)} unexpected ({', '.join(unexpected[:3]) or 'none'}). "
                "The config's `layers` and the weights must come from the same model; save it again with save_pretrained."
            )
        return (model, info) if return_info else model

    @functools.wraps(ModelMixin.save_pretrained, assigned=())  # pipelines pass `variant` and others only if the signature names them
    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in diffusers, but refuses while PEFT adapters are injected: their wrapped weights would reload as random ones."""
        if any(".base_layer." in name for name in self.state_dict()):  # delete_adapters() leaves the wrappers behind
            raise ValueError(
                f"The model's layers are wrapped for the adapters {sorted(getattr(self, 'peft_config', {}))}; keep an adapter with "
                "save_lora_adapter(), or merge it with fuse_lora(); then call unload_lora() and save the model."
            )
        return super().save_pretrained(save_directory, *args, **kwargs)
