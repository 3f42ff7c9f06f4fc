"""The tables of the ranking study: which objective foretells the quality after tuning."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..markup import markdown
from ..search.ranking import pairs_within

COLUMNS = {
    "spearman": "Spearman ρ",
    "kendall": "Kendall τ",
    "partial": "ρ given latency",
    "within": "τ within groups",
    "lead": "lead over the distance",
}
NAMES = {
    "proxy_loss": "summed proxy loss",
    "distance": "Fréchet distance",
    "denoising": "denoising loss",
    "output_error": "distance to the teacher's output",
    "parameters": "parameters, negated",
    "latency": "latency, negated",
}


def ranking_table(ranking: Mapping[str, Any]) -> str:
    """Markdown: a table for each quality after the tuning."""
    lines = []
    for name in ranking["correlations"]:
        header, rows = ranking_rows(ranking, name)
        lines += [markdown(ranking_caption(ranking, name)), "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        lines += [f"| {' | '.join([markdown(row[0]), *row[1:]])} |" for row in rows] + [""]
    return "\n".join(lines)


def ranking_rows(ranking: Mapping[str, Any], name: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table for one quality after the tuning, in plain text."""
    found = ranking["correlations"][name].items()
    rows = [[objective_label(ranking, one), *(correlation(figures[key]) for key in COLUMNS)] for one, figures in found]
    return ["objective", *COLUMNS.values()], rows


def ranking_caption(ranking: Mapping[str, Any], name: str) -> str:
    """What the figures of a table are, in plain text."""
    rows = ranking["genotypes"]
    pairs = pairs_within([row["group"] for row in rows])
    error = statistics.median(row["quality"][name][1] for row in rows)
    return (
        f"Rank correlation with the {quality_label(ranking, name)} after {ranking['steps']} tuning steps, of "
        f"{len(rows)} genotypes, seed {ranking['seed']}; in brackets 95 % intervals of a bootstrap over genotypes. "
        f"Within groups: {pairs} pairs of similar latency. Lead: of ρ given latency over that of the distance as "
        f"assembled ({ranking['search_samples']} images). A tuned genotype's own standard error is {error:.2g} "
        "(median); as all share images and noise, that of a difference is less."
    )


def quality_label(ranking: Mapping[str, Any], name: str) -> str:
    """What genotypes are ranked by after their tuning, in words."""
    if name == "distance":
        return f"Fréchet distance ({ranking['extractor']}, {ranking['samples']} images)"
    return f"denoising loss ({ranking['held_out']} held-out images a bucket)"


def objective_label(ranking: Mapping[str, Any], objective: str) -> str:
    """An objective's name in words, e.g. "denoising loss, t 200–400"."""
    name, _, more = objective.partition(" ")
    if more == "early":
        return f"{NAMES[name]} after {ranking['early_steps']} steps"
    if more:
        edges = [0.0, *ranking["edges"], 1000.0]
        low, high = edges[int(more) - 1 : int(more) + 1]
        return f"{NAMES[name]}, t {low:.0f}–{high:.0f}"
    return NAMES[name]


def correlation(figure: Sequence[float | None]) -> str:
    """A correlation `(value, low, high)` with its interval, in plain text; a dash where it is not defined."""
    value, low, high = figure
    if value is None or low is None or high is None:
        return "–"
    value, low, high = (round(number, 2) + 0.0 for number in (value, low, high))  # no minus before zero
    return f"{value:.2f} [{low:.2f}, {high:.2f}]".replace("-", "−")
