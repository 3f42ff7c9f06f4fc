"""Results never go stale: a stage whose input was made anew is refused by name, whichever stage is run, and so is the
report.
"""

import dataclasses
import json
import shutil

import pytest
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.report.edgedit import write_report
from edgedit_hf.run.comparison import NO_RESULT
from edgedit_hf.run.config import RunConfig, load_config
from edgedit_hf.run.launch import make_accelerator, stage_runs
from edgedit_hf.run.stage import EDGEDIT, RANK, SENSITIVITY, STAGES, TEXT_TO_IMAGE, Stage
from edgedit_hf.search.latency_table import LatencyTable


def alter(path) -> None:
    """Other results of the same form: the weights of a pipeline or encoder, or a file of values."""
    if path.suffix == ".json":
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values, indent=7))
        return
    for file in path.rglob("*.safetensors"):
        tensors = load_file(file)
        save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, file, {"format": "pt"})


@pytest.fixture
def run(debug_run, tmp_path):
    return shutil.copytree(debug_run, tmp_path / "run")


@pytest.mark.parametrize(
    ("script", "input_", "name"),
    [
        ("distill_proxies", "teacher", "teacher"),
        ("search_architecture", "latency/table.json", "latency"),
        ("select_student", "search/front.json", "front"),
        ("finetune", "student", "student"),
        ("export_student", "student-tuned", "student-tuned"),
        ("evaluate_models", "student-tuned", "student-tuned"),
        ("evaluate_models", "teacher-more-steps", "teacher-more-steps"),
        ("evaluate_models", "exported/onnx-int8", "exported/onnx-int8"),
    ],
)
def test_a_finished_stage_is_refused_when_what_it_read_was_made_anew(run, fail, script, input_, name):
    path = run / input_
    if path.suffix or "onnx" not in input_:
        alter(path)
    else:
        shutil.copytree(run / "exported" / "onnx-fp32", path, dirs_exist_ok=True)
    assert f"was made with inputs.{name} = " in fail(script, run)


@pytest.mark.parametrize(
    ("script", "input_", "name"), [("train_elastic", "text", "text"), ("evaluate_elastic", "elastic", "weights")]
)
def test_the_same_of_text_to_image(debug_t2i_run, tmp_path, fail, script, input_, name):
    run = shutil.copytree(debug_t2i_run, tmp_path / "run")
    alter(run / input_)
    shutil.rmtree(run / "text-embeddings")  # a cache, which would say so first
    assert f"was made with inputs.{name} = " in fail(script, run, "threads=2", config="debug-t2i.yaml")


def test_figures_of_an_older_student_are_made_anew_by_no_stage_alone(run, fail):
    """Tuned again, and judged again: but the exports are still those of the student before."""
    alter(run / "student-tuned")
    with pytest.raises(EdgeDiTError, match="figures of 'student-tuned' are those of other weights"):
        write_report(run)
    shutil.rmtree(run / "evaluate")
    message = fail("evaluate_models", run)
    assert f"{run / 'exported'} was made from another {run / 'student-tuned'} than is there now" in message
    assert "run stage export (training/export_student.py) again" in message


def test_exports_of_one_student_are_not_taken_for_those_of_the_other(run, fail):
    for script in ("export_student", "evaluate_models"):
        message = fail(script, run, "few_step.enabled=true")
        assert "stage few-step (training/distill_few_step.py)" in message and "run that first" in message
    shutil.copytree(run / "student-tuned", run / "few-step", ignore=shutil.ignore_patterns("stage.json", "run.json"))
    message = fail("export_student", run, "few_step.enabled=true")
    assert "exported was made with inputs.few-step = None, but now inputs.few-step = '" in message


def test_a_model_that_the_recipe_does_not_make_is_not_judged():
    """Its folder may be of an earlier recipe."""
    from edgedit_hf.training.evaluate_models import asked_for

    config = RunConfig()
    config.export.executorch = ["int4"]
    whole = asked_for(config)
    assert whole == [
        *("teacher", "teacher-more-steps", "student", "student-tuned"),
        *("exported/onnx-fp32", "exported/onnx-int8", "exported/executorch-int4"),
    ]
    config.tune.teacher_more_steps, config.tune.random_proxies, config.evaluate.exports = False, True, False
    assert asked_for(config) == ["teacher", "student", "student-random-proxies", "student-tuned"]
    config.few_step.enabled = True
    assert asked_for(config)[-1] == "few-step"
    config.quantize.enabled = True
    assert asked_for(config)[-2:] == ["few-step", "quantized"]


