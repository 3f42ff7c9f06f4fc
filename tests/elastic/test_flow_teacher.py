"""Every family of flow teachers against its own diffusers pipeline: the same velocity, sign included, from the same
text.
"""

import pytest
import torch
from diffusers import DiffusionPipeline
from flow_pipelines import MAKERS, flux, randomise

from edgedit_hf.elastic.flow_teacher import (
    FAMILIES,
    FlowTeacher,
    _pack,
    _unpack,
    check_latents,
    latent_space,
    transformer_bytes,
)
from edgedit_hf.errors import EdgeDiTError

PROMPTS = ["a cat", "seven thin dogs"]
GUIDANCE = {
    "StableDiffusion3Pipeline": lambda scale: {"guidance_scale": scale, "negative_prompt": ["", ""]},
    "FluxPipeline": lambda scale: {"true_cfg_scale": scale, "negative_prompt": ["", ""]},
    "QwenImagePipeline": lambda scale: {"true_cfg_scale": scale, "negative_prompt": ["", ""]},
    "SanaPipeline": lambda scale: {"guidance_scale": scale, "use_resolution_binning": False},
    "AuraFlowPipeline": lambda scale: {"guidance_scale": scale},
    "Lumina2Pipeline": lambda scale: {"guidance_scale": scale, "cfg_normalization": False},
    "ElasticDiTPipeline": lambda scale: {"guidance_scale": scale},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`folders(name)`: a saved tiny pipeline of a family."""
    made = {}

    def make(name, maker=None):
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp(name)
            randomise((maker or MAKERS[name])()).save_pretrained(made[name])
        return made[name]

    return make


def run(folder, steps=3, size=(16, 8), **options):
    """What the family's own pipeline hands to its scheduler: (velocity, timestep, latents) of every step, and its
    result.
    """
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    seen, step = [], pipeline.scheduler.step

    def spy(output, timestep, sample, *args, **kwargs):
        seen.append((output, float(timestep), sample))
        return step(output, timestep, sample, *args, **kwargs)

    pipeline.scheduler.step = spy
    # Lumina 2 takes every VAE to shrink by 8, these shrink by 2; Sana wants multiples of 32 pixels.
    factor = 4 if type(pipeline).__name__ in ("Lumina2Pipeline", "SanaPipeline") else 1
    height, width = (side * factor for side in size)
    generator = torch.Generator().manual_seed(1)
    result = pipeline(
        PROMPTS,
        height=height,
        width=width,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
        **options,
    )
    packed = seen[0][0].ndim == 3
    unpack = (lambda x: _unpack(x, size[0] // 2, size[1] // 2)) if packed else (lambda x: x)
    return [(unpack(v), t, unpack(x)) for v, t, x in seen], unpack(result.images)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", MAKERS)
def test_velocity_is_the_familys_own(folders, name, scale):
    folder = folders(name)
    steps, result = run(folder, **GUIDANCE[name](scale))
    teacher = FlowTeacher.load(folder, guidance_scale=scale)
    conditioning = teacher.encode_prompt(PROMPTS)
    teacher.free_text_encoders()
    for output, t, x in steps:
        velocity = teacher.velocity(x, torch.full((2,), t / 1000), conditioning)
        torch.testing.assert_close(velocity, output, rtol=1e-4, atol=1e-4)
    # The last step of every scheduler goes from σ to 0: x0 = x_t − σ·(ε − x0).
    torch.testing.assert_close(
        x - t / 1000 * velocity, result, rtol=1e-3, atol=5e-3 if name == "SanaPipeline" else 1e-4
    )


@pytest.mark.parametrize("name", MAKERS)
def test_features_are_the_last_layers_image_tokens(folders, name):
    teacher = FlowTeacher.load(folders(name))
    outputs = []
    layers = getattr(teacher.transformer, "single_transformer_blocks", None)
    layers = layers or getattr(teacher.transformer, "layers", None) or getattr(teacher.transformer, "up_blocks", None)
    layers = layers or teacher.transformer.transformer_blocks
    layers[-1].register_forward_hook(
        lambda module, inputs, output: outputs.append(output[-1] if isinstance(output, tuple) else output)
    )
    x, sigma = torch.randn(2, 4, 8, 4), torch.tensor([0.3, 0.8])
    conditioning = teacher.encode_prompt(PROMPTS)
    teacher.velocity(x, sigma, conditioning)
    tokens = 8 if teacher.transformer.config.get("patch_size", 1) == 2 or name == "FluxPipeline" else 32
    assert teacher.features.shape == (2, tokens, teacher.feature_dim)
    for row in range(2):  # the image's tokens stand last, but for padding behind a shorter text
        whole = outputs[0][row]
        starts = [
            i for i in range(len(whole) - tokens + 1) if torch.equal(whole[i : i + tokens], teacher.features[row])
        ]
        length = int(conditioning.masks[0][row].sum()) if name == "Lumina2Pipeline" else len(whole) - tokens
        assert starts == [length]


@pytest.mark.parametrize("name", MAKERS)
def test_rows_are_independent_and_text_may_be_dropped_row_by_row(folders, name):
    teacher = FlowTeacher.load(folders(name), guidance_scale=2.0)
    x, sigma = torch.randn(3, 4, 8, 8), torch.tensor([0.3, 0.8, 0.5])
    conditioning = teacher.encode_prompt([*PROMPTS, "a"])
    velocity = teacher.velocity(x, sigma, conditioning)
    for row in range(3):
        alone = [[part[row : row + 1] for part in parts] for parts in conditioning]
        torch.testing.assert_close(
            teacher.velocity(x[row : row + 1], sigma[row : row + 1], alone),
            velocity[row : row + 1],
            rtol=1e-4,
            atol=1e-4,
        )
    dropped = teacher.velocity(x, sigma, conditioning, torch.tensor([False, True, False]))
    torch.testing.assert_close(dropped[[0, 2]], velocity[[0, 2]], rtol=1e-4, atol=1e-4)
    teacher.guidance_scale = 1.0
    null = [[part.expand(3, *part.shape[1:]) for part in parts] for parts in teacher._null]
    torch.testing.assert_close(dropped[1], teacher.velocity(x, sigma, null)[1], rtol=1e-4, atol=1e-4)


def test_flux_takes_guidance_as_an_embedding(folders):
    folder = folders("Flux-dev", lambda: flux(guidance=True))
    steps, _ = run(folder, guidance_scale=3.5)
    teacher = FlowTeacher.load(folder, guidance_scale=3.5)
    output, t, x = steps[1]
    calls = []
    teacher.transformer.register_forward_hook(lambda *_: calls.append(1))
    velocity = teacher.velocity(x, torch.full((2,), t / 1000), teacher.encode_prompt(PROMPTS))
    torch.testing.assert_close(velocity, output, rtol=1e-4, atol=1e-4)
    assert len(calls) == 1


@pytest.mark.parametrize("name", MAKERS)
def test_bfloat16_as_on_a_gpu(name, tmp_path):
    torch.manual_seed(0)
    MAKERS[name]().save_pretrained(tmp_path)
    x, sigma = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8])
    exact, half = (
        FlowTeacher.load(tmp_path, dtype=dtype, guidance_scale=1.5) for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.transformer.dtype == torch.bfloat16
    wanted = exact.velocity(x, sigma, exact.encode_prompt(PROMPTS))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as in a step of mixed precision: the teacher keeps its own
        velocity = half.velocity(x, sigma, half.encode_prompt(PROMPTS))
    assert velocity.dtype == torch.float32 and half.features.dtype == torch.bfloat16
    assert (velocity - wanted).norm() <= 0.05 * wanted.norm()


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline"])
def test_four_bit_weights_change_little(name):
    """NF4 layers of bitsandbytes, put in by hand: diffusers does so on a GPU alone, the arithmetic also runs here."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    teacher = FAMILIES[name](MAKERS[name](), torch.device("cpu"), torch.float32)
    x, sigma, conditioning = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), teacher.encode_prompt(PROMPTS)
    exact = teacher.velocity(x, sigma, conditioning)
    for parent in list(teacher.transformer.transformer_blocks.modules()):
        for key, layer in list(parent.named_children()):
            if isinstance(layer, torch.nn.Linear):
                small = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type="nf4"
                )
                small.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                small.bias = layer.bias
                setattr(parent, key, small.to("cpu"))
    quantised = teacher.velocity(x, sigma, conditioning)
    error = (quantised - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.3, error
    assert teacher.features.shape[-1] == teacher.feature_dim


def test_packing_is_the_pipelines():
    from diffusers import FluxPipeline

    x = torch.randn(2, 4, 8, 6)
    assert torch.equal(_pack(x), FluxPipeline._pack_latents(x, 2, 4, 8, 6))
    assert torch.equal(_unpack(_pack(x), 8, 6), x)


# -------------------------------------------------------------------- latent spaces


def test_another_latent_space_is_an_error_with_both_values(folders):
    from flow_pipelines import autoencoder

    folder = folders("StableDiffusion3Pipeline")
    check_latents(folder, autoencoder(), 4)
    for vae, words in (
        (autoencoder(channels=8), ("channels is 4 there and 8",)),
        (autoencoder(scaling_factor=0.7), ("scaling_factor is 0.5 there and 0.7",)),
        (autoencoder(shift_factor=None), ("shift_factor is 0.1 there and 0.0",)),
        (None, ("downsampling is 2 there and 1", "without a VAE")),
    ):
        with pytest.raises(EdgeDiTError, match="another latent space") as error:
            check_latents(folder, vae, 4)
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_teachers_on_pixels(tmp_path):
    from flow_pipelines import elastic

    elastic(vae=False).save_pretrained(tmp_path)
    check_latents(tmp_path, None, 1)
    with pytest.raises(EdgeDiTError, match="channels is 1 there and 3"):
        check_latents(tmp_path, None, 3)


@pytest.mark.parametrize("name", ["SanaPipeline", "QwenImagePipeline"])
def test_latent_spaces_of_other_families(folders, name):
    vae = MAKERS[name]().vae
    check_latents(folders(name), vae, 4)
    space = latent_space(vae.config, 4)
    assert space[:3] == ((4, 2, 0.4) if name == "SanaPipeline" else (4, 2, 1.0))
    if name == "QwenImagePipeline":
        vae.register_to_config(latents_std=[0.9, 0.9, 0.9, 0.8])
        with pytest.raises(
            EdgeDiTError, match=r"latents_std is \(0.9, 0.9, 0.9, 0.9\) there and \(0.9, 0.9, 0.9, 0.8\)"
        ):
            check_latents(folders(name), vae, 4)


# -------------------------------------------------------------------- bad input


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_unknown_pipelines_are_refused_before_their_weights_are_read(tmp_path):
    from diffusers import PixArtAlphaPipeline

    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "PixArtAlphaPipeline", "scheduler": ["diffusers", "DPMSolverMultistepScheduler"]}'
    )
    assert PixArtAlphaPipeline.__name__ not in FAMILIES
    with pytest.raises(EdgeDiTError, match="is a PixArtAlphaPipeline; it must be a flow pipeline") as error:
        FlowTeacher.load(tmp_path)
    assert "QwenImagePipeline" in one_line(error)
    with pytest.raises(EdgeDiTError, match="There is no pipeline in") as error:
        FlowTeacher.load(tmp_path / "nothing")
    one_line(error)


