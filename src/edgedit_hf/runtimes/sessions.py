"""Artefacts in their runtimes: opened by path, run on inputs by name."""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

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


_EXECUTORCH = threading.Lock()  # a method keeps its inputs and outputs, and the pool of threads is one for the process


class OnnxSession:
    """An .onnx file in ONNX Runtime.

    Args:
        path: the file.
        threads: intra-op threads (`None`: ONNX Runtime's choice).
        provider: execution provider.

    Raises:
        EdgeDiTError: the provider does not exist, or ONNX Runtime refuses the file.
    """

    def __init__(self, path: Path, threads: int | None = None, provider: str = "CPUExecutionProvider"):
        import onnxruntime

        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise EdgeDiTError(
                f"The provider {provider!r} is not in this onnxruntime; it offers {', '.join(available)}."
            )
        try:
            self.session = onnxruntime.InferenceSession(str(path), session_options(threads), providers=[provider])
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise EdgeDiTError(f"ONNX Runtime cannot load {path}: {error}. Export it again.") from error
        self.inputs = {value.name for value in self.session.get_inputs()}

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says about itself, as text."""
        entries = self.session.get_modelmeta().custom_metadata_map
        return {key.removeprefix("edgedit."): value for key, value in entries.items() if key.startswith("edgedit.")}

    def run(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Outputs for contiguous inputs on the CPU, by name; what the file does not take is left out. ONNX Runtime
        reads the tensors' own memory, and the outputs are its own: nothing is copied."""
        values = {name: value.numpy() for name, value in inputs.items() if name in self.inputs}
        return [torch.from_numpy(value) for value in self.session.run(None, values)]


class PteSession:
    """A .pte file in ExecuTorch ([`ExecutorchSession`]), called like [`OnnxSession`]; `inputs` are in the order of the
    file's.
    """

    def __init__(self, path: Path, threads: int | None = None):
        self.session = ExecutorchSession(path, threads)
        self.metadata = dict(self.session.metadata)

    def run(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Outputs for contiguous inputs on the CPU."""
        with _EXECUTORCH:
            return self.session.run_all(list(inputs.values()))


SESSIONS = {"onnx": OnnxSession, "executorch": PteSession}


def open_session(
    file: str | os.PathLike, format: str, threads: int | None = None, **options: Any
) -> OnnxSession | PteSession:
    """Open an artefact.

    Args:
        file: the file. format: `"onnx"` or `"executorch"`. threads: of the runtime. options: of the runtime.
    """
    return SESSIONS[format](Path(file), threads, **options)
