"""The elastic transformer: counts, sub-networks and their extraction, gradients, text, geometry, loading, bad input."""

import copy
import inspect
import json
import math
import re
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file

from edgedit_hf.models.transformer_elastic_dit import PRESETS, ElasticDiTTransformer2DModel, rotate, rotation_table
from edgedit_hf.quantization.layers import quantizable_layers, quantized_weights
from edgedit_hf.quantization.quantizer import EdgeDiTQuantizationConfig

DEBUG = "elastic-dit-debug"


def make_net(seed: int = 0, **config) -> ElasticDiTTransformer2DModel:
    """A tiny net whose every weight is random: a fresh one predicts zero."""
    net = ElasticDiTTransformer2DModel.from_preset(DEBUG, **config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 1, 8, 12, generator=generator)
    text = [torch.randn(2, 5, 16, generator=generator), torch.randn(2, 7, 24, generator=generator)]
    masks = [torch.tensor([[1, 1, 1, 0, 0], [1] * 5]), torch.tensor([[1] * 7, [1, 1, 0, 0, 0, 0, 0]])]
    return {
        "hidden_states": sample,
        "timestep": torch.tensor([10.0, 700.0]),
        "encoder_hidden_states": text,
        "encoder_attention_mask": masks,
    }


@torch.no_grad()
def run(net, inputs, **changes):
    return net(**{**inputs, **changes}).sample


# -------------------------------------------------------------------- counts


def test_the_published_sizes_and_the_cost_of_being_elastic():
    with torch.device("meta"):
        net = ElasticDiTTransformer2DModel.from_preset("elastic-dit-1.6b")
        counts = {}
        for name in net.subnet_names:
            net.set_active_subnet(name)
            counts[name] = sum(
                p.numel() for p in ElasticDiTTransformer2DModel(**net.active_subnet_config()).parameters()
            )
    assert {name: round(count / 1e9, 1) for name, count in counts.items()} == {"tiny": 0.3, "small": 0.4, "full": 1.6}
    total = sum(p.numel() for p in net.parameters())
    assert 1 < total / counts["full"] <= 1.02 and round(total / 1e9, 1) == 1.6
    assert [len(net.down_blocks), len(net.middle_blocks), len(net.up_blocks)] == [6, 8, 10]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_sound(name):
    with torch.device("meta"):
        net = ElasticDiTTransformer2DModel.from_preset(name)
    assert net.subnet_names == ["tiny", "small", "full"] == [*net.subnet_names[:-1], net.active_subnet]


# -------------------------------------------------------------------- sub-networks


def test_subnets_differ_and_their_extracted_twins_are_equal(inputs):
    net = make_net()
    outputs = {}
    for name in net.subnet_names:
        net.set_active_subnet(name)
        outputs[name] = run(net, inputs)
        twin = net.extract_subnet(name)
        torch.testing.assert_close(run(twin, inputs), outputs[name], atol=1e-5, rtol=0)
        assert dict(twin.config)["subnets"] is None and {**twin.config, **net.active_subnet_config()} == dict(
            twin.config
        )
    for one, other in (("tiny", "small"), ("small", "full"), ("tiny", "full")):
        assert (outputs[one] - outputs[other]).abs().max() > 0.1
    net.set_active_subnet("tiny")
    assert torch.equal(run(net, inputs), outputs["tiny"])  # switching leaves nothing behind


