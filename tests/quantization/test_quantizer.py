"""Quantised models as files: saved, loaded and refused through diffusers, of either family, alone and in pipelines."""

import json
import math

import pytest
import torch
from diffusers import (
    BitsAndBytesConfig,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    PipelineQuantizationConfig,
    TorchAoConfig,
)
from safetensors.torch import load_file, save_file
from stored_bytes import stored_bytes

from edgedit_hf import (
    EdgeDiTPipeline,
    EdgeDiTQuantizationConfig,
    EdgeDiTTransformer2DModel,
    ElasticDiTPipeline,
    ElasticDiTTransformer2DModel,
    dequantize_model,
    quantize_model,
)
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.quantization.layers import quantizable_layers, quantized_weights, set_empty_weight, weight_shape
from edgedit_hf.quantization.quantizer import mark_quantized
from edgedit_hf.quantization.weights import spec_bits

WEIGHTS = "diffusion_pytorch_model.safetensors"
INPUT = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([5.0, 500.0])
LABELS = torch.tensor([1, 2])
TEXT = [torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2)), None]
MIXED = [
    {"scheme": "palette", "bits": 4, "rows_per_palette": 16},
    {"scheme": "palette", "bits": 8, "rows_per_palette": 0},
    {"scheme": "affine", "bits": 4, "group_size": 16, "symmetric": False},
    {"scheme": "affine", "bits": 8, "group_size": 0, "symmetric": True},
    {"scheme": "nf4", "block": 64},
]


def mixed_plan(model) -> dict:
    return {name: MIXED[index % len(MIXED)] for index, name in enumerate(quantizable_layers(model))}


