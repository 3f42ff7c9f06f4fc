"""The teacher's knowledge of where the student's own x_t leads: the chord of a few guided steps of the many-step net,
or the velocity of a teacher that needs few steps itself.

Unlike a trained few-step teacher (SnapGen++, arXiv:2601.08303, section 3.3) the chord needs no second training and no
download, and it is taken at every one of the student's steps, on the student's own way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline

from ..data.captions import CaptionedDataset
from ..data.text_table import TextTable, text_table
from ..diffusion import TRAIN_TIMESTEPS, Diffusion
from ..elastic.flow_teacher import FlowTeacher, check_latents, teacher_family
from ..elastic.knowledge_loss import FeatureProjector, feature_distance, grid_of
from ..errors import EdgeDiTError
from ..files import weights_hash
from ..hub import component_folder, pipeline_folder
from ..pipelines.loading import load_pipeline
from ..run.config import RunConfig
from .checks import check_class_teacher, teacher_guidance
from .losses import chord, knowledge_loss, on_flow
from .networks import REAL, predict
from .source import Conditions, Piece, Source

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`(x_t, t (B,)) → output`."""


def substeps(t: float, to: float | None, count: int, whole: bool) -> list[float]:
    """So many timesteps from t towards `to` (`None`: clean data), evenly, without the end; `whole`: integers, fewer
    where there are no more.
    """
    end = 0.0 if to is None else to
    found = [t + (end - t) * index / count for index in range(count)]
    if whole:
        found = list(dict.fromkeys(float(round(value)) for value in found))
        found = [value for value in found if value > end or value == t]
    return found


@torch.no_grad()
def chord_velocity(
    predict: Predict, diffusion: Diffusion, x_t: torch.Tensor, t: float, to: float | None, count: int
) -> torch.Tensor:
    """Velocity `(B, C, H, W)` of the straight line from x_t to where `count` deterministic steps of a net lead, on the
    flow's path.

    With one step of a flow net that is its velocity at x_t.
    """
    places = substeps(t, to, count, diffusion.prediction_type == "epsilon")
    x = x_t
    for place, then in zip(places, [*places[1:], to]):
        now, goal = _rows(place, x), None if then is None else _rows(then, x)
        x = diffusion.move(predict(x, now), x, now, goal)
    now = _rows(t, x_t)
    start, level = on_flow(x_t, *diffusion.alpha_sigma(now, x_t)), diffusion.noise_level(now)
    if to is None:
        return chord(start, x, level, torch.zeros_like(level))
    goal = _rows(to, x)
    return chord(start, on_flow(x, *diffusion.alpha_sigma(goal, x)), level, diffusion.noise_level(goal))


def _rows(t: float, like: torch.Tensor) -> torch.Tensor:
    return torch.full((len(like),), int(t) if t == int(t) else t, device=like.device)


# -------------------------------------------------------------------- whose