def test_an_extracted_net_owns_its_weights_and_saves_as_an_ordinary_checkpoint(inputs, tmp_path):
    net = make_net()
    twin = net.extract_subnet("small")
    before = run(twin, inputs)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(run(twin, inputs), before)
    twin.save_pretrained(tmp_path)
    names = load_file(tmp_path / "diffusion_pytorch_model.safetensors").keys()
    plain = ElasticDiTTransformer2DModel(**twin.config)
    assert set(names) == set(plain.state_dict()) and not any(
        word in name for name in names for word in ("tiny", "small", "full")
    )
    assert not any(word in (tmp_path / "config.json").read_text() for word in ("tiny", "small", "full", "0.375"))
    assert {type(module).__name__ for module in twin.modules()}.isdisjoint({"ElasticLinear", "PerWidth"})
    loaded = ElasticDiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(run(loaded, inputs), before) and loaded.active_subnet is None and loaded.subnet_names == []
    assert loaded.active_subnet_config() == {k: v for k, v in loaded.config.items() if not k.startswith("_")}


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_loading_a_subnet_reads_only_its_slice(inputs, tmp_path, monkeypatch, sharded):
    net = make_net()
    net.save_pretrained(tmp_path, max_shard_size="100KB" if sharded else "10GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not sharded
    read = []

    class Spy:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            del self.file

        def keys(self):
            return self.file.keys()

        def get_slice(self, name):
            part = self.file.get_slice(name)

            class Part:
                def __getitem__(self, index):
                    tensor = part[index]
                    read.append((name, tensor.numel()))
                    return tensor

            return Part()

    monkeypatch.setattr("edgedit_hf.models.transformer_elastic_dit.safe_open", Spy)
    loaded = ElasticDiTTransformer2DModel.from_pretrained(tmp_path, subnet="small")
    twin = net.extract_subnet("small")
    assert (
        sum(count for _, count in read)
        == sum(p.numel() for p in twin.parameters())
        < 0.4 * sum(p.numel() for p in net.parameters())
    )
    assert not any(".tiny." in name or ".full." in name for name, _ in read)
    assert torch.equal(run(loaded, inputs), run(twin, inputs)) and not loaded.training
    half = ElasticDiTTransformer2DModel.from_pretrained(tmp_path, subnet="tiny", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_supernet_survives_saving(inputs, tmp_path):
    net = make_net()
    net.save_pretrained(tmp_path)
    loaded = ElasticDiTTransformer2DModel.from_pretrained(tmp_path)
    for name in net.subnet_names:
        net.set_active_subnet(name)
        loaded.set_active_subnet(name)
        assert torch.equal(run(loaded, inputs), run(net, inputs))


def test_switching_is_instant_and_copies_nothing():
    net = make_net()
    pointers = [p.data_ptr() for p in net.parameters()]
    seconds = []
    for _ in range(50):
        for name in net.subnet_names:
            start = time.perf_counter()
            net.set_active_subnet(name)
            seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 1e-3
    assert [p.data_ptr() for p in net.parameters()] == pointers


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_a_subnets_loss_sends_no_gradient_outside_its_slice(inputs, name):
    net = make_net()
    net.set_active_subnet(name)
    net(**inputs).sample.square().mean().backward()
    twin = net.extract_subnet(name)
    twin(**inputs).sample.square().mean().backward()
    inside = dict(twin.named_parameters())
    touched = 0
    for key, parameter in net.named_parameters():
        plain = key.replace(f".{name}.", ".")
        if parameter.grad is None:
            assert any(f".{other}." in f".{key}." for other in net.subnet_names if other != name), key
            continue
        expected = torch.zeros_like(parameter)
        expected[tuple(slice(0, size) for size in inside[plain].shape)] = inside[plain].grad
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-4)
        touched += inside[plain].grad.abs().sum().item() > 0
    assert touched == len(inside)  # and every weight of the sub-network learns


def test_a_fresh_net_is_zero_and_still_learns(inputs):
    net = ElasticDiTTransformer2DModel.from_preset(DEBUG)
    assert run(net, inputs).abs().max() == 0
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    target = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(60):
        loss = F.mse_loss(net(**inputs).sample, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# -------------------------------------------------------------------- text


def test_an_absent_encoder_is_one_that_is_masked(inputs):
    net = make_net()
    text, masks = inputs["encoder_hidden_states"], inputs["encoder_attention_mask"]
    nothing = [torch.zeros_like(mask) for mask in masks]
    for keep in ((0,), (1,), ()):
        absent = run(net, inputs, encoder_hidden_states=[text[i] if i in keep else None for i in (0, 1)])
        masked = run(net, inputs, encoder_attention_mask=[masks[i] if i in keep else nothing[i] for i in (0, 1)])
        torch.testing.assert_close(masked, absent, atol=1e-5, rtol=1e-5)
        assert torch.isfinite(absent).all() and (absent - run(net, inputs)).abs().max() > 1e-3
    torch.testing.assert_close(
        run(net, inputs, encoder_hidden_states=None, encoder_attention_mask=None), absent, atol=1e-5, rtol=1e-5
    )


def test_padding_is_not_seen(inputs):
    net = make_net()
    text = [part.clone() for part in inputs["encoder_hidden_states"]]
    text[0][0, 3:] = 100.0
    torch.testing.assert_close(run(net, inputs, encoder_hidden_states=text), run(net, inputs), atol=1e-5, rtol=1e-5)


def test_text_keys_and_values_are_those_of_every_subnet(inputs):
    net = make_net()
    attention, seen = net.middle_blocks[0].cross_attn, {}
    hook = attention.to_v.register_forward_hook(lambda module, args, output: seen.setdefault(net.active_subnet, output))
    for name in net.subnet_names:
        net.set_active_subnet(name)
        run(net, inputs)
    hook.remove()
    assert torch.equal(seen["tiny"], seen["full"]) and torch.equal(seen["small"], seen["full"])


# -------------------------------------------------------------------- geometry


def test_rotary_scores_depend_on_relative_positions_alone():
    cos, sin = rotation_table(6, 5, 1, 8, 100.0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 1, 1, 8, generator=generator), torch.randn(1, 1, 1, 8, generator=generator)
    table = (cos, sin)
    scores = (rotate(query.expand(1, 1, 30, 8), table)[0, 0] @ rotate(key.expand(1, 1, 30, 8), table)[0, 0].T).view(
        6, 5, 6, 5
    )
    assert torch.allclose(scores[0, 0, 2, 1], scores[3, 2, 5, 3], atol=1e-5) and torch.allclose(
        scores[4, 4, 1, 0], scores[5, 4, 2, 0], atol=1e-5
    )
    assert not torch.allclose(scores[0, 0, 2, 1], scores[0, 0, 1, 2], atol=1e-3)  # rows and columns are told apart
    # A token of the coarse grid stands at the centre of the four that it covers: the mean of their angles.
    fine = rotation_table(4, 4, 1, 8, 100.0, torch.device("cpu"))
    coarse = rotation_table(2, 2, 2, 8, 100.0, torch.device("cpu"))
    angle = [torch.atan2(sin, cos) for cos, sin in (fine, coarse)]
    expected = angle[0].view(2, 2, 2, 2, 4).mean(dim=(1, 3)).view(4, 4)
    assert torch.allclose(angle[1], expected, atol=1e-5) and math.isclose(angle[1][0, 0], 0.5, abs_tol=1e-6)


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (6, 16), (14, 2)], ids=str)
def test_any_resolution_and_aspect_ratio(size, inputs):
    net = make_net()
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(2, 1, *size, generator=generator)
    output = net(**{**inputs, "hidden_states": sample}, return_features=True)
    assert output.sample.shape == sample.shape and output.features.shape == (2, size[0] * size[1], net.hidden_size)
    one = run(
        net,
        inputs,
        hidden_states=sample[:1],
        **{k: [t[:1] for t in inputs[k]] for k in ("encoder_hidden_states", "encoder_attention_mask")},
        timestep=inputs["timestep"][:1],
    )
    torch.testing.assert_close(output.sample[:1], one, atol=1e-5, rtol=1e-4)


