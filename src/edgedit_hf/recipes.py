"""The one YAML that every stage reads: its schema, defaults, comments, overrides and checks. No torch.

A run is described by one file with a section a stage. Each recipe in training/ reads the same file and uses its own section, so
`train_teacher.py` and `compress.py` never disagree. Unknown keys and values of a wrong type are errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import EdgeDiTError


def _key(default: Any, doc: str, choices: Sequence[Any] = (), minimum: float | None = None) -> Any:
    metadata = {"doc": doc, "choices": tuple(choices), "minimum": minimum}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    """Images to learn from."""

    source: str = _key("digits", "'digits' (scikit-learn's, offline), a folder (class folders or metadata.jsonl), or a `datasets` id")
    split: str = _key("train", "split of a `datasets` id to train on")
    resolution: int | None = _key(None, "resize and centre-crop to this many pixels; null keeps the size the images have", minimum=2)
    buckets: list[str] | None = _key(None, "text-to-image: sizes (height x width: '128x128', '160x96') in place of resolution; an image goes to the nearest")
    channels: int | None = _key(None, "1 (grey) or 3 (RGB); null keeps what the first image has", (None, 1, 3))
    image_column: str | None = _key(None, "column that holds the images; null takes the first image column")
    label_column: str | None = _key(None, "column that holds the classes; null takes 'label' or the only class column")
    caption_column: str | None = _key(None, "text-to-image: column that holds the captions; null takes 'text', 'caption', 'prompt' or 'description'")
    validation_fraction: float = _key(0.2, "share held out where the data set has no split of its own", minimum=0.0)
    vae: str | None = _key(None, "AutoencoderKL or -Tiny, text-to-image also -DC or -KLQwenImage (folder or Hub id): work in its cached latents; null: pixels")
    num_workers: int = _key(0, "worker processes of the data loader", minimum=0)


@dataclass
class OptimisationConfig:
    """How a denoiser is trained."""

    steps: int = _key(1000, "optimiser steps", minimum=1)
    batch_size: int = _key(128, "images a step, over all processes and accumulation", minimum=1)
    learning_rate: float = _key(1e-3, "peak learning rate of AdamW", minimum=0.0)
    final_learning_rate: float = _key(0.05, "the cosine decay ends at this share of the peak", minimum=0.0)
    warmup_steps: int = _key(50, "linear warm-up", minimum=0)
    weight_decay: float = _key(0.0, "weight decay of AdamW", minimum=0.0)
    max_grad_norm: float = _key(1.0, "gradient clipping; 0 clips nothing", minimum=0.0)
    ema_decay: float = _key(0.995, "exponential moving average of the weights; the average is what is saved", minimum=0.0)
    gradient_accumulation: int = _key(1, "micro-batches a step", minimum=1)
    gradient_checkpointing: bool = _key(False, "recompute activations to save memory")
    checkpoint_every: int = _key(200, "steps between checkpoints", minimum=1)
    log_every: int = _key(20, "steps between lines of telemetry", minimum=1)


@dataclass
class DenoiserConfig(OptimisationConfig):
    """A class-conditional denoiser, teacher and student alike."""

    class_dropout: float = _key(0.1, "share of labels dropped, for classifier-free guidance", minimum=0.0)


@dataclass
class TeacherConfig(DenoiserConfig):
    """The network that is compressed: trained here, or brought along with `path`."""

    path: str | None = _key(None, "a trained EdgeDiT pipeline (folder or Hub id) to compress; null trains one with the keys below")
    patch_size: int = _key(2, "side of the patches", minimum=1)
    hidden_size: int = _key(128, "residual width", minimum=4)
    num_layers: int = _key(6, "transformer layers", minimum=1)
    num_heads: int = _key(4, "attention heads", minimum=1)
    prediction_type: str = _key("epsilon", "epsilon (DDPM schedule of DiT) or flow_prediction (flow matching)", ("epsilon", "flow_prediction"))
    learn_sigma: bool = _key(False, "also learn the variance (epsilon only)")
    conditional: bool = _key(True, "false trains an unconditional model even if the data has labels (num_classes: 0)")


@dataclass
class BankConfig:
    """Proxy blocks: every smaller stand-in of every layer, distilled from the teacher's features."""

    reduced_mlp_ratio: float = _key(2.0, "MLP ratio of the reduced options", minimum=0.01)
    reduced_attention_dim: int | None = _key(None, "attention width of the reduced options; null: 4/9 of the hidden size, rounded to 8·heads")
    init: str = _key("closed_form", "start of a proxy: closed_form, copy (truncated teacher weights) or random", ("closed_form", "copy", "random"))
    only: list[str] | None = _key(None, "make only what these genotypes need: preset names (EdgeDiT-1) or genotype JSON files; null makes all")
    calibration_samples: int = _key(256, "images that closed-form starts are fitted to, and as many held-out ones to judge by", minimum=1)
    steps: int = _key(200, "optimiser steps of every proxy", minimum=0)
    both_steps: int = _key(100, "steps of the proxies that combine a reduced attention with a reduced MLP", minimum=0)
    batch_size: int = _key(32, "images a step; one teacher forward feeds all proxies", minimum=1)
    learning_rate: float = _key(1e-3, "peak learning rate of AdamW for proxies that start far off; nearer ones get less", minimum=0.0)
    warmup_steps: int = _key(30, "linear warm-up (full first steps undo part of a closed-form start)", minimum=0)
    optimizer: str = _key("adamw", "adamw, or adamw8bit (bitsandbytes: a quarter of the optimiser's memory)", ("adamw", "adamw8bit"))
    memory_budget_gb: float | None = _key(None, "memory a process may use; proxies then take turns on the device; null: no bound", minimum=0.0)
    loss: str = _key("normalised", "normalised (by the layer's own update) or plain (the paper's squared error)", ("normalised", "plain"))
    checkpoint_every: int = _key(100, "steps between checkpoints", minimum=1)
    log_every: int = _key(20, "steps between lines of telemetry", minimum=1)


