"""The figures: what a montage holds, and that every figure is drawn for small and for DiT-XL-sized inputs."""

import numpy as np
import pytest
from PIL import Image

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.search import plots
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
        str(i): {"source": layer.source, "option": space.option_of(layer), "loss_before": rng.random(), "loss_after": rng.random()}
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


@pytest.mark.parametrize("count", [1, 4])
def test_sample_grid_of_any_number_of_panels(tmp_path, count):
    wide, narrow = (plots.montage(np.random.default_rng(0).random((20, 8, 8, 3)), columns) for columns in (10, 2))
    for name, picture in (("wide", wide), ("narrow", narrow)):
        plots.sample_grid(tmp_path / f"{name}.png", {f"model {i}": picture for i in range(count)})
        assert np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")).std() > 20
