"""What the JSON files of a run hold, for [`schema.read_record`]: what is read of them, no more. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .schema import key
from .stamp import Stamp

# Bounds of networks: nothing that is built from a file may be larger, whatever the file says.
WIDTH, LAYERS, HEADS, SIDE = 2**16, 1000, 2**12, 2**16
COUNT, FIGURE = 10**12, 1e30  # images, steps, bytes (counted, never allocated); parameters, FLOPs, distances
MS: dict[str, Any] = {"above": 0.0, "maximum": 1e12}  # milliseconds
SHARE: dict[str, Any] = {"minimum": 0.0, "maximum": 1.0}


# -------------------------------------------------------------------- search space, bank, latency table

SPAN, CHOICES = 3, 16  # of a menu: most teacher layers that become one, and most choices for each number of them
CODES = SPAN * CHOICES  # greatest number of choices that a code tells apart


@dataclass(kw_only=True)
class MenuChoice:
    """A choice of a menu, see [`menu_space.MenuSpace`]; what is null is the teacher's."""

    merge: int | None = key(None, minimum=1, maximum=SPAN)
    attention_dim: int | None = key(None, minimum=1, maximum=WIDTH)
    num_heads: int | None = key(None, minimum=1, maximum=HEADS)
    mlp_ratio: float | None = key(None, above=0.0, maximum=1024.0)
    modulation_rank: int | None = key(None, minimum=0, maximum=WIDTH)
    token_merge: int | None = key(None, minimum=1, maximum=2)


@dataclass(kw_only=True)
class Space:
    """A search space, as [`search_space.SearchSpace.to_dict`] gives it."""

    num_layers: int = key(minimum=1, maximum=LAYERS)
    hidden_size: int = key(minimum=1, maximum=WIDTH)
    num_heads: int = key(minimum=1, maximum=HEADS)
    mlp_ratio: float = key(4.0, above=0.0, maximum=1024.0)
    reduced_mlp_ratio: float = key(2.0, above=0.0, maximum=1024.0)
    reduced_attention_dim: int | None = key(None, minimum=1, maximum=WIDTH)
    menu: list[MenuChoice] | None = key(None, items=CODES, fewest=1)
    allowed: list[list[int]] | None = key(None, minimum=0, maximum=CODES - 1, items=LAYERS)


BANK_FORMAT = "edgedit-proxy-bank-1"


@dataclass(kw_only=True)
class BankIndex:
    """bank/index.json, as students are assembled from it."""

    format: str = key()
    teacher_hash: str = key()
    space: Space = key()
    entries: dict[str, dict[str, Any]] = key(items=10**5)


@dataclass(kw_only=True)
class Scored:
    """What a choice among proxies goes by."""

    source: list[int] = key(minimum=0, maximum=LAYERS, items=LAYERS, fewest=1)
    loss_after: float = key(minimum=0.0, maximum=FIGURE)


@dataclass(kw_only=True)
class ProxyFigures:
    """What the report reads of a proxy."""

    option: str = key(file=True)
    source: list[int] = key(minimum=0, maximum=LAYERS, items=LAYERS, fewest=1)
    loss_before: float = key(minimum=0.0, maximum=FIGURE)
    loss_after: float = key(minimum=0.0, maximum=FIGURE)
    losses: dict[str, float] = key(dict, minimum=0.0, maximum=FIGURE)
    curve: list[list[float]] = key(list, minimum=0.0, maximum=FIGURE, items=10**6)


@dataclass(kw_only=True)
class BankFigures:
    """bank/index.json, as the report reads it."""

    teacher_hash: str = key()
    space: Space = key()
    position_weights: int = key(0, minimum=0, maximum=COUNT)  # of a head
    entries: dict[str, ProxyFigures] = key(items=10**5)


@dataclass(kw_only=True)
class Block:
    """A layer's shape and its time."""

    attention_dim: int = key(minimum=1, maximum=WIDTH)
    num_heads: int = key(minimum=1, maximum=HEADS)
    mlp_ratio: float = key(above=0.0, maximum=1024.0)
    token_merge: int = key(1, choices=(1, 2))
    ms: float = key(**MS)


@dataclass(kw_only=True)
class Environment:
    """What a latency belongs to."""

    cpu: str | None = key(None, length=(0, 4096))
    machine: str | None = key(None, length=(0, 4096))
    versions: dict[str, str] | None = key(None, items=1000)


