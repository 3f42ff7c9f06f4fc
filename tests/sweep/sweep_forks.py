"""Run many bad inputs fast: one process imports everything, every case runs in a fork of it, with limits, in a copy of
the fixtures.

A case is plain values (JSON): what is copied, how the copies are damaged, which command reads them, and what that
command may write. It ends as

- error: refused in words (exit code 2, or 1 with a line of text), without a traceback
- late: accepted by `--dry-run`, refused by the stage itself
- worked: exit code 0, and nothing that was printed or written holds NaN or infinity
- library: a Python call of diffusers or transformers that failed within them, without one of our frames
- traceback, hang, crash (a signal), memory (the limit was met), unsound (exit code 0 with NaN in the output), destroyed
  (a file of the input changed, or files were left where none was asked for)
"""

from __future__ import annotations

import contextlib
import fnmatch
import gc
import hashlib
import importlib
import json
import math
import os
import pkgutil
import random
import re
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ROOT / "training"
CLASSES = ("error", "late", "worked", "library", "traceback", "hang", "crash", "memory", "unsound", "destroyed")
BAD = CLASSES[4:]
MEMORY = 6 << 30  # bytes a case may have beyond what the imports hold


def warm_up(quick: bool = False) -> None:
    """Import what the commands import (`quick`: report and dry runs alone); nothing here may start a thread."""
    import torch

    torch.set_num_threads(1)
    import diffusers
    import transformers
    from diffusers import DiffusionPipeline  # noqa: F401

    import edgedit_hf

    names = [
        "edgedit_hf.run.launch",
        "edgedit_hf.estimate",
        "edgedit_hf.report.edgedit",
        "edgedit_hf.commands.cli",
        "edgedit_hf.elastic.cost",
        "matplotlib.pyplot",
    ]
    if not quick:
        names += [
            module.name
            for module in pkgutil.walk_packages(edgedit_hf.__path__, "edgedit_hf.")
            if ".training" not in module.name
        ]
        names += (
            "accelerate botorch onnxruntime onnx onnxscript optimum.commands.optimum_cli sklearn.svm "
            "torch.export torch.onnx datasets"
        ).split()
        names += (
            "bitsandbytes peft executorch.runtime executorch.exir transformers.models.clip transformers.models.t5"
        ).split()
    for name in names:
        if not name.endswith(".sample_min") and ".evaluate_" not in name:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    gc.collect()
    gc.freeze()


# -------------------------------------------------------------------- damage


def damage(folder: Path, edit: dict) -> None:
    """Apply one edit: `json` (a path of keys) with `set` or `delete`; `bytes`, a way to damage a whole file; `write`,
    another text; `link`, a symbolic link.
    """
    path = folder / edit["file"]
    if "link" in edit:
        path.symlink_to(edit["link"])
    elif "write" in edit:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(edit["write"], encoding="utf-8")
    elif "json" in edit:
        lines = path.suffix == ".jsonl"
        text = path.read_text(encoding="utf-8")
        content = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
        *way, last = edit["json"]
        target = content
        for key in way:
            target = target[key]
        if "delete" in edit:
            del target[last]
        else:
            target[last] = edit["set"]
        path.write_text(
            "".join(json.dumps(line) + "\n" for line in content) if lines else json.dumps(content), encoding="utf-8"
        )
    else:
        data = path.read_bytes()
        path.unlink()
        kind, rng = edit["bytes"], random.Random(edit.get("seed", 0))
        if kind == "directory":
            path.mkdir()
        elif kind != "gone":
            path.write_bytes(damaged(data, kind, rng, edit.get("at", 0.5)))


