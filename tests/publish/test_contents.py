"""Which files of a folder go to the Hub, and what keeps a folder here."""

import json
import os

import pytest
import torch

from edgedit_hf import EdgeDiTPipeline
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.formats import ExportOptions
from edgedit_hf.export.pipeline import export_pipeline
from edgedit_hf.publish.contents import MADE, checked, content_hash, items, left_out
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.lock import FolderLock
from edgedit_hf.run.stage import EXPORT, TEACHER
from edgedit_hf.run.state import RunState
from edgedit_hf.search_space import SearchSpace


@pytest.fixture
def folder(make_transformer, tmp_path):
    EdgeDiTPipeline(make_transformer(), make_scheduler("epsilon")).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def stage_of(config, stage):
    state = RunState(config, stage, 1, inputs=dict.fromkeys(name for name, _ in stage.inputs))
    for _ in state.steps():
        pass
    return state


def refused(folder, **options) -> str:
    with pytest.raises(EdgeDiTError) as error:
        checked(folder, **options)
    return str(error.value)


def test_a_plain_folder_goes_whole_and_hidden_files_stay(folder):
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    contents = checked(folder)
    names = [item.name for item in items(contents, {"README.md": b"# card"})]
    assert names == sorted(names)
    assert set(names) == {
        *("README.md", MADE, "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json"),
        "transformer/diffusion_pytorch_model.safetensors",
    }
    assert left_out(folder) == [".cache"]
    assert all(
        item.size == (len(item.source) if isinstance(item.source, bytes) else item.source.stat().st_size)
        for item in items(contents, {})
    )


def test_a_stage_goes_without_its_bookkeeping_and_says_what_made_it(make_transformer, tmp_path):
    config = RunConfig(output_dir=str(tmp_path / "run"), seed=5)
    config.data.source = str(tmp_path)
    folder = tmp_path / "run" / "teacher"
    state = stage_of(config, TEACHER)
    assert "not finished" in refused_before(folder, make_transformer)
    state.finish()
    names = {item.name: item for item in items(checked(folder), {})}
    assert not {"run.json", "stage.json", "telemetry.jsonl", FolderLock.NAME} & set(names)
    made = json.loads(names[MADE].source)
    assert (made["stage"], made["seed"], made["kind"]) == ("teacher", 5, "teacher")
    assert made["config"]["data"]["source"] == tmp_path.name and str(tmp_path) not in names[MADE].source.decode()

    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert f"{weights} holds other bytes" in refused(folder)


def refused_before(folder, make_transformer) -> str:
    EdgeDiTPipeline(make_transformer(), make_scheduler("epsilon")).save_pretrained(folder)
    return refused(folder)


def test_where_a_model_was_loaded_from_does_not_go(folder):
    loaded = EdgeDiTPipeline.from_pretrained(folder)
    other = folder.with_name("other")
    loaded.save_pretrained(other)
    path = other / "transformer" / "config.json"
    assert str(folder) in path.read_text(), "diffusers no longer writes it; then this can go"
    found = {item.name: item.source for item in items(checked(other), {})}
    assert "_name_or_path" not in json.loads(found["transformer/config.json"])
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "_name_or_path": "acme/teacher"}))
    assert {item.name: item.source for item in items(checked(other), {})}["transformer/config.json"] == path


def test_every_private_or_dangerous_thing_is_refused_by_name(folder, tmp_path):
    token = "hf" + "_" + "Ab1" * 12
    for name, content, said in (
        ("notes.txt", token, "a Hugging Face token"),
        ("optimizer.bin", "x", "is a pickle"),
        ("notes.md", f"trained from {tmp_path}/photos/cats", "names the path"),
        ("id_rsa", "x", "a file of secrets"),
    ):
        (folder / name).write_text(content)
        assert str(folder / name) in (told := refused(folder)) and said in told and token not in told
        (folder / name).unlink()
    outside = tmp_path / "outside.txt"
    outside.write_text("x")
    (folder / "link.txt").symlink_to(outside)
    assert "is a link to" in refused(folder)
    (folder / "link.txt").unlink()
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    assert "no whole safetensors file" in refused(folder)


