"""Running the benchmarks at their smallest: in this process, which spares the imports."""

import contextlib
import io
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def benchmark(repository, monkeypatch):
    """`benchmark("forward.py", "--repeats", 2)`: the lines that the script prints, and the JSON object that ends them.

    What the script starts of itself in processes of their own (networks too big to share one) runs here too, unless
    `children`, for those that measure their own memory.
    """
    folder = repository / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    start = subprocess.run

    def script(path: Path, arguments: list[str]) -> str:
        threads, printed = torch.get_num_threads(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(sys, "argv", [str(path), *arguments])
            try:
                runpy.run_path(str(path), run_name="__main__")
            finally:
                torch.set_num_threads(threads)
        return printed.getvalue()

    def run(command, **options):
        if command[0] != sys.executable or Path(command[1]).parent != folder:
            return start(command, **options)
        return subprocess.CompletedProcess(command, 0, script(Path(command[1]), command[2:]), "")

    def benchmark(name: str, *arguments, children: bool = False, threads: int | None = 1) -> tuple[list[str], dict]:
        if not children:
            monkeypatch.setattr(subprocess, "run", run)
        threaded = [] if threads is None else ["--threads", str(threads)]
        *table, last = script(folder / name, ["--json", *threaded, *map(str, arguments)]).strip().splitlines()
        return table, json.loads(last)

    return benchmark
