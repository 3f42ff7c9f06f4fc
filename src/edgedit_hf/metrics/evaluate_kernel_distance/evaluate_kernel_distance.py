"""The kernel distance as an `evaluate` module: `evaluate.load(<this folder>)`.

One import a line and no relative imports: `evaluate` copies this file elsewhere and parses its imports by itself.
"""

import evaluate

from edgedit_hf.metrics import kernel_distance
from edgedit_hf.metrics.adapters import describe

_DESCRIPTION = "Unbiased squared maximum mean discrepancy of two sets of features (Bińkowski et al. 2018)."
_CITATION = """
@inproceedings{binkowski2018demystifying,
    title={Demystifying MMD GANs},
    author={Bi{\\'n}kowski, Miko{\\l}aj and Sutherland, Danica J and Arbel, Michael and Gretton, Arthur},
    booktitle={International Conference on Learning Representations},
    year={2018},
}
"""
_INPUTS = """
Args:
    predictions: features of generated images, one list of D floats an image.
    references: features of real images, as many as predictions, of the same width.
    subsets: random subsets that the mean is taken of, default 100.
    subset_size: images of each, default 1000; all, where there are fewer.
    seed: that the subsets are drawn by, default 0.
Returns:
    {"kernel_distance": float, "standard_deviation": float}
"""


class KernelDistance(evaluate.Metric):
    """`evaluate` adapter of [`edgedit_hf.metrics.kernel_distance`].

    `evaluate` pairs predictions with references, so both sets have the same size here.
    """

    def _info(self) -> evaluate.MetricInfo:
        return describe(_DESCRIPTION, _CITATION, _INPUTS, ["predictions", "references"])

    def _compute(
        self, predictions, references, subsets: int = 100, subset_size: int = 1000, seed: int = 0
    ) -> dict[str, float]:
        mean, deviation = kernel_distance(predictions, references, subsets, min(subset_size, len(predictions)), seed)
        return {"kernel_distance": mean, "standard_deviation": deviation}
