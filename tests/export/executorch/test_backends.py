"""ExecuTorch's backends: XNNPACK takes a layer whole and computes what torch computes; what is missing is named."""

import os

import pytest
import torch
from torch import nn

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.executorch.backends import edge_program
from edgedit_hf.export.formats import FORMATS
from edgedit_hf.export.wrappers import quiet
from edgedit_hf.runtimes.sessions import open_session

EXECUTORCH = FORMATS["executorch"]


def test_xnnpack_takes_the_network_and_the_constants_stay(tmp_path):
    torch.manual_seed(0)
    form = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(3, 8)
    with quiet():
        edge = edge_program("xnnpack", {"forward": (form, [x])}, {"edgedit_word": "text"})
        calls = [str(node.target) for node in edge.exported_program().graph.nodes if node.op == "call_function"]
        lowered = edge.to_executorch()
    assert len(calls) == 2 and "executorch_call_delegate" in calls[0]  # one delegate, and its output taken out
    with open(tmp_path / "a.pte", "wb") as file:
        lowered.write_to_file(file)
    session = open_session(tmp_path / "a.pte", threads=1)
    assert session.metadata == {"word": "text"}
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(session.run({"x": x})[0]), form(x), atol=1e-5)


@pytest.mark.parametrize("backend", EXECUTORCH.backends)
def test_backends_say_what_they_need(backend, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    if backend == "qnn":
        with pytest.raises(EdgeDiTError, match="QNN_SDK_ROOT is '', not a folder; install the SDK"):
            EXECUTORCH.check_backend(backend, "fp32")
    else:
        EXECUTORCH.check_backend(backend, "fp32")
    if backend != "xnnpack":
        assert "but not run" in EXECUTORCH.backends[backend]
        with pytest.raises(EdgeDiTError, match=f"through ExecuTorch's {backend} delegate only fp32"):
            EXECUTORCH.check_backend(backend, "int8")
