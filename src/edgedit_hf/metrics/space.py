"""The page of an `evaluate` module as a Space on the Hub, made with gradio."""

from __future__ import annotations

import json
from pathlib import Path

import evaluate


def launch(folder: str | Path) -> None:
    """Serve the metric of a folder: a field of JSON for each of its inputs.

    The launcher that comes with `evaluate` needs gradio 3, which needs NumPy 1.
    """
    import gradio

    metric = evaluate.load(str(Path(folder, f"{Path(folder).name}.py")))

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
