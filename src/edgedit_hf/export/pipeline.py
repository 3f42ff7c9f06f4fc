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
from ..runtimes.sessions import open_session
from ..runtimes.timing import environment
from . import verify
from .components import COMPONENTS
from .contract import Artefact, set_schedule, write_contract
from .executorch.lower import lower_executorch
from .exported import stem
from .formats import ExportOptions
from .mixed import Form, choose_8bit, nearest_form, quantized_linears, xnnpack_weights
from .onnx.lowbit import GROUP, MIN_QUANTIZED_ELEMENTS
from .parts import Part, is_elastic, latent_size, pipeline_parts, text_lengths
from .schedule import NotLinearError
from .wrappers import check_model, plain_config

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Lowering:
    """What an export asks of a lowering, beside the precision.

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


def _lower_onnx(part: Part, path: Path, precision: str, facts: Mapping[str, str], lowering: Lowering) -> dict:
    from .onnx.lower import DEFAULT_OPSET, lower_onnx

    return lower_onnx(
        part,
        path,
        precision,
        facts,
        opset=DEFAULT_OPSET if lowering.opset is None else lowering.opset,
        open_sizes=lowering.open_sizes,
        scales=lowering.scales if part.name == "denoiser" else None,
        given=lowering.given,
        keep_8bit=lowering.keep_8bit,
        layers=lowering.layers,
    )


def _lower_executorch(part: Part, path: Path, precision: str, facts: Mapping[str, str], lowering: Lowering) -> dict:
    in_transformer = part.component == "transformer"
    given = (
        {name: weight for name, weight in lowering.given.items() if isinstance(weight, AffineWeight)}
        if in_transformer
        else None
    )
    kept = lowering.keep_8bit if in_transformer else ()
    return lower_executorch(part, path, precision, facts, keep_8bit=kept, affine=given, backend=lowering.backend)


def _lower_coreml(part: Part, path: Path, precision: str, facts: Mapping[str, str], lowering: Lowering) -> dict:
    from .coreml.lower import lower_coreml

    quantized = lowering.quantized if part.component == "transformer" else {}
    if quantized and precision != "fp32":
        precision = "fp16"  # of all that is not packed already
    return lower_coreml(part, path, precision, facts, quantized=quantized or None)


LOWER: dict[str, Callable[[Part, Path, str, Mapping[str, str], Lowering], dict]] = {
    "onnx": _lower_onnx,
    "executorch": _lower_executorch,
    "coreml": _lower_coreml,
}
# What the runtime makes of a layer in 4 bits, given the low-bit weights to use as they are, and the least weights of a
# layer that it quantises.
FOUR_BITS: dict[str, tuple[Callable[[Mapping[str, Any]], Form], int]] = {
    "onnx": (nearest_form, MIN_QUANTIZED_ELEMENTS),
    "executorch": (xnnpack_weights, 1),
}


def export_pipeline(pipeline: Any, output: str | os.PathLike, options: ExportOptions | None = None) -> Path:
    """Export a pipeline: lower every network of it, verify and time the result, and write a pipeline folder around the
    artefacts.

    The folder holds model_index.json, scheduler/, tokenizers, and of every component config.json and the artefacts
    (`<component>/<format>/…`); verify.json, bench.json, for ExecuTorch delegation.json, and the port contract
    ([`contract.write_contract`]). It appears at once and complete, or, if a gate fails, not at all.

    Args:
        pipeline: an [`EdgeDiTPipeline`] or [`ElasticDiTPipeline`], a pipeline folder or a Hub id.
        output: folder to write.
        options: what is asked; default: ONNX in fp32.

    Returns:
        `output`.

    Raises:
        EdgeDiTError: the pipeline cannot be loaded or is an export already, `output` is in the way, options do not fit
            the pipeline, or a gate fails (the message has the measured error and the tolerance; nothing is written).
    """
    options = ExportOptions() if options is None else options
    source = str(pipeline) if isinstance(pipeline, (str, os.PathLike)) else None
    check_output(output, [source, *options.inputs], overwrite=options.overwrite)
    output = Path(output)
    if source is not None:
        pipeline = load_pipeline(
            pipeline,
            trust_remote_code=options.trust_remote_code,
            kind=("EdgeDiTPipeline", "ElasticDiTPipeline"),
        )
    if not isinstance(pipeline.transformer, nn.Module):
        raise EdgeDiTError(
            f"The transformer is a {type(pipeline.transformer).__name__}, an export already; give the pipeline that it "
            "was made from."
        )
    if hasattr(pipeline.transformer, "_orig_mod"):  # compiled: its weights would have other names
        pipeline = with_components(pipeline, transformer=pipeline.transformer._orig_mod)
    pipeline, subnet = _with_subnet(pipeline, options.subnet)
    plain, packed = _plain(pipeline)
    check_finite(
        plain.transformer.state_dict(), "The pipeline's transformer", "nothing was written. Export a sound checkpoint."
    )
    open_size = options.resolution == "dynamic"
    if open_size and is_elastic(pipeline):
        raise EdgeDiTError(
            "The resolution is 'dynamic', but an elastic DiT cuts its tokens into strips of a fixed number; export it "
            "once a resolution."
        )
    size = latent_size(plain, None if open_size else options.resolution)
    if is_elastic(pipeline) and options.batch != "dynamic":
        options = replace(options, prompts=prompts_that_fit(plain, options.prompts))
    job = Job(plain, options, subnet, None if open_size else size)
    set_schedule(plain, size)
    parts = pipeline_parts(
        plain,
        split=options.split_conditioner,
        size=_other(size, plain) if open_size else size,
        batch=job.rows,
        images=job.images,
    )
    lowering = Lowering(
        opset=options.opset,
        open_sizes=job.open_sizes,
        quantized=packed,
        backend=options.backend,
        layers=plain.transformer,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        with atomic_folder(output) as folder:
            facts = {"source": source, **job.identity()}
            if options.not_run:
                job.write_unverified(folder, parts, lowering, facts)
            else:
                if packed and options.dtype in ("int8", "int4"):
                    lowering = replace(lowering, given=packed)
                job.write_verified(folder, parts, _calibrated(plain, lowering, options), pipeline, facts)
    finally:
        torch.set_num_threads(before)
    return output


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


def _calibrated(pipeline: Any, lowering: Lowering, options: ExportOptions) -> Lowering:
    """The lowering with what is measured on the pipeline's own samples: activation scales, or compensated 4-bit
    weights.
    """
    if options.activations == "dynamic" and options.weights == "nearest":
        return lowering
    from ..quantization.activations import activation_scales
    from ..quantization.calibration import input_ranges, record, second_moments
    from ..quantization.gptq import gptq

    model = pipeline.transformer
    layers = [name for name in quantized_linears(model) if name not in lowering.given]
    calls = record(
        pipeline, CALIBRATION_IMAGES, seed=options.seed, prompts=list(options.prompts or verify.PROMPTS)
    ).calls
    if options.activations != "dynamic":
        # The first layer sees the sample itself, where one value (a background's) may fill half of it: its rounding
        # error would be the same everywhere.
        timesteps, ranges = input_ranges(model, calls, [name for name in layers if name != "patch_embed"])
        used = {
            name: bounds for name, bounds in ranges.items() if torch.isfinite(bounds).all()
        }  # side blocks are never called
        buckets = min(BUCKETS, len(timesteps)) if options.activations == "by-timestep" else 1
        return replace(lowering, scales=activation_scales(timesteps, used, buckets))
    given = dict(lowering.given)
    for name in layers:  # one at a time: the moments of all layers of a large network would not fit
        moments = second_moments(model, calls, [name])[name]
        given[name] = gptq(model.get_submodule(name).weight, moments, 4, GROUP, symmetric=True)
    return replace(lowering, given=given)


CALIBRATION_IMAGES = 16
EIGHT_BIT_ATTEMPTS = 3
BUCKETS = 8  # of timesteps, each with activation scales of its own


def extra_inputs(part: Part, lowering: Lowering) -> dict[str, torch.Tensor]:
    """Examples of what a file takes beside the part's own inputs: a split denoiser with activation scales by timestep
    is told the timestep.
    """
    if (
        part.name != "denoiser"
        or "timestep" in part.inputs
        or lowering.scales is None
        or lowering.scales.num_buckets == 1
    ):
        return {}
    return {"timestep": torch.full((len(part.inputs["sample"]),), 500.0)}


@dataclass(frozen=True)
class Job:
    """One export: what its steps share."""

    pipeline: Any  # with plain weights
    options: ExportOptions
    subnet: str | None
    size: tuple[int, int] | None  # of the latents; `None`: any

    @property
    def rows(self) -> int:
        """Rows of the denoiser's examples: torch.export would freeze an open batch of 0 or 1."""
        return 2 if self.options.batch == "dynamic" else int(self.options.batch)

    @property
    def images(self) -> int:
        """Images of the VAE's and prompts of the text encoders' examples."""
        return 2 if self.options.batch == "dynamic" else 1

    @property
    def open_sizes(self) -> tuple[str, ...]:
        """Sizes that stay open."""
        if self.options.batch != "dynamic":
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
        pipeline, export = self.pipeline, {"precision": self.options.dtype, "batch": self.options.batch}
        model = {
            **plain_config(pipeline.transformer),
            **export,
            "split": self.options.split_conditioner,
            "size": None if self.size is None else list(self.size),
        }
        if is_elastic(pipeline):
            model |= {
                "subnet": self.subnet,
                "text_tokens": None if self.options.batch == "dynamic" else text_lengths(pipeline),
            }
        configs = {"transformer": model}
        images = {
            "precision": self.options.dtype,
            "batch": "dynamic" if self.options.batch == "dynamic" else self.images,
        }
        if pipeline.vae is not None:
            configs["vae"] = {**plain_config(pipeline.vae), **images, "size": model["size"]}
        if is_elastic(pipeline):
            for name, tokens in zip(TEXT_ENCODERS, text_lengths(pipeline)):
                encoder = getattr(pipeline, name)
                if encoder is not None:
                    vocabulary = encoder.get_input_embeddings().num_embeddings
                    added = {
                        **images,
                        "tokens": None if self.options.batch == "dynamic" else tokens,
                        "vocabulary": vocabulary,
                    }
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
            "precision": self.options.dtype,
            "batch": str(self.options.batch),
            "versions": json.dumps(versions()),
        }
        if "layers" in config and "hidden_size" in config and component == "transformer":
            said["genotype"] = Genotype.of(config).to_json()
        if self.subnet is not None and component == "transformer":
            said["subnet"] = self.subnet
        return said

    def dtype_of(self, part: Part) -> str:
        """The precision that is asked of a part: text encoders run once an image and steer all of it, so that they have
        8 bits in int4.
        """
        dtype = self.options.dtype
        return "int8" if dtype == "int4" and part.component in TEXT_ENCODERS else dtype

    def file(self, part: Part) -> str:
        """Where a part's artefact stands within the export."""
        return f"{part.component}/{self.options.format}/{stem(part.name)}{self.options.target.suffix}"

    def write(self, folder: Path, parts: Sequence[Part], lowering: Lowering) -> dict[str, dict]:
        """Lower every part. Returns what each lowering says, by the artefact's file."""
        facts = {component: self.facts(component) for component in {part.component for part in parts}}
        said = {}
        for part in parts:
            path = folder / self.file(part)
            path.parent.mkdir(parents=True, exist_ok=True)
            lower = LOWER[self.options.format]
            said[self.file(part)] = lower(
                part, path, self.dtype_of(part), {**facts[part.component], "part": part.name}, lowering
            )
        return said

    def load(self, folder: Path) -> Any:
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
            cls = COMPONENTS[self.options.format, kind]
            cls(**config).save_config(folder / component)
            loaded[component] = cls.from_pretrained(folder / component, num_threads=self.options.threads)
        return with_components(self.pipeline, **loaded)

    def write_verified(
        self, folder: Path, parts: Sequence[Part], lowering: Lowering, eager: Any, facts: Mapping[str, Any]
    ) -> None:
        """Lower, load back, compare and time: the whole export.

        Args:
            eager: the pipeline as it was given, which the artefacts are compared with.
            facts: what verify.json and bench.json say beside.
        """
        options = self.options
        said, verified, lowering = self.lower_until_good(folder, parts, lowering, eager)
        facts = {**facts, **self.contract(folder, parts, said, lowering, options.threads)}
        atomic_write_json(folder / "verify.json", {**verified, **facts})
        atomic_write_json(folder / "bench.json", {**self.cost(folder, parts, said, lowering), **facts})
        delegation = {file: entry["delegation"] for file, entry in said.items() if "delegation" in entry}
        if delegation:
            atomic_write_json(folder / "delegation.json", delegation)

    def write_unverified(
        self, folder: Path, parts: Sequence[Part], lowering: Lowering, facts: Mapping[str, Any]
    ) -> None:
        """The whole export of artefacts that cannot be run here."""
        options = self.options
        said = self.write(folder, parts, lowering)
        save_without_networks(self.pipeline, folder)
        facts = {**facts, **self.contract(folder, parts, said, lowering, None)}
        checked = self.interpreted(folder, parts, said) if options.format == "coreml" else {}
        verified = {"precision": options.dtype, "passed": None, "parts": checked, "not_run": options.not_run}
        atomic_write_json(folder / "verify.json", {**verified, **facts})
        atomic_write_json(folder / "bench.json", {"parts": said, "environment": environment(options.threads), **facts})

    def lower_until_good(
        self, folder: Path, parts: Sequence[Part], lowering: Lowering, eager: Any
    ) -> tuple[dict, dict, Lowering]:
        """Lower, load back and compare; in int4 with as many layers of 8 bits as the images need. The exported pipeline
        is in `folder` then.

        Returns:
            what the lowerings say, what verify.json holds, and the lowering that was good.
        """
        options, precision = self.options, self.options.precision
        asked = {"seed": options.seed, "num_images": options.num_images, "prompts": options.prompts}
        least = precision.min_psnr_db if options.min_psnr_db is None else options.min_psnr_db
        goal = least
        for _ in range(EIGHT_BIT_ATTEMPTS):
            if options.dtype == "int4":
                form, smallest = FOUR_BITS[options.format]
                kept = choose_8bit(
                    self.pipeline,
                    form(lowering.given),
                    goal,
                    smallest=smallest,
                    seed=options.seed,
                    prompts=options.prompts,
                )
                lowering = replace(lowering, keep_8bit=tuple(kept))
            given = {name: weight for name, weight in lowering.given.items() if name not in lowering.keep_8bit}
            said = self.write(folder, parts, replace(lowering, given=given))
            exported = self.load(folder)
            found = verify.compare(eager, exported, **asked)
            if options.dtype != "int4" or not found["finite"] or found["psnr_db"] is None or found["psnr_db"] >= least:
                break
            goal += (
                least - found["psnr_db"] + 0.5
            )  # kernels round a little differently than the simulation: ask for more
        found = verify.check(found, precision.name, options.tolerance, options.min_psnr_db)
        if options.dtype == "int4":
            found["layers_of_8_bits"] = list(lowering.keep_8bit)
        checked = {}
        for part in parts:
            if part.name == "denoiser":
                continue
            file = self.file(part)
            outputs = open_session(folder / file, options.threads).run(part.inputs)
            error = verify.compare_part(part, outputs)
            checked[file] = verify.check_part(part, self.precision_of(part, said), error)
        exported.save_pretrained(folder)
        return said, {**found, "parts": checked}, lowering

    def precision_of(self, part: Part, said: Mapping[str, dict]) -> str:
        """The precision that a part's lowering says it has, as its runtime calls it."""
        dtype = said[self.file(part)].get("precision", self.dtype_of(part))
        return self.options.target.precisions[dtype].name

    def interpreted(self, folder: Path, parts: Sequence[Part], said: Mapping[str, dict]) -> dict[str, dict]:
        """The gate of Core ML packages, which cannot be run here: their programs, read back and interpreted
        ([`mil.run_package`]).
        """
        from .coreml.mil import run_package

        checked = {}
        for part in parts:
            file = self.file(part)
            # A model that is quantised already is compared with its own unpacked weights.
            outputs = run_package(folder / file, part.inputs)
            error = verify.compare_part(part, [value.numpy() for value in outputs.values()])
            checked[file] = verify.check_part(part, self.precision_of(part, said), error, self.options.tolerance)
        return checked

    def contract(
        self,
        folder: Path,
        parts: Sequence[Part],
        said: Mapping[str, dict],
        lowering: Lowering,
        threads: int | None,
    ) -> dict[str, str]:
        """Write the port contract, with the artefacts' own outputs as its reference (`threads` of their runtime) or,
        where they cannot be run (`None`), the eager network's. Returns nothing, or why there is none: a scheduler that
        adds noise is not numbers alone.
        """
        options = self.options
        sessions: dict[str, Any] = {}

        def run(artefact: Artefact, inputs: Mapping[str, Any]) -> dict[str, Any]:
            if artefact.file not in sessions:
                sessions[artefact.file] = open_session(folder / artefact.file, threads)
            return dict(zip(artefact.part.outputs, sessions[artefact.file].run(inputs)))

        artefacts = []
        for part in parts:
            entry = said[self.file(part)]
            precision = "fp32" if entry.get("scheme") == "fp32" else entry.get("precision", self.dtype_of(part))
            artefacts.append(
                Artefact(part, self.file(part), precision, lowering.open_sizes, extra_inputs(part, lowering))
            )
        try:
            write_contract(
                folder,
                self.pipeline,
                artefacts,
                format=options.format,
                precision=options.dtype,
                split=options.split_conditioner,
                seed=options.seed,
                prompt=options.prompts[0] if options.prompts else verify.PROMPTS[0],
                run=None if threads is None else run,
            )
        except NotLinearError as error:
            return {"contract": f"none was written: {error}"}
        return {}

    def cost(self, folder: Path, parts: Sequence[Part], said: Mapping[str, dict], lowering: Lowering) -> dict:
        """What bench.json holds: the denoiser's cost, and under `parts` that of every other artefact."""
        options = self.options
        batches = options.bench_batches if options.batch == "dynamic" else [options.batch]
        found: dict[str, Any] = {}
        others = {}
        for part in parts:
            file = self.file(part)
            rows = batches if part.component == "transformer" else [self.images]
            measured = verify.benchmark(
                part,
                {self.dtype_of(part): folder / file},
                rows,
                options.threads,
                options.bench_repeats,
                extra=extra_inputs(part, lowering),
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
