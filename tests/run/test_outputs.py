"""No command that writes destroys what the user has: every command × every way an output can be somewhere else's."""

import json
import os
import sys
from pathlib import Path

import pytest

from edgedit_hf.commands.cli import main
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.run.outputs import check_output, foreign_to_pipeline


def contents(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder: bytes of files, targets of links, folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else "folder" if path.is_dir() else path.read_bytes()
    return found


def model(folder: Path, kind: str = "EdgeDiTPipeline") -> Path:
    """What looks like a pipeline folder that one of our commands wrote."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    (folder / "transformer" / "config.json").write_text("{}")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    return folder


def convert(here: Path):
    (here / "in").mkdir()
    (here / "in" / "DiT.pt").write_bytes(b"weights of DiT")
    source = here / "in" / "DiT.pt"
    return here / "in", lambda output, *flags: main(["convert", str(source), output, *flags]), ["--overwrite"]


def convert_a_folder(here: Path):
    model(here / "in", "DiTPipeline")
    return here / "in", lambda output, *flags: main(["convert", str(here / "in"), output, *flags]), ["--overwrite"]


def convert_vae(here: Path):
    model(here / "in")
    (here / "DiT.pt").write_bytes(b"weights")
    return (
        here / "in",
        lambda output, *flags: main(["convert", str(here / "DiT.pt"), output, "--vae", str(here / "in"), *flags]),
        ["--overwrite"],
    )


def export(here: Path):
    from argparse import ArgumentParser

    from edgedit_hf.commands.export import EdgeDiTExportCommand

    model(here / "in")

    def run(output, *flags):
        parser = ArgumentParser()
        EdgeDiTExportCommand(parser.add_subparsers())
        args = parser.parse_args(["edgedit", "--model", str(here / "in"), "--output", output, *flags])
        try:
            args.func(args).run()
        except SystemExit as stop:
            return stop.code
        return 0

    return here / "in", run, ["--overwrite"]


def select(here: Path):
    run = here / "in"
    model(run / "teacher")
    for name in ("bank", "latency", "search"):
        (run / name).mkdir()
        (run / name / "index.json").write_text("{}")
    entry = {"distance": 1.0, "latency_ms": 1.0, "code": [0], "parameters": 1, "flops": 1}
    teacher = {"path": None, "latency_ms": 2.0, "parameters": 1, "flops": 1}
    (run / "search" / "front.json").write_text(json.dumps({"front": [entry], "teacher": teacher}))
    return run / "teacher", lambda output, *flags: main(["select", str(run), "--output", output, *flags]), []


def copy(here: Path):
    source = Path(__file__).parents[2] / "training"
    return source, lambda output, *flags: main(["recipes", "copy", output, *flags]), ["--force"]


def recipe(here: Path):
    from edgedit_hf.run.launch import recipe_main

    (here / "in").mkdir()
    (here / "in" / "a.png").write_bytes(b"an image")
    (here / "run.yaml").write_text("")

    def run(output, *flags):
        given = [f"output_dir={json.dumps(output)}", f"data.source={here / 'in'}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                sys,
                "argv",
                [
                    "x",
                    "--config",
                    str(here / "run.yaml"),
                    *(part for value in given for part in ("--override", value)),
                    *flags,
                ],
            )
            try:
                recipe_main(lambda *_: pytest.fail("it ran"), "", dry_run=lambda config: None)
            except SystemExit as stop:
                return stop.code
        return 0

    return here / "in", run, ["--dry-run"]


COMMANDS = [convert, convert_a_folder, convert_vae, export, select, copy, recipe]


CASES = [
    "input",
    "inside",
    "holds",
    "link",
    "dots",
    "nothing",
    "here",
    "home",
    "root",
    "foreign",
    "file",
    "nul",
    "long",
]
BESIDE = (
    copy,
    recipe,
)  # these put files, and folders of stages, beside what is there: to them a folder of somebody else's is no fault


@pytest.mark.parametrize(
    "command, case",
    [(command, case) for command in COMMANDS for case in CASES if case != "foreign" or command not in BESIDE],
)
def test_nothing_of_the_users_is_lost(command, case, tmp_path, monkeypatch, capsys):
    here = tmp_path / "here"
    here.mkdir()
    source, run, flags = command(here)
    monkeypatch.chdir(here)
    (here / "link").symlink_to(source)
    (here / "mine").mkdir()
    (here / "mine" / "notes.txt").write_text("mine")
    output = {
        "input": str(source),
        "inside": str(source / "deeper" / "out"),
        "holds": str(source.parent),
        "link": "link",
        "dots": os.path.relpath(source / ".." / source.name),
        "nothing": "",
        "here": ".",
        "home": "~",
        "root": "/",
        "foreign": "mine",
        "file": "mine/notes.txt",
        "nul": "a\0b",
        "long": "x" * 5000,
    }[case]
    output = os.path.expanduser(output)
    before, given = contents(here), contents(source)
    for options in ([], flags):
        assert run(output, *options) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and "Traceback" not in lines[0] and "fault of" not in lines[0], lines
        assert contents(here) == before and contents(source) == given


def test_an_input_of_any_name(tmp_path):
    """The same file under another path is the same file."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "x.pt").write_bytes(b"x")
    (tmp_path / "y.pt").symlink_to(tmp_path / "a" / "x.pt")
    for output, source in (("b/out", "a"), ("a/../b/out", "a"), ("a/", "y.pt"), ("a", "b/x.pt"), ("out/../a/sub", "b")):
        with pytest.raises(EdgeDiTError, match="the input|is a link"):
            check_output(tmp_path / output, [tmp_path / source], overwrite=True)
    check_output(tmp_path / "out" / "new", [tmp_path / "a", "organisation/name", None, ""])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda folder: None, None),
        (lambda folder: (folder / "notes.txt").write_text(""), "notes.txt"),
        (lambda folder: (folder / ".git").mkdir(), ".git"),
        (lambda folder: (folder / "transformer" / "DiT.pt").write_text(""), "DiT.pt"),
        (lambda folder: (folder / "transformer" / "config.yaml").symlink_to("/etc/hostname"), "config.yaml"),
        (
            lambda folder: (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}'),
            "not a pipeline folder",
        ),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "not a pipeline folder"),
        (lambda folder: (folder / "model_index.json").unlink(), "not a pipeline folder"),
        (lambda folder: (folder / "stage.json").write_text("{}"), "the folder of a stage of a run .*stage.json"),
    ],
)
def test_only_what_we_wrote_is_replaced(tmp_path, change, said):
    folder = model(tmp_path / "out")
    change(folder)
    if said is None:
        assert foreign_to_pipeline(folder) is None
        check_output(folder, overwrite=True)
        with pytest.raises(EdgeDiTError, match="--overwrite"):
            check_output(folder)
    else:
        with pytest.raises(EdgeDiTError, match=said):
            check_output(folder, overwrite=True)