def damaged(data: bytes, kind: str, rng: random.Random, at: float) -> bytes:
    if kind == "truncate":
        return data[: int(len(data) * at)]
    if kind == "empty":
        return b""
    if kind == "garbage":
        return rng.randbytes(max(64, min(len(data), 4096)))
    if kind == "text":
        return b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"
    if kind == "deep":
        return b"[" * 100_000
    if kind == "list":
        return b"[]"
    if kind == "null":
        return b"null"
    if kind == "not-utf8":
        return data[: len(data) // 2] + b"\xff\xfe\x00" + data[len(data) // 2 :]
    if kind == "flip":  # a few bytes of the first few kilobytes, where headers are, or anywhere
        changed = bytearray(data)
        reach = len(data) if rng.random() < 0.5 else min(len(data), 2048)
        for _ in range(rng.choice((1, 2, 8, 64))):
            if reach:
                changed[rng.randrange(reach)] = rng.randrange(256)
        return bytes(changed)
    if kind == "insert":
        place = rng.randrange(len(data) + 1)
        return data[:place] + rng.randbytes(rng.choice((1, 8, 100))) + data[place:]
    if kind == "zero":
        place = rng.randrange(len(data) + 1)
        return data[:place] + bytes(len(data[place : place + 256])) + data[place + 256 :]
    if kind == "huge-digits":  # one number of the text becomes enormous
        numbers = list(re.finditer(rb"(?<![\w.\"])\d+", data))
        if not numbers:
            return data[:-1]
        found = rng.choice(numbers)
        return (
            data[: found.start()]
            + rng.choice((b"1000000000000", b"-1", b"NaN", b"1e400", b"18446744073709551616"))
            + data[found.end() :]
        )
    raise ValueError(kind)


# -------------------------------------------------------------------- entries


def enter(entry: str, argv: list[str]) -> Any:
    """Run a command of the product in this process, as its own process would."""
    sys.argv = [entry, *argv]
    if entry == "edgedit":
        from edgedit_hf.commands import cli

        return cli.main(argv)
    if entry == "optimum":
        from optimum.commands.optimum_cli import main

        sys.argv = ["optimum-cli", *argv]
        return main()
    if entry == "sample":
        return sample(*argv)
    path = Path(entry) if entry.endswith(".py") else TRAINING / f"{entry}.py"
    sys.argv = [str(path), *argv]
    runpy.run_path(str(path.resolve()), run_name="__main__")


def sample(folder: str, *subnet: str) -> None:
    """What a Python user does with a folder of ours."""
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline

    import edgedit_hf  # noqa: F401

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    call = {"prompt": "a thick seven"} if "Elastic" in type(pipeline).__name__ else {}
    if not call and getattr(pipeline.transformer.config, "num_classes", 0):
        call["class_labels"] = [3]
    image = pipeline(**call, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    print("mean", float(np.asarray(image, dtype=np.float64).mean()))


def run_entry(entry: str, argv: list[str]) -> int:
    """The exit code that a process of its own would have; whatever is raised is told on stderr."""
    try:
        code = enter(entry, argv)
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        ours = any("/edgedit_hf/" in name for name in frames)
        if entry == "sample" and isinstance(error, (ValueError, OSError)) and not isinstance(error, UnicodeError):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 2
        traceback.print_exc()
        if entry == "sample" and not ours:
            return 3
        return 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        return 1
    return code or 0


def run_limited(steps: list, folder: Path, seconds: float) -> tuple[int, str, str, str, int]:
    """Fork, run the commands one after the other until one does not end with 0. Returns (number of the last step, how
    it ended, out, err, kB).
    """
    out, err, index = folder / ".stdout", folder / ".stderr", folder / ".step"
    index.write_text("0")
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setsid()
            for number, target in ((0, os.devnull), (1, out), (2, err)):
                opened = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
                os.dup2(opened, number)
            sys.stdin, sys.stdout, sys.stderr = (
                open(0, closefd=False),
                open(1, "w", closefd=False),
                open(2, "w", closefd=False),
            )
            size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.chdir(folder)
            for number, (entry, argv) in enumerate(steps):
                index.write_text(str(number))
                code = run_entry(entry, argv)
                sys.stdout.flush()
                sys.stderr.flush()
                if code:
                    break
        finally:
            os._exit(code if isinstance(code, int) and 0 <= code < 256 else 255)
    deadline, ended = time.monotonic() + 4 * seconds, ""
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            break
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            ended = "hang"
            _, status, usage = os.wait4(pid, 0)
            break
        time.sleep(0.004)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # workers that it left
    if not ended:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        ended = "hang" if number == signal.SIGXCPU else f"signal {number}" if number else str(os.WEXITSTATUS(status))
    texts = [path.read_bytes().decode("utf-8", "replace") if path.exists() else "" for path in (out, err)]
    return int(index.read_text() or 0), ended, *texts, usage.ru_maxrss


# -------------------------------------------------------------------- judgement


def hashes(folder: Path) -> dict[str, str]:
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if path.is_file() and not (root == str(folder) and name.startswith(".s")):
                found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


NOT_FINITE = re.compile(r"(?<![\w.-])[+-]?(nan|inf|infinity)(?![\w-])", re.IGNORECASE)


def not_finite_json(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    return (
        any(map(not_finite_json, value.values() if isinstance(value, dict) else value))
        if isinstance(value, (dict, list))
        else False
    )


def unsound(folder: Path, names: list[str], printed: str) -> str:
    """What is not finite in what was printed or newly written; empty if nothing is."""
    if found := NOT_FINITE.search(printed):
        return f"printed: {printed[max(0, found.start() - 60) : found.end() + 20]!r}"
    for name in names:
        path = folder / name
        try:
            if path.suffix == ".json" and not_finite_json(json.loads(path.read_text(encoding="utf-8"))):
                return f"{name} holds NaN or infinity"
            if path.suffix == ".html":
                text = re.sub(r"data:[^\"')]*", "", path.read_text(encoding="utf-8"))
                if found := re.search(r">[^<]*(?<![\w.-])(nan|inf)(?![\w-])[^<]*<", text, re.IGNORECASE):
                    return f"{name}: {found[0][:100]!r}"
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                for key, tensor in load_file(path).items():
                    if tensor.is_floating_point() and not tensor.float().isfinite().all():
                        return f"{name}: {key} is not finite"
        except ValueError as error:
            return f"{name}: {error}"
    return ""


def impossible_figures(printed: str) -> str:
    """What `edgedit info --json` counted that nothing can have."""
    start = printed.find("\n{")
    facts = json.loads(printed[start:]) if start >= 0 else {}
    for key in ("parameters", "macs", "flops", "layers", "tokens"):
        values = facts.get(key, 1)
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, int) or value < 0:
                return f"{key} is {value}"
    return ""


def judge(
    case: dict,
    folder: Path,
    before: dict[str, str],
    last: int,
    ended: str,
    out: str,
    err: str,
    kilobytes: int,
    base: int,
) -> tuple[str, str]:
    """(class, a line of explanation)."""
    after = hashes(folder)
    changed = [name for name in before if before[name] != after.get(name)]
    lost = [name for name in changed if not any(fnmatch.fnmatch(name, pattern) for pattern in case["writes"])]
    lines = [line for line in err.strip().splitlines() if line.strip()]
    line = lines[-1][-400:] if lines else ""
    if lost:
        return "destroyed", f"{lost[:4]} changed; exit {ended}: {line}"
    added = [
        name
        for name in after
        if name not in before and not any(fnmatch.fnmatch(name, pattern) for pattern in case["writes"])
    ]
    if added and ended != "hang" and not ended.startswith("signal"):
        return "destroyed", f"{added[:4]} written where nothing was asked for; exit {ended}: {line}"
    if ended == "hang":
        return "hang", f"step {last}: {(out + err)[-200:]!r}"
    grown = (kilobytes - base) / 1e6
    if re.search(r"MemoryError|allocate memory|bad_alloc|bad allocation|Cannot allocate", err):
        return "memory", f"exit {ended}: {line}"
    if grown > 4:
        return "memory", f"exit {ended} after {grown:.1f} GB: {line}"
    if ended.startswith("signal") or ended in ("134", "139", "255"):
        return "crash", f"{ended}: {line}"
    if ended == "0":
        new = [name for name in after if before.get(name) != after[name]]
        words = {
            value
            for word in case["steps"][-1][1]
            for value in (word, word.rpartition("=")[2])
            if value in ("nan", "inf")
        }
        echoed = any(
            f"{name}=" in word
            for word in case["steps"][-1][1]
            for name in ("--output", "--teacher", "--data", "--model")
        )
        printed = (
            re.sub("|".join(words), "", out) if words and (echoed or words & set(case["steps"][-1][1])) else out
        )  # a path of that name
        problem = unsound(folder, new, printed) or ("--json" in case["steps"][-1][1] and impossible_figures(out))
        return (
            ("unsound", problem) if problem else ("worked", out.strip().splitlines()[-1][-120:] if out.strip() else "")
        )
    if ended == "3" and case["steps"][last][0] == "sample":
        return "library", line
    if "Traceback (most recent call last)" in err or ended == "70":
        return "traceback", line if ended != "70" else line + " | " + " ".join(err.split())[-300:]
    if ended == "1" and case["steps"][last][0].endswith("sample_min.py") and "FAIL" in out:
        return "error", "the check failed, as it should"
    if ended == "2" or (ended == "1" and line):
        return ("late" if last > 0 else "error"), line
    return "traceback", f"exit {ended}: {line}"


def run_case(case: dict, fixtures: Path, scratch: Path, base: int) -> dict:
    """Copy, damage, run, judge, clean up."""
    folder = scratch / case["id"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    try:
        for name in case["copies"]:
            source = fixtures / name
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, folder / name, dirs_exist_ok=True) if source.is_dir() else shutil.copy(
                source, folder / name
            )
        for pattern in case["remove"]:
            for path in list(folder.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for edit in case["edits"]:
            damage(folder, edit)
        before = hashes(folder)
        result = run_limited(case["steps"], folder, case["seconds"])
        kind, text = judge(case, folder, before, *result, base)
        error = result[3][-3000:] if kind in BAD else ""
    except Exception:
        kind, text, error = "harness", traceback.format_exc(), ""
    finally:
        if not os.environ.get("SWEEP_KEEP"):
            shutil.rmtree(folder, ignore_errors=True)
    return {**case, "class": kind, "text": text, "stderr": error, "took": round(time.monotonic() - started, 2)}


def run_cases(
    cases: list[dict], fixtures: Path, scratch: Path, results: Path, jobs: int = 1, show: bool = True
) -> list[dict]:
    """Run all, `jobs` at a time; results go to a file of JSON lines as they come, and are returned in the order of the
    cases.
    """
    base = int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    folder = results.parent / f".{results.name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    waiting, running, done = list(reversed(cases)), {}, {}
    started = time.monotonic()
    with open(results, "a", encoding="utf-8") as stream:
        while waiting or running:
            while waiting and len(running) < jobs:
                case = waiting.pop()
                pid = os.fork()
                if pid == 0:
                    try:
                        (folder / case["id"]).write_text(json.dumps(run_case(case, fixtures, scratch, base)))
                    finally:
                        os._exit(0)
                running[pid] = case
            pid, _ = os.wait()
            case = running.pop(pid)
            path = folder / case["id"]
            found = (
                json.loads(path.read_text())
                if path.exists()
                else {**case, "class": "harness", "text": "no result", "stderr": "", "took": 0}
            )
            done[case["id"]] = found
            stream.write(json.dumps(found) + "\n")
            stream.flush()
            if show and (found["class"] in (*BAD, "harness") or len(done) % 100 == 0):
                print(
                    f"[{len(done)}/{len(cases)} {time.monotonic() - started:.0f} s] {found['class']:9} {found['name']} "
                    f"({found['id']}): {found['text'][:200]}",
                    flush=True,
                )
    shutil.rmtree(folder, ignore_errors=True)
    return [done[case["id"]] for case in cases]
