"""Running the benchmarks at their smallest: in this process, which spares the imports."""

import json
import runpy
import sys

import pytest
import torch


@pytest.fixture
def benchmark(repository, monkeypatch, capsys):
    """`benchmark("forward.py", "--repeats", 2)`: the lines that the script prints, and the JSON object that ends them.

    Ends as a test of `--check` asks: a script that exits with another code than 0 raises `SystemExit`.
    """

    def run(script: str, *arguments) -> tuple[list[str], dict]:
        folder, threads = repository / "benchmarks", torch.get_num_threads()
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setattr(sys, "argv", [str(folder / script), "--json", "--threads", "1", *map(str, arguments)])
        capsys.readouterr()
        try:
            runpy.run_path(str(folder / script), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
        *table, last = capsys.readouterr().out.strip().splitlines()
        return table, json.loads(last)

    return run
