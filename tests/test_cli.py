"""The `edgedit` command line: what it prints, its exit codes, and that its help needs no torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from edgedit_hf.commands.cli import main

PUBLISHED = {  # the DiT and EdgeDiT papers: parameters in millions, GFLOPs, layers
    "DiT-XL/2": ("675.13", "237.34", 28),
    "EdgeDiT-1": ("470.65", "143.96", 25),
    "EdgeDiT-6": ("529.64", "169.97", 25),
}

HELP = """
import resource, sys
before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
from edgedit_hf.commands.cli import main
for command in ("", "info", "recipes copy", "init", "select", "convert", "train"):
    arguments = [*command.split(), "--help"]
    try:
        main(arguments)
    except SystemExit as done:
        assert done.code == 0
spent = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
heavy = {"torch", "numpy", "diffusers", "transformers"} & set(sys.modules)
assert not heavy, heavy
assert spent < 0.5, f"help took {spent:.2f} s of CPU"
"""


def test_help_is_quick_and_imports_no_torch(run_python):
    printed = run_python(HELP)
    for command in ("info", "convert", "init", "recipes", "train", "select", "report"):
        assert command in printed


def test_the_console_script_is_installed():
    script = Path(sys.executable).with_name("edgedit")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("edgedit_hf ")


@pytest.mark.parametrize("name", PUBLISHED)
def test_info_prints_the_published_figures(name, capsys):
    parameters, gflops, layers = PUBLISHED[name]
    assert main(["info", name]) == 0
    printed = capsys.readouterr().out
    assert f"{parameters} M" in printed and f"{gflops} GFLOPs" in printed
    assert main(["info", name, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (f"{facts['parameters'] / 1e6:.2f}", f"{facts['flops'] / 1e9:.2f}", facts["layers"]) == (
        parameters,
        gflops,
        layers,
    )
    assert facts["bytes"]["fp32"] == 4 * facts["weights"] == 8 * facts["bytes"]["int4"]


def test_info_counts_what_a_saved_model_holds(make_transformer, tmp_path, capsys, make_hub_cache, monkeypatch):
    from diffusers import DDIMScheduler

    from edgedit_hf import EdgeDiTPipeline

    model = make_transformer()
    EdgeDiTPipeline(model, DDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    cache = make_hub_cache(tmp_path / "pipeline", "acme/edge", listing=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    weights = sum(parameter.numel() for parameter in model.parameters())
    found = {}
    for name in (tmp_path / "pipeline", tmp_path / "pipeline" / "transformer", "DiT-debug/2", "acme/edge"):
        assert main(["info", str(name), "--json"]) == 0
        found[name] = json.loads(capsys.readouterr().out)
        assert found[name]["weights"] == weights
        assert found[name]["parameters"] == weights + model.pos_embed.numel()
        assert found[name].pop("name") == str(name)
    assert len({json.dumps(facts) for facts in found.values()}) == 1


def test_info_of_an_elastic_net_has_a_line_a_subnet(tmp_path, capsys):
    from edgedit_hf import ElasticDiTTransformer2DModel

    assert main(["info", "elastic-dit-1.6b"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for name, size in (("tiny", "0.3 B"), ("small", "0.4 B"), ("full", "1.6 B")):
        assert f" {size} = " in lines[name] and "GFLOPs" in lines[name]
    net = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug")
    net.save_pretrained(tmp_path / "net")
    net.extract_subnet("small").save_pretrained(tmp_path / "small")
    facts = {}
    for name in ("elastic-dit-debug", tmp_path / "net", tmp_path / "small"):
        assert main(["info", str(name), "--json"]) == 0
        facts[name] = json.loads(capsys.readouterr().out)
        assert facts[name].pop("name") == str(name)
    assert facts["elastic-dit-debug"] == facts[tmp_path / "net"] and facts[tmp_path / "small"].pop("subnets") == {}
    small = facts[tmp_path / "net"]["subnets"].pop("small")
    assert small.pop("width") == 0.5 and small == {key: facts[tmp_path / "small"][key] for key in small}
    assert facts[tmp_path / "net"]["parameters"] == sum(parameter.numel() for parameter in net.parameters())


def test_init_prints_a_recipe_with_every_key_commented(tmp_path, capsys):
    from edgedit_hf.run.config import load_config

    assert main(["init", "--teacher", "runs/teacher", "--data", "my: images", "--output", "runs/mine"]) == 0
    printed = capsys.readouterr().out
    assert all("#" in line for line in printed.splitlines() if line.strip())
    values = yaml.safe_load(printed)
    assert values["teacher"]["path"] == "runs/teacher" and values["data"]["source"] == "my: images"
    (tmp_path / "run.yaml").write_text(printed)
    assert load_config(tmp_path / "run.yaml").output_dir == "runs/mine"


def test_recipes_copy(repository, tmp_path, capsys):
    folder = tmp_path / "training"
    assert main(["recipes", "copy", str(folder)]) == 0
    assert "accelerate launch" in capsys.readouterr().out
    expected = {
        path.relative_to(repository / "training")
        for path in (repository / "training").rglob("*")
        if path.suffix in (".py", ".yaml") and path.name != "__init__.py"
    }
    assert {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} == expected
    changed = folder / "train_teacher.py"
    original = changed.read_text()
    assert main(["recipes", "copy", str(folder)]) == 0  # equal files are no conflict
    changed.write_text("print('mine')\n")
    assert main(["recipes", "copy", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "train_teacher.py" in said and "--force" in said and changed.read_text() == "print('mine')\n"
    assert main(["recipes", "copy", str(folder), "--force"]) == 0 and changed.read_text() == original


def _no_model(folder: Path) -> list[str]:
    return ["info", str(folder)]


def _foreign_model(folder: Path) -> list[str]:
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    return ["info", str(folder)]


def _damaged_config(folder: Path) -> list[str]:
    (folder / "config.json").write_text('{"_class_name": "EdgeDiT')
    return ["info", str(folder)]


def _incomplete_config(folder: Path) -> list[str]:
    (folder / "config.json").write_text('{"_class_name": "EdgeDiTTransformer2DModel", "num_layers": 2}')
    return ["info", str(folder)]


def _incomplete_elastic_config(folder: Path) -> list[str]:
    (folder / "config.json").write_text('{"_class_name": "ElasticDiTTransformer2DModel", "num_layers": [1, 1, 1]}')
    return ["info", str(folder)]


def _copy_onto_a_file(folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return ["recipes", "copy", str(folder / "file")]


@pytest.mark.parametrize(
    "arrange, said",
    [
        (lambda folder: ["info", "DiT-XXL/2"], ["DiT-XXL/2", "DiT-XL/2"]),
        (lambda folder: ["info", "nobody/nothing"], ["nobody/nothing", "EdgeDiT-1"]),
        (_no_model, ["config.json"]),
        (_foreign_model, ["UNet2DModel", "EdgeDiTTransformer2DModel"]),
        (_damaged_config, ["config.json", "not JSON"]),
        (_incomplete_config, ["not an EdgeDiT's"]),
        (_incomplete_elastic_config, ["not an elastic net's", "subnets"]),
        (_copy_onto_a_file, ["file", "folder"]),
        (lambda folder: ["select", str(folder), "--max-latency-ms", "80"], [str]),
        (lambda folder: ["report", str(folder)], [str]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arrange, said, tmp_path, capsys):
    assert main(arrange(tmp_path)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()[-1:]
    assert line.startswith("edgedit: ")
    for words in said:
        assert (str(tmp_path) if words is str else words) in line


@pytest.mark.parametrize("number, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_interrupted(monkeypatch, capsys, number, code):
    import signal

    from edgedit_hf.commands import init

    monkeypatch.setattr(init, "run", lambda args: signal.raise_signal(getattr(signal, number)))
    for before in (signal.default_int_handler, signal.SIG_IGN):  # ignored: a job in a script's background
        previous = signal.signal(signal.SIGINT, before)
        try:
            assert main(["init"]) == code and signal.getsignal(signal.SIGINT) is before
        finally:
            signal.signal(signal.SIGINT, previous)
        assert capsys.readouterr().err == "edgedit: interrupted.\n"


# -------------------------------------------------------------------- convert


def test_convert_writes_a_pipeline_that_samples(tmp_path, capsys):
    import torch
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file

    oracle = load_file(Path(__file__).parent / "models" / "oracles" / "sit.safetensors")
    weights = {key.removeprefix("weights."): value for key, value in oracle.items() if key.startswith("weights.")}
    source, output = tmp_path / "SiT-tiny.pt", tmp_path / "pipeline"
    torch.save(weights, source)
    arguments = ["convert", str(source), str(output), "--heads", "4"]
    assert main(arguments) == 0
    assert "2 layers of width 48" in capsys.readouterr().out
    pipeline = DiffusionPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert pipeline([1], num_inference_steps=2, output_type="latent").images.isfinite().all()
    assert main(arguments) == 2 and "holds a pipeline already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--image-size", "256"]) == 2
    assert "sample size 8 (64² images" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--image-size", "128", "--allow-resize"]) == 0
    assert "sample size 16" in capsys.readouterr().out
    assert main(["info", str(source)]) == 2 and "edgedit convert" in capsys.readouterr().err
