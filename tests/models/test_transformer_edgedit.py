"""The transformer: published sizes, counted costs, equality with diffusers' DiT, and everything a diffusers model can
do.
"""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from accelerate import infer_auto_device_map
from diffusers import DiTTransformer2DModel, TorchAoConfig
from diffusers.models.embeddings import Timesteps
from kinds import CHANGES, MIXED, ORIGINAL, layer_of
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from edgedit_hf import EdgeDiTTransformer2DModel, Genotype, SearchSpace
from edgedit_hf.models.transformer_edgedit import PRESETS, EdgeDiTAttention, sincos_position_embedding
from edgedit_hf.search_space import OPTIONS, model_cost

PUBLISHED = {  # parameters (M) and GFLOPs of the DiT and EdgeDiT papers
    "DiT-XL/2": ("675.13", "237.34"),
    "EdgeDiT-1": ("470.65", "143.96"),
    "EdgeDiT-6": ("529.64", "169.97"),
}
SPACE = SearchSpace(4, 32, 2)
LAYERS = {option: [SPACE.layer((i,), option).to_dict() for i in range(4)] for option in OPTIONS}
LAYERS |= {
    f"merged {option}": [SPACE.layer((2 * i, 2 * i + 1), option).to_dict() for i in range(2)] for option in OPTIONS
}
LAYERS["mixed"] = SPACE.from_code((4 * 1 + 2, 16 + 3)).to_layers()
KINDS = {change: [layer_of((i,), change) for i in range(4)] for change in CHANGES} | {"every kind": MIXED}


def inputs(batch: int = 3, height: int = 8, width: int = 8, channels: int = 1, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width, generator=generator)
    return x, torch.linspace(3, 950, batch), torch.arange(batch) % 10


def layer(**changes) -> dict:
    """A layer of DiT-debug/2 with these changes."""
    return {"source": [0], **ORIGINAL, **changes}


@torch.no_grad()
def output(model, *arguments):
    return model(*(arguments or inputs())).sample


# -------------------------------------------------------------------- sizes and costs


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_every_preset_are_the_closed_form(name):
    with torch.device("meta"):
        model = EdgeDiTTransformer2DModel.from_preset(name)
    cost = model_cost(model.config)
    assert cost.weights == sum(p.numel() for p in model.parameters())
    assert cost.parameters == cost.weights + model.pos_embed.numel()
    if name in PUBLISHED:
        assert f"{cost.parameters / 1e6:.2f}" == PUBLISHED[name][0]


class ElementCounter(TorchDispatchMode):
    """Elements that LayerNorm (four operations each), GELU and SiLU (one each) go over, whoever calls them."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        each = {"native_layer_norm": 4, "gelu": 1, "silu": 1}.get(func.overloadpacket.__name__, 0)
        self.operations += each * args[0].numel() if each else 0
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_of_the_published_networks(name):
    with torch.device("meta"):
        model = EdgeDiTTransformer2DModel.from_preset(name).eval()
        x, t, labels = torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long)
    with FlopCounterMode(display=False) as products, ElementCounter() as elements:
        output(model, x, t, labels)
    cost = model_cost(model.config)
    assert products.get_total_flops() == 2 * cost.macs
    assert products.get_total_flops() + elements.operations == cost.flops
    assert f"{cost.flops / 1e9:.2f}" == PUBLISHED[name][1]


def hooked_macs(model: nn.Module, *arguments) -> int:
    """Multiply-accumulates of a forward of one image, counted by hooks on its modules."""
    macs = 0

    def count(module, given, result):
        nonlocal macs
        if isinstance(module, nn.Linear):
            macs += result.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            macs += result.numel() * module.weight[0].numel()
        elif isinstance(module, EdgeDiTAttention):  # scores, then the average of the values
            macs += 2 * given[0].shape[1] ** 2 * module.to_out.in_features

    handles = [module.register_forward_hook(count) for module in model.modules()]
    output(model, *arguments)
    for handle in handles:
        handle.remove()
    return macs


@pytest.mark.parametrize(
    "variant", [{}, {"num_classes": 0}, {"learn_sigma": True}, {"patch_size": 4, "in_channels": 3}], ids=str
)
@pytest.mark.parametrize("name", LAYERS)
def test_closed_form_costs_are_what_hooks_count(name, variant):
    check_costs(EdgeDiTTransformer2DModel.from_preset("DiT-debug/2", layers=LAYERS[name], **variant))


@pytest.mark.parametrize("name", KINDS)
def test_closed_form_costs_of_every_kind_of_layer_are_what_hooks_count(name):
    model = EdgeDiTTransformer2DModel.from_preset("DiT-debug/2", layers=KINDS[name])
    check_costs(model)
    whole = model_cost(EdgeDiTTransformer2DModel.from_preset("DiT-debug/2").config)
    assert model_cost(model.config).flops < whole.flops or "heads" in name
    assert model_cost(model.config).weights < whole.weights or "heads" in name or name == "merged tokens"


def check_costs(model: EdgeDiTTransformer2DModel) -> None:
    """The closed form against hooks, a dispatch mode and torch's own counter, on a grid that is no square."""
    x, t, labels = inputs(1, 8, 16, model.config.in_channels)
    arguments = (x, t, labels if model.config.num_classes else None)
    cost = model_cost(model.config, 8, 16)
    assert cost.weights == sum(p.numel() for p in model.parameters())
    assert cost.macs == hooked_macs(model, *arguments)
    with ElementCounter() as elements:
        output(model, *arguments)
    assert cost.flops == 2 * cost.macs + elements.operations
    with FlopCounterMode(display=False) as products:
        output(model.to("meta"), *(tensor if tensor is None else tensor.to("meta") for tensor in arguments))
    assert products.get_total_flops() == 2 * cost.macs


