"""Conversions against the outputs that the original implementations gave (oracles/) and against diffusers' own
class.
"""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline
from oracles import HEADS, ORACLES, oracle, random_diffusers_model
from safetensors.torch import load_file, save_file

from edgedit_hf import EdgeDiTError, EdgeDiTTransformer2DModel, SearchSpace, load_original, model_cost
from edgedit_hf.models.transformer_edgedit import TimestepEmbedder
from edgedit_hf.pipelines.loading import load_original_pipeline


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint("dit", **extra)`: the oracle's weights as the original repository saves them."""

    def write(name: str, file: str | None = None, **changes) -> Path:
        weights = {**oracle(name)[0], **changes}
        path = tmp_path / (file or f"{name}.pt")
        torch.save({key: value for key, value in weights.items() if value is not None}, path)
        return path

    return write


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# -------------------------------------------------------------------- proofs


@pytest.mark.parametrize("name", ["dit", "sit", "mdtv2"])
@torch.no_grad()
def test_a_converted_checkpoint_computes_what_its_original_computed(name, checkpoint):
    model = load_original(checkpoint(name), num_attention_heads=HEADS)
    call = {key.removeprefix("call0."): value for key, value in oracle(name)[1].items() if key.startswith("call0.")}
    if name == "sit":  # its time runs from noise to data, its velocity to the data
        found = -model(call["x"], 1000 * (1 - call["t"]), call["y"]).sample
    else:
        found = model(call["x"], call["t"], call["y"]).sample
    assert relative_error(found, call["out"]) <= 1e-5


@torch.no_grad()
def test_the_guided_call_of_the_original_is_reproduced(checkpoint):
    model = load_original(checkpoint("dit"), num_attention_heads=HEADS)
    x, t, y, expected = (oracle("dit")[1][f"call1.{key}"] for key in ("x", "t", "y", "out"))
    half = len(x) // 2
    output = model(torch.cat([x[:half], x[:half]]), t, y).sample
    conditional, unconditional = output[:, :3].chunk(2)  # the original guides three channels
    guided = unconditional + 4.0 * (conditional - unconditional)
    assert relative_error(torch.cat([torch.cat([guided, guided]), output[:, 3:]], dim=1), expected) <= 1e-5


@pytest.mark.parametrize("version", ["mdt", "mdtv2"])
@torch.no_grad()
def test_mdt_of_both_versions_with_and_without_masked_tokens(version, tmp_path):
    tensors = {
        k.removeprefix(f"{version}."): v
        for k, v in load_file(ORACLES / "mdt_masked.safetensors").items()
        if k.startswith(f"{version}.")
    }
    path = tmp_path / "mdt.pt"
    torch.save({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}, path)
    if version == "mdt":
        with pytest.raises(EdgeDiTError, match="decoder_layers"):
            load_original(path)
    model = load_original(path, decoder_layers=2 if version == "mdt" else None)
    inputs = tensors["x"], tensors["t"], tensors["y"]
    assert relative_error(model(*inputs).sample, tensors["out"]) <= 1e-5
    masked = model(*inputs, visible=tensors["visible"]).sample
    assert relative_error(masked, tensors["masked_out"]) <= 1e-5
    assert model.config.decoder_start == 2 and model.config.side_layers == 1


def test_a_model_with_long_skips_survives_saving_and_counts_its_weights(checkpoint, tmp_path):
    model = load_original(checkpoint("mdtv2"), num_attention_heads=HEADS)
    assert model.config.long_skips == [[0, 1], [-1, 2], [-1, 3]]
    model.save_pretrained(tmp_path / "saved")
    again = EdgeDiTTransformer2DModel.from_pretrained(tmp_path / "saved")
    x, t, y = (oracle("mdtv2")[1][f"call0.{key}"] for key in "xty")
    with torch.no_grad():
        assert torch.equal(again(x, t, y).sample, model(x, t, y).sample)
    assert model_cost(model.config).weights == sum(p.numel() for p in model.parameters())


def test_merges_do_not_cross_the_end_of_a_skip(checkpoint):
    config = load_original(checkpoint("mdtv2"), num_attention_heads=HEADS).config
    space = SearchSpace.for_config(config)
    assert not [layer for layer in space.proxies() if len(layer.source) > 1]  # 0→1, and 2, 3 both start with a skip
    merged = SearchSpace(4, 48, HEADS).from_code((16, 0)).to_layers()
    with pytest.raises(ValueError, match=r"long skip \[0, 1\].*merge must not cross"):
        EdgeDiTTransformer2DModel(**{**config, "layers": merged})
    free = {**config, "long_skips": [[-1, 2]], "decoder_start": 2, "side_layers": 0}
    assert len([layer for layer in SearchSpace.for_config(free).proxies() if len(layer.source) > 1]) == 8


@pytest.mark.parametrize("numerics", ["original", "diffusers"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"sample_size": 16, "num_layers": 2},
        {"patch_size": 4, "num_attention_heads": 3, "attention_head_dim": 8},
        {"out_channels": 4},
    ],
    ids=["small", "larger input", "other patch and heads", "fixed variance"],
)
@torch.no_grad()
def test_a_diffusers_folder_computes_what_diffusers_or_the_original_computes(config, numerics, tmp_path):
    theirs = random_diffusers_model(**config)
    theirs.save_pretrained(tmp_path / "model")
    model = load_original(tmp_path / "model", numerics=numerics)
    if numerics == "original":  # with its two departures undone, diffusers' class computes what the training code does
        for block in theirs.transformer_blocks:
            block.norm3.eps = 1e-6
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    size = theirs.config.sample_size
    generator = torch.Generator().manual_seed(1)
    x, t, y = torch.randn(3, 4, size, size, generator=generator), torch.tensor([3, 500, 999]), torch.tensor([0, 5, 10])
    assert relative_error(model(x, t, y).sample, theirs(x, t, y).sample) <= 1e-5
    assert (
        model_cost(model.config).weights
        == sum(p.numel() for p in model.parameters())
        < sum(p.numel() for p in theirs.parameters())
    )


@torch.no_grad()
def test_another_resolution_gets_the_position_embedding_of_its_size(tmp_path):
    random_diffusers_model(sample_size=8).save_pretrained(tmp_path / "model")
    with pytest.raises(EdgeDiTError, match=r"sample size 8 .*but 16 is asked for.*allow_resize"):
        load_original(tmp_path / "model", sample_size=16)
    model = load_original(tmp_path / "model", sample_size=16, allow_resize=True, numerics="diffusers")
    theirs = random_diffusers_model(sample_size=16)
    x, t, y = (
        torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)),
        torch.tensor([3, 500]),
        torch.tensor([0, 10]),
    )
    assert relative_error(model(x, t, y).sample, theirs(x, t, y).sample) <= 1e-5
    assert model.config.sample_size == 16


# -------------------------------------------------------------------- forms of files


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded", "pipeline", "hub"])
def test_every_form_of_a_diffusers_checkpoint_is_read(form, tmp_path, make_hub_cache):
    theirs, folder = random_diffusers_model(), tmp_path / "model"
    location, options = folder, {}
    if form == "pipeline" or form == "hub":
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
        DiTPipeline(theirs, vae, DDPMScheduler()).save_pretrained(folder)
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(
            json.dumps({**index, "id2label": {"0": "a, b"}})
        )  # as the published ones have it
    else:
        theirs.save_pretrained(
            folder, safe_serialization=form != "bin", max_shard_size="40KB" if form == "sharded" else "1GB"
        )
    if form == "sharded":
        assert len(list(folder.glob("*.safetensors"))) > 1
    if form == "hub":
        location, options = "org/dit", {"cache_dir": make_hub_cache(folder, "org/dit")}
    model = load_original(location, **options)
    assert torch.equal(model.blocks[2].attn.to_qkv.weight[32:64], theirs.transformer_blocks[2].attn1.to_k.weight)
    if form in ("pipeline", "hub"):
        pipeline = load_original_pipeline(location, **options)
        assert type(pipeline.scheduler) is DDPMScheduler and pipeline.labels == {"a, b": [0], "a": [0], "b": [0]}
        assert (
            torch.equal(pipeline.vae.decoder.conv_in.weight, vae.decoder.conv_in.weight)
            and pipeline.config.guidance_channels is None
        )


def test_of_a_training_checkpoint_the_average_is_taken_and_its_arguments_tell_the_family(checkpoint, tmp_path):
    average = oracle("sit")[0]
    content = {"model": {k: torch.zeros_like(v) for k, v in average.items()}, "ema": average, "opt": {}}
    path = tmp_path / "0400000.pt"
    torch.save({**content, "args": argparse.Namespace(model="SiT-XL/2", num_classes=7)}, path)
    model = load_original(path, num_attention_heads=HEADS)
    assert model.config.prediction_type == "flow_prediction"
    assert torch.equal(model.patch_embed.weight, average["x_embedder.proj.weight"])
    torch.save({**content, "args": argparse.Namespace(model="SiT-XL/2", prediction="score")}, path)
    with pytest.raises(EdgeDiTError, match="prediction 'score'; only SiT's 'velocity'"):
        load_original(path, num_attention_heads=HEADS)


def test_files_of_old_torch_versions_are_read(checkpoint):
    path, weights = checkpoint("dit"), oracle("dit")[0]
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    assert torch.equal(
        load_original(path, num_attention_heads=HEADS).patch_embed.weight, weights["x_embedder.proj.weight"]
    )


def test_half_precision_and_prefixed_keys_are_read(tmp_path):
    weights = {f"module.{k}": v.half() for k, v in oracle("dit")[0].items()}
    save_file(weights, tmp_path / "DiT-tiny.safetensors")
    model = load_original(tmp_path / "DiT-tiny.safetensors", num_attention_heads=HEADS)
    assert model.dtype == torch.float32 and not model.config.learned_position
    assert torch.equal(model.proj_out.weight, weights["module.final_layer.linear.weight"].float())


def test_a_trained_position_embedding_is_kept(checkpoint):
    positions = oracle("dit")[0]["pos_embed"]
    model = load_original(checkpoint("dit", pos_embed=positions + 0.5), num_attention_heads=HEADS)
    assert model.config.learned_position and torch.equal(model.pos_embed, positions[0] + 0.5)


def test_a_sit_pipeline_integrates_its_velocity_from_noise_to_data(checkpoint):
    pipeline = load_original_pipeline(checkpoint("sit"), num_attention_heads=HEADS)
    assert (
        type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
        and pipeline.config.guidance_channels == 3
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 2])
    found = pipeline(labels, latents=noise, num_inference_steps=5, guidance_scale=1.0, output_type="latent").images
    # SiT's own Euler: time 1 - sigma grows, x ← x + Δt · v with v towards the data.
    x, times = noise, 1 - pipeline.scheduler.sigmas
    with torch.no_grad():
        for now, then in zip(times, times[1:]):
            x = x + (then - now) * -pipeline.transformer(x, 1000 * (1 - now), labels).sample
    assert relative_error(found, x) <= 1e-5


# -------------------------------------------------------------------- adapters


@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_adapter_in_the_checkpoints_own_names_is_fused_first(rslora, tmp_path):
    from peft import LoraConfig, get_peft_model

    theirs = random_diffusers_model()
    theirs.save_pretrained(tmp_path / "model")
    adapted = get_peft_model(
        theirs, LoraConfig(r=2, lora_alpha=6, use_rslora=rslora, target_modules=["to_q", "to_v", "net.2"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    model = load_original(tmp_path / "model", lora=tmp_path / "adapter", numerics="diffusers")
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 10])
    with torch.no_grad():
        expected = adapted.merge_and_unload()(x, t, y).sample
        assert relative_error(model(x, t, y).sample, expected) <= 1e-5
        assert relative_error(load_original(tmp_path / "model", numerics="diffusers")(x, t, y).sample, expected) > 1e-3


def test_an_adapter_in_this_packages_names_is_fused_first(checkpoint, tmp_path):
    from peft import LoraConfig

    path = checkpoint("dit")
    model = load_original(path, num_attention_heads=HEADS)
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_qkv", "modulation"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_lora_adapter(tmp_path / "adapter")
    x, t, y = (oracle("dit")[1][f"call0.{key}"] for key in "xty")
    with torch.no_grad():
        expected = model(x, t, y).sample
        fused = load_original(path, num_attention_heads=HEADS, lora=tmp_path / "adapter")(x, t, y).sample
    assert relative_error(fused, expected) <= 1e-5
    save_file(
        {"other.lora_A.weight": torch.zeros(2, 4), "other.lora_B.weight": torch.zeros(4, 2)},
        tmp_path / "foreign.safetensors",
    )
    with pytest.raises(EdgeDiTError, match="does not have, such as 'other'"):
        load_original(path, num_attention_heads=HEADS, lora=tmp_path / "foreign.safetensors")
    with pytest.raises(EdgeDiTError, match="is no LoRA adapter"):
        load_original(path, num_attention_heads=HEADS, lora=tmp_path / "none")


# -------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "name, options, changes, said",
    [
        ("dit.pt", {}, {}, "width 48.*give num_attention_heads"),
        ("weights.pt", {"num_attention_heads": 4}, {}, "may be DiT or SiT.*--family"),
        ("dit.pt", {"num_attention_heads": 4, "num_classes": 1000}, {}, "has 7 classes, but 1000 are asked for"),
        ("dit.pt", {"num_attention_heads": 4, "sample_size": 32}, {}, "sample size 8 .*but 32 is asked for"),
        ("dit.pt", {"num_attention_heads": 5}, {}, "attention_dim 48 is not a multiple of num_heads 5"),
        ("dit.pt", {"num_attention_heads": 4, "family": "mdt"}, {}, "keys of DiT or SiT, but family 'mdt'"),
        ("dit.pt", {"num_attention_heads": 4, "numerics": "jax"}, {}, "numerics is 'jax'"),
        (
            "dit.pt",
            {"num_attention_heads": 4},
            {"blocks.1.mlp.fc1.bias": None},
            "lacks the weight 'blocks.1.mlp.fc1.bias'",
        ),
        ("dit.pt", {"num_attention_heads": 4}, {"extra": torch.zeros(1)}, "no place for, such as 'extra'"),
        (
            "dit.pt",
            {"num_attention_heads": 4},
            {"blocks.1.mlp.fc2.weight": torch.zeros(48, 96)},
            r"blocks.1.mlp.proj_out.weight' has the shape \(48, 96\), the model needs \(48, 192\)",
        ),
        ("dit.txt", {}, {}, "no weights file; they end in"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_clear_error(name, options, changes, said, checkpoint):
    with pytest.raises(EdgeDiTError, match=said):
        load_original(checkpoint("dit", name, **changes), **options)


def test_a_file_that_is_damaged_or_no_checkpoint_is_one_clear_error(checkpoint, tmp_path):
    path = checkpoint("dit")
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(EdgeDiTError, match=r"\(100000 bytes\) is no readable weights file, or truncated"):
        load_original(path)
    torch.save({"anything": Path("x")}, path)
    with pytest.raises(EdgeDiTError, match="holds more than tensors and is not opened"):
        load_original(path)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(EdgeDiTError, match=r"no DiT, SiT or MDT checkpoint: its keys begin with \['weight'\]"):
        load_original(path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(EdgeDiTError, match="holds a list, not a state dict"):
        load_original(path)
    with pytest.raises(EdgeDiTError, match="There is no file or folder"):
        load_original(tmp_path / "none.pt")
    with pytest.raises(EdgeDiTError, match="neither a local path nor a Hub id"):
        load_original("organisation/name")


def test_a_diffusers_folder_that_does_not_fit_is_one_clear_error(tmp_path):
    folder = tmp_path / "model"
    random_diffusers_model(copies_equal=False).save_pretrained(folder)
    with pytest.raises(
        EdgeDiTError, match="layer 1's own copy of timestep_embedder.linear_1.weight differs from layer 0's by up to 0"
    ):
        load_original(folder)
    config = json.loads((folder / "config.json").read_text())
    for changes, said in (
        (
            {"_class_name": "SiTTransformer2DModel"},
            "holds a SiTTransformer2DModel.*nearest supported class is DiTTransformer2DModel",
        ),
        ({"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"}, "norm_type 'ada_norm_single'"),
        ({"activation_fn": "geglu"}, "activation_fn 'geglu'; only 'gelu-approximate'"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(EdgeDiTError, match=said):
            load_original(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(EdgeDiTError, match="has no weights; expected diffusion_pytorch_model.safetensors"):
        load_original(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(EdgeDiTError, match="no readable config.json"):
        load_original(folder)
    shutil.rmtree(folder)


def test_index_files_cannot_point_elsewhere(tmp_path):
    folder = tmp_path / "model"
    random_diffusers_model().save_pretrained(folder, max_shard_size="40KB")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {key: f"../{value}" for key, value in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    with pytest.raises(EdgeDiTError, match="files outside its folder"):
        load_original(folder)


def test_the_embedder_of_time_is_the_published_formula():
    """cos and sin of t·10000^(-i/128), with diffusers' shift of the denominator and SiT's time as options."""
    embedder = TimestepEmbedder(8, scale=-1e-3, offset=1.0, frequency_shift=1.0)
    seen = []
    embedder.linear_1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    embedder(torch.tensor([250.0]))
    angles = 0.75 * torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 127)
    assert torch.allclose(seen[0], torch.cat([angles.cos(), angles.sin()])[None], atol=1e-6)
