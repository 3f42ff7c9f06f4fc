"""The estimates of a dry run: they know the sizes of what a run writes, and scale as its work does."""

import pytest
import torch

from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.estimate import estimate, print_estimate
from edgedit_hf.launch import new_pipeline
from edgedit_hf.recipes import RunConfig, load_config
from edgedit_hf.search_space import SearchSpace

STAGES = ["teacher", "bank", "latency", "search", "student", "tune", "export", "evaluate"]
SMALL = "teacher={hidden_size: 32, num_layers: 4, num_heads: 2}"


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def configured(tmp_path):
    def make(*overrides: str) -> RunConfig:
        (tmp_path / "recipe.yaml").touch()
        return load_config(tmp_path / "recipe.yaml", [f"output_dir={tmp_path / 'run'}", "threads=1", SMALL, *overrides])

    return make


def by_stage(config: RunConfig) -> dict:
    rows = estimate(config)
    assert [row.stage for row in rows] == STAGES
    return {row.stage: row for row in rows}


def test_every_stage_has_a_time_a_memory_and_a_size(configured, tmp_path):
    for row in by_stage(configured()).values():
        assert 0 < row.seconds < 3600 and 5e8 < row.memory < 4e9 and 0 < row.disk < 1e9
    assert not (tmp_path / "run").exists()


def test_sizes_are_those_of_the_files(configured, make_transformer, tmp_path):
    rows = by_stage(configured())
    teacher = make_transformer()
    teacher.save_pretrained(tmp_path / "teacher")
    written = (tmp_path / "teacher" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert rows["teacher"].disk == pytest.approx(written, rel=0.1)  # safetensors adds a header
    space = SearchSpace.for_config(teacher.config)
    bank = ProxyBank.create(tmp_path / "bank", teacher, space)
    for layer in space.proxies():
        bank.write_proxy(layer, bank.new_block(layer), {})
    written = sum(path.stat().st_size for path in (tmp_path / "bank").glob("*.safetensors"))
    assert rows["bank"].disk == pytest.approx(written, rel=0.1)


def test_times_scale_with_the_work(configured):
    # Within one estimate, so that both rates are the same measurement.
    def ratio(*overrides: str, of: str, to: str) -> float:
        rows = by_stage(configured("tune.teacher_more_steps=false", "tune.output_kd=0", "latency.repeats=3", *overrides))
        return rows[of].seconds / rows[to].seconds

    assert ratio("teacher.steps=600", "tune.steps=300", of="teacher", to="tune") == pytest.approx(2)
    assert ratio("teacher.batch_size=64", "tune.batch_size=256", "teacher.steps=500", of="teacher", to="tune") == pytest.approx(1 / 4)
    assert ratio("tune.teacher_more_steps=true", "tune.steps=500", "teacher.steps=500", of="tune", to="teacher") == pytest.approx(2)
    assert ratio("tune.output_kd=1", "tune.steps=600", "teacher.steps=800", of="tune", to="teacher") == pytest.approx(1)
    # A bank's step costs a teacher forward and three forwards of every proxy.
    bank = ("bank.steps=100", "bank.both_steps=0", "teacher.steps=100")
    large = ratio(*bank, "bank.batch_size=128", of="bank", to="teacher")
    assert large == pytest.approx(2 * ratio(*bank, "bank.batch_size=64", of="bank", to="teacher")) and 1 < large < 20


def test_a_teacher_that_is_brought_along_costs_nothing(configured, make_transformer, tmp_path):
    new_pipeline(make_transformer(), None, [str(i) for i in range(10)], RunConfig()).save_pretrained(tmp_path / "given")
    rows = by_stage(configured(f"teacher.path={tmp_path / 'given'}"))
    assert rows["teacher"].seconds == 0 and rows["bank"].seconds > 0


def test_what_cannot_run_is_said_before_anything_runs(configured):
    with pytest.raises(EdgeDiTError, match=r"\(1, 8, 8\).*patch_size 3"):
        estimate(configured("teacher.patch_size=3"))
    with pytest.raises(EdgeDiTError, match="There is no pipeline|cannot be loaded"):
        estimate(configured("teacher.path=/no/such/folder"))


def test_the_table_has_a_line_a_stage_and_their_sum(configured, capsys):
    print_estimate(configured())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["stage", "time", "memory", "disk"]
    assert [line.split()[0] for line in lines[1:10]] == [*STAGES, "all"]
    assert "with 1 threads; nothing was written" in lines[10] and len(lines) == 11