# -------------------------------------------------------------------- the architecture


def diffusers_dit(model: EdgeDiTTransformer2DModel) -> DiTTransformer2DModel:
    """diffusers' DiT with the same weights, and without its two known departures from the original.

    It spreads the frequencies of the timestep up to 1/10000 instead of just short of it, and its second norm has an
    epsilon of 1e-5.
    """
    config, heads = model.config, model.config.layers[0]["num_heads"]
    dit = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=config.hidden_size // heads,
        in_channels=config.in_channels,
        out_channels=model.out_channels,
        num_layers=len(config.layers),
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    ).eval()
    dit.pos_embed.proj.load_state_dict(model.patch_embed.state_dict())
    dit.proj_out_1.load_state_dict(model.modulation_out.state_dict())
    dit.proj_out_2.load_state_dict(model.proj_out.state_dict())
    for theirs, ours in zip(dit.transformer_blocks, model.blocks):
        embedding = theirs.norm1.emb
        embedding.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        embedding.timestep_embedder.linear_1.load_state_dict(model.timestep_embedder.linear_1.state_dict())
        embedding.timestep_embedder.linear_2.load_state_dict(model.timestep_embedder.linear_2.state_dict())
        embedding.class_embedder.embedding_table.load_state_dict(model.label_embedder.state_dict())
        theirs.norm1.linear.load_state_dict(ours.modulation.state_dict())
        projections = (theirs.attn1.to_q, theirs.attn1.to_k, theirs.attn1.to_v)
        for linear, weight, bias in zip(projections, ours.attn.to_qkv.weight.chunk(3), ours.attn.to_qkv.bias.chunk(3)):
            linear.load_state_dict({"weight": weight, "bias": bias})
        theirs.attn1.to_out[0].load_state_dict(ours.attn.to_out.state_dict())
        theirs.ff.net[0].proj.load_state_dict(ours.mlp.proj_in.state_dict())
        theirs.ff.net[2].load_state_dict(ours.mlp.proj_out.state_dict())
    return dit


@pytest.mark.parametrize(
    "sizes",
    [{}, {"learn_sigma": True, "in_channels": 4}, {"patch_size": 4, "sample_size": 16, "num_attention_heads": 4}],
    ids=["pixels", "latents", "large patches"],
)
def test_equals_an_independent_dit(make_transformer, sizes):
    model = make_transformer(**sizes)
    size = model.config.sample_size
    x, t, labels = inputs(4, size, size, model.config.in_channels)
    labels[-1] = model.config.num_classes  # the null class
    ours, theirs = output(model, x, t, labels), output(diffusers_dit(model), x, t, labels)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def test_a_fresh_network_predicts_zero_and_its_layers_are_the_identity():
    model = EdgeDiTTransformer2DModel.from_preset("DiT-debug/2")
    x, t, labels = inputs()
    tokens, conditioning = model.embed(x, t, labels)
    assert all(torch.equal(block(tokens, conditioning), tokens) for block in model.blocks)
    assert not output(model).any()
    assert {name for name, p in model.named_parameters() if p.ndim > 1 and not p.any()} == {
        *(f"blocks.{i}.modulation.weight" for i in range(4)),
        "modulation_out.weight",
        "proj_out.weight",
    }


def test_forward_is_embed_blocks_unembed(make_transformer):
    model = make_transformer(layers=LAYERS["mixed"])
    x, t, labels = inputs()
    with torch.no_grad():
        tokens, conditioning = model.embed(x, t, labels)
        assert tokens.shape == (3, 16, 32) and conditioning.shape == (3, 32)
        for block in model.blocks:
            tokens = block(tokens, conditioning)
        sample = model.unembed(tokens, conditioning, 8, 8)
        assert torch.equal(sample, output(model))
        assert torch.equal(sample, model(x, t, labels, return_dict=False)[0])


def test_one_timestep_stands_for_all_images_and_labels_matter(make_transformer):
    model = make_transformer()
    x, _, labels = inputs()
    expected = output(model, x, torch.full((3,), 500.0), labels)
    for timestep in (torch.tensor(500), torch.tensor(500.0), torch.tensor([500]), torch.full((3,), 500)):
        assert torch.equal(output(model, x, timestep, labels), expected)
    assert not torch.allclose(output(model, x, torch.tensor(501), labels), expected, atol=1e-3)
    assert not torch.allclose(output(model, x, torch.tensor(500), labels + 1), expected, atol=1e-3)


