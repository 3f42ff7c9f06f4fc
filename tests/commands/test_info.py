"""`edgedit info` counts what the networks hold, at once and without torch."""

import json

import pytest
import torch
from kinds import MIXED

from edgedit_hf import EdgeDiTTransformer2DModel, ElasticDiTTransformer2DModel
from edgedit_hf.commands.cli import main
from edgedit_hf.models import transformer_edgedit, transformer_elastic_dit

INFO = """
import io, json, sys, time
from contextlib import redirect_stdout
start = time.perf_counter()
from edgedit_hf.commands.cli import main
printed = {}
for name in sys.argv[1:]:
    with redirect_stdout(io.StringIO()) as out:
        assert main(["info", name, "--json"]) == 0
    printed[name] = json.loads(out.getvalue())
    assert main(["info", name]) == 0
heavy = {"torch", "numpy", "diffusers", "transformers", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
spent = (time.perf_counter() - start) / len(printed)
assert spent < 1.5, f"{spent:.2f} s a model"
print(json.dumps(printed))
"""


@pytest.fixture(scope="module")
def facts(run_python, make_transformer, tmp_path_factory):
    """What is printed of every preset, and of a saved pipeline and its denoiser."""
    from diffusers import DDIMScheduler

    from edgedit_hf import EdgeDiTPipeline

    folder = tmp_path_factory.mktemp("info") / "pipeline"
    EdgeDiTPipeline(make_transformer(), DDIMScheduler()).save_pretrained(folder)
    presets = [*transformer_edgedit.PRESETS, *transformer_elastic_dit.PRESETS]
    found = json.loads(run_python(INFO, *presets, folder, folder / "transformer").splitlines()[-1])
    saved = found.pop(str(folder)), found.pop(str(folder / "transformer"))
    return {**found, "pipeline": saved[0], "denoiser": saved[1]}


@pytest.mark.parametrize("name", transformer_edgedit.PRESETS)
def test_an_edgedit_is_counted_without_torch(facts, name):
    with torch.device("meta"):
        model = EdgeDiTTransformer2DModel.from_preset(name)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert facts[name]["weights"] == weights and facts[name]["parameters"] == weights + model.pos_embed.numel()
    assert facts[name]["layers"] == len(model.blocks)
    assert facts[name]["input"] == [model.config.in_channels, *2 * [model.config.sample_size]]
    assert facts[name]["bytes"]["bf16"] == 2 * weights


@pytest.mark.parametrize("name", transformer_elastic_dit.PRESETS)
def test_an_elastic_net_is_counted_without_torch(facts, name):
    with torch.device("meta"):
        net = ElasticDiTTransformer2DModel.from_preset(name)
        assert facts[name]["parameters"] == sum(parameter.numel() for parameter in net.parameters())
        assert list(facts[name]["subnets"]) == net.subnet_names
        for subnet in net.subnet_names:
            net.set_active_subnet(subnet)
            alone = ElasticDiTTransformer2DModel(**net.active_subnet_config())
            counted = facts[name]["subnets"][subnet]["parameters"]
            assert counted == sum(parameter.numel() for parameter in alone.parameters())
    assert facts[name]["layers"] == list(net.config.num_layers)


def test_a_saved_model_is_counted_without_torch(facts):
    for saved in ("pipeline", "denoiser"):
        same = {key: value for key, value in facts[saved].items() if key != "name"}
        assert same == {key: value for key, value in facts["DiT-debug/2"].items() if key != "name"}


PUBLISHED = {  # the DiT and EdgeDiT papers: parameters in millions, GFLOPs, layers
    "DiT-XL/2": ("675.13", "237.34", 28),
    "EdgeDiT-1": ("470.65", "143.96", 25),
    "EdgeDiT-6": ("529.64", "169.97", 25),
}


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


def test_info_says_what_is_special_about_layers(make_transformer, tmp_path, capsys):
    make_transformer(layers=MIXED).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["modulation_rank"] == [None, 0, 4] and facts["token_merge"] == [1, 1, 2]
    assert main(["info", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "  modulation  static in layers [1], rank 4 in layers [2]\n" in printed
    assert "  tokens      merged 2 × 2 in layers [2]\n" in printed


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


def test_info_says_what_a_few_step_pipeline_was_made_for(
    make_transformer, tmp_path, capsys, make_hub_cache, monkeypatch
):
    from edgedit_hf import EdgeDiTError, EdgeDiTPipeline
    from edgedit_hf.commands.info import describe
    from edgedit_hf.diffusion import make_few_step_scheduler

    few = {"default_steps": 2, "default_guidance_scale": 1.0, "few_step_timesteps": [800, 400]}
    scheduler = make_few_step_scheduler("epsilon")
    EdgeDiTPipeline(make_transformer(), scheduler, **few).save_pretrained(tmp_path / "pipeline")
    cache = make_hub_cache(tmp_path / "pipeline", "acme/few", listing=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for name in (tmp_path / "pipeline", "acme/few"):
        assert main(["info", str(name), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["few_step"] == {"steps": 2, "guidance_scale": 1.0, "timesteps": [800.0, 400.0]}
        assert main(["info", str(name)]) == 0
        assert "  made for    2 steps, no guidance  (at timesteps 800, 400)\n" in capsys.readouterr().out
    assert "few_step" not in describe(str(tmp_path / "pipeline" / "transformer"))
    assert "few_step" not in describe("DiT-debug/2")
    index = tmp_path / "pipeline" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "few_step_timesteps": [800, "x"]}))
    with pytest.raises(EdgeDiTError, match="model_index.json does not describe a pipeline.*few_step_timesteps"):
        describe(str(tmp_path / "pipeline"))
