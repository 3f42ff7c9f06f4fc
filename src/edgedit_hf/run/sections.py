"""The sections of a recipe: what each key means, its default and its range. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..export.formats import MEASURED, precisions_key
from ..records import CODES, MenuChoice
from ..schema import key

# Greatest values: beyond what anybody runs, and below what exhausts memory or overflows before a message could say so.
STEPS = 10**9  # optimiser steps, and steps between two events
BATCH = 2**20  # rows of a batch
IMAGES = 10**7  # images that are sampled or measured
WIDTH, LAYERS, HEADS = 2**16, 1000, 1024  # of networks
TIMESTEPS = 1000  # of training; more denoising steps than that there are not
REPEATS, THREADS, PROCESSES = 10**5, 1024, 512
LARGEST = 1e38  # float32 holds no more: weights of losses, learning rates
SEED = 2**63 - 1  # torch takes 64 bits and refuses more; the streams of a run are the seed and a small number added


@dataclass
class DataConfig:
    """Images to learn from."""

    source: str = key(
        "digits",
        "'digits' (scikit-learn's, offline), a folder (class folders or metadata.jsonl), or a `datasets` id",
        path=True,
    )
    split: str = key("train", "split of a `datasets` id to train on")
    resolution: int | None = key(
        None,
        "resize and centre-crop to this many pixels; null keeps the size the images have",
        minimum=2,
        maximum=2**14,
    )
    buckets: list[str] | None = key(
        None,
        "text-to-image: sizes (height x width: '128x128', '160x96') in place of resolution; an image goes to the "
        "nearest",
        items=1000,
    )
    channels: int | None = key(None, "1 (grey) or 3 (RGB); null keeps what the first image has", (None, 1, 3))
    background: str = key("white", "colour behind transparent images: a name, or '#rrggbb' in quotes")
    image_column: str | None = key(None, "column that holds the images; null takes the first image column")
    label_column: str | None = key(
        None, "column that holds the classes; null takes 'label' or the only class column", length=(0, 4096)
    )
    caption_column: str | None = key(
        None, "text-to-image: column that holds the captions; null takes 'text', 'caption', 'prompt' or 'description'"
    )
    validation_fraction: float = key(
        0.2, "share held out where the data set has no split of its own", minimum=0.0, below=1.0
    )
    vae: str | None = key(
        None,
        "AutoencoderKL or -Tiny, text-to-image also -DC or -KLQwenImage (folder or Hub id): work in its cached "
        "latents; null: pixels",
        path=True,
    )
    num_workers: int = key(0, "worker processes of the data loader", minimum=0, maximum=PROCESSES)


@dataclass
class OptimisationConfig:
    """How a denoiser is trained."""

    steps: int = key(1000, "optimiser steps", minimum=1, maximum=STEPS)
    batch_size: int = key(128, "images a step, over all processes and accumulation", minimum=1, maximum=BATCH)
    learning_rate: float = key(1e-3, "peak learning rate of AdamW", minimum=0.0, maximum=LARGEST)
    final_learning_rate: float = key(0.05, "the cosine decay ends at this share of the peak", minimum=0.0, maximum=1.0)
    warmup_steps: int = key(50, "linear warm-up", minimum=0, maximum=STEPS)
    weight_decay: float = key(0.0, "weight decay of AdamW", minimum=0.0, maximum=1e6)
    max_grad_norm: float = key(1.0, "gradient clipping; 0 clips nothing", minimum=0.0, maximum=LARGEST)
    ema_decay: float = key(
        0.995, "exponential moving average of the weights; the average is what is saved", minimum=0.0, below=1.0
    )
    gradient_accumulation: int = key(1, "micro-batches a step", minimum=1, maximum=BATCH)
    gradient_checkpointing: bool = key(False, "recompute activations to save memory")
    checkpoint_every: int = key(200, "steps between checkpoints", minimum=1, maximum=STEPS)
    log_every: int = key(20, "steps between lines of telemetry", minimum=1, maximum=STEPS)


@dataclass
class DenoiserConfig(OptimisationConfig):
    """A class-conditional denoiser, teacher and student alike."""

    class_dropout: float = key(0.1, "share of labels dropped, for classifier-free guidance", minimum=0.0, maximum=1.0)


@dataclass
class TeacherConfig(DenoiserConfig):
    """The network that is compressed: trained here, or brought along with `path`."""

    path: str | None = key(
        None,
        "a trained EdgeDiT pipeline (folder or Hub id) to compress; null trains one with the keys below",
        path=True,
    )
    patch_size: int = key(2, "side of the patches", minimum=1, maximum=256)
    hidden_size: int = key(128, "residual width", minimum=4, maximum=WIDTH)
    num_layers: int = key(6, "transformer layers", minimum=1, maximum=LAYERS)
    num_heads: int = key(4, "attention heads", minimum=1, maximum=HEADS)
    prediction_type: str = key(
        "epsilon", "epsilon (DDPM, as DiT) or flow_prediction (flow matching)", ("epsilon", "flow_prediction")
    )
    learn_sigma: bool = key(False, "also learn the variance (epsilon only)")
    conditional: bool = key(True, "false trains an unconditional model even if the data has labels (num_classes: 0)")


@dataclass
class BankConfig:
    """Proxy blocks: every smaller stand-in of every layer, distilled from the teacher's features."""

    menu: list[MenuChoice] | None = key(
        None,
        "choices that may replace 1 to 3 layers, e.g. [{num_heads: 8}, {merge: 3}]; null: the paper's, of the sizes "
        "below",
        items=CODES,
        fewest=1,
    )
    reduced_mlp_ratio: float = key(2.0, "MLP ratio of the reduced options", above=0.0, maximum=64.0)
    reduced_attention_dim: int | None = key(
        None,
        "attention width of the reduced options; null: 4/9 of the hidden size, rounded to 8·heads",
        minimum=1,
        maximum=WIDTH,
    )
    init: str = key(
        "closed_form",
        "start of a proxy: closed_form, copy (truncated teacher weights) or random",
        ("closed_form", "copy", "random"),
    )
    only: list[str] | None = key(
        None,
        "make only what these genotypes need: preset names (EdgeDiT-1) or genotype JSON files; null makes all",
        items=1000,
        path=True,
    )
    calibration_samples: int = key(
        256,
        "images that closed-form starts are fitted to, and as many held-out ones to judge by",
        minimum=1,
        maximum=IMAGES,
    )
    steps: int = key(200, "optimiser steps of every proxy", minimum=0, maximum=STEPS)
    both_steps: int = key(
        100, "steps of the proxies that combine a reduced attention with a reduced MLP", minimum=0, maximum=STEPS
    )
    batch_size: int = key(32, "images a step; one teacher forward feeds all proxies", minimum=1, maximum=BATCH)
    learning_rate: float = key(
        1e-3,
        "peak learning rate of AdamW for proxies that start far off; nearer ones get less",
        minimum=0.0,
        maximum=LARGEST,
    )
    final_learning_rate: float = key(0.02, "the cosine decay ends at this share of the peak", minimum=0.0, maximum=1.0)
    warmup_steps: int = key(
        30, "linear warm-up (full first steps undo part of a closed-form start)", minimum=0, maximum=STEPS
    )
    class_dropout: float = key(
        0.1,
        "share of labels dropped: features with and without a class, as guidance needs both",
        minimum=0.0,
        maximum=1.0,
    )
    optimizer: str = key(
        "adamw", "adamw, or adamw8bit (bitsandbytes: a quarter of the optimiser's memory)", ("adamw", "adamw8bit")
    )
    memory_budget_gb: float | None = key(
        None,
        "memory a process may use; proxies then take turns on the device; null: no bound",
        minimum=0.0,
        maximum=1e6,
    )
    loss: str = key(
        "normalised",
        "normalised (by the layer's own update) or plain (the paper's squared error)",
        ("normalised", "plain"),
    )
    checkpoint_every: int = key(100, "steps between checkpoints", minimum=1, maximum=STEPS)
    log_every: int = key(20, "steps between lines of telemetry", minimum=1, maximum=STEPS)