@dataclass
class LatencyConfig:
    """The latency table: every distinct block shape, lowered and measured once in the runtime that will ship."""

    batch_size: int = _key(32, "images a forward", minimum=1)
    threads: int = _key(2, "threads of the runtime", minimum=1)
    runtime: str = _key("onnxruntime", "runtime that will ship: onnxruntime or executorch", ("onnxruntime", "executorch"))
    precision: str = _key("fp32", "precision of the measured artefacts: fp32, int8, or int4 (executorch only)", ("fp32", "int8", "int4"))
    repeats: int = _key(40, "measurements a shape; the median counts", minimum=3)


@dataclass
class SearchConfig:
    """Two objectives, both minimised: Fréchet distance of the assembled, untuned student, and table latency."""

    mode: str = _key("joint", "joint (20 choices a pair of layers) or two-stage (the paper: merges first, then options)", ("joint", "two-stage"))
    acquisition: str = _key("qlogehvi", "qlogehvi, qlognehvi or ehvi (the paper's)", ("qlogehvi", "qlognehvi", "ehvi"))
    evaluations: int = _key(24, "genotypes to evaluate", minimum=2)
    initial: int = _key(8, "of these, how many form the space-filling start", minimum=2)
    batch: int = _key(4, "genotypes asked at a time", minimum=1)
    random_baseline: bool = _key(True, "also spend the same budget on random search, for comparison")
    samples: int = _key(256, "images a genotype is judged by", minimum=8)
    sampling_steps: int = _key(10, "denoising steps of these images", minimum=1)
    guidance_scale: float = _key(1.5, "classifier-free guidance of these images", minimum=0.0)


@dataclass
class StudentConfig:
    """Which point of the front becomes the student."""

    genotype: str | None = _key(None, "a preset (EdgeDiT-1) or a genotype JSON file to build instead: no latency table, search and report then")
    max_latency_ms: float | None = _key(None, "latency budget (table latency); null: see max_latency_ratio", minimum=0.0)
    max_latency_ratio: float | None = _key(0.7, "budget as a share of the teacher's table latency; null with max_latency_ms null: knee point", minimum=0.0)
    max_parameters_ratio: float | None = _key(0.8, "parameters at most this share of the teacher's; null: no bound", minimum=0.0)
    max_flops_ratio: float | None = _key(0.75, "FLOPs at most this share of the teacher's; null: no bound", minimum=0.0)


