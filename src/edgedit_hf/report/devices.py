"""How devices differ: what their latency tables say of the same networks, and the front would be on each. No torch.

FLOPs do not tell what a network takes on a device, and one device does not tell for another: the rank correlations here
say how far they do.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EdgeDiTError
from ..genotype import Genotype
from ..search.device_tables import DeviceTables, load_table
from ..search.latency_table import LatencyTable
from ..search.pareto import hypervolume, pareto_front
from ..search_space import SearchSpace, grid_tokens, layer_cost

SAMPLED = 256  # genotypes of the space that devices are compared by
FLOPS = "FLOPs"


def tables_of(run_dir: Path, others: Sequence[str | Path] = ()) -> dict[str, LatencyTable]:
    """The latency tables of a run's stage, and further ones for the same teacher and batch, by device; none or one
    where there is nothing to compare.

    Raises:
        EdgeDiTError: they are of different teachers or batches.
    """
    file = run_dir / "latency" / "table.json"
    own = list(load_table(file).devices.values()) if file.is_file() else []
    tables = [*own, *(table for other in others for table in load_table(other).devices.values())]
    if others and not own:
        raise EdgeDiTError(f"{run_dir} has no latency table to compare {others[0]} with; run its stage latency first.")
    different = list({table.hash: table for table in tables}.values())
    if len(different) < 2:
        return {table.device: table for table in different}
    for table in different[1:]:  # of this teacher, and with every shape that may be chosen
        table.check_config(different[0].trunk, different[0].space)
    return DeviceTables(different).devices


def compare_devices(
    tables: Mapping[str, LatencyTable], points: Sequence[tuple[Sequence[int], float]] = ()
) -> dict[str, Any]:
    """What the tables of several devices say of one another.

    Args:
        tables: by device, two or more; the first one's search space is sampled.
        points: (code, distance) of what a search evaluated.

    Returns:
        `devices`: of each its table's facts, `teacher_ms` and `prediction`; `space`: how many genotypes were sampled,
        and `pairs` of devices, and of a device and FLOPs, with `kendall` and `spearman` over them; `front` the same
        over the first device's front; `fronts`: for each device its front of the points (codes), how many of them are
        the first device's too (`shared`), and which share of the hypervolume of its own front the first device's front
        has there (`kept`).
    """
    first = next(iter(tables.values()))
    space = first.space
    tokens = grid_tokens(first.trunk)
    whole = Genotype.original(space.num_layers, space.hidden_size, space.num_heads, space.mlp_ratio)
    sampled = sample(space, SAMPLED)
    found: dict[str, Any] = {
        "devices": [_facts(name, table, table.latency_ms(whole)) for name, table in tables.items()],
        "space": _correlations(tables, sampled, tokens),
    }
    if not points:
        return found
    genotypes = [space.from_code(code) for code, _ in points]
    fronts: dict[str, list[int]] = {}
    times = {name: [table.latency_ms(genotype) for genotype in genotypes] for name, table in tables.items()}
    distances = [distance for _, distance in points]
    for name, ms in times.items():
        fronts[name] = pareto_front(list(zip(distances, ms)))
    mine = next(iter(fronts.values()))
    found["front"] = _correlations(tables, [genotypes[index] for index in mine], tokens)
    found["fronts"] = {
        name: {
            "codes": [list(points[index][0]) for index in front],
            "shared": len(set(front) & set(mine)),
            "kept": _kept(distances, times[name], mine, front),
        }
        for name, front in fronts.items()
    }
    return found


def sample(space: SearchSpace, count: int, seed: int = 0) -> list[Genotype]:
    """Different genotypes of a space, each of a uniform point of its codec; all, if they are fewer."""
    if space.size <= count:
        return list(space.all())
    generator = random.Random(seed)
    found: dict[str, Genotype] = {}
    for _ in range(20 * count):
        genotype = space.decode([generator.random() for _ in range(space.dimension)])
        found.setdefault(genotype.hash, genotype)
        if len(found) == count:
            break
    return list(found.values())


def _facts(name: str, table: LatencyTable, teacher_ms: float) -> dict[str, Any]:
    data = table.to_dict()
    prediction = data.get("prediction")
    return {
        "name": name,
        **{key: data[key] for key in ("runtime", "precision", "batch", "threads")},
        "backend": (data.get("protocol") or {}).get("backend"),
        "imported": table.imported,
        "hash": table.hash,
        "teacher_ms": teacher_ms,
        "prediction": prediction,
        "remarks": table.remarks,
    }


def _correlations(tables: Mapping[str, LatencyTable], genotypes: Sequence[Genotype], tokens: int) -> dict[str, Any]:
    """Rank correlations of the genotypes' costs between every two devices, and of each with FLOPs."""
    from scipy.stats import kendalltau, spearmanr

    values = {name: [table.latency_ms(genotype) for genotype in genotypes] for name, table in tables.items()}
    values[FLOPS] = [
        float(sum(layer_cost(genotype.hidden_size, layer.shape, tokens).flops for layer in genotype.layers))
        for genotype in genotypes
    ]
    pairs = []
    for (name, a), (other, b) in itertools.combinations(values.items(), 2):
        ranked = len(set(a)) > 1 and len(set(b)) > 1
        pairs.append(
            {
                "pair": [name, other],
                "kendall": float(kendalltau(a, b).statistic) if ranked else None,
                "spearman": float(spearmanr(a, b).statistic) if ranked else None,
            }
        )
    return {"count": len(genotypes), "pairs": pairs}


def _kept(distances: Sequence[float], ms: Sequence[float], front: Sequence[int], own: Sequence[int]) -> float:
    """The hypervolume that one front has on a device, as a share of that of the device's own."""
    reference = 1.1 * max(distances), 1.1 * max(ms)
    areas = [hypervolume([(distances[i], ms[i]) for i in each], reference) for each in (front, own)]
    return areas[0] / areas[1]


def in_words(found: Mapping[str, Any]) -> str:
    """The comparison in a few sentences."""

    def told(about: Mapping[str, Any]) -> str:
        return ", ".join(
            f"{' and '.join(pair['pair'])} {'–' if pair['kendall'] is None else format(pair['kendall'], '.2f')}"
            for pair in about["pairs"]
        )

    lines = [f"Kendall's τ over {found['space']['count']} genotypes of the space: {told(found['space'])}."]
    if "fronts" in found:
        (first, own), *others = found["fronts"].items()
        lines.append(f"Over the {found['front']['count']} of the front: {told(found['front'])}.")
        lines += [
            f"On {name} the front would have {len(front['codes'])} points, {front['shared']} of them of the "
            f"{len(own['codes'])} on {first}, whose front keeps {front['kept']:.1%} of its hypervolume there."
            for name, front in others
        ]
    return " ".join(lines)
