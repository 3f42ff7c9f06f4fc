"""Few-step pipelines of both families in every format and precision: the loaded export samples as the pipeline does,
without being told how, and so does sample_min.py.
"""

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from flow_pipelines import clip, tokenizer
from safetensors.numpy import load_file

from edgedit_hf import EdgeDiTPipeline, ElasticDiTPipeline, ElasticDiTTransformer2DModel
from edgedit_hf.diffusion import make_few_step_scheduler, make_scheduler
from edgedit_hf.export import sample_min
from edgedit_hf.export.coreml.mil import run_package
from edgedit_hf.export.formats import ExportOptions
from edgedit_hf.export.pipeline import export_pipeline
from edgedit_hf.metrics.distances import psnr
from edgedit_hf.pipelines.loading import with_components
from edgedit_hf.quantization.layers import quantizable_layers
from edgedit_hf.quantization.quantizer import quantize_model

TIMESTEPS = {"edgedit": [800, 600, 400, 200], "elastic": [1000, 900, 750, 500]}
LEAST = {"fp32": 50.0, "int8": 25.0, "int4": 18.0}  # dB against the pipeline's image


def smooth(model):
    """Small random weights everywhere: a network that amplifies rounding says nothing about low precision."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def plain(make_transformer):
    torch.manual_seed(0)
    net = smooth(make_transformer(num_layers=2, hidden_size=64, num_attention_heads=2))
    sizes = {"num_layers": [1, 1, 1], "attention_blocks": 2, "in_channels": 4}
    text = smooth(ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug", **sizes).extract_subnet("small"))
    encoder = {"text_encoder": clip(projection=False), "tokenizer": tokenizer()}
    return {
        "edgedit": EdgeDiTPipeline(net, make_scheduler("epsilon")),
        "elastic": ElasticDiTPipeline(text, make_scheduler("flow_prediction"), **encoder),
    }


def few_step(pipeline, timesteps, stochastic=False):
    kind = pipeline.transformer.config.get("prediction_type", "flow_prediction")
    few = {"default_steps": len(timesteps), "default_guidance_scale": 1.0, "few_step_timesteps": timesteps}
    pipe = with_components(pipeline, scheduler=make_few_step_scheduler(kind, stochastic), **few)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export(pipeline, folder, **options):
    options = {"threads": 1, "bench_repeats": 2, "bench_batches": (1,), "num_images": 2, **options}
    return export_pipeline(pipeline, folder, ExportOptions(**options))


def image_of(pipeline, noise):
    what = ["a 3"] if "text_dims" in pipeline.transformer.config else [3]
    return pipeline(what, latents=torch.from_numpy(noise.copy()), output_type="np").images[0]


def check_contract(folder, pipeline, reference_image, least):
    """The contract's numbers are the pipeline's, and its loop makes the pipeline's image."""
    contract = sample_min.read_contract(folder)
    timesteps = pipeline.config.few_step_timesteps
    assert [step["timestep"] for step in contract["schedule"]["steps"]] == pytest.approx(timesteps, abs=1e-3)
    assert contract["guidance"]["rows"] == 1

    def opener(key):
        entry = contract["artefacts"][key]
        names = [[tensor["name"] for tensor in entry[side]] for side in ("inputs", "outputs")]
        if contract["format"] != "coreml":
            return sample_min.open_file(folder / entry["file"], contract["format"], *names)

        def interpreted(arrays):
            given = dict(zip(names[0], map(torch.from_numpy, arrays)))
            found = run_package(folder / entry["file"], given)
            return [found[name].numpy() for name in names[1]]

        return interpreted

    artefacts, reference = sample_min.Artefacts(contract, opener), load_file(folder / "reference.safetensors")
    condition = sample_min.conditioning(contract, artefacts, 3, sample_min.reference_windows(contract, reference))
    image = sample_min.sample(contract, artefacts, reference["noise"], condition)
    assert psnr(image / 255.0, reference_image, 1.0) > least
    return contract


CASES = [(family, form, dtype) for family in TIMESTEPS for form in ("onnx", "executorch", "coreml") for dtype in LEAST]
SLOW = (pytest.mark.slow, pytest.mark.export)