def test_how_images_are_sampled_is_part_of_what_saves_it(run, fail):
    for script in ("train_teacher", "evaluate_models"):
        assert "config.sampling.steps = 2, but now config.sampling.steps = 3" in fail(script, run, "sampling.steps=3")


def test_an_extractor_of_other_steps_is_not_taken(run, fail):
    for stage in ("search", "evaluate"):
        (run / stage / "stage.json").unlink()
        (run / stage / "run.json").unlink()
    for path in (run / "search").iterdir():
        path.unlink()
    message = fail("search_architecture", run, "evaluate.extractor_steps=21")
    assert "extractor was trained with evaluate.extractor_steps = 20, but now" in message and "delete" in message


def test_a_table_that_is_given_is_copied_and_must_fit_the_teacher(recipes, debug_run, run, fail, tmp_path):
    given = debug_run / "latency" / "table.json"
    shutil.rmtree(run / "latency")
    recipes.run_here("measure_latency", run, f"latency.table={given}")
    assert (run / "latency" / "table.json").read_bytes() == given.read_bytes()
    recipes.run_here("search_architecture", run)  # finished, and its input is the same
    values = LatencyTable.from_json(given).to_dict()
    LatencyTable({**values, "trunk": {**values["trunk"], "patch_size": 1}}).to_json(tmp_path / "other.json")
    shutil.rmtree(run / "latency")
    said = fail("measure_latency", run, f"latency.table={tmp_path / 'other.json'}")
    assert "latency.table is " in said and "patch_size 1 (table) / 2 (model)" in said
    assert not (run / "latency" / "stage.json").exists()
    (run / "latency").mkdir(exist_ok=True)
    shutil.copy(tmp_path / "other.json", run / "latency" / "table.json")
    assert "patch_size 1 (table) / 2 (model)" in fail("search_architecture", run)


@pytest.fixture
def keys_read(monkeypatch):
    """The keys of a recipe that code reads, whoever reads them; what a record holds of a section is no reading."""
    found: set[str] = set()

    def watch(kind, section=""):
        names = {entry.name for entry in dataclasses.fields(kind) if section or entry.name in ("seed", "threads")}

        def read(self, name):
            if name in names:
                found.add(f"{section}.{name}" if section else name)
            return object.__getattribute__(self, name)

        monkeypatch.setattr(kind, "__getattribute__", read)

    def unwatched(method):
        def call(*args):
            before = set(found)
            try:
                return method(*args)
            finally:
                found.intersection_update(before)

        return call

    for entry in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(getattr(RunConfig(), entry.name)):
            watch(type(getattr(RunConfig(), entry.name)), entry.name)
    watch(RunConfig)
    monkeypatch.setattr(RunConfig, "section", unwatched(RunConfig.section))
    monkeypatch.setattr(Stage, "values", unwatched(Stage.values))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "stages"),
    [("debug.yaml", (*EDGEDIT, SENSITIVITY, RANK)), ("debug-t2i.yaml", TEXT_TO_IMAGE)],
    ids=["edgedit", "text to image"],
)
def test_no_stage_reads_a_key_that_it_does_not_declare(recipes, tmp_path, keys_read, recipe, stages):
    training = recipes.root / "training"
    overrides = [f"output_dir={tmp_path}", "threads=1", "tune.random_proxies=true", *recipes.tiny, "quantize.steps=2"]
    config = load_config(training / "recipes" / recipe, overrides)
    accelerator = make_accelerator(config)
    diffusers_logging.disable_progress_bar()
    by_input = {"data": "data", "teacher": "teacher.path", "text": "text"}  # the hash says more than the keys
    # Images do not depend on their batch but for rounding; of the teacher a table needs sizes alone, which it records;
    # an export asks whether the student's teacher is still the one that it was made from, a search whether its table is
    # of what is asked for.
    batch, asked = (
        {"evaluate.batch_size"},
        {f"latency.{key}" for key in ("batch_size", "precision", "runtime", "threads")},
    )
    free = {"search": batch | asked, "rank": batch, "latency": {"teacher.path"}, "export": {"teacher.path"}}
    for stage, run in stage_runs(stages, training).items():
        keys_read.clear()
        run(config, accelerator)
        rows = [row for row in STAGES if row.script == stage.script]
        declared = {name for row in rows for name in row.sections}
        declared |= {by_input.get(name) for row in rows for name, _ in row.inputs}
        undeclared = {key for key in keys_read - free.get(stage.name, set()) if not {key, key.split(".")[0]} & declared}
        assert not {key for key in undeclared if key.split(".")[-1] not in NO_RESULT}, stage.name
