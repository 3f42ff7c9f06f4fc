"""What a child process said on stderr."""

import re

PROGRESS = re.compile(
    r"\d+%\|.*\| *[\d.]+\w?/[\d.]+\w? \[.*\] *(\x1b\[A)?$"
)  # a bar of tqdm's, whatever stands before it


def beside_progress(stderr: str) -> list[str]:
    """Its lines, but for empty ones and those of progress bars."""
    return [line for line in re.split(r"[\r\n]+", stderr) if line.strip() and not PROGRESS.search(line)]
