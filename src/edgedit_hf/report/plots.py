"""The figures of a compression run, one function each: plain values in, a PNG out. No state, no display needed.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; every series also has its own marker or dash.
"""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image

from ..errors import EdgeDiTError
from ..files import aside_of
from ..genotype import Genotype
from ..search.pareto import pareto_front
from ..search_space import OPTIONS, SearchSpace

Points = Sequence[Sequence[float]]
BLUE, ORANGE, GREEN, RED, PURPLE, GREY, BLACK = "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #8A8F98 #1A1A1A".split()
SKY, YELLOW = "#56B4E9", "#F0E442"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, RED, GREY)
HATCHES = ("", "///", "...", "xxx")  # when the colours are used up
OPTION_COLOURS = dict(zip(OPTIONS, PALETTE))
OPTION_LABELS = dict(zip(OPTIONS, ("original size", "narrow MLP", "narrow attention", "both narrow")))
OPTION_PARTS = {  # of a menu's names
    "attn": "attention {}",
    "heads": "{} heads",
    "mlp": "MLP ratio {}",
    "static": "static modulation",
    "rank": "modulation rank {}",
    "tokens": "{0} × {0} tokens",
}

# Name in a bank's index → marker, whether it is a start that the bank itself made, words.
PROXY_STARTS = {
    "random": ("x", False, "random"),
    "copied": ("+", False, "copied weights"),
    "closed_form": ("o", True, "closed form"),
    "combined": ("D", True, "of two trained proxies"),
}
MERGED_NAMES = {1: "teacher layer", 2: "merged pair of teacher layers", 3: "merged three teacher layers"}
LEGEND = {"columnspacing": 1.4, "handletextpad": 0.4}


# -------------------------------------------------------------------- search


def pareto_plot(
    path: str | os.PathLike,
    points: Points,
    random_points: Points = (),
    chosen: Sequence[float] | None = None,
    teacher: Sequence[float] | None = None,
    distance_label: str = "Fréchet distance",
    named: Mapping[str, tuple[float | None, float]] = MappingProxyType({}),
    by: str = "Bayesian search",
) -> None:
    """What the search evaluated, its Pareto front, the choice, the teacher and students that have a name.

    Args:
        points, random_points: (distance, latency_ms) of every genotype evaluated by the search and by random search.
        chosen, teacher: (distance, latency_ms) of the student that is built and of the uncompressed model.
        named: (distance, latency_ms) by name; a distance that nobody evaluated is `None`: a line at the latency alone.
        by: what chose the points.
    """
    figure, axes = _figure(7.2, 4.6)
    if len(random_points):
        distance, latency = np.asarray(random_points).T
        axes.scatter(latency, distance, marker="x", s=34, color=GREY, label="random search", zorder=2)
    distance, latency = np.asarray(points).T
    axes.scatter(latency, distance, s=34, facecolor="white", edgecolor=BLUE, label=by, zorder=3)
    front = np.asarray(points)[pareto_front(points)]
    axes.step(front[:, 1], front[:, 0], where="pre", color=BLUE, linewidth=1.2, zorder=2)
    axes.scatter(front[:, 1], front[:, 0], s=34, color=BLUE, label="Pareto front", zorder=4)
    if teacher is not None:
        axes.scatter(teacher[1], teacher[0], marker="D", s=60, color=BLACK, label="teacher", zorder=5)
    if chosen is not None:
        axes.scatter(chosen[1], chosen[0], marker="*", s=260, color=ORANGE, edgecolor=BLACK, label="chosen", zorder=6)
    for (name, (distance, latency)), colour, marker in zip(named.items(), (GREEN, PURPLE, RED), "s^v"):
        if distance is None:
            label = f"{name} (not evaluated)"
            axes.axvline(latency, color=colour, linestyle=":" if marker == "s" else "--", linewidth=1.5, label=label)
        else:
            axes.scatter(latency, distance, marker=marker, s=60, color=colour, edgecolor=BLACK, label=name, zorder=5)
    axes.set_xlabel("predicted latency (ms)")
    axes.set_ylabel(textwrap.fill(f"{distance_label}, not yet tuned", 40))
    _log_if_wide(axes, [float(d) for d, _ in points])
    _legend_below(axes, columns=3 if named else 5)
    _save(figure, path)


