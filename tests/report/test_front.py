"""What the page of a report says of the genotypes of a search, and the paper's students."""

import json
import shutil

import pytest
from run_folder import make_run

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.genotype import Genotype
from edgedit_hf.menu_space import MenuSpace
from edgedit_hf.models.transformer_edgedit import PRESETS
from edgedit_hf.report import front
from edgedit_hf.report.edgedit import build_report
from edgedit_hf.report.front import front_data, overlaid, paper_students
from edgedit_hf.search.pareto import pareto_front
from edgedit_hf.search_space import SearchSpace

WORDS = {
    "original": "original size",
    "mlp": "narrow MLP",
    "attention": "narrow attention",
    "both": "both narrow",
}


@pytest.fixture(scope="module")
def made(make_transformer, tmp_path_factory):
    """A run whose figures are made up."""
    return make_run(tmp_path_factory.mktemp("front") / "run", make_transformer())


def test_every_genotype_that_was_evaluated_says_what_it_is(made):
    report = build_report(made)
    found = front_data(made, report)
    told, random = (json.loads((made / "search" / f"{name}.json").read_text()) for name in ("state", "random"))
    space = SearchSpace.from_dict(told["settings"]["space"])
    points = {point["facts"][-1][1]: point for point in found["points"]}
    searched = {space.from_code(point["code"]).hash: point for point in told["told"]}
    assert set(points) == set(searched) | {space.from_code(point["code"]).hash for point in random["told"]}
    assert found["left_out"] == 0 and [p["x"] for p in found["points"]] == sorted(p["x"] for p in found["points"])
    for point in told["told"]:
        genotype = space.from_code(point["code"])
        shown = points[genotype.hash]
        assert (shown["x"], shown["y"]) == pytest.approx((point["latency_ms"], point["distance"]), rel=1e-5)
        for (first, count, option), layer in zip(shown["strip"], genotype.layers, strict=True):
            assert layer.source == tuple(range(first, first + count))
            assert found["options"][option]["label"] == WORDS[space.option_of(layer)]
    best = pareto_front([(point["distance"], point["latency_ms"]) for point in told["told"]])
    line = sorted([told["told"][i]["latency_ms"], told["told"][i]["distance"]] for i in best)
    assert found["front"] == line
    kinds = {key: point["kind"] for key, point in points.items()}
    assert kinds[report["genotype"]["hash"]] == "chosen" and kinds[space.from_code((0, 0)).hash] == "teacher"
    only_random = set(points) - set(searched)
    assert {kinds[key] for key in only_random} <= {"random", "named"}
    measured = dict(points[report["genotype"]["hash"]]["facts"])
    assert measured["measured: student, tuned"] == (
        "Fréchet distance (digits-cnn, n=64) 1.7, ONNX Runtime fp32 5.00 ms, ONNX Runtime int8 2.50 ms"
    )


def test_a_student_that_was_taken_by_hand_stands_at_its_own_figures(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "run")
    report = build_report(folder)
    space = SearchSpace.from_dict(report["bank"]["space"])
    known = {point["facts"][-1][1] for point in front_data(folder, report)["points"]}
    other = next(genotype for genotype in space.all() if genotype.hash not in known)
    choice = json.loads((folder / "student" / "choice.json").read_text())
    choice |= {"genotype": other.to_layers(), "distance": 3.5, "predicted_latency_ms": 4.5}
    (folder / "student" / "choice.json").write_text(json.dumps(choice))
    (point,) = [p for p in front_data(folder, build_report(folder))["points"] if p["kind"] == "chosen"]
    assert (point["x"], point["y"]) == (4.5, 3.5) and point["facts"][-1][1] == other.hash


def test_of_many_genotypes_the_front_is_kept(made, monkeypatch):
    report = build_report(made)
    every = front_data(made, report)
    special = {p["facts"][-1][1] for p in every["points"] if p["kind"] not in ("search", "random")}
    monkeypatch.setattr(front, "POINTS", len(special) + 2)
    fewer = front_data(made, report)
    kept = {p["facts"][-1][1] for p in fewer["points"]}
    assert special < kept and len(kept) <= len(special) + 2
    assert fewer["left_out"] == len(every["points"]) - len(kept) > 0


def test_a_search_of_nothing_but_its_front(made, tmp_path):
    """A short one may judge no other student, and random search may have been left out."""
    folder = shutil.copytree(made, tmp_path / "run")
    (folder / "search" / "random.json").unlink()
    state = json.loads((folder / "search" / "state.json").read_text())
    on_front = {tuple(point["code"]) for point in build_report(made)["search"]["front"]}
    state["told"] = [point for point in state["told"] if tuple(point["code"]) in on_front]
    (folder / "search" / "state.json").write_text(json.dumps(state))
    data = front_data(folder, build_report(made))
    assert {point["kind"] for point in data["points"]} <= {"front", "chosen", "teacher"} and data["left_out"] == 0


def test_searches_share_a_plot_where_they_share_its_axes(made, tmp_path):
    one = front_data(made, build_report(made))
    other = {**one, "key": "another", "y": "FID, not yet tuned"}
    plots = overlaid({"a": one, "b": None, "c": other, "d": one})
    assert [[series["run"] for series in plot["series"]] for plot in plots] == [["a", "d"], ["c"]]
    assert plots[1]["y"] == "FID, not yet tuned"
    folder = shutil.copytree(made, tmp_path / "run")
    stage = json.loads((folder / "search" / "stage.json").read_text())
    stage["config"]["search"]["sampling_steps"] += 1
    (folder / "search" / "stage.json").write_text(json.dumps(stage))
    assert front_data(folder, build_report(folder))["key"] != one["key"]


def test_a_code_that_the_space_does_not_have_is_refused(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "run")
    state = json.loads((folder / "search" / "state.json").read_text())
    state["told"][0]["code"] = [19]
    (folder / "search" / "state.json").write_text(json.dumps(state))
    with pytest.raises(EdgeDiTError, match="code"):
        front_data(folder, build_report(made))


@pytest.mark.parametrize(("num_layers", "merged"), [(28, [8, 14, 20]), (6, [2]), (5, [2]), (2, [0]), (1, [])])
def test_the_papers_students_of_other_teachers(num_layers, merged):
    """Of DiT-XL/2's depth, those of the presets; else as great a share of merged pairs around the middle."""
    space = SearchSpace(num_layers, 1152, 16)
    found = paper_students(space)
    assert list(found) == [f"{'' if num_layers == 28 else 'like '}EdgeDiT-{number}" for number in (1, 6)]
    for genotype, shape in zip(found.values(), ((1152, 16, 2.0), (512, 16, 4.0))):
        assert genotype.merged == [(first, first + 1) for first in merged]
        assert {tuple(layer.shape)[:3] for layer in genotype.layers} == {shape}
    if num_layers == 28:
        for name, genotype in found.items():
            assert genotype == Genotype.from_layers(PRESETS[name]["layers"], 1152)
    choices = [{"mlp_ratio": 2.0}, {"merge": 2, "mlp_ratio": 2.0}][: min(2, num_layers)]
    menu = MenuSpace(num_layers, 1152, 16, 4.0, choices)
    assert list(paper_students(menu)) == list(found)[:1]  # it has no narrow attention
    assert paper_students(MenuSpace(num_layers, 1152, 16, 4.0, [{"attention_dim": 768}])) == {}
