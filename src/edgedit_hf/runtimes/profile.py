"""Where the time of an artefact's run goes, by the profiler of its runtime."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .sessions import ExecutorchSession, OnnxSession

SHARE_METHOD = (
    "Median over the runs of 1 - (time in delegate calls) / (time of Method::execute), both from ExecuTorch's event "
    "tracer (ETDump) in the Python runtime on the host's CPU; so the interpreter's own time counts as not delegated."
)


def onnx_profile(path: str | os.PathLike, inputs: Mapping[str, Any], threads: int) -> dict[str, float]:
    """Milliseconds of one run of an `.onnx` file by kind of operator.

    Args:
        path: the file. inputs: by name. threads: of the runtime.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = OnnxSession(path, threads, profile=os.path.join(folder, "profile"))
        session.run(inputs)
        events = json.loads(Path(session.session.end_profiling()).read_text(encoding="utf-8"))
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"] / 1e3
    return dict(spent)


def executorch_profile(path: str | os.PathLike, inputs: Mapping[str, Any], runs: int) -> dict:
    """Where the time of a forward goes, by ExecuTorch's event tracer.

    Args:
        path: the `.pte` file. inputs: by name. runs: forwards that count, after one that does not.

    Returns:
        portable_share: the share of what is not in delegate calls; portable_share_method; portable_ms: portable kernel
            → ms a forward;
        forward_ms (median, with the tracer on).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it will do without one day
        from executorch.devtools import Inspector
        from executorch.extension.pybindings.portable_lib import _load_for_executorch

        values = [torch.from_numpy(value) for value in ExecutorchSession(path).fit(inputs)]
        program = _load_for_executorch(str(path), enable_etdump=True)
        for _ in range(runs + 1):
            program.forward(values)
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "etdump")
            program.write_etdump_result_to_file(file)
            (block,) = [block for block in Inspector(etdump_path=file).event_blocks if block.name == "Execute"]
    times: dict[str, torch.Tensor] = {}
    for event in block.events:
        if event.perf_data is not None and not event.is_delegated_op:
            times[event.name] = times.get(event.name, 0) + torch.tensor(event.perf_data.raw[1:], dtype=torch.float64)
    total = times["Method::execute"]
    share = 1 - times.get("DELEGATE_CALL", torch.zeros_like(total)) / total
    kernels = {
        name.removeprefix("native_call_"): float(value.median())
        for name, value in times.items()
        if name.startswith("native_call_")
    }
    return {
        "portable_share": float(share.median()),
        "portable_share_method": SHARE_METHOD,
        "portable_ms": dict(sorted(kernels.items())),
        "forward_ms": float(total.median()),
    }
