"""Precision and recall of features as an `evaluate` module: `evaluate.load(<this folder>)`.

One import a line and no relative imports: `evaluate` copies this file elsewhere and parses its imports by itself.
"""

import evaluate

from edgedit_hf.metrics import adm_precision_recall, precision_recall
from edgedit_hf.metrics.adapters import describe

_DESCRIPTION = "How many generated images lie among the real ones, and the other way round (Kynkäänniemi et al. 2019)."
_CITATION = """
@inproceedings{kynkaanniemi2019improved,
    title={Improved Precision and Recall Metric for Assessing Generative Models},
    author={Kynk{\\"a}{\\"a}nniemi, Tuomas and Karras, Tero and Laine, Samuli and Lehtinen, Jaakko and Aila, Timo},
    booktitle={Advances in Neural Information Processing Systems},
    year={2019},
}
"""
_INPUTS = """
Args:
    predictions: features of generated images, one list of D floats an image.
    references: features of real images, as many as predictions, of the same width.
    k: neighbours that the manifolds reach to, default 3.
    adm: whether distances are rounded as ADM's evaluator does, which published figures of diffusion models rest on.
Returns:
    {"precision": float, "recall": float}
"""


class PrecisionRecall(evaluate.Metric):
    """`evaluate` adapter of [`edgedit_hf.metrics.precision_recall`] and [`edgedit_hf.metrics.adm_precision_recall`].

    `evaluate` pairs predictions with references, so both sets have the same size here.
    """

    def _info(self) -> evaluate.MetricInfo:
        return describe(_DESCRIPTION, _CITATION, _INPUTS, ["predictions", "references"])

    def _compute(self, predictions, references, k: int = 3, adm: bool = False) -> dict[str, float]:
        precision, recall = (adm_precision_recall if adm else precision_recall)(references, predictions, k)
        return {"precision": precision, "recall": recall}
