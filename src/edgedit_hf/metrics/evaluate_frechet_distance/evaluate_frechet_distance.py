"""The Fréchet distance as an `evaluate` module: `evaluate.load(<this folder>)`.

One import a line and no relative imports: `evaluate` copies this file elsewhere and parses its imports by itself.
"""

import evaluate

from edgedit_hf.metrics import frechet_distance
from edgedit_hf.metrics.adapters import describe

_DESCRIPTION = "Squared Fréchet distance of two sets of features, each fitted by a Gaussian (Heusel et al. 2017)."
_CITATION = """
@inproceedings{heusel2017gans,
    title={GANs trained by a two time-scale update rule converge to a local Nash equilibrium},
    author={Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and Hochreiter, Sepp},
    booktitle={Advances in Neural Information Processing Systems},
    year={2017},
}
"""
_INPUTS = """
Args:
    predictions: features of generated images, one list of D floats an image.
    references: features of real images, as many as predictions, of the same width.
Returns:
    {"frechet_distance": float}
"""


class FrechetDistance(evaluate.Metric):
    """`evaluate` adapter of [`edgedit_hf.metrics.frechet_distance`]; it adds nothing to it.

    `evaluate` pairs predictions with references, so both sets have the same size here.
    """

    def _info(self) -> evaluate.MetricInfo:
        return describe(_DESCRIPTION, _CITATION, _INPUTS, ["predictions", "references"])

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"frechet_distance": frechet_distance(predictions, references)}
