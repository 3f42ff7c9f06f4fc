"""From a finished search to an assembled student, with a real bank of untrained proxies."""

import json

import pytest
import torch
from demo_stage import demo_run
from unsearched import write_table

from edgedit_hf import EdgeDiTPipeline, EdgeDiTTransformer2DModel, ProxyBank, SearchSpace
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.files import file_record, replace_folder
from edgedit_hf.search.latency_table import LatencyTable, trunk_of
from edgedit_hf.search.objectives import StudentQuality
from edgedit_hf.search.selection import select, write_student
from edgedit_hf.search_space import model_cost


@pytest.fixture
def run(make_transformer, tmp_path):
    """A teacher, a bank and a front of three genotypes: all original, all reduced, all merged and reduced."""
    teacher = make_transformer()
    pipeline = EdgeDiTPipeline(teacher, make_scheduler("epsilon"))
    pipeline.save_pretrained(tmp_path / "teacher")
    space = SearchSpace.for_config(teacher.config)
    bank = ProxyBank.create(tmp_path / "bank", teacher, space)
    torch.manual_seed(0)
    record = {"loss_before": 1.0, "loss_after": 1.0, "steps": 0, "seed": 0, "init": "random"}
    bank.write_index(
        {bank.key(layer): bank.write_proxy(layer, bank.new_block(layer), record) for layer in space.proxies()}
    )
    front = []
    for distance, latency, code in ((1.0, 9.0, [0, 0]), (2.0, 6.0, [15, 15]), (4.0, 3.0, [19, 19])):
        cost = model_cost({**teacher.config, "layers": space.from_code(code).to_layers()})
        front.append(
            {
                "distance": distance,
                "latency_ms": latency,
                "code": code,
                "parameters": cost.parameters,
                "flops": cost.flops,
                "weights": cost.weights,
                "live_values": 10 * (10 - distance),
            }
        )
    cost = model_cost(teacher.config)
    whole = {"path": None, "latency_ms": 9.0, "parameters": cost.parameters, "flops": cost.flops}
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "front.json").write_text(json.dumps({"front": front, "teacher": whole}))
    return tmp_path, pipeline, bank


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"max_latency_ms": 7.0}, [15, 15]),
        ({"max_latency_ratio": 0.5}, [19, 19]),
        ({"max_parameters_ratio": 0.9}, [15, 15]),
        ({"max_flops_ratio": 0.4}, [19, 19]),
    ],
)
def test_the_lowest_distance_within_the_limits_is_assembled(run, limits, code):
    folder, _, bank = run
    choice = select(folder, **limits)
    assert choice["code"] == code and json.loads((folder / "student" / "choice.json").read_text()) == choice
    student = EdgeDiTTransformer2DModel.from_pretrained(folder / "student" / "transformer")
    expected = bank.assemble(bank.space.from_code(code))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor), name


def test_the_memory_of_points_is_bounded(run):
    folder, pipeline, bank = run
    table = write_table(folder, pipeline.transformer, bank.space)
    points = json.loads((folder / "search" / "front.json").read_text())["front"]
    for precision, size in (("fp32", 4), ("int8", 1), (None, 1)):
        for point in points:
            memory = size * point["weights"] + table.batch * 4 * point["live_values"]
            choice = select(folder, max_memory_mb=(memory + 1) / 1e6, bytes_precision=precision)
            assert choice["code"] == point["code"]
    front = json.loads((folder / "search" / "front.json").read_text())
    del front["front"][1]["live_values"]
    (folder / "search" / "front.json").write_text(json.dumps(front))
    with pytest.raises(EdgeDiTError, match="limit is set on .'memory'., which the front's entries do not hold"):
        select(folder, max_memory_mb=1.0)


def test_other_files_of_the_folder_stay(run):
    folder = run[0]
    (folder / "student").mkdir()
    (folder / "student" / "run.json").write_text("{}")
    select(folder, max_latency_ms=7.0)
    assert (folder / "student" / "run.json").read_text() == "{}"


def test_another_choice_takes_the_place_of_a_finished_student_at_once(run, monkeypatch):
    folder = run[0] / "student"
    state = demo_run(folder, "student", {}, 1)
    for _ in state.steps():
        select(run[0], max_latency_ms=7.0)
    state.finish()
    before, switches = file_record(folder), []

    def watched(source, target):
        assert target == folder and file_record(folder, ["run.lock"]) == before  # nothing was touched until now
        files_of_new = file_record(source)
        replace_folder(source, target)
        assert file_record(folder) == files_of_new
        switches.append(target)

    monkeypatch.setattr("edgedit_hf.files.replace_folder", watched)
    choice = select(run[0], max_latency_ratio=0.5)
    assert len(switches) == 1 and json.loads((folder / "choice.json").read_text()) == choice
    assert demo_run(folder, "student", {}, 1).finished and not (folder / "run.lock").exists()


def test_a_student_that_is_not_finite_is_not_written(run):
    folder, pipeline, bank = run
    with torch.no_grad():
        next(bank.teacher.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(EdgeDiTError, match="The assembled student: .* NaN .* nothing was written"):
        write_student(pipeline, bank, bank.space.from_code([0, 0]), folder / "student", {})
    assert not (folder / "student").exists()


def test_a_budget_that_nothing_meets_writes_nothing(run):
    folder = run[0]
    with pytest.raises(EdgeDiTError, match="fastest"):
        select(folder, max_latency_ms=1.0)
    assert not (folder / "student").exists()


def test_a_table_of_another_machine_is_refused_unless_told(run):
    """By the recipe that the latency stage was run with, or by whoever selects."""
    folder, pipeline, bank = run
    config = pipeline.transformer.config
    blocks = [{**layer.shape._asdict(), "ms": 1.0} for layer in bank.space.replacements()]
    table = {"format": 1, "runtime": "onnxruntime", "precision": "fp32", "batch": 1, "threads": 1, "trunk_ms": 1.0}
    about = {"space": bank.space.to_dict(), "trunk": trunk_of(config), "blocks": blocks}
    foreign = LatencyTable({**table, **about, "environment": {"cpu": "Snapdragon 8", "machine": "aarch64"}})
    (folder / "latency").mkdir()
    foreign.to_json(folder / "latency" / "table.json")
    with pytest.raises(EdgeDiTError, match=r"device Snapdragon 8 \(aarch64\) \(table\).*select: --accept-other"):
        select(folder, max_latency_ms=7.0)
    assert not (folder / "student").exists()
    select(folder, max_latency_ms=7.0, accept_other=True)
    asked = {"config": {"latency": {"accept_other": True}}, "inputs": {}}
    (folder / "latency" / "run.json").write_text(json.dumps(asked))
    assert select(folder, max_latency_ms=7.0)["code"] == [15, 15]


def test_quality_is_a_function_of_the_genotype(run):
    _, pipeline, bank = run

    class Pixels:
        def features(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, ::8]

    real = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    quality = StudentQuality(bank, pipeline, Pixels(), real, samples=20, steps=2, guidance_scale=1.5, seed=0)
    original, reduced = bank.space.from_code([0, 0]), bank.space.from_code([15, 15])
    assert quality(original) == quality(original) != quality(reduced)
    assert quality(original) > 0
