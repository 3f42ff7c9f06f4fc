"""The estimates of a dry run: they know the sizes of what a run writes, and scale as its work does."""

import dataclasses
import json
import re

import pytest
import torch
from diffusers import AutoencoderKL

from edgedit_hf import EdgeDiTTransformer2DModel
from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.distill.teacher import new_pipeline
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.estimate import estimate, print_estimate, print_text_to_image_estimate
from edgedit_hf.menu_space import MenuSpace
from edgedit_hf.run.config import RunConfig, load_config
from edgedit_hf.run.cost import Machine
from edgedit_hf.run.stage import EDGEDIT
from edgedit_hf.search_space import SearchSpace, layer_cost, model_cost

STAGES = [stage.name for stage in EDGEDIT if not stage.only]
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


def test_a_menu_costs_what_its_own_choices_do(configured, repository):
    menu = load_config(repository / "training" / "recipes" / "debug-menu.yaml").bank.menu
    space = MenuSpace(4, 32, 2, menu=menu)
    weights = [layer_cost(32, layer.shape, 16).weights for layer in space.proxies()]
    rows, paper = counted(configured(f"bank.menu={menu}")), counted(configured())
    assert rows["bank"].disk == 4 * sum(weights)
    timed = {layer.shape.timed for layer in space.replacements()}
    more = (rows["latency"].seconds - 10) / (paper["latency"].seconds - 10)
    assert 1 < more < len(timed) / 4  # a network more for every shape; those that judge the table stay as many
    fewer = counted(configured(f"bank.menu={menu[:4]}"))
    assert fewer["bank"].seconds < rows["bank"].seconds and fewer["bank"].disk < rows["bank"].disk


def test_few_steps_cost_what_the_named_student_does(configured, tmp_path):
    space = SearchSpace(4, 32, 2)
    (tmp_path / "student.json").write_text(space.from_code((17, 4)).to_json())
    given = f"student.genotype={tmp_path / 'student.json'}"
    rows = counted(configured("few_step.enabled=true", given))
    assert list(rows) == [stage.name for stage in EDGEDIT if stage.only != "quantize.enabled"]
    assert rows["few-step"].disk == pytest.approx(rows["student"].disk, rel=0.05)
    fewer = counted(configured("few_step.enabled=true", given, "few_step.steps=10"))
    assert 0 < fewer["few-step"].seconds < rows["few-step"].seconds
    with_pipeline = configured("few_step.enabled=true", given, f"few_step.path={tmp_path / 'wide'}")
    wide = EdgeDiTTransformer2DModel(sample_size=8, patch_size=2, in_channels=1, hidden_size=64, num_layers=6)
    wide.save_pretrained(tmp_path / "wide" / "transformer")
    other = counted(with_pipeline)["few-step"]
    assert other.disk == 4 * sum(p.numel() for p in wide.parameters()) > 2 * rows["few-step"].disk
    assert other.memory > rows["few-step"].memory and other.seconds > rows["few-step"].seconds
    plain = counted(configured(given))
    assert "few-step" not in plain and plain["evaluate"].seconds < rows["evaluate"].seconds


def test_a_quantised_student_costs_what_its_bits_and_its_steps_say(configured):
    asked = ("few_step.enabled=true", "quantize.enabled=true")
    rows = counted(configured(*asked))
    assert list(rows) == [stage.name for stage in EDGEDIT]
    for name in ("quantize", "self-distil"):
        assert rows[name].disk == pytest.approx(4.3 / 32 * rows["student"].disk)
    fewer = counted(configured(*asked, "quantize.steps=100"))
    assert fewer["self-distil"].seconds == pytest.approx(rows["self-distil"].seconds / 10)
    # The same images take 20 guided steps of the tuned student in the place of four of the few-step one.
    many = counted(
        configured("quantize.enabled=true", "sampling={steps: 20, guidance_scale: 1.5}", "quantize.timesteps=4")
    )
    few = counted(configured(*asked, "quantize.timesteps=4"))
    images = 5 * 64 + 1024
    tried = few["quantize"].seconds - 4 * images * (per := few["self-distil"].seconds / (4 * 1000 * 64))
    assert many["quantize"].seconds == pytest.approx(40 * images * per + 2 * tried)
    assert rows["evaluate"].seconds > counted(configured("few_step.enabled=true"))["evaluate"].seconds


