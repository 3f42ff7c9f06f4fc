"""A small run folder for the tests of report and card: real classes write what is cheap, the measured values are made
up.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.files import atomic_write_json
from edgedit_hf.genotype import Genotype
from edgedit_hf.report.plots import save_montage
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.stage import EDGEDIT, EVALUATE, EXPORT, TUNE
from edgedit_hf.run.state import RunState
from edgedit_hf.search.ask_tell import RandomSearch, summary
from edgedit_hf.search.bayes import BayesSearch
from edgedit_hf.search.pareto import choose
from edgedit_hf.search_space import SearchSpace, model_cost

METRIC = "fid[digits-cnn,n=64]"
NOTE = "generated images: 3 of 64 features (number <0>, *1*, 2) have no variance."
"""Of a model, with characters that mean something in HTML and in Markdown."""


def make_run(folder: Path, transformer, evaluated: bool = True) -> Path:
    """Write a run of this teacher below `folder`; without `evaluated` it ends with the chosen student."""
    config = RunConfig(output_dir=str(folder), seed=5)
    rng = np.random.default_rng(0)
    for stage in (stage for stage in EDGEDIT if not stage.only):
        if evaluated or stage not in (TUNE, EXPORT, EVALUATE):
            state = RunState(config, stage, 1, inputs=dict.fromkeys(name for name, _ in stage.inputs))
            for _ in state.steps():
                pass
            state.finish()
    space = SearchSpace.for_config(transformer.config, reduced_attention_dim=8)
    bank = ProxyBank.create(folder / "bank", transformer, space)
    entries = {}
    for layer in space.proxies():
        before = 10 ** rng.uniform(-2, 0)
        after = before * rng.uniform(0.1, 0.9)
        losses = {"random": 1.1, "copied": 3 * before, "closed_form": before, "after": after}
        if space.option_of(layer) == "both":
            losses["combined"] = before
        record = {
            "loss_before": before,
            "loss_after": after,
            "losses": losses,
            "curve": [[0, before], [1, after]],
            "steps": 1,
            "seed": 5,
        }
        entries[bank.key(layer)] = bank.write_proxy(layer, bank.new_block(layer), record)
    bank.write_index(entries)

    def evaluate(genotype) -> tuple[float, float]:
        flops = model_cost({**transformer.config, "layers": genotype.to_layers()}).flops
        return 1e6 / flops + len(genotype.merged), flops / 1e5

    search = BayesSearch(space, 10, seed=config.seed, num_initial=8)
    run(search, evaluate)
    random = RandomSearch.sharing_initial(search)
    run(random, evaluate)
    search.save(folder / "search" / "state.json")
    random.save(folder / "search" / "random.json")
    whole = {"path": None, "latency_ms": evaluate(space.from_code((0, 0)))[1], "parameters": 1, "flops": 1}
    atomic_write_json(folder / "search" / "front.json", {**summary(search, random), "teacher": whole})
    entry, reason = choose(search.front())
    choice = {
        "genotype": entry["genotype"]["layers"],
        "code": entry["code"],
        "reason": reason,
        "predicted_latency_ms": entry["latency_ms"],
        "teacher_latency_ms": whole["latency_ms"],
        "distance": entry["distance"],
    }
    atomic_write_json(folder / "student" / "choice.json", choice)
    if evaluated:
        write_evaluation(folder, transformer, choice, rng)
    return folder


def run(search, evaluate) -> None:
    while not search.finished:
        for genotype in search.pending or search.ask(2):
            search.tell(genotype, evaluate(genotype))


def write_evaluation(folder: Path, transformer, choice, rng) -> None:
    """Made-up results of the evaluation and the exports."""
    student = {**transformer.config, "layers": choice["genotype"]}
    models = [
        ("teacher", "teacher", transformer.config, 2.0, {"onnxruntime-fp32": 8.0, "onnxruntime-int8": 4.0}),
        ("teacher-more-steps", "teacher-more-steps", transformer.config, 1.6, {"onnxruntime-fp32": 8.0}),
        ("student", "student", student, 9.0, {"onnxruntime-fp32": 5.0}),
        ("student-tuned", "student-tuned", student, 1.7, {"onnxruntime-fp32": 5.0, "onnxruntime-int8": 2.5}),
        ("onnx-int8", "exported", student, 1.75, {"onnxruntime-int8": 2.5}),
    ]
    for name, stage, config, distance, latency in models:
        cost = model_cost(config)
        images = rng.integers(0, 256, (32, 1, 8, 8), dtype=np.uint8)
        save_montage(folder / "evaluate" / f"{name}.png", images.transpose(0, 2, 3, 1), columns=4)
        save_file({"images": images}, folder / "evaluate" / f"{name}.safetensors")
        result = {
            "name": name,
            "stage": stage,
            "genotype_hash": Genotype.of(config).hash,
            "parameters": cost.parameters,
            "flops": cost.flops,
            "bytes": {"fp32": cost.bytes("fp32")},
            "latency_ms": latency,
            "metrics": {METRIC: distance, "precision": 0.9, "recall": 0.8},
            "precision": 0.9,
            "recall": 0.8,
            "class_agreement": 0.97 if stage != "student" else 0.6,
            "standard_errors": {METRIC: distance / 20},
            "notes": [NOTE] if stage == "student" else [],
            "num_samples": 64,
            "steps": 10,
            "guidance_scale": 1.5,
            "grid": f"evaluate/{name}.png",
        }
        if stage == "exported":
            result["psnr_db"] = 31.5
        atomic_write_json(folder / "evaluate" / f"{name}.json", result)
    reference = {
        "extractor": "digits-cnn",
        "extractor_accuracy": 0.985,
        "classifier": "SVC on pixels",
        "classifier_accuracy": 0.98,
        "real_floor": 0.4,
        "count": 64,
    }
    atomic_write_json(folder / "evaluate" / "reference.json", reference)
    latency = {
        "batch_size": 32,
        "threads": 2,
        "environment": {"cpu": "a <fast> processor"},
        "speedup": {"onnxruntime-fp32": 1.59},
    }
    atomic_write_json(folder / "evaluate" / "latency.json", latency)
    curves = {"distilled proxies": {"steps": [0, 5, 10], "values": [9.0, 3.0, 1.7]}}
    atomic_write_json(folder / "evaluate" / "curves.json", curves)
    verify = {"relative_error": 0.012, "tolerance": 0.05, "psnr_db": 31.0}
    atomic_write_json(folder / "exported" / "onnx-int8" / "verify.json", verify)
    bench = {"initializer_bytes": 100_000, "initializer_shrink": 3.6}
    atomic_write_json(folder / "exported" / "onnx-int8" / "bench.json", bench)