def hypervolume_plot(
    path: str | os.PathLike,
    traces: Mapping[str, Sequence[float] | Sequence[Sequence[float]]],
    num_initial: int = 0,
    whole: float | None = None,
    label: str = "hypervolume (distance × ms)",
) -> None:
    """Hypervolume after each evaluation, a line a search; the initial points, which the searches share, are shaded.

    Args:
        traces: by name what one run reached, or a sequence a seed: then their mean, and from the least to the most as
            a band.
        whole: hypervolume of the true front, where that is known.
        label: of the axis.
    """
    figure, axes = _figure(7.2, 4.2)
    looks = zip((BLUE, GREY, GREEN, ORANGE, PURPLE, RED, SKY), ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)), "--"))
    means = {}
    for (name, values), (colour, dash) in zip(traces.items(), looks):
        seeds = np.atleast_2d(np.asarray(values, dtype=float))
        mean = means[name] = seeds.mean(axis=0)
        x = np.array([*range(1, len(mean) + 1), len(mean) + 0.5])  # half a step more shows where the last one led
        axes.step(x, _held(mean), where="post", color=colour, linestyle=dash, linewidth=2, label=name)
        if len(seeds) > 1:
            band = _held(seeds.min(axis=0)), _held(seeds.max(axis=0))
            axes.fill_between(x, *band, step="post", color=colour, alpha=0.15, linewidth=0)
    if whole is not None:
        axes.axhline(whole, color=BLACK, linewidth=1, linestyle=(0, (1, 3)), label="true front")
    if num_initial:
        axes.axvspan(1, num_initial, color=GREY, alpha=0.15, linewidth=0, label="initial points")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("genotypes evaluated")
    axes.set_ylabel(label)
    # The searches differ after the initial points, which rise from 0: show where they end, and as much again below.
    best = max(*(mean[-1] for mean in means.values()), whole or 0.0)
    shared = min(mean[min(num_initial, len(mean)) - 1] for mean in means.values()) if num_initial else 0.0
    axes.set_ylim(bottom=max(0.0, shared - max(best - shared, 0.02 * best)), top=1.01 * best)
    axes.set_xlim(1, max(map(len, means.values())) + 0.5)
    _legend_below(axes)
    _save(figure, path)


def latency_plot(path: str | os.PathLike, networks: Sequence[Mapping[str, Any]]) -> None:
    """Whole networks as a latency table predicts them and as they were measured, with the line where both are equal.

    Args:
        networks: `predicted_ms`, `measured_ms` and, where it was kept, `iqr_ms` of the measured rounds.
    """
    predicted, measured = (np.array([n[f"{kind}_ms"] for n in networks], float) for kind in ("predicted", "measured"))
    figure, axes = _figure(5.6, 5.0)
    half = np.array([(n.get("iqr_ms") or 0.0) / 2 for n in networks])
    low, high = (f(np.concatenate([predicted, measured - half, measured + half])) for f in (np.min, np.max))
    ends = np.array([max(0.0, low - 0.08 * (high - low)), high + 0.08 * (high - low)])
    axes.fill_between(ends, 0.92 * ends, 1.08 * ends, color=GREY, alpha=0.15, linewidth=0, label="within 8 %")
    axes.plot(ends, ends, color=GREY, linewidth=1.2, label="predicted = measured")
    bars = {"xerr": half, "ecolor": SKY, "elinewidth": 2} if half.any() else {}
    label = "network (bar: IQR of its rounds)" if half.any() else "network"
    axes.errorbar(measured, predicted, fmt="o", color=BLUE, markersize=6, markeredgecolor="white", label=label, **bars)
    error = np.abs(predicted - measured) / measured
    axes.set_title(
        f"{len(networks)} whole networks: mean error {error.mean():.1%}, largest {error.max():.1%}", fontsize=11
    )
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.set_aspect("equal")
    axes.set_xlabel("measured (ms)")
    axes.set_ylabel("predicted (ms)")
    _legend_below(axes)
    _save(figure, path)


