"""Sessions: tiny files of each runtime compute what the eager network computes, with inputs by name."""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
import torch

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.runtimes.runners import SessionRunner
from edgedit_hf.runtimes.sessions import Input, open_session, session_type, set_executorch_threads

RUNTIMES = ("onnxruntime", "executorch")


def pool_size() -> int:
    from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count

    return _threadpool_get_thread_count()


def inputs(*timesteps: float) -> dict[str, np.ndarray]:
    return {"timestep": np.array(timesteps, np.float32), "class_labels": np.arange(len(timesteps)) % 11}


def error(found, part, given) -> float:
    """Relative to what the eager network computes."""
    with torch.no_grad():
        expected = part.module(*(torch.from_numpy(given[name]) for name in part.inputs)).numpy()
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# -------------------------------------------------------------------- inputs by name


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_inputs_go_by_name_in_any_order(part, files, runtime):
    session = open_session(files[runtime], threads=1)
    assert session.runtime == runtime and session.input_names == ("timestep", "class_labels")
    given = inputs(700, 20)
    (found,) = session.run(given)
    (turned,) = session.run(dict(reversed(given.items())))
    assert isinstance(found, np.ndarray) and np.array_equal(found, turned)
    assert error(found, part, given) < 1e-4
    # tensors, and arrays that are not contiguous or cannot be written to, are taken as well
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    strided = {name: np.broadcast_to(np.repeat(value, 2)[::2], value.shape) for name, value in given.items()}
    for same in (tensors, strided):
        assert np.array_equal(session.run(same)[0], found)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    "change, said",
    [
        ({"class_labels": None}, r"The inputs are timestep float32 \(2,\), but"),
        ({"labels": np.zeros(2, np.int64)}, r"class_labels int64 \(2,\), labels int64 \(2,\), but"),
        ({"class_labels": np.zeros(2, np.float32)}, r"class_labels float32 \(2,\), but"),
        ({"timestep": np.zeros((2, 1), np.float32)}, r"timestep float32 \(2, 1\), class_labels int64 \(2,\), but"),
        ({"timestep": None, "class_labels": None}, "The inputs are none, but"),
    ],
)
def test_what_does_not_fit_is_one_error_with_both_values(files, runtime, change, said):
    session = open_session(files[runtime], threads=1)
    given = {name: value for name, value in {**inputs(1, 2), **change}.items() if value is not None}
    size = "batch" if runtime == "onnxruntime" else 2
    wanted = rf".*was exported for timestep float32 \({size},\), class_labels int64 \({size},\); give these"
    with pytest.raises(EdgeDiTError, match=said + wanted):
        session.run(given)
    assert session.run(inputs(1, 2))[0].shape == (2, 8, 32)


def test_open_sizes_are_any_and_fixed_ones_are_not(part, files):
    given = inputs(1, 2, 3)
    found = open_session(files["onnxruntime"], threads=1).run(given)[0]
    assert error(found, part, given) < 1e-4
    with pytest.raises(EdgeDiTError, match=r"timestep float32 \(3,\).*exported for timestep float32 \(2,\)"):
        open_session(files["executorch"], threads=1).run(given)
    spec = Input("x", ("batch", 4, None), np.dtype("float32"))
    assert spec.takes(np.zeros((3, 4, 9), np.float32)) and not spec.takes(np.zeros((3, 5, 9), np.float32))
    assert str(spec) == "x float32 (batch, 4, any)"


def test_a_file_that_does_not_name_its_inputs_takes_them_in_their_order(part, files):
    session = open_session(files["older"], threads=1)
    assert session.input_names == () and session.metadata == {"part": "conditioner"}
    given = inputs(700, 20)
    assert error(session.run(given)[0], part, given) < 1e-4
    for wrong in (dict(reversed(given.items())), {"timestep": given["timestep"]}):
        with pytest.raises(EdgeDiTError, match=r"was exported for float32 \(2,\), int64 \(2,\)"):
            session.run(wrong)


# -------------------------------------------------------------------- what a session knows


def test_metadata_is_what_the_export_said(files):
    assert open_session(files["onnxruntime"]).metadata == {"part": "conditioner", "precision": "fp32"}
    assert open_session(files["executorch"]).metadata == {"part": "conditioner", "scheme": "fp32"}


