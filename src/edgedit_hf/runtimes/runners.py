"""Callables for [`~edgedit_hf.runtimes.timing.measure`]: one forward of a fixed batch in a runtime with fixed threads.

Runners are named `<runtime>-<precision>`: "torch-fp32", "onnxruntime-int8", "executorch-int4" (the keys of `latency_ms`
in report.json).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import EdgeDiTError
from ..quiet import POOL, without_native_lines

if TYPE_CHECKING:
    import onnxruntime


def session_options(threads: int | None) -> onnxruntime.SessionOptions:
    """ONNX Runtime options with `threads` intra-op threads (`None`: ONNX Runtime's choice, one a physical core).

    Its worker threads spin while a run lasts, as they do in deployment, but stop with it: several sessions that live in
    one process (interleaved measurements, a pipeline of artefacts) would otherwise burn each other's cores between
    runs.
    """
    import onnxruntime

    if threads is not None and threads < 1:
        raise EdgeDiTError(f"threads is {threads}; a session needs at least 1.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads or 0)
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    return options


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

CONSTANT_PREFIX = "edgedit_"  # of the constant methods by which a .pte file describes itself
# Numbers of types in .pte files (executorch/runtime/core/portable_type/scalar_type.h).
_SCALAR_TYPES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.bool: 11,
}


def require_executorch() -> None:
    """Raise an [`EdgeDiTError`] with the remedy where the package `executorch` is missing (it is optional)."""
    if importlib.util.find_spec("executorch") is None:
        raise EdgeDiTError("ExecuTorch is not installed; install it with: pip install 'edgedit_hf[executorch]'")


def _executorch() -> ModuleType:
    require_executorch()
    return _portable_lib()


@functools.cache
def _portable_lib() -> ModuleType:
    with warnings.catch_warnings(), without_native_lines(POOL):
        warnings.simplefilter("ignore")  # the import itself says that it is experimental
        from executorch.extension.pybindings import portable_lib

        portable_lib._threadpool_get_thread_count()  # makes the pool, which says how it counts the cores
    return portable_lib


def _load_program(path: Path) -> Any:
    _executorch()
    from executorch.runtime import Runtime

    return Runtime.get().load_program(path)


_sessions: weakref.WeakSet[ExecutorchSession] = weakref.WeakSet()


def set_executorch_threads(threads: int) -> None:
    """Set the size of ExecuTorch's thread pool, which the whole process shares (at first: one thread a core).

    XNNPACK keeps a pointer to the pool in every loaded method, so the methods of all sessions are dropped before a new
    pool is made; each is loaded again at its next run.
    """
    if threads < 1:
        raise EdgeDiTError(f"threads is {threads}; ExecuTorch needs at least 1.")
    runtime = _executorch()
    if runtime._threadpool_get_thread_count() != threads:
        for session in list(_sessions):
            session.release()
        with without_native_lines(POOL):
            runtime._unsafe_reset_threadpool(threads)


class ExecutorchSession:
    """A .pte file in ExecuTorch; opening it reads the file's description, the first run loads the network.

    Args:
        path: the file.
        threads: threads of every run (`None`: the pool as it is). The pool is one for the process: when another session
            asks for another number, this one loads its network again from `path` at its next run, so do not alternate.

    Raises:
        EdgeDiTError: ExecuTorch is not installed, or refuses the file.
    """

    def __init__(self, path: str | Path, threads: int | None = None):
        self.path, self.threads = Path(path), threads
        if threads is not None:
            set_executorch_threads(threads)
        self._method: Any = None
        self._expected: list[tuple[tuple[int, ...], int | None]] = []
        self._program = self._load(lambda: _load_program(self.path))
        names = [name for name in self._program.method_names if name.startswith(CONSTANT_PREFIX)]
        self.metadata: dict[str, str] = {
            name.removeprefix(CONSTANT_PREFIX): self._load(
                lambda name=name: self._program.load_method(name).execute([])[0]
            )
            for name in names
        }
        _sessions.add(self)

    def _load(self, call: Any) -> Any:
        try:
            return call()
        except RuntimeError as error:
            raise EdgeDiTError(f"ExecuTorch cannot load {self.path}: {error}. Export it again.") from error

    def release(self) -> None:
        """Drop the loaded network; the next run loads it again."""
        self._method = self._program = None

    def run_all(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All outputs of the network for inputs of the exported shapes and types.

        Raises:
            EdgeDiTError: the file cannot be loaded, or the number, a shape or a type of the inputs is another.
        """
        if self.threads is not None:
            set_executorch_threads(self.threads)
        if self._method is None:
            if self._program is None:
                self._program = self._load(lambda: _load_program(self.path))
            self._method = self._load(lambda: self._program.load_method("forward"))
            meta = self._method.metadata
            self._expected = [
                (tuple(info.sizes()), info.dtype()) for info in map(meta.input_tensor_meta, range(meta.num_inputs()))
            ]
        given = [(tuple(tensor.shape), _SCALAR_TYPES.get(tensor.dtype)) for tensor in inputs]
        if given != self._expected:
            found = ", ".join(f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}" for tensor in inputs)
            names = {code: str(dtype).removeprefix("torch.") for dtype, code in _SCALAR_TYPES.items()}
            wanted = ", ".join(f"{names.get(code, code)} {shape}" for shape, code in self._expected)
            raise EdgeDiTError(
                f"The inputs are {found}, but {self.path} was exported for {wanted}; give these, or export it again "
                "for other sizes."
            )
        return list(self._method.execute([tensor.contiguous() for tensor in inputs]))

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The first output of [`run_all`]."""
        return self.run_all(inputs)[0]


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
