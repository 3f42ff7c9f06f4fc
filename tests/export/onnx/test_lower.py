"""Export to ONNX: the artefact computes what the model computes, says what it is, loads back, and a failed gate leaves
nothing.
"""

import json
import re
from argparse import ArgumentParser

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import DiffusionPipeline
from onnx import helper, numpy_helper
from peft import LoraConfig

from edgedit_hf import EdgeDiTPipeline, OnnxEdgeDiTTransformer2DModel
from edgedit_hf.commands.export import EdgeDiTExportCommand
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export import verify
from edgedit_hf.export.formats import ExportOptions
from edgedit_hf.export.lowering import lower_denoiser
from edgedit_hf.export.onnx import lower as lowering
from edgedit_hf.export.onnx.lowbit import MIN_QUANTIZED_ELEMENTS, dynamic_int8, gemm_to_matmul
from edgedit_hf.export.onnx.lower import initializer_bytes, lower_onnx, save_onnx
from edgedit_hf.export.parts import edgedit_parts
from edgedit_hf.export.pipeline import export_pipeline
from edgedit_hf.genotype import Genotype
from edgedit_hf.pipelines.loading import with_components
from edgedit_hf.runtimes.runners import example_inputs
from edgedit_hf.runtimes.sessions import open_session
from edgedit_hf.search_space import SearchSpace


def relative_error(a, b) -> float:
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images_of(pipeline):
    return pipeline([3, 7], generator=torch.Generator().manual_seed(1), output_type="pt").images


@pytest.fixture(scope="module")
def pipeline(make_transformer):
    """A compressed model: two merged layers and one each with reduced attention and MLP."""
    genotype = SearchSpace(4, 32, 2).from_code((16, 4 * 2 + 1))
    transformer = make_transformer(layers=genotype.to_layers())
    with torch.no_grad():  # smoother than the fixture's: a network that amplifies rounding says nothing about int8
        for parameter in transformer.parameters():
            parameter.mul_(0.25)
    return quiet(EdgeDiTPipeline(transformer, make_scheduler("epsilon"), default_steps=4, default_guidance_scale=1.5))


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline") / "model"
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def fp32(pipeline, tmp_path_factory):
    output = tmp_path_factory.mktemp("export") / "onnx-fp32"
    return export_pipeline(pipeline, output, ExportOptions(threads=1, bench_batches=(2,), bench_repeats=3))


@pytest.fixture(scope="module")
def int8(folder, tmp_path_factory):
    """Through the command line's own class, as optimum-cli calls it."""
    output = tmp_path_factory.mktemp("export") / "onnx-int8"
    assert command("--model", folder, "--dtype", "int8", "--output", output, "--threads", 1) is None
    return output


def command(*options):
    parser = ArgumentParser()
    EdgeDiTExportCommand(parser.add_subparsers())
    args = parser.parse_args(["edgedit", *map(str, options)])
    return args.func(args).run()


# -------------------------------------------------------------------- what the artefact computes


@pytest.mark.parametrize("batch", [1, 5])
def test_fp32_is_the_model(pipeline, fp32, batch):
    inputs = tuple(example_inputs(pipeline.transformer.config, batch).values())
    artefact = OnnxEdgeDiTTransformer2DModel.from_pretrained(fp32, subfolder="transformer", num_threads=1)
    with torch.no_grad():
        expected = pipeline.transformer(*inputs).sample
    assert relative_error(artefact(*inputs).sample, expected) < 1e-4
    scalar = (inputs[0], torch.tensor(500), inputs[2])  # one integer timestep for the batch, as schedulers give it
    with torch.no_grad():
        expected = pipeline.transformer(*scalar).sample
    (found,) = artefact(*scalar, return_dict=False)
    assert relative_error(found, expected) < 1e-4


def test_images_of_the_loaded_pipeline(pipeline, fp32, int8):
    expected = images_of(pipeline)
    for path, floor in ((fp32, 60), (int8, 25)):
        loaded = quiet(DiffusionPipeline.from_pretrained(path))
        assert type(loaded) is EdgeDiTPipeline and type(loaded.transformer) is OnnxEdgeDiTTransformer2DModel
        assert -10 * torch.log10((images_of(loaded) - expected).square().mean() + 1e-20) > floor


