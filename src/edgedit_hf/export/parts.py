"""The parts of a pipeline that an export lowers: each a module with tensors in and out, its example inputs, and which
of their sizes may stay open.

A part belongs to a component of the pipeline and becomes one file in that component's folder: the transformer is a
`denoiser`, and, split, also a `conditioner` (adaLN's modulations, which a schedule needs once) and, for text, a
`text_conditioner`; a VAE is a `decoder` and an `encoder`; a text encoder is a `text_encoder`. All parts compute in
float32 here; precision is the business of a format.

Names and shapes of the tensors are the same in every format. B rows of a forward (guidance makes two an image), C
channels and H × W size of the latents, L layers and D width of the transformer, T_i tokens and E_i width of text
encoder i.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..data.latents import vae_decode, vae_encode
from ..errors import EdgeDiTError
from .wrappers import BlockWrapper, DenoiserWrapper, EmbedWrapper, UnembedWrapper

if TYPE_CHECKING:
    from ..models.transformer_edgedit import EdgeDiTTransformer2DModel
    from ..models.transformer_elastic_dit import ElasticDiTTransformer2DModel

MODULATED = "modulation"  # name of the tensor between conditioner and denoiser


@dataclass(frozen=True)
class Part:
    """One file of an export.

    Args:
        component: the pipeline's component, `"transformer"`, `"vae"`, `"text_encoder"` or `"text_encoder_2"`.
        name: `"denoiser"`, `"conditioner"`, `"text_conditioner"`, `"decoder"`, `"encoder"` or `"text_encoder"`: the
            file's stem.
        module: takes `inputs` by position, in eval mode, float32, on the CPU.
        inputs: example inputs by name, in order. Masks are float32 of 0 and 1.
        outputs: names of its outputs.
        dynamic: input → axis → name of a size that a format with open shapes may leave open; equal names are one size.
    """

    component: str
    name: str
    module: nn.Module
    inputs: dict[str, torch.Tensor]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Its name in the contract: the part's name, a text encoder's component."""
        return self.component if self.name == "text_encoder" else self.name

    @property
    def weights(self) -> int:
        """Numbers in the module's parameters and buffers."""
        tensors = {id(tensor): tensor for tensor in (*self.module.parameters(), *self.module.buffers())}
        return sum(tensor.numel() for tensor in tensors.values())

    def run(self) -> dict[str, torch.Tensor]:
        """The module's outputs, by name, for the example inputs."""
        with torch.no_grad():
            values = self.module(*self.inputs.values())
        return dict(zip(self.outputs, values if isinstance(values, tuple) else (values,)))


# -------------------------------------------------------------------- EdgeDiT