def test_patches_come_back_to_their_places():
    # With every layer the identity and the output layer undoing the input layer, the net returns its (normed) input:
    # patches keep their places.
    net = ElasticDiTTransformer2DModel.from_preset(DEBUG, patch_size=2, in_channels=3, subnets=None).eval()
    with torch.no_grad():
        torch.nn.init.zeros_(net.up_sample.weight)
        torch.nn.init.eye_(net.patch_embed.weight)
        torch.nn.init.eye_(net.proj_out.weight)
    sample = torch.randn(1, 3, 8, 4, generator=torch.Generator().manual_seed(0))
    patches = F.unfold(sample, 2, stride=2).view(1, 3, 4, 8)  # [B, C, P·P, N]
    vectors = patches.permute(0, 3, 2, 1).reshape(1, 8, 12)
    normed = F.layer_norm(F.pad(vectors, (0, net.hidden_size - 12)), (net.hidden_size,), eps=1e-6)[..., :12]
    # modulation_out is the embedded timestep plus a table of zeros; with no MLP it is zero, so only the norm is left.
    torch.nn.init.zeros_(net.modulation.linear_2.weight)
    expected = F.fold(normed.view(1, 8, 4, 3).permute(0, 3, 2, 1).reshape(1, 12, 8), (8, 4), 2, stride=2)
    with torch.no_grad():
        torch.testing.assert_close(net(sample, torch.tensor([500.0])).sample, expected, atol=1e-5, rtol=1e-5)


def test_modulations_of_a_schedule_at_once(inputs):
    net = make_net()
    for name in net.subnet_names:
        net.set_active_subnet(name)
        table = net.precompute_modulation(inputs["timestep"])
        assert torch.equal(run(net, inputs, timestep=None, modulation=table), run(net, inputs))


def test_gradient_checkpointing_changes_nothing(inputs):
    gradients = []
    for checkpointing in (False, True):
        net = make_net().train()
        if checkpointing:
            net.enable_gradient_checkpointing()
        net.set_active_subnet("small")
        net(**inputs).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-7, rtol=1e-5)


# -------------------------------------------------------------------- the width belongs to the call


@torch.no_grad()
def test_calls_at_once_do_not_mix_their_widths(inputs):
    net = make_net()
    expected = {name: run(net, inputs, subnet=name) for name in net.subnet_names}
    together = threading.Barrier(len(expected), timeout=60)
    handles = [
        module.register_forward_pre_hook(lambda *_: (together.wait(), None)[1])
        for module in (net.down_sample, net.up_blocks[0].mlp.proj_in)
    ]
    with ThreadPoolExecutor(len(expected)) as pool:
        found = dict(zip(expected, pool.map(lambda name: run(net, inputs, subnet=name), expected)))
    for handle in handles:
        handle.remove()
    for name, output in expected.items():
        assert torch.equal(found[name], output), name
        torch.testing.assert_close(output, run(net.extract_subnet(name), inputs), atol=1e-5, rtol=0)
    assert net.active_subnet == "full" and torch.equal(run(net, inputs), expected["full"])


