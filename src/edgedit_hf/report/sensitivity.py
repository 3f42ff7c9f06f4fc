"""The tables of the sensitivity study: every row as CSV, a line a change as Markdown."""

from __future__ import annotations

import csv
import io
import statistics

from ..markup import csv_cell, markdown


def as_csv(rows: list[dict]) -> str:
    """All rows; without the errors by timestep, which table.json holds."""
    columns = ["change", "layers", "parameters", "flops", "layer_before", "layer_after", "model_before", "model_after"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {
                **row,
                "change": csv_cell(row["change"]),
                "layers": " ".join("+".join(map(str, source)) for source in row["layers"]),
            }
        )
    return text.getvalue()


def as_markdown(rows: list[dict], steps: int) -> str:
    """One line a change: damage of a single place (median, worst) and of all places at once."""
    lines = [
        f"Damage at the closed-form start → after {steps} steps. Layer: normalised feature loss. Model: relative "
        "output error.",
        "",
        "| change | FLOPs everywhere | layer, median | layer, worst | model, median | model, worst | worst place | "
        "model, everywhere |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["change"] for row in rows):
        *places, everywhere = [row for row in rows if row["change"] == name]

        def pair(quantity: str, reduce, among=places) -> str:
            return " → ".join(
                f"{reduce([row[f'{quantity}_{when}'] for row in among]):.3g}" for when in ("before", "after")
            )

        worst = max(places, key=lambda row: row["model_after"])["layers"][0]
        cells = [
            pair("layer", statistics.median),
            pair("layer", max),
            pair("model", statistics.median),
            pair("model", max),
        ]
        cells += ["–".join(map(str, sorted({worst[0], worst[-1]}))), pair("model", max, [everywhere])]
        lines.append(f"| {markdown(name)} | {everywhere['flops']:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
