"""The figures, by what they show: every mark stands where its figures are, in its colour; every tile is its picture."""

import numpy as np
import pytest
from drawn import Drawn
from matplotlib.colors import to_rgb
from PIL import Image

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.menu_space import MenuSpace
from edgedit_hf.report import plots
from edgedit_hf.search_space import OPTIONS, SearchSpace

WHITE = "#FFFFFF"


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """`drawn(plots.curve_plot, …)`: the figure that the function writes, as [`Drawn`]."""
    figures, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))

    def draw(function, *arguments, **options) -> Drawn:
        function(tmp_path / "figure.png", *arguments, **options)
        assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]  # nothing is left aside
        return Drawn(tmp_path / "figure.png", figures[-1])

    return draw


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


def test_a_search_shows_its_front_its_choice_and_the_teacher(drawn):
    points = [(9.0, 1.0), (5.0, 2.0), (7.0, 3.0), (4.0, 4.0)]  # the third is behind the second
    picture = drawn(plots.pareto_plot, points, [(8.0, 3.5)], chosen=points[1], teacher=(3.0, 6.0))
    assert picture.colour(1.0, 9.0) == picture.colour(4.0, 4.0) == plots.BLUE
    assert picture.colour(3.0, 7.0) == WHITE and picture.colour(3.5, 8.0) == plots.GREY
    assert picture.colour(2.0, 5.0) == plots.ORANGE and picture.colour(6.0, 3.0) == plots.BLACK
    # What a latency buys until the next point of the front is reached.
    assert picture.colour(1.5, 9.0) == picture.colour(2.0, 7.5) == picture.colour(3.5, 5.0) == plots.BLUE
    assert picture.colour(1.5, 5.0) != plots.BLUE != picture.colour(1.0, 7.5)
    assert {"random search", "Pareto front", "teacher", "chosen"} < set(picture.legend())


def test_a_search_shows_students_that_have_a_name(drawn):
    points = [(9.0, 1.0), (5.0, 2.0), (4.0, 4.0)]
    named = {"EdgeDiT-1": (7.0, 3.0), "EdgeDiT-6": (None, 3.5)}
    picture = drawn(plots.pareto_plot, points, chosen=points[1], teacher=(3.0, 6.0), named=named)
    assert picture.colour(3.0, 7.0) == plots.GREEN
    up = [picture.colour(3.5, y) for y in np.linspace(6, 8.9, 200)]
    assert plots.PURPLE in up and WHITE in up  # dashed: where it stands is known, how high is not
    assert {"EdgeDiT-1", "EdgeDiT-6 (not evaluated)"} < set(picture.legend())


def test_several_runs_of_a_search_are_a_mean_in_a_band(drawn):
    traces = {"ours": [[1.0, 2.0, 4.0], [1.0, 4.0, 5.0]], "greedy": [1.0, 1.5, 2.0]}
    picture = drawn(plots.hypervolume_plot, traces, whole=6.0)
    assert picture.colour(3.25, 4.5) == plots.BLUE  # the mean
    light = picture.colour(3.25, 4.2)
    assert light not in (WHITE, plots.BLUE) and light == picture.colour(2.6, 2.4) and picture.colour(3.25, 3.8) == WHITE
    assert picture.colour(3.25, 2.0) != WHITE and "true front" in picture.legend()
    assert picture.figure.axes[0].get_ylim()[1] > 6.0


def test_a_network_stands_at_what_it_was_predicted_and_measured(drawn):
    networks = [
        {"predicted_ms": 20.0, "measured_ms": 25.0, "iqr_ms": 10.0},
        {"predicted_ms": 50.0, "measured_ms": 50.0, "iqr_ms": 1.0},
    ]
    picture = drawn(plots.latency_plot, networks)
    assert picture.colour(25.0, 20.0) == picture.colour(50.0, 50.0) == plots.BLUE
    assert picture.colour(21.0, 20.0) == picture.colour(29.0, 20.0) == plots.SKY  # half its IQR to either side
    assert picture.colour(31.0, 20.0) != plots.SKY
    assert picture.figure.axes[0].get_title() == "2 whole networks: mean error 10.0%, largest 20.0%"
    shade = picture.colour(41.0, 43.0)
    assert shade not in (WHITE, plots.GREY) and picture.colour(41.0, 46.0) == WHITE  # 8 % of 41 ms
    bare = drawn(plots.latency_plot, [{k: v for k, v in n.items() if k != "iqr_ms"} for n in networks])
    assert bare.colour(21.0, 20.0) != plots.SKY and "network" in bare.legend()