def test_reports(pipeline, fp32, int8):
    genotype = Genotype.of(pipeline.transformer.config)
    for path, precision in ((fp32, "fp32"), (int8, "int8")):
        report = json.loads((path / "verify.json").read_text())
        assert report["passed"] and report["precision"] == precision and report["genotype"] == genotype.hash
        assert len(report["per_timestep"]) == report["steps"] == 4
        assert (
            report["relative_error"] == max(s["relative_error"] for s in report["per_timestep"]) <= report["tolerance"]
        )
        bench = json.loads((path / "bench.json").read_text())
        runners = {"torch-fp32", f"onnxruntime-{precision}"}
        for entry in bench["latency"]:
            assert set(entry["timings"]) == runners
            assert set(entry["speedup"]) == runners - {f"onnxruntime-{precision}"}
            assert all(t["median_ms"] > 0 and t["threads"] == 1 for t in entry["timings"].values())
        assert bench["file_bytes"] == (path / "transformer/onnx/model.onnx").stat().st_size > bench["initializer_bytes"]
        contract = [
            "PORTING.md",
            "bench.json",
            "contract.json",
            "model_index.json",
            "reference.safetensors",
            "sample_min.py",
        ]
        assert sorted(p.name for p in path.iterdir()) == [*contract, "scheduler", "transformer", "verify.json"]
    assert [entry["batch"] for entry in bench["latency"]] == [2, 8]


def test_attention_is_one_operator_and_the_model_keeps_its_own(pipeline, fp32):
    nodes = [node.op_type for node in onnx.load(str(fp32 / "transformer/onnx/model.onnx")).graph.node]
    assert nodes.count("Attention") == 3 and nodes.count("Transpose") == 2  # the two of the patches
    assert {type(block.attn.processor).__name__ for block in pipeline.transformer.blocks} == {"EdgeDiTAttnProcessor"}


def test_the_file_describes_itself(pipeline, fp32, int8):
    for path, precision in ((fp32, "fp32"), (int8, "int8")):
        entries = onnx.load(path / "transformer/onnx/model.onnx", load_external_data=False).metadata_props
        metadata = {entry.key.removeprefix("edgedit."): entry.value for entry in entries}
        assert metadata["precision"] == precision and metadata["batch"] == "dynamic"
        genotype = Genotype.from_json(metadata["genotype"])
        assert genotype == Genotype.of(pipeline.transformer.config)
        assert json.loads(metadata["config"])["sample_size"] == 8 and "torch" in json.loads(metadata["versions"])
    content = (fp32 / "transformer/onnx/model.onnx").read_bytes()
    assert b"site-packages" not in content and b".py" not in content  # no paths of the machine that made it
    artefact = OnnxEdgeDiTTransformer2DModel.from_pretrained(fp32 / "transformer")
    assert artefact.metadata["weights"] == metadata["weights"] and artefact.metadata["config"]["layers"]


