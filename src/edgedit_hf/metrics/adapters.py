"""What the `evaluate` modules of this package share: how they describe themselves, and the page that serves one as a
Space on the Hub, made with gradio.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import datasets
import evaluate


def describe(description: str, citation: str, inputs: str, names: Sequence[str]) -> evaluate.MetricInfo:
    """The description of a module.

    Args:
        inputs: its arguments and what it returns, in words.
        names: of the inputs that have a list of floats an image.
    """
    features = datasets.Sequence(datasets.Value("float32"))
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=inputs,
        features=datasets.Features(dict.fromkeys(names, features)),
    )


def launch(module: str | Path) -> None:
    """Serve the metric of a module's file: a field of JSON for each of its inputs.

    The launcher that comes with `evaluate` needs gradio 3, which needs NumPy 1.
    """
    import gradio

    metric = evaluate.load(str(module))

    def compute(*texts: str) -> dict[str, float]:
        try:
            return metric.compute(**dict(zip(metric.features, map(json.loads, texts))))
        except Exception as error:  # shown on the page instead of a traceback in its log
            raise gradio.Error(str(error)) from error

    gradio.Interface(
        compute,
        [gradio.Textbox(label=f"{name}: JSON, a list of floats an image") for name in metric.features],
        gradio.JSON(),
        title=metric.name,
        description=metric.description,
        api_name="compute",
    ).launch()