def test_images_of_a_batch_do_not_see_each_other(make_transformer):
    model = make_transformer(layers=LAYERS["mixed"])
    x, t, labels = inputs()
    for i in range(3):
        torch.testing.assert_close(
            output(model, x[i : i + 1], t[i : i + 1], labels[i : i + 1])[0], output(model)[i], rtol=0, atol=1e-5
        )


def test_an_unconditional_network_needs_no_labels(make_transformer):
    model = make_transformer(num_classes=0)
    x, t, labels = inputs()
    assert model.label_embedder is None and output(model, x, t).shape == x.shape
    with pytest.raises(ValueError, match="num_classes=0, but class_labels were given"):
        model(x, t, labels)


def test_other_sizes_than_the_native_one(make_transformer):
    small, large = make_transformer(sample_size=8), make_transformer(sample_size=16)
    x, t, labels = inputs(3, 16, 16)
    assert torch.equal(output(small, x, t, labels), output(large, x, t, labels))
    # Not square: the position of a patch is that of the same row and column of a square grid.
    square = sincos_position_embedding(6, 6, 32).view(6, 6, 32)
    assert torch.equal(sincos_position_embedding(4, 6, 32), square[:4].flatten(0, 1))
    assert torch.equal(sincos_position_embedding(6, 4, 32), square[:, :4].flatten(0, 1))
    for height, width in ((8, 12), (20, 4)):
        x, t, labels = inputs(3, height, width)
        assert output(small, x, t, labels).shape == x.shape


def test_patches_go_back_to_where_they_came_from(make_transformer):
    model = make_transformer(learn_sigma=True, in_channels=3)
    x, t, labels = inputs(2, 8, 12, 3)
    with torch.no_grad():
        tokens, conditioning = model.embed(x, t, labels)
        sample = model.unembed(tokens, conditioning, 8, 12)
        shift, scale = model.modulation_out(conditioning).chunk(2, dim=1)
        patches = model.proj_out(F.layer_norm(tokens, (32,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None])
    channels_first = (
        patches.view(2, 24, 4, 6).transpose(2, 3).flatten(2)
    )  # DiT's order in a patch: row, column, channel
    torch.testing.assert_close(sample, F.fold(channels_first.mT, (8, 12), 2, stride=2), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hidden_size": 30}, "hidden_size is 30; the position embedding needs a multiple of 4"),
        ({"sample_size": 9}, "sample_size 9 is not a multiple of patch_size 2"),
        ({"prediction_type": "x0"}, "prediction_type is 'x0'"),
        ({"num_attention_heads": 3}, "attention_dim 32 is not a multiple of num_heads 3"),
        ({"layers": [{"source": [0]}]}, r"Layer 0 has the keys \['source'\]; it must have exactly"),
        ({"layers": [layer(colour="red")]}, "'colour'.*may have .'modulation_rank', 'token_merge'."),
        ({"layers": [layer(), layer(source="1")]}, "Layer 1: source is '1'; it must list teacher layers"),
        ({"layers": [layer(num_heads=2.0)]}, "attention_dim 32 and num_heads 2.0 must be integers above 0"),
        ({"layers": [layer(mlp_ratio="4")]}, "mlp_ratio is '4'; it must be a number above 0"),
        ({"layers": [layer(mlp_ratio=0.01)]}, "mlp_ratio 0.01 of hidden_size 32 leaves no neuron"),
        ({"layers": [layer(modulation_rank=33)]}, "modulation_rank is 33; .* from 0 .static. to the hidden_size 32"),
        ({"layers": [layer(modulation_rank=True)]}, "modulation_rank is True"),
        ({"layers": [layer(token_merge=3)]}, r"token_merge is 3; it must be one of \(1, 2\)"),
        ({"layers": [layer(token_merge=2)], "sample_size": 10}, "token_merge 2 needs a token grid .* make 5 × 5"),
    ],
)
def test_configs_that_make_no_sense_are_refused(config, said):
    with pytest.raises(ValueError, match=said):
        EdgeDiTTransformer2DModel.from_preset("DiT-debug/2", **config)


def test_inputs_that_do_not_fit_are_refused(make_transformer):
    model = make_transformer()
    x, t, labels = inputs()
    with pytest.raises(ValueError, match="num_classes=10, but no class_labels were given"):
        model(x, t)
    with pytest.raises(ValueError, match=r"shape \(3, 2, 8, 8\); this model needs \(batch, 1, height, width\)"):
        model(x.repeat(1, 2, 1, 1), t, labels)
    with pytest.raises(ValueError, match="multiples of 2"):
        model(x[..., :7], t, labels)
    with pytest.raises(ValueError, match="There is no preset 'DiT-XXL/2'; the presets are DiT-S/2, "):
        EdgeDiTTransformer2DModel.from_preset("DiT-XXL/2")


# -------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("variant", [{}, {"variant": "ema"}], ids=str)
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "50KB"}], ids=str)
def test_a_saved_network_loads_equal(make_transformer, tmp_path, shards, variant):
    model = make_transformer(layers=LAYERS["mixed"], learn_sigma=True)
    model.save_pretrained(tmp_path, **shards, **variant)
    weights = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (len(weights) > 2) == bool(shards) and all((".ema" in name) == bool(variant) for name in weights)
    again = EdgeDiTTransformer2DModel.from_pretrained(tmp_path, **variant)
    assert torch.equal(output(again), output(model)) and not again.training
    assert again.config.layers == model.config.layers == LAYERS["mixed"]
    assert Genotype.of(again.config) == SPACE.from_code((6, 19))
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys() and all(
        torch.equal(v, state[k]) for k, v in again.state_dict().items()
    )


