"""One export: its parts written, loaded back, compared with the network, timed and described."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import EdgeDiTError
from ..files import atomic_write_json, weights_hash
from ..genotype import Genotype
from ..pipelines.loading import with_components
from ..runtimes.sessions import open_session
from ..runtimes.timing import environment
from . import verify
from .components import COMPONENTS
from .contract import Artefact, More, write_contract
from .exported import stem
from .formats import ExportOptions
from .lowering import LOWER, Lowering, example_rows, facts_of, lower_one_file
from .mixed import Form, choose_8bit, nearest_form, xnnpack_weights
from .onnx.lowbit import MIN_QUANTIZED_ELEMENTS
from .parts import Part, is_elastic, text_lengths
from .schedule import NotLinearError
from .web import page
from .wrappers import plain_config

PIPELINE_FILE = "pipeline.pte"  # all networks of an ExecuTorch export as methods of one file
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
EIGHT_BIT_ATTEMPTS = 3
# What the runtime makes of a layer in 4 bits, given the low-bit weights to use as they are, and the least weights of a
# layer that it quantises.
FOUR_BITS: dict[str, tuple[Callable[[Mapping[str, Any]], Form], int]] = {
    "onnx": (nearest_form, MIN_QUANTIZED_ELEMENTS),
    "executorch": (xnnpack_weights, 1),
}


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
        """Rows of the denoiser's examples."""
        return example_rows(self.options.rows)

    @property
    def images(self) -> int:
        """Images of the VAE's and prompts of the text encoders' examples."""
        return 2 if self.options.rows == "dynamic" else 1

    @property
    def open_sizes(self) -> tuple[str, ...]:
        """Sizes that stay open."""
        if self.options.rows != "dynamic":
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
        pipeline, export = self.pipeline, {"precision": self.options.dtype, "batch": self.options.rows}
        model = {
            **plain_config(pipeline.transformer),
            **export,
            "split": self.options.split_conditioner,
            "size": None if self.size is None else list(self.size),
        }
        if is_elastic(pipeline):
            model |= {
                "subnet": self.subnet,
                "text_tokens": None if self.options.rows == "dynamic" else text_lengths(pipeline),
            }
        configs = {"transformer": model}
        images = {
            "precision": self.options.dtype,
            "batch": "dynamic" if self.options.rows == "dynamic" else self.images,
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
                        "tokens": None if self.options.rows == "dynamic" else tokens,
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
        said = facts_of(component, module, config, self.options.dtype, self.options.rows)
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
        target = self.options.target
        return f"{part.component}/{target.lowered_as}/{stem(part.name)}{target.suffix}"

    def write(self, folder: Path, parts: Sequence[Part], lowering: Lowering) -> dict[str, dict]:
        """Lower every part. Returns what each lowering says, by the artefact's file."""
        facts = {component: self.facts(component) for component in {part.component for part in parts}}
        said = {}
        for part in parts:
            path = folder / self.file(part)
            path.parent.mkdir(parents=True, exist_ok=True)
            lower = LOWER[self.options.target.lowered_as]
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
            cls = COMPONENTS[self.options.target.lowered_as, kind]
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
        one_file, more = None, None
        if options.one_file:
            one_file = self.write_one_file(folder, parts, lowering)
            verified["one_file"] = {"file": PIPELINE_FILE, "equal": True}  # or it would have been refused
        if options.format == "web":
            title = Path(facts["source"] or "edgedit_hf").name
            more = partial(page.write_page, title=title, runtime_url=options.runtime_url)
            verified["run_in"] = page.RUN_IN
        facts = {**facts, **self.contract(folder, parts, said, lowering, options.threads, more, one_file)}
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
            what the lowerings say, what verify.json holds, and the lowering that was used.
        """
        options, precision = self.options, self.options.precision
        least = precision.min_psnr_db if options.min_psnr_db is None else options.min_psnr_db
        goal = least
        for _ in range(EIGHT_BIT_ATTEMPTS):
            if options.dtype == "int4":
                form, smallest = FOUR_BITS[options.target.lowered_as]
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
            used = replace(lowering, given=given)
            said = self.write(folder, parts, used)
            exported = self.load(folder)
            found = verify.compare(eager, exported, options.seed, options.num_images, options.prompts)
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
        return said, {**found, "parts": checked}, used

    def write_one_file(self, folder: Path, parts: Sequence[Part], lowering: Lowering) -> dict[str, Any]:
        """Write all parts as methods of one file, and hold each to its own file's numbers.

        Returns:
            What contract.json says of it: file, bytes, saved_bytes (by which it is smaller than the single files
            together), methods (by the artefacts' names: planned_bytes).

        Raises:
            EdgeDiTError: a method gives other numbers than its part's file.
        """
        path, facts = folder / PIPELINE_FILE, {part.component: self.facts(part.component) for part in parts}
        asked = {part.key: (part, self.dtype_of(part), {**facts[part.component], "part": part.name}) for part in parts}
        said = lower_one_file(asked, path, lowering)
        for part in parts:
            file = self.file(part)
            alone = open_session(folder / file, self.options.threads).run(part.inputs)
            together = open_session(path, self.options.threads, method=part.key).run(part.inputs)
            if not all(map(np.array_equal, alone, together)):
                worst = max(float(np.abs(one - other).max()) for one, other in zip(alone, together, strict=True))
                raise EdgeDiTError(
                    f"The method {part.key} of {PIPELINE_FILE} gives other numbers than {file}: they differ by up to "
                    f"{worst:.3g}. Nothing was written; export without --one-file."
                )
        size = path.stat().st_size
        return {
            "file": PIPELINE_FILE,
            "bytes": size,
            "saved_bytes": sum((folder / self.file(part)).stat().st_size for part in parts) - size,
            "methods": {key: {"planned_bytes": entry["planned_bytes"]} for key, entry in said.items()},
        }

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
        more: More | None = None,
        one_file: Mapping[str, Any] | None = None,
    ) -> dict[str, str]:
        """Write the port contract, with the artefacts' own outputs as its reference (`threads` of their runtime) or,
        where they cannot be run (`None`), the eager network's; `more`: what the format writes besides. Returns nothing,
        or why there is none: a scheduler that adds noise is not numbers alone.
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
                Artefact(
                    part,
                    self.file(part),
                    precision,
                    lowering.open_sizes,
                    extra_inputs(part, lowering),
                    entry.get("planned_bytes"),
                )
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
                more=more,
                one_file=one_file,
            )
        except NotLinearError as error:
            if options.format == "web":
                raise
            return {"contract": f"none was written: {error}"}
        return {}

    def cost(self, folder: Path, parts: Sequence[Part], said: Mapping[str, dict], lowering: Lowering) -> dict:
        """What bench.json holds: the denoiser's cost, and under `parts` that of every other artefact."""
        options = self.options
        batches = [options.rows] if isinstance(options.rows, int) else options.bench_batches
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


def save_without_networks(pipeline: Any, folder: Path) -> None:
    """The parts of a pipeline's folder that are no networks: scheduler and tokenizers."""
    for name in ("scheduler", "tokenizer", "tokenizer_2"):
        component = pipeline.components.get(name)
        if component is not None:
            component.save_pretrained(folder / name)
