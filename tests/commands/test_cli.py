"""The `edgedit` command line: what it prints, its exit codes, and that its help needs no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from edgedit_hf.commands.cli import main

HELP = """
import resource, sys
before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
from edgedit_hf.commands.cli import main
for command in ("", "info", "recipes copy", "init", "select", "convert", "train", "phone pack", "card"):
    arguments = [*command.split(), "--help"]
    try:
        main(arguments)
    except SystemExit as done:
        assert done.code == 0
spent = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
heavy = {"torch", "numpy", "diffusers", "transformers"} & set(sys.modules)
assert not heavy, heavy
assert spent < 0.5, f"help took {spent:.2f} s of CPU"
"""


def test_help_is_quick_and_imports_no_torch(run_python):
    printed = run_python(HELP)
    for command in ("info", "convert", "init", "recipes", "train", "select", "phone", "report", "card"):
        assert command in printed


def test_the_console_script_is_installed():
    script = Path(sys.executable).with_name("edgedit")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("edgedit_hf ")


def _no_model(folder: Path) -> list[str]:
    return ["info", str(folder)]


def _foreign_model(folder: Path) -> list[str]:
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    return ["info", str(folder)]


def _damaged_config(folder: Path) -> list[str]:
    (folder / "config.json").write_text('{"_class_name": "EdgeDiT')
    return ["info", str(folder)]


def _incomplete_config(folder: Path) -> list[str]:
    (folder / "config.json").write_text('{"_class_name": "EdgeDiTTransformer2DModel", "num_layers": 2}')
    return ["info", str(folder)]


def _incomplete_elastic_config(folder: Path) -> list[str]:
    (folder / "config.json").write_text('{"_class_name": "ElasticDiTTransformer2DModel", "num_layers": [1, 1, 1]}')
    return ["info", str(folder)]


def _copy_onto_a_file(folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return ["recipes", "copy", str(folder / "file")]


@pytest.mark.parametrize(
    "arrange, said",
    [
        (lambda folder: ["info", "DiT-XXL/2"], ["DiT-XXL/2", "DiT-XL/2"]),
        (lambda folder: ["info", "nobody/nothing"], ["nobody/nothing", "EdgeDiT-1"]),
        (_no_model, ["config.json"]),
        (_foreign_model, ["UNet2DModel", "EdgeDiTTransformer2DModel"]),
        (_damaged_config, ["config.json", "not JSON"]),
        (_incomplete_config, ["not an EdgeDiT's"]),
        (_incomplete_elastic_config, ["not an elastic net's", "subnets"]),
        (_copy_onto_a_file, ["file", "folder"]),
        (lambda folder: ["select", str(folder), "--max-latency-ms", "80"], [str]),
        (lambda folder: ["report", str(folder)], [str]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arrange, said, tmp_path, capsys):
    assert main(arrange(tmp_path)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()[-1:]
    assert line.startswith("edgedit: ")
    for words in said:
        assert (str(tmp_path) if words is str else words) in line


@pytest.mark.parametrize("number, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_interrupted(monkeypatch, capsys, number, code):
    import signal

    from edgedit_hf.commands import init

    monkeypatch.setattr(init, "run", lambda args: signal.raise_signal(getattr(signal, number)))
    for before in (signal.default_int_handler, signal.SIG_IGN):  # ignored: a job in a script's background
        previous = signal.signal(signal.SIGINT, before)
        try:
            assert main(["init"]) == code and signal.getsignal(signal.SIGINT) is before
        finally:
            signal.signal(signal.SIGINT, previous)
        assert capsys.readouterr().err == "edgedit: interrupted.\n"
