"""Every command and Python block of the README, of CONTRIBUTING and of docs/ runs, at debug scale.

A new command without a way to run it here fails. Most run in this process, which spares the imports; the shared runs
are made as a user types it.
"""

import contextlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from phone_servers import free_port
from phones import measure
from PIL import Image
from recipe_runs import BIN, DEBUG_COMMANDS
from safetensors.torch import load_file, save_file

from edgedit_hf.phone.bundle import Bundle
from edgedit_hf.phone.results import append_rows
from edgedit_hf.run.config import load_config
from edgedit_hf.run.stage import EDGEDIT

RUN_BLOCKS = """
import sys
for path in sys.argv[1:]:
    print(path, flush=True)
    exec(compile(open(path, encoding="utf-8").read(), path, "exec"), {"__name__": "__main__"})
"""


def pages(recipes) -> list[Path]:
    return [recipes.root / "README.md", recipes.root / "CONTRIBUTING.md", *sorted(recipes.root.glob("docs/**/*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands(recipes) -> list[str]:
    """Every command of every page, once."""
    lines = [line for page in pages(recipes) for block in blocks(page, "bash") for line in block.splitlines()]
    return list(dict.fromkeys(command for line in lines if (command := line.split("#")[0].strip())))


@pytest.fixture(scope="module")
def clone(recipes, debug_run, debug_t2i_run, tmp_path_factory):
    """A folder that looks like the clone (the pages' paths are relative to it) with finished debug runs as `runs/demo`
    and `runs/demo-t2i`: the session's, which the commands of the pages made.
    """
    folder = tmp_path_factory.mktemp("clone")
    (folder / "training").symlink_to(recipes.root / "training")
    shutil.copytree(debug_run, folder / "runs" / "demo")
    shutil.copytree(debug_t2i_run, folder / "runs" / "demo-t2i")
    return folder


def test_the_shared_runs_are_those_of_the_pages(recipes):
    assert find(recipes, "train compress --config training/recipes/debug.yaml") == DEBUG_COMMANDS["debug"]
    command = find(recipes, "edgedit train text-to-image --config training/recipes/debug-t2i.yaml")
    assert command == DEBUG_COMMANDS["debug-t2i"]


def find(recipes, part: str) -> str:
    found = [command for command in commands(recipes) if part == command] or [
        command for command in commands(recipes) if part in command
    ]
    assert len(found) == 1, f"README and docs/ have {len(found)} commands with {part!r}"
    return found[0]


def test_every_command_has_a_test_here(recipes):
    source = Path(__file__).read_text(encoding="utf-8")
    handled = re.findall(r'find\(recipes, "(.*?)"\)', source)
    # What is started with --dry-run is also run (test_pip_users_run), and stands on the pages without it.
    left = [command for command in commands(recipes) if not any(part in f"{command} --dry-run" for part in handled)]
    assert left == [], "commands that no test runs"


def test_make_targets(recipes):
    for target in (
        find(recipes, "make demo"),
        find(recipes, "make demo-t2i"),
        find(recipes, "make demo-few-step"),
        find(recipes, "make demo-t2i-few-step"),
        find(recipes, "make check"),
        find(recipes, "make results"),
        find(recipes, "make test"),
        find(recipes, "make test-slow PART=kills"),
    ):
        assert recipes.shell([*shlex.split(target), "-n"], recipes.root)
    demo = recipes.shell(["make", "-n", "demo"], recipes.root)
    assert "edgedit train compress" in demo and "training/recipes/digits.yaml" in demo and "HF_HUB_OFFLINE=1" in demo
    demo = recipes.shell(["make", "-n", "demo-t2i"], recipes.root)
    assert (
        "edgedit train text-to-image" in demo
        and "training/recipes/digits-t2i.yaml" in demo
        and "HF_HUB_OFFLINE=1" in demo
    )
    demo = recipes.shell(["make", "-n", "demo-few-step"], recipes.root)
    assert "edgedit train compress" in demo and "training/recipes/digits-few-step.yaml" in demo
    demo = recipes.shell(["make", "-n", "demo-t2i-few-step"], recipes.root)
    assert "edgedit train text-to-image" in demo and "training/recipes/digits-t2i-few-step.yaml" in demo


def test_dry_run_prints_a_line_a_stage(recipes, clone):
    printed = recipes.here(shlex.split(find(recipes, "digits.yaml --dry-run")), clone)
    assert [
        line.split()[0] for line in printed.splitlines()[1:10]
    ] == "teacher bank latency search student tune export evaluate all".split()
    assert not (clone / "runs" / "demo" / "digits").exists()
    (shown,) = [block for block in blocks(recipes.root / "docs" / "tutorial.md", "text") if "evaluate" in block]
    assert [line.split()[0] for line in shown.splitlines()] == [line.split()[0] for line in printed.splitlines()[:10]]


def test_dry_run_of_text_to_image(recipes, clone):
    printed = recipes.here(shlex.split(find(recipes, "debug-t2i.yaml --dry-run")), clone)
    first = [line.split()[0] for line in printed.splitlines() if line]
    assert first[:3] == [
        "stage",
        "elastic",
        "all",
    ]  # what costs; encoding captions and judging widths are not estimated


def test_the_memory_of_few_steps(recipes, clone):
    command = shlex.split(find(recipes, "edgedit train few-step --config training/recipes/digits.yaml --report-memory"))
    printed = recipes.here(command, clone)
    assert "nets of their own, float32" in printed and "of it is needed" in printed


def test_the_card_and_what_would_be_pushed(recipes, clone):
    card = clone / "runs" / "demo" / "student-tuned" / "README.md"
    recipes.here(shlex.split(find(recipes, "edgedit card")), clone)
    assert "me/edgedit-digits" in card.read_text(encoding="utf-8")
    listed = recipes.here(shlex.split(find(recipes, "edgedit push")), clone)
    assert f"{len(card.read_bytes()):,}  README.md" in listed and "transformer/diffusion_pytorch_model" in listed


def test_the_run_has_what_its_page_says(recipes, clone):
    run = clone / "runs" / "demo"
    row = r"^\| \[([\w-]+)\]\(.*?\) \| `(\w+\.py)` \| (.*) \|$"
    rows = re.findall(row, page_text(recipes, "runs"), flags=re.MULTILINE)
    assert [(name, script) for name, script, _ in rows] == [(stage.name, stage.script) for stage in EDGEDIT]
    for stage, (_, _, written) in zip(EDGEDIT, rows, strict=True):
        for entry in re.findall(r"`([\w./-]+)`", written):
            assert stage.only or (run / entry).exists(), entry
    for entry in ("report.html", "report.json", "exported/onnx-int8/model_index.json", "evaluate/teacher.png"):
        assert (run / entry).exists(), entry


def page_text(recipes, name: str) -> str:
    return (recipes.root / "docs" / f"{name}.md").read_text(encoding="utf-8")


def run_blocks(recipes, clone, tmp_path, chosen: list[Path]) -> list[str]:
    """Run every Python block of these pages, all in one process, which spares the imports; return their names."""
    files = []
    for page in chosen:
        for number, code in enumerate(blocks(page, "python")):
            files.append(tmp_path / f"{page.stem}-{number}.py")
            files[-1].write_text(code, encoding="utf-8")
    recipes.shell([sys.executable, "-c", RUN_BLOCKS, *map(str, files)], clone)
    return [file.stem for file in files]


def test_python_blocks(recipes, clone, tmp_path):
    rest = [page for page in pages(recipes) if page.name != "export.md"]  # which needs an export, below
    ran = run_blocks(recipes, clone, tmp_path, rest)
    assert {"README-0", "bank-0", "elastic-0", "python-0", "python-1", "python-2", "quantize-0", "hub-0"} <= set(ran)
    assert (clone / "runs" / "demo-t2i" / "report.html").is_file()
    assert (clone / "small" / "transformer" / "config.json").is_file()


def test_blocks_of_yaml_are_parts_of_a_recipe(recipes, tmp_path):
    found = [block for page in pages(recipes) for block in blocks(page, "yaml")]
    for number, block in enumerate(found):
        (tmp_path / f"{number}.yaml").write_text(block, encoding="utf-8")
        load_config(tmp_path / f"{number}.yaml", ["teacher.hidden_size=1152", "teacher.num_heads=16"])  # DiT-XL/2's
    assert len(found) >= 4


def test_blocks_of_text_hold_nothing_to_run(recipes):
    for page in pages(recipes):
        for block in blocks(page, "text"):
            first = [line.split()[0] for line in block.splitlines() if line.strip()]
            assert not {"edgedit", "python", "make", "pip", "git", "accelerate", "from", "import"} & {*first}, page


def test_no_block_is_left_out(recipes):
    """A block in another language, or indented, would not be run."""
    for page in pages(recipes):
        fences = re.findall(r"^\s*```(.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert fences[::2] == [name for name in fences[::2] if name in ("bash", "python", "text", "yaml")], page
        assert set(fences[1::2]) <= {""} and len(fences) % 2 == 0, page


def sampled_from(recipes, clone, folder: str) -> str:
    """Load an exported folder in a fresh process, make an image, and return the transformer's class and the image's
    size.
    """
    code = (
        "import edgedit_hf; from diffusers import DiffusionPipeline; p = "
        f"DiffusionPipeline.from_pretrained({folder!r});print(type(p.transformer).__name__, p(class_labels=3, "
        "num_inference_steps=2).images[0].size)"
    )
    return recipes.shell([sys.executable, "-c", code], clone)


def test_export_and_load_back(recipes, clone):
    recipes.shell(shlex.split(find(recipes, "--format onnx")), clone)
    (block,) = blocks(recipes.root / "docs" / "export.md", "python")
    code = f"{block}\nprint(type(pipeline.transformer).__name__, image.size)"
    assert "OnnxEdgeDiTTransformer2DModel (8, 8)" in recipes.shell([sys.executable, "-c", code], clone)


@pytest.mark.slow
@pytest.mark.export
def test_export_to_executorch_and_load_back(recipes, clone):
    recipes.shell(shlex.split(find(recipes, "--format executorch")), clone)
    assert "ExecutorchEdgeDiTTransformer2DModel (8, 8)" in sampled_from(recipes, clone, "exported-pte")


def test_what_an_app_author_ports(recipes, clone):
    """After the export above: the loop in numpy, against its reference."""
    if not (clone / "exported").is_dir():
        recipes.shell(shlex.split(find(recipes, "--format onnx")), clone)
    assert "ok" in recipes.shell(shlex.split(find(recipes, "sample_min.py --check")), clone)
    recipes.shell(shlex.split(find(recipes, "sample_min.py --reference")), clone)
    assert Image.open(clone / "three.png").size == (8, 8)


@pytest.mark.slow
@pytest.mark.export
def test_export_of_text_to_image(recipes, clone):
    recipes.shell(shlex.split(find(recipes, "--subnet small --split-conditioner")), clone)
    code = (
        "import edgedit_hf; from diffusers import DiffusionPipeline; p = "
        "DiffusionPipeline.from_pretrained('exported-t2i');print(type(p.text_encoder_2).__name__, p('a thick seven', "
        "num_inference_steps=2).images[0].size)"
    )
    assert "OnnxTextEncoder (8, 8)" in recipes.shell([sys.executable, "-c", code], clone)


@pytest.mark.slow
@pytest.mark.export
def test_export_of_a_page_and_its_server(recipes, clone, web_runtime):
    recipes.shell(shlex.split(find(recipes, "--format web")), clone)
    *command, port = shlex.split(find(recipes, "python -m http.server"))
    assert port == "8000"
    port = str(free_port())
    with subprocess.Popen([sys.executable, *command[1:], port], cwd=clone, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(100):
                with contextlib.suppress(OSError):
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/contract.json") as answer:
                        break
                time.sleep(0.1)
            assert answer.status == 200
        finally:
            server.terminate()


def test_a_score(recipes, clone):
    printed = recipes.here(shlex.split(find(recipes, "edgedit train score")), clone)
    assert "Fréchet distance (digits-cnn, n=500)" in printed
    assert (clone / "scores" / "student" / "result.json").is_file()


def test_quantise(recipes, clone):
    recipes.here(shlex.split(find(recipes, "train quantize")), clone)
    assert (clone / "runs" / "debug-quantize" / "quantized" / "quantization.json").is_file()


def test_convert_original_checkpoints(recipes, tmp_path):
    """Small ones, whose width is not one of the papers'."""
    for oracle, text in {
        "dit": find(recipes, "edgedit convert DiT-XL-2-256x256.pt teacher"),
        "sit": find(recipes, "edgedit convert SiT-S-2.pt teacher-sit --family sit"),
        "mdtv2": find(recipes, "edgedit convert mdt_v2.safetensors teacher-mdt"),
    }.items():
        stored = load_file(recipes.root / "tests" / "models" / "oracles" / f"{oracle}.safetensors")
        weights = {key.removeprefix("weights."): value for key, value in stored.items() if key.startswith("weights.")}
        command = shlex.split(text)
        save = save_file if command[2].endswith(".safetensors") else torch.save
        save(weights, tmp_path / command[2])
        assert "layers of width 48" in recipes.here([*command, "--heads", "4"], tmp_path)
        assert (tmp_path / command[3] / "model_index.json").is_file()


@pytest.mark.slow
@pytest.mark.ranks
def test_two_process_commands_start(recipes, clone):
    started = (
        find(recipes, "cpu-2.yaml training/train_teacher.py"),
        find(recipes, "train teacher --num_processes 2"),
        find(recipes, "torchrun --standalone"),
    )
    for text in started:
        command = shlex.split(text)
        assert "usage" in recipes.shell([*command[: command.index("--config")], "--help"], clone)


@pytest.fixture(scope="module")
def pip_user(recipes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    rng = np.random.default_rng(0)
    for label in "ab":
        (folder / "my_images" / label).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(
                folder / "my_images" / label / f"{i}.png"
            )
    recipes.shell(shlex.split(find(recipes, "edgedit recipes copy recipes")), folder)
    recipes.shell(shlex.split(find(recipes, "edgedit recipes copy training")), folder)
    assert (folder / "training" / "recipes" / "digits.yaml").is_file()
    recipes.shell(["sh", "-c", find(recipes, "edgedit init")], folder)
    return folder


def test_pip_users_dry_run(recipes, pip_user):
    assert "evaluate" in recipes.here(shlex.split(find(recipes, "compress --config run.yaml --dry-run")), pip_user)


def test_select_another_point(recipes, clone, tmp_path, capsys):
    command = shlex.split(find(recipes, "edgedit select runs/edgedit --max-latency-ms 80"))
    shutil.copytree(clone / "runs" / "demo", tmp_path / "runs" / "edgedit")
    before = (tmp_path / "runs" / "edgedit" / "search" / "state.json").read_bytes()
    recipes.here(command, tmp_path)
    assert (tmp_path / "runs" / "edgedit" / "student" / "choice.json").exists()
    assert (tmp_path / "runs" / "edgedit" / "search" / "state.json").read_bytes() == before
    recipes.here([*command[:-1], "1e-9"], tmp_path, expect=2)
    assert "latency_ms" in capsys.readouterr().err


def test_list_the_best_without_a_search(recipes, clone, tmp_path):
    shutil.copytree(clone / "runs" / "demo", tmp_path / "runs" / "edgedit")
    shutil.rmtree(tmp_path / "runs" / "edgedit" / "search")
    best = recipes.here(shlex.split(find(recipes, "edgedit select runs/edgedit --max-latency-ms 80 --k 10")), tmp_path)
    assert len(best.strip().splitlines()) > 10
    sweep = recipes.here(shlex.split(find(recipes, "edgedit select runs/edgedit --front 16")), tmp_path)
    assert len(sweep.strip().splitlines()) > 3


def test_list_the_choices_of_a_bank(recipes, clone, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "edgedit").symlink_to(clone / "runs" / "demo")
    said = recipes.here(shlex.split(find(recipes, "edgedit bank runs/edgedit")), tmp_path)
    assert "02-03/both" in said and "saved ms" in said


def test_the_tutorial_goes_on_in_the_runs_own_folder(recipes, clone, tmp_path):
    """The same as above of `runs/demo`."""
    shutil.copytree(clone / "runs" / "demo", tmp_path / "runs" / "demo")
    for command, said in {
        find(recipes, "edgedit bank runs/demo"): "02-03/both",
        find(recipes, "edgedit select runs/demo --max-latency-ms 8"): "latency_ms <= 8",
    }.items():
        assert said in recipes.here(shlex.split(command), tmp_path)
    assert "latency_ms <= 8" in (tmp_path / "runs" / "demo" / "student" / "choice.json").read_text()


@pytest.mark.slow
def test_record_what_was_measured(recipes, clone):
    """In a checkout of its own, whose pages then have the new tables."""
    for folder in ("benchmarks", "docs"):
        shutil.copytree(recipes.root / folder, clone / folder)
    shutil.copy(recipes.root / "README.md", clone)
    for name in ("demo", "programme"):
        (clone / "benchmarks" / "results" / f"{name}.json").unlink(missing_ok=True)
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.com"]
    recipes.shell(["git", "init", "--quiet"], clone)
    recipes.shell([*git, "add", "README.md"], clone)
    recipes.shell([*git, "commit", "--quiet", "-m", "One"], clone)
    recipes.shell(shlex.split(find(recipes, "python benchmarks/record.py programme")), clone)
    recipes.shell(shlex.split(find(recipes, "python benchmarks/record.py demo --of")), clone)
    recipes.shell([sys.executable, "benchmarks/results.py"], clone)
    report = json.loads((clone / "runs" / "demo" / "report.json").read_text())
    for page in ("README.md", "docs/results.md"):
        text = (clone / page).read_text(encoding="utf-8")
        assert f"| {report['models'][0]['parameters'] / 1e6:.2f} M |" in text
        assert all(f"| {model['name']} |" in text for model in report["models"])
    assert "best under two caps" in text and text.count("### ") == len(list((clone / "benchmarks/results").iterdir()))


def test_examples_are_the_examples_tests(recipes):
    """tests/examples/test_examples.py runs them."""
    for command in (
        find(recipes, "python examples/own_data.py"),
        find(recipes, "python examples/lora.py"),
        find(recipes, "python examples/few_steps.py"),
        find(recipes, "python examples/numpy_and_runtime.py"),
        find(recipes, "python examples/own_teacher.py"),
        find(recipes, "python examples/evaluate_other.py"),
    ):
        assert (recipes.root / command.split()[1]).is_file()


def test_a_copy_from_the_hub(recipes, run_with_hub, hub, clone, tmp_path):
    hub.add("org/name", clone / "runs" / "demo" / "student-tuned")
    for command, there in {
        find(recipes, "edgedit pull org/name folder"): "folder/transformer/config.json",
        find(recipes, "edgedit pull hf://org/name/transformer part"): "part/config.json",
    }.items():
        code = "import os, sys; from edgedit_hf.commands.cli import main; os.chdir(sys.argv[1]); main(sys.argv[2:])"
        assert f"of {command.split()[2]} at commit" in run_with_hub(code, tmp_path, *shlex.split(command)[1:])
        assert (tmp_path / there).is_file()


def test_a_command_for_gpus_is_understood(recipes, clone):
    command = shlex.split(find(recipes, "accelerate/gpu.yaml --num_processes 8"))
    (clone / "run.yaml").write_text("output_dir: runs/gpu\n")
    assert "teacher" in recipes.here([*command, "--dry-run"], clone)


def test_beyond_digits_has_tests_of_its_own(recipes):
    """tests/training/test_compress_beyond_digits.py runs the recipes, tests/benchmarks/test_evidence.py the claims,
    tests/examples/test_examples.py the example; nothing is cloned in a test.
    """
    assert (recipes.root / find(recipes, "python examples/fluent_emoji.py").split()[1]).is_file()
    for command in (
        find(recipes, "git clone --depth 1 https://github.com/microsoft/fluentui-emoji"),
        find(recipes, "edgedit train compress --config training/recipes/emoji.yaml"),
    ):
        assert f"\n#   {command}" in (recipes.root / "training" / "recipes" / "emoji.yaml").read_text()
    again = find(recipes, "--override output_dir=runs/emoji-1")
    assert again.startswith("edgedit train compress --config training/recipes/emoji.yaml --override seed=1 ")
    script, first, second, _, recipe, _, asked = shlex.split(find(recipes, "python benchmarks/evidence.py runs/emoji"))[
        1:
    ]
    assert (first, second) == ("runs/emoji", "runs/emoji-1") and (recipes.root / recipe).is_file()
    source = (recipes.root / script).read_text(encoding="utf-8")
    assert all(f"\ndef {name}(run: Run)" in source for name in asked.split(","))
    garments = find(recipes, "edgedit train compress --config training/recipes/fashion.yaml")
    again = find(recipes, "--override output_dir=runs/fashion-1")
    claims = find(recipes, "python benchmarks/evidence.py runs/fashion")
    head = (recipes.root / "training" / "recipes" / "fashion.yaml").read_text()
    for command in (garments, again, claims.removesuffix(" --check")):
        assert f"\n#   {command}" in head


@pytest.mark.slow
@pytest.mark.export
def test_measure_on_a_phone(recipes, clone, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(clone / "runs" / "demo")
    recipes.here(shlex.split(find(recipes, "edgedit phone pack")), tmp_path)
    append_rows(tmp_path / "galaxy" / "results.csv", measure(Bundle.read(tmp_path / "galaxy")))
    assert "on Galaxy S25 Ultra" in recipes.here(shlex.split(find(recipes, "edgedit phone import")), tmp_path)
    assert (tmp_path / "galaxy" / "table.json").is_file()


@pytest.mark.slow
@pytest.mark.export
def test_serve_a_page_that_measures(recipes, clone, web_runtime):
    command = shlex.split(find(recipes, "edgedit phone serve runs/demo --precision int8"))
    command = [str(BIN / command[0]), *command[1:], "--port", str(free_port())]
    options = {"cwd": clone, "env": recipes.environment(), "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **options) as server:
        try:
            address = next(line.split()[1] for line in server.stdout if line.startswith("Open "))
            with urllib.request.urlopen(f"{address}plan.json") as answer:
                assert json.load(answer)["precision"] == "int8"
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(60) == 130


@pytest.mark.slow
def test_pip_users_run(recipes, pip_user):
    overrides = [part for value in recipes.tiny for part in ("--override", value)]
    command = find(recipes, "compress --config run.yaml --dry-run").removesuffix(" --dry-run")
    assert command in commands(recipes)
    recipes.shell([*shlex.split(command), *overrides], pip_user)
    assert (pip_user / "runs" / "edgedit" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.ranks
def test_two_process_commands_run(recipes, clone):
    (clone / "runs" / "debug").mkdir(exist_ok=True)
    recipes.shell([*shlex.split(find(recipes, "cpu-2.yaml training/train_teacher.py"))], clone)
    shutil.rmtree(clone / "runs" / "debug")
    recipes.shell([*shlex.split(find(recipes, "train teacher --num_processes 2"))], clone)
    recipes.shell([*shlex.split(find(recipes, "torchrun --standalone"))], clone)
    assert (clone / "runs" / "debug" / "bank" / "index.json").exists()


def test_what_is_counted(recipes):
    counted = json.loads(recipes.here(shlex.split(find(recipes, "edgedit info")), recipes.root))
    row = re.search(r"^\| DiT-XL/2 \| ([\d.]+) M \| ([\d.]+) \|$", page_text(recipes, "teacher"), flags=re.MULTILINE)
    assert [f"{counted['parameters'] / 1e6:.2f}", f"{counted['flops'] / 1e9:.2f}"] == list(row.groups())


def test_the_report_again(recipes, clone):
    def metrics():
        report = json.loads((clone / "runs" / "demo" / "report.json").read_text())
        return {model["name"]: (model["metrics"], model["latency_ms"]) for model in report["models"]}

    before = metrics()
    (clone / "runs" / "demo" / "report.html").unlink()
    recipes.here(shlex.split(find(recipes, "edgedit report")), clone)
    assert metrics() == before and (clone / "runs" / "demo" / "report.html").is_file()


def test_pip_install_is_the_packaging_tests(recipes):
    # tests/test_packaging.py installs the wheel into a fresh environment; the name is what it must be.
    assert find(recipes, "pip install edgedit_hf").split()[-1] in (recipes.root / "setup.cfg").read_text()