@dataclass
class TuneConfig(DenoiserConfig):
    """Fine-tuning of the assembled student, and of the teacher for the same steps (the fair reference)."""

    steps: int = _key(500, "optimiser steps", minimum=1)
    learning_rate: float = _key(5e-4, "peak learning rate of AdamW", minimum=0.0)
    output_kd: float = _key(0.0, "weight of the distance to the teacher's output, for a teacher that has converged", minimum=0.0)
    teacher_more_steps: bool = _key(True, "train the teacher on for the same steps too")
    random_proxies: bool = _key(False, "also tune the same genotype from untrained random proxies (what feature distillation is worth)")


@dataclass
class EvaluateConfig:
    """Final figures of teacher, student and exports."""

    samples: int = _key(2000, "images a model is judged by", minimum=16)
    sampling_steps: int = _key(20, "denoising steps", minimum=1)
    guidance_scale: float = _key(1.5, "classifier-free guidance", minimum=0.0)
    batch_size: int = _key(250, "images a sampling batch", minimum=1)
    extractor: str = _key("classifier", "features of the Fréchet distance: classifier (trained on the data) or inception", ("classifier", "inception"))
    extractor_steps: int = _key(300, "training steps of the classifier", minimum=1)
    exports: bool = _key(True, "judge the exported networks too; their runtimes use the CPU alone")
    grid: int = _key(8, "rows of the sample grids", minimum=1)
    latency_batch_size: int = _key(32, "images a forward when whole models are timed", minimum=1)
    latency_repeats: int = _key(30, "measurements a model; the median counts", minimum=3)


@dataclass
class ExportConfig:
    """Artefacts for the phone's runtime."""

    dtypes: list[str] = _key(lambda: ["fp32", "int8"], "precisions of the ONNX exports: fp32, int8")
    executorch: list[str] = _key(lambda: [], "precisions of the ExecuTorch exports: fp32, int8 (8da8w), int4 (8da4w); needs edgedit_hf[executorch]")
    threads: int = _key(2, "threads of the runtime when exports are timed", minimum=1)


@dataclass
class CardConfig:
    """The model card of the tuned student, made of the report's figures."""

    repo_id: str = _key("your-name/your-student", "where the model will live on the Hub")
    license: str = _key("other", "the Hub's licence identifier; it depends on your data and teacher")


@dataclass
class SensitivityConfig:
    """Optional study (training/sensitivity.py): what every single change of a layer costs, before and after a short tune."""

    calibration_samples: int = _key(256, "images that starts are fitted to, and as many held-out ones to judge by", minimum=1)
    steps: int = _key(100, "feature-distillation steps of every changed layer; 0 judges the closed-form starts alone", minimum=0)
    batch_size: int = _key(32, "images a step; one teacher forward feeds all places of a change", minimum=1)
    learning_rate: float = _key(1e-3, "peak learning rate of AdamW for proxies that start far off; nearer ones get less", minimum=0.0)
    warmup_steps: int = _key(30, "linear warm-up", minimum=0)
    samples: int = _key(64, "images a timestep that whole models are judged by", minimum=1)
    timesteps: int = _key(5, "timesteps, evenly spaced, that whole models are judged at", minimum=1)
    checkpoint_every: int = _key(100, "steps between checkpoints", minimum=1)
    log_every: int = _key(20, "steps between lines of telemetry", minimum=1)


@dataclass
class TextConfig:
    """Text-to-image: the text encoders. Two small ones are trained on the captions, or others brought along."""

    encoder: str | None = _key(None, "CLIP-type encoder with its tokenizer (folder or Hub id), used as it is; null trains one; 'none' goes without")
    encoder_2: str | None = _key(None, "T5- or Gemma-type encoder with its tokenizer (folder or Hub id); null trains a T5-type; 'none' goes without")
    vocabulary_size: int = _key(512, "tokens at most of each tokenizer; the 256 bytes and the special tokens are among them", minimum=260)
    max_tokens: int = _key(32, "tokens that the CLIP-type encoder reads at a time", minimum=4)
    hidden_size: int = _key(64, "width of both encoders", minimum=4)
    num_layers: int = _key(2, "layers of each", minimum=1)
    num_heads: int = _key(4, "attention heads of each", minimum=1)
    mask_share: float = _key(0.3, "share of the tokens that the T5-type encoder has to guess", minimum=0.0)
    temperature: float = _key(0.1, "of the contrast between captions and images", minimum=0.001)
    steps: int = _key(300, "optimiser steps", minimum=1)
    batch_size: int = _key(128, "captions a step, over all processes", minimum=2)
    learning_rate: float = _key(2e-3, "peak learning rate of AdamW", minimum=0.0)
    final_learning_rate: float = _key(0.05, "the cosine decay ends at this share of the peak", minimum=0.0)
    warmup_steps: int = _key(20, "linear warm-up", minimum=0)
    checkpoint_every: int = _key(200, "steps between checkpoints", minimum=1)
    log_every: int = _key(20, "steps between lines of telemetry", minimum=1)


