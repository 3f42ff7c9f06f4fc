"""Artefacts in their runtimes: [`open_session`] opens a file, [`Session.run`] runs it on inputs by name.

Nothing else in the package opens an artefact to run it, and threads and options of a runtime are set here alone. Values
are numpy arrays (tensors on the CPU are taken too); importing this module loads no runtime, opening a file does.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import EdgeDiTError
from ..export.formats import FORMATS
from ..quiet import POOL, without_native_lines

if TYPE_CHECKING:
    import onnxruntime


@dataclass(frozen=True)
class Input:
    """What a file says of one of its inputs.

    Args:
        name: its name (`""`: a `.pte` file of an older export does not say it).
        shape: a size that the file leaves open is a text or `None`.
        dtype: of the values.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: np.dtype

    def takes(self, value: np.ndarray) -> bool:
        """Whether a value has this type and shape."""
        return (
            value.dtype == self.dtype
            and value.ndim == len(self.shape)
            and all(size == own for size, own in zip(value.shape, self.shape) if isinstance(own, int))
        )

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"{self.name} {self.dtype} ({sizes}{',' * (len(self.shape) == 1)})".lstrip()


class Session(ABC):
    """An artefact in a runtime.

    Args:
        path: the file.
        threads: threads of a run (`None`: the runtime's choice).

    Raises:
        EdgeDiTError: the runtime is not installed, or refuses the file.
    """

    runtime: ClassVar[str]  # as in the keys of `latency_ms` in report.json
    metadata: dict[str, str]  # what the file says about itself, as text
    inputs: tuple[Input, ...]  # in the file's order

    def __init__(self, path: str | os.PathLike, threads: int | None = None):
        if threads is not None and threads < 1:
            raise EdgeDiTError(f"threads is {threads}; a session needs at least 1.")
        self.path, self.threads = Path(path), threads

    @staticmethod
    @abstractmethod
    def load_runtime() -> Any:
        """Import the runtime; raises an [`EdgeDiTError`] with the remedy where it is missing."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs in the file's order (none for a `.pte` file of an older export)."""
        return tuple(value.name for value in self.inputs if value.name)

    def fit(self, inputs: Mapping[str, Any]) -> list[np.ndarray]:
        """Inputs by name, in any order, as [`execute`] takes them. A file that does not name its inputs takes them in
        the order given.

        Raises:
            EdgeDiTError: a name is missing or unknown, or a shape or type is not the file's.
        """
        values = {name: np.require(value, requirements=["C", "W"]) for name, value in inputs.items()}
        names = self.input_names or tuple(values)
        fitting = set(names) == set(values) and len(names) == len(self.inputs)
        if not fitting or not all(known.takes(values[name]) for name, known in zip(names, self.inputs)):
            given = ", ".join(str(Input(name, value.shape, value.dtype)) for name, value in values.items())
            wanted = ", ".join(map(str, self.inputs))
            raise EdgeDiTError(
                f"The inputs are {given or 'none'}, but {self.path} was exported for {wanted}; give these, or export "
                "it again for other sizes."
            )
        return [values[name] for name in names]

    @abstractmethod
    def execute(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs, in the file's order, for what [`fit`] returned."""

    @abstractmethod
    def release(self) -> None:
        """Drop the loaded network; the next run loads it again."""

    def run(self, inputs: Mapping[str, Any]) -> list[np.ndarray]:
        """The outputs, in the file's order, for inputs by name.

        Raises:
            EdgeDiTError: see [`fit`].
        """
        return self.execute(self.fit(inputs))


# -------------------------------------------------------------------- ONNX Runtime


def session_options(threads: int | None) -> onnxruntime.SessionOptions:
    """ONNX Runtime options with `threads` intra-op threads (`None`: ONNX Runtime's choice, one a physical core).

    Its worker threads spin while a run lasts, as they do in deployment, but stop with it: several sessions that live in
    one process (interleaved measurements, a pipeline of artefacts) would otherwise burn each other's cores between
    runs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads or 0)
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    return options


class OnnxSession(Session):
    """An `.onnx` file in ONNX Runtime; see [`Session`].

    Nothing is copied: the runtime reads the inputs' own memory, and the outputs are its own.

    Args:
        provider: execution provider.
        profile: prefix of the file that its profiler writes; see [`~edgedit_hf.runtimes.profile.onnx_profile`].
    """

    runtime = "onnxruntime"

    def __init__(
        self,
        path: str | os.PathLike,
        threads: int | None = None,
        provider: str = "CPUExecutionProvider",
        profile: str | None = None,
    ):
        super().__init__(path, threads)
        onnxruntime = self.load_runtime()
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise EdgeDiTError(
                f"The provider {provider!r} is not in this onnxruntime; it offers {', '.join(available)}."
            )
        options = session_options(threads)
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, profile
        self._options, self._provider = options, provider
        self.session: Any = self._open()
        entries = self.session.get_modelmeta().custom_metadata_map
        self.metadata = {
            key.removeprefix("edgedit."): value for key, value in entries.items() if key.startswith("edgedit.")
        }
        self.inputs = tuple(
            Input(value.name, tuple(value.shape), _numpy_type(value.type)) for value in self.session.get_inputs()
        )

    @staticmethod
    def load_runtime() -> Any:
        import onnxruntime

        return onnxruntime

    def _open(self) -> Any:
        try:
            return self.load_runtime().InferenceSession(str(self.path), self._options, providers=[self._provider])
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise EdgeDiTError(f"ONNX Runtime cannot load {self.path}: {error}. Export it again.") from error

    def release(self) -> None:
        self.session = None

    def execute(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        if self.session is None:
            self.session = self._open()
        return self.session.run(None, dict(zip(self.input_names, values)))


def _numpy_type(kind: str) -> np.dtype:
    """ONNX Runtime's "tensor(float)" as numpy's type."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(name, name))


# -------------------------------------------------------------------- ExecuTorch

CONSTANT_PREFIX = "edgedit_"  # of the constant methods by which a .pte file describes itself
INPUT_NAMES = "inputs"  # the constant method, behind the prefix, that names the inputs: a JSON list in their order
METHODS = "methods"  # of a file of several networks instead: JSON, method → what a file of that network alone says
FORWARD = "forward"  # the method of a file of one network
# Types by their numbers in .pte files (executorch/runtime/core/portable_type/scalar_type.h).
_SCALAR_TYPES = {
    0: "uint8",
    1: "int8",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    7: "float64",
    11: "bool",
}
# A method keeps its inputs and outputs, and the pool of threads is one for the process: one at a time.
_EXECUTORCH = threading.RLock()
_sessions: weakref.WeakSet[ExecutorchSession] = weakref.WeakSet()


@functools.cache
def _portable_lib() -> ModuleType:
    with warnings.catch_warnings(), without_native_lines(POOL):
        warnings.simplefilter("ignore")  # the import itself says that it is experimental
        import executorch.runtime  # noqa: F401
        from executorch.extension.pybindings import portable_lib

        portable_lib._threadpool_get_thread_count()  # makes the pool, which says how it counts the cores
    return portable_lib


def set_executorch_threads(threads: int) -> None:
    """Set the size of ExecuTorch's thread pool, which the whole process shares (at first: one thread a core).

    XNNPACK keeps a pointer to the pool in every loaded method, so the methods of all sessions are dropped before a new
    pool is made; each is loaded again at its next run.
    """
    if threads < 1:
        raise EdgeDiTError(f"threads is {threads}; ExecuTorch needs at least 1.")
    runtime = ExecutorchSession.load_runtime()
    with _EXECUTORCH:
        if runtime._threadpool_get_thread_count() != threads:
            for session in list(_sessions):
                session.release()
            with without_native_lines(POOL):
                runtime._unsafe_reset_threadpool(threads)


class ExecutorchSession(Session):
    """A `.pte` file in ExecuTorch; see [`Session`]. Opening it reads the file's description, the first run loads the
    network.

    Args:
        threads: threads of every run (`None`: the pool as it is). The pool is one for the process: when another session
            asks for another number, this one loads its network again from `path` at its next run, so do not alternate.
        method: of a file of several networks: which one.

    Raises:
        EdgeDiTError: see [`Session`]; or the file has no such method.
    """

    runtime = "executorch"

    def __init__(self, path: str | os.PathLike, threads: int | None = None, method: str = FORWARD):
        super().__init__(path, threads)
        if threads is not None:
            set_executorch_threads(threads)
        self.method = method
        self._method: Any = None
        with _EXECUTORCH:
            self._program = self._load(self._open)
            said = self._load(lambda: _constants(self._program))
            if method not in self._program.method_names:
                known = sorted(name for name in self._program.method_names if not name.startswith(CONSTANT_PREFIX))
                raise EdgeDiTError(f"{self.path} has no method {method!r}; its methods are {', '.join(known)}.")
            tensors = self._load(lambda: _input_tensors(self._program.metadata(method)))
            _sessions.add(self)
        if METHODS in said:
            said = json.loads(said[METHODS])[method]
        names = json.loads(said.pop(INPUT_NAMES, "[]")) or [""] * len(tensors)
        self.metadata = said
        self.inputs = tuple(Input(name, shape, dtype) for name, (shape, dtype) in zip(names, tensors, strict=True))

    @staticmethod
    def load_runtime() -> ModuleType:
        FORMATS["executorch"].require()
        return _portable_lib()

    def _open(self) -> Any:
        self.load_runtime()
        from executorch.runtime import Runtime

        return Runtime.get().load_program(self.path)

    def _load(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:
            raise EdgeDiTError(f"ExecuTorch cannot load {self.path}: {error}. Export it again.") from error

    def release(self) -> None:
        self._method = self._program = None

    def execute(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        import torch

        with _EXECUTORCH:
            if self.threads is not None:
                set_executorch_threads(self.threads)
            if self._method is None:
                if self._program is None:
                    self._program = self._load(self._open)
                self._method = self._load(lambda: self._program.load_method(self.method))
            found = self._method.execute([torch.from_numpy(value) for value in values])
        return [value.numpy() for value in found]


def _constants(program: Any) -> dict[str, str]:
    """What a program's constant methods return, by their names without the prefix."""
    names = [name for name in program.method_names if name.startswith(CONSTANT_PREFIX)]
    return {name.removeprefix(CONSTANT_PREFIX): program.load_method(name).execute([])[0] for name in names}


def _input_tensors(method: Any) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of a method's inputs."""
    tensors = [method.input_tensor_meta(index) for index in range(method.num_inputs())]
    return [(tuple(tensor.sizes()), np.dtype(_SCALAR_TYPES[tensor.dtype()])) for tensor in tensors]


# -------------------------------------------------------------------- opening

SESSIONS: dict[str, type[Session]] = {".onnx": OnnxSession, ".pte": ExecutorchSession}  # by the file's ending


def session_type(path: str | os.PathLike) -> type[Session]:
    """Which session opens a file.

    Raises:
        EdgeDiTError: no runtime here runs such a file.
    """
    ending = Path(path).suffix
    if ending not in SESSIONS:
        raise EdgeDiTError(f"{path} cannot be run; the files that can be end in {', '.join(SESSIONS)}.")
    return SESSIONS[ending]


def open_session(path: str | os.PathLike, threads: int | None = None, **options: Any) -> Session:
    """Open an artefact in its runtime.

    Args:
        path: the file, `.onnx` or `.pte`.
        threads: threads of a run (`None`: the runtime's choice).
        options: of the runtime; ONNX Runtime has `provider`, ExecuTorch `method`.

    Raises:
        EdgeDiTError: no runtime runs such a file, it is not installed, or it refuses the file.
    """
    return session_type(path)(path, threads, **options)
