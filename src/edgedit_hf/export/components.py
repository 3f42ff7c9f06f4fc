"""Exported parts as components of a diffusers pipeline: denoisers, VAEs and text encoders that ONNX Runtime or
ExecuTorch runs; what they share stands in [`export.exported`], the denoisers' calls in [`export.denoisers`].
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import BaseOutput

from ..errors import EdgeDiTError
from .denoisers import ExportedEdgeDiT, ExportedElasticDiT
from .exported import ExportedComponent


@dataclass
class AutoencoderOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor`): Images `(B, channels, H·f, W·f)`, or latents `(B, C, H, W)`.
    """

    sample: torch.Tensor


class ExportedAutoencoder(ExportedComponent):
    """A VAE in a runtime: `decode` and `encode`. Its config is the VAE's; `size` holds height and width of the latents
    (`None`: any).
    """

    PARTS = ("decoder", "encoder")

    def _run(self, part: str, name: str, values: torch.Tensor) -> torch.Tensor:
        frame = values[:, :, 0] if values.ndim == 5 else values  # a video VAE's callers have one frame
        (result,) = self.run(part, {name: frame}, pad=True)
        result = result.to(values.device, values.dtype)
        return result.unsqueeze(2) if values.ndim == 5 else result

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> AutoencoderOutput | tuple[torch.Tensor]:
        """Latents `(B, C, H, W)`, scaled and shifted back, → images about [-1, 1]."""
        size = self.config.get("size")
        if size and tuple(latents.shape[-2:]) != tuple(size):
            raise EdgeDiTError(
                f"The latents are {latents.shape[-2]} × {latents.shape[-1]}; this decoder was exported for {size[0]} × "
                f"{size[1]}."
            )
        sample = self._run("decoder", "latents", latents)
        return AutoencoderOutput(sample=sample) if return_dict else (sample,)

    def encode(self, images: torch.Tensor, return_dict: bool = True) -> AutoencoderOutput | tuple[torch.Tensor]:
        """Images in [-1, 1] → latents, the mode of the posterior, before scale and shift."""
        sample = self._run("encoder", "image", images)
        return AutoencoderOutput(sample=sample) if return_dict else (sample,)


@dataclass
class TextEncoderOutput(BaseOutput):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, T, E)`): Hidden states of the tokens.
    """

    last_hidden_state: torch.Tensor


class ExportedTextEncoder(ExportedComponent):
    """A text encoder in a runtime. Its config is that of transformers; what the export adds stands in its field
    `edgedit_export`.
    """

    PARTS = ("text_encoder",)

    def __init__(self, **config: Any):
        from transformers import AutoConfig

        super().__init__(**config["edgedit_export"])
        values = dict(config)
        self._text_config = AutoConfig.for_model(values.pop("model_type"), **values)

    @property
    def config(self) -> Any:
        """The text encoder's own config."""
        return self._text_config

    def save_config(self, save_directory: str | os.PathLike) -> None:
        """Write `config.json`."""
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        (target / self.config_name).write_text(
            json.dumps(self.config.to_dict(), indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8"
        )

    def _check(self) -> None:
        """The file must say that it is a text encoder of this package's export."""
        session = self.sessions["text_encoder"]
        if "config" not in session.metadata:
            raise EdgeDiTError(f"{session.path} was not written by this package's export.")

    def get_input_embeddings(self) -> Any:
        """Only `num_embeddings`, the size of the vocabulary."""
        return FrozenDict(num_embeddings=self.export["vocabulary"])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> TextEncoderOutput:
        """Tokens `(B, T)` and which of them count `(B, T)` → hidden states `(B, T, E)`."""
        tokens = input_ids.shape[1]
        length = self.export["tokens"]
        if length is not None and tokens > length:
            raise EdgeDiTError(
                f"The prompt has {tokens} tokens, but this text encoder was exported for {length}; shorten it."
            )
        ids, mask = input_ids.cpu(), attention_mask.cpu().float()
        if length is not None:
            ids = torch.nn.functional.pad(ids, (0, length - tokens))
            mask = torch.nn.functional.pad(mask, (0, length - tokens))
        (states,) = self.run("text_encoder", {"input_ids": ids, "attention_mask": mask}, pad=True)
        return TextEncoderOutput(last_hidden_state=states[:, :tokens].to(input_ids.device))

    __call__ = forward


class OnnxEdgeDiTTransformer2DModel(ExportedEdgeDiT):
    """An EdgeDiT denoiser in ONNX Runtime; see [`ExportedEdgeDiT`]. Load it with
    [`~ExportedComponent.from_pretrained`].
    """

    FORMAT = "onnx"


class ExecutorchEdgeDiTTransformer2DModel(ExportedEdgeDiT):
    """An EdgeDiT denoiser in ExecuTorch; see [`ExportedEdgeDiT`].

    `num_threads` is the size of ExecuTorch's thread pool, which the whole process shares: setting it here sets it for
    every such component.
    """

    FORMAT = "executorch"


class OnnxElasticDiTTransformer2DModel(ExportedElasticDiT):
    """An elastic denoiser in ONNX Runtime; see [`ExportedElasticDiT`]."""

    FORMAT = "onnx"


class ExecutorchElasticDiTTransformer2DModel(ExportedElasticDiT):
    """An elastic denoiser in ExecuTorch; see [`ExportedElasticDiT`]."""

    FORMAT = "executorch"


class OnnxAutoencoder(ExportedAutoencoder):
    """A VAE in ONNX Runtime; see [`ExportedAutoencoder`]."""

    FORMAT = "onnx"


class ExecutorchAutoencoder(ExportedAutoencoder):
    """A VAE in ExecuTorch; see [`ExportedAutoencoder`]."""

    FORMAT = "executorch"


class OnnxTextEncoder(ExportedTextEncoder):
    """A text encoder in ONNX Runtime; see [`ExportedTextEncoder`]."""

    FORMAT = "onnx"


class ExecutorchTextEncoder(ExportedTextEncoder):
    """A text encoder in ExecuTorch; see [`ExportedTextEncoder`]."""

    FORMAT = "executorch"


COMPONENTS: dict[tuple[str, str], type[ExportedComponent]] = {  # (format, kind) → class
    ("onnx", "edgedit"): OnnxEdgeDiTTransformer2DModel,
    ("onnx", "elastic"): OnnxElasticDiTTransformer2DModel,
    ("onnx", "vae"): OnnxAutoencoder,
    ("onnx", "text_encoder"): OnnxTextEncoder,
    ("executorch", "edgedit"): ExecutorchEdgeDiTTransformer2DModel,
    ("executorch", "elastic"): ExecutorchElasticDiTTransformer2DModel,
    ("executorch", "vae"): ExecutorchAutoencoder,
    ("executorch", "text_encoder"): ExecutorchTextEncoder,
}
