"""A given genotype instead of a search: only its proxies are made, nothing is searched, and the student is that
network, here distilled to two steps; and what the report says of such a run.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from edgedit_hf import EdgeDiTPipeline, SearchSpace

pytestmark = pytest.mark.slow


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
        "few_step.enabled=true",
        "few_step.steps=4",
    )
    return folder / "run", genotype, recipes.printed_here("compress", folder / "run", *recipes.tiny, *overrides)


def test_the_student_is_the_given_network(finished):
    run, genotype, _ = finished
    choice = json.loads((run / "student" / "choice.json").read_text())
    assert choice["genotype_hash"] == genotype.hash and "student.json" in choice["reason"]
    for name in ("student", "student-tuned", "exported/onnx-fp32"):
        assert EdgeDiTPipeline.from_pretrained(run / name).transformer.config["layers"] == genotype.to_layers()
    assert {entry["option"] for entry in json.loads((run / "bank" / "index.json").read_text())["entries"].values()} == {
        "mlp"
    }


def test_nothing_was_searched_and_there_is_a_report_of_the_rest(finished):
    run, genotype, printed = finished
    assert not (run / "search").exists() and not (run / "latency").exists()
    assert f"{run / 'report.html'} (this process: " in printed
    report = json.loads((run / "report.json").read_text())
    assert "search" not in report and report["genotype"]["hash"] == genotype.hash and report["seed"] == 0
    assert {"few-step", "few-step-strips", "samples", "genotype", "proxies"} == {
        path.stem for path in (run / "report").glob("*.png")
    }
    assert json.loads((run / "evaluate" / "student-tuned.json").read_text())["num_samples"] == 16


def test_what_ships_is_the_few_step_student(finished):
    run, _, _ = finished
    made = json.loads((run / "exported" / "run.json").read_text())["inputs"]
    judged = json.loads((run / "evaluate" / "run.json").read_text())["inputs"]
    assert made == {"few-step": judged["few-step"]} and judged["few-step"] != judged["student-tuned"]
    few, tuned = (EdgeDiTPipeline.from_pretrained(run / name) for name in ("few-step", "student-tuned"))
    exported = EdgeDiTPipeline.from_pretrained(run / "exported" / "onnx-fp32")
    assert exported.config.few_step_timesteps == few.config.few_step_timesteps and few.config.default_steps == 2
    assert any(not torch.equal(a, b) for a, b in zip(few.transformer.parameters(), tuned.transformer.parameters()))
    assert "few_step" not in (run / "few-step" / "README.md").read_text().split("## How to reproduce")[0]
    assert "knows its 2 steps" in (run / "few-step" / "README.md").read_text()


def test_every_model_was_judged_as_it_samples(finished):
    run, _, _ = finished
    report = json.loads((run / "report.json").read_text())
    models = {model["name"]: model for model in report["models"]}
    asked = {name: (m["steps"], m["guidance_scale"], m["forwards_per_image"]) for name, m in models.items()}
    assert asked["teacher"] == asked["student-tuned"] == (1, 1.5, 2)  # sampling.steps=1
    assert asked["few-step"] == asked["onnx-fp32"] == (2, 1.0, 2)
    assert asked["student-tuned-few-steps"] == (2, 1.5, 4)
    for name, model in models.items():
        runtime = "onnxruntime-fp32" if name == "onnx-fp32" else "torch-fp32"
        assert list(model["seconds_per_image"]) == [runtime] and model["seconds_per_image"][runtime] > 0
    solvers = json.loads((run / "evaluate" / "solvers.json").read_text())["distances"]
    assert len(solvers) == 6
    best = models["student-tuned-few-steps"]
    assert solvers[best["solver"]] == min(solvers.values())
    assert best["metrics"]["fid[digits-cnn,n=16]"] == pytest.approx(min(solvers.values()), rel=1e-6)
    eager, ours = (load_file(run / "evaluate" / f"{name}.safetensors")["images"] for name in ("few-step", "onnx-fp32"))
    assert (eager.int() - ours.int()).abs().max() <= 1  # against what was exported


def test_the_extractor_is_nobodys_and_stays(finished):
    run, _, _ = finished
    assert (run / "extractor" / "extractor.json").is_file() and not (run / "evaluate" / "extractor").exists()


def test_exports_are_left_out_of_the_evaluation_where_asked(recipes, finished, tmp_path):
    run, _, _ = finished
    for name in ("teacher", "student", "student-tuned", "exported"):
        (tmp_path / name).symlink_to(run / name)
    recipes.run("evaluate_models", tmp_path, *recipes.tiny, "evaluate.exports=false")
    assert {path.stem for path in (tmp_path / "evaluate").glob("*.png")} == {"teacher", "student", "student-tuned"}
