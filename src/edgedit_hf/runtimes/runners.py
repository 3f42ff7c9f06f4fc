"""Callables for [`~edgedit_hf.runtimes.timing.measure`]: one forward of a fixed batch in a runtime with fixed threads.

Runners are named `<runtime>-<precision>`: "torch-fp32", "onnxruntime-int8", "executorch-int4" (the keys of `latency_ms`
in report.json).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import EdgeDiTError
from .sessions import ExecutorchSession, session_options

if TYPE_CHECKING:
    pass


def example_inputs(config: Mapping, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of one denoiser forward: `sample` `(B, C, H, W)`, `timestep` `(B,)` and, with classes, `class_labels`
    `(B,)`.

    Values are those of sampling with guidance: unit noise, every image its own timestep, labels over all classes and
    the null class.
    """
    generator = torch.Generator().manual_seed(seed)
    size = config["sample_size"]
    inputs = {
        "sample": torch.randn(batch, config["in_channels"], size, size, generator=generator),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator).float(),
    }
    if config["num_classes"]:
        inputs["class_labels"] = torch.randint(0, config["num_classes"] + 1, (batch,), generator=generator)
    return inputs


class TorchRunner:
    """One eager forward of a model in this process; torch's thread count is set to `threads` around each call.

    Args:
        model: `EdgeDiTTransformer2DModel`, in eval mode.
        batch: images a forward.
        threads: intra-op threads.
    """

    def __init__(self, model: torch.nn.Module, batch: int, threads: int):
        self.model, self.batch, self.threads = model, int(batch), int(threads)
        inputs = example_inputs(model.config, batch)
        self.inputs = (inputs["sample"].to(model.dtype), inputs["timestep"], inputs.get("class_labels"))

    def __call__(self) -> torch.Tensor:
        before = torch.get_num_threads()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                return self.model(*self.inputs, return_dict=False)[0]
        finally:
            if before != self.threads:
                torch.set_num_threads(before)


class OnnxRunner:
    """One run of an ONNX file in ONNX Runtime on the CPU.

    Args:
        model: path of the .onnx file, or its serialised bytes.
        inputs: name → array; the batch is fixed by them.
        threads: intra-op threads.
    """

    def __init__(self, model: str | Path | bytes, inputs: Mapping[str, np.ndarray], threads: int):
        import onnxruntime

        self.threads = int(threads)
        source = model if isinstance(model, bytes) else str(model)
        self.session = onnxruntime.InferenceSession(
            source, session_options(threads), providers=["CPUExecutionProvider"]
        )
        self.inputs = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        self.batch = len(next(iter(self.inputs.values())))

    def __call__(self) -> list[np.ndarray]:
        return self.session.run(None, self.inputs)


def onnx_runner(model: str | Path, config: Mapping, batch: int, threads: int) -> OnnxRunner:
    """[`OnnxRunner`] of an exported denoiser with the inputs that [`TorchRunner`] uses."""
    inputs = {name: value.numpy() for name, value in example_inputs(config, batch).items()}
    return OnnxRunner(model, inputs, threads)


# -------------------------------------------------------------------- ExecuTorch


class ExecutorchRunner:
    """One run of a .pte file in ExecuTorch on the CPU.

    Args:
        model: path of the file.
        inputs: tensors by position, of the exported shapes.
        threads: threads of the pool, which is one for the process: runners that are measured together must ask for the
            same number.
    """

    def __init__(self, model: str | Path, inputs: Sequence[torch.Tensor], threads: int):
        self.threads = int(threads)
        self.session = ExecutorchSession(model, self.threads)
        self.inputs = [tensor.contiguous() for tensor in inputs]
        self.batch = len(self.inputs[0])

    def __call__(self) -> torch.Tensor:
        return self.session.run(self.inputs)


def executorch_runner(model: str | Path, config: Mapping, batch: int, threads: int) -> ExecutorchRunner:
    """[`ExecutorchRunner`] of an exported denoiser with the inputs that [`TorchRunner`] uses; the file must be of this
    batch.
    """
    runner = ExecutorchRunner(model, list(example_inputs(config, batch).values()), threads)
    made_for = json.loads(runner.session.metadata.get("batch", "null"))
    if made_for != batch:
        raise EdgeDiTError(
            f"{model} was exported for batch {made_for}; a runner of batch {batch} is asked for. Export it for this "
            "batch."
        )
    return runner


RUNNERS = {"onnxruntime": onnx_runner, "executorch": executorch_runner}  # by the runtime's name
