"""The page of this metric as a Space on the Hub."""

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load(str(Path(__file__).with_name("evaluate_frechet_distance.py"))))