@pytest.mark.parametrize(
    "family, form, dtype",
    [
        pytest.param(*case, marks=() if case == ("edgedit", "onnx", "int8") else SLOW, id="-".join(case))
        for case in CASES
    ],
)
def test_every_format_and_precision(plain, tmp_path, run_python, family, form, dtype):
    pipeline = few_step(plain[family], TIMESTEPS[family])
    loose = {"min_psnr_db": LEAST[dtype]} if dtype == "int4" else {}
    folder = export(pipeline, tmp_path / "out", format=form, dtype=dtype, prompts=["a 3"], **loose)
    noise = load_file(folder / "reference.safetensors")["noise"]
    expected = image_of(pipeline, noise)
    contract = check_contract(folder, pipeline, expected, LEAST[dtype])
    batch = contract["artefacts"]["denoiser"]["inputs"][0]["shape"][0]
    assert batch == ("batch" if form == "onnx" else 1)  # one image is one row
    if form == "coreml":
        return
    loaded = DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.few_step_timesteps == TIMESTEPS[family]
    assert psnr(image_of(loaded, noise), expected, 1.0) > LEAST[dtype]
    assert [round(float(t)) for t in loaded.scheduler.timesteps] == TIMESTEPS[family]
    printed = run_python(
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')",
        folder / "sample_min.py",
        "--check",
    )
    assert "FAIL" not in printed and "ok    loop.image" in printed
    verified = json.loads((folder / "verify.json").read_text())
    assert verified["steps"] == 4 and verified["guidance_scale"] == 1.0


@pytest.mark.slow
@pytest.mark.export
@pytest.mark.parametrize("form", ["onnx", "executorch", "coreml"])
@pytest.mark.parametrize("family", TIMESTEPS)
def test_four_bit_palettes(plain, tmp_path, family, form):
    """A model quantised to 4.3 bits, in the precision that its palettes become in the format."""
    pipeline = few_step(plain[family], TIMESTEPS[family])
    pipeline = few_step(with_components(pipeline, transformer=copy.deepcopy(pipeline.transformer)), TIMESTEPS[family])
    layers = [name for name, layer in quantizable_layers(pipeline.transformer).items() if layer.weight.shape[0] >= 16]
    quantize_model(pipeline.transformer, {name: {"scheme": "palette", "bits": 4} for name in layers})
    pipeline.save_pretrained(tmp_path / "quantised")
    folder = export(tmp_path / "quantised", tmp_path / "out", format=form, dtype="fp32", prompts=["a 3"])
    noise = load_file(folder / "reference.safetensors")["noise"]
    check_contract(folder, pipeline, image_of(pipeline, noise), 40.0)


@pytest.mark.slow
@pytest.mark.export
@pytest.mark.parametrize("activations", ["static", "by-timestep"])
def test_activation_scales_are_of_its_timesteps(plain, tmp_path, activations):
    pipeline = few_step(plain["edgedit"], TIMESTEPS["edgedit"])
    folder = export(pipeline, tmp_path / "out", dtype="int8", activations=activations)
    noise = load_file(folder / "reference.safetensors")["noise"]
    check_contract(folder, pipeline, image_of(pipeline, noise), LEAST["int8"])


@pytest.mark.slow
@pytest.mark.export
def test_one_that_adds_noise_is_exported_without_a_contract(plain, tmp_path):
    """As every export of such a scheduler: verify.json says why, and how to get one."""
    pipeline = few_step(plain["edgedit"], TIMESTEPS["edgedit"], stochastic=True)
    folder = export(pipeline, tmp_path / "out")
    assert not (folder / "contract.json").exists()
    said = json.loads((folder / "verify.json").read_text())["contract"]
    assert "none was written" in said and "LCMScheduler" in said and "solver_order=1" in said
    loaded = DiffusionPipeline.from_pretrained(folder)
    images = [
        pipe([3], generator=torch.Generator().manual_seed(2), output_type="np").images for pipe in (pipeline, loaded)
    ]
    assert np.abs(images[0] - images[1]).max() < 1e-3
