"""DiT's relatives export too: SiT's time, MDTv2's long skips and position biases, against the outputs of the original
code.
"""

import pytest
import torch
from oracles import relative

from edgedit_hf.export.lowering import lower_denoiser
from edgedit_hf.runtimes.sessions import open_session


@pytest.mark.slow
@pytest.mark.export
@pytest.mark.parametrize("name", ["sit", "mdtv2"])
def test_an_artefact_computes_what_the_original_computed(name, tmp_path):
    model, inputs, expected = relative(name, tmp_path)
    lower_denoiser(model, tmp_path / "model.onnx")
    found = torch.from_numpy(open_session(tmp_path / "model.onnx", threads=1).run(inputs)[0])
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    lower_denoiser(model, tmp_path / "model.pte", "executorch", batch=len(expected))
    found = torch.from_numpy(open_session(tmp_path / "model.pte", threads=1).run(inputs)[0])
    assert (found - expected).norm() <= 1e-5 * expected.norm()