def test_a_network_whose_layers_were_left_to_the_defaults_saves_what_it_is(make_transformer, tmp_path):
    make_transformer().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["layers"] == Genotype.original(4, 32, 2).to_layers() and saved["num_layers"] == 4


def test_half_precision(make_transformer, tmp_path):
    model = make_transformer()
    model.save_pretrained(tmp_path)
    half = EdgeDiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    x, t, labels = inputs()
    expected = output(model)
    near = dict(rtol=0, atol=0.1 * expected.abs().max().item())
    torch.testing.assert_close(output(half, x.bfloat16(), t, labels).float(), expected, **near)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(output(model).float(), expected, **near)


@pytest.fixture
def saved(make_transformer, tmp_path):
    """Folder of a saved network, and a function that changes its weights."""
    make_transformer(layers=LAYERS["mixed"]).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"

    def change(**changes):
        state = {**load_file(path), **changes}
        save_file(
            {name: tensor for name, tensor in state.items() if tensor is not None}, path, metadata={"format": "pt"}
        )

    return tmp_path, change


def test_a_missing_weight_is_an_error(saved):
    folder, change = saved
    change(**{"blocks.1.attn.to_qkv.weight": None})
    with pytest.raises(ValueError, match=r"1 missing \(blocks.1.attn.to_qkv.weight\), 0 unexpected \(none\)"):
        EdgeDiTTransformer2DModel.from_pretrained(folder)


def test_an_unexpected_weight_is_an_error(saved):
    folder, change = saved
    change(**{"blocks.9.attn.to_qkv.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"0 missing \(none\), 1 unexpected \(blocks.9.attn.to_qkv.weight\)"):
        EdgeDiTTransformer2DModel.from_pretrained(folder)


@pytest.mark.parametrize("code", [(6, 16), (6, 15), (16, 19), (10, 19)], ids=str)
def test_weights_of_another_genotype_are_an_error(saved, code):
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layers": SPACE.from_code(code).to_layers()}))
    with pytest.raises(ValueError, match="blocks"):
        EdgeDiTTransformer2DModel.from_pretrained(folder)


def test_loading_info_is_given_on_request(saved):
    model, info = EdgeDiTTransformer2DModel.from_pretrained(saved[0], output_loading_info=True)
    assert isinstance(model, EdgeDiTTransformer2DModel) and not info["missing_keys"] and not info["unexpected_keys"]


# -------------------------------------------------------------------- adapters


LORA = LoraConfig(
    r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_qkv", "to_out", "proj_in", "proj_out"]
)


def test_adapters_are_added_switched_off_saved_and_loaded(make_transformer, tmp_path):
    model = make_transformer(layers=LAYERS["mixed"])
    plain = output(model)
    model.add_adapter(LORA, "style")
    adapted = output(model)
    assert not torch.allclose(adapted, plain, atol=1e-2)
    model.disable_adapters()
    assert torch.equal(output(model), plain)
    model.enable_adapters()
    model.save_lora_adapter(tmp_path, adapter_name="style")
    again = make_transformer(layers=LAYERS["mixed"])
    again.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors", adapter_name="style")
    assert torch.equal(output(again), adapted)


def test_a_network_with_compiled_layers_is_not_saved_under_their_names(make_transformer, tmp_path):
    model = make_transformer()
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    with pytest.raises(ValueError, match="_orig_mod stands in the names.*layer._orig_mod"):
        model.save_pretrained(tmp_path)
    model.blocks[0] = model.blocks[0]._orig_mod
    torch.compile(model, backend="eager").save_pretrained(tmp_path)  # of the whole network there is no trace
    assert torch.equal(output(EdgeDiTTransformer2DModel.from_pretrained(tmp_path)), output(model))


def test_a_network_with_adapters_is_not_saved_as_if_it_had_none(make_transformer, tmp_path):
    model = make_transformer()
    plain = output(model)
    model.add_adapter(LORA, "style")
    adapted = output(model)
    with pytest.raises(ValueError, match=r"wrapped for the adapters \['style'\].*unload_lora"):
        model.save_pretrained(tmp_path)
    emptied = copy.deepcopy(model)
    emptied.delete_adapters("style")  # the wrappers stay, and with them the wrong names
    with pytest.raises(ValueError, match=r"wrapped for the adapters \[\].*unload_lora"):
        emptied.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())

    emptied.unload_lora()
    emptied.save_pretrained(tmp_path / "plain")
    assert torch.equal(output(EdgeDiTTransformer2DModel.from_pretrained(tmp_path / "plain")), plain)
    model.fuse_lora()
    model.unload_lora()
    model.save_pretrained(tmp_path / "merged")
    merged = output(EdgeDiTTransformer2DModel.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4 * adapted.abs().max().item())


# -------------------------------------------------------------------- what training and inference switch on


@pytest.mark.parametrize("layers", [LAYERS["mixed"], MIXED], ids=["mixed", "kinds"])
def test_gradient_checkpointing_gives_the_same_gradients(make_transformer, layers):
    gradients = []
    for checkpointing in (False, True):
        model = make_transformer(layers=layers).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        calls = []
        handle = model.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(*inputs(width=12)).sample.square().mean().backward()
        handle.remove()
        assert len(calls) == 1 + checkpointing  # once more on the way back
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends(make_transformer, backend):
    model = make_transformer(layers=LAYERS["mixed"])
    expected = output(model)
    model.set_attention_backend(backend)
    try:
        assert {block.attn.processor._attention_backend.value for block in model.blocks} == {backend}
        torch.testing.assert_close(output(model), expected, rtol=0, atol=1e-5)
    finally:
        model.set_attention_backend(
            "native"
        )  # what was chosen last also holds for every network without a choice of its own
        model.reset_attention_backend()
    assert {block.attn.processor._attention_backend for block in model.blocks} == {None}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["original", "mixed", "every kind"])
