"""Every objective of a network at once: as assembled, after a few steps of its tuning, and after all of them."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.training_utils import EMAModel

from ..files import atomic_write_json, read_json
from ..models.transformer_edgedit import EdgeDiTTransformer2DModel
from ..run.stage import RANK
from ..run.state import RunState, on_main
from .objectives import LOSSES, HeldOutLosses, StudentQuality

ASSEMBLED, EARLY, TUNED = "assembled.json", "early.json", "tuned.json"  # of a genotype's folder


class NetworkJudge:
    """Distance and held-out losses of a network as plain values, each with its standard error.

    A call returns `{"distance": [value, error], "denoising": [[value, error], …], "output_error": […]}`: of the losses
    first the mean over all timesteps, then every bucket's. `samples`: images of the distance; default the search's.
    """

    def __init__(self, quality: StudentQuality, losses: HeldOutLosses) -> None:
        self.quality, self.losses = quality, losses

    def __call__(self, network: EdgeDiTTransformer2DModel, samples: int | None = None) -> dict[str, Any]:
        sampling = {} if samples is None else {"num_images": samples}
        found = self.losses.scores(network)
        return {
            "distance": list(self.quality.score(network, **sampling)),
            **{name: [list(score) for score in (found[name][0], *found[name][1])] for name in LOSSES},
        }

    def write(
        self,
        path: str | os.PathLike,
        network: EdgeDiTTransformer2DModel,
        samples: int | None = None,
        also: Mapping[str, Any] | None = None,
    ) -> None:
        """Judge a network into a file, unless that is there."""
        if not Path(path).exists():
            atomic_write_json(path, {**self(network, samples), **(also or {})})


class EarlyLook:
    """A training loop's `on_step` that judges the averaged weights once, after some of the steps.

    Args:
        run: of the tuning; what is found goes to a file in its folder. at: after how many steps.
    """

    def __init__(self, judge: NetworkJudge, run: RunState, at: int) -> None:
        self.judge, self.run, self.at = judge, run, at

    def __call__(self, step: int, model: EdgeDiTTransformer2DModel, ema: EMAModel) -> None:
        if step == self.at:
            on_main(lambda: self._look(model, ema), self.run.accelerator)

    def _look(self, model: EdgeDiTTransformer2DModel, ema: EMAModel) -> None:
        averaged = copy.deepcopy(model)
        ema.copy_to(averaged.parameters())
        self.judge.write(self.run.folder / EARLY, averaged)


def objectives_of(folder: Path, parameters: int, latency_ms: float) -> dict[str, float]:
    """Every objective of a judged genotype by name; a network's size counts as minus itself: the larger, the better it
    should become.
    """
    found: dict[str, float] = {}
    for name, when in ((ASSEMBLED, ""), (EARLY, " early")):
        judged = read_json(folder / name, RANK.made_by)
        if "proxy_loss" in judged:
            found["proxy_loss"] = judged["proxy_loss"]
        found[f"distance{when}"] = judged["distance"][0]
        for loss in LOSSES:
            overall, *buckets = [value for value, _ in judged[loss]]
            found[f"{loss}{when}"] = overall
            found |= {} if when else {f"{loss} {number}": value for number, value in enumerate(buckets, 1)}
    return {**found, "parameters": -float(parameters), "latency": -latency_ms}


def quality_of(folder: Path) -> dict[str, list[float]]:
    """What a genotype became by its tuning: [value, standard error] of its distance and of its denoising loss."""
    judged = read_json(folder / TUNED, RANK.made_by)
    return {"distance": judged["distance"], "denoising": judged["denoising"][0]}