@dataclass(kw_only=True)
class Predicted:
    """A whole network that a latency table was not fitted to."""

    predicted_ms: float = key(**MS)
    measured_ms: float = key(**MS)


@dataclass(kw_only=True)
class Prediction:
    """How well a latency table predicted whole networks."""

    mean: float | None = key(None, minimum=0.0, maximum=FIGURE)
    max: float | None = key(None, minimum=0.0, maximum=FIGURE)
    baseline: float | None = key(None, minimum=0.0, maximum=FIGURE)
    ratio: float | None = key(None, minimum=0.0, maximum=FIGURE)
    kendall: float | None = key(None, minimum=-1.0, maximum=1.0)
    spearman: float | None = key(None, minimum=-1.0, maximum=1.0)
    remarks: list[str] = key(list, items=100)
    networks: list[Predicted] = key(list, items=1000)


@dataclass(kw_only=True)
class Trunk:
    """The sizes that a latency table was measured for."""

    sample_size: int = key(minimum=1, maximum=SIDE)
    patch_size: int = key(minimum=1, maximum=SIDE)
    in_channels: int = key(minimum=1, maximum=WIDTH)
    hidden_size: int = key(minimum=1, maximum=WIDTH)
    num_classes: int = key(minimum=0, maximum=10**7)
    learn_sigma: bool = key()


@dataclass(kw_only=True)
class Table:
    """latency/table.json."""

    runtime: str = key()
    precision: str = key()
    batch: int = key(minimum=1, maximum=2**20)
    threads: int = key(minimum=1, maximum=4096)
    space: Space = key()
    trunk: Trunk = key()
    trunk_ms: float = key(minimum=0.0, maximum=1e12)
    blocks: list[Block] = key(items=1000, fewest=1)
    environment: Environment = key()
    noisy: bool = key(False)
    prediction: Prediction | None = key(None)


# -------------------------------------------------------------------- search and student


@dataclass(kw_only=True)
class Settings:
    """What a search was made with."""

    kind: str = key()
    space: Space = key()
    num_evaluations: int = key(minimum=1, maximum=10**6)
    seed: int = key(minimum=0, maximum=2**64)
    num_initial: int = key(minimum=1, maximum=10**6)
    reference: list[float] | None = key(**MS, items=2, fewest=2)
    acquisition: str = key("")
    programme: str | None = key(None)
    caps: dict[str, float] | None = key(None)
    plan: list[list[int]] | None = key(None, minimum=0, maximum=CODES - 1, items=10**6)
    swaps: bool = key(False)


@dataclass(kw_only=True)
class Point:
    """One evaluation."""

    code: list[int] = key(minimum=0, maximum=CODES - 1, items=LAYERS, fewest=1)
    distance: float = key(above=0.0, maximum=FIGURE)
    latency_ms: float = key(**MS)
    parameters: float = key(1, minimum=1, maximum=FIGURE)
    weights: float = key(1, minimum=1, maximum=FIGURE)
    flops: float = key(1, minimum=1, maximum=FIGURE)
    live_values: float = key(1, minimum=1, maximum=FIGURE)
    noise: float | None = key(None, minimum=0.0, maximum=FIGURE)


@dataclass(kw_only=True)
class Failure:
    """An evaluation that gave no objectives."""

    code: list[int] = key(minimum=0, maximum=CODES - 1, items=LAYERS, fewest=1)
    reason: str = key()
    after: int = key(minimum=0, maximum=COUNT)


@dataclass(kw_only=True)
class SearchState:
    """search/state.json, merge.json, random.json."""

    format: int = key()
    settings: Settings = key()
    reference: list[float] | None = key(above=0.0, maximum=FIGURE, items=2, fewest=2)
    told: list[Point] = key(items=10**6)
    failed: list[Failure] | None = key(None, items=10**6)
    pending: list[list[int]] = key(minimum=0, maximum=CODES - 1, items=10**6)


@dataclass(kw_only=True)
class Whole:
    """The teacher beside a front."""

    latency_ms: float = key(**MS)
    parameters: float = key(minimum=1, maximum=FIGURE)
    flops: float = key(minimum=1, maximum=FIGURE)
    path: str | None = key(None, path=True)