@dataclass
class ElasticConfig(OptimisationConfig):
    """Text-to-image: the elastic supernet. Each step trains the full net and sub-networks of it on the same batch, noise and timesteps."""

    model: str = _key("elastic-dit-digits", "a preset (elastic-dit-1.6b, -digits, -debug), or a JSON file with a model's config")
    subnets: list[str] | None = _key(None, "sub-networks beside the full net and their shares of its width, e.g. [tiny=0.375, small=0.5]; null: the model's")
    sampling: str = _key("one", "sub-networks of a step: one (drawn uniformly), or sandwich (the narrowest and one of the others)", ("one", "sandwich"))
    distillation: float = _key(1.0, "weight of a sub-network's squared distance to the full net's velocity", minimum=0.0)
    balance: str = _key("gradient_norm", "gradient_norm (equal norms of both networks on the weights they share) or none", ("gradient_norm", "none"))
    balance_limit: float = _key(10.0, "a sub-network's gradient is scaled by at most this, and at least its inverse", minimum=1.0)
    text_dropout: float = _key(0.3, "share of captions dropped, each text encoder on its own; without any is its square: for guidance", minimum=0.0)
    validation_samples: int = _key(256, "held-out images that every width's loss is measured on; 0 measures none", minimum=0)
    validate_every: int = _key(0, "steps between these measurements, of the averaged weights; 0: at the end only", minimum=0)

    def widths(self) -> dict[str, float] | None:
        """The sub-networks' shares of the full width, the full net included; `None`: the model's own."""
        if self.subnets is None:
            return None
        pairs = [text.partition("=") for text in self.subnets]
        return {**{name.strip(): float(width) for name, _, width in pairs}, "full": 1.0}


@dataclass
class KnowledgeConfig:
    """Text-to-image: a large flow teacher that the full net of the supernet also learns from (the sub-networks learn from the full net)."""

    teacher: str | None = _key(None, "a flow pipeline of diffusers or of ours on the same latents (folder or Hub id); null: learn from data alone")
    output_weight: float = _key(1.0, "share of the timestep-aware scaling of its velocity's distance; 1 is SnapGen++, 0 leaves the data alone", minimum=0.0)
    feature_weight: float = _key(1.0, "weight of the distance to its last layer's tokens", minimum=0.0)
    guidance_scale: float = _key(1.0, "learn from its guided velocity; 1: unguided", minimum=0.0)
    quantization: str = _key("none", "none, 8bit or 4bit (bitsandbytes, needs a GPU)", ("none", "8bit", "4bit"))