@dataclass
class LatencyConfig:
    """The latency table: every distinct block shape, lowered and measured once in the runtime that will ship."""

    table: list[str] | str | None = key(
        None, "table.json of a run or a phone to use, or several devices'; null measures", path=True, items=16, fewest=1
    )
    weights: list[float] | None = key(
        None, "of several tables' ratios to the teacher; null: their worst counts", above=0.0, maximum=1e6, items=16
    )
    accept_other: bool = key(
        False, "take a table of another device, runtime version, threads, precision or batch (imported: of batch)"
    )
    batch_size: int = key(32, "images a forward", minimum=1, maximum=BATCH)
    threads: int = key(2, "threads of the runtime", minimum=1, maximum=THREADS)
    runtime: str = key("onnxruntime", f"runtime that will ship: {' or '.join(MEASURED)}", tuple(MEASURED))
    precision: str = key(
        "fp32",
        "precision of the measured artefacts: fp32, int8, or int4 (executorch only)",
        tuple(dict.fromkeys(dtype for target in MEASURED.values() for dtype in target.measured)),
    )
    repeats: int = key(
        40, "rounds of all networks; up to three times as many while they scatter", minimum=3, maximum=REPEATS
    )


@dataclass
class SearchConfig:
    """Two objectives, both minimised: `objective` of the assembled, untuned student, and table latency."""

    mode: str = key(
        "joint",
        "joint (Bayes over all choices), two-stage (the paper: merges first, then options), or exact (judges what the "
        "integer programme over the bank's losses and the latency table names)",
        ("joint", "two-stage", "exact"),
    )
    scores: str = key(
        "loss", "mode exact: a proxy's loss, or first swaps (each alone in the teacher)", ("loss", "swaps")
    )
    objective: str = key(
        "distance",
        "distance (Fréchet, of images), or, of held-out images, denoising loss or output_error (to the teacher's)",
        ("distance", "denoising", "output_error"),
    )
    acquisition: str = key("qlogehvi", "qlogehvi, qlognehvi or ehvi (the paper's)", ("qlogehvi", "qlognehvi", "ehvi"))
    evaluations: int = key(24, "genotypes to evaluate", minimum=2, maximum=10**4)
    initial: int = key(8, "of these, how many form the space-filling start", minimum=2, maximum=10**4)
    batch: int = key(4, "genotypes asked at a time", minimum=1, maximum=1000)
    max_latency_ratio: float | None = key(
        None, "mode joint: no genotype above this share of the teacher's latency", above=0.0, maximum=1.0
    )
    max_parameters_ratio: float | None = key(
        None, "nor above this share of its parameters; null: any", above=0.0, maximum=1.0
    )
    max_memory_mb: float | None = key(
        None, "nor above this estimate of peak memory (see student.max_memory_mb); null: any", above=0.0, maximum=1e9
    )
    timeout_minutes: float | None = key(
        None, "a genotype that takes longer counts as failed; null: no limit", above=0.0, maximum=1e5
    )
    random_baseline: bool = key(True, "also spend the same budget on random search, for comparison")
    samples: int = key(256, "images a genotype is judged by", minimum=8, maximum=IMAGES)
    sampling_steps: int = key(10, "denoising steps of these images", minimum=1, maximum=TIMESTEPS)
    guidance_scale: float = key(1.5, "classifier-free guidance of these images", minimum=0.0, maximum=1000.0)