@dataclass(kw_only=True)
class Front:
    """search/front.json, as a student is chosen from it."""

    front: list[Point] = key(items=10**6, fewest=1)
    teacher: Whole = key()


@dataclass(kw_only=True)
class FrontFigures(Front):
    """search/front.json, as the report reads it."""

    reference: list[float] = key(above=0.0, maximum=FIGURE, items=2, fewest=2)
    reference_rule: str = key()
    evaluations: int = key(minimum=1, maximum=COUNT)
    hypervolume: list[float] = key(minimum=0.0, maximum=FIGURE, fewest=1)
    random_hypervolume: list[float] | None = key(None, minimum=0.0, maximum=FIGURE, fewest=1)


@dataclass(kw_only=True)
class Ranked:
    """A genotype of the ranking study."""

    group: int = key(minimum=0, maximum=10**4)
    kind: str = key(choices=("best", "random", "worst"))
    latency_ms: float = key(**MS)
    objectives: dict[str, float] = key(minimum=-FIGURE, maximum=FIGURE, items=10**4)
    quality: dict[str, list[float]] = key(minimum=0.0, maximum=FIGURE, items=10)


@dataclass(kw_only=True)
class Ranking:
    """ranking/ranking.json."""

    seed: int = key(minimum=0, maximum=2**63)
    steps: int = key(minimum=1, maximum=COUNT)
    early_steps: int = key(minimum=1, maximum=COUNT)
    samples: int = key(minimum=1, maximum=COUNT)
    search_samples: int = key(minimum=1, maximum=COUNT)
    held_out: int = key(minimum=1, maximum=COUNT)
    edges: list[float] = key(minimum=0.0, maximum=1000.0, items=1000)
    extractor: str = key()
    genotypes: list[Ranked] = key(items=10**4, fewest=2)
    correlations: dict[str, dict[str, dict[str, list[float | None]]]] = key(
        minimum=-2.0, maximum=2.0, items=10**4, fewest=1
    )


@dataclass(kw_only=True)
class GivenChoice:
    """student/choice.json of any student."""

    genotype: list[dict[str, Any]] = key(items=LAYERS, fewest=1)
    reason: str = key()


@dataclass(kw_only=True)
class ExactChoice(GivenChoice):
    """student/choice.json of a student that the integer programme chose, without a search."""

    score: float = key(minimum=-FIGURE, maximum=FIGURE)
    gap: float = key(minimum=0.0, maximum=FIGURE)
    caps: dict[str, float] = key(above=0.0, maximum=FIGURE, items=100)
    predicted_latency_ms: float = key(**MS)
    teacher_latency_ms: float = key(**MS)


@dataclass(kw_only=True)
class Choice(GivenChoice):
    """student/choice.json of a student that was searched for."""

    distance: float = key(above=0.0, maximum=FIGURE)
    predicted_latency_ms: float = key(**MS)
    teacher_latency_ms: float = key(**MS)


# -------------------------------------------------------------------- stages and evaluation


@dataclass(kw_only=True)
class Checkpoint:
    """The plain values of a stage's checkpoint."""

    step: int = key(minimum=0, maximum=COUNT)
    seconds: float = key(minimum=0.0, maximum=1e12)
    world_size: int = key(minimum=1, maximum=10**6)
    objects: dict[str, Any] = key()


@dataclass(kw_only=True)
class Listed:
    """A result of a stage, as it was written."""

    size: int = key(minimum=0, maximum=2**62)
    mtime_ns: int = key(minimum=-(2**63), maximum=2**63)
    sha256: str = key()


@dataclass(kw_only=True)
class Results:
    """stage.json, as far as a finished stage is believed by it."""

    files: dict[str, Listed] = key(dict, items=10**6)
    inputs: dict[str, Any] = key(dict, items=1000)
    format: int = key(1, minimum=1, maximum=1000)


@dataclass(kw_only=True)
class Asked:
    """run.json of any stage."""

    config: dict[str, Any] = key()
    inputs: dict[str, Any] = key(items=1000)
    format: int = key(1, minimum=1, maximum=1000)
    changes: list[dict[str, Any]] = key(list, items=10**5)
    aborted: dict[str, Any] | None = key(None)