def test_a_switch_reaches_the_calls_that_begin_after_it(inputs):
    net = make_net()
    expected = {name: run(net, inputs, subnet=name) for name in net.subnet_names}
    handle = net.down_sample.register_forward_pre_hook(lambda *_: net.set_active_subnet("tiny"))
    assert torch.equal(run(net, inputs), expected["full"]) and net.active_subnet == "tiny"
    handle.remove()
    assert torch.equal(run(net, inputs), expected["tiny"]) and torch.equal(
        run(net, inputs, subnet="small"), expected["small"]
    )
    assert net.resolve_subnet() == net.active_subnet == "tiny" and net.resolve_subnet("small") == "small"
    with pytest.raises(ValueError, match="'huge'; this net has tiny, small, full"):
        run(net, inputs, subnet="huge")
    with pytest.raises(ValueError, match="'tiny' was asked for, but this is a stand-alone net"):
        run(net.extract_subnet("tiny"), inputs, subnet="tiny")
    table = net.precompute_modulation(inputs["timestep"], subnet="small")
    assert torch.equal(run(net, inputs, timestep=None, modulation=table, subnet="small"), expected["small"])


@pytest.mark.parametrize("name", ["tiny", "small", "full"])
def test_a_checkpoint_computes_again_at_the_width_of_its_forward(inputs, name):
    net = make_net().train()
    net(**inputs, subnet=name).sample.square().mean().backward()
    expected = {key: p.grad for key, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    net.enable_gradient_checkpointing()
    net.set_active_subnet(name)
    losses = [net(**inputs).sample.square().mean()]  # by the default, and by the argument
    net.set_active_subnet({"tiny": "full", "small": "tiny", "full": "tiny"}[name])
    losses.append(net(**inputs, subnet=name).sample.square().mean())
    for loss in losses:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loss.backward).result()
        found = {key: p.grad for key, p in net.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, atol=1e-7, rtol=1e-5)
        net.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_a_compiled_net_runs_the_width_that_is_asked_for(inputs, how):
    torch._dynamo.reset()
    net = make_net(num_layers=[1, 1, 1] if how == "blocks" else [0, 1, 0])
    expected = {name: run(net, inputs, subnet=name) for name in net.subnet_names}
    if how == "whole":
        compiled = torch.compile(net, fullgraph=True, backend="eager")
    else:
        compiled = net
        net.compile_repeated_blocks(fullgraph=True, backend="eager")
    for name in ("tiny", "full", "small", "tiny", "full"):
        assert torch.equal(run(compiled, inputs, subnet=name), expected[name]), name
    for name in ("small", "tiny", "full"):
        compiled.set_active_subnet(name)
        assert torch.equal(run(compiled, inputs), expected[name]), name
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading_at_every_width(inputs, kind):
    net = make_net()
    expected = {name: run(net, inputs, subnet=name) for name in net.subnet_names}
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    net.enable_group_offload(onload_device=torch.device("cpu"), offload_type=kind, **blocks)
    for name in ("full", "tiny", "small", "full"):
        assert torch.equal(run(net, inputs, subnet=name), expected[name]), name


# -------------------------------------------------------------------- the order of modules


@pytest.mark.parametrize(
    "names", [["full", "tiny", "small"], ["small", "full", "tiny"], ["tiny", "small", "full"]], ids="-".join
)
def test_states_of_before_fit_a_net_that_was_saved_and_loaded(inputs, names, tmp_path):
    widths = {"tiny": 0.375, "small": 0.5, "full": 1.0}
    net = make_net(subnets={name: widths[name] for name in names}).train()
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in make_net().named_parameters()]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    ema = EMAModel(net.parameters(), decay=0.5, model_cls=ElasticDiTTransformer2DModel, model_config=net.config)
    for name in net.subnet_names:
        net(**inputs, subnet=name).sample.square().mean().backward()
    optimizer.step()
    ema.step(net.parameters())
    net.save_pretrained(tmp_path / "net")
    assert list(json.loads((tmp_path / "net" / "config.json").read_text())["subnets"]) == sorted(
        widths
    )  # by name: no order to go by
    ema.save_pretrained(tmp_path / "ema")
    loaded = ElasticDiTTransformer2DModel.from_pretrained(tmp_path / "net").train()
    assert [(name, p.shape) for name, p in loaded.named_parameters()] == [
        (name, p.shape) for name, p in net.named_parameters()
    ]
    assert list(loaded.config.subnets) == ["tiny", "small", "full"]
    again = torch.optim.AdamW(loaded.parameters(), lr=1e-2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gradients = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    for model, stepped in ((net, optimizer), (loaded, again)):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        stepped.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), loaded.parameters(), strict=True))
    averages = EMAModel.from_pretrained(tmp_path / "ema", ElasticDiTTransformer2DModel)
    ema.copy_to(loaded.parameters())
    averages.copy_to(net.parameters())
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), loaded.parameters(), strict=True))


