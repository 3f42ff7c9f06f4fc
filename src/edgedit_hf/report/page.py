"""What the pages of all families share: optional records, figures, and the page itself with everything in it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..schema import read_record
from .tables import (
    MODEL_LABELS,
    chosen_model,
    comparison_table,
    judging_lines,
    latency_label,
    metric_label,
    plus_minus,
    scaled,
    template,
)

GENERATOR = "edgedit_hf report"
"""What a page says that it was written by."""


def optional_record(path: Path, schema: Any) -> Any:
    """What a stage wrote there, or `None`."""
    return read_record(path, schema, "an earlier stage") if path.exists() else None


def is_text_to_image(run_dir: Path) -> bool:
    """Whether a run is of that family."""
    return (run_dir / "elastic").is_dir() and not (run_dir / "bank").exists()


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture of the report: file name, heading, what it shows (for who cannot see it), and what to look for."""

    file: str
    title: str
    alt: str
    caption: str

    def embedded(self, folder: Path) -> tuple[Figure, str]:
        """Itself, and its file of that folder in base64."""
        return self, base64.b64encode((folder / self.file).read_bytes()).decode("ascii")


def render_html(
    page: str,
    report: Mapping[str, Any],
    figures: Sequence[Figure],
    headlines: Sequence[tuple[str, str]],
    folder: Path,
    few_steps: tuple[list[str], list[list[str]]] = ([], []),
    ranking: tuple[list[str], list[list[str]]] = ([], []),
    data: Mapping[str, Any] | None = None,
) -> str:
    """The page of a run, with the figures of `folder` embedded.

    Args:
        page: a template of hub_cards/. headlines: (figure, what it is) for its top.
        few_steps: header and rows of the table from many steps to few. ranking: those of the table of rank
            correlations.
        data: of [`render_page`].
    """
    header, rows = comparison_table(report["models"])
    return render_page(
        page,
        data,
        report=report,
        header=header,
        rows=rows,
        chosen=MODEL_LABELS[chosen_model(report["models"])],
        few_steps=few_steps,
        ranking=ranking,
        headlines=headlines,
        judging=[*plus_minus(report), *judging_lines(report)],
        pictures=[figure.embedded(folder) for figure in figures],
        seconds=[[stage, f"{seconds:,.0f}"] for stage, seconds in report["seconds"].items()],
    )


def render_page(page: str, data: Mapping[str, Any] | None, **values: Any) -> str:
    """A page of hub_cards/ with its style and script in it, which asks for nothing outside.

    Args:
        page: the template. values: what it names.
        data: what the script draws: `compare` of [`samples.compared`], `fronts` (of each `y` and `series`:
            [`front.front_data`], of several runs with `run`) and `telemetry` of [`telemetry.telemetry`].
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
    given = {"compare": None, "fronts": [], "telemetry": [], **(data or {})}
    style, script = _text("report.css"), _text("report.js")
    return environment.get_template(page).render(
        **values,
        compared=given["compare"],
        fronts=given["fronts"],
        telemetry=given["telemetry"],
        data=in_script(given),
        generator=GENERATOR,
        style=style,
        script=script,
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
    )


def in_script(values: Any) -> str:
    """JSON that can stand between the tags of a script: no character in it means anything in HTML."""
    text = json.dumps(values, allow_nan=False, separators=(",", ":"))  # ASCII, so no line separator is in it either
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _text(name: str) -> str:
    return (importlib.resources.files("edgedit_hf.report") / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a policy calls a style or script in the page by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
