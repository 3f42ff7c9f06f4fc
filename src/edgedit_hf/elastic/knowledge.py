"""A large teacher beside the training of a supernet: loading it, its conditioning of the captions, and the full net's
loss.

The teacher's distances apply to the full net alone; a sub-network learns of it through the full net's velocity (eq. 5
of SnapGen++), which it is distilled from in the same step.
"""

from __future__ import annotations

from typing import Any

import torch

from ..data.captions import CaptionedDataset
from ..data.text_table import TextTable, text_table
from ..distill.output_loss import output_loss
from ..models.transformer_elastic_dit import ElasticDiTTransformer2DModel
from ..run.config import RunConfig
from .flow_teacher import FlowTeacher, check_latents, check_quantization, teacher_family, transformer_bytes
from .knowledge_loss import FeatureProjector, feature_distance, grid_of, knowledge_loss


class Knowledge:
    """A teacher beside the training of a student: the student's total loss on one batch.

    Args:
        teacher: the frozen teacher. texts: its conditioning of the training captions, by row of the data set.
        projector: φ, trained with the student; patch_size: of the student's tokens.
        output_weight, feature_weight: of [`knowledge_loss`].
    """

    def __init__(
        self,
        teacher: FlowTeacher,
        texts: TextTable,
        projector: FeatureProjector,
        patch_size: int,
        output_weight: float,
        feature_weight: float,
    ) -> None:
        self.teacher, self.texts, self.projector, self.patch_size = teacher, texts, projector, patch_size
        self.output_weight, self.feature_weight = output_weight, feature_weight

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained beside the student: the projector's weights, where features count."""
        return list(self.projector.parameters()) if self.feature_weight else []

    def loss(
        self,
        task: torch.Tensor,
        velocity: torch.Tensor,
        features: torch.Tensor,
        x_t: torch.Tensor,
        sigma: torch.Tensor,
        rows: torch.Tensor,
        without_text: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Total loss `(B,)` of [`knowledge_loss`], and the mean distances `output_kd` and `feature_kd` to look at.

        Args:
            task: flow loss `(B,)`. velocity, features: the student's output and last tokens for x_t and σ. rows: of the
                data set `(B,)`.
            without_text: `(B,)` bool, the rows whose student sees no text at all; their teacher sees the empty caption.
        """
        target = self.teacher.velocity(x_t, sigma, self.texts.batch(rows.cpu()), without_text)
        output, feature = output_loss(velocity, target, x_t.shape[1]), None
        distances = {"output_kd": output.mean()}
        if self.feature_weight:
            height, width = x_t.shape[-2:]
            tokens = self.teacher.features.to(velocity.device)
            grid = (height // self.patch_size, width // self.patch_size)
            feature = feature_distance(self.projector(features, grid, grid_of(tokens.shape[1], height, width)), tokens)
            distances["feature_kd"] = feature.mean()
        return knowledge_loss(task, sigma, output, feature, self.output_weight, self.feature_weight), distances


def load_knowledge(
    config: RunConfig, accelerator: Any, model: ElasticDiTTransformer2DModel, dataset: CaptionedDataset, vae: Any
) -> Knowledge | None:
    """The teacher that `knowledge.teacher` names, with what its text encoders made of the captions; `None` if there is
    none.

    Every process holds the teacher, in bfloat16 on a GPU and in float32 on the CPU. The main process encodes the
    captions into <output_dir>/knowledge; the text encoders are freed then.

    Args:
        dataset: the training set. vae: that the student's latents are of, `None` on pixels.

    Raises:
        EdgeDiTError: the teacher cannot be used (see [`FlowTeacher.load`]), or its latent space is another one or does
            not hold the data's sizes.
    """
    options = config.knowledge
    if options.teacher is None:
        return None
    check_quantization(options.quantization)
    teacher_family(options.teacher)
    check_latents(options.teacher, vae, model.config.in_channels)
    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    teacher = FlowTeacher.load(options.teacher, options.quantization, accelerator.device, dtype, options.guidance_scale)
    folder = config.folder("knowledge", f"text-{teacher.text_fingerprint}")
    if accelerator.is_main_process:
        text_table(teacher, dataset.captions, folder)
    accelerator.wait_for_everyone()
    teacher.free_text_encoders()
    teacher.check_shapes(dataset.shapes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        projector = FeatureProjector(model.hidden_size, teacher.feature_dim).to(accelerator.device)
    texts = TextTable(folder, dataset.captions)
    return Knowledge(teacher, texts, projector, model.config.patch_size, options.output_weight, options.feature_weight)


def teacher_note(config: RunConfig) -> list[str]:
    """What the teacher adds to the memory of training, in a line for the estimate; none without a teacher. Nothing is
    downloaded.
    """
    options = config.knowledge
    if options.teacher is None:
        return []
    try:
        on_gpu, on_cpu = (
            transformer_bytes(options.teacher, options.quantization),
            transformer_bytes(options.teacher, bytes_a_weight=4),
        )
    except OSError:
        return [f"the teacher {options.teacher} is not here: its memory is not counted"]
    precision = "bf16" if options.quantization == "none" else options.quantization
    return [
        f"the teacher's weights come on top, {on_cpu / 1e9:.2f} GB on the CPU and {on_gpu / 1e9:.2f} GB on a GPU "
        f"({precision}) a process, and before them its text encoders"
    ]
