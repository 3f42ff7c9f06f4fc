"""What a recipe's section hub says, checked before the first stage and done after the last."""

import shutil

import pytest
from hub_server import READER

from edgedit_hf.publish.run import places
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.stage import FEW_STEP

CHECK = """
import sys
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.publish.run import check_push
from edgedit_hf.run.config import RunConfig
config = RunConfig()
config.hub.push_to, config.card.license = sys.argv[1:]
try:
    check_push(config)
except EdgeDiTError as error:
    print(error)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    ("repo_id", "license", "who", "said"),
    [
        ("me/student", "mit", {}, ""),
        ("acme/student", "mit", {}, ""),
        ("me/student", "other", {}, "card.license is 'other'"),
        ("elsewhere/student", "mit", {}, "the token is that of 'me'"),
        ("me/student", "mit", {"token": READER}, "may only read"),
        ("me/student", "mit", {"token": "hf_unknown"}, "does not take the token"),
        ("me/student", "mit", {"token": None}, "log in"),
        ("me/student", "mit", {"offline": True}, "HF_HUB_OFFLINE"),
    ],
)
def test_what_could_not_be_pushed_stops_a_run_before_it_begins(run_with_hub, repo_id, license, who, said):
    printed = run_with_hub(CHECK, repo_id, license, **who).strip()
    assert said in printed and bool(said) == bool(printed) and len(printed.splitlines()) <= 1, printed


def test_every_export_has_a_repository_of_its_own(tmp_path):
    config = RunConfig(output_dir=str(tmp_path))
    config.hub.push_to = "me/student"
    for name in ("onnx-int8", "executorch-int8", "broken-int4"):
        (tmp_path / "exported" / name).mkdir(parents=True)
        if name != "broken-int4":
            (tmp_path / "exported" / name / "contract.json").write_text("{}")
    exported = tmp_path / "exported"
    assert places(config, FEW_STEP) == {
        "me/student": tmp_path / "few-step",
        "me/student-executorch-int8": exported / "executorch-int8",
        "me/student-onnx-int8": exported / "onnx-int8",
    }
    config.hub.exports = False
    assert list(places(config, FEW_STEP)) == ["me/student"]


RUN = """
import os, sys
from edgedit_hf.commands.cli import main
os.chdir(sys.argv[1])
sys.exit(main(["train", *sys.argv[2:], "--push", "me/digits", "--override", "hub.collection=Digits"]))
"""


@pytest.mark.slow
def test_a_run_pushes_what_it_made(debug_run, hub, run_with_hub, tmp_path):
    (tmp_path / "training").symlink_to(debug_run.parents[1] / "training")
    shutil.copytree(debug_run, tmp_path / "runs" / "debug")
    command = [tmp_path, "compress", "--config", "training/recipes/debug.yaml"]
    printed = run_with_hub(RUN, *command, expect=2)
    assert not hub.requests("POST"), f"without a licence nothing is begun: {printed}"
    command += ["--override", "card.license=mit"]
    printed = run_with_hub(RUN, *command)
    exports = [path.name for path in (debug_run / "exported").glob("*-*")]
    assert exports and all(f"me/digits-{name} at " in printed for name in exports)
    assert "me/digits-onnx-int8" in hub.files("me/digits-onnx-int8")["README.md"].read_text()
    (collection,) = hub.collections.values()
    assert len(collection["items"]) == 1 + len(exports)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    pushed = hub.files("me/digits")
    assert pushed[weights].read_bytes() == (debug_run / "student-tuned" / weights).read_bytes()
    for name in ("me/digits", *(f"me/digits-{export}" for export in exports)):
        for path, file in hub.files(name).items():
            assert str(tmp_path).encode() not in file.read_bytes(), f"{name}/{path} says where it lay"
    hub.forget()
    assert run_with_hub(RUN, *command).count("nothing had changed") == 1 + len(exports) and hub.sent() == 0