def test_a_file_that_would_not_load_is_not_written(tmp_path):
    net = make_net()
    net.up_blocks[0] = torch.compile(net.up_blocks[0], backend="eager")
    with pytest.raises(ValueError, match="_orig_mod stands in the names.*layer._orig_mod"):
        net.save_pretrained(tmp_path)
    net.up_blocks[0] = net.up_blocks[0]._orig_mod
    torch.compile(net, backend="eager").save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "diffusion_pytorch_model.safetensors")) == set(net.state_dict())


# -------------------------------------------------------------------- a sub-network by diffusers' own loader


def test_keys_that_others_put_into_the_config_are_ignored_and_kept(inputs, tmp_path):
    net = make_net()
    net.register_to_config(
        trained_on="digits", decay=0.999, optimization_step=7
    )  # EMAModel.save_pretrained registers its own
    net.save_pretrained(tmp_path)
    twin = net.extract_subnet("small")
    loaded = ElasticDiTTransformer2DModel.from_pretrained(tmp_path, subnet="small")
    whole = ElasticDiTTransformer2DModel.from_pretrained(tmp_path)
    for model in (twin, loaded, whole, whole.extract_subnet("small")):
        assert (model.config.trained_on, model.config.decay, model.config.optimization_step) == ("digits", 0.999, 7)
    assert torch.equal(run(loaded, inputs), run(twin, inputs))
    whole.set_active_subnet("small")
    for make in (lambda config: ElasticDiTTransformer2DModel(**config), ElasticDiTTransformer2DModel.from_config):
        assert {name: p.shape for name, p in make(whole.active_subnet_config()).named_parameters()} == {
            n: p.shape for n, p in twin.named_parameters()
        }
    twin.save_pretrained(tmp_path / "twin")
    assert ElasticDiTTransformer2DModel.from_pretrained(tmp_path / "twin").config.trained_on == "digits"


def quantization() -> EdgeDiTQuantizationConfig:
    return EdgeDiTQuantizationConfig(layers={"proj_out": {"scheme": "affine", "bits": 8}}, default={"scheme": "nf4"})


