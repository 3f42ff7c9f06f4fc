"""What every exported component of a pipeline shares: a folder of artefacts that belong together, and their sessions.

The folder holds `config.json` and a folder named after the format with the artefacts: `onnx/model.onnx` (with
`onnx/model.onnx.data` if the weights are big) or `executorch/model.pte`; a split denoiser has `conditioner` files
beside it, a VAE `decoder` and `encoder`. Importing this module loads no runtime; opening a file does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict

from ..errors import EdgeDiTError
from ..files import copy_tree, file_sha256, read_json
from ..hub import resolve
from ..records import ContractFiles
from ..runtimes.sessions import Session, open_session
from ..schema import read_record
from .formats import FORMATS

STEMS = {"denoiser": "model", "text_encoder": "model"}  # file names of parts that are not named after the part
CONTRACT = "contract.json"


def stem(part: str) -> str:
    """File name, without suffix, of a part by its name."""
    return STEMS.get(part, part)


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
    PARTS: ClassVar[tuple[str, ...]]  # the first must be there

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
        return f"{cls.FORMAT}/{stem(part)}{FORMATS[cls.FORMAT].suffix}"

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
            pretrained_model_name_or_path: component folder, pipeline folder or Hub id (also
                `hf://organisation/name[@revision][/folder]`).
            subfolder: the component's folder within it, e.g. `"transformer"`.
            num_threads: threads of the runtime; default its own choice. [`~set_threads`] changes it later.
            cache_dir, revision, token, local_files_only: as in diffusers, for Hub ids.
            options: of the runtime; ONNX Runtime has `provider`, its execution provider (default
                `"CPUExecutionProvider"`).

        Raises:
            EdgeDiTError: the folder has no artefact, config and artefact describe different networks, or the runtime is
                missing or refuses the file or an option.
        """
        within = f"{subfolder}/" if subfolder else ""
        root = resolve(
            pretrained_model_name_or_path,
            [f"{within}{cls.config_name}", f"{within}{cls.FORMAT}/*", CONTRACT if subfolder else f"../{CONTRACT}"],
            cache_dir=cache_dir,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
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
        files = {part: self._loaded_folder() / self.part_file(part) for part in self.PARTS}
        self.sessions = {
            part: open_session(file, self.num_threads, **self._options)
            for part, file in files.items()
            if file.is_file()
        }

    def _loaded_folder(self) -> Path:
        if self.folder is None:
            suffix = FORMATS[self.FORMAT].suffix
            raise EdgeDiTError(f"This component has a config but no {suffix} file; make it with from_pretrained().")
        return self.folder

    def _check(self) -> None:
        """Config and artefacts must describe one network."""
        weights = set()
        for session in self.sessions.values():
            file, said = session.path, session.metadata
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
