"""Memory and load time of artefacts, each measured in a process of its own: `python -m edgedit_hf.runtimes.footprint
JOB.json`.

JOB.json holds `{"file", "format", "inputs", "threads"}`; inputs are a safetensors file in the order of the artefact's
inputs (`names`). The last line that the process prints is one JSON object. Resident memory is what Linux says of the
process (`/proc`); elsewhere it is not measured.
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


def footprint(file: str | os.PathLike, format: str, inputs: Mapping, threads: int, timeout: float = 600) -> dict:
    """What opening and running an artefact takes.

    Args:
        file: the artefact. format: `"onnx"` or `"executorch"`.
        inputs: tensors by name, in the order of the artefact's inputs.
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
                    "format": format,
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
    if job["format"] == "onnx":
        import onnxruntime
        from safetensors.numpy import load_file

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = job["threads"], 3
        tensors = load_file(job["inputs"])

        def load():
            session = onnxruntime.InferenceSession(job["file"], options, providers=["CPUExecutionProvider"])
            names = {value.name for value in session.get_inputs()}
            values = {name: value for name, value in tensors.items() if name in names}
            return lambda: session.run(None, values)

    else:
        from safetensors.torch import load_file

        from .sessions import ExecutorchSession, require_executorch

        require_executorch()
        from executorch.runtime import Runtime

        Runtime.get()
        tensors = load_file(job["inputs"])
        values = [tensors[name] for name in job["names"]]

        def load():
            session = ExecutorchSession(job["file"], job["threads"])
            return lambda: session.run_all(values)

    before = resident_bytes()
    start = time.perf_counter()
    run = load()
    run()
    seconds = time.perf_counter() - start
    for _ in range(2):
        run()
    held, peak = resident_bytes(), resident_bytes("VmHWM")
    known = before is not None and held is not None and peak is not None
    return {
        "load_seconds": seconds,
        "resident_bytes": held - before if known else None,
        "peak_bytes": peak - before if known else None,
    }


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
