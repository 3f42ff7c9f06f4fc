"""The port contract: all that an app author needs to write the sampling loop again, as numbers, in the folder of an
export.

[`write_contract`] writes

- `contract.json`: every file's tensors (names, shapes, layouts, types, meaning), the order of the calls, the scheduler
  as coefficients ([`export.schedule`]), the noise of a seed, guidance, the scale of latents and images, the tokenizers,
  hashes and versions;
- `reference.safetensors`: what every file takes and returns in the first step, and the noise, latents and image of a
  whole loop;
- `sample_min.py`: [`sample_min`], the loop with numpy and the runtime alone;
- `PORTING.md`: the same for people, with the steps for adb and Xcode.

The reference is made by `sample_min` itself. That its loop is the pipeline's is what the tests show, and an export's
gates.
"""

from __future__ import annotations

import importlib.resources
import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from safetensors.numpy import save

from ..data.latents import decoder_numbers, latent_scale
from ..errors import EdgeDiTError
from ..files import atomic_write_text, explain_write_errors, file_sha256, versions
from ..genotype import Genotype
from ..markup import MARKUP
from . import sample_min
from .memory import artefact_bytes, kept_bytes, memory_plan
from .parts import MODULATED, Part, is_elastic
from .schedule import check_timesteps, linear_schedule
from .wrappers import plain_config

CONTRACT_VERSION = 2  # 2: `noise`, how a seed becomes noise
CONTRACT, REFERENCE, SAMPLER, PORTING = "contract.json", "reference.safetensors", "sample_min.py", "PORTING.md"
# What another machine's kernels may differ by from the reference: relative error of a forward, and the image's PSNR
# after the loop.
TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "int8": 5e-2, "int4": 1e-1}
IMAGE_PSNR_DB = {"fp32": 40.0, "fp16": 30.0, "int8": 25.0, "int4": 20.0}
LOOP_FACTOR = 3  # guidance amplifies the errors of forwards, and a loop adds them up
RUNTIMES = {"onnx": "onnxruntime", "executorch": "executorch", "coreml": "coremltools", "web": "onnxruntime"}

# Tensor → axes, meaning, values. An axis whose size a file leaves open is named in its shape.
_TENSORS = {
    "sample": (
        "batch channels height width",
        "x_i · input_scale: noisy latents (pixels without a VAE)",
        "about unit variance",
    ),
    "prediction": (
        "batch channels height width",
        "the network's prediction; channels beyond the sample's are a learned variance, to be dropped",
        "real",
    ),
    "timestep": ("batch", "the step's timestep, the same in every row", "0 … 1000"),
    "class_labels": ("batch", "class of the row; labels.null means no class", "0 … labels.null"),
    MODULATED: (
        "batch modulations width",
        "six modulations a layer (shift, scale, gate of attention; of MLP), then shift and scale of the output",
        "real",
    ),
    "text": ("batch tokens width", "the text of all encoders, embedded", "real"),
    "text_mask": ("batch tokens", "1 where a token counts", "0 or 1"),
    "latents": (
        "batch channels latents_height latents_width",
        "latents as the VAE scales them: x · multiply + add",
        "real",
    ),
    "image": ("batch channels image_height image_width", "the image", "about -1 … 1"),
    "input_ids": ("batch tokens", "token ids, padded on the right", "0 … vocabulary - 1"),
    "attention_mask": ("batch tokens", "1 where there is a token, 0 where there is padding", "0 or 1"),
    "last_hidden_state": (
        "batch tokens width",
        "the encoder's states; those of padding are to be replaced by 0",
        "real",
    ),
    "text_N": ("batch tokens_N width", "states of text encoder N, 0 behind its tokens", "real"),
    "mask_N": ("batch tokens_N", "1 where text encoder N has a token; all 0: no text", "0 or 1"),
}
# Key of a file → when it is called.
_CALLS = {
    "text_encoder": "once a prompt",
    "text_encoder_2": "once a prompt",
    "text_conditioner": "once an image",
    "conditioner": "once an image, for every timestep of the schedule",
    "denoiser": "in every step",
    "decoder": "once an image, after the loop",
    "encoder": "never by the loop; it makes latents of an image",
}
# How a seed becomes noise, so that every port draws the same: the rules of `sample_min.standard_normal`. The example is
# of the second block of a seed that does not fit into 32 bits.
_EXAMPLE_SEED, _EXAMPLE_BLOCK = 2**33 + 7, 1