class ConditionerWrapper(nn.Module):
    """adaLN of a whole EdgeDiT: `(timestep (B,)[, class_labels (B,)]) → modulation (B, 6L + 2, D)`."""

    def __init__(self, model: EdgeDiTTransformer2DModel):
        super().__init__()
        self.embedders = nn.ModuleList(
            [model.timestep_embedder, *([] if model.label_embedder is None else [model.label_embedder])]
        )
        self.layers = nn.ModuleList([*(block.modulation for block in model.blocks), model.modulation_out])
        self.width = model.config.hidden_size

    def forward(self, timestep: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        conditioning = self.embedders[0](timestep)  # [B, D]
        if class_labels is not None:
            conditioning = conditioning + self.embedders[1](class_labels)
        conditioning = nn.functional.silu(conditioning)
        return torch.cat([layer(conditioning).unflatten(-1, (-1, self.width)) for layer in self.layers], dim=1)


class ModulatedDenoiserWrapper(nn.Module):
    """An EdgeDiT without its conditioner: `(sample (B, C, H, W), modulation (B, 6L + 2, D)) → prediction`.

    The weights of the conditioner are not in it; all others are shared with the model.
    """

    def __init__(self, model: EdgeDiTTransformer2DModel):
        super().__init__()
        self.model = share(model)
        for block in self.model.blocks:
            block.modulation = None
        self.model.timestep_embedder = self.model.label_embedder = self.model.modulation_out = None
        self.model.side_blocks = nn.ModuleList()  # they serve masked training inputs only

    def forward(self, sample: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        return self.model(sample, None, None, return_dict=False, modulation=modulation)[0]


def share(model: nn.Module) -> Any:
    """A copy of a module that shares every tensor with it, so that its structure can be changed."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, tensors).eval().requires_grad_(False)


def edgedit_parts(model: EdgeDiTTransformer2DModel, size: tuple[int, int], batch: int, split: bool) -> list[Part]:
    """The denoiser of an EdgeDiT, or its conditioner and denoiser.

    Args:
        size: H, W. batch: B of the examples.
    """
    sample = torch.randn(batch, model.config.in_channels, *size, generator=torch.Generator().manual_seed(0))
    condition: dict[str, torch.Tensor] = {"timestep": torch.linspace(999, 1, batch)}
    if model.config.num_classes:
        condition["class_labels"] = torch.arange(batch) % (model.config.num_classes + 1)
    rows = {name: {0: "batch"} for name in ("sample", *condition, MODULATED)}
    rows["sample"] |= {2: "height", 3: "width"}
    if not split:
        return [
            _part(
                "transformer",
                "denoiser",
                DenoiserWrapper(model),
                {"sample": sample, **condition},
                ("prediction",),
                rows,
            )
        ]
    conditioner = _part("transformer", "conditioner", ConditionerWrapper(model), condition, (MODULATED,), rows)
    inputs = {"sample": sample, **conditioner.run()}
    return [
        conditioner,
        _part("transformer", "denoiser", ModulatedDenoiserWrapper(model), inputs, ("prediction",), rows),
    ]


def layer_parts(model: EdgeDiTTransformer2DModel, batch: int) -> tuple[Part, list[Part], Part]:
    """An EdgeDiT in pieces: what comes before its layers, every layer, what comes after them.

    A layer's output is called `tokens_out`; the next piece calls it `tokens`.

    Args:
        batch: B of the examples.
    """
    size = (model.config.sample_size, model.config.sample_size)
    (denoiser,) = edgedit_parts(model, size, batch, split=False)
    rows = {name: {0: "batch"} for name in (*denoiser.inputs, "tokens", "conditioning")}
    before = _part("transformer", "embed", EmbedWrapper(model), denoiser.inputs, ("tokens", "conditioning"), rows)
    middle = before.run()
    layers = [
        _part("transformer", f"layer_{index}", BlockWrapper(block), middle, ("tokens_out",), rows)
        for index, block in enumerate(model.blocks)
    ]
    return before, layers, _part("transformer", "unembed", UnembedWrapper(model), middle, ("prediction",), rows)


# -------------------------------------------------------------------- elastic DiT


class ElasticDenoiserWrapper(nn.Module):
    """`(sample, timestep, text_0, mask_0, text_1, mask_1, …) → prediction`; an absent text encoder is one whose mask is
    0.
    """

    def __init__(self, model: ElasticDiTTransformer2DModel):
        super().__init__()
        self.model = model

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, *texts: torch.Tensor) -> torch.Tensor:
        return self.model(sample, timestep, texts[::2], texts[1::2], return_dict=False)[0]


class ElasticConditionerWrapper(nn.Module):
    """adaLN-single of an elastic DiT: `timestep (B,) → modulation (B, 6L + 2, D)`."""

    def __init__(self, model: ElasticDiTTransformer2DModel):
        super().__init__()
        self.modulation = model.modulation

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        return self.modulation(timestep)


class TextConditionerWrapper(nn.Module):
    """`(text_0 (B, T_0, E_0), mask_0 (B, T_0), …) → text (B, T, E), text_mask (B, T)`, T = T_0 + T_1 + … + the number
    of encoders.
    """

    def __init__(self, model: ElasticDiTTransformer2DModel):
        super().__init__()
        self.embedder = model.text_embedder

    def forward(self, *texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        text, mask = self.embedder(texts[::2], texts[1::2], texts[0].shape[0])
        return text, mask.flatten(1).to(text.dtype)


class ModulatedElasticDenoiserWrapper(nn.Module):
    """An elastic DiT without its conditioners: `(sample, modulation, text, text_mask) → prediction`."""

    def __init__(self, model: ElasticDiTTransformer2DModel):
        super().__init__()
        self.model = share(model)
        self.model.modulation = self.model.text_embedder = None

    def forward(
        self, sample: torch.Tensor, modulation: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor
    ) -> torch.Tensor:
        return self.model.denoise(sample, modulation, text, text_mask[:, None, None] > 0.5)[0]


def elastic_parts(
    model: ElasticDiTTransformer2DModel, size: tuple[int, int], batch: int, split: bool, text_tokens: Sequence[int]
) -> list[Part]:
    """The denoiser of a stand-alone elastic DiT, or its conditioners and denoiser.

    Args:
        size: H, W. batch: B of the examples. text_tokens: T_i of the examples.
    """
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(batch, model.config.in_channels, *size, generator=generator)
    timestep = {"timestep": torch.linspace(999, 1, batch)}
    texts = {}
    for index, (tokens, width) in enumerate(zip(text_tokens, model.config.text_dims)):
        texts[f"text_{index}"] = torch.randn(batch, tokens, width, generator=generator)
        # Examples with padding: rows of full and of half length.
        lengths = torch.tensor([tokens if row % 2 == 0 else max(1, tokens // 2) for row in range(batch)])
        texts[f"mask_{index}"] = (torch.arange(tokens) < lengths[:, None]).float()
    open_sizes = {name: {0: "batch"} for name in ("timestep", MODULATED)} | {
        "sample": {0: "batch", 2: "height", 3: "width"}
    }
    open_sizes |= {name: {0: "batch", 1: f"tokens_{name[-1]}"} for name in texts} | {
        name: {0: "batch", 1: "tokens"} for name in ("text", "text_mask")
    }
    if not split:
        inputs = {"sample": sample, **timestep, **texts}
        return [_part("transformer", "denoiser", ElasticDenoiserWrapper(model), inputs, ("prediction",), open_sizes)]
    conditioner = _part(
        "transformer", "conditioner", ElasticConditionerWrapper(model), timestep, (MODULATED,), open_sizes
    )
    text = _part(
        "transformer", "text_conditioner", TextConditionerWrapper(model), texts, ("text", "text_mask"), open_sizes
    )
    inputs = {"sample": sample, **conditioner.run(), **text.run()}
    return [
        conditioner,
        text,
        _part("transformer", "denoiser", ModulatedElasticDenoiserWrapper(model), inputs, ("prediction",), open_sizes),
    ]


# -------------------------------------------------------------------- VAE and text encoders


class DecoderWrapper(nn.Module):
    """`latents (B, C, H, W) → image (B, channels, H·f, W·f)` about [-1, 1]; the latents are those of the VAE, scaled
    and shifted back.
    """

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return vae_decode(self.vae, latents)


class EncoderWrapper(nn.Module):
    """`image (B, channels, H·f, W·f)` in [-1, 1] → latents (B, C, H, W)`, the mode of the VAE's posterior, before scale
    and shift.
    """

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return vae_encode(self.vae, image)


class TextEncoderWrapper(nn.Module):
    """`(input_ids (B, T) int64, attention_mask (B, T) float 0/1) → last_hidden_state (B, T, E)`, as
    [`ElasticDiTPipeline.encode_prompt`] reads it.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        accepted = inspect.signature(encoder.forward).parameters
        self.extra: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        self.language_model = "logits_to_keep" in accepted
        if self.language_model:  # its output is logits
            self.extra |= {"logits_to_keep": 1, "output_hidden_states": True}

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask.long(), **self.extra)
        return output.hidden_states[-1] if self.language_model else output.last_hidden_state


def vae_parts(vae: nn.Module, size: tuple[int, int], factor: int, channels: int, batch: int) -> list[Part]:
    """Decoder and encoder of a VAE.

    Args:
        size: H, W of the latents. factor: f. channels: C. batch: images of the examples.
    """
    latents = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))
    open_sizes = {name: {0: "batch", 2: f"{name}_height", 3: f"{name}_width"} for name in ("latents", "image")}
    decoder = _part("vae", "decoder", DecoderWrapper(vae), {"latents": latents}, ("image",), open_sizes)
    image = decoder.run()["image"]
    if tuple(image.shape[2:]) != (size[0] * factor, size[1] * factor):
        raise EdgeDiTError(
            f"The VAE makes images of {tuple(image.shape[2:])} from latents of {size}; {factor} times the size was "
            "expected."
        )
    return [
        decoder,
        _part("vae", "encoder", EncoderWrapper(vae), {"image": image.clamp(-1, 1)}, ("latents",), open_sizes),
    ]


def text_encoder_part(component: str, encoder: nn.Module, tokens: int, batch: int) -> Part:
    """A text encoder of transformers.

    Args:
        component: `"text_encoder"` or `"text_encoder_2"`. tokens: T. batch: prompts of the examples.
    """
    vocabulary = encoder.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([tokens if row % 2 == 0 else max(1, tokens // 2) for row in range(batch)])
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(tokens) < lengths[:, None]).float()}
    open_sizes = {name: {0: "batch", 1: "tokens"} for name in inputs}
    return _part(component, "text_encoder", TextEncoderWrapper(encoder), inputs, ("last_hidden_state",), open_sizes)


def _part(
    component: str,
    name: str,
    module: nn.Module,
    inputs: dict[str, torch.Tensor],
    outputs: tuple[str, ...],
    open_sizes: dict[str, dict[int, str]],
) -> Part:
    return Part(
        component, name, module.eval().requires_grad_(False), inputs, outputs, {key: open_sizes[key] for key in inputs}
    )


# -------------------------------------------------------------------- pipelines


def is_elastic(pipeline: Any) -> bool:
    """Whether a pipeline's denoiser is an elastic (text-to-image) one."""
    return hasattr(pipeline.transformer.config, "text_dims")


def text_lengths(pipeline: Any) -> list[int]:
    """T_i: tokens of a prompt that every text encoder of an elastic pipeline sees at most: a CLIP-type's window, else
    `max_sequence_length`.
    """
    lengths = []
    for index, _ in enumerate(pipeline.transformer.config.text_dims):
        encoder = getattr(pipeline, "text_encoder" if index == 0 else f"text_encoder_{index + 1}", None)
        config = None if encoder is None else encoder.config.get_text_config()
        window = getattr(config, "max_position_embeddings", None) or pipeline.config.max_sequence_length
        clip = str(getattr(config, "model_type", "")).startswith("clip")
        lengths.append(window if clip else min(window, pipeline.config.max_sequence_length))
    return lengths


def latent_size(pipeline: Any, resolution: tuple[int, int] | None) -> tuple[int, int]:
    """H, W of the latents of images of `resolution` (height, width in pixels; `None`: what the transformer was made
    for).

    Raises:
        EdgeDiTError: the network or the VAE has no such size.
    """
    config, factor = pipeline.transformer.config, pipeline.vae_scale_factor
    if resolution is None:
        return config.sample_size, config.sample_size
    unit = factor * config.patch_size * (2 if is_elastic(pipeline) else 1)
    if min(resolution) < 1 or any(pixels % unit for pixels in resolution):
        raise EdgeDiTError(
            f"The resolution is {resolution[0]}x{resolution[1]}; height and width must be positive multiples of {unit} "
            "pixels."
        )
    size = resolution[0] // factor, resolution[1] // factor
    native = (config.sample_size, config.sample_size)
    if size != native and (config.get("learned_position") or config.get("position_bias")):
        raise EdgeDiTError(
            f"The resolution is {resolution[0]}x{resolution[1]}, but this model's positions are learned for "
            f"{native[0] * factor}x{native[1] * factor}; leave it out."
        )
    return size


def pipeline_parts(
    pipeline: Any, *, split: bool = False, size: tuple[int, int] | None = None, batch: int = 2, images: int = 1
) -> list[Part]:
    """Every part that a pipeline needs, in the order in which an image passes them; the encoder of a VAE, which it does
    not need, last.

    Args:
        pipeline: an [`EdgeDiTPipeline`] or an [`ElasticDiTPipeline`] with plain float32 weights; a supernet gives its
            active sub-network.
        split: whether the transformer's conditioner is a part of its own.
        size: H, W of the latents ([`latent_size`]); default: what the transformer was made for.
        batch: B of the denoiser's examples. images: of the VAE's and the text encoders'.
    """
    model, size, parts = pipeline.transformer, size or latent_size(pipeline, None), []
    if is_elastic(pipeline):
        if model.active_subnet is not None:
            model = model.extract_subnet(model.active_subnet)
        lengths = text_lengths(pipeline)
        for name, tokens in zip(("text_encoder", "text_encoder_2"), lengths):
            if getattr(pipeline, name) is not None:
                parts.append(text_encoder_part(name, getattr(pipeline, name), tokens, images))
        parts += elastic_parts(model, size, batch, split, lengths)
    else:
        parts += edgedit_parts(model, size, batch, split)
    if pipeline.vae is not None:
        parts += vae_parts(pipeline.vae, size, pipeline.vae_scale_factor, model.config.in_channels, images)
    return parts
