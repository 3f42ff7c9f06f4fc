"""What the libraries say that nobody can act on, dropped by name: each message by a filter on the one logger that says
it. No torch.

Of the tested versions (constraints.txt) no others fit together: executorch 1.5 wants torchao 0.18 and nothing else, and
diffusers imports torchao and bitsandbytes wherever they are installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator

MESSAGES = {
    # torchao's wheel for Linux holds CUDA kernels; a torch without CUDA cannot load them, and has no use for them.
    "torchao": r"Failed to load \S*torchao\S*_C\S*\.so: Could not load this library",
    # torchao registers two enumerations as constants, which torch 2.13 no longer needs.
    "torch.utils._pytree": r"<enum '(KernelPreference|ScaleCalculationMode)'> is an Enum subclass and is now natively",
    # bitsandbytes on the CPU would take a faster kernel from the Hub; diffusers runs bitsandbytes on GPUs alone.
    "bitsandbytes.backends.cpu.ops": r"Failed to load CPU gemm_4bit_forward .*No module named 'kernels'",
    # diffusers 0.42 looks for tensor classes that torchao 0.18 no longer has; they are of old pickled checkpoints.
    "diffusers.quantizers.torchao.torchao_quantizer": r"Unable to import `torchao` Tensor objects\.",
    # A cast, though no module asks to be kept in float32: diffusers takes an empty list for one with names.
    "diffusers.models.modeling_utils": r"There are modules in \w+ that should be kept in float32: \[\]\.",
    # AutoencoderTiny saves a value that it does not take back.
    "diffusers.configuration_utils": r"The config attributes \{'block_out_channels': [^}:]*\} were passed to "
    "AutoencoderTiny,",
}
OF_CUDA = "torchao"  # the logger whose message is worth reading where torch is built for CUDA
POOL = re.compile(rb"\[(cpuinfo_utils|threadpool)\.cpp:\d+\] ")  # how ExecuTorch's thread pool counts cores
HIGHS = re.compile(rb"HighsMipSolverData::")  # a trace that HiGHS 1.12 left in, on stdout


class _Drop(logging.Filter):
    """Drops one logger's one message; all others pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        torch = sys.modules.get("torch")
        if record.name == OF_CUDA and torch is not None and torch.version.cuda is not None:
            return True
        return re.match(MESSAGES[record.name], record.getMessage()) is None


def install() -> None:
    """Put the filters on; again changes nothing."""
    for name in MESSAGES:
        logger = logging.getLogger(name)
        if not any(isinstance(present, _Drop) for present in logger.filters):
            logger.addFilter(_Drop())


@contextlib.contextmanager
def without_native_lines(pattern: re.Pattern[bytes], stream: int = 2) -> Iterator[None]:
    """Within it, what C++ code writes to stderr (1: to stdout) is held back; then the lines that `pattern` matches are
    dropped and all others printed.
    """
    try:
        kept = os.dup(stream)
    except OSError:  # there is none
        yield
        return
    _flush_native(stream)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), stream)
        try:
            yield
        finally:
            _flush_native(stream)
            os.dup2(kept, stream)
            os.close(kept)
            said.seek(0)
            for line in said:
                if not pattern.match(line):
                    with contextlib.suppress(OSError):
                        os.write(stream, line)


def _flush_native(stream: int) -> None:
    """Write what Python and C hold back of stdout; stderr is not held back."""
    if stream == 1:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
        with contextlib.suppress(OSError, TypeError, AttributeError):  # as on Windows
            ctypes.CDLL(None).fflush(None)