@pytest.mark.slow
def test_text_to_image_has_a_table_of_few_steps_where_it_is_asked_for(tmp_path, repository, capsys):
    recipe, output = repository / "training" / "recipes" / "debug-t2i.yaml", f"output_dir={tmp_path / 'run'}"
    for asked, stages in ((False, ["elastic"]), (True, ["elastic", "few-step"])):
        print_text_to_image_estimate(load_config(recipe, [output, "threads=1", f"few_step.enabled={asked}"]))
        printed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
        assert [name for name in printed if name in ("elastic", "few-step")] == stages
    assert not (tmp_path / "run").exists()


# One FLOP a nanosecond, updates for nothing: times are FLOPs.
COUNTING = Machine("counting", 1, 1e9, 1e9, 1e9, 1e30)
UNBOUNDED = "student={max_parameters_ratio: null, max_flops_ratio: null}"


def counted(config: RunConfig, processes: int = 1) -> dict:
    return {row.stage: row for row in estimate(config, dataclasses.replace(COUNTING, processes=processes))}


def test_times_scale_with_the_work(configured):
    def ratio(*overrides: str, of: str, to: str) -> float:
        rows = counted(configured("tune.teacher_more_steps=false", "tune.output_kd=0", UNBOUNDED, *overrides))
        return rows[of].seconds / rows[to].seconds

    assert ratio("teacher.steps=600", "tune.steps=300", of="teacher", to="tune") == pytest.approx(2)
    assert ratio(
        "teacher.batch_size=64", "tune.batch_size=256", "teacher.steps=500", of="teacher", to="tune"
    ) == pytest.approx(1 / 4)
    assert ratio(
        "tune.teacher_more_steps=true", "tune.steps=500", "teacher.steps=500", of="tune", to="teacher"
    ) == pytest.approx(2)
    assert ratio("tune.output_kd=1", "tune.steps=600", "teacher.steps=800", of="tune", to="teacher") == pytest.approx(1)
    assert ratio("teacher.gradient_checkpointing=true", "teacher.steps=500", of="teacher", to="tune") == pytest.approx(
        4 / 3
    )
    assert ratio("student.max_flops_ratio=0.5", "teacher.steps=500", of="tune", to="teacher") == pytest.approx(
        1 / 2, rel=1e-4
    )
    for bound in ("max_bytes_mb", "max_memory_mb"):  # no student is larger than what its weights may take
        assert counted(configured(f"student.{bound}=0.02"))["student"].disk < counted(configured())["student"].disk
    # A bank's step costs a teacher forward and three forwards of every proxy.
    bank = (
        "bank.steps=1000",
        "bank.both_steps=0",
        "bank.init=copy",
        "bank.calibration_samples=1",
        "teacher.steps=1000",
    )
    large = ratio(*bank, "bank.batch_size=128", of="bank", to="teacher")
    assert (
        large == pytest.approx(2 * ratio(*bank, "bank.batch_size=64", of="bank", to="teacher"), rel=0.01)
        and 1 < large < 20
    )


def test_a_training_step_costs_three_forwards_of_its_batch(configured, make_transformer):
    rows = counted(configured("teacher.steps=10", "teacher.batch_size=32"))
    assert rows["teacher"].seconds == pytest.approx(10 * 32 * 3 * model_cost(make_transformer().config).flops / 1e9)


def test_processes_share_training_and_nothing_else(configured):
    config = configured("bank.init=copy", "bank.calibration_samples=1")
    one, two = counted(config), counted(config, processes=2)
    assert (two["teacher"].processes, two["bank"].processes, two["tune"].processes) == (2, 2, 2)
    for stage in ("teacher", "tune"):
        assert two[stage].seconds == pytest.approx(one[stage].seconds / 2)
    # The second rank runs the whole prefix, the first its half.
    assert (
        one["bank"].seconds / 2 < two["bank"].seconds < 0.6 * one["bank"].seconds
        and two["bank"].memory < one["bank"].memory
    )
    for stage in ("latency", "search", "student", "export", "evaluate"):
        assert two[stage].seconds == one[stage].seconds and two[stage].processes == 1


