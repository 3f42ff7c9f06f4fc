"""ProxyBank: every proxy of a teacher as an addressable safetensors file, with an index; assembles students.

Folder: `index.json` and a file a proxy, e.g. `03-mlp.safetensors` (layer 3 with a reduced MLP),
`04-05-both.safetensors` (layers 4 and 5 merged into one with both reductions).
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from ..errors import EdgeDiTError
from ..files import (
    aside_of,
    atomic_write_json,
    check_finite,
    explain_write_errors,
    file_sha256,
    read_json,
    weights_hash,
)
from ..genotype import Genotype, LayerSpec
from ..hub import fetch, is_name, pinned
from ..models.stored_weights import check_weights
from ..models.transformer_edgedit import EdgeDiTBlock, EdgeDiTTransformer2DModel
from ..records import BANK_FORMAT, BankIndex
from ..run.stage import BANK
from ..schema import held_to, shorten
from ..search_space import SearchSpace, position_weights


class ProxyBank:
    """The proxies of one teacher.

    Args:
        folder: a bank's folder with its `index.json`, or its name on the Hub (see [`hub`]), of which the proxies are
            fetched when they are needed.
        teacher: the teacher, whose trunk and original layers students take over; its weights must be those the bank was
            made from.

    Raises:
        EdgeDiTError: no bank there, or it belongs to another teacher (both hashes are quoted).
    """

    def __init__(self, folder: str | os.PathLike, teacher: EdgeDiTTransformer2DModel) -> None:
        self.name = str(folder) if is_name(folder) else None
        self.folder = Path(folder) if self.name is None else fetch(self.name, ["index.json"])
        path, made_by = self.folder / "index.json", BANK.made_by
        index = read_json(path, made_by)
        if (
            not isinstance(index, dict)
            or index.get("format") != BANK_FORMAT
            or not {"teacher_hash", "space", "entries"} <= set(index)
        ):
            found = index.get("format") if isinstance(index, dict) else type(index).__name__
            raise EdgeDiTError(
                f"{path} has the format {shorten(found)}; expected a whole {BANK_FORMAT!r}: it is no proxy bank."
            )
        held_to(index, BankIndex, path, made_by, "a proxy bank")
        found = weights_hash(teacher.state_dict())
        if found != index["teacher_hash"]:
            raise EdgeDiTError(
                f"The bank {self.folder} was made from a teacher with hash {index['teacher_hash']}, but the given "
                f"teacher has {found}; use the teacher it was made from, or make the bank anew."
            )
        self.index = index
        self.teacher = teacher
        self.space = SearchSpace.from_dict(index["space"])

    @classmethod
    def create(cls, folder: str | os.PathLike, teacher: EdgeDiTTransformer2DModel, space: SearchSpace) -> ProxyBank:
        """An empty bank. [`~ProxyBank.write_proxy`] and [`~ProxyBank.write_index`] fill it."""
        check_weights(teacher, "The teacher of the bank")
        index: dict[str, Any] = {
            "format": BANK_FORMAT,
            "teacher_hash": weights_hash(teacher.state_dict()),
            "space": space.to_dict(),
            "entries": {},
        }
        if head := position_weights(teacher.config):
            index["position_weights"] = head
        atomic_write_json(Path(folder, "index.json"), index)
        return cls(folder, teacher)

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """What the bank holds, by key: file, sha256, source, option, steps, seed, init, and held-out losses.

        All losses are normalised (1: no better than leaving the layers out) and held-out: `loss_before` and
        `loss_after` of the proxy's training; `losses`, a dict of "random", "copied", "closed_form" (where that was
        fitted), "combined" (the start of a "both", from the trained "attention" and "mlp") and "after"; `curve`, pairs
        (steps done, loss) from the proxy's own start to its end.
        """
        return self.index["entries"]

    def key(self, layer: LayerSpec) -> str:
        """Address of the proxy with this source and shape, e.g. `"03/mlp"` or `"04-05/original"`."""
        return self.space.key(layer)

    def missing(self, genotype: Genotype | None = None) -> list[str]:
        """Keys that the bank does not hold yet, of the proxies that this genotype needs (default: of the whole search
        space).
        """
        layers = (
            self.space.proxies()
            if genotype is None
            else [layer for layer in genotype.layers if not self.space.is_teachers(layer)]
        )
        return [key for key in map(self.key, layers) if key not in self.entries]

    # ---------------------------------------------------------------- writing

    def write_proxy(self, layer: LayerSpec, block: EdgeDiTBlock, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write one proxy's file (aside, then renamed); returns the entry for [`~ProxyBank.write_index`].

        Args:
            record: what is to be remembered, see [`~ProxyBank.entries`].
        """
        name = self.key(layer).replace("/", "-") + ".safetensors"
        aside = aside_of(self.folder / name)
        state = {k: v.detach().cpu().contiguous() for k, v in block.state_dict().items()}
        check_finite(
            state,
            f"The proxy {self.key(layer)}",
            "it was not written. Lower bank.learning_rate, or look at the teacher.",
        )
        with explain_write_errors(self.folder / name):
            try:
                save_file(state, aside)
                with open(aside, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(aside, self.folder / name)
            finally:
                aside.unlink(missing_ok=True)
        option = self.space.option_of(layer)
        return {
            "file": name,
            "sha256": file_sha256(self.folder / name),
            "source": list(layer.source),
            "option": option,
            **record,
        }

    def write_index(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Add entries and write the index."""
        self.entries.update({key: dict(entry) for key, entry in sorted(entries.items())})
        atomic_write_json(self.folder / "index.json", self.index)

    # ---------------------------------------------------------------- reading

    def load(self, layer: LayerSpec) -> dict[str, torch.Tensor]:
        """State dict of the block that stands for `layer`: the teacher's own, or a proxy's file.

        Raises:
            EdgeDiTError: the bank lacks the proxy, or its file is damaged.
        """
        if self.space.is_teachers(layer):
            return self.teacher.blocks[layer.source[0]].state_dict()
        key = self.key(layer)
        if key not in self.entries:
            raise self._lacks([key])
        name, sha256 = str(self.entries[key].get("file")), self.entries[key].get("sha256")
        if Path(name).name != name or len(name.encode()) > 255:
            raise EdgeDiTError(
                f"The index of {self.folder} names the file {shorten(name)}; a proxy's file must lie in the bank's own "
                "folder."
            )
        path = self.folder / name
        self._fetch([name])
        try:
            content = path.read_bytes()
            if (found := hashlib.sha256(content).hexdigest()) != sha256:
                raise EdgeDiTError(
                    f"The proxy {path} ({len(content)} bytes) has the SHA-256 {found}, but the bank's index says "
                    f"{str(sha256)[:64]}: it is damaged or from another bank; delete the bank and make it anew."
                )
            state = load(content)
        except (OSError, SafetensorError) as error:
            raise EdgeDiTError(
                f"The proxy {path} cannot be read ({error}); delete the bank and make it anew."
            ) from error
        expected = {k: tuple(v.shape) for k, v in self.new_block(layer, device="meta").state_dict().items()}
        got = {k: tuple(v.shape) for k, v in state.items()}
        if got != expected:
            raise EdgeDiTError(f"The proxy {path} holds {got}; the layer {layer.to_dict()} needs {expected}.")
        return state

    def _fetch(self, files: Iterable[str]) -> None:
        """Of a bank on the Hub, bring files of the index's own commit."""
        if self.name is None or not (missing := [file for file in files if not (self.folder / file).is_file()]):
            return
        fetch(pinned(self.name, self.folder), [glob.escape(file) for file in missing])

    def _lacks(self, keys: list[str]) -> EdgeDiTError:
        named = ", ".join(map(repr, keys[:5])) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
        noun = "proxy" if len(keys) == 1 else "proxies"
        return EdgeDiTError(
            f"The bank {self.folder} has no {noun} {named}; it holds {len(self.entries)} of "
            f"{len(self.space.proxies())} entries. Finish stage bank first, with a bank.only that names this genotype "
            "or is null."
        )

    def new_block(self, layer: LayerSpec, device: str = "cpu") -> EdgeDiTBlock:
        """A block of the layer's shape with untrained weights."""
        with torch.device(device):
            return self.teacher.new_block(layer.to_dict())

    def assemble(self, genotype: Genotype, *, random_seed: int | None = None) -> EdgeDiTTransformer2DModel:
        """The student of a genotype: the teacher's trunk and kept layers, the bank's proxies for the rest.

        Args:
            genotype: must be one of the bank's search space.
            random_seed: when given, proxies are left at DiT's random initialisation instead (to see what distillation
                is worth).

        Raises:
            EdgeDiTError: the genotype does not fit the teacher, or proxies are missing (they are named).
        """
        self.space.code(genotype)  # raises when the genotype is of another teacher or space
        if random_seed is None and (missing := self.missing(genotype)):
            raise self._lacks(missing)
        state = torch.random.get_rng_state()
        torch.default_generator.manual_seed(
            0 if random_seed is None else random_seed
        )  # the CPU's alone: blocks start there
        try:
            student = EdgeDiTTransformer2DModel.with_config(self.teacher.config, layers=genotype.to_layers())
        finally:
            torch.random.set_rng_state(state)
        if random_seed is None:
            kept = [self.key(layer) for layer in genotype.layers if not self.space.is_teachers(layer)]
            self._fetch(str(self.entries[key].get("file")) for key in kept)
        trunk = {k: v for k, v in self.teacher.state_dict().items() if not k.startswith("blocks.")}
        student.load_state_dict(trunk, strict=False)
        for block, layer in zip(student.blocks, genotype.layers):
            if self.space.is_teachers(layer) or random_seed is None:
                block.load_state_dict(self.load(layer))
        return student.to(self.teacher.dtype).eval()
