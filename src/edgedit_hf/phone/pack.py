"""A bundle as a folder to measure without a browser: over adb, or in an app from Xcode, with the scripts that do it.

What the scripts call and read was taken from the sources of ONNX Runtime (onnxruntime/test/perftest: flags of 2026,
output of 2025) and ExecuTorch 1.5 (examples/portable/executor_runner). They were run against stand-ins that print
the same, not on a phone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from ..errors import EdgeDiTError
from ..files import atomic_folder
from ..run.outputs import check_place, check_writable
from .bundle import Bundle, Subject, check_kind, make_bundle
from .results import COLUMNS

RUNTIMES = {"onnxruntime": "adb.sh", "executorch": "adb.sh", "coreml": "Measure.swift"}  # what measures each
PROCESSES = 5  # of a network: rounds of one process each, in which the runs of a network follow each other
PRECISION = {"onnxruntime": "fp32", "executorch": "fp32", "coreml": "fp16"}  # where none is asked for


def write_pack(
    output: str | os.PathLike,
    subject: Subject,
    *,
    runtime: str,
    precision: str | None = None,
    batch: int = 1,
    tell: Callable[[str], None] = lambda line: None,
) -> Bundle:
    """Write a bundle with what measures it, as a new folder.

    Args:
        output: it must not be there yet, or be empty.
        subject, runtime, precision, batch, tell: of [`make_bundle`](bundle.make_bundle); the runtime is a key of
            [`RUNTIMES`], the precision by default fp32 (Core ML: fp16).

    Raises:
        EdgeDiTError: something is there, or see `make_bundle`.
    """
    if runtime not in RUNTIMES:
        raise EdgeDiTError(
            f"A pack for {runtime!r} is asked for; packs are for {', '.join(RUNTIMES)} (a browser measures what "
            "`edgedit phone serve` gives it)."
        )
    precision = PRECISION[runtime] if precision is None else precision
    check_kind(runtime, precision)
    place = check_place(output)
    if place.exists() and any(place.iterdir()):
        raise EdgeDiTError(f"{output} is there already and is left as it is; choose another output.")
    check_writable(place, output)
    with atomic_folder(place) as folder:
        bundle = make_bundle(folder, subject, runtime=runtime, precision=precision, batch=batch, tell=tell)
        (folder / "README.md").write_text(readme(bundle), encoding="utf-8")
        script = folder / RUNTIMES[runtime]
        script.write_text(script_of(bundle), encoding="utf-8")
        if script.suffix == ".sh":
            script.chmod(0o755)
    return Bundle.read(place)


def script_of(bundle: Bundle) -> str:
    """The script that measures a bundle, with its networks and the protocol filled in."""
    protocol = bundle.data["protocol"]
    runs = -(-protocol["rounds"] // PROCESSES)
    text = _template(RUNTIMES[bundle.runtime])
    if bundle.runtime != "coreml":
        text = text.replace("@RUN@", _template(f"{bundle.runtime}.sh").rstrip())
    names = [entry["name"] for entry in bundle.data["networks"]]
    filled = {
        "BUNDLE": bundle.hash,
        "HEADER": ",".join(COLUMNS),
        "NETWORKS": "\n".join(f"{entry['name']} {Path(entry['file']).name}" for entry in bundle.data["networks"]),
        "NAMES": ", ".join(f'"{name}"' for name in names),
        "INPUTS": ",".join(Path(entry["file"]).name for entry in bundle.data["inputs"]),
        "PROCESSES": str(PROCESSES),
        "WARMUPS": str(protocol["warmups"]),
        "RUNS": str(runs),
        "COLD": str(protocol["cold_loads"]),
        "ROUNDS": str(protocol["rounds"]),
        "SHAPES": ", ".join(_swift_input(entry) for entry in bundle.data["inputs"]),
    }
    for name, value in filled.items():
        text = text.replace(f"@{name}@", value)
    return text


def _swift_input(entry: dict) -> str:
    return f'("{entry["name"]}", {entry["shape"]}, "{entry["dtype"]}", "{Path(entry["file"]).name}")'


def readme(bundle: Bundle) -> str:
    """How to measure the bundle, step by step, each marked run or not run here."""
    text = _template(f"{bundle.runtime}.md")
    sizes = [stored["bytes"] for stored in bundle.data["files"].values()]
    filled = {
        "BUNDLE": bundle.hash,
        "PRECISION": bundle.precision,
        "BATCH": str(bundle.batch),
        "COUNT": str(len(bundle.networks)),
        "SIZE": f"{sum(sizes) / 1e6:,.1f} MB",
        "PROCESSES": str(PROCESSES),
        "RUNS": str(-(-bundle.data["protocol"]["rounds"] // PROCESSES)),
        "WARMUPS": str(bundle.data["protocol"]["warmups"]),
    }
    for name, value in filled.items():
        text = text.replace(f"@{name}@", value)
    return text


def _template(name: str) -> str:
    return (files("edgedit_hf.phone") / "packs" / name).read_text(encoding="utf-8")
