"""The model card that is rendered from a run's report."""

import json

import pytest
import yaml
from run_folder import METRIC, make_run

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.hub import render_card, template, write_card
from edgedit_hf.report import build_report


@pytest.fixture(scope="module")
def report(tmp_path_factory, make_transformer):
    folder = make_run(tmp_path_factory.mktemp("runs") / "digits", make_transformer(num_layers=4))
    return json.loads(json.dumps(build_report(folder)))


def metadata(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_metadata_is_what_the_hub_reads(report):
    from huggingface_hub import ModelCard

    card = render_card(report, repo_id="me/digits-edgedit", license="mit", base_model="me/digits-dit")
    data = metadata(card)
    assert data["license"] == "mit" and data["library_name"] == "diffusers" and data["base_model"] == "me/digits-dit"
    assert "edgedit_hf" in data["tags"] and data["pipeline_tag"] == "unconditional-image-generation"
    (index,) = data["model-index"]
    assert index["name"] == "digits-edgedit"
    metrics = {m["name"]: m for result in index["results"] for m in result["metrics"]}
    assert metrics["Fréchet distance (digits-cnn, n=64)"] == {
        "type": "frechet_distance",
        "value": 1.7,
        "name": "Fréchet distance (digits-cnn, n=64)",
    }
    assert {"precision", "recall", "class agreement"} < set(metrics)
    parsed = ModelCard(card).data  # the Hub's own reader
    assert {r.metric_value for r in parsed.eval_results} == {1.7, 0.9, 0.8, 0.97}


def test_text_loads_compares_and_reproduces(report, tmp_path):
    path = write_card(tmp_path, report, repo_id="me/digits-edgedit", license="mit", model="onnx-int8")
    card = path.read_text()
    assert path.name == "README.md" and "onnx" in metadata(card)["tags"]
    snippet = card.split("```python\n")[1].split("```")[0]
    assert snippet.index("import edgedit_hf") < snippet.index('DiffusionPipeline.from_pretrained("me/digits-edgedit")')
    compile(snippet, "snippet", "exec")
    assert "class_labels=[0, 1, 2]" in snippet
    lines = card.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| model |"))
    table = lines[first : first + 2 + len(report["models"])]
    assert all(line.startswith("|") and line.count("|") == table[0].count("|") for line in table)
    assert "Fréchet distance (digits-cnn, n=64)" in table[0] and "| student, tuned |" in "\n".join(table)
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["seed"] == 5 and recipe["teacher"]["hidden_size"] == report["reproduce"]["config"]["teacher"]["hidden_size"]
    assert "## Limits" in card and "FID" not in card and "{{" not in card and "{%" not in card


def test_unconditional_and_inception(report):
    report = json.loads(json.dumps(report).replace(METRIC, "fid[inception,n=64]"))
    for model in report["models"]:
        del model["class_agreement"]
    card = render_card(report, repo_id="me/faces", license="mit")
    (index,) = metadata(card)["model-index"]
    assert [m["type"] for r in index["results"] for m in r["metrics"]] == ["fid", "precision", "recall"]
    assert "batch_size=3" in card and "class_labels" not in card and "FID (n=64)" in card


def test_bad_requests(report):
    with pytest.raises(EdgeDiTError, match="no model 'few-step'.*'teacher'"):
        render_card(report, repo_id="me/x", license="mit", model="few-step")
    with pytest.raises(FileNotFoundError):
        template("missing.jinja")


def test_recipe_of_the_report_is_one_that_loads(report, tmp_path):
    from edgedit_hf.recipes import load_config

    (tmp_path / "run.yaml").write_text(report["reproduce"]["yaml"])
    config = load_config(tmp_path / "run.yaml")
    assert config.seed == 5 and config.output_dir.endswith("-again")
