"""The recipe of the proxy bank: groups within a memory budget, chosen genotypes, precision, what the index records, and
refusals.
"""

import json
import runpy
import shutil
import sys

import pytest
from safetensors.torch import load_file

from edgedit_hf import Genotype, ProxyBank, SearchSpace
from edgedit_hf.distill.memory_plan import MemoryModel, units_of
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.pipelines.loading import load_pipeline

LAYERS = 5
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SMALL = (
    "teacher.num_layers=5",
    "teacher.steps=4",
    "bank.calibration_samples=8",
    "bank.batch_size=4",
    "bank.steps=16",
    "bank.both_steps=3",
)


@pytest.fixture
def bank_of(recipes, monkeypatch, capsys):
    """Run the bank's recipe in this process, on a copy of a run's teacher; returns the exit code, the bank's folder and
    stderr.
    """

    def run(source, target, *overrides, arguments=()):
        if not (target / "teacher").exists():
            shutil.copytree(source / "teacher", target / "teacher")
        monkeypatch.setattr(
            sys, "argv", [*recipes.arguments("distill_proxies", target, *SMALL, *overrides), *arguments]
        )
        code = 0
        try:
            runpy.run_path(str(recipes.root / "training" / "distill_proxies.py"), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        return code, target / "bank", capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def teacher_run(recipes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank") / "run"
    recipes.run_here("train_teacher", folder, *SMALL)
    return folder


@pytest.fixture(scope="module")
def whole(recipes, teacher_run):
    """The bank of one process without a budget, which holds nothing else."""
    recipes.run("distill_proxies", teacher_run, *SMALL)
    return teacher_run / "bank"


def budget_for(run, pairs: int) -> float:
    """A budget in GB into which `pairs` pairs of layers fit, and no more."""
    config = load_pipeline(run / "teacher").transformer.config
    space = SearchSpace.for_config(config)
    memory = MemoryModel(space, dict(config), tokens=16, batch_size=4, calibration_samples=8)
    layers = [
        [layer for pair in units_of(space, space.proxies())[:count] for layer in pair] for count in (pairs, pairs + 1)
    ]
    enough, more = (memory.predict(some, LAYERS) for some in layers)
    return (0.9 * enough + 0.1 * more) / 1e9  # nor does the last odd layer fit in as well


def same_files(one, other) -> None:
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names == sorted(path.name for path in other.glob("*.safetensors"))
    different = [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]
    assert not different


# -------------------------------------------------------------------- what is recorded


def test_the_index_records_every_start_and_a_curve(whole, teacher_run):
    bank = ProxyBank(whole, load_pipeline(teacher_run / "teacher").transformer)
    assert bank.missing() == [] and len(bank.entries) == 5 * 3 + 2 * 4
    for entry in bank.entries.values():
        both = entry["option"] == "both"
        assert set(entry["losses"]) == {"random", "copied", "closed_form", "after"} | ({"combined"} if both else set())
        assert [step for step, _ in entry["curve"]] == ([0, 3] if both else [0, 1, 4, 16])
        assert (
            entry["losses"]["after"] == entry["loss_after"] == entry["curve"][-1][1]
            and entry["steps"] == entry["curve"][-1][0]
        )
        assert entry["loss_before"] == entry["curve"][0][1]
        assert entry["loss_before"] == pytest.approx(entry["losses"]["combined" if both else "closed_form"], rel=1e-5)
        assert (
            entry["losses"]["closed_form"] < entry["losses"]["copied"]
            and entry["losses"]["closed_form"] < entry["losses"]["random"]
        )
        assert entry["init"] == ("combined" if both else "closed_form")


def test_what_was_planned_and_held_is_in_the_stage_file(whole):
    stage = json.loads((whole / "stage.json").read_text())
    assert stage["memory_budget_gb"] is None and stage["precision"] == "no" and stage["proxies"] == 23
    ((group,),) = stage["ranks"]
    assert (
        group["teacher_layers"] == [0, 4]
        and group["proxies"] == 23
        and 0.1 < group["peak_gb"] < group["predicted_gb"] < 2
    )


def test_no_steps_at_all_gives_the_starts(bank_of, teacher_run, tmp_path):
    code, bank, _ = bank_of(teacher_run, tmp_path, "bank.steps=0", "bank.both_steps=0", "bank.init=copy")
    assert code == 0
    entries = json.loads((bank / "index.json").read_text())["entries"]
    assert len(entries) == 23 and all(
        entry["curve"] == [[0, entry["loss_after"]]] and entry["steps"] == 0 for entry in entries.values()
    )
    assert entries["02/mlp"]["loss_before"] == pytest.approx(entries["02/mlp"]["losses"]["copied"], rel=1e-5)
    assert "closed_form" not in entries["02/mlp"]["losses"]


# -------------------------------------------------------------------- groups


@pytest.mark.parametrize(
    ("pairs", "groups"), [pytest.param(1, [[0, 1], [2, 3], [4, 4]], marks=pytest.mark.slow), (2, [[0, 3], [4, 4]])]
)
def test_a_budget_makes_groups_and_changes_no_byte(bank_of, teacher_run, whole, tmp_path, pairs, groups):
    budget = budget_for(teacher_run, pairs)
    code, bank, _ = bank_of(teacher_run, tmp_path, arguments=["--memory-budget-gb", str(budget)])
    assert code == 0
    same_files(whole, bank)
    assert json.loads((bank / "index.json").read_text()) == json.loads((whole / "index.json").read_text())
    stage = json.loads((bank / "stage.json").read_text())
    assert [group["teacher_layers"] for group in stage["ranks"][0]] == groups and stage["memory_budget_gb"] == budget
    assert all(group["predicted_gb"] <= budget + 1e-3 for group in stage["ranks"][0])
    assert stage["steps"] == len(groups) * (16 + 3 + 1)


@pytest.mark.slow
@pytest.mark.kills
def test_a_run_with_groups_killed_and_resumed_equals_one_group(recipes, teacher_run, whole, tmp_path):
    shutil.copytree(teacher_run / "teacher", tmp_path / "teacher")
    budget, seconds = budget_for(teacher_run, 1), json.loads((whole / "stage.json").read_text())["seconds"]
    overrides = (*SMALL, f"bank.memory_budget_gb={budget}")
    delays = recipes.run_with_kills("distill_proxies", tmp_path, tmp_path / "bank" / "run.json", seconds, *overrides)
    same_files(whole, tmp_path / "bank")
    assert json.loads((tmp_path / "bank" / "index.json").read_text()) == json.loads(
        (whole / "index.json").read_text()
    ), delays


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_with_different_numbers_of_groups_give_the_same_bytes(recipes, teacher_run, whole, tmp_path):
    shutil.copytree(teacher_run / "teacher", tmp_path / "teacher")
    budget = f"bank.memory_budget_gb={budget_for(teacher_run, 1)}"
    recipes.run("distill_proxies", tmp_path, *SMALL, budget, launcher=TORCHRUN)
    same_files(whole, tmp_path / "bank")
    ranks = json.loads((tmp_path / "bank" / "stage.json").read_text())["ranks"]
    assert [[group["teacher_layers"] for group in groups] for groups in ranks] == [[[0, 1]], [[2, 3], [4, 4]]]


@pytest.mark.slow
def test_a_real_budget_is_kept(recipes, tmp_path):
    """Wide enough that the proxies outweigh the rest of the process."""
    wide = (
        "teacher.hidden_size=384 teacher.num_layers=8 teacher.num_heads=6 teacher.steps=1 teacher.batch_size=2 "
        "bank.steps=2 bank.both_steps=2"
    ).split()
    wide += (
        "bank.init=copy bank.calibration_samples=4 bank.batch_size=4 bank.log_every=1 bank.checkpoint_every=1".split()
    )
    recipes.run("train_teacher", tmp_path, *wide)
    recipes.run("distill_proxies", tmp_path, *wide)
    ((alone,),) = json.loads((tmp_path / "bank" / "stage.json").read_text())["ranks"]
    assert alone["peak_gb"] <= alone["predicted_gb"]
    budget = round(0.75 * alone["peak_gb"], 2)
    (tmp_path / "bank").rename(tmp_path / "unbounded")
    recipes.run("distill_proxies", tmp_path, *wide, f"bank.memory_budget_gb={budget}")
    (groups,) = json.loads((tmp_path / "bank" / "stage.json").read_text())["ranks"]
    assert len(groups) > 1 and max(group["peak_gb"] for group in groups) <= budget < alone["peak_gb"]
    same_files(tmp_path / "unbounded", tmp_path / "bank")


# -------------------------------------------------------------------- what is made


def test_only_what_a_genotype_needs_is_made_and_assembles(bank_of, teacher_run, whole, tmp_path):
    teacher = load_pipeline(teacher_run / "teacher").transformer
    space = SearchSpace.for_config(teacher.config)
    genotype = space.from_code(
        (16, 1 * 4 + 0, 3)
    )  # layers 0 and 1 merged, layer 2 with a reduced MLP, layer 3 kept, layer 4 with both
    (tmp_path / "genotype.json").write_text(genotype.to_json())
    code, folder, _ = bank_of(teacher_run, tmp_path, f"bank.only=[{tmp_path / 'genotype.json'}]")
    assert code == 0
    bank = ProxyBank(folder, teacher)
    assert sorted(bank.entries) == ["00-01/original", "02/mlp", "04/attention", "04/both", "04/mlp"]
    for name in (path.name for path in folder.glob("*.safetensors")):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), (
            "a proxy does not depend on which others are made"
        )
    assert len(bank.assemble(genotype).blocks) == 4
    assert len(bank.missing()) == 23 - 5


def test_the_parts_that_the_both_of_a_student_needs_are_the_only_extra(bank_of, teacher_run, tmp_path):
    (tmp_path / "genotype.json").write_text(SearchSpace(5, 32, 2).from_code((1, 0, 0)).to_json())
    code, folder, _ = bank_of(teacher_run, tmp_path, f"bank.only=[{tmp_path / 'genotype.json'}]")
    stage = json.loads((folder / "stage.json").read_text())
    assert code == 0 and stage["proxies"] == 1 and stage["steps"] == 16 + 1  # no "both", so no steps for them
    assert stage["ranks"][0][0]["teacher_layers"] == [1, 1]


# -------------------------------------------------------------------- precision


@pytest.mark.slow
def test_a_bf16_teacher_gives_fp32_proxies_and_the_losses_of_an_fp32_teacher(recipes, teacher_run, whole, tmp_path):
    shutil.copytree(teacher_run / "teacher", tmp_path / "teacher")
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--mixed_precision",
        "bf16",
    ]
    recipes.run("distill_proxies", tmp_path, *SMALL, "bank.optimizer=adamw8bit", launcher=launcher)
    assert json.loads((tmp_path / "bank" / "stage.json").read_text())["precision"] == "bf16"
    found, expected = (
        json.loads((folder / "index.json").read_text())["entries"] for folder in (tmp_path / "bank", whole)
    )
    assert found.keys() == expected.keys()
    for key, entry in found.items():
        for start in ("random", "copied", "closed_form"):
            assert entry["losses"][start] == pytest.approx(expected[key]["losses"][start], rel=0.02, abs=5e-4), (
                key,
                start,
            )
        assert {str(t.dtype) for t in load_file(tmp_path / "bank" / entry["file"]).values()} == {"torch.float32"}