def _noise() -> dict[str, Any]:
    words = sample_min.philox(
        [np.array([word], np.uint64) for word in (_EXAMPLE_BLOCK, 0, 0, 0)],
        (_EXAMPLE_SEED & 0xFFFFFFFF, _EXAMPLE_SEED >> 32),
    )
    values = sample_min.standard_normal(_EXAMPLE_SEED, (4 * _EXAMPLE_BLOCK + 4,))
    return {
        "generator": "philox4x32-10",
        "transform": "box-muller",
        "seed": "0 … 2^63 - 1",
        "key": "[seed mod 2^32, floor(seed / 2^32)]",
        "counter": "[block mod 2^32, floor(block / 2^32), 0, 0], block = 0, 1, 2, …",
        "rounds": 10,
        "multipliers": [0xD2511F53, 0xCD9E8D57],
        "key_increments": [0x9E3779B9, 0xBB67AE85],
        "round": "p = a · multipliers[0], q = c · multipliers[1]; [a, b, c, d] becomes [high(q) xor b xor key[0], "
        "low(q), high(p) xor d xor key[1], low(p)]; then key[i] = (key[i] + key_increments[i]) mod 2^32. [a, b, c, d] "
        "starts as the counter and ends as the block's four words; high and low are the upper and lower 32 bits of 64",
        "uniform": "u[i] = (word[i] + 0.5) / 2^32",
        "formula": "r = sqrt(-2 · ln u[0]), s = sqrt(-2 · ln u[2]); the block's values are [r · cos(2π · u[1]), "
        "r · sin(2π · u[1]), s · cos(2π · u[3]), s · sin(2π · u[3])], in float64, rounded to float32",
        "order": "block n gives the values 4n … 4n + 3 of the array, row-major; the rest of the last block is not used",
        "example": {
            "seed": _EXAMPLE_SEED,
            "block": _EXAMPLE_BLOCK,
            "words": [int(word[0]) for word in words],
            "values": [float(value) for value in values[4 * _EXAMPLE_BLOCK :]],
        },
    }