def test_a_hypervolume_stands_as_high_as_it_is(drawn):
    picture = drawn(plots.hypervolume_plot, {"ours": [1.0, 3.0, 4.0], "random": [1.0, 3.0, 3.2]}, num_initial=2)
    assert picture.colour(3.25, 4.0) == plots.BLUE  # the last step is drawn to its end
    assert picture.colour(1.45, 3.35) not in (WHITE, plots.BLUE) and picture.colour(2.45, 3.35) == WHITE  # the shade
    assert picture.figure.axes[0].get_ylim()[0] < 3.0  # where they end, and as much again below


@pytest.mark.parametrize("num_layers", [5, 28])
def test_every_proxy_has_a_mark_at_its_loss(drawn, num_layers):
    space, rng = SearchSpace(num_layers, 128, 4), np.random.default_rng(0)
    entries = {
        str(i): {
            "source": layer.source,
            "option": space.option_of(layer),
            "loss_before": 10 ** rng.uniform(-1, 0),
            "loss_after": 10 ** rng.uniform(-3, -2),
        }
        for i, layer in enumerate(space.proxies())
    }
    picture = drawn(plots.proxy_loss_plot, entries)
    for row, length in enumerate((1, 2)):
        place = 0
        for option in OPTIONS:
            group = [e for e in entries.values() if len(e["source"]) == length and e["option"] == option]
            for x, entry in enumerate(sorted(group, key=lambda e: e["source"]), start=place):
                assert picture.colour(x, entry["loss_after"], row) == plots.OPTION_COLOURS[option]
                assert picture.colour(x, entry["loss_before"], row) == WHITE  # a hollow mark
            place += len(group) + bool(group)
    with pytest.raises(EdgeDiTError, match="0 entries"):
        drawn(plots.proxy_loss_plot, {})


def test_bank_figure_shows_every_start_that_is_known(drawn):
    space, rng = SearchSpace(5, 128, 4), np.random.default_rng(0)
    older, newer = {}, {}
    for i, layer in enumerate(space.proxies()):
        after = 10 ** rng.uniform(-3, -2)
        entry = {"source": layer.source, "option": space.option_of(layer)}
        older[str(i)] = {**entry, "loss_before": 3 * after, "loss_after": after}
        losses = {"random": 1.2, "copied": 0.4, "closed_form": 3 * after, "after": after}
        newer[str(i)] = {**older[str(i)], "losses": losses | ({"combined": 2 * after} if i == 0 else {})}
    first = next(iter(newer.values()))["option"]
    assert first == OPTIONS[1]
    for entries, known in ((older, False), (newer, True), ({**newer, "0": older["0"]}, False)):
        picture = drawn(plots.proxy_loss_plot, entries)
        assert (picture.colour(0, 1.2) == plots.GREY) == known if entries is not older else True
        assert picture.colour(0, entries["0"]["loss_after"]) == plots.OPTION_COLOURS[first]
    newest = drawn(plots.proxy_loss_plot, newer)
    assert all(newest.colour(x, loss) == plots.GREY for x in range(5) for loss in (0.4, 1.2))


@pytest.mark.parametrize("num_layers", [5, 28])
def test_a_genotype_is_a_cell_a_layer_in_the_colour_of_its_option(drawn, num_layers):
    space = SearchSpace(num_layers, 128, 4)
    genotype = space.decode(np.random.default_rng(0).random(num_layers))
    picture = drawn(plots.genotype_strip, genotype, space)
    for layer in genotype.layers:
        colour = plots.OPTION_COLOURS[space.option_of(layer)]
        for place in layer.source:
            assert picture.colour(place + 0.2, 0.1) == colour
        ends = layer.source[0] + 0.06, layer.source[-1] + 0.94
        assert all(picture.colour(x, 0.1) == colour for x in ends)
        if len(layer.source) > 1:  # one cell: no gap in its middle
            assert picture.colour(layer.source[-1], 0.1) == colour
    assert all(picture.colour(number + 0.2, 1.25) == "#E3E6EA" for number in range(num_layers))
    assert picture.texts()[:num_layers] == [str(number) for number in range(num_layers)]
    assert len(picture.texts()) == num_layers + len(genotype.layers)