def test_a_component_that_is_missing_is_named(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", "AutoencoderTiny"]}))
    assert "component 'vae'" in refused(folder)


@pytest.mark.slow
@pytest.mark.export
def test_an_export_goes_only_verified_and_as_it_was_written(folder, make_transformer, tmp_path):
    smooth = make_transformer()
    with torch.no_grad():
        for parameter in smooth.parameters():
            parameter.mul_(0.25)
    EdgeDiTPipeline(smooth, make_scheduler("epsilon")).save_pretrained(folder)
    config = RunConfig(output_dir=str(tmp_path / "run"))
    export = tmp_path / "run" / "exported" / "onnx-fp32"
    state = stage_of(config, EXPORT)
    export_pipeline(folder, export, ExportOptions(format="onnx", dtype="fp32", bench_repeats=2))
    assert "not finished" in refused(export), "the stage that the export is part of"
    state.finish()
    assert checked(export).kind == "exported"

    path = export / "verify.json"
    verified = json.loads(path.read_text())
    listing = export.parent / "stage.json"
    listed = json.loads(listing.read_text())
    del listed["files"]["onnx-fp32/verify.json"]
    listing.write_text(json.dumps(listed))
    for passed, said in ((False, "failed"), (None, "was not verified")):
        path.write_text(json.dumps({**verified, "passed": passed}))
        assert said in refused(export)
    assert checked(export, unverified=True)
    path.unlink()
    assert "no verify.json" in refused(export)
    path.write_text(json.dumps(verified))

    listing.unlink()
    (export.parent / "run.json").unlink()  # as optimum-cli writes it: only the contract tells
    script = export / "sample_min.py"
    script.write_text(script.read_text() + "# changed\n")
    assert "contract.json says" in refused(export) and str(script) in refused(export)


def test_a_bank_with_another_proxy_than_its_index_says_is_refused(make_transformer, tmp_path):
    teacher = make_transformer()
    space = SearchSpace.for_config(teacher.config, reduced_attention_dim=8)
    bank = ProxyBank.create(tmp_path / "bank", teacher, space)
    layer = space.proxies()[0]
    bank.write_index({bank.key(layer): bank.write_proxy(layer, bank.new_block(layer), {})})
    assert checked(bank.folder).kind == "bank"
    file = next(bank.folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "SHA-256" in refused(bank.folder) and file.name in refused(bank.folder)


def test_the_hash_of_content_is_that_of_the_thing_alone(folder):
    before = content_hash(folder)
    (folder / "README.md").write_text("# another card")
    os.utime(folder / "model_index.json", (1, 1))
    assert content_hash(folder) == before
    (folder / "transformer" / "extra.txt").write_text("x")
    assert content_hash(folder) != before


def test_a_folder_in_it_that_is_a_link_is_refused(folder):
    (folder / "transformer").rename(folder / "real")
    (folder / "transformer").symlink_to("real")
    assert str(folder / "transformer") in (told := refused(folder)) and "link to the folder" in told


def test_a_pulled_folder_keeps_what_made_it(folder):
    made = {"kind": "teacher", "family": "edgedit", "genotype": checked(folder).genotype.hash, "stage": "teacher"}
    (folder / MADE).write_text(json.dumps(made))
    assert {item.name: item.source for item in items(checked(folder), {})}[MADE] == folder / MADE
    (folder / MADE).write_text(json.dumps({**made, "kind": "student"}))
    assert "stage" not in json.loads({item.name: item.source for item in items(checked(folder), {})}[MADE])


def test_the_stage_around_is_found_from_within_the_folder(folder, tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text("{}")
    monkeypatch.chdir(folder)
    assert "not finished" in refused(".")


def test_a_large_file_that_rotted_in_its_place_is_refused(make_transformer, tmp_path, monkeypatch):
    monkeypatch.setattr("edgedit_hf.files.HASHED_ALWAYS", 0)
    config = RunConfig(output_dir=str(tmp_path / "run"))
    config.data.source = str(tmp_path)
    folder = tmp_path / "run" / "teacher"
    state = stage_of(config, TEACHER)
    EdgeDiTPipeline(make_transformer(), make_scheduler("epsilon")).save_pretrained(folder)
    state.finish()
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    content, times = bytearray(weights.read_bytes()), weights.stat()
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert f"{weights} holds other bytes" in refused(folder)


def test_weights_in_several_files_of_which_one_is_missing_are_refused(folder, tmp_path):
    EdgeDiTPipeline.from_pretrained(folder).save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert checked(tmp_path / "parts").kind == "teacher"
    gone = sorted((tmp_path / "parts" / "transformer").glob("*-of-*.safetensors"))[1]
    gone.unlink()
    assert gone.name in (told := refused(tmp_path / "parts")) and "not there" in told