@dataclass
class StudentConfig:
    """Which point of the front becomes the student."""

    genotype: str | None = key(
        None,
        "a preset (EdgeDiT-1) or a genotype JSON file to build instead: no latency table and no search then",
        path=True,
    )
    max_latency_ms: float | None = key(
        None, "latency budget by the table (several: on each); null: see max_latency_ratio", above=0.0, maximum=1e9
    )
    max_latency_ratio: float | None = key(
        0.7,
        "budget as a share of the teacher's (several: of worst ratio or mean); null, with max_latency_ms: knee point",
        above=0.0,
        maximum=1.0,
    )
    max_parameters_ratio: float | None = key(
        0.8, "parameters at most this share of the teacher's; null: no bound", above=0.0, maximum=1.0
    )
    max_flops_ratio: float | None = key(
        0.75, "FLOPs at most this share of the teacher's; null: no bound", above=0.0, maximum=1.0
    )
    max_bytes_mb: float | None = key(
        None, "megabytes (10^6 bytes) of the weights at latency.precision; null: no bound", above=0.0, maximum=1e9
    )
    max_memory_mb: float | None = key(
        None,
        "megabytes of these and of what the largest layer holds at latency.batch_size, a low estimate; null: no bound",
        above=0.0,
        maximum=1e9,
    )


