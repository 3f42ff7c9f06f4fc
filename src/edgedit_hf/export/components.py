"""Exported parts as components of a diffusers pipeline: denoisers, VAEs and text encoders that ONNX Runtime or
ExecuTorch runs.

A component folder holds `config.json` and a folder named after the format with the artefacts: `onnx/model.onnx` (with
`onnx/model.onnx.data` if the weights are big) or `executorch/model.pte`; a split denoiser has `conditioner` files
beside it, a VAE `decoder` and `encoder`. Importing this module loads neither runtime; opening a file does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import BaseOutput

from ..errors import EdgeDiTError
from ..files import copy_tree, file_sha256, read_json
from ..records import ContractFiles
from ..runtimes.sessions import Session, open_session
from ..schema import read_record
from .parts import MODULATED

STEMS = {"denoiser": "model", "text_encoder": "model"}  # file names of parts that are not named after the part
CACHED_MODULATIONS = 64  # timesteps whose modulations an elastic denoiser keeps


def stem(part: str) -> str:
    """File name, without suffix, of a part by its name."""
    return STEMS.get(part, part)


SUFFIXES = {"onnx": ".onnx", "executorch": ".pte", "coreml": ".mlpackage"}
CONTRACT = "contract.json"


def check_hashes(folder: Path, format: str) -> None:
    """Compare a component's artefacts with the SHA-256 that the export's contract.json has of them, if it stands beside
    the component.

    Reading and hashing takes about a second for 1 to 2 GB. Only files of the component's own folder are opened.

    Raises:
        EdgeDiTError: a file differs (with both hashes) or is missing, or the contract is damaged.
    """
    path = folder.parent / CONTRACT
    if not path.is_file():
        return
    prefix = f"{folder.name}/{format}/"
    listed = read_record(path, ContractFiles, "the export", "an export's list of files")["files"]
    expected = {name.removeprefix(prefix): facts["sha256"] for name, facts in listed.items() if name.startswith(prefix)}
    there = {
        file.relative_to(folder / format).as_posix(): file
        for file in sorted((folder / format).rglob("*"))
        if file.is_file()
    }
    missing = sorted(set(expected) - set(there))
    if missing:
        raise EdgeDiTError(
            f"{folder / format / missing[0]} is missing, but {path} lists it; copy the export whole, or export again."
        )
    for name, sha256 in expected.items():
        found = file_sha256(there[name])
        if found != sha256:
            raise EdgeDiTError(
                f"{there[name]} has the SHA-256 {found}, but {path} says {sha256}: it was damaged or changed after the "
                "export. Copy it again, or export again."
            )


class ExportedComponent(ConfigMixin):
    r"""
    A component that a runtime computes: what all of them share.

    Inputs may be on any device and of any float type: they are brought to the CPU as float32, and outputs go back to
    the device and type of the input. `device` and `dtype` are those of the runtime: CPU, float32. A subclass names its
    format and parts.

    Args:
        config: what `config.json` holds: the config of the component that was exported, `precision` and `batch`
            (`"dynamic"`, or the batch of the files; calls then take multiples of it).
    """

    FORMAT: str  # as in `optimum-cli export edgedit --format`
    PARTS: tuple[str, ...]  # the first must be there

    config_name = "config.json"

    def __init__(self, **config: Any):
        self.export = self._internal_dict = FrozenDict(config)
        self.folder: Path | None = None
        self.num_threads: int | None = None
        self.sessions: dict[str, Session] = {}
        self._options: dict[str, Any] = {}

    @classmethod
    def part_file(cls, part: str) -> str:
        """Where an artefact stands within the component's folder."""
        return f"{cls.FORMAT}/{stem(part)}{SUFFIXES[cls.FORMAT]}"

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
        """Open an exported component.

        Args:
            pretrained_model_name_or_path: component folder, pipeline folder or Hub id.
            subfolder: the component's folder within it, e.g. `"transformer"`.
            num_threads: threads of the runtime; default its own choice. [`~set_threads`] changes it later.
            cache_dir, revision, token, local_files_only: as in diffusers, for Hub ids.
            options: of the runtime; ONNX Runtime has `provider`, its execution provider (default
                `"CPUExecutionProvider"`).

        Raises:
            EdgeDiTError: the folder has no artefact, config and artefact describe different networks, or the runtime is
                missing or refuses the file or an option.
        """
        root = Path(pretrained_model_name_or_path)
        if not root.is_dir():
            from huggingface_hub import snapshot_download

            within = f"{subfolder}/" if subfolder else ""
            root = Path(
                snapshot_download(
                    str(pretrained_model_name_or_path),
                    allow_patterns=[f"{within}{cls.config_name}", f"{within}{cls.FORMAT}/*", CONTRACT],
                    cache_dir=cache_dir,
                    revision=revision,
                    token=token,
                    local_files_only=local_files_only,
                )
            )
        folder = root / subfolder if subfolder else root
        needed = cls.part_file(cls.PARTS[0])
        if not (folder / needed).is_file() or not (folder / cls.config_name).is_file():
            name = folder.name if subfolder is None else subfolder
            raise EdgeDiTError(
                f"{folder} does not hold {cls.config_name} and {needed}; give the component's folder of an exported "
                f"pipeline (optimum-cli export edgedit … --format {cls.FORMAT}), or the pipeline's folder with "
                f"subfolder={name!r}."
            )
        check_hashes(folder, cls.FORMAT)
        component = cls(**cls._read_config(folder))
        component.folder, component.num_threads, component._options = folder, num_threads, options
        component._open()
        component._check()
        return component

    @classmethod
    def _read_config(cls, folder: Path) -> dict[str, Any]:
        path = folder / cls.config_name
        values = read_json(path, "the export")
        if not isinstance(values, dict):
            raise EdgeDiTError(f"{path} is not the config of a component (a {type(values).__name__}); export it again.")
        return {key: value for key, value in values.items() if not key.startswith("_")}

    def save_config(self, save_directory: str | os.PathLike) -> None:
        """Write `config.json`."""
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        values = {"_class_name": type(self).__name__, **self.config}
        (target / self.config_name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write the component folder: config.json and a copy of the artefacts."""
        target = Path(save_directory)
        self.save_config(target)
        source = self._loaded_folder() / self.FORMAT
        if (target / self.FORMAT).resolve() != source.resolve():
            copy_tree(source, target / self.FORMAT)

    def set_threads(self, num_threads: int | None) -> None:
        """Open the files anew for this many threads (`None`: the runtime's choice)."""
        self._loaded_folder()
        self.num_threads = num_threads
        self._open()

    def _open(self) -> None:
        files = {part: self.folder / self.part_file(part) for part in self.PARTS}
        self.sessions = {
            part: open_session(file, self.num_threads, **self._options)
            for part, file in files.items()
            if file.is_file()
        }

    def _loaded_folder(self) -> Path:
        if self.folder is None:
            raise EdgeDiTError(
                f"This component has a config but no {SUFFIXES[self.FORMAT]} file; make it with from_pretrained()."
            )
        return self.folder

    def _check(self) -> None:
        """Config and artefacts must describe one network."""
        weights = set()
        for part, session in self.sessions.items():
            file, said = self.folder / self.part_file(part), session.metadata
            if "config" not in said:
                raise EdgeDiTError(
                    f"{file} has no edgedit config in its metadata; it was not written by this package's export."
                )
            for key, value in json.loads(said["config"]).items():
                if key in self.config and self.config[key] != value:
                    raise EdgeDiTError(
                        f"{file} was made from a network with {key} {value!r}, but its config.json says "
                        f"{self.config[key]!r}; the two files do not belong together: export again."
                    )
            weights.add(said.get("weights"))
        if len(weights) > 1:
            raise EdgeDiTError(
                f"The files in {self.folder} were made from the weights {sorted(map(str, weights))}; they do not "
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
    def path(self) -> Path:
        """The first artefact's file."""
        return self._loaded_folder() / self.part_file(self.PARTS[0])

    @property
    def metadata(self) -> dict[str, Any]:
        """What the first artefact says about itself: config, weights' hash, precision, batch, versions, and a
        denoiser's genotype.
        """
        self._loaded_folder()
        found = self.sessions[self.PARTS[0]].metadata
        return {key: json.loads(value) if value.startswith(("{", "[")) else value for key, value in found.items()}

    def run(self, part: str, inputs: Mapping[str, torch.Tensor], pad: bool = False) -> list[torch.Tensor]:
        """One artefact's outputs for inputs with as many rows each, on the CPU; a file of fixed batch runs as often as
        it takes.

        Args:
            pad: whether rows that do not fill a fixed batch are repeated to fill it (and their outputs dropped).

        Raises:
            EdgeDiTError: the rows are no multiple of the batch.
        """
        self._loaded_folder()
        if part not in self.sessions:
            raise EdgeDiTError(
                f"{self.folder} has no {self.part_file(part)}; export the pipeline again with the component it belongs "
                "to."
            )
        values = {}
        for name, value in inputs.items():
            value = value.detach().to("cpu")
            values[name] = value.float() if value.is_floating_point() else value
        rows = len(next(iter(values.values())))
        batch = self.export["batch"]
        step = rows if batch == "dynamic" else batch
        missing = -rows % step if step else 0
        if rows == 0 or (missing and not pad):
            raise EdgeDiTError(
                f"The batch is {rows}, but this artefact was exported for batch {batch} and takes multiples of it "
                "(guidance doubles the images' number); export it for a batch that divides this one (--batch)."
            )
        if missing:
            values = {
                name: torch.cat([value, value[-1:].expand(missing, *value.shape[1:])]) for name, value in values.items()
            }
        session = self.sessions[part]
        parts = [
            session.run({name: value[i : i + step] for name, value in values.items()})
            for i in range(0, rows + missing, step)
        ]
        return [
            torch.from_numpy(np.concatenate(outputs)[:rows] if len(parts) > 1 or missing else outputs[0])
            for outputs in zip(*parts)
        ]


class ExportedTransformer(ExportedComponent):
    """A denoiser: what both families share. Beside the exported config, `split` says whether the conditioner is a file
    of its own, and `size` holds height and width of the latents (`None`: any)."""

    PARTS = ("denoiser", "conditioner")

    @property
    def split(self) -> bool:
        """Whether the modulations come from an artefact of their own."""
        return bool(self.config.get("split"))

    def _check_sample(self, hidden_states: torch.Tensor) -> None:
        self._loaded_folder()
        channels, size = self.config.in_channels, self.config.get("size")
        height, width = size if size else hidden_states.shape[-2:]
        if tuple(hidden_states.shape[1:]) != (channels, height, width):
            expected = f"(batch, {channels}, {height if size else 'height'}, {width if size else 'width'})"
            raise EdgeDiTError(f"The input has shape {tuple(hidden_states.shape)}; this artefact takes {expected}.")

    def _bucket_edges(self) -> list[float] | None:
        """Borders of the buckets of timesteps with activation scales of their own: a file takes those of its first row
        for all (`None`: no buckets).
        """
        said = self.sessions["denoiser"].metadata
        if "timestep_edges" in said:
            return json.loads(said["timestep_edges"])
        # A file of an older export does not say it; one with a scheme (`.pte`) has dynamic activations.
        older = said.get("precision") == "int8" and not {"activations", "scheme"} & said.keys()
        return [] if older else None

    def _predict(self, inputs: dict[str, torch.Tensor], times: torch.Tensor) -> torch.Tensor:
        """The denoiser's output for rows with these timesteps; rows of several buckets of timesteps go through the file
        bucket by bucket.
        """
        if "timestep" in self.sessions["denoiser"].input_names:  # a split one's, if its scales are by timestep
            inputs = {**inputs, "timestep": times}
        edges = self._bucket_edges()
        if edges is None or bool((times == times[0]).all()):
            return self.run("denoiser", inputs)[0]
        # Without borders: timestep by timestep.
        places = (
            torch.bucketize(times, torch.tensor(edges, dtype=torch.float32), right=True)
            if edges
            else torch.unique(times, return_inverse=True)[1]
        )
        groups = [(places == place).nonzero().flatten() for place in torch.unique(places)]
        if len(groups) == 1:
            return self.run("denoiser", inputs)[0]
        outputs = [
            self.run("denoiser", {name: value[rows.to(value.device)] for name, value in inputs.items()}, pad=True)[0]
            for rows in groups
        ]
        return torch.cat(outputs)[torch.argsort(torch.cat(groups))]

    def _output(
        self, like: torch.Tensor, prediction: torch.Tensor, return_dict: bool
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        sample = prediction.to(like.device, like.dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class ExportedEdgeDiT(ExportedTransformer):
    r"""
    An EdgeDiT denoiser in a runtime with the call signature of [`EdgeDiTTransformer2DModel`].

    A split one has [`precompute_modulation`] as the model has, and so a pipeline computes the modulations of a whole
    schedule before it samples.
    """

    @property
    def precompute_modulation(self) -> Callable[..., torch.Tensor]:
        """`(timesteps (T,), class_labels (K,)) → (T, K, 6L + 2, D)`, as
        [`EdgeDiTTransformer2DModel.precompute_modulation`]; of a split denoiser alone.

        Raises:
            AttributeError: the denoiser is not split; pipelines ask whether there is such a method.
        """
        if not self.split:
            raise AttributeError(f"This {type(self).__name__} has no conditioner of its own to compute modulations.")
        return self._precompute_modulation

    def _precompute_modulation(self, timesteps: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        count = 1 if class_labels is None else len(class_labels)
        labels = None if class_labels is None else class_labels.repeat(len(timesteps))
        table = self._condition(timesteps.repeat_interleave(count), labels)
        return table.view(len(timesteps), count, *table.shape[1:])

    def modulation_steps(self, num_labels: int) -> int:
        """Timesteps whose table of modulations is as large as the weights that make it, at least one."""
        return max(1, self.config.hidden_size // num_labels)

    def _condition(self, timestep: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        inputs = {"timestep": timestep.float()}
        return self.run(
            "conditioner", inputs if labels is None else {**inputs, "class_labels": labels.long()}, pad=True
        )[0]

    def _labels(self, class_labels: torch.Tensor | None) -> torch.Tensor | None:
        classes = self.config.num_classes
        if (class_labels is None) != (classes == 0):
            given = "no class_labels were given" if class_labels is None else "class_labels were given"
            raise EdgeDiTError(f"The artefact has num_classes={classes}, but {given}.")
        if class_labels is None:
            return None
        labels = class_labels.to("cpu", torch.int64)
        if not (0 <= int(labels.min()) and int(labels.max()) <= classes):
            raise EdgeDiTError(
                f"class_labels span {int(labels.min())} … {int(labels.max())}; they must be from 0 to {classes}."
            )
        return labels

    def __call__(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        modulation: torch.Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Noisy input, of the exported
            size.
            timestep (`torch.Tensor` of shape `(batch,)` or a scalar): Timestep on the scale 0 … 1000.
            class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): Classes; `num_classes` means "no class".
            return_dict (`bool`, defaults to `True`): Whether to return a [`Transformer2DModelOutput`].
            modulation (`torch.Tensor` of shape `(batch, 6 * layers + 2, hidden_size)`, *optional*): For a split
            denoiser: a step of the table of
                `precompute_modulation`.

        Returns:
            The prediction, of shape `(batch, out_channels, height, width)`.
        """
        self._check_sample(hidden_states)
        inputs = {"sample": hidden_states}
        times = torch.as_tensor(timestep).to("cpu", torch.float32).expand(len(hidden_states))
        labels = self._labels(class_labels)
        if self.split:
            inputs[MODULATED] = self._condition(times, labels) if modulation is None else modulation
        else:
            inputs |= {"timestep": times} if labels is None else {"timestep": times, "class_labels": labels}
        return self._output(hidden_states, self._predict(inputs, times), return_dict)

    forward = __call__


class ExportedElasticDiT(ExportedTransformer):
    r"""
    An elastic text-to-image denoiser in a runtime with the call signature of [`ElasticDiTTransformer2DModel`]: one
    sub-network, whose name is in the config's `subnet`. `text_tokens` holds the tokens of every text encoder that the
    artefact takes (`None`: any number); shorter texts are padded.

    A split one keeps what its conditioners gave: the modulations of a timestep, and the text of a call.
    """

    PARTS = ("denoiser", "conditioner", "text_conditioner")

    def __init__(self, **config: Any):
        super().__init__(**config)
        self._modulations: dict[float, torch.Tensor] = {}
        self._text: tuple[tuple[Any, ...], dict[str, torch.Tensor]] = ((), {})

    @property
    def active_subnet(self) -> str | None:
        """The exported sub-network (`None`: a stand-alone net)."""
        return self.config.get("subnet")

    def set_active_subnet(self, name: str) -> None:
        """There is but one."""
        self.resolve_subnet(name)

    def resolve_subnet(self, name: str | None = None) -> str | None:
        """The exported sub-network; a ValueError if another one is named."""
        if name not in (None, self.active_subnet):
            raise EdgeDiTError(
                f"The sub-network {name!r} was asked for, but this artefact holds "
                f"{self.active_subnet or 'a stand-alone net'}; export that one."
            )
        return self.active_subnet

    def _texts(
        self, embeds: Sequence[torch.Tensor | None] | None, masks: Sequence[torch.Tensor | None] | None, rows: int
    ) -> dict[str, torch.Tensor]:
        """text_0, mask_0, … of the artefact; an absent encoder is one whose tokens are all masked."""
        dims, lengths = self.config.text_dims, self.config.get("text_tokens") or [None] * len(self.config.text_dims)
        embeds = [None] * len(dims) if embeds is None else list(embeds)
        masks = [None] * len(dims) if masks is None else list(masks)
        if len(embeds) != len(dims) or len(masks) != len(dims):
            raise EdgeDiTError(
                f"{len(embeds)} text embeddings and {len(masks)} masks were given; this net has {len(dims)} text "
                "encoders."
            )
        values = {}
        for index, (states, mask, width, length) in enumerate(zip(embeds, masks, dims, lengths)):
            there = 0 if states is None else states.shape[1]
            if states is not None and (states.ndim != 3 or states.shape[0] != rows or states.shape[2] != width):
                raise EdgeDiTError(
                    f"encoder_hidden_states[{index}] has the shape {tuple(states.shape)}; it must be ({rows}, tokens, "
                    f"{width})."
                )
            if length is not None and there > length:
                raise EdgeDiTError(
                    f"encoder_hidden_states[{index}] has {there} tokens, but this artefact was exported for {length}; "
                    "shorten the prompt, or export the pipeline with a larger max_sequence_length."
                )
            tokens = max(1, there) if length is None else length
            text, valid = torch.zeros(rows, tokens, width), torch.zeros(rows, tokens)
            if states is not None:
                text[:, :there] = states.to("cpu", torch.float32)
                valid[:, :there] = 1.0 if mask is None else mask.to("cpu", torch.float32)
            values |= {f"text_{index}": text, f"mask_{index}": valid}
        return values

    def _modulation(self, times: torch.Tensor) -> torch.Tensor:
        """Modulations `(rows, 6L + 2, D)` of timesteps `(rows,)`; each timestep is computed once."""
        unique, place = torch.unique(times, return_inverse=True)
        known = self._modulations  # replaced, never changed: a call in another thread may be reading it
        unknown = [time for time in unique.tolist() if time not in known]
        if unknown:
            if len(known) + len(unknown) > CACHED_MODULATIONS:
                known, unknown = {}, unique.tolist()
            found = self.run("conditioner", {"timestep": torch.tensor(unknown)}, pad=True)[0]
            self._modulations = known = {**known, **dict(zip(unknown, found))}
        return torch.stack([known[time] for time in unique.tolist()])[place]

    def __call__(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: Sequence[torch.Tensor | None] | None = None,
        encoder_attention_mask: Sequence[torch.Tensor | None] | None = None,
        return_dict: bool = True,
        subnet: str | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, C, H, W)`): Noisy input, of the exported size.
            timestep (`torch.Tensor` of shape `(B,)` or a scalar): Timestep 1000·σ on the scale 0 … 1000.
            encoder_hidden_states, encoder_attention_mask: As for [`ElasticDiTTransformer2DModel`].
            subnet (`str`, *optional*): The exported sub-network, no other.

        Returns:
            The velocity ε − x0, `(B, C, H, W)`.
        """
        self._check_sample(hidden_states)
        self.resolve_subnet(subnet)
        rows = len(hidden_states)
        times = torch.as_tensor(timestep).to("cpu", torch.float32).reshape(-1).expand(rows)
        inputs = {"sample": hidden_states}
        if self.split:
            key = (rows, *(encoder_hidden_states or ()), *(encoder_attention_mask or ()))
            known, text = self._text  # read once: a call in another thread may replace it
            if len(key) != len(known) or any(a is not b for a, b in zip(key[1:], known[1:])) or key[0] != known[0]:
                text = dict(
                    zip(
                        ("text", "text_mask"),
                        self.run("text_conditioner", self._texts(encoder_hidden_states, encoder_attention_mask, rows)),
                    )
                )
                self._text = key, text
            inputs |= {MODULATED: self._modulation(times), **text}
        else:
            inputs |= {"timestep": times, **self._texts(encoder_hidden_states, encoder_attention_mask, rows)}
        return self._output(hidden_states, self._predict(inputs, times), return_dict)

    forward = __call__


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
        if "config" not in self.sessions["text_encoder"].metadata:
            raise EdgeDiTError(
                f"{self.folder / self.part_file('text_encoder')} was not written by this package's export."
            )

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
