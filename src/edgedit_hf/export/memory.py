"""The bytes that an app has to hold: of every file, of the buffers that it plans, and of what is kept between the
calls; and the most that are held at once, by the order in which the files are loaded.

Plain sums of sizes that are known when an export is written. What a runtime makes of a file (packed weights, its
workspace, activations within the network) is not among them; bench.json has what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

NOT_COUNTED = (
    "what a runtime makes of a file when it is opened and run: packed weights, its workspace, activations within the "
    "network; a file that is mapped is counted whole"
)


def artefact_bytes(path: Path) -> int:
    """Bytes of an artefact: a file with the `.data` file beside it, or a package's folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    beside = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)


def kept_bytes(contract: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Bytes that the app itself holds while an artefact runs: what earlier ones gave for it or later ones, and what it
    gives itself.

    Args:
        contract: its order, text, split, schedule and guidance. tensors: those of reference.safetensors, which show
            the sizes.

    Returns:
        By artefact of the loop, in the order of the calls.
    """
    rows, steps = contract["guidance"]["rows"], contract["schedule"]
    stages = [call["artefact"] for call in contract["order"] if call["artefact"] != "encoder"]
    kept = dict.fromkeys(stages, 0)

    def row_bytes(*names: str) -> int:
        return sum(tensors[name].nbytes // len(tensors[name]) for name in names)

    def keep(first: str, last: str, size: int) -> None:
        for stage in stages[stages.index(first) : stages.index(last) + 1]:
            kept[stage] += size

    encoders = contract["text"]["encoders"] if contract["text"] else ()
    reader = "text_conditioner" if contract["split"] and encoders else "denoiser"
    for index, encoder in enumerate(encoders):
        size = row_bytes(f"{reader}.inputs.text_{index}", f"{reader}.inputs.mask_{index}")
        keep(encoder["artefact"] or stages[0], reader, rows * size)
    if contract["split"]:
        table = row_bytes("conditioner.outputs.modulation") * len(steps["steps"])
        keep("conditioner", "denoiser", rows * table)
        if encoders:
            embedded = row_bytes("text_conditioner.outputs.text", "text_conditioner.outputs.text_mask")
            keep("text_conditioner", "denoiser", rows * embedded)
    latents = tensors["noise"].nbytes
    keep("denoiser", "denoiser", 2 * (steps["history"] + 1) * latents)  # samples and predictions
    if "decoder" in kept:
        keep("decoder", "decoder", latents + row_bytes("decoder.outputs.image"))
    return kept


def memory_plan(
    sizes: Mapping[str, int],
    planned: Mapping[str, int | None],
    kept: Mapping[str, int],
    one_file: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What contract.json says of memory.

    Args:
        sizes: artefact → bytes of its file. planned: artefact → bytes of the buffers that the file plans for a run;
            `None` where a format does not say. kept: see [`kept_bytes`]; its artefacts are those of the loop.
        one_file: of an export with one file of all methods: its bytes, and its methods' planned_bytes.

    Returns:
        artefacts: file_bytes, planned_bytes and kept_bytes of each; orders: name → peak_bytes and, where one artefact
        decides, at; not_counted.
    """
    buffers = {key: planned[key] or 0 for key in kept}
    alone = {key: sizes[key] + buffers[key] + kept[key] for key in kept}
    orders: dict[str, Any] = {
        "all_at_once": {"peak_bytes": sum(sizes[key] + buffers[key] for key in kept) + max(kept.values())},
        "one_after_another": _highest(alone),
    }
    if one_file is not None:
        size = one_file["bytes"]
        buffers = {key: one_file["methods"][key]["planned_bytes"] for key in kept}
        orders["one_file"] = {"peak_bytes": size + sum(buffers.values()) + max(kept.values())}
        orders["one_file_in_turn"] = _highest({key: size + buffers[key] + kept[key] for key in kept})
    artefacts = {
        key: {"file_bytes": sizes[key], "planned_bytes": planned[key], "kept_bytes": kept.get(key)} for key in sizes
    }
    return {"artefacts": artefacts, "orders": orders, "not_counted": NOT_COUNTED}


def _highest(peaks: Mapping[str, int]) -> dict[str, Any]:
    at = max(peaks, key=lambda key: peaks[key])
    return {"peak_bytes": peaks[at], "at": at}
