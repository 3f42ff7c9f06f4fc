"""A many-step net with few steps by the solvers that everybody has: what a few-step student is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from ..pipelines.loading import with_components


def standard_solvers(scheduler: Any) -> dict[str, Any]:
    """Solvers of the process that a pipeline's scheduler integrates, by name: DDIM, the second-order DPM-Solver++ (2M;
    Lu et al., arXiv:2211.01095) and UniPC (Zhao et al., arXiv:2302.04867), each with trailing and with leading
    timesteps; of a flow Euler, and both of these with the flow's noise levels, where spacing makes no difference.
    """
    config = scheduler.config
    second = {"solver_order": 2, "final_sigmas_type": "zero"}
    if type(scheduler).__name__.startswith("FlowMatch"):
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": config["shift"], **second}
        return {
            "Euler": type(scheduler).from_config(config),
            "DPM-Solver++": DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++", **flow),
            "UniPC": UniPCMultistepScheduler.from_config(config, **flow),
        }
    found = {}
    for spacing in ("trailing", "leading"):
        spaced = {"timestep_spacing": spacing}
        multistep = {"algorithm_type": "dpmsolver++", "variance_type": None, **second, **spaced}
        found[f"DDIM, {spacing}"] = DDIMScheduler.from_config(config, **spaced)
        found[f"DPM-Solver++, {spacing}"] = DPMSolverMultistepScheduler.from_config(config, **multistep)
        found[f"UniPC, {spacing}"] = UniPCMultistepScheduler.from_config(config, **second, **spaced)
    return found


def with_solver(pipeline: Any, name: str) -> Any:
    """The same pipeline with one of its [`standard_solvers`]."""
    return with_components(pipeline, scheduler=standard_solvers(pipeline.scheduler)[name])


def solver_distances(pipeline: Any, distance_of: Callable[[Any], float]) -> dict[str, float]:
    """What `distance_of` gives for the pipeline with each of its [`standard_solvers`], the best first."""
    found = {name: distance_of(with_solver(pipeline, name)) for name in standard_solvers(pipeline.scheduler)}
    return dict(sorted(found.items(), key=lambda item: item[1]))