@dataclass
class QuantizeConfig(OptimisationConfig):
    """Low-bit weights (training/quantize.py): sensitivity of the layers, allocation of bits, self-distillation. Needs a pipeline, no data."""

    path: str | None = _key(None, "the pipeline to quantise (folder or Hub id); null: the run's student-tuned, or else its elastic")
    subnet: str | None = _key(None, "of a supernet: quantise this sub-network alone, as a stand-alone net; null: the supernet, tuned at every width")
    scheme: str = _key("palette", "palette (k-means; SnapGen++, Core ML) or affine (symmetric groups; ONNX Runtime, ExecuTorch)", ("palette", "affine"))
    budget_bits: float = _key(4.3, "stored bits a weight on average (indices, palettes, scales), from 4 to 8", minimum=4.0)
    rows_per_palette: int | None = _key(None, "output rows that share a 4-bit palette, 0: all; null: the allocation chooses for every layer", minimum=0)
    group_size: int = _key(64, "inputs that share a scale (affine)", minimum=1)
    compensate: bool = _key(True, "round with error compensation (GPTQ); false rounds to the nearest")
    prompts: str | None = _key(None, "text to image: file with a prompt a line, to calibrate and tune with; null: the captions of `data`")
    calibration_images: int = _key(64, "images that are sampled to calibrate, and as many to judge by", minimum=1)
    sampling_steps: int | None = _key(None, "denoising steps of all images sampled here; null: the pipeline's default", minimum=1)
    guidance_scale: float | None = _key(None, "their guidance; null: the pipeline's default", minimum=0.0)
    sensitivity_images: int = _key(16, "images that the sensitivity of layers is measured on", minimum=1)
    timesteps: int = _key(8, "timesteps, evenly spread, that it is measured at", minimum=1)
    samples: int = _key(1024, "samples of the unquantised network that self-distillation adds noise to", minimum=1)
    sampling_batch_size: int = _key(64, "images a sampling batch", minimum=1)
    dropout: float = _key(0.3, "share of labels or texts dropped in self-distillation, for classifier-free guidance", minimum=0.0)
    steps: int = _key(1000, "steps of self-distillation; 0: none", minimum=0)
    batch_size: int = _key(64, "noisy samples a step, over all processes and accumulation", minimum=1)


