"""The tables of stages: what a row declares is what its stage is held to, and nothing that repeats a table strays from
it.
"""

import ast
import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from edgedit_hf.commands.train import SCORE, SCRIPTS
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.run.comparison import NO_RESULT
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.stage import (
    BANK,
    DRIVERS,
    EDGEDIT,
    EVALUATE,
    FEW_STEP,
    LATENCY,
    STAGES,
    STUDENT,
    TEACHER,
    TEXT_TO_IMAGE,
    TUNE,
    given_source,
    maker_of,
    shipped,
)
from edgedit_hf.run.state import RunState

TRAINING = Path(__file__).parents[2] / "training"


def keys() -> list[str]:
    """Every key of a recipe but the run's folder, and that which moves the teacher (a test of its own)."""
    found = []
    for entry in dataclasses.fields(RunConfig):
        value = getattr(RunConfig(), entry.name)
        nested = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        found += [f"{entry.name}.{key.name}" for key in nested] or [entry.name]
    return [key for key in found if key not in ("output_dir", "teacher.path")]


def changed(config: RunConfig, key: str) -> RunConfig:
    """The recipe with another value of a key, of the same kind."""
    config, *path = copy.deepcopy(config), *key.split(".")
    target = config if len(path) == 1 else getattr(config, path[0])
    value = getattr(target, path[-1])
    other = not value if isinstance(value, bool) else value + 1 if isinstance(value, (int, float)) else ["other"]
    setattr(target, path[-1], other if value is not None and not isinstance(value, str) else "other")
    return config


def write(path: Path, content: str) -> None:
    """What stands for a stage's results at a place: a file, or a pipeline with these weights."""
    if path.suffix == ".json":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"content": content}))
        return
    (path / "transformer").mkdir(parents=True, exist_ok=True)
    (path / "model_index.json").write_text(json.dumps({"_class_name": "P", "transformer": ["diffusers", "T"]}))
    (path / "transformer" / "weights.safetensors").write_text(content)


def state(config: RunConfig, stage, **given) -> RunState:
    opened = {name: "as it was" for name, at in stage.inputs if not at}
    return RunState(config, stage, 1, inputs={**opened, **given})


@pytest.fixture
def config(tmp_path):
    return RunConfig(output_dir=str(tmp_path / "run"))


@pytest.fixture
def finish(config):
    def work(stage):
        for _, at in stage.inputs:
            if at:
                write(config.folder(at), "as it was")
        run = state(config, stage)
        for _ in run.steps():
            pass
        run.finish()
        return run

    return work


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_finished_stage_is_refused_by_what_it_declares_and_by_nothing_else(config, finish, stage):
    finish(stage)
    assert state(config, stage).finished
    for key in keys():
        names = (key, key.split(".")[0])
        if set(names) & set(stage.sections) and names[0].split(".")[-1] not in NO_RESULT:
            with pytest.raises(
                EdgeDiTError, match=rf"was made with (config\.)?{key} = .*, but now (config\.)?{key} = "
            ):
                state(changed(config, key), stage)
        else:
            assert state(changed(config, key), stage).finished, key
    for name, at in stage.inputs:
        with pytest.raises(EdgeDiTError, match=rf"was made with inputs\.{name} = "):
            if at:
                write(config.folder(at), "another")
            state(config, stage, **({} if at else {name: "another"}))
        if at:
            write(config.folder(at), "as it was")
    assert state(config, stage).finished


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_says_what_it_did_not_read_and_gives_what_it_declares(config, finish, stage):
    finish(stage)
    with pytest.raises(ValueError, match=f"stage {stage.name} declares the inputs"):
        state(config, stage, unheard_of="hash")
    for name, _ in stage.inputs:
        with pytest.raises(EdgeDiTError, match=rf"inputs\.{name} = '\w+.*', but now inputs\.{name} = None"):
            state(config, stage, **{name: None})


def test_a_teacher_that_is_brought_along_is_the_input(config, finish, tmp_path):
    finish(BANK)
    config.teacher.path = str(tmp_path / "given")
    write(tmp_path / "given", "as it was")  # the same weights elsewhere are the same
    assert state(config, BANK).finished
    write(tmp_path / "given", "another")
    with pytest.raises(EdgeDiTError, match=r"inputs\.teacher"):
        state(config, BANK)


def test_another_teacher_than_was_given_is_named_where_it_is(config, finish, tmp_path):
    finish(BANK)
    config.teacher.path = str(tmp_path / "given")
    write(tmp_path / "given", "another")
    bank = config.folder("bank")
    said = rf"{bank} was made from another teacher than {tmp_path / 'given'}: give the one .*, or delete {bank} and run"
    with pytest.raises(EdgeDiTError, match=said):
        state(config, STUDENT)


def test_what_was_made_of_something_older_is_named_from_wherever_it_is_read(config, finish):
    """The teacher is made anew: the bank, of which the student and all else is, is of the old one."""
    for stage in (TEACHER, BANK):
        finish(stage)
    write(config.folder("teacher"), "another")
    bank, teacher = config.folder("bank"), config.folder("teacher")
    said = rf"{bank} was made from another {teacher} than is there now: delete {bank} and run {re.escape(BANK.made_by)}"
    for stage, folder in ((STUDENT, None), (TUNE, "student-random-proxies")):
        with pytest.raises(EdgeDiTError, match=said):
            RunState(config, stage, 1, folder=folder, inputs={name: "x" for name, at in stage.inputs if not at})


