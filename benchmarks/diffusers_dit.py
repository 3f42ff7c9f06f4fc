"""What the benchmarks of the forward and of sampling share: the same random weights in this package's transformer and
in diffusers'.
"""

import sys
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import DiTTransformer2DModel

from edgedit_hf import EdgeDiTTransformer2DModel

# What diffusers' class computes (its timestep frequencies and one epsilon are not the original's), so that outputs can
# be compared.
DIFFUSERS_NUMERICS = {"frequency_shift": 1.0, "mlp_norm_eps": 1e-5}
# Whether this processor multiplies int8 in tiles: without, int8 is at most 4 times as fast as fp32.
AMX = "amx_int8" in (Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "")


def _fill(model: torch.nn.Module, dtype: torch.dtype, device: str, seed: int) -> torch.nn.Module:
    """Random values for a model without any."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: parameter.shape for name, parameter in model.state_dict().items()}
    state = {name: (0.02 * torch.randn(shape, generator=generator)).to(device, dtype) for name, shape in shapes.items()}
    model.load_state_dict(state, assign=True)
    return _buffers_to(model, device).eval().requires_grad_(False)


def _buffers_to(model: torch.nn.Module, device: str | torch.device) -> torch.nn.Module:
    """Move the buffers in the types they have: the models' own `.to()` warns about the modules that diffusers keeps in
    float32.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to(device)
    return model


def preset_config(preset: str, **config):
    """The config of a preset (but for `config`), without allocating its weights."""
    with init_empty_weights():
        return EdgeDiTTransformer2DModel.from_preset(preset, **config).config


def shortened(name: str, layers: int | None) -> dict:
    """What to change in a preset so that it has what became of the teacher's first so many layers alone."""
    if layers is None:
        return {}
    return {"layers": [layer for layer in preset_config(name).layers if layer["source"][-1] < layers]}


def random_transformer(
    preset: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0, **config
) -> EdgeDiTTransformer2DModel:
    """This package's transformer of a preset's size (but for `config`) with every weight random, as diffusers' class
    would compute it.
    """
    with init_empty_weights():
        model = EdgeDiTTransformer2DModel.from_preset(preset, **DIFFUSERS_NUMERICS, **config)
    return _fill(model, dtype, device, seed)


def _empty_twin(config) -> DiTTransformer2DModel:
    """diffusers' transformer of the same sizes, without weights."""
    with init_empty_weights():
        return DiTTransformer2DModel(
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.hidden_size // config.num_attention_heads,
            in_channels=config.in_channels,
            out_channels=config.in_channels * (2 if config.learn_sigma else 1),
            num_layers=config.num_layers,
            sample_size=config.sample_size,
            patch_size=config.patch_size,
            num_embeds_ada_norm=config.num_classes,
        )


def random_diffusers_transformer(
    preset: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0, **config
) -> DiTTransformer2DModel:
    """diffusers' transformer of a preset's size (but for `config`) with random weights of its own."""
    return _fill(_empty_twin(preset_config(preset, **config)), dtype, device, seed)


def diffusers_twin(model: EdgeDiTTransformer2DModel) -> DiTTransformer2DModel:
    """diffusers' transformer with the weights of `model`, and with its own 28 copies of the embedders, as a checkpoint
    gives it.
    """
    twin = _empty_twin(model.config)
    state = {}

    def put(target: str, source: str) -> None:
        for part in ("weight", "bias"):
            state[f"{target}.{part}"] = model.get_parameter(f"{source}.{part}").clone()

    for target, source in {
        "pos_embed.proj": "patch_embed",
        "proj_out_1": "modulation_out",
        "proj_out_2": "proj_out",
    }.items():
        put(target, source)
    names = {
        "attn1.to_out.0": "attn.to_out",
        "ff.net.0.proj": "mlp.proj_in",
        "ff.net.2": "mlp.proj_out",
        "norm1.linear": "modulation",
    }
    for index, block in enumerate(model.blocks):
        stem = f"transformer_blocks.{index}."
        for target, source in names.items():
            put(stem + target, f"blocks.{index}.{source}")
        for part in ("weight", "bias"):
            chunks = getattr(block.attn.to_qkv, part).chunk(3)
            state.update({f"{stem}attn1.to_{kind}.{part}": chunk.clone() for kind, chunk in zip("qkv", chunks)})
        for number in (1, 2):
            put(f"{stem}norm1.emb.timestep_embedder.linear_{number}", f"timestep_embedder.linear_{number}")
        state[f"{stem}norm1.emb.class_embedder.embedding_table.weight"] = model.label_embedder.weight.clone()
    twin.load_state_dict(state, assign=True)
    return _buffers_to(twin, model.device).eval().requires_grad_(False)


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of the parameters that are held."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def fail(problems: list[str]) -> None:
    """End with exit code 1 and one line a requirement that is not met, if any."""
    for problem in problems:
        print(f"not met: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)
