"""`export_pipeline`: a pipeline whose denoiser is an artefact, lowered, verified, timed and written as one folder; the same for every format."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from ..errors import EdgeDiTError
from ..genotype import Genotype
from ..launch import load_pipeline, with_transformer
from ..run_state import atomic_folder, atomic_write_json
from . import verify
from .executorch import DEFAULT_BATCH, SCHEMES, export_executorch
from .runtime import ExecutorchEdgeDiTTransformer2DModel, ExportedTransformer, OnnxEdgeDiTTransformer2DModel
from .wrappers import check_batch, plain_config

if TYPE_CHECKING:
    from ..models.transformer_edgedit import EdgeDiTTransformer2DModel
    from ..pipelines.pipeline_edgedit import EdgeDiTPipeline


@dataclass(frozen=True)
class Format:
    """One artefact format.

    Args:
        runtime: key of `latency.runners.RUNNERS`.
        component: class that loads the artefact back.
        schemes: precision → what it means here, a key of `verify.TOLERANCE`.
        default_batch: batch of an export that states none.
        dynamic: whether the batch may stay open.
        lower: `(model, target, folder, precision, batch, opset)` writes the artefact to `target`; `folder` is for what it is made from.
            Returns the files to time (precision → path, the artefact last) and facts for bench.json.
    """

    runtime: str
    component: type[ExportedTransformer]
    schemes: Mapping[str, str]
    default_batch: str | int
    dynamic: bool
    lower: Callable[[EdgeDiTTransformer2DModel, Path, Path, str, str | int, int | None], tuple[dict[str, Path], dict]]


def _lower_onnx(
    model: EdgeDiTTransformer2DModel, target: Path, folder: Path, precision: str, batch: str | int, opset: int | None
) -> tuple[dict[str, Path], dict]:
    from .onnx import DEFAULT_OPSET, export_onnx, quantize_int8

    opset = DEFAULT_OPSET if opset is None else opset
    if precision == "fp32":
        return {"fp32": export_onnx(model, target, batch, opset)}, {}
    source = export_onnx(model, folder / "fp32.onnx", batch, opset)
    return {"fp32": source, "int8": quantize_int8(source, target)}, {}


def _lower_executorch(
    model: EdgeDiTTransformer2DModel, target: Path, folder: Path, precision: str, batch: str | int, opset: int | None
) -> tuple[dict[str, Path], dict]:
    if opset is not None:
        raise EdgeDiTError(f"opset is {opset}; operator sets belong to ONNX. Leave it out for ExecuTorch.")
    facts = export_executorch(model, target, precision, batch)
    return {precision: target}, facts


FORMATS = {
    "onnx": Format("onnxruntime", OnnxEdgeDiTTransformer2DModel, {"fp32": "fp32", "int8": "int8"}, "dynamic", True, _lower_onnx),
    "executorch": Format("executorch", ExecutorchEdgeDiTTransformer2DModel, SCHEMES, DEFAULT_BATCH, False, _lower_executorch),
}


def export_pipeline(
    pipeline: EdgeDiTPipeline | str | os.PathLike,
    output: str | os.PathLike,
    *,
    format: str = "onnx",
    dtype: str = "fp32",
    batch: str | int | None = None,
    opset: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    threads: int = 2,
    bench_batches: Sequence[int] = (2, 8),
    bench_repeats: int = 20,
    num_images: int = 8,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Export a pipeline: lower its denoiser, verify it, time it, and write a pipeline folder around the artefact.

    The folder holds model_index.json, scheduler/, transformer/config.json, transformer/onnx/model.onnx or
    transformer/executorch/model.pte, the VAE if there is one (as safetensors), verify.json and bench.json. It appears at once and
    complete, or, if a gate fails, not at all.

    Args:
        pipeline: an [`EdgeDiTPipeline`], a pipeline folder or a Hub id.
        output: folder to write.
        format: `"onnx"` or `"executorch"`.
        dtype: `"fp32"` or `"int8"`; in ExecuTorch also `"int4"`.
        batch: `"dynamic"` (ONNX's default), or the batch of a forward (ExecuTorch's default is 2); guidance makes it twice the images.
        opset: ONNX operator set, 18 or later.
        tolerance: largest relative error of a forward; default as in `verify.TOLERANCE`.
        seed: seed of the comparison's images.
        threads: threads of the comparison and the timing.
        bench_batches: batches that are timed (a fixed `batch` is timed alone).
        bench_repeats: timed rounds a batch.
        num_images: images of the comparison, rounded up to what fills a fixed batch.
        overwrite: whether `output`, if it is an older pipeline folder, is replaced.
        trust_remote_code: whether code in the pipeline's repository may run.

    Returns:
        `output`.

    Raises:
        EdgeDiTError: the pipeline cannot be loaded or is an export already, `output` is in the way, or a gate fails (the message
            has the measured error and the tolerance; nothing is written).
    """
    if format not in FORMATS:
        raise EdgeDiTError(f"format is {format!r}; the formats are {' and '.join(FORMATS)}.")
    target = FORMATS[format]
    batch = check_batch(target.default_batch if batch is None else batch, target.dynamic)
    if dtype not in target.schemes:
        raise EdgeDiTError(f"dtype is {dtype!r}; the format {format} exists as {', '.join(target.schemes)}.")
    output = Path(output)
    check_output(output, overwrite)
    source = str(pipeline) if isinstance(pipeline, (str, os.PathLike)) else None
    if source is not None:
        pipeline = load_pipeline(pipeline, trust_remote_code=trust_remote_code)
    model = pipeline.transformer
    if not isinstance(model, torch.nn.Module):
        raise EdgeDiTError(f"The transformer is a {type(model).__name__}, an export already; give the pipeline that it was made from.")
    config = plain_config(model)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with atomic_folder(output) as folder, TemporaryDirectory(dir=folder) as scratch:
            transformer = folder / "transformer"
            target.component(**config, precision=dtype, batch=batch).save_config(transformer)
            files, facts = target.lower(model, transformer / target.component.MODEL_FILE, Path(scratch), dtype, batch, opset)
            artefact = target.component.from_pretrained(transformer, num_threads=threads)
            found = verify.compare(pipeline, artefact, seed=seed, num_images=num_images)
            source_of = {
                "source": source,
                "genotype": Genotype.from_layers(config["layers"], config["hidden_size"]).hash,
                "weights": artefact.metadata["weights"],
            }
            atomic_write_json(folder / "verify.json", {**verify.check(found, target.schemes[dtype], tolerance), **source_of})
            batches = bench_batches if batch == "dynamic" else [batch]
            cost = verify.benchmark(model, files, batches, threads, bench_repeats, runtime=target.runtime)
            atomic_write_json(folder / "bench.json", {**cost, **facts, **source_of})
            with_transformer(pipeline, artefact).save_pretrained(folder)
    finally:
        torch.set_num_threads(before)
    return output


def check_output(output: Path, overwrite: bool) -> None:
    """An existing folder is replaced only if asked for, and only if it is a pipeline folder (or empty)."""
    if not output.exists():
        return
    if output.is_dir() and not any(output.iterdir()):
        return
    if not (output / "model_index.json").is_file():
        raise EdgeDiTError(f"{output} exists and is not a pipeline folder; it is left as it is. Choose another output.")
    if not overwrite:
        raise EdgeDiTError(f"{output} holds a pipeline already; choose another output, or allow overwriting it (--overwrite).")
