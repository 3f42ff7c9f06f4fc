"""The whole loop with a browser as the device: measured there, searched for it, exported to it and measured again.

    python benchmarks/browser_loop.py runs/demo [--config training/recipes/digits.yaml] [--work FOLDER] [--batch 64]
    [--precision fp32] [--override key=value] [--json] [--check]

Takes the teacher and the bank of a finished run and does what a user does, command by command: `edgedit phone serve`
with a headless Chromium (WebAssembly) as the phone; `edgedit train compress` with the table that came back, so that the
search, the choice of the student and the report go by it; export as a web page; `edgedit phone serve` again, whose
networks now include the student. Then the page draws with the teacher's and the student's export, and the same networks
are timed in ONNX Runtime and ExecuTorch on this machine, in as many threads.

It prints: how far the first table is from the networks it was not fitted to, and from what the second measurement found
of them and of the student, which it never saw; how much faster than the teacher the student is in the browser, by the
networks and by the page's own time a step; how the picture of a seed differs from Python's; and whether the ranking is
another one in the runtimes of this machine. --work keeps everything, and goes on with it. --check: the student is
predicted within 10 %, Kendall's τ over at least 8 networks is at least .9, the teacher takes at least 20 ms (browsers'
clocks are coarse), the picture has at least 40 dB (int8: 25).
"""

import argparse
import base64
import contextlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from diffusers_dit import fail
from PIL import Image
from scipy.stats import kendalltau

from edgedit_hf.files import read_json
from edgedit_hf.genotype import Genotype
from edgedit_hf.metrics.distances import psnr
from edgedit_hf.report.devices import compare_devices, in_words
from edgedit_hf.runtimes.timing import environment
from edgedit_hf.search.latency_table import LatencyTable

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from browser import CHROMIUM, Browser, served  # noqa: E402  the tests' driver of a browser

ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
LEAST_MS, MOST_ERROR, LEAST_TAU, LEAST_NETWORKS = 20.0, 0.10, 0.9, 8
LEAST_DB = {"fp32": 40.0, "int8": 25.0}
NATIVE = ("onnxruntime", "executorch")
DEVICE = "Chromium, WebAssembly"
SEED, LABEL = 7, 3


def edgedit(*words: str | Path) -> None:
    """Run a command of the package; what it says goes to this script's standard error."""
    line = ["-c", "from edgedit_hf.commands.cli import main; raise SystemExit(main())", *map(str, words)]
    subprocess.run([sys.executable, *line], check=True, stdout=sys.stderr)


