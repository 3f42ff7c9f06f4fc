"""Every genotype of a small space, really evaluated: the ground on which searches are compared.

    edgedit train teacher|bank|latency --config training/recipes/search-digits.yaml
    python benchmarks/enumerate_space.py [RUN --config training/recipes/search-digits.yaml [--override KEY=VALUE …]
        [--shard I/N] [--output FILE]] [--table FILE] [--json] [--check]

With RUN, a run that has a teacher, a bank and a latency table, each genotype's student is assembled and judged as the
search judges it (the recipe's section search), with the standard error of its distance; every 16th also on other noise.
Evaluations are kept in RUN/enumerated one by one: interrupted or killed, run it again. N processes share the work with
--shard 1/N … N/N; each then helps the others. With all evaluated, FILE is written.

Without RUN it reads the table and prints what the space is like: its front, its ends, what the noise is, and how well
the summed losses of the bank's blocks rank the distances. --check: every genotype once, at least 1,000 of them, all
values sound, and the bootstrap's standard error not below what other noise does.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from diffusers_dit import fail

from edgedit_hf.files import atomic_write_text, hash_json, read_json, versions
from edgedit_hf.genotype import Genotype, LayerSpec
from edgedit_hf.run.config import load_config
from edgedit_hf.search.pareto import hypervolume, pareto_front
from edgedit_hf.search_space import SearchSpace

TABLE = Path(__file__).parent / "data" / "search_digits.json"
AGAIN = 16  # one genotype in so many is evaluated on a second noise
LEAST, NOISE = 1000, 1.1
Code = tuple[int, ...]
Task = tuple[Code, int]  # and the seed of the noise


# -------------------------------------------------------------------- the table


class Enumerated:
    """A space with the distance and the latency of every genotype.

    Args:
        values: of the file: `made_by`, `space`, `latency` (`trunk_ms`, `blocks`), `bank` (by key: loss before and after
            distillation), `entries` (code, distance, its standard error), `again` (code, distance on other noise).
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.space = SearchSpace.from_dict(values["space"])
        self.losses = {key: after for key, (_, after) in values["bank"].items()}
        self.entries = {tuple(code): (distance, error) for code, distance, error in values["entries"]}
        self.again = {tuple(code): distance for code, distance in values["again"]}
        self.trunk_ms = values["latency"]["trunk_ms"]
        self._layer_ms = {
            (b["attention_dim"], b["num_heads"], b["mlp_ratio"]): b["ms"] for b in values["latency"]["blocks"]
        }

    @classmethod
    def read(cls, path: str | os.PathLike = TABLE) -> "Enumerated":
        """The table in a file."""
        return cls(read_json(path, "benchmarks/enumerate_space.py RUN"))

    def layer_ms(self, layer: LayerSpec) -> float:
        """Time of one layer."""
        return self._layer_ms[layer.attention_dim, layer.num_heads, layer.mlp_ratio]

    def latency_ms(self, genotype: Genotype) -> float:
        """Time of a student: the trunk's and its layers'."""
        return self.trunk_ms + sum(map(self.layer_ms, genotype.layers))

    def loss(self, layer: LayerSpec) -> float:
        """Loss of a layer after distillation; 0 where it is the teacher's own."""
        return 0.0 if self.space.is_teachers(layer) else self.losses[self.space.key(layer)]

    def summed_loss(self, genotype: Genotype) -> float:
        """Sum of the layers' losses."""
        return sum(map(self.loss, genotype.layers))

    @cached_property
    def codes(self) -> list[Code]:
        """Of all genotypes, in the order of `points`."""
        return list(self.entries)

    @cached_property
    def points(self) -> list[tuple[float, float]]:
        """(distance, latency in ms) of every genotype."""
        return [(self.entries[code][0], self.latency_ms(self.space.from_code(code))) for code in self.codes]

    @cached_property
    def objectives(self) -> dict[Code, tuple[float, float]]:
        """(distance, latency in ms) by code."""
        return dict(zip(self.codes, self.points))

    @cached_property
    def front(self) -> list[Code]:
        """The true front's codes, by latency."""
        return sorted((self.codes[i] for i in pareto_front(self.points)), key=lambda code: self.objectives[code][1])

    @cached_property
    def reference(self) -> tuple[float, float]:
        """A tenth beyond the worse of the space's ends, which every search evaluates first: what a search that knows
        nothing else would fix.
        """
        ends = [self.objectives[self.space.code(genotype)] for genotype in self.space.ends()]
        return 1.1 * max(d for d, _ in ends), 1.1 * max(ms for _, ms in ends)

    @cached_property
    def hypervolume(self) -> float:
        """Of the true front, below [`~Enumerated.reference`]."""
        return hypervolume([self.objectives[code] for code in self.front], self.reference)