OPTIONS = {  # of ModelMixin.from_pretrained
    "cache_dir": lambda folder: {"cache_dir": folder / "cache"},
    "ignore_mismatched_sizes": lambda folder: {"ignore_mismatched_sizes": True},
    "force_download": lambda folder: {"force_download": True},
    "proxies": lambda folder: {"proxies": {"https": "localhost:1"}},
    "output_loading_info": lambda folder: {"output_loading_info": True},
    "local_files_only": lambda folder: {"local_files_only": True},
    "token": lambda folder: {"token": "secret"},
    "revision": lambda folder: {"revision": "main"},
    "torch_dtype": lambda folder: {"torch_dtype": torch.bfloat16},
    "dtype": lambda folder: {"dtype": torch.float16},
    "subfolder": lambda folder: {"subfolder": "within"},
    "device_map": lambda folder: {"device_map": "cpu"},
    "max_memory": lambda folder: {"max_memory": {"cpu": "1GB"}, "device_map": "auto"},
    "offload_folder": lambda folder: {"offload_folder": str(folder / "offload"), "device_map": {"": "cpu"}},
    "offload_state_dict": lambda folder: {"offload_state_dict": False, "device_map": "cpu"},
    "low_cpu_mem_usage": lambda folder: {"low_cpu_mem_usage": False},
    "variant": lambda folder: {"variant": "half"},
    "use_safetensors": lambda folder: {"use_safetensors": False, "variant": "pickle"},
    "quantization_config": lambda folder: {"quantization_config": quantization()},
    "disable_mmap": lambda folder: {"disable_mmap": True},
    "flashpack_kwargs": lambda folder: {"flashpack_kwargs": {}},
    "parallel_config": None,  # refused
    "use_flashpack": None,
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Folders of a supernet and of its sub-network "small" alone, each with several kinds of files."""
    folder, net = tmp_path_factory.mktemp("both"), make_net()
    for name, model in (("net", net), ("alone", net.extract_subnet("small"))):
        for where in (folder / name, folder / name / "within"):
            model.save_pretrained(where)
        model.save_pretrained(folder / name, variant="pickle", safe_serialization=False)
        torch.manual_seed(0)
        with torch.no_grad():
            model.proj_out.bias += 1.0
        model.to(torch.bfloat16).save_pretrained(folder / name, variant="half")
        model.save_pretrained(folder / f"{name}-only", variant="half")
        model.save_pretrained(folder / f"{name}-shards", max_shard_size="50KB")
        model.save_pretrained(folder / f"{name}-variant-shards", variant="half", max_shard_size="50KB")
        model.save_pretrained(folder / f"{name}-pickle-shards", safe_serialization=False, max_shard_size="50KB")
    return folder


def same(found, expected) -> None:
    """Equal weights, types, devices, layers and config."""
    ours, theirs = found.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].device) == (tensor.dtype, tensor.device) and torch.equal(
            ours[name], tensor
        ), name
    assert [type(module) for module in found.modules()] == [type(module) for module in expected.modules()]
    assert {**found.config, "_name_or_path": ""} == {
        **expected.config,
        "_name_or_path": "",
    } and found.training == expected.training
    assert getattr(found, "hf_device_map", None) == getattr(expected, "hf_device_map", None)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_diffusers_means_with_subnet_what_it_means_without(both, option, tmp_path):
    load = ElasticDiTTransformer2DModel.from_pretrained
    if OPTIONS[option] is None:
        with pytest.raises(ValueError, match=f"'small' cannot be combined with {option}"):
            load(both / "net", subnet="small", **{option: True})
        return
    found, expected = (
        load(both / name, **given, **OPTIONS[option](tmp_path))
        for name, given in (("net", {"subnet": "small"}), ("alone", {}))
    )
    if option == "output_loading_info":
        assert found[1] == expected[1]
        found, expected = found[0], expected[0]
    same(found, expected)
    if option == "quantization_config":
        assert len(quantized_weights(found)) == len(quantizable_layers(expected)) > 20


def test_no_option_of_diffusers_is_forgotten():
    source = inspect.getsource(ModelMixin.from_pretrained)
    assert set(re.findall(r"""kwargs\.pop\(\s*["'](\w+)["']""", source)) == set(OPTIONS)


@pytest.mark.parametrize(
    "files, given",
    [
        ("only", {"variant": "half"}),
        ("shards", {}),
        ("shards", {"disable_mmap": True}),
        ("variant-shards", {"variant": "half"}),
        ("pickle-shards", {"use_safetensors": False}),
    ],
    ids=str,
)
def test_every_kind_of_checkpoint_holds_a_subnet(both, files, given):
    load = ElasticDiTTransformer2DModel.from_pretrained
    same(load(both / f"net-{files}", subnet="small", **given), load(both / f"alone-{files}", **given))
    if "variant" in given:
        with pytest.raises(OSError, match="no file named"):
            load(both / f"net-{files}", subnet="small")


# -------------------------------------------------------------------- adapters and bad input


ALL_LINEAR = (
    "to_q to_k to_v to_out gate proj_in proj_out hidden skip patch_embed down_sample up_sample projections.0 "
    "projections.1 linear_1 linear_2 projection"
).split()


def lora(**options):
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ALL_LINEAR, "init_lora_weights": False, **options})


def adapted_net(*adapters: str, **options) -> ElasticDiTTransformer2DModel:
    """The net of [`make_net`] with these adapters, each of another rank, the first one on."""
    net = make_net()
    torch.manual_seed(2)
    for index, name in enumerate(adapters):
        net.add_adapter(lora(r=2 + index, **options), name)
    net.set_adapter(adapters[0])
    return net


def merged_by_hand(net, name: str, **scales: float) -> ElasticDiTTransformer2DModel:
    """The stand-alone net of the weights W[:o, :i] + s · B[:o] A[:, :i] of a net's adapters."""
    twin = make_net().extract_subnet(name)
    layers = {key.removesuffix(".lora_A"): layer for key, layer in net.named_modules() if key.endswith(".lora_A")}
    changed = 0
    with torch.no_grad():
        for key, layer in twin.named_modules():
            wrapper = key.replace("modulation.", f"modulation.{name}.")
            if isinstance(layer, torch.nn.Linear) and wrapper in layers:
                rows, columns = layer.weight.shape
                for adapter, scale in scales.items():
                    down = net.get_submodule(f"{wrapper}.lora_A.{adapter}").weight
                    up = net.get_submodule(f"{wrapper}.lora_B.{adapter}").weight
                    layer.weight += scale * up[:rows] @ down[:, :columns]
                changed += 1
    assert changed == sum(isinstance(layer, torch.nn.Linear) for layer in twin.modules()) > 50
    return twin


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ["tiny", "small", "full"])
def test_adapters_are_cut_to_every_width(name, inputs):
    net = adapted_net("one", "two")  # scales 6/2 and 6/3
    before, expected = run(make_net(), inputs, subnet=name), run(merged_by_hand(net, name, one=3.0), inputs)
    assert (expected - before).norm() > 0.1 * before.norm()
    assert_near(run(net, inputs, subnet=name), expected)
    net.set_adapter("two")
    assert_near(run(net, inputs, subnet=name), run(merged_by_hand(net, name, two=2.0), inputs))
    net.set_adapters(["one", "two"], [0.5, -2.0])
    both = run(merged_by_hand(net, name, one=1.5, two=-4.0), inputs)
    assert_near(run(net, inputs, subnet=name), both)
    net.disable_adapters()
    assert torch.equal(run(net, inputs, subnet=name), before)  # adapters that are off leave every width alone
    net.enable_adapters()
    net.fuse_lora()
    assert_near(run(net, inputs, subnet=name), both)
    net.unfuse_lora()
    net.unload_lora()
    assert_near(run(net, inputs, subnet=name), before)