@dataclass
class TuneConfig(DenoiserConfig):
    """Fine-tuning of the assembled student, and of the teacher for the same steps (the fair reference)."""

    steps: int = key(500, "optimiser steps", minimum=1, maximum=STEPS)
    learning_rate: float = key(5e-4, "peak learning rate of AdamW", minimum=0.0, maximum=LARGEST)
    output_kd: float = key(
        0.0,
        "weight of the distance to the teacher's output, for a teacher that has converged",
        minimum=0.0,
        maximum=LARGEST,
    )
    teacher_more_steps: bool = key(True, "train the teacher on for the same steps too")
    random_proxies: bool = key(
        False, "also tune the same genotype from untrained random proxies (what feature distillation is worth)"
    )


@dataclass
class SamplingConfig:
    """How images are sampled where nothing else is said: default of the pipelines that are trained, and of their
    evaluation.
    """

    steps: int = key(20, "denoising steps", minimum=1, maximum=TIMESTEPS)
    guidance_scale: float = key(1.5, "classifier-free guidance", minimum=0.0, maximum=1000.0)


@dataclass
class EvaluateConfig:
    """Final figures of teacher, student and exports."""

    samples: int = key(2000, "images a model is judged by", minimum=16, maximum=IMAGES)
    batch_size: int = key(250, "images a sampling batch", minimum=1, maximum=BATCH)
    extractor: str = key(
        "classifier",
        "features of the Fréchet distance: classifier (trained on the data) or inception",
        ("classifier", "inception"),
    )
    extractor_steps: int = key(300, "training steps of the classifier", minimum=1, maximum=STEPS)
    exports: bool = key(True, "judge the exported networks too; their runtimes use the CPU alone")
    grid: int = key(8, "rows of the sample grids", minimum=1, maximum=1000)
    latency_batch_size: int = key(32, "images a forward when whole models are timed", minimum=1, maximum=BATCH)
    latency_repeats: int = key(
        30, "measurements a model, 5 at least once all took 20 s; the median counts", minimum=3, maximum=REPEATS
    )


@dataclass
class ExportConfig:
    """Artefacts for the phone's runtime."""

    dtypes: list[str] = precisions_key("onnx", default=("fp32", "int8"))
    executorch: list[str] = precisions_key("executorch", "; needs edgedit_hf[executorch]")
    web: list[str] = precisions_key("web", "; needs npm")
    tolerance: float | None = key(
        None, "greatest relative error of exports below 32 bits; null: 0.05 in 8 bits, 0.3 in 4", above=0.0, maximum=1.0
    )
    threads: int = key(2, "threads of the runtime when exports are timed", minimum=1, maximum=THREADS)


REPO_ID, LICENSE = r"[\w.-]{1,96}(/[\w.-]{1,96})?", r"\w[\w.+-]{0,59}"  # what the Hub takes


@dataclass
class CardConfig:
    """The model card of the tuned student, made of the report's figures."""

    repo_id: str = key("your-name/your-student", "where the model will live on the Hub", length=(1, 200))
    license: str = key("other", "the Hub's licence identifier; it depends on your data and teacher", length=(1, 100))


