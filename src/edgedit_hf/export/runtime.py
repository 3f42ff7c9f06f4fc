"""Exported denoisers as components of a diffusers pipeline: OnnxEdgeDiTTransformer2DModel, run by ONNX Runtime, and
ExecutorchEdgeDiTTransformer2DModel, run by ExecuTorch.

A component folder holds `config.json` (the denoiser's config plus `precision` and `batch`) and the artefact: `onnx/model.onnx` (with
`onnx/model.onnx.data` if the weights are big) or `executorch/model.pte`. Importing this module loads neither runtime; opening a file does.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from ..errors import EdgeDiTError
from ..genotype import Genotype
from ..latency.runners import ExecutorchSession, session_options

if TYPE_CHECKING:
    import onnxruntime


class ExportedTransformer(ConfigMixin):
    r"""
    A denoiser in a runtime with the call signature of [`EdgeDiTTransformer2DModel`]: what the components of all runtimes share.

    Inputs may be on any device and of any float type: they are brought to the CPU as float32, and the prediction goes back to the
    device and type of the input. `device` and `dtype` are those of the runtime: CPU, float32.

    A runtime's class states its files and implements `_open`, `_run` and `_description`.

    Args:
        sample_size, patch_size, in_channels, hidden_size, num_layers, num_attention_heads, mlp_ratio, num_classes, learn_sigma,
            prediction_type, norm_eps, layers and the fields after it: as in [`EdgeDiTTransformer2DModel`].
        precision (`str`, defaults to `"fp32"`): `"fp32"`, `"int8"` or `"int4"`.
        batch (`str` or `int`, defaults to `"dynamic"`): `"dynamic"`, or the batch of the file; calls then take multiples of it.
    """

    FORMAT: str  # as in `optimum-cli export edgedit --format`
    MODEL_FILE: str  # the artefact, within the component's folder
    BESIDE: tuple[str, ...] = ()  # files that may stand beside it

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
        self.num_threads: int | None = None
        self._open_options: dict[str, Any] = {}

    # ---------------------------------------------------------------- what a runtime implements

    def _open(self, **options: Any) -> None:
        """Open `self.path` for `self.num_threads`."""
        raise NotImplementedError

    def _run(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """One forward of contiguous inputs on the CPU, by name and in the order of the signature."""
        raise NotImplementedError

    def _description(self) -> dict[str, str]:
        """What the file says about itself, as text."""
        raise NotImplementedError

    # ---------------------------------------------------------------- loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str | None = None,
        num_threads: int | None = None,
        cache_dir: str | os.PathLike | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **options: Any,
    ):
        """Open an exported denoiser.

        Args:
            pretrained_model_name_or_path: component folder, pipeline folder or Hub id.
            subfolder: the component's folder within it, e.g. `"transformer"`.
            num_threads: threads of the runtime; default its own choice. [`~set_threads`] changes it later.
            cache_dir, revision, token, local_files_only: as in diffusers, for Hub ids.
            options: of the runtime; ONNX Runtime has `provider`, its execution provider (default `"CPUExecutionProvider"`).

        Raises:
            EdgeDiTError: the folder has no artefact, config and artefact describe different networks, or the runtime is missing or refuses the
                file or an option.
        """
        root = Path(pretrained_model_name_or_path)
        if not root.is_dir():
            from huggingface_hub import snapshot_download

            within = f"{subfolder}/" if subfolder else ""
            root = Path(
                snapshot_download(
                    str(pretrained_model_name_or_path),
                    allow_patterns=[f"{within}{cls.config_name}", f"{within}{Path(cls.MODEL_FILE).parent}/*"],
                    cache_dir=cache_dir,
                    revision=revision,
                    token=token,
                    local_files_only=local_files_only,
                )
            )
        folder = root / subfolder if subfolder else root
        path = folder / cls.MODEL_FILE
        if not path.is_file() or not (folder / cls.config_name).is_file():
            raise EdgeDiTError(
                f"{folder} does not hold {cls.config_name} and {cls.MODEL_FILE}; give the transformer folder of an exported pipeline "
                f"(optimum-cli export edgedit … --format {cls.FORMAT}), or the pipeline's folder with subfolder='transformer'."
            )
        model = cls.from_config(cls.load_config(folder))
        model.path, model.num_threads, model._open_options = path, num_threads, options
        model._open(**options)
        model._check_genotype()
        return model

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write the component folder: config.json and a copy of the artefact."""
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        self.save_config(target)
        source = self._loaded_path()
        folder = (target / self.MODEL_FILE).parent
        if folder.resolve() != source.parent.resolve():
            folder.mkdir(exist_ok=True)
            for name in (source.name, *self.BESIDE):
                if (source.parent / name).is_file():
                    shutil.copyfile(source.parent / name, folder / name)

    def set_threads(self, num_threads: int | None) -> None:
        """Open the file anew for this many threads (`None`: the runtime's choice)."""
        self._loaded_path()
        self.num_threads = num_threads
        self._open(**self._open_options)

    def _loaded_path(self) -> Path:
        if self.path is None:
            raise EdgeDiTError(f"This component has a config but no {Path(self.MODEL_FILE).suffix} file; make it with from_pretrained().")
        return self.path

    def _check_genotype(self) -> None:
        genotype = self._description().get("genotype")
        if genotype is None:
            raise EdgeDiTError(f"{self.path} has no edgedit genotype in its metadata; it was not written by this package's export.")
        inside, beside = Genotype.from_json(genotype), Genotype.from_layers(self.config.layers, self.config.hidden_size)
        if inside != beside:
            raise EdgeDiTError(
                f"{self.path} holds the genotype {inside.hash}, but its config.json describes {beside.hash}; the two files do not "
                "belong together: export again."
            )

    # ---------------------------------------------------------------- use

    @property
    def device(self) -> torch.device:
        """Where the runtime computes."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the runtime's inputs and outputs."""
        return torch.float32

    @property
    def metadata(self) -> dict[str, Any]:
        """What the file says about itself: genotype, config, weights' hash, precision, batch, versions."""
        self._loaded_path()
        found = self._description()
        return {key: json.loads(value) if value.startswith(("{", "[")) else value for key, value in found.items()}

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
        step = batch if self.config.batch == "dynamic" else self.config.batch
        if batch == 0 or batch % step:
            raise EdgeDiTError(
                f"The batch is {batch}, but this artefact was exported for batch {self.config.batch} and takes multiples of it (guidance "
                "doubles the images' number); export it for a batch that divides this one (--batch)."
            )
        if (class_labels is None) != (self.config.num_classes == 0):
            given = "no class_labels were given" if class_labels is None else "class_labels were given"
            raise EdgeDiTError(f"The artefact has num_classes={self.config.num_classes}, but {given}.")
        inputs = {
            "sample": hidden_states.detach().to("cpu", torch.float32).contiguous(),
            "timestep": torch.as_tensor(timestep).to("cpu", torch.float32).expand(batch).contiguous(),
        }
        if class_labels is not None:
            labels = class_labels.to("cpu", torch.int64)
            if not (0 <= int(labels.min()) and int(labels.max()) <= self.config.num_classes):
                raise EdgeDiTError(
                    f"class_labels span {int(labels.min())} … {int(labels.max())}; they must be from 0 to {self.config.num_classes}."
                )
            inputs["class_labels"] = labels.contiguous()
        parts = [self._run({name: value[i : i + step] for name, value in inputs.items()}) for i in range(0, batch, step)]
        sample = torch.cat(parts).to(hidden_states.device, hidden_states.dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    forward = __call__


class OnnxEdgeDiTTransformer2DModel(ExportedTransformer):
    """A denoiser in ONNX Runtime; see [`ExportedTransformer`]. Load it with [`~ExportedTransformer.from_pretrained`]."""

    FORMAT = "onnx"
    MODEL_FILE = "onnx/model.onnx"
    BESIDE = ("model.onnx.data",)

    def _open(self, provider: str = "CPUExecutionProvider") -> None:
        import onnxruntime

        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise EdgeDiTError(f"The provider {provider!r} is not in this onnxruntime; it offers {', '.join(available)}.")
        options = session_options(self.num_threads)
        try:
            self.session: onnxruntime.InferenceSession = onnxruntime.InferenceSession(str(self.path), options, providers=[provider])
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise EdgeDiTError(f"ONNX Runtime cannot load {self.path}: {error}. Export it again.") from error

    def _description(self) -> dict[str, str]:
        entries = self.session.get_modelmeta().custom_metadata_map
        return {key.removeprefix("edgedit."): value for key, value in entries.items() if key.startswith("edgedit.")}

    def _run(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        (prediction,) = self.session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(prediction)


class ExecutorchEdgeDiTTransformer2DModel(ExportedTransformer):
    """A denoiser in ExecuTorch; see [`ExportedTransformer`]. Load it with [`~ExportedTransformer.from_pretrained`].

    `num_threads` is the size of ExecuTorch's thread pool, which the whole process shares: setting it here sets it for every such component.
    """

    FORMAT = "executorch"
    MODEL_FILE = "executorch/model.pte"

    def _open(self) -> None:
        self.session = ExecutorchSession(self.path, self.num_threads)

    def _description(self) -> dict[str, str]:
        return dict(self.session.metadata)

    def _run(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.session.run(list(inputs.values()))
