"""`edgedit info` counts what the networks hold, at once and without torch."""

import json

import pytest
import torch

from edgedit_hf import EdgeDiTTransformer2DModel, ElasticDiTTransformer2DModel
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
