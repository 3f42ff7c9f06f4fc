"""`export_pipeline`: every network of a pipeline lowered, verified, timed and written as one folder; the same for every
format and both families.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..errors import EdgeDiTError
from ..files import atomic_folder, atomic_write_json, check_finite, versions, weights_hash
from ..genotype import Genotype
from ..pipelines.loading import load_pipeline, with_components
from ..quantization.layers import dequantize_model, quantized_weights
from ..quantization.weights import AffineWeight
from ..run.outputs import check_output
from ..runtimes.timing import environment
from . import verify
from .components import COMPONENTS, SUFFIXES, open_session, stem
from .contract import Artefact, set_schedule, write_contract
from .executorch.backends import NOT_RUN as BACKEND_NOT_RUN
from .executorch.backends import check_backend
from .executorch.lower import DEFAULT_BATCH, SCHEMES, lower_executorch
from .mixed import Form, choose_8bit, nearest_form, quantized_linears, xnnpack_weights
from .onnx.lowbit import GROUP, MIN_QUANTIZED_ELEMENTS
from .options import check_ranges
from .parts import Part, is_elastic, latent_size, pipeline_parts, text_lengths
from .schedule import NotLinearError
from .wrappers import check_batch, check_model, plain_config

Resolution = tuple[int, int] | str | None
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Options:
    """What an export asks of its format, beside the precision.

    Args:
        opset: ONNX operator set.
        open_sizes: sizes that stay open.
        scales: static int8 activations ([`ActivationScales`]) of the denoiser's layers; default: dynamic.
        given: low-bit weights to use as they are, by layer. keep_8bit: layers that a 4-bit export gives 8 bits.
        layers: the module whose layer names these use.
        quantized: Core ML: the packed weights of a quantised model, by layer.
        backend: ExecuTorch: who computes, `"xnnpack"`, `"coreml"` or `"qnn"`.
    """

    opset: int | None = None
    open_sizes: tuple[str, ...] = ()
    scales: Any = None
    given: Mapping[str, Any] = field(default_factory=dict)
    keep_8bit: tuple[str, ...] = ()
    layers: nn.Module | None = None
    quantized: Mapping[str, Any] = field(default_factory=dict)
    backend: str = "xnnpack"


@dataclass(frozen=True)
class Format:
    """One artefact format.

    Args:
        schemes: precision → what it means here, a key of `verify.TOLERANCE`.
        default_batch: rows of a forward of an export that states none.
        dynamic: whether sizes may stay open.
        lower: `(part, path, precision, facts, options)` writes a part; returns facts for bench.json.
        four_bits: what its runtime makes of a layer in 4 bits, given the low-bit weights to use as they are. smallest:
            weights of a layer that it quantises.
    """

    schemes: Mapping[str, str]
    default_batch: str | int
    dynamic: bool
    lower: Callable[[Part, Path, str, Mapping[str, str], Options], dict]
    four_bits: Callable[[Mapping[str, Any]], Form] | None = None
    smallest: int = MIN_QUANTIZED_ELEMENTS


def _lower_onnx(part: Part, path: Path, precision: str, facts: Mapping[str, str], options: Options) -> dict:
    from .onnx.lower import DEFAULT_OPSET, lower_onnx

    return lower_onnx(
        part,
        path,
        precision,
        facts,
        opset=DEFAULT_OPSET if options.opset is None else options.opset,
        open_sizes=options.open_sizes,
        scales=options.scales if part.name == "denoiser" else None,
        given=options.given,
        keep_8bit=options.keep_8bit,
        layers=options.layers,
    )


def _lower_executorch(part: Part, path: Path, precision: str, facts: Mapping[str, str], options: Options) -> dict:
    in_transformer = part.component == "transformer"
    given = (
        {name: weight for name, weight in options.given.items() if isinstance(weight, AffineWeight)}
        if in_transformer
        else None
    )
    kept = options.keep_8bit if in_transformer else ()
    return lower_executorch(part, path, precision, facts, keep_8bit=kept, affine=given, backend=options.backend)


def _lower_coreml(part: Part, path: Path, precision: str, facts: Mapping[str, str], options: Options) -> dict:
    from .coreml.lower import lower_coreml

    quantized = options.quantized if part.component == "transformer" else {}
    if quantized and precision != "fp32":
        precision = "fp16"  # of all that is not packed already
    return lower_coreml(part, path, precision, facts, quantized=quantized or None)


FORMATS = {
    "onnx": Format(
        {name: name for name in ("fp32", "fp16", "int8", "int4")}, "dynamic", True, _lower_onnx, nearest_form
    ),
    "executorch": Format(SCHEMES, DEFAULT_BATCH, False, _lower_executorch, xnnpack_weights, 1),
    "coreml": Format({name: name for name in ("fp32", "fp16", "int8", "int4")}, DEFAULT_BATCH, False, _lower_coreml),
}
ACTIVATIONS = ("dynamic", "static", "by-timestep")
WEIGHTS = ("nearest", "gptq")


def export_pipeline(
    pipeline: Any,
    output: str | os.PathLike,
    *,
    format: str = "onnx",
    dtype: str = "fp32",
    batch: str | int | None = None,
    split_conditioner: bool = False,
    subnet: str | None = None,
    resolution: Resolution = None,
    opset: int | None = None,
    tolerance: float | None = None,
    min_psnr_db: float | None = None,
    activations: str = "dynamic",
    weights: str = "nearest",
    backend: str = "xnnpack",
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    threads: int = 2,
    bench_batches: Sequence[int] = (2, 8),
    bench_repeats: int = 20,
    num_images: int = 8,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    inputs: Sequence[str | os.PathLike | None] = (),
) -> Path:
    """Export a pipeline: lower every network of it, verify and time the result, and write a pipeline folder around the
    artefacts.

    The folder holds model_index.json, scheduler/, tokenizers, and of every component config.json and the artefacts
    (`<component>/<format>/…`); verify.json, bench.json, for ExecuTorch delegation.json, and the port contract
    ([`contract.write_contract`]). It appears at once and complete, or, if a gate fails, not at all.

    Args:
        pipeline: an [`EdgeDiTPipeline`] or [`ElasticDiTPipeline`], a pipeline folder or a Hub id.
        output: folder to write.
        format: `"onnx"`, `"executorch"` or `"coreml"`.
        dtype: `"fp32"`, `"int8"` or `"int4"`, for ONNX and Core ML also `"fp16"`. Convolutions of a VAE stay at 16 bits
            or more, and text encoders have 8 bits in `"int4"`.
        batch: `"dynamic"` (ONNX's default), or the rows of a forward (default 2); guidance makes two an image.
        split_conditioner: write adaLN, a third of a DiT's weights, as an artefact of its own, which a schedule needs
            once.
        subnet: of an elastic supernet: which one (default: the active one, the full net).
        resolution: (height, width) in pixels; `"dynamic"` for an ONNX file of an EdgeDiT that takes any; default: what
            it was made for.
        opset: ONNX operator set, 18 or later.
        tolerance: largest relative error of a forward; default as in `verify.TOLERANCE`.
        min_psnr_db: least ratio of the images of the whole loop; default as in `verify.MIN_PSNR_DB`. In int4, layers
            get 8 bits, the most sensitive first, until it is reached.
        activations: of ONNX in int8: `"dynamic"`, `"static"` (calibrated on the pipeline's own samples) or
            `"by-timestep"` (a scale a bucket of timesteps).
        weights: of int4: `"nearest"`, or `"gptq"` (error-compensating, calibrated in the same way). A model that is
            quantised already keeps its own.
        backend: of ExecuTorch: `"xnnpack"`, or `"coreml"` or `"qnn"` where their SDKs are installed; the files of those
            two cannot be run here.
        prompts: of text to image: what is sampled to calibrate and to verify.
        seed: seed of the comparison's images.
        threads: threads of the comparison and the timing.
        bench_batches: batches that are timed (a fixed `batch` is timed alone).
        bench_repeats: timed rounds a batch.
        num_images: images of the comparison, rounded up to what fills a fixed batch.
        overwrite: whether `output`, if it is an older pipeline folder, is replaced.
        trust_remote_code: whether code in the pipeline's repository may run.
        inputs: further files of the user that `output` must not touch.

    Returns:
        `output`.

    Raises:
        EdgeDiTError: the pipeline cannot be loaded or is an export already, `output` is in the way, options do not fit
            the pipeline or the format, or a gate fails (the message has the measured error and the tolerance; nothing
            is written).
    """
    if format not in FORMATS:
        raise EdgeDiTError(f"format is {format!r}; the formats are {', '.join(FORMATS)}.")
    target = FORMATS[format]
    batch = check_batch(target.default_batch if batch is None else batch, target.dynamic)
    if dtype not in target.schemes:
        raise EdgeDiTError(f"dtype is {dtype!r}; the format {format} exists as {', '.join(target.schemes)}.")
    _check_options(format, dtype, opset, activations, weights, resolution, backend)
    numbers = {
        "opset": opset,
        "tolerance": tolerance,
        "min_psnr": min_psnr_db,
        "images": num_images,
        "threads": threads,
        "seed": seed,
    }
    check_ranges(**numbers, batch=None if batch == "dynamic" else batch)
    for side in resolution if isinstance(resolution, tuple) else ():
        check_ranges(resolution=side)
    source = str(pipeline) if isinstance(pipeline, (str, os.PathLike)) else None
    check_output(output, [source, *inputs], overwrite=overwrite)
    output = Path(output)
    if source is not None:
        pipeline = load_pipeline(
            pipeline, trust_remote_code=trust_remote_code, kind=("EdgeDiTPipeline", "ElasticDiTPipeline")
        )
    if not isinstance(pipeline.transformer, nn.Module):
        raise EdgeDiTError(
            f"The transformer is a {type(pipeline.transformer).__name__}, an export already; give the pipeline that it "
            "was made from."
        )
    if hasattr(pipeline.transformer, "_orig_mod"):  # compiled: its weights would have other names
        pipeline = with_components(pipeline, transformer=pipeline.transformer._orig_mod)
    pipeline, subnet = _with_subnet(pipeline, subnet)
    plain, packed = _plain(pipeline)
    check_finite(
        plain.transformer.state_dict(), "The pipeline's transformer", "nothing was written. Export a sound checkpoint."
    )
    open_size = resolution == "dynamic"
    if open_size and is_elastic(pipeline):
        raise EdgeDiTError(
            "The resolution is 'dynamic', but an elastic DiT cuts its tokens into strips of a fixed number; export it "
            "once a resolution."
        )
    size = latent_size(plain, None if open_size else resolution)
    job = _Job(plain, target, format, dtype, batch, split_conditioner, subnet, None if open_size else size)
    set_schedule(plain, size)
    parts = pipeline_parts(
        plain,
        split=split_conditioner,
        size=_other(size, plain) if open_size else size,
        batch=job.rows,
        images=job.images,
    )
    options = Options(
        opset=opset, open_sizes=job.open_sizes, quantized=packed, backend=backend, layers=plain.transformer
    )
    if is_elastic(pipeline) and batch != "dynamic":
        prompts = prompts_that_fit(plain, prompts)
    asked = {"seed": seed, "num_images": num_images, "prompts": prompts}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with atomic_folder(output) as folder:
            facts = {"source": source, **job.identity()}
            if format == "coreml" or backend != "xnnpack":
                said = job.write(folder, parts, options)
                save_without_networks(plain, folder)
                facts |= job.contract(folder, parts, said, options, asked, None)
                checked = job.interpreted(folder, parts, said, tolerance) if format == "coreml" else {}
                reason = NOT_RUN if format == "coreml" else BACKEND_NOT_RUN[backend]
                atomic_write_json(
                    folder / "verify.json",
                    {"precision": dtype, "passed": None, "parts": checked, "not_run": reason, **facts},
                )
                atomic_write_json(folder / "bench.json", {"parts": said, "environment": environment(threads), **facts})
                return output
            if packed and dtype in ("int8", "int4"):
                options = replace(options, given=packed)
            options = _calibrated(plain, options, format, dtype, activations, weights, seed, prompts)
            said, verified, exported = job.write_verified(
                folder, parts, options, pipeline, asked, tolerance, min_psnr_db, threads
            )
            exported.save_pretrained(folder)
            facts |= job.contract(folder, parts, said, options, asked, threads)
            atomic_write_json(folder / "verify.json", {**verified, **facts})
            batches = bench_batches if batch == "dynamic" else [batch]
            cost = job.cost(folder, parts, said, options, batches, threads, bench_repeats)
            atomic_write_json(folder / "bench.json", {**cost, **facts})
            delegation = {file: entry["delegation"] for file, entry in said.items() if "delegation" in entry}
            if delegation:
                atomic_write_json(folder / "delegation.json", delegation)
    finally:
        torch.set_num_threads(before)
    return output


NOT_RUN = (
    "Core ML runs on Apple's systems only, so the packages were not run. The errors are those of the saved programs, "
    "interpreted operator by operator in PyTorch with their declared types, for example inputs."
)


def _check_options(
    format: str, dtype: str, opset: int | None, activations: str, weights: str, resolution: Resolution, backend: str
) -> None:
    """Raise unless the options exist and go together."""
    if backend != "xnnpack":
        if format != "executorch":
            raise EdgeDiTError(f"backend is {backend!r}; backends belong to ExecuTorch. Leave it out for {format}.")
        check_backend(backend, dtype)
    if opset is not None and format != "onnx":
        raise EdgeDiTError(f"opset is {opset}; operator sets belong to ONNX. Leave it out for {format}.")
    if activations not in ACTIVATIONS:
        raise EdgeDiTError(f"activations is {activations!r}; it may be {', '.join(ACTIVATIONS)}.")
    if activations != "dynamic" and (format, dtype) != ("onnx", "int8"):
        raise EdgeDiTError(
            f"activations is {activations!r}, but the export is {format} {dtype}; calibrated activations are for onnx "
            "int8."
        )
    if weights not in WEIGHTS:
        raise EdgeDiTError(f"weights is {weights!r}; it may be {', '.join(WEIGHTS)}.")
    if weights != "nearest" and (dtype != "int4" or format == "coreml"):
        raise EdgeDiTError(
            f"weights is {weights!r}, but the export is {format} {dtype}; compensated rounding is for onnx and "
            "executorch int4."
        )
    if resolution == "dynamic" and format != "onnx":
        raise EdgeDiTError(
            f"The resolution is 'dynamic', but {format} files are made for one size; give HxW, or export to onnx."
        )


def _with_subnet(pipeline: Any, subnet: str | None) -> tuple[Any, str | None]:
    """The pipeline around one stand-alone network, and the name of the sub-network it was."""
    if not is_elastic(pipeline):
        if subnet is not None:
            raise EdgeDiTError(f"subnet is {subnet!r}, but the pipeline's network is not elastic; leave it out.")
        return pipeline, None
    model = pipeline.transformer
    if model.active_subnet is None:
        if subnet is not None:
            raise EdgeDiTError(f"subnet is {subnet!r}, but the pipeline's network is a stand-alone net; leave it out.")
        return pipeline, None
    if subnet is not None and subnet not in model.subnet_names:
        raise EdgeDiTError(f"subnet is {subnet!r}; this net has {', '.join(model.subnet_names)}.")
    name = subnet or model.active_subnet
    return with_components(pipeline, transformer=model.extract_subnet(name)), name


def _plain(pipeline: Any) -> tuple[Any, dict[str, Any]]:
    """The pipeline with plain float32 weights, and the packed weights of a quantised transformer by layer."""
    packed = quantized_weights(pipeline.transformer)
    if packed:
        model = copy.deepcopy(pipeline.transformer)
        dequantize_model(model, torch.float32)
        pipeline = with_components(pipeline, transformer=model)
    check_model(pipeline.transformer)
    return pipeline, packed


def _other(size: tuple[int, int], pipeline: Any) -> tuple[int, int]:
    """A size of latents that the network was not made for: an example of it keeps the exporter from fixing the native
    positions.
    """
    patch = pipeline.transformer.config.patch_size
    return size[0] + 2 * patch, size[1] + 4 * patch


def _calibrated(
    pipeline: Any,
    options: Options,
    format: str,
    dtype: str,
    activations: str,
    weights: str,
    seed: int,
    prompts: Sequence[str] | None,
) -> Options:
    """The options with what is measured on the pipeline's own samples: activation scales, or compensated 4-bit
    weights.
    """
    if activations == "dynamic" and weights == "nearest":
        return options
    from ..quantization.activations import activation_scales
    from ..quantization.calibration import input_ranges, record, second_moments
    from ..quantization.gptq import gptq

    model = pipeline.transformer
    layers = [name for name in quantized_linears(model) if name not in options.given]
    calls = record(pipeline, CALIBRATION_IMAGES, seed=seed, prompts=list(prompts or verify.PROMPTS)).calls
    if activations != "dynamic":
        # The first layer sees the sample itself, where one value (a background's) may fill half of it: its rounding
        # error would be the same everywhere.
        timesteps, ranges = input_ranges(model, calls, [name for name in layers if name != "patch_embed"])
        used = {
            name: bounds for name, bounds in ranges.items() if torch.isfinite(bounds).all()
        }  # side blocks are never called
        buckets = min(BUCKETS, len(timesteps)) if activations == "by-timestep" else 1
        return replace(options, scales=activation_scales(timesteps, used, buckets))
    given = dict(options.given)
    for name in layers:  # one at a time: the moments of all layers of a large network would not fit
        moments = second_moments(model, calls, [name])[name]
        given[name] = gptq(model.get_submodule(name).weight, moments, 4, GROUP, symmetric=True)
    return replace(options, given=given)


CALIBRATION_IMAGES = 16
EIGHT_BIT_ATTEMPTS = 3
BUCKETS = 8  # of timesteps, each with activation scales of its own


def extra_inputs(part: Part, options: Options) -> dict[str, torch.Tensor]:
    """Examples of what a file takes beside the part's own inputs: a split denoiser with activation scales by timestep
    is told the timestep.
    """
    if (
        part.name != "denoiser"
        or "timestep" in part.inputs
        or options.scales is None
        or options.scales.num_buckets == 1
    ):
        return {}
    return {"timestep": torch.full((len(part.inputs["sample"]),), 500.0)}


@dataclass(frozen=True)
class _Job:
    """One export: what its steps share."""

    pipeline: Any  # with plain weights
    target: Format
    format: str
    dtype: str
    batch: str | int
    split: bool
    subnet: str | None
    size: tuple[int, int] | None  # of the latents; `None`: any

    @property
    def rows(self) -> int:
        """Rows of the denoiser's examples: torch.export would freeze an open batch of 0 or 1."""
        return 2 if self.batch == "dynamic" else int(self.batch)

    @property
    def images(self) -> int:
        """Images of the VAE's and prompts of the text encoders' examples."""
        return 2 if self.batch == "dynamic" else 1

    @property
    def open_sizes(self) -> tuple[str, ...]:
        """Sizes that stay open."""
        if self.batch != "dynamic":
            return ()
        sizes = (
            "batch",
            "tokens",
            *(f"tokens_{index}" for index in range(len(self.pipeline.transformer.config.get("text_dims") or ()))),
        )
        if self.size is None:
            sizes += (
                "height",
                "width",
                *(f"{name}_{side}" for name in ("latents", "image") for side in ("height", "width")),
            )
        return sizes

    def identity(self) -> dict[str, Any]:
        """What is exported: the weights' hash and, of an EdgeDiT, the genotype's."""
        config = plain_config(self.pipeline.transformer)
        said: dict[str, Any] = {"weights": weights_hash(self.pipeline.transformer.state_dict())}
        if "layers" in config:
            said["genotype"] = Genotype.of(config).hash
        if self.subnet is not None:
            said["subnet"] = self.subnet
        return said

    def configs(self) -> dict[str, dict[str, Any]]:
        """config.json of every component that becomes an artefact."""
        pipeline, export = self.pipeline, {"precision": self.dtype, "batch": self.batch}
        model = {
            **plain_config(pipeline.transformer),
            **export,
            "split": self.split,
            "size": None if self.size is None else list(self.size),
        }
        if is_elastic(pipeline):
            model |= {"subnet": self.subnet, "text_tokens": None if self.batch == "dynamic" else text_lengths(pipeline)}
        configs = {"transformer": model}
        images = {"precision": self.dtype, "batch": "dynamic" if self.batch == "dynamic" else self.images}
        if pipeline.vae is not None:
            configs["vae"] = {**plain_config(pipeline.vae), **images, "size": model["size"]}
        if is_elastic(pipeline):
            for name, tokens in zip(TEXT_ENCODERS, text_lengths(pipeline)):
                encoder = getattr(pipeline, name)
                if encoder is not None:
                    vocabulary = encoder.get_input_embeddings().num_embeddings
                    added = {**images, "tokens": None if self.batch == "dynamic" else tokens, "vocabulary": vocabulary}
                    configs[name] = {
                        **json.loads(encoder.config.to_json_string(use_diff=False)),
                        "edgedit_export": added,
                    }
        return configs

    def facts(self, component: str) -> dict[str, str]:
        """What the files of a component say about themselves, as text."""
        module = getattr(self.pipeline, component)
        config = json.loads(module.config.to_json_string()) if component in TEXT_ENCODERS else plain_config(module)
        said = {
            "config": json.dumps(config, sort_keys=True),
            "weights": weights_hash(module.state_dict()),
            "precision": self.dtype,
            "batch": str(self.batch),
            "versions": json.dumps(versions()),
        }
        if "layers" in config and "hidden_size" in config and component == "transformer":
            said["genotype"] = Genotype.of(config).to_json()
        if self.subnet is not None and component == "transformer":
            said["subnet"] = self.subnet
        return said

    def precision(self, part: Part) -> str:
        """The precision that is asked of a part: text encoders run once an image and steer all of it, so that they have
        8 bits in int4.
        """
        return "int8" if self.dtype == "int4" and part.component in TEXT_ENCODERS else self.dtype

    def file(self, part: Part) -> str:
        """Where a part's artefact stands within the export."""
        return f"{part.component}/{self.format}/{stem(part.name)}{SUFFIXES[self.format]}"

    def write(self, folder: Path, parts: Sequence[Part], options: Options) -> dict[str, dict]:
        """Lower every part. Returns what each lowering says, by the artefact's file."""
        facts = {component: self.facts(component) for component in {part.component for part in parts}}
        said = {}
        for part in parts:
            path = folder / self.file(part)
            path.parent.mkdir(parents=True, exist_ok=True)
            precision = self.precision(part)
            said[self.file(part)] = self.target.lower(
                part, path, precision, {**facts[part.component], "part": part.name}, options
            )
        return said

    def load(self, folder: Path, threads: int) -> Any:
        """The pipeline around the artefacts in `folder`."""
        loaded = {}
        for component, config in self.configs().items():
            kind = (
                "vae"
                if component == "vae"
                else "text_encoder"
                if component in TEXT_ENCODERS
                else "elastic"
                if is_elastic(self.pipeline)
                else "edgedit"
            )
            cls = COMPONENTS[self.format, kind]
            cls(**config).save_config(folder / component)
            loaded[component] = cls.from_pretrained(folder / component, num_threads=threads)
        return with_components(self.pipeline, **loaded)

    def write_verified(
        self,
        folder: Path,
        parts: Sequence[Part],
        options: Options,
        eager: Any,
        asked: Mapping[str, Any],
        tolerance: float | None,
        min_psnr_db: float | None,
        threads: int,
    ) -> tuple[dict, dict, Any]:
        """Lower, load back and compare. Returns what the lowerings say, what verify.json holds, and the exported
        pipeline.
        """
        scheme = self.target.schemes[self.dtype]
        least = verify.MIN_PSNR_DB[scheme] if min_psnr_db is None else min_psnr_db
        goal = least
        for _ in range(EIGHT_BIT_ATTEMPTS):
            if self.dtype == "int4":
                form = self.target.four_bits(options.given)
                kept = choose_8bit(
                    self.pipeline,
                    form,
                    goal,
                    smallest=self.target.smallest,
                    seed=asked["seed"],
                    prompts=asked["prompts"],
                )
                options = replace(options, keep_8bit=tuple(kept))
            given = {name: weight for name, weight in options.given.items() if name not in options.keep_8bit}
            said = self.write(folder, parts, replace(options, given=given))
            exported = self.load(folder, threads)
            found = verify.compare(eager, exported, **asked)
            if self.dtype != "int4" or not found["finite"] or found["psnr_db"] is None or found["psnr_db"] >= least:
                break
            goal += (
                least - found["psnr_db"] + 0.5
            )  # kernels round a little differently than the simulation: ask for more
        found = verify.check(found, scheme, tolerance, min_psnr_db)
        if self.dtype == "int4":
            found["layers_of_8_bits"] = list(options.keep_8bit)
        checked = {}
        for part in parts:
            if part.name == "denoiser":
                continue
            file = self.file(part)
            precision = self.target.schemes[said[file].get("precision", self.precision(part))]
            session = open_session(folder / file, self.format, threads)
            checked[file] = verify.check_part(part, precision, verify.compare_part(part, session))
        return said, {**found, "parts": checked}, exported

    def interpreted(
        self, folder: Path, parts: Sequence[Part], said: Mapping[str, dict], tolerance: float | None
    ) -> dict[str, dict]:
        """The gate of Core ML packages, which cannot be run here: their programs, read back and interpreted
        ([`mil.run_package`]).
        """
        from .coreml.mil import run_package

        checked = {}
        for part in parts:
            file = self.file(part)
            precision = self.target.schemes[said[file]["precision"]]
            # A model that is quantised already is compared with its own unpacked weights.
            session = SimpleNamespace(run=lambda inputs, file=file: list(run_package(folder / file, inputs).values()))
            checked[file] = verify.check_part(part, precision, verify.compare_part(part, session), tolerance)
        return checked

    def contract(
        self,
        folder: Path,
        parts: Sequence[Part],
        said: Mapping[str, dict],
        options: Options,
        asked: Mapping[str, Any],
        threads: int | None,
    ) -> dict[str, str]:
        """Write the port contract, with the artefacts' own outputs as its reference (`threads` of their runtime) or,
        where they cannot be run (`None`), the eager network's. Returns nothing, or why there is none: a scheduler that
        adds noise is not numbers alone.
        """
        sessions: dict[str, Any] = {}

        def run(artefact: Artefact, inputs: Mapping[str, Any]) -> dict[str, Any]:
            if artefact.file not in sessions:
                sessions[artefact.file] = open_session(folder / artefact.file, self.format, threads)
            found = sessions[artefact.file].run({name: torch.from_numpy(value) for name, value in inputs.items()})
            return dict(zip(artefact.part.outputs, (value.numpy() for value in found)))

        artefacts = []
        for part in parts:
            entry = said[self.file(part)]
            precision = "fp32" if entry.get("scheme") == "fp32" else entry.get("precision", self.precision(part))
            artefacts.append(
                Artefact(part, self.file(part), precision, options.open_sizes, extra_inputs(part, options))
            )
        prompts = asked["prompts"]
        try:
            write_contract(
                folder,
                self.pipeline,
                artefacts,
                format=self.format,
                precision=self.dtype,
                split=self.split,
                seed=asked["seed"],
                prompt=prompts[0] if prompts else verify.PROMPTS[0],
                run=None if threads is None else run,
            )
        except NotLinearError as error:
            return {"contract": f"none was written: {error}"}
        return {}

    def cost(
        self,
        folder: Path,
        parts: Sequence[Part],
        said: Mapping[str, dict],
        options: Options,
        batches: Sequence[int],
        threads: int,
        repeats: int,
    ) -> dict:
        """What bench.json holds: the denoiser's cost, and under `parts` that of every other artefact."""
        found: dict[str, Any] = {}
        others = {}
        for part in parts:
            file = self.file(part)
            rows = batches if part.component == "transformer" else [self.images]
            measured = verify.benchmark(
                part,
                {self.precision(part): folder / file},
                self.format,
                rows,
                threads,
                repeats,
                extra=extra_inputs(part, options),
            )
            if part.name == "denoiser":
                found = {**measured, **said[file]}
            else:
                others[file] = {**measured, **said[file]}
        return {**found, "parts": others}


def prompts_that_fit(pipeline: Any, prompts: Sequence[str] | None) -> list[str]:
    """Prompts for files whose number of tokens is fixed: the given ones, or the beginnings of the usual ones that fit.

    Raises:
        EdgeDiTError: a given prompt has more tokens than the files take.
    """
    limits = [
        (pipeline.components.get(name), length)
        for name, length in zip(("tokenizer", "tokenizer_2"), text_lengths(pipeline))
    ]

    def excess(prompt: str) -> tuple[int, int] | None:
        counts = [
            (len(tokenizer(prompt, verbose=False).input_ids), length)
            for tokenizer, length in limits
            if tokenizer is not None
        ]
        return next(((count, length) for count, length in counts if count > length), None)

    for prompt in prompts or ():
        over = excess(prompt)
        if over is not None:
            raise EdgeDiTError(
                f"The prompt {prompt!r} has {over[0]} tokens, but files of a fixed batch take {over[1]}; shorten it, "
                "or leave --batch dynamic."
            )
    if prompts:
        return list(prompts)
    found = []
    for prompt in verify.PROMPTS:
        words = prompt.split()
        while len(words) > 1 and excess(" ".join(words)) is not None:
            words.pop()
        found.append(" ".join(words))
    return found


def save_without_networks(pipeline: Any, folder: Path) -> None:
    """The parts of a pipeline's folder that are no networks: scheduler and tokenizers."""
    for name in ("scheduler", "tokenizer", "tokenizer_2"):
        component = pipeline.components.get(name)
        if component is not None:
            component.save_pretrained(folder / name)
