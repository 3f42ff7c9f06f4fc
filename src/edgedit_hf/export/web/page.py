"""The folder of `--format web`: the page beside the ONNX files, and whether a browser's memory holds them. No torch.

What a browser can hold is bounded by the runtime's memory, a WebAssembly memory of 32-bit addresses: [`LIMIT`]. A file
takes [`peak_bytes`] of it while its session is opened and run. Sessions can be opened one after another, so that the
largest file alone decides whether a model fits; the page does so where all of them together are too much.
"""

from __future__ import annotations

import importlib.resources
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...errors import EdgeDiTError
from ...files import atomic_write_text, file_sha256
from ...markup import MARKUP
from ..memory import artefact_bytes
from . import runtime
from .tokenizers import check_tokenizer

LIMIT = 2**32
"""Bytes that a WebAssembly memory of 32-bit addresses can have. Browsers before 2021 stop at half of it, and phones
with little memory earlier.
"""

COPIES = {"fp32": 3, "fp16": 5, "int8": 3, "int4": 3}
FIXED_BYTES = 64 * 2**20
"""Of the peak: the file, its weights as they are read and as the kernels want them (those of 16 bits in 32, since
WebAssembly has no smaller floats), and what the runtime and the activations of pictures of some hundred pixels take.
The page docs/phone has what was measured in Chromium.
"""

RUN_IN = (
    "ONNX Runtime, on this machine: onnxruntime-web is the same code built for WebAssembly. The page itself was not "
    "opened; open it, and compare with sample_min.py of the same seed."
)
"""What verify.json says of where the files were run."""

RUNTIME_FOLDER = "runtime"
PAGE = ("sample.js", "runtime.js", "philox.js", "tokenizer.js", "style.css")
HEADERS = {
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "cross-origin",
}
"""With which a browser isolates a page, and lends it threads."""


def peak_bytes(size: float, precision: str) -> int:
    """What a file of so many bytes takes of a browser's memory while it is opened and run, at most."""
    return int(COPIES[precision] * size) + FIXED_BYTES


def check_memory(sizes: Mapping[str, tuple[float, str]]) -> None:
    """Raise an [`EdgeDiTError`] with the sizes if a file, opened alone, would not fit into a browser's memory.

    Args:
        sizes: file → its bytes, or the least that they will be, and its precision.
    """
    large = {file: (*given, peak_bytes(*given)) for file, given in sizes.items() if peak_bytes(*given) > LIMIT}
    if large:
        listed = ", ".join(
            f"{file} of {size / 1e9:.2f} GB takes {peak / 1e9:.2f} ({COPIES[precision]} × the file + "
            f"{FIXED_BYTES / 1e6:.0f} MB, in {precision})"
            for file, (size, precision, peak) in large.items()
        )
        raise EdgeDiTError(
            f"This model does not fit into a browser: of the {LIMIT / 1e9:.2f} GB that WebAssembly has, {listed}. "
            "Nothing was written. Export it at a lower precision (--dtype), a smaller network, or to another format."
        )


def space_metadata(title: str) -> dict[str, Any]:
    """What the front matter of README.md says to be a Static Space of the Hub."""
    return {
        "title": title,
        "sdk": "static",
        "app_file": "index.html",
        "custom_headers": dict(HEADERS),
    }


def check_pipeline(pipeline: Any, weights: Mapping[str, tuple[float, str]]) -> None:
    """Raise an [`EdgeDiTError`] if a page could not sample a pipeline, before anything is lowered.

    Args:
        pipeline: whose scheduler's timesteps are set. weights: file → the least bytes that it will have, and its
            precision.
    """
    from ..schedule import NotLinearError, linear_schedule

    check_memory(weights)
    try:
        linear_schedule(pipeline.scheduler)
    except NotLinearError as error:
        raise EdgeDiTError(f"A page samples by the numbers of a contract, but there is none here: {error}") from error
    names = [name for name in ("text_encoder", "text_encoder_2") if name in pipeline.components]
    if names and all(pipeline.components[name] is None for name in names):
        raise EdgeDiTError(
            "A page reads prompts, but the pipeline has no text encoder; give it one, or export it to onnx."
        )
    for name in ("tokenizer", "tokenizer_2"):
        if pipeline.components.get(name) is not None:
            with TemporaryDirectory() as aside:
                pipeline.components[name].save_pretrained(aside)
                check_tokenizer(Path(aside, "tokenizer.json"))


def write_page(
    folder: Path, contract: Mapping[str, Any], *, title: str, runtime_url: str | None = None
) -> dict[str, Any]:
    """Write the page of an export into its folder.

    Args:
        folder: of the export, with its artefacts.
        contract: what contract.json will hold.
        title: of README.md.
        runtime_url: where the runtime lies; default: in the folder, into which it is copied.

    Returns:
        The contract's entry `web`: the runtime, the memory that every session takes, and the page's files.

    Raises:
        EdgeDiTError: a file does not fit into a browser, or the runtime cannot be had.
    """
    sizes = {}
    for key, entry in contract["artefacts"].items():
        if key != "encoder":  # which the page never opens
            sizes[key] = artefact_bytes(folder / entry["file"]), entry["precision"]
    check_memory({contract["artefacts"][key]["file"]: given for key, given in sizes.items()})
    peaks = {key: peak_bytes(*given) for key, given in sizes.items()}
    if runtime_url is None:
        shutil.copytree(runtime.runtime_folder(), folder / RUNTIME_FOLDER)
    source = importlib.resources.files(__package__) / "page"
    for name in PAGE:
        (folder / name).write_bytes((source / name).read_bytes())
    release = {"package": runtime.PACKAGE, "version": runtime.VERSION}
    values = {
        "contract": contract,
        "title": title,
        "front_matter": _yaml(space_metadata(title)),
        "origin": runtime.runtime_origin(runtime_url) if runtime_url else "",
        "runtime": release,
        "peak": max(peaks.values()),
        "limit": LIMIT,
    }
    for name in ("index.html", "README.md"):
        atomic_write_text(folder / name, _render((source / f"{name}.jinja").read_text(encoding="utf-8"), values))
    kept = sorted(f"{RUNTIME_FOLDER}/{name}" for name in runtime.FILES) if runtime_url is None else []
    web = {
        "runtime": {**release, "url": runtime_url or f"{RUNTIME_FOLDER}/"},
        "memory": {
            "limit_bytes": LIMIT,
            "rule": "sessions are opened one after another if their peaks together are above the limit, or above a "
            "quarter of the device's memory",
            "peak_bytes": peaks,
        },
        "files": ["index.html", *PAGE, *kept],
        "readme_sha256": file_sha256(folder / "README.md"),  # which a card replaces
    }
    return {"web": web}


def _yaml(values: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip()


def _render(text: str, values: Mapping[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(text).render(**values, **MARKUP)
