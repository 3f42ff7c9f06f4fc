"""The inception score as an `evaluate` module: `evaluate.load(<this folder>)`.

One import a line and no relative imports: `evaluate` copies this file elsewhere and parses its imports by itself.
"""

import evaluate

from edgedit_hf.metrics import inception_score
from edgedit_hf.metrics.adapters import describe

_DESCRIPTION = "exp(E KL(p(y|x) ‖ p(y))) of a classifier's answers (Salimans et al. 2016), as ADM computes it."
_CITATION = """
@inproceedings{salimans2016improved,
    title={Improved techniques for training GANs},
    author={Salimans, Tim and Goodfellow, Ian and Zaremba, Wojciech and Cheung, Vicki and Radford, Alec and Chen, Xi},
    booktitle={Advances in Neural Information Processing Systems},
    year={2016},
}
"""
_INPUTS = """
Args:
    predictions: a classifier's logits or log-probabilities of generated images, one list of floats an image.
    split_size: images of the consecutive parts that the score is computed on, default 5000.
Returns:
    {"inception_score": float, "standard_deviation": float}
"""


class InceptionScore(evaluate.Metric):
    """`evaluate` adapter of [`edgedit_hf.metrics.inception_score`]; it adds nothing to it."""

    def _info(self) -> evaluate.MetricInfo:
        return describe(_DESCRIPTION, _CITATION, _INPUTS, ["predictions"])

    def _compute(self, predictions, split_size: int = 5000) -> dict[str, float]:
        mean, deviation = inception_score(predictions, split_size)
        return {"inception_score": mean, "standard_deviation": deviation}