def test_compiles_without_a_graph_break(make_transformer, name):
    layers = (LAYERS | KINDS)[name]
    model = make_transformer(layers=layers)
    expected = output(model)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(output(compiled), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    repeated = make_transformer(layers=layers)
    repeated.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(output(repeated), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_torchao_quantises_the_linear_layers_and_round_trips(make_transformer, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig

    model = make_transformer(layers=LAYERS["mixed"])
    expected = output(model)
    model.save_pretrained(tmp_path / "plain")
    quantised = EdgeDiTTransformer2DModel.from_pretrained(
        tmp_path / "plain", quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), torch_dtype=torch.float32
    )
    linear = [module for module in quantised.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 5 * 3 + 4 and all(type(module.weight) is not nn.Parameter for module in linear)
    result = output(quantised)
    assert 0 < (result - expected).norm() / expected.norm() < 0.05
    quantised.save_pretrained(tmp_path / "int8")
    again = EdgeDiTTransformer2DModel.from_pretrained(tmp_path / "int8", torch_dtype=torch.float32)
    assert torch.equal(output(again), result)


def test_layerwise_casting_stores_small_and_computes_large(make_transformer):
    model = make_transformer()
    expected = output(model)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert model.blocks[0].attn.to_qkv.weight.dtype == torch.bfloat16
    assert model.timestep_embedder.linear_1.weight.dtype == model.label_embedder.weight.dtype == torch.float32
    result = output(model)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=0, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading(make_transformer, kind):
    model = make_transformer(layers=MIXED)
    expected = output(model)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, **blocks)
    assert torch.equal(output(model), expected)


def test_blocks_are_not_split_over_devices(make_transformer):
    model = make_transformer()
    room = sum(p.numel() * p.element_size() for p in model.parameters()) // 2
    where = infer_auto_device_map(
        model, max_memory={0: room, "cpu": 10 * room}, no_split_module_classes=model._no_split_modules
    )
    assert set(where.values()) == {0, "cpu"}
    for index in range(len(model.blocks)):
        assert (
            len({device for name, device in where.items() if name == "blocks" or name.startswith(f"blocks.{index}")})
            == 1
        )
        assert not any(name.startswith(f"blocks.{index}.") for name in where)


# -------------------------------------------------------------------- what a layer may have of its own


def test_layers_without_the_new_keys_have_the_weights_that_they_always_had(make_transformer):
    model = make_transformer(layers=[layer(source=[i]) for i in range(4)])
    assert model.config.layers == make_transformer().config.layers
    names = {name.split(".", 2)[2] for name in model.state_dict() if name.startswith("blocks.")}
    assert names == {
        f"{module}.{kind}"
        for module in ("attn.to_qkv", "attn.to_out", "mlp.proj_in", "mlp.proj_out", "modulation")
        for kind in ("weight", "bias")
    }


@torch.no_grad()
def test_a_static_layer_is_one_whose_projection_is_zero(make_transformer):
    static, whole = make_transformer(layers=[layer(modulation_rank=0)]), make_transformer(layers=[layer()], seed=1)
    assert [name for name in static.state_dict() if "blocks.0.modulation" in name] == ["blocks.0.modulation.bias"]
    whole.load_state_dict(static.state_dict(), strict=False)
    whole.blocks[0].modulation.weight.zero_()
    assert torch.equal(output(static), output(whole))
    table = static.precompute_modulation(*inputs()[1:])
    assert torch.equal(table[:, :, :6], static.blocks[0].modulation.bias.view(6, 32).expand(3, 3, 6, 32))


@torch.no_grad()
def test_a_layer_of_low_rank_is_one_whose_projection_is_the_product(make_transformer):
    low, whole = make_transformer(layers=[layer(modulation_rank=4)]), make_transformer(layers=[layer()], seed=1)
    names = [name.removeprefix("blocks.0.") for name in low.state_dict() if "blocks.0.modulation" in name]
    assert names == ["modulation.down.weight", "modulation.up.weight", "modulation.up.bias"]
    whole.load_state_dict({k: v for k, v in low.state_dict().items() if "modulation.down" not in k}, strict=False)
    made, given = whole.blocks[0].modulation, low.blocks[0].modulation
    made.weight.copy_(given.up.weight @ given.down.weight)
    made.bias.copy_(given.up.bias)
    torch.testing.assert_close(output(low), output(whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 4), (4, 6), (2, 8)], ids=str)
@torch.no_grad()
def test_a_layer_on_merged_tokens_hands_back_what_it_adds(make_transformer, grid):
    """Against torch's own pooling and interpolation of images."""
    merging = make_transformer(layers=[layer(token_merge=2)]).blocks[0]
    plain = make_transformer(layers=[layer()]).blocks[0]
    assert merging.state_dict().keys() == plain.state_dict().keys()
    tokens = torch.randn(3, grid[0] * grid[1], 32, generator=torch.Generator().manual_seed(1))
    conditioning = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    means = F.avg_pool2d(tokens.mT.unflatten(2, grid), 2)
    added = plain(means.flatten(2).mT, conditioning) - means.flatten(2).mT
    added = F.interpolate(added.mT.reshape(means.shape), scale_factor=2, mode="nearest").flatten(2).mT
    found = merging(tokens, conditioning, grid=grid)
    torch.testing.assert_close(found, tokens + added, rtol=0, atol=1e-5)
    if grid == (4, 4):
        assert torch.equal(merging(tokens, conditioning), found)


def test_grids_that_cannot_be_merged_are_refused(make_transformer):
    model = make_transformer(layers=[layer(token_merge=2)])
    with pytest.raises(ValueError, match=r"merges 2 × 2 tokens, but their grid is 4 × 5; both sides must be multiples"):
        output(model, *inputs(width=10))
    block, conditioning = model.blocks[0], torch.zeros(1, 32)
    with pytest.raises(ValueError, match="got 24, which make no square; give their grid"):
        block(torch.zeros(1, 24, 32), conditioning)
    with pytest.raises(ValueError, match="their grid is 3 × 3"):
        block(torch.zeros(1, 9, 32), conditioning)


@torch.no_grad()
def test_the_position_bias_of_merged_tokens_is_that_of_their_first_tokens(make_transformer):
    model = make_transformer(position_bias=True, layers=[layer(token_merge=2)])
    bias = model.blocks[0].attn.position_bias
    assert bias.table.shape == (49, 2)
    whole = make_transformer(position_bias=True, layers=[layer()]).blocks[0].attn.position_bias
    whole.table.copy_(bias.table)
    first = torch.tensor([0, 2, 8, 10])  # top left of every 2 × 2 of a 4 × 4 grid
    assert torch.equal(bias(), whole()[:, :, first][..., first])
    assert model_cost(model.config).weights == sum(p.numel() for p in model.parameters())


def test_masked_input_cannot_be_merged(make_transformer):
    layers = [layer(source=[0], token_merge=2), layer(source=[1], modulation_rank=0), layer(source=[2], token_merge=2)]
    config = {"decoder_start": 1, "side_layers": 1, "position_bias": True, "learned_position": True}
    visible = torch.tensor([[0, 2, 5], [1, 2, 3], [7, 8, 15]])
    with pytest.raises(ValueError, match=r"Layer 0 merges 2 × 2 tokens, but a masked input .* teacher layer 1"):
        make_transformer(layers=layers, **config)(*inputs(), visible=visible)
    layers[0].pop("token_merge")  # behind the start of the decoder all tokens are there
    model = make_transformer(layers=layers, **config)
    model(*inputs(), visible=visible).sample.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_layer_starts_as_the_identity_learns_saves_and_loads(make_transformer, tmp_path, name):
    fresh = EdgeDiTTransformer2DModel.from_preset("DiT-debug/2", layers=KINDS[name])
    tokens, conditioning = fresh.embed(*inputs())
    assert all(torch.equal(block(tokens, conditioning), tokens) for block in fresh.blocks)
    model = make_transformer(layers=KINDS[name])
    model(*inputs()).sample.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = EdgeDiTTransformer2DModel.from_pretrained(tmp_path)
    assert again.config.layers == KINDS[name] and torch.equal(output(again), output(model))
    wide = inputs(width=12)
    step = model.precompute_modulation(*wide[1:])[range(3), range(3)]
    expected = output(model, *wide)
    with torch.no_grad():
        torch.testing.assert_close(model(wide[0], None, modulation=step).sample, expected, rtol=0, atol=1e-4)


def test_adapters_low_bit_storage_and_casting_work_with_every_kind_of_layer(make_transformer, tmp_path):
    model = make_transformer(layers=MIXED)
    expected = output(model)
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), "a")
    assert (output(model) - expected).abs().max() > 0.01
    model.disable_adapters()
    assert torch.equal(output(model), expected)
    model.unload_lora()
    model.fuse_gelu()
    torch.testing.assert_close(output(model), expected, rtol=0, atol=1e-5)
    half = copy.deepcopy(model).to(torch.bfloat16)
    x, t, y = inputs()
    assert (output(half, x.bfloat16(), t, y).float() - expected).norm() < 0.05 * expected.norm()
    model.fuse_gelu(False)  # which is not for weights that hooks cast
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert model.blocks[2].modulation.down.weight.dtype == torch.bfloat16
    assert model.blocks[1].modulation.bias.dtype == torch.float32  # no layer of torch's own: it stays
    torch.testing.assert_close(output(model), expected, rtol=0, atol=0.05 * expected.abs().max().item())


