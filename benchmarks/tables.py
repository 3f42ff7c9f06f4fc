"""The tables of a record: from its JSON to Markdown, a function for every kind of record whose tables pages show.

A record of a kind without one is shown as the script printed it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean, median
from typing import Any

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.markup import code, fenced, markdown
from edgedit_hf.report.ranking import NAMES, correlation, ranking_table
from edgedit_hf.report.tables import MODEL_LABELS, latency_label, metric_label, model_place
from edgedit_hf.stamp import check_comparable

Result = Mapping[str, Any]


def tables_of(record: Mapping[str, Any]) -> dict[str, str]:
    """label → Markdown of every table of a record, in order; the label of an only one is empty.

    Raises:
        EdgeDiTError: its result lacks a figure that the tables of its kind need.
    """
    if record["kind"] not in TABLES:
        return {"": fenced("\n".join(record["printed"]), "text")}
    try:
        return TABLES[record["kind"]](record["result"])
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise EdgeDiTError(
            f"The record of {record['command']!r} lacks what the tables of its kind, {record['kind']!r}, need "
            f"({error!r}); measure it again with benchmarks/record.py."
        ) from None


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown; what stands in it is Markdown already."""

    def line(cells: Iterable[str]) -> str:
        return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"

    return "\n".join([line(header), f"|{' --- |' * len(header)}", *map(line, rows)])


def number(value: float | None, digits: int = 3) -> str:
    """In so many digits, with separators, and an exponent only of what is very small; nothing for `None`."""
    if value is None or value == 0:
        return "" if value is None else "0"
    if abs(value) >= 10**digits - 0.5:
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".removesuffix(".") if abs(value) >= 1e-4 else f"{value:.{digits - 1}e}"


def percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"


def plus_minus(value: float | None, error: float | None) -> str:
    """A figure with its standard error, where that is known."""
    return number(value) + (f" ± {number(error, 2)}" if value is not None and error is not None else "")


def megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:,.2f} MB"


def keys_of(rows: Iterable[Result], name: str) -> list[str]:
    """The keys of a dict that several rows have, in the order in which they appear."""
    return list(dict.fromkeys(key for row in rows for key in row.get(name, {})))


def columns(models: Sequence[Result], shown: Mapping[str, Callable[[Result], str]]) -> str:
    """A row a model; columns in which no model has anything are left out."""
    cells = {label: [cell(model) for model in models] for label, cell in shown.items()}
    cells = {label: values for label, values in cells.items() if any(values)}
    rows = [[model["name"], *(values[place] for values in cells.values())] for place, model in enumerate(models)]
    return table(["", *cells], rows)


# -------------------------------------------------------------------- runs


