"""One tiny artefact in each runtime, of the same network."""

import pytest


@pytest.fixture(scope="session")
def part(make_transformer):
    """The conditioner of a tiny network: a real and an integer input, for batch 2."""
    from edgedit_hf.export.parts import edgedit_parts

    conditioner, _ = edgedit_parts(make_transformer(num_layers=1), (8, 8), 2, split=True)
    return conditioner


@pytest.fixture(scope="session")
def files(part, tmp_path_factory):
    """Runtime → the part as a file in it; `older` is a `.pte` file that does not name its inputs."""
    pytest.importorskip("executorch")
    from edgedit_hf.export.executorch.lower import form_of, lower, lower_executorch
    from edgedit_hf.export.onnx.lower import lower_onnx

    folder = tmp_path_factory.mktemp("artefacts")
    found = {name: folder / f"{name}{suffix}" for name, suffix in SUFFIXES.items()}
    lower_onnx(part, found["onnxruntime"], "fp32", {"part": "conditioner"})
    lower_executorch(part, found["executorch"], "fp32", {"part": "conditioner"}, profile_runs=0)
    lower(form_of(part), tuple(part.inputs.values()), found["older"], {"part": "conditioner"})
    return found


SUFFIXES = {"onnxruntime": ".onnx", "executorch": ".pte", "older": ".pte"}