def test_adapters_are_merged_before_a_net_is_extracted_or_saved(inputs, tmp_path):
    net = adapted_net("style")
    narrow = run(net, inputs, subnet="tiny")
    with pytest.raises(ValueError, match="unload_lora"):
        net.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="fuse_lora"):
        net.extract_subnet("tiny")
    net.fuse_lora()
    net.unload_lora()
    assert_near(run(net.extract_subnet("tiny"), inputs), narrow)
    net.save_pretrained(tmp_path)
    loaded = ElasticDiTTransformer2DModel.from_pretrained(tmp_path, subnet="tiny")
    assert_near(run(loaded, inputs), narrow)
    loaded.add_adapter(lora())
    assert (run(loaded, inputs) - narrow).norm() > 0.1 * narrow.norm()  # a stand-alone net has its own


def test_adapters_that_peft_itself_adds_with_a_bias_and_rank_stabilised_run_at_every_width(inputs):
    net, plain = make_net(), make_net()
    torch.manual_seed(2)
    inject_adapter_in_model(lora(lora_bias=True, use_rslora=True, target_modules=["to_q", "to_out"]), net, "style")
    with torch.no_grad():
        for key, layer in list(net.named_modules()):
            if hasattr(layer, "lora_A"):
                down, up, scale = layer.lora_A["style"].weight, layer.lora_B["style"], 6 / math.sqrt(2)
                plain.get_submodule(key).weight += scale * up.weight @ down
                plain.get_submodule(key).bias += scale * up.bias
    for name in plain.subnet_names:
        assert_near(run(net, inputs, subnet=name), run(plain.extract_subnet(name), inputs))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_narrow_adapter_are_those_of_the_formula(checkpointing, inputs):
    net = adapted_net("style").train()
    net.gradient_checkpointing = checkpointing
    if checkpointing:
        net.enable_gradient_checkpointing()
    net(**inputs, subnet="small").sample.square().sum().backward()
    plain = make_net().requires_grad_(False)
    factors, changes = {}, {}
    for key, layer in net.named_modules():
        if hasattr(layer, "lora_A"):
            pair = layer.lora_A["style"].weight, layer.lora_B["style"].weight
            factors[key] = down, up = [tensor.detach().clone().requires_grad_() for tensor in pair]
            changes[f"{key}.weight"] = plain.get_submodule(key).weight + 3.0 * up @ down
    torch.func.functional_call(plain, changes, kwargs={**inputs, "subnet": "small"}).sample.square().sum().backward()
    for key, (down, up) in factors.items():
        layer = net.get_submodule(key)
        for ours, theirs in ((layer.lora_A["style"].weight, down), (layer.lora_B["style"].weight, up)):
            there = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            ours = torch.zeros_like(there) if ours.grad is None else ours.grad
            torch.testing.assert_close(ours, there, rtol=1e-3, atol=1e-4 * there.abs().max().item() + 1e-9)
        assert all(parameter.grad is None for parameter in layer.base_layer.parameters())
    down, up = factors["down_blocks.0.attn.to_q"]
    assert down.grad[:, :32].abs().min() > 0 and not down.grad[:, 32:].any() and not up.grad[32:].any()


def test_narrow_adapters_work_under_autocast_offloading_and_torch_compile(inputs):
    net = adapted_net("style", target_modules=r"(down|middle)_blocks.*(to_[qv]|to_out|proj_in)")
    expected = run(net, inputs, subnet="tiny")
    with torch.autocast("cpu", torch.bfloat16):
        close = run(net, inputs, subnet="tiny")
    assert (close - expected).norm() < 0.05 * expected.norm()
    half = copy.deepcopy(net).to(torch.bfloat16)
    for key, parameter in half.named_parameters():
        if ".lora_" in key:
            parameter.data = parameter.data.float()
    close = run(half, {**inputs, "hidden_states": inputs["hidden_states"].bfloat16()}, subnet="tiny")
    assert close.dtype == torch.bfloat16 and (close - expected).norm() < 0.1 * expected.norm()
    mlp, tokens = net.down_blocks[0].mlp, torch.randn(2, 3, 24)
    assert_near(torch.compile(mlp, backend="eager", fullgraph=True)(tokens, "tiny"), mlp(tokens, "tiny"))
    offloaded = accelerate.cpu_offload(net, torch.device("cpu"))
    assert offloaded.down_blocks[0].attn.to_q.lora_A["style"].weight.is_meta
    assert_near(run(offloaded, inputs, subnet="tiny"), expected)


