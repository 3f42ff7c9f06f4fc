"""A bundle: it holds whole networks, self-contained, and gives back the plan that it was made of."""

import json
import shutil

import numpy as np
import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.genotype import Genotype
from edgedit_hf.phone.bundle import (
    Bundle,
    Subject,
    bundle_bytes,
    make_bundle,
    subject_of,
)
from edgedit_hf.runtimes.sessions import open_session
from edgedit_hf.search.latency_networks import lower_network
from edgedit_hf.search.latency_plan import TablePlan


def inputs_of(folder, data) -> dict[str, np.ndarray]:
    """The inputs as an app reads them: raw values."""
    values = {}
    for entry in data["inputs"]:
        kind = np.dtype(entry["dtype"]).newbyteorder("<")
        values[entry["name"]] = np.frombuffer((folder / entry["file"]).read_bytes(), kind).reshape(entry["shape"])
    return values


def test_what_stands_in_it(bundle, subject):
    plan = TablePlan(subject.config, subject.space)
    again = Bundle.read(bundle.folder)
    assert again.hash == bundle.hash and again.plan.fitted == plan.fitted and again.plan.shapes == plan.shapes
    assert set(again.networks.values()) == set(again.plan.networks)
    assert again.networks["teacher"] == Genotype.of(subject.config).hash
    assert again.networks["student"] == subject.student.hash
    assert {g.hash for g in plan.check} <= set(again.networks.values())
    assert [name for name in again.networks if name.startswith("fitted")] == [f"fitted-{i:02}" for i in range(9)]
    assert again.data["batch"] == 2 and again.data["protocol"] == {"cold_loads": 3, "warmups": 3, "rounds": 20}
    again.check_files()


def test_every_network_runs_from_its_own_files_alone(bundle, subject, tmp_path):
    """Copied elsewhere with nothing but the files that it names, a network computes, for the inputs of the bundle, what
    the whole network's own lowering does."""
    inputs = inputs_of(bundle.folder, bundle.data)
    assert inputs["sample"].shape[0] == bundle.batch and inputs["class_labels"].dtype == np.int64
    entry = next(entry for entry in bundle.data["networks"] if entry["name"] == "student")
    for file in entry["files"]:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(bundle.folder / file, tmp_path / file)
    assert entry["file"] in entry["files"] and len(entry["files"]) > 2
    assert all("/" not in file.removeprefix("networks/") for file in entry["files"])
    network = {**subject.config, "layers": [dict(layer) for layer in entry["layers"]]}
    values = open_session(tmp_path / entry["file"], 1).run(inputs)
    own = open_session(lower_network(network, "onnxruntime", "fp32", 2, tmp_path / "whole"), 1).run(inputs)
    assert [value.shape for value in values] == [value.shape for value in own]
    assert all(np.isfinite(value).all() for value in values)


def test_the_test_data_of_the_perf_test_is_the_inputs(bundle):
    import onnx

    inputs = inputs_of(bundle.folder, bundle.data)
    files = sorted((bundle.folder / "networks" / "test_data_set_0").iterdir())
    assert [file.name for file in files] == [f"input_{place}.pb" for place in range(len(inputs))]
    for file in files:
        tensor = onnx.TensorProto.FromString(file.read_bytes())
        assert np.array_equal(onnx.numpy_helper.to_array(tensor), inputs[tensor.name])


def test_a_bundle_that_was_changed_is_refused(bundle_copy, bundle):
    path = bundle_copy / "bundle.json"
    data = json.loads(path.read_text())
    for change, said in (
        ({"batch": 8}, f"states the hash {bundle.hash}, but its values give"),
        ({"format": "edgedit-phone-bundle-9"}, "format is 'edgedit-phone-bundle-9'"),
        ({"runtime": "tflite"}, "runtime is 'tflite'"),
        ({"networks": []}, "networks has 0 entries"),
        ({"files": {**data["files"], "../x": data["files"]["networks/teacher.onnx"]}}, "names the file '../x'"),
        ({"inputs": [{**data["inputs"][0], "file": "/etc/passwd"}]}, "names the file '/etc/passwd'"),
    ):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(EdgeDiTError, match=said):
            Bundle.read(bundle_copy)
    path.write_text(json.dumps(data))
    (bundle_copy / "networks" / "teacher.onnx").write_bytes(b"x")
    with pytest.raises(EdgeDiTError, match="teacher.onnx holds other bytes"):
        Bundle.read(bundle_copy).check_files()
    (bundle_copy / "networks" / "teacher.onnx").unlink()
    with pytest.raises(EdgeDiTError, match="teacher.onnx of the bundle is missing"):
        Bundle.read(bundle_copy).check_files()


def test_what_does_not_exist_and_what_has_no_room(subject, tmp_path, monkeypatch):
    for runtime, precision in (("onnxruntime", "int4"), ("tflite", "fp32"), ("executorch", "fp16")):
        with pytest.raises(
            EdgeDiTError, match=f"{runtime}-{precision} is asked for; what exists is onnxruntime: fp32, i"
        ):
            make_bundle(tmp_path, subject, runtime=runtime, precision=precision, batch=1)
    plan = TablePlan(subject.config, subject.space)
    assert bundle_bytes(plan, "executorch", "fp32") > 5 * bundle_bytes(plan, "onnxruntime", "fp32")
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(2000, 1000, 1000))
    with pytest.raises(EdgeDiTError, match="networks take about .* GB left"):
        make_bundle(tmp_path, subject, runtime="onnxruntime", precision="fp32", batch=1)


def test_the_subject_of_a_run(unsearched, tmp_path):
    run, bank = unsearched
    found = subject_of(run)
    assert found.space.to_dict() == bank.space.to_dict() and found.student is None
    assert Genotype.of(found.config) == Genotype.of(bank.teacher.config)
    student = bank.space.from_code((5,) * bank.space.num_pairs)
    (run / "student").mkdir()
    choice = {"genotype": student.to_layers(), "genotype_hash": student.hash, "code": [5, 5], "reason": "a test"}
    (run / "student" / "choice.json").write_text(json.dumps(choice))
    assert subject_of(run).student == student
    shutil.move(run / "teacher", tmp_path / "elsewhere")
    with pytest.raises(EdgeDiTError, match="no teacher of its own.*--teacher"):
        subject_of(run)
    assert isinstance(subject_of(run, tmp_path / "elsewhere"), Subject)
    config = json.loads((tmp_path / "elsewhere" / "transformer" / "config.json").read_text())
    config["layers"] = config["layers"][:2]
    (tmp_path / "elsewhere" / "transformer" / "config.json").write_text(json.dumps({**config, "num_layers": 2}))
    with pytest.raises(EdgeDiTError, match=r"another teacher: num_layers 4 \(bank\) / 2 \(teacher\)"):
        subject_of(run, tmp_path / "elsewhere")