@pytest.mark.slow
@pytest.mark.export
def test_every_parametrisation(make_transformer, tmp_path):
    """Unconditional flow matching, and a learned variance with a batch of its own."""
    flow = make_transformer(
        num_classes=0, prediction_type="flow_prediction", layers=Genotype.original(1, 32, 2).to_layers()
    )
    pipe = quiet(EdgeDiTPipeline(flow, make_scheduler("flow_prediction"), default_steps=2))
    loaded = DiffusionPipeline.from_pretrained(
        export_pipeline(pipe, tmp_path / "flow", ExportOptions(threads=1, bench_repeats=2))
    )
    expected = pipe(batch_size=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
    found = quiet(loaded)(batch_size=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert torch.allclose(found, expected, atol=1e-4)
    with pytest.raises(EdgeDiTError, match="num_classes=0, but class_labels were given"):
        loaded.transformer(torch.zeros(1, 1, 8, 8), torch.tensor(1), torch.tensor([0]))

    sigma = make_transformer(learn_sigma=True, layers=Genotype.original(1, 32, 2).to_layers())
    pipe = quiet(EdgeDiTPipeline(sigma, make_scheduler("epsilon"), default_steps=2))
    output = export_pipeline(pipe, tmp_path / "sigma", ExportOptions(batch=4, threads=1, bench_repeats=2))
    report = json.loads((output / "verify.json").read_text())
    assert report["images"] == 8 and report["guidance_scale"] > 1  # in four forwards of the file's batch
    assert [e["batch"] for e in json.loads((output / "bench.json").read_text())["latency"]] == [4]
    artefact = DiffusionPipeline.from_pretrained(output).transformer
    assert artefact(torch.zeros(4, 1, 8, 8), torch.tensor(1), torch.zeros(4, dtype=torch.long)).sample.shape == (
        4,
        2,
        8,
        8,
    )
    with pytest.raises(EdgeDiTError, match="batch is 3, but this artefact was exported for batch 4"):
        artefact(torch.zeros(3, 1, 8, 8), torch.tensor(1), torch.zeros(3, dtype=torch.long))


# -------------------------------------------------------------------- int8


def test_int8_shrinks_every_linear_layer(make_transformer, tmp_path):
    layers = Genotype.original(2, 128, 4).to_layers()
    model = make_transformer(hidden_size=128, num_attention_heads=4, num_layers=2, layers=layers)
    source, target = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    for path in (source, target):
        lower_denoiser(model, path, dtype=path.stem)
    before, after = initializer_bytes(source), initializer_bytes(target)
    assert sum(before.values()) / sum(after.values()) >= 3
    proto = onnx.load(str(target))
    # What stays fp32 with a thousand numbers or more: position table [N, D] and label table; the rest are biases and
    # scales.
    large = [
        list(t.dims)
        for t in proto.graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 6 * 128
    ]
    assert sorted(large) == [[1, 16, 128], [11, 128]] or sorted(large) == [[11, 128], [16, 128]]
    assert not [node.op_type for node in proto.graph.node if node.op_type == "Gemm"]
    int8_elements = after["uint8"]
    linear = [
        m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight.numel() >= MIN_QUANTIZED_ELEMENTS
    ]
    assert int8_elements >= sum(m.weight.numel() for m in linear)


def test_int8_does_not_saturate(tmp_path):
    """Large weights of one sign on large inputs: where products are added up in 16 bits, half of the sum is lost."""
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
            "product",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4, 128])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4, 64])],
            [numpy_helper.from_array(np.ones((128, 64), np.float32), "w")],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    quantized = dynamic_int8(proto, external=False)
    session = onnxruntime.InferenceSession(quantized.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.ones((4, 128), np.float32)})
    np.testing.assert_allclose(y, 128.0, rtol=1e-3)