def test_a_stage_that_was_refused_for_its_sources_starts_once_they_are_made_anew(config, finish):
    """It has noted nothing of them, so the remedy that it named is enough; and its folder is free."""
    for stage in (TEACHER, BANK, STUDENT):
        finish(stage)
    write(config.folder("bank/index.json"), "another")
    with pytest.raises(EdgeDiTError, match="student was made from another .*: delete"):
        state(config, TUNE)
    assert not any(config.folder(TUNE.folder).iterdir())
    shutil.rmtree(config.folder(STUDENT.folder))
    write(config.folder("student"), "made anew")
    assert not state(config, TUNE).finished


def test_a_stage_that_is_refused_for_its_sources_gives_its_folder_back(config, finish):
    for stage in (TEACHER, BANK, STUDENT):
        finish(stage)
    state(config, TUNE)._lock.release()
    record = config.folder(STUDENT.folder, "stage.json")
    made = json.loads(record.read_text())
    record.write_text(json.dumps({**made, "inputs": {**made["inputs"], "bank": "another"}}))
    with pytest.raises(EdgeDiTError, match="student was made from another"):
        state(config, TUNE)
    assert not config.folder(TUNE.folder, "run.lock").exists()


def test_records_of_earlier_versions_are_compared_as_far_as_they_go(config, finish):
    finish(BANK)
    path = config.folder("bank", "run.json")
    record = json.loads(path.read_text())
    record["inputs"]["teacher"] = "0123456789abcdef"  # of the loaded weights
    for key in ("class_dropout", "final_learning_rate"):
        del record["config"]["bank"][key]  # there were none
    path.write_text(json.dumps({**record, "format": 2}))
    assert state(config, BANK).finished
    with pytest.raises(EdgeDiTError, match=r"bank\.class_dropout = 0\.1, but now .* = 0\.2"):
        state(dataclasses.replace(config, bank=dataclasses.replace(config.bank, class_dropout=0.2)), BANK)
    with pytest.raises(EdgeDiTError, match=r"bank\.steps"):
        state(changed(config, "bank.steps"), BANK)
    with pytest.raises(EdgeDiTError, match=r"inputs\.data"):
        state(config, BANK, data="another")


def test_a_run_with_a_key_of_another_name_is_refused_naming_the_new_one(config, finish):
    finish(EVALUATE)
    path = config.folder("evaluate", "run.json")
    record = json.loads(path.read_text())
    record["config"]["evaluate"]["sampling_steps"] = record["config"].pop("sampling")["steps"]
    path.write_text(json.dumps({**record, "format": 2}))
    with pytest.raises(EdgeDiTError, match=r"evaluate.sampling_steps is called sampling.steps now.* Delete .*evaluate"):
        state(config, EVALUATE)


# -------------------------------------------------------------------- the tables


def test_names_folders_and_scripts():
    names = [stage.name for stage in STAGES]
    assert len(set(names)) == len(names) and not set(names) & set(DRIVERS)
    for table in (EDGEDIT, TEXT_TO_IMAGE):
        folders = [folder for stage in table for folder in stage.folders]
        assert len(set(folders)) == len(folders)
    scripts = {path.name for path in TRAINING.glob("*.py")} - {"__init__.py"}
    of_no_run = {SCRIPTS[SCORE]}
    assert {stage.script for stage in STAGES} | {script for script, _ in DRIVERS.values()} | of_no_run == scripts
    for stage in STAGES:
        tree = ast.parse((TRAINING / stage.script).read_text())
        assert stage.does in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    ways = [(stage.script, stage.does) for stage in STAGES]
    assert len(set(ways)) == len(ways)


@pytest.mark.parametrize("table", [EDGEDIT, TEXT_TO_IMAGE], ids=["edgedit", "text to image"])
def test_a_stage_reads_what_stands_before_it(table):
    for place, stage in enumerate(table):
        for _, at in stage.inputs:
            assert not at or maker_of(at, table) in table[:place]


def test_sections_are_those_of_a_recipe():
    for stage in STAGES:
        for name in stage.sections:
            target = RunConfig()
            for part in name.split("."):
                target = getattr(target, part)
            assert stage.values(RunConfig()) or stage.sections == ("seed",)
        for key in filter(None, (stage.brought, stage.unless)):
            assert getattr(getattr(RunConfig(), key.split(".")[0]), key.split(".")[1]) is None


def test_what_a_recipe_makes_needless():
    config = RunConfig()
    assert [stage.name for stage in STAGES if not stage.needed(config)] == [
        *("few-step", "quantize", "self-distil"),
        "evaluate-few-step",
    ]
    config.few_step.enabled = config.quantize.enabled = True
    assert all(stage.needed(config) for stage in STAGES)
    config.student.genotype = "EdgeDiT-1"
    assert [stage.name for stage in STAGES if not stage.needed(config)] == ["latency", "search"]
    assert not LATENCY.needed(config)


def test_one_place_says_what_a_run_ships():
    config = RunConfig()
    assert shipped(config) is TUNE
    config.few_step.enabled = True
    assert shipped(config) is FEW_STEP


def test_a_few_step_student_is_of_the_run_or_of_what_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = RunConfig(output_dir="runs/mine")
    assert given_source(config) is None
    for own in ("runs/mine/student-tuned", "runs/mine/elastic", str(tmp_path / "runs" / "mine" / "student-tuned")):
        config.few_step.path = own
        assert given_source(config) is None
    for given in ("runs/mine/teacher", "runs/other/student-tuned", "someone/pipeline"):
        config.few_step.path = given
        assert given_source(config) == given


def test_the_documentation_lists_the_stages_in_their_order():
    lines = (TRAINING.parent / "docs" / "runs.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| [")]
    assert [(row[0].split("]")[0][1:], row[1].strip("`")) for row in rows] == [(s.name, s.script) for s in EDGEDIT]
    for row, stage in zip(rows, EDGEDIT):
        assert f"`{stage.folder}/" in row[2]