def report(table: Enumerated) -> dict[str, Any]:
    """What the space is like."""
    from scipy.stats import spearmanr

    distances = np.array([distance for distance, _ in table.points])
    errors = np.array([error for _, error in table.entries.values()])
    losses = [table.summed_loss(table.space.from_code(code)) for code in table.codes]
    latencies = [ms for _, ms in table.points]
    shared = [(table.entries[code], other) for code, other in table.again.items()]
    moved = np.array([(other - distance) for (distance, _), other in shared])
    # Of a pair both have the standard error s, their difference s·√2. A shift that all share is no genotype's own.
    boot = float(np.median([error for (_, error), _ in shared]))
    cheapest, teacher = sorted(map(table.space.code, table.space.ends()), key=lambda code: table.objectives[code][1])
    return {
        "genotypes": len(table.entries),
        "quantiles": {str(q): float(np.quantile(distances, q)) for q in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)},
        "teacher": table.objectives[teacher],
        "cheapest": table.objectives[cheapest],
        "front": [[list(code), *table.objectives[code]] for code in table.front],
        "reference": table.reference,
        "hypervolume": table.hypervolume,
        "standard_error": float(median(errors)),
        "noise": {
            "genotypes": len(shared),
            "bootstrap": boot,
            "other_noise": float(np.sqrt((moved**2).mean() / 2)),
            "own": float(moved.std(ddof=1) / np.sqrt(2)),
            "spearman": float(spearmanr([distance for (distance, _), _ in shared], [o for _, o in shared])[0]),
        },
        "spearman": {
            "loss": float(spearmanr(losses, distances)[0]),
            "latency": float(spearmanr(latencies, distances)[0]),
        },
    }


def gaps(table: Enumerated) -> list[str]:
    """What a table is not to be read with: genotypes that are not there once, values that are none."""
    wrong = []
    entries = table.values["entries"]
    if len(entries) != len(table.entries) or set(table.entries) != set(table.space.codes()):
        wrong.append(f"{len(entries)} entries of {len(table.entries)} genotypes, {table.space.size} wanted")
    values = np.array([[distance, error] for _, distance, error in entries])
    if not (np.isfinite(values).all() and (values > 0).all()):
        wrong.append("a distance or a standard error is not finite and above 0")
    return wrong


def problems(found: Mapping[str, Any]) -> list[str]:
    """What --check finds wrong with a report."""
    wrong, noise = [], found["noise"]
    if found["genotypes"] < LEAST:
        wrong.append(f"{found['genotypes']} genotypes, at least {LEAST} wanted")
    if noise["own"] > NOISE * noise["bootstrap"]:
        wrong.append(
            f"the bootstrap's standard error is {noise['bootstrap']:.3g}, other noise gives {noise['own']:.3g}"
        )
    return wrong