# -------------------------------------------------------------------- refusals


def error_of(result) -> str:
    code, _, stderr = result
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1, stderr
    return lines[0]


@pytest.mark.parametrize("budget", ["0", "0.5"])
def test_a_budget_too_small_for_a_pair_is_refused_before_anything_is_written(bank_of, teacher_run, tmp_path, budget):
    message = error_of(bank_of(teacher_run, tmp_path, arguments=["--memory-budget-gb", budget]))
    assert f"bank.memory_budget_gb is {budget}. Raise it" in message and "layers 0–1 need 0.8" in message
    assert not (tmp_path / "bank").exists()


def test_a_negative_budget_and_words_are_refused(bank_of, teacher_run, tmp_path):
    assert "bank.memory_budget_gb is -1.0; it must be at least 0" in error_of(
        bank_of(teacher_run, tmp_path, arguments=["--memory-budget-gb=-1"])
    )
    assert "bank.memory_budget_gb is 'much'" in error_of(
        bank_of(teacher_run, tmp_path, arguments=["--memory-budget-gb", "much"])
    )


def test_genotypes_that_are_not_there_or_of_another_teacher_are_refused(bank_of, teacher_run, tmp_path):
    message = error_of(bank_of(teacher_run, tmp_path, "bank.only=[no.json]"))
    assert (
        "'no.json', which is neither a student preset (EdgeDiT-1, EdgeDiT-6, EdgeDiT-digits) nor a genotype file"
        in message
    )
    assert "replaces 28 layers of width 1152, but the teacher has 5 of width 32" in error_of(
        bank_of(teacher_run, tmp_path, "bank.only=[EdgeDiT-1]")
    )
    (tmp_path / "teacher.json").write_text(Genotype.original(5, 32, 2).to_json())
    assert "they need no proxies" in error_of(
        bank_of(teacher_run, tmp_path, f"bank.only=[{tmp_path / 'teacher.json'}]")
    )


