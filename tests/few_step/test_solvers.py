"""Standard solvers with few steps: each integrates the pipeline's own process, and the nearest comes first."""

import pytest
import torch

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import Diffusion, make_scheduler
from edgedit_hf.few_step.solvers import solver_distances, standard_solvers, with_solver

EPSILON = {f"{name}, {spacing}" for name in ("DDIM", "DPM-Solver++", "UniPC") for spacing in ("trailing", "leading")}


@pytest.mark.parametrize(
    ("prediction_type", "names"), [("epsilon", EPSILON), ("flow_prediction", {"Euler", "DPM-Solver++", "UniPC"})]
)
def test_every_solver_brings_noise_to_a_gaussian(prediction_type, names):
    """Data N(m, s²): the exact prediction is known, and every solver ends at that distribution."""
    mean, std, diffusion = 0.5, 0.3, Diffusion(prediction_type)
    scheduler = make_scheduler(prediction_type)
    assert set(standard_solvers(scheduler)) == names
    noise = torch.randn(2000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    for name, solver in standard_solvers(scheduler).items():
        solver.set_timesteps(40)
        x = noise.clone()
        for t in solver.timesteps:
            at = t.expand(len(x))
            alpha, sigma = diffusion.alpha_sigma(at, x)
            away = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
            epsilon, x0 = sigma * away, mean + alpha * std**2 * away  # what is to be expected of both, given x
            output = epsilon if prediction_type == "epsilon" else epsilon - x0
            x = solver.step(output, t, x).prev_sample
        assert float(x.mean()) == pytest.approx(mean, abs=0.03), name
        assert float(x.std()) == pytest.approx(std, rel=0.15), name


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_the_pipelines_own_solver_is_one_of_them(make_transformer, prediction_type):
    net = make_transformer(prediction_type=prediction_type)
    pipeline = EdgeDiTPipeline(net, make_scheduler(prediction_type), default_steps=4, default_guidance_scale=1.5)
    size = net.config.sample_size
    asked = {
        "class_labels": [0, 1],
        "latents": torch.randn(2, net.config.in_channels, size, size, generator=torch.Generator().manual_seed(1)),
        "output_type": "pt",
    }
    name = "Euler" if prediction_type == "flow_prediction" else "DDIM, trailing"
    torch.testing.assert_close(with_solver(pipeline, name)(**asked).images, pipeline(**asked).images)
    seen = []

    def distance(other) -> float:
        assert other(**asked).images.isfinite().all()
        seen.append(type(other.scheduler).__name__)
        return -float(len(seen))

    found = solver_distances(pipeline, distance)
    assert list(found.values()) == sorted(found.values()) and len(found) == len(seen) == len(set(found))
    assert type(pipeline.scheduler) is type(make_scheduler(prediction_type))
