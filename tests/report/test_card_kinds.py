"""The card of every kind of folder: artefacts of tiny runs, their figures, pictures and the lines that use them."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import hub_card_rules
import numpy as np
import pytest
import yaml
from card_texts import HOSTILE, metadata, visible
from PIL import Image

from edgedit_hf import EdgeDiTPipeline, ElasticDiTPipeline
from edgedit_hf.commands.cli import main
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.folders import look_at
from edgedit_hf.report.card import card_files, write_card

ID = "me/thing"
EDGEDIT = {
    "teacher": ("teacher", "teacher"),
    "student": ("student-tuned", "student"),
    "int8": ("exported/onnx-int8", "exported"),
    "bank": ("bank", "bank"),
    "latency": ("latency", "latency"),
}
"""Kinds in the run of classes → folder and what it is."""


@pytest.fixture(scope="module")
def run(debug_run, tmp_path_factory):
    """A copy of the session's run of classes."""
    return shutil.copytree(debug_run, tmp_path_factory.mktemp("card") / "run")


@pytest.fixture(scope="module")
def t2i_run(debug_t2i_run, tmp_path_factory):
    """A copy of the session's run of text to image, with its narrowest width alone, and as a bundle with its code."""
    run = shutil.copytree(debug_t2i_run, tmp_path_factory.mktemp("card") / "t2i")
    pipeline = ElasticDiTPipeline.from_pretrained(run / "elastic")
    pipeline.save_pretrained(run / "bundle", bundle_code=True)
    pipeline.register_modules(transformer=pipeline.transformer.extract_subnet(pipeline.transformer.subnet_names[0]))
    pipeline.save_pretrained(run / "alone")
    return run


def card_of(folder, **options) -> tuple[str, dict[str, bytes]]:
    files = card_files(folder, ID, **{"license": "mit", "base_model": "me/teacher", **options})
    return files.pop("README.md").decode(), files


def check(card: str, pictures: dict[str, bytes]) -> dict:
    """What holds of every card; returns its metadata."""
    assert hub_card_rules.check(card) == ([], [])
    assert not re.search(r"TODO|your-name|your-student|\bNone\b|\{\{|\{%", card)
    shown = re.findall(r"!\[[^]]*\]\((card/[\w-]+\.png)\)", card)
    data = metadata(card)
    shown += [example["output"]["url"] for example in data.get("widget", [])]
    assert sorted(shown) == sorted(pictures)
    for content in pictures.values():
        Image.open(io.BytesIO(content)).verify()
    kinds = [token.type for token in visible(card.split("\n---\n", 1)[1])[1]]
    assert "html_inline" not in kinds and "html_block" not in kinds
    for heading in ("Intended use", "Use", "Figures", "Limits", "How to reproduce"):
        assert f"\n## {heading}\n" in card
    return data


def values(data: dict) -> dict[str, float]:
    (index,) = data["model-index"]
    return {metric["name"]: metric["value"] for result in index["results"] for metric in result["metrics"]}


@pytest.mark.parametrize("kind", EDGEDIT)
def test_of_classes(run, kind):
    place, what = EDGEDIT[kind]
    assert look_at(run / place).kind == what
    card, pictures = card_of(run / place)
    data, report = check(card, pictures), json.loads((run / "report.json").read_text())
    pipeline = kind not in ("bank", "latency")
    assert data.get("library_name") == ("diffusers" if pipeline else None)
    assert data.get("pipeline_tag") == ("unconditional-image-generation" if pipeline else None)
    relations = {"teacher": "finetune", "student": "finetune", "int8": "quantized", "bank": "adapter"}
    assert data["base_model"] == "me/teacher" and data.get("base_model_relation") == relations.get(kind)
    found = values(data)
    if pipeline:
        name = {"student": "student-tuned", "int8": "onnx-int8"}.get(kind, kind)
        (model,) = (model for model in report["models"] if model["name"] == name)
        protocol = f"n=64, {model['steps']} steps, guidance {model['guidance_scale']:g})"
        judged = {key: value for key, value in found.items() if key.endswith(protocol)}
        wanted = [model["metrics"]["fid[digits-cnn,n=64]"], *(model[k] for k in ("precision", "recall"))]
        assert list(judged.values()) == [*wanted, model["class_agreement"]]
        assert "card/samples.png" in pictures
    if kind == "int8":
        verify = json.loads((run / place / "verify.json").read_text())
        checked = {verify["relative_error"], verify["psnr_db"]} - {None}  # null: no error at all
        assert checked <= set(found.values()) and "onnx" in data["tags"]
    if kind == "latency":
        prediction = json.loads((run / "latency" / "table.json").read_text())["prediction"]
        assert list(found.values()) == [prediction["mean"], prediction["max"]]
    if kind == "bank":
        entries = json.loads((run / "bank" / "index.json").read_text())["entries"].values()
        assert list(found.values()) == [np.median([entry["loss_after"] for entry in entries])]
    if kind in ("student", "int8"):
        assert {"card/genotype.png", "card/pareto.png"} < set(pictures)