# -------------------------------------------------------------------- modulations computed beforehand


@pytest.mark.parametrize("layers", [LAYERS["original"], LAYERS["mixed"], MIXED], ids=["original", "mixed", "kinds"])
@torch.no_grad()
def test_precomputed_modulations_give_the_same_output(make_transformer, layers):
    model = make_transformer(layers=layers)
    timesteps, labels = torch.tensor([999.0, 500.0, 3.0]), torch.tensor([2, 7])
    table = model.precompute_modulation(timesteps, labels)
    assert table.shape == (3, 2, 6 * len(model.blocks) + 2, 32)
    x, _, _ = inputs(batch=2)
    for step, timestep in enumerate(timesteps):
        expected = model(x, timestep, labels).sample
        found = model(x, None, modulation=table[step]).sample
        torch.testing.assert_close(
            found, expected, rtol=0, atol=3e-6 * expected.abs().max().item()
        )  # other shapes, other rounding
    unconditional = make_transformer(num_classes=0)
    step = unconditional.precompute_modulation(timesteps)[1].expand(2, -1, -1)
    torch.testing.assert_close(
        unconditional(x, None, modulation=step).sample, unconditional(x, timesteps[1]).sample, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("layers", [None, [*KINDS["rank 4"][:2], *KINDS["merged tokens"][2:]]], ids=["whole", "ranks"])
def test_the_table_stays_below_the_weights_that_make_it(make_transformer, layers):
    model = make_transformer(layers=layers)
    weights = sum(p.numel() for block in model.blocks for p in block.modulation.parameters())
    for labels in (1, 3, 15):
        table = model.precompute_modulation(torch.arange(model.modulation_steps(labels)), torch.arange(labels) % 10)
        assert table[..., : 6 * len(model.blocks), :].numel() <= weights
    assert model.modulation_steps(1000) == 1


@pytest.mark.parametrize("layers", [None, MIXED], ids=["whole", "kinds"])
@torch.no_grad()
def test_offloaded_modulations_are_read_from_their_file_and_come_back(make_transformer, tmp_path, layers):
    model = make_transformer(layers=layers)
    x, t, y = inputs()
    expected = output(model)
    table = model.precompute_modulation(t, y)
    held = sum(p.numel() for p in model.parameters())
    model.offload_modulation(tmp_path / "modulation.safetensors")
    gone = 4 * 6 * 32 * 33 if layers is None else 6 * 32 * 33 + 6 * 32 + (7 * 32 * 4 + 6 * 32)
    assert held - sum(p.numel() for p in model.parameters()) == gone
    assert torch.equal(model.precompute_modulation(t, y), table)
    rows = torch.arange(3)
    assert torch.allclose(model(x, None, modulation=table[rows, rows]).sample, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"call restore_modulation\(\)|restore_modulation\(\)"):
        model(x, t, y)
    with pytest.raises(ValueError, match="before saving the model"):
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="already"):
        model.offload_modulation(tmp_path / "other.safetensors")
    model.restore_modulation()
    assert torch.equal(output(model), expected) and sum(p.numel() for p in model.parameters()) == held
    content = (tmp_path / "modulation.safetensors").read_bytes()
    with open(
        tmp_path / "modulation.safetensors", "r+b"
    ) as file:  # in place: the weights are memory, not a map of the file
        file.write(b"\xff" * len(content))
        file.truncate(100)
    assert torch.equal(output(model), expected)
    with pytest.raises(ValueError, match="exists; offload_modulation writes a file of its own"):
        model.offload_modulation(tmp_path / "modulation.safetensors")


