"""The model card that is rendered from a run's report."""

import json

import pytest
import yaml
from card_texts import HOSTILE, STRUCTURE, metadata, visible

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.report.card import render_card
from edgedit_hf.report.edgedit import build_report
from edgedit_hf.report.tables import template

METRIC = "fid[digits-cnn,n=64]"


@pytest.fixture(scope="module")
def report(debug_run):
    return json.loads(json.dumps(build_report(debug_run)))


def test_metadata_is_what_the_hub_reads(report):
    from huggingface_hub import ModelCard

    (tuned,) = (model for model in report["models"] if model["name"] == "student-tuned")
    card = render_card(report, repo_id="me/digits-edgedit", license="mit", base_model="me/digits-dit")
    data = metadata(card)
    assert data["license"] == "mit" and data["library_name"] == "diffusers" and data["base_model"] == "me/digits-dit"
    assert "edgedit_hf" in data["tags"] and data["pipeline_tag"] == "unconditional-image-generation"
    (index,) = data["model-index"]
    assert index["name"] == "digits-edgedit"
    metrics = {m["name"]: m for result in index["results"] for m in result["metrics"]}
    sampled = f"{tuned['steps']} steps, guidance {tuned['guidance_scale']:g}"
    name = f"Fréchet distance (digits-cnn, n=64, {sampled})"
    assert metrics[name] == {"type": "frechet_distance", "value": tuned["metrics"][METRIC], "name": name}
    assert {f"{word} (digits-cnn, n=64, {sampled})" for word in ("precision", "recall")} < set(metrics)
    assert any(name.startswith("class agreement (") and name.endswith(f"n=64, {sampled})") for name in metrics)
    parsed = ModelCard(card).data  # the Hub's own reader
    judged = (tuned["metrics"][METRIC], tuned["precision"], tuned["recall"], tuned["class_agreement"])
    assert {r.metric_value for r in parsed.eval_results} == set(judged)


def test_text_loads_compares_and_reproduces(report):
    card = render_card(report, repo_id="me/digits-edgedit", license="mit", model="onnx-int8")
    assert "onnx" in metadata(card)["tags"]
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
    assert (
        recipe["seed"] == 0
        and recipe["teacher"]["hidden_size"] == report["reproduce"]["config"]["teacher"]["hidden_size"]
    )
    assert "## Limits" in card and "FID" not in card and "{{" not in card and "{%" not in card


def test_unconditional_and_inception(report):
    report = json.loads(json.dumps(report).replace(METRIC, "fid[inception,n=64]"))
    for model in report["models"]:
        del model["class_agreement"]
    card = render_card(report, repo_id="me/faces", license="mit")
    (index,) = metadata(card)["model-index"]
    assert [m["type"] for r in index["results"] for m in r["metrics"]] == ["fid", "precision", "recall"]
    assert "batch_size=3" in card and "class_labels" not in card and "FID (n=64)" in card


def few_step_report(report: dict, steps: int, guidance: float) -> dict:
    """The same run with a few-step student of two unguided steps, beside others of these."""
    report = json.loads(json.dumps(report))
    for model in report["models"]:
        ours = model["stage"] == "exported"
        model |= {"steps": 2 if ours else steps, "guidance_scale": 1.0 if ours else guidance}
        model["forwards_per_image"] = model["steps"] * (1 + (model["guidance_scale"] > 1))
    (tuned,) = (model for model in report["models"] if model["name"] == "student-tuned")
    few = {"name": "few-step", "stage": "few-step", "steps": 2, "guidance_scale": 1.0, "forwards_per_image": 2}
    report["models"].append({**tuned, **few})
    return report


@pytest.mark.parametrize(
    ("steps", "guidance", "columns", "ours", "tuned"),
    [
        (2, 1.5, {"guidance"}, "2 denoising steps without guidance", "2 denoising steps, guidance scale 1.5"),
        (
            28,
            1.5,
            {"steps", "guidance"},
            "2 denoising steps without guidance",
            "28 denoising steps, guidance scale 1.5",
        ),
        (1, 1.0, {"steps"}, "2 denoising steps without guidance", "1 denoising step"),
        (2, 1.0, set(), "2 denoising steps without guidance", "2 denoising steps"),
    ],
)
def test_what_is_said_of_sampling_is_in_the_table(report, steps, guidance, columns, ours, tuned):
    few = few_step_report(report, steps, guidance)
    rest = " for this one, as the table states for the others." if columns else "."
    for name, said in (("few-step", ours), ("onnx-int8", ours), ("student-tuned", tuned)):
        card = render_card(few, repo_id="me/x", license="mit", model=name)
        assert f"64 images each, {said}{rest}" in card
        header = next(line for line in card.splitlines() if line.startswith("| model |"))
        assert {cell.strip() for cell in header.split("|")} & {"steps", "guidance"} == columns


