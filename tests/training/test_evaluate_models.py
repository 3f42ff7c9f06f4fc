"""The evaluation's latencies are those of the files that the run ships."""

import json
import shutil

import pytest

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.genotype import Genotype
from edgedit_hf.schema import check
from edgedit_hf.stamp import Stamp, check_comparable


def test_every_result_is_stamped_with_what_it_was_measured_with(debug_run):
    stamps = {}
    for path in (debug_run / "evaluate").glob("*.json"):
        found = json.loads(path.read_text())
        if "metrics" in found:
            stamps[found["name"]] = found["stamp"]
    reference = json.loads((debug_run / "evaluate" / "reference.json").read_text())
    extractor = json.loads((debug_run / "extractor" / "extractor.json").read_text())
    assert {"teacher", "student-tuned", "onnx-int8"} <= set(stamps)
    for name, stamp in stamps.items():
        check(stamp, Stamp)
        assert stamp["extractor_hash"] == extractor["hash"] and stamp["reference"] == reference["data"]
        assert (stamp["scheduler"], stamp["rounding"], stamp["vae"]) == ("DDIMScheduler", "none", None)
        assert stamp["dtype"] == ("int8" if name.endswith("int8") else "fp32" if name.startswith("onnx") else "float32")
    check_comparable(stamps)


def test_what_the_run_exported_is_what_is_timed(debug_run):
    latency = json.loads((debug_run / "evaluate" / "latency.json").read_text())
    runners = {"torch-fp32", "onnxruntime-fp32", "onnxruntime-int8"}
    assert latency["shipped"] == {
        f"student-tuned onnxruntime-{dtype}": f"exported/onnx-{dtype}" for dtype in ("fp32", "int8")
    }
    assert set(latency["timings"]) == {f"{name} {key}" for name in ("teacher", "student-tuned") for key in runners}
    assert set(latency["speedup"]) == runners


@pytest.mark.slow
def test_a_student_of_another_net_is_compared_with_that_one(recipes, debug_run, tmp_path, fail):
    """The run's teacher distilled in the place of its student, with a sampler that noises anew after every step."""
    run = shutil.copytree(debug_run, tmp_path / "run")
    for folder in ("exported", "evaluate"):
        shutil.rmtree(run / folder)
    asked = ("few_step.enabled=true", f"few_step.path={run / 'teacher'}", "few_step.sampler=sde")
    recipes.run("compress", run, *asked, "export.dtypes=[int8]")
    report = json.loads((run / "report.json").read_text())
    models, ratios = {model["name"]: model for model in report["models"]}, report["ratios"]
    many, few = models["few-step-source"], models["few-step-source-few-steps"]
    assert "student-tuned-few-steps" not in models
    figures = ("parameters", "flops", "metrics", "precision", "recall", "class_agreement", "weights", "genotype_hash")
    assert all(many[key] == models["teacher"][key] for key in figures)
    net = EdgeDiTPipeline.from_pretrained(run / "few-step").transformer
    genotype = Genotype.of(net.config)
    ours = models["few-step"]
    assert ours["genotype_hash"] == few["genotype_hash"] == genotype.hash != report["genotype"]["hash"]
    assert ours["parameters"] == many["parameters"] == few["parameters"] > models["student-tuned"]["parameters"]
    (metric,) = ours["metrics"].keys() - {"precision", "recall"}
    assert ratios["few_step"]["source"] == "few-step-source"
    assert ratios["few_step"]["distance"] == pytest.approx(ours["metrics"][metric] / many["metrics"][metric])
    assert report["few_step"]["source"]["genotype"] == {"hash": genotype.hash, "layers": genotype.to_layers()}
    assert models["onnx-int8"]["psnr_db"] > 40  # the same fresh noise
    card = (run / "few-step" / "README.md").read_text().split("## Use")[0]
    assert genotype.hash in card and report["genotype"]["hash"] not in card and f"{len(genotype.layers)} layers" in card
    page = (run / "report.html").read_text()
    assert "The few-step student is another network: of 4 layers" in page
    shutil.rmtree(run / "evaluate")
    said = fail("evaluate_models", run, "few_step.enabled=true", "few_step.sampler=sde", "export.dtypes=[int8]")
    assert "few-step was distilled from a net with the weights" in said and "student-tuned holds" in said
