"""One way down: what is measured is the file that ships."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgedit_hf import EdgeDiTPipeline, OnnxEdgeDiTTransformer2DModel
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.formats import ExportOptions
from edgedit_hf.export.lowering import Lowering, denoiser_file, lower_denoiser, lower_one_file
from edgedit_hf.export.parts import edgedit_parts
from edgedit_hf.export.pipeline import export_pipeline
from edgedit_hf.export.verify import relative_error
from edgedit_hf.genotype import Genotype
from edgedit_hf.runtimes.sessions import open_session


@pytest.fixture(scope="module")
def model(make_transformer):
    return make_transformer(num_layers=1)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """An int8 export's transformer."""
    pipeline = EdgeDiTPipeline(model, make_scheduler("epsilon"), default_steps=2)
    options = ExportOptions(
        dtype="int8", threads=1, bench_batches=(2,), bench_repeats=2, num_images=1, min_psnr_db=0, tolerance=10
    )
    folder = export_pipeline(pipeline, tmp_path_factory.mktemp("lowering") / "out", options)
    return OnnxEdgeDiTTransformer2DModel.from_pretrained(folder / "transformer")


def read_metadata(path):
    """What a file says about itself."""
    entries = onnx.load(str(path), load_external_data=False).metadata_props
    return {entry.key.removeprefix("edgedit."): entry.value for entry in entries}


def content(path):
    """Everything that a file computes with: its operators and the values of its weights, in order."""
    graph = onnx.load(str(path)).graph
    nodes = [(node.op_type, list(node.input), list(node.output)) for node in graph.node]
    return nodes, {tensor.name: numpy_helper.to_array(tensor).tobytes() for tensor in graph.initializer}


def test_a_network_alone_is_lowered_as_in_its_export(model, exported, tmp_path):
    path = tmp_path / "alone.onnx"
    said = lower_denoiser(model, path, dtype="int8")
    assert said == {"precision": "int8", "activations": "dynamic"}
    assert content(path) == content(exported.path)
    assert read_metadata(path) == read_metadata(exported.path)


def test_a_file_describes_itself(model, tmp_path):
    lower_denoiser(model, tmp_path / "a.onnx", batch=3)
    said = read_metadata(tmp_path / "a.onnx")
    assert set(said) == {"config", "weights", "precision", "batch", "versions", "genotype", "part"}
    assert (said["precision"], said["batch"], said["part"]) == ("fp32", "3", "denoiser")
    assert Genotype.from_json(said["genotype"]) == Genotype.of(model.config)
    assert json.loads(said["config"])["hidden_size"] == model.config.hidden_size
    (sample, *_) = onnx.load(str(tmp_path / "a.onnx")).graph.input
    assert sample.type.tensor_type.shape.dim[0].dim_value == 3


def test_an_export_is_used_where_it_fits(model, exported, make_transformer, tmp_path):
    assert denoiser_file(model, tmp_path, "onnx", "int8", 5, exported) == exported.path
    assert list(tmp_path.iterdir()) == []
    other = make_transformer(num_layers=2)
    file = denoiser_file(other, tmp_path, "onnx", "int8", 5, exported)
    assert file == tmp_path / "onnx-int8.onnx" and content(file) != content(exported.path)
    assert Genotype.from_json(read_metadata(file)["genotype"]) == Genotype.of(other.config)


@pytest.mark.slow
@pytest.mark.export
def test_a_file_of_another_batch_keeps_its_layers_of_8_bits(model, exported, tmp_path):
    """As of ExecuTorch, whose files have one batch."""
    exported = OnnxEdgeDiTTransformer2DModel.from_pretrained(exported.folder)
    exported._internal_dict = type(exported.config)({**exported.config, "batch": 2})
    kept = "blocks.0.mlp.proj_in"
    verified = exported.folder.parent / "verify.json"
    before = verified.read_text()
    try:
        verified.write_text(json.dumps({**json.loads(before), "layers_of_8_bits": [kept]}))
        mixed = denoiser_file(model, tmp_path, "onnx", "int4", 8, exported)
    finally:
        verified.write_text(before)
    lower_denoiser(model, tmp_path / "kept.onnx", dtype="int4", keep_8bit=[kept])
    lower_denoiser(model, tmp_path / "plain.onnx", dtype="int4")
    assert content(mixed) == content(tmp_path / "kept.onnx") != content(tmp_path / "plain.onnx")


def test_what_cannot_be_lowered_is_an_error(model, tmp_path):
    for options, message in (
        ({"format": "tflite"}, "--format is 'tflite'"),
        ({"dtype": "int2"}, "ONNX files exist as fp32, fp16, int8, int4"),
        ({"batch": 0}, "--batch is 0"),
    ):
        with pytest.raises(EdgeDiTError, match=message):
            lower_denoiser(model, tmp_path / "a.onnx", **options)
    with pytest.raises(EdgeDiTError, match="float16; export needs float32"):
        lower_denoiser(type(model).with_config(dict(model.config)).half(), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_the_model_changes(model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lower_denoiser(model, tmp_path / "a.onnx", dtype="int8")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {type(block.attn.processor).__name__ for block in model.blocks} == {"EdgeDiTAttnProcessor"}
    assert np.isfinite(np.array([value.abs().sum().item() for value in before.values()])).all()


# -------------------------------------------------------------------- one file of several networks


@pytest.mark.slow
@pytest.mark.export
def test_methods_of_one_file_share_their_tensors(model, tmp_path):
    """A network for one row and for two: its packed weights are in the file once."""
    program = pytest.importorskip("executorch.exir._serialize._program")
    parts = {name: edgedit_parts(model, (8, 8), rows, split=True)[0] for name, rows in (("one", 1), ("two", 2))}

    def stored(path):
        file = program.deserialize_pte_binary(path.read_bytes())
        planned = {plan.name: sum(plan.non_const_buffer_sizes) for plan in file.program.execution_plan}
        return planned, sorted(map(bytes, file.named_data.buffers))

    asked = {name: (part, "int4", {"part": name}) for name, part in parts.items()}
    said = lower_one_file(asked, tmp_path / "both.pte", Lowering())
    lower_one_file({"one": asked["one"]}, tmp_path / "single.pte", Lowering())
    (planned, weights), (_, alone) = stored(tmp_path / "both.pte"), stored(tmp_path / "single.pte")
    assert {name: entry["planned_bytes"] for name, entry in said.items()} == {name: planned[name] for name in parts}
    assert planned["two"] > planned["one"] > 0
    assert weights == alone and sum(map(len, weights)) > 0.5 * 8 * 32 * 32  # the modulations
    for name, part in parts.items():
        session = open_session(tmp_path / "both.pte", 1, method=name)
        assert session.metadata == {"part": name, "scheme": "8da4w"} and session.input_names == tuple(part.inputs)
        assert relative_error(torch.from_numpy(session.run(part.inputs)[0]), part.run()["modulation"]) < 0.3
    with pytest.raises(EdgeDiTError, match="both.pte has no method 'forward'; its methods are one, two"):
        open_session(tmp_path / "both.pte", 1)
