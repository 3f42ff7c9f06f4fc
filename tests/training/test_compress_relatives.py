"""A teacher with MDTv2's long skips, position biases and side blocks goes through the loop like any other."""

import json
from statistics import median

import pytest
import torch
from diffusers import DiffusionPipeline

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import make_scheduler

STRUCTURE = {
    "long_skips": [
        [0, 2],
        [-1, 3],
    ],  # layers 0 and 1 may not be merged, nor 2 and 3: a skip begins or ends between them
    "decoder_start": 2,
    "side_layers": 1,
    "learned_position": True,
    "position_bias": True,
    "num_layers": 6,
}


@pytest.fixture(scope="module")
def teacher(make_transformer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mdt") / "teacher"
    EdgeDiTPipeline(make_transformer(**STRUCTURE), make_scheduler("epsilon"), default_steps=2).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_bank_of_a_masked_transformer_assembles_students(recipes, teacher, tmp_path):
    import edgedit_hf

    recipes.run("distill_proxies", tmp_path, *recipes.tiny, f"teacher.path={teacher}")
    source = DiffusionPipeline.from_pretrained(teacher).transformer
    bank = edgedit_hf.ProxyBank(tmp_path / "bank", source)
    assert not bank.missing()
    assert {key.split("/")[0] for key in bank.entries if "-" in key.split("/")[0]} == {"04-05"}
    student = bank.assemble(bank.space.decode([0.99] * 6))
    assert len(student.blocks) == 5 and student.config.long_skips == STRUCTURE["long_skips"]
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([10, 900]), torch.tensor([1, 10])
    with torch.no_grad():
        assert student(x, t, y).sample.isfinite().all()
        original = bank.assemble(bank.space.decode([0.0] * 6))
        assert torch.equal(original(x, t, y).sample, source(x, t, y).sample)
    starts = [entry["losses"] for entry in bank.entries.values() if "closed_form" in entry["losses"]]
    assert median(start["closed_form"] for start in starts) < median(start["copied"] for start in starts)


@pytest.mark.slow
def test_whole_loop_with_a_masked_transformer(recipes, teacher, tmp_path):
    # Not int8: its gate is right to refuse a network of random weights.
    recipes.run("compress", tmp_path, *recipes.tiny, f"teacher.path={teacher}", "export.dtypes=[fp32]")
    report = json.loads((tmp_path / "report.json").read_text())
    assert {m["name"] for m in report["models"]} >= {"teacher", "student-tuned", "onnx-fp32"}
    tuned = DiffusionPipeline.from_pretrained(tmp_path / "student-tuned").transformer
    assert tuned.config.side_layers == 1 and tuned.mask_token is not None
