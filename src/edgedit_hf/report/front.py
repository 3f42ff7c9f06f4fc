"""The genotypes of a search as the page of its report names them, and the students of the paper. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EdgeDiTError
from ..files import hash_json
from ..genotype import Genotype, LayerSpec
from ..records import SearchState, StageRecord
from ..search.device_tables import load_table
from ..search.pareto import pareto_front
from ..search_space import SearchSpace, default_attention_dim
from .page import optional_record
from .tables import MODEL_LABELS, latency_label, metric_label, scaled

POINTS = 400
"""Genotypes of a search that the page names, at most: the front, those with a name, and others evenly."""

KINDS = ("random", "search", "front", "named", "teacher", "chosen")
"""What a point is; of a genotype that is several, the last."""


def paper_students(space: SearchSpace) -> dict[str, Genotype]:
    """EdgeDiT-1 (MLPs of half the size) and EdgeDiT-6 (attention of 4/9 of the width), both with three of fourteen
    pairs merged, or what they are of another teacher: as great a share of its pairs, around its middle. Those that a
    space does not have are left out.
    """
    pairs = space.num_layers // 2
    count = max(1, round(pairs * 3 / 14))
    first = pairs // 2 - pairs // (count + 1) * (count - 1) // 2
    merged = {2 * (first + place * (pairs // (count + 1))) for place in range(count)} if pairs else set()
    narrow = default_attention_dim(space.hidden_size, space.num_heads)
    found = {}
    for name, attention_dim, mlp_ratio in (
        ("EdgeDiT-1", space.hidden_size, space.mlp_ratio / 2),
        ("EdgeDiT-6", narrow, space.mlp_ratio),
    ):
        sources = [(i, i + 1) if i in merged else (i,) for i in range(space.num_layers) if i - 1 not in merged]
        layers = tuple(LayerSpec(source, attention_dim, space.num_heads, mlp_ratio) for source in sources)
        with contextlib.suppress(EdgeDiTError):
            space.code(genotype := Genotype(layers, space.hidden_size))
            found[name if space.num_layers == 28 else f"like {name}"] = genotype
    return found


def named_students(run_dir: Path) -> dict[str, list[float | None]]:
    """[distance, latency_ms] of the paper's students, as far as the search's space has them; a distance that the search
    did not evaluate is `None`.
    """
    file = run_dir / "latency" / "table.json"
    state = optional_record(run_dir / "search" / "state.json", SearchState)
    if state is None or not file.exists():
        return {}
    table = load_table(file)
    evaluated = {tuple(point["code"]): point["distance"] for point in state["told"]}
    return {
        name: [evaluated.get(table.space.code(genotype)), table.latency_ms(genotype)]
        for name, genotype in paper_students(table.space).items()
    }


def front_data(run_dir: Path, report: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the page needs to draw a search whose points say what they are; `None`: the run has no search.

    Returns:
        `key` (searches with the same one have the same axes), `about` (what is in it, in words), `y` (its axis, in
        words), `layers` (of the teacher), `options` (`label`, `colour` of each), `lines` ([name, latency] of the
        paper's students that were not evaluated), `points` (by latency: `x`, `y`, `kind`, `name`, `strip`: [first
        layer, how many, option] of each layer, `facts`: [what, how much]), `front` ([latency, distance]), and
        `left_out` (how many genotypes).
    """
    search = report.get("search")
    if search is None:
        return None
    from .plots import option_label, option_looks, option_order

    space = SearchSpace.from_dict(report["bank"]["space"])
    genotypes = _told(run_dir)
    chosen = Genotype.of(report["genotype"])
    whole = Genotype.original(space.num_layers, space.hidden_size, space.num_heads, space.mlp_ratio)
    if chosen.hash not in genotypes:  # taken by hand since
        its = search["chosen"]
        figures = {"distance": its["distance"], "latency_ms": its["predicted_latency_ms"]}
        genotypes[chosen.hash] = {**figures, "genotype": chosen, "kind": "chosen", "name": ""}
    ours = [point for point in genotypes.values() if point["kind"] == "search"]
    best = [ours[i] for i in pareto_front([(point["distance"], point["latency_ms"]) for point in ours])]
    for point in best:
        point["kind"] = "front"
    names = {genotype.hash: name for name, genotype in paper_students(space).items()}
    special = {**{key: ("named", name) for key, name in names.items()}, whole.hash: ("teacher", "teacher")}
    special[chosen.hash] = ("chosen", "chosen student" + (f", {names[chosen.hash]}" if chosen.hash in names else ""))
    for key, (kind, name) in special.items():
        if key in genotypes:
            genotypes[key] |= {"kind": kind, "name": name}
    kept = _bounded(list(genotypes.values()))
    used = {space.option_of(layer) for point in kept for layer in point["genotype"].layers}
    options = sorted(used, key=option_order)
    looks = option_looks(options)
    metric = metric_label(search["metric"]) if "metric" in search else "Fréchet distance"
    about = _protocol(run_dir, metric)
    return {
        "key": hash_json(about),
        "about": about,
        "y": f"{metric}, not yet tuned",
        "layers": space.num_layers,
        "options": [{"label": option_label(option), "colour": looks[option][0]} for option in options],
        "lines": [[name, x] for name, (distance, x) in search["named"].items() if distance is None],
        "points": [_point(point, space, options, report["models"], metric) for point in kept],
        "front": [[point["latency_ms"], point["distance"]] for point in reversed(best)],
        "left_out": len(genotypes) - len(kept),
    }


