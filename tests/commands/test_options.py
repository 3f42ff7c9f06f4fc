"""Options out of range end in one line before any model is loaded."""

from argparse import ArgumentParser

import pytest

from edgedit_hf.commands.cli import main
from edgedit_hf.commands.export import EdgeDiTExportCommand

EXPORT = [
    *(("--tolerance", value) for value in ("nan", "inf", "0", "-1")),
    *(("--min-psnr", value) for value in ("nan", "inf", "-1", "1e9")),
    *(("--seed", value) for value in ("-1", str(2**64))),
    *(("--images", value) for value in ("0", "-1", str(10**9))),
    *(("--threads", value) for value in ("0", str(10**9))),
    *(("--opset", value) for value in ("5", "0", "-3")),
    *(("--batch", value) for value in ("0", "abc", "-1", "nan", "1e3", str(2**64))),
    *(("--resolution", value) for value in ("0x0", "999999x999999", "8x", "nanxnan", "-8x8")),
    *(("--format", value) for value in ("", "x" * 5000)),
    ("--dtype", "fp8"),
    *(("--prompts", value) for value in ("", "/no/such", "x" * 5000, "/dev/null")),
]


@pytest.mark.parametrize("option, value", EXPORT)
def test_of_the_export(option, value, tmp_path, capsys):
    parser = ArgumentParser()
    EdgeDiTExportCommand(parser.add_subparsers())
    args = parser.parse_args(
        ["edgedit", "--model", str(tmp_path / "absent"), "--output", str(tmp_path / "out"), f"{option}={value}"]
    )
    with pytest.raises(SystemExit) as stop:
        args.func(args).run()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and option in err, err


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            ["convert", "IN", "OUT", *words.split()]
            for words in ("--image-size 0", "--image-size -8", f"--image-size {2**64}", "--num-classes -1")
        ),
        *(
            ["convert", "IN", "OUT", *words.split()]
            for words in ("--heads 0", f"--heads {2**64}", "--decoder-layers -1")
        ),
        *(
            ["select", "RUN", *words.split()]
            for words in ("--max-latency-ms nan", "--max-latency-ms inf", "--max-latency-ms -1", "--max-latency-ms 0")
        ),
        *(
            ["select", "RUN", *words.split()]
            for words in ("--max-parameters-ratio nan", "--max-parameters-ratio 0", "--max-parameters-ratio=-1")
        ),
        *(
            ["select", "RUN", *words.split()]
            for words in ("--max-bytes-mb nan", "--max-memory-mb 0", "--max-flops-ratio 0", "--k 0", "--front 100000")
        ),
        *(
            ["phone", "pack", "RUN", "OUT", *words.split()]
            for words in ("--batch 0", "--precision int4", "--precision x")
        ),
        *(["phone", "import", "CSV", "RUN", f"--device={name}"] for name in ("", "a\nb", "x" * 301, "a phone")),
        *(["info", name] for name in ("", "a/b/c/d", "x" * 5000, "/dev/null", "a\0b")),
        *(["report", name] for name in ("", "x" * 5000, "/dev/null")),
        *(["train", name] for name in ("", "no-such-stage", "/no/such.py", "x" * 5000)),
        ["init", "--data", "x" * 5000, "--output", "a\0b"],
    ],
)
def test_of_the_other_commands(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = main(arguments)
    err = "".join(
        line
        for line in capsys.readouterr().err.splitlines(keepends=True)
        if line.startswith(("edgedit: ", "Traceback"))
    )
    if arguments[0] == "init":
        assert code in (0, 2) and err.count("\n") <= 1
    else:
        assert code == 2 and err.count("\n") == 1 and "fault of" not in err, err
    assert list(tmp_path.iterdir()) == []


def test_they_load_no_torch(run_python):
    run_python(
        "import sys\nfrom edgedit_hf.commands.cli import main\n"
        "assert main(['select', 'RUN', '--max-latency-ms', 'nan']) == 2\n"
        "assert main(['convert', 'IN', 'OUT', '--heads', '0']) == 2\n"
        "assert 'torch' not in sys.modules"
    )
