"""What the pages of all families share: optional records, figures, and the page itself with everything in it."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..schema import read_record
from .tables import MODEL_LABELS, comparison_table, latency_label, metric_label, scaled, template


def optional_record(path: Path, schema: Any) -> Any:
    """What a stage wrote there, or `None`."""
    return read_record(path, schema, "an earlier stage") if path.exists() else None


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture of the report: file name, heading, what it shows (for who cannot see it), and what to look for."""

    file: str
    title: str
    alt: str
    caption: str


def render_html(
    page: str,
    report: Mapping[str, Any],
    figures: Sequence[Figure],
    headlines: Sequence[tuple[str, str]],
    folder: Path,
    few_steps: tuple[list[str], list[list[str]]] = ([], []),
    ranking: tuple[list[str], list[list[str]]] = ([], []),
) -> str:
    """A page of hub_cards/ with the figures of `folder` embedded.

    Args:
        headlines: (figure, what it is) for its top. few_steps: header and rows of the table from many steps to few.
        ranking: those of the table of rank correlations.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"scaled": scaled, "metric_label": metric_label, "latency_label": latency_label}
    header, rows = comparison_table(report["models"])
    chosen = "few-step" if any(model["name"] == "few-step" for model in report["models"]) else "student-tuned"
    pictures = [(f, base64.b64encode((folder / f.file).read_bytes()).decode("ascii")) for f in figures]
    return environment.get_template(page).render(
        report=report,
        header=header,
        rows=rows,
        chosen=MODEL_LABELS[chosen],
        few_steps=few_steps,
        ranking=ranking,
        headlines=headlines,
        pictures=pictures,
    )