def test_an_unfinished_bank_says_what_is_missing(whole, teacher_run, tmp_path):
    """Files are there as soon as their group is done; what counts is the index, which the end of the stage writes."""
    teacher = load_pipeline(teacher_run / "teacher").transformer
    shutil.copytree(whole, tmp_path / "bank")
    index = json.loads((whole / "index.json").read_text())
    (tmp_path / "bank" / "index.json").write_text(json.dumps({**index, "entries": {}}))
    space = SearchSpace.for_config(teacher.config)
    with pytest.raises(
        EdgeDiTError, match="has no proxies '00/mlp', '01/mlp'.* it holds 0 of 23 entries. Finish stage bank first"
    ):
        ProxyBank(tmp_path / "bank", teacher).assemble(space.from_code((5, 0, 0)))


@pytest.mark.slow
@pytest.mark.ranks
def test_more_processes_than_pairs(recipes, teacher_run, tmp_path):
    shutil.copytree(teacher_run / "teacher", tmp_path / "teacher")
    (tmp_path / "genotype.json").write_text(SearchSpace(5, 32, 2).from_code((1, 0, 0)).to_json())
    only = f"bank.only=[{tmp_path / 'genotype.json'}]"
    result = recipes.run("distill_proxies", tmp_path, *SMALL, only, launcher=TORCHRUN, check=False)
    assert result.returncode != 0 and "2 processes share 1 pairs of layers; start at most that many" in result.stderr
