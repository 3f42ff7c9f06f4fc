"""What can be exported: every format with its precisions, gates and variants ([`FORMATS`]), and what may be asked of an
export ([`ExportOptions`]).

No torch: the command line, its help, the recipes' schema and the exporter all read this.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..errors import EdgeDiTError
from ..schema import check_option, key

DYNAMIC_BATCH = "dynamic"
FIXED_BATCH = 2  # of formats whose shapes are fixed: one image with guidance

# -------------------------------------------------------------------- precisions


@dataclass(frozen=True)
class Precision:
    """One precision of a network in a runtime.

    Args:
        name: what it is called there; the key in verify.json.
        tolerance: of ‖artefact − eager‖ / ‖eager‖ of one forward, the worst over all sampling timesteps.
        min_psnr_db: least peak signal-to-noise ratio of the images after the full loop, where the forwards' errors have
            added up.
        note: what the name does not say.
        activations, weights: how activations and weights may be rounded; the first is the default.
    """

    name: str
    tolerance: float
    min_psnr_db: float
    note: str = ""
    activations: tuple[str, ...] = ("dynamic",)
    weights: tuple[str, ...] = ("nearest",)


# fp32 differs by the order of additions only. Quantised networks are worst at the last, nearly clean timesteps, where
# trained models on digits lie between 0.010 and 0.021 in int8 (images at 44 to 54 dB), between 0.009 and 0.015 in 8da8w
# (43 to 48 dB), and between 0.06 and 0.13 in 4 bits (25 to 32 dB).
PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", 1e-3, 50.0),
        Precision("fp16", 1e-2, 40.0),
        Precision("int8", 5e-2, 25.0),
        Precision("int4", 3e-1, 25.0),
        Precision("8da8w", 5e-2, 25.0),  # ExecuTorch: activations in 8 bits as they come, weights in 8
        Precision("8da4w", 3e-1, 25.0),
    )
}
ACTIVATIONS = ("dynamic", "static", "by-timestep")
WEIGHTS = ("nearest", "gptq")

# -------------------------------------------------------------------- formats


@dataclass(frozen=True)
class Package:
    """An optional package that a format needs.

    Args:
        name: in messages. module: what is imported. extra: of ours, that installs it.
    """

    name: str
    module: str
    extra: str

    @property
    def installed(self) -> bool:
        """Whether it can be imported."""
        return importlib.util.find_spec(self.module) is not None

    @property
    def remedy(self) -> str:
        """The command that installs it."""
        return f"pip install 'edgedit_hf[{self.extra}]'"


@dataclass(frozen=True)
class Format:
    """One artefact format.

    Args:
        name: in options and folders. label: in prose. runtime: what runs it, as in the keys of latencies.
        suffix: of its files.
        precisions: what every `--dtype` is here.
        measured: the dtypes that a run exports and a latency table measures.
        dynamic: whether sizes may stay open.
        lowered_as: the format whose lowering makes its files, and whose components load them; default: itself.
        package: what it needs beside this package's own requirements.
        backends: who may compute: name → why its files are not run here. not_run: the same of the whole format.
    """

    name: str
    label: str
    runtime: str
    suffix: str
    precisions: Mapping[str, Precision]
    measured: tuple[str, ...] = ()
    dynamic: bool = False
    lowered_as: str = ""
    package: Package | None = None
    backends: Mapping[str, str | None] = field(default_factory=dict)
    not_run: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lowered_as", self.lowered_as or self.name)

    @property
    def default_batch(self) -> str | int:
        """Rows of a forward of an export that states none."""
        return DYNAMIC_BATCH if self.dynamic else FIXED_BATCH

    @property
    def missing(self) -> Package | None:
        """The package that it needs, where that is not installed."""
        return None if self.package is None or self.package.installed else self.package

    def require(self) -> None:
        """Raise an [`EdgeDiTError`] with the remedy unless what the format needs is installed."""
        if (missing := self.missing) is not None:
            raise EdgeDiTError(f"{missing.name} is not installed; install it with: {missing.remedy}")

    def check_dtype(self, dtype: str) -> None:
        """Raise an [`EdgeDiTError`] unless the format exists in this precision."""
        if dtype not in self.precisions:
            raise EdgeDiTError(f"--dtype is {dtype!r}; the format {self.name} exists as {', '.join(self.precisions)}.")

    def check_batch(self, batch: str | int | None) -> str | int:
        """Rows of a forward: `"dynamic"` (where it exists) or a positive integer (also as text); `None`: the default.

        Raises:
            EdgeDiTError: it is something else.
        """
        if batch is None:
            return self.default_batch
        if batch == DYNAMIC_BATCH and self.dynamic:
            return batch
        try:
            number = int(batch)
        except ValueError:
            number = 0
        if number < 1:
            choice = "'dynamic' or a number" if self.dynamic else "a number"
            raise EdgeDiTError(f"--batch is {batch!r}; give {choice} of at least 1.")
        return number

    def check_backend(self, backend: str, dtype: str) -> None:
        """Raise an [`EdgeDiTError`] unless the backend exists, its SDK is there, and it takes the precision."""
        if not self.backends:
            if backend != BACKEND:
                raise EdgeDiTError(
                    f"backend is {backend!r}; backends belong to ExecuTorch. Leave it out for {self.name}."
                )
            return
        if backend not in self.backends:
            raise EdgeDiTError(
                f"backend is {backend!r}; the backends of {self.label} here are {', '.join(self.backends)}."
            )
        if backend != BACKEND and dtype != "fp32":
            raise EdgeDiTError(
                f"precision is {dtype!r}; through {self.label}'s {backend} delegate only fp32 is exported (it computes "
                "in 16 bits there). For small Core ML weights use the format coreml."
            )
        if backend == "coreml" and not COREMLTOOLS.installed:
            raise EdgeDiTError(
                f"The backend coreml needs coremltools, which is not installed; install it with: {COREMLTOOLS.remedy}"
            )
        if backend == "qnn" and not os.path.isdir(os.environ.get("QNN_SDK_ROOT", "")):
            raise EdgeDiTError(
                "The backend qnn needs Qualcomm's AI Engine Direct SDK, but QNN_SDK_ROOT is "
                f"{os.environ.get('QNN_SDK_ROOT', '')!r}, not a folder; install the SDK from Qualcomm's site and set "
                "QNN_SDK_ROOT to it."
            )


BACKEND = "xnnpack"
COREMLTOOLS = Package("coremltools", "coremltools", "coreml")
ONNX_PRECISIONS = {
    "fp32": PRECISIONS["fp32"],
    "fp16": PRECISIONS["fp16"],
    "int8": replace(PRECISIONS["int8"], activations=ACTIVATIONS),
    "int4": replace(PRECISIONS["int4"], weights=WEIGHTS),
}
FORMATS = {
    target.name: target
    for target in (
        Format(
            "onnx",
            "ONNX",
            "onnxruntime",
            ".onnx",
            ONNX_PRECISIONS,
            measured=("fp32", "int8"),
            dynamic=True,
        ),
        Format(
            "executorch",
            "ExecuTorch",
            "executorch",
            ".pte",
            {
                "fp32": PRECISIONS["fp32"],
                "int8": PRECISIONS["8da8w"],
                "int4": replace(PRECISIONS["8da4w"], weights=WEIGHTS),
            },
            measured=("fp32", "int8", "int4"),
            package=Package("ExecuTorch", "executorch", "executorch"),
            backends={
                BACKEND: None,
                "coreml": "The file was lowered, but not run: Core ML's delegate runs on Apple's devices only.",
                "qnn": "The file was lowered, but not run: QNN's delegate runs on Qualcomm's devices only.",
            },
        ),
        Format(
            "coreml",
            "Core ML",
            "coreml",
            ".mlpackage",
            {
                "fp32": PRECISIONS["fp32"],
                "fp16": PRECISIONS["fp16"],
                "int8": PRECISIONS["int8"],
                "int4": replace(PRECISIONS["int4"], note="palettes of 16 entries"),
            },
            package=COREMLTOOLS,
            not_run=(
                "Core ML runs on Apple's systems only, so the packages were not run. The errors are those of the saved "
                "programs, interpreted operator by operator in PyTorch with their declared types, for example inputs."
            ),
        ),
        # The files are run here by ONNX Runtime itself; a browser runs the same code, built for WebAssembly.
        Format("web", "a web page (onnxruntime-web)", "web", ".onnx", ONNX_PRECISIONS, lowered_as="onnx"),
    )
}
RUNTIMES = {target.runtime: target for target in FORMATS.values()}  # by the runtime's name
MEASURED = {runtime: target for runtime, target in RUNTIMES.items() if target.measured}
DTYPES = tuple(dict.fromkeys(dtype for target in FORMATS.values() for dtype in target.precisions))


def format_of(name: str) -> Format:
    """The format of this name.

    Raises:
        EdgeDiTError: there is none.
    """
    if name not in FORMATS:
        raise EdgeDiTError(f"--format is {name!r}; the formats are {', '.join(FORMATS)}.")
    return FORMATS[name]


def dtype_words() -> str:
    """Every dtype, and what it is in formats where the name does not say it, for the command's help."""
    words = []
    for dtype in DTYPES:
        there = {name: target.precisions.get(dtype) for name, target in FORMATS.items()}
        notes = [f"not {name}" for name, found in there.items() if found is None]
        for name, found in there.items():
            if found is not None and (found.name != dtype or found.note):
                notes.append(f"{name}: {found.note or found.name}")
        words.append(f"{dtype} ({'; '.join(notes)})" if notes else dtype)
    return f"{', '.join(words[:-1])} or {words[-1]}"


