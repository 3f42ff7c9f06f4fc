"""Results of a stage: replaced whole, and what was read of an earlier version."""

import json

import pytest
import torch
from demo_stage import demo_run, finished_with_results
from safetensors.torch import save_file

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.run.results import pipeline_weights_hash, replace_results


def test_what_describes_a_pipeline_counts_where_it_is_asked_for(tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "transformer").mkdir()
    save_file({"weight": torch.ones(3)}, tmp_path / "transformer" / "weights.safetensors")
    index = {
        "_class_name": "DiTPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "default_steps": 4}))
    weights, seen = pipeline_weights_hash(tmp_path), [pipeline_weights_hash(tmp_path, described=True)]
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"timestep_spacing": "trailing"}')
    seen.append(pipeline_weights_hash(tmp_path, described=True))
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "default_steps": 5}))
    seen.append(pipeline_weights_hash(tmp_path, described=True))
    assert pipeline_weights_hash(tmp_path) == weights and len({*seen, weights}) == 4


def test_results_are_replaced_whole_and_stay_a_stages(tmp_path):
    folder = tmp_path / "student"
    finished_with_results(folder)
    (folder / "old.json").write_text("{}")
    with replace_results(folder) as aside:
        (aside / "other.json").write_text("{}")
    assert sorted(path.name for path in folder.iterdir()) == ["other.json", "run.json", "stage.json"]
    assert demo_run(folder, "demo", {}, 1).finished
    (folder / "other.json").write_text("[]")
    with pytest.raises(EdgeDiTError, match="other.json holds other bytes"):
        demo_run(folder, "demo", {}, 1)