@dataclass(frozen=True)
class Artefact:
    """A part and the file that it has become.

    Args:
        part: what was lowered.
        file: the file (Core ML: the package), relative to the export's folder, with `/`. `<file>.data` beside it
            belongs to it.
        precision: `"fp32"`, `"fp16"`, `"int8"` or `"int4"`.
        open_sizes: names of sizes (values of `part.dynamic`) that the file leaves open; all others are those of the
            part's examples.
        extra_inputs: examples of inputs that the file has behind the part's, such as the `timestep` by which static
            int8 finds its scales.
        planned_bytes: of the buffers that the file plans for a run; `None`: its format does not say.
    """

    part: Part
    file: str
    precision: str
    open_sizes: Collection[str] = ()
    extra_inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    planned_bytes: int | None = None

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Examples of all its inputs, in order."""
        return {**self.part.inputs, **self.extra_inputs}

    @property
    def key(self) -> str:
        """Its name in the contract."""
        return self.part.key


Run = Callable[[Artefact, dict[str, np.ndarray]], Mapping[str, np.ndarray]]
More = Callable[[Path, dict[str, Any]], Mapping[str, Any]]


def write_contract(
    folder: str | Path,
    pipeline: Any,
    artefacts: Sequence[Artefact],
    *,
    format: str,
    precision: str,
    split: bool,
    seed: int = 0,
    label: int = 0,
    prompt: str = "a photo",
    run: Run | None = None,
    more: More | None = None,
    one_file: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the port contract into the folder of an export, last of all: it holds the other files' hashes.

    Args:
        folder: the export; tokenizers that are not in it are saved there, where the pipeline's own folder has them.
        pipeline: the eager pipeline that was exported.
        artefacts: its files, in the order of [`parts.pipeline_parts`].
        format: `"onnx"`, `"executorch"`, `"coreml"` or `"web"`.
        precision: of the export. split: whether conditioners are files of their own.
        seed: of the reference's noise. label: its class. prompt: its prompt.
        run: runs an artefact on the inputs of its contract (types, shapes, names) and returns its outputs by name.
            `None`: the eager parts are run instead, where no runtime is at hand (Core ML).
        more: writes what the format has besides into the folder, given the contract so far, and returns further entries
            of it; the files that its entry `web` names are hashed with the others.
        one_file: of an ExecuTorch export with one file of all methods: file, bytes, saved_bytes and, of every
            artefact's method, its planned_bytes.

    Returns:
        The contract.

    Raises:
        EdgeDiTError: the scheduler is not linear ([`linear_schedule`]) or does not fit the model, the label
            does not exist, an artefact returns numbers that are not finite, or the folder cannot be written.
        ValueError: the pipeline's scheduler does not fit its transformer.
    """
    folder = Path(folder)
    contract, noise, windows = _describe(folder, pipeline, artefacts, format, precision, split, seed, prompt)
    labels = contract["labels"]
    if labels is not None and not 0 <= label < labels["count"]:
        raise EdgeDiTError(
            f"The reference's label is {label}, but the model has the classes 0 … {labels['count'] - 1}; give one of "
            "them."
        )
    tensors = _reference(contract, artefacts, noise, label, windows, run)
    with explain_write_errors(folder):
        (folder / REFERENCE).write_bytes(save(tensors))
        shutil.copyfile(sample_min.__file__, folder / SAMPLER)
    _fill_shapes(contract, artefacts, tensors)
    contract["reference"] |= {
        "made_by": _maker(format, run),
        "tensors": {name: list(value.shape) for name, value in tensors.items()},
    }
    sizes = {artefact.key: artefact_bytes(folder / artefact.file) for artefact in artefacts}
    planned = {artefact.key: artefact.planned_bytes for artefact in artefacts}
    contract["one_file"] = one_file
    contract["memory"] = memory_plan(sizes, planned, kept_bytes(contract, tensors), one_file)
    atomic_write_text(folder / PORTING, _porting(contract))
    if more is not None:
        contract |= more(folder, contract)
    contract["files"] = _files(folder, contract)
    atomic_write_text(
        folder / CONTRACT, _one_line_lists(json.dumps(contract, indent=2, ensure_ascii=False, allow_nan=False)) + "\n"
    )
    return contract


# -------------------------------------------------------------------- description


def _describe(
    folder: Path,
    pipeline: Any,
    artefacts: Sequence[Artefact],
    format: str,
    precision: str,
    split: bool,
    seed: int,
    prompt: str,
) -> tuple[dict[str, Any], np.ndarray, list | None]:
    """The contract without what only a run can say, the reference's noise, and its prompt's windows of token ids."""
    pipeline.check_scheduler()
    denoiser = next(artefact for artefact in artefacts if artefact.key == "denoiser")
    config, elastic = plain_config(denoiser.part.module.model), is_elastic(pipeline)
    shape = [1, *denoiser.part.inputs["sample"].shape[1:]]
    _, channels, height, width = shape
    scale, guided = float(pipeline.config.default_guidance_scale), is_guided(pipeline)
    text, windows = _text(folder, pipeline, artefacts, prompt) if elastic else (None, None)
    contract = {
        "contract_version": CONTRACT_VERSION,
        "family": "elastic" if elastic else "edgedit",
        "format": format,
        "precision": precision,
        "split": split,
        "runtime": _runtime(format),
        "artefacts": {artefact.key: _entry(artefact, format) for artefact in artefacts},
        "order": [{"artefact": artefact.key, "called": _CALLS[artefact.key]} for artefact in artefacts],
        "latents": {"shape": shape, "layout": "NCHW", "dtype": "float32", **_to_decoder(pipeline)},
        "noise": _noise(),
        "schedule": _schedule(pipeline, (height, width)),
        "guidance": {
            "rows": 2 if guided else 1,
            "order": ["conditional", "unconditional"][: 2 if guided else 1],
            "formula": "unconditional + scale · (conditional - unconditional)" if guided else "none: one row a forward",
            "scale": scale,
            # Channels from this one on keep the conditional prediction; null: all are guided.
            "channels": None if elastic else pipeline.config.guidance_channels,
        },
        "variance_channels": channels if config.get("learn_sigma") else 0,
        "labels": _labels(pipeline, config) if not elastic and config["num_classes"] else None,
        "text": text,
        "image": {
            "layout": "NCHW",
            "range": [-1.0, 1.0],
            "to_uint8": "round(clip(image / 2 + 0.5, 0, 1) · 255), halves to even",
        },
        "model": config,
        "subnet": pipeline.transformer.active_subnet if elastic else None,
        "genotype": None if elastic else json.loads(Genotype.of(config).to_json()),
        "versions": versions(),
        "reference": {
            "file": REFERENCE,
            "seed": seed,
            "prompt": prompt if text else None,
            "tolerance": LOOP_FACTOR * TOLERANCE[precision],
            "image_psnr": IMAGE_PSNR_DB[precision],
        },
    }
    return contract, sample_min.standard_normal(seed, shape), windows


