"""Extractors around networks that others trained: ADM's Inception, any torch module, any vision model of transformers.

Shapes: n images `[n, C, H, W]` in [-1, 1], features `[n, D]` float32. What a network sees is said by its class: how
images are resized decides a distance as much as the weights do.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import hub
from ..data.datasets import to_bytes
from ..errors import EdgeDiTError
from ..files import ask_nothing, file_sha256, read_json, weights_hash
from .extractors import Extractor, FeatureExtractor, check_images

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # the name ends with the start of its SHA-256
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
SPATIAL_CHANNELS = 7  # of 192, which makes 7 · 17 · 17 = 2023 features, about as many as pooled ones
DONE = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
OTHER = ("crop_pct", "keep_aspect_ratio", "rescale_offset", "include_top")  # what image processors do besides
RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # of Pillow, as image processors name them


# ------------------------------------------------------------------ Inception


class InceptionExtractor:
    """ADM's Inception-v3 (2048 pooled features) as torch-fidelity ports it: what an "FID" without more is computed in.

    It needs torch-fidelity with torchvision, and the weights in torch's hub folder, and downloads nothing. This
    package's tests run it on random weights of the same architecture, not on torch-fidelity's, which is not among its
    requirements.

    Images are rounded to bytes, grey ones repeated, and resized to 299 × 299 by bilinear interpolation without
    antialiasing, as ADM's TensorFlow graph does; published figures rest on that.

    Args:
        device: where the network runs.
        network: another network in its place, with torchvision's names (`Mixed_6d.branch1x1`, `fc`): bytes
            `[n, 3, H, W]` to features `[n, 2048]`.
    """

    name = "inception"
    width = 2048

    def __init__(self, device: str | torch.device = "cpu", network: nn.Module | None = None) -> None:
        if network is None:
            network, self.hash = self._torch_fidelity()
        else:
            self.hash = weights_hash(network.state_dict())
        self.network = network.to(device).eval().requires_grad_(False)
        self._device = device

    @staticmethod
    def _torch_fidelity() -> tuple[nn.Module, str]:
        path = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)
        if not path.is_file():
            raise EdgeDiTError(
                f"The Inception weights {path} do not exist. Download {INCEPTION_URL} to that place, or use a "
                "classifier trained on the data (train_classifier)."
            )
        found = file_sha256(path)[:16]
        if not found.startswith(path.stem.rpartition("-")[2]):
            raise EdgeDiTError(
                f"{path} has the SHA-256 {found}…, which is not the one its name gives; download it anew."
            )
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias=False), found
        except ImportError as error:
            raise EdgeDiTError(f"Inception needs torch-fidelity and torchvision ({error}); install both.") from error

    @torch.inference_mode()
    def features_and_spatial(self, images: torch.Tensor, batch_size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled features `[n, 2048]` and spatial ones `[n, 2023]` of images `[n, 1 or 3, H, W]` in one pass.

        The spatial features, which sFID is computed in, are the first seven channels of `mixed_6/conv`: the rectified
        end of the 1×1 branch of torchvision's `Mixed_6d`, flattened as TensorFlow has it, channels last.
        """
        check_images(images, (images.shape[1], *images.shape[-2:]))
        pooled, spatial = [], []

        def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            spatial.append(output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float().cpu())

        handle = self.network.Mixed_6d.branch1x1.register_forward_hook(keep)
        try:
            for part in images.split(batch_size):
                pixels = to_bytes(part).expand(-1, 3, -1, -1)
                pooled.append(self.network(pixels.to(self._device)).float().cpu())
        finally:
            handle.remove()
        return torch.cat(pooled), torch.cat(spatial)

    def features(self, images: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
        """Features `[n, 2048]` float32 of images `[n, 1 or 3, H, W]` in [-1, 1]."""
        return self.features_and_spatial(images, batch_size)[0]

    def spatial(self, images: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
        """Spatial features `[n, 2023]` float32, see [`~InceptionExtractor.features_and_spatial`]."""
        return self.features_and_spatial(images, batch_size)[1]

    @torch.inference_mode()
    def head(self, features: torch.Tensor) -> torch.Tensor:
        """Logits `[n, 1008]` of features, without the last layer's bias, as ADM's inception score uses them."""
        return features @ self.network.fc.weight.float().cpu().T

    def logits(self, images: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
        """Logits `[n, 1008]` of images, see [`~InceptionExtractor.head`]."""
        return self.head(self.features(images, batch_size))


# ------------------------------------------------------------------ any module, any vision model of transformers


class ModuleExtractor:
    """Features of any torch module.

    Args:
        module: images `[n, C, H, W]` float32 in [-1, 1], as they are, to features `[n, width]`. It resizes and
            normalises as it needs to.
        name: what a metric calls it.
        width: features of an image.
        device: where it runs.
        settings: plain values that decide about the features beside the weights; they are part of the hash.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        width: int,
        device: str | torch.device = "cpu",
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.name, self.width = name, width
        weights = weights_hash(module.state_dict())
        whole = json.dumps([weights, settings], sort_keys=True).encode()
        self.hash = weights if settings is None else hashlib.sha256(whole).hexdigest()[:16]
        self._module = module.to(device).eval().requires_grad_(False)
        self._device = device

    @torch.inference_mode()
    def features(self, images: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
        """Features `[n, width]` float32 of images `[n, C, H, W]` in [-1, 1]; another number of them is an error."""
        check_images(images, (images.shape[1], *images.shape[-2:]))
        found = torch.cat(
            [self._module(part.float().to(self._device)).float().cpu() for part in images.split(batch_size)]
        )
        if tuple(found.shape) != (len(images), self.width):
            raise EdgeDiTError(
                f"The extractor {self.name} gave features of shape {tuple(found.shape)} for {len(images)} images; "
                f"expected {(len(images), self.width)}."
            )
        return found


class Preprocessing(nn.Module):
    """What the image processor of a transformers model does, by its `preprocessor_config.json`, on tensors:
    transformers' own needs torchvision.

    Grey images are repeated to three channels. Resizing keeps the aspect ratio where the file says `shortest_edge`; it
    is antialiased where it shrinks, as Pillow's is. A file that asks for something else is refused.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        path = folder / "preprocessor_config.json"
        values = read_json(path, "the model's image processor")
        try:
            self.settings = self._settings(values)
        except (KeyError, TypeError, ValueError) as error:
            raise EdgeDiTError(f"{path} describes no image processor that is known here ({error!r}).") from None

    @staticmethod
    def _settings(values: dict[str, Any]) -> dict[str, Any]:
        more = [name for name, on in values.items() if on and (name in OTHER or name[:3] == "do_" and name not in DONE)]
        if more or not values.get("do_rescale", True):
            raise ValueError(f"{', '.join(more) or 'no rescaling'}")
        if not 0.0039 < float(values.get("rescale_factor", 1 / 255)) < 0.00393:
            raise ValueError("another rescale_factor than 1/255")
        found: dict[str, Any] = {"resize": None, "crop": None, "mode": RESAMPLING[int(values.get("resample", 3))]}
        if values.get("do_resize", True):
            size = values["size"]
            size = {"shortest_edge": size} if isinstance(size, int) else size
            edge = size.get("shortest_edge")
            found["resize"] = int(edge) if edge else [int(size["height"]), int(size["width"])]
        if values.get("do_center_crop", False):
            size = values["crop_size"]
            found["crop"] = [size, size] if isinstance(size, int) else [int(size["height"]), int(size["width"])]
        normal = values.get("do_normalize", True)
        for name, neutral in (("image_mean", 0.0), ("image_std", 1.0)):
            numbers = values[name] if normal else neutral
            found[name] = [float(number) for number in (numbers if isinstance(numbers, list) else [numbers] * 3)]
        return found

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[n, 1 or 3, H, W]` in [-1, 1] as the model takes them, `[n, 3, h, w]`."""
        size, crop, (height, width) = self.settings["resize"], self.settings["crop"], images.shape[-2:]
        pixels = images.expand(-1, 3, -1, -1) / 2 + 0.5
        if size is not None:
            short = min(height, width)
            size = [int(side * size / short) for side in (height, width)] if isinstance(size, int) else size
            if size != [height, width]:
                mode = self.settings["mode"]
                smooth = {} if mode == "nearest" else {"align_corners": False, "antialias": True}
                pixels = F.interpolate(pixels, size, mode=mode, **smooth).clamp(0, 1)
        if crop is not None:
            top, left = ((side - wanted) // 2 for side, wanted in zip(pixels.shape[-2:], crop))
            if min(top, left) < 0:
                raise EdgeDiTError(f"The images are {height} × {width}, too small to be cropped to {crop}.")
            pixels = pixels[..., top : top + crop[0], left : left + crop[1]]
        mean, std = (pixels.new_tensor(self.settings[name])[:, None, None] for name in ("image_mean", "image_std"))
        return (pixels - mean) / std


def load_vision_model(path: str | Path) -> tuple[Path, nn.Module]:
    """Folder and model (float32) of a transformers model, by its folder or name on the Hub, see [`hub`]; code in it
    never runs.

    Raises:
        EdgeDiTError: it cannot be loaded, or lacks weights (those of a pooler apart, which are not used).
    """
    import transformers

    folder = hub.component_folder(path)
    if not (folder / "config.json").is_file():
        raise EdgeDiTError(
            f"There is no model in {path}: {folder / 'config.json'} does not exist; give the folder or the Hub id "
            "(organisation/name) of a vision model of transformers."
        )
    try:
        with ask_nothing():
            model, info = transformers.AutoModel.from_pretrained(
                folder, trust_remote_code=False, output_loading_info=True, dtype=torch.float32
            )
    except Exception as error:  # transformers, huggingface_hub and safetensors each have their own
        raise EdgeDiTError(f"The model {path} cannot be loaded: {' '.join(str(error).split())[:500]}") from error
    if missing := sorted(name for name in info["missing_keys"] if "pooler" not in name):
        raise EdgeDiTError(
            f"The weights of {path} lack {len(missing)} that its config asks for, such as {missing[0]!r}; give a model "
            "whose config and weights belong together."
        )
    return folder, model.eval().requires_grad_(False)


class _Vision(nn.Module):
    def __init__(self, preprocessing: Preprocessing, model: nn.Module) -> None:
        super().__init__()
        self.preprocessing, self.model = preprocessing, model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = self.preprocessing(images)
        if hasattr(self.model, "get_image_features"):  # CLIP and its like: what is compared with texts
            return self.model.get_image_features(pixel_values=pixels).pooler_output
        states = self.model(pixel_values=pixels).last_hidden_state
        return states.mean((2, 3)) if states.ndim == 4 else states[:, 0]


class TransformersExtractor(ModuleExtractor):
    """Features of a vision model of transformers: `TransformersExtractor("facebook/dinov2-small")` gives those of
    FD-DINOv2 with the small network.

    The last layer's first token (of ViT, DINOv2 the class token), the mean over the map of a convolutional network, or
    the projected embedding of CLIP and its like. Images are prepared as [`Preprocessing`] says. The hash is of weights,
    preparation, and what the config has beside transformers' defaults.

    Args:
        path: folder or name on the Hub, see [`hub`].
        device: where it runs.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        folder, model = load_vision_model(path)
        preprocessing = Preprocessing(folder)
        module = _Vision(preprocessing, model)
        try:
            with torch.inference_mode():
                width = module(torch.zeros(1, 3, 224, 224)).shape[-1]
        except (AttributeError, TypeError, IndexError, ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())[:300]
            raise EdgeDiTError(
                f"{path} is a {type(model).__name__}, which gives no features of images ({said})."
            ) from error
        name = Path(str(path).rstrip("/")).name.partition("@")[0]
        name += "-transformers" if name == InceptionExtractor.name else ""  # a metric of that name is ADM's
        decisive = json.loads(model.config.to_json_string(use_diff=True))
        for where_from in ("_name_or_path", "transformers_version", "architectures", "dtype"):
            decisive.pop(where_from, None)
        super().__init__(module, name, width, device, {**preprocessing.settings, "config": decisive})


def open_extractor(name: str, device: str | torch.device = "cpu") -> Extractor:
    """The extractor that a command line names: `inception`, the folder of a classifier trained on the data, or the
    folder or Hub id of a vision model of transformers.
    """
    if name == "inception":
        return InceptionExtractor(device)
    if Path(name, "extractor.json").is_file():
        return FeatureExtractor.load(name)
    return TransformersExtractor(name, device)