def test_of_text_to_image(t2i_run):
    report = json.loads((t2i_run / "report.json").read_text())
    captions = json.loads((t2i_run / "evaluate" / "captions.json").read_text())["captions"]
    for place, kind in (("elastic", "supernet"), ("alone", "subnet"), ("bundle", "supernet")):
        assert look_at(t2i_run / place).kind == kind
        card, pictures = card_of(t2i_run / place)
        data = check(card, pictures)
        assert data["pipeline_tag"] == "text-to-image"
        assert [example["text"] for example in data["widget"]] == captions[:3]
        models = report["models"] if kind == "supernet" else report["models"][:1]
        found = values(data)
        for model in models:
            (distance,) = (value for key, value in model["metrics"].items() if key.startswith("fid["))
            assert distance in found.values() and any(f"width {model['name']})" in name for name in found)
        assert ("trust_remote_code=True" in card) == (place == "bundle")


def snippets(card: str, folder: Path, base: Path) -> list[tuple[str, str]]:
    """The lines that use it, with the folder in the place of the repository."""
    blocks = re.findall(r"```(python|bash|yaml)\n(.*?)```", card.split("## Use\n")[1].split("\n## ")[0], re.DOTALL)
    return [(kind, text.replace(ID, str(folder)).replace("me/teacher", str(base))) for kind, text in blocks]


RUN = """
import json, sys
for number, text in enumerate(json.loads(sys.argv[1])):
    names = {}
    exec(compile(text, f"snippet {number}", "exec"), names)
    made = names.get("images", names.get("student", names.get("table")))
    assert made is not None and (not isinstance(made, list) or made[0].size), text
print("done")
"""


@pytest.mark.slow
def test_the_lines_that_use_it_run(run, t2i_run, run_python, tmp_path):
    """Of every kind and flavour; without the package where the code is bundled."""
    tuned = EdgeDiTPipeline.from_pretrained(run / "student-tuned")
    tuned.save_pretrained(run / "student-bundle", bundle_code=True)
    shutil.copy(run / "student-tuned" / "stage.json", run / "student-bundle")
    places = [run / place for place, _ in EDGEDIT.values()] + [t2i_run / "elastic", t2i_run / "alone"]
    python, shell = [], []
    for folder in places:
        for kind, text in snippets(card_of(folder)[0], folder, run / "teacher"):
            if kind == "python":
                python.append(text)
            elif kind == "bash":
                shell.append((folder, text))
            else:
                assert yaml.safe_load(text) == {"latency": {"table": str(folder)}}
    assert len(python) == len(places) and len(shell) == 1
    assert "done" in run_python(RUN, json.dumps(python))
    bundles = [run / "student-bundle", t2i_run / "bundle"]
    bundled = [text for folder in bundles for _, text in snippets(card_of(folder)[0], folder, run / "teacher")]
    blocked = "import sys\nsys.modules['edgedit_hf'] = None\n" + RUN
    assert all("edgedit_hf" not in text for text in bundled)
    env = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    assert "done" in run_python(blocked, json.dumps(bundled), env=env)
    for folder, text in shell:
        (tmp_path / "thing").symlink_to(folder)
        download, *lines = text.splitlines()
        assert download == f"hf download {folder} --local-dir thing"
        for line in lines:
            command = [sys.executable, *line.split()[1:]]
            assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120).returncode == 0, line
    assert Image.open(tmp_path / "image.png").size == (8, 8)


def test_what_is_missing_is_refused_by_name(run, tmp_path):
    alone = shutil.copytree(run / "student-tuned", tmp_path / "alone")
    with pytest.raises(EdgeDiTError, match="no figures of .*alone.*--report FILE"):
        card_files(alone, ID, license="mit")
    assert "## Figures" in card_of(alone, report=run / "report.json")[0]  # found by its weights
    with pytest.raises(EdgeDiTError, match=r"licence of .* is unknown.*--license"):
        card_files(run / "student-tuned", ID)
    with pytest.raises(EdgeDiTError, match="'other' says nothing.*name=link"):
        card_files(run / "student-tuned", ID, license="other")
    for given in (
        "x=javascript:alert(1)",
        "x=https://a/)![x](https://b)",
        "<b>=LICENSE",
        "a b=LICENSE",
        "x=/etc/passwd",
    ):
        with pytest.raises(EdgeDiTError, match="is no name=link"):
            card_files(run / "student-tuned", ID, license=given)
    with pytest.raises(EdgeDiTError, match="needs the Hub's id of its teacher"):
        card_files(run / "bank", ID, license="mit")
    with pytest.raises(EdgeDiTError, match="repo_id 'your-name/your-student'.*must be yours"):
        card_files(run / "teacher", "your-name/your-student", license="mit")
    export = shutil.copytree(run / "exported" / "onnx-int8", tmp_path / "export")
    (export / "verify.json").unlink()
    with pytest.raises(EdgeDiTError, match=r"verify\.json"):
        card_files(export, ID, license="mit")