def run(model, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    noisy, timestep = INPUT
    extra = (LABELS,) if isinstance(model, EdgeDiTTransformer2DModel) else (TEXT,)
    with torch.no_grad():
        return model(noisy.to(dtype), timestep, *extra).sample


@pytest.fixture(scope="module")
def saved(make_transformer, tmp_path_factory):
    """By family: the plain model, its quantised form, and the folders of both."""
    torch.manual_seed(0)
    elastic = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug").eval()
    for parameter in elastic.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    models = {}
    for family, plain in (("edgedit", make_transformer()), ("elastic", elastic)):
        folder = tmp_path_factory.mktemp(family)
        plain.save_pretrained(folder / "plain")
        quantized = type(plain).from_pretrained(folder / "plain")
        quantize_model(quantized, mixed_plan(quantized))
        quantized.save_pretrained(folder / "quantized")
        models[family] = plain, quantized, folder
    return models


FAMILIES = pytest.mark.parametrize("family", ["edgedit", "elastic"])


@FAMILIES
def test_a_quantised_model_is_saved_and_loaded(saved, family, tmp_path):
    _, quantized, folder = saved[family]
    loaded, info = type(quantized).from_pretrained(folder / "quantized", output_loading_info=True)
    assert torch.equal(run(loaded), run(quantized)) and not info["missing_keys"]
    assert {name: weight.spec() for name, weight in quantized_weights(loaded).items()} == {
        name: weight.spec() for name, weight in quantized_weights(quantized).items()
    }
    loaded.save_pretrained(tmp_path)
    first, again = (load_file(path / WEIGHTS) for path in (folder / "quantized", tmp_path))
    assert list(first) == list(again) and all(torch.equal(first[name], again[name]) for name in first)
    configs = [
        json.loads((path / "config.json").read_text())["quantization_config"]
        for path in (folder / "quantized", tmp_path)
    ]
    assert configs[0] == configs[1] and configs[0]["quant_method"] == "edgedit"


@FAMILIES
def test_the_file_is_as_small_as_its_formula_says(saved, family):
    plain, quantized, folder = saved[family]
    content = (folder / "quantized" / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert len(content) - header == stored_bytes(
        plain, {name: weight.spec() for name, weight in quantized_weights(quantized).items()}
    )


@FAMILIES
def test_shards(saved, family, tmp_path):
    _, quantized, _ = saved[family]
    quantized.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(run(type(quantized).from_pretrained(tmp_path)), run(quantized))


@FAMILIES
def test_loading_in_bf16_rounds_no_palette(saved, family):
    _, quantized, folder = saved[family]
    loaded = type(quantized).from_pretrained(folder / "quantized", torch_dtype=torch.bfloat16)
    for name, weight in quantized_weights(loaded).items():
        assert all(
            torch.equal(tensor, quantized_weights(quantized)[name].tensors()[key])
            for key, tensor in weight.tensors().items()
        )
    exact, rounded = run(quantized), run(loaded, torch.bfloat16)
    assert loaded.dtype == rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 0.05 * exact.norm()
    # A cast and its undoing lose nothing but what the biases lost.
    assert (run(loaded.to(torch.float32)) - exact).norm() < 0.02 * exact.norm()


@FAMILIES
def test_unpacking_at_load(saved, family, tmp_path):
    plain, quantized, folder = saved[family]
    loaded = type(plain).from_pretrained(
        folder / "quantized", quantization_config=EdgeDiTQuantizationConfig(dequantize=True)
    )
    assert set(loaded.state_dict()) == set(plain.state_dict()) and "quantization_config" not in loaded.config
    assert all(type(module) is type(plain.get_submodule(name)) for name, module in loaded.named_modules())
    assert torch.allclose(run(loaded), run(quantized), atol=1e-6)
    loaded.save_pretrained(tmp_path)
    assert torch.equal(run(type(plain).from_pretrained(tmp_path)), run(loaded))
    with pytest.raises(ValueError, match="quantize"):
        type(plain).from_pretrained(folder / "plain", quantization_config=EdgeDiTQuantizationConfig(dequantize=True))
    with pytest.raises(EdgeDiTError, match="dequantize=True and specs"):
        EdgeDiTQuantizationConfig(default={"scheme": "nf4"}, dequantize=True)


@FAMILIES
def test_quantising_while_loading(saved, family, tmp_path):
    plain, _, folder = saved[family]
    config = EdgeDiTQuantizationConfig(layers={"proj_out": {"scheme": "affine", "bits": 8}}, default={"scheme": "nf4"})
    loaded = type(plain).from_pretrained(folder / "plain", quantization_config=config)
    schemes = {name: weight.scheme for name, weight in quantized_weights(loaded).items()}
    assert (
        set(schemes) == set(quantizable_layers(plain))
        and schemes.pop("proj_out") == "affine"
        and set(schemes.values()) == {"nf4"}
    )
    loaded.save_pretrained(tmp_path)
    assert torch.equal(run(type(plain).from_pretrained(tmp_path)), run(loaded))
    assert "EdgeDiTQuantizationConfig" in repr(config)
    with pytest.raises(ValueError, match="is quantised already .edgedit.; load it without"):
        type(plain).from_pretrained(tmp_path, quantization_config=config)


@pytest.mark.parametrize("subnet", ["tiny", "full"])
def test_a_subnet_of_a_quantised_supernet_is_loaded_alone(saved, subnet, tmp_path):
    _, quantized, folder = saved["elastic"]
    alone = ElasticDiTTransformer2DModel.from_pretrained(folder / "quantized", subnet=subnet)
    assert torch.equal(run(alone), run(quantized.extract_subnet(subnet)))
    alone.save_pretrained(tmp_path)
    assert torch.equal(run(ElasticDiTTransformer2DModel.from_pretrained(tmp_path)), run(alone))


@pytest.fixture(scope="module")
def pipeline_folder(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    plain, quantized, _ = saved["edgedit"]
    for name, model in (("plain", plain), ("quantized", quantized)):
        EdgeDiTPipeline(model, DDIMScheduler()).save_pretrained(folder / name)
    return folder


def sample(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(class_labels=[1, 2], latents=INPUT[0], num_inference_steps=3, output_type="pt").images


def test_a_quantised_pipeline_is_saved_loaded_and_samples(saved, pipeline_folder):
    loaded = DiffusionPipeline.from_pretrained(pipeline_folder / "quantized")
    assert type(loaded) is EdgeDiTPipeline and quantized_weights(loaded.transformer)
    assert torch.equal(sample(loaded), sample(EdgeDiTPipeline(saved["edgedit"][1], DDIMScheduler())))


def test_code_is_not_bundled_with_weights_that_it_cannot_read(saved, tmp_path):
    pipelines = (
        EdgeDiTPipeline(saved["edgedit"][1], DDIMScheduler()),
        ElasticDiTPipeline(saved["elastic"][1], FlowMatchEulerDiscreteScheduler()),
    )
    for pipeline in pipelines:
        with pytest.raises(ValueError, match="Only the package edgedit_hf can load quantised weights"):
            pipeline.save_pretrained(tmp_path / "bundle", bundle_code=True)
    assert not (tmp_path / "bundle").exists()


def test_a_pipeline_is_quantised_or_unpacked_while_loading(pipeline_folder):
    nf4 = PipelineQuantizationConfig(
        quant_mapping={"transformer": EdgeDiTQuantizationConfig(default={"scheme": "nf4"})}
    )
    loaded = DiffusionPipeline.from_pretrained(pipeline_folder / "plain", quantization_config=nf4)
    assert {weight.scheme for weight in quantized_weights(loaded.transformer).values()} == {"nf4"}
    plain = PipelineQuantizationConfig(quant_mapping={"transformer": EdgeDiTQuantizationConfig(dequantize=True)})
    loaded = DiffusionPipeline.from_pretrained(pipeline_folder / "quantized", quantization_config=plain)
    assert not quantized_weights(loaded.transformer)
    with pytest.raises(ValueError, match="could not be found"):
        PipelineQuantizationConfig(quant_mapping={"transformer": object()})


def test_modulation_of_a_quantised_model(saved, tmp_path):
    _, quantized, _ = saved["edgedit"]
    table = quantized.precompute_modulation(INPUT[1][:1], LABELS)
    with torch.no_grad():
        found = quantized(INPUT[0], None, modulation=table[0]).sample
        expected = quantized(INPUT[0], INPUT[1][:1].expand(2), LABELS).sample
    assert torch.allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="dequantise them"):
        quantized.offload_modulation(tmp_path / "modulation.safetensors")


# ---------------------------------------------------------------- files that do not fit


def damage(folder, target, tensors=None, layers=None):
    """A copy of a quantised model with changed tensors (`None` drops one) or layer specs."""
    target.mkdir()
    state = {**load_file(folder / WEIGHTS), **(tensors or {})}
    save_file(
        {name: tensor for name, tensor in state.items() if tensor is not None},
        target / WEIGHTS,
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["layers"].update(layers or {})
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_files_that_do_not_fit_are_one_clear_error(saved, tmp_path):
    _, quantized, folder = saved["edgedit"]
    source, load = folder / "quantized", EdgeDiTTransformer2DModel.from_pretrained
    weight = quantized_weights(quantized)["proj_out"]
    assert weight.scheme == "nf4", "the specs below are for this layer"
    with pytest.raises(EdgeDiTError, match="names the layer 'blocks.9.mlp', which"):
        load(damage(source, tmp_path / "a", layers={"blocks.9.mlp": weight.spec()}))
    with pytest.raises(EdgeDiTError, match="scheme 'int3'"):
        load(damage(source, tmp_path / "b", layers={"proj_out": {"scheme": "int3"}}))
    with pytest.raises(EdgeDiTError, match=r"does not fit the layer 'proj_out'.*shape \(3, 3\)"):
        load(damage(source, tmp_path / "c", layers={"proj_out": {**weight.spec(), "shape": [3, 3]}}))
    with pytest.raises(
        EdgeDiTError, match=r"proj_out.weight_absmax in the file is torch.float16 of shape \(2,\).*of shape \(4,\)"
    ):
        load(damage(source, tmp_path / "d", layers={"proj_out": {**weight.spec(), "block": 32}}))
    with pytest.raises(EdgeDiTError, match="weight_absmax in the file is torch.float32"):
        load(damage(source, tmp_path / "e", {"proj_out.weight_absmax": weight.absmax.float()}))
    with pytest.raises(ValueError, match=r"1 missing \(proj_out.weight_absmax\), 0 unexpected"):
        load(damage(source, tmp_path / "f", {"proj_out.weight_absmax": None}))
    with pytest.raises(ValueError, match=r"0 missing \(none\), 1 unexpected \(proj_out.weight\)"):
        load(damage(source, tmp_path / "g", {"proj_out.weight": weight.dequantize()}))
    with pytest.raises(EdgeDiTError, match="weight_absmax in the file"):
        load(damage(source, tmp_path / "i", layers={"proj_out": {**weight.spec(), "block": 20_000_000_000}}))
    grid = next(
        name for name, found in quantized_weights(quantized).items() if found.scheme == "affine" and found.bits == 4
    )
    with pytest.raises(EdgeDiTError, match="weight_scale in the file"):
        load(
            damage(
                source,
                tmp_path / "j",
                layers={grid: {**quantized_weights(quantized)[grid].spec(), "group_size": 10**9}},
            )
        )
    for number, (changes, said) in enumerate(
        [({"layers": 3}, "layers of the quantization_config are 3"), ({"bits": 4}, "the key 'bits'")]
    ):
        folder = damage(source, tmp_path / f"k{number}")
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"].update(changes)
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(EdgeDiTError, match=said):
            load(folder)
    cut = damage(source, tmp_path / "h")
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(OSError, match="Unable to load weights from checkpoint file"):
        load(cut)


# ---------------------------------------------------------------- other libraries' quantisers


@pytest.mark.parametrize(
    "config", [BitsAndBytesConfig(load_in_4bit=True), BitsAndBytesConfig(load_in_8bit=True)], ids=["4bit", "8bit"]
)
@FAMILIES
@pytest.mark.skipif(torch.cuda.is_available(), reason="bitsandbytes works here")
def test_bitsandbytes_without_a_gpu_names_what_works(saved, family, config):
    plain, _, folder = saved[family]
    with pytest.raises(ValueError, match="works with a GPU only.*EdgeDiTQuantizationConfig"):
        type(plain).from_pretrained(folder / "plain", quantization_config=config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name, options, allowed",
    [("Int8WeightOnlyConfig", {}, 0.05), ("IntxWeightOnlyConfig", {"weight_dtype": torch.int4}, 0.6)],
)
def test_torchao_works_on_cpus(saved, name, options, allowed, dtype, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    plain, _, folder = saved["edgedit"]
    config = TorchAoConfig(getattr(quantization, name)(**options))
    loaded = EdgeDiTTransformer2DModel.from_pretrained(folder / "plain", quantization_config=config, torch_dtype=dtype)
    loaded.fuse_gelu()  # quietly not done: the fused product takes plain weights
    assert (run(loaded, dtype) - run(plain)).norm() < allowed * run(plain).norm()
    loaded.save_pretrained(tmp_path)
    again = EdgeDiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert torch.equal(run(again, dtype), run(loaded, dtype))


def test_torchao_works_on_sub_networks(saved, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    plain, _, folder = saved["elastic"]
    # torchao's int8 fails on a layer with one input, which the patches of this tiny net are.
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=["patch_embed"])
    loaded = ElasticDiTTransformer2DModel.from_pretrained(
        folder / "plain", quantization_config=config, torch_dtype=torch.float32
    )
    loaded.save_pretrained(tmp_path)
    alone = ElasticDiTTransformer2DModel.from_pretrained(tmp_path, subnet="tiny")
    loaded.set_active_subnet("tiny")
    assert torch.allclose(run(alone), run(loaded), rtol=1e-4, atol=1e-4 * float(run(loaded).abs().max()))
    alone.save_pretrained(tmp_path / "alone")
    assert torch.equal(run(ElasticDiTTransformer2DModel.from_pretrained(tmp_path / "alone")), run(alone))
    expected = run(plain.extract_subnet("tiny"))
    assert (run(loaded) - expected).norm() < 0.1 * expected.norm()


# ---------------------------------------------------------------- whichever is imported first, and the large models

ORDER = """
import sys
{imports}
assert not any("edgedit_hf.quantization" in name for name in sys.modules)
model = edgedit_hf.EdgeDiTTransformer2DModel.from_pretrained(sys.argv[1] + "/transformer")
from diffusers import DiffusionPipeline
from edgedit_hf.quantization.layers import quantized_weights
loaded = DiffusionPipeline.from_pretrained(sys.argv[1]).transformer
assert quantized_weights(model).keys() == quantized_weights(loaded).keys() != set()
ours = [type(finder).__module__ for finder in sys.meta_path if type(finder).__module__.startswith("edgedit_hf")]
assert not ours, "the import hooks remove themselves"
"""


@pytest.mark.slow
@pytest.mark.parametrize("imports", ["import edgedit_hf", "from diffusers import ModelMixin\nimport edgedit_hf"])
def test_diffusers_knows_the_quantiser_whichever_is_imported_first(pipeline_folder, imports, run_python):
    run_python(ORDER.replace("{imports}", imports), pipeline_folder / "quantized")


def plan_of(model, budget: float = 4.3) -> dict:
    """4-bit palettes, and 8-bit ones for the smallest layers, as many as the average bits allow."""
    shapes = {name: weight_shape(layer) for name, layer in quantizable_layers(model).items()}
    four, eight = ({"scheme": "palette", "bits": bits, "rows_per_palette": 16} for bits in (4, 8))
    plan, bits = dict.fromkeys(shapes, four), sum(spec_bits(four, shape) for shape in shapes.values())
    for name in sorted(shapes, key=lambda name: math.prod(shapes[name])):
        bits += spec_bits(eight, shapes[name]) - spec_bits(four, shapes[name])
        if bits > budget * sum(map(math.prod, shapes.values())):
            break
        plan[name] = eight
    return plan


@pytest.mark.parametrize(
    "model, preset, limit",
    [(EdgeDiTTransformer2DModel, "EdgeDiT-1", 0.28e9), (ElasticDiTTransformer2DModel, "elastic-dit-1.6b", 0.95e9)],
)
def test_the_large_models_fit_their_budgets(model, preset, limit):
    with torch.device("meta"):
        net = model.from_preset(preset)
    size = stored_bytes(net, plan_of(net))
    assert 0.9 * limit < size < limit


LOAD = """
import sys
import torch
from edgedit_hf import ElasticDiTTransformer2DModel

net = ElasticDiTTransformer2DModel.from_pretrained(sys.argv[1])
for tensor in net.state_dict().values():
    tensor.count_nonzero()  # so that every page of the file has been read

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

loaded = peak()
with torch.no_grad():
    net(torch.randn(1, 16, 8, 8), torch.tensor([500.0]))
print(loaded * 1024, peak() * 1024)
"""


@pytest.mark.slow
def test_a_file_of_the_largest_model_is_small_and_loads_in_little_memory(tmp_path, run_python):
    with torch.device("meta"):
        net = ElasticDiTTransformer2DModel.from_preset("elastic-dit-1.6b")
    plan = plan_of(net)
    expected = stored_bytes(net, plan)
    for name, layer in quantizable_layers(net).items():
        set_empty_weight(layer, plan[name])
    mark_quantized(net)
    net.save_config(tmp_path)
    state = {}
    for name, tensor in net.state_dict().items():
        packed = tensor.dtype == torch.uint8
        state[name] = (
            torch.randint(1, 256, tensor.shape, dtype=torch.uint8)
            if packed
            else torch.full(tensor.shape, 0.02, dtype=tensor.dtype)
        )
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    del state
    size = (tmp_path / WEIGHTS).stat().st_size
    assert expected < size < expected + 200_000 and size + (tmp_path / "config.json").stat().st_size < 0.95e9
    loaded, run_once = map(int, run_python(LOAD, tmp_path).split()[-2:])
    assert 0.9e9 < loaded < 2.5e9
    assert run_once < loaded + 0.5e9  # one layer's weights (85 MB), their indices, and the libraries' own


def test_dequantising_a_loaded_model_forgets_the_quantiser(saved, tmp_path):
    _, quantized, folder = saved["edgedit"]
    loaded = EdgeDiTTransformer2DModel.from_pretrained(folder / "quantized")
    dequantize_model(loaded)
    loaded.save_pretrained(tmp_path)
    again = EdgeDiTTransformer2DModel.from_pretrained(tmp_path)
    assert not quantized_weights(again) and torch.allclose(run(again), run(quantized), atol=1e-6)