def show(table: Enumerated, found: Mapping[str, Any]) -> None:
    """Print the table."""
    quantiles = "  ".join(f"{q}: {value:.3f}" for q, value in found["quantiles"].items())
    print(f"{found['genotypes']} genotypes; quantiles of the distance  {quantiles}")
    print(f"{'':<9} {'code':<14} {'distance':>9} {'±':>6} {'ms':>7} {'loss':>7}")
    cheapest, teacher = sorted(map(table.space.code, table.space.ends()), key=lambda code: table.objectives[code][1])
    for name, code in (("teacher", teacher), ("cheapest", cheapest), *(("front", code) for code in table.front)):
        (distance, error), loss = table.entries[code], table.summed_loss(table.space.from_code(code))
        ms = table.objectives[code][1]
        print(f"{name:<9} {' '.join(map(str, code)):<14} {distance:>9.3f} {error:>6.3f} {ms:>7.2f} {loss:>7.4f}")
    noise = found["noise"]
    print(
        f"hypervolume of the front {found['hypervolume']:.4f} below ({found['reference'][0]:.3f}, "
        f"{found['reference'][1]:.2f} ms)\n"
        f"standard error of a distance: bootstrap {noise['bootstrap']:.3f}; {noise['genotypes']} genotypes on other "
        f"noise {noise['other_noise']:.3f}, without the shift that all share {noise['own']:.3f}; Spearman of the two "
        f"{noise['spearman']:.3f}\n"
        f"Spearman with the distance: summed loss {found['spearman']['loss']:.3f}, latency "
        f"{found['spearman']['latency']:.3f}"
    )


# -------------------------------------------------------------------- making it