def precisions_key(format: str, needs: str = "", default: Sequence[str] = ()) -> Any:
    """The key of a recipe that lists the precisions of a format's exports.

    Args:
        needs: what its comment says of what the format needs. default: its default.
    """
    target = FORMATS[format]
    dtypes = target.measured or tuple(target.precisions)
    words = (dtype if (own := target.precisions[dtype].name) == dtype else f"{dtype} ({own})" for dtype in dtypes)
    comment = f"precisions of the exports to {target.label}: {', '.join(words)}{needs}"
    return key(lambda: list(default), comment, choices=dtypes, items=10)


def gate_words(gate: str) -> str:
    """The default of a gate (`"tolerance"` or `"min_psnr_db"`) for every dtype, for the command's help."""
    first = {d: next(t.precisions[d] for t in FORMATS.values() if d in t.precisions) for d in DTYPES}
    return ", ".join(f"{getattr(precision, gate):g} for {dtype}" for dtype, precision in first.items())


def _where(variants: str, value: str) -> str:
    """The formats and dtypes that have a variant: `"onnx, executorch and web int4"`."""
    places: dict[str, list[str]] = {}
    for name, target in FORMATS.items():
        for dtype, precision in target.precisions.items():
            if value in getattr(precision, variants):
                places.setdefault(dtype, []).append(name)
    return ", ".join(f"{_listed(names)} {dtype}" for dtype, names in places.items())