@dataclass
class HubConfig:
    """Where the run's result goes after the last stage: nowhere, unless `push_to` names a repository."""

    push_to: str | None = key(
        None, "organisation/name that the net that ships is pushed to, with its card", length=(1, 200)
    )
    exports: bool = key(True, "every export too, each to a repository of its own: push_to-<format>-<dtype>")
    private: bool = key(True, "whether repositories that are made for it are private")
    collection: str | None = key(None, "title of a collection that all of them are put into", length=(1, 60))
    base_model: str | None = key(None, "the Hub's model that the teacher is or was made from", length=(1, 200))


@dataclass
class SensitivityConfig:
    """Optional study (training/sensitivity.py): what every single change of a layer costs, before and after a short
    tune.
    """

    calibration_samples: int = key(
        256, "images that starts are fitted to, and as many held-out ones to judge by", minimum=1, maximum=IMAGES
    )
    steps: int = key(
        100,
        "feature-distillation steps of every changed layer; 0 judges the closed-form starts alone",
        minimum=0,
        maximum=STEPS,
    )
    batch_size: int = key(
        32, "images a step; one teacher forward feeds all places of a change", minimum=1, maximum=BATCH
    )
    learning_rate: float = key(
        1e-3,
        "peak learning rate of AdamW for proxies that start far off; nearer ones get less",
        minimum=0.0,
        maximum=LARGEST,
    )
    final_learning_rate: float = key(0.02, "the cosine decay ends at this share of the peak", minimum=0.0, maximum=1.0)
    warmup_steps: int = key(30, "linear warm-up", minimum=0, maximum=STEPS)
    class_dropout: float = key(0.1, "share of labels dropped, as the bank's", minimum=0.0, maximum=1.0)
    samples: int = key(64, "images a timestep that whole models are judged by", minimum=1, maximum=IMAGES)
    timesteps: int = key(5, "timesteps, evenly spaced, that whole models are judged at", minimum=1, maximum=TIMESTEPS)
    checkpoint_every: int = key(100, "steps between checkpoints", minimum=1, maximum=STEPS)
    log_every: int = key(20, "steps between lines of telemetry", minimum=1, maximum=STEPS)


@dataclass
class RankConfig(DenoiserConfig):
    """Optional study (training/rank_objectives.py): which objective of a search foretells the quality after tuning."""

    genotypes: int = key(16, "genotypes to tune", minimum=4, maximum=10**4)
    groups: int = key(4, "groups of similar latency that they are in, spread over its range", minimum=1, maximum=1000)
    steps: int = key(150, "optimiser steps of every tuning", minimum=1, maximum=STEPS)
    learning_rate: float = key(5e-4, "peak learning rate of AdamW", minimum=0.0, maximum=LARGEST)
    warmup_steps: int = key(10, "linear warm-up", minimum=0, maximum=STEPS)
    output_kd: float = key(0.0, "as tune.output_kd", minimum=0.0, maximum=LARGEST)
    early: float = key(0.1, "share of the steps after which the objectives are measured again", above=0.0, maximum=1.0)
    samples: int = key(1000, "images a tuned genotype is judged by", minimum=16, maximum=IMAGES)
    held_out: int = key(128, "held-out images a bucket of timesteps, for the losses", minimum=1, maximum=IMAGES)
    buckets: int = key(5, "buckets of timesteps", minimum=1, maximum=TIMESTEPS)


