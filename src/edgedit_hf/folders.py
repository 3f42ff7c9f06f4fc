"""What a folder of ours holds, said by its own files: a pipeline and of which kind, an export, a proxy bank, a latency
table. No torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import EdgeDiTError
from .files import read_json
from .genotype import Genotype
from .records import BANK_FORMAT, BankIndex, Contract, NetConfig, PipelineIndex, Table
from .run.stage import BANK, LATENCY
from .schema import held_to, read_record, shorten

KINDS = {
    "teacher": "a network as it was trained, with every layer of its own",
    "student": "a compressed network",
    "supernet": "an elastic network with several widths",
    "subnet": "one width of an elastic network",
    "few-step": "a network distilled to a few steps",
    "quantized": "a network with low-bit weights",
    "exported": "a network lowered for a runtime",
    "bank": "a proxy bank",
    "latency": "a latency table",
}
"""Kinds of folders, and what they are in words."""

INDEX, CONTRACT, TABLE, BANK_INDEX = "model_index.json", "contract.json", "table.json", "index.json"
FAMILIES = {"EdgeDiTPipeline": "edgedit", "ElasticDiTPipeline": "elastic"}


@dataclass(frozen=True)
class Contents:
    """What a folder holds.

    Args:
        kind: a key of [`KINDS`].
        family: "edgedit" or "elastic".
        config: of its denoiser; of a bank its index, of a latency table the table.
        index: `model_index.json` of a pipeline, `contract.json` of an export.
        bundled: whether the pipeline's code lies in the folder.
        few_step: whether it samples in a few steps without guidance.
    """

    path: Path
    kind: str
    family: str
    config: dict[str, Any]
    index: dict[str, Any]
    bundled: bool = False
    few_step: bool = False

    @property
    def pipeline(self) -> bool:
        """Whether `DiffusionPipeline.from_pretrained` loads it."""
        return self.kind not in ("bank", "latency") and (self.path / INDEX).is_file()

    @property
    def genotype(self) -> Genotype | None:
        """Of an EdgeDiT: what every layer is."""
        return Genotype.of(self.config) if self.family == "edgedit" and "layers" in self.config else None


def look_at(folder: str | os.PathLike) -> Contents:
    """What a folder holds; its weights are not read.

    Raises:
        EdgeDiTError: it is none of [`KINDS`], or one of its files is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise EdgeDiTError(f"{folder} is not a folder; give that of a pipeline, an export, a bank or a latency table.")
    if (folder / BANK_INDEX).is_file():
        index = read_json(folder / BANK_INDEX, BANK.made_by)
        if isinstance(index, dict) and index.get("format") == BANK_FORMAT:
            held_to(index, BankIndex, folder / BANK_INDEX, BANK.made_by, "a proxy bank")
            return Contents(folder, "bank", "edgedit", index, {})
    if (folder / CONTRACT).is_file():
        contract = read_record(folder / CONTRACT, Contract, "the export", "an export")
        index = _index(folder) if (folder / INDEX).is_file() else {}
        config = read_json(folder / "transformer" / "config.json", "the export") if index else {}
        few_step = bool(index.get("few_step_timesteps"))
        return Contents(folder, "exported", contract["family"], config, contract, few_step=few_step)
    if (folder / INDEX).is_file():
        return _pipeline(folder)
    if (folder / TABLE).is_file():
        table = read_json(folder / TABLE, LATENCY.made_by)
        if isinstance(table, dict) and "tables" in table:
            raise EdgeDiTError(
                f"{folder / TABLE} holds the tables of several devices; give the folder of one device's table."
            )
        held_to(table, Table, folder / TABLE, LATENCY.made_by, "a latency table")
        return Contents(folder, "latency", "edgedit", table, {})
    inside = sorted(path.parent.name for name in (INDEX, CONTRACT) for path in folder.glob(f"*/{name}"))
    hint = f" (its folders {', '.join(dict.fromkeys(inside))} do)" if inside else ""
    raise EdgeDiTError(
        f"{folder} holds no {INDEX}, {CONTRACT}, {TABLE} or bank's {BANK_INDEX}{hint}; give the folder of a pipeline, "
        "an export, a proxy bank or a latency table."
    )


def _index(folder: Path) -> dict[str, Any]:
    return read_record(folder / INDEX, PipelineIndex, "save_pretrained", "a pipeline")


def _pipeline(folder: Path) -> Contents:
    index = _index(folder)
    said = index.get("_class_name")
    name = said[-1] if isinstance(said, list) and said else said
    if name not in FAMILIES:
        raise EdgeDiTError(
            f"{folder} holds a pipeline of class {shorten(name)}; this package's are {' and '.join(FAMILIES)}."
        )
    path = folder / "transformer" / "config.json"
    config = read_record(path, NetConfig, "save_pretrained", "a denoiser")
    few_step = bool(index.get("few_step_timesteps"))
    if config.get("quantization_config") is not None:
        kind = "quantized"
    elif few_step:
        kind = "few-step"
    elif FAMILIES[name] == "elastic":
        kind = "supernet" if len(config.get("subnets") or {}) > 1 else "subnet"
    else:
        kind = "student" if config.get("layers") and Genotype.of(config).compressed else "teacher"
    return Contents(folder, kind, FAMILIES[name], config, index, isinstance(said, list), few_step)