def test_licences(run, tmp_path):
    """A name of its own with a link; that of the base's card; of weights whose licence is known."""
    named = metadata(card_of(run / "student-tuned", license="My-Licence=LICENSE")[0])
    assert (named["license"], named["license_name"], named["license_link"]) == ("other", "my-licence", "LICENSE")
    (run / "teacher" / "README.md").write_text("---\nlicense: openrail\n---\n")
    assert metadata(card_of(run / "student-tuned", license=None)[0])["license"] == "openrail"
    (run / "teacher" / "README.md").unlink()
    dit = card_of(run / "student-tuned", license=None, base_model="facebook/DiT-XL-2-256")[0]
    assert metadata(dit)["license"] == "cc-by-nc-4.0"


def test_the_runs_wrote_cards_without_a_placeholder(run, t2i_run):
    for folder in (run / "student-tuned", t2i_run / "elastic"):
        card = (folder / "README.md").read_text()
        assert "your-name" not in card and "license" not in metadata(card)
        assert f'from_pretrained("{folder.name}")' in card and (folder / "card" / "samples.png").is_file()


def test_the_command_writes_what_it_says(run, capsys):
    folder = run / "exported" / "onnx-fp32"
    assert main(["card", str(folder), "--repo-id", ID, "--license", "mit"]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "README.md")
    assert (folder / "README.md").read_bytes() == card_files(folder, ID, license="mit")["README.md"]
    before = {path: path.stat().st_mtime_ns for path in (folder / "card").iterdir()}
    write_card(folder, repo_id=ID, license="mit")
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "card").iterdir()}  # unchanged pictures stay
    assert main(["card", str(run / "evaluate")]) == 2


LIGHT = """
import resource, sys
from edgedit_hf.report.card import card_files
files = card_files(sys.argv[1], "me/thing", license="mit")
assert "card/samples.png" in files
heavy = {"torch", "diffusers", "transformers", "onnx", "onnxruntime", "accelerate"} & set(sys.modules)
assert not heavy, heavy
"""


def test_a_card_needs_no_torch(run, t2i_run, run_python):
    run_python(LIGHT, run / "student-tuned")
    run_python(LIGHT, t2i_run / "elastic")


def test_captions_and_labels_of_others_stay_text(run, t2i_run, tmp_path):
    labels = shutil.copytree(run, tmp_path / "labels")
    path = labels / "student-tuned" / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "id2label": {key: HOSTILE for key in index["id2label"]}}))
    texts = shutil.copytree(t2i_run, tmp_path / "texts")
    path = texts / "evaluate" / "captions.json"
    captions = json.loads(path.read_text())
    path.write_text(json.dumps({**captions, "captions": [HOSTILE.replace("\n", " ")] * len(captions["captions"])}))
    for folder, plain in ((labels / "student-tuned", run / "student-tuned"), (texts / "elastic", t2i_run / "elastic")):
        card, pictures = card_of(folder)
        assert hub_card_rules.check(card) == ([], []) and str(8123 * 7919) not in card
        kept = ("html", "fence", "link", "image", "heading", "em_", "strong", "bullet", "table")
        found, wanted = (
            [token.type for token in visible(text.split("\n---\n", 1)[1])[1] if token.type.startswith(kept)]
            for text in (card, card_of(plain)[0])
        )
        assert found == wanted and pictures
        (block,) = re.findall(r"```python\n(.*?)\n```\n", card.split("## Use\n")[1].split("\n## ")[0], re.DOTALL)
        compile(block, "snippet", "exec")


def test_the_hub_takes_the_card(run, hub, run_with_hub):
    """The client's own validation, against the rules of the Hub."""
    write_card(run / "student-tuned", repo_id=ID, license="mit", base_model="me/teacher")
    said = run_with_hub(
        "import sys\nfrom huggingface_hub import ModelCard\ncard = ModelCard.load(sys.argv[1])\ncard.validate()\n"
        "print(len(card.data.eval_results))",
        run / "student-tuned" / "README.md",
    )
    assert said.strip() == "4" and hub.requests("POST /api/validate-yaml")


