"""Tiny nets of both families with what a training step sees."""

from dataclasses import dataclass
from typing import Any

import flow_pipelines
import pytest
import torch

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.few_step.source import Piece, Source
from edgedit_hf.pipelines.loading import with_transformer


@dataclass
class Family:
    """A many-step pipeline, conditions of 4 rows, and those of none."""

    name: str
    pipeline: Any
    condition: dict
    null: dict
    timesteps: list[float]

    @property
    def model(self):
        """A new copy of the net."""
        model = type(self.pipeline.transformer).from_config(self.pipeline.transformer.config)
        model.load_state_dict(self.pipeline.transformer.state_dict())
        return model.eval()

    @property
    def widths(self) -> list[str | None]:
        return list(getattr(self.pipeline.transformer, "subnet_names", [])) or [None]

    def source(self, real_guidance: float = 1.0, knowledge_guidance: float = 1.5) -> Source:
        """Of a new copy of the net."""
        pipeline = with_transformer(self.pipeline, self.model)
        return Source(pipeline, self.timesteps, self.widths, real_guidance, knowledge_guidance)

    def piece(self, rows: list[int]) -> Piece:
        """Some of the rows 0 … 3."""

        def some(condition: dict) -> dict:
            return {
                name: [part[rows] for part in value] if isinstance(value, list) else value[rows]
                for name, value in condition.items()
            }

        noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(7))[rows]
        return Piece(rows, noise, some(self.condition), some(self.null), torch.tensor(rows))


@pytest.fixture(scope="session")
def families(make_transformer) -> dict[str, Family]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.tensor([3, 5, 0, 9])
    classes = {"class_labels": labels}, {"class_labels": torch.full_like(labels, 10)}
    text = flow_pipelines.randomise(flow_pipelines.elastic(vae=False))
    embeds = [torch.randn(4, 3, dim, generator=generator) for dim in text.transformer.config.text_dims]
    masks = [torch.ones(4, 3, dtype=torch.bool) for _ in embeds]
    words = [
        {"encoder_hidden_states": embeds, "encoder_attention_mask": m}
        for m in (masks, [torch.zeros_like(mask) for mask in masks])
    ]
    edgedit = EdgeDiTPipeline(make_transformer(num_layers=2), make_scheduler("epsilon"), default_guidance_scale=1.5)
    return {
        "edgedit": Family("edgedit", edgedit, *classes, [800.0, 600.0, 400.0, 200.0]),
        "elastic": Family("elastic", text, *words, [1000.0, 900.0, 750.0, 500.0]),
    }


@pytest.fixture(params=["edgedit", "elastic"])
def family(request, families) -> Family:
    return families[request.param]


@pytest.fixture(scope="session")
def disturb():
    """`disturb(parameters, seed)`: move them, so that adapters no longer change nothing."""

    def change(parameters, seed: int = 0, by: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))

    return change