def measured_in_browser(run: Path, arguments: argparse.Namespace, output: Path) -> LatencyTable:
    """`edgedit phone serve` of a run, with a browser that opens its page; the table, at once if it is there."""
    if output.is_file():
        return LatencyTable.from_json(output)
    line = ["-c", "from edgedit_hf.commands.cli import main; raise SystemExit(main())", "phone", "serve", run]
    line += ["--precision", arguments.precision, "--batch", arguments.batch, "--port", arguments.port]
    line += ["--device", DEVICE, "--output", output]
    with subprocess.Popen([sys.executable, *map(str, line)], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            for said in server.stdout:
                print(said, end="", file=sys.stderr, flush=True)
                if address := re.search(r"http://\S+", said):
                    break
            else:
                fail([f"edgedit phone serve {run} gave no address"])
            with Browser(timeout=60) as page:
                page.open(address.group())
                page.wait("document.body.dataset.state === 'ready'")
                page.run("document.getElementById('measure').click()")
                for said in server.stdout:  # until it has all and ends
                    print(said, end="", file=sys.stderr, flush=True)
        finally:
            if server.poll() is None and sys.exc_info()[0] is not None:
                server.send_signal(signal.SIGINT)
    if server.returncode:
        fail([f"edgedit phone serve {run} ended with {server.returncode}"])
    return LatencyTable.from_json(output)


def natively(run: Path, arguments: argparse.Namespace, threads: int, runtime: str, folder: Path) -> LatencyTable:
    """The table of the same networks in a runtime of this machine."""
    place = folder / f"native-{runtime}"
    table = place / "latency" / "table.json"
    if not table.is_file():
        copy_parts(run, place)
        values = {
            "output_dir": place,
            "latency.runtime": runtime,
            "latency.precision": arguments.precision,
            "latency.threads": threads,
            "latency.batch_size": arguments.batch,
        }
        edgedit("train", "latency", "--config", arguments.config, *overrides(arguments, values))
    return LatencyTable.from_json(table)


def overrides(arguments: argparse.Namespace, values: Mapping[str, Any]) -> list[str]:
    """Options of a recipe's command."""
    said = [
        *arguments.override,
        *(f"{key}={json.dumps(str(v) if isinstance(v, Path) else v)}" for key, v in values.items()),
    ]
    return [word for one in said for word in ("--override", one)]


def copy_parts(run: Path, place: Path) -> None:
    """A run's teacher and bank, as a run of its own."""
    for part in ("teacher", "bank"):
        if not (place / part).exists():
            shutil.copytree(run / part, place / f"{part}.part")
            (place / f"{part}.part").rename(place / part)


@contextlib.contextmanager
def page_of(folder: Path) -> Iterator[Browser]:
    """The page of an export, ready to draw."""
    with served(folder, ISOLATED) as address, Browser(timeout=600) as page:
        page.open(address)
        page.wait("document.body.dataset.state === 'ready'")
        yield page


def drawn(folder: Path, temporary: Path) -> dict[str, Any]:
    """The page's times of a picture, and its PSNR to sample_min.py's in dB (`None`: not one byte differs)."""
    with page_of(folder) as page:
        for name, value in (("seed", SEED), ("label", LABEL)):
            page.run(f"document.getElementById('{name}').value = '{value}'")
        page.run("document.body.dataset.state = ''; document.getElementById('draw').click()")
        page.wait("document.body.dataset.state === 'done'", seconds=600)
        png = page.run("document.getElementById('canvas').toDataURL('image/png')")
        times = page.run(
            "Object.fromEntries([...document.querySelectorAll('#timing dt')]"
            ".map((term) => [term.textContent, term.nextElementSibling.textContent]))"
        )
    file = temporary / "python.png"
    asked = ["--seed", str(SEED), "--label", str(LABEL), "--output", str(file)]
    subprocess.run([sys.executable, str(folder / "sample_min.py"), *asked], check=True, stdout=sys.stderr)
    browser = np.asarray(Image.open(io.BytesIO(base64.b64decode(png.partition(",")[2]))).convert("RGB"))
    python = np.asarray(Image.open(file).convert("RGB"))
    return {"times": times, "db": None if np.array_equal(browser, python) else psnr(browser, python, data_range=255)}


def compared(first: LatencyTable, again: LatencyTable, student: Genotype, teacher: Genotype) -> dict[str, Any]:
    """What the second measurement found of the first table's predictions."""
    found = {entry["genotype"]: entry for entry in again.to_dict()["prediction"]["networks"]}
    before = {entry["genotype"] for entry in first.to_dict()["prediction"]["networks"]}
    names = [hash_ for hash_ in found if hash_ in before or hash_ == student.hash]
    measured = [found[name]["measured_ms"] for name in names]
    predicted = [first.latency_ms(again.space.from_code(found[name]["code"])) for name in names]
    one, whole = found[student.hash], found[teacher.hash]
    return {
        "networks": len(names),
        "mean_error": sum(abs(p - m) / m for p, m in zip(predicted, measured)) / len(names),
        "kendall": float(kendalltau(predicted, measured).statistic),
        "student_unseen": student.hash not in before,
        "student_predicted_ms": first.latency_ms(student),
        "student_measured_ms": one["measured_ms"],
        "student_error": abs(first.latency_ms(student) - one["measured_ms"]) / one["measured_ms"],
        "teacher_measured_ms": whole["measured_ms"],
        "speedup": whole["measured_ms"] / one["measured_ms"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run of the recipe")
    parser.add_argument("--config", type=Path, default=ROOT / "training/recipes/digits.yaml")
    parser.add_argument("--override", action="append", default=[], metavar="key=value", help="of the recipe")
    parser.add_argument("--work", type=Path, help="where all is kept for another run; default nowhere")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", choices=tuple(LEAST_DB), default="fp32")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless all bars are kept")
    arguments = parser.parse_args()
    if CHROMIUM is None:
        fail(["there is no Chromium or Chrome on this machine"])
    with tempfile.TemporaryDirectory() as temporary:
        rows = loop(arguments, (arguments.work or Path(temporary)).resolve(), Path(temporary))
    for name, value in rows["second"].items():
        print(f"{name:<22} {value:.3f}" if isinstance(value, float) else f"{name:<22} {value}")
    for name, said in rows["pages"].items():
        compared_to = "equals Python's" if said["db"] is None else f"{said['db']:.1f} dB against Python's"
        print(f"the {name}'s page: its picture {compared_to}; {said['times']}")
    print(rows["devices"]["words"])
    for name, ratio in rows["speedups"].items():
        print(f"the student's speed-up, {name}: {ratio:.2f} (by its table)")
    if arguments.json:
        print(json.dumps({**rows, "batch": arguments.batch, "environment": environment(rows["threads"])}))
    if arguments.check:
        fail(problems(rows, arguments.precision))


def loop(arguments: argparse.Namespace, work: Path, temporary: Path) -> dict[str, Any]:
    """All of it; every step that is there already is left out."""
    student_run = work / "student"
    copy_parts(arguments.run, student_run)
    first = measured_in_browser(student_run, arguments, work / "first.json")
    threads = first.to_dict()["threads"]
    values = {
        "output_dir": student_run,
        "latency.table": work / "first.json",
        "latency.batch_size": arguments.batch,
        "export.web": [arguments.precision],
    }
    edgedit("train", "compress", "--config", arguments.config, *overrides(arguments, values))
    teacher_page = work / f"teacher-web-{arguments.precision}"
    if not teacher_page.exists():
        words = ["--model", student_run / "teacher", "--format", "web", "--dtype", arguments.precision]
        export = [Path(sys.executable).with_name("optimum-cli"), "export", "edgedit", *words, "--output", teacher_page]
        subprocess.run(list(map(str, export)), check=True, stdout=sys.stderr)
    second = measured_in_browser(student_run, arguments, work / "second.json")
    choice = read_json(student_run / "student" / "choice.json", "edgedit select")
    student = Genotype.from_layers(choice["genotype"], first.space.hidden_size)
    teacher = Genotype.of(read_json(student_run / "teacher/transformer/config.json", "edgedit train teacher"))
    tables = {DEVICE: first}
    for runtime in NATIVE:
        tables[runtime] = natively(student_run, arguments, threads, runtime, work)
    devices = compare_devices(tables)
    return {
        "threads": threads,
        "first": first.to_dict()["prediction"],
        "second": compared(first, second, student, teacher),
        "pages": {
            "teacher": drawn(teacher_page, temporary),
            "student": drawn(student_run / "exported" / f"web-{arguments.precision}", temporary),
        },
        "devices": {**devices, "words": in_words(devices)},
        "speedups": {name: table.latency_ms(teacher) / table.latency_ms(student) for name, table in tables.items()},
    }


def problems(rows: Mapping[str, Any], precision: str) -> list[str]:
    """What is below a bar."""
    second, found = rows["second"], []
    if second["student_error"] > MOST_ERROR:
        found.append(f"the student is predicted {second['student_error']:.1%} off, at most {MOST_ERROR:.0%} wanted")
    if second["networks"] < LEAST_NETWORKS or second["kendall"] < LEAST_TAU:
        found.append(f"τ {second['kendall']:.2f} over {second['networks']} networks, at least {LEAST_TAU} wanted")
    if second["teacher_measured_ms"] < LEAST_MS:
        found.append(
            f"the teacher takes {second['teacher_measured_ms']:.1f} ms, less than {LEAST_MS:.0f}; raise --batch"
        )
    for name, said in rows["pages"].items():
        if said["db"] is not None and said["db"] < LEAST_DB[precision]:
            found.append(f"the {name}'s picture has {said['db']:.1f} dB, at least {LEAST_DB[precision]:.0f} wanted")
    return found


if __name__ == "__main__":
    main()
