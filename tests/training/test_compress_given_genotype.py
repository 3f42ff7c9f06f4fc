"""A given genotype instead of a search: only its proxies are made, nothing is searched, and the student is that
network.
"""

import json

import pytest

from edgedit_hf import EdgeDiTPipeline, SearchSpace


@pytest.fixture(scope="module")
def finished(recipes, tmp_path_factory):
    """The whole loop for a merged pair and a kept one; the run's folder, the genotype, and what was printed."""
    folder = tmp_path_factory.mktemp("given")
    genotype = SearchSpace(4, 32, 2).from_code((17, 4))
    (folder / "student.json").write_text(genotype.to_json())
    overrides = (
        "teacher.num_layers=4",
        f"student.genotype={folder / 'student.json'}",
        f"bank.only=[{folder / 'student.json'}]",
        "export.dtypes=[fp32]",
    )
    done = recipes.run("compress", folder / "run", *recipes.tiny, *overrides)
    return folder / "run", genotype, done.stdout


def test_the_student_is_the_given_network(finished):
    run, genotype, _ = finished
    choice = json.loads((run / "student" / "choice.json").read_text())
    assert choice["genotype_hash"] == genotype.hash and "student.json" in choice["reason"]
    for name in ("student", "student-tuned", "exported/onnx-fp32"):
        assert EdgeDiTPipeline.from_pretrained(run / name).transformer.config["layers"] == genotype.to_layers()
    assert {entry["option"] for entry in json.loads((run / "bank" / "index.json").read_text())["entries"].values()} == {
        "mlp"
    }


def test_nothing_was_searched_and_the_end_says_so(finished):
    run, _, printed = finished
    assert not (run / "search").exists() and not (run / "latency").exists() and not (run / "report.html").exists()
    assert "a report needs a search, which student.genotype replaces" in printed
    assert json.loads((run / "evaluate" / "student-tuned.json").read_text())["num_samples"] == 16


@pytest.mark.slow
def test_exports_are_left_out_of_the_evaluation_where_asked(recipes, finished, tmp_path):
    run, _, _ = finished
    for name in ("teacher", "student", "student-tuned", "exported"):
        (tmp_path / name).symlink_to(run / name)
    recipes.run("evaluate_models", tmp_path, *recipes.tiny, "evaluate.exports=false")
    assert {path.stem for path in (tmp_path / "evaluate").glob("*.png")} == {"teacher", "student", "student-tuned"}