@dataclass
class RunConfig:
    """A whole run."""

    output_dir: str = _key("runs/edgedit", "folder of the run; every stage has a folder in it")
    seed: int = _key(0, "seed of everything", minimum=0)
    threads: int = _key(2, "threads of PyTorch on the CPU, a process; 0 leaves PyTorch's choice", minimum=0)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    card: CardConfig = field(default_factory=CardConfig)
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)
    text: TextConfig = field(default_factory=TextConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    knowledge: KnowledgeConfig = field(default_factory=KnowledgeConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)

    def section(self, *names: str) -> dict[str, Any]:
        """Plain values of some sections, e.g. for a stage's `run.json`."""
        return {name: dataclasses.asdict(getattr(self, name)) for name in names}

    def folder(self, *names: str) -> Path:
        """A path inside the run's folder."""
        return Path(self.output_dir, *names)


# -------------------------------------------------------------------- reading


def _convert(value: Any, hint: Any, name: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        if type(None) in options:
            return None
    elif float in options and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif float in options and isinstance(value, str):
        try:  # YAML reads 1e-3 as text
            return float(value)
        except ValueError:
            pass
    elif int in options and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif bool in options and isinstance(value, bool):
        return value
    elif str in options and isinstance(value, str):
        return value
    elif any(typing.get_origin(o) is list for o in options) and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return value
    wanted = " or ".join("null" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise EdgeDiTError(f"{name} is {value!r} ({type(value).__name__}); it must be {wanted}.")


def _fill(target: Any, values: Any, prefix: str, source: str) -> None:
    if not isinstance(values, dict):
        raise EdgeDiTError(f"{source}: {prefix or 'the file'} holds {type(values).__name__}; it must hold keys and values.")
    hints = typing.get_type_hints(type(target))
    fields = {f.name: f for f in dataclasses.fields(target)}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys there are {', '.join(fields)}."
            raise EdgeDiTError(f"{source}: unknown key {name!r}; {hint}")
        if dataclasses.is_dataclass(getattr(target, key)):
            _fill(getattr(target, key), {} if value is None else value, name, source)
            continue
        value = _convert(value, hints[key], f"{source}: {name}")
        choices, minimum = fields[key].metadata["choices"], fields[key].metadata["minimum"]
        if choices and value not in choices:
            raise EdgeDiTError(f"{source}: {name} is {value!r}; it must be one of {', '.join(map(str, choices))}.")
        if minimum is not None and value is not None and not value >= minimum:  # nor NaN
            raise EdgeDiTError(f"{source}: {name} is {value}; it must be at least {minimum}.")
        setattr(target, key, value)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply `section.key=value` overrides (values are YAML).

    Raises:
        EdgeDiTError: the file is missing or not YAML; a key is unknown (the nearest is named) or its value does not fit.
    """
    import yaml

    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EdgeDiTError(f"The recipe {path} cannot be read ({error.strerror}); `edgedit recipes copy DIR` gives the shipped ones.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EdgeDiTError(f"The recipe {path} is not YAML: {error}") from None
    config = RunConfig()
    _fill(config, values or {}, "", str(path))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise EdgeDiTError(f"--override {text!r} has no '='; write section.key=value, e.g. teacher.steps=100.")
        try:
            nested: Any = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise EdgeDiTError(f"--override {text!r}: the value is not YAML: {error}") from None
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        _fill(config, nested, "", "--override")
    _check(config, str(path))
    return config


def _check(config: RunConfig, source: str) -> None:
    teacher, search = config.teacher, config.search
    if teacher.hidden_size % teacher.num_heads:
        raise EdgeDiTError(
            f"{source}: teacher.hidden_size {teacher.hidden_size} is not a multiple of teacher.num_heads {teacher.num_heads}; change one."
        )
    if teacher.hidden_size % 4:
        raise EdgeDiTError(f"{source}: teacher.hidden_size {teacher.hidden_size} is not a multiple of 4, as its position embedding needs.")
    if teacher.learn_sigma and teacher.prediction_type != "epsilon":
        raise EdgeDiTError(
            f"{source}: teacher.learn_sigma needs teacher.prediction_type epsilon, not {teacher.prediction_type}: "
            "flow matching has no variance to learn."
        )
    if config.data.buckets is not None and config.data.resolution is not None:
        raise EdgeDiTError(f"{source}: data.buckets and data.resolution {config.data.resolution} exclude each other; set one to null.")
    if config.text.hidden_size % config.text.num_heads:
        raise EdgeDiTError(f"{source}: text.hidden_size {config.text.hidden_size} is not a multiple of text.num_heads {config.text.num_heads}; change one.")
    for text in config.elastic.subnets or ():
        name, _, width = text.partition("=")
        try:
            usable = name.strip() not in ("", "full") and 0 < float(width) < 1
        except ValueError:
            usable = False
        if not usable:
            raise EdgeDiTError(f"{source}: elastic.subnets holds {text!r}; it may hold name=width with a width between 0 and 1, e.g. small=0.5.")
    if config.elastic.subnets is not None and len(config.elastic.widths()) != len(config.elastic.subnets) + 1:
        raise EdgeDiTError(f"{source}: elastic.subnets {config.elastic.subnets} holds a name twice; give every sub-network its own.")
    if search.initial > search.evaluations:
        raise EdgeDiTError(f"{source}: search.initial {search.initial} exceeds search.evaluations {search.evaluations}.")
    for key, allowed in (("dtypes", ("fp32", "int8")), ("executorch", ("fp32", "int8", "int4"))):
        for dtype in getattr(config.export, key):
            if dtype not in allowed:
                raise EdgeDiTError(f"{source}: export.{key} holds {dtype!r}; it may hold {', '.join(allowed)}.")
    if not config.quantize.budget_bits <= 8:
        raise EdgeDiTError(f"{source}: quantize.budget_bits is {config.quantize.budget_bits:g}; it must be at most 8, the widest form of a layer.")
    if config.latency.runtime == "onnxruntime" and config.latency.precision == "int4":
        raise EdgeDiTError(f"{source}: latency.precision int4 needs latency.runtime executorch; ONNX Runtime has fp32 and int8.")


# -------------------------------------------------------------------- writing


def commented_yaml(overrides: Sequence[str] = ()) -> str:
    """A recipe with every key, its default (or the given `section.key=value`) and a comment saying what it does."""
    import yaml

    config = RunConfig()
    for text in overrides:
        key, _, value = text.partition("=")
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        _fill(config, nested, "", text)

    def plain(value: Any) -> str:
        return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")

    lines: list[str] = []
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if not dataclasses.is_dataclass(value):
            lines.append(f"{entry.name}: {plain(value)}  # {entry.metadata['doc']}")
            continue
        lines += ["", f"{entry.name}:  # {type(value).__doc__}"]
        for key in dataclasses.fields(value):
            lines.append(f"  {key.name}: {plain(getattr(value, key.name))}  # {key.metadata['doc']}")
    return "\n".join(lines) + "\n"