def run(result: Result) -> dict[str, str]:
    """A run's models, and their latencies; its bank's losses; its search. Models that were not judged alike are an
    error: they would stand in one column.
    """
    models = result["models"]
    check_comparable({model["name"]: model.get("stamp") for model in models})
    metrics = [key for key in keys_of(models, "metrics") if key not in ("precision", "recall")]
    sizes: dict[str, Callable[[Result], str]] = {
        "parameters": lambda model: f"{model['parameters'] / 1e6:.2f} M",
        "MFLOPs": lambda model: number(model["flops"] / 1e6),
        "stored": lambda model: megabytes(next(iter(model["bytes"].values()))),
        "steps, guidance": lambda model: f"{model['steps']}, {model['guidance_scale']:g}" if "steps" in model else "",
    }
    widths = (result.get("few_step") or {}).get("widths") or []
    uncertain = keys_of([*models, *(width[way] for width in widths for way in ("few", "few_step"))], "standard_errors")
    quality: dict[str, Callable[[Result], str]] = {
        metric_label(key) + (", ± standard error" if key in uncertain else ""): lambda model, key=key: plus_minus(
            model["metrics"].get(key), model.get("standard_errors", {}).get(key)
        )
        for key in metrics
    }
    quality["precision"] = lambda model: number(model["metrics"].get("precision"))
    quality["recall"] = lambda model: number(model["metrics"].get("recall"))
    quality["shows the class asked for"] = lambda model: percent(model.get("class_agreement"))
    quality["the same, of captions kept out of training"] = lambda model: percent(
        (model.get("held_out") or {}).get("class_agreement")
    )
    for key in keys_of([*models, *(width["few"] for width in widths)], "seconds_per_image"):
        sizes[f"an image, {latency_label(key)}"] = lambda model, key=key: (
            f"{number(1e3 * model['seconds_per_image'][key])} ms" if key in model.get("seconds_per_image", {}) else ""
        )
    times: dict[str, Callable[[Result], str]] = {
        f"{latency_label(key)}, ms": lambda model, key=key: number(model["latency_ms"].get(key))
        for key in keys_of(models, "latency_ms")
    }
    found = {"models": columns(models, sizes | quality)}
    if widths:
        ways = {"many": "", "few": ", {solver}", "few_step": ", distilled"}
        few = [
            {**width[way], "name": width["name"] + label.format(solver=markdown(width[way].get("solver") or ""))}
            for width in widths
            for way, label in ways.items()
        ]
        found["few steps"] = columns(few, sizes | quality)
    found[f"latency of {result['latency'].get('batch_size', '?')} images a forward"] = columns(models, times)
    losses = (result.get("bank") or {}).get("median_losses")
    if losses:
        names = {"random": "random", "copied": "copied", "closed_form": "closed form"}
        names |= {"combined": "combined of trained halves", "after": "distilled"}
        starts = [start for start in names if any(start in row for row in losses.values())]
        found["proxies"] = table(
            ["median held-out loss of proxies", *(names[start] for start in starts)],
            [[kind, *(number(row.get(start)) for start in starts)] for kind, row in losses.items()],
        )
    search = result.get("search")
    if search and search.get("random_hypervolume"):
        ours, random = search["hypervolume"], search["random_hypervolume"]
        marks = sorted({place for place in (4, 8, 12, 16, 24, 32, 48, 64, len(ours)) if place <= len(ours)})
        found["search"] = table(
            ["evaluations", "hypervolume, ours", "random"],
            [[str(mark), number(ours[mark - 1], 4), number(random[min(mark, len(random)) - 1], 4)] for mark in marks],
        )
    return found


def ranking(result: Result) -> dict[str, str]:
    """Which objective foretells the quality after tuning."""
    return {"": ranking_table(result).strip()}


# -------------------------------------------------------------------- the search


def programme(result: Result) -> dict[str, str]:
    rows = [
        [label, f"{row['seconds']:.2f}", str(row["solutions"]), number(row["score"])]
        for label, row in result["rows"].items()
    ]
    return {
        "": table([f"of {result['replacements']:,} replacements", "seconds", "solutions", "loss of the first"], rows)
    }


SEARCHES = {
    "ours": "ours",
    "no scores": "ours without the programme",
    "old pool": "the old pool: the search before",
    "k-best": "the programme's solutions, each evaluated",
    "nsga2": "NSGA-II",
    "greedy": "greedy, loss per millisecond",
    "random": "random",
}


def search(result: Result) -> dict[str, str]:
    """Searches, scores of a proxy, or models of the distance, whichever was compared."""
    if "scores" in result:
        budgets = list(next(iter(result["scores"].values()))["at"])
        rows = [
            [markdown(name), number(row["spearman"]), *(f"{share:.3f}" for share in row["at"].values())]
            for name, row in result["scores"].items()
        ]
        return {"": table(["score of a proxy", "Spearman", *(f"after {budget}" for budget in budgets)], rows)}
    if "kernels" in result:
        sizes = list(next(iter(result["kernels"].values())))
        rows = [
            [markdown(name), *(f"{density:.2f} ({rank:.2f})" for density, rank in row.values())]
            for name, row in result["kernels"].items()
        ]
        return {"": table(["kernel", *sizes], rows)}
    rows = []
    for name, found in result["searches"].items():
        cells = [f"{middle:.3f}" + (f" ± {half:.3f}" if half >= 5e-4 else "") for middle, half in found["at"].values()]
        usual = median(math.inf if count is None else count for count in found["enough"])
        cells.append("not reached" if usual == math.inf else f"{usual:g}")
        rows.append([SEARCHES.get(name, name), *cells])
    header = ["search", *(str(budget) for budget in result["budgets"]), "evaluations to .97 (median)"]
    return {"": table(header, rows)}


