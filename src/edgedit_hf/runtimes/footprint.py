"""Memory and load time of artefacts, each measured in a process of its own: `python -m edgedit_hf.runtimes.footprint
JOB.json`.

JOB.json holds `{"file", "inputs", "names", "threads"}`; inputs are a safetensors file, names their order (which counts
for a file that does not name its inputs). The last line that the process prints is one JSON object. Resident memory is
what Linux says of the process (`/proc`); elsewhere it is not measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from ..errors import EdgeDiTError
from .sessions import open_session, session_type


def resident_bytes(field: str = "VmRSS") -> int | None:
    """Resident memory of this process (`VmHWM`: its peak), in bytes; `None` where the system does not say."""
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            for line in file:
                if line.startswith(f"{field}:"):
                    return 1024 * int(line.split()[1])
    except OSError:
        pass  # not Linux
    return None


def footprint(file: str | os.PathLike, inputs: Mapping, threads: int, timeout: float = 600) -> dict:
    """What opening and running an artefact takes.

    Args:
        file: the artefact.
        inputs: tensors by name.
        threads: of the runtime.

    Returns:
        load_seconds (until the first run is done), resident_bytes (held after some runs) and peak_bytes, both above
        what the process had with the runtime imported; `None` where memory cannot be measured.

    Raises:
        EdgeDiTError: the process failed.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        tensors, job = Path(folder, "inputs.safetensors"), Path(folder, "job.json")
        save_file({name: value.contiguous() for name, value in inputs.items()}, str(tensors))
        job.write_text(
            json.dumps(
                {
                    "file": os.fspath(file),
                    "inputs": str(tensors),
                    "names": list(inputs),
                    "threads": threads,
                }
            )
        )
        command = [sys.executable, "-m", "edgedit_hf.runtimes.footprint", str(job)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise EdgeDiTError(f"{file} could not be run in a process of its own (exit code {done.returncode}: {said}).")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _measure(job: Mapping) -> dict:
    from safetensors.numpy import load_file

    session_type(job["file"]).load_runtime()
    tensors = load_file(job["inputs"])
    before = resident_bytes()
    start = time.perf_counter()
    session = open_session(job["file"], job["threads"])
    values = session.fit({name: tensors[name] for name in job["names"]})
    session.execute(values)
    seconds = time.perf_counter() - start
    for _ in range(2):
        session.execute(values)
    held, peak = resident_bytes(), resident_bytes("VmHWM")
    if before is None or held is None or peak is None:
        return {"load_seconds": seconds, "resident_bytes": None, "peak_bytes": None}
    return {"load_seconds": seconds, "resident_bytes": held - before, "peak_bytes": peak - before}


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
