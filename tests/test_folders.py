"""What a folder holds: every kind, written by the real classes."""

import json

import pytest
import torch

from edgedit_hf import EdgeDiTPipeline, ElasticDiTPipeline, ElasticDiTTransformer2DModel, quantize_model
from edgedit_hf.diffusion import make_few_step_scheduler, make_scheduler
from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.formats import ExportOptions
from edgedit_hf.export.pipeline import export_pipeline
from edgedit_hf.folders import KINDS, look_at
from edgedit_hf.genotype import Genotype
from edgedit_hf.quantization.layers import quantizable_layers
from edgedit_hf.search_space import SearchSpace

FEW = {"few_step_timesteps": [600.0, 300.0], "default_steps": 2, "default_guidance_scale": 1.0}


def classes(transformer, folder, bundle_code=False, **facts):
    scheduler = make_few_step_scheduler("epsilon") if facts else make_scheduler("epsilon")
    EdgeDiTPipeline(transformer, scheduler, **facts).save_pretrained(folder, bundle_code=bundle_code)
    return look_at(folder)


def test_pipelines_of_classes(make_transformer, tmp_path):
    teacher = classes(make_transformer(), tmp_path / "teacher")
    assert (teacher.kind, teacher.family, teacher.pipeline, teacher.bundled) == ("teacher", "edgedit", True, False)
    assert teacher.genotype == Genotype.of(teacher.config)
    assert classes(make_transformer(), tmp_path / "bundled", bundle_code=True).bundled
    few = classes(make_transformer(), tmp_path / "few", **FEW)
    assert few.kind == "few-step" and few.few_step
    layers = [{**layer, "mlp_ratio": 2.0} for layer in make_transformer().config.layers]
    assert classes(make_transformer(layers=layers), tmp_path / "student").kind == "student"
    quantized = make_transformer(hidden_size=64)
    quantize_model(quantized, {next(iter(quantizable_layers(quantized))): {"scheme": "nf4", "block": 32}})
    found = classes(quantized, tmp_path / "quantized", **FEW)
    assert found.kind == "quantized" and found.few_step, "few steps in low-bit weights are both"


def test_a_supernet_and_its_subnet(tmp_path):
    net = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug")
    for kind, one in (("supernet", net), ("subnet", net.extract_subnet("small"))):
        ElasticDiTPipeline(one, make_scheduler("flow_prediction")).save_pretrained(tmp_path / kind)
        found = look_at(tmp_path / kind)
        assert (found.kind, found.family, found.genotype) == (kind, "elastic", None)


def test_what_is_no_pipeline(make_transformer, tmp_path):
    transformer = make_transformer()
    ProxyBank.create(tmp_path / "bank", transformer, SearchSpace.for_config(transformer.config))
    bank = look_at(tmp_path / "bank")
    assert (bank.kind, bank.pipeline) == ("bank", False) and "teacher_hash" in bank.config

    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(0.25)  # a smoother net, which rounding does not upset
    pipeline = EdgeDiTPipeline(transformer, make_few_step_scheduler("epsilon"), **FEW)
    pipeline.save_pretrained(tmp_path / "few")
    export_pipeline(tmp_path / "few", tmp_path / "onnx", ExportOptions(format="onnx", dtype="fp32", bench_repeats=2))
    export = look_at(tmp_path / "onnx")
    assert (export.kind, export.family, export.few_step, export.pipeline) == ("exported", "edgedit", True, True)
    assert (export.index["format"], export.index["precision"]) == ("onnx", "fp32")


def test_anything_else_is_refused_and_says_what_was_expected(make_transformer, tmp_path):
    with pytest.raises(EdgeDiTError, match="not a folder"):
        look_at(tmp_path / "nothing")
    classes(make_transformer(), tmp_path / "run" / "teacher")
    with pytest.raises(EdgeDiTError, match=r"holds no model_index\.json.*its folders teacher do"):
        look_at(tmp_path / "run")
    path = tmp_path / "run" / "teacher" / "model_index.json"
    path.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(EdgeDiTError, match=r"'StableDiffusionPipeline'.*EdgeDiTPipeline and ElasticDiTPipeline"):
        look_at(path.parent)
    assert len(KINDS) == 9