class Knowledge:
    """Where the student's x_t leads, by a teacher; see [`chord_velocity`].

    Args:
        call: `(x_t, t, piece, features) → (output, tokens or None)` of the teacher, guided.
        diffusion: its process. steps: sub-steps to the student's next timestep.
        feature_weight: of the distance of the last layers' tokens. projector: φ, from the student's tokens to the
            teacher's; `None`: they are of one net.
        patch_size: of the student's tokens. fingerprint: of a teacher that was given.
    """

    def __init__(
        self,
        call: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
        diffusion: Diffusion,
        steps: int,
        feature_weight: float = 0.0,
        projector: FeatureProjector | None = None,
        patch_size: int = 1,
        fingerprint: str | None = None,
    ) -> None:
        self.call, self.diffusion, self.steps = call, diffusion, steps
        self.feature_weight, self.projector, self.patch_size = feature_weight, projector, patch_size
        self.fingerprint = fingerprint

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained beside the student: φ."""
        return list(self.projector.parameters()) if self.projector is not None else []

    def loss(
        self,
        velocity: torch.Tensor,
        tokens: torch.Tensor | None,
        piece: Piece,
        x_t: torch.Tensor,
        t: float,
        to: float | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss `(B,)` of the student's velocity (and last tokens) at x_t, and the distances to look at."""

        found: list[torch.Tensor | None] = []

        def output_of(x: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
            output, theirs = self.call(x, now, piece, tokens is not None and not found)  # of the first forward, at x_t
            found.append(theirs)
            return output

        target = chord_velocity(output_of, self.diffusion, x_t, t, to, self.steps)
        loss = knowledge_loss(velocity, target)
        distances = {"knowledge": loss.detach().mean()}
        if tokens is None:
            return loss, distances
        assert found[0] is not None, "tokens were asked for"
        theirs = found[0].to(x_t.device)
        if self.projector is None:
            tokens = F.layer_norm(tokens.float(), tokens.shape[-1:])  # as the distance does with the teacher's
        else:
            height, width = x_t.shape[-2:]
            grid = (height // self.patch_size, width // self.patch_size)
            tokens = self.projector(tokens, grid, grid_of(theirs.shape[1], height, width))
        distance = feature_distance(tokens, theirs)
        return loss + self.feature_weight * distance, {**distances, "features": distance.detach().mean()}


def own_knowledge(config: RunConfig, source: Source, networks: Any) -> Knowledge:
    """That of the many-step net itself, at full width and guided as its pipeline is."""
    options, full = config.few_step, source.widths[-1]

    def call(x: torch.Tensor, t: torch.Tensor, piece: Piece, features: bool):
        asked = {"features": features, "subnet": full, "guided_channels": source.guided_channels}
        return networks(REAL, x, t, piece.condition, piece.null, guidance_scale=source.knowledge_guidance, **asked)

    return Knowledge(call, source.diffusion, options.knowledge_steps, options.feature_weight)


def given_knowledge(config: RunConfig, accelerator: Any, source: Source, conditions: Conditions) -> Knowledge | None:
    """That of the teacher `few_step.teacher`; `None`: none is given.

    Raises:
        EdgeDiTError: it cannot be used beside this student.
    """
    if config.few_step.teacher is None:
        return None
    build = _text_teacher if source.elastic else _class_teacher
    return build(config, accelerator, source, conditions)


def _class_teacher(config: RunConfig, accelerator: Any, source: Source, conditions: Conditions) -> Knowledge:
    options, student = config.few_step, source.pipeline.transformer.config
    pipeline = load_pipeline(str(options.teacher))
    theirs = pipeline.transformer.config
    check_class_teacher(options.teacher, theirs, student)
    check_latents(str(options.teacher), source.pipeline.vae, student.in_channels)
    model = pipeline.transformer.to(accelerator.device).eval().requires_grad_(False)
    few = bool(pipeline.config.get("few_step_timesteps"))
    guidance = teacher_guidance(options, pipeline.config)

    def call(x: torch.Tensor, t: torch.Tensor, piece: Piece, features: bool):
        return predict(model, x, t, piece.condition, piece.null, guidance, pipeline.config.guidance_channels, features)

    projector = _projector(config, student.hidden_size, theirs.hidden_size) if options.feature_weight else None
    return Knowledge(
        call,
        source.diffusion,
        1 if few else options.knowledge_steps,
        options.feature_weight,
        None if projector is None else projector.to(accelerator.device),
        student.patch_size,
        weights_hash(model.state_dict()),
    )


def _text_teacher(config: RunConfig, accelerator: Any, source: Source, conditions: Conditions) -> Knowledge:
    options, model = config.few_step, source.pipeline.transformer
    dataset: CaptionedDataset = conditions.dataset
    teacher_family(str(options.teacher))
    check_latents(str(options.teacher), source.pipeline.vae, model.config.in_channels)
    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    folder = pipeline_folder(str(options.teacher), described=True)
    guidance = teacher_guidance(options, DiffusionPipeline.load_config(str(folder)))
    teacher = FlowTeacher.load(str(options.teacher), options.quantization, accelerator.device, dtype, guidance)
    own = teacher.pipeline.config
    if options.teacher_lora is not None:
        _put_on(teacher.pipeline, options.teacher_lora)
    folder = config.folder("knowledge", f"text-{teacher.text_fingerprint}")
    if accelerator.is_main_process:
        text_table(teacher, dataset.captions, folder)
    accelerator.wait_for_everyone()
    teacher.free_text_encoders()
    teacher.check_shapes(dataset.shapes)
    texts = TextTable(folder, dataset.captions)

    def call(x: torch.Tensor, t: torch.Tensor, piece: Piece, features: bool):
        output = teacher.velocity(x, t.float() / TRAIN_TIMESTEPS, texts.batch(piece.images.cpu()))
        return output, teacher.features if features else None

    projector = _projector(config, model.hidden_size, teacher.feature_dim) if options.feature_weight else None
    return Knowledge(
        call,
        source.diffusion,
        1 if own.get("few_step_timesteps") else options.knowledge_steps,
        options.feature_weight,
        None if projector is None else projector.to(accelerator.device),
        model.config.patch_size,
        teacher.fingerprint,
    )


def _projector(config: RunConfig, student_dim: int, teacher_dim: int) -> FeatureProjector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return FeatureProjector(student_dim, teacher_dim)


def _put_on(pipeline: Any, path: str) -> None:
    """Put a LoRA on a teacher's transformer, for good."""
    folder = component_folder(path)
    try:
        pipeline.load_lora_weights(str(folder))
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    except Exception as error:  # diffusers, peft and huggingface_hub each have their own
        raise EdgeDiTError(
            f"few_step.teacher_lora {path} cannot be put on {type(pipeline).__name__}: {' '.join(str(error).split())}"
        ) from error