def test_a_scheduler_without_a_flow_is_refused(tmp_path):
    from diffusers import DPMSolverMultistepScheduler

    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "SanaPipeline", "scheduler": ["diffusers", "DPMSolverMultistepScheduler"]}'
    )
    DPMSolverMultistepScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(EdgeDiTError, match="'epsilon', which integrates no flow") as error:
        FlowTeacher.load(tmp_path)
    one_line(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantisation_without_a_gpu_is_refused_before_anything_is_read(tmp_path, quantization):
    with pytest.raises(EdgeDiTError, match=f"A {quantization} teacher needs a CUDA GPU") as error:
        FlowTeacher.load(tmp_path / "nothing", quantization)
    assert "knowledge.quantization" in one_line(error)


def test_captions_after_the_encoders_were_freed(folders):
    teacher = FlowTeacher.load(folders("AuraFlowPipeline"))
    teacher.free_text_encoders()
    with pytest.raises(EdgeDiTError, match="no text encoders"):
        teacher.encode_prompt("a")


def test_bytes_of_a_teacher_follow_its_precision(folders):
    folder = folders("StableDiffusion3Pipeline")
    model = FlowTeacher.load(folder).transformer
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert transformer_bytes(folder) == 2 * model.num_parameters()
    assert transformer_bytes(folder, "8bit") == 2 * model.num_parameters() - linear
    assert transformer_bytes(folder, "4bit") < transformer_bytes(folder, "8bit")
