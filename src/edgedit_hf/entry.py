"""How every command line of the package ends: one line on stderr and an exit code. No torch; nothing of ours but
`errors`.

| code | what happened |
| --- | --- |
| 0 | done |
| 2 | bad input: arguments, files, a full disk, too little memory |
| 70 | a fault of this package |
| 130, 143 | interrupted by Ctrl-C (SIGINT), by SIGTERM |

The environment variable [`TRACEBACK`] set to 1 shows the traceback of whatever ended a command.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from .errors import EdgeDiTError

BAD_INPUT, BUG, INTERRUPTED, TERMINATED, BROKEN_PIPE = 2, 70, 130, 143, 141
TRACEBACK = "EDGEDIT_TRACEBACK"
LAUNCHED = "EDGEDIT_LAUNCHED"
"""Set by `edgedit train` for the processes that it starts: of several, the launcher says what the first to fail has to
say.
"""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "unable to allocate")


class Terminated(KeyboardInterrupt):
    """SIGTERM, where Ctrl-C would be a `KeyboardInterrupt`."""


_received: list[
    int
] = []  # signals since the outermost `signals`: some libraries turn the exception of one into another


def _raise(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """Within it Ctrl-C and SIGTERM raise, though SIGINT may have been ignored at the start, as for a job in a script's
    background.
    """
    _received.clear()
    before = {}
    with contextlib.suppress(ValueError):  # not the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, usual if handler in (None, _leave) else handler)


# -------------------------------------------------------------------- while the imports run


def _leave(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        tell("interrupted while it started; nothing was begun.")
    os._exit(128 + number)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    code, line = explain(error)
    show_traceback(error)
    tell(f"error: {line}")
    flush()
    os._exit(code)


def starting() -> None:
    """Until [`started`], Ctrl-C and SIGTERM end the process at once, and an error that nobody catches ends it in one
    line.

    Importing torch and diffusers takes seconds, and the exception of a signal may be swallowed by any of a thousand
    modules.
    """
    with contextlib.suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _leave)
    sys.excepthook = _uncaught


def started() -> None:
    """End what [`starting`] began."""
    if sys.excepthook is _uncaught:
        sys.excepthook = sys.__excepthook__
    with contextlib.suppress(ValueError):
        for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) is _leave:
                signal.signal(number, usual)


# -------------------------------------------------------------------- what is said


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message, in one line, of what ended a command."""
    if _received:
        return 128 + _received[0], "interrupted."
    if isinstance(error, KeyboardInterrupt):
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED, "interrupted."
    text = " ".join(str(error).split())
    if isinstance(error, EdgeDiTError):
        return BAD_INPUT, text
    if isinstance(error, OSError):
        return BAD_INPUT, _explain_os_error(error, text)
    if isinstance(error, (ValueError, UnicodeError)) and ("embedded null" in text or "surrogates not allowed" in text):
        return BAD_INPUT, f"a file name holds a character that no file name may hold ({text}); give another name."
    if isinstance(error, MemoryError) or any(words in text.lower() for words in OUT_OF_MEMORY):
        return (
            BAD_INPUT,
            f"out of memory ({text[:200] or type(error).__name__}); ask for less at once (batch size, model, "
            "resolution), or free some.",
        )
    shown = f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
    return (
        BUG,
        f"this is a fault of edgedit_hf, not of your input: {shown}. Please report it; {TRACEBACK}=1 in the "
        "environment shows the traceback.",
    )


def _explain_os_error(error: OSError, text: str) -> str:
    reason = os.strerror(error.errno) if isinstance(error.errno, int) else text
    name = " ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    name = " ".join(name.split())
    name = f"{name[:200]}…" if len(name) > 201 else name
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk{f' of {name}' if name else ''}; free some and run the same command again."
    if error.errno == errno.ENOENT and not name:  # tempfile's: no folder for temporary files
        return f"{text}; free some space there, or set TMPDIR."
    remedy = (
        "choose a shorter name" if error.errno == errno.ENAMETOOLONG else "look at that path and at your rights there"
    )
    return f"{name}: {reason}; {remedy}." if name else f"{text}."


def show_traceback(error: BaseException) -> None:
    """Print the traceback if the user asked for tracebacks."""
    if os.environ.get(TRACEBACK, "") not in ("", "0"):
        with contextlib.suppress(OSError, ValueError):
            traceback.print_exception(error)


def tell(line: str) -> None:
    """One line on stderr, if there is still somebody there."""
    try:
        print(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)
    except (ValueError, AttributeError):  # closed, or there is none
        pass


def flush() -> OSError | None:
    """Flush stdout; if that fails, the rest of it goes nowhere."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        return error
    except (ValueError, AttributeError):  # closed, or there is none
        pass
    return None


def _discard(stream: Any) -> None:
    """Send what is left in a stream nowhere: Python would complain when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# -------------------------------------------------------------------- the wrapper


def guard(
    work: Callable[[], Any],
    program: str,
    *,
    interrupted: str | None = None,
    pipe_closed: int = 0,
    at_end: Callable[[], None] = lambda: None,
) -> int:
    """Do the work of a command line; whatever happens, end it in at most one line on stderr and return the exit code.

    Args:
        work: parses the arguments, too: `SystemExit` of argparse keeps its code.
        program: what the line begins with.
        interrupted: the line after Ctrl-C or SIGTERM, if it is another than that it was interrupted.
        pipe_closed: code for a stdout whose reader has gone (`… | head`): 0 where printing is the last thing that is
            done.
        at_end: called before the line is printed, such as to close progress bars.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        with contextlib.suppress(ValueError, OSError):
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    code, line, cause = 0, None, None
    with signals():
        started()
        try:
            try:
                work()
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else BAD_INPUT
                said = getattr(stop, "message", None)
                line = said if said is not None else f"{program}: {stop.code}" if isinstance(stop.code, str) else None
            if (failed := flush()) is not None:
                raise failed
        except BaseException as error:
            if isinstance(error, BrokenPipeError) and not _received:
                code = pipe_closed
            else:
                code, line = explain(error)
                line = interrupted if interrupted and code in (INTERRUPTED, TERMINATED) else f"{program}: {line}"
                cause = error
            flush()
        with contextlib.suppress(Exception):
            at_end()
        if cause is not None:
            show_traceback(cause)
        if line is not None:
            _say(" ".join(line.split()), code)
    return code


def _say(line: str, code: int) -> None:
    """Of several processes, all that stop at the same step say so once, and [`LAUNCHED`] ones leave an error to the
    launcher.
    """
    rank, file = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_ERROR_FILE")
    if code in (INTERRUPTED, TERMINATED):
        if rank == "0":
            tell(line)
    elif os.environ.get(LAUNCHED) and file:
        try:
            with open(file, "w", encoding="utf-8") as report:
                json.dump({"message": line, "timestamp": int(time.time())}, report)
        except OSError:
            tell(line)
    else:
        tell(line)