def test_gpus_are_much_faster_and_leave_the_exports_to_the_cpu(configured):
    config = configured(UNBOUNDED)
    here, there = counted(config), {row.stage: row for row in estimate(config, COUNTING, on_gpus=2)}
    assert there["teacher"].seconds < here["teacher"].seconds / 1e4 and there["teacher"].processes == 2
    assert there["export"] == here["export"] and there["latency"] == here["latency"]


def test_what_training_keeps_is_what_autograd_saves(configured, make_transformer):
    model = make_transformer(hidden_size=64, num_layers=3, num_attention_heads=2).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(torch.randn(256, 1, 8, 8), torch.full((256,), 5.0), torch.zeros(256, dtype=torch.long)).sample
    assert output.requires_grad
    kept = sum(storage.nbytes() for storage in saved.values())
    rows = {
        batch: counted(
            configured("teacher={hidden_size: 64, num_layers: 3, num_heads: 2}", f"teacher.batch_size={batch}")
        )["teacher"].memory
        for batch in (256, 512)
    }
    assert rows[512] - rows[256] == pytest.approx(kept, rel=0.1)


def test_micro_batches_and_checkpointing_save_memory(configured):
    def held(*overrides: str, processes: int = 1) -> float:
        return counted(configured("teacher.batch_size=16384", *overrides), processes)["teacher"].memory

    whole = held()
    pieces = held("teacher.gradient_accumulation=4")
    assert pieces == pytest.approx(held(processes=4), rel=0.01) and pieces < 0.5 * whole
    assert held("teacher.gradient_checkpointing=true") < 0.6 * whole


def test_the_bank_keeps_to_its_budget_in_groups(configured):
    wide = (
        "teacher={hidden_size: 1024, num_layers: 24, num_heads: 16}",
        "bank={calibration_samples: 1, batch_size: 4}",
    )
    whole = counted(configured(*wide))["bank"]
    budget = 0.5 * whole.memory / 1e9
    grouped = counted(configured(*wide, f"bank.memory_budget_gb={budget}"))["bank"]
    assert (
        grouped.memory <= 1e9 * budget and grouped.seconds > whole.seconds
    )  # a further group runs the teacher's prefix again
    states = counted(configured(*wide, "bank.optimizer=adamw8bit"))["bank"]
    assert states.memory < whole.memory and states.disk == whole.disk


def test_a_teacher_that_is_brought_along_costs_nothing(configured, make_transformer, tmp_path):
    new_pipeline(make_transformer(num_layers=6), None, [str(i) for i in range(10)], RunConfig()).save_pretrained(
        tmp_path / "given"
    )
    rows = counted(configured(f"teacher.path={tmp_path / 'given'}", "teacher.num_layers=2"))
    assert rows["teacher"].seconds == 0 and rows["bank"].seconds > 0
    assert rows["bank"].disk == counted(configured("teacher.num_layers=6"))["bank"].disk


def test_a_given_genotype_needs_no_search(configured, make_transformer, tmp_path):
    space = SearchSpace.for_config(make_transformer().config)
    (tmp_path / "genotype.json").write_text(space.from_code((19, 19)).to_json())
    rows = counted(configured(f"student.genotype={tmp_path / 'genotype.json'}"))
    assert rows["latency"].seconds == rows["search"].seconds == 0
    layers = space.from_code((19, 19)).to_layers()
    assert rows["student"].disk == 4 * model_cost({**make_transformer().config, "layers": layers}).weights


def test_latents_are_counted_with_the_vae_that_makes_them(configured, tmp_path):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    small = AutoencoderKL(
        in_channels=1, out_channels=1, **blocks, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4
    )
    small.save_pretrained(tmp_path / "vae")
    row = counted(configured(f"data.vae={tmp_path / 'vae'}", "data.resolution=16", "teacher.steps=1"))["teacher"]
    convolution = 2 * 16 * 16 * 8 * 9  # the first of the encoder, one channel to eight, 3 × 3
    assert row.before > 1438 * convolution / 1e9 and row.seconds > row.before
    assert counted(configured())["teacher"].before == 0
    AutoencoderKL(
        in_channels=3, **blocks, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4
    ).save_pretrained(tmp_path / "colour")
    with pytest.raises(EdgeDiTError, match="have 1 channels, but the VAE takes 3"):
        counted(configured(f"data.vae={tmp_path / 'colour'}", "data.resolution=16"))
    assert (
        counted(configured("data.vae=not-here", "data.resolution=16"))["teacher"].before > row.before
    )  # taken to be as large as Stable Diffusion's