def test_threads_are_set_in_one_place(part, files):
    one, two = (open_session(files["onnxruntime"], threads=n) for n in (1, 2))
    assert [s.session.get_session_options().intra_op_num_threads for s in (one, two)] == [1, 2]
    assert open_session(files["onnxruntime"]).threads is None
    one, two = (open_session(files["executorch"], threads=n) for n in (1, 2))
    given = inputs(700, 20)
    for session in (one, two, one):  # each finds the pool as it asked for it, and its network loaded anew
        assert error(session.run(given)[0], part, given) < 1e-4
        assert pool_size() == session.threads
    for runtime in RUNTIMES:
        with pytest.raises(EdgeDiTError, match="threads is 0"):
            open_session(files[runtime], threads=0)
    with pytest.raises(EdgeDiTError, match="threads is -1"):
        set_executorch_threads(-1)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_calls_at_once_do_not_mix(part, files, runtime):
    sessions = [open_session(files[runtime], threads=1) for _ in range(2)]
    jobs = [inputs(100.0 * n, 3.0 * n) for n in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda n: sessions[n % 2].run(jobs[n])[0], range(len(jobs)))
    for given, one in zip(jobs, found):
        assert error(one, part, given) < 1e-4


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runner_runs_its_inputs_with_the_threads_of_its_session(part, files, runtime):
    given = inputs(700, 20)
    runner = SessionRunner(open_session(files[runtime], threads=1), given)
    assert runner.threads == 1
    assert error(runner()[0], part, given) < 1e-4
    with pytest.raises(EdgeDiTError, match="was exported for timestep"):
        SessionRunner(runner.session, {"timestep": given["timestep"]})


# -------------------------------------------------------------------- files that cannot be opened


def test_files_that_cannot_be_opened(files, tmp_path):
    with pytest.raises(EdgeDiTError, match=r"model.bin cannot be run; the files that can be end in .onnx, .pte"):
        open_session(tmp_path / "model.bin")
    with pytest.raises(EdgeDiTError, match="'NoProvider' is not in this onnxruntime; it offers .*CPUExecutionProvider"):
        open_session(files["onnxruntime"], provider="NoProvider")
    for runtime, name in (("onnxruntime", "ONNX Runtime"), ("executorch", "ExecuTorch")):
        broken = tmp_path / files[runtime].name
        for content in (files[runtime].read_bytes()[:500], b"", None):
            broken.unlink(missing_ok=True) if content is None else broken.write_bytes(content)
            with pytest.raises(EdgeDiTError, match=f"{name} cannot load {broken}: .*Export it again"):
                open_session(broken)
    assert session_type("a/b.pte").runtime == "executorch"


TORCH_FREE = """
import sys
import numpy as np
from edgedit_hf.runtimes.sessions import open_session

assert not {"torch", "onnxruntime", "executorch"} & set(sys.modules)
session = open_session(sys.argv[1], threads=1)
found = session.run({"class_labels": np.zeros(3, np.int64), "timestep": np.ones(3, np.float32)})[0]
assert found.shape == (3, 8, 32) and "torch" not in sys.modules
"""


def test_an_onnx_file_runs_without_torch(files, run_python):
    run_python(TORCH_FREE, files["onnxruntime"])


def test_types_of_onnx_inputs(tmp_path):
    kinds = ("FLOAT", "DOUBLE", "FLOAT16", "INT64", "INT32", "INT8", "UINT8", "BOOL")
    types = [getattr(onnx.TensorProto, kind) for kind in kinds]
    values = [onnx.helper.make_tensor_value_info(f"x{n}", kind, [2]) for n, kind in enumerate(types)]
    outputs = [onnx.helper.make_tensor_value_info(f"y{n}", kind, [2]) for n, kind in enumerate(types)]
    nodes = [onnx.helper.make_node("Identity", [f"x{n}"], [f"y{n}"]) for n in range(len(types))]
    graph = onnx.helper.make_graph(nodes, "types", values, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "types.onnx")
    session = open_session(tmp_path / "types.onnx")
    given = {value.name: np.ones(2, value.dtype) for value in session.inputs}
    assert [value.dtype for value in given.values()] == [onnx.helper.tensor_dtype_to_np_dtype(kind) for kind in types]
    assert all(np.array_equal(a, b) for a, b in zip(session.run(given), given.values()))


def test_nothing_else_opens_an_artefact_to_run_it(repository):
    """`sample_min.py` ships beside an export and stands alone."""
    opens = re.compile(r"InferenceSession|Runtime\.get\(|load_method|_load_for_executorch")
    folders = ("src/edgedit_hf", "training", "benchmarks")
    files = [path for folder in folders for path in (repository / folder).rglob("*.py")]
    found = {path.relative_to(repository).as_posix() for path in files if opens.search(path.read_text("utf-8"))}
    assert {path for path in found if not path.startswith("src/edgedit_hf/runtimes/")} == {
        "src/edgedit_hf/export/sample_min.py"
    }