def larger_space(result: Result) -> dict[str, str]:
    def order(row: Result) -> tuple[int, float]:
        return row["merge"], row["saved_ms"]

    def signed(value: float) -> str:
        return f"{value:.1f}".replace("-0.0", "0.0").replace("-", "−")

    choices = [
        [
            str(row["merge"]),
            code(row["option"]),
            f"{row['loss']:.4f}",
            signed(row["saved_ms"]),
            f"{row['saved_weights']:,}",
        ]
        for row in sorted(result["choices"], key=order)
    ]
    searches = [
        [
            str(row["seed"]),
            number(row["paper"]),
            number(row["menu"]),
            f"{row['ratio']:.2f}",
            f"{row['ratio_on_other_noise']:.2f}",
        ]
        for row in result["searches"]
    ]
    return {
        "choices": table(["layers", "choice", "loss", "ms saved", "weights saved"], choices),
        "searches": table(
            ["seed", "hypervolume, the paper's choices", "the whole menu", "ratio", "ratio on other noise"], searches
        ),
    }


def latency_table(result: Result) -> dict[str, str]:
    """What a table is worth, or what a layer saves by each choice, whichever was measured."""
    if "choice" in result["rows"][0]:
        return _choices(result)
    about = f"{result['preset']}, {result['layers']} layers, batch {result['batch']}"
    rows = []
    for row in result["rows"]:
        said = row["prediction"]
        measured = [network["measured_ms"] for network in said["networks"]]
        noisy = sum(bool(network["noisy"]) for network in said["networks"])
        rows.append(
            [
                latency_label(row["kind"]),
                f"{min(measured):.0f} – {max(measured):.0f} ms",
                percent(said["mean"]),
                percent(said["max"]),
                f"{said['ratio']:.2f}",
                f"{said['kendall']:.2f}",
                f"{noisy} of {len(measured)}",
            ]
        )
    header = [about, "16 networks", "mean error", "greatest", "ratio to the baseline", "τ", "flagged as noisy"]
    return {"": table(header, rows)}


def _choices(result: Result) -> dict[str, str]:
    cells: dict[str, dict[str, str]] = {}
    for row in result["rows"]:
        said = percent(row["saved_share"], 0) + (", noisy" if row["noisy"] else "")
        cells.setdefault(row["choice"], {})[row["kind"]] = said
    kinds = list(dict.fromkeys(row["kind"] for row in result["rows"]))
    rows = [[code(choice), *(of.get(kind, "") for kind in kinds)] for choice, of in cells.items()]
    return {"": table([f"a layer of {result['preset']} is shortened by", *map(latency_label, kinds)], rows)}


# -------------------------------------------------------------------- distillation


def closed_form(result: Result) -> dict[str, str]:
    """Means over layers, a row a kind of proxy."""

    def kinds(values: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(place.split("/", 1)[1] for place in values))

    marks = result["marks"]
    curves = []
    for kind in kinds(result["curves"]["copied"]):
        for start, found in result["curves"].items():
            of_kind = [losses for place, losses in found.items() if place.split("/", 1)[1] == kind]
            curves.append([kind, start, *(number(mean(column)) for column in zip(*of_kind))])
    random = []
    for kind in kinds(result["random"]):
        rows = [row for place, row in result["random"].items() if place.split("/", 1)[1] == kind]
        figures = [mean(row["loss"] for row in rows), mean(row["closed_form"] for row in rows)]
        steps = f"{min(row['steps'] for row in rows)} – {max(row['steps'] for row in rows)}"
        ratios = [row["ratio"] for row in rows]
        random.append([kind, steps, *map(number, figures), f"{min(ratios):.1f} – {max(ratios):.1f}"])
    return {
        "starts": table(["proxy", "start", *(f"step {mark}" for mark in marks)], curves),
        "random": table(
            ["proxy", "steps from random weights", "loss then", "closed form, no step", "ratio, over the layers"],
            random,
        ),
    }