def _listed(names: Sequence[str]) -> str:
    """`"a"`, `"a and b"`, `"a, b and c"`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


# -------------------------------------------------------------------- options

Resolution = tuple[int, int] | str | None
OPTION_NAMES = {"num_images": "images", "min_psnr_db": "min-psnr"}  # whose name is another on the command line


@dataclass(frozen=True)
class ExportOptions:
    """What is asked of an export; checked when it is made.

    Args:
        format: a key of [`FORMATS`].
        dtype: `"fp32"`, `"int8"` or `"int4"`, for ONNX and Core ML also `"fp16"`. Convolutions of a VAE stay at 16 bits
            or more, and text encoders have 8 bits in `"int4"`.
        batch: `"dynamic"` (ONNX's default), or the rows of a forward (default 2, without guidance 1); guidance
            makes two an image.
        one_file: of ExecuTorch: write all networks as methods of one more file too, `pipeline.pte`.
        split_conditioner: write adaLN, a third of a DiT's weights, as an artefact of its own, which a schedule needs
            once.
        subnet: of an elastic supernet: which one (default: the active one, the full net).
        resolution: (height, width) in pixels; `"dynamic"` for an ONNX file of an EdgeDiT that takes any; default: what
            it was made for.
        opset: ONNX operator set, 18 or later, up to what the installed onnx knows.
        tolerance: largest relative error of a forward; default the precision's.
        min_psnr_db: least ratio of the images of the whole loop; default the precision's. In int4, layers get 8 bits,
            the most sensitive first, until it is reached.
        activations: of ONNX in int8: `"dynamic"`, `"static"` (calibrated on the pipeline's own samples) or
            `"by-timestep"` (a scale a bucket of timesteps).
        weights: of int4: `"nearest"`, or `"gptq"` (error-compensating, calibrated in the same way). A model that is
            quantised already keeps its own.
        backend: of ExecuTorch: `"xnnpack"`, or `"coreml"` or `"qnn"` where their SDKs are installed; the files of those
            two cannot be run here.
        runtime_url: of a web page: the address of a folder with onnxruntime-web's files, the one origin that the page
            may ask beside its own; default: a copy in the page's folder, fetched with npm.
        prompts: of text to image: what is sampled to calibrate and to verify.
        seed: seed of the comparison's images.
        threads: threads of the comparison and the timing.
        bench_batches: batches that are timed (a fixed `batch` is timed alone).
        bench_repeats: timed rounds a batch.
        num_images: images of the comparison, rounded up to what fills a fixed batch.
        overwrite: whether the output, if it is an older pipeline folder, is replaced.
        trust_remote_code: whether code in the pipeline's repository may run.
        inputs: further files of the user that the output must not touch.

    Raises:
        EdgeDiTError: an option does not exist, is out of its range, or does not go with the others.
    """

    format: str = "onnx"
    dtype: str = "fp32"
    batch: str | int | None = key(None, minimum=1, maximum=1024)
    one_file: bool = False
    split_conditioner: bool = False
    subnet: str | None = None
    resolution: Resolution = key(None, minimum=8, maximum=4096)
    opset: int | None = key(None, minimum=18, maximum=99)
    tolerance: float | None = key(None, above=0.0, maximum=1e6)
    min_psnr_db: float | None = key(None, minimum=0.0, maximum=200.0)
    activations: str = "dynamic"
    weights: str = "nearest"
    backend: str = BACKEND
    runtime_url: str | None = None
    prompts: Sequence[str] | None = None
    seed: int = key(0, minimum=0, maximum=2**63 - 1)
    threads: int = key(2, minimum=1, maximum=1024)
    bench_batches: Sequence[int] = (2, 8)
    bench_repeats: int = 20
    num_images: int = key(8, minimum=1, maximum=10_000)
    overwrite: bool = False
    trust_remote_code: bool = False
    inputs: Sequence[str | os.PathLike | None] = ()

    def __post_init__(self) -> None:
        format_of(self.format).check_dtype(self.dtype)
        self._check_numbers()
        self._check_together()

    @property
    def target(self) -> Format:
        """The format."""
        return FORMATS[self.format]

    @property
    def rows(self) -> str | int:
        """Rows of a forward: `"dynamic"` or a number."""
        return self.target.check_batch(self.batch)

    @property
    def precision(self) -> Precision:
        """The precision in this format."""
        return self.target.precisions[self.dtype]

    @property
    def not_run(self) -> str | None:
        """Why the artefacts cannot be run here (`None`: they can)."""
        return self.target.not_run or self.target.backends.get(self.backend)

    def _check_numbers(self) -> None:
        """Raise unless the numbers are in their ranges."""
        self.target.check_batch(self.batch)
        for entry in fields(self):
            rule, value = entry.metadata.get("rule"), getattr(self, entry.name)
            if rule is None or isinstance(value, str) and value == "dynamic":
                continue
            for number in value if isinstance(value, tuple) else (value,):
                name = OPTION_NAMES.get(entry.name, entry.name)
                check_option(name, number, rule)

    def _check_together(self) -> None:
        """Raise unless the options exist and go together."""
        self.target.check_backend(self.backend, self.dtype)
        if self.runtime_url is not None and self.format != "web":
            raise EdgeDiTError(
                f"runtime-url is {self.runtime_url!r}; a page alone loads a runtime. Leave it out for {self.format}."
            )
        if self.one_file and (self.format != "executorch" or self.not_run):
            raise EdgeDiTError(
                f"one-file is asked, but the export is {self.format}"
                f"{f' for {self.backend}' if self.target.backends else ''}; one file with all methods is written by "
                f"executorch for {BACKEND}. Leave it out."
            )
        if self.opset is not None and self.target.lowered_as != "onnx":
            raise EdgeDiTError(f"opset is {self.opset}; operator sets belong to ONNX. Leave it out for {self.format}.")
        for name, known, words in (
            ("activations", ACTIVATIONS, "calibrated activations are"),
            ("weights", WEIGHTS, "compensated rounding is"),
        ):
            value = getattr(self, name)
            if value not in known:
                raise EdgeDiTError(f"{name} is {value!r}; it may be {', '.join(known)}.")
            if value not in getattr(self.precision, name):
                raise EdgeDiTError(
                    f"{name} is {value!r}, but the export is {self.format} {self.dtype}; {words} for "
                    f"{_where(name, value)}."
                )
        if self.resolution == "dynamic" and not self.target.dynamic:
            raise EdgeDiTError(
                f"The resolution is 'dynamic', but {self.format} files are made for one size; give HxW, or export to "
                "onnx."
            )