def row_colour(picture, row: int, rows: int, place: float) -> str:
    return picture.colour(place, rows - 1 - row + 0.15)


@pytest.mark.parametrize("num_layers", [5, 28])
def test_a_front_is_a_row_a_student_and_a_colour_an_option(drawn, num_layers):
    space, rng = SearchSpace(num_layers, 128, 4), np.random.default_rng(0)
    points = [(space.decode(rng.random(num_layers)), 9.0 - i, 3.0 + i) for i in range(4)]
    picture = drawn(plots.front_strips, points[::-1], space, chosen=points[2][0])
    for row, (genotype, *_) in enumerate(points):  # fastest first
        for layer in genotype.layers:
            colour = plots.OPTION_COLOURS[space.option_of(layer)]
            assert all(row_colour(picture, row, 4, place + 0.25) == colour for place in layer.source)
            if len(layer.source) > 1:  # one cell: no gap in its middle
                assert row_colour(picture, row, 4, layer.source[-1]) == colour
    texts = picture.texts()
    assert [text for text in texts if "ms" in text] == ["3.000 ms", "4.000 ms", "★ 5.000 ms", "6.000 ms"]
    assert set(picture.legend()) <= set(plots.OPTION_LABELS.values())


def test_a_long_front_keeps_its_ends_and_the_chosen_one(drawn):
    space = SearchSpace(6, 128, 4)
    points = [(genotype, 100.0 - i, 1.0 + i) for i, genotype in zip(range(60), space.all())]
    picture = drawn(plots.front_strips, points, space, chosen=points[7][0], most=10)
    rows = [text for text in picture.texts() if "ms" in text]
    assert len(rows) in (10, 11) and rows[0] == "1.00 ms" and rows[-1] == "60.00 ms" and "★ 8.00 ms" in rows


def test_the_many_options_of_a_menu_are_told_apart(drawn):
    menu = [{"mlp_ratio": r} for r in (1.0, 2.0, 3.0)] + [{"attention_dim": a} for a in (32, 64)]
    menu += [{"num_heads": 8}, {"num_heads": 2}, {"modulation_rank": 0}, {"modulation_rank": 16}, {"token_merge": 2}]
    menu += [
        {"attention_dim": 64, "mlp_ratio": 2.0, "modulation_rank": 0},
        {"merge": 3},
        {"merge": 2, "mlp_ratio": 2.0},
    ]
    space, rng = MenuSpace(28, 128, 4, 4.0, menu), np.random.default_rng(0)
    points = [(space.decode(rng.random(28)), 9.0 - i, 3.0 + i) for i in range(6)]
    picture = drawn(plots.front_strips, points, space)
    used = {space.option_of(layer) for genotype, *_ in points for layer in genotype.layers}
    legend = dict(text.replace("\n", " ").split(": ") for text in picture.legend())
    assert len(used) == len(legend) == 12 and legend["1"] == "original size"
    numbers = {label: number for number, label in legend.items()}
    wanted = [
        numbers[plots.option_label(space.option_of(layer))] for genotype, *_ in points for layer in genotype.layers
    ]
    assert [text for text in picture.texts() if text.isdigit()] == wanted
    assert len(set(plots.option_looks(used).values())) == 12
    assert plots.option_label("attn64-mlp2-static") == "attention 64, MLP ratio 2, static modulation"
    assert plots.option_label("heads8-rank16-tokens2") == "8 heads, modulation rank 16, 2 × 2 tokens"
    assert plots.option_label("both") == "both narrow"
    drawn(plots.genotype_strip, points[0][0], space)
    entries = {
        str(i): {"source": layer.source, "option": space.option_of(layer), "loss_before": 0.2, "loss_after": 0.1}
        for i, layer in enumerate(space.proxies())
    }
    picture = drawn(plots.proxy_loss_plot, entries)
    assert [axes.get_xlabel() for axes in picture.figure.axes] == [plots.MERGED_NAMES[n] for n in (1, 2, 3)]


def brightness(colour: str) -> float:
    return sum(int(colour[place : place + 2], 16) for place in (1, 3, 5)) / (3 * 255)