def distill_cost(result: Result) -> dict[str, str]:
    shared = result["seconds"]["shared"]
    rows = [[name, number(seconds), f"{seconds / shared:.2f}"] for name, seconds in result["seconds"].items()]
    return {"": table([f"one step of {result['proxies']} proxies", "seconds", "to shared"], rows)}


def feature_distillation(result: Result) -> dict[str, str]:
    rows = [
        [label, str(seed), *(number(value) for value in values)]
        for label, runs in result["curves"].items()
        for seed, values in enumerate(runs)
    ]
    ratios = [
        "random / distilled",
        "",
        *[""] * (len(result["steps"]) - 1),
        ", ".join(f"{x:.2f}" for x in result["ratios"]),
    ]
    header = [f"Fréchet distance ({result['extractor']}, n={result['samples']:,})", "seed"]
    return {"": table([*header, *(f"{step} steps" for step in result["steps"])], [*rows, ratios])}


def few_step(result: Result) -> dict[str, str]:
    rows = []
    for width, found in result["widths"].items():
        few = found["few"]

        def row(label: str, figures: Result, collapsed: str = "", width: str = width) -> list[str]:
            cells = [number(figures["distance"]), number(figures["recall"]), percent(figures["agreement"])]
            return [width, label, *cells, percent(figures.get("closed"), 0), collapsed]

        rows += [row("many steps, guided", found["many"]), row(f"few steps, {markdown(few['solver'])}", few)]
        for term, figures in found["terms"].items():
            rows.append(row(f"distilled: {term}", figures, f"{figures['collapsed']} of {len(figures['runs'])}"))
    header = ["width", "", "distance", "recall", "shows what was asked for", "of the gap closed", "collapsed"]
    return {"": table(header, rows)}


MERGED = {
    "with": "merges of two and of three",
    "without": "merges of two",
    "either": "merges of two, with or without those of three",
}
TERMS = {"both": "both", "knowledge": "knowledge alone", "matching": "matching alone"}


def evidence(result: Result) -> dict[str, str]:
    """Claims and costs beside the papers', every model's distance, and the ablations, a column or a row a seed."""
    runs = result["runs"]
    seeds = [f"seed {run['seed']}" for run in runs]

    def claimed(found: Result) -> str:
        interval = " – ".join(f"{end:.3f}" for end in found["interval"])
        return "" if found["value"] is None else f"{found['value']:.3f}" + (f" ({interval})" if interval else "")

    claims = []
    for name, claim in result["claims"].items():
        cells = [claimed(run["claims"][name]) for run in runs]
        claims.append([name, claim["paper"], claim["bar"], *cells, claimed({"value": claim["mean"], "interval": []})])
    costs = []
    for name, paper in result["papers_costs"].items():
        label = {"parameters": name, "flops": "FLOPs"}.get(name) or f"latency, {latency_label(name)}"
        costs.append([label, paper, *(f"{run['costs'][name]:.2f}" for run in runs)])
    for run in runs:
        check_comparable(run.get("stamps", {}))
    names = sorted(dict.fromkeys(name for run in runs for name in run["distances"]), key=model_place)
    distances = [
        [MODEL_LABELS.get(name, name), *(number(run["distances"].get(name)) for run in runs)] for name in names
    ]
    metric = metric_label(f"fid[{result['extractor']},n={result['samples']}]")
    found = {
        "claims": table(["ratio of Fréchet distances", "the papers'", "asked for", *seeds, "mean"], claims),
        "costs": table(["student to teacher", "the papers'", *seeds], costs),
        "distances": table([metric, *seeds], distances),
    }
    if all("seconds" in run for run in runs):  # earlier records have none
        stages = dict.fromkeys(stage for run in runs for stage in run["seconds"])
        rows = [[stage, *(number(run["seconds"].get(stage)) for run in runs)] for stage in stages]
        total = ["all", *(number(sum(run["seconds"].values())) for run in runs)]
        found["seconds"] = table(["seconds of a stage", *seeds], [*rows, total])
    made = {run["seed"]: run["ablations"] for run in runs}
    ablations: dict[str, tuple[list[str], Callable[[Result], Iterable[list[str]]]]] = {
        "starts": (["start", "held-out loss", "distilled", "distance, untuned"], _starts),
        "merges": (["latency at most", "", "loss", "latency", "distance, untuned"], _merges),
        "terms": (["terms of few-step distillation", "distance", "recall", "won back"], _terms),
        "objectives": (["objective", "ρ with the distance after tuning", "given latency"], _objectives),
    }
    for name, (header, rows) in ablations.items():
        if all(name in ablation for ablation in made.values()):
            lines = [[str(seed), *row] for seed, ablation in made.items() for row in rows(ablation[name])]
            found[name] = table(["seed", *header], lines)
    return found