def overlaid(found: Mapping[str, Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """The plots of the searches of several runs: `y`, `about` and `series` of each (`run` and what [`front_data`]
    gives), one plot for all that share latency table and distance.

    Args:
        found: of each run, by name (empty where there is one run), what [`front_data`] gives.
    """
    plots: dict[str, dict[str, Any]] = {}
    for run, front in found.items():
        if front is not None:
            plot = plots.setdefault(front["key"], {"y": front["y"], "about": front["about"], "series": []})
            plot["series"].append({"run": run, **front})
    return list(plots.values())


def _told(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Every genotype that a search evaluated, by hash: its figures, `genotype`, and `kind`: "search" or "random"."""
    found: dict[str, dict[str, Any]] = {}
    for name, kind in (("random.json", "random"), ("merge.json", "search"), ("state.json", "search")):
        state = optional_record(run_dir / "search" / name, SearchState)
        if state is not None:
            space = SearchSpace.from_dict(state["settings"]["space"])
            for point in state["told"]:
                genotype = space.from_code(point["code"])
                found[genotype.hash] = {**point, "genotype": genotype, "kind": kind, "name": ""}
    return found


def _bounded(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points by latency, of many [`POINTS`]: others than of search and random all, if they are not too many."""
    ordered = sorted(points, key=lambda point: (KINDS.index(point["kind"]) < 2, KINDS.index(point["kind"])))
    first = [point for point in ordered if KINDS.index(point["kind"]) >= 2]
    rest, room = ordered[len(first) :], max(0, POINTS - len(first))
    every = max(1, -(-len(rest) // room)) if room else len(rest) + 1
    return sorted([*first[-POINTS:], *rest[::every]], key=lambda point: (point["latency_ms"], point["distance"]))


def _point(
    point: Mapping[str, Any],
    space: SearchSpace,
    options: Sequence[str],
    models: Sequence[Mapping[str, Any]],
    metric: str,
) -> dict[str, Any]:
    genotype = point["genotype"]
    strip = [[layer.source[0], len(layer.source), options.index(space.option_of(layer))] for layer in genotype.layers]
    facts = [
        ["predicted latency", f"{point['latency_ms']:.3g} ms"],
        [f"{metric}, not tuned", f"{point['distance']:.4g}"],
        ["layers", str(len(genotype.layers))],
    ]
    if point.get("parameters", 1) > 1:
        facts += [["parameters", scaled(point["parameters"])], ["FLOPs", scaled(point["flops"])]]
    for model in models:
        if model.get("genotype_hash") == genotype.hash:
            name = MODEL_LABELS.get(model["name"], model["name"])
            measured = [f"{latency_label(key)} {ms:.2f} ms" for key, ms in model["latency_ms"].items()]
            distances = [
                f"{metric_label(key)} {value:.3g}"
                for key, value in model["metrics"].items()
                if key.startswith("fid[") and value is not None
            ]
            facts.append([f"measured: {name}", ", ".join([*distances, *measured])])
    facts.append(["genotype", genotype.hash])
    return {
        "x": float(f"{point['latency_ms']:.6g}"),
        "y": float(f"{point['distance']:.6g}"),
        "kind": point["kind"],
        "name": point["name"],
        "strip": strip,
        "facts": facts,
    }


def _protocol(run_dir: Path, metric: str) -> dict[str, Any]:
    """What latency and distance of a search's points belong to, in words."""
    file = run_dir / "latency" / "table.json"
    stage = optional_record(run_dir / "search" / "stage.json", StageRecord) or {"config": {}, "inputs": {}}
    asked = stage["config"].get("search") or {}
    tables = sorted(table.hash for table in load_table(file).devices.values()) if file.is_file() else []
    return {
        "latency table": ", ".join(tables) or f"none in {run_dir}",
        "distance": metric,
        "steps": str(asked.get("sampling_steps", "–")),
        "guidance": str(asked.get("guidance_scale", "–")),
        "data": str(stage["inputs"].get("data", "–"))[:16],
        "extractor": str(stage["inputs"].get("extractor", "–"))[:16],
    }
