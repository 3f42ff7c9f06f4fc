"""Callables for [`~edgedit_hf.runtimes.timing.measure`]: one forward of a fixed batch with fixed threads, eager or an
artefact's in its runtime.

Where runners are named, it is `<runtime>-<precision>`: "torch-fp32", "onnxruntime-int8", "executorch-int4" (the keys of
`latency_ms` in report.json).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from .sessions import Session


def example_inputs(
    config: Mapping, batch: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Inputs of one denoiser forward: `sample` `(B, C, H, W)`, `timestep` `(B,)` and, with classes, `class_labels`
    `(B,)`.

    Values are those of sampling with guidance: unit noise, every image its own timestep, labels over all classes and
    the null class. `dtype` is that of the sample.
    """
    generator = torch.Generator().manual_seed(seed)
    size = config["sample_size"]
    inputs = {
        "sample": torch.randn(batch, config["in_channels"], size, size, generator=generator).to(dtype),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator).float(),
    }
    if config["num_classes"]:
        inputs["class_labels"] = torch.randint(0, config["num_classes"] + 1, (batch,), generator=generator)
    return inputs


class TorchRunner:
    """One eager forward in this process; torch's thread count is set to `threads` around each call.

    Args:
        module: takes the inputs by position, in their order.
        inputs: by name; the batch is fixed by them.
        threads: intra-op threads.
    """

    def __init__(self, module: Callable[..., Any], inputs: Mapping[str, Any], threads: int):
        self.module, self.inputs, self.threads = module, tuple(inputs.values()), int(threads)

    def __call__(self) -> Any:
        before = torch.get_num_threads()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                return self.module(*self.inputs)
        finally:
            if before != self.threads:
                torch.set_num_threads(before)


class SessionRunner:
    """One run of an artefact; its threads are the session's. ExecuTorch has one pool for the process: sessions that are
    measured together must ask for the same number.

    Args:
        session: the opened artefact.
        inputs: by name; the batch is fixed by them.
        keep: whether its network stays in memory between its turns.
    """

    def __init__(self, session: Session, inputs: Mapping[str, Any], keep: bool = True):
        self.session, self.threads = session, session.threads
        self.values = session.fit(inputs)
        if not keep:
            self.release = session.release
            self.release()

    def __call__(self) -> list[np.ndarray]:
        return self.session.execute(self.values)