def _entry(artefact: Artefact, format: str) -> dict[str, Any]:
    """One file of the contract; the shapes of outputs are filled in once they are known."""

    def tensor(name: str, value: torch.Tensor | None) -> dict[str, Any]:
        template, meaning, values = _TENSORS[name if name in _TENSORS else f"{name[:-1]}N"]
        axes = template.replace("_N", name[-2:]).split()
        integer = value is not None and not value.is_floating_point()
        return {
            "name": name,
            "shape": None if value is None else _shape(axes, value.shape, artefact.open_sizes),
            "axes": axes,
            "dtype": ("int32" if format == "coreml" else "int64") if integer else "float32",
            "meaning": meaning.replace("encoder N", f"encoder {name[-1]}"),
            "values": values,
        }

    part = artefact.part
    return {
        "file": artefact.file,
        "component": part.component,
        "precision": artefact.precision,
        "tolerance": TOLERANCE[artefact.precision],
        "inputs": [tensor(name, value) for name, value in artefact.inputs.items()],
        "outputs": [tensor(name, None) for name in part.outputs],
    }


def _shape(axes: Sequence[str], sizes: Sequence[int], open_sizes: Collection[str]) -> list[int | str]:
    return [axis if axis in open_sizes else int(size) for axis, size in zip(axes, sizes)]


def is_guided(pipeline: Any) -> bool:
    """Whether a pipeline samples with guidance by default: two rows of a forward an image."""
    conditional = is_elastic(pipeline) or plain_config(pipeline.transformer)["num_classes"]
    return bool(conditional) and pipeline.config.default_guidance_scale > 1