def test_sensitivity_stands_where_its_layers_are(drawn):
    rng, rows = np.random.default_rng(0), []
    names = ["MLP ratio 1", "MLP ratio 2", "attention 512", "merge 2 → 1", "merge 3 → 1"]
    for number, name in enumerate(names):
        length = max(1, number - 1)
        for first in range(28 - length + 1):
            after = 10 ** rng.uniform(-4, -1)
            values = {"layer_before": 2 * after, "layer_after": after, "model_before": after, "model_after": after / 2}
            rows.append({"change": name, "layers": [list(range(first, first + length))], **values})
        everywhere = {
            "layer_before": None,
            "layer_after": None,
            "model_before": 0.5,
            "model_after": 0.1 + 0.05 * number,
        }
        rows.append({"change": name, "layers": [[i] for i in range(28)], **everywhere})
    picture = drawn(plots.sensitivity_plot, rows, 28)
    last = [row for row in rows if row["change"] == names[-1] and row["layer_after"] is not None]  # drawn on top
    last_colour = picture.colour((last[0]["layers"][0][0] + last[0]["layers"][0][-1]) / 2, last[0]["layer_after"])
    for row in last:
        middle = (row["layers"][0][0] + row["layers"][0][-1]) / 2
        assert picture.colour(middle, row["layer_after"], 0) == picture.colour(middle, row["model_after"], 1)
        assert picture.colour(middle, row["layer_after"], 0) == last_colour != WHITE
    for number in range(len(names)):  # everywhere at once, solid after the tune; hollow before, but for the dotted line
        assert brightness(picture.colour(number, 0.1 + 0.05 * number, 2)) < 0.8
        assert max(brightness(picture.colour(number + beside, 0.5, 2)) for beside in (0.03, 0.04, 0.05)) > 0.85
    assert picture.legend() == names


def plain(colours: list[str], side: int) -> np.ndarray:
    """One image of one colour each."""
    return np.array([np.broadcast_to(to_rgb(colour), (side, side, 3)) for colour in colours])


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("columns", [10, 2])
def test_sample_grid_shows_every_tile_of_every_panel(drawn, count, columns):
    rng = np.random.default_rng(0)
    tiles = {
        f"model {i}": ["#{:02X}{:02X}{:02X}".format(*rng.integers(0, 256, 3)) for _ in range(20)] for i in range(count)
    }
    picture = drawn(
        plots.sample_grid, {name: plots.montage(plain(colours, 8), columns) for name, colours in tiles.items()}
    )
    for axes, (name, colours) in enumerate(tiles.items()):
        assert picture.figure.axes[axes].get_title() == name
        for index, colour in enumerate(colours):
            assert picture.colour(index % columns * 9 + 3.5, index // columns * 9 + 3.5, axes) == colour
    with pytest.raises(EdgeDiTError, match="0 pictures"):
        drawn(plots.sample_grid, {})


def test_caption_grid_puts_images_under_their_captions(drawn):
    captions, colours = (
        ["a thin one", "a thick seven that leans"],
        {"full": ["#102030", "#FF0000"], "tiny": ["#00FF00", "#0000FF"]},
    )
    picture = drawn(
        plots.caption_grid, captions, {name: (255 * plain(row, 8)).astype(np.uint8) for name, row in colours.items()}
    )
    found = [[picture.colour(3.5, 3.5, 2 * row + column) for column in range(2)] for row in range(2)]
    assert found == list(colours.values())
    assert [axes.get_title().replace("\n", " ") for axes in picture.figure.axes[:2]] == captions
    assert [picture.figure.axes[2 * row].get_ylabel() for row in range(2)] == list(colours)
    with pytest.raises(EdgeDiTError, match="There are 1 captions"):
        drawn(plots.caption_grid, captions[:1], {"full": plain(colours["full"], 8)})


def test_curves_go_through_their_points(drawn):
    series = {"distilled": ([0, 5, 10], [9.0, 3.0, 1.5]), "random": ([0, 5, 10], [30.0, 20.0, 4.0])}
    picture = drawn(plots.curve_plot, series)
    for (steps, values), colour in zip(series.values(), (plots.BLUE, plots.ORANGE)):
        assert [picture.colour(step, value) for step, value in zip(steps, values)] == [colour] * 3
    assert picture.legend() == list(series) and picture.figure.axes[0].get_yscale() == "log"  # 1.5 to 30