@pytest.mark.slow
def test_of_quantised_folders(recipes, run, t2i_run, run_python, tmp_path):
    """Of both families, whose figures are their own."""
    lines = []
    for folder, family in ((run / "student-tuned", "edgedit"), (t2i_run / "elastic", "elastic")):
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a thin 1\na thick 2\n")
        asked = [f"quantize.path={folder}", "quantize.steps=2"]
        asked += [f"quantize.prompts={prompts}"] if family == "elastic" else []
        recipes.run_here("quantize", tmp_path / family, *asked, config="debug-quantize.yaml")
        quantized = tmp_path / family / "quantized"
        card, pictures = card_of(quantized)
        data, record = check(card, pictures), json.loads((quantized / "quantization.json").read_text())
        assert data["base_model_relation"] == "quantized" and "quantized" in data["tags"]
        assert {record["average_bits"], *(e["sqnr_db"] for e in record["error"]["tuned"].values())} == set(
            values(data).values()
        )
        assert str(tmp_path) not in card  # no place of the machine that made it
        lines += [text for kind, text in snippets(card, quantized, folder) if kind == "python"]
        (quantized / "quantization.json").unlink()
        with pytest.raises(EdgeDiTError, match=r"quantization\.json"):
            card_files(quantized, ID, license="mit")
    assert "done" in run_python(RUN, json.dumps(lines))


@pytest.mark.slow
def test_of_few_steps(recipes, run, t2i_run, run_python, tmp_path):
    """Of both families, in runs that are taken further."""
    lines = []
    for name, source, recipe in (("compress", run, "debug.yaml"), ("text_to_image", t2i_run, "debug-t2i.yaml")):
        further = shutil.copytree(source, tmp_path / name)
        for folder in ("exported", "evaluate") if name == "compress" else ():
            shutil.rmtree(further / folder)
        threads = json.loads((source / ("teacher" if name == "compress" else "evaluate") / "run.json").read_text())
        asked = ("few_step.enabled=true", "few_step.steps=4", f"threads={threads['config'].get('threads', 1)}")
        recipes.run(name, further, *asked, config=recipe)
        assert (further / "few-step" / "README.md").is_file()
        card, pictures = card_of(further / "few-step")
        report, data = json.loads((further / "report.json").read_text()), check(card, pictures)
        assert "few-step" in data["tags"] and "card/samples.png" in pictures
        judged = [model for model in report["models"] if model["name"] == "few-step"]
        judged = judged or [width["few_step"] for width in report["few_step"]["widths"]]
        distances = {value for model in judged for key, value in model["metrics"].items() if key.startswith("fid[")}
        assert distances <= set(values(data).values()) and "knows its" in card
        lines += [text for _, text in snippets(card, further / "few-step", further / "teacher")]
    assert "done" in run_python(RUN, json.dumps(lines))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["executorch", "onnx", "coreml"])
def test_of_exports_of_every_format(form, run, t2i_run, run_python, tmp_path):
    """Made outside a run, of both families: figures of verify.json and bench.json, and the sampler beside them."""
    from edgedit_hf.export.formats import ExportOptions, format_of
    from edgedit_hf.export.pipeline import export_pipeline

    if format_of(form).missing:
        pytest.skip(format_of(form).missing.remedy)
    for source, subnet in ((run / "student-tuned", None), (t2i_run / "elastic", "tiny")):
        folder = tmp_path / f"{form}-{source.name}"
        export_pipeline(source, folder, ExportOptions(format=form, num_images=2, subnet=subnet))
        card, pictures = card_of(folder)
        data, verify = check(card, pictures), json.loads((folder / "verify.json").read_text())
        assert form in data["tags"] and data["base_model_relation"] == "quantized"
        errors = [part["relative_error"] for part in verify["parts"].values()]
        errors = errors if form == "coreml" else [verify["relative_error"]]
        assert errors and set(errors) <= set(values(data).values()) and "optimum-cli export edgedit" in card
        assert str(tmp_path) not in card
        blocks = snippets(card, folder, source)
        if form == "coreml":  # runs on Apple's systems only
            assert [kind for kind, _ in blocks] == ["bash"] and "were not run" in card and "library_name" not in data
            continue
        assert "done" in run_python(RUN, json.dumps([text for kind, text in blocks if kind == "python"]))
        (shell,) = (text for kind, text in blocks if kind == "bash")
        (tmp_path / "thing").unlink(missing_ok=True)
        (tmp_path / "thing").symlink_to(folder)
        for line in shell.splitlines()[1:]:
            command = [sys.executable, *shlex.split(line)[1:]]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