def devices_plot(path: str | os.PathLike, devices: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Whole networks of several devices as their tables predict them and as they were measured, each as a share of the
    device's slowest network.

    Args:
        devices: by name, networks as [`latency_plot`] takes them.
    """
    figure, axes = _figure(5.6, 5.0)
    axes.plot([0, 1.08], [0, 1.08], color=GREY, linewidth=1.2, label="predicted = measured")
    for place, (name, networks) in enumerate(devices.items()):
        predicted, measured = (np.array([n[f"{kind}_ms"] for n in networks]) for kind in ("predicted", "measured"))
        most, look = measured.max(), {"color": PALETTE[1 + place % 7], "marker": "osD^v<>"[place % 7], "s": 34}
        axes.scatter(measured / most, predicted / most, edgecolor="white", label=f"{name} ({most:.3g} ms)", **look)
    axes.set_xlim(0, 1.08)
    axes.set_ylim(0, 1.08)
    axes.set_aspect("equal")
    axes.set_xlabel("measured / slowest measured")
    axes.set_ylabel("predicted / slowest measured")
    _legend_below(axes, columns=2)
    _save(figure, path)


# -------------------------------------------------------------------- bank and genotype


def option_label(option: str) -> str:
    """An option's name in words: "mlp" is "narrow MLP", and "attn512-mlp2" of a menu "attention 512, MLP ratio 2"."""
    if option in OPTION_LABELS:
        return OPTION_LABELS[option]
    parts = [re.fullmatch(r"([a-z]+)(.*)", part) for part in option.split("-")]
    return ", ".join(OPTION_PARTS.get(p[1], p[0]).format(p[2]) if p else option for p in parts)


def option_looks(options: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(colour, hatch) of every option, in the order of their first mention; the paper's keep theirs."""
    names = list(dict.fromkeys(options))
    if set(names) <= set(OPTIONS):
        return {name: (OPTION_COLOURS[name], "") for name in names}
    names = ["original", *(name for name in names if name != "original")]
    return {name: (PALETTE[i % 8], HATCHES[i // 8 % 4]) for i, name in enumerate(names)}


def proxy_loss_plot(path: str | os.PathLike, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Loss of every proxy block before and after its distillation, grouped by what the block is, and what other starts
    would have had.

    Args:
        entries: of a proxy bank's index: `source` (teacher layers), `option`, `loss_before`, `loss_after`, and, in
            newer banks, `losses` (by name of [`PROXY_STARTS`]).
    """
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for entry in sorted(entries.values(), key=lambda e: (len(e["source"]), *option_order(e["option"]), e["source"])):
        groups.setdefault((len(entry["source"]), entry["option"]), []).append(entry)
    if not groups:
        raise EdgeDiTError("The proxy bank has 0 entries; run the stage 'bank' first.")
    rows = [[key for key in groups if key[0] == length] for length in sorted({length for length, _ in groups})]
    looks = option_looks(option for _, option in groups)
    figure, _ = _figure(9.4, 1.4 + 2.8 * len(rows), axes=False)
    axes_of = figure.subplots(len(rows), 1, sharey=True, squeeze=False)[:, 0]
    shown = [name for name in PROXY_STARTS if any(name in e.get("losses", {}) for e in entries.values())]
    for axes, row in zip(axes_of, rows):
        _style(axes)
        start, ticks, names = 0, [], []
        crowded = len(row) > 4
        for length, option in row:
            group = groups[(length, option)]
            x = np.arange(start, start + len(group))
            before, after = (np.array([e[f"loss_{when}"] for e in group], dtype=float) for when in ("before", "after"))
            colour, _ = looks[option]
            axes.vlines(x, np.minimum(before, after), np.maximum(before, after), color=colour, alpha=0.5, linewidth=2)
            for name in shown:
                marker, own, _ = PROXY_STARTS[name]
                points = [(place, e["losses"][name]) for place, e in zip(x, group) if name in e.get("losses", {})]
                if points:
                    look = {"facecolor": "white", "edgecolor": colour} if own else {"color": GREY}
                    axes.scatter(*zip(*points), s=26, marker=marker, linewidth=1.2, zorder=3, **look)
            if not any("losses" in e for e in group):
                axes.scatter(x, before, s=28, facecolor="white", edgecolor=colour, zorder=3)
            axes.scatter(x, after, s=28, color=colour, zorder=4)
            every = -(-len(group) // max(1, (16 if length > 1 else 30) // len(row)))  # as many names as fit
            ticks += list(x[::every])
            names += [_layers_name(e["source"]) for e in group[::every]]
            axes.text(
                x.mean(),
                1.02,
                textwrap.shorten(option_label(option), 34, placeholder=" …") if crowded else option_label(option),
                color=BLACK if crowded else colour,
                transform=axes.get_xaxis_transform(),
                ha="left" if crowded else "center",
                va="bottom",
                rotation=30 if crowded else 0,
                rotation_mode="anchor",
                fontsize=8 if crowded else None,
            )
            start += len(group) + 1
        axes.set_yscale("log")
        axes.set_xticks(ticks, names, fontsize=8)
        axes.set_xlim(-1, start - 1)
        axes.set_xlabel(MERGED_NAMES[row[0][0]])
        axes.set_ylabel("feature loss (1: layer left out)" if shown else "feature loss")
    marks = []
    for name in shown:
        marker, own, label = PROXY_STARTS[name]
        look = {"markerfacecolor": "white", "markeredgecolor": BLACK} if own else {"color": GREY}
        marks.append(Line2D([], [], linestyle="none", marker=marker, label=label, **look))
    if not shown:
        marks.append(
            Line2D(
                [],
                [],
                linestyle="none",
                marker="o",
                markerfacecolor="white",
                markeredgecolor=BLACK,
                label="at the start",
            )
        )
    marks.append(Line2D([], [], linestyle="none", marker="o", color=BLACK, label="after distillation"))
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False, **LEGEND)
    _save(figure, path)


def sensitivity_plot(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]], num_layers: int) -> None:
    """What single changes cost: a layer's own feature loss and the whole model's output error, by place; on the right,
    everywhere at once.

    Args:
        rows: of training/sensitivity.py's table: `change`, `layers` (lists of teacher layers), `layer_before`,
            `layer_after` (`None` for the change everywhere), `model_before`, `model_after`.
    """
    names = list(dict.fromkeys(row["change"] for row in rows))
    looks = dict(zip(names, zip((BLUE, "#56B4E9", GREEN, ORANGE, "#B8860B", RED, PURPLE), "osD^v<>")))
    figure, _ = _figure(10.5, 4.4, axes=False)
    layer_axes, model_axes, all_axes = figure.subplots(1, 3, width_ratios=(3, 3, 1.6))
    for axes, quantity, label in (
        (layer_axes, "layer", "feature loss of the layer"),
        (model_axes, "model", "output error of the model"),
    ):
        _style(axes)
        for name in names:
            places = [row for row in rows if row["change"] == name and row["layer_after"] is not None]
            x = [(row["layers"][0][0] + row["layers"][0][-1]) / 2 for row in places]
            colour, marker = looks[name]
            axes.plot(x, [row[f"{quantity}_before"] for row in places], color=colour, linestyle=":", linewidth=1)
            axes.plot(
                x,
                [row[f"{quantity}_after"] for row in places],
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=1.6,
                label=name,
            )
        axes.set_yscale("log")
        axes.set_xlim(-0.3, num_layers - 0.7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("teacher layer (middle of merged ones)")
        axes.set_ylabel(label)
    _style(all_axes)
    for place, name in enumerate(names):
        colour, marker = looks[name]
        for row in rows:
            if row["change"] == name and row["layer_after"] is None:
                all_axes.vlines(
                    place, *sorted((row["model_before"], row["model_after"])), color=colour, linestyle=":", linewidth=1
                )
                all_axes.scatter(place, row["model_before"], s=24, marker=marker, facecolor="white", edgecolor=colour)
                all_axes.scatter(place, row["model_after"], s=24, marker=marker, color=colour)
    all_axes.set_yscale("log")
    all_axes.set_xticks([])
    all_axes.set_xlim(-0.6, len(names) - 0.4)
    all_axes.set_xlabel("everywhere at once")
    all_axes.set_ylabel("output error of the model")
    handles, labels = layer_axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9, **LEGEND)
    figure.suptitle("dotted, hollow: closed-form start; solid: after the tune", fontsize=10, color=GREY)
    _save(figure, path)


RANKED = {
    "proxy_loss": "summed proxy loss",
    "distance": "Fréchet distance as assembled",
    "denoising": "denoising loss",
    "output_error": "distance to the teacher's output",
    "distance early": "Fréchet distance after a few steps",
    "latency": "latency, negated",
}


def ranking_plot(path: str | os.PathLike, ranking: Mapping[str, Any]) -> None:
    """Quality after tuning against what was known before it: a panel an objective, a point a genotype.

    Args:
        ranking: of training/rank_objectives.py.
    """
    rows = ranking["genotypes"]
    figure, _ = _figure(10.5, 6.2, axes=False)
    groups = sorted({row["group"] for row in rows})
    colours = [BLUE, ORANGE, GREEN, RED, PURPLE, BLACK]
    marks = {"best": "^", "random": "o", "worst": "v"}
    for axes, (name, label) in zip(figure.subplots(2, 3, sharey=True).flat, RANKED.items()):
        _style(axes)
        for row in rows:
            colour = colours[groups.index(row["group"]) % len(colours)]
            x, y = row["objectives"][name], row["quality"]["distance"][0]
            axes.scatter(x, y, s=28, color=colour, marker=marks[row["kind"]])
        figures = ranking["correlations"]["distance"][name]
        said = " · ".join(
            f"{words} {'–' if figures[key][0] is None else format(figures[key][0], '.2f')}"
            for key, words in (("spearman", "ρ"), ("within", "τ within groups"))
        )
        axes.set_title(said, fontsize=9, color=GREY)
        axes.set_xlabel(label)
    figure.supylabel("Fréchet distance after the tuning", fontsize=10)
    handles = [
        Line2D(
            [], [], linestyle="none", marker="s", color=colours[place % len(colours)], label=_group_label(rows, group)
        )
        for place, group in enumerate(groups)
    ]
    handles += [
        Line2D(
            [], [], linestyle="none", marker=mark, color=GREY, label=f"{kind} proxy loss" if kind != "random" else kind
        )
        for kind, mark in marks.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9, **LEGEND)
    _save(figure, path)


def _group_label(rows: Sequence[Mapping[str, Any]], group: int) -> str:
    times = [row["latency_ms"] for row in rows if row["group"] == group]
    return f"{sum(times) / len(times):.3g} ms"


def genotype_strip(path: str | os.PathLike, genotype: Genotype, space: SearchSpace) -> None:
    """The student's layers under the teacher's: one cell a layer, coloured by option, merged layers drawn wide."""
    figure, axes = _figure(8.4, 2.1)
    size = min(10.0, 260 / space.num_layers)
    for number in range(space.num_layers):
        _cell(axes, number, 1, 1.15, "#E3E6EA", str(number), BLACK, size)
    looks = option_looks(sorted(map(space.option_of, genotype.layers), key=option_order))
    for layer in genotype.layers:
        colour, hatch = looks[space.option_of(layer)]
        text = _layers_name(layer.source)
        _cell(axes, layer.source[0], len(layer.source), 0.0, colour, text, _ink(colour), size, hatch)
    axes.set_xlim(-0.02, space.num_layers + 0.02)
    axes.set_ylim(-0.05, 2.2)
    counts = f"{space.num_layers} layers", f"{len(genotype.layers)} layers"
    axes.set_yticks([0.5, 1.65], [f"student\n{counts[1]}", f"teacher\n{counts[0]}"])
    axes.set_xticks([])
    _bare(axes)
    used = {space.option_of(layer) for layer in genotype.layers}
    _legend_below(axes, handles=[_patch(*looks[option], option_label(option)) for option in looks if option in used])
    _save(figure, path)


def front_strips(
    path: str | os.PathLike,
    points: Sequence[tuple[Genotype, float, float]],
    space: SearchSpace,
    chosen: Genotype | None = None,
    most: int = 24,
) -> None:
    """What each teacher layer became along a front: a row a student, fastest first, a column a teacher layer, a colour
    an option, and merged layers one wide cell. With more options than the paper's four, the cells are numbered too.

    Args:
        points: (genotype, distance, latency in ms).
        chosen: the student whose row is marked.
        most: rows; of a longer front as many, evenly, with both ends and the chosen one.
    """
    rows = sorted(points, key=lambda point: point[2])
    if len(rows) > most:
        kept = {round(i) for i in np.linspace(0, len(rows) - 1, most)}
        rows = [row for i, row in enumerate(rows) if i in kept or row[0] == chosen]
    used = {space.option_of(layer) for genotype, *_ in rows for layer in genotype.layers}
    looks = option_looks(sorted(used, key=option_order))
    looks = {option: look for option, look in looks.items() if option in used}
    numbers = {} if used <= set(OPTIONS) else {option: str(i) for i, option in enumerate(looks, start=1)}
    count, decimals = len(rows), [_decimals(column) for column in list(zip(*rows))[1:]]
    figure, axes = _figure(8.4, 1.3 + 0.3 * count + 0.22 * (len(looks) // 3))
    size = min(9.0, 240 / space.num_layers)
    for row, (genotype, distance, latency) in enumerate(rows):
        y = count - 1 - row
        for layer in genotype.layers:
            option = space.option_of(layer)
            colour, hatch = looks[option]
            text, width = numbers.get(option, ""), len(layer.source)
            _cell(axes, layer.source[0], width, y + 0.08, colour, text, _ink(colour), size, hatch, 0.84)
        weight = "bold" if genotype == chosen else "normal"
        style = {"va": "center", "fontsize": 9, "color": BLACK, "fontweight": weight}
        star = "★ " if genotype == chosen else ""
        for x, text, side in (
            (-0.012, f"{star}{latency:.{decimals[1]}f} ms", "right"),
            (1.012, f"{distance:.{decimals[0]}f}", "left"),
        ):
            axes.text(x, y + 0.5, text, ha=side, transform=axes.get_yaxis_transform(), **style)
    for x, text, side in ((-0.012, "latency", "right"), (1.012, "distance", "left")):
        axes.text(x, count + 0.15, text, ha=side, transform=axes.get_yaxis_transform(), fontsize=9, color=GREY)
    axes.set_xlim(-0.02, space.num_layers + 0.02)
    axes.set_ylim(0, count)
    axes.xaxis.tick_top()
    axes.set_xticks([i + 0.5 for i in range(space.num_layers)], list(map(str, range(space.num_layers))), fontsize=size)
    axes.set_yticks([])
    axes.set_xlabel("teacher layer" + (" (★ the chosen student)" if chosen in [row[0] for row in rows] else ""))
    _bare(axes)
    names = {option: f"{numbers[option]}: " if numbers else "" for option in looks}
    handles = [_patch(*look, names[option] + option_label(option)) for option, look in looks.items()]
    _legend_below(axes, handles=handles, columns=4 if not numbers else 3)
    _save(figure, path)


# -------------------------------------------------------------------- samples and curves


def montage(images: np.ndarray, columns: int) -> np.ndarray:
    """Tile images row by row, one pixel of white between them; missing tiles of the last row are white.

    Args:
        images: shape (n, height, width, channels) with 1 or 3 channels; uint8, or floats in [0, 1] (a pipeline's
            `output_type="np"`).
        columns: images a row.

    Returns:
        One picture, shape (rows·(height + 1) - 1, columns·(width + 1) - 1, 3), uint8.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images) or not np.isfinite(images).all():
        raise EdgeDiTError(
            f"The images have shape {images.shape}; expected finite values of shape (n, height, width, 1 or 3)."
        )
    if images.dtype != np.uint8:
        images = np.rint(images.clip(0, 1) * 255).astype(np.uint8)
    count, height, width, _ = images.shape
    pixels = np.broadcast_to(images, (count, height, width, 3))
    rows = -(-count // columns)
    picture = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, dtype=np.uint8)
    for index in range(count):
        top, left = (index // columns) * (height + 1), (index % columns) * (width + 1)
        picture[top : top + height, left : left + width] = pixels[index]
    return picture


def save_montage(path: str | os.PathLike, images: np.ndarray, columns: int) -> None:
    """Write a [`montage`] as a PNG, pixel for pixel."""
    _replace(path, lambda aside: Image.fromarray(montage(images, columns)).save(aside, format="PNG"))


def sample_grid(path: str | os.PathLike, panels: Mapping[str, np.ndarray]) -> None:
    """Pictures of the same seeds side by side, one labelled panel a model.

    Args:
        panels: label → picture of shape (height, width, 3), e.g. [`montage`]s with the same number of columns.
    """
    if not panels:
        raise EdgeDiTError("There are 0 pictures to put side by side; give at least 1.")
    shape = np.mean([picture.shape[:2] for picture in panels.values()], axis=0)
    # Narrow pictures stand in one row; wide ones two by two, where they still show their pixels.
    columns = len(panels) if shape[1] < 0.6 * shape[0] or len(panels) < 3 else 2
    rows = -(-len(panels) // columns)
    figure, _ = _figure(9.0, rows * (9.0 / columns * shape[0] / shape[1] + 0.4), axes=False)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    axes_of = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in axes_of:
        axes.set_axis_off()
    for axes, (label, picture) in zip(axes_of, panels.items()):
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(label, fontsize=11)
    _save(figure, path)


def caption_grid(path: str | os.PathLike, captions: Sequence[str], rows: Mapping[str, np.ndarray]) -> None:
    """Generated images under the captions that they are of, one labelled row a model.

    Args:
        rows: label → images of shape (len(captions), height, width, 1 or 3), uint8.
    """
    count = len(captions)
    if not count or not rows or any(len(images) != count for images in rows.values()):
        raise EdgeDiTError(
            f"There are {count} captions and rows of {[len(images) for images in rows.values()]} images; give as many "
            "of each."
        )
    figure, _ = _figure(10.0, 0.75 + len(rows) * 10.0 / (count + 0.7), axes=False)
    axes_of = figure.subplots(len(rows), count, squeeze=False)
    for (label, images), of_row in zip(rows.items(), axes_of):
        of_row[0].set_ylabel(label, fontsize=11)
        for axes, image in zip(of_row, images):
            axes.imshow(np.broadcast_to(image, (*image.shape[:2], 3)), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
    for axes, caption in zip(axes_of[0], captions):
        axes.set_title(textwrap.fill(caption, 15), fontsize=7)
    _save(figure, path)


def curve_plot(
    path: str | os.PathLike,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    ylabel: str = "Fréchet distance",
    xlabel: str = "fine-tuning steps",
) -> None:
    """Quality against steps. `series`: label → (steps, values)."""
    figure, axes = _figure(7.2, 3.8)
    looks = zip((BLUE, ORANGE, GREEN, PURPLE, RED, GREY), "osD^vx", ("-", "--", "-.", ":", "-", "--"))
    for (label, (steps, values)), (colour, marker, dash) in zip(series.items(), looks):
        axes.plot(steps, values, color=colour, marker=marker, linestyle=dash, linewidth=2, markersize=5, label=label)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    _log_if_wide(axes, [value for _, values in series.values() for value in values])
    _legend_below(axes)
    _save(figure, path)


# -------------------------------------------------------------------- shared


def _figure(width: float, height: float, axes: bool = True) -> tuple[Figure, Axes | None]:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, _style(figure.add_subplot()) if axes else None


def _style(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return axes


def _log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic y axis where the values span more than a factor of ten, with plain numbers on it."""
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")


def _legend_below(axes: Axes, handles: Sequence[Patch] | None = None, columns: int = 5) -> None:
    handles = handles or axes.get_legend_handles_labels()[0]
    figure = axes.get_figure()
    columns = min(columns, len(handles))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, **LEGEND)


def _bare(axes: Axes) -> None:
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _decimals(values: Iterable[float]) -> int:
    """Digits behind the point, of which the largest of the values has four significant ones."""
    return max(0, 3 - math.floor(math.log10(max(values))))


def _held(values: np.ndarray) -> np.ndarray:
    """With the last one twice."""
    return np.append(values, values[-1])


def option_order(option: str) -> tuple[int, str]:
    """To sort options by: the paper's in their order, then a menu's by name."""
    return (OPTIONS.index(option) if option in OPTIONS else len(OPTIONS), option)


def _layers_name(source: Sequence[int]) -> str:
    return str(source[0]) if len(source) == 1 else f"{source[0]}–{source[-1]}"


def _cell(
    axes: Axes,
    x: float,
    width: float,
    y: float,
    colour: str,
    text: str,
    ink: str,
    size: float,
    hatch: str = "",
    height: float = 1.0,
) -> None:
    lines = {"edgecolor": _ink(colour), "linewidth": 0.0, "hatch": hatch} if hatch else {"edgecolor": "none"}
    axes.add_patch(Rectangle((x + 0.03, y), width - 0.06, height, facecolor=colour, **lines))
    if text:
        box = {"boxstyle": "round,pad=0.15", "facecolor": colour, "edgecolor": "none"} if hatch else None
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink, fontsize=size, bbox=box)


def _ink(colour: str) -> str:
    return "white" if colour in (BLUE, GREEN, RED, GREY) else BLACK


def _patch(colour: str, hatch: str, label: str) -> Patch:
    edge = _ink(colour) if hatch else colour
    return Patch(facecolor=colour, edgecolor=edge, hatch=hatch, linewidth=0, label=textwrap.fill(label, 34))


def _save(figure: Figure, path: str | os.PathLike) -> None:
    """In the format that the name ends with."""
    kind = Path(path).suffix.removeprefix(".") or "png"
    _replace(path, lambda aside: figure.savefig(aside, format=kind, bbox_inches="tight", pad_inches=0.1))


def _replace(path: str | os.PathLike, write: Any) -> None:
    """A PNG that is there is a whole one: written aside, then moved."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    write(aside)
    os.replace(aside, path)
