"""Export to ExecuTorch: XNNPACK runs nearly all of it, the artefact computes what the model computes, and a bad file is
one clear error.
"""

import importlib.util
import json
import re
from argparse import ArgumentParser

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from edgedit_hf import EdgeDiTPipeline, ExecutorchEdgeDiTTransformer2DModel, OnnxEdgeDiTTransformer2DModel
from edgedit_hf.commands.export import EdgeDiTExportCommand
from edgedit_hf.diffusion import make_scheduler
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.executorch.lower import GROUP, form_of, quantize_linears
from edgedit_hf.export.executorch.xnnpack import XnnpackGELU, XnnpackLayerNorm
from edgedit_hf.export.formats import ExportOptions
from edgedit_hf.export.lowering import lower_denoiser
from edgedit_hf.export.parts import edgedit_parts
from edgedit_hf.export.pipeline import export_pipeline
from edgedit_hf.export.wrappers import DenoiserWrapper
from edgedit_hf.genotype import Genotype
from edgedit_hf.runtimes.runners import SessionRunner, TorchRunner, example_inputs
from edgedit_hf.runtimes.sessions import open_session
from edgedit_hf.runtimes.timing import measure
from edgedit_hf.search_space import SearchSpace


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def images_of(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline([3, 7], generator=torch.Generator().manual_seed(1), output_type="pt").images


def command(*options):
    parser = ArgumentParser()
    EdgeDiTExportCommand(parser.add_subparsers())
    args = parser.parse_args(["edgedit", *map(str, options)])
    return args.func(args).run()


@pytest.fixture(scope="module")
def pipeline(make_transformer):
    """A compressed model: a merged layer with reduced attention, whose output projection has no 4-bit kernel."""
    transformer = make_transformer(num_layers=2, layers=SearchSpace(2, 32, 2).from_code((18,)).to_layers())
    assert transformer.config.layers[0]["attention_dim"] % GROUP
    with torch.no_grad():  # smoother than the fixture's: a network that amplifies rounding says nothing about int8
        for parameter in transformer.parameters():
            parameter.mul_(0.25)
    return EdgeDiTPipeline(transformer, make_scheduler("epsilon"), default_steps=4, default_guidance_scale=1.5)


@pytest.fixture(scope="module")
def fp32(pipeline, tmp_path_factory):
    output = tmp_path_factory.mktemp("export") / "fp32"
    return export_pipeline(pipeline, output, ExportOptions(format="executorch", threads=1, bench_repeats=3))


@pytest.fixture(scope="module")
def int4(pipeline, tmp_path_factory):
    """Through the command line's own class, as optimum-cli calls it."""
    folder = tmp_path_factory.mktemp("export")
    pipeline.save_pretrained(folder / "model")
    options = ("--format", "executorch", "--dtype", "int4", "--batch", 1, "--threads", 1)
    assert command("--model", folder / "model", "--output", folder / "int4", *options) is None
    return folder / "int4"


# -------------------------------------------------------------------- the rewritten network


@pytest.mark.parametrize(
    "config",
    [
        {"layers": SearchSpace(4, 32, 2).from_code((16, 9)).to_layers()},
        {
            "num_classes": 0,
            "timestep_scale": -1e-3,
            "timestep_offset": 1.0,
            "frequency_shift": 1.0,
            "mlp_norm_eps": 1e-5,
        },
        {
            "learned_position": True,
            "position_bias": True,
            "long_skips": [[0, 3], [1, 2]],
            "decoder_start": 2,
            "side_layers": 1,
        },
    ],
    ids=["compressed", "sit", "mdt"],
)
def test_the_rewritten_network_is_the_model(make_transformer, config):
    model = make_transformer(**config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sizes = [(8, 8)] if config.get("learned_position") else [(8, 8), (8, 12)]
    for size, split in ((size, split) for size in sizes for split in (False, True)):
        for part in edgedit_parts(model, size, 3, split):
            form = form_of(part)
            with torch.no_grad():
                assert relative_error(form(*part.inputs.values()), part.run()[part.outputs[0]]) < 1e-5
    quantize_linears(form, "8da8w")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert type(model.blocks[0].attn.to_qkv.weight) is nn.Parameter


def test_norm_and_gelu_are_torchs():
    x = 5 * torch.randn(4, 7, 32)
    assert torch.allclose(XnnpackLayerNorm(32, 1e-6)(x), nn.functional.layer_norm(x, (32,), eps=1e-6), atol=1e-5)
    assert torch.allclose(XnnpackGELU()(x), nn.functional.gelu(x, approximate="tanh"), atol=1e-6)


def test_every_linear_layer_is_quantised_as_far_as_the_scheme_reaches(pipeline):
    (part,) = edgedit_parts(pipeline.transformer, (8, 8), 1, split=False)
    form = form_of(part)
    linears = [layer for layer in form.modules() if isinstance(layer, nn.Linear)]
    odd = sum(layer.in_features % GROUP > 0 for layer in linears)
    assert odd >= 1 and quantize_linears(form, "8da4w")["linear_layers"] == {"8da4w": len(linears) - odd, "8da8w": odd}
    assert all(type(layer.weight).__name__ == "IntxUnpackedToInt8Tensor" for layer in linears)
    assert {str(layer.weight.target_dtype) for layer in linears if layer.in_features % GROUP == 0} == {"torch.int4"}


def test_what_cannot_be_exported_is_an_error(pipeline, make_transformer, tmp_path):
    model = pipeline.transformer
    for options, message in (
        ({"dtype": "int8wo"}, "precision is 'int8wo'; ExecuTorch exports exist as fp32, int8, int4"),
        ({"batch": "dynamic"}, "batch is 'dynamic'; give a number of at least 1"),
        ({"batch": 0}, "batch is 0"),
    ):
        with pytest.raises(EdgeDiTError, match=message):
            lower_denoiser(model, tmp_path / "model.pte", "executorch", **options)
    with pytest.raises(EdgeDiTError, match="bfloat16; export needs float32"):
        lower_denoiser(make_transformer().to(torch.bfloat16), tmp_path / "model.pte", "executorch")
    from peft import LoraConfig

    adapted = make_transformer()
    adapted.add_adapter(LoraConfig(target_modules=["to_qkv"]))
    with pytest.raises(EdgeDiTError, match="fuse_lora"):
        lower_denoiser(adapted, tmp_path / "model.pte", "executorch")
    with pytest.raises(EdgeDiTError, match="opset is 20; operator sets belong to ONNX"):
        export_pipeline(pipeline, tmp_path / "out", ExportOptions(format="executorch", opset=20))
    with pytest.raises(EdgeDiTError, match="format is 'tflite'; the formats are onnx, executorch, coreml"):
        export_pipeline(pipeline, tmp_path / "out", ExportOptions(format="tflite"))
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------- the artefact


def test_fp32_is_the_model_at_every_multiple_of_its_batch(pipeline, fp32):
    artefact = ExecutorchEdgeDiTTransformer2DModel.from_pretrained(fp32, subfolder="transformer", num_threads=1)
    for batch in (2, 6):
        sample, timestep, labels = example_inputs(pipeline.transformer.config, batch).values()
        with torch.no_grad():
            expected = pipeline.transformer(sample, timestep, labels).sample
        assert relative_error(artefact(sample, timestep, labels).sample, expected) < 1e-5
    with torch.no_grad():
        expected = pipeline.transformer(sample, torch.tensor(500), labels).sample
    (found,) = artefact(sample.bfloat16().float(), torch.tensor(500), labels, return_dict=False)
    assert relative_error(found, expected) < 1e-2
    with pytest.raises(
        EdgeDiTError, match="batch is 3, but this artefact was exported for batch 2 and takes multiples of it"
    ):
        artefact(sample[:3], timestep[:3], labels[:3])


@pytest.mark.slow
@pytest.mark.export
def test_images_of_the_loaded_pipelines(pipeline, fp32, int4):
    expected = images_of(pipeline)
    for path, floor in ((fp32, 60), (int4, 15)):
        loaded = DiffusionPipeline.from_pretrained(path)
        assert type(loaded) is EdgeDiTPipeline and type(loaded.transformer) is ExecutorchEdgeDiTTransformer2DModel
        assert -10 * torch.log10((images_of(loaded) - expected).square().mean() + 1e-20) > floor
    loaded.save_pretrained(path.parent / "again")
    again = DiffusionPipeline.from_pretrained(path.parent / "again")
    assert torch.equal(images_of(again), images_of(loaded))
    index = json.loads((path.parent / "again/model_index.json").read_text())
    assert index["transformer"] == ["edgedit_hf", "ExecutorchEdgeDiTTransformer2DModel"]


@pytest.mark.slow
@pytest.mark.export
def test_reports(pipeline, fp32, int4):
    genotype = Genotype.of(pipeline.transformer.config)
    for path, precision, scheme, batch in ((fp32, "fp32", "fp32", 2), (int4, "int4", "8da4w", 1)):
        report = json.loads((path / "verify.json").read_text())
        assert report["passed"] and report["precision"] == scheme and report["genotype"] == genotype.hash
        assert report["steps"] == 4 and report["images"] == 8 and report["guidance_scale"] == 1.5
        bench = json.loads((path / "bench.json").read_text())
        assert bench["precision"] == precision and bench["scheme"] == scheme
        assert (
            bench["file_bytes"]
            == bench["initializer_bytes"]
            == (path / "transformer/executorch/model.pte").stat().st_size
        )
        assert [entry["batch"] for entry in bench["latency"]] == [batch]
        assert set(bench["latency"][0]["timings"]) == {"torch-fp32", f"executorch-{precision}"}
        # Everything with arithmetic on tokens is XNNPACK's; what is left are a look-up and views of one row an image.
        assert bench["delegation"]["delegated"] > 50 > 5 * bench["delegation"]["subgraphs"]
        assert set(bench["delegation"]["portable"]) <= {
            "aten_embedding_default",
            "aten_expand_copy_default",
            "aten_squeeze_copy_dims",
            "aten_unsqueeze_copy_default",
            "dim_order_ops__to_dim_order_copy_default",
        }
        contract = [
            "PORTING.md",
            "bench.json",
            "contract.json",
            "delegation.json",
            "model_index.json",
            "reference.safetensors",
            "sample_min.py",
        ]
        assert sorted(p.name for p in path.iterdir()) == [*contract, "scheduler", "transformer", "verify.json"]
        share = json.loads((path / "delegation.json").read_text())["transformer/executorch/model.pte"]
        assert share["portable"] == bench["delegation"]["portable"] and 0 <= share["portable_share"] <= 0.1
        assert json.loads((path / "transformer/config.json").read_text())["batch"] == batch
    assert json.loads((fp32 / "bench.json").read_text())["file_bytes"] > 1.5 * bench["file_bytes"]


def test_the_file_describes_itself(pipeline, fp32):
    metadata = ExecutorchEdgeDiTTransformer2DModel.from_pretrained(fp32 / "transformer").metadata
    assert Genotype.from_json(json.dumps(metadata["genotype"])) == Genotype.of(pipeline.transformer.config)
    assert metadata["precision"] == metadata["scheme"] == "fp32" and metadata["batch"] == "2"
    assert metadata["config"]["sample_size"] == 8 and "executorch" in metadata["versions"]
    assert metadata["weights"] == json.loads((fp32 / "verify.json").read_text())["weights"]


@pytest.mark.slow
@pytest.mark.export
def test_int8_stands_between(pipeline, tmp_path):
    output = export_pipeline(
        pipeline, tmp_path / "int8", ExportOptions(format="executorch", dtype="int8", threads=1, bench_repeats=2)
    )
    report, bench = (json.loads((output / f"{name}.json").read_text()) for name in ("verify", "bench"))
    assert 1e-4 < report["relative_error"] < 5e-2 and list(bench["linear_layers"]) == ["8da8w"]


def test_threads_of_the_pool(pipeline, fp32):
    """A new pool drops the loaded networks: they would keep a pointer to the old one."""
    from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count

    one, two = (
        ExecutorchEdgeDiTTransformer2DModel.from_pretrained(fp32, subfolder="transformer", num_threads=n)
        for n in (1, 2)
    )
    inputs = tuple(example_inputs(pipeline.transformer.config, 2).values())
    expected = one(*inputs).sample
    assert _threadpool_get_thread_count() == 1
    for artefact, threads in ((two, 2), (one, 1)):
        assert torch.allclose(artefact(*inputs).sample, expected, atol=1e-5)
        assert _threadpool_get_thread_count() == threads
    one.set_threads(2)
    assert torch.allclose(one(*inputs).sample, expected, atol=1e-5) and _threadpool_get_thread_count() == 2
    with pytest.raises(EdgeDiTError, match="threads is 0"):
        one.set_threads(0)
    one.set_threads(1)


def test_runners_measure_the_artefact(pipeline, fp32):
    model, file = pipeline.transformer, fp32 / "transformer/executorch/model.pte"
    inputs, session = example_inputs(model.config, 2), open_session(file, 1)
    runners = {
        "torch-fp32": TorchRunner(DenoiserWrapper(model), inputs, 1),
        "executorch-fp32": SessionRunner(session, inputs),
    }
    assert relative_error(torch.from_numpy(runners["executorch-fp32"]()[0]), runners["torch-fp32"]()) < 1e-5
    timings = measure(runners, warmup=1, repeats=3)
    assert all(timing.median_ms > 0 and timing.threads == 1 for timing in timings.values())
    with pytest.raises(EdgeDiTError, match=r"sample float32 \(4, .* exported for sample float32 \(2, "):
        SessionRunner(session, example_inputs(model.config, 4))


# -------------------------------------------------------------------- gates and files


def test_a_failed_gate_writes_nothing(make_transformer, tmp_path):
    model = make_transformer(num_layers=1)
    with torch.no_grad():
        model.proj_out.bias[0] = torch.nan
    pipe = EdgeDiTPipeline(model, make_scheduler("epsilon"), default_steps=2)
    with pytest.raises(EdgeDiTError, match="NaN or infinite.*nothing was written"):
        export_pipeline(pipe, tmp_path / "out", ExportOptions(format="executorch", threads=1))
    assert list(tmp_path.iterdir()) == []


def test_files_that_do_not_fit(fp32, tmp_path):
    with pytest.raises(EdgeDiTError, match="does not hold config.json and executorch/model.pte.*--format executorch"):
        ExecutorchEdgeDiTTransformer2DModel.from_pretrained(fp32)
    with pytest.raises(EdgeDiTError, match="onnx/model.onnx"):
        OnnxEdgeDiTTransformer2DModel.from_pretrained(fp32 / "transformer")
    ExecutorchEdgeDiTTransformer2DModel.from_pretrained(fp32 / "transformer").save_pretrained(tmp_path)
    content = (tmp_path / "executorch/model.pte").read_bytes()
    for broken in (content[: len(content) // 2], b"", b"not a program" * 100):
        (tmp_path / "executorch/model.pte").write_bytes(broken)
        with pytest.raises(EdgeDiTError, match="ExecuTorch cannot load .*model.pte.*Export it again"):
            ExecutorchEdgeDiTTransformer2DModel.from_pretrained(tmp_path)
    (tmp_path / "executorch/model.pte").write_bytes(content)
    config = json.loads((tmp_path / "config.json").read_text())
    config["layers"][0]["mlp_ratio"] = 3.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EdgeDiTError, match="do not belong together"):
        ExecutorchEdgeDiTTransformer2DModel.from_pretrained(tmp_path)
    with pytest.raises(EdgeDiTError, match="no .pte file"):
        ExecutorchEdgeDiTTransformer2DModel(**config).set_threads(1)


def test_from_a_hub_cache(fp32, make_hub_cache):
    cache = make_hub_cache(fp32, "acme/pte")
    loaded = DiffusionPipeline.from_pretrained("acme/pte", cache_dir=cache, local_files_only=True)
    assert torch.equal(images_of(loaded), images_of(DiffusionPipeline.from_pretrained(fp32)))


def test_a_missing_package_names_the_remedy(pipeline, fp32, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "executorch" else find(name, *rest)
    )
    remedy = re.escape("pip install 'edgedit_hf[executorch]'")
    with pytest.raises(EdgeDiTError, match=remedy):
        export_pipeline(pipeline, tmp_path / "out", ExportOptions(format="executorch"))
    with pytest.raises(EdgeDiTError, match=remedy):
        ExecutorchEdgeDiTTransformer2DModel.from_pretrained(fp32 / "transformer")
    assert list(tmp_path.iterdir()) == []


def test_command_errors_end_in_one_line(tmp_path, capsys):
    for options, message in (
        (("--dtype", "fp16"), "--dtype is 'fp16'; the format executorch exists as fp32, int8, int4"),
        (("--batch", "dynamic"), "batch is 'dynamic'; give a number of at least 1"),
    ):
        with pytest.raises(SystemExit) as stop:
            command("--model", tmp_path / "absent", "--output", tmp_path / "out", "--format", "executorch", *options)
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and message in err
