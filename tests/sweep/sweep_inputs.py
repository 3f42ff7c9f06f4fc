"""The fixtures of the sweep, and its cases: every option, every recipe key, every file of ours, and random bytes."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sweep_forks import ROOT, TRAINING, run_limited

LONG = "n" * 5000
FILE = "precious.txt"
"""A file of the user, in every case's folder."""

TINY = {  # smaller than debug.yaml
    "threads": 1,
    "teacher": {"num_layers": 2, "steps": 6, "checkpoint_every": 2, "batch_size": 8},
    "bank": {"steps": 2, "both_steps": 1, "calibration_samples": 8, "batch_size": 4},
    "latency": {"repeats": 3, "batch_size": 2, "threads": 1},
    "search": {"evaluations": 4, "initial": 3, "samples": 16, "sampling_steps": 1},
    "tune": {"steps": 2, "batch_size": 8},
    "export": {"threads": 1},
    "sampling": {"steps": 1},
    "evaluate": {
        "samples": 16,
        "extractor_steps": 5,
        "grid": 1,
        "latency_batch_size": 2,
        "latency_repeats": 3,
    },
    "sensitivity": {"calibration_samples": 8, "steps": 1, "batch_size": 4, "samples": 4, "timesteps": 1},
    "rank": {"genotypes": 4, "groups": 2, "steps": 2, "batch_size": 4, "samples": 16, "held_out": 2},
    "text": {"steps": 3, "batch_size": 8},
    "elastic": {"steps": 3, "validation_samples": 8, "checkpoint_every": 2},
    "quantize": {
        "calibration_images": 2,
        "sampling_steps": 2,
        "samples": 4,
        "sampling_batch_size": 4,
        "steps": 4,
        "batch_size": 4,
    },
}


# -------------------------------------------------------------------- fixtures


