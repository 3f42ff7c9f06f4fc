"""The whole EdgeDiT loop over a menu with every kind of choice; its bank killed and resumed, and made by two ranks."""

import json
import shutil
import sys

import pytest

from edgedit_hf import EdgeDiTPipeline, Genotype, ProxyBank, SearchSpace
from edgedit_hf.menu_space import MenuSpace
from edgedit_hf.pipelines.loading import load_pipeline
from edgedit_hf.records import Front
from edgedit_hf.schema import read_record

MENU = {"config": "debug-menu.yaml"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def whole(recipes, tmp_path_factory):
    """The teacher and the bank of one process, left alone."""
    folder = tmp_path_factory.mktemp("menu") / "run"
    for name in ("train_teacher", "distill_proxies"):
        recipes.run(name, folder, **MENU)
    return folder


@pytest.fixture
def started(whole, tmp_path):
    """A run that has the teacher alone."""
    shutil.copytree(whole / "teacher", tmp_path / "run" / "teacher")
    return tmp_path / "run"


def space_of(run) -> SearchSpace:
    return SearchSpace.from_dict(json.loads((run / "bank" / "index.json").read_text())["space"])


def students(space: SearchSpace) -> list[Genotype]:
    """Two that between them have every option of the menu but one size."""
    wanted = [
        [((0,), "rank4"), ((1,), "static"), ((2,), "tokens2"), ((3,), "heads1")],
        [((0,), "heads4"), ((1, 2, 3), "attn16")],
        [((0, 1), "mlp2-rank4"), ((2,), "attn16-mlp1"), ((3,), "static")],
    ]
    return [Genotype(tuple(space.layer(*layer) for layer in layers), space.hidden_size) for layers in wanted]


@pytest.mark.slow
def test_a_bank_holds_a_proxy_of_every_choice_that_starts_close_to_its_layers(whole):
    space = space_of(whole)
    assert isinstance(space, MenuSpace)
    bank = ProxyBank(whole / "bank", load_pipeline(whole / "teacher").transformer)
    assert bank.missing() == [] and set(bank.entries) == {bank.key(layer) for layer in space.proxies()}
    assert {"00-01-02/attn16", "01-02/original", "03/static", "02/tokens2", "01/heads1"} < set(bank.entries)
    for entry in bank.entries.values():
        assert entry["init"] == "closed_form" and entry["steps"] == 6 and "combined" not in entry["losses"]
        assert entry["losses"]["closed_form"] < min(entry["losses"]["copied"], entry["losses"]["random"])
    for genotype in students(space):
        assert Genotype.of(bank.assemble(genotype).config) == genotype


@pytest.mark.slow
def test_the_whole_loop_over_a_menu(recipes, whole, tmp_path):
    for folder in ("teacher", "bank"):
        shutil.copytree(whole / folder, tmp_path / folder)
    recipes.run("compress", tmp_path, timeout=1800, **MENU)
    space = space_of(tmp_path)
    table = json.loads((tmp_path / "latency" / "table.json").read_text())
    assert table["space"] == space.to_dict()
    assert len(table["blocks"]) == len({layer.shape.timed for layer in space.replacements()})
    front = read_record(tmp_path / "search" / "front.json", Front, "stage search")["front"]
    for point in front:
        genotype = Genotype.of(point["genotype"])
        assert list(space.code(genotype)) == point["code"]
    student = load_pipeline(tmp_path / "student").transformer
    assert Genotype.of(student.config).hash in {point["hash"] for point in front}
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"teacher", "student-tuned", "onnx-fp32", "onnx-int8"} <= {model["name"] for model in report["models"]}
    assert sum(report["genotype"]["options"].values()) == len(student.config.layers)
    assert (tmp_path / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.export
@pytest.mark.parametrize("number", [0, 1, 2])
def test_given_students_of_every_kind_are_made_tuned_and_exported(recipes, whole, started, number):
    genotype = students(space_of(whole))[number]
    file = started.parent / "genotype.json"
    file.write_text(genotype.to_json())
    given = f"student.genotype={file}", f"bank.only=[{file}]"
    formats = "export.dtypes=[fp32, int8]", "export.executorch=[fp32]", "tune.teacher_more_steps=false"
    for name in ("distill_proxies", "select_student", "finetune", "export_student"):
        recipes.run(name, started, *given, *formats, **MENU)
    made = sorted(path.name for path in (started / "bank").glob("*.safetensors"))
    assert len(made) == len(genotype.layers)  # none of them is the teacher's own
    for name in made:
        assert (started / "bank" / name).read_bytes() == (whole / "bank" / name).read_bytes()
    for name in ("onnx-fp32", "onnx-int8", "executorch-fp32"):
        verified = json.loads((started / "exported" / name / "verify.json").read_text())
        assert verified["relative_error"] <= verified["tolerance"], name
    pipeline = EdgeDiTPipeline.from_pretrained(started / "student-tuned")
    assert Genotype.of(pipeline.transformer.config) == genotype


@pytest.mark.slow
@pytest.mark.kills
def test_a_bank_of_a_menu_killed_and_resumed_is_the_same(recipes, whole, result_files, started):
    seconds = json.loads((whole / "bank" / "stage.json").read_text())["seconds"]
    delays = recipes.run_with_kills("distill_proxies", started, started / "bank" / "run.json", seconds, kills=2, **MENU)
    expected = result_files(whole / "bank", ".safetensors")
    assert result_files(started / "bank", ".safetensors") == expected and expected, delays
    assert (started / "bank" / "index.json").read_text() == (whole / "bank" / "index.json").read_text()


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_make_the_same_bank_of_a_menu(recipes, whole, result_files, started):
    recipes.run("distill_proxies", started, launcher=TORCHRUN, **MENU)
    assert result_files(started / "bank", ".safetensors") == result_files(whole / "bank", ".safetensors")
    ranks = json.loads((started / "bank" / "stage.json").read_text())["ranks"]
    assert len(ranks) == 2 and ranks[1][-1]["teacher_layers"][1] == 3
