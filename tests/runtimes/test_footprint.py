"""Memory and load time of real files, each in a process of its own."""

import mmap
import os
import subprocess

import numpy as np
import onnx
import pytest
import torch

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.runtimes.footprint import footprint, resident_bytes

MB = 1 << 20
LINUX = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux says what a process holds")


def save_product(path, size: int):
    """`y = x @ w` with size² random weights."""
    weight = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, size]) for name in "xy")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [x],
        [y],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@LINUX
def test_the_weights_count(tmp_path):
    sizes = {1024: 4 * MB, 4096: 64 * MB}
    found = {
        size: footprint(save_product(tmp_path / f"{size}.onnx", size), {"x": torch.ones(1, size)}, threads=1)
        for size in sizes
    }
    for one in found.values():
        assert one.keys() == {"load_seconds", "resident_bytes", "peak_bytes"}
        assert 0 < one["load_seconds"] < 60 and one["peak_bytes"] >= one["resident_bytes"]
    more = found[4096]["resident_bytes"] - found[1024]["resident_bytes"]
    assert 0.8 * (sizes[4096] - sizes[1024]) < more < 4 * sizes[4096]


@pytest.mark.slow
@LINUX
def test_a_pte_file_is_measured_too(part, files):
    found = footprint(files["older"], part.inputs, threads=1)  # its inputs have no names: they come in their order
    assert found["load_seconds"] > 0 and found["peak_bytes"] >= found["resident_bytes"] > 0


def test_a_process_that_fails_says_why(tmp_path):
    path = save_product(tmp_path / "product.onnx", 8)
    with pytest.raises(EdgeDiTError, match=r"product.onnx could not be run .*exit code 1: .*exported for x float32"):
        footprint(path, {"z": torch.ones(1, 8)}, threads=1)
    with pytest.raises(subprocess.TimeoutExpired):
        footprint(path, {"x": torch.ones(1, 8)}, threads=1, timeout=0.01)


@LINUX
def test_resident_bytes_are_what_the_system_says():
    before = resident_bytes()
    held = mmap.mmap(-1, 32 * MB)  # pages of its own; an array may take what was freed before
    np.frombuffer(held, np.uint8)[:] = 1
    assert 28 * MB < resident_bytes() - before < 64 * MB
    assert resident_bytes("VmHWM") >= resident_bytes() and resident_bytes("NoSuchField") is None