@dataclass
class TextConfig:
    """Text-to-image: the text encoders. Two small ones are trained on the captions, or others brought along."""

    encoder: str | None = key(
        None,
        "CLIP-type encoder with its tokenizer (folder or Hub id), used as it is; null trains one; 'none' goes without",
        path=True,
    )
    encoder_2: str | None = key(
        None,
        "T5- or Gemma-type encoder with its tokenizer (folder or Hub id); null trains a T5-type; 'none' goes without",
        path=True,
    )
    vocabulary_size: int = key(
        512,
        "tokens at most of each tokenizer; the 256 bytes and the special tokens are among them",
        minimum=260,
        maximum=10**6,
    )
    max_tokens: int = key(32, "tokens that the CLIP-type encoder reads at a time", minimum=4, maximum=2**13)
    hidden_size: int = key(64, "width of both encoders", minimum=4, maximum=WIDTH)
    num_layers: int = key(2, "layers of each", minimum=1, maximum=LAYERS)
    num_heads: int = key(4, "attention heads of each", minimum=1, maximum=HEADS)
    mask_share: float = key(0.3, "share of the tokens that the T5-type encoder has to guess", minimum=0.0, maximum=1.0)
    temperature: float = key(0.1, "of the contrast between captions and images", minimum=0.001, maximum=1000.0)
    steps: int = key(300, "optimiser steps", minimum=1, maximum=STEPS)
    batch_size: int = key(128, "captions a step, over all processes", minimum=2, maximum=BATCH)
    learning_rate: float = key(2e-3, "peak learning rate of AdamW", minimum=0.0, maximum=LARGEST)
    final_learning_rate: float = key(0.05, "the cosine decay ends at this share of the peak", minimum=0.0, maximum=1.0)
    warmup_steps: int = key(20, "linear warm-up", minimum=0, maximum=STEPS)
    checkpoint_every: int = key(200, "steps between checkpoints", minimum=1, maximum=STEPS)
    log_every: int = key(20, "steps between lines of telemetry", minimum=1, maximum=STEPS)


@dataclass
class ElasticConfig(OptimisationConfig):
    """Text-to-image: the elastic supernet. Each step trains the full net and sub-networks of it on the same batch,
    noise and timesteps.
    """

    model: str = key(
        "elastic-dit-digits",
        "a preset (elastic-dit-1.6b, -digits, -debug), or a JSON file with a model's config",
        path=True,
    )
    subnets: list[str] | None = key(
        None,
        "sub-networks beside the full net and their shares of its width, e.g. [tiny=0.375, small=0.5]; null: the "
        "model's",
        items=100,
    )
    sampling: str = key(
        "one",
        "sub-networks of a step: one (drawn uniformly), or sandwich (the narrowest and one of the others)",
        ("one", "sandwich"),
    )
    distillation: float = key(
        1.0, "weight of a sub-network's squared distance to the full net's velocity", minimum=0.0, maximum=LARGEST
    )
    balance: str = key(
        "gradient_norm",
        "gradient_norm (equal norms of both networks on the weights they share) or none",
        ("gradient_norm", "none"),
    )
    balance_limit: float = key(
        10.0,
        "a sub-network's gradient is scaled by at most this, and at least its inverse",
        minimum=1.0,
        maximum=LARGEST,
    )
    text_dropout: float = key(
        0.3,
        "share of captions dropped, each text encoder on its own; without any is its square: for guidance",
        minimum=0.0,
        maximum=1.0,
    )
    validation_samples: int = key(
        256, "held-out images that every width's loss is measured on; 0 measures none", minimum=0, maximum=IMAGES
    )
    validate_every: int = key(
        0, "steps between these measurements, of the averaged weights; 0: at the end only", minimum=0, maximum=STEPS
    )

    def widths(self) -> dict[str, float] | None:
        """The sub-networks' shares of the full width, the full net included; `None`: the model's own."""
        if self.subnets is None:
            return None
        pairs = [text.partition("=") for text in self.subnets]
        return {**{name.strip(): float(width) for name, _, width in pairs}, "full": 1.0}


@dataclass
class KnowledgeConfig:
    """Text-to-image: a large flow teacher that the full net of the supernet also learns from (the sub-networks learn
    from the full net).
    """

    teacher: str | None = key(
        None,
        "a flow pipeline of diffusers or of ours on the same latents (folder or Hub id); null: learn from data alone",
        path=True,
    )
    output_weight: float = key(
        1.0,
        "share of the timestep-aware scaling of its velocity's distance; 1 is SnapGen++, 0 leaves the data alone",
        minimum=0.0,
        maximum=LARGEST,
    )
    feature_weight: float = key(1.0, "weight of the distance to its last layer's tokens", minimum=0.0, maximum=LARGEST)
    guidance_scale: float = key(1.0, "learn from its guided velocity; 1: unguided", minimum=0.0, maximum=1000.0)
    quantization: str = key("none", "none, 8bit or 4bit (bitsandbytes, needs a GPU)", ("none", "8bit", "4bit"))


