"""OnnxEdgeDiTTransformer2DModel: an exported denoiser as a component of a diffusers pipeline, run by ONNX Runtime.

The component folder holds `config.json` (the denoiser's config plus `precision` and `batch`) and `onnx/model.onnx` (with
`onnx/model.onnx.data` if the weights are big). Importing this module does not load onnxruntime; making a session does.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from ..errors import EdgeDiTError
from ..genotype import Genotype
from ..latency.runners import session_options

if TYPE_CHECKING:
    import onnxruntime

MODEL_FILE = "onnx/model.onnx"


class OnnxEdgeDiTTransformer2DModel(ConfigMixin):
    r"""
    A denoiser in ONNX Runtime with the call signature of [`EdgeDiTTransformer2DModel`]. Load it with [`~from_pretrained`].

    Inputs may be on any device and of any float type: they are brought to the CPU as float32, and the prediction goes back to the
    device and type of the input. `device` and `dtype` are those of the session: CPU, float32.

    Args:
        sample_size, patch_size, in_channels, hidden_size, num_layers, num_attention_heads, mlp_ratio, num_classes, learn_sigma,
            prediction_type, norm_eps, layers and the fields after it: as in [`EdgeDiTTransformer2DModel`].
        precision (`str`, defaults to `"fp32"`): `"fp32"` or `"int8"`.
        batch (`str` or `int`, defaults to `"dynamic"`): `"dynamic"`, or the only batch that the file takes.
    """

    config_name = "config.json"

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
        precision: str = "fp32",
        batch: str | int = "dynamic",
    ):
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.path: Path | None = None
        self.session: onnxruntime.InferenceSession | None = None
        self.provider = "CPUExecutionProvider"
        self.num_threads: int | None = None

    # ---------------------------------------------------------------- loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str | None = None,
        provider: str = "CPUExecutionProvider",
        num_threads: int | None = None,
        cache_dir: str | os.PathLike | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> OnnxEdgeDiTTransformer2DModel:
        """Open an exported denoiser.

        Args:
            pretrained_model_name_or_path: component folder, pipeline folder or Hub id.
            subfolder: the component's folder within it, e.g. `"transformer"`.
            provider: ONNX Runtime execution provider.
            num_threads: intra-op threads; default ONNX Runtime's choice. [`~set_threads`] changes it later.
            cache_dir, revision, token, local_files_only: as in diffusers, for Hub ids.

        Raises:
            EdgeDiTError: the folder has no ONNX file, config and file describe different networks, or ONNX Runtime refuses the file
                or the provider.
        """
        root = Path(pretrained_model_name_or_path)
        if not root.is_dir():
            from huggingface_hub import snapshot_download

            within = f"{subfolder}/" if subfolder else ""
            root = Path(
                snapshot_download(
                    str(pretrained_model_name_or_path),
                    allow_patterns=[f"{within}{cls.config_name}", f"{within}onnx/*"],
                    cache_dir=cache_dir,
                    revision=revision,
                    token=token,
                    local_files_only=local_files_only,
                )
            )
        folder = root / subfolder if subfolder else root
        path = folder / MODEL_FILE
        if not path.is_file() or not (folder / cls.config_name).is_file():
            raise EdgeDiTError(
                f"{folder} does not hold {cls.config_name} and {MODEL_FILE}; give the transformer folder of an exported pipeline "
                "(optimum-cli export edgedit … --format onnx), or the pipeline's folder with subfolder='transformer'."
            )
        model = cls.from_config(cls.load_config(folder))
        model.path, model.provider, model.num_threads = path, provider, num_threads
        model._open()
        return model

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write the component folder: config.json and a copy of the ONNX files."""
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        self.save_config(target)
        source = self._loaded_path().parent
        folder = target / "onnx"
        if folder.resolve() != source.resolve():
            folder.mkdir(exist_ok=True)
            for name in ("model.onnx", "model.onnx.data"):
                if (source / name).is_file():
                    shutil.copyfile(source / name, folder / name)

    def set_threads(self, num_threads: int | None) -> None:
        """Open the session anew with this many intra-op threads (`None`: ONNX Runtime's choice)."""
        self._loaded_path()
        self.num_threads = num_threads
        self._open()

    def _loaded_path(self) -> Path:
        if self.path is None:
            raise EdgeDiTError("This component has a config but no ONNX file; make it with from_pretrained().")
        return self.path

    def _open(self) -> None:
        import onnxruntime

        available = onnxruntime.get_available_providers()
        if self.provider not in available:
            raise EdgeDiTError(
                f"The provider {self.provider!r} is not in this onnxruntime; it offers {', '.join(available)}."
            )
        options = session_options(self.num_threads)
        try:
            session = onnxruntime.InferenceSession(str(self.path), options, providers=[self.provider])
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise EdgeDiTError(f"ONNX Runtime cannot load {self.path}: {error}. Export it again.") from error
        genotype = session.get_modelmeta().custom_metadata_map.get("edgedit.genotype")
        if genotype is None:
            raise EdgeDiTError(
                f"{self.path} has no edgedit.genotype in its metadata; it was not written by this package's export."
            )
        inside, beside = Genotype.from_json(genotype), Genotype.from_layers(self.config.layers, self.config.hidden_size)
        if inside != beside:
            raise EdgeDiTError(
                f"{self.path} holds the genotype {inside.hash}, but its config.json describes {beside.hash}; the two files do not "
                "belong together: export again."
            )
        self.session = session

    # ---------------------------------------------------------------- use

    @property
    def device(self) -> torch.device:
        """Where the session computes."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the session's inputs and outputs."""
        return torch.float32

    @property
    def metadata(self) -> dict[str, Any]:
        """What the file says about itself: genotype, config, weights' hash, precision, batch, versions."""
        self._loaded_path()
        found = {}
        for key, value in self.session.get_modelmeta().custom_metadata_map.items():
            if key.startswith("edgedit."):
                name = key.removeprefix("edgedit.")
                found[name] = json.loads(value) if name in ("genotype", "config", "versions") else value
        return found

    def __call__(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Noisy input, of the exported size.
            timestep (`torch.Tensor` of shape `(batch,)` or a scalar): Timestep on the scale 0 … 1000.
            class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): Classes; `num_classes` means "no class".
            return_dict (`bool`, defaults to `True`): Whether to return a [`Transformer2DModelOutput`].

        Returns:
            The prediction, of shape `(batch, out_channels, height, width)`.
        """
        self._loaded_path()
        batch, size = hidden_states.shape[0], self.config.sample_size
        expected = (self.config.in_channels, size, size)
        if tuple(hidden_states.shape[1:]) != expected:
            raise EdgeDiTError(
                f"The input has shape {tuple(hidden_states.shape)}; this artefact takes (batch, {', '.join(map(str, expected))})."
            )
        if self.config.batch != "dynamic" and batch != self.config.batch:
            raise EdgeDiTError(
                f"The batch is {batch}, but this artefact was exported for batch {self.config.batch} (guidance doubles the images' "
                "number); export it with --batch dynamic or with this batch."
            )
        if (class_labels is None) != (self.config.num_classes == 0):
            given = "no class_labels were given" if class_labels is None else "class_labels were given"
            raise EdgeDiTError(f"The artefact has num_classes={self.config.num_classes}, but {given}.")
        timestep = torch.as_tensor(timestep)
        inputs = {
            "sample": hidden_states.detach().to("cpu", torch.float32).numpy(),
            "timestep": timestep.to("cpu", torch.float32).expand(batch).numpy(),
        }
        if class_labels is not None:
            labels = class_labels.to("cpu", torch.int64)
            if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) <= self.config.num_classes):
                raise EdgeDiTError(
                    f"class_labels span {int(labels.min())} … {int(labels.max())}; they must be from 0 to {self.config.num_classes}."
                )
            inputs["class_labels"] = labels.numpy()
        (prediction,) = self.session.run(None, {name: np.ascontiguousarray(value) for name, value in inputs.items()})
        sample = torch.from_numpy(prediction).to(hidden_states.device, hidden_states.dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    forward = __call__
