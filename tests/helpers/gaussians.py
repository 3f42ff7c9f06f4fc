"""Mixtures of Gaussians, whose best denoiser, score and probability flow are known in closed form."""

from dataclasses import dataclass

import torch

from edgedit_hf.diffusion import Diffusion


@dataclass
class Mixture:
    """Every element of a sample is drawn from Σ w N(m, s²), each on its own."""

    weights: torch.Tensor  # (K,)
    means: torch.Tensor
    stds: torch.Tensor

    @classmethod
    def of(cls, *parts: tuple[float, float, float]) -> "Mixture":
        """Of (weight, mean, std)."""
        return cls(*torch.tensor(parts, dtype=torch.float64).unbind(1))

    def parts(self, x_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor):
        """log of w N(x_t), and the mean of x0 given x_t, by component `(…, K)`."""
        x_t, alpha, sigma = (part.unsqueeze(-1) for part in (x_t, alpha, sigma))
        variance = alpha**2 * self.stds**2 + sigma**2
        away = x_t - alpha * self.means
        log = self.weights.log() - 0.5 * (away**2 / variance + variance.log())
        return log, self.means + alpha * self.stds**2 / variance * away

    def log_density(self, x_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Of noisy samples, up to a constant."""
        return self.parts(x_t, alpha, sigma)[0].logsumexp(-1)

    def x0(self, x_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """E[x0 | x_t]: what a perfect network takes for the clean sample."""
        log, means = self.parts(x_t, alpha, sigma)
        return (log.softmax(-1) * means).sum(-1)

    def network(self, diffusion: Diffusion):
        """`(x_t, t) → output` of a perfect network, written by hand for both parametrisations."""

        def output(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            alpha, sigma = diffusion.alpha_sigma(t, x_t)
            return output_for(diffusion, self.x0(x_t, alpha.expand_as(x_t), sigma.expand_as(x_t)), x_t, t)

        return output

    def sample(self, shape, generator: torch.Generator) -> torch.Tensor:
        which = torch.multinomial(self.weights, int(torch.Size(shape).numel()), True, generator=generator).view(shape)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return self.means[which] + self.stds[which] * noise


def output_for(diffusion: Diffusion, x0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What a network says that takes this x0 for what is in x_t."""
    alpha, sigma = diffusion.alpha_sigma(t, x_t)
    noise = (x_t - alpha * x0) / sigma
    return noise if diffusion.prediction_type == "epsilon" else noise - x0