@dataclass
class QuantizeConfig(OptimisationConfig):
    """Low-bit weights (training/quantize.py): errors of single layers, allocation of bits, self-distillation. Needs a
    pipeline, no data.
    """

    enabled: bool = key(False, "whether a whole run of classes (edgedit train compress) quantises what it ships too")
    path: str | None = key(
        None,
        "the pipeline to quantise (folder or Hub id); null: few-step where that is enabled, student-tuned, or elastic",
        path=True,
    )
    subnet: str | None = key(
        None,
        "of a supernet: quantise this sub-network alone, as a stand-alone net; null: the supernet, tuned at every "
        "width",
    )
    scheme: str = key(
        "palette",
        "palette (k-means; SnapGen++, Core ML) or affine (symmetric groups; ONNX Runtime, ExecuTorch)",
        ("palette", "affine"),
    )
    budget_bits: float = key(
        4.3, "stored bits a weight on average (indices, palettes, scales), from 4 to 8", minimum=4.0, maximum=8.0
    )
    rows_per_palette: int | None = key(
        None,
        "output rows that share a 4-bit palette, 0: all; null: the allocation chooses for every layer",
        minimum=0,
        maximum=BATCH,
    )
    group_size: int = key(64, "inputs that share a scale (affine)", minimum=1, maximum=WIDTH)
    compensate: bool = key(True, "round with error compensation (GPTQ); false rounds to the nearest")
    prompts: str | None = key(
        None,
        "text to image: file with a prompt a line, to calibrate and tune with; null: the captions of `data`",
        path=True,
    )
    calibration_images: int = key(
        64, "images that are sampled to calibrate, and as many to judge by", minimum=1, maximum=IMAGES
    )
    sampling_steps: int | None = key(
        None, "denoising steps of all images sampled here; null: the pipeline's default", minimum=1, maximum=TIMESTEPS
    )
    guidance_scale: float | None = key(
        None, "their guidance; null: the pipeline's default", minimum=0.0, maximum=1000.0
    )
    sensitivity_images: int = key(
        16, "images that the error of every single layer is measured on", minimum=1, maximum=IMAGES
    )
    timesteps: int = key(8, "timesteps, evenly spread, that it is measured at", minimum=1, maximum=TIMESTEPS)
    samples: int = key(
        1024, "samples of the unquantised network that self-distillation adds noise to", minimum=1, maximum=IMAGES
    )
    sampling_batch_size: int = key(64, "images a sampling batch", minimum=1, maximum=BATCH)
    dropout: float = key(
        0.3, "share of labels or texts dropped in self-distillation, for guidance", minimum=0.0, maximum=1.0
    )
    steps: int = key(1000, "steps of self-distillation; 0: none", minimum=0, maximum=STEPS)
    batch_size: int = key(64, "noisy samples a step, over all processes and accumulation", minimum=1, maximum=BATCH)