def _starts(found: Result) -> Iterable[list[str]]:
    for start, row in found.items():
        yield [start.replace("_", " "), *(number(row[key]) for key in ("before", "after", "distance"))]


def _merges(found: Result) -> Iterable[list[str]]:
    for budget, both in found.items():
        if len({row["hash"] for row in both.values()}) < len(both):
            both = {"either": both["with"]}
        for kind, row in both.items():
            figures = [number(row["score"]), f"{row['latency_ratio']:.2f}", number(row["distance"])]
            yield [f"{float(budget):g} of the teacher's", MERGED[kind], *figures]


def _terms(found: Result) -> Iterable[list[str]]:
    for term, row in found.items():
        share = row["won_back"]  # none where few steps cost nothing that could be won back
        won_back = "nothing" if share is not None and share <= 0 else percent(share, 0)
        yield [TERMS[term], number(row["distance"]), number(row["recall"]), won_back]


def _objectives(found: Result) -> Iterable[list[str]]:
    for objective, row in found.items():
        yield [NAMES[objective], *(correlation(row[key]) for key in ("spearman", "partial"))]


# -------------------------------------------------------------------- networks, formats, runtimes


def attention(result: Result) -> dict[str, str]:
    rows = []
    for row in result["rows"]:
        cells = []
        for part in ("core", "layer"):
            times = row["ms"][part]
            cells += [f"{times['full']:.1f} ms", f"{times['ASSA']:.1f} ms", f"{row['speedup'][part]:.2f}"]
        cells += [f"{row['peak_bytes'][kind] / 1e6:.0f} MB" for kind in ("full", "ASSA")]
        rows.append([latency_label(row["runtime"]), *cells])
    header = ["", "attention: full", "sparse", "times as fast", "whole layer: full", "sparse", "times as fast"]
    return {"": table([*header, "memory: full", "sparse"], rows)}


def elastic(result: Result) -> dict[str, str]:
    """A supernet and its networks trained alone: losses and forwards, then what training and a switch take."""
    rows = [
        [
            name,
            f"{result['parameters'][name] / 1e6:.2f} M",
            *(f"{result['steps_in_supernet'][name]:,}", f"{result['steps']:,}"),
            *(number(result[losses][name]) for losses in ("loss_supernet", "loss_alone")),
            f"{result['loss_ratio'][name]:.3f}",
            f"{result['forward_ratio'][name]:.2f}",
        ]
        for name in result["loss_alone"]
    ]
    header = ["", "parameters", "steps in the supernet", "alone", "loss in the supernet", "alone", "ratio"]
    alone = sum(result["seconds_alone"].values())
    costs = [
        ["training the supernet", f"{result['seconds_supernet']:,.0f} s"],
        ["training the three alone", f"{alone:,.0f} s"],
        ["ratio", f"{result['time_ratio']:.2f}"],
        ["a switch", f"{1e3 * result['switch_ms']:.1f} µs"],
    ]
    return {
        "losses": table([*header, "a forward, to that of the network taken out"], rows),
        "costs": table(["", ""], costs),
    }