class Store:
    """Evaluations one by one, a file a process, in the folder of what they were made with."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.file = folder, folder / f"{name}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if self.file.exists():  # a process that was killed may have left half a line
            content = self.file.read_bytes()
            os.truncate(self.file, content.rfind(b"\n") + 1)

    def done(self) -> dict[Task, dict[str, Any]]:
        """All processes' evaluations, by code and seed."""
        found: dict[Task, dict[str, Any]] = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            text = file.read_text(encoding="utf-8")
            for line in text[: text.rfind("\n") + 1].splitlines():  # a last line without its end is not yet written
                row = json.loads(line)
                found[tuple(row["code"]), row["seed"]] = row
        return found

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one evaluation to the disk."""
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def wanted(space: SearchSpace, seed: int) -> list[Task]:
    """(code, seed of the noise) of all evaluations, shuffled, so that their average time is soon known; other noise
    last.
    """
    codes = list(space.codes())
    order = np.random.default_rng(0).permutation(len(codes))
    return [(codes[i], seed) for i in order] + [(codes[i], seed + 1) for i in order[::AGAIN]]


def share_of(tasks: Sequence[Task], shard: int, shards: int) -> list[Task]:
    """All tasks in the order in which a process takes them: its own share, and then, from the last, what the others may
    not have got to.
    """
    own = tasks[shard - 1 :: shards]
    taken = set(own)
    return [*own, *(task for task in reversed(tasks) if task not in taken)]


def progress(done: int, out_of: int, since: float, at_start: int) -> str:
    """How far all processes are, and when they will be there."""
    rate = (time.monotonic() - since) / max(1, done - at_start)
    return f"{done} of {out_of} evaluated, {rate:.2f} s each, about {rate * (out_of - done) / 60:.0f} min left"


def enumerate_space(arguments: argparse.Namespace) -> None:
    """Evaluate what is missing (of the shard), and write the table when all is there."""
    from edgedit_hf.data.loading import load_run_images
    from edgedit_hf.distill.proxy_bank import ProxyBank
    from edgedit_hf.distill.teacher import load_teacher
    from edgedit_hf.metrics.reference import load_extractor, real_features
    from edgedit_hf.run.launch import make_accelerator
    from edgedit_hf.search.latency_table import LatencyTable
    from edgedit_hf.search.objectives import StudentQuality

    config = load_config(arguments.config, [*arguments.override, f"output_dir={arguments.run}"])
    device = make_accelerator(config).device
    pipeline = load_teacher(config).to(device)
    bank = ProxyBank(config.folder("bank"), pipeline.transformer)
    images = load_run_images(config)
    extractor = load_extractor(config, images, device)
    real = real_features(extractor, images)
    settings = {
        "samples": config.search.samples,
        "steps": config.search.sampling_steps,
        "guidance_scale": config.search.guidance_scale,
        "batch_size": min(config.search.samples, config.evaluate.batch_size),
    }
    quality = StudentQuality(bank, pipeline, extractor, real, seed=config.seed, **settings)
    made_from = {
        "data": images.fingerprint,
        "bank": hash_json(bank.entries),
        "extractor": extractor.hash,
        "seed": config.seed,
        "threads": config.threads,
        **settings,
    }
    shard, shards = arguments.shard
    store = Store(Path(arguments.run, "enumerated", hash_json(made_from)), f"{shard}-of-{shards}")
    tasks = wanted(bank.space, config.seed)
    done = store.done()
    at_start, since = len(done), time.monotonic()
    said = since
    for code, seed in share_of(tasks, shard, shards):
        if (code, seed) in done or (code, seed) in (done := store.done()):  # by another process meanwhile
            continue
        if time.monotonic() - said > 30:
            said = time.monotonic()
            print(progress(len(done), len(tasks), since, at_start), flush=True)
        score = quality.score(bank.assemble(bank.space.from_code(code)), seed=seed)
        store.add({"code": code, "seed": seed, "distance": score.value, "error": score.error})
    if arguments.output is None:
        return

    done = store.done()
    rows = {
        seed: sorted((r for r in done.values() if r["seed"] == seed), key=lambda r: r["code"])
        for seed in (config.seed, config.seed + 1)
    }
    latency = LatencyTable.from_json(config.folder("latency", "table.json")).to_dict()
    latency["prediction"] = {key: value for key, value in latency["prediction"].items() if key != "networks"}
    values = {
        "made_by": {
            "command": f"python benchmarks/enumerate_space.py RUN --config {arguments.config}",
            **config.section("teacher", "bank"),
            "made_from": made_from,
            "versions": versions(),
        },
        "space": bank.space.to_dict(),
        "latency": {key: value for key, value in latency.items() if key not in ("space", "networks")},
        "bank": {key: [e["loss_before"], e["loss_after"]] for key, e in sorted(bank.entries.items())},
        "entries": [[r["code"], round(r["distance"], 5), round(r["error"], 5)] for r in rows[config.seed]],
        "again": [[r["code"], round(r["distance"], 5)] for r in rows[config.seed + 1]],
    }
    write(arguments.output, values)


def write(path: Path, values: Mapping[str, Any]) -> None:
    """The file, a line an entry."""
    lines = []
    for key, value in values.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in value) + "\n]"
        else:
            text = json.dumps(value)
        lines.append(f"{json.dumps(key)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def shard_of(text: str) -> tuple[int, int]:
    """`"2/3"` as (2, 3)."""
    first, _, of = text.partition("/")
    if not (first.isdigit() and of.isdigit() and 1 <= int(first) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with 1 ≤ I ≤ N")
    return int(first), int(of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="evaluate this run's space")
    parser.add_argument("--config", help="the run's recipe")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--shard", type=shard_of, default=(1, 1), metavar="I/N", help="take this share first, beside other processes"
    )
    parser.add_argument("--output", type=Path, help="write the table here when all is evaluated")
    parser.add_argument("--table", type=Path, default=TABLE, help="the table to read")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless the table is whole and sound")
    arguments = parser.parse_args()
    if arguments.run is not None:
        if arguments.config is None:
            parser.error("RUN needs --config, the recipe that it was made with")
        enumerate_space(arguments)
        if arguments.output is None:
            return
    table = Enumerated.read(arguments.output if arguments.run is not None else arguments.table)
    if wrong := gaps(table):
        fail(wrong)
    found = report(table)
    show(table, found)
    if arguments.json:
        print(json.dumps(found))
    if arguments.check:
        fail(problems(found))


if __name__ == "__main__":
    main()
