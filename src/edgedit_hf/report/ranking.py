"""The tables of the ranking study: which objective foretells the quality after tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..markup import markdown
from ..search.judging import spread
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
    rows, lines = ranking["genotypes"], []
    groups = [row["group"] for row in rows]
    for name, figures in ranking["correlations"].items():
        measured = [row["quality"][name] for row in rows]
        lines += [
            f"Rank correlation with the {quality_label(ranking, name)} after {ranking['steps']} tuning steps: "
            f"{len(rows)} genotypes, seed {ranking['seed']}; in brackets 95 % intervals of a bootstrap over "
            f"genotypes. Within groups: {pairs_within(groups)} pairs of similar latency. Lead: of ρ given latency over "
            f"that of the distance as assembled ({ranking['search_samples']} images). {spread(measured):.0%} of the "
            "variance after the tuning is not noise of measuring it.",
            "",
            f"| objective | {' | '.join(COLUMNS.values())} |",
            f"|---|{'---|' * len(COLUMNS)}",
        ]
        for objective, found in figures.items():
            cells = [_cell(found[column]) for column in COLUMNS]
            lines.append(f"| {markdown(objective_label(ranking, objective))} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def quality_label(ranking: Mapping[str, Any], name: str) -> str:
    """What genotypes are ranked by after their tuning, in words."""
    if name == "distance":
        return f"Fréchet distance ({markdown(ranking['extractor'])}, {ranking['samples']} images)"
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


def _cell(figure: Sequence[float | None]) -> str:
    value, low, high = figure
    if value is None or low is None or high is None:
        return "–"
    return f"{value:.2f} [{low:.2f}, {high:.2f}]".replace("-", "−")