@dataclass(kw_only=True)
class StageRecord:
    """stage.json of any stage."""

    config: dict[str, Any] = key()
    inputs: dict[str, Any] = key(dict, items=1000)
    seed: int = key(minimum=0, maximum=2**64)
    steps: int = key(minimum=0, maximum=COUNT)
    seconds: float = key(minimum=0.0, maximum=1e12)
    versions: dict[str, str] = key(dict, items=1000)


@dataclass(kw_only=True)
class TextStage(StageRecord):
    """text/stage.json."""

    learned: dict[str, Any] = key()


@dataclass(kw_only=True)
class ElasticStage(StageRecord):
    """elastic/stage.json."""

    sampled: dict[str, int] = key(minimum=0, maximum=COUNT)
    validation: dict[str, float] = key(dict, minimum=0.0, maximum=FIGURE)


@dataclass(kw_only=True)
class Best:
    """The student that few-step distillation published."""

    distance: float = key(minimum=-FIGURE, maximum=FIGURE)
    step: int = key(minimum=0, maximum=COUNT)
    widths: dict[str, float] = key(dict, minimum=-FIGURE, maximum=FIGURE, items=1000)


@dataclass(kw_only=True)
class FewStepStage(StageRecord):
    """few-step/stage.json."""

    best: Best = key()
    timesteps: list[float] = key(minimum=0.0, maximum=1000.0, items=8, fewest=1)


@dataclass(kw_only=True)
class Subnets:
    """What stage evaluate of text to image was asked for."""

    subnets: list[str] = key(items=1000, fewest=1, file=True)


@dataclass(kw_only=True)
class ElasticEvaluation(StageRecord):
    """evaluate/stage.json of text to image."""

    config: Subnets = key()  # type: ignore[assignment]


@dataclass(kw_only=True)
class Model:
    """evaluate/<name>.json."""

    name: str = key(file=True)
    stage: str = key()
    parameters: float = key(minimum=1, maximum=FIGURE)
    flops: float = key(minimum=1, maximum=FIGURE)
    latency_ms: dict[str, float] = key(**MS, items=1000)
    metrics: dict[str, float | None] = key(minimum=-FIGURE, maximum=FIGURE, items=1000, fewest=1)
    standard_errors: dict[str, float] = key(dict, minimum=0.0, maximum=FIGURE, items=1000)
    notes: list[str] = key(list, items=1000)
    num_samples: int = key(minimum=1, maximum=COUNT)
    steps: int = key(minimum=1, maximum=COUNT)
    guidance_scale: float = key(minimum=0.0, maximum=FIGURE)
    forwards_per_image: int | None = key(None, minimum=1, maximum=COUNT)
    seconds_per_image: dict[str, float] = key(dict, **MS, items=1000)
    solver: str | None = key(None)
    bytes: dict[str, float] = key(dict, minimum=0.0, maximum=FIGURE)
    precision: float | None = key(None, **SHARE)
    recall: float | None = key(None, **SHARE)
    class_agreement: float | None = key(None, **SHARE)
    style_agreement: dict[str, float] | None = key(None, **SHARE)
    held_out: dict[str, float] | None = key(None, minimum=0.0, maximum=COUNT)
    psnr_db: float | None = key(None, minimum=-FIGURE, maximum=FIGURE)
    grid: str | None = key(None, path=True)
    path: str | None = key(None, path=True)
    folder: str | None = key(None, path=True)
    weights: str | None = key(None)
    stamp: Stamp | None = key(None)  # earlier versions wrote none


@dataclass(kw_only=True)
class Reference:
    """evaluate/reference.json."""

    extractor: str = key()
    real_floor: float = key(minimum=-1.0, maximum=FIGURE)
    notes: list[str] = key(list, items=1000)
    extractor_accuracy: float | None = key(None, **SHARE)
    classifier: str | None = key(None)
    classifier_accuracy: float | None = key(None, **SHARE)


@dataclass(kw_only=True)
class Latency:
    """evaluate/latency.json, as the report reads it."""

    batch_size: int = key(minimum=1, maximum=2**20)
    threads: int = key(minimum=1, maximum=4096)
    environment: Environment = key()
    speedup: dict[str, float] = key(dict, **MS)
    multiplied: list[str] = key(list, items=1000)


@dataclass(kw_only=True)
class Latencies(Latency):
    """evaluate/latency.json, as its stage reads it: milliseconds by model and runtime."""

    latency_ms: dict[str, dict[str, float]] = key(**MS, items=1000)
    seconds_per_image: dict[str, float] = key(dict, **MS, items=1000)