def write_inputs(root: Path) -> None:
    """What a user brings along: recipes, images, prompts, a foreign checkpoint, a file of no concern to us."""
    import torch
    import yaml
    from PIL import Image
    from safetensors.torch import load_file

    root.mkdir(parents=True, exist_ok=True)
    for name, base, output in (
        ("tiny", "debug", "run"),
        ("tiny-t2i", "debug-t2i", "t2i"),
        ("tiny-quantize", "debug-quantize", "q"),
    ):
        values = yaml.safe_load((TRAINING / "recipes" / f"{base}.yaml").read_text())
        for key, value in TINY.items():
            if key == "threads" or key in values:
                values[key] = {**values[key], **value} if isinstance(value, dict) else value
        values["output_dir"] = output
        if name == "tiny-quantize":
            values["quantize"]["path"] = "run/student-tuned"
        (root / f"{name}.yaml").write_text(yaml.safe_dump(values))
    (root / FILE).write_text("precious\n")
    (root / "prompts.txt").write_text("a thin one\na thick seven\n")
    rng = random.Random(0)
    (root / "images").mkdir()
    for index in range(12):
        Image.frombytes("L", (8, 8), rng.randbytes(64)).save(root / "images" / f"{index}.png")
    lines = [
        json.dumps({"file_name": f"{index}.png", "label": index % 3, "text": f"number {index}"}) for index in range(12)
    ]
    (root / "images" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    weights = load_file(ROOT / "tests" / "models" / "oracles" / "dit.safetensors")
    torch.save(
        {key.removeprefix("weights."): value for key, value in weights.items() if key.startswith("weights.")},
        root / "dit.pt",
    )
    (root / "m").mkdir()
    shutil.copy(root / "dit.pt", root / "m" / "dit.pt")


def build_fixtures(root: Path) -> None:
    """One finished run of each family, a quantised model, exports, a checkpoint of a stopped run: about two minutes."""
    if (root / "complete").exists():
        return
    shutil.rmtree(root, ignore_errors=True)
    write_inputs(root)

    from phones import measure

    from edgedit_hf.phone.bundle import Bundle
    from edgedit_hf.phone.results import append_rows

    def run(entry: str, *argv: str, limit: float = 400) -> None:
        _, ended, out, err, _ = run_limited([(entry, list(argv))], root, limit)
        if ended != "0":
            raise RuntimeError(f"the fixture {entry} {' '.join(argv)} ended with {ended}:\n{out[-500:]}\n{err[-2000:]}")

    run("compress", "--config", "tiny.yaml")
    run("sensitivity", "--config", "tiny.yaml")
    run("edgedit", "phone", "pack", "run", "run/phone/onnxruntime-fp32")
    bundle = Bundle.read(root / "run" / "phone" / "onnxruntime-fp32")
    append_rows(root / "run" / "phone" / "results.csv", measure(bundle))
    run("rank_objectives", "--config", "tiny.yaml")
    run("text_to_image", "--config", "tiny-t2i.yaml")
    run("quantize", "--config", "tiny-quantize.yaml")
    export = ("export", "edgedit", "--threads", "1", "--images", "2")
    run("optimum", *export, "--model", "run/student-tuned", "--output", "onnx-split", "--split-conditioner")
    run("optimum", *export, "--model", "t2i/elastic", "--output", "t2i-onnx", "--subnet", "tiny")
    run("optimum", *export, "--model", "run/student-tuned", "--output", "pte", "--format", "executorch")
    # A run that stopped in the middle of its first stage: with a checkpoint.
    shutil.copytree(
        root / "run",
        root / "stopped",
        ignore=lambda folder, names: [n for n in names if Path(folder) == root / "run" and n != "teacher"],
    )
    shutil.rmtree(root / "stopped" / "teacher")
    program = (
        "import os, sys, runpy\nfrom edgedit_hf.run.state import RunState\nkept = RunState.checkpoint\n"
        "def stop(self):\n    kept(self)\n    os._exit(0)\nRunState.checkpoint = stop\n"
        "sys.argv = ['x', '--config', 'tiny.yaml', '--override', 'output_dir=stopped']\n"
        f"runpy.run_path({str(TRAINING / 'train_teacher.py')!r}, run_name='__main__')\n"
    )
    (root / "stop.py").write_text(program)
    run("stop.py")
    if not list((root / "stopped" / "teacher" / "checkpoints").glob("step-*")):
        raise RuntimeError("the stopped run has no checkpoint")
    genotype = json.loads((root / "run" / "search" / "front.json").read_text())["front"][0]["genotype"]
    (root / "genotype.json").write_text(json.dumps(genotype))
    for name in (".stdout", ".stderr", ".step"):
        (root / name).unlink(missing_ok=True)
    (root / "complete").touch()


# -------------------------------------------------------------------- cases


def case(
    area: str,
    name: str,
    *steps: tuple,
    copies: list[str],
    writes: list[str],
    remove: list[str] = (),
    edits: list[dict] = (),
    seconds: float = 40,
) -> dict:
    """One case; its id follows from its name, so that the same ones can be run again on other code."""
    content = {
        "area": area,
        "name": name,
        "steps": [[entry, list(argv)] for entry, argv in steps],
        "copies": [*copies, FILE],
        "remove": list(remove),
        "edits": list(edits),
        "writes": list(writes),
        "seconds": seconds,
    }
    return {**content, "id": hashlib.sha256(f"{area}: {name}".encode()).hexdigest()[:12]}


BAD_WORDS = (
    "",
    "abc",
    "nan",
    "inf",
    "-1",
    "0",
    "18446744073709551616",
    LONG,
    FILE,
    "/dev/full/x",
    "1e400",
    "{}",
    "../..",
)


def short(text: str) -> str:
    return repr(text if len(text) < 60 else f"{text[:10]}…({len(text)})")


CARD = ["run/report*", "run/student-tuned/README.md", "run/student-tuned/card/*"]
COMMANDS: dict[str, dict[str, Any]] = {
    "info": {"argv": ["run/student-tuned"], "writes": []},
    "convert": {"argv": ["dit.pt", "out", "--heads", "4", "--family", "dit"], "writes": ["out/*"]},
    "init": {"argv": [], "writes": []},
    "recipes copy": {"argv": ["out"], "writes": ["out/*"]},
    "bank": {"argv": ["run", "--table", "run/latency/table.json"], "writes": []},
    "select": {"argv": ["run", "--output", "out"], "writes": ["out/*"]},
    "phone pack": {"argv": ["run", "out"], "writes": ["out/*"], "seconds": 120},
    "phone serve": {"argv": ["run", "--keyfile", "key.pem"], "writes": ["run/phone/*"], "seconds": 120},
    "phone import": {
        "argv": ["run/phone/results.csv", "run", "--device", "a phone", "--output", "out.json"],
        "writes": ["out.json"],
    },
    "report": {"argv": ["run"], "writes": ["run/report*"]},
    "card": {"argv": ["run/student-tuned"], "writes": CARD[1:]},
    "push": {"argv": ["run/student-tuned", "me/student", "--license", "mit", "--dry-run"], "writes": []},
    "pull": {"argv": ["me/student", "out"], "writes": ["out/*"]},
    "train": {"argv": ["teacher", "--config", "tiny.yaml", "--dry-run"], "writes": []},
}
FAMILY = {"run": ["run", "dit.pt", "tiny.yaml"], "t2i": ["t2i", "prompts.txt"]}
EXPORT = ["export", "edgedit", "--model", "run/student-tuned", "--output", "out", "--images", "2", "--threads", "1"]
EXPORTS = {  # forms of the export in which an option is tried
    "": (EXPORT, ["run/student-tuned"], None),
    "t2i": (
        [*EXPORT[:3], "t2i/elastic", *EXPORT[4:], "--subnet", "tiny"],
        ["t2i/elastic", "prompts.txt"],
        {"--subnet", "--prompts", "--resolution", "--batch"},
    ),
    "int8": (
        [*EXPORT, "--dtype", "int8", "--activations", "static"],
        ["run/student-tuned"],
        {"--activations", "--tolerance", "--images"},
    ),
    "int4": ([*EXPORT, "--dtype", "int4", "--weights", "gptq"], ["run/student-tuned"], {"--weights", "--min-psnr"}),
    "pte": (
        [*EXPORT, "--format", "executorch"],
        ["run/student-tuned"],
        {"--batch", "--backend", "--resolution", "--opset"},
    ),
    "web": ([*EXPORT, "--format", "web"], ["run/student-tuned"], {"--runtime-url", "--resolution", "--batch"}),
}


def leaves(parser: argparse.ArgumentParser, prefix: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield prefix, parser
    for action in nested:
        for name, child in action.choices.items():
            yield from leaves(child, f"{prefix} {name}".strip())


def with_value(argv: list[str], parser: argparse.ArgumentParser, action: argparse.Action, value: str) -> list[str]:
    """The command's arguments with this value for one of its options or positionals."""
    changed = list(argv)
    if action.nargs == argparse.REMAINDER:
        return [*changed, value]
    if not action.option_strings:
        positionals = [
            a for a in parser._actions if not a.option_strings and not isinstance(a, argparse._SubParsersAction)
        ]
        place = [
            index
            for index, _ in enumerate(changed)
            if not changed[index].startswith("--") and (index == 0 or not changed[index - 1].startswith("--"))
        ]
        index = place[positionals.index(action)]
        return [
            *changed[:index],
            *(["--"] if value.startswith("-") and index == len(changed) - 1 else []),
            value,
            *changed[index + 1 :],
        ]
    name = action.option_strings[-1]
    while name in changed:
        index = changed.index(name)
        del changed[index : index + 2]
    return [*changed, f"{name}={value}"]


def option_cases() -> Iterator[dict]:
    """Every option of `edgedit`, `optimum-cli export edgedit` and sample_min.py with every bad value."""
    from edgedit_hf.commands.cli import build_parser
    from edgedit_hf.commands.export import add_arguments

    for name, parser in leaves(build_parser()):
        spec = COMMANDS.get(name)
        if spec is None:
            raise KeyError(
                f"tests/sweep knows no ordinary arguments of the command edgedit {name}; add them to COMMANDS"
            )
        for action in parser._actions:
            if action.nargs == 0:
                continue
            for value in BAD_WORDS:
                argv = [*name.split(), *with_value(spec["argv"], parser, action, value)]
                target = action.dest in ("output", "folder")
                writes = [*spec["writes"], *([f"{value}/*"] if target and value not in ("", FILE, "../..") else [])]
                label = (
                    f"edgedit {name}: {action.option_strings[-1] if action.option_strings else action.dest} = "
                    f"{short(value)}"
                )
                seconds = spec.get("seconds", 40)
                yield case("options", label, ("edgedit", argv), copies=FAMILY["run"], writes=writes, seconds=seconds)
        for argv in ([], ["--no-such"], [*spec["argv"], "surplus"]):
            yield case(
                "options",
                f"edgedit {name} {argv}",
                ("edgedit", [*name.split(), *argv]),
                copies=FAMILY["run"],
                writes=spec["writes"],
            )
    for argv in ([], ["nothing"], [""], [LONG], ["--version", "x"]):
        yield case("options", f"edgedit {short(str(argv))}", ("edgedit", argv), copies=[], writes=[])
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for form, (base, copies, only) in EXPORTS.items():
        for action in parser._actions:
            name = action.option_strings[-1]
            if action.nargs == 0 or (only is not None and name not in only):
                continue
            for value in BAD_WORDS:
                writes = ["out/*", *([f"{value}/*"] if name == "--output" and value not in ("", FILE, "../..") else [])]
                argv = with_value(base, parser, action, value)
                yield case(
                    "options",
                    f"export {form}: {name} = {short(value)}",
                    ("optimum", argv),
                    copies=copies,
                    writes=writes,
                    seconds=60,
                )
    for folder, extra in (("run/exported/onnx-fp32", []), ("onnx-split", []), ("t2i-onnx", []), ("pte", [])):
        for name in ("--seed", "--label", "--token-ids", "--prompt", "--output"):
            for value in BAD_WORDS:
                argv = [*extra, f"{name}={value}"]
                writes = [
                    "image.png",
                    *(
                        [value]
                        if name == "--output" and value in ("abc", "nan", "inf", "-1", "0", "{}", "1e400", FILE)
                        else []
                    ),
                ]
                label = f"sample_min.py of {folder}: {name} = {short(value)}"
                yield case("options", label, (f"{folder}/sample_min.py", argv), copies=[folder], writes=writes)


def output_cases() -> Iterator[dict]:
    """Every command that writes, onto its own input, into it, around it, and onto what is not ours."""
    inputs = {
        "convert": (["convert", "m/dit.pt", "{}", "--heads", "4", "--family", "dit"], "m/dit.pt", ["--overwrite"]),
        "convert-folder": (["convert", "run/teacher", "{}"], "run/teacher", ["--overwrite"]),
        "select": (["select", "run", "--output={}"], "run/bank", []),
        "recipes": (["recipes", "copy", "{}"], "run", []),
        "init": (["init", "--output={}"], "run", []),
        "export": (
            ["export", "edgedit", "--model", "run/student-tuned", "--output={}", "--images", "2", "--threads", "1"],
            "run/student-tuned",
            ["--overwrite"],
        ),
        "export-quantised": (
            ["export", "edgedit", "--model", "q/quantized", "--output={}", "--images", "2", "--threads", "1"],
            "q/quantized",
            ["--overwrite"],
        ),
    }
    for name, (argv, source, flags) in inputs.items():
        first = source.split("/")[0]
        targets = [
            "",
            ".",
            first,
            source,
            f"{source}/new",
            f"{first}/../{source}",
            FILE,
            f"{FILE}/x",
            "precious",
            "precious/new/../..",
            "run/teacher",
            "run/bank/../teacher",
            "/dev/null",
            "/proc/x",
            "link",
        ]
        for target in targets:
            for flag in [[], *[[f] for f in flags]]:
                filled = [word.replace("{}", target) for word in argv]
                entry = "optimum" if argv[0] == "export" else "edgedit"
                edits = [
                    {"file": "precious/notes.txt", "write": "mine"},
                    {"file": "precious/config.json", "write": "{}"},
                    {"file": "link", "link": "run/teacher"},
                ]
                # Recipes are copied into any folder; they replace nothing of another name.
                writes = (
                    [f"{os.path.normpath(target)}/*".removeprefix("./")]
                    if name == "recipes" and target not in ("", FILE)
                    else []
                )
                copies = ["run", *(["q"] if first == "q" else [])]
                if first == "m":
                    copies.append("m/dit.pt")
                yield case(
                    "outputs",
                    f"{name} onto {target!r} {flag}",
                    (entry, [*filled, *flag]),
                    copies=copies,
                    edits=edits,
                    writes=writes,
                    seconds=60,
                )


# -------------------------------------------------------------------- recipes

PREFIX = {"run": ("tiny.yaml", "run"), "t2i": ("tiny-t2i.yaml", "t2i"), "q": ("tiny-quantize.yaml", "q")}
AFTER = [
    "teacher",
    "bank",
    "latency",
    "search",
    "student",
    "student-tuned",
    "teacher-more-steps",
    "exported",
    "evaluate",
]


def stage_of(section: str) -> tuple[str, str, list[str], list[str], list[str]]:
    """(script, recipe, copies, removed, may write) for a section of the recipe: that stage runs again on what the
    stages before left.
    """

    def run(script: str, *outputs: str, also: tuple[str, ...] = ()) -> tuple:
        return (
            script,
            "tiny.yaml",
            ["run", "tiny.yaml"],
            [f"run/{name}" for name in outputs],
            [f"run/{name}/*" for name in (*outputs, *also)],
        )

    if section in ("", "data", "sampling", "teacher"):
        return "train_teacher", "tiny.yaml", ["tiny.yaml", "images"], [], ["run/*"]
    if section in ("text", "elastic", "knowledge"):
        script, folder = ("train_text_encoders", "text") if section == "text" else ("train_elastic", "elastic")
        return (
            script,
            "tiny-t2i.yaml",
            ["t2i", "tiny-t2i.yaml"],
            [f"t2i/{folder}"],
            [f"t2i/{folder}/*", "t2i/text-embeddings/*"],
        )
    if section == "quantize":
        return "quantize", "tiny-quantize.yaml", ["run/student-tuned", "tiny-quantize.yaml"], [], ["q/*"]
    return {
        "bank": run("distill_proxies", "bank"),
        "latency": run("measure_latency", "latency"),
        "search": run("search_architecture", "search", also=("evaluate",)),
        "student": run("select_student", "student"),
        "tune": run("finetune", "student-tuned", "teacher-more-steps", also=("evaluate",)),
        "few_step": run("distill_few_step", "few-step", also=("extractor", "evaluate")),
        "export": run("export_student", "exported"),
        "evaluate": run("evaluate_models", "evaluate"),
        "sensitivity": run("sensitivity", "sensitivity"),
        "rank": run("rank_objectives", "ranking", also=("extractor", "evaluate")),
        "card": ("compress", "tiny.yaml", ["run", "tiny.yaml"], [], CARD),
        "hub": ("compress", "tiny.yaml", ["run", "tiny.yaml"], [], CARD),
    }[section]


BAD_VALUES = (
    "",
    None,
    "abc",
    [],
    {},
    True,
    1.5,
    float("nan"),
    float("inf"),
    float("-inf"),
    -1,
    0,
    2**64,
    1e30,
    LONG,
    FILE,
    "a\0b",
    ["", LONG],
    "2026-01-01",
)


def recipe_keys() -> Iterator[tuple[str, str]]:
    """(section, key) of every key of the recipe; the section of a top-level key is empty."""
    from edgedit_hf.run.config import RunConfig

    for entry in dataclasses.fields(RunConfig):
        kind = getattr(RunConfig(), entry.name)
        if not dataclasses.is_dataclass(kind):
            yield "", entry.name
            continue
        for key in dataclasses.fields(kind):
            yield entry.name, key.name


def recipe_cases() -> Iterator[dict]:
    """Every key with every bad value: the dry run must refuse it, or the stage must work with it."""
    import yaml

    for section, key in recipe_keys():
        script, recipe, copies, removed, writes = stage_of(section)
        name = f"{section}.{key}" if section else key
        for value in BAD_VALUES:
            text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
            written = list(writes)
            if key == "output_dir" and isinstance(value, str) and value not in ("", FILE):
                written.append(f"{value}/*")
            argv = ["--config", recipe, "--override", f"{name}={text}"]
            label = f"{name} = {short(str(value)) if isinstance(value, (str, list)) else value}"
            steps = (script, [*argv, "--dry-run"]), (script, argv)
            yield case("recipe keys", label, *steps, copies=copies, remove=removed, writes=written)


# -------------------------------------------------------------------- files


@dataclasses.dataclass
class Reader:
    """A command that reads files of ours: what it is called, how it is run, which files it reads, what it may write."""

    name: str
    steps: list[tuple]
    copies: list[str]
    files: list[str]
    writes: list[str] = dataclasses.field(default_factory=list)
    remove: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 40
    slow: bool = False  # takes long where it works: fewer cases


def recipe_reader(
    script: str,
    files: list[str],
    remove: list[str],
    writes: list[str],
    recipe: str = "tiny.yaml",
    *also: str,
    folder: str = "run",
) -> Reader:
    return Reader(f"{script}.py", [(script, ["--config", recipe])], [folder, recipe, *also], files, writes, remove)


def readers() -> list[Reader]:
    """Every file of ours beside the commands that read it."""
    models = [
        "model_index.json",
        "transformer/config.json",
        "scheduler/scheduler_config.json",
        "transformer/*.safetensors",
    ]
    report = CARD
    again = [
        *report,
        "run/*/stage.json",
        "run/*/run.json",
        "run/*/telemetry.jsonl",
    ]  # a stage that is not finished runs again, to the same weights

    def of(folder: str, names: list[str] = models) -> list[str]:
        return [f"{folder}/{name}" for name in names]

    measured = [
        "run/search/*.json",
        "run/bank/index.json",
        "run/latency/table.json",
        "run/student/choice.json",
        "run/evaluate/*.json",
        "run/exported/*/verify.json",
        "run/exported/*/bench.json",
        "run/*/telemetry.jsonl",
        "run/*/stage.json",
        "run/*/run.json",
        "run/sensitivity/*.json",
        "run/evaluate/*.png",
        "run/evaluate/*.safetensors",
    ]
    found = [
        Reader("edgedit report", [("edgedit", ["report", "run"])], ["run"], measured, report),
        Reader(
            "edgedit select",
            [("edgedit", ["select", "run", "--output", "out"])],
            ["run"],
            [
                "run/search/front.json",
                "run/search/stage.json",
                "run/search/run.json",
                "run/bank/*",
                "run/latency/table.json",
                *of("run/teacher"),
            ],
            ["out/*"],
        ),
        Reader(
            "edgedit bank",
            [("edgedit", ["bank", "run"]), ("edgedit", ["bank", "run", "--json"])],
            ["run"],
            ["run/bank/index.json", "run/latency/table.json"],
        ),
        Reader(
            "edgedit phone import",
            [("edgedit", ["phone", "import", "run/phone/results.csv", "run", "--device", "a", "--output", "out.json"])],
            ["run"],
            ["run/phone/results.csv", "run/phone/onnxruntime-fp32/bundle.json"],
            ["out.json"],
        ),
        Reader(
            "edgedit phone serve",  # a key without its certificate: it ends before it serves
            [("edgedit", ["phone", "serve", "run", "--keyfile", "key.pem"])],
            ["run"],
            ["run/bank/index.json", "run/student/choice.json", *of("run/teacher", models[:2])],
        ),
        Reader(
            "edgedit info",
            [("edgedit", ["info", "run/teacher"]), ("edgedit", ["info", "run/teacher", "--json"])],
            ["run/teacher"],
            of("run/teacher", models[:2]),
        ),
        Reader(
            "edgedit info (elastic)",
            [("edgedit", ["info", "t2i/elastic"]), ("edgedit", ["info", "t2i/elastic", "--json"])],
            ["t2i/elastic"],
            of("t2i/elastic", models[:2]),
        ),
        Reader(
            "edgedit info (export)",
            [("edgedit", ["info", "run/exported/onnx-fp32"])],
            ["run/exported/onnx-fp32"],
            of("run/exported/onnx-fp32", models[:2]),
        ),
        Reader(
            "edgedit convert",
            [("edgedit", ["convert", "dit.pt", "out", "--heads", "4", "--family", "dit"])],
            ["dit.pt"],
            ["dit.pt"],
            ["out/*"],
        ),
        recipe_reader(
            "compress",
            [
                "run/*/stage.json",
                "run/*/run.json",
                "run/evaluate/*.json",
                "run/report.json",
                "run/student-tuned/README.md",
            ],
            [],
            again,
        ),
        recipe_reader(
            "train_teacher",
            ["run/teacher/stage.json", "run/teacher/run.json", *of("run/teacher")],
            [],
            ["run/teacher/*.json*"],
        ),
        recipe_reader(
            "distill_proxies",
            [*of("run/teacher"), "run/bank/index.json", "run/bank/*.safetensors", "run/bank/run.json"],
            ["run/bank/stage.json"],
            ["run/bank/*"],
        ),
        recipe_reader(
            "measure_latency", [*of("run/teacher"), "run/latency/*.json"], ["run/latency/stage.json"], ["run/latency/*"]
        ),
        recipe_reader(
            "search_architecture",
            [
                *of("run/teacher"),
                "run/bank/index.json",
                "run/bank/*.safetensors",
                "run/latency/table.json",
                "run/search/state.json",
                "run/search/random.json",
                "run/search/telemetry.jsonl",
                "run/extractor/*",
                "run/evaluate/reference.json",
            ],
            ["run/search/stage.json", "run/search/front.json"],
            ["run/search/*", "run/evaluate/*"],
        ),
        recipe_reader(
            "select_student",
            ["run/search/front.json", "run/search/stage.json", "run/bank/index.json", "run/bank/*.safetensors"],
            ["run/student"],
            ["run/student/*"],
        ),
        recipe_reader(
            "finetune",
            ["run/student/choice.json", "run/student/stage.json", *of("run/student"), *of("run/teacher")],
            ["run/student-tuned", "run/teacher-more-steps"],
            ["run/student-tuned/*", "run/teacher-more-steps/*", "run/evaluate/*"],
        ),
        recipe_reader("export_student", of("run/student-tuned"), ["run/exported"], ["run/exported/*"]),
        recipe_reader(
            "evaluate_models",
            [
                *of(
                    "run/exported/onnx-int8",
                    [
                        "model_index.json",
                        "transformer/config.json",
                        "contract.json",
                        "verify.json",
                        "bench.json",
                        "transformer/onnx/model.onnx",
                    ],
                ),
                "run/extractor/*",
                "run/student/choice.json",
                "run/student-tuned/stage.json",
            ],
            ["run/evaluate/*.*"],
            ["run/evaluate/*"],
        ),
        recipe_reader(
            "rank_objectives",
            ["run/bank/index.json", "run/latency/table.json", "run/ranking/*/*.json", "run/extractor/*"],
            ["run/ranking/stage.json", "run/ranking/ranking.json", "run/ranking/table.md", "run/ranking/plot.png"],
            ["run/ranking/*", "run/ranking/*/*"],
        ),
        recipe_reader(
            "sensitivity",
            ["run/sensitivity/*.json", *of("run/teacher")],
            ["run/sensitivity/stage.json"],
            ["run/sensitivity/*"],
        ),
        Reader(
            "train_teacher.py (stopped)",
            [("train_teacher", ["--config", "tiny.yaml", "--override", "output_dir=stopped"])],
            ["stopped", "tiny.yaml"],
            ["stopped/teacher/checkpoints/*/*", "stopped/teacher/*.json*"],
            ["stopped/*"],
        ),
        Reader(
            "select_student.py (genotype)",
            [("select_student", ["--config", "tiny.yaml", "--override", "student.genotype=genotype.json"])],
            ["run", "tiny.yaml", "genotype.json"],
            ["genotype.json"],
            ["run/student/*"],
            ["run/student"],
        ),
        Reader(
            "distill_proxies.py (only)",
            [("distill_proxies", ["--config", "tiny.yaml", "--override", "bank.only=[genotype.json]"])],
            ["run", "tiny.yaml", "genotype.json"],
            ["genotype.json"],
            ["run/bank/*"],
            ["run/bank"],
        ),
        Reader(
            "train_teacher.py (images)",
            [
                (
                    "train_teacher",
                    ["--config", "tiny.yaml", "--override", "data.source=images", "--override", "teacher.steps=1"],
                )
            ],
            ["tiny.yaml", "images"],
            ["images/metadata.jsonl", "images/0.png", "images/5.png"],
            ["run/*"],
        ),
        Reader(
            "train_teacher.py (recipe)",
            [("train_teacher", ["--config", "tiny.yaml", "--dry-run"])],
            ["tiny.yaml"],
            ["tiny.yaml"],
        ),
        Reader(
            "train_elastic.py (recipe)",
            [("train_elastic", ["--config", "tiny-t2i.yaml", "--dry-run"])],
            ["tiny-t2i.yaml"],
            ["tiny-t2i.yaml"],
        ),
        recipe_reader(
            "train_elastic",
            [
                "t2i/text/text_encoder/*",
                "t2i/text/tokenizer/*.json",
                "t2i/text/text_encoder_2/config.json",
                "t2i/text/stage.json",
                "t2i/text-embeddings/train/index.json",
                "t2i/text-embeddings/train/*/*",
            ],
            ["t2i/elastic"],
            ["t2i/elastic/*", "t2i/text-embeddings/*"],
            "tiny-t2i.yaml",
            folder="t2i",
        ),
        recipe_reader(
            "evaluate_elastic",
            [
                *of("t2i/elastic"),
                "t2i/elastic/text_encoder/config.json",
                "t2i/elastic/tokenizer/*.json",
                "t2i/elastic/stage.json",
            ],
            ["t2i/evaluate"],
            ["t2i/evaluate/*"],
            "tiny-t2i.yaml",
            folder="t2i",
        ),
        recipe_reader(
            "text_to_image",
            ["t2i/evaluate/*.json", "t2i/*/stage.json", "t2i/*/run.json", "t2i/*/telemetry.jsonl"],
            [],
            ["t2i/report*", "t2i/*/stage.json", "t2i/*/run.json", "t2i/*/telemetry.jsonl"],
            "tiny-t2i.yaml",
            folder="t2i",
        ),
        Reader(
            "quantize.py",
            [("quantize", ["--config", "tiny-quantize.yaml"])],
            ["q", "run/student-tuned", "tiny-quantize.yaml"],
            ["q/*/*.json", *of("run/student-tuned")],
            ["q/*"],
            ["q/quantized/stage.json"],
        ),
        Reader(
            "a model of the quantised",
            [("sample", ["q/quantized"])],
            ["q/quantized"],
            ["q/quantized/*.json", *of("q/quantized")],
        ),
        Reader(
            "export of the quantised",
            [("optimum", [*EXPORT[:3], "q/quantized", *EXPORT[4:], "--dtype", "int4"])],
            ["q/quantized"],
            ["q/quantized/*.json", *of("q/quantized")],
            ["out/*"],
        ),
        Reader("export", [("optimum", EXPORT)], ["run/student-tuned"], of("run/student-tuned"), ["out/*"]),
        Reader(
            "export of t2i",
            [("optimum", [*EXPORT[:3], "t2i/elastic", *EXPORT[4:], "--prompts", "prompts.txt", "--subnet", "tiny"])],
            ["t2i/elastic", "prompts.txt"],
            ["prompts.txt", *of("t2i/elastic"), "t2i/elastic/text_encoder/config.json", "t2i/elastic/tokenizer/*.json"],
            ["out/*"],
            seconds=60,
            slow=True,
        ),
        Reader("an elastic model", [("sample", ["t2i/elastic"])], ["t2i/elastic"], of("t2i/elastic")),
    ]
    for folder in ("run/exported/onnx-fp32", "onnx-split", "t2i-onnx", "pte"):
        files = of(
            folder,
            [
                "contract.json",
                "reference.safetensors",
                "transformer/onnx/*",
                "transformer/*/*.pte",
                "text_encoder/onnx/*",
            ],
        )
        found.append(
            Reader(
                f"sample_min.py of {folder}",
                [(f"{folder}/sample_min.py", ["--check"]), (f"{folder}/sample_min.py", ["--seed", "1"])],
                [folder],
                files,
                ["image.png"],
            )
        )
        files = of(
            folder,
            [
                "contract.json",
                "model_index.json",
                "*/config.json",
                "scheduler/*.json",
                "verify.json",
                "transformer/onnx/*",
                "transformer/*/*.pte",
            ],
        )
        found.append(Reader(f"from_pretrained of {folder}", [("sample", [folder])], [folder], files))
    return found


REMOVED = ("delete",)
VALUES = (
    None,
    "text",
    5,
    [],
    {},
    float("nan"),
    -1,
    10**12,
    2**64,
    "",
    LONG,
    "../../etc/passwd",
    True,
    0.5,
    [[]],
    float("inf"),
)
WHOLE = (
    ("truncate", 0.3),
    ("truncate", 0.7),
    ("truncate", 0.98),
    ("empty", 0),
    ("garbage", 0),
    ("text", 0),
    ("deep", 0),
    ("list", 0),
    ("null", 0),
    ("not-utf8", 0),
    ("directory", 0),
    ("gone", 0),
)
FUZZ = ("flip", "flip", "truncate", "insert", "zero", "huge-digits")


def paths_of(content: Any, rng: random.Random, depth: int = 4) -> list[list]:
    """Paths to the fields of JSON: every top-level one, and of the deeper ones a sample."""
    found = []
    items = (
        list(content.items())
        if isinstance(content, dict)
        else list(enumerate(content))
        if isinstance(content, list)
        else []
    )
    if len(items) > 12 and depth < 4:
        items = rng.sample(items, 6)
    for key, value in items:
        found.append([key])
        if depth > 1:
            found += [[key, *rest] for rest in paths_of(value, rng, depth - 1)]
    return found


def load_content(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return (
            [json.loads(line) for line in text.splitlines()]
            if path.suffix == ".jsonl"
            else json.loads(text)
            if path.suffix == ".json"
            else None
        )
    except (ValueError, OSError):
        return None


def files_of(reader: Reader, fixtures: Path) -> list[str]:
    found = []
    for pattern in reader.files:
        found += sorted(path.relative_to(fixtures).as_posix() for path in fixtures.glob(pattern) if path.is_file())
    return list(dict.fromkeys(found))


def at(content: Any, path: list) -> Any:
    for key in path:
        content = content[key]
    return content


def reader_case(area: str, reader: Reader, label: str, file: str, edit: dict) -> dict:
    writes = [*reader.writes, *([file] if area == "" else [])]
    return case(
        area,
        f"{reader.name} < {file}: {label}",
        *copy.deepcopy(reader.steps),
        copies=reader.copies,
        remove=reader.remove,
        edits=[{"file": file, **edit}],
        writes=writes,
        seconds=reader.seconds,
    )


def kept(reader: Reader, file: str) -> bool:
    import fnmatch

    return not any(fnmatch.fnmatch(file, pattern) or file.startswith(f"{pattern}/") for pattern in reader.remove)


def file_cases(fixtures: Path, seed: int, a_file: int) -> Iterator[dict]:
    """Fields missing, of another type, NaN, negative, enormous; files cut, empty, foreign: for every file, `a_file` of
    each of the two kinds at most.
    """
    for reader in readers():
        for file in files_of(reader, fixtures):
            if not kept(reader, file):
                continue
            rng = random.Random(f"{seed} {reader.name} {file}")
            content = load_content(fixtures / file)
            edits = []
            if content is not None:
                ways = paths_of(content, rng)
                top = [way for way in ways if len(way) == 1]
                deep = [way for way in ways if len(way) > 1]
                chosen = [(way, "delete") for way in top] + [
                    (way, value) for way in top for value in rng.sample(VALUES, 4)
                ]
                chosen += [(way, rng.choice(("delete", *VALUES))) for way in deep]
                rng.shuffle(chosen)
                for way, value in chosen[: a_file // (4 if reader.slow else 1)]:
                    name = ".".join(map(str, way))
                    if value == "delete":
                        edits.append((f"without {name}", {"json": way, "delete": True}))
                    else:
                        edits.append(
                            (
                                f"{name} = {short(value) if isinstance(value, str) else value}",
                                {"json": way, "set": value},
                            )
                        )
            whole = list(WHOLE)
            rng.shuffle(whole)
            for kind, place in whole[: 2 if reader.slow else max(4, a_file // 3)]:
                edits.append((f"{kind} {place or ''}", {"bytes": kind, "at": place, "seed": seed}))
            for label, edit in edits:
                yield reader_case("files", reader, label, file, edit)


def fuzz_cases(fixtures: Path, seed: int, count: int) -> Iterator[dict]:
    """Random bytes in `count` files, spread over all kinds of files and their readers."""
    rng = random.Random(f"fuzz {seed}")
    pairs = [
        (reader, file)
        for reader in readers()
        for file in files_of(reader, fixtures)
        if kept(reader, file) and not reader.slow and not file.endswith(".png")
    ]
    by_kind: dict[str, list] = {}
    for reader, file in pairs:
        by_kind.setdefault(Path(file).suffix, []).append((reader, file))
    kinds = sorted(by_kind)
    for index in range(count):
        reader, file = rng.choice(by_kind[kinds[index % len(kinds)]])
        kind = rng.choice(FUZZ if Path(file).suffix in (".json", ".jsonl", ".yaml") else FUZZ[:-1])
        yield reader_case(
            "fuzz", reader, f"{kind} #{index}", file, {"bytes": kind, "seed": index + 1000 * seed, "at": rng.random()}
        )


def all_cases(fixtures: Path, seed: int = 0, a_file: int = 12, fuzz: int = 400) -> list[dict]:
    """The whole sweep."""
    found = [
        *option_cases(),
        *output_cases(),
        *recipe_cases(),
        *file_cases(fixtures, seed, a_file),
        *fuzz_cases(fixtures, seed, fuzz),
    ]
    return list({each["id"]: each for each in found}.values())


def quick_cases(fixtures: Path, seed: int, a_file: int) -> list[dict]:
    """What needs neither a trained network nor an export: options of `edgedit`, dry runs with every kind of key, what
    the report reads.
    """
    options = [each for each in option_cases() if each["steps"][0][0] == "edgedit"]
    keys = [{**each, "steps": each["steps"][:1]} for each in recipe_cases()]
    files = [
        each
        for each in file_cases(fixtures, seed, a_file)
        if each["name"].startswith(("edgedit report", "train_teacher.py (recipe)"))
    ]
    return [each for each in (*options, *keys, *files) if all((fixtures / name).exists() for name in each["copies"])]


def scratch_folder() -> Path:
    """Where cases run: memory if there is a file system of it, for speed."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(os.environ.get("TMPDIR", "/tmp"))