@torch.no_grad()
def test_another_file_in_the_place_of_offloaded_modulations_is_refused(make_transformer, tmp_path):
    model, other = make_transformer(), make_transformer()
    expected = output(model)
    for each, name in ((model, "ours"), (other, "other")):
        each.offload_modulation(tmp_path / name)
    ours = (tmp_path / "ours").read_bytes()
    others = ((tmp_path / "other").read_bytes(), "is not the file that offload_modulation")
    for content, said in (others, (b"short", "cannot be read"), (None, "cannot be read")):
        (tmp_path / "ours").unlink()
        if content is not None:
            (tmp_path / "ours").write_bytes(content)
        else:
            (tmp_path / "ours").mkdir()
        for use in (model.restore_modulation, lambda: model.precompute_modulation(*inputs()[1:])):
            with pytest.raises(ValueError, match=said):
                use()
    (tmp_path / "ours").rmdir()
    (tmp_path / "ours").write_bytes(ours)
    model.restore_modulation()
    assert torch.equal(output(model), expected)


def test_a_table_that_does_not_fit_is_refused(make_transformer):
    model = make_transformer()
    table = model.precompute_modulation(torch.tensor([1.0]), torch.tensor([1, 2]))
    with pytest.raises(
        ValueError, match=r"modulation has the shape \(2, 26, 32\); this model and batch need \(3, 26, 32\)"
    ):
        model(inputs()[0], None, modulation=table[0])
    with pytest.raises(ValueError, match="visible needs a model with side blocks"):
        model(*inputs(), visible=torch.zeros(3, 4, dtype=torch.long))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_fused_gelu_gives_the_same_output_and_steps_aside_where_it_must(make_transformer, dtype, tolerance):
    model = make_transformer().to(dtype)
    x, t, y = inputs()
    arguments = x.to(dtype), t, y
    expected = output(model, *arguments)
    model.fuse_gelu()
    calls = []
    for block in model.blocks:
        block.mlp.act.register_forward_hook(lambda *_: calls.append(1))
    assert (output(model, *arguments) - expected).norm() <= tolerance * expected.norm()
    # A processor without instructions for bfloat16 has no fused layers in it.
    assert len(calls) == (0 if dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported() else 4)
    calls.clear()
    model(*arguments).sample.float().sum().backward()
    assert len(calls) == 4
    model.add_adapter(LoraConfig(r=2, target_modules=["proj_in"], init_lora_weights=False))
    adapted = output(model, *arguments)
    assert len(calls) == 8 and (adapted - expected).norm() > 10 * tolerance * expected.norm()
    model.unload_lora()
    exported = torch.export.export(model, arguments)
    assert not any("mkldnn" in str(node.target) for node in exported.graph.nodes)
    model.fuse_gelu(False)
    assert torch.equal(output(model, *arguments), expected)