def test_recipes_are_not_copied_through_a_link(tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "digits.yaml").write_text("mine")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "recipes").symlink_to(tmp_path / "elsewhere")
    assert main(["recipes", "copy", str(tmp_path / "copy"), "--force"]) == 2
    assert "link" in capsys.readouterr().err and (tmp_path / "elsewhere" / "digits.yaml").read_text() == "mine"


def test_a_run_may_read_an_earlier_stage_of_its_own_folder(tmp_path):
    from edgedit_hf.run.config import load_config
    from edgedit_hf.run.launch import check_run_folder

    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "run" / "student-tuned").mkdir(parents=True)
    config = load_config(
        tmp_path / "recipe.yaml",
        [f"output_dir={tmp_path / 'run'}", f"quantize.path={tmp_path / 'run' / 'student-tuned'}"],
    )
    with pytest.raises(EdgeDiTError, match="holds the input"):
        check_run_folder(config)
    (tmp_path / "run" / "student-tuned" / "run.json").write_text("{}")
    check_run_folder(config)
    (tmp_path / "other").symlink_to(tmp_path)  # the same folder under another name
    config.quantize.path = str(tmp_path / "other" / "run" / "student-tuned")
    check_run_folder(config)


def test_a_place_that_cannot_be_written_is_found_at_once(tmp_path):
    for output, said in (
        ("/proc/self/out", "Cannot write"),
        (tmp_path / ("x" * 250), "Cannot write"),
        ("/dev/null/x", "Cannot write|file"),
    ):
        with pytest.raises(EdgeDiTError, match=said):
            check_output(output)
    assert list(tmp_path.iterdir()) == []
