"""CLIPScore: how well images show their prompts, by any CLIP of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import EdgeDiTError
from ..files import weights_hash
from .extractors import check_images
from .networks import Preprocessing, load_vision_model


class ClipScorer:
    """CLIPScore (Hessel et al. 2021) in torchmetrics' scale: 100 · max(cos, 0) of the embeddings of image and text.

    The cosine is computed here: torchmetrics 1.9 takes what `get_image_features` returned before transformers 5, and a
    processor whose image part needs torchvision. Images are prepared as [`Preprocessing`] says; prompts longer than
    the text model takes are cut off at its end, and those of SigLIP, which sees no mask, filled up to it.

    Args:
        path: folder or name on the Hub of a CLIP (or another model with `get_image_features` and `get_text_features`)
            with its tokenizer, see [`hub`].
        device: where it runs.

    Attributes:
        name: what a metric calls it.
        hash: of its weights.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        import transformers

        folder, model = load_vision_model(path)
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise EdgeDiTError(f"{path} is a {type(model).__name__}, which embeds no texts; CLIPScore needs a CLIP.")
        self._preprocessing = Preprocessing(folder)
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # every tokenizer has its own
            said = " ".join(str(error).split())[:300]
            raise EdgeDiTError(f"The tokenizer of {path} cannot be loaded: {said}") from error
        self._length = model.config.text_config.max_position_embeddings
        self._whole = model.config.model_type.startswith("siglip")  # its embedding is of the last token, padded or not
        self.name, self.hash = Path(str(path).rstrip("/")).name, weights_hash(model.state_dict())
        self._model, self._device = model.to(device), device

    @torch.inference_mode()
    def scores(self, images: torch.Tensor, prompts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
        """The score of every image `[n, C, H, W]` in [-1, 1] with its prompt, `[n]` float32 in [0, 100]."""
        check_images(images, (images.shape[1], *images.shape[-2:]))
        if len(images) != len(prompts):
            raise EdgeDiTError(f"There are {len(images)} images and {len(prompts)} prompts; give one an image.")
        found = []
        for start in range(0, len(images), batch_size):
            part, texts = images[start : start + batch_size], list(prompts[start : start + batch_size])
            padding = "max_length" if self._whole else True
            tokens = self._tokenizer(
                texts, padding=padding, truncation=True, max_length=self._length, return_tensors="pt"
            ).to(self._device)
            mask = None if self._whole else tokens["attention_mask"]
            pixels = self._preprocessing(part.float().to(self._device))
            shown = self._model.get_image_features(pixel_values=pixels).pooler_output
            said = self._model.get_text_features(tokens["input_ids"], mask).pooler_output
            found.append(100 * torch.cosine_similarity(shown, said).clamp(min=0).float().cpu())
        return torch.cat(found)
