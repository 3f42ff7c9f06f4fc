"""The page of this metric as a Space on the Hub."""

from pathlib import Path

from edgedit_hf.metrics.adapters import launch

launch(Path(__file__).with_name("evaluate_frechet_distance.py"))
