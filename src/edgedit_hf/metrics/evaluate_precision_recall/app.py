"""The page of this metric as a Space on the Hub."""

from pathlib import Path

from edgedit_hf.metrics.space import launch

launch(Path(__file__).parent)