def push(result: Result) -> dict[str, str]:
    rows = [
        [code(name), f"{row['seconds']:.1f} s", *(f"{row[key] / 1e6:,.0f} MB" for key in ("sent", "memory"))]
        for name, row in result["rows"].items()
    ]
    return {"": table([f"{result['bytes'] / 1e6:,.0f} MB on the loopback", "time", "sent", "memory"], rows)}


def quantization(result: Result) -> dict[str, str]:
    def decibels(value: float | None) -> str:
        return "" if value is None else f"{value:.1f} dB"

    forms = [
        [
            markdown(name),
            f"{row['bits']:.2f}",
            megabytes(row["bytes"]),
            decibels(row["error"]["sqnr_db"]),
            f"{row['frechet']:.2f}",
            f"{row['frechet_ratio']:.2f}",
            decibels(row["psnr_db"]),
        ]
        for name, row in result["rows"].items()
    ]
    inputs = [[name, decibels(error["sqnr_db"])] for name, error in result["activations"].items()]
    header = ["form", "bits a weight", "bytes", "output's signal to noise", "Fréchet distance", "to fp32's"]
    return {
        "forms": table([*header, "PSNR to fp32's images"], forms),
        "inputs": table(["8-bit inputs of all layers but the first", "output's signal to noise"], inputs),
    }


def export(result: Result) -> dict[str, str]:
    found = {}
    if "blocks" in result:
        found["blocks of DiT-XL/2"] = table(
            ["form", "ms", "times as fast as eager", "file", "error of the output"],
            [
                [
                    row["form"],
                    number(row["ms"]),
                    f"{row['speedup']:.2f}",
                    megabytes(row["bytes"]),
                    number(row["error"], 2),
                ]
                for row in result["blocks"]["rows"]
            ],
        )
        found["conditioner split off"] = table(
            ["form", "ms a step", "file", "resident"],
            [
                [row["form"], number(row["ms"]), megabytes(row["bytes"]), megabytes(row["resident_bytes"])]
                for row in result["blocks"]["split"]
            ],
        )
    if "trained" in result:
        found["a trained network"] = table(
            ["export", "error of a forward", "PSNR of the images", "files", "ms", "layers kept in 8 bits"],
            [
                [
                    row["export"],
                    number(row["error"], 2),
                    "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB",
                    megabytes(row["bytes"]),
                    number(row["ms"]),
                    str(len(row["layers_of_8_bits"])),
                ]
                for row in result["trained"]
            ],
        )
    return found


def sampling(result: Result) -> dict[str, str]:
    rows = [
        [
            row["dtype"],
            f"{row['seconds']['ours']:.1f} s",
            f"{row['seconds']['diffusers']:.1f} s",
            f"{row['speedup']:.2f}",
            f"{row['weight_ratio']:.3f}",
            f"{row['released']['ratio']:.3f}",
        ]
        for row in result["rows"]
    ]
    header = [
        f"{result['preset']}, {result['steps']} steps",
        "ours",
        "diffusers",
        "times as fast",
        "weights of diffusers'",
    ]
    return {"": table([*header, "adaLN released"], rows)}


def forward(result: Result) -> dict[str, str]:
    rows = [
        [
            f"{row['dtype']}, batch {row['batch']}",
            *(f"{row['ms'][who]:.0f} ms" for who in ("ours", "diffusers")),
            f"{row['speedup']:.2f}",
            percent(row["matrix_share"]),
        ]
        for row in result["rows"]
    ]
    return {"": table([result["preset"], "ours", "diffusers", "times as fast", "of its matrix products' rate"], rows)}


def metrics(result: Result) -> dict[str, str]:
    """Every figure as we, ADM's evaluator and torchmetrics compute it."""
    rows = [
        [row["name"], *(number(row[who], 6) for who in ("ours", "adm", "torchmetrics")), f"{row['apart']:.0e}"]
        for row in result["rows"]
    ]
    about = f"{result['count']:,} images against {result['count']:,}, {result['features']:,} features"
    return {"": table([about, "ours", "ADM's", "torchmetrics'", "apart at most"], rows)}


