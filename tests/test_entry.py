"""How command lines end: exit codes, at most one line on stderr, signals at any moment, a stdout that cannot be
written.
"""

import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import sys
from edgedit_hf.entry import guard
from edgedit_hf.errors import EdgeDiTError

def work():
    {work}

sys.exit(guard(work, "program"))
"""

STARTING = """
from edgedit_hf.entry import starting
starting()
print("started", flush=True)
{work}
"""


def ended(code: str, *, environment: dict | None = None, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONUNBUFFERED": "", **(environment or {})}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output="stdout" not in options,
        text=True,
        timeout=120,
        env=environment,
        **options,
    )


@pytest.mark.parametrize(
    "work, code, said",
    [
        ("print('done')", 0, None),
        ("raise EdgeDiTError('a is 1,\\n  but b is 2')", 2, "program: a is 1, but b is 2"),
        ("open('/proc/no/such/file')", 2, "program: /proc/no/such/file: No such file or directory"),
        ("open('/' + 'x' * 300, 'w')", 2, "File name too long"),
        ("raise PermissionError(13, '', '/x')", 2, "program: /x: Permission denied"),
        ("open('a\\0b')", 2, "embedded null"),
        ("open('/dev/full', 'w').write('x' * 100000)", 2, "no space left on the disk"),
        ("raise MemoryError", 2, "out of memory"),
        ('raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory")', 2, "out of memory"),
        ("1 / 0", 70, "fault of edgedit_hf, not of your input: ZeroDivisionError: division by zero"),
        ("raise RecursionError", 70, "RecursionError"),
        ("sys.exit(5)", 5, None),
        ("sys.exit('words')", 2, "program: words"),
        ("import argparse; argparse.ArgumentParser('program').parse_args(['--no'])", 2, "unrecognized arguments: --no"),
        ("raise KeyboardInterrupt", 130, "program: interrupted."),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143, "program: interrupted."),
        # Libraries turn the exception of a signal into one of their own, which is not what happened.
        (
            "import signal\n    try:\n        signal.raise_signal(2)\n    except KeyboardInterrupt:\n        raise "
            "ImportError('broken')",
            130,
            "interrupted",
        ),
    ],
)
def test_one_line_and_the_code(work, code, said):
    done = ended(PROGRAM.format(work=work))
    assert done.returncode == code and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == (0 if said is None else 2 if "argparse" in work else 1), done.stderr
    assert said is None or said in done.stderr


@pytest.mark.parametrize("work", ["1 / 0", "raise EdgeDiTError('wrong')"])
def test_the_traceback_is_shown_to_who_asks(work):
    done = ended(PROGRAM.format(work=work), environment={"EDGEDIT_TRACEBACK": "1"})
    assert done.stderr.startswith("Traceback") and done.stderr.splitlines()[-1].startswith("program: ")


@pytest.mark.parametrize(
    "work", ["print('x')", "print('x' * 1000000)", "import argparse; argparse.ArgumentParser().parse_args(['--help'])"]
)
def test_stdout_that_takes_nothing(work):
    with open("/dev/full", "w") as full:
        done = ended(PROGRAM.format(work=work), stdout=full, stderr=subprocess.PIPE)
    assert (
        done.returncode == 2
        and done.stderr == "program: no space left on the disk; free some and run the same command again.\n"
    )


@pytest.mark.parametrize("arguments, code", [("", 0), (", pipe_closed=141", 141)])
def test_a_reader_that_has_gone(arguments, code):
    read, write = os.pipe()
    os.close(read)
    program = PROGRAM.format(work="print('x' * 1000000)").replace('"program")', f'"program"{arguments})')
    done = ended(program, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == code and done.stderr == ""


def test_closed_streams_and_names_that_are_no_text():
    assert (
        ended(
            PROGRAM.format(work="raise EdgeDiTError('x')").replace(
                "import sys", "import os, sys; os.close(2); os.close(1)", 1
            )
        ).returncode
        == 2
    )
    done = ended(PROGRAM.format(work="print('a\\udcffb')"), environment={"PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0 and done.stdout == "a\\udcffb\n"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_it_starts_or_works_though_it_was_ignored(number, code):
    """A job in a script's background is started with SIGINT ignored."""
    for program in (
        STARTING.format(work="import time; time.sleep(60)"),
        PROGRAM.format(work="print('started', flush=True); import time; time.sleep(60)"),
    ):
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
        assert process.returncode == code and len(err.splitlines()) == 1 and "nterrupted" in err


def test_an_error_while_it_starts():
    done = ended(STARTING.format(work="import no_such_module"))
    assert done.returncode == 70 and done.stderr.count("\n") == 1 and "No module named 'no_such_module'" in done.stderr


@pytest.mark.slow
@pytest.mark.kills
def test_signals_at_any_moment_of_the_imports():
    program = STARTING.format(
        work="import torch, diffusers\nfrom edgedit_hf.run.launch import recipe_main\nprint('imported')"
    )
    for number in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        time.sleep(0.5 * number)
        process.send_signal(signal.SIGINT if number % 2 else signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        if "imported" not in out:
            assert (
                process.returncode == (130 if number % 2 else 143)
                and err.splitlines()[-1] == "interrupted while it started; nothing was begun."
            )
