"""The figures: what a montage holds, and that every figure is drawn for small and for DiT-XL-sized inputs."""

import numpy as np
import pytest
from PIL import Image

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.report import plots
from edgedit_hf.search_space import SearchSpace


def test_montage_places_every_pixel(tmp_path):
    images = np.random.default_rng(0).random((5, 3, 4, 1))
    picture = plots.montage(images, columns=2)
    assert picture.shape == (3 * 4 - 1, 2 * 5 - 1, 3) and picture.dtype == np.uint8
    pixels = np.rint(images * 255)
    assert (picture[4:7, 5:9] == pixels[3]).all() and (picture[8:, :4] == pixels[4]).all()
    assert (picture[3] == 255).all() and (picture[8:, 5:] == 255).all()  # gap, missing tile
    assert (plots.montage(pixels.astype(np.uint8), 2) == picture).all()
    plots.save_montage(tmp_path / "grid.png", images, 2)
    assert (np.asarray(Image.open(tmp_path / "grid.png")) == picture).all()
    for bad in (images[..., 0], np.full((1, 2, 2, 1), np.nan), images[:0]):
        with pytest.raises(EdgeDiTError, match="expected finite values of shape"):
            plots.montage(bad, 2)


@pytest.mark.parametrize("num_layers", [5, 28])
def test_bank_and_genotype_figures(tmp_path, num_layers):
    space = SearchSpace(num_layers, 128, 4)
    rng = np.random.default_rng(0)
    entries = {
        str(i): {
            "source": layer.source,
            "option": space.option_of(layer),
            "loss_before": rng.random(),
            "loss_after": rng.random(),
        }
        for i, layer in enumerate(space.proxies())
    }
    plots.proxy_loss_plot(tmp_path / "proxies.png", entries)
    plots.genotype_strip(tmp_path / "genotype.png", space.decode(rng.random(num_layers)), space)
    for path in tmp_path.glob("*.png"):
        picture = np.asarray(Image.open(path).convert("L"))
        assert picture.shape[1] > 1000 and picture.std() > 5
    assert len(list(tmp_path.iterdir())) == 2  # nothing is left aside
    with pytest.raises(EdgeDiTError, match="0 entries"):
        plots.proxy_loss_plot(tmp_path / "proxies.png", {})


def test_bank_figure_shows_every_start_that_is_known(tmp_path):
    space = SearchSpace(28, 128, 4)
    rng = np.random.default_rng(0)
    older, newer = {}, {}
    for i, layer in enumerate(space.proxies()):
        after = 10 ** rng.uniform(-3, -2)
        older[str(i)] = {
            "source": layer.source,
            "option": space.option_of(layer),
            "loss_before": 3 * after,
            "loss_after": after,
        }
        losses = {
            "random": 1 + 0.2 * rng.random(),
            "copied": 0.3 + 0.2 * rng.random(),
            "closed_form": 3 * after,
            "after": after,
        }
        if space.option_of(layer) == "both":
            losses["combined"] = 2 * after
        newer[str(i)] = {**older[str(i)], "losses": losses}
    plots.proxy_loss_plot(tmp_path / "older.png", older)
    plots.proxy_loss_plot(tmp_path / "newer.png", newer)
    plots.proxy_loss_plot(tmp_path / "mixed.png", {**newer, "0": older["0"]})
    grey = {}
    for name in ("older", "newer", "mixed"):
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).reshape(-1, 3)
        wanted = tuple(int(plots.GREY[i : i + 2], 16) for i in (1, 3, 5))
        grey[name] = int((pixels == wanted).all(1).sum())
    assert grey["older"] == 0 < 100 < grey["mixed"] < grey["newer"]


def test_sensitivity_figure(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for number, name in enumerate(
        ["MLP ratio 1", "MLP ratio 2", "MLP ratio 3", "attention 512", "attention 768", "merge 2 → 1", "merge 3 → 1"]
    ):
        length = max(1, number - 3)
        for first in range(28 - length + 1):
            after = 10 ** rng.uniform(-4, -1)
            values = {"layer_before": 2 * after, "layer_after": after, "model_before": after, "model_after": after / 2}
            rows.append({"change": name, "layers": [list(range(first, first + length))], **values})
        everywhere = {"layer_before": None, "layer_after": None, "model_before": 0.5, "model_after": 0.1}
        rows.append({"change": name, "layers": [[i] for i in range(28)], **everywhere})
    plots.sensitivity_plot(tmp_path / "plot.png", rows, 28)
    picture = np.asarray(Image.open(tmp_path / "plot.png").convert("L"))
    assert picture.shape[1] > 1000 and picture.std() > 5


@pytest.mark.parametrize("count", [1, 4])
def test_sample_grid_of_any_number_of_panels(tmp_path, count):
    wide, narrow = (plots.montage(np.random.default_rng(0).random((20, 8, 8, 3)), columns) for columns in (10, 2))
    for name, picture in (("wide", wide), ("narrow", narrow)):
        plots.sample_grid(tmp_path / f"{name}.png", {f"model {i}": picture for i in range(count)})
        assert np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")).std() > 20