# -------------------------------------------------------------------- what DiT's relatives have


RELATIVES = {
    "long skips": {"long_skips": [[0, 2], [-1, 3]]},
    "learned positions": {"learned_position": True, "position_bias": True},
    "everything": {
        "long_skips": [[0, 1], [-1, 2]],
        "decoder_start": 2,
        "side_layers": 1,
        "learned_position": True,
        "position_bias": True,
    },
}


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_of_dit_count_save_and_learn(make_transformer, name, tmp_path):
    model = make_transformer(**RELATIVES[name])
    assert model_cost(model.config).weights == sum(p.numel() for p in model.parameters())
    plain, flops = make_transformer(), []
    for network in (model, plain):
        with FlopCounterMode(display=False) as counter:
            output(network, *inputs(batch=1))
        flops.append(counter.get_total_flops())
    assert flops[0] - flops[1] == 2 * (model_cost(model.config).macs - model_cost(plain.config).macs)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(EdgeDiTTransformer2DModel.from_pretrained(tmp_path)), output(model))
    visible = torch.tensor([[0, 2, 5], [1, 2, 3], [7, 8, 15]]) if model.config.side_layers else None
    model.train().enable_gradient_checkpointing()
    model(*inputs(), visible=visible).sample.sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert idle == ([] if visible is not None or not model.config.side_layers else ["mask_token"])


def test_layer_features_are_the_layers_inputs_and_outputs(make_transformer):
    model = make_transformer(**RELATIVES["everything"])
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    with torch.no_grad():
        tokens, conditioning = model.embed(*inputs())
        features = model.layer_features(tokens, conditioning)
        expected = list(seen)
        seen.clear()
        output(model)
        shallow = model.layer_features(tokens, conditioning, depth=2)
    assert all(torch.equal(a, b) for pair in zip(zip(*features), expected) for a, b in zip(*pair))
    assert all(torch.equal(a, b) for pair in zip(expected, seen[:4]) for a, b in zip(*pair))
    assert len(shallow[0]) == len(shallow[1]) == 2 and torch.equal(shallow[1][1], features[1][1])


@pytest.mark.parametrize(
    "config, said",
    [
        ({"long_skips": [[2, 1]]}, r"The long skip \[2, 1\]"),
        ({"long_skips": [[0, 9]]}, r"The long skip \[0, 9\]"),
        ({"decoder_start": 7}, "decoder_start is 7"),
        ({"side_layers": 1}, "side_layers is 1, but there is no decoder_start"),
    ],
)
def test_a_structure_that_makes_no_sense_is_refused(make_transformer, config, said):
    with pytest.raises(ValueError, match=said):
        make_transformer(**config)


def test_learned_positions_have_one_size(make_transformer):
    with pytest.raises(ValueError, match="positions are learned: it takes only 8 × 8"):
        output(make_transformer(learned_position=True), *inputs(height=16))


@pytest.mark.parametrize(
    "sizes, said",
    [
        ({"num_layers": 10**9}, "1000000000 layers; at most 4096"),
        ({"sample_size": 400_000}, "sample_size 400000, patch_size 2 and hidden_size 32"),
        ({"hidden_size": 4 * 10**9}, "hidden_size 4000000000"),
        ({"mlp_ratio": 0.01}, "Layer 0: mlp_ratio 0.01 of hidden_size 32 leaves no neuron"),
    ],
    ids=str,
)
def test_sizes_beyond_any_model_are_refused_before_anything_is_allocated(sizes, said):
    with pytest.raises(ValueError, match=said):
        EdgeDiTTransformer2DModel.from_preset("DiT-debug/2", **sizes)
