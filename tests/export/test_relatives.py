"""DiT's relatives export too: SiT's time, MDTv2's long skips and position biases, against the outputs of the original
code.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgedit_hf import load_original
from edgedit_hf.export.lowering import lower_denoiser
from edgedit_hf.runtimes.sessions import open_session

ORACLES = Path(__file__).parents[1] / "models" / "oracles"


MASKED = pytest.param("mdtv2", marks=(pytest.mark.slow, pytest.mark.export))


@pytest.mark.parametrize("name", ["sit", MASKED])
def test_an_artefact_computes_what_the_original_computed(name, tmp_path):
    tensors = load_file(ORACLES / f"{name}.safetensors")
    torch.save(
        {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}, tmp_path / f"{name}.pt"
    )
    model = load_original(tmp_path / f"{name}.pt", num_attention_heads=4)
    x, t, y, expected = (tensors[f"call0.{key}"] for key in ("x", "t", "y", "out"))
    if name == "sit":
        t, expected = 1000 * (1 - t), -expected
    inputs = {"sample": x, "timestep": t.float(), "class_labels": y}
    lower_denoiser(model, tmp_path / "model.onnx")
    found = torch.from_numpy(open_session(tmp_path / "model.onnx", threads=1).run(inputs)[0])
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    lower_denoiser(model, tmp_path / "model.pte", "executorch", batch=len(x))
    found = torch.from_numpy(open_session(tmp_path / "model.pte", threads=1).run(inputs)[0])
    assert (found - expected).norm() <= 1e-5 * expected.norm()