@dataclass
class FewStepConfig(OptimisationConfig):
    """Few-step distillation (training/distill_few_step.py): a net that samples in 1 to 8 steps without guidance, by
    distribution matching and the knowledge of its own many-step sampling. Of either family.
    """

    enabled: bool = key(False, "whether a whole run of either family goes through it, after the tuning or the supernet")
    path: str | None = key(
        None,
        "the many-step pipeline to distil (folder or Hub id); null: the run's student-tuned, or else its elastic",
        path=True,
    )
    subnet: str | None = key(
        None, "of a supernet: distil this sub-network alone; null: all widths in one run, one drawn a step"
    )
    sampling_steps: int = key(4, "denoising steps of the few-step student", minimum=1, maximum=8)
    shift: float = key(3.0, "flow: how far its noise levels are moved towards noise", minimum=0.01, maximum=100.0)
    first_signal: float = key(
        0.16, "epsilon: signal to noise of the first timestep, at least", above=0.0, maximum=100.0
    )
    timesteps: list[float] | None = key(
        None,
        "its timesteps themselves, falling, on the scale 0 … 1000; null: as shift or first_signal say",
        items=8,
        minimum=0.0,
        maximum=1000.0,
    )
    sampler: str = key("ode", "ode (deterministic: Euler, DDIM) or sde (noises anew after every step)", ("ode", "sde"))
    matching_weight: float = key(
        0.2, "weight of distribution matching; 0: knowledge alone, without a critic", minimum=0.0, maximum=LARGEST
    )
    real_guidance: float | None = key(
        None,
        "guidance of the real score; null: none for classes, the pipeline's default for text",
        minimum=0.0,
        maximum=1000.0,
    )
    decoupled: bool | None = key(
        None, "match unguided and guide in a term of its own, at cleaner noise; null: where there is guidance"
    )
    norm_floor: float = key(0.01, "least normaliser of a matching gradient", above=0.0, maximum=LARGEST)
    moments_weight: float = key(
        0.0, "weight of the KL that holds the samples' mean and contrast", minimum=0.0, maximum=LARGEST
    )
    knowledge_weight: float = key(1.0, "weight of the teacher's knowledge", minimum=0.0, maximum=LARGEST)
    knowledge_last: float = key(
        1.0, "share of that weight that is left at the last step's noise level", minimum=0.0, maximum=1.0
    )
    knowledge_steps: int = key(
        4,
        "sub-steps of the teacher from the student's own x_t to its next; 1: its velocity there (a few-step teacher)",
        minimum=1,
        maximum=TIMESTEPS,
    )
    knowledge_guidance: float | None = key(
        None, "their guidance; null: the teacher's default", minimum=0.0, maximum=1000.0
    )
    feature_weight: float = key(
        0.0, "weight of the distance to the teacher's last-layer tokens at x_t", minimum=0.0, maximum=LARGEST
    )
    teacher: str | None = key(
        None,
        "whose knowledge: a pipeline of the same family, or for text any flow pipeline on the same latents; null: the "
        "many-step net itself",
        path=True,
    )
    teacher_lora: str | None = key(None, "LoRA that is put on this teacher first, such as a few-step one", path=True)
    quantization: str = key(
        "none", "of the text teacher: none, 8bit or 4bit (bitsandbytes, needs a GPU)", ("none", "8bit", "4bit")
    )
    schedule: str = key(
        "every",
        "every (the critic learns in every step, the student in each student_every-th) or alternate (one or the other)",
        ("every", "alternate"),
    )
    student_every: int = key(1, "steps from one update of the student to the next", minimum=1, maximum=10**4)
    critic_learning_rate: float = key(1e-3, "peak learning rate of the critic", minimum=0.0, maximum=LARGEST)
    critic_merge: float = key(
        0.0,
        "after every step the critic keeps this share of itself, the rest comes of the student (.999); 0: all itself",
        minimum=0.0,
        maximum=1.0,
    )
    backbone: str = key(
        "adapters",
        "adapters (student and critic are LoRA adapters of one frozen net) or full (a net each)",
        ("adapters", "full"),
    )
    rank: int = key(64, "rank of the adapters", minimum=1, maximum=WIDTH)
    alpha: float = key(128.0, "alpha of the adapters", above=0.0, maximum=LARGEST)
    evaluate_every: int = key(100, "steps between Fréchet distances of few-step samples", minimum=1, maximum=STEPS)
    samples: int = key(1000, "images of each; the best is what is published", minimum=16, maximum=IMAGES)
    mean_drift: float = key(
        0.15,
        "a drift of the samples' mean by more than so many standard deviations stops the run",
        minimum=0.01,
        maximum=LARGEST,
    )
    std_drift: float = key(
        0.15, "a standard deviation off by more than this share stops the run", minimum=0.01, maximum=LARGEST
    )
    continue_from: str = key(
        "last", "which checkpoint an interrupted or stopped run continues from: last, or best", ("last", "best")
    )
