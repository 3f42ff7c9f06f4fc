"""A recipe whose teacher is a name on the Hub: it makes and refuses what it would with the teacher's folder."""

import json
import shutil

import pytest
from diffusers import DDIMScheduler

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.run.results import pipeline_weights_hash

TINY = (
    "bank.steps=2",
    "bank.both_steps=1",
    "bank.calibration_samples=8",
    "bank.batch_size=4",
)


@pytest.mark.slow
def test_a_teacher_by_name(recipes, make_transformer, make_hub_cache, monkeypatch, tmp_path, capsys):
    def teacher(seed: int):
        folder = tmp_path / f"teacher-{seed}"
        EdgeDiTPipeline(make_transformer(seed, num_classes=10), DDIMScheduler()).save_pretrained(folder)
        return folder

    def on_the_hub(folder) -> None:
        shutil.rmtree(tmp_path / "hub", ignore_errors=True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(make_hub_cache(folder, "me/teacher")))

    def run(folder: str, *overrides: str) -> tuple[int, str]:
        code = 0
        try:
            recipes.run_here("distill_proxies", tmp_path / folder, *TINY, *overrides)
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr()
        return code, said.out + said.err

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    code, said = run("run", "teacher.path=me/teacher")
    assert code == 2 and "me/teacher: it is neither a local path nor a Hub id" in said
    first = teacher(0)
    on_the_hub(first)
    assert run("run", "teacher.path=me/teacher")[0] == 0
    assert run("by-path", f"teacher.path={first}")[0] == 0
    made, by_path = (json.loads((tmp_path / name / "bank" / "stage.json").read_text()) for name in ("run", "by-path"))
    assert made["inputs"] == by_path["inputs"] and made["inputs"]["teacher"] == pipeline_weights_hash(first)
    banks = [(tmp_path / name / "bank" / "index.json").read_bytes() for name in ("run", "by-path")]
    assert json.loads(banks[0])["entries"].keys() == json.loads(banks[1])["entries"].keys()
    assert {entry["sha256"] for entry in json.loads(banks[0])["entries"].values()} == {
        entry["sha256"] for entry in json.loads(banks[1])["entries"].values()
    }
    assert run("run", "teacher.path=me/teacher")[0] == 0  # finished
    on_the_hub(teacher(1))
    code, said = run("run", "teacher.path=me/teacher")
    assert code == 2 and "teacher" in said and made["inputs"]["teacher"] in said, said