def test_gemm_to_matmul_changes_no_number(pipeline, fp32, tmp_path):
    path = fp32 / "transformer/onnx/model.onnx"
    proto = onnx.load(str(path))
    gemms = sum(node.op_type == "Gemm" for node in proto.graph.node)
    gemm_to_matmul(proto)
    assert gemms > 0 and not any(node.op_type == "Gemm" for node in proto.graph.node)
    onnx.checker.check_model(proto)
    inputs = example_inputs(pipeline.transformer.config, 3)
    rewritten = open_session(save_onnx(proto, tmp_path / "rewritten.onnx"), 1)
    assert np.allclose(rewritten.run(inputs)[0], open_session(path, 1).run(inputs)[0], rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------- big models, opsets, batches


@pytest.mark.slow
@pytest.mark.export
def test_big_weights_stand_beside_the_file(pipeline, fp32, tmp_path, monkeypatch):
    monkeypatch.setattr(lowering, "EXTERNAL_DATA_BYTES", 0)
    (tmp_path / "transformer").mkdir()
    artefact = OnnxEdgeDiTTransformer2DModel.from_pretrained(fp32, subfolder="transformer")
    artefact.save_config(tmp_path / "transformer")
    path = save_onnx(onnx.load(str(artefact.path)), tmp_path / "transformer/onnx/model.onnx")
    assert path.with_name("model.onnx.data").stat().st_size > path.stat().st_size
    inputs = tuple(example_inputs(pipeline.transformer.config, 2).values())
    external = OnnxEdgeDiTTransformer2DModel.from_pretrained(tmp_path / "transformer")
    assert torch.equal(external(*inputs).sample, artefact(*inputs).sample)
    external.save_pretrained(tmp_path / "copy")
    assert sorted(p.name for p in (tmp_path / "copy/onnx").iterdir()) == ["model.onnx", "model.onnx.data"]
    quantized = tmp_path / "int8/model.onnx"
    lower_denoiser(pipeline.transformer, quantized, dtype="int8")
    assert quantized.with_name("model.onnx.data").exists()
    monkeypatch.undo()
    lower_denoiser(pipeline.transformer, tmp_path / "i.onnx", dtype="int8")
    assert initializer_bytes(quantized)["uint8"] == initializer_bytes(tmp_path / "i.onnx")["uint8"]


@pytest.mark.parametrize(
    "options, message", [({"opset": 11}, "opset is 11"), ({"batch": 0}, "batch is 0"), ({"batch": "two"}, "'two'")]
)
def test_bad_options(pipeline, tmp_path, options, message):
    with pytest.raises(EdgeDiTError, match=message):
        export_pipeline(pipeline, tmp_path / "out", ExportOptions(**options))
    assert list(tmp_path.iterdir()) == []


def test_older_opsets_and_half_precision(make_transformer, tmp_path):
    model = make_transformer(layers=Genotype.original(1, 32, 2).to_layers())
    path = tmp_path / "18.onnx"
    (part,) = edgedit_parts(model, (8, 8), 2, split=False)
    lower_onnx(part, path, "fp32", {}, opset=18)
    assert "Attention" not in {node.op_type for node in onnx.load(str(path)).graph.node}
    inputs = example_inputs(model.config, 3)
    with torch.no_grad():
        expected = model(*inputs.values()).sample
    assert relative_error(open_session(path, 1).run(inputs)[0], expected) < 1e-4
    with pytest.raises(EdgeDiTError, match="bfloat16; export needs float32"):
        lower_denoiser(model.to(torch.bfloat16), tmp_path / "bf16.onnx")
    model.float().add_adapter(LoraConfig(target_modules=["to_qkv"]))
    with pytest.raises(EdgeDiTError, match="fuse_lora"):
        lower_denoiser(model, tmp_path / "adapted.onnx")


# -------------------------------------------------------------------- gates


def test_a_failed_gate_writes_nothing_and_removes_nothing(make_transformer, tmp_path):
    model = make_transformer(layers=Genotype.original(1, 32, 2).to_layers())
    with torch.no_grad():
        model.proj_out.bias[0] = torch.nan
    pipe = quiet(EdgeDiTPipeline(model, make_scheduler("epsilon"), default_steps=2))
    older = tmp_path / "out"
    older.mkdir()
    (older / "model_index.json").write_text('{"_class_name": "EdgeDiTPipeline"}')
    with pytest.raises(EdgeDiTError, match="NaN or infinite.*nothing was written"):
        export_pipeline(pipe, older, ExportOptions(threads=1, overwrite=True))
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and [p.name for p in older.iterdir()] == ["model_index.json"]


def test_gates_quote_the_error_and_the_tolerance(fp32):
    found = json.loads((fp32 / "verify.json").read_text())
    assert verify.check({**found, "relative_error": 9e-4}, "fp32")["passed"]
    with pytest.raises(EdgeDiTError, match=r"relative error of 0.002 at timestep \d+; the tolerance is 0.001"):
        verify.check({**found, "relative_error": 2e-3}, "fp32")
    assert verify.check({**found, "relative_error": 2e-3}, "fp32", tolerance=1e-2)["passed"]
    with pytest.raises(EdgeDiTError, match="reach 20.0 dB.*gate is 25 dB"):
        verify.check({**found, "psnr_db": 20.0}, "int8")
    with pytest.raises(EdgeDiTError, match="NaN"):
        verify.check({**found, "finite": False}, "fp32")
    assert verify.check({**found, "psnr_db": None}, "fp32")["passed"]  # equal images


def test_the_comparison_sees_a_wrong_artefact(pipeline, fp32, make_transformer):
    other = quiet(EdgeDiTPipeline(make_transformer(seed=1), pipeline.scheduler, default_steps=2))
    artefact = OnnxEdgeDiTTransformer2DModel.from_pretrained(fp32, subfolder="transformer")
    found = verify.compare(other, with_components(other, transformer=artefact), num_images=2)
    assert found["finite"] and found["relative_error"] > 0.1 and found["steps"] == 2
    assert not other.transformer._forward_hooks


def test_what_is_in_the_way_stays(pipeline, fp32, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(EdgeDiTError, match="not a pipeline folder; it is left as it is"):
        export_pipeline(pipeline, tmp_path, ExportOptions(overwrite=True))
    with pytest.raises(EdgeDiTError, match="--overwrite"):
        export_pipeline(pipeline, fp32)
    assert (tmp_path / "notes.txt").read_text() == "mine" and (fp32 / "verify.json").exists()
    with pytest.raises(EdgeDiTError, match="an export already"):
        export_pipeline(fp32, tmp_path / "again")


# -------------------------------------------------------------------- the component


def test_the_component_has_the_models_config(pipeline, fp32):
    artefact = OnnxEdgeDiTTransformer2DModel.from_pretrained(fp32 / "transformer")
    of_model = {key: value for key, value in pipeline.transformer.config.items() if not key.startswith("_")}
    assert set(artefact.config) - set(of_model) == {"precision", "batch", "split", "size"}
    assert {key: artefact.config[key] for key in of_model} == of_model


def test_component_calls(pipeline, fp32):
    artefact = OnnxEdgeDiTTransformer2DModel.from_pretrained(fp32, subfolder="transformer", num_threads=1)
    assert artefact.device == torch.device("cpu") and artefact.dtype == torch.float32
    sample, timestep, labels = example_inputs(pipeline.transformer.config, 2).values()
    before = artefact(sample, timestep, labels).sample
    artefact.set_threads(2)
    assert artefact.sessions["denoiser"].session.get_session_options().intra_op_num_threads == 2
    assert torch.allclose(artefact(sample, timestep, labels).sample, before, atol=1e-5)
    assert artefact(sample.bfloat16(), timestep, labels).sample.dtype == torch.bfloat16
    for arguments, message in (
        ((sample, timestep), "num_classes=10, but no class_labels"),
        ((sample, timestep, labels + 10), "they must be from 0 to 10"),
        ((sample[..., :4], timestep, labels), r"shape \(2, 1, 8, 4\); this artefact takes \(batch, 1, 8, 8\)"),
    ):
        with pytest.raises(EdgeDiTError, match=message):
            artefact(*arguments)


def test_component_files_that_do_not_fit(fp32, tmp_path):
    with pytest.raises(EdgeDiTError, match="does not hold config.json and onnx/model.onnx"):
        OnnxEdgeDiTTransformer2DModel.from_pretrained(fp32)
    with pytest.raises(EdgeDiTError, match="NoSuchProvider.*CPUExecutionProvider"):
        OnnxEdgeDiTTransformer2DModel.from_pretrained(fp32 / "transformer", provider="NoSuchProvider")
    artefact = OnnxEdgeDiTTransformer2DModel.from_pretrained(fp32 / "transformer")
    artefact.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["layers"][0]["mlp_ratio"] = 3.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EdgeDiTError, match="do not belong together"):
        OnnxEdgeDiTTransformer2DModel.from_pretrained(tmp_path)
    (tmp_path / "onnx/model.onnx").write_bytes((tmp_path / "onnx/model.onnx").read_bytes()[:1000])
    with pytest.raises(EdgeDiTError, match="cannot load.*Export it again"):
        OnnxEdgeDiTTransformer2DModel.from_pretrained(tmp_path)
    with pytest.raises(EdgeDiTError, match="no .onnx file"):
        OnnxEdgeDiTTransformer2DModel(**config).set_threads(1)


def test_saving_the_loaded_pipeline_keeps_it_whole(fp32, tmp_path):
    loaded = quiet(DiffusionPipeline.from_pretrained(fp32))
    loaded.save_pretrained(tmp_path / "again")
    again = quiet(DiffusionPipeline.from_pretrained(tmp_path / "again"))
    assert torch.equal(images_of(again), images_of(loaded))
    index = json.loads((tmp_path / "again/model_index.json").read_text())
    assert index["transformer"] == ["edgedit_hf", "OnnxEdgeDiTTransformer2DModel"]


FROM_THE_HUB = """
import sys
from pathlib import Path
import torch
import edgedit_hf
from diffusers import DiffusionPipeline
from onnx import helper, numpy_helper

cache, expected = sys.argv[1], torch.load(sys.argv[2], weights_only=True)

def check(pipeline, kind):
    assert type(pipeline).__name__ == "EdgeDiTPipeline" and type(pipeline.transformer).__name__ == kind
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([3, 7], generator=torch.Generator().manual_seed(1), output_type="pt").images
    assert torch.allclose(images, expected, atol=1e-3), (images - expected).abs().max()

# Downloaded from a Hub: what diffusers' filter leaves out would be missing here.
check(DiffusionPipeline.from_pretrained("acme/onnx"), "OnnxEdgeDiTTransformer2DModel")
check(DiffusionPipeline.from_pretrained("acme/torch"), "EdgeDiTTransformer2DModel")
found = {}
for name in ("onnx", "torch"):
    folder = next(Path(sys.argv[3], f"models--acme--{name}", "snapshots").iterdir())
    found[name] = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
print(found["onnx"], found["torch"], sep="\\n")

# From a cache, without network.
offline = {"cache_dir": cache, "local_files_only": True}
check(DiffusionPipeline.from_pretrained("acme/cached", **offline), "OnnxEdgeDiTTransformer2DModel")
model = edgedit_hf.OnnxEdgeDiTTransformer2DModel.from_pretrained(
    "acme/cached", subfolder="transformer", num_threads=1, **offline
)
assert model.num_threads == 1
"""


@pytest.mark.slow
@pytest.mark.export
def test_from_the_hub_and_from_its_cache(
    make_transformer, make_hub_cache, make_hub_server, run_python, tmp_path, monkeypatch
):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=1, layers_per_block=1).eval()
    model = make_transformer(layers=Genotype.original(1, 32, 2).to_layers())
    pipe = quiet(EdgeDiTPipeline(model, make_scheduler("epsilon"), vae, default_steps=2))
    pipe.save_pretrained(tmp_path / "torch")
    # With the weights beside the file, as a big model has them: the filter must keep both.
    monkeypatch.setattr(lowering, "EXTERNAL_DATA_BYTES", 0)
    export_pipeline(tmp_path / "torch", tmp_path / "onnx", ExportOptions(threads=1, bench_repeats=2))
    torch.save(images_of(pipe), tmp_path / "expected.pt")
    cache = make_hub_cache(tmp_path / "onnx", "acme/cached")
    env = make_hub_server({"acme/onnx": tmp_path / "onnx", "acme/torch": tmp_path / "torch"})
    out = run_python(FROM_THE_HUB, cache, tmp_path / "expected.pt", env["HF_HUB_CACHE"], env=env, quiet=True)
    onnx_files, torch_files = out.splitlines()[-2:]
    needed = ["model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json"]
    for name in [
        *needed,
        "transformer/onnx/model.onnx",
        "transformer/onnx/model.onnx.data",
        "vae/onnx/decoder.onnx",
        "vae/onnx/decoder.onnx.data",
    ]:
        assert repr(name) in onnx_files
    for name in [*needed, "transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"]:
        assert repr(name) in torch_files