def test_adapters_that_cannot_be_cut_are_explained(inputs):
    for config, kind in (
        (lora(use_dora=True, target_modules=["to_q"]), "DoraLinearVariant"),
        (LoHaConfig(r=2, target_modules=["to_q"], init_weights=False), "peft.tuners.loha.layer.Linear"),
    ):
        net = make_net()
        net.add_adapter(config, "style")
        with pytest.raises(ValueError, match=f"'style' is of the kind .*{kind}.*fuse_lora.*disable_adapters"):
            run(net, inputs, subnet="tiny")
        assert (run(net, inputs) - run(make_net(), inputs)).abs().max() > 1e-4
        net.disable_adapters()
        assert torch.equal(run(net, inputs, subnet="tiny"), run(make_net(), inputs, subnet="tiny"))
    net = make_net()
    net.add_adapter(lora(use_dora=True, target_modules=["linear_1"]), "style")  # a width has its own of these
    assert run(net, inputs, subnet="tiny").isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(2, 1, 8, 7)}, r"\(2, 1, 8, 7\).*multiples of 2"),
        ({"hidden_states": torch.zeros(2, 3, 8, 8)}, r"\(2, 3, 8, 8\).*needs 1 channels"),
        ({"encoder_hidden_states": [torch.zeros(2, 5, 16)]}, "1 text embeddings.*2 text encoders"),
        ({"encoder_hidden_states": [torch.zeros(2, 5, 17), None]}, r"\[0\].*\(2, 5, 17\).*\(2, tokens, 16\)"),
        ({"encoder_attention_mask": [torch.ones(2, 4), None]}, r"mask\[0\].*\(2, 4\).*\(2, 5\)"),
    ],
    ids=["odd", "channels", "encoders", "width", "mask"],
)
def test_bad_forward_input_is_explained(inputs, change, message):
    with pytest.raises(ValueError, match=message):
        make_net()(**{**inputs, **change})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"subnets": {"s": 0.4, "full": 1.0}},
            r"width 0.4 \(s\) the 16 heads become 6.4 and the 8 key/value heads 3.2",
        ),
        ({"subnets": {"s": 0.5}}, "one must be 1.0"),
        ({"subnets": {"a.b": 0.5, "full": 1.0}}, "'a.b'"),
        ({"subnets": {"keys": 0.5, "full": 1.0}}, "'keys'"),
        ({"num_text_key_value_heads": 4}, "6 query heads, which 3 key/value heads and 4 of the text must divide"),
        ({"attention_head_dim": 6}, "attention_head_dim is 6"),
        ({"num_layers": [1, 2]}, r"\[1, 2\].*three values"),
        ({"mlp_ratios": [4.0, 3.3, 4.0]}, "ratio 3.3"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_configs_are_explained(config, message):
    with pytest.raises(ValueError, match=message):
        ElasticDiTTransformer2DModel.from_preset(DEBUG, **config)


def test_layers_that_cannot_be_cut_are_explained(inputs):
    net = make_net()
    net.quantization_method = "bitsandbytes"  # needs a GPU to be more than a name
    with pytest.raises(
        ValueError, match="quantised by bitsandbytes.*sub-network 'tiny'; load that alone.*or run 'full'"
    ):
        run(net, inputs, subnet="tiny")
    assert run(net, inputs).isfinite().all()


def test_unknown_names_are_explained(tmp_path):
    net = make_net()
    for call in (net.set_active_subnet, net.extract_subnet):
        with pytest.raises(ValueError, match="'huge'; this net has tiny, small, full"):
            call("huge")
    twin = net.extract_subnet("tiny")
    with pytest.raises(ValueError, match="stand-alone"):
        twin.set_active_subnet("tiny")
    with pytest.raises(ValueError, match="no preset 'elastic'.*elastic-dit-1.6b"):
        ElasticDiTTransformer2DModel.from_preset("elastic")
    net.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'huge'.*tiny, small, full"):
        ElasticDiTTransformer2DModel.from_pretrained(tmp_path, subnet="huge")
    with pytest.raises(ValueError, match="cannot be combined with use_flashpack"):
        ElasticDiTTransformer2DModel.from_pretrained(tmp_path, subnet="tiny", use_flashpack=True)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cannot be read"):
        ElasticDiTTransformer2DModel.from_pretrained(tmp_path, subnet="tiny")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "subnets": None}))
    with pytest.raises(ValueError, match="is a stand-alone net"):
        ElasticDiTTransformer2DModel.from_pretrained(tmp_path, subnet="tiny")