PAPER = """
import sys
from pathlib import Path
from edgedit_hf.estimate import print_estimate
from edgedit_hf.run.config import load_config
print_estimate(load_config(sys.argv[1], ["output_dir=" + sys.argv[2]]))
status = Path("/proc/self/status").read_text()  # not getrusage: its peak includes the parent's, from before the exec
print("peak", next(int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_the_paper_recipe_is_estimated_without_anything_of_its_own(repository, run_python, tmp_path):
    recipe = repository / "training" / "recipes" / "imagenet256-edgedit1.yaml"
    lines = run_python(PAPER, recipe, tmp_path / "run").splitlines()
    assert "1 × A100:" in lines[0] and "8 × A100:" in lines[0]
    assert [line.split()[0] for line in lines[1:10]] == [*STAGES, "all"]
    devices = {line.split()[0]: re.findall(r"\b(?:cpu|[18] GPUs?)(?= )", line) for line in lines[1:9]}
    assert devices["tune"] == devices["bank"] == ["1 GPU", "8 GPUs"] and devices["search"] == devices["evaluate"] == [
        "1 GPU",
        "1 GPU",
    ]
    assert devices["latency"] == devices["export"] == ["cpu", "cpu"]
    assert all(float(held) < 80 for held in re.findall(r"([\d.]+) GB", lines[9])[2:])  # both GPU columns fit
    said = [line for line in lines if line.startswith("Assumed: ")]
    assert [next(word for word in ("data.source", "VAE", "teacher.path") if word in line) for line in said] == [
        "data.source",
        "VAE",
        "teacher.path",
    ]
    assert int(lines[-1].split()[1]) < 1800  # MB; the teacher alone would be 2,700
    assert not (tmp_path / "run").exists()


MEASURED = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("peak", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_real_run_needs_what_was_estimated(configured, repository, run_python, tmp_path):
    overrides = (
        "teacher={hidden_size: 256, num_layers: 8, num_heads: 4, steps: 12, batch_size: 64}",
        "bank={steps: 6, both_steps: 3, batch_size: 32, calibration_samples: 64}",
        f"output_dir={tmp_path / 'run'}",
    )
    rows = by_stage(configured(*overrides))
    arguments = [part for override in ("threads=1", *overrides) for part in ("--override", override)]
    for script, stage in (("train_teacher", "teacher"), ("distill_proxies", "bank")):
        printed = run_python(
            MEASURED, repository / "training" / f"{script}.py", "--config", tmp_path / "recipe.yaml", *arguments
        )
        record = json.loads((tmp_path / "run" / stage / "stage.json").read_text())
        peak = (
            int(printed.split()[-1])
            if stage == "teacher"
            else 1e9 * max(group["peak_gb"] for group in record["ranks"][0])
        )
        assert peak / 1.5 < rows[stage].memory < 1.5 * peak, stage
        assert record["seconds"] / 2.5 < rows[stage].seconds < 2.5 * record["seconds"], (
            stage
        )  # 1.5 where nothing else runs


def test_what_cannot_run_is_said_before_anything_runs(configured):
    with pytest.raises(EdgeDiTError, match=r"\(1, 8, 8\).*patch_size 3"):
        estimate(configured("teacher.patch_size=3"))
    with pytest.raises(EdgeDiTError, match="The folder '/no/such/folder' does not exist"):
        estimate(configured("data.source=/no/such/folder", "data.resolution=8"))


def test_the_table_has_a_line_a_stage_and_their_sum(configured, capsys):
    print_estimate(configured())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "stage here: time memory disk 1 × A100: time memory 8 × A100: time memory".split()
    assert [line.split()[0] for line in lines[1:10]] == [*STAGES, "all"]
    assert "with 1 threads; nothing was written" in lines[10] and len(lines) == 11
