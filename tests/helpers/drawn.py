"""What a figure shows: colours of its file at places of its data."""

import numpy as np
import pytest
from PIL import Image


class Drawn:
    """A figure that was written, read back from its file: colours at places of its axes."""

    def __init__(self, path, figure):
        self.pixels = np.asarray(Image.open(path).convert("RGB"))
        self.figure = figure
        box = figure.get_tightbbox().padded(0.1)  # what is left of the figure when its margins are cut off
        self.left, self.top, self.dpi = box.x0, box.y1, figure.dpi
        assert self.pixels.shape[:2] == pytest.approx((self.dpi * box.height, self.dpi * box.width), abs=2)

    def colour(self, x: float, y: float, axes: int = 0) -> str:
        """Colour of the pixel at a place of the data."""
        right, up = self.figure.axes[axes].transData.transform((x, y)) / self.dpi
        row, column = (self.top - up) * self.dpi, (right - self.left) * self.dpi
        return "#{:02X}{:02X}{:02X}".format(*self.pixels[int(row), int(column)])

    def texts(self, axes: int = 0) -> list[str]:
        return [text.get_text() for text in self.figure.axes[axes].texts]

    def legend(self) -> list[str]:
        return [text.get_text() for legend in self.figure.legends for text in legend.get_texts()]