@dataclass(kw_only=True)
class Solvers:
    """evaluate/solvers.json: the distance of few steps by every standard solver."""

    metric: str = key()
    distances: dict[str, float] = key(minimum=-FIGURE, maximum=FIGURE, items=1000, fewest=1)


@dataclass(kw_only=True)
class WidthSolvers:
    """evaluate-few-step/solvers.json: the same of every width."""

    metric: str = key()
    distances: dict[str, dict[str, float]] = key(minimum=-FIGURE, maximum=FIGURE, items=1000, fewest=1)


@dataclass(kw_only=True)
class Seconds:
    """evaluate-few-step/seconds.json."""

    seconds_per_image: dict[str, float] = key(**MS, items=1000)


@dataclass(kw_only=True)
class Curve:
    """One line of evaluate/curves.json."""

    steps: list[float] = key(minimum=0.0, maximum=COUNT, fewest=1)
    values: list[float] = key(minimum=-FIGURE, maximum=FIGURE, fewest=1)


@dataclass(kw_only=True)
class Captions:
    """evaluate/captions.json."""

    captions: list[str] = key(free=True, length=(0, 10**6), fewest=1)
    shown: int = key(minimum=1, maximum=1000)
    held_out: list[str] = key(list, free=True, length=(0, 10**6))


@dataclass(kw_only=True)
class Telemetry:
    """A line of telemetry.jsonl."""

    step: int = key(minimum=0, maximum=COUNT)


@dataclass(kw_only=True)
class Verified:
    """verify.json of an export that was run."""

    relative_error: float = key(minimum=0.0, maximum=FIGURE)
    tolerance: float = key(minimum=0.0, maximum=FIGURE)
    psnr_db: float | None = key(None, minimum=-FIGURE, maximum=FIGURE)


@dataclass(kw_only=True)
class Hashed:
    """A file of an export."""

    sha256: str = key()


@dataclass(kw_only=True)
class ContractFiles:
    """contract.json, as loading an export compares its files with it."""

    files: dict[str, Hashed] = key(items=10**6)


@dataclass(kw_only=True)
class Contract(ContractFiles):
    """contract.json, as far as it says what the export is."""

    family: str = key(choices=("edgedit", "elastic"))
    format: str = key(choices=("onnx", "executorch", "coreml", "web"))
    precision: str = key(length=(1, 40))
    subnet: str | None = key(None, length=(1, 100))


@dataclass(kw_only=True)
class Bench:
    """bench.json of such an export."""

    initializer_bytes: float = key(minimum=0.0, maximum=FIGURE)
    initializer_shrink: float = key(minimum=0.0, maximum=FIGURE)


@dataclass(kw_only=True)
class OutputError:
    """What quantisation did to a network's output."""

    sqnr_db: float | None = key(minimum=-FIGURE, maximum=FIGURE)  # null: there is no error at all


@dataclass(kw_only=True)
class Quantization:
    """quantized/quantization.json."""

    average_bits: float = key(above=0.0, maximum=64.0)
    error: dict[str, dict[str, OutputError]] = key(items=1000)


# -------------------------------------------------------------------- caches, extractors, configs


@dataclass(kw_only=True)
class Extractor:
    """extractor.json."""

    name: str = key()
    accuracy: float = key(**SHARE)
    shape: list[int] = key(minimum=1, maximum=SIDE, items=3, fewest=3)
    hash: str = key()
    num_classes: int = key(minimum=1, maximum=10**7)
    made_from: dict[str, Any] | None = key(None, items=100)


@dataclass(kw_only=True)
class LatentIndex:
    """index.json of a latent cache."""

    format: int = key()
    dataset: str = key()
    vae: str = key()
    count: int = key(minimum=1, maximum=COUNT)
    shape: list[int] = key(minimum=1, maximum=SIDE, items=3, fewest=3)
    shard_rows: int = key(minimum=1, maximum=2**30)
    label_names: list[str] = key(free=True, length=(0, 10**6))


@dataclass(kw_only=True)
class TextIndex:
    """index.json of a cache of text embeddings."""

    format: int = key()
    captions: str = key()
    encoders: str = key()
    dims: list[int] = key(minimum=0, maximum=WIDTH, items=2, fewest=1)