def set_schedule(pipeline: Any, size: Sequence[int]) -> None:
    """Set the timesteps of a pipeline's scheduler for its default number of steps and latents of this height and width.

    Raises:
        EdgeDiTError: they are not finite.
    """
    steps, patch = pipeline.config.default_steps, pipeline.transformer.config.patch_size
    try:
        with np.errstate(divide="ignore", invalid="ignore"):
            pipeline._set_timesteps(
                steps, (size[0] // patch) * (size[1] // patch)
            )  # with a shift by the number of tokens where there is one
    except ValueError as error:  # the pipeline's or the scheduler's own words
        raise EdgeDiTError(
            f"The scheduler has no schedule of the pipeline's {steps} default step(s): {error}"
        ) from error
    check_timesteps(pipeline.scheduler)


def _schedule(pipeline: Any, size: Sequence[int]) -> dict[str, Any]:
    set_schedule(pipeline, size)
    found = linear_schedule(pipeline.scheduler).to_json()
    formula = (
        "x[i+1] = Σ factor · x[j] over the pairs [j, factor] in x + Σ factor · m[j] over those in m; x[0] = "
        "noise · init_noise_sigma; "
    )
    formula += "m[i] = guided prediction of the denoiser for x[i] · input_scale at timestep"
    return {"num_inference_steps": pipeline.config.default_steps, "formula": formula, **found}


def _to_decoder(pipeline: Any) -> dict[str, Any]:
    """`decoder input = x · multiply + add`, one number, or one a channel."""
    if pipeline.vae is None:
        return {"multiply": [1.0], "add": [0.0], "scaling_factor": None, "shift_factor": None}
    scale, (multiply, add) = latent_scale(pipeline.vae.config), decoder_numbers(pipeline.vae.config)
    return {"multiply": multiply, "add": add, "scaling_factor": scale.scaling, "shift_factor": scale.shift}


def _labels(pipeline: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"count": config["num_classes"], "null": config["num_classes"], "names": pipeline.config.id2label}


def _text(folder: Path, pipeline: Any, artefacts: Sequence[Artefact], prompt: str) -> tuple[dict[str, Any], list]:
    """The text encoders, and the reference prompt's windows of token ids."""
    reader = next(artefact for artefact in artefacts if "text_0" in artefact.part.inputs)
    there = {artefact.key: artefact for artefact in artefacts}
    encoders: list[Any] = []
    windows: list[Any] = []
    for index, (name, encoder, tokenizer) in enumerate(pipeline._encoders()):
        example = reader.part.inputs[f"text_{index}"]
        entry = {
            "artefact": None,
            "tokens": example.shape[1],
            "width": example.shape[2],
            "open": False,
            "tokenizer": None,
        }
        encoders.append(entry)
        windows.append(None)
        if encoder is None:
            continue
        entry["artefact"] = name
        entry["open"] = f"tokens_{index}" in reader.open_sizes and "tokens" in there[name].open_sizes
        entry["tokenizer"] = _tokenizer(
            folder,
            tokenizer,
            name.replace("text_encoder", "tokenizer"),
            encoder.config.get_text_config(),
            entry["tokens"],
        )
        windows[-1] = _windows(tokenizer, entry["tokenizer"], prompt)
    rule = (
        "Ids are padded on the right to `tokens`, mask 0 there; states of padding become 0, the windows of one "
        "prompt follow one another. No text "
    )
    rule += "(the unconditional row, a missing encoder): states 0, mask 0."
    return {"rule": rule, "encoders": encoders}, windows


def _tokenizer(folder: Path, tokenizer: Any, name: str, config: Any, tokens: int) -> dict[str, Any]:
    if not (folder / name).is_dir():
        with explain_write_errors(folder / name):
            tokenizer.save_pretrained(folder / name)
    file = f"{name}/tokenizer.json"
    return {
        "file": file if (folder / file).is_file() else None,
        "class": type(tokenizer).__name__,
        # windows: a long prompt goes through a CLIP-type encoder in several; cut: after so many tokens, special ones
        # included
        "rule": "windows" if str(config.model_type).startswith("clip") else "cut",
        "max_tokens": tokens,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id or 0,
        "vocabulary": len(tokenizer),
    }


def _windows(tokenizer: Any, rule: Mapping[str, Any], prompt: str) -> list[list[int]]:
    """The one window of a short prompt, as [`ElasticDiTPipeline.encode_prompt`] makes it."""
    if rule["rule"] == "cut":
        return [tokenizer(prompt, truncation=True, max_length=rule["max_tokens"]).input_ids]
    start, end = ([] if token is None else [token] for token in (rule["bos_token_id"], rule["eos_token_id"]))
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    return [start + ids[: rule["max_tokens"] - len(start) - len(end)] + end]


# -------------------------------------------------------------------- reference


def _reference(
    contract: dict[str, Any],
    artefacts: Sequence[Artefact],
    noise: np.ndarray,
    label: int,
    windows: list | None,
    run: Run | None,
) -> dict[str, np.ndarray]:
    """The tensors of reference.safetensors."""
    by_key = {artefact.key: artefact for artefact in artefacts}

    def opener(key: str) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
        artefact = by_key[key]

        def call(arrays: list[np.ndarray]) -> list[np.ndarray]:
            found = (run or run_part)(artefact, dict(zip(artefact.inputs, arrays)))
            values = [np.asarray(found[name], dtype=np.float32) for name in artefact.part.outputs]
            for name, value in zip(artefact.part.outputs, values):
                if not np.isfinite(value).all():
                    raise EdgeDiTError(
                        f"The output {name} of {artefact.file} holds numbers that are not finite; export it at a "
                        "higher precision."
                    )
            return values

        return call

    trace: dict[str, np.ndarray] = {}
    record: dict[str, np.ndarray] = {}
    files = sample_min.Artefacts(contract, opener, trace)
    condition = sample_min.conditioning(contract, files, label, windows)
    sample_min.sample(contract, files, noise, condition, record)
    decoded = record.pop("loop.decoded")
    if "encoder" in by_key:
        files("encoder", image=np.clip(decoded, -1, 1))
    tensors = {"noise": noise, **trace, **record}
    if contract["labels"] is not None:
        tensors["label"] = np.array([label])
    for index, rows in enumerate(windows or ()):
        if rows is not None:
            tensors[f"ids_{index}"], tensors[f"mask_{index}"] = (
                np.array(rows),
                np.ones((len(rows), len(rows[0])), np.float32),
            )
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def run_part(artefact: Artefact, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The eager part on an artefact's inputs."""
    arrays = [torch.from_numpy(value) for value in (inputs[name] for name in artefact.part.inputs)]
    arrays = [value if value.is_floating_point() else value.long() for value in arrays]
    with torch.no_grad():
        values = artefact.part.module(*arrays)
    return {
        name: value.numpy()
        for name, value in zip(artefact.part.outputs, values if isinstance(values, tuple) else (values,))
    }


def _fill_shapes(contract: dict[str, Any], artefacts: Sequence[Artefact], tensors: Mapping[str, np.ndarray]) -> None:
    for artefact in artefacts:
        for tensor in contract["artefacts"][artefact.key]["outputs"]:
            found = tensors[f"{artefact.key}.outputs.{tensor['name']}"]
            tensor["shape"] = _shape(tensor["axes"], found.shape, artefact.open_sizes)


def _runtime(format: str) -> dict[str, Any]:
    """What runs the files, and how inputs are given."""
    package = RUNTIMES[format]
    note = (
        "its Python binding takes torch tensors only; an app passes its own buffers" if format == "executorch" else None
    )
    return {"package": package, "inputs": "by position" if format == "executorch" else "by name", "note": note}


def _one_line_lists(text: str) -> str:
    """Indented JSON in which a list of plain values takes one line: no string of JSON holds a line break."""
    return re.sub(
        r"\[\n[^\[\]{}]*?\n *\]",
        lambda found: re.sub(r"\s*\n\s*", " ", found[0]).replace("[ ", "[").replace(" ]", "]"),
        text,
    )


def _maker(format: str, run: Run | None) -> str:
    runtime = RUNTIMES[format]
    return (
        f"the eager parts in torch {torch.__version__}; no {runtime} has run the files"
        if run is None
        else f"the files in {runtime}"
    )


# -------------------------------------------------------------------- the other files


def _files(folder: Path, contract: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file that the contract names."""
    paths = [folder / REFERENCE, folder / SAMPLER]
    for entry in contract["artefacts"].values():
        path = folder / entry["file"]
        paths += sorted(path.rglob("*")) if path.is_dir() else [path, path.with_name(f"{path.name}.data")]
    for encoder in (contract["text"] or {"encoders": ()})["encoders"]:
        if encoder["tokenizer"] and encoder["tokenizer"]["file"]:
            paths.append(folder / encoder["tokenizer"]["file"])
    paths += [folder / name for name in contract.get("web", {}).get("files", ())]
    if contract["one_file"] is not None:
        paths.append(folder / contract["one_file"]["file"])
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in paths
        if path.is_file()
    }


def _porting(contract: Mapping[str, Any]) -> str:
    text = (importlib.resources.files(__package__) / f"{PORTING}.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(text).render(**contract, **MARKUP)