def test_an_incomplete_cache_is_noticed(fp32, make_hub_cache):
    """The file list says that the ONNX file belongs to the download: a snapshot without it is no pipeline."""
    cache = make_hub_cache(fp32, "acme/partial")
    (missing,) = cache.glob("models--acme--partial/snapshots/*/transformer/onnx/model.onnx")
    missing.unlink()
    with pytest.raises(Exception, match="model.onnx"):
        DiffusionPipeline.from_pretrained("acme/partial", cache_dir=cache, local_files_only=True)


# -------------------------------------------------------------------- the command


def test_command_errors_end_in_one_line(tmp_path, capsys):
    for options, message in (
        (("--format", "tflite"), "--format is 'tflite'; the formats are onnx, executorch, coreml"),
        (
            ("--dtype", "fp16", "--format", "executorch"),
            "--dtype is 'fp16'; the format executorch exists as fp32, int8, int4",
        ),
        ((), "There is no pipeline in"),
    ):
        with pytest.raises(SystemExit) as stop:
            command("--model", tmp_path / "absent", "--output", tmp_path / "out", *options)
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert re.search(message, err), err
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(SystemExit):
        command("--model", tmp_path / "foreign", "--output", tmp_path / "out")
    assert "foreign" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_help_loads_no_torch(run_python):
    out = run_python(
        "import sys\nfrom optimum.commands.optimum_cli import main\nsys.argv = ['optimum-cli', 'export', 'edgedit', "
        "'--help']\ntry:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\nassert 'torch' not in "
        "sys.modules"
    )
    assert "--trust-remote-code" in out and "--tolerance" in out
