"""A latency table of what a device measured: the same fit and judgement as of one that is measured here. No torch."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import EdgeDiTError
from ..runtimes.timing import Timing
from ..search.latency_table import LatencyTable
from .bundle import BUNDLE, Bundle, bundles_of
from .results import THROTTLED, Results, read_rows, summarise


def find_bundle(place: str | os.PathLike, wanted: str) -> Bundle:
    """The bundle with this hash: `place` itself, or one that was made of the run `place`.

    Raises:
        EdgeDiTError: there is none, or another one; both hashes are named.
    """
    place = Path(place)
    found = [
        Bundle.read(file.parent) for file in ([place / BUNDLE] if (place / BUNDLE).is_file() else bundles_of(place))
    ]
    if not found:
        raise EdgeDiTError(
            f"{place} holds no {BUNDLE}, and no run whose bundles are below it; give what `edgedit phone pack` wrote, "
            "or the run that `edgedit phone serve` was given."
        )
    for bundle in found:
        if bundle.hash == wanted:
            return bundle
    there = ", ".join(f"{bundle.hash} ({bundle.runtime}-{bundle.precision})" for bundle in found)
    raise EdgeDiTError(f"The results are of the bundle {wanted}, but {place} holds {there}; give the one measured.")


def import_table(results: str | os.PathLike, place: str | os.PathLike, device: str) -> LatencyTable:
    """The latency table of a CSV file of results.

    Args:
        results: see [`read_rows`](results.read_rows). place: of [`find_bundle`].
        device: its name, in words: what the table is of.

    Raises:
        EdgeDiTError: the rows are no whole measurement of the bundle, or no table fits them.
    """
    rows = read_rows(results)
    if not rows:
        raise EdgeDiTError(f"{results}: there are no rows, so nothing was measured.")
    bundle = find_bundle(place, rows[0].bundle)
    return table_of(bundle, summarise(rows, bundle.hash, list(bundle.networks), str(results)), device)


def table_of(bundle: Bundle, results: Results, device: str) -> LatencyTable:
    """The latency table of a whole measurement of a bundle."""
    setting, threads = results.setting, results.setting["threads"]
    times = {
        bundle.networks[name]: Timing.from_samples(found.samples, threads) for name, found in results.networks.items()
    }
    remarks = []
    if results.throttled:
        remarks.append(
            f"the device was {results.drift:.0%} slower in the last rounds than in the first, above {THROTTLED:.0%}: "
            "it throttled; let it cool, plug it in, and measure again"
        )
    return bundle.plan.table(
        times,
        runtime=bundle.runtime,
        precision=bundle.precision,
        batch=bundle.batch,
        threads=threads,
        environment={
            "cpu": device,
            "machine": None,
            "threads": threads,
            "versions": {bundle.runtime: setting["version"]},
        },
        protocol={
            "imported": True,
            "bundle": bundle.hash,
            "device": setting["device"],  # as it calls itself
            "browser": setting["browser"],
            "backend": setting["backend"],
            "cold_loads": results.cold_loads,
            "warmups": results.warmups,
            "drift": results.drift,
            "throttled": results.throttled,
            "rows_unused": results.unused,
            "battery": results.battery and list(results.battery),
            "temperature": results.temperature and list(results.temperature),
            "time": list(results.time),
            "networks": {name: found.to_dict() for name, found in results.networks.items()},
        },
        remarks=remarks,
    )