def end_to_end(result: Result) -> dict[str, str]:
    """One image in every way, and what decodes it."""
    rows = [
        [
            code(row["row"]),
            markdown(row["network"]),
            f"{row['steps']}{'*' if row['timed_steps'] < row['steps'] else ''}",
            str(row["forwards"]),
            number(row["seconds"]),
            number(row["ratio"]),
            f"{row['peak_bytes'] / 1e6:,.0f} MB",
            number(row["memory_ratio"], 2),
            *(f"{number(row['whole_seconds'][decoder])} s" for decoder in ("AutoencoderKL", "AutoencoderTiny")),
        ]
        for row in result["rows"]
    ]
    decoders = [
        [
            entry["decoder"],
            latency_label(entry["runtime"]),
            number(entry["seconds"]),
            f"{entry['parameters'] / 1e6:.1f} M",
        ]
        for entry in result["decoders"]
    ]
    header = ["", "network", "steps", "forwards", "seconds", "times as fast", "peak memory", "of diffusers'"]
    return {
        "denoising": table([*header, "whole image, KL", "whole image, Tiny"], rows),
        "decoding": table(["decoder", "runtime", "seconds", "weights"], decoders),
    }


def int8(result: Result) -> dict[str, str]:
    rows = [
        [
            str(row["batch"]),
            *(f"{row['ms'][form]:.0f} ms" for form in ("fp32", "bf16", "int8")),
            f"{row['speedup']:.2f}",
            number(row["relative_error"], 2),
        ]
        for row in result["rows"]
    ]
    header = [
        f"{result['preset']}, batch",
        "eager fp32",
        "eager bf16",
        "int8 in ONNX Runtime",
        "times as fast as either",
    ]
    return {"": table([*header, "error of the output"], rows)}


def browser_loop(result: Result) -> dict[str, str]:
    """The first table against the second measurement; the devices; the pages."""
    second, pairs = result["second"], result["devices"]["space"]["pairs"]
    predicted = [
        ["networks that the table was not fitted to, as measured with it", percent(result["first"]["mean"])],
        [f"the same and the student, {second['networks']}, measured after the search", percent(second["mean_error"])],
        ["Kendall's τ of the latter", number(second["kendall"], 2)],
        ["the student, predicted", f"{number(second['student_predicted_ms'])} ms"],
        ["the student, measured", f"{number(second['student_measured_ms'])} ms"],
        ["the teacher, measured", f"{number(second['teacher_measured_ms'])} ms"],
        ["times as fast as the teacher, measured", number(second["speedup"])],
    ]
    own = result["devices"]["devices"][0]["name"]
    taus = {name: pair["kendall"] for pair in pairs for name in pair["pair"] if own in pair["pair"]}
    devices = [
        [device["name"], f"{number(device['teacher_ms'])} ms", number(result["speedups"][device["name"]])]
        + ["" if device["name"] == own else number(taus[device["name"]], 2)]
        for device in result["devices"]["devices"]
    ]
    pages = [
        [name, *page["times"].values(), "equal" if page["db"] is None else f"{page['db']:.1f} dB"]
        for name, page in result["pages"].items()
    ]
    header = ["", *next(iter(result["pages"].values()))["times"], "picture against Python's"]
    return {
        "predictions": table([f"{own}, {result['batch']} images a forward", ""], predicted),
        "devices": table(["", "teacher", "the student's speed-up", "τ of the space with the browser's"], devices),
        "pages": table(header, pages),
    }


TABLES: dict[str, Callable[[Result], dict[str, str]]] = {
    made.__name__: made
    for made in (
        *(run, ranking, programme, search, larger_space, latency_table, closed_form, distill_cost),
        *(feature_distillation, few_step, attention, quantization, export, sampling, forward, int8, browser_loop),
        *(evidence, end_to_end, metrics, elastic, push),
    )
}