@dataclass(kw_only=True)
class ScaleRecord:
    """Activation scales of a layer, one a bucket of timesteps."""

    scale: list[float] = key(minimum=0.0, maximum=FIGURE)
    zero_point: list[int] = key(minimum=-(2**31), maximum=2**31)


@dataclass(kw_only=True)
class Scales:
    """A file of activation scales."""

    edges: list[float] = key(minimum=-FIGURE, maximum=FIGURE, items=10**5)
    layers: dict[str, ScaleRecord] = key(items=10**6)


@dataclass(kw_only=True)
class NetConfig:
    """config.json of a denoiser of either family: the sizes that are built from it."""

    sample_size: int = key(1, minimum=1, maximum=SIDE)
    patch_size: int = key(1, minimum=1, maximum=SIDE)
    in_channels: int = key(1, minimum=1, maximum=WIDTH)
    hidden_size: int = key(1, minimum=1, maximum=WIDTH)
    num_layers: int | list[int] | None = key(1, minimum=0, maximum=LAYERS, items=100)
    num_attention_heads: int = key(1, minimum=1, maximum=HEADS)
    num_key_value_heads: int | None = key(None, minimum=1, maximum=HEADS)
    num_text_key_value_heads: int | None = key(None, minimum=1, maximum=HEADS)
    attention_head_dim: int | None = key(None, minimum=1, maximum=WIDTH)
    mlp_ratio: float | None = key(None, above=0.0, maximum=1024.0)
    mlp_ratios: list[float] | None = key(None, above=0.0, maximum=1024.0, items=100)
    num_classes: int | None = key(None, minimum=0, maximum=10**7)
    layers: list[dict[str, Any]] | None = key(None, items=LAYERS)
    text_dims: list[int] = key(list, minimum=0, maximum=WIDTH, items=100)
    text_width: int | None = key(None, minimum=1, maximum=WIDTH)
    subnets: dict[str, float] | None = key(None, above=0.0, maximum=1.0, items=1000)


@dataclass(kw_only=True)
class ElasticModel(NetConfig):
    """What a recipe's elastic.model names: what is left out would be the largest net's."""

    num_layers: list[int] = key(minimum=0, maximum=LAYERS, items=3, fewest=3)
    num_attention_heads: int = key(minimum=1, maximum=HEADS)
    attention_head_dim: int = key(minimum=1, maximum=WIDTH)
    num_key_value_heads: int = key(1, minimum=1, maximum=HEADS)
    num_text_key_value_heads: int = key(1, minimum=1, maximum=HEADS)
    mlp_ratios: list[float] = key(list, above=0.0, maximum=1024.0, items=3, fewest=3)
    text_width: int = key(1, minimum=1, maximum=WIDTH)
    attention_blocks: int = key(1, minimum=1, maximum=SIDE)
    attention_radius: int = key(0, minimum=0, maximum=SIDE)
    norm_eps: float = key(0.0, minimum=0.0, maximum=1.0)
    rope_theta: float = key(1.0, above=0.0, maximum=FIGURE)


@dataclass(kw_only=True)
class Adapter:
    """adapter_config.json of a LoRA, or what a LoRA file says of itself."""

    lora_alpha: float = key(1.0, minimum=-FIGURE, maximum=FIGURE)
    use_rslora: bool | None = key(None)


@dataclass(kw_only=True)
class Named:
    """A config.json or model_index.json of diffusers: its class, or [file, class] with code of its own."""

    _class_name: str | list[str] = key()


@dataclass(kw_only=True)
class FewSteps:
    """model_index.json, as `edgedit info` reads how the pipeline samples."""

    few_step_timesteps: list[float] | None = key(None, above=0.0, maximum=1000.0, items=1000, fewest=1)


@dataclass(kw_only=True)
class PipelineIndex(FewSteps):
    """model_index.json of an EdgeDiTPipeline, or a pipeline like it."""

    id2label: dict[str, str] | None = key(None, free=True, length=(0, 10**6))
    default_steps: int | None = key(None, minimum=1, maximum=10**6)
    default_guidance_scale: float | None = key(None, minimum=0.0, maximum=10**6)
    guidance_channels: int | None = key(None, minimum=1, maximum=10**6)


@dataclass(kw_only=True)
class SchedulerConfig:
    """scheduler_config.json."""

    _class_name: str = key()