def test_the_card_of_a_student_of_another_net_is_not_that_of_the_runs(report):
    few = few_step_report(report, 28, 1.5)
    student = report["genotype"]["hash"]
    own = render_card(few, repo_id="me/x", license="mit", model="few-step")
    assert f"from 4 to {len(report['genotype']['layers'])} layers" in own and student in own
    source = {"path": "someone/`pipeline`", "genotype": {"hash": "0123456789abcdef", "layers": [{}] * 5}}
    few["few_step"] = {"source": source}
    for name in ("few-step", "onnx-int8"):
        card = render_card(few, repo_id="me/x", license="mit", model=name).split("## Use")[0]
        assert "(few-step student) of 5 layers" in card or "(exported, int8) of 5 layers" in card
        assert "to 2 steps without guidance" in card and "0123456789abcdef" in card and student not in card
        assert "compressed with" not in card and "someone/`pipeline`" in visible(card)[0]
    assert student in render_card(few, repo_id="me/x", license="mit", model="student-tuned")


def test_bad_requests(report):
    with pytest.raises(EdgeDiTError, match="no model 'few-step'.*'teacher'"):
        render_card(report, repo_id="me/x", license="mit", model="few-step")
    with pytest.raises(FileNotFoundError):
        template("missing.jinja")


def test_recipe_of_the_report_is_one_that_loads(report, tmp_path):
    from edgedit_hf.run.config import load_config

    (tmp_path / "run.yaml").write_text(report["reproduce"]["yaml"])
    config = load_config(tmp_path / "run.yaml")
    assert config.seed == 0 and config.output_dir.endswith("-again")


# -------------------------------------------------------------------- text of others


def test_names_of_others_stay_text_in_the_card(report, tmp_path):
    plain = render_card(report, repo_id="me/x", license="mit")
    hostile = json.loads(json.dumps(report))
    hostile["reference"]["extractor"] = hostile["reproduce"]["config"]["data"]["source"] = HOSTILE
    hostile["latency"]["environment"] = {"cpu": HOSTILE}
    hostile["versions"] = {HOSTILE: HOSTILE}
    hostile["genotype"] |= {"hash": HOSTILE, "options": {HOSTILE: 2}}
    hostile["reproduce"] |= {"yaml": f"a: 1\n{HOSTILE}\n", "command": HOSTILE}
    for model in hostile["models"]:
        model["metrics"] = {f"fid[{HOSTILE},n=64]": 1.7}
        model |= {"standard_errors": {f"fid[{HOSTILE},n=64]": 0.1}, "notes": [HOSTILE]}
    hostile["models"].append({**hostile["models"][0], "name": HOSTILE})
    for model in ("student-tuned", HOSTILE):
        card = render_card(hostile, repo_id="me/x", license="mit", model=model)
        data = metadata(card)
        assert set(data) == set(metadata(plain)) and data["license"] == "mit"
        body, before = card.split("\n---\n", 1)[1], plain.split("\n---\n", 1)[1]
        found, wanted = (
            [token.type for token in visible(text)[1] if token.type.startswith(STRUCTURE)] for text in (body, before)
        )
        assert found == wanted  # no link, no HTML, no heading, no emphasis, no block of code more than without
        assert str(8123 * 7919) not in body  # no template evaluates what a name holds


def test_metadata_refuses_what_the_hub_does_not_take(report):
    for repo_id, license in ((HOSTILE, "mit"), ("me/x", HOSTILE), ("a/b/c", "mit"), ("", "mit"), ("me/x", "")):
        with pytest.raises(EdgeDiTError, match="the Hub takes organisation/name"):
            render_card(report, repo_id=repo_id, license=license)
