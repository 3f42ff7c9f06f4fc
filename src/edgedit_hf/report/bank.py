"""What every choice of a proxy bank is worth: its loss, its time, its weights. Plain values in, plain values out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import EdgeDiTError
from ..genotype import LayerSpec
from ..search.latency_table import LatencyTable
from ..search_space import SearchSpace, layer_cost
from .tables import scaled

HEADER = ("proxy", "loss before", "after", "ms", "saved ms", "parameters", "saved", "bytes (fp32)")


def bank_choices(index: Mapping[str, Any], table: LatencyTable | None) -> dict[str, Any]:
    """The choices of a bank.

    Args:
        index: of the bank, as [`records.BankFigures`] has it.
        table: the latency table of its teacher, if there is one.

    Returns:
        `original` (a layer of the teacher: `ms`, `parameters`, `bytes` at fp32), `choices` (of every proxy also `key`,
        `option`, `source`, `loss_before`, `loss_after`, `saved_ms`, `saved_parameters`, of the layers that it stands
        for), and `total` (`proxies`, `missing` ones of the search space, `parameters`, `bytes`). Without a table, or of
        a layer that it did not measure, times are `None`.

    Raises:
        EdgeDiTError: the table is one of another teacher.
    """
    space = SearchSpace.from_dict(index["space"])
    sizes = ("num_layers", "hidden_size", "num_heads", "mlp_ratio")
    if table is not None and any(getattr(table.space, name) != getattr(space, name) for name in sizes):
        theirs, ours = ({name: getattr(of, name) for name in sizes} for of in (table.space, space))
        raise EdgeDiTError(
            f"The latency table was measured for a teacher of {theirs}, the bank's is {ours}; give the table of its "
            "own run."
        )

    def figures(layer: LayerSpec) -> dict[str, Any]:
        # Weights do not depend on the tokens.
        weights = layer_cost(space.hidden_size, layer.shape, 4, index.get("position_weights", 0)).weights
        ms = None if table is None else table.blocks.get(layer.shape.timed)
        return {"ms": ms, "parameters": weights, "bytes": 4 * weights}

    original = figures(space.layer((0,), "original"))
    choices = []
    for entry in index["entries"].values():
        layer = space.layer(tuple(entry["source"]), entry["option"])
        its, count = figures(layer), len(layer.source)
        timed = None not in (its["ms"], original["ms"])
        choices.append(
            {
                "key": space.key(layer),
                **{name: entry[name] for name in ("option", "source", "loss_before", "loss_after")},
                **its,
                "saved_ms": count * original["ms"] - its["ms"] if timed else None,
                "saved_parameters": count * original["parameters"] - its["parameters"],
            }
        )
    total = {name: sum(choice[name] for choice in choices) for name in ("parameters", "bytes")}
    missing = len(space.proxies()) - len(choices)
    return {"original": original, "choices": choices, "total": {"proxies": len(choices), "missing": missing, **total}}


def bank_table(found: Mapping[str, Any]) -> list[str]:
    """Lines of text for what [`bank_choices`] found."""

    def ms(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    original, total = found["original"], found["total"]
    rows = [HEADER]
    whole = scaled(original["parameters"]), "", f"{original['bytes']:,}"
    rows.append(("a layer as it is", "", "", ms(original["ms"]), "", *whole))
    for choice in found["choices"]:
        losses = f"{choice['loss_before']:.3g}", f"{choice['loss_after']:.3g}"
        saved = scaled(choice["parameters"]), scaled(choice["saved_parameters"]), f"{choice['bytes']:,}"
        rows.append((choice["key"], *losses, ms(choice["ms"]), ms(choice["saved_ms"]), *saved))
    rows.append((f"{total['proxies']} proxies", "", "", "", "", scaled(total["parameters"]), "", f"{total['bytes']:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
    if total["missing"]:
        lines.append(f"{total['missing']} of the search space's proxies were not made (bank.only).")
    return lines
